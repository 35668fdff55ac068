"""L1 of an audit: canaries pass the real code, show every gross fault, and are found without privacy, at both units."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import client.app
import client.training.optimizer
import client.training.train
import server.strategy
from client.training.optimizer import PolicyOptimizer
from shared.config import PrivacyConfig, Scenario, TrainingConfig
from shared.errors import CampaignError, ScenarioError
from shared.privacy.noise import GRID_SIGMA, SecureRandomness
from shared.privacy.policy import grid_of
from simulations.audit import canaries
from simulations.audit.canary_stand import _devices, _seats, _seen, _settings, attack, open_stand
from simulations.audit.mutants import MUTANTS, _Scaled, mutant, quieter
from simulations.audit.stage import make_policy, open_subject, play, unprotected

RECORD = Scenario(name="canaries", privacy=PrivacyConfig(epsilon=2.0, max_participations=1))
DISTRIBUTED = Scenario(
    name="canaries",
    privacy=PrivacyConfig(unit="user", trust="distributed", epsilon=2.0, survivors=0.9, colluders=0.05),
    training=TrainingConfig(learning_rate=0.5),
)
CENTRAL = Scenario(
    name="canaries", privacy=PrivacyConfig(unit="user", trust="central", epsilon=2.0, max_participations=1)
)
PLACES = (
    (client.training.train, "make_optimizer"),
    (client.training.train, "_draw"),
    (client.training.optimizer, "clipped_sum"),
    (client.app, "train_shared"),
    (client.app, "contribute"),
    (server.strategy, "noised_sum"),
    (server.strategy, "check_reply"),
    (PolicyOptimizer, "step"),
)


@pytest.fixture(scope="module")
def stand(tmp_path_factory):
    """A thousand canary records at epsilon 2."""
    return open_stand(RECORD, name="audited", folder=tmp_path_factory.mktemp("stand"))


def weaken(monkeypatch, share):
    """Policies state an epsilon that their noise, a share of what it takes, does not keep; devices believe them."""

    def weak(*arguments, **options):
        policy = make_policy(*arguments, **options)
        policy = policy.model_copy(update={"noise_multiplier": policy.noise_multiplier * share})
        return policy.model_copy(update={"grid": grid_of(policy)})

    monkeypatch.setattr("simulations.audit.stage.make_policy", weak)
    monkeypatch.setattr("shared.protocol.campaign.check_price", lambda policy: None)


# Mutants


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_gone_after_its_block_however_it_ends(name):
    def looked_up():
        return [getattr(*place) for place in PLACES]

    def fail_inside():
        with mutant(name):
            assert looked_up() != before
            raise KeyError

    before = looked_up()
    with pytest.raises(KeyError):
        fail_inside()
    assert looked_up() == before


def test_an_unknown_mutant_is_named():
    with pytest.raises(ScenarioError, match=r"must be one of no-noise, .*, got 'no-nose'"):
        mutant("no-nose")


@pytest.mark.parametrize("factor", [0.0, 0.25])
def test_scaled_noise_has_its_share_and_draws_are_left_alone(factor):
    scaled = _Scaled(SecureRandomness(), factor)
    assert np.std(scaled.gaussian_integers(20_000)) == pytest.approx(factor * GRID_SIGMA, rel=0.04)
    assert np.std(scaled.gaussian_integers(20_000, log2_sigma=10)) == pytest.approx(factor * 2**10, rel=0.04, abs=0.2)
    assert 0.4 < scaled.bernoulli(0.5, 2_000).mean() < 0.6


# Records


def test_real_steps_keep_epsilon_and_without_privacy_nearly_every_canary_is_found(stand, tmp_path):
    real = attack(stand, seed=1)
    assert stand.campaign.policy.epsilon == 2.0
    assert stand.campaign.policy.rounds == 1
    assert 0 < real.highest <= 2.0
    assert 110 < real.correct < 180  # there is something to see, and it is not all
    control = attack(open_stand(unprotected(RECORD), name="bare", folder=tmp_path), seed=1)
    assert control.correct == control.guesses == 200
    assert control.epsilon_lower > 4
    assert control.gaussian is None


@pytest.mark.parametrize("name", canaries.MUTANTS)
def test_gross_faults_show(stand, name):
    with mutant(name):
        assert attack(stand, seed=2).epsilon_lower > 2.0


@pytest.mark.slow
def test_a_record_that_counts_twice_is_half_of_the_noise_and_is_seen_by_the_sharper_bound_as_a_rule(stand):
    found = []
    for seed, fault in enumerate([MUTANTS["record-twice"].apply, quieter(0.5)] * 5):
        with fault():
            found.append(attack(stand, seed=seed))
    assert sum(each.gaussian.epsilon_lower > 2.0 for each in found) >= 3  # 8 in 10 as a rule
    assert all(each.epsilon_lower <= 2.0 for each in found[:4])


def test_a_policy_whose_noise_is_not_what_it_states_is_found_out(tmp_path, monkeypatch):
    weaken(monkeypatch, 1 / 4)
    assert attack(open_stand(RECORD, name="weak", folder=tmp_path), seed=3).epsilon_lower > 2.0


def test_a_device_refuses_such_a_policy_by_itself(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        weaken(patch, 1 / 4)
        weak = open_stand(RECORD, name="refused", folder=tmp_path)
    with pytest.raises(CampaignError, match="POLICY"):
        attack(weak, seed=3)


def test_no_more_is_played_than_time_allows_and_the_price_is_that_of_what_is_played():
    many = RECORD.model_copy(update={"training": TrainingConfig(steps=25), "privacy": PrivacyConfig(delta=0.5)})
    played = _settings(many, name="many", clients=100)
    assert (played.training.steps, played.privacy.max_participations, played.federation.rounds) == (25, 2, 2)
    assert played.privacy.delta == 1e-3
    users = _settings(DISTRIBUTED, name="users", clients=100)
    assert (users.privacy.max_participations, users.federation.rounds) == (1, 1)
    assert users.privacy.clip_norm == DISTRIBUTED.privacy.clip_norm


def test_canaries_are_at_right_angles_over_both_tensors_and_an_odd_number_fits(tmp_path):
    odd = open_stand(RECORD, name="odd", folder=tmp_path, canaries=7)
    directions = odd.head.directions()
    assert np.allclose(directions @ directions.T, np.eye(8))
    left, right = np.split(directions, 2, axis=1)
    assert np.allclose(np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1))
    assert odd.campaign.policy.size == 8
    assert attack(odd, seed=0).guesses == 7


# Users


@pytest.mark.parametrize("scenario", [DISTRIBUTED, CENTRAL], ids=["distributed", "central"])
def test_without_noise_the_adversary_sees_each_user_by_itself(scenario, tmp_path):
    stand = open_stand(scenario, name="audited", folder=tmp_path, canaries=40)
    policy, directions = stand.campaign.policy, stand.head.directions()
    inside = np.random.default_rng(0).random(40) < 0.5
    parts = _devices(stand, directions * 1e3, inside)
    with mutant("no-noise"):
        played = play(stand.campaign, parts)
    scores = directions @ _seen(stand, played)
    unit = policy.grid if policy.trust == "distributed" else policy.cohort_size / 1e-3
    assert np.allclose(scores * unit, policy.clip_norm * inside, atol=0.03 * policy.clip_norm)
    noisy = directions @ _seen(stand, play(stand.campaign, parts)) * unit / policy.clip_norm
    assert np.std(noisy) == pytest.approx(policy.noise_multiplier, rel=0.5)


def test_only_the_fewest_survivors_answer_and_colluders_are_no_canaries():
    for canary_count in (40, 300, 1000):
        clients, colluders, silent = _seats(DISTRIBUTED, canary_count)
        survivors = clients - silent
        assert survivors == int(np.ceil(0.9 * clients - 1e-9))
        assert survivors - colluders == canary_count
        assert 0 <= colluders <= 0.05 * clients
    assert _seats(CENTRAL, 300) == (300, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [DISTRIBUTED, CENTRAL], ids=["distributed", "central"])
def test_a_policy_for_users_whose_noise_is_not_what_it_states_is_found_out(scenario, tmp_path, monkeypatch):
    weaken(monkeypatch, 1 / 4)
    assert attack(open_stand(scenario, name="weak", folder=tmp_path), seed=3).epsilon_lower > 2.0


# Whole levels


@pytest.fixture
def subject(tmp_path):
    """(scenario) -> what the level needs of a subject."""
    return lambda scenario: SimpleNamespace(scenario=scenario, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "",
        "privacy.sampling_rate = 0.3\ntraining.steps = 4",
        'privacy.unit = "user"\nprivacy.trust = "distributed"\nprivacy.survivors = 0.75',
        'privacy.unit = "user"\nprivacy.trust = "central"',
    ],
    ids=["record", "sampled", "distributed", "central"],
)
def test_the_level_passes_what_keeps_its_promise(tiny_world, tmp_path, body):
    (tmp_path / "audit").mkdir()
    found = canaries.audit(
        open_subject(tiny_world(tmp_path, body=body), folder=tmp_path / "audit", seed=0, quiet=True),
        seed=0,
        quiet=True,
    )
    assert found.passed is True
    assert found.control_detected
    assert found.mutants_caught == canaries.MUTANTS
    assert 0 < found.epsilon_lower <= 2.0
    assert found.facts["audit"]["epsilon"] == 2.0
    assert found.facts["audit"]["canaries"] >= 1000
    assert found.facts["claimed"]["epsilon"] == 8.0
    assert found.facts["power"]["audit"]["one-run"]["sigma/4"] >= 0.99
    assert ("No power" in found.words[1]) is ("gaussian" not in found.facts["power"]["claimed"])


@pytest.mark.slow
def test_the_level_fails_a_policy_whose_noise_is_not_what_it_states(subject, monkeypatch):
    weaken(monkeypatch, 1 / 4)
    found = canaries.audit(subject(RECORD), seed=0, quiet=True)
    assert found.passed is False
    assert found.control_detected
    assert not found.mutants_missed


@pytest.mark.slow
def test_the_level_gives_no_result_where_its_control_or_a_mutant_is_missed(subject, monkeypatch):
    blind = replace(MUTANTS["no-clip"], apply=MUTANTS["tells-count"].apply)
    with monkeypatch.context() as patch:
        patch.setitem(MUTANTS, "no-clip", blind)
        found = canaries.audit(subject(RECORD), seed=0, quiet=True)
    assert found.passed is None
    assert found.mutants_missed == ("no-clip",)
