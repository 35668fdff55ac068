"""Noise in shares: its price against the exact law of sums, against dp-accounting, and with its parts left out."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from dp_accounting.rdp import rdp_privacy_accountant
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import PrivacyError
from shared.privacy import zcdp
from shared.privacy.accounting import (
    DistributedMechanism,
    Mechanism,
    calibrate_distributed,
    epsilon,
    epsilon_by_participation,
    epsilon_together,
    zcdp_epsilon,
)

NAN = math.nan
CAMPAIGN = DistributedMechanism(3.0, max_participations=20, coordinates=2000, shares=70, share_sigma=256.0)
EXACT = [  # sigma of a share in steps, shares, how far one user moves a coordinate, coordinates, rounds, delta
    (0.5, 2, 1, 1, 1, 1e-5),
    (0.5, 8, 1, 1, 50, 1e-5),
    (0.5, 8, 1, 5, 10, 1e-5),
    (0.6, 5, 1, 2, 20, 1e-3),
    (0.8, 3, 2, 1, 20, 1e-5),
    (1.0, 5, 2, 3, 4, 1e-8),
    (2.0, 10, 3, 1, 10, 1e-6),
    (4.0, 4, 8, 2, 10, 1e-5),
]
ROUGH = EXACT[1]  # where a share is so coarse that the sum's own shape shows


@functools.cache
def share_pmf(sigma: float) -> np.ndarray:
    """One discrete Gaussian, as far as float64 reaches."""
    k = np.arange(-math.ceil(14 * sigma + 14), math.ceil(14 * sigma + 14) + 1)
    weights = np.exp(-(k**2) / (2 * sigma**2))
    return weights / weights.sum()


@functools.cache
def sum_pmf(sigma: float, shares: int) -> np.ndarray:
    return functools.reduce(np.convolve, [share_pmf(sigma)] * shares)


@functools.cache
def exact_epsilon(sigma: float, shares: int, shift: int, releases: int, delta: float, *, upper: bool) -> float:
    """Bound of the true epsilon of a sum of shares, moved by ``shift`` in each of ``releases`` numbers.

    Numbers are independent, so that coordinates count like rounds. dp-accounting is given the exact probabilities and
    knows nothing of Gaussians.
    """
    log_p = {k: math.log(p) for k, p in enumerate(sum_pmf(sigma, shares)) if p > 1e-300}
    moved = {k + shift: log for k, log in log_p.items()}
    one = privacy_loss_distribution.from_two_probability_mass_functions(
        log_p, moved, pessimistic_estimate=upper, value_discretization_interval=1e-3
    )
    return float(one.self_compose(releases).get_epsilon_for_delta(delta))


def priced(sigma: float, shares: int, shift: int, coordinates: int, rounds: int) -> DistributedMechanism:
    """The mechanism in which one user moves each of the coordinates by ``shift``."""
    noise = math.sqrt(shares) * sigma / (shift * math.sqrt(coordinates))
    return DistributedMechanism(noise, rounds, coordinates, shares, sigma)


def gaussian_delta(price: float, noise: float, rounds: int) -> float:
    """Delta of one continuous Gaussian of as much noise, in closed form."""
    return float(GaussianPrivacyLoss(noise / math.sqrt(rounds)).get_delta_for_epsilon(price))


def without_tau(mechanism: DistributedMechanism, delta: float) -> float:
    return zcdp_epsilon(mechanism.releases / (2 * mechanism.noise_multiplier**2), delta)


@pytest.mark.parametrize(("sigma", "shares", "shift", "coordinates", "rounds", "delta"), EXACT)
def test_a_sum_of_shares_costs_no_more_than_certified(sigma, shares, shift, coordinates, rounds, delta):
    truth = exact_epsilon(sigma, shares, shift, coordinates * rounds, delta, upper=True)
    price = epsilon(priced(sigma, shares, shift, coordinates, rounds), delta=delta)
    assert truth <= price
    if sigma >= 1:
        assert price <= 1.1 * truth + 0.1


def test_a_price_that_leaves_something_out_is_below_the_truth():
    sigma, shares, shift, coordinates, rounds, delta = ROUGH
    truth = exact_epsilon(sigma, shares, shift, coordinates * rounds, delta, upper=False)
    right = priced(sigma, shares, shift, coordinates, rounds)
    assert truth <= epsilon(right, delta=delta)
    assert truth > without_tau(right, delta)
    assert gaussian_delta(truth, right.noise_multiplier, rounds) < delta  # the Gaussian's own price is below it too


@pytest.mark.parametrize(("sigma", "shares", "shift", "coordinates", "rounds", "delta"), EXACT[-3:])
def test_counting_colluders_noise_or_half_of_the_noise_would_show(sigma, shares, shift, coordinates, rounds, delta):
    right = priced(sigma, shares, shift, coordinates, rounds)
    truth = exact_epsilon(sigma, shares, shift, coordinates * rounds, delta, upper=False)
    everybody = replace(right, shares=2 * shares, noise_multiplier=right.noise_multiplier * math.sqrt(2))
    assert epsilon(everybody, delta=delta) < truth
    assert epsilon(right, delta=delta) < exact_epsilon(
        sigma / 2, shares, shift, coordinates * rounds, delta, upper=False
    )
    assert epsilon(replace(right, max_participations=rounds // 2), delta=delta) < truth


@pytest.mark.parametrize("sigma", [0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("shares", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("shift", [1, 2])
def test_every_renyi_divergence_is_within_both_bounds(sigma, shares, shift):
    law, tau, mu = sum_pmf(sigma, shares), zcdp.tau_of(shares, sigma), shift / (math.sqrt(shares) * sigma)
    here, moved = law[shift:], law[:-shift]
    seen = (here > 1e-250) & (moved > 1e-250)
    log_here, log_moved = np.log(here[seen]), np.log(moved[seen])
    for order in (1.01, 1.2, 1.5, 2, 3, 5, 8):
        truth = math.log(np.exp(order * log_here + (1 - order) * log_moved).sum()) / (order - 1)
        assert truth <= (order / 2 * mu**2 + tau) * (1 + 1e-9)
        assert truth <= order / 2 * (mu + tau) ** 2 * (1 + 1e-9)


def test_without_tau_the_renyi_divergence_would_be_missed():
    law, order = sum_pmf(0.5, 8), 1.01
    middle = law[law.size // 2 - 20 : law.size // 2 + 21]
    truth = math.log(np.sum(middle[1:] ** order * middle[:-1] ** (1 - order))) / (order - 1)
    assert truth > 1.1 * order / (2 * 8 * 0.5**2)


@pytest.mark.parametrize("sigma", [0.5, 0.7, 1.0, 1.4])
@pytest.mark.parametrize("shares", [2, 3, 10])
def test_tau_is_how_far_a_sum_is_from_one_discrete_gaussian(sigma, shares):
    law, one = sum_pmf(sigma, shares), share_pmf(math.sqrt(shares) * sigma)
    reach = math.ceil(4 * math.sqrt(shares) * sigma)
    near = [p[p.size // 2 - reach : p.size // 2 + reach + 1] for p in (law, one)]
    apart = float(abs(np.log(near[0] / near[1])).max())
    assert apart <= zcdp.tau_of(shares, sigma) / 2
    assert apart >= zcdp.tau_of(shares, sigma) / 6 or shares > 2  # of two shares it is the truth but for a constant


@pytest.mark.parametrize(
    ("noise", "rounds", "coordinates", "shares", "sigma", "which"),
    [(1.0, 3, 2, 5, 0.7, "apart"), (4.0, 10, 9, 5, 0.9, "joint"), (3.0, 5, 5000, 9, 1.0, "joint")],
)
def test_the_price_is_the_smaller_of_both_bounds_composed(noise, rounds, coordinates, shares, sigma, which):
    tau, delta = zcdp.tau_of(shares, sigma), 1e-5
    bounds = {
        "apart": rounds * coordinates * tau + zcdp_epsilon(rounds / (2 * noise**2), delta),
        "joint": zcdp_epsilon(rounds / 2 * (1 / noise + tau * math.sqrt(coordinates)) ** 2, delta),
    }
    assert min(bounds, key=bounds.__getitem__) == which
    assert min(bounds.values()) < 0.99 * max(bounds.values())
    price = epsilon(DistributedMechanism(noise, rounds, coordinates, shares, sigma), delta=delta)
    assert price == pytest.approx(bounds[which], rel=1e-12)


def test_tau_is_never_rounded_down_to_nothing():
    assert zcdp.tau_of(1, 0.5) == 0  # one share is a discrete Gaussian
    assert zcdp.tau_of(2, 2.0**16) > 0
    assert zcdp.tau_of(10**6, 2.0**16) < 1e-290
    for shares, sigma in ((2, 0.5), (7, 0.6), (100, 1.0)):
        terms = [math.exp(-2 * math.pi**2 * sigma**2 * k / (k + 1)) for k in range(1, shares)]
        assert 10 * math.fsum(terms) <= zcdp.tau_of(shares, sigma) <= 10 * math.fsum(terms) * (1 + 1e-8)


@pytest.mark.parametrize("rho", [1e-6, 1e-3, 0.1, 1.0, 20.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-5, 1e-2, 0.3])
def test_the_conversion_is_dp_accountings_at_its_best_order(rho, delta):
    orders = 1 + np.geomspace(0.011, 1e5, 20_000)
    known, _ = rdp_privacy_accountant.compute_epsilon(orders, rho * orders, delta)
    assert zcdp_epsilon(rho, delta) <= known * (1 + 1e-5) + 1e-9
    x = np.geomspace(1e-3, 1e9, 100_000)
    best = np.min(rho * (1 + x) + np.log1p(-1 / (1 + x)) - np.log(delta * (1 + x)) / x)
    assert zcdp_epsilon(rho, delta) >= best * (1 - 1e-6) - 1e-9


@pytest.mark.parametrize(("noise", "rounds", "delta"), [(0.7, 1, 1e-5), (20.0, 50, 1e-7)])
def test_fine_shares_cost_what_one_gaussian_costs_in_concentrated_privacy(noise, rounds, delta):
    fine = DistributedMechanism(noise, rounds, 1_000_000, 70, 2.0**16)
    assert epsilon(fine, delta=delta) == pytest.approx(zcdp_epsilon(rounds / (2 * noise**2), delta), rel=1e-12)
    assert gaussian_delta(epsilon(fine, delta=delta), noise, rounds) < delta
    assert gaussian_delta(epsilon(fine, delta=delta) / 1.13, noise, rounds) > delta


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    noise=st.floats(0.3, 50),
    rounds=st.integers(1, 100),
    coordinates=st.integers(1, 10_000),
    shares=st.integers(1, 300),
    sigma=st.one_of(st.floats(0.5, 3), st.floats(3, 2.0**16)),
    delta=st.floats(1e-10, 0.1),
)
def test_the_price_of_shares_is_monotone_in_every_argument(noise, rounds, coordinates, shares, sigma, delta):
    base = DistributedMechanism(noise, rounds, coordinates, shares, sigma)
    price = epsilon(base, delta=delta)
    assert epsilon(replace(base, noise_multiplier=noise * 1.01), delta=delta) <= price
    assert epsilon(replace(base, share_sigma=sigma * 1.1), delta=delta) <= price
    assert epsilon(replace(base, max_participations=rounds + 1), delta=delta) >= price
    assert epsilon(replace(base, coordinates=coordinates + 1), delta=delta) >= price
    assert epsilon(replace(base, shares=shares + 1), delta=delta) >= price  # with as much noise in all
    assert epsilon(base, delta=delta / 2) >= price
    assert without_tau(base, delta) <= price * (1 + 1e-12)


@pytest.mark.parametrize("noise", [0.8, 2.0, 8.0])
def test_it_is_never_cheaper_than_the_gaussian_of_the_same_noise(noise):
    for rounds in (1, 7, 30):
        for shares, sigma in ((1, 1.0), (9, 0.7), (70, 256.0)):
            price = epsilon(DistributedMechanism(noise, rounds, 3, shares, sigma), delta=1e-6)
            assert price == math.inf or gaussian_delta(price, noise, rounds) <= 1e-6


def test_rounds_campaigns_and_kinds_add_up():
    curve = epsilon_by_participation(CAMPAIGN, delta=1e-5)
    assert len(curve) == 20
    assert curve == sorted(set(curve))
    assert curve[4] == epsilon(replace(CAMPAIGN, max_participations=5), delta=1e-5)
    assert curve[-1] == epsilon(CAMPAIGN, delta=1e-5)
    twice = epsilon_together([CAMPAIGN, CAMPAIGN], delta=1e-5)
    assert twice == pytest.approx(epsilon(replace(CAMPAIGN, max_participations=40), delta=1e-5), rel=1e-12)
    rough = replace(CAMPAIGN, share_sigma=0.6, coordinates=3, max_participations=2)
    mixed = epsilon_together([rough, CAMPAIGN], delta=1e-5)
    assert max(epsilon(m, delta=1e-5) for m in (rough, CAMPAIGN)) < mixed
    assert epsilon_together([replace(m, share_sigma=256.0) for m in (rough, CAMPAIGN)], delta=1e-5) < mixed


def test_both_kinds_together_cost_at_least_what_two_gaussians_cost():
    central = Mechanism(3.0, 1.0, 1, 20, coordinates=2000, grid_sigma=2**24)
    both = epsilon_together([CAMPAIGN, central], delta=1e-5)
    assert both == pytest.approx(epsilon(CAMPAIGN, delta=5e-6) + epsilon_together([central], delta=5e-6))
    assert both >= epsilon_together([central, central], delta=1e-5)


@pytest.mark.parametrize(
    ("target", "delta", "rounds", "coordinates", "shares", "sigma"),
    [
        (8.0, 1e-5, 20, 2000, 70, 2.0**16),
        (1.0, 1e-6, 50, 100_000, 700, 256.0),
        (0.05, 1e-9, 5, 385, 3, 8.0),
        (150.0, 1e-5, 3, 10, 2, 2.0**16),
        (8.0, 1e-5, 5, 5, 4, 0.7),
    ],
)
def test_calibrated_shares_are_certified_and_smallest(target, delta, rounds, coordinates, shares, sigma):
    noise = calibrate_distributed(
        epsilon=target,
        delta=delta,
        max_participations=rounds,
        coordinates=coordinates,
        shares=shares,
        share_sigma=sigma,
    )
    found = DistributedMechanism(noise, rounds, coordinates, shares, sigma)
    assert target * 0.998 <= epsilon(found, delta=delta) <= target
    assert epsilon(replace(found, noise_multiplier=noise * 0.995), delta=delta) > target
    assert found.releases == rounds
    assert found.chance_of_a_draw == 1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"epsilon": 0.0}, r"privacy\.epsilon must be in \(0, 200\], got 0\.0"),
        ({"epsilon": NAN}, r"privacy\.epsilon must be in \(0, 200\], got nan"),
        ({"delta": NAN}, r"privacy\.delta must be in \(0, 1\), got nan"),
        ({"delta": 1e-13}, r"privacy\.delta must be at least 1e-12, got 1e-13"),
        ({"max_participations": 0}, r"privacy\.max_participations must be a whole number >= 1, got 0"),
        ({"coordinates": 0}, "coordinates must be a whole number >= 1, got 0"),
        ({"shares": 0}, "1 to 1000000 honest shares of noise, got 0"),
        ({"shares": 1_000_001}, "1 to 1000000 honest shares of noise, got 1000001"),
        ({"shares": 2.5}, r"1 to 1000000 honest shares of noise, got 2\.5"),
        ({"share_sigma": 0.49}, r"at least 0\.5 steps of the grid, got 0\.49"),
        ({"share_sigma": NAN}, r"at least 0\.5 steps of the grid, got nan"),
        ({"share_sigma": math.inf}, r"at least 0\.5 steps of the grid, got inf"),
        ({"share_sigma": 0.5, "coordinates": 10**6}, r"privacy\.epsilon must be within reach, got 8\.0"),
    ],
)
def test_impossible_shares_are_refused(changed, says):
    possible = {"epsilon": 8.0, "delta": 1e-5, "max_participations": 20}
    possible |= {"coordinates": 10, "shares": 70, "share_sigma": 256.0}
    with pytest.raises(PrivacyError, match=says):
        calibrate_distributed(**{**possible, **changed})


def test_impossible_arguments_of_a_price_are_refused():
    for noise in (0.0, -1.0, NAN, math.inf):
        with pytest.raises(PrivacyError, match="noise_multiplier must be finite and > 0"):
            replace(CAMPAIGN, noise_multiplier=noise)
    for price in (epsilon, epsilon_by_participation):
        with pytest.raises(PrivacyError, match=r"privacy\.delta must be in \(0, 1\), got nan"):
            price(CAMPAIGN, delta=NAN)
    with pytest.raises(PrivacyError, match=r"privacy\.delta must be in \(0, 1\), got 1"):
        epsilon_together([CAMPAIGN], delta=1.0)
    for rho in (-1.0, NAN, math.inf):
        with pytest.raises(PrivacyError, match="rho must be finite and >= 0"):
            zcdp_epsilon(rho, 1e-5)
    assert epsilon(replace(CAMPAIGN, noise_multiplier=0.01), delta=1e-5) == math.inf
    assert epsilon(replace(CAMPAIGN, noise_multiplier=1e9), delta=1e-5) == 0 == zcdp_epsilon(0.0, 1e-5)
