"""``bench sweep`` times nothing that ends with other scores, and takes both ways in turns."""

from types import SimpleNamespace

import pytest

import simulations.bench.sweep as bench
from shared.errors import CampaignError
from simulations.study.config import load_study
from simulations.study.plan import plan_runs


def runs(*scores):
    return {
        epsilon: SimpleNamespace(settings={"privacy": {"epsilon": epsilon}}, summary=SimpleNamespace(rows={"x": score}))
        for epsilon, score in zip(bench._EPSILONS, scores, strict=True)
    }


@pytest.mark.parametrize(("found", "equal"), [((1.0, 2.0, 3.0), True), ((1.0, 2.0, 3.1), False)])
def test_other_scores_stop_it(tmp_path, monkeypatch, found, equal):
    alone = runs(1.0, 2.0, 3.0)
    monkeypatch.setattr(bench, "finished_runs", lambda _: {k: [run] for k, run in runs(*found).items()})
    monkeypatch.setattr(bench, "read_run", lambda path: alone[float(path.name.removeprefix("run-"))])
    if equal:
        bench._compare(tmp_path)
    else:
        with pytest.raises(CampaignError, match="must have the scores of the same run alone"):
            bench._compare(tmp_path)


def test_a_study_s_runs_are_those_that_are_typed(tmp_path):
    path = tmp_path / "study.toml"
    path.write_text(bench._study("movielens"), encoding="utf-8")
    planned = plan_runs(load_study(path), path)
    assert [run.scenario.privacy.epsilon for run in planned] == list(bench._EPSILONS)
    words = bench._simulate("movielens", 2.0, tmp_path)
    for key, value in bench._SETTINGS.items():
        table, name = key.split(".")
        assert getattr(getattr(planned[0].scenario, table), name) == value
        assert any(word.startswith(f"{key}=") for word in words)


def test_ways_are_timed_in_turns_and_the_overhead_is_of_each_round(monkeypatch):
    took = {"sweep": 11.0, "simulate": 10.0}
    asked = []

    def timed(commands):
        name = "report" if "--report-only" in commands[0] else commands[0][0]
        asked.append((name, len(commands)))
        return took.get(name, 1.0), 1.0

    monkeypatch.setattr(bench, "_timed", timed)
    monkeypatch.setattr(bench, "_compare", lambda _: None)
    measured = bench.measure(rounds=2, quiet=True)
    assert asked == [("simulate", 3), ("sweep", 1), ("report", 1), ("sweep", 1), ("simulate", 3), ("report", 1)]
    assert measured["overhead"]["median"] == pytest.approx(0.1)
    assert not measured["goals"]["overhead of a sweep, report included"]["met"]
    assert any("MISSED" in line for line in bench.lines(measured))
