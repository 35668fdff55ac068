"""What an attack's guesses prove: lower bounds on epsilon, and how well a score tells members from others.

A bound says: were the mechanism (epsilon, delta)-private for the epsilon returned, guesses this good would come up in
at most 1 - confidence of all runs. The canaries' coins and the number of guesses are fixed before scores are seen.
"""

import math

import numpy as np
import numpy.typing as npt
from scipy import special, stats

from shared.errors import PrivacyError
from shared.metrics import Interval

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


def clopper_pearson(hits: int, trials: int, *, confidence: float = 0.95) -> Interval:
    """A proportion with its exact two-sided interval; each end alone holds with probability (1 + ``confidence``) / 2.

    Raises:
        PrivacyError: More hits than trials, no trial, or an impossible confidence.
    """
    if not (trials >= 1 and 0 <= hits <= trials):
        raise PrivacyError(f"hits must be 0 to trials and trials at least 1, got {hits} of {trials}.")
    check_chances(0.0, confidence)
    tail = (1 - confidence) / 2
    return Interval(hits / trials, float(_lowest(hits, trials, tail)), float(_highest(hits, trials, tail)))


def rates_bound(
    *, hits: int, inside: int, false_alarms: int, outside: int, delta: float, confidence: float = 0.95
) -> float:
    """Lower bound on epsilon from how often one test, fixed beforehand, says "in".

    Args:
        hits: Of those that were in, how many the test calls in.
        inside: How many were in.
        false_alarms: Of those that were out, how many the test calls in.
        outside: How many were out.
        delta: In [0, 1).
        confidence: In (0, 1); either rate gets half of what may fail.

    Returns:
        The larger of log (TPR - delta) / FPR and log (1 - FPR - delta) / (1 - TPR) at the worst ends of the rates'
        exact intervals; 0 where that is less.

    Raises:
        PrivacyError: A number is impossible.

    Guarantee:
        As ``one_run_bound``, **provided the scores are independent**: each from a run of its own, or of canaries that
        do not meet. Canaries that disturb each other in a single run are judged by ``one_run_bound``.

    Source:
        Kairouz, Oh, Viswanath 2015, arXiv:1311.0776, Theorem 2.1; Nasr et al. 2021, arXiv:2101.04535, section IV.
    """
    check_chances(delta, confidence)
    true_rate = clopper_pearson(hits, inside, confidence=confidence).low
    false_rate = clopper_pearson(false_alarms, outside, confidence=confidence).high
    return float(_epsilon_of(np.array(true_rate), np.array(false_rate), delta))


def threshold_bound(inside: Scores, outside: Scores, *, delta: float, confidence: float = 0.95, seed: int = 0) -> float:
    """``rates_bound`` of the test "score above a threshold": one half of the scores fix it, the other half is judged.

    Args:
        inside: Scores of those that were in, at least two.
        outside: Scores of those that were out, at least two.
        delta: In [0, 1).
        confidence: In (0, 1).
        seed: Of the split, which looks at no score.

    Raises:
        PrivacyError: A number is impossible, a score is NaN, or there are too few.

    Guarantee:
        As ``rates_bound``.
    """
    check_chances(delta, confidence)
    (choose_in, judge_in), (choose_out, judge_out) = (
        _halves(scores, np.random.default_rng([seed, which])) for which, scores in enumerate((inside, outside))
    )
    thresholds = np.unique(np.concatenate([choose_in, choose_out]))
    tail = (1 - confidence) / 2
    true_rates = _lowest(_above(choose_in, thresholds), choose_in.size, tail)
    false_rates = _highest(_above(choose_out, thresholds), choose_out.size, tail)
    best = thresholds[np.argmax(_epsilon_of(true_rates, false_rates, delta))]
    return rates_bound(
        hits=int(_above(judge_in, best)),
        inside=judge_in.size,
        false_alarms=int(_above(judge_out, best)),
        outside=judge_out.size,
        delta=delta,
        confidence=confidence,
    )


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


def _epsilon_of(true_rate: Scores, false_rate: Scores, delta: float) -> Scores:
    """Epsilon that a pair of rates needs, at least 0."""
    found = np.maximum((true_rate - delta) / false_rate, (1 - false_rate - delta) / (1 - true_rate))
    return np.log(np.maximum(found, 1.0))


def _lowest(hits: npt.ArrayLike, trials: int, tail: float) -> Scores:
    """Lower Clopper-Pearson end: 0 for no hit."""
    hits = np.asarray(hits)
    return np.where(hits > 0, stats.beta.ppf(tail, np.maximum(hits, 1), trials - hits + 1), 0.0)


def _highest(hits: npt.ArrayLike, trials: int, tail: float) -> Scores:
    """Upper Clopper-Pearson end: 1 for hits alone."""
    hits = np.asarray(hits)
    return np.where(hits < trials, stats.beta.isf(tail, hits + 1, np.maximum(trials - hits, 1)), 1.0)


def _above(scores: Scores, thresholds: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """How many scores lie above each threshold."""
    return np.asarray(scores.size - np.searchsorted(np.sort(scores), thresholds, side="right"), dtype=np.int64)


def _halves(scores: Scores, generator: np.random.Generator) -> tuple[Scores, Scores]:
    """Two halves at random."""
    scores = _checked(scores)
    if not scores.size >= 2:
        raise PrivacyError(f"a threshold needs at least two scores of each kind, got {scores.size}.")
    mixed = generator.permutation(scores)
    return mixed[: scores.size // 2], mixed[scores.size // 2 :]


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
