"""The shorter way of ``bench lora`` ends where the campaign itself does."""

import numpy as np
import pytest

from client.training.site import resident_base, resident_dataset
from server.checkpoint import load_checkpoint, newest_first
from shared.config import load_scenario
from shared.errors import ScenarioError
from simulations.bench.lora import HEADS, federate, fresh_head, lines, score
from simulations.campaigns import plan_campaigns
from simulations.observe.observe import RatingObserver
from simulations.run import simulate

USER = (
    'privacy.unit="user"',
    'federation.cohort_size="all"',
    "federation.rounds=3",
    "privacy.max_participations=3",
    "privacy.epsilon=100",
    "linear.enabled=false",
    "statistics.enabled=false",
    "export.users=0",
)


@pytest.mark.parametrize(
    "options",
    [
        ('privacy.trust="distributed"', "model.head_blocks=1", "privacy.survivors=0.9"),
        ('privacy.trust="central"', "model.head_blocks=0", "adapter.kernel_features=8", "adapter.whitened_features=0"),
    ],
)
@pytest.mark.slow
def test_the_shorter_way_gives_the_arrays_of_the_campaign(tiny_world, tmp_path, options):
    scenario = load_scenario(tiny_world(tmp_path), (*USER, *options))
    summary = simulate(scenario, out=tmp_path / "run", quiet=True)
    [campaign] = (tmp_path / "run" / "campaigns").iterdir()
    wanted = load_checkpoint(newest_first(campaign / "checkpoints")[0]).arrays

    dataset, base = resident_dataset(scenario.data), resident_base(scenario.model.base)
    [plan] = plan_campaigns(scenario, base, dataset, quiet=True)
    head = fresh_head(plan, base, dataset)
    rows = RatingObserver(head, plan.texts, dataset, scenario).fit
    found = federate(plan, head, rows, users=len(dataset.users))
    assert list(found) == list(wanted)
    for name, array in found.items():
        moved = np.abs(wanted[name] - plan.start[name]).max()
        assert moved > 0.01
        assert np.abs(array - wanted[name]).max() < 1e-3 * moved
    assert score(scenario) == pytest.approx(summary["rows"]["personal"]["rmse"]["value"], abs=1e-4)


def test_what_it_cannot_shorten_is_refused(tiny_world, tmp_path):
    scenario = load_scenario(tiny_world(tmp_path), (*USER, 'privacy.trust="central"', "training.steps=2"))
    with pytest.raises(ScenarioError, match=r"training\.steps = 1"):
        score(scenario)


def test_the_table_names_every_head():
    one = {"mean": 1.0, "sd": 0.1, "values": [1.0]}
    cell = {"epsilon": 8.0, "test": dict.fromkeys(HEADS, one), "added": dict.fromkeys(("linear", "kernel"), one)}
    [_, names, row] = lines({"seeds": 1, "cells": [cell]})
    assert all(name in names for name in HEADS)
    assert row.split()[0] == "8"
