"""Answers in words to test prompts, by the runtime of the devices, scored against what the users wrote themselves."""

import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from client.export.private_head import language_parts
from client.runtime.generation import Generator, spell
from client.runtime.language import LanguageBase, open_lm_base
from client.training.site import resident_base
from shared.config import Scenario
from shared.datasets import Dataset, Record
from shared.files import write_atomically
from shared.heads.adapter import load_shared
from shared.heads.causal import CausalHead
from shared.metrics.ratings import Interval
from shared.metrics.text import TEXT_METRICS, Tokens, judge_named, over_answers, score_answers
from shared.models.model import Base
from shared.progress import track
from simulations.campaigns import Result
from simulations.lamp import write_answers_of_row
from simulations.observe.language import PROFILE, LanguageObserver

ANSWERS = "answers.json"
_PAIRS = (("personal", "base"), ("personal", "federated"), ("federated", "base"))  # whose answers a judge compares
_ENCODED_TOKENS = 128  # of an answer, for BERTScore


def measure_answers(
    scenario: Scenario, base: Base, dataset: Dataset, result: Result, *, folder: Path, quiet: bool
) -> dict[str, Any]:
    """Let base, shared and private part answer the first test prompts of every user, greedily, and score the answers.

    Args:
        scenario: ``evaluation.answers`` prompts a user, answers of at most ``evaluation.answer_tokens`` tokens.
        base: The frozen base.
        dataset: Its test records are asked.
        result: The finished campaign of the first seed.
        folder: Of the run; gets ``answers.json``, and LaMP's file of predictions where the data are LaMP's.
        quiet: No progress on stderr.

    Returns:
        ``answers`` of the summary; nothing where none are asked for.

    Raises:
        HeadError: The exported base does not answer as torch does.
    """
    count = scenario.evaluation.answers
    if not count or scenario.task.name != "generation":
        return {}
    observer = cast(LanguageObserver, result.observer)
    asked = {addition: _first(shown, count) for addition, shown in observer.asked().items()}
    with tempfile.TemporaryDirectory(prefix="sottovoce-answers-") as made:
        fleet = _export(observer, scenario, base, dataset, Path(made))
        rows = _answer(observer, result, fleet, base, asked, quiet=quiet)
    owners = np.array([user for user, _ in asked[""]], dtype=np.int64)
    records = [record for _, record in asked[""]]
    _keep(folder / ANSWERS, dataset, asked[""], rows)
    best = f"personal{PROFILE}" if f"personal{PROFILE}" in rows else "personal"
    write_answers_of_row(scenario, dataset, [record.item for record in records], rows[best], folder=folder)
    embed = partial(token_states, resident_base(scenario.prompt.encoder))
    scoring: dict[str, Any] = {"seed": scenario.seed, "resamples": scenario.evaluation.bootstrap_resamples}
    own = [record.response for record in records]
    scores = {name: score_answers(row, own, owners, embed=embed, **scoring) for name, row in rows.items()}
    pairs = [pair for pair in (*_PAIRS, (f"personal{PROFILE}", "base")) if pair[0] in rows]
    wins = {f"{a} - {b}": _wins(scenario, records, rows[a], rows[b], owners, embed, scoring) for a, b in pairs}
    return {
        "answers": {
            "per_user": count,
            "answers": len(records),
            "users": len(set(owners.tolist())),
            "longest": scenario.evaluation.answer_tokens,
            "metrics": {name: asdict(each) for name, each in TEXT_METRICS.items()},
            "rows": {name: {metric: asdict(value) for metric, value in each.items()} for name, each in scores.items()},
            "judge": scenario.evaluation.judge,
            "win_rates": {pair: asdict(rate) for pair, rate in wins.items()},
        }
    }


@torch.inference_mode()
def token_states(base: Base, texts: Sequence[str]) -> list[np.ndarray]:
    """States (T, d) of the tokens of texts after an encoder's last block, without its own two special tokens."""
    found = []
    for ids in base.tokenize(list(texts), max_tokens=_ENCODED_TOKENS):
        mask = torch.ones(1, len(ids), dtype=torch.bool)
        hidden = base.family.embed(base.model, torch.tensor([ids]))
        for block in base.family.blocks(base.model):
            hidden = base.family.run(base.model, block, hidden, mask)
        found.append(base.family.finish(base.model, hidden)[0, 1:-1].numpy())
    return found


def _first(dataset: Dataset, count: int) -> list[tuple[int, Record]]:
    """The first so many test records of every user, with the user's index."""
    return [(i, record) for i, user in enumerate(dataset.users) for record in user.test[:count]]


def _export(observer: LanguageObserver, scenario: Scenario, base: Base, dataset: Dataset, folder: Path) -> LanguageBase:
    from simulations.heads import export_base, probe_texts  # onnx is slow to import

    export_base(observer.head, scenario, base, folder, probe_texts(dataset))
    return open_lm_base(folder / "base")


def _answer(
    observer: LanguageObserver,
    result: Result,
    fleet: LanguageBase,
    base: Base,
    asked: Mapping[str, Sequence[tuple[int, Record]]],
    *,
    quiet: bool,
) -> dict[str, list[str]]:
    """Row -> an answer to every prompt, in their order."""
    scenario, arrays = result.plan.scenario, result.last.arrays
    longest = scenario.evaluation.answer_tokens
    rows: dict[str, list[str]] = {
        name + addition: [] for name in ("base", "federated", "personal") for addition in asked
    }
    users = sorted({user for user, _ in asked[""]})
    load_shared(observer.head, arrays)
    shared = _generator(observer.head, scenario, base, fleet)
    for user in track(users, description="answers", unit="user", quiet=quiet):
        load_shared(observer.head, observer.private_arrays(arrays, user))
        models = {"base": Generator(None, fleet, {}, {}), "federated": shared}
        models["personal"] = _generator(observer.head, scenario, base, fleet)
        for addition, prompts in asked.items():
            texts = [record.text for owner, record in prompts if owner == user]
            for name, model in models.items():
                rows[name + addition] += [_say(model, text, longest) for text in texts]
    return rows


def _generator(head: CausalHead, scenario: Scenario, base: Base, fleet: LanguageBase) -> Generator:
    """The runtime with the tensors the head holds."""
    from client.export.language_model import bound_arrays

    parts = language_parts(head, base, scenario)
    return bound_arrays(fleet, parts["lora"], scaling=parts["scaling"], prefix=parts["prefix"])


def _say(model: Generator, text: str, longest: int) -> str:
    """A greedy answer; of a prompt that is too long its beginning is left away, as in training."""
    fleet = model.base
    kept = len(fleet.tokens(fleet.template.partition("{text}")[0]))
    ids = fleet.encode(text)
    excess = max(0, len(ids) + longest - model.room)
    ids = ids[:kept] + ids[kept + excess :]

    def tokens() -> Iterator[int]:
        for token, _ in model.steps(ids, max_new_tokens=longest):
            if token not in fleet.stop_ids:
                yield token

    return "".join(spell(fleet, tokens())).strip()


def _wins(
    scenario: Scenario,
    records: Sequence[Record],
    first: Sequence[str],
    second: Sequence[str],
    owners: np.ndarray,
    embed: Tokens,
    scoring: Mapping[str, Any],
) -> Interval:
    """Share of prompts where the judge finds the first answer better, a draw counting half."""
    judge = judge_named(scenario.evaluation.judge)
    said = [
        float(judge(prompt=record.text, own=record.response, first=a, second=b, embed=embed))
        for record, a, b in zip(records, first, second, strict=True)
    ]
    return over_answers(said, owners, **scoring)


def _keep(path: Path, dataset: Dataset, asked: Sequence[tuple[int, Record]], rows: Mapping[str, Sequence[str]]) -> None:
    """Every answer beside the user and the item of its prompt; what the user wrote is not in the file."""
    found = [
        {"user": dataset.users[user].user, "item": record.item, **{name: row[i] for name, row in rows.items()}}
        for i, (user, record) in enumerate(asked)
    ]
    write_atomically(path, json.dumps(found, indent=1, ensure_ascii=False).encode())
