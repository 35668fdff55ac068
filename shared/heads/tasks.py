"""What a record asks: its tokens for the base, and the targets its loss is measured against."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shared.config import Scenario, TaskConfig
from shared.datasets import Record
from shared.errors import ScenarioError
from shared.models.model import Base

IGNORE = -100  # label of a position whose prediction is of no account


class Targets(Protocol):
    """The targets of a list of records."""

    def __len__(self) -> int:
        """How many records."""

    def batch(self, rows: np.ndarray, length: int) -> Tensor:
        """Targets of some rows, whose hidden states are padded to ``length``."""


class Scores:
    """One number a record; a batch is (B,) float32."""

    def __init__(self, values: Sequence[float]) -> None:
        self._values = torch.tensor(values, dtype=torch.float32)

    def __len__(self) -> int:
        return len(self._values)

    def batch(self, rows: np.ndarray, length: int) -> Tensor:  # noqa: D102
        del length
        return self._values[torch.from_numpy(rows)]


class Labels:
    """The next token at every position, ``IGNORE`` outside the response; a batch is (B, T) int64."""

    def __init__(self, labels: Sequence[np.ndarray]) -> None:
        self._labels = list(labels)

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, rows: np.ndarray, length: int) -> Tensor:  # noqa: D102
        padded = torch.full((len(rows), length), IGNORE, dtype=torch.int64)
        for i, row in enumerate(rows):
            padded[i, : len(self._labels[row])] = torch.from_numpy(self._labels[row])
        return padded


@dataclass(frozen=True)
class Encoded:
    """Distinct inputs as the base sees them: token ids, and labels of the same lengths where tokens are predicted.

    Where two answers are compared, these are of the chosen one and ``rejected`` is as much of the other.
    """

    token_ids: list[list[int]]
    labels: list[np.ndarray] | None
    rejected: "Encoded | None" = None


Key = tuple[str, ...]  # of a record, ``Record.key``: those that share it share their hidden states


def encode_texts(base: Base, keys: Sequence[Key], scenario: Scenario) -> Encoded:
    """Token ids of the texts alone."""
    return Encoded(base.tokenize([text for text, *_ in keys], max_tokens=scenario.model.max_tokens), None)


def encode_dialogues(base: Base, keys: Sequence[Key], scenario: Scenario) -> Encoded:
    """Token ids of prompt and response, the prompt cut in its middle where both are too long.

    Position t is labelled with token t + 1 where that belongs to the response or ends it; the last token predicts
    nothing and is left away. Labels come from lengths, never from ids: padding often has the id of the end.

    Raises:
        ScenarioError: The base's files name no token that ends a text.
    """
    found = [_answered(base, scenario, text, [answer])[0] for text, answer, *_ in keys]
    return Encoded([ids for ids, _ in found], [labels for _, labels in found])


def encode_pairs(base: Base, keys: Sequence[Key], scenario: Scenario) -> Encoded:
    """As ``encode_dialogues`` for both answers of each key, after a prompt that is cut alike for both.

    Raises:
        ScenarioError: A key has a response and nothing that was rejected, or the base names no end of a text.
    """
    if any(answer and not rejected for _, answer, *rejected in keys):
        raise ScenarioError(
            f"task.name = {scenario.task.name!r} needs a rejected answer beside every response, a record has none; "
            "choose data of comparisons."
        )
    both = [_answered(base, scenario, text, [answer, *(rejected or [""])]) for text, answer, *rejected in keys]
    chosen, others = (Encoded([each[i][0] for each in both], [each[i][1] for each in both]) for i in range(2))
    return replace(chosen, rejected=others)


def _answered(base: Base, scenario: Scenario, text: str, answers: Sequence[str]) -> list[tuple[list[int], np.ndarray]]:
    """Token ids and labels of one prompt with each of its answers, which share what is left of the prompt."""
    if base.eos_id is None:
        raise ScenarioError(f"{base.folder}/config.json must name eos_token_id for task {scenario.task.name!r}.")
    before, _, after = scenario.task.template.partition("{text}")
    room = scenario.model.max_tokens
    responses = [[*_encode(base, answer)[: room // 2 - 1], base.eos_id] for answer in answers]
    kept, prompt = len(_encode(base, before)), _encode(base, before + text + after)
    excess = max(0, len(prompt) + max(map(len, responses)) - room - 1)
    prompt = prompt[:kept] + prompt[kept + excess :] if excess else prompt
    # without a prompt nothing predicts the first token
    return [
        ([*prompt, *response][:-1], np.array([*[IGNORE] * len(prompt), *response][1:], dtype=np.int64))
        for response in responses
    ]


def _encode(base: Base, text: str) -> list[int]:
    base.tokenizer.no_padding()
    base.tokenizer.no_truncation()
    ids: list[int] = base.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


TASKS = {
    "rating": encode_texts,
    "tagging": encode_texts,
    "ranking": encode_texts,
    "generation": encode_dialogues,
    "preference": encode_pairs,
}


def teaches(record: Record, task: TaskConfig) -> bool:
    """Whether anything is learnt of a record: what is not liked has no loss in a ranking."""
    return task.name != "ranking" or record.target >= task.liked


def scores_of(records: Sequence[Record]) -> Scores:
    """The numbers of records."""
    return Scores([record.target for record in records])
