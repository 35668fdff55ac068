"""Which faults a one-run audit would find: trials on the mechanism itself, in seconds and without a model.

A canary that is in moves its score by the clip bound C in every release that draws it; every release's noise moves the
score by a Gaussian of standard deviation z C. The attack sees their sum, which at full sampling is all there is to see.
A fault that is not found here is not found by the audit either, and a pass says nothing of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq

from shared.errors import PrivacyError
from shared.privacy import accounting
from shared.privacy.accounting import calibrate_distributed
from shared.privacy.mechanisms import MAX_EPSILON, AnyMechanism, DistributedMechanism, check_delta
from simulations.audit.bounds import Coins, Scores, count_correct_each, fewest_correct
from simulations.audit.gaussian import fewest_correct_gaussian, is_gaussian

CANARIES = 1000
GUESSES: Mapping[str, int] = {
    "one-run": 200,  # a fifth: finds sigma/4 most often, for epsilon .5 to 2 and every sampling rate tried
    "gaussian": 400,  # two fifths: finds sigma/2 most often at epsilon 8, and hardly less than others below it
}
Bound = Literal["one-run", "gaussian"]
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0)
TRUE = "true noise"  # the null: what is found here is a false alarm
FAULTS: Mapping[str, float] = {"sigma/2": 1 / 2, "sigma/4": 1 / 4, "sigma/10": 1 / 10, "no noise": 0.0}
ENOUGH = 0.8  # share of trials in which a fault must be found for the audit to have power

_GROSS = 1 / 4  # share of the noise; at this much or less a fault must be found
_FEWEST = {"one-run": fewest_correct, "gaussian": fewest_correct_gaussian}
_PRICE_STEPS = 300  # grid steps an epsilon of the table is priced in: its noise comes out a little high, never low


def power_table(
    mechanism: AnyMechanism,
    *,
    delta: float,
    canaries: int = CANARIES,
    guesses: int | None = None,
    bound: Bound = "one-run",
    epsilons: Sequence[float] = EPSILONS,
    faults: Mapping[str, float] = FAULTS,
    trials: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """How often each fault would be found, were the same releases calibrated to each epsilon.

    Args:
        mechanism: What is released of one unit; its noise multiplier is replaced by the one each epsilon needs.
        delta: Of the claims.
        canaries: See ``find_faults``.
        guesses: See ``find_faults``.
        bound: See ``find_faults``.
        epsilons: Claims.
        faults: See ``find_faults``.
        trials: See ``find_faults``.
        seed: See ``find_faults``.

    Returns:
        JSON: the arguments, and ``rows``, one an epsilon: ``epsilon``, ``noise_multiplier``, ``found.<fault>`` with the
        null first, ``power`` (whether every fault down to a quarter of the noise is found in ``enough`` of the trials).

    Raises:
        PrivacyError: A number is impossible, or no noise reaches an epsilon.
    """
    guesses = GUESSES[bound] if guesses is None else guesses
    rows = []
    for index, target in enumerate(epsilons):
        claimed = replace(mechanism, noise_multiplier=noise_for(mechanism, epsilon=target, delta=delta))
        found = find_faults(
            claimed,
            epsilon=target,
            delta=delta,
            canaries=canaries,
            guesses=guesses,
            bound=bound,
            faults=faults,
            trials=trials,
            seed=seed + index,
        )
        gross = [found[name] for name, share in faults.items() if share <= _GROSS]
        power = bool(gross) and min(gross) >= ENOUGH
        rows.append({"epsilon": target, "noise_multiplier": claimed.noise_multiplier, "found": found, "power": power})
    return {
        "bound": bound,
        "canaries": canaries,
        "guesses": guesses,
        "delta": delta,
        "confidence": 0.95,
        "trials": trials,
        "enough": ENOUGH,
        "releases": mechanism.releases,
        "sampling_rate": _rate(mechanism),
        "rows": rows,
    }


def find_faults(
    mechanism: AnyMechanism,
    *,
    epsilon: float,
    delta: float,
    canaries: int = CANARIES,
    guesses: int | None = None,
    bound: Bound = "one-run",
    faults: Mapping[str, float] = FAULTS,
    trials: int = 100,
    seed: int = 0,
) -> dict[str, float]:
    """How often a bound at 95 % exceeds the claim, of one mechanism with its noise and with less of it.

    Args:
        mechanism: As claimed.
        epsilon: As claimed.
        delta: As claimed.
        canaries: Canaries of a run; a fair coin each.
        guesses: Guesses of a run; by default what ``GUESSES`` says for the bound, which is for 1000 canaries.
        bound: ``one-run``, or ``gaussian`` where the mechanism ``is_gaussian``.
        faults: Name -> share of the claimed noise that is really there.
        trials: Runs a fault.
        seed: Of the trials.

    Returns:
        ``TRUE`` (false alarms) and every fault -> share of the trials.

    Raises:
        PrivacyError: A number is impossible, or the bound is no proof for the mechanism.
    """
    if bound == "gaussian" and not is_gaussian(mechanism):
        raise PrivacyError(
            "the gaussian bound needs noise that is nearly Gaussian and a sampling rate of 1, "
            f"got {type(mechanism).__name__} at {_rate(mechanism)}; take the one-run bound."
        )
    if not trials >= 1:
        raise PrivacyError(f"trials must be at least 1, got {trials}. 100 take a second.")
    guesses = GUESSES[bound] if guesses is None else guesses
    fewest = _FEWEST[bound](canaries=canaries, guesses=guesses, epsilon=epsilon, delta=delta)
    generator, found = np.random.default_rng([seed, 7]), {}
    for name, share in {TRUE: 1.0, **faults}.items():
        if not 0 <= share < math.inf:
            raise PrivacyError(f"a fault must be a share of the noise, finite and >= 0, got {share} for {name}.")
        inside, scores = _draw(mechanism, share, (trials, canaries), generator)
        right = count_correct_each(scores, inside, guesses=guesses)
        found[name] = float(np.mean(right >= fewest)) if fewest is not None else 0.0
    return found


@lru_cache(maxsize=64)
def noise_for(mechanism: AnyMechanism, *, epsilon: float, delta: float) -> float:
    """The noise multiplier these releases need for ``epsilon``, within a few percent above: quick, not for a policy.

    Raises:
        PrivacyError: A number is impossible, or no noise reaches the target.
    """
    check_delta(delta)
    if not 0 < epsilon <= MAX_EPSILON:
        raise PrivacyError(f"an epsilon of the table must be in (0, {MAX_EPSILON:.0f}], got {epsilon}.")
    if isinstance(mechanism, DistributedMechanism):
        return calibrate_distributed(
            epsilon=epsilon,
            delta=delta,
            max_participations=mechanism.max_participations,
            coordinates=mechanism.coordinates,
            shares=mechanism.shares,
            share_sigma=mechanism.share_sigma,
        )

    def excess(log_noise: float) -> float:
        noisy = replace(mechanism.continuous, noise_multiplier=math.exp(log_noise))
        priced = accounting.epsilon(noisy, delta=delta, discretization=epsilon / _PRICE_STEPS)
        return math.log(min(max(priced / epsilon, 1e-9), 1e9))

    low, high = math.log(0.05), math.log(1e3 * math.sqrt(mechanism.releases))
    if not (excess(low) >= 0 >= excess(high)):
        raise PrivacyError(f"no noise was found that makes {mechanism.releases} releases cost epsilon {epsilon}.")
    return math.exp(brentq(excess, low, high, xtol=1e-3)) * (1 + 1e-3)


def _rate(mechanism: AnyMechanism) -> float:
    return 1.0 if isinstance(mechanism, DistributedMechanism) else mechanism.sampling_rate


def _draw(
    mechanism: AnyMechanism, share: float, shape: tuple[int, int], generator: np.random.Generator
) -> tuple[Coins, Scores]:
    """Coins and scores of (trials, canaries), in units of the clip bound."""
    inside = generator.random(shape) < 0.5
    drawn = generator.binomial(mechanism.releases, _rate(mechanism), shape)
    stddev = share * mechanism.noise_multiplier * math.sqrt(mechanism.releases)
    return inside, inside * drawn + generator.normal(0.0, 1.0, shape) * stddev
