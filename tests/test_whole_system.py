"""One server and three devices over TLS on loopback, real model and data; the same campaign as a simulation."""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

import client.training.site
import shared.models.features
from client.home.home import open_home
from client.training.site import TextFeatures
from server.checkpoint import last_checkpoint
from server.rounds import read_rounds
from shared.assets import resolve
from shared.config import load_scenario
from shared.datasets import read
from shared.errors import CampaignError
from shared.flower.control import Control
from shared.flower.tasks import TaskError, Tasks
from shared.protocol.campaign import find_campaign, read_campaign
from simulations.bench.loopback import (
    ADDRESS,
    device_command,
    federation,
    live,
    make_fleet,
    server_command,
    sottovoce,
    wait_for_end,
)
from simulations.run import simulate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern"),  # of Flower's own way to build a bundle
]

TESTS = Path(__file__).parent
DEVICES, SEED = 3, 5
SCENARIO = """\
name = "{name}"
seed = {seed}

[data]
source = "{data}"

[federation]
method = "ffa-lora"
rounds = {rounds}
cohort_size = {devices}

[privacy]
max_participations = {rounds}

[performance]
micro_batch = 1

[linear]
enabled = false

[export]
users = 0
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return few_users(tmp_path_factory.mktemp("ml-three"), DEVICES)


def few_users(folder, count):
    """MovieLens with the users who rated least but twenty films; the whole public catalogue."""
    folder.mkdir(exist_ok=True)
    published = Path(resolve("asset:ml-100k", quiet=True))
    header, *rows = (published / "ml-100k.inter").read_text(encoding="utf-8").splitlines()
    counts = Counter(row.split("\t")[0] for row in rows)
    users = sorted(counts, key=lambda user: (counts[user], user))[:count]
    kept = [row for row in rows if row.split("\t")[0] in users]
    (folder / "ml-100k.inter").write_text("\n".join([header, *kept]) + "\n", encoding="utf-8")
    (folder / "ml-100k.item").write_bytes((published / "ml-100k.item").read_bytes())
    return folder


def make(folder, data, *, name, rounds):
    """A server and homes whose owners agreed, with the records the simulation trains on."""
    scenario = folder / f"{name}.toml"
    scenario.write_text(
        SCENARIO.format(name=name, seed=SEED, data=data, devices=DEVICES, rounds=rounds), encoding="utf-8"
    )
    users = read("movielens-100k", data).users
    return make_fleet(folder / "fleet", scenario, name=name, records=[user.fit for user in users])


def seeded_server(fleet):
    return [sys.executable, str(TESTS / "seeded_server.py"), str(fleet.server), fleet.name]


def seeded_device(fleet, number):
    arguments = [fleet.home(number), fleet.server / "invitation", SEED, fleet.name, number]
    return [sys.executable, str(TESTS / "seeded_device.py"), *map(str, arguments)]


def alone(cache):
    """The records' features as a device computes them, each text alone, which moves their last bits."""

    def features(*args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shared.models.features, "_BATCH_TOKENS", 1)
            patch.setattr(client.training.site, "feature_cache", lambda: cache)
            return TextFeatures(*args, **kwargs)

    return features


def test_a_federation_of_devices_gives_what_its_simulation_gives(data, tmp_path, monkeypatch):
    """The same seeds, the same records: the same arrays, through TLS, Flower's processes, ledgers and a gate."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    fleet = make(tmp_path, data, name="three", rounds=3)
    with federation(fleet, server=seeded_server, device=seeded_device) as processes:
        wait_for_end(fleet, processes, timeout_s=600)
    policy = read_campaign(fleet.campaign).policy
    real = last_checkpoint(fleet.campaign / "checkpoints", policy_sha256=policy.sha256)
    assert real.total.replies == 3 * DEVICES, real.total

    monkeypatch.setattr(client.training.site, "TextFeatures", alone(tmp_path / "features"))
    simulate(load_scenario(fleet.scenario), out=tmp_path / "run", command="", quiet=True)
    campaign = find_campaign(tmp_path / "run" / "campaigns", policy.sha256)
    assert campaign is not None  # one policy for both
    simulated = last_checkpoint(campaign.folder / "checkpoints", policy_sha256=policy.sha256)
    assert real.round_number == simulated.round_number == 3
    assert real.answered == simulated.answered == dict.fromkeys(range(DEVICES), 3)
    for name, array in simulated.arrays.items():
        # a simulation runs what is frozen once, a device takes every record alone: last bits of sums, far below noise
        np.testing.assert_allclose(real.arrays[name], array, rtol=0, atol=1e-6)
    assert any(np.abs(array).max() > 0 for array in real.arrays.values())


def outside(fleet):
    """Flower's own clients at the server's public address, with the right authority's certificate."""
    settings = json.loads((fleet.server / "server.json").read_text(encoding="utf-8"))
    certificate = (fleet.server / "invitation" / "ca.crt").read_bytes()
    return f"{ADDRESS}:{settings['port']}", certificate


def attack_from_outside(fleet):
    """Start a run, register a device, take a task with the very secret: refused at the door."""
    address, certificate = outside(fleet)
    control = Control(address, root_certificates=certificate)
    for attempt in (control.start_run, control.nodes, lambda: control.register(b"key", name="mine")):
        with pytest.raises(CampaignError, match="HTTPStatusError"):
            attempt()
    secret = (fleet.server / "keys" / "executor.secret").read_bytes()
    with pytest.raises(TaskError, match="404"):
        Tasks(address, secret=secret, kind="server", root_certificates=certificate).take()


def test_a_campaign_from_the_first_key_to_an_answer(data, tmp_path, monkeypatch):
    """As an engineer would type it; one device's noise can be foreseen, and the server takes none of its replies."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    fleet = make(tmp_path, data, name="live", rounds=3)

    def server(fleet):
        scored = ["--holdout", str(data), "--holdout-format", "movielens-100k"]
        return [*(word for word in server_command(fleet) if word != "--no-holdout"), *scored]

    def device(fleet, number):
        return seeded_device(fleet, number) if number == 2 else device_command(fleet, number)

    with federation(fleet, server=server, device=device) as processes:
        while processes["server"].poll() is None and not any(d["online"] for d in live(fleet).get("devices", [])):
            time.sleep(0.2)
        attack_from_outside(fleet)
        wait_for_end(fleet, processes, timeout_s=600)

    found = json.loads(sottovoce("server", "status", "--server", str(fleet.server), "--json"))
    [campaign] = found["campaigns"]
    assert campaign["round"] == 3
    rounds = read_rounds(fleet.campaign)
    assert [rounds[n].accepted for n in (1, 2, 3)] == [2, 2, 2]
    assert [dict(rounds[n].rejected) for n in (1, 2, 3)] == [{"SEEDED": 1}] * 3
    assert all(line.score is not None and line.score.value is not None for line in rounds.values())

    home, base = ["--home", str(fleet.home(0))], tmp_path / "base"
    events = json.loads(sottovoce("client", "history", "--json", *home))
    assert len([event for event in events if event["event"] == "release"]) == 3
    sottovoce("server", "base", "live", "--out", str(base), "--precision", "int8", "--server", str(fleet.server))
    for number in range(DEVICES):
        place = ["--home", str(fleet.home(number)), "--base", str(base)]
        sottovoce("client", "personalize", *place)
        text = "Fargo (1996). Crime, Drama, Thriller"
        answer = json.loads(sottovoce("client", "predict", "--text", text, "--json", *place))
        assert answer["personal"] is True
        assert 1 <= answer["predictions"][0]["prediction"] <= 5


USERS = """\
name = "users"

[data]
source = "{data}"

[model]
head_blocks = 0

[adapter]
kernel_features = 64
whitened_features = 0
constant_feature = 0.015

[federation]
rounds = 3
cohort_size = 5
server_optimizer = "momentum"
round_timeout_s = 90.0

[privacy]
unit = "user"
trust = "distributed"
max_participations = 3
survivors = 0.8
colluders = 0.0

[linear]
enabled = false

[export]
users = 0
"""


def test_five_devices_sum_in_secret_and_go_on_without_the_one_whose_owner_pauses(tmp_path):
    data = few_users(tmp_path / "data", 5)
    scenario = tmp_path / "users.toml"
    scenario.write_text(USERS.format(data=data), encoding="utf-8")
    records = [user.fit for user in read("movielens-100k", data).users]
    fleet = make_fleet(tmp_path / "fleet", scenario, name="users", records=records)
    with federation(fleet) as processes:
        paused = False
        while processes["server"].poll() is None:
            if not paused and read_rounds(fleet.campaign):
                sottovoce("client", "pause", "--home", str(fleet.home(2)))
                paused = True
            time.sleep(0.2)
        wait_for_end(fleet, processes, timeout_s=1)
    campaign = read_campaign(fleet.campaign)
    last = last_checkpoint(fleet.campaign / "checkpoints", policy_sha256=campaign.policy.sha256)
    assert last.round_number == 3
    assert last.total.replies in (12, 13)  # the pause may come before or after the second round has begun
    assert last.total.rejected == {"PAUSED": 15 - last.total.replies - 0}
    assert any(not np.array_equal(array, campaign.start[name]) for name, array in last.arrays.items())
    for device in range(5):
        told = json.loads(sottovoce("client", "status", "--json", "--home", str(fleet.home(device))))
        [standing] = told["campaigns"]
        assert standing["rounds_sent"] == (3 if device != 2 else last.total.replies - 12)


@pytest.mark.parametrize("setting", ["federation.method=rolora", "personal.method=fedper"])
def test_methods_that_take_turns_or_keep_a_part_live(tiny_world, tmp_path, setting):
    """A part in turns goes round by round; a part that is kept never leaves the vaults, where it lies sealed."""
    table, _, method = setting.replace("=", ".").split(".")
    body = f'''
{table}.method = "{method}"
privacy.trust = "local"
linear.enabled = false
statistics.enabled = false
'''
    scenario = tiny_world(tmp_path, body=body)
    text = scenario.read_text(encoding="utf-8").replace("max_participations = 1", "max_participations = 2")
    text = text.replace("rounds = 3", "rounds = 2").replace("cohort_size = 4", "cohort_size = 2")
    scenario.write_text(text.replace("export.users = 2", "export.users = 0"), encoding="utf-8")
    loaded = load_scenario(scenario)
    records = [user.fit for user in read(loaded.data.format, Path(loaded.data.source)).users[:2]]
    fleet = make_fleet(tmp_path / "fleet", scenario, name="tiny", records=records)
    with federation(fleet) as processes:
        wait_for_end(fleet, processes, timeout_s=200)

    campaign, rounds = read_campaign(fleet.campaign), read_rounds(fleet.campaign)
    assert [(rounds[n].accepted, dict(rounds[n].rejected)) for n in (1, 2)] == [(2, {}), (2, {})]
    last = last_checkpoint(fleet.campaign / "checkpoints", policy_sha256=campaign.policy.sha256)
    moved = {name for name, array in last.arrays.items() if not np.array_equal(array, campaign.start[name])}
    assert moved == {slot.name for slot in campaign.policy.array_slots()}
    turns = [{slot.name for slot in campaign.policy.turn_slots(n)} for n in (1, 2)]
    assert (turns[0] != turns[1]) is (method == "rolora")
    for device in range(2):
        place = ["--json", "--home", str(fleet.home(device))]
        [standing] = json.loads(sottovoce("client", "status", *place))["campaigns"]
        assert (standing["rounds_sent"], standing["rounds_used"], standing["rounds_allowed"]) == (2, 2, 2)
        events = [event["event"] for event in json.loads(sottovoce("client", "history", *place))]
        assert [event for event in events if event in ("spend", "release", "burn")] == ["spend", "release"] * 2
        check_kept(open_home(fleet.home(device)), {"output.weight"} if method == "fedper" else set(), moved)


def check_kept(home, names, shared):
    """Exactly these tensors lie in a home's vault, not one of them shared, and nowhere in the clear."""
    vault = home.vault()
    kept = {tensor: array for name in vault.names("state/") for tensor, array in load(vault.open(name)).items()}
    assert kept.keys() == names
    assert not names & shared
    for array in kept.values():
        assert np.abs(array).max() > 0
        assert not [p for p in home.folder.rglob("*") if p.is_file() and array.tobytes() in p.read_bytes()]
