"""Devices that fall silent at every stage of a secure sum, and rounds with too few, over a real server.

Every device is an owned home, with its ledger, keys and consent, whose answers go through Flower's fleet calls
(``tests/wire_device.py``): so a device can fall silent exactly where a test wants it to.
"""

import threading
import time

import numpy as np
import pytest

import client.app
from client.home.home import open_home
from client.training.device import OwnedDevice
from server.rounds import read_rounds
from shared.protocol import wire
from shared.secure_sum.messages import Survivors

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DEVICES, TIMEOUT_S = 5, 25.0
USERS = f"""
privacy.unit = "user"
privacy.trust = "distributed"
privacy.survivors = 0.8
privacy.colluders = 0.0
linear.enabled = false
statistics.enabled = false
federation.round_timeout_s = {TIMEOUT_S}
"""
RECORDS = f"""
privacy.trust = "local"
linear.enabled = false
statistics.enabled = false
federation.min_reply_share = 0.75
federation.round_timeout_s = {TIMEOUT_S}
"""
STAGES = (wire.SECURE_KEYS, wire.SECURE_SHARES, "train", wire.SECURE_UNMASK)
_ONE = threading.Lock()  # torch's threads and the resident base are one process's


@pytest.fixture(scope="module")
def served(tiny_world, wire_worlds, wire_devices, tmp_path_factory):
    """(name, body, devices, rounds) -> a context: the server of such a campaign, and its devices by hand."""

    def made(name, body, *, devices, rounds):
        scenario = tiny_world(tmp_path_factory.mktemp(name), body=body)
        settings = {"max_participations": str(rounds), "rounds": str(rounds)}
        fleet, _ = wire_worlds.fleet_for(scenario, homes=devices, settings=settings)
        return wire_worlds.world_of(fleet, homes=devices)

    return made, wire_devices.WireDevice


@pytest.fixture(scope="module")
def sums(served):
    """Five devices and a secure sum; what goes into it is kept, before it is masked."""
    made, device = served
    with made("sums", USERS, devices=DEVICES, rounds=12) as world, pytest.MonkeyPatch.context() as patch:
        mask = client.app.mask

        def kept(whole, request, campaign, device):
            seat = int(device._home.folder.name)
            world.contributed[seat, request.round_number] = whole.copy()
            return mask(whole, request, campaign, device)

        patch.setattr(client.app, "mask", kept)
        start(world, device)
        world.end_of(1)
        yield world


def start(world, device):
    homes = [open_home(world.fleet.home(number)) for number in range(world.homes)]

    def honest(device, message):
        device.reply(message, said(device, message).content)

    def said(device, message):
        home = homes[world.devices.index(device)]
        with _ONE:
            return client.app.answer(message, None, find=lambda _: OwnedDevice(home))

    world.otherwise, world.said_by = honest, said
    world.start_server()
    world.by_hand(device, [home.folder / "device.key" for home in homes])


def silent_from(world, stage):
    """A device that answers until this stage, and nothing from then on."""

    def act(device, message):
        if STAGES.index(message.metadata.message_type) < STAGES.index(stage):
            world.otherwise(device, message)

    return act


def asked(world, number):
    """Which devices were sent which stage of a round."""
    return {
        stage: [
            seat
            for seat, device in enumerate(world.devices)
            for message in device.heard
            if (message.metadata.message_type, message.content["config"]["round"]) == (stage, number)
        ]
        for stage in STAGES
    }


@pytest.mark.fault("R21")
@pytest.mark.parametrize("stage", STAGES)
def test_one_device_falls_silent_at_a_stage_and_the_sum_is_of_those_who_masked(sums, stage):
    number = sums.play(d1=silent_from(sums, stage))
    line = sums.end_of(number)
    counted = sums.check(number)
    assert counted == ([0, 1, 2, 3, 4] if stage == wire.SECURE_UNMASK else [0, 2, 3, 4])
    assert line.accepted == len(counted)
    assert line.rejected["NO_REPLY"] == 1
    assert not any(device.said for device in sums.devices)


@pytest.mark.fault("R7", "R21")
def test_below_the_fewest_survivors_a_round_is_void_and_nobody_is_asked_to_unmask(sums):
    number = sums.play(d1=silent_from(sums, "train"), d3=silent_from(sums, "train"))
    line = sums.end_of(number)
    assert line.rejected["NO_REPLY"] >= 2
    assert line.rejected["VOID"] == 1
    assert line.accepted == 0
    assert asked(sums, number)[wire.SECURE_UNMASK] == []
    sums.unchanged(number)
    after = sums.end_of(number + 1)  # the round is not asked for again, the next one is whole
    assert after.accepted == len(sums.check(number + 1)) >= DEVICES - 1


@pytest.mark.fault("R21")
def test_with_too_few_shares_the_sum_stays_closed(sums):
    silent = silent_from(sums, wire.SECURE_UNMASK)
    number = sums.play(d0=silent, d1=silent, d2=silent)
    line = sums.end_of(number)
    assert line.rejected["NO_REPLY"] >= 3
    assert line.rejected["VOID"] == 1
    sums.unchanged(number)
    assert sums.end_of(number + 1).accepted == len(sums.check(number + 1)) >= DEVICES - 1


@pytest.mark.fault("R21")
def test_a_device_opens_nothing_for_a_server_whose_lists_overlap_and_the_sum_goes_on_without_it(sums):
    """What a lying server would send it, put in the place of the honest list on its way."""
    told = []

    def lied_to(device, message):
        if message.metadata.message_type == wire.SECURE_UNMASK:
            honest = Survivors.from_bytes(message.content["config"]["body"])
            lie = Survivors(honest.alive, honest.alive[:1])
            message.content["config"]["body"] = lie.to_bytes()
            answer = sums.said_by(device, message)
            told.append(wire.refusal_code(answer))
            device.reply(message, answer.content)
        else:
            sums.otherwise(device, message)

    number = sums.play(d2=lied_to)
    line = sums.end_of(number)
    assert told == ["UNMASK"]
    assert dict(line.rejected) == {"UNMASK": 1}
    assert sums.check(number) == list(range(DEVICES))


@pytest.mark.fault("R7")
def test_below_the_quorum_a_campaign_stops_with_its_arrays_and_goes_on_when_the_devices_are_back(
    served, record_property
):
    """At record level the round is asked for again; who has answered it gives the same bytes, and pays once."""
    made, device = served
    with made("quorum", RECORDS, devices=2, rounds=4) as world:
        start(world, device)
        world.end_of(1)
        number = world.play(d1=lambda *_: None)
        world.end_of(number - 1)
        assert world.processes["server"].wait(300) != 0
        assert max(read_rounds(world.fleet.campaign)) == number - 1
        assert "needs 75% of 2 replies, got 1" in world.said("server")
        first = [m for m in world.devices[0].heard if m.content["config"]["round"] == number]
        assert len(first) == 3
        released = world.released[0, number]

        world._script.clear()
        began = time.monotonic()
        world.start_server()
        line = world.end_of(number)
        record_property("recover_s", time.monotonic() - began)
        assert line.accepted == 2
        assert world.check(number) == [0, 1]
        for name, array in released.items():
            np.testing.assert_array_equal(world.released[0, number][name], array)
        world.processes["server"].wait(120)
        for home in range(2):
            with open_home(world.fleet.home(home)).ledger() as ledger:
                events = [(event.kind, event.round_number) for event in ledger.history()]
            assert [event for event in events if event[1] == number] == [("spend", number), ("release", number)]
