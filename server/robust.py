"""Rules by which replies become one change although some devices lie: pure functions from vectors to a vector.

A rule reads what was released already, so it costs no privacy; where the server sees a sum alone it is given the means
of groups. ``docs/robustness.md`` says what each withstands.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from server.aggregate import mean_update
from shared.config import FederationConfig
from shared.errors import TooFewRepliesError
from shared.registry import lookup

Vectors = np.ndarray  # (n, P) float64, one row a reply or a group
Update = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Suspicion:
    """What a rule is told, all of it public and fixed for a campaign.

    Attributes:
        liars: How many of the vectors may be a liar's, f.
        norm_bound: Longest vector that ``norm-bound`` lets count whole; None for the median of the lengths.
    """

    liars: int
    norm_bound: float | None = None


Rule = Callable[[Vectors, Suspicion], np.ndarray]


def mean(vectors: Vectors, suspicion: Suspicion) -> np.ndarray:
    """The mean: one liar moves it as far as the gate lets a reply be long."""
    del suspicion
    return np.asarray(vectors.mean(axis=0))


def norm_bound(vectors: Vectors, suspicion: Suspicion) -> np.ndarray:
    """The mean of vectors cut to one length: the median of their own, or ``federation.norm_bound``.

    Returns:
        (P,): a liar moves it by at most twice the bound over n, however long what it sent.

    Source:
        A bound: Sun et al. 2019, arXiv:1911.07963, section 5. The median as the bound: Nguyen et al. 2022 (FLAME),
        arXiv:2101.02281, section 4.3.
    """
    norms = np.linalg.norm(vectors, axis=1)
    bound = float(np.median(norms)) if suspicion.norm_bound is None else suspicion.norm_bound
    scales = np.minimum(1.0, np.divide(bound, norms, out=np.ones_like(norms), where=norms > 0))
    return np.asarray((vectors * scales[:, None]).mean(axis=0))


def median(vectors: Vectors, suspicion: Suspicion) -> np.ndarray:
    """The median of every coordinate.

    Source:
        Yin et al. 2018, arXiv:1803.01498, Definition 1.

    Example:
        >>> median(np.array([[0.0, 1.0], [2.0, 9.0], [1.0, -50.0]]), Suspicion(liars=1)).tolist()
        [1.0, 1.0]
    """
    _enough(vectors, 2 * suspicion.liars + 1, "median")
    return np.asarray(np.median(vectors, axis=0))


def trimmed_mean(vectors: Vectors, suspicion: Suspicion) -> np.ndarray:
    """The mean of every coordinate without its f largest and its f smallest values.

    Source:
        Yin et al. 2018, arXiv:1803.01498, Definition 2, with beta n = f.

    Example:
        >>> trimmed_mean(np.array([[0.0], [1.0], [3.0], [1e9]]), Suspicion(liars=1)).tolist()
        [2.0]
    """
    liars = suspicion.liars
    _enough(vectors, 2 * liars + 1, "trimmed-mean")
    return np.asarray(np.sort(vectors, axis=0)[liars : len(vectors) - liars].mean(axis=0))


def krum(vectors: Vectors, suspicion: Suspicion) -> np.ndarray:
    """The vector whose n - f - 2 nearest others are nearest; of equals the first.

    Source:
        Blanchard et al. 2017, arXiv:1703.02757, section 4.
    """
    return np.asarray(vectors[int(np.argmin(krum_scores(vectors, liars=suspicion.liars, rule="krum")))])


def multi_krum(vectors: Vectors, suspicion: Suspicion) -> np.ndarray:
    """The mean of the n - f vectors with the least scores of ``krum``; of equals the first.

    Source:
        Blanchard et al. 2017, arXiv:1703.02757, section 6 (m-Krum), with m = n - f.
    """
    scores = krum_scores(vectors, liars=suspicion.liars, rule="multi-krum")
    chosen = np.sort(np.argsort(scores, kind="stable")[: len(vectors) - suspicion.liars])
    return np.asarray(vectors[chosen].mean(axis=0))


def krum_scores(vectors: Vectors, *, liars: int, rule: str = "krum") -> np.ndarray:
    """Sum of the squared distances (n,) of every vector to its n - f - 2 nearest others.

    Raises:
        TooFewRepliesError: n is below 2 f + 3, where the rule proves nothing.
    """
    count = len(vectors)
    _enough(vectors, 2 * liars + 3, rule)
    centred = vectors - vectors.mean(axis=0)  # distances do not see it, and rounding is of the size of a difference
    squares = np.einsum("ij,ij->i", centred, centred)
    distances = np.maximum(squares[:, None] + squares[None] - 2 * centred @ centred.T, 0.0)
    np.fill_diagonal(distances, np.inf)
    nearest = np.sort(distances, axis=1)[:, : count - liars - 2]
    return np.asarray(nearest.sum(axis=1))


AGGREGATORS: dict[str, Rule] = {
    "mean": mean,
    "norm-bound": norm_bound,
    "median": median,
    "trimmed-mean": trimmed_mean,
    "krum": krum,
    "multi-krum": multi_krum,
}


def combine(
    updates: Sequence[Update], *, federation: FederationConfig, asked: int, liars: int
) -> dict[str, np.ndarray]:
    """What updates together say, by the campaign's rule.

    Args:
        updates: One mapping a reply, or a group's mean, all with the same names and shapes; at least one.
        federation: ``aggregation`` and ``norm_bound``.
        asked: A public constant, how many updates there would be if everybody answered. A rule's answer is multiplied
            by the share that came, so that ``mean`` is the sum over ``asked`` (rule P2) and the others have its size.
        liars: How many of those asked may lie.

    Returns:
        Slot name -> float64 array.

    Raises:
        TooFewRepliesError: Fewer updates than the rule needs against so many liars.
        ScenarioError: Nobody registers the rule.
    """
    if federation.aggregation == "mean":
        return mean_update(updates, denominator=asked)
    rule = lookup("aggregators", federation.aggregation, AGGREGATORS, Callable)
    vectors = np.stack([np.concatenate([x.astype(np.float64).ravel() for x in update.values()]) for update in updates])
    bound = None if federation.norm_bound == "median" else federation.norm_bound
    found = rule(vectors, Suspicion(liars, bound)) * (len(updates) / asked)
    shapes = {name: array.shape for name, array in updates[0].items()}
    parts = np.split(found, np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _enough(vectors: Vectors, wanted: int, rule: str) -> None:
    if len(vectors) < wanted:
        raise TooFewRepliesError(
            f"federation.aggregation = {rule!r} needs {wanted} vectors against as many liars as "
            f"federation.malicious_share allows for, got {len(vectors)}; the last checkpoint is kept."
        )
