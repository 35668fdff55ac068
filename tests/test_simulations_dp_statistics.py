"""The row dp-statistics: what bounds a contribution, the noise it carries, and what is made of the release."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from shared.config import PrivacyConfig, Scenario, StatisticsConfig, TaskConfig
from shared.datasets import Dataset, Record, UserData
from shared.privacy.accounting import Mechanism, calibrate_distributed, calibrate_noise, epsilon
from simulations.observe import dp_statistics
from simulations.observe.dp_statistics import Statistics, clipped_sums, cosines, promise, release, sensitivity, smooth
from simulations.observe.rows import Rows

TASK = TaskConfig()
SETTINGS = StatisticsConfig()
TEXTS = 7


def rows(*triples):
    """Rows of (user, text, target), users ascending."""
    user, text, target = zip(*triples, strict=True) if triples else ((), (), ())
    return Rows(np.array(text, dtype=np.int64), np.array(target, dtype=float), np.array(user, dtype=np.int64))


def sums(found, unit):
    return clipped_sums(found, texts=TEXTS, unit=unit, settings=SETTINGS, task=TASK)


def without(found, left_out):
    keep = ~left_out
    return Rows(found.text[keep], found.target[keep], found.user[keep])


def random_rows(seed=0):
    """Users with 1 to 40 ratings of 7 texts, so that most rate some text several times."""
    draw = np.random.default_rng(seed)
    return rows(
        *(
            (user, draw.integers(TEXTS), draw.choice([1.0, 2.0, 3.0, 4.0, 5.0]))
            for user in range(15)
            for _ in range(draw.integers(1, 40))
        )
    )


def test_two_users_by_hand():
    """One user with a 5 and a 2 of different texts, one with a 3: midpoint 3, half width 2, k = .3."""
    found = sums(rows((0, 1, 5.0), (0, 2, 2.0), (1, 2, 3.0)), "user")
    root = 1 / math.sqrt(2)
    wanted = np.zeros(2 * TEXTS)
    wanted[[1, 2]] = root, -0.5 * root
    wanted[[TEXTS + 1, TEXTS + 2]] = 0.3 * root, 0.3 * root + 0.3
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    alone = sums(rows((0, 1, 5.0), (0, 2, 2.0), (1, 2, 3.0)), "record")
    np.testing.assert_allclose(alone[[1, 2, TEXTS + 2]], [1, -0.5, 0.6], atol=1e-12)


@pytest.mark.parametrize("unit", ["user", "record"])
def test_leaving_out_one_unit_moves_the_sums_by_at_most_the_bound(unit):
    found = random_rows()
    units = found.user if unit == "user" else np.arange(len(found.user))
    whole, bound = sums(found, unit), math.sqrt(1 + SETTINGS.count_weight**2)
    moved = [np.linalg.norm(whole - sums(without(found, units == one), unit)) for one in np.unique(units)]
    assert max(moved) <= bound + 1e-9
    assert max(moved) > 0.9 * bound  # the bound is no larger than it need be


def test_a_user_who_rates_one_text_many_times_is_held_by_the_clip():
    """One coordinate would hold 100 / sqrt(100) = 10 ratings: no bound may rest on one rating a text."""
    often = rows(*((0, 4, 5.0) for _ in range(100)), (1, 2, 4.0))
    moved = sums(often, "user") - sums(without(often, often.user == 0), "user")
    assert np.linalg.norm(moved) == pytest.approx(sensitivity(SETTINGS), abs=1e-9)
    assert moved[4] == pytest.approx(1.0)
    outside = rows((0, 4, 5000.0))  # a target beyond the public scale counts as its end
    assert np.linalg.norm(sums(outside, "record")) <= sensitivity(SETTINGS) + 1e-9


def test_a_user_without_a_record_counts_nothing():
    assert not sums(rows(), "user").any()


@pytest.mark.parametrize("unit", ["user", "record"])
def test_the_noise_has_the_stated_deviation(unit):
    draw = np.random.default_rng(3)
    found = rows(*((user, text, 4.0) for user in range(5) for text in draw.integers(3000, size=20)))
    terms = {"texts": 3000, "unit": unit, "settings": SETTINGS, "task": TASK}
    exact = release(found, **terms, sum_noise=0.0, generator=draw)
    noisy = release(found, **terms, sum_noise=2.5, generator=draw)
    assert exact.noise_stddev == 0
    assert noisy.noise_stddev == pytest.approx(2.5 * math.sqrt(1.09))
    added = np.concatenate([noisy.sums - exact.sums, (noisy.counts - exact.counts) * SETTINGS.count_weight])
    for stddev, fits in ((1.0, True), (0.95, False), (1.05, False)):
        squares = float(np.sum((added / (stddev * 2.5 * math.sqrt(1.09))) ** 2))
        tail = min(scipy.stats.chi2.sf(squares, len(added)), scipy.stats.chi2.cdf(squares, len(added)))
        assert (tail > 0.005) == fits
    again = release(found, **terms, sum_noise=2.5, generator=np.random.default_rng(9))
    assert not np.array_equal(again.sums, noisy.sums)


def test_locally_every_device_adds_all_of_the_noise_and_centrally_one():
    once = calibrate_noise(epsilon=3.0, delta=1e-5, sampling_rate=1.0, steps=1, max_participations=1)
    local = promise(PrivacyConfig(epsilon=3.0), texts=50, users=400)
    central = promise(PrivacyConfig(epsilon=3.0, trust="central", unit="user"), texts=50, users=400)
    assert central.sum_noise == once
    assert local.sum_noise == pytest.approx(20 * once)
    assert epsilon(Mechanism(once, 1.0, 1, 1), delta=1e-5) <= 3.0
    assert (local.claim.unit, local.claim.trust, central.claim.unit, central.claim.trust) == (
        "record", "local", "user", "central"
    )  # fmt: skip
    assert local.claim.epsilon == central.claim.epsilon == pytest.approx(3.0, rel=3e-3)
    assert local.claim.max_participations == 1


def test_distributed_noise_covers_those_who_drop_out_or_collude():
    privacy = PrivacyConfig(trust="distributed", unit="user", survivors=0.8, colluders=0.1, max_participations=20)
    found = promise(privacy, texts=50, users=100)
    least = calibrate_distributed(
        epsilon=8.0, delta=1e-5, max_participations=1, coordinates=100, shares=70, share_sigma=2.0**16
    )
    assert found.sum_noise == pytest.approx(least * math.sqrt(100 / 70), rel=1e-3)
    assert found.claim.trust == "distributed"
    assert found.claim.epsilon <= 8.0


def test_without_a_promise_there_is_no_noise():
    found = promise(PrivacyConfig(trust="none"), texts=50, users=100)
    assert (found.sum_noise, found.mechanism, found.claim.epsilon) == (0.0, None, None)


def test_smoothing_is_the_mean_of_the_texts_given_the_sums():
    """Against the joint covariance of means and sums, inverted the slow way."""
    draw = np.random.default_rng(0)
    features = draw.normal(size=(6, 4))
    counts = np.array([5.0, 0.0, 2.0, 9.0, -1.0, 3.0])
    released = Statistics(draw.normal(size=6), counts, noise_stddev=0.4, weight=0.2)
    found = smooth(released, cosines(features, np.zeros(4)), settings=SETTINGS, task=TASK)
    positive = np.maximum(counts, 0)
    common = released.sums.sum() / positive.sum()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    prior = 0.05 * (0.2 * np.eye(6) + 0.8 * np.exp((unit @ unit.T - 1) / 0.3))
    variance = 0.4**2 + 0.3 * 0.2 * positive + 1e-3
    joint = np.diag(positive) @ prior @ np.diag(positive) + np.diag(variance)
    means = common + prior @ np.diag(positive) @ np.linalg.inv(joint) @ (released.sums - positive * common)
    np.testing.assert_allclose(found, 3 + 2 * means, atol=1e-9)


def test_an_unrated_text_follows_its_likes():
    features = np.array([[1.0, 0.0], [1.0, 0.05], [-1.0, 0.0], [0.0, -1.0]])
    released = Statistics(np.array([30.0, 0.0, -30.0, 0.0]), np.array([40.0, 0.0, 40.0, 0.0]), 0.1, 1.0)
    found = smooth(released, cosines(features, np.zeros(2)), settings=SETTINGS, task=TASK)
    assert found[0] > found[1] > 3.2
    assert found[2] < 2.8
    assert found[3] == pytest.approx(3.0, abs=0.05)


def test_noise_that_drowns_everything_leaves_a_finite_prediction():
    noisy = Statistics(np.array([900.0, 800.0]), np.array([-5.0, -7.0]), 500.0, 1.0)
    found = smooth(noisy, np.eye(2), settings=SETTINGS, task=TASK)
    assert np.isfinite(found).all()
    assert np.all((found >= 1) & (found <= 5))


def test_the_row_needs_ratings_of_public_texts():
    record = Record("Fargo", 4.0, "1", 0)
    dataset = Dataset("x", (UserData("a", (record,), (), ()),), ("Fargo", "Heat"))
    scenario = Scenario(name="x")
    assert dp_statistics.applies(scenario, dataset)
    assert not dp_statistics.applies(scenario, replace(dataset, public_texts=("Heat", "Alien")))
    assert not dp_statistics.applies(scenario, replace(dataset, public_texts=()))
    assert not dp_statistics.applies(Scenario(name="x", statistics=StatisticsConfig(enabled=False)), dataset)
    assert not dp_statistics.applies(Scenario(name="x", task=TaskConfig(name="generation")), dataset)


def test_predictions_depend_on_the_seed_and_on_nothing_else():
    found, features = random_rows(), np.random.default_rng(1).normal(size=(TEXTS, 3))

    def predicted(seed, **privacy):
        scenario = Scenario(name="x", seed=seed, privacy=PrivacyConfig(**privacy))
        return dp_statistics.text_predictions(found, features, np.zeros(3), users=15, scenario=scenario)

    np.testing.assert_array_equal(predicted(1), predicted(1))
    assert not np.allclose(predicted(1), predicted(2))
    np.testing.assert_array_equal(predicted(1, trust="none"), predicted(2, trust="none"))


@pytest.fixture(scope="module")
def observed(tiny_world, tmp_path_factory):
    """An observer of the tiny world, and its scenario."""
    from client.training.site import resident_base, resident_dataset
    from shared.config import load_scenario
    from shared.heads.adapter import load_start
    from shared.heads.registry import make_head
    from simulations.campaigns import plan_campaigns
    from simulations.observe.observe import make_observer

    scenario = load_scenario(tiny_world(tmp_path_factory.mktemp("observed")), ("linear.enabled=false",))
    base, dataset = resident_base(scenario.model.base), resident_dataset(scenario.data)
    [plan] = plan_campaigns(scenario, base, dataset, quiet=True)

    def make(**privacy):
        changed = scenario.model_copy(update={"privacy": scenario.privacy.model_copy(update=privacy)})
        head = make_head(base, scenario, public_texts=len(dataset.public_texts))
        load_start(head, plan.start)
        return make_observer(head, plan.texts, dataset, changed)

    return SimpleNamespace(make=make)


def test_the_rows_have_the_private_part_of_personal(observed):
    """Fitted here by hand for one user, on what the release predicts."""
    from client.personal.personalize import fit_ridge

    observer = observed.make(trust="none")
    found = observer.baselines()
    shared, personal, train, test = found["dp-statistics-shared"], found["dp-statistics"], observer.train, observer.test
    mine, asked = train.of(0), test.of(0)
    features, means = observer.bare_features(), observer.statistics(observer.bare_features(), train)
    np.testing.assert_allclose(shared, np.clip(means[test.text], 1, 5))
    private = fit_ridge(
        features[train.text[mine]],
        train.target[mine] - means[train.text[mine]],
        mean=observer.public_mean(),
        personal=observer._scenario.personal,
    )
    wanted = private.predict(features[test.text[asked]], means[test.text[asked]])
    np.testing.assert_allclose(personal[asked], np.clip(wanted, 1, 5))
    noisy = observed.make(trust="local", epsilon=1.0).baselines()
    assert not np.allclose(noisy["dp-statistics"], personal)
    np.testing.assert_array_equal(noisy["local"], found["local"])
