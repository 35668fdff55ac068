"""A run that was cut short, wherever that was, ends as if it had not been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import simulations.campaigns
import simulations.journal
import simulations.run
from shared.config import load_scenario
from shared.errors import CampaignError, ScenarioError
from simulations.run import simulate

CHANGES = ("federation.rounds=4", "privacy.max_participations=2", "export.users=1")


class PowerCut(BaseException):
    """Nothing catches it."""


@pytest.fixture(scope="module")
def whole(tiny_world, tmp_path_factory):
    """Scenario and folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    scenario = load_scenario(tiny_world(folder), CHANGES)
    simulate(scenario, out=folder / "out", quiet=True)
    return scenario, folder / "out"


def result_of(out: Path):
    """Everything of a run folder that is a result and not a time."""
    summary = json.loads((out / "summary.json").read_text())
    for key in summary.keys() & {"cost", "cost_linear"}:
        summary[key] = {name: value for name, value in summary[key].items() if name.startswith("bytes")}
    del summary["resumed"]
    heads = {path.name: path.read_bytes() for path in (out / "heads" / "user-1").glob("*.safetensors")}
    checkpoints = {
        str(path.relative_to(out)): path.read_bytes() for path in out.glob("campaigns/*/checkpoints/round-*/*")
    }
    return summary, (out / "metrics.jsonl").read_text(), (out / "user_scores.json").read_text(), heads, checkpoints


def cut_at(monkeypatch, place, call):
    """Cut the power at the n-th call of a function, before it does anything."""
    module, name = place
    real, calls = getattr(module, name), []

    def cutting(*arguments, **named):
        calls.append(name)
        if len(calls) == call:
            raise PowerCut
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, cutting)


@pytest.mark.fault("R1")
@pytest.mark.parametrize(
    ("place", "call"),
    [
        ((simulations.run, "plan_campaigns"), 1),  # nothing published
        pytest.param(
            (simulations.campaigns, "write_campaign"), 2, marks=pytest.mark.slow
        ),  # one of two campaigns published
        pytest.param((sys.modules["server.app"], "save_checkpoint"), 1, marks=pytest.mark.slow),  # in the first round
        pytest.param((sys.modules["server.app"], "save_checkpoint"), 3, marks=pytest.mark.slow),
        ((sys.modules["server.app"], "save_checkpoint"), 7),  # in the second campaign
        pytest.param((simulations.journal.json, "dumps"), 4, marks=pytest.mark.slow),  # a line of the journal
        pytest.param((simulations.run, "score_run"), 1, marks=pytest.mark.slow),  # all rounds done
        ((simulations.run, "write_json"), 3),  # everything but the summary
    ],
    ids=lambda value: value[1] if isinstance(value, tuple) else str(value),
)
def test_a_run_cut_anywhere_ends_as_the_whole_one(whole, tmp_path, monkeypatch, place, call):
    scenario, reference = whole
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(
            "simulations.folder.shutil", SimpleNamespace(rmtree=lambda *_, **__: None)
        )  # a kill tidies nothing up
        cut_at(patch, place, call)
        with pytest.raises(PowerCut):
            simulate(scenario, out=out, quiet=True)
    assert not (out / "summary.json").exists()
    summary = simulate(scenario, out=out, quiet=True, resume=True)
    assert result_of(out) == result_of(reference)
    assert summary["resumed"]


@pytest.mark.fault("R11")
def test_damage_after_the_cut_costs_the_damaged_rounds_only(whole, tmp_path):
    scenario, reference = whole
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    (out / "summary.json").unlink()
    tensors = out / "campaigns" / "lora" / "checkpoints" / "round-0004" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    half_a_line = (out / "metrics.jsonl").read_text()[:-30]
    (out / "metrics.jsonl").write_text(half_a_line)
    summary = simulate(scenario, out=out, quiet=True, resume=True)
    assert {(note["campaign"], note["round"]) for note in summary["resumed"]} == {("lora", 3), ("linear", 4)}
    shutil.rmtree(out / "campaigns" / "lora" / "checkpoints" / "damaged-round-0004")
    assert result_of(out) == result_of(reference)


def test_a_finished_run_is_scored_again_and_trains_nothing(whole, tmp_path, monkeypatch):
    scenario, reference = whole
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    monkeypatch.setattr("client.app.train_shared", None)
    simulate(scenario, out=out, quiet=True, resume=True)
    assert result_of(out) == result_of(reference)


def test_what_is_no_run_of_this_scenario_is_not_resumed(whole, tiny_world, tmp_path):
    scenario, reference = whole
    before = {path: path.stat().st_mtime_ns for path in reference.rglob("*")}
    with pytest.raises(ScenarioError, match=r"there federation.rounds = 4, here 3"):
        simulate(load_scenario(tiny_world(tmp_path), CHANGES[1:]), out=reference, quiet=True, resume=True)
    smaller = load_scenario(tiny_world(tmp_path), (*CHANGES, "performance.micro_batch=64"))
    with pytest.raises(ScenarioError, match=r"there performance.micro_batch = 512, here 64"):
        simulate(smaller, out=reference, quiet=True, resume=True)
    with pytest.raises(ScenarioError, match=r"holds no scenario\.json"):
        simulate(scenario, out=tmp_path / "nothing", quiet=True, resume=True)
    assert {path: path.stat().st_mtime_ns for path in reference.rglob("*")} == before


def test_a_run_does_not_go_on_from_where_its_devices_have_nothing_left(tiny_world, tmp_path):
    """Devices keep the last two states; damage that goes further back would make them begin anew, unseen."""
    changes = ("personal.method=fedper", "federation.rounds=3", "federation.cohort_size=all",
               "privacy.max_participations=3", "linear.enabled=false", "export.users=0")  # fmt: skip
    scenario, out = load_scenario(tiny_world(tmp_path), changes), tmp_path / "out"
    simulate(scenario, out=out, quiet=True)
    for number in (2, 3):
        (out / "campaigns" / "lora" / "checkpoints" / f"round-{number:04d}" / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(CampaignError, match="must hold what the device kept by round 1"):
        simulate(scenario, out=out, quiet=True, resume=True)


def test_another_base_under_the_same_name_is_noticed(whole, tmp_path):
    scenario, reference = whole
    out = tmp_path / "out"
    shutil.copytree(reference, out)
    policy = out / "campaigns" / "lora" / "policy.json"
    content = json.loads(policy.read_text())
    policy.write_text(json.dumps(content | {"base_sha256": "0" * 64}))
    with pytest.raises(CampaignError, match="it belongs to another scenario, base or data"):
        simulate(scenario, out=out, quiet=True, resume=True)


@pytest.mark.fault("R18")
def test_two_processes_never_share_a_run(whole):
    scenario, out = whole
    holder = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), 2); print(1, flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        process.stdout.readline()
        with pytest.raises(CampaignError, match="must belong to one process"):
            simulate(scenario, out=out, quiet=True, resume=True)
    finally:
        process.communicate("\n", timeout=10)


def killed_and_resumed(scenario, folder, moments):
    """Run folder of a real process that is killed as soon as each of these files is there, and resumed to its end."""
    out = folder / "out"
    (folder / "scenario.json").write_text(scenario.model_dump_json())
    command = [sys.executable, "-m", "sottovoce.cli", "simulate", "--quiet"]
    arguments = [str(folder / "scenario.json"), "--out", str(out)]
    for wanted in moments:
        process = subprocess.Popen([*command, *arguments], cwd=Path(__file__).parent.parent, env=os.environ)
        deadline = time.monotonic() + 180
        while not (out / wanted).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert (out / wanted).exists()
        assert process.wait(timeout=10) == -signal.SIGKILL
        arguments = ["--resume", str(out)]
    done = subprocess.run([*command, *arguments], cwd=Path(__file__).parent.parent, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.fault("R1")
@pytest.mark.slow
def test_kill_9_again_and_again(whole, tmp_path):
    """A real process, killed at whatever moment it is in, resumed until it is through."""
    scenario, reference = whole
    moments = ("campaigns/lora/checkpoints/round-0002", "campaigns/linear/checkpoints/round-0001")
    assert result_of(killed_and_resumed(scenario, tmp_path, moments)) == result_of(reference)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "late"),
    [
        ("fedper", "devices/1/0000003.safetensors"),  # within a round: some devices have kept its tensors, others not
        ("user-embedding", "checkpoints/round-0003"),
    ],
)
def test_devices_that_keep_tensors_go_on_with_them(tiny_world, tmp_path, method, late):
    """Killed and resumed; the tensors a device keeps are results too, for a next round would begin with them."""
    changes = (
        f"personal.method={method}",
        "federation.rounds=4",
        "federation.cohort_size=all",
        "privacy.max_participations=4",
        "linear.enabled=false",
        "export.users=0",
    )
    scenario = load_scenario(tiny_world(tmp_path), changes)
    simulate(scenario, out=tmp_path / "whole", quiet=True)
    campaign = f"campaigns/{scenario.adapter.technique}"
    moments = [f"{campaign}/{place}" for place in ("devices/1/0000002.safetensors", late)]
    (tmp_path / "killed").mkdir()
    out = killed_and_resumed(scenario, tmp_path / "killed", moments)
    assert result_of(out) == result_of(tmp_path / "whole")
    assert kept_of(out) == kept_of(tmp_path / "whole") != {}


def kept_of(out):
    """What every device has kept for itself at the end."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.glob("campaigns/*/devices/*/0000004.*")}
