"""The row ``dp-statistics`` of rankings: one private release of how often each public text is liked, smoothed.

What is released is as private as the campaign: same unit, trust, epsilon and delta. What follows is post-processing.
"""

import numpy as np
import scipy.linalg
import scipy.sparse

from shared.config import Scenario
from shared.privacy.noise import seeded_generator
from simulations.observe.dp_statistics import promise
from simulations.observe.rows import Rows

_TEXT_SHARE = 0.2  # of the counts' variance that similar texts have in common
_WIDTH = 0.3  # of the kernel exp((cosine - 1) / width) of two texts
_FLOOR = 5.0  # likes added to every text before the logarithm, which noise would otherwise rule
_LEAST_SHARE = 0.01  # of the variance released that is taken for the counts' own, whatever the noise


def clipped_counts(rows: Rows, *, texts: int, unit: str) -> np.ndarray:
    """Sum (M,) of all contributions: of a record its text, of a user all texts, each weighted 1 / sqrt(their number).

    Args:
        rows: Liked records; their texts are below ``texts``.
        texts: Number of public texts M.
        unit: ``user`` or ``record``.

    Guarantee:
        Leaving out one unit, whatever its records are, moves the result by at most 1.
    """
    _, owner = np.unique(rows.user if unit == "user" else np.arange(len(rows.user)), return_inverse=True)
    weight = 1 / np.sqrt(np.bincount(owner)[owner])
    each = scipy.sparse.csr_array((weight, (owner, rows.text)), shape=(int(owner.max(initial=-1)) + 1, texts))
    norms = np.sqrt(each.multiply(each).sum(axis=1))
    summed: np.ndarray = np.minimum(1, 1 / np.maximum(norms, 1e-12)) @ each
    return summed


def log_popularity(rows: Rows, cosine: np.ndarray, *, users: int, scenario: Scenario) -> np.ndarray:
    """Release, smooth, take the logarithm: scores (M,) of the public texts.

    Args:
        rows: Liked records of all users.
        cosine: (M, M) of the public texts' centred features.
        users: How many take part.
        scenario: Its privacy and seed.

    Source:
        Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, eq. 2.23: count = mean + process + noise.
    """
    privacy, texts = scenario.privacy, len(cosine)
    generator = seeded_generator(seed=scenario.seed, purpose="noise of dp-statistics", device=0, round_number=0)
    stddev = promise(privacy, texts=texts, users=users).sum_noise
    counts = clipped_counts(rows, texts=texts, unit=privacy.unit) + stddev * generator.standard_normal(texts)
    if privacy.unit == "user":  # back to records, by the guess that the settings state
        scale = scenario.statistics.records_per_user**0.5
        counts, stddev = counts * scale, stddev * scale
    return np.asarray(np.log(np.maximum(smooth(counts, cosine, stddev=stddev), 0.0) + _FLOOR))


def smooth(counts: np.ndarray, cosine: np.ndarray, *, stddev: float) -> np.ndarray:
    """Expected counts (M,) given noisy ones; without noise they stand."""
    if not stddev:
        return counts
    own = max(float(counts.var()) - stddev**2, _LEAST_SHARE * float(counts.var()))
    kernel = _TEXT_SHARE * np.exp((cosine - 1) / _WIDTH)
    kernel[np.diag_indices_from(kernel)] += 1 - _TEXT_SHARE
    kernel *= own
    level = counts.mean()
    dual = scipy.linalg.solve(kernel + stddev**2 * np.eye(len(counts)), counts - level, assume_a="pos")
    return np.asarray(level + kernel @ dual)
