"""What an attack's guesses prove: lower bounds on epsilon, and how well a score tells members from others.

A bound says: were the mechanism (epsilon, delta)-private for the epsilon returned, guesses this good would come up in
at most 1 - confidence of all runs. The canaries' coins and the number of guesses are fixed before scores are seen.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from shared.errors import PrivacyError
from shared.metrics.ratings import Interval

Scores = npt.NDArray[np.floating]
Coins = npt.NDArray[np.bool_]

_TIES = 2305_08846  # seed of the order among equal scores


def one_run_bound(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """Lower bound on epsilon from a single run with many canaries.

    Args:
        canaries: Canaries m, each one unit of privacy that is in or out by a fair coin of its own.
        guesses: Guesses r, a number fixed before; the other canaries are abstained from.
        correct: Right guesses v.
        delta: In [0, 1).
        confidence: In (0, 1).

    Returns:
        The largest epsilon that v right guesses rule out, 0 where they rule out none; always 0 for
        2 m delta > 1, where the theorem's delta term swallows what could be seen.

    Raises:
        PrivacyError: A number is impossible.

    Guarantee:
        A mechanism that is (epsilon, delta)-private when a unit is added or removed gets a bound above epsilon with
        probability at most 1 - ``confidence``, whatever its canaries and scores are. Never falls as ``correct`` grows.

    Source:
        Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, Theorem 5.2: P[V >= v] <= beta + 2 m delta alpha.

    Example:
        >>> round(one_run_bound(canaries=1000, guesses=100, correct=90, delta=1e-5), 4)
        1.6261
    """
    check_counts(canaries=canaries, guesses=guesses, correct=correct)
    check_chances(delta, confidence)
    if not 2 * canaries * delta <= 1:
        return 0.0
    p = 1 - confidence
    low, high = 0.0, float(special.logit(p ** (1 / guesses)))  # where r of r right have probability p

    def likely(epsilon: float) -> bool:
        return _chance(epsilon, canaries=canaries, guesses=guesses, correct=correct, delta=delta) > p

    if not high > 0 or likely(low):
        return 0.0
    for _ in range(50):  # the chance never falls as epsilon grows, given 2 m delta <= 1
        middle = (low + high) / 2
        low, high = (low, middle) if likely(middle) else (middle, high)
    return low


def fewest_correct(
    *, canaries: int, guesses: int, epsilon: float, delta: float, confidence: float = 0.95
) -> int | None:
    """Right guesses from which on ``one_run_bound`` exceeds ``epsilon``; None where not even all of them do.

    Args:
        canaries: See ``one_run_bound``.
        guesses: See ``one_run_bound``.
        epsilon: Claimed; finite and >= 0.
        delta: See ``one_run_bound``.
        confidence: See ``one_run_bound``.

    Raises:
        PrivacyError: A number is impossible.
    """
    check_counts(canaries=canaries, guesses=guesses, correct=0)
    check_chances(delta, confidence)
    if not 0 <= epsilon < math.inf:
        raise PrivacyError(f"the claimed epsilon must be finite and >= 0, got {epsilon}.")
    low, high = 0, guesses + 1
    while high - low > 1:
        middle = (low + high) // 2
        chance = _chance(epsilon, canaries=canaries, guesses=guesses, correct=middle, delta=delta)
        low, high = (low, middle) if chance < 1 - confidence else (middle, high)
    return high if high <= guesses and 2 * canaries * delta <= 1 else None


def count_correct(scores: Scores, inside: Coins, *, guesses: int) -> int:
    """Guess "in" for the highest scores and "out" for the lowest, half of the guesses each, and count what is right.

    Args:
        scores: (m,), higher where a canary looks more like one that was in.
        inside: (m,), which ones were.
        guesses: How many to guess, at most m; fixed before the scores were seen.

    Raises:
        PrivacyError: Shapes differ, a score is NaN, or more guesses than canaries.

    Guarantee:
        Equal scores are taken in an order that knows nothing of the coins, whatever order they are given in.
    """
    scores, inside = np.asarray(scores), np.asarray(inside)
    if not (scores.ndim == 1 and scores.shape == inside.shape and inside.dtype == np.bool_):
        raise PrivacyError(
            f"scores and coins must be one each a canary, got {scores.shape} and {inside.dtype} {inside.shape}."
        )
    check_counts(canaries=scores.size, guesses=guesses, correct=0)
    _check_scores(scores)
    return int(count_correct_each(scores, inside, guesses=guesses))


def count_correct_each(scores: Scores, inside: Coins, *, guesses: int) -> npt.NDArray[np.int64]:
    """``count_correct`` along the last axis, unchecked: (..., m) -> (...)."""
    lowest = guesses // 2
    ties = np.broadcast_to(np.random.default_rng(_TIES).permutation(scores.shape[-1]), scores.shape)
    rising = np.lexsort((ties, scores))  # the last key leads
    called_in, called_out = rising[..., rising.shape[-1] - (guesses - lowest) :], rising[..., :lowest]
    right = np.take_along_axis(inside, called_in, -1).sum(-1) + np.take_along_axis(~inside, called_out, -1).sum(-1)
    return np.asarray(right, dtype=np.int64)


def auc(inside: Scores, outside: Scores) -> Interval:
    """Chance that one that was in scores higher than one that was out, equal scores counting half; 95 % interval.

    Args:
        inside: Scores of those that were in.
        outside: Scores of those that were out.

    Returns:
        The area under the ROC curve with Wilson's interval for as many trials as the smaller group has members. It is
        somewhat wide: no distribution of scores has a larger variance. It is never empty, not even at 1.

    Raises:
        PrivacyError: A group is empty, or a score is NaN.

    Source:
        Birnbaum & Klose 1957, Ann. Math. Statist. 28: Var <= AUC (1 - AUC) / min(n, n'). Wilson 1927.
    """
    inside, outside = _checked(inside), _checked(outside)
    ranks = stats.rankdata(np.concatenate([inside, outside]))[: inside.size]
    value = float((ranks.sum() - inside.size * (inside.size + 1) / 2) / (inside.size * outside.size))
    trials, z = min(inside.size, outside.size), float(stats.norm.isf(0.025))
    centre = (value + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z * math.sqrt(value * (1 - value) / trials + z**2 / (4 * trials**2)) / (1 + z**2 / trials)
    return Interval(value, max(0.0, centre - half), min(1.0, centre + half))


def tpr_at_fpr(inside: Scores, outside: Scores, *, fpr: float = 0.01) -> Interval:
    """Share of those that were in found by the threshold that calls ``fpr`` of those that were out in; 95 % interval.

    Args:
        inside: Scores of those that were in.
        outside: Scores of those that were out; below about 440 of them the lower end is 0 at an FPR of .01.
        fpr: In (0, 1).

    Returns:
        The share above the threshold at which at most ``fpr`` of the scores of ``outside`` lie. The interval is for the
        rate at the true threshold: four exact ends, two of where that lies and two of the share there, each at 1.25 %.

    Raises:
        PrivacyError: ``fpr`` is impossible, a group is empty, or a score is NaN.

    Guarantee:
        The interval holds the true rate with probability >= 95 % if scores are independent.
    """
    if not 0 < fpr < 1:
        raise PrivacyError(f"fpr must be in (0, 1), got {fpr}. .01 is usual.")
    inside, outside = _checked(inside), _checked(outside)
    falling, tail = np.sort(outside)[::-1], 0.0125
    below = stats.binom.cdf(np.arange(outside.size), outside.size, fpr)  # chance of at most k beyond the true threshold
    strict, loose = int(np.sum(below <= tail)), int(np.sum(below < 1 - tail)) + 1
    high_threshold = falling[strict - 1] if strict else math.inf
    low_threshold = falling[loose - 1] if loose <= outside.size else -math.inf
    threshold = falling[math.floor(fpr * outside.size)]
    value = float(np.mean(inside > threshold))
    at_least, at_most = int(np.sum(inside > high_threshold)), int(np.sum(inside >= low_threshold))
    return Interval(
        value,
        float(_lowest(at_least, inside.size, tail)),
        float(_highest(at_most, inside.size, tail)),
    )


def _chance(epsilon: float, *, canaries: int, guesses: int, correct: int, delta: float) -> float:
    """Most an (epsilon, delta)-private mechanism can have of ``correct`` right guesses or more.

    With W ~ Bin(guesses, q) it is beta + max_i c (P[W >= v - i] - beta) / i, c = 2 m delta. Its slope in q is, for
    every i, r P[W' = v - 1] (1 - c / i) + r P[W' = v - i - 1] c / i with W' ~ Bin(r - 1, q): not negative for c <= 1.
    """
    at_least = stats.binom.sf(np.arange(-1, correct), guesses, special.expit(epsilon))  # of 0, 1, ... v right
    beta = float(at_least[-1])
    steps = np.arange(correct, 0, -1)
    alpha = float(np.max((at_least[:-1] - beta) / steps, initial=0.0))
    return beta + 2 * canaries * delta * alpha


def _lowest(hits: npt.ArrayLike, trials: int, tail: float) -> Scores:
    """Lower Clopper-Pearson end: 0 for no hit."""
    hits = np.asarray(hits)
    return np.where(hits > 0, stats.beta.ppf(tail, np.maximum(hits, 1), trials - hits + 1), 0.0)


def _highest(hits: npt.ArrayLike, trials: int, tail: float) -> Scores:
    """Upper Clopper-Pearson end: 1 for hits alone."""
    hits = np.asarray(hits)
    return np.where(hits < trials, stats.beta.isf(tail, hits + 1, np.maximum(trials - hits, 1)), 1.0)


def _checked(scores: Scores) -> Scores:
    """The scores of one group as float64, at least one, none NaN."""
    scores = np.asarray(scores, dtype=np.float64)
    if not (scores.ndim == 1 and scores.size):
        raise PrivacyError(f"scores must be one row with at least one entry, got shape {scores.shape}.")
    _check_scores(scores)
    return scores


def _check_scores(scores: Scores) -> None:
    if np.isnan(scores).any():
        raise PrivacyError(f"scores must be numbers, got {int(np.isnan(scores).sum())} NaN; the attack itself failed.")


def check_counts(*, canaries: int, guesses: int, correct: int) -> None:
    """Refuse more guesses than canaries and more right ones than guesses."""
    if not 1 <= guesses <= canaries:
        raise PrivacyError(f"guesses must be 1 to the {canaries} canaries, got {guesses}.")
    if not 0 <= correct <= guesses:
        raise PrivacyError(f"correct guesses must be 0 to the {guesses} made, got {correct}.")


def check_chances(delta: float, confidence: float) -> None:
    """Refuse what is no probability."""
    if not 0 <= delta < 1:
        raise PrivacyError(f"delta must be in [0, 1), got {delta}. It is the claim's own.")
    if not 0 < confidence < 1:
        raise PrivacyError(f"confidence must be in (0, 1), got {confidence}. .95 is usual.")
