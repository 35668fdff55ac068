"""A user's own records as a head carries them: on the device the nearest ones correct a prediction. Needs no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from pydantic import ValidationError

from client.runtime.artifact import ADAPTER, MANIFEST, MEMORY_PREFIX, Arrays, damaged
from client.runtime.retrieval import RETRIEVERS, recall
from shared.config import PersonalConfig
from shared.errors import HeadError

_RESIDUALS, _KEYS, _CENTRE = (MEMORY_PREFIX + name for name in ("residuals", "keys", "centre"))
_SETTINGS = ("retriever", "neighbours", "temperature", "ridge", "bias_shrinkage")


@dataclass(frozen=True)
class Memory:
    """What the shared part left unexplained of n records, and how to find the right ones.

    Attributes:
        personal: The retriever and its strengths.
        residuals: (n,) target minus shared prediction, oldest first.
        features: (n, d) pooled features of the records; (n, 0) where the retriever does not compare meanings.
        centre: (d,) of the features.
        texts: Of the records; empty where the retriever does not compare words.
    """

    personal: PersonalConfig
    residuals: np.ndarray
    features: np.ndarray
    centre: np.ndarray
    texts: Sequence[str]

    def __len__(self) -> int:
        return len(self.residuals)

    def correct(self, features: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """What is added to the shared predictions (m,) of texts with pooled features (m, d)."""
        asked = Memory(self.personal, np.zeros(len(texts)), features, self.centre, texts)
        found = RETRIEVERS[self.personal.retriever](cast(Any, self), cast(Any, asked), mean=self.centre)
        return recall(found, self.residuals, personal=self.personal)

    def tensors(self) -> dict[str, np.ndarray]:
        """As an adapter file holds it, in float32."""
        found = {_RESIDUALS: self.residuals}
        if self.personal.retriever == "dense":
            found |= {_KEYS: self.features, _CENTRE: self.centre}
        return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in found.items()}

    def described(self) -> dict[str, Any]:
        """As a manifest says it; the texts stand in it where words are compared."""
        settings = self.personal.model_dump(include=set(_SETTINGS))
        return settings | ({"texts": list(self.texts)} if self.personal.retriever == "bm25" else {})


def make_memory(
    features: np.ndarray, texts: Sequence[str], residuals: np.ndarray, *, centre: np.ndarray, personal: PersonalConfig
) -> Memory | None:
    """The memory of n records, arguments as of ``Memory``; None of no records.

    Raises:
        HeadError: Words are to be compared, and a text is missing.
    """
    if not len(residuals):
        return None
    if personal.retriever == "bm25" and len(texts) != len(residuals):
        raise HeadError(
            "a memory of words must have the text of every record, got some the base cannot take; set "
            "personal.retriever to dense, or remove those records."
        )
    made = Memory(personal, residuals, features, centre, texts if personal.retriever == "bm25" else ())
    return _restored(made.tensors(), made.described())  # rounded as the file will be: what is compared is what is used


def read_memory(folder: Path, manifest: Mapping[str, Any], tensors: Arrays) -> Memory:
    """The memory of a head's file.

    Raises:
        HeadError: Manifest and tensors do not belong together, or a setting is impossible.
    """
    described = manifest.get("memory")
    own = {name: array for name, array in tensors.items() if name.startswith(MEMORY_PREFIX)}
    try:
        found = _restored(own, dict(described or {}))
    except (KeyError, TypeError, ValueError, ValidationError):
        raise damaged(folder / MANIFEST, "its memory must have a retriever, strengths and records") from None
    if found.tensors().keys() != own.keys():
        raise damaged(folder / ADAPTER, f"a memory of retriever {found.personal.retriever!r} must have its own tensors")
    return found


def _restored(tensors: Arrays, described: dict[str, Any]) -> Memory:
    texts = described.pop("texts", [])
    personal = PersonalConfig.model_validate(described)
    residuals = tensors[_RESIDUALS].astype(np.float64)
    count, dense = len(residuals), personal.retriever == "dense"
    features = tensors[_KEYS].astype(np.float64) if dense else np.zeros((count, 0))
    centre = tensors[_CENTRE].astype(np.float64) if dense else np.zeros(0)
    said = len(texts) == count and all(isinstance(text, str) for text in texts)
    if not (
        described.keys() == set(_SETTINGS)
        and residuals.ndim == 1 <= count
        and features.shape == (count, len(centre))
        and (said if personal.retriever == "bm25" else not texts)
    ):
        raise ValueError("sizes")
    return Memory(personal, residuals, features, centre, texts)
