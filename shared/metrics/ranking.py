"""Score rankings in which one text of each user's list is liked, with intervals from a bootstrap over users.

A list's scores may tie: every order of tied texts counts alike, and a metric is its mean over them. A scorer that gives
all texts one score then has exactly the value of a random order.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from shared.metrics.ratings import Described, Floats, Interval, draw_users, interval, over_users

Gain = Callable[[Floats], Floats]  # rank of the liked text, 1 the best -> what it is worth


def ndcg_at(k: int) -> Gain:
    """Discounted gain 1 / log2(rank + 1) down to rank k; of one liked text the ideal is 1."""
    return lambda rank: np.where(rank <= k, 1 / np.log2(rank + 1), 0.0)


def recall_at(k: int) -> Gain:
    """Whether the liked text is among the first k."""
    return lambda rank: (rank <= k).astype(np.float64)


def reciprocal(rank: Floats) -> Floats:
    """One over the rank."""
    return 1 / rank


PRIMARY = "ndcg@10"
GAINS: dict[str, Gain] = {
    PRIMARY: ndcg_at(10),
    "ndcg@5": ndcg_at(5),
    "ndcg@20": ndcg_at(20),
    "recall@5": recall_at(5),
    "recall@10": recall_at(10),
    "recall@20": recall_at(20),
    "mrr": reciprocal,
}
RANKING_METRICS: dict[str, Described] = {
    PRIMARY: Described("discounted gain of the held-out text among the first 10 of its list, 1 at the top", "more"),
    "ndcg@5": Described("the same among the first 5", "more"),
    "ndcg@20": Described("the same among the first 20", "more"),
    "recall@5": Described("share of users whose held-out text is among the first 5", "more"),
    "recall@10": Described("the same for 10; of one held-out text a user this is the hit rate too", "more"),
    "recall@20": Described("the same for 20", "more"),
    "mrr": Described("mean over users of one over the held-out text's rank", "more"),
    "share_gaining": Described("share of users whose held-out text ranks higher than in the row local", "more"),
    "popularity_bias": Described(
        "how much more popular the ten texts recommended from the whole catalogue are than what their user liked, in "
        "percentiles of popularity, from 0 to 1; below 0 they are less popular"
    ),
}


def expected_gain(scores: npt.NDArray[np.float64], gain: Gain) -> Floats:
    """What each user's list is worth, the mean over the orders of tied texts.

    Args:
        scores: (U, 1 + negatives); the liked text stands first.
        gain: Of a rank.

    Returns:
        (U,).

    Raises:
        ValueError: There is no user or no negative, or a score is not finite.

    Example:
        >>> expected_gain(np.array([[0.5, 0.7, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]), recall_at(2)).tolist()
        [1.0, 0.5]
    """
    first, last = ranks(scores)
    worth = np.concatenate([[0.0], np.cumsum(gain(np.arange(1.0, scores.shape[1] + 1)))])
    return np.asarray((worth[last] - worth[first - 1]) / (last - first + 1))


def ranks(scores: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Best and worst rank (U,) of each user's liked text among those it ties with; arguments as above."""
    if scores.ndim != 2 or not len(scores) or scores.shape[1] < 2:
        raise ValueError(f"scores must be of users with a liked text and at least one other, got shape {scores.shape}.")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite, got NaN or infinity; mend the model that made them.")
    above = (scores[:, 1:] > scores[:, :1]).sum(1)
    tied = (scores[:, 1:] == scores[:, :1]).sum(1)
    return above + 1, above + 1 + tied


def score_ranking(
    scores: npt.NDArray[np.float64],
    *,
    bias: npt.NDArray[np.float64],
    reference: npt.NDArray[np.float64] | None = None,
    seed: int,
    resamples: int = 2000,
) -> dict[str, Interval]:
    """Every metric of a row with its interval.

    Args:
        scores: As of ``expected_gain``.
        bias: (U,) from ``popularity_bias``.
        reference: Scores of the row a user gains against; None leaves ``share_gaining`` out.
        seed: Of the bootstrap; the same for rows that are to be paired.
        resamples: Of the bootstrap.
    """
    draws = draw_users(len(scores), seed=seed, resamples=resamples)
    per_user = {name: expected_gain(scores, gain) for name, gain in GAINS.items()}
    if reference is not None:
        per_user["share_gaining"] = np.asarray(per_user["mrr"] > expected_gain(reference, reciprocal), dtype=np.float64)
    per_user["popularity_bias"] = bias
    return {name: interval(over_users(values), draws) for name, values in per_user.items()}


def ranking_difference(
    a: npt.NDArray[np.float64], b: npt.NDArray[np.float64], *, seed: int, resamples: int = 2000
) -> Interval:
    """Primary metric of scores ``a`` minus that of ``b``, on the same resamples; above 0, ``a`` is better."""
    gain = GAINS[PRIMARY]
    difference = expected_gain(a, gain) - expected_gain(b, gain)
    return interval(over_users(difference), draw_users(len(difference), seed=seed, resamples=resamples))


def top(
    scores: npt.NDArray[np.float64], known: Sequence[npt.NDArray[np.int64]], *, k: int = 10
) -> npt.NDArray[np.int64]:
    """The k best texts (U, k) of the catalogue that each user does not know; equal scores in an order drawn once.

    Args:
        scores: (U, M); NaN or infinity must not occur.
        known: Texts of each user, which are left out.
        k: At most the number of texts that any user does not know.
    """
    drawn = np.stack([np.random.default_rng([0, user]).permutation(scores.shape[1]) for user in range(len(scores))])
    left = scores.copy()
    for user, texts in enumerate(known):
        left[user, texts] = -np.inf
    best = np.argsort(-np.take_along_axis(left, drawn, axis=1), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(drawn, best, axis=1)


def percentiles(counts: npt.NDArray[np.float64]) -> Floats:
    """Share of the catalogue (M,) that a text is more popular than; half of those as popular as it count.

    Example:
        >>> percentiles(np.array([3.0, 0.0, 7.0, 0.0])).tolist()
        [0.625, 0.25, 0.875, 0.25]
    """
    ordered = np.sort(counts)
    below, upto = (np.searchsorted(ordered, counts, side=side) for side in ("left", "right"))
    return np.asarray((below + upto) / 2 / len(counts))


def popularity_bias(
    recommended: npt.NDArray[np.int64], liked: Sequence[npt.NDArray[np.int64]], percentile: Floats
) -> Floats:
    """Mean popularity percentile of what each user is recommended minus that of what the user liked, (U,).

    Source:
        Abdollahpouri et al. 2019, arXiv:1907.13286: group average popularity of recommendations and of profiles.
    """
    own = np.array([percentile[texts].mean() if len(texts) else percentile.mean() for texts in liked])
    return np.asarray(percentile[recommended].mean(1) - own)


def exposure(recommended: npt.NDArray[np.int64], *, texts: int) -> dict[str, float]:
    """How recommendations spread over the catalogue: ``coverage``, share of texts that anybody gets, and ``gini``.

    Both depend on how many users there are, which a resample of users changes; so they have no interval.

    Source:
        Gini coefficient of exposure as in Fleder and Hosanagar 2009: 0, all alike; near 1, a few have everything.

    Example:
        >>> exposure(np.array([[0, 1], [2, 3]]), texts=4), exposure(np.array([[0], [0]]), texts=4)
        ({'coverage': 1.0, 'gini': 0.0}, {'coverage': 0.25, 'gini': 0.75})
    """
    shown = np.sort(np.bincount(recommended.ravel(), minlength=texts)).astype(np.float64)
    place = np.arange(1, texts + 1)
    gini = float(((2 * place - texts - 1) * shown).sum() / (texts * shown.sum()))
    return {"coverage": float((shown > 0).mean()), "gini": gini}
