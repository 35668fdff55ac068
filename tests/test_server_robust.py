"""Rules that withstand liars: against their published definitions, computed slowly; what they refuse."""

import itertools

import numpy as np
import pytest
from pydantic import ValidationError

from server.aggregate import mean_update
from server.robust import (
    AGGREGATORS,
    Suspicion,
    combine,
    krum,
    krum_scores,
    median,
    multi_krum,
    norm_bound,
    trimmed_mean,
)
from shared.config import AGGREGATION_NEEDS, FederationConfig, Scenario
from shared.errors import PrivacyError, ScenarioError, TooFewRepliesError
from shared.privacy.compatible import check_aggregation, liars_among


def _vectors(count=9, size=7, seed=0):
    return np.random.default_rng(seed).standard_normal((count, size))


def _scenario(trust="local", **federation):
    unit = "record" if trust in ("local", "none") else "user"
    return Scenario.model_validate({"name": "s", "federation": federation, "privacy": {"trust": trust, "unit": unit}})


def test_the_median_is_the_middle_value_of_every_coordinate():
    for count in (5, 6):
        vectors = _vectors(count)
        slow = []
        for column in vectors.T.tolist():
            ordered = sorted(column)
            slow.append((ordered[(count - 1) // 2] + ordered[count // 2]) / 2)
        np.testing.assert_allclose(median(vectors, Suspicion(2)), slow, rtol=1e-14)


def test_the_trimmed_mean_leaves_out_f_on_either_side_and_divides_by_the_rest():
    vectors = _vectors()
    slow = [sum(sorted(column)[2:-2]) / 5 for column in vectors.T.tolist()]
    np.testing.assert_allclose(trimmed_mean(vectors, Suspicion(2)), slow, rtol=1e-14)
    np.testing.assert_allclose(trimmed_mean(vectors, Suspicion(0)), vectors.mean(axis=0), rtol=1e-14)


def test_krum_scores_are_sums_of_the_nearest_squared_distances():
    vectors, liars = _vectors(), 2
    slow = []
    for i, one in enumerate(vectors):
        distances = sorted(float(((one - other) ** 2).sum()) for j, other in enumerate(vectors) if j != i)
        slow.append(sum(distances[: len(vectors) - liars - 2]))
    np.testing.assert_allclose(krum_scores(vectors, liars=liars), slow, rtol=1e-12)
    best = int(np.argmin(slow))
    np.testing.assert_array_equal(krum(vectors, Suspicion(liars)), vectors[best])
    chosen = sorted(np.argsort(slow)[: len(vectors) - liars])
    np.testing.assert_allclose(multi_krum(vectors, Suspicion(liars)), vectors[chosen].mean(axis=0), rtol=1e-14)


def test_krum_sees_small_differences_of_long_vectors():
    near = _vectors(count=7, seed=1) * 1e-4
    far = near + 1e6  # squares of 1e6 alone would leave nothing of differences of 1e-4
    assert int(np.argmin(krum_scores(far, liars=1))) == int(np.argmin(krum_scores(far - 1e6, liars=1)))


def test_a_norm_bound_cuts_what_is_longer_and_nothing_else():
    vectors = np.array([[3.0, 4.0], [0.0, 0.0], [0.0, 500.0]])
    np.testing.assert_allclose(norm_bound(vectors, Suspicion(1)), np.array([3.0, 9.0]) / 3)  # the median length is 5
    np.testing.assert_allclose(norm_bound(vectors, Suspicion(1, norm_bound=1.0)), np.array([0.6, 1.8]) / 3)


@pytest.mark.parametrize("rule", ["median", "trimmed-mean", "krum", "multi-krum"])
def test_whatever_two_of_nine_send_the_answer_stays_among_the_honest(rule):
    honest = _vectors(count=7) * 0.1 + 1.0
    worst = 0.0
    for lie, sign in itertools.product((0.0, 10.0, 1e3, 1e12), (1, -1)):
        vectors = np.vstack([np.full((2, 7), sign * lie), honest])
        found = AGGREGATORS[rule](vectors, Suspicion(2))
        worst = max(worst, float(np.abs(found - 1.0).max()))
    assert worst < 0.4
    moved = AGGREGATORS["mean"](np.vstack([np.full((2, 7), 1e12), honest]), Suspicion(2))
    assert np.abs(moved).min() > 1e10  # what they withstand


def test_a_length_of_any_size_moves_a_norm_bounded_mean_by_twice_the_bound_over_n():
    honest = _vectors(count=8)
    bound = float(np.median(np.linalg.norm(np.vstack([honest, np.full((1, 7), 1e12)]), axis=1)))
    one, other = (norm_bound(np.vstack([honest, np.full((1, 7), lie)]), Suspicion(1)) for lie in (1e12, -1e12))
    assert np.linalg.norm(one - other) <= 2 * bound / 9 * (1 + 1e-12)
    assert np.linalg.norm(one - other) > 1.9 * bound / 9  # and so far it can


@pytest.mark.parametrize("rule", sorted(AGGREGATORS))
def test_the_order_of_replies_does_not_matter(rule):
    vectors = _vectors()
    found = AGGREGATORS[rule](vectors, Suspicion(2))
    np.testing.assert_allclose(AGGREGATORS[rule](vectors[::-1], Suspicion(2)), found, rtol=1e-12)


@pytest.mark.parametrize("rule", sorted(AGGREGATORS))
def test_too_few_vectors_for_a_rule_are_refused(rule):
    factor, more = AGGREGATION_NEEDS[rule]
    needed = factor * 2 + more
    AGGREGATORS[rule](_vectors(needed), Suspicion(2))
    if factor:
        with pytest.raises(TooFewRepliesError, match=f"{rule}.* needs {needed} vectors"):
            AGGREGATORS[rule](_vectors(needed - 1), Suspicion(2))


def test_every_name_of_the_settings_has_its_rule():
    assert list(AGGREGATORS) == list(AGGREGATION_NEEDS)


def test_the_mean_of_all_rules_divides_by_the_constant_and_others_are_scaled_like_it():
    updates = [{"w": np.full((2, 2), value), "b": np.array([value])} for value in (1.0, 2.0, 3.0)]
    plain = combine(updates, federation=FederationConfig(), asked=6, liars=0)
    exact = mean_update(updates, denominator=6)
    for name in exact:
        np.testing.assert_array_equal(plain[name], exact[name])
    found = combine(updates, federation=FederationConfig(aggregation="median"), asked=6, liars=1)
    np.testing.assert_allclose(found["w"], np.full((2, 2), 2.0 * 3 / 6))
    np.testing.assert_allclose(found["b"], [1.0])


def test_an_installed_package_brings_a_rule(install_package):
    code = "def first(vectors, suspicion):\n    'Whoever came first.'\n    return vectors[0]\n"
    install_package("ruling", code, {"aggregators": {"first": "first"}})
    federation = FederationConfig(aggregation="first")
    found = combine([{"w": np.ones(2)}, {"w": np.zeros(2)}], federation=federation, asked=2, liars=0)
    assert found["w"].tolist() == [1.0, 1.0]


def test_a_rule_that_nobody_registers_is_refused():
    with pytest.raises(ValidationError, match=r"federation.aggregation must be 'mean', .*got 'bulyan'"):
        FederationConfig(aggregation="bulyan")


def test_rules_that_look_at_single_replies_are_refused_where_only_a_sum_may_be_seen():
    for trust in ("central", "distributed"):
        check_aggregation(_scenario(trust), cohort_size=20)
        with pytest.raises(PrivacyError, match=f"'{trust}' only a noised sum may; allowed here: 'mean'"):
            check_aggregation(_scenario(trust, aggregation="median"), cohort_size=20)
    for trust in ("local", "none"):
        check_aggregation(_scenario(trust, aggregation="median"), cohort_size=20)
    check_aggregation(_scenario("distributed", aggregation="median", groups=5), cohort_size=20)


def test_groups_without_use_of_unequal_size_or_too_few_are_refused():
    refused = {
        "must be 1 unless": _scenario("local", aggregation="median", groups=4),
        "must be 1 unless privacy": _scenario("distributed", groups=4),
        "multiple of federation.groups, got 20 and 6": _scenario("distributed", aggregation="median", groups=6),
        "needs 5 groups a round to withstand 2 liars": _scenario("distributed", aggregation="median", groups=4),
        "needs 21 devices a round to withstand 9": _scenario("local", aggregation="krum", malicious_share=0.45),
    }
    for words, scenario in refused.items():
        with pytest.raises(ScenarioError, match=words):
            check_aggregation(scenario, cohort_size=20)


def test_liars_are_a_share_of_the_devices_asked_and_never_rounded_down():
    assert liars_among(_scenario(malicious_share=0.1), cohort_size=47) == 5
    assert liars_among(_scenario(malicious_share=0.1), cohort_size=30) == 3
