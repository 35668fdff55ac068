"""What a record asks: its tokens for the base, and the targets its loss is measured against."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from shared.config import Scenario, TaskConfig
from shared.datasets import Record
from shared.errors import ScenarioError
from shared.model import Base

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
    """Distinct inputs as the base sees them: token ids, and labels of the same lengths where tokens are predicted."""

    token_ids: list[list[int]]
    labels: list[np.ndarray] | None


Key = tuple[str, str]  # text and response: records that share them share their hidden states


def encode_texts(base: Base, keys: Sequence[Key], scenario: Scenario) -> Encoded:
    """Token ids of the texts alone."""
    return Encoded(base.tokenize([text for text, _ in keys], max_tokens=scenario.model.max_tokens), None)


def encode_dialogues(base: Base, keys: Sequence[Key], scenario: Scenario) -> Encoded:
    """Token ids of prompt and response, the prompt cut in its middle where both are too long.

    Position t is labelled with token t + 1 where that belongs to the response or ends it; the last token predicts
    nothing and is left away. Labels come from lengths, never from ids: padding often has the id of the end.

    Raises:
        ScenarioError: The base's files name no token that ends a text.
    """
    if base.eos_id is None:
        raise ScenarioError(f"{base.folder}/config.json must name eos_token_id for task {scenario.task.name!r}.")
    before, _, after = scenario.task.template.partition("{text}")
    room = scenario.model.max_tokens
    ids, labels = [], []
    kept = len(_encode(base, before))
    for text, answer in keys:
        response = [*_encode(base, answer)[: room // 2 - 1], base.eos_id]
        prompt = _encode(base, before + text + after)
        excess = max(0, len(prompt) + len(response) - room - 1)
        prompt = prompt[:kept] + prompt[kept + excess :] if excess else prompt
        whole = prompt + response
        ids.append(whole[:-1])
        shifted = [IGNORE] * len(prompt) + response
        labels.append(np.array(shifted[1:], dtype=np.int64))  # without a prompt nothing predicts the first token
    return Encoded(ids, labels)


def _encode(base: Base, text: str) -> list[int]:
    base.tokenizer.no_padding()
    base.tokenizer.no_truncation()
    ids: list[int] = base.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


TASKS = {"rating": encode_texts, "tagging": encode_texts, "ranking": encode_texts, "generation": encode_dialogues}


def teaches(record: Record, task: TaskConfig) -> bool:
    """Whether anything is learnt of a record: what is not liked has no loss in a ranking."""
    return task.name != "ranking" or record.target >= task.liked


def scores_of(records: Sequence[Record]) -> Scores:
    """The numbers of records."""
    return Scores([record.target for record in records])
