"""Epsilon against closed forms and Opacus, calibration against the price, claims word by word."""

import math
import time
from dataclasses import replace

import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm

import shared.privacy.accounting
from shared.errors import PrivacyError
from shared.privacy.accounting import (
    Mechanism,
    calibrate_noise,
    epsilon,
    epsilon_by_participation,
    grid_excess,
)
from shared.privacy.claims import Claim, no_claim, record_claim

NAN = math.nan
CLAIM = Claim(
    trust="local",
    unit="record",
    relation="one training record added or removed",
    epsilon=7.99,
    delta=1e-5,
    sampling="none, every record enters every step (1 per round)",
    accountant="dp-accounting 0.6.0, privacy loss distributions",
    max_participations=20,
    noise="seeded",
)


def mechanism(noise: float = 2.0, rate: float = 1.0, steps: int = 2, rounds: int = 5) -> Mechanism:
    return Mechanism(noise_multiplier=noise, sampling_rate=rate, steps=steps, max_participations=rounds)


def gaussian_epsilon(noise: float, releases: int, delta: float) -> float:
    """Balle & Wang 2018, Theorem 5, solved for epsilon."""
    mu = math.sqrt(releases) / noise

    def excess(eps: float) -> float:
        upper = norm.cdf(mu / 2 - eps / mu)
        return float(upper - math.exp(eps + norm.logcdf(-mu / 2 - eps / mu)) - delta)

    return float(brentq(excess, 0, mu**2 / 2 + 20 * mu, xtol=1e-12))


def one_sampled_delta(noise: float, rate: float, eps: float) -> float:
    """Delta of one Poisson-sampled release with the record removed, the worse direction: a likelihood-ratio test."""
    threshold = noise**2 * math.log((math.exp(eps) - 1 + rate) / rate) + 0.5
    absent, present = norm.sf(threshold / noise), norm.sf((threshold - 1) / noise)
    return float((1 - rate) * absent + rate * present - math.exp(eps) * absent)


def library_epsilon(noise: float, rate: float, releases: int, delta: float, grid: float) -> float:
    """The accountant of dp-accounting as its users call it."""
    import dp_accounting

    accountant = dp_accounting.pld.PLDAccountant(value_discretization_interval=grid)
    event = dp_accounting.GaussianDpEvent(noise)
    accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, event) if rate < 1 else event, releases)
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize(
    ("noise", "steps", "rounds", "delta"),
    [(0.8, 1, 1, 1e-5), (2.6843, 1, 20, 1e-5), (8.4885, 4, 50, 1e-5), (50, 3, 7, 1e-3), (5, 2, 3, 1e-10)],
)
def test_every_record_in_every_step_has_the_closed_form(noise, steps, rounds, delta):
    exact = gaussian_epsilon(noise, steps * rounds, delta)
    price = epsilon(mechanism(noise, 1.0, steps, rounds), delta=delta)
    assert exact - 1e-9 <= price <= exact + 1e-3
    assert abs(gaussian_epsilon(noise, steps * rounds + 1, delta) - exact) > 2e-3  # one step would be noticed


@pytest.mark.parametrize(("noise", "rate", "delta"), [(0.9, 0.1, 1e-5), (1.0, 0.5, 1e-3), (0.8, 0.01, 1e-5)])
def test_one_sampled_release_has_the_closed_form(noise, rate, delta):
    price = epsilon(mechanism(noise, rate, 1, 1), delta=delta)
    assert one_sampled_delta(noise, rate, price) <= delta * (1 + 1e-9)
    assert one_sampled_delta(noise, rate, price - 1e-3) > delta


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "rounds", "delta"),
    [(1.13, 0.1, 20, 10, 1e-5), (2.0, 0.267, 40, 1, 0.011), (1.0, 0.01, 100, 10, 1e-5)],
)
def test_sampled_steps_agree_with_opacus(noise, rate, steps, rounds, delta):
    from opacus.accountants import PRVAccountant

    eps_error = 0.01
    opacus = PRVAccountant()
    opacus.history = [(noise, rate, steps * rounds)]
    upper = float(opacus.get_epsilon(delta, eps_error=eps_error))  # PRV states the upper end of its interval
    price = epsilon(mechanism(noise, rate, steps, rounds), delta=delta)
    assert upper - 2 * eps_error <= price <= upper


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    noise=st.floats(0.8, 6),
    rate=st.sampled_from([0.03, 0.2, 0.7, 1.0]),
    steps=st.integers(1, 8),
    rounds=st.integers(1, 8),
    delta=st.sampled_from([1e-3, 1e-5, 1e-8]),
)
def test_price_is_monotone_in_every_argument(noise, rate, steps, rounds, delta):
    base = mechanism(noise, rate, steps, rounds)

    def price(changed: Mechanism, at: float = delta) -> float:
        return epsilon(changed, delta=at, discretization=1e-2)

    here = price(base)
    assert price(replace(base, steps=steps + 1)) >= here
    assert price(replace(base, max_participations=rounds + 1)) >= here
    assert price(replace(base, noise_multiplier=noise * 1.1)) <= here
    assert price(replace(base, sampling_rate=min(1.0, rate * 1.2))) >= here
    assert price(base, delta / 2) >= here
    assert epsilon(base, delta=delta, discretization=5e-2) >= here - 1e-6  # a coarse grid never flatters


def test_sampling_and_rounds_count():
    def price(*values: float) -> float:
        return epsilon(mechanism(*values), delta=1e-5, discretization=2e-3)

    assert price(2.0, 0.99) < price(2.0, 1.0) - 2e-3
    assert price(2.0, 0.2, 10, 4) == price(2.0, 0.2, 4, 10)
    assert price(2.0, 0.2, 10, 4) > price(2.0, 0.2, 10, 3) + 2e-3


@pytest.mark.parametrize(
    "hopeless",
    [mechanism(1e-6), mechanism(0.049, 1e-4, 1, 1), mechanism(0.5, 0.5, 1000, 1000), mechanism(2.0, 0.1, 10**6, 2)],
)
def test_no_noise_to_speak_of_has_no_price(hopeless):
    start = time.monotonic()
    assert epsilon(hopeless, delta=1e-5) == math.inf
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("rate", [1.0, 0.1])
def test_curve_rises_to_the_price_of_the_campaign(rate):
    campaign = mechanism(3.0, rate, 4, 6)
    curve = epsilon_by_participation(campaign, delta=1e-5)
    assert len(curve) == 6
    assert curve == sorted(set(curve))
    assert curve[-1] == epsilon(campaign, delta=1e-5)
    for rounds in (1, 3):
        exact = epsilon(replace(campaign, max_participations=rounds), delta=1e-5)
        assert exact - 1e-6 <= curve[rounds - 1] <= exact + 1e-3


def test_curve_of_a_campaign_without_a_price():
    curve = epsilon_by_participation(mechanism(0.1, 1.0, 1, 5), delta=1e-5)
    assert math.isfinite(curve[0])
    assert curve[-1] == math.inf
    assert curve == sorted(curve)


@pytest.mark.parametrize(
    ("target", "delta", "rate", "steps", "rounds"),
    [
        (8.0, 1e-5, 1.0, 1, 20),
        (8.0, 1e-5, 0.1, 20, 10),
        (2.0, 1e-5, 0.1, 20, 50),
        (3.0, 0.011, 0.267, 40, 1),
        (0.05, 1e-6, 0.1, 10, 10),
        (150.0, 1e-5, 1.0, 2, 3),
    ],
)
def test_calibrated_noise_is_certified_and_smallest(target, delta, rate, steps, rounds):
    epsilon(mechanism(), delta=0.1)  # pays for the import
    start = time.process_time()
    noise = calibrate_noise(epsilon=target, delta=delta, sampling_rate=rate, steps=steps, max_participations=rounds)
    assert time.process_time() - start < 5
    assert epsilon(mechanism(noise, rate, steps, rounds), delta=delta) <= target
    again = library_epsilon(noise, rate, steps * rounds, delta, grid=max(1e-4, target / 1e5))
    assert target * 0.99 <= again <= target * (1 + 1e-6)
    if rate == 1:
        assert gaussian_epsilon(noise * 0.998, steps * rounds, delta) > target
    else:
        assert epsilon(mechanism(noise * 0.997, rate, steps, rounds), delta=delta) > target


@pytest.mark.parametrize("fine_over_coarse", [0.9, 1.0, 1.1])
def test_only_the_fine_grid_certifies(monkeypatch, fine_over_coarse):
    def price(campaign: Mechanism, delta: float, grid: float) -> float:
        return 10 / campaign.noise_multiplier * (fine_over_coarse if grid <= 1e-4 else 1.0)

    monkeypatch.setattr(shared.privacy.accounting, "_price", price)
    noise = calibrate_noise(epsilon=2.0, delta=1e-5, sampling_rate=0.1, steps=5, max_participations=2)
    assert 2.0 * 0.998 <= price(mechanism(noise), 1e-5, 1e-4) <= 2.0


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"epsilon": 0.0}, r"privacy\.epsilon must be in \(0, 200\], got 0\.0"),
        ({"epsilon": -1.0}, r"privacy\.epsilon must be in \(0, 200\], got -1\.0"),
        ({"epsilon": NAN}, r"privacy\.epsilon must be in \(0, 200\], got nan"),
        ({"epsilon": math.inf}, r"privacy\.epsilon must be in \(0, 200\], got inf"),
        ({"delta": 0.0}, r"privacy\.delta must be in \(0, 1\), got 0\.0"),
        ({"delta": 1.0}, r"privacy\.delta must be in \(0, 1\), got 1\.0"),
        ({"delta": 1.5}, r"privacy\.delta must be in \(0, 1\), got 1\.5\. A common choice is below"),
        ({"delta": NAN}, r"privacy\.delta must be in \(0, 1\), got nan"),
        ({"delta": 1e-13}, r"privacy\.delta must be at least 1e-12, got 1e-13"),
        ({"delta": 0.1, "sampling_rate": 0.01}, r"privacy\.delta must be below the chance"),
        ({"sampling_rate": 0.0}, r"privacy\.sampling_rate must be in \(0, 1\], got 0\.0"),
        ({"sampling_rate": NAN}, r"privacy\.sampling_rate must be in \(0, 1\], got nan"),
        ({"sampling_rate": 1.1}, r"privacy\.sampling_rate must be in \(0, 1\], got 1\.1"),
        ({"steps": 0}, r"training\.steps must be a whole number >= 1, got 0"),
        ({"steps": 1.5}, r"training\.steps must be a whole number >= 1, got 1\.5"),
        ({"max_participations": NAN}, r"privacy\.max_participations must be a whole number >= 1, got nan"),
        ({"sampling_rate": 0.5, "steps": 10**9}, r"privacy\.epsilon must be within reach, got 8\.0"),
    ],
)
def test_impossible_targets_are_refused(changed, says):
    possible = {"epsilon": 8.0, "delta": 1e-5, "sampling_rate": 1.0, "steps": 1, "max_participations": 1}
    with pytest.raises(PrivacyError, match=says):
        calibrate_noise(**{**possible, **changed})


@pytest.mark.parametrize("noise", [0.0, -1.0, NAN, math.inf])
def test_impossible_noise_is_refused(noise):
    with pytest.raises(PrivacyError, match="noise_multiplier must be finite and > 0, got"):
        mechanism(noise)


def test_prices_refuse_impossible_arguments():
    for price in (epsilon, epsilon_by_participation, record_claim):
        with pytest.raises(PrivacyError, match=r"privacy\.delta must be in \(0, 1\), got nan"):
            price(mechanism(), delta=NAN)
    for grid in (0.0, NAN, math.inf):
        with pytest.raises(PrivacyError, match="discretization must be finite and > 0"):
            epsilon(mechanism(), delta=1e-5, discretization=grid)


def test_sentence_names_everything():
    assert CLAIM.sentence() == (
        "Record-level (epsilon = 7.99, delta = 1e-05)-differential privacy, neighbours: one training record added or "
        "removed; trust: nobody (local noise on each device); sampling: none, every record enters every step "
        "(1 per round); accountant: dp-accounting 0.6.0, privacy loss distributions; rounds per device: at most "
        "20; noise: this is what a deployment with these settings would spend; this simulation's noise is "
        "seeded, its seeds are in the run folder."
    )
    assert no_claim(max_participations=20).sentence() == (
        "NOT PRIVATE: no epsilon, no delta; unit: none; neighbours: none; trust: everyone; sampling: not "
        "accounted; accountant: none; rounds per device: at most 20; noise: none."
    )


@pytest.mark.parametrize(
    ("value", "says"), [(7.9912, "8.00"), (7.99, "7.99"), (0.012301, "0.0124"), (99.91, "100.0"), (0.0, "0")]
)
def test_stated_epsilon_is_never_below_the_certified_one(value, says):
    assert f"(epsilon = {says}, " in replace(CLAIM, epsilon=value).sentence()


def test_claim_of_a_mechanism_states_its_price():
    claim = record_claim(mechanism(4.0, 0.25, 3, 2), delta=1e-5)
    assert claim.epsilon == epsilon(mechanism(4.0, 0.25, 3, 2), delta=1e-5)
    assert claim.sampling == "Poisson, each record enters a step with probability 0.25 (3 per round)"
    assert (claim.trust, claim.unit, claim.noise, claim.max_participations) == ("local", "record", "seeded", 2)
    assert "every record enters every step (2 per round)" in record_claim(mechanism(), delta=1e-5).sentence()
    with pytest.raises(PrivacyError, match="must have a finite epsilon"):
        record_claim(mechanism(1e-6), delta=1e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"trust": "everywhere"},
        {"noise": "lucky"},
        {"noise": "none"},
        {"trust": "none"},
        {"epsilon": None},
        {"epsilon": NAN},
        {"epsilon": math.inf},
        {"epsilon": -1.0},
        {"delta": None},
        {"delta": NAN},
        {"delta": 0.0},
    ],
)
def test_contradictory_claims_are_refused(changed):
    with pytest.raises(PrivacyError, match="A claim must have"):
        replace(CLAIM, **changed)


@pytest.mark.parametrize(("sensitivity", "releases"), [(40, 1), (40, 12), (100, 3), (13, 40)])
def test_discrete_noise_costs_what_its_own_distribution_says(sensitivity, releases):
    """In one dimension dp-accounting knows the discrete Gaussian itself; our bound lies on it, and never below."""
    sigma, delta = 200, 1e-5
    distribution = privacy_loss_distribution.from_discrete_gaussian_mechanism(
        sigma, sensitivity=sensitivity, value_discretization_interval=1e-4
    )
    exact = distribution.self_compose(releases).get_epsilon_for_delta(delta)
    discrete = replace(mechanism(sigma / sensitivity, steps=1, rounds=releases), coordinates=1, grid_sigma=sigma)
    excess = grid_excess(discrete, epsilon=exact, delta=delta)
    assert 0 < excess < 0.02
    assert exact * (1 - 1e-3) <= epsilon(discrete, delta=delta) <= exact * (1 + 1e-3) + excess


def test_a_fine_grid_costs_next_to_nothing_and_a_coarse_one_is_not_priced():
    plain = mechanism(3.0, steps=1, rounds=20)
    fine = replace(plain, coordinates=100_000, grid_sigma=2**24)
    assert 0 < epsilon(fine, delta=1e-5) - epsilon(plain, delta=1e-5) < 2e-4
    assert grid_excess(fine, epsilon=8.0, delta=1e-5) < 1e-6
    assert epsilon(replace(fine, grid_sigma=2**8), delta=1e-5) == math.inf
    grid = {"coordinates": 100_000, "grid_sigma": 2**24}
    noise = calibrate_noise(epsilon=2.0, delta=1e-5, sampling_rate=1.0, steps=1, max_participations=20, **grid)
    assert epsilon(replace(fine, noise_multiplier=noise), delta=1e-5) <= 2.0
    for wrong in ({"coordinates": -1}, {"coordinates": 1.5}, {"grid_sigma": 0.5}, {"grid_sigma": NAN}):
        with pytest.raises(PrivacyError, match="coordinates must be a whole number"):
            replace(fine, **wrong)
