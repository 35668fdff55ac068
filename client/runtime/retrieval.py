"""What a device remembers of its own records: the nearest ones correct a prediction, and nothing is ever uploaded.

Similarities are at most about 1, which is that of a text with itself, so that one temperature suits all retrievers.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.config import PersonalConfig

if TYPE_CHECKING:
    from shared.models.features import Features

_SATURATION, _LENGTH = 1.5, 0.75  # BM25's k1 and b
_SMALLEST_NORM = 1e-12


@dataclass(frozen=True)
class Texts:
    """Texts one by one, and all that is known of each before anything private.

    Attributes:
        features: (n, d) float64, pooled at the shared arrays.
        shared: (n,) shared predictions, which a private part corrects.
        texts: The texts; may be empty where no method compares words.
        inputs: Prepared backbone outputs; None where no method passes the head again.
        offset: (n,) shared predictions minus those of the head itself, where they come from elsewhere; else zeros.
    """

    features: np.ndarray
    shared: np.ndarray
    texts: Sequence[str] = ()
    inputs: "Features | None" = None
    offset: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.shared)

    def take(self, rows: np.ndarray) -> "Texts":
        """Some of them, in the order given."""
        return Texts(
            self.features[rows],
            self.shared[rows],
            [self.texts[row] for row in rows] if self.texts else (),
            self.inputs.select(rows.tolist()) if self.inputs else None,
            None if self.offset is None else self.offset[rows],
        )


def cosines(known: np.ndarray, asked: np.ndarray, *, mean: np.ndarray) -> np.ndarray:
    """Cosines (m, n) of features (n, d) and (m, d), centred."""
    return np.asarray(_unit(asked - mean) @ _unit(known - mean).T)


class BM25:
    """Words of a text weighed by how rare they are among a device's own texts.

    Source:
        Robertson and Zaragoza 2009, "The Probabilistic Relevance Framework: BM25 and Beyond", section 3.4, with the
        inverse frequency ln(1 + (N - n + 0.5) / (n + 0.5)), which is never negative.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._counts = [Counter(words(text)) for text in texts]
        self._frequency = Counter(word for counts in self._counts for word in counts)
        self._mean_length = sum(counts.total() for counts in self._counts) / max(len(texts), 1) or 1.0

    def scores(self, text: str) -> np.ndarray:
        """Score (n,) of every text for the words of another."""
        asked = Counter(words(text))
        return np.array([self._score(asked, counts) for counts in self._counts])

    def similarities(self, text: str) -> np.ndarray:
        """Scores (n,) as a share of what the asked text itself would get; 1 for the same words."""
        asked = Counter(words(text))
        return self.scores(text) / (self._score(asked, asked) or 1.0)

    def _score(self, asked: Counter[str], counts: Counter[str]) -> float:
        slowed = _SATURATION * (1 - _LENGTH + _LENGTH * counts.total() / self._mean_length)
        return sum(
            self._rarity(word) * counts[word] * (_SATURATION + 1) / (counts[word] + slowed)
            for word in asked
            if word in counts
        )

    def _rarity(self, word: str) -> float:
        found = self._frequency[word]
        return math.log(1 + (len(self._counts) - found + 0.5) / (found + 0.5))


def words(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return re.findall(r"\w+", text.lower())


def nearest(similarities: np.ndarray, *, count: int) -> np.ndarray:
    """Columns (m, k) of the most similar records; of equals the newest, which is the last."""
    order = np.argsort(-similarities[:, ::-1], axis=1, kind="stable")[:, :count]
    return np.asarray(similarities.shape[1] - 1 - order)


def recall(similarities: np.ndarray, residuals: np.ndarray, *, personal: PersonalConfig) -> np.ndarray:
    """What memory adds to shared predictions (m,): a shrunken level, and what the nearest records leave of it.

    Args:
        similarities: (m, n) of asked texts with the device's records, which are in the order of time.
        residuals: (n,) target minus shared prediction; n = 0 is allowed and gives zeros.
        personal: ``neighbours`` are looked up, each weighing exp((similarity - 1) / ``temperature``) beside ``ridge``
            at zero; ``bias_shrinkage`` of the level.

    Source:
        Nadaraya 1964 and Watson 1964, kernel regression, with a prior at zero; the memory of a user's own records is
        that of LaMP's retrieval augmentation (Salemi et al. 2024, arXiv:2304.11406), here of residuals.
    """
    if not len(residuals):
        return np.zeros(len(similarities))
    level = float(residuals.sum()) / (len(residuals) + personal.bias_shrinkage)
    chosen = nearest(similarities, count=personal.neighbours)
    weights = np.exp((np.take_along_axis(similarities, chosen, axis=1) - 1) / personal.temperature)  # (m, k)
    return np.asarray(level + (weights * (residuals - level)[chosen]).sum(1) / (weights.sum(1) + personal.ridge))


def local_share(similarities: np.ndarray, *, personal: PersonalConfig) -> np.ndarray:
    """FedDPA's weight (m,) of the local adapter: how similar a text is to the device's own records, from 0 to 1.

    Args:
        similarities: (m, n) cosines; n = 0 gives zeros.
        personal: The ``neighbours`` nearest are averaged, weighing exp(similarity / ``temperature``).

    Source:
        Yang et al. 2024, arXiv:2403.19211: there the mean cosine with five records drawn at random, times
        a constant; the nearest ones tell a foreign text from a familiar one without luck.
    """
    if not similarities.shape[1]:
        return np.zeros(len(similarities))
    found = np.take_along_axis(similarities, nearest(similarities, count=personal.neighbours), axis=1)
    weights = np.exp((found - found.max(1, keepdims=True)) / personal.temperature)
    return np.asarray(np.clip((weights * found).sum(1) / weights.sum(1), 0.0, 1.0))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), _SMALLEST_NORM))


def by_meaning(known: "Texts", asked: "Texts", *, mean: np.ndarray) -> np.ndarray:
    """Cosines (m, n) of the local encoder's pooled features, centred on the public mean."""
    return cosines(known.features, asked.features, mean=mean)


def by_words(known: "Texts", asked: "Texts", *, mean: np.ndarray) -> np.ndarray:
    """BM25 as a share of a text's own, (m, n)."""
    del mean
    index = BM25(known.texts)
    return np.array([index.similarities(text) for text in asked.texts]).reshape(len(asked), len(known))


def by_time(known: "Texts", asked: "Texts", *, mean: np.ndarray) -> np.ndarray:
    """All alike, so that the newest are the nearest."""
    del mean
    return np.ones((len(asked), len(known)))


RETRIEVERS: dict[str, Callable[..., np.ndarray]] = {"dense": by_meaning, "bm25": by_words, "recency": by_time}
