"""Bounds that an attack's guesses prove: known values, few false alarms, and what wrong formulas would do."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from shared.errors import PrivacyError
from shared.privacy.accounting import epsilon
from shared.privacy.mechanisms import DistributedMechanism, Mechanism
from simulations.audit import bounds
from simulations.audit.bounds import (
    auc,
    count_correct,
    count_correct_each,
    fewest_correct,
    one_run_bound,
    tpr_at_fpr,
)
from simulations.audit.gaussian import epsilon_of_mu, fewest_correct_gaussian, gdp_one_run_bound, is_gaussian
from simulations.audit.power import ENOUGH, FAULTS, TRUE, find_faults, noise_for, power_table
from simulations.bench.audits import lines, response

GOLDEN = {  # (canaries, guesses, correct) -> one-run, gaussian; of jax-privacy 2.0.0 at delta 1e-5 and 95 %
    (1000, 100, 90): (1.6261, 2.4564),
    (1000, 200, 200): (4.1665, 7.2568),
    (100, 100, 100): (3.4902, 8.2162),
    (200, 60, 60): (2.9665, 5.6235),
    (1000, 1000, 600): (0.2972, 0.5835),
}
BOUNDS = {one_run_bound: fewest_correct, gdp_one_run_bound: fewest_correct_gaussian}


@pytest.mark.parametrize("counts", GOLDEN)
def test_known_values(counts):
    m, r, v = counts
    found = [bound(canaries=m, guesses=r, correct=v, delta=1e-5) for bound in BOUNDS]
    assert found == pytest.approx(GOLDEN[counts], abs=1e-4)


def test_without_delta_it_is_the_binomial_alone():
    q = 0.05 ** (1 / 60)  # sixty of sixty right guesses have this chance each
    assert one_run_bound(canaries=60, guesses=60, correct=60, delta=0.0) == pytest.approx(math.log(q / (1 - q)))


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_bound_grows_with_right_guesses_and_shrinks_with_delta_confidence_and_canaries(bound):
    at = {"canaries": 300, "guesses": 80, "correct": 66, "delta": 1e-4}
    by_correct = {v: bound(**at | {"correct": v}) for v in range(0, 81, 5)}
    assert list(by_correct.values()) == sorted(by_correct.values())
    assert by_correct[0] == by_correct[40] == 0 < by_correct[65] < by_correct[80]
    assert bound(**at, confidence=0.99) < bound(**at) < bound(**at, confidence=0.9)
    if bound is one_run_bound:  # the other reads epsilon off a curve, at delta
        assert bound(**at | {"canaries": 3000}) < bound(**at)
    assert bound(**at | {"delta": 1e-3}) < bound(**at) < bound(**at | {"delta": 1e-6})


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("guesses", "claim"), [(40, 0.5), (200, 2.0), (200, 4.0), (200, 8.0), (400, 8.0)])
def test_the_fewest_right_guesses_are_where_the_bound_passes_the_claim(bound, guesses, claim):
    at = {"canaries": 1000, "guesses": guesses, "delta": 1e-5}
    fewest = BOUNDS[bound](**at, epsilon=claim)
    if fewest is None:
        assert bound(**at, correct=guesses) <= claim
    else:
        assert bound(**at, correct=fewest - 1) <= claim < bound(**at, correct=fewest)


def test_where_delta_swallows_everything_there_is_no_bound():
    assert one_run_bound(canaries=1000, guesses=200, correct=200, delta=6e-4) == 0.0
    assert fewest_correct(canaries=1000, guesses=200, epsilon=1.0, delta=6e-4) is None


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"guesses": 101},
        {"guesses": 0},
        {"correct": 51},
        {"correct": -1},
        {"correct": math.nan},
        {"guesses": math.nan},
        {"canaries": math.nan},
        {"delta": math.nan},
        {"delta": -1e-9},
        {"delta": 1.0},
        {"confidence": math.nan},
        {"confidence": 1.0},
        {"confidence": 0.0},
    ],
)
def test_impossible_numbers_are_refused(bound, wrong):
    with pytest.raises(PrivacyError, match="must be"):
        bound(**{"canaries": 100, "guesses": 50, "correct": 40, "delta": 1e-5} | wrong)


RUNS = 300
LIMIT = int(stats.binom.isf(0.01, RUNS, 0.05))  # false alarms that are too many


def draw(mechanism, runs=RUNS):
    """Coins and scores (runs, 1000) of a mechanism."""
    generator = np.random.default_rng(5)
    coins = generator.random((runs, 1000)) < 0.5
    return coins, mechanism(coins, generator)


def best_of_five(scores, coins):
    """A wrong auditor: judges five times two hundred guesses, and shows the best."""
    return ((scores > 0) == coins).reshape(len(scores), 5, 200).sum(-1).max(-1)


def test_false_alarms_of_the_one_run_bound_stay_below_five_percent_and_of_the_best_of_five_do_not():
    coins, scores = draw(response)  # the very mechanism for which the theorem is tight
    fewest = fewest_correct(canaries=1000, guesses=200, epsilon=2.0, delta=1e-5)
    right = count_correct_each(scores, coins, guesses=200)
    assert 1 <= (right >= fewest).sum() <= LIMIT
    assert (best_of_five(scores, coins) >= fewest).sum() > LIMIT
    assert right[0] == count_correct(scores[0], coins[0], guesses=200)


def test_the_delta_term_is_needed():
    """With chance m delta / 12 twelve coins at random are told, else nothing: (0, delta)-private; by exact chances."""
    m, r, delta = 1000, 23, 3e-4
    told = m * delta / 12

    def false_alarms(fewest):
        return told * stats.binom.sf(fewest - 13, r - 12, 0.5) + (1 - told) * stats.binom.sf(fewest - 1, r, 0.5)

    assert false_alarms(fewest_correct(canaries=m, guesses=r, epsilon=0.0, delta=0.0)) > 0.065
    assert false_alarms(fewest_correct(canaries=m, guesses=r, epsilon=0.0, delta=delta)) <= 0.05


@pytest.mark.parametrize("mu", [0.5, 1.5])
def test_the_gaussian_bound_against_the_exact_chances_of_its_mechanism(mu):
    """One Gaussian, every canary guessed by the sign of its score: right with chance Phi(mu / 2), independently."""
    claim = epsilon_of_mu(mu, delta=1e-5)
    for canaries in (1, 10, 60, 400):
        fewest = fewest_correct_gaussian(canaries=canaries, guesses=canaries, epsilon=claim, delta=1e-5)
        if fewest is not None:
            chance = stats.binom.sf(fewest - 1, canaries, stats.norm.cdf(mu / 2))
            assert chance <= 0.05


def test_the_gaussian_bound_holds_for_every_guess_of_two_canaries():
    """Every rule that abstains by a threshold, by exact integration: V >= 2 of 2 guesses out of 3 canaries."""
    mu, generator = 1.0, np.random.default_rng(3)
    claim = epsilon_of_mu(mu, delta=1e-5)
    coins = generator.random((100_000, 3)) < 0.5
    right = count_correct_each(coins * mu + generator.standard_normal(coins.shape), coins, guesses=2)
    share = float(np.mean(right == 2))  # about .55
    low = gdp_one_run_bound(canaries=3, guesses=2, correct=2, delta=1e-5, confidence=1 - share - 0.01)
    assert low <= claim


def test_epsilon_of_a_gaussian_is_the_accountants():
    for z in (0.6, 2.0, 7.0):
        priced = epsilon(Mechanism(z, 1.0, 1, 1), delta=1e-5, discretization=1e-3)
        assert epsilon_of_mu(1 / z, delta=1e-5) == pytest.approx(priced, rel=2e-3)
    assert epsilon_of_mu(1e-7, delta=1e-5) == 0.0


def test_which_mechanisms_are_gaussian():
    assert is_gaussian(Mechanism(1.0, 1.0, 20, 5))
    assert not is_gaussian(Mechanism(1.0, 0.5, 1, 1))
    assert is_gaussian(DistributedMechanism(1.0, 16, 2000, 800, 2.0**16))
    assert not is_gaussian(DistributedMechanism(1.0, 1, 10, 10, 256.0))  # within a factor of 1 + 6e-5
    assert not is_gaussian(DistributedMechanism(1.0, 1, 1, 1_000_000, 0.5))  # coarse shares, however many


def test_guesses_are_counted_from_both_ends():
    scores, inside = np.array([5.0, -1.0, 4.0, 0.0, 3.0, 2.0]), np.array([True, False, False, True, True, False])
    assert [count_correct(scores, inside, guesses=r) for r in range(1, 7)] == [1, 2, 2, 2, 3, 4]


def test_equal_scores_prove_nothing_whatever_their_order():
    inside = np.arange(1000) >= 500  # as if those that were in had been appended
    for coins in (inside, ~inside):
        assert 70 <= count_correct(np.zeros(1000), coins, guesses=200) <= 130


@pytest.mark.parametrize(
    ("scores", "inside"),
    [
        (np.array([1.0, math.nan]), np.array([True, False])),
        (np.ones(3), np.array([True, False])),
        (np.ones(2), np.array([1, 0])),
        (np.ones(1), np.array([True])),
        (np.array([]), np.array([], dtype=bool)),
    ],
)
def test_scores_that_cannot_be_judged_are_refused(scores, inside):
    with pytest.raises(PrivacyError, match="must be"):
        count_correct(scores, inside, guesses=2)


@pytest.mark.parametrize(("hits", "trials"), [(0, 9), (9, 9), (3, 9), (1, 500)])
def test_exact_ends_are_scipys(hits, trials):
    known = stats.binomtest(hits, trials).proportion_ci(method="exact")
    assert bounds._lowest(hits, trials, 0.025) == pytest.approx(known.low)
    assert bounds._highest(hits, trials, 0.025) == pytest.approx(known.high)


def test_the_auc_is_the_share_of_pairs():
    generator = np.random.default_rng(2)
    inside, outside = generator.integers(0, 9, 40) + 1.0, generator.integers(0, 9, 70) * 1.0
    pairs = [(x > y) + (x == y) / 2 for x, y in itertools.product(inside, outside)]
    found = auc(inside, outside)
    assert found.value == pytest.approx(np.mean(pairs))
    assert 0 < found.low < found.value < found.high < 1
    assert auc(np.array([2.0]), np.array([1.0])).low < 0.5  # a single pair proves nothing
    for wrong in (np.array([]), np.array([math.nan])):
        with pytest.raises(PrivacyError, match="scores must be"):
            auc(wrong, outside)


def test_intervals_hold_the_truth_and_are_not_everything():
    generator, missed, widths = np.random.default_rng(4), np.zeros(3), np.zeros(3)
    true = [0.5, float(stats.norm.cdf(1 / math.sqrt(2))), float(stats.norm.sf(stats.norm.isf(0.05) - 1))]
    for _ in range(200):
        outside, inside = generator.normal(size=400), generator.normal(size=(2, 300))
        found = [auc(inside[0], outside), auc(inside[1] + 1, outside), tpr_at_fpr(inside[1] + 1, outside, fpr=0.05)]
        missed += [not each.low <= value <= each.high for each, value in zip(found, true, strict=True)]
        widths += [(each.high - each.low) / 200 for each in found]
        assert all(each.low <= each.value <= each.high for each in found)
    assert (missed <= 16).all()
    assert (widths < [0.13, 0.12, 0.3]).all()


def test_the_rate_at_a_false_alarm_rate_by_hand():
    inside, outside = np.array([0.5, 98.5, 99.5, 100.0]), np.arange(100.0)
    assert tpr_at_fpr(inside, outside).value == 0.75  # 98 is exceeded by one of the hundred
    assert tpr_at_fpr(inside, outside).low == 0.0  # a hundred cannot tell where one percent lies
    assert tpr_at_fpr(inside, np.arange(1000.0) / 10, fpr=0.1).low > 0
    assert tpr_at_fpr(np.zeros(50), np.zeros(500)).value == 0.0  # equal scores find nobody
    with pytest.raises(PrivacyError, match="fpr must be"):
        tpr_at_fpr(inside, outside, fpr=math.nan)


@pytest.fixture(scope="module")
def table():
    return power_table(Mechanism(1.0, 1.0, 5, 4), delta=1e-5, epsilons=(1.0, 2.0, 8.0), trials=50, seed=3)


def test_what_a_one_run_audit_finds_and_what_it_does_not(table):
    one, two, eight = (row["found"] for row in table["rows"])
    for found in (one, two):
        assert found["sigma/4"] >= 0.8
        assert found["no noise"] == 1.0
        assert found["sigma/2"] < 0.5
        assert found[TRUE] <= 0.1
    assert set(eight.values()) == {0.0}
    assert [row["power"] for row in table["rows"]] == [True, True, False]
    assert list(one) == [TRUE, *FAULTS]


def test_the_gaussian_bound_finds_at_epsilon_8_what_the_other_cannot():
    claimed = Mechanism(noise_for(Mechanism(1.0, 1.0, 1, 1), epsilon=8.0, delta=1e-5), 1.0, 1, 1)
    found = find_faults(claimed, epsilon=8.0, delta=1e-5, bound="gaussian", trials=50)
    assert found["sigma/4"] >= 0.8
    assert found["sigma/2"] >= 0.8
    assert found[TRUE] <= 0.1
    with pytest.raises(PrivacyError, match="one-run bound"):
        find_faults(Mechanism(1.0, 0.5, 1, 1), epsilon=8.0, delta=1e-5, bound="gaussian")


def test_sampling_and_releases_count():
    """A record that is seldom drawn is hard to see although the claim is the same; twenty steps are not one."""
    whole, rare = Mechanism(1.995 * math.sqrt(20), 1.0, 20, 1), Mechanism(1.364, 0.1, 20, 1)  # epsilon 2 both

    def quarter(mechanism):
        return find_faults(mechanism, epsilon=2.0, delta=1e-5, trials=40)["sigma/4"]

    assert quarter(whole) >= ENOUGH
    assert quarter(rare) < ENOUGH
    assert quarter(Mechanism(1.995 * 20, 1.0, 20, 1)) < ENOUGH


@pytest.mark.parametrize(
    "mechanism", [Mechanism(1.0, 0.1, 20, 1), Mechanism(1.0, 1.0, 1, 3), DistributedMechanism(1.0, 4, 50, 90, 256.0)]
)
def test_the_tables_noise_is_enough_and_not_much_more(mechanism):
    noise = noise_for(mechanism, epsilon=2.0, delta=1e-5)
    assert 1.96 <= epsilon(replace(mechanism, noise_multiplier=noise), delta=1e-5, discretization=1e-3) <= 2.0
    assert power_table(mechanism, delta=1e-5, epsilons=(2.0,), trials=2)["releases"] == mechanism.releases
    for wrong in (math.nan, 0.0, 300.0):
        with pytest.raises(PrivacyError):
            noise_for(mechanism, epsilon=wrong, delta=1e-5)


def test_the_measurements_can_be_read(table):
    goals = {"one-run": {"value": 3, "at_most": 16, "met": True}}
    power = {"full batch": {"2": {fault: {"median": 1.0, "low": 0.9, "high": 1.0} for fault in FAULTS}}}
    measured = {"mode": "x", "rounds": 200, "epsilon": 2.0, "false_alarms": goals, "power": power, "seconds": goals}
    text = "\n".join(lines(measured))
    assert "200 null runs" in text
    assert "1.00 [0.90, 1.00]" in text
