"""What leaves a device: bytes that follow from released arrays and noised integers, and the price of all of it."""

import json
import logging
import random
import shutil

import numpy as np
import pytest
import torch
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
from dp_accounting.pld import PLDAccountant
from flwr.app import ConfigRecord, Message, MetricRecord

import client.app
import server.strategy
from client.home.home import open_home
from client.training.train import train_shared
from server.app import run_rounds
from shared.config import load_scenario
from shared.errors import CampaignError, ScenarioError
from shared.privacy.noise import SeededRandomness
from shared.privacy.policy import read_policy
from shared.protocol import wire
from shared.protocol.campaign import read_campaign


@pytest.fixture(scope="module")
def released(homes, tiny_world, tmp_path_factory):
    """A signed campaign with three sampled steps a round and two rounds a device."""
    folder = tmp_path_factory.mktemp("released")
    changes = ("training.steps=3", "privacy.sampling_rate=0.5", "privacy.max_participations=2")
    return homes.publish(tiny_world(folder), folder, overrides=(*changes, "federation.cohort_size=2"))


@pytest.fixture
def home(homes, released, tmp_path):
    return homes.make_home(tmp_path / "home", released)


@pytest.fixture
def replayed(steps, monkeypatch):
    """Devices draw from this instead: (seed=0) -> the randomness of the next round."""

    def use(seed=0):
        draws = steps.Replay(seed)
        monkeypatch.setattr("client.training.device.SecureRandomness", lambda: draws)
        return draws

    return use


def arrays_in(homes, reply, released):
    return {name: array.tobytes() for name, array in homes.update_in(reply, released.campaign).items()}


# D6: record and play, through the app


def trace(homes, home, released, draws, caplog):
    """All that a device's round shows but the values of its arrays: draws, log, ledger, and every byte beside them."""
    caplog.clear()
    grid = homes.grid_of([home.folder])
    campaign = released.campaign
    arrays = wire.pack_arrays({slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()})
    request = wire.pack_request(arrays, round_number=1, policy_sha256=campaign.policy.sha256)
    [reply] = grid.send_and_receive([Message(request, dst_node_id=1000, message_type="train")])
    assert wire.refusal_code(reply) is None
    with home.ledger() as ledger:
        events = [(event.kind, event.round_number, {**event.detail, "sha256": 0}) for event in ledger.history()]
    return {
        "draws": draws.asked,
        "log": [(r.name, r.levelno, r.getMessage().replace(str(home.folder), "HOME")) for r in caplog.records],
        "fields": {name: type(record).__name__ for name, record in reply.content.items()},
        "config": dict(reply.content["config"]),
        "shapes": [(name, array.shape, array.dtype) for name, array in reply.content["arrays"].items()],
        "bytes": grid.bytes_up,
        "ledger": [(kind, number, detail) for kind, number, detail in events if kind in ("spend", "release")],
        "files": sorted(path.name for path in home.folder.rglob("*") if path.parent.name != "features"),
    }


def without_place(found):
    return json.loads(json.dumps(found, default=str))


def test_one_record_more_shows_in_the_values_of_the_arrays_and_nowhere_else(
    homes, released, replayed, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.DEBUG)
    records = released.dataset.users[0].train
    fewer, more = (homes.make_home(tmp_path / name, released, user=None) for name in ("fewer", "more"))
    fewer.records().add(records[:-1])
    more.records().add(records)
    originals = {home.folder: home.folder.with_name(f"{home.folder.name}-before") for home in (fewer, more)}
    for folder, copy in originals.items():
        shutil.copytree(folder, copy)

    def same():
        found = []
        for home in (fewer, more):
            shutil.rmtree(home.folder)
            shutil.copytree(originals[home.folder], home.folder)
            found.append(without_place(trace(homes, home, released, replayed(), caplog)))
        assert len(found[0]["draws"]) >= 6
        return found[0] == found[1]

    assert same()

    def logs(module, start, features, targets, **rest):
        logging.getLogger("sottovoce.client").debug("training on %d records", len(targets))
        return train_shared(module, start, features, targets, **rest)

    def steps_by_data(module, start, features, targets, *, policy, **rest):
        policy = policy.model_copy(update={"steps": len(targets)})
        return train_shared(module, start, features, targets, policy=policy, **rest)

    def rate_by_data(module, start, features, targets, *, policy, **rest):
        policy = policy.model_copy(update={"sampling_rate": 4 / len(targets)})
        return train_shared(module, start, features, targets, policy=policy, **rest)

    for mutant in (logs, steps_by_data, rate_by_data):
        monkeypatch.setattr(client.app, "train_shared", mutant)
        assert not same(), mutant


# D11, D18: nothing else of the device


def test_no_private_head_moves_a_byte_of_what_is_sent(homes, home, released, replayed, tmp_path, monkeypatch):
    shutil.copytree(home.folder, tmp_path / "other")
    shutil.copytree(home.folder, tmp_path / "third")
    other, third = (open_home(tmp_path / name, clock=homes.clock) for name in ("other", "third"))
    for home_with_head in (other, third):
        about = {"created": "2030-05-01", "campaign": released.campaign.policy.sha256, "round": "1"}
        home_with_head.heads().add({"adapter.safetensors": b"private", "manifest.json": b"{}"}, about)

    def sent(place, seed=0):
        replayed(seed)
        code, reply = homes.ask(place, released.campaign)
        assert code is None
        return arrays_in(homes, reply, released)

    plain = sent(home)
    assert sent(other) == plain
    monkeypatch.setattr(
        client.app,
        "train_shared",
        lambda module, start, *rest, **named: train_shared(
            module,
            {name: array + 1e-3 * len(third.heads().versions()) for name, array in start.items()},
            *rest,
            **named,
        ),
    )
    assert sent(third) != plain


# D12: where an owner's noise comes from


def test_no_seed_decides_what_an_owners_device_sends(homes, home, released, tmp_path, monkeypatch):
    copies = [tmp_path / name for name in "abcd"]
    for copy in copies:
        shutil.copytree(home.folder, copy)

    def sent(copy):
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        code, reply = homes.ask(copy, released.campaign)
        assert code is None
        return np.concatenate([array.ravel() for array in homes.update_in(reply, released.campaign).values()])

    def unforeseen(*pair):
        one, other = map(sent, pair)
        return (one == other).mean() < 0.1

    with monkeypatch.context() as patch:
        seeded = "client.training.device.SeededRandomness"
        patch.setattr(seeded, lambda **_: pytest.fail("a seeded generator on a device"))
        assert unforeseen(*copies[:2])
    seed = released.campaign.scenario.seed
    monkeypatch.setattr(
        "client.training.device.SecureRandomness",
        lambda: SeededRandomness(seed=seed, campaign="tiny", device=0, round_number=1),
    )
    assert not unforeseen(*copies[2:])


# D14, D15: nothing beside the arrays


@pytest.mark.parametrize("user", [0, None])
def test_beside_its_arrays_a_reply_only_echoes_the_request(homes, released, tmp_path, user, monkeypatch):
    home = homes.make_home(tmp_path / "home", released, user=user)
    code, reply = homes.ask(home, released.campaign)
    assert code is None
    assert set(reply.content) == {"arrays", "config"}
    assert dict(reply.content["config"]) == {"round": 1, "policy": released.campaign.policy.sha256}
    pack = wire.pack_reply

    def with_loss(*arguments, **named):
        content = pack(*arguments, **named)
        content["metrics"] = MetricRecord({"loss": 0.5})
        return content

    def with_count(*arguments, **named):
        content = pack(*arguments, **named)
        content["config"] = ConfigRecord({**content["config"], "num-examples": 17})
        return content

    for mutant in (with_loss, with_count):
        monkeypatch.setattr(wire, "pack_reply", mutant)
        code, reply = homes.ask(home, released.campaign, round_number=2)
        assert code == "POLICY"
        assert set(reply.content) == {"refusal"}
        assert dict(reply.content["refusal"]) == {"code": "POLICY"}


def test_no_count_in_a_reply_weighs_in_the_aggregate(homes, released, tmp_path, monkeypatch):
    """A device that sends one is left out, whatever it says; with the usual weights its number would count."""
    turn = iter(range(100))

    def aggregate(extra):
        folder = tmp_path / str(next(turn))
        shutil.copytree(released.campaign.folder, folder)
        policy = released.campaign.policy

        def device(message, context):
            value = 0.01 * (context.node_id - 999)
            request = wire.unpack_request(message.content, policy.array_slots())
            update = {name: np.full_like(array, value) for name, array in request.arrays.items()}
            content = wire.pack_reply(update, round_number=request.round_number, policy_sha256=policy.sha256)
            if context.node_id == 1001 and extra is None:
                content = wire.pack_refusal("PAUSED")
            elif context.node_id == 1001:
                content["metrics"] = MetricRecord({"num-examples": extra})
            return Message(content, reply_to=message)

        grid = homes.grid_of([tmp_path] * 3, client=device)
        last = run_rounds(grid, read_campaign(folder), roster={1000 + i: i for i in range(3)})
        return {name: array.tobytes() for name, array in last.arrays.items()}

    def unweighted():
        return aggregate(1) == aggregate(10**9) == aggregate(None)

    assert unweighted()
    check = server.strategy.check_reply

    def weighing(message, **rest):
        weight = message.content.pop("metrics")["num-examples"] if "metrics" in message.content else 1
        return {name: array * min(weight, 50) for name, array in check(message, **rest).items()}

    monkeypatch.setattr(server.strategy, "check_reply", weighing)
    assert not unweighted()


# D16, D19: the price


def independent_price(policy, *, steps, noise_multiplier=None, grid=1e-3):
    """Dp-accounting as its users call it, over noisy steps that have happened."""
    accountant = PLDAccountant(value_discretization_interval=grid)
    event = GaussianDpEvent(noise_multiplier or policy.noise_multiplier)
    accountant.compose(PoissonSampledDpEvent(policy.sampling_rate, event), steps)
    return accountant.get_epsilon(policy.delta)


def test_what_a_device_really_did_costs_no_more_than_its_ledger_says(homes, home, released, replayed):
    """Asked until it refuses, each time as after a restart; then its noise is counted and priced by another."""
    policy, drawn, rounds = released.campaign.policy, 0, 0
    numbers = sum(int(np.prod(shape)) for _, shape in policy.slots)
    for round_number in (1, 1, 2, 3, 3):
        draws = replayed(round_number)
        code, _ = homes.ask(home, released.campaign, round_number=round_number)
        rounds += code is None and bool(draws.asked)
        drawn += sum(count for what, count in draws.asked if what == "noise")
        assert {rate for what, rate in draws.asked if what == "bernoulli"} <= {policy.sampling_rate}
        with home.ledger() as ledger:
            assert ledger.totals().epsilon == policy.epsilon
            assert [standing.spent for standing in ledger.consents()] == [rounds]
    assert code == "BUDGET"
    steps, rest = divmod(drawn, numbers)
    assert (rest, steps, rounds) == (0, policy.steps * policy.max_participations, policy.max_participations)
    price = independent_price(policy, steps=steps, grid=1e-4)
    assert 0.99 * policy.epsilon < price <= policy.epsilon
    assert independent_price(policy, steps=steps + 1) > policy.epsilon
    assert independent_price(policy, steps=steps, noise_multiplier=0.9 * policy.noise_multiplier) > policy.epsilon


def test_no_policy_and_no_scenario_can_name_another_sampler(released, tiny_world, tmp_path, homes):
    """Amplification is priced for one sampler, which is the one there is (``tests/test_privacy_step.py``)."""
    content = json.loads(released.campaign.policy.model_dump_json())
    read_policy(json.dumps(content))
    for field in ("sampler", "shuffle", "batch_size"):
        with pytest.raises(CampaignError, match="the policy must be readable"):
            read_policy(json.dumps(content | {field: "shuffled"}))
    with pytest.raises(ScenarioError, match="sampler"):
        load_scenario(tiny_world(tmp_path), ('privacy.sampler="shuffled"',))
