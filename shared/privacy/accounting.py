"""Price in epsilon what is released of one unit over a campaign, and find the noise for a target."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from shared.errors import PrivacyError
from shared.privacy.mechanisms import MAX_EPSILON, AnyMechanism, DistributedMechanism, Mechanism, check_delta
from shared.privacy.zcdp import distributed_epsilon, zcdp_epsilon

__all__ = [
    "MAX_EPSILON",
    "AnyMechanism",
    "DistributedMechanism",
    "Mechanism",
    "calibrate_distributed",
    "calibrate_noise",
    "epsilon",
    "epsilon_by_participation",
    "epsilon_together",
    "grid_excess",
    "zcdp_epsilon",
]

_MIN_NOISE_MULTIPLIER = 0.05  # one release at MAX_EPSILON needs .06
_MAX_NOISE_MULTIPLIER = 1e9
_MAX_SAMPLED_RELEASES = 1_000_000
_TOLERANCE = 2e-3  # relative: calibrated epsilon below its target, and noise above the smallest
_GRID_STEPS = 1e5  # a grid finer than epsilon / 1e5 costs seconds and changes the sixth digit

_TOGETHER_GRID = 1e-3  # pessimistic by less than .001 a campaign


def epsilon(mechanism: AnyMechanism, *, delta: float, discretization: float = 1e-4) -> float:
    """Price a campaign: by its privacy loss distribution, or in concentrated privacy where devices share the noise.

    Args:
        mechanism: What is released of one unit.
        delta: In [1e-12, 1).
        discretization: Grid of the privacy loss; epsilon / 100,000 is used where that is coarser.

    Returns:
        An epsilon the campaign satisfies with ``delta``, units added, removed or replaced by zero; ``inf`` above 200,
        for a noise multiplier below .05, and for more than a million sampled steps.

    Raises:
        PrivacyError: ``delta`` or ``discretization`` is impossible.

    Guarantee:
        Not below the true epsilon, since a coarser grid only raises it. One step more never lowers it.

    Source:
        Google dp-accounting; Doroshenko et al. 2022, arXiv:2207.04380 (connect the dots). A choice made once adds its
        own epsilon (basic composition, Dwork et al. 2006). Discrete noise is priced as
        the Gaussian's plus what ``grid_excess`` proves. Noise in shares: ``shared/privacy/zcdp.py``.
    """
    check_delta(delta)
    if not (math.isfinite(discretization) and discretization > 0):
        raise PrivacyError(f"discretization must be finite and > 0, got {discretization}. 1e-4 is usual.")
    if isinstance(mechanism, DistributedMechanism):
        return distributed_epsilon([mechanism], delta=delta)
    return _price_all(mechanism, delta, discretization)


def grid_excess(mechanism: Mechanism, *, epsilon: float, delta: float) -> float:
    """How much epsilon grows when the Gaussian noise behind ``epsilon`` is replaced by discrete noise on the grid.

    Args:
        mechanism: What one device releases; N = coordinates x releases numbers in all.
        epsilon: Of the same mechanism with continuous noise, at ``delta`` x (1 - 1e-4).
        delta: Of the discrete mechanism.

    Returns:
        N (t^2 + 1) / (24 s^2) with s = ``grid_sigma``; 0 for continuous noise, inf where the bound does not hold.

    Guarantee:
        The discrete mechanism is (epsilon + excess, delta)-private.

    Source:
        Ours. Contributions are integers, so rounding the sum with Gaussian noise is post-processing of the Gaussian
        mechanism and adds exactly the rounded Gaussian r. Against it the discrete Gaussian p has, up to a constant that
        cancels between neighbours, -1 / (24 s^2) <= log r(k) / p(k) <= k^2 / (24 s^4) (by sinh(x) / x <= exp(x^2 / 6)
        and Jensen). Hence, with all N noises within t s, p on D is at most exp(N / 24 s^2) times r on D, and r on D' at
        most exp(N t^2 / 24 s^2) times p on D'; t is such that e^epsilon times the chance of a noise beyond it is below
        1e-5 of delta, which grows by exp(N / 24 s^2) at most, as the constant is positive. Sampling does not matter:
        the bound holds given every draw. ``noise.py`` has the two inequalities, docs/privacy.md the steps.
    """
    if not mechanism.coordinates:
        return 0.0
    numbers, per_number = mechanism.coordinates * mechanism.releases, 1 / (24 * mechanism.grid_sigma**2)
    if not (numbers * per_number <= 5e-5 and math.isfinite(epsilon)):
        return math.inf
    t_squared = 2 * (epsilon + math.log(4 * numbers) - math.log(1e-5 * delta))
    return numbers * (t_squared + 1) * per_number if t_squared <= mechanism.grid_sigma**2 else math.inf


def _price_all(mechanism: Mechanism, delta: float, discretization: float) -> float:
    """Price of continuous noise, and what discrete noise adds to it."""
    once = mechanism.choice_epsilon
    if not mechanism.coordinates:
        return once + _refined_price(mechanism.continuous, delta, discretization)
    continuous = _refined_price(mechanism.continuous, delta * (1 - 1e-4), discretization)
    return once + continuous + grid_excess(mechanism, epsilon=continuous, delta=delta)


def epsilon_by_participation(mechanism: AnyMechanism, *, delta: float) -> list[float]:
    """Price the campaign after each round a device joins, for a curve.

    Args:
        mechanism: What is released of one unit.
        delta: In [1e-12, 1).

    Returns:
        Epsilon after 1, 2, ... ``max_participations`` rounds. The last equals ``epsilon()``; the others
        come from a grid of epsilon / 10,000, at least 1e-4, and lie a little high.

    Raises:
        PrivacyError: ``delta`` is impossible.
    """
    total = epsilon(mechanism, delta=delta)
    if isinstance(mechanism, DistributedMechanism) or not math.isfinite(total):
        rounds = range(1, mechanism.max_participations + 1)
        return [epsilon(replace(mechanism, max_participations=k), delta=delta) for k in rounds]
    excess = total - epsilon(mechanism.continuous, delta=delta)
    one_round = _distribution(replace(mechanism, max_participations=1), max(1e-4, total / 1e4))
    composed, curve = one_round, []
    for _ in range(1, mechanism.max_participations):
        curve.append(min(float(composed.get_epsilon_for_delta(delta)) + excess, total))
        composed = composed.compose(one_round)
    return [*curve, total]


def calibrate_noise(
    *,
    epsilon: float,
    delta: float,
    sampling_rate: float,
    steps: int,
    max_participations: int,
    coordinates: int = 0,
    grid_sigma: float = math.inf,
    choice_epsilon: float = 0.0,
) -> float:
    """Find the smallest noise multiplier whose certified epsilon is within the target.

    Args:
        epsilon: Target for the whole campaign; in (0, 200].
        delta: In [1e-12, 1), and below the chance that a record is sampled at all.
        sampling_rate: See ``Mechanism``.
        steps: See ``Mechanism``.
        max_participations: See ``Mechanism``.
        coordinates: See ``Mechanism``.
        grid_sigma: See ``Mechanism``.
        choice_epsilon: See ``Mechanism``; below ``epsilon``.

    Returns:
        The noise multiplier; its epsilon lies within .2 % below the target.

    Raises:
        PrivacyError: An impossible value, or no noise reaches the target.

    Guarantee:
        ``epsilon()`` of the returned mechanism is at most the target: that very price was evaluated.

    Source:
        Start value: Balle & Wang 2018, arXiv:1805.06530, and under sampling the central limit theorem of
        Bu et al. 2020, arXiv:1911.11607. It only saves time: search and certificate are the accountant's.
    """
    _check_target(epsilon)
    check_delta(delta)
    unit = Mechanism(1.0, sampling_rate, steps, max_participations, coordinates, grid_sigma, choice_epsilon)
    if not choice_epsilon < epsilon:
        raise PrivacyError(
            f"persona.epsilon must be below privacy.epsilon, {epsilon:g}, out of which it is spent, got "
            f"{choice_epsilon:g}."
        )
    if delta >= unit.chance_of_a_draw:
        raise PrivacyError(
            f"privacy.delta must be below the chance that a record is ever sampled, got {delta}: "
            "the target would hold without noise and protect nobody. A common choice is 1e-5."
        )

    def search(start: float, price: Callable[[Mechanism], float]) -> float:
        return _smallest_noise(lambda noise: price(replace(unit, noise_multiplier=noise)), start=start, target=epsilon)

    noise = _guess_noise(epsilon - choice_epsilon, delta, unit)
    for share in (4e-3, 4e-4):
        grid = max(1e-4, share * epsilon)
        noise = search(noise, lambda m, grid=grid: choice_epsilon + _price(m.continuous, delta, grid))  # type: ignore[misc]
    return search(noise, lambda m: _price_all(m, delta, 1e-4))  # as a rule a single evaluation


def calibrate_distributed(
    *, epsilon: float, delta: float, max_participations: int, coordinates: int, shares: int, share_sigma: float
) -> float:
    """Find the smallest noise multiplier of a secure sum whose certified epsilon is within the target.

    Args:
        epsilon: Target for the whole campaign; in (0, 200].
        delta: In [1e-12, 1).
        max_participations: See ``DistributedMechanism``.
        coordinates: See ``DistributedMechanism``.
        shares: See ``DistributedMechanism``.
        share_sigma: See ``DistributedMechanism``.

    Returns:
        The noise multiplier; its epsilon lies within .2 % below the target.

    Raises:
        PrivacyError: An impossible value, or no noise reaches the target.

    Guarantee:
        ``epsilon()`` of the returned mechanism is at most the target: that very price was evaluated.
    """
    _check_target(epsilon)
    check_delta(delta)
    unit = DistributedMechanism(1.0, max_participations, coordinates, shares, share_sigma)
    rho = (math.sqrt(epsilon - math.log(delta)) - math.sqrt(-math.log(delta))) ** 2  # Bun & Steinke 2016, a start
    return _smallest_noise(
        lambda noise: distributed_epsilon([replace(unit, noise_multiplier=noise)], delta=delta),
        start=math.sqrt(max_participations / (2 * rho)),
        target=epsilon,
    )


def epsilon_together(mechanisms: Sequence[AnyMechanism], *, delta: float) -> float:
    """Price several campaigns on the same units as one.

    Args:
        mechanisms: What is released in each; at least one.
        delta: In [1e-12, 1).

    Returns:
        Epsilon of their privacy loss distributions composed; where noise is in shares, of their concentrated privacy
        added up; of both kinds, the sum at half of ``delta`` each.

    Raises:
        PrivacyError: ``delta`` is impossible.
    """
    check_delta(delta)
    shared = [mechanism for mechanism in mechanisms if isinstance(mechanism, DistributedMechanism)]
    alone = [mechanism for mechanism in mechanisms if isinstance(mechanism, Mechanism)]
    if shared and alone:
        return epsilon_together(shared, delta=delta / 2) + epsilon_together(alone, delta=delta / 2)
    if shared:
        return distributed_epsilon(shared, delta=delta)
    first, *rest = (_distribution(mechanism, _TOGETHER_GRID) for mechanism in alone)
    for other in rest:
        first = first.compose(other)
    together = float(first.get_epsilon_for_delta(delta * (1 - 1e-4)))
    besides = (grid_excess(each, epsilon=together, delta=delta) + each.choice_epsilon for each in alone)
    return together + sum(besides)


def _check_target(epsilon: float) -> None:
    if not 0 < epsilon <= MAX_EPSILON:
        raise PrivacyError(
            f"privacy.epsilon must be in (0, {MAX_EPSILON:.0f}], got {epsilon}. "
            'A common choice is between 1 and 8; for no privacy set privacy.trust = "none".'
        )


def _distribution(mechanism: Mechanism, grid: float) -> Any:
    """Return the privacy loss distribution of the whole campaign, records added or removed, rounded up."""
    from dp_accounting.pld import privacy_loss_distribution  # two seconds: only for those who price

    sigma, rate, releases = mechanism.noise_multiplier, mechanism.sampling_rate, mechanism.releases
    if rate == 1:  # n Gaussian releases weigh as much as one with sqrt(n) times less noise
        return privacy_loss_distribution.from_gaussian_mechanism(
            sigma / math.sqrt(releases), value_discretization_interval=grid
        )
    return privacy_loss_distribution.from_gaussian_mechanism(
        sigma, sampling_prob=rate, value_discretization_interval=grid
    ).self_compose(releases)


@lru_cache(maxsize=1024)
def _price(mechanism: Mechanism, delta: float, grid: float) -> float:
    """Price on one grid."""
    if mechanism.noise_multiplier < _MIN_NOISE_MULTIPLIER or _typical_loss(mechanism) > MAX_EPSILON:
        return math.inf  # the distribution might not fit into memory
    if mechanism.sampling_rate < 1 and mechanism.releases > _MAX_SAMPLED_RELEASES:
        return math.inf  # convolving so many takes minutes
    price = float(_distribution(mechanism, grid).get_epsilon_for_delta(delta))
    return price if price <= MAX_EPSILON else math.inf


def _refined_price(mechanism: Mechanism, delta: float, discretization: float) -> float:
    """Price on ever finer grids down to ``discretization``, or to what is fine enough for this epsilon."""
    grid = max(1e-2, discretization)
    while True:
        price = _price(mechanism, delta, grid)
        finer = max(discretization, price / _GRID_STEPS)
        if finer > grid / 2:
            return price
        grid = finer


def _typical_loss(mechanism: Mechanism) -> float:
    """Estimate the expected privacy loss from below; epsilon lies above it at any small delta."""
    sigma, rate = mechanism.noise_multiplier, mechanism.sampling_rate
    if rate == 1:
        return mechanism.releases / (2 * sigma**2)
    # E log(1 - q + q e^L) is at least E log(q e^L) for a sampled record and log(1 - q) for one left out
    per_step = rate * (1 / (2 * sigma**2) + math.log(rate)) + (1 - rate) * math.log1p(-rate)
    return mechanism.releases * max(per_step, rate**2 / (8 * sigma**2))


def _guess_noise(epsilon: float, delta: float, unit: Mechanism) -> float:
    """Guess the noise: exact without sampling, by a central limit theorem with it."""
    from dp_accounting.pld import common, privacy_loss_mechanism

    target = common.DifferentialPrivacyParameters(epsilon, delta)
    alone = float(privacy_loss_mechanism.GaussianPrivacyLoss.from_privacy_guarantee(target).standard_deviation)
    if unit.sampling_rate == 1:
        return alone * math.sqrt(unit.releases)
    return 1 / math.sqrt(math.log1p(1 / (alone * unit.sampling_rate) ** 2 / unit.releases))


def _smallest_noise(price: Callable[[float], float], *, start: float, target: float) -> float:
    """Return a noise multiplier that ``price`` puts just within the target, by secants on log scales."""
    low, high, priced = -math.inf, math.log(_MAX_NOISE_MULTIPLIER), False  # log noise; was ``high`` priced?
    x, slope, previous = math.log(start), -1.5, (math.nan, math.nan)
    for _ in range(100):
        value = price(math.exp(x))
        excess = math.log(value / target) if 0 < value < math.inf else math.copysign(math.inf, value - target)
        low, high, priced = (x, high, priced) if excess > 0 else (low, x, True)
        if -_TOLERANCE <= excess <= 0 or high - low < _TOLERANCE / 10:
            break
        if math.isinf(excess):
            guess = x + math.copysign(1.0, excess)
        else:
            secant = (excess - previous[1]) / (x - previous[0])
            slope = min(-0.3, secant) if math.isfinite(secant) else slope
            previous = (x, excess)
            guess = x - (excess + _TOLERANCE / 2) / slope
        x = guess if low < guess < high else (low + high) / 2
    if not priced:
        raise PrivacyError(
            f"privacy.epsilon must be within reach, got {target}: no noise reaches it with so many steps and "
            "so small a delta. Raise privacy.epsilon or privacy.delta, or lower privacy.max_participations."
        )
    return math.exp(high)
