"""LaMP's own files of answers, gold or predicted, and LaMP's own way of scoring the one against the other."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import DataError
from shared.files import write_atomically

MOVIE_TAGS = (
    "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
    "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
)  # fmt: skip
NEWS_CATEGORIES = (
    "women", "religion", "politics", "style & beauty", "entertainment", "culture & arts", "sports",
    "science & technology", "travel", "business", "crime", "education", "healthy living", "parents", "food & drink",
)  # fmt: skip
LABELS: Mapping[int, Sequence[tuple[str, ...]]] = {1: [("[1]", "[2]")], 2: [MOVIE_TAGS, NEWS_CATEGORIES]}
LOW, HIGH = 1.0, 5.0  # the scale of LaMP-3
_TASK = re.compile(r"LaMP[-_]([1-7])[MN]?")
_SHOWN = 5  # ids in a message


@dataclass(frozen=True)
class Answers:
    """A file of answers.

    Attributes:
        task: Number of the task, 1 to 7.
        outputs: Id of a question -> its answer, in the file's order.
    """

    task: int
    outputs: Mapping[str, str]


def read_answers(path: Path) -> Answers:
    """Read gold answers or predictions: ``{"task": "LaMP_3", "golds": [{"id": "310", "output": "2"}]}``.

    Raises:
        DataError: The file cannot be read, is no such object, or answers a question twice.

    Source:
        Salemi et al. 2024, LaMP: When Large Language Models Meet Personalization, arXiv:2304.11406, and its files.
    """
    try:
        found: Any = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} must be readable, got: {error.strerror}; name a file of LaMP answers.") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} must be JSON, got something else; name a file of LaMP answers.") from None
    if not (isinstance(found, dict) and isinstance(found.get("golds"), list)):
        raise DataError(f'{path} must hold an object {{"task": …, "golds": […]}}, got another; name such a file.')
    named = _TASK.fullmatch(str(found.get("task")))
    if not named:
        raise DataError(f"{path}: task must be LaMP_1 to LaMP_7, got {str(found.get('task'))[:20]!r}; mend the file.")
    outputs: dict[str, str] = {}
    for number, each in enumerate(found["golds"], start=1):
        if not (isinstance(each, dict) and all(_is_plain(each.get(key)) for key in ("id", "output"))):
            raise DataError(f"{path}, answer {number}: must be an object with id and output, got another; mend it.")
        name = str(each["id"])
        if name in outputs:
            raise DataError(f"{path}, answer {number}: an id must occur once, got {name[:40]!r} again; leave one.")
        outputs[name] = str(each["output"])
    return Answers(int(named[1]), outputs)


def write_answers(path: Path, answers: Answers) -> None:
    """Write answers as LaMP has them; the file is whole or absent."""
    golds = [{"id": name, "output": output} for name, output in answers.outputs.items()]
    write_atomically(path, json.dumps({"task": f"LaMP_{answers.task}", "golds": golds}, ensure_ascii=False).encode())


def score(predicted: Answers, gold: Answers, *, labels: Sequence[str] = ()) -> dict[str, float]:
    """Score predictions as LaMP does.

    Args:
        predicted: Answers to exactly the questions of ``gold``.
        gold: The right ones.
        labels: Of tasks 1 and 2, where the gold answers are of another list than LaMP's own.

    Returns:
        Tasks 1 and 2: ``accuracy`` and ``f1``, its mean over the whole label list, an unknown prediction being wrong
        for every label. Task 3: ``MAE`` and ``RMSE``; a prediction that is no number counts as the end of the scale
        that is farther from the gold score, as 5 where both are equally far. Tasks 4 to 7: ``rouge-1`` and
        ``rouge-L``, the mean F-measures over the questions, without stemming.

    Raises:
        DataError: Another task, other questions, none, or a gold answer that is none of the labels or no score.

    Source:
        Salemi et al. 2024, arXiv:2304.11406, §3, and the evaluation script beside it. There, nan and inf are numbers;
        here they are none. There, ROUGE is the median of bootstrapped means; here it is the mean they estimate.

    Example:
        >>> gold = Answers(3, {"a": "2", "b": "5"})
        >>> score(Answers(3, {"a": "3", "b": "five stars"}), gold)
        {'MAE': 2.5, 'RMSE': 2.9154759474226504}
    """
    if predicted.task != gold.task:
        raise DataError(f"predictions must be of LaMP_{gold.task} as the golds are, got LaMP_{predicted.task}.")
    if not gold.outputs:
        raise DataError("there must be at least one gold answer, got none; name a file that holds some.")
    check_ids(predicted.outputs, gold.outputs, what="predictions")
    pairs = [(predicted.outputs[name].strip(), output.strip()) for name, output in gold.outputs.items()]
    if gold.task in LABELS:
        return _score_labels(pairs, tuple(labels) or _labels(gold))
    return _score_numbers(pairs) if gold.task == 3 else _score_texts(pairs)


def check_ids(given: Iterable[str], wanted: Iterable[str], *, what: str) -> None:
    """Refuse, with names, where two sets of ids differ.

    Example:
        >>> check_ids(["1", "3"], ["1", "2"], what="predictions")
        Traceback (most recent call last):
        shared.errors.DataError: predictions must have the ids of the questions, got 1 too few ('2'), 1 too many ('3').
    """
    has, needs = dict.fromkeys(given), dict.fromkeys(wanted)
    missing, unknown = [n for n in needs if n not in has], [n for n in has if n not in needs]
    if missing or unknown:
        parts = [
            f"{len(names):,} too {word} ({', '.join(repr(n[:40]) for n in names[:_SHOWN])}"
            f"{', …' if len(names) > _SHOWN else ''})"
            for word, names in (("few", missing), ("many", unknown))
            if names
        ]
        raise DataError(f"{what} must have the ids of the questions, got {', '.join(parts)}.")


def stars(text: str) -> float | None:
    """The score that a text states, None where it is no finite number.

    Example:
        >>> stars(" 4.5"), stars("four"), stars("nan")
        (4.5, None, None)
    """
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _labels(gold: Answers) -> tuple[str, ...]:
    found = {output.strip() for output in gold.outputs.values()}
    for labels in LABELS[gold.task]:
        if found <= set(labels):
            return labels
    raise DataError(f"gold answers must all be of LaMP-{gold.task}'s labels, got others; name theirs with --labels.")


def _score_labels(pairs: Sequence[tuple[str, str]], labels: tuple[str, ...]) -> dict[str, float]:
    if not {gold for _, gold in pairs} <= set(labels):
        raise DataError(f"every gold answer must be one of the {len(labels)} labels, got another; name them all.")
    hits, found, truth = (
        Counter(a for a, b in pairs if a == b),
        Counter(a for a, _ in pairs),
        Counter(b for _, b in pairs),
    )
    f1 = (2 * hits[label] / max(1, found[label] + truth[label]) for label in labels)
    return {"accuracy": hits.total() / len(pairs), "f1": math.fsum(f1) / len(labels)}


def _score_numbers(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    errors = []
    for answer, gold in pairs:
        truth, number = stars(gold), stars(answer)
        if truth is None:
            raise DataError("every gold score must be a number, got another; compare the file with the published one.")
        if number is None:
            number = LOW if truth - LOW > HIGH - truth else HIGH
        errors.append(abs(number - truth))
    return {"MAE": math.fsum(errors) / len(errors), "RMSE": math.sqrt(math.fsum(e * e for e in errors) / len(errors))}


def _score_texts(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    from shared.metrics.text import rouge  # a device reads this module and has no such package

    kinds = {"rouge-1": "rouge1", "rouge-L": "rougeL"}
    return {
        name: math.fsum(rouge(answer, gold, kind) for answer, gold in pairs) / len(pairs)
        for name, kind in kinds.items()
    }


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)
