"""``bench peers`` takes one step in several ways that must agree; ``bench all`` goes on where one fails."""

import json
from dataclasses import dataclass

import numpy as np
import pytest

import simulations.bench.peers as bench
from shared.errors import CampaignError
from simulations.bench.all import measure_all
from sottovoce.cli import main


def installed(name):
    package = bench.WAYS[name][0] if name in bench.WAYS else None
    return package is None or bench._installed(package)


@pytest.fixture
def world(tiny_world, tiny_base, tmp_path):
    from client.training.site import campaign_dataset
    from shared.config import load_scenario

    scenario = load_scenario(tiny_world(tmp_path))
    dataset = campaign_dataset(scenario)
    return scenario, tiny_base, dataset, dataset.users[0].fit


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # vmap over attention; that it is slow is measured
@pytest.mark.parametrize("name", ["ours_fp32", *bench.WAYS])
def test_every_way_gives_the_answer_of_opacus_hooks(world, name):
    if not installed(name):
        pytest.skip("needs the package; pip install 'sottovoce[peers]'")
    wanted = bench._answer("opacus_hooks", *world)
    assert max(np.abs(each).max() for each in wanted.values()) > 1e-4
    assert bench.distance(bench._answer(name, *world), wanted) < 1e-3


def test_noise_is_drawn_where_a_way_is_timed(world):
    step = bench._step(*world)
    assert step.noise == step.prepared.policy.noise_multiplier > 0
    changes = []
    for _ in range(2):
        step = bench._step(*world)
        bench._way("opacus_hooks", step)()
        changes.append(step.change())
    assert bench.distance(*changes) > 1e-3


def test_nothing_is_timed_where_ours_is_another_answer(world, monkeypatch):
    monkeypatch.setattr(bench, "_way", lambda name, step: lambda: {n: a + 1 for n, a in step.prepared.start.items()})
    monkeypatch.setattr(bench, "distance", lambda a, b: 1.0)
    with pytest.raises(CampaignError, match="ours_fp32 and Opacus must agree"):
        bench._ways(*world)


def test_a_package_that_is_not_there_is_left_out_with_the_reason(world, monkeypatch):
    monkeypatch.setattr(bench, "_installed", lambda package: False)
    monkeypatch.setattr(bench, "distance", lambda a, b: 0.0)
    found = bench._ways(*world)
    assert set(found.left_out) == {"dp-lora", "opake-dpsgd"}
    assert "pip install" in found.left_out["dp-lora"]
    assert set(found.timed) == {
        "ours_fp32",
        "ours_mixed",
        "opacus_hooks",
        "opacus_hooks_onednn",
        "opacus_functorch",
        "opacus_ghost",
    }


@dataclass
class Done:
    returncode: int
    stdout: bytes = b'{"x": 1}'


def test_all_go_on_where_one_fails_and_the_exit_code_says_so(tmp_path, monkeypatch, capfd):
    ran = []

    def run(command, **_):
        ran.append(command[4])
        return Done(int(command[4] == "step"))

    monkeypatch.setattr("subprocess.run", run)
    assert measure_all(["step", "ledger"], out=tmp_path / "m") == ["step"]
    assert [path.name for path in (tmp_path / "m").iterdir()] == ["bench-ledger.json"]
    assert json.loads((tmp_path / "m" / "bench-ledger.json").read_text()) == {"x": 1}
    assert main(["bench", "all", "--only", "step", "noise", "--out", str(tmp_path / "n")]) == 1
    assert main(["bench", "all", "--only", "noise", "--out", str(tmp_path / "n")]) == 0
    assert ran == ["step", "ledger", "step", "noise", "noise"]
    assert "step: failed with exit code 1" in capfd.readouterr().err


def test_the_list_measures_nothing(monkeypatch, capsys):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("it measured"))
    assert main(["bench", "all", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"{kind} " in listed for kind in ("step", "peers", "fuzz", "scale"))
