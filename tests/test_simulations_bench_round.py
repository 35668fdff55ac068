"""``bench round``: what another framework is given is what our own rounds compute, to the last constant."""

import sys
from pathlib import Path

import numpy as np
import pytest

import simulations.bench.round as bench
from client.training.site import campaign_dataset
from shared.config import load_scenario
from shared.errors import CampaignError
from simulations.bench.simulate import _publish
from simulations.bench.step import Silent
from sottovoce.cli import main


@pytest.fixture
def world(tiny_world, tiny_base, tmp_path):
    """A campaign of rounds over the tiny base, its data set, and the task for the other framework."""
    scenario = bench._of_rounds(load_scenario(tiny_world(tmp_path)))
    dataset = campaign_dataset(scenario)
    campaign = _publish(scenario, tiny_base, dataset, tmp_path / "campaign")
    return campaign, dataset, bench._task(campaign, tiny_base, dataset)


def by_hand(task, **changes):
    """The same rounds from the task alone."""
    task = task | changes
    weight, users = task["start"].astype(np.float64), len(task["counts"])
    ends = np.cumsum(task["counts"])
    for _ in range(task["rounds"]):
        total = np.zeros_like(weight)
        for end, count, divisor in zip(ends, task["counts"], task["divisors"], strict=True):
            x, y = task["x"][end - count : end], task["y"][end - count : end]
            change = -task["learning_rate"] * x.T @ (x @ weight + task["centre"] - y) / divisor
            total += change * min(1.0, task["clip_norm"] / np.linalg.norm(change))
        weight = weight + task["server_learning_rate"] * total / users
    return weight


def test_the_task_is_what_our_rounds_compute(world):
    campaign, dataset, task = world
    for _ in range(2):  # rounds may be timed again and again
        ours = bench._ours(campaign, len(dataset.users), Silent())
        assert bench._distance(ours.weight, by_hand(task)) < bench._SAME
    for wrong in (
        {"clip_norm": 1.1 * task["clip_norm"]},
        {"divisors": task["counts"]},
        {"centre": task["centre"] + 0.5},
    ):
        assert bench._distance(ours.weight, by_hand(task, **wrong)) > bench._SAME


def test_noise_is_drawn_at_the_server(world):
    campaign, dataset, task = world
    from shared.privacy.noise import SeededRandomness

    noise = SeededRandomness(seed=0, campaign="bench", device=0, round_number=0)
    ours = bench._ours(campaign, len(dataset.users), noise)
    assert campaign.policy.noise_multiplier > 0
    assert bench._distance(ours.weight, by_hand(task)) > 10 * bench._SAME


def test_an_environment_is_made_only_where_that_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["bench", "round"]) == 2
    assert "make it with --install" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(bench, "PINS", ("pfl[pytorch]==0.0.0",))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(CampaignError, match=r"-m pip install must succeed in .*pfl-0\.0\.0"):
        bench.environment(install=True)


def test_what_stops_the_other_framework_is_said(world, tmp_path):
    _, _, task = world
    with pytest.raises(CampaignError, match="pfl must run its rounds, got: ModuleNotFoundError"):
        bench._theirs(Path(sys.executable), task, tmp_path, noise=0.0)
