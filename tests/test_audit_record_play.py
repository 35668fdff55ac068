"""L0 of an audit: it passes the real code, finds each fault by the check meant for it, and says when it is weak."""

import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from shared.privacy.noise import SecureRandomness
from shared.privacy.policy import grid_of
from simulations.audit import record_play
from simulations.audit.assumptions import (
    Replay,
    Tape,
    are_independent,
    coins_decide,
    draws_as_priced,
    noise_as_asked,
    priced_as_stated,
)
from simulations.audit.mutants import mutant
from simulations.audit.neighbours import Row
from simulations.audit.record_play import RecordStand
from simulations.audit.stage import open_subject
from simulations.audit.user_play import UserStand

FOUND_BY = {
    "record-twice": "coins",
    "user-twice": "bound",
    "no-clip": "bound",
    "clip-each-tensor": "bound",
    "data-steps": "draws",
    "data-rate": "draws",
    "data-denominator": "bound",
    "skip-empty": "draws",
    "tells-count": "same log",
    "no-noise": "noise",
    "quarter-noise": "noise",
    "wrong-sampler": "independent",
}


@pytest.fixture
def make(tiny, tiny_world, tiny_llama, tmp_path):
    """(task, *overrides) -> a subject over tiny models."""

    def build(task, *overrides):
        if task == "language":
            data = tiny.tiny_dialogues(tmp_path / "dialogues")
            path = tiny.tiny_generation(tmp_path, base=tiny_llama, data=data)
        else:
            path = tiny_world(tmp_path)
        folder = tmp_path / "audit"
        folder.mkdir()
        return open_subject(path, overrides=overrides, folder=folder, seed=0, quiet=True)

    return build


LINEAR = "rating", "model.head_blocks=0"
CASES = {
    "linear": LINEAR,
    "rating": ("rating",),
    "language": ("language",),
    "sampled": ("rating", "privacy.sampling_rate=0.5", "training.steps=3", "privacy.max_participations=2"),
    "distributed": ("rating", "privacy.unit=user", "privacy.trust=distributed"),
    "central": ("rating", "privacy.unit=user", "privacy.trust=central"),
}


SLOW = ("rating", "language", "sampled", "central")


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow if c in SLOW else ()) for c in CASES])
def test_the_real_code_passes_and_every_fault_is_found_by_its_check(make, case):
    result = record_play.audit(make(*CASES[case]), seed=0)
    assert result.passed, (result.words, result.facts)
    assert result.control_detected
    assert result.facts["moved"]["loud"] >= 0.99
    assert set(result.mutants_caught) == set(result.facts["found_by"])
    for name, checks in result.facts["found_by"].items():
        assert FOUND_BY[name] in checks, name
    assert result.epsilon_lower is None
    assert 1 <= len(result.words) <= 6


@pytest.fixture
def without_mutants(monkeypatch):
    for stand in (RecordStand, UserStand):
        monkeypatch.setattr(stand, "mutants", ())


def test_code_with_a_fault_does_not_pass(make, without_mutants):
    subject = make(*LINEAR)
    with mutant("data-denominator"):
        result = record_play.audit(subject, seed=0)
    assert result.passed is False
    assert "bound" in result.words[0]


def test_a_check_that_misses_a_fault_gives_no_result(make, monkeypatch):
    monkeypatch.setattr(RecordStand, "mutants", ("quarter-noise",))
    monkeypatch.setattr(RecordStand, "_is_noise", lambda *_: True)
    result = record_play.audit(make(*LINEAR), seed=0)
    assert result.passed is None
    assert result.mutants_missed == ("quarter-noise",)


def test_without_anything_too_long_there_is_no_result(make, monkeypatch, without_mutants):
    monkeypatch.setattr(Row, "loud", lambda row, share=1.0: Row(row.hidden * 0, 3.0))  # a gradient of nearly nothing
    result = record_play.audit(make(*LINEAR), seed=0)
    assert result.passed is None
    assert not result.control_detected


def test_what_is_priced_is_what_is_stated_and_nothing_else(make):
    subject = make(*LINEAR)
    campaign = subject.campaign
    assert all(priced_as_stated(campaign, devices=12).values())
    assert not priced_as_stated(campaign, devices=11)["participations"]  # somebody would be asked twice

    def but(**changes):
        altered = type(campaign)(
            campaign.folder, campaign.scenario, campaign.policy.model_copy(update=changes), campaign.start
        )
        return [name for name, held in priced_as_stated(altered, devices=12).items() if not held]

    assert but(steps=2) == ["price"]
    assert set(but(noise_multiplier=campaign.policy.noise_multiplier / 2)) == {"price", "constants"}


def fixed_size(count, rate, steps):
    draw = np.random.default_rng(0)
    return np.array([draw.permutation(count) < rate * count for _ in range(steps)])


def one_coin_for_all(count, rate, steps):
    return np.repeat(np.random.default_rng(0).random((steps, 1)) < rate, count, axis=1)


def same_in_all_steps(count, rate, steps):
    return np.repeat(np.random.default_rng(0).random((1, count)) < rate, steps, axis=0)


def another_rate(count, rate, steps):
    return np.random.default_rng(0).random((steps, count)) < rate / 2


@pytest.mark.parametrize("wrong", [fixed_size, one_coin_for_all, same_in_all_steps, another_rate])
def test_only_independent_coins_look_like_them(wrong):
    count, steps = record_play._SAMPLED, record_play._STEPS
    randomness = SecureRandomness()
    for rate in (0.1, 0.5, 0.9):
        coins = np.array([randomness.bernoulli(rate, count) for _ in range(steps)]).astype(int)
        if coins.any(0).all() and not coins.all(0).any():
            assert are_independent(coins, rate)
    assert not are_independent(wrong(count, 0.5, steps).astype(int), 0.5)


def test_draws_of_more_records_begin_with_those_of_fewer():
    fewer, more = Replay(1, 2), Replay(1, 2)
    for _ in range(3):
        assert np.array_equal(fewer.bernoulli(0.5, 40), more.bernoulli(0.5, 41)[:40])
        assert np.array_equal(fewer.gaussian_integers(7), more.gaussian_integers(7))
    assert not np.array_equal(fewer.gaussian_integers(7), fewer.gaussian_integers(7))
    assert not Replay(1, 2, scale=0).gaussian_integers(7).any()


def test_a_coin_that_was_not_heeded_is_seen(make):
    policy = make(*LINEAR).campaign.policy.model_copy(update={"sampling_rate": 0.5, "steps": 2})

    def played(take):
        tape = Tape(lambda _: Replay(1))
        randomness = tape.randomness(1)
        for _ in range(policy.steps):
            coins = randomness.bernoulli(0.5, 6)
            tape.hear(take(np.flatnonzero(coins)))
            randomness.gaussian_integers(policy.size)
        assert draws_as_priced(tape, policy, rounds=1)
        assert not draws_as_priced(tape, policy, rounds=2)
        assert not draws_as_priced(tape, policy.model_copy(update={"sampling_rate": 0.4}), rounds=1)
        return coins_decide(tape, 6)

    assert played(lambda rows: rows)
    assert not played(lambda rows: rows[1:])
    assert not played(lambda rows: np.repeat(rows, 2))


def without_clip_near_the_bound(real):
    """Records of 1 to 2 bounds pass as they are."""

    def spares(per_sample, *, clip_norm, grid):
        norms = torch.stack([x.flatten(1).norm(dim=1) for x in per_sample]).norm(dim=0)
        near = (norms > clip_norm) & (norms <= 2 * clip_norm)
        usual, loose = (
            real([x[rows] for x in per_sample], clip_norm=bound, grid=grid)
            for rows, bound in ((~near, clip_norm), (near, 2.1 * clip_norm))
        )
        return [one + other for one, other in zip(usual, loose, strict=True)]

    return spares


def less_noise_from_the_second_step_on(real):
    """A third of it."""

    class Tired(real):
        def step(self, closure=None):
            super().step(closure)
            if not isinstance(self._randomness, Third):
                self._randomness = Third(self._randomness)

    return Tired


class Third:
    def __init__(self, randomness):
        self._randomness = randomness

    def gaussian_integers(self, count):
        return self._randomness.gaussian_integers(count) // 3


def a_bit_that_tells(real):
    """The lowest bit of what is sent says whether the number of records is even."""

    def tells(module, start, features, targets, **rest):
        update = real(module, start, features, targets, **rest)
        name = next(iter(update))
        update[name].view(np.uint32).ravel()[0] ^= len(targets) % 2
        return update

    return tells


@pytest.mark.parametrize(
    ("place", "fault", "settings", "check"),
    [
        ("client.training.optimizer.clipped_sum", without_clip_near_the_bound, (), "bound"),
        (
            "client.training.optimizer.PolicyOptimizer",
            less_noise_from_the_second_step_on,
            ("training.steps=3",),
            "noise",
        ),
        ("client.app.train_shared", a_bit_that_tells, (), "nan"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_subtler_faults_are_found(make, without_mutants, monkeypatch, place, fault, settings, check):
    module, name = place.rsplit(".", 1)
    subject = make(*LINEAR, *settings)
    monkeypatch.setattr(place, fault(getattr(importlib.import_module(module), name)))
    result = record_play.audit(subject, seed=0)
    assert result.passed is False
    assert not result.facts["checks"][check]


def test_noise_of_another_size_or_the_same_for_everybody_is_found(monkeypatch):
    assert noise_as_asked(24)
    assert noise_as_asked(16)
    monkeypatch.setattr("os.urandom", lambda count: bytes(count))
    assert not noise_as_asked(24)  # two devices draw the same
    monkeypatch.undo()
    real = SecureRandomness.gaussian_integers
    monkeypatch.setattr(SecureRandomness, "gaussian_integers", lambda *a, **k: (real(*a, **k) * 0.97).astype(np.int64))
    assert not noise_as_asked(24)


def test_colluders_and_survivors_are_those_of_the_settings(make):
    campaign = make(*CASES["distributed"], "privacy.colluders=0.25", "privacy.survivors=0.75").campaign
    assert priced_as_stated(campaign, devices=12)["constants"]
    terms = campaign.policy.secure_sum
    for change in ({"colluders": 0}, {"min_survivors": terms.min_survivors + 1}):
        policy = campaign.policy.model_copy(update={"secure_sum": terms.model_copy(update=change)})
        policy = policy.model_copy(update={"grid": grid_of(policy)})
        assert not priced_as_stated(replace(campaign, policy=policy), devices=12)["constants"]
