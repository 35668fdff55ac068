"""A whole simulation on a tiny base and an invented data set: what it writes, and what is the same whatever happens."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message

from client.app import app as client_app
from client.training.optimizer import PolicyOptimizer
from client.training.site import accepted_campaign, open_site, resident_base, resident_dataset
from server.app import run_rounds
from server.checkpoint import checkpoint_path, load_checkpoint
from shared.config import load_scenario
from shared.errors import CampaignError, PrivacyError, ScenarioError
from shared.flower.grid import InlineGrid, run_inline, seats
from shared.privacy.policy import hash_settings
from shared.protocol import wire
from shared.protocol.campaign import Resumed, read_campaign, write_campaign, write_resumed
from simulations.campaigns import FATAL, plan_campaigns
from simulations.dry_run import describe, lines
from simulations.run import simulate

README = Path(__file__).parent.parent / "README.md"


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory):
    """One finished run: folder and summary."""
    folder = tmp_path_factory.mktemp("run")
    scenario = load_scenario(tiny_world(folder))
    out = folder / "out"
    summary = simulate(scenario, out=out, quiet=True)
    return scenario, out, summary


def plan(scenario):
    dataset = resident_dataset(scenario.data)
    return plan_campaigns(scenario, resident_base(scenario.model.base), dataset, quiet=True)


@pytest.fixture
def campaign(tiny_world, tmp_path):
    """A published campaign nobody has run."""

    def publish(*, body="", seed=3, name="campaign"):
        planned = plan(load_scenario(tiny_world(tmp_path, body=body), (f"seed={seed}",)))[0]
        return write_campaign(tmp_path / name / "lora", planned.scenario, planned.policy, planned.start)

    return publish


def run_campaign(campaign, *, client=client_app, devices=12, fatal=()):
    grids = []

    def main(grid):
        grids.append(grid)
        run_rounds(grid, campaign, roster=seats(grid, devices=devices), fatal=fatal)

    run_inline(main, client, devices=devices, run_config=config_of(campaign))
    return grids[0], load_checkpoint(checkpoint_path(campaign.folder / "checkpoints", campaign.policy.rounds))


def config_of(campaign):
    return {"campaigns": str(campaign.folder.parent)}


def test_the_run_folder_holds_what_the_documentation_says(run):
    scenario, out, summary = run
    names = {
        "scenario.json",
        "run.json",
        "metrics.jsonl",
        "summary.json",
        "user_scores.json",
        "report.html",
        "heads",
        "events",
    }
    assert names | {"campaigns"} == {path.name for path in out.iterdir()}
    assert load_scenario(out / "scenario.json") == scenario
    assert read_json(out / "summary.json") == json.loads(json.dumps(summary))
    assert set(summary["rows"]) == {
        "constant", "user-mean", "pooled", "local", "federated", "personal", "federated-linear", "personal-linear",
        "dp-statistics", "dp-statistics-shared",
    }  # fmt: skip
    for row in summary["rows"].values():
        assert {"rmse", "mae", "accuracy", "user_rmse", "worst_decile", "share_gaining"} == set(row)
        assert row["rmse"]["low"] <= row["rmse"]["value"] <= row["rmse"]["high"]
    wanted = {"trust", "unit", "relation", "epsilon", "delta", "sampling", "accountant", "max_participations", "noise"}
    assert wanted <= set(summary["privacy"])
    costs = {"wall_s", "client_rounds", "engine_ms_per_client_round", "bytes_up_per_client_round"}
    assert costs | {"bytes_down_per_client_round", "peak_rss_mib"} <= set(summary["cost"])
    assert summary["cost"]["client_rounds"] == 3 * 4
    assert summary["privacy"]["epsilon"] <= 8.0
    assert summary["privacy"]["noise"] == "seeded"
    assert "noise: seeded" in summary["stamps"]
    assert "personal - dp-statistics" in summary["differences"]
    assert 7.9 < summary["privacy_statistics"]["epsilon"] <= 8.0
    together = next(stamp for stamp in summary["stamps"] if stamp.startswith("each is priced alone; "))
    assert "lora and linear and dp-statistics on the same records would together spend ε = " in together
    assert float(together.split()[-1]) > 1.5 * summary["privacy"]["epsilon"]
    assert "it protects nobody" in (out / "report.html").read_text(encoding="utf-8")
    lines_ = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines_ if line["campaign"] == "lora"] == [0, 1, 2, 3]
    epsilons = [line["epsilon"] for line in lines_ if line["campaign"] == "lora"]
    assert epsilons[0] == 0
    assert epsilons == sorted(epsilons)
    assert [path.name for path in sorted((out / "heads").iterdir())] == ["base", "user-1", "user-2"]


def test_a_run_under_a_relative_name_opens_its_devices_once(tiny_world, tmp_path, monkeypatch):
    """Two names of one folder once meant two resident sites, and a cost table that took all for the engine's."""
    monkeypatch.chdir(tmp_path)
    open_site.cache_clear()
    scenario = load_scenario(tiny_world(tmp_path), ("export.users=0", "linear.enabled=false"))
    summary = simulate(scenario, out=Path("out"), quiet=True)
    assert open_site.cache_info().misses == 1
    assert summary["cost"]["device_ms_per_client_round"] > 0


def test_two_runs_of_one_seed_agree_and_another_seed_does_not(campaign):
    _, first = run_campaign(campaign(name="first"))
    _, again = run_campaign(campaign(name="again"))
    _, other = run_campaign(campaign(seed=4, name="other"))
    for name in first.arrays:
        np.testing.assert_array_equal(first.arrays[name], again.arrays[name])
        assert not np.array_equal(first.arrays[name], other.arrays[name])


def test_everybody_takes_part_equally_often(campaign):
    published = campaign(body="linear.enabled = false")
    _, last = run_campaign(published)
    assert sorted(last.participations.values()) == [1] * 12


class Faulty:
    """The real app, except for what some devices answer."""

    def __init__(self, faults):
        self.faults = faults

    def __call__(self, message, context):
        reply = client_app(message, context)
        fault = self.faults.get(context.node_config["partition-id"])
        if fault:
            reply.content = fault(reply.content)
        return reply


def poison(content):
    arrays = {name: np.full_like(array.numpy(), np.nan) for name, array in content["arrays"].items()}
    config = content["config"]
    return wire.pack_reply(arrays, round_number=config["round"], policy_sha256=config["policy"])


@pytest.mark.fault("R8", "R9")
def test_a_bad_reply_loses_that_device_and_not_the_round(campaign):
    published = campaign()
    grid, last = run_campaign(published, client=Faulty({0: poison, 5: lambda _: wire.pack_refusal("BUDGET")}))
    assert all(np.isfinite(array).all() for array in last.arrays.values())
    assert grid.messages == 12


@pytest.mark.fault("R7")
def test_too_few_good_replies_stop_the_campaign_and_keep_what_was_done(campaign):
    published = campaign()
    faults = dict.fromkeys(range(12), poison)
    with pytest.raises(CampaignError, match=r"round 1 needs 50% of 4 replies, got 0 .*NOT_FINITE"):
        run_campaign(published, client=Faulty(faults))


@pytest.mark.fault("R3", "R7")
def test_a_round_that_its_devices_refuse_for_ever_is_void_and_the_next_one_comes(campaign):
    """As after a power cut: whoever was at work has burnt the round, and asking again would never end."""
    published = campaign()

    def refuse(code):
        def first_round(content):
            return wire.pack_refusal(code) if content["config"]["round"] == 1 else content

        return Faulty(dict.fromkeys(range(12), first_round))

    _, last = run_campaign(published, client=refuse("BURNT"))
    assert last.round_number == 3
    assert (last.total.replies, dict(last.total.rejected)) == (8, {"BURNT": 4, "VOID": 1})
    with pytest.raises(CampaignError, match=r"round 1 needs 50% of 4 replies, got 0 .*PAUSED"):
        run_campaign(campaign(name="again"), client=refuse("PAUSED"))


@pytest.mark.fault("R6")
def test_who_is_silent_is_counted_once_though_flower_answers_in_its_own_name(campaign):
    def gone(message, context):
        reply = client_app(message, context)
        if context.node_config["partition-id"] == 0:
            reply = Message(Error(code=3, reason="Message Unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's
        return reply

    with pytest.raises(CampaignError, match=r"must answer in a simulation; in round \d 1 did not \(NO_REPLY"):
        run_campaign(campaign(), client=gone, fatal=FATAL)


def test_in_a_simulation_one_broken_device_stops_the_run(campaign):
    published = campaign()
    broken = Faulty({0: lambda _: wire.pack_refusal("INTERNAL")})
    with pytest.raises(CampaignError, match=r"must answer in a simulation; in round \d 1 did not \(INTERNAL"):
        run_campaign(published, client=broken, fatal=FATAL)


def test_a_device_that_never_answers_is_counted_and_stops_a_simulation(campaign):
    published = campaign()

    class Deaf(InlineGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages, timeout=timeout))
            return replies[1:] if len(replies) > 1 else replies

    def run(fatal):
        grid = Deaf(client_app, devices=12, run_config=config_of(published))
        return run_rounds(grid, published, roster=seats(grid, devices=12), fatal=fatal)

    with pytest.raises(CampaignError, match=r"in round 1 1 did not \(NO_REPLY"):
        run(FATAL)
    assert run(()).total.rejected == {"NO_REPLY": 3}


def answer(campaign, *, device=0, node_config=None, context=None, **changes):
    """What one device answers to a request that may be changed."""
    request = {"round_number": 1, "policy_sha256": campaign.policy.sha256}
    arrays = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    arrays = changes.pop("arrays", arrays)
    grid = context or InlineGrid(client_app, devices=12, run_config=config_of(campaign))
    if node_config is not None:
        grid._contexts[1000 + device].node_config.clear()
        grid._contexts[1000 + device].node_config.update(node_config)
    message = Message(
        wire.pack_request(wire.pack_arrays(arrays), **(request | changes)),
        dst_node_id=1000 + device,
        message_type="train",
    )
    [reply] = grid.send_and_receive([message])
    return wire.refusal_code(reply), grid


def update_of(campaign, *, device):
    """Code and arrays of one device's answer to the first round."""
    grid = InlineGrid(client_app, devices=12, run_config=config_of(campaign))
    arrays = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    request = wire.pack_request(wire.pack_arrays(arrays), round_number=1, policy_sha256=campaign.policy.sha256)
    [reply] = grid.send_and_receive([Message(request, dst_node_id=1000 + device, message_type="train")])
    code = wire.refusal_code(reply)
    return code, None if code else wire.unpack_reply(reply.content, campaign.policy.array_slots())[0]


def test_a_device_refuses_what_the_policy_does_not_say(campaign):
    published = campaign()
    good = {slot.name: published.start[slot.name] for slot in published.policy.array_slots()}
    nan = {name: np.full_like(array, np.nan) for name, array in good.items()}
    assert answer(published)[0] is None
    assert answer(published, policy_sha256="0" * 64)[0] == "POLICY"
    assert answer(published, round_number=0)[0] == "ROUND"
    assert answer(published, round_number=published.policy.rounds + 1)[0] == "ROUND"
    assert answer(published, arrays=nan)[0] == "ARRAYS"
    assert answer(published, arrays=dict(list(good.items())[1:]))[0] == "ARRAYS"
    huge = {name: np.full_like(array, 1e6) for name, array in good.items()}
    assert answer(published, arrays=huge)[0] == "ARRAYS"  # predictions would be rounding error, see within_bound


def test_a_device_takes_part_no_more_often_than_it_paid_for(campaign):
    published = campaign()  # max_participations = 1
    code, grid = answer(published)
    assert code is None
    assert answer(published, context=grid)[0] == "ROUND"  # the same round again
    assert answer(published, context=grid, round_number=2)[0] == "BUDGET"


def test_a_device_of_a_resumed_simulation_remembers_what_it_spent(campaign):
    published = campaign()  # max_participations = 1
    write_resumed(published.folder, Resumed(1, {0: 1}))
    assert answer(published, round_number=1)[0] == "ROUND"
    assert answer(published, round_number=2)[0] == "BUDGET"
    assert answer(published, device=1, round_number=2)[0] is None
    write_resumed(published.folder, None)
    assert answer(published, round_number=1)[0] is None


def test_outside_a_simulation_no_device_trains(campaign):
    published = campaign()
    real = {"partition-id": 0, "num-partitions": 12}
    assert answer(published, node_config=real)[0] == "NO_HOME"
    assert answer(published, node_config=real | {"simulation": "true"})[0] == "NO_HOME"


def test_what_goes_wrong_on_a_device_leaves_it_as_a_code_without_its_text(campaign, monkeypatch, caplog):
    published = campaign()
    secret = "xyzzy-my-diary"

    def fail(*_, **__):
        raise RuntimeError(secret)

    monkeypatch.setattr("client.app.train_shared", fail)
    assert answer(published)[0] == "INTERNAL"
    assert secret not in caplog.text
    assert "RuntimeError" in caplog.text


def test_an_exception_on_one_device_leaves_nothing_for_the_next(campaign, monkeypatch):
    """Half a batch's gradients in the resident head would be another device's records in the next release."""
    published = campaign()
    _, clean = update_of(published, device=1)
    real, calls = PolicyOptimizer.accumulate, []

    def fail_once(optimizer):
        calls.append(optimizer)
        if len(calls) == 1:
            raise MemoryError
        real(optimizer)

    monkeypatch.setattr(PolicyOptimizer, "accumulate", fail_once)
    assert update_of(published, device=0)[0] == "INTERNAL"
    code, after = update_of(published, device=1)
    assert code is None
    for name, array in after.items():
        np.testing.assert_array_equal(array, clean[name])


@pytest.mark.parametrize(
    "change", [{"noise_multiplier": 0.1}, {"steps": 3}, {"max_participations": 9}, {"epsilon": 1.0}, {"steps": 0}]
)
def test_a_device_certifies_the_price_itself(campaign, change):
    """Whoever publishes a policy may state any epsilon; the constants decide."""
    published = campaign(name="cheap" + str(change).translate({ord(c): None for c in "{}':. "}))
    policy = published.policy.model_copy(update=change)
    (published.folder / "policy.json").write_text(policy.model_dump_json(), encoding="utf-8")
    assert answer(published, policy_sha256=policy.sha256)[0] == "POLICY"
    with pytest.raises(PrivacyError, match=r"must give the epsilon|must be"):
        accepted_campaign(str(published.folder.parent), policy.sha256)


def test_nothing_is_read_before_the_round_is_spent(campaign, monkeypatch):
    published = campaign()
    order = []
    monkeypatch.setattr("client.training.device.SimulatedDevice.spend", lambda *_: order.append("spend"))
    monkeypatch.setattr("client.training.device.open_site", lambda *where: order.append("read") or open_site(*where))
    answer(published)
    assert order == ["spend", "read"]


def test_the_update_does_not_depend_on_anything_but_start_records_and_policy(campaign):
    """The private part is fitted after the fact; fitting it differently cannot move a byte of what was sent."""
    plain = campaign(name="plain")
    other = campaign(body='personal.method = "none"\npersonal.ridge = 99.0', name="other")
    updates = []
    for published in (plain, other):
        open_site.cache_clear()
        _, last = run_campaign(published)
        updates.append(last.arrays)
    for name in updates[0]:
        np.testing.assert_array_equal(updates[0][name], updates[1][name])


def test_an_altered_start_is_noticed(campaign):
    published = campaign()
    path = published.folder / "start.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CampaignError, match="must be the start the policy names"):
        read_campaign(published.folder)


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [("privacy", "trust", "none"), ("personal", "method", "none"), ("federation", "method", "fedavg")],
)
def test_a_scenario_that_says_otherwise_than_its_policy_is_refused(campaign, table, key, value):
    """Also by whoever publishes it, hash and all: what runs are the scenario's methods, what is priced the policy's."""
    published = campaign(name=f"altered-{key}-{value}")
    path = published.folder / "scenario.json"
    settings = read_json(path)
    settings[table][key] = value
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(CampaignError, match="must hold the settings the policy names"):
        read_campaign(published.folder)
    assert answer(published)[0] == "POLICY"
    policy = published.policy.model_copy(update={"settings_sha256": hash_settings(load_scenario(path))})
    (published.folder / "policy.json").write_text(policy.model_dump_json(), encoding="utf-8")
    with pytest.raises(CampaignError, match="must name methods, trust and unit of the policy"):
        read_campaign(published.folder)
    assert answer(published, policy_sha256=policy.sha256)[0] == "POLICY"


@pytest.mark.parametrize(
    ("body", "error", "says"),
    [
        ("privacy.max_participations = 1\nfederation.rounds = 4", PrivacyError, "must be at least 2"),
        ("federation.cohort_size = 13", PrivacyError, "at most the 12 clients, got 13"),
        ("privacy.delta = 0.01", PrivacyError, "privacy.delta must be at most"),
        ("model.head_blocks = 3", ScenarioError, "between 0 and 2 for this base, got 3"),
        ('adapter.targets = ["wq"]', ScenarioError, "adapter.targets must name linear layers"),
        ("adapter.rank = 33", ScenarioError, "adapter.rank must be at most the base's width 32, got 33"),
        ("linear.cohort_size = 13", PrivacyError, "campaign linear: federation.cohort_size"),
        ('export.users = ["99"]', ScenarioError, "export.users must name users"),
    ],
)
def test_a_scenario_that_cannot_hold_is_refused_before_anything_is_written(tiny_world, tmp_path, body, error, says):
    path = tiny_world(tmp_path)
    overrides = tuple(line.replace(" = ", "=") for line in body.split("\n"))
    with pytest.raises(error, match=says):
        simulate(load_scenario(path, overrides), out=tmp_path / "out", quiet=True)
    assert not (tmp_path / "out").exists()


def test_an_existing_run_folder_is_not_touched(tiny_world, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ScenarioError, match="must be a new folder"):
        simulate(load_scenario(tiny_world(tmp_path)), out=tmp_path / "out", quiet=True)
    assert list((tmp_path / "out").iterdir()) == []


def test_without_privacy_the_run_says_so(tiny_world, tmp_path):
    scenario = load_scenario(tiny_world(tmp_path), ('privacy.trust="none"', "export.users=0", "linear.enabled=false"))
    summary = simulate(scenario, out=tmp_path / "out", quiet=True)
    assert summary["claim"].startswith("NOT PRIVATE")
    assert summary["privacy"]["epsilon"] is None
    assert "NOT PRIVATE" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_the_dry_run_names_cost_and_bytes_and_writes_nothing(tiny_world, tmp_path):
    scenario = load_scenario(tiny_world(tmp_path))
    described = describe(scenario, quiet=True)
    lora = described["campaigns"]["lora"]
    assert lora["epsilon"] <= 8.0
    assert lora["bytes_per_round"]["up"] == 4 * lora["bytes_per_client_round"]["up"]
    assert lora["bytes_per_client_round"]["up"] > 4 * lora["parameters"]
    text = "\n".join(lines(described))
    assert "privacy.epsilon = 8.0" in text
    assert "bytes per round" in text
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.toml"]


def test_the_dry_run_names_the_release_beside_the_campaigns(tiny_world, tmp_path):
    scenario = load_scenario(tiny_world(tmp_path))
    [(row, claim)] = describe(scenario, quiet=True)["releases"].items()
    assert row == "dp-statistics"
    assert claim.startswith("Record-level (epsilon")
    without = scenario.model_copy(update={"statistics": scenario.statistics.model_copy(update={"enabled": False})})
    assert describe(without, quiet=True)["releases"] == {}


def test_the_dry_run_counts_the_bytes_a_run_really_sends(run):
    scenario, _, summary = run
    promised = describe(scenario, quiet=True)["campaigns"]["lora"]["bytes_per_client_round"]["up"]
    assert summary["cost"]["bytes_up_per_client_round"] == pytest.approx(
        promised, abs=8
    )  # a device's number may be a byte longer


def command(*arguments, cwd=Path(__file__).parent.parent, **environment):
    return subprocess.run(
        [sys.executable, "-m", "sottovoce.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | environment,
        check=False,
    )


def test_the_command_predicts_with_a_head_of_the_run(run):
    _, out, _ = run
    done = command("client", "predict", "--head", out / "heads" / "user-1", "--text", "Film number 3 (1953). War")
    assert done.returncode == 0, done.stderr
    assert 1.0 <= float(done.stdout.split()[0]) <= 5.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "nowhere.toml"], "nowhere.toml must be a readable scenario file"),
        (["simulate", "SCENARIO", "--set", "privacy.delta=1.5"], "privacy.delta must be less than 1, got 1.5"),
        (["report", "nowhere"], "nowhere"),
        (["simulate", "SCENARIO", "--out", "/proc/nowhere/out"], "must be a folder that can be made"),
        (["simulate"], "simulate needs a scenario file, or --resume"),
        (["simulate", "--resume", "nowhere"], "--resume must name the folder of a run that had begun"),
        (["bench", "step", "--rounds", "0"], "must be a whole number of at least 1, got '0'"),
        (["client", "predict", "--head", "nowhere", "--text", "x"], "nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_two(tiny_world, tmp_path, arguments, says):
    scenario = tiny_world(tmp_path)
    done = command(*(str(scenario) if argument == "SCENARIO" else argument for argument in arguments))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
    assert says in done.stderr


def test_an_interrupt_leaves_whole_checkpoints_and_no_summary(tiny_world, tmp_path):
    scenario, out = tiny_world(tmp_path), tmp_path / "out"
    many = ["--set", "federation.rounds=3000", "--set", "privacy.max_participations=1000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sottovoce.cli", "simulate", str(scenario), "--out", str(out), *many],
        cwd=Path(__file__).parent.parent,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    checkpoints = out / "campaigns" / "lora" / "checkpoints"
    deadline = time.monotonic() + 60
    while not (checkpoints / "round-0005").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said.strip().endswith("interrupted; what was finished is kept.")
    assert not (out / "summary.json").exists()
    finished = sorted(checkpoints.glob("round-*"))
    assert load_checkpoint(finished[-1]).round_number == len(finished) >= 5


def test_the_python_of_the_readme_runs(run):
    _, out, _ = run
    [block] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert "runs/first" in block
    done = subprocess.run(
        [sys.executable, "-c", block.replace("runs/first", str(out))],
        cwd=README.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 1.0 <= float(done.stdout.strip("[]\n ")) <= 5.0
