"""LaMP around a run: predictions in LaMP's own files, and stand-ins in LaMP's format made of other data."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from shared.assets import resolve
from shared.config import Scenario
from shared.datasets import Dataset, Record, read
from shared.datasets.lamp import PUBLIC, question_labels
from shared.errors import DataError, ScenarioError
from shared.metrics.lamp import HIGH, LOW, Answers, write_answers

PREDICTIONS = "predictions.json"
TAGS = ("loved", "fine", "disliked")
SPLITS = ("time", "user")
_AROUND = 0.5  # stars from a user's own mean that are still around it
_DEV_EVERY = 5  # user-based split: every fifth user is asked, the others are the split train
_ASK_SCORE = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without further "
    "explanation. review: "
)
_ASK_TAG = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
    f"explanation. tags: [{', '.join(TAGS)}] description: "
)
_ASK_HEADLINE = "Generate a headline for the following article: "


def write_predictions(scenario: Scenario, dataset: Dataset, row: Any, *, folder: Path) -> Path | None:
    """Write a row of a run on LaMP's files as a file of LaMP answers, for LaMP's own scoring.

    Args:
        scenario: Of the run.
        dataset: What it was run on.
        row: Of task rating, the predicted scores (n,) of every test record, users in order; of task tagging, the
            places (n,) of the predicted labels in the task's list, or a number for every label (n, K), the largest
            being the predicted one's.
        folder: Of the run.

    Returns:
        The file; None where the data are not LaMP-2 read for tagging, or LaMP-3 for rating.
    """
    names = [record.item for user in dataset.users for record in user.test]
    if (dataset.name, scenario.task.name) == ("lamp-3", "rating"):
        outputs = [repr(float(score)) for score in row]
    elif (dataset.name, scenario.task.name) == ("lamp-2", "tagging"):
        labels = question_labels(resolve(scenario.data.source))
        places = np.asarray(row)
        outputs = [labels[int(place)] for place in (places.argmax(axis=1) if places.ndim == 2 else places)]
    else:
        return None
    path = folder / PREDICTIONS
    write_answers(path, Answers(int(dataset.name[-1]), dict(zip(names, outputs, strict=True))))
    return path


def write_answers_of_row(
    scenario: Scenario, dataset: Dataset, items: Sequence[str], answers: Sequence[str], *, folder: Path
) -> Path | None:
    """Write answers in words as a file of LaMP answers; None where the data are not LaMP-4 to 7.

    Args:
        scenario: Of the run.
        dataset: What it was run on.
        items: Id (n,) of each question.
        answers: To them.
        folder: Of the run.
    """
    if dataset.name not in ("lamp-4", "lamp-5", "lamp-6", "lamp-7") or scenario.task.name != "generation":
        return None
    path = folder / PREDICTIONS
    write_answers(path, Answers(int(dataset.name[-1]), dict(zip(items, answers, strict=True))))
    return path


def check_labels(scenario: Scenario) -> None:
    """Refuse a scenario whose labels are not those that the questions of its LaMP-2 files name, in their order.

    Raises:
        ScenarioError: Another list, or another order.
        DataError: As ``read_lamp``.
    """
    if (scenario.data.format, scenario.task.name) != ("lamp-2", "tagging"):
        return
    labels = question_labels(resolve(scenario.data.source))
    if scenario.task.labels != labels:
        raise ScenarioError(
            f"task.labels must be those of the questions in {scenario.data.source}, in their order: "
            f"{json.dumps(labels, ensure_ascii=False)}; got {json.dumps(scenario.task.labels, ensure_ascii=False)}."
        )


@dataclass(frozen=True)
class Made:
    """What ``make`` wrote: the folder, questions by split, profile items over all of them, and public texts."""

    folder: Path
    questions: dict[str, int]
    items: int
    public_texts: int


@dataclass(frozen=True)
class _Form:
    """How records are put as one of LaMP's tasks."""

    number: int
    ask: str
    text: str
    answer: str
    answers: Callable[[Sequence[Record]], list[str]]  # of one user's records, the question's last
    kept: Callable[[Sequence[Record]], tuple[Record, ...]] = tuple  # those a question or a profile can be made of


def make(format: str, source: str, *, task: str, out: Path, split: str = "time", quiet: bool = False) -> Made:
    """Write a stand-in for LaMP-2, 3 or 4, in LaMP's format, of what another reader reads.

    LaMP's own files may not be passed on. A stand-in has their form and none of their content: its numbers say nothing
    about LaMP.

    Args:
        format: Of the data, a name in ``READERS``.
        source: ``asset:NAME`` or a folder.
        task: ``lamp-3``: a text's score is its rating. ``lamp-2``: its tag is ``loved``, ``fine`` or ``disliked``, as
            the rating is above, within half a point of or below the mean of all this user's ratings but the last.
            ``lamp-4``: a text's headline is its response; records without a text or a response are left out.
        out: A folder that does not exist.
        split: ``time``: a user's last record is the question of split dev, the one before it that of split train, and
            questions have a ``user_id``, profile items a date. ``user``: every fifth user's last record is a question
            of split dev, the other users' of split train; neither user_id nor dates.
        quiet: Show nothing while downloading.

    Raises:
        AssetError: The source cannot be had.
        DataError: It is not as its format says, holds no such records or no user with two, or ``out`` exists.
    """
    form = FORMS[task]
    if out.exists():
        raise DataError(f"--out must name a folder that does not exist yet, got {out}; name another, or remove it.")
    dataset = read(format, resolve(source, quiet=quiet))
    whole = {user.user: form.kept(user.train + user.test) for user in dataset.users}
    histories = [_History(user, rows, form.answers(rows)) for user, rows in whole.items() if len(rows) >= 2]
    if not histories:
        raise DataError(
            f"data of format {format!r} must hold a user with two records or more that {task} can be made of, got none."
        )
    asked = _by_time(histories) if split == "time" else _by_user(histories)
    public = tuple(dict.fromkeys(_line(text) for text in dataset.public_texts))
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    scratch.mkdir()
    try:
        items = sum(
            _write_split(scratch, name, form, each, dated=split == "time") for name, each in asked.items() if each
        )
        (scratch / "README.txt").write_text(
            f"Not LaMP: a stand-in in the format of {task.replace('lamp', 'LaMP')}, made of {format} by sottovoce lamp "
            "make. The licence is that of the data it was made of.\n",
            encoding="utf-8",
        )
        if public:
            (scratch / PUBLIC).write_text("".join(f"{text}\n" for text in public), encoding="utf-8")
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return Made(out, {name: len(records) for name, records in asked.items()}, items, len(public))


@dataclass(frozen=True)
class _History:
    """A user's records in the order of time with their answers; the last is the question."""

    user: str
    records: tuple[Record, ...]
    answers: list[str]


def _by_time(everybody: Sequence[_History]) -> dict[str, list[_History]]:
    before = [_History(each.user, each.records[:-1], each.answers[:-1]) for each in everybody]
    return {"train": [each for each in before if len(each.records) >= 2], "dev": list(everybody)}


def _by_user(everybody: Sequence[_History]) -> dict[str, list[_History]]:
    return {
        "train": [each for i, each in enumerate(everybody) if i % _DEV_EVERY],
        "dev": list(everybody[::_DEV_EVERY]),
    }


def _write_split(folder: Path, split: str, form: _Form, asked: Sequence[_History], *, dated: bool) -> int:
    """Write questions and answers of a split; returns the number of profile items."""
    gold: dict[str, str] = {}
    items = 0
    with (folder / f"{split}_questions.json").open("w", encoding="utf-8") as file:
        for i, each in enumerate(asked, start=1):
            name, records, answers = f"{i}0", each.records, each.answers
            profile = [
                {"id": f"{name}{n}", form.text: _line(record.text), form.answer: answer}
                | (_date(record) if dated else {})
                for n, (record, answer) in enumerate(zip(records[:-1], answers[:-1], strict=True))
            ]
            question = {"id": name, "input": form.ask + _line(records[-1].text), "profile": profile}
            file.write("[\n" if i == 1 else ",\n")
            json.dump(question | ({"user_id": each.user} if dated else {}), file, ensure_ascii=False)
            gold[name] = answers[-1]
            items += len(profile)
        file.write("\n]\n")
    write_answers(folder / f"{split}_outputs.json", Answers(form.number, gold))
    return items


def _scores(records: Sequence[Record]) -> list[str]:
    for record in records:
        if record.response or record.target not in range(int(LOW), int(HIGH) + 1):
            raise DataError("LaMP-3 needs ratings of 1, 2, 3, 4 or 5, got something else; name other data with --from.")
    return [str(int(record.target)) for record in records]


def _tags(records: Sequence[Record]) -> list[str]:
    if any(record.response for record in records):
        raise DataError(
            "LaMP-2 is made of ratings, got texts that users answer with texts; name other data with --from."
        )
    before = records[:-1]
    mean = sum(record.target for record in before) / len(before)
    return [_tag(record.target - mean) for record in records]


def _tag(apart: float) -> str:
    """How a user takes a film, by the stars it has above the user's mean."""
    loved, fine, disliked = TAGS
    return loved if apart > _AROUND else disliked if apart < -_AROUND else fine


def _answered(records: Sequence[Record]) -> tuple[Record, ...]:
    return tuple(record for record in records if record.text.strip() and record.response.strip())


def _headlines(records: Sequence[Record]) -> list[str]:
    return [_line(record.response) for record in records]


def _date(record: Record) -> dict[str, str]:
    return {"date": f"{datetime.fromtimestamp(record.timestamp, UTC):%Y-%m-%d}"}


def _line(text: str) -> str:
    return " ".join(text.split())


FORMS = {
    "lamp-2": _Form(2, _ASK_TAG, "description", "tag", _tags),
    "lamp-3": _Form(3, _ASK_SCORE, "text", "score", _scores),
    "lamp-4": _Form(4, _ASK_HEADLINE, "text", "title", _headlines, _answered),
}
