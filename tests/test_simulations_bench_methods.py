"""The comparison of personal methods: one shared part for all of them, constants from validation rows."""

import numpy as np
import pytest

from shared.config import PersonalConfig, load_scenario
from simulations.bench import methods as bench_methods
from simulations.bench.methods import METHODS, lines, measure


@pytest.fixture(scope="module")
def scenario(tiny_world, tmp_path_factory):
    body = "model.head_blocks = 0\nprivacy.clip_norm = 0.5\n"
    return load_scenario(tiny_world(tmp_path_factory.mktemp("bench-methods"), body=body))


def test_constants_are_the_best_on_validation_rows_and_all_stand_on_one_shared_part(scenario, monkeypatch):
    monkeypatch.setattr(bench_methods, "TRUSTS", ("none",))
    grids = {
        name: (fixed, {key: values[:2] for key, values in grid.items()}) for name, (fixed, grid) in METHODS.items()
    }
    monkeypatch.setattr(bench_methods, "METHODS", {name: grids[name] for name in ("none", "ditto", "retrieval, dense")})
    trained = []
    train = bench_methods.train
    monkeypatch.setattr(bench_methods, "train", lambda changed: trained.append(train(changed)) or trained[-1])
    measured = measure(rounds=1, quiet=True, scenario=scenario)
    assert len(trained) == 1
    cells = {cell["method"]: cell for cell in measured["cells"]}
    changed = bench_methods._changed(scenario, "none", scenario.seed)
    tried = [
        bench_methods._with(changed, PersonalConfig(method="ditto", proximal=value)).validate(trained[0])["personal"]
        for value in grids["ditto"][1]["proximal"]
    ]
    assert cells["ditto"]["validation"] == min(tried) < max(tried)
    test = bench_methods.observer_of(changed).federated(trained[0])
    np.testing.assert_allclose(test["federated"], test["personal"])
    assert len({cell["rmse"][0] for cell in cells.values()}) == 3
    assert len(lines(measured)) == 2 + 3
