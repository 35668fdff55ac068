"""Canary sentences: the ceiling of AUC by hand, and whole attacks on the small model with few canaries."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from simulations.audit import sentences
from simulations.audit.sentences import audit, audit_scenario, exceeds, make_canaries, make_speaker, most_auc, run
from simulations.audit.stage import open_subject

SCENARIOS = Path(sentences.__file__).parents[1] / "scenarios"


@pytest.fixture(scope="module")
def users(tiny_world, tmp_path_factory):
    """A subject at user level whose claim is small, so that few canaries have power."""
    folder = tmp_path_factory.mktemp("sentences")
    body = 'privacy.unit = "user"\nprivacy.trust = "distributed"\nprivacy.epsilon = 0.5'
    return open_subject(tiny_world(folder, body=body), folder=folder, seed=2, quiet=True)


def test_canaries_are_told_without_privacy_or_noise_and_not_otherwise(users, monkeypatch):
    monkeypatch.setattr(sentences, "_WIDTH", 32)  # 40 canaries need less room than 500
    monkeypatch.setattr(sentences, "_RANK", 8)
    result = run(users, canaries=40, seed=4, quiet=True)
    facts = result.facts
    assert facts["control"]["auc"][0] > 0.95
    assert facts["no-noise"]["auc"][0] > 0.95
    assert facts["private"]["auc"][0] < 0.8
    assert (result.passed, result.control_detected, result.mutants_missed) == (True, True, ())
    assert "no-noise" in result.mutants_caught
    assert 0 <= result.epsilon_lower <= 0.5
    assert all(result.words)


def test_no_result_where_the_control_is_not_detected(users, monkeypatch, tmp_path):
    monkeypatch.setattr(sentences, "attack", lambda *_, **__: {
        "auc": [0.6, 0.5, 0.7], "tpr": [0.0, 0.0, 0.1], "correct": 5, "guesses": 10, "epsilon_lower": 0.0,
    })  # fmt: skip
    subject = type(users)(**{**vars(users), "folder": tmp_path})
    result = run(subject, canaries=40, seed=4, quiet=True)
    assert (result.passed, result.control_detected, result.mutants_missed) == (None, False, ("no-noise",))


def test_the_ceiling_of_auc_is_that_of_two_changes(users):
    policy = users.campaign.policy.model_copy(
        update={"unit": "record", "noise_multiplier": 2.0, "steps": 4, "max_participations": 1}
    )
    assert most_auc(policy) == pytest.approx(stats.norm.cdf(1.0))
    assert most_auc(policy.model_copy(update={"unit": "user"})) == pytest.approx(stats.norm.cdf(0.5))
    assert most_auc(policy.model_copy(update={"sampling_rate": 0.5})) is None


def test_the_ceiling_holds_for_the_best_test_of_the_mechanism_and_has_power():
    draw, noise, runs, canaries = np.random.default_rng(0), 1.2, 60, 200
    over = {1.0: 0, 0.25: 0}
    for share in over:
        for _ in range(runs):
            inside = draw.random(canaries) < 0.5
            scores = inside + share * noise * draw.standard_normal(canaries)  # each along a direction of its own
            found = sentences.auc(scores[inside], scores[~inside])
            over[share] += found.low > stats.norm.cdf(1 / noise)
    assert over[1.0] <= 2
    assert over[0.25] >= 0.95 * runs


@pytest.mark.parametrize(
    ("epsilon_lower", "low", "most", "expected"),
    [(0.4, 0.5, 0.9, False), (0.6, 0.5, 0.9, True), (0.4, 0.91, 0.9, True), (0.4, 0.91, None, False)],
)
def test_what_exceeds_a_claim(epsilon_lower, low, most, expected):
    found = {"epsilon_lower": epsilon_lower, "auc": [0.95, low, 1.0]}
    assert exceeds(found, epsilon=0.5, most=most) is expected


def test_the_promise_stays_and_the_rates_suit_the_clip_norm(users):
    old = users.scenario
    new = audit_scenario(old, name="sentences")
    kept = {"unit", "trust", "epsilon", "delta", "clip_norm", "sampling_rate", "survivors", "colluders"}
    assert new.privacy.model_dump(include=kept) == old.privacy.model_dump(include=kept)
    assert new.federation.method == old.federation.method
    assert new.adapter.scaling >= 4 * old.privacy.clip_norm


def test_canaries_are_the_seeds_and_all_differ(users, tmp_path):
    base = make_speaker(tmp_path / "speaker", seed=0)
    scenario = audit_scenario(users.scenario, name="sentences")
    one, same, other = (make_canaries(base, scenario, count=50, seed=seed).labels for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert len({labels.tobytes() for labels in one}) == 50
    assert {len(labels) for labels in one} == {sentences._SENTENCE}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["movielens", "sotu", "movielens-user"])
def test_the_shipped_scenarios(name, tmp_path):
    subject = open_subject(SCENARIOS / f"{name}.toml", folder=tmp_path, seed=0, quiet=True)
    result = audit(subject, seed=0, quiet=True)
    assert (result.passed, result.control_detected, result.mutants_missed) == (True, True, ())
    assert result.facts["control"]["auc"][0] >= 0.95
    assert set(result.mutants_caught) == {"no-noise", "quarter-noise"}  # at epsilon 8, where the bound has no power
