"""Several seeds in one run, and one seed on several engines."""

import json

import numpy as np
import pytest
import scipy.stats

from server.checkpoint import checkpoint_path, load_checkpoint
from shared.config import load_scenario
from shared.metrics.ratings import Interval
from simulations.run import simulate
from simulations.score import mean_over_seeds

unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
handles = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
LEAN = ("export.users=0",)


@pytest.fixture(scope="module")
def runs(tiny_world, tmp_path_factory):
    """Three seeds in one run, and each of them in a run of its own."""
    folder = tmp_path_factory.mktemp("seeds")
    path = tiny_world(folder)
    several = simulate(load_scenario(path, (*LEAN, "evaluation.seeds=3")), out=folder / "several", quiet=True)
    alone = [
        simulate(load_scenario(path, (*LEAN, f"seed={seed}")), out=folder / f"alone-{seed}", quiet=True)
        for seed in (3, 4, 5)
    ]
    return folder, several, alone


def test_each_seed_is_the_run_it_would_be_alone(runs):
    folder, several, alone = runs
    assert several["seeds"] == [3, 4, 5]
    for seed, summary in zip((3, 4, 5), alone, strict=True):
        assert "over_seeds" not in summary
        ours, theirs = (
            load_checkpoint(checkpoint_path(folder / name / "checkpoints", 3))
            for name in (f"several/campaigns/lora-seed-{seed}", f"alone-{seed}/campaigns/lora")
        )
        for name in ours.arrays:
            np.testing.assert_array_equal(ours.arrays[name], theirs.arrays[name])
    for row, metrics in several["over_seeds"].items():
        for metric, found in metrics.items():
            assert found["values"] == pytest.approx([summary["rows"][row][metric]["value"] for summary in alone])


def test_the_table_holds_the_mean_and_students_interval(runs):
    _, several, alone = runs
    values = [summary["rows"]["personal"]["rmse"]["value"] for summary in alone]
    assert len(set(values)) == 3  # everything that is drawn was drawn anew
    assert several["rows"]["personal"]["rmse"]["value"] == pytest.approx(np.mean(values))
    low, high = scipy.stats.t.interval(0.95, 2, loc=np.mean(values), scale=scipy.stats.sem(values))
    found = several["over_seeds"]["personal"]["rmse"]
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    assert len({json.dumps(summary["rows"]["constant"]) for summary in alone}) == 3  # other resamples of the users
    assert several["over_seeds"]["constant"]["rmse"]["values"] == [several["rows"]["constant"]["rmse"]["value"]] * 3


def test_devices_count_each_seeds_campaign_alone(runs):
    """max_participations = 1: with one count for all seeds the second seed would be refused."""
    _, several, _ = runs
    assert several["federation"]["rejected"] == {}
    assert several["federation"]["replies"] == 3 * 4


def test_the_lines_tell_the_seeds_apart(runs):
    folder, _, _ = runs
    lines = [json.loads(line) for line in (folder / "several" / "metrics.jsonl").read_text().splitlines()]
    keys = [(line["campaign"], line["seed"], line["round"]) for line in lines]
    wanted = [(name, seed, done) for seed in (3, 4, 5) for name in ("lora", "linear") for done in range(4)]
    assert keys == wanted


def test_the_interval_of_a_mean_is_the_mean_of_the_intervals():
    found = mean_over_seeds([Interval(1.0, 0.5, 2.0), Interval(2.0, 1.5, 2.5)])
    assert (found.value, found.low, found.high) == (1.5, 1.0, 2.25)


@pytest.mark.slow
@unraisable
@handles
@pytest.mark.timeout(900)
def test_inline_and_ray_give_the_same_aggregate_and_the_same_epsilon(tiny_world, tmp_path):
    path = tiny_world(tmp_path)
    summaries = {}
    for engine in ("inline", "ray"):
        changes = (*LEAN, f"performance.engine={engine}", "performance.workers=2", "evaluation.seeds=2")
        summaries[engine] = simulate(load_scenario(path, changes), out=tmp_path / engine, quiet=True)
    assert summaries["inline"]["rows"] == summaries["ray"]["rows"]
    assert summaries["inline"]["privacy"] == summaries["ray"]["privacy"]
    for campaign in ("lora-seed-3", "linear-seed-3", "lora-seed-4", "linear-seed-4"):
        for done in (1, 2, 3):
            one, other = (
                load_checkpoint(checkpoint_path(tmp_path / engine / "campaigns" / campaign / "checkpoints", done))
                for engine in ("inline", "ray")
            )
            assert one.participations == other.participations
            for name in one.arrays:
                np.testing.assert_array_equal(one.arrays[name], other.arrays[name])
            for name in one.optimizer.first:
                np.testing.assert_array_equal(one.optimizer.first[name], other.optimizer.first[name])


@pytest.mark.slow
@unraisable
@handles
@pytest.mark.timeout(900)
def test_a_run_begun_inline_goes_on_with_ray(tiny_world, tmp_path):
    """The engine is a setting of performance: which one finishes a run does not show in its result."""
    import shutil

    path = tiny_world(tmp_path)
    whole = simulate(load_scenario(path, LEAN), out=tmp_path / "whole", quiet=True)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").unlink()
    for campaign in ("lora", "linear"):
        shutil.rmtree(checkpoint_path(tmp_path / "cut" / "campaigns" / campaign / "checkpoints", 3))
    scenario = load_scenario(path, (*LEAN, "performance.engine=ray"))
    resumed = simulate(scenario, out=tmp_path / "cut", quiet=True, resume=True)
    assert resumed["rows"] == whole["rows"]
    assert [note["round"] for note in resumed["resumed"]] == [2, 2]
