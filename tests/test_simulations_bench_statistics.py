"""The measurement of the rival: constants come from validation rows, and every group carries the whole noise."""

import math

import pytest

from shared.config import PrivacyConfig, load_scenario
from simulations.bench import statistics as bench_statistics
from simulations.bench.statistics import GRID, _Bench, _grid, lines, measure


@pytest.fixture(scope="module")
def scenario(tiny_world, tmp_path_factory):
    return load_scenario(tiny_world(tmp_path_factory.mktemp("bench-statistics")))


def test_constants_are_the_best_on_validation_rows(scenario):
    bench = _Bench(scenario)
    settings, best = bench.choose(unit="user", noise=0.5)
    observer = bench.observer
    tried = {
        each: bench.score(observer.fit, observer.validation, unit="user", noise=0.5, settings=each, seed=1000)[1]
        for each in _grid(scenario.statistics)
    }
    assert len(tried) == math.prod(len(values) for values in GRID.values())
    assert tried[settings] == best == min(tried.values()) < max(tried.values())


def test_every_group_carries_the_whole_noise(scenario):
    bench = _Bench(scenario)
    privacy = PrivacyConfig(unit="user", trust="central", delta=1e-4)
    assert bench.noise(privacy, group=5) == pytest.approx(math.sqrt(3) * bench.noise(privacy))  # 12 users
    assert bench.noise(privacy, group=12) == bench.noise(privacy)


def test_the_table_has_every_unit_and_epsilon(scenario, monkeypatch):
    monkeypatch.setattr(bench_statistics, "EPSILONS", (8.0,))
    monkeypatch.setattr(bench_statistics, "GRID", {"variance": (0.05, 0.25)})
    measured = measure(rounds=2, quiet=True, scenario=scenario)
    found = {(cell["unit"], cell["epsilon"]): cell for cell in measured["cells"]}
    assert list(found) == [("user", None), ("user", 8.0), ("record", None), ("record", 8.0)]
    private, bare = found["user", 8.0], found["user", None]
    assert private["chosen"]["variance"] in (0.05, 0.25)
    assert len(set(private["test"]["personal"]["values"])) == 2  # seeds of the noise differ
    assert len(bare["test"]["personal"]["values"]) == 1
    assert "test_in_groups" in private
    assert "test_in_groups" not in found["record", 8.0]
    assert len(lines(measured)) == 2 + len(found)
