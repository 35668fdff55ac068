"""A bad line and liars on it, played to a real server.

Two honest devices take part all the time, the first over the proxy of ``tests/tcp_proxy.py``; six enrolled keys belong
to liars, ``tests/wire_device.py``. Whatever is played, the round is worked out once more from what was released, and
must be the server's to the last bit.
"""

import contextlib
import hashlib
import ssl
import threading
import time

import httpx
import numpy as np
import pytest
from flwr.app import Array, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from shared.protocol import wire

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

HONEST, LIARS, ROUNDS, TIMEOUT_S = 2, 6, 80, 60.0
LATE_S = 20.0  # what a round may take beyond its deadline: the server asks every three seconds, on a busy machine
SETTINGS = f"""
adapter.targets = ["intermediate.dense", "output.dense"]
privacy.trust = "local"
linear.enabled = false
statistics.enabled = false
federation.min_reply_share = 0.25
federation.round_timeout_s = {TIMEOUT_S}
"""
MB = 2**20
MEMORY_BYTES = 256 * MB  # that server and SuperLink may take more while somebody sends them gigabytes


@pytest.fixture(scope="module")
def world(tiny_world, wire_worlds, bad_lines, wire_devices, tmp_path_factory):
    scenario = tiny_world(tmp_path_factory.mktemp("wire"), body=SETTINGS)
    settings = {"max_participations": str(ROUNDS), "rounds": str(ROUNDS), "rank": "32"}
    fleet, keys = wire_worlds.fleet_for(scenario, homes=HONEST, liars=LIARS, settings=settings)
    with wire_worlds.world_of(fleet, homes=HONEST) as made, bad_lines.bad_line(made.port) as (through, line):
        made.line = line
        made.start_server()
        made.start_device(0, through=through)
        made.start_device(1)
        made.by_hand(wire_devices.WireDevice, keys)
        made.end_of(1)
        yield made


@pytest.fixture(autouse=True)
def healed(world):
    """Every test begins and ends with a good line and silent liars' mouths shut."""
    yield
    world.line.heal()
    assert [device.said for device in world.devices] == [[]] * LIARS


def reply(make):
    """A behaviour: answer with what ``make`` makes of the message."""
    return lambda device, message: device.reply(message, make(message))


def with_bytes(world, message, content):
    """A reply of which one array's bytes are these."""
    packed = world.packed(message)
    name = next(iter(packed["arrays"]))
    was = packed["arrays"][name]
    packed["arrays"][name] = Array(was.dtype, was.shape, was.stype, content)
    return packed


def one_more(packed):
    packed["metrics"] = MetricRecord({"loss": 1.0})
    return packed


def swapped(arrays, change):
    """Arrays of which the first is another."""
    name = next(iter(arrays))
    return arrays | {name: change(arrays[name])}


@pytest.mark.fault("R9")
def test_a_lie_in_any_form_loses_its_sender_and_nobody_else(world):
    good = world.good()
    first = world.play(
        d0=reply(lambda m: world.packed(m, world.good(np.nan))),
        d1=reply(lambda m: world.packed(m, world.good(np.inf))),
        d2=reply(lambda m: world.packed(m, swapped(good, lambda a: a[:1]))),
        d3=reply(lambda m: world.packed(m, swapped(good, lambda a: a.astype(np.float64)))),
        d4=reply(lambda m: world.packed(m, good | {"another": np.zeros(3, np.float32)})),
        d5=reply(lambda m: world.packed(m, **{"num-examples": -5})),
    )
    line = world.end_of(first)
    assert dict(line.rejected) == {"NOT_FINITE": 2, "ARRAY": 2, "KEYS": 1, "SCHEMA": 1}
    assert world.check(first) == [0, 1]

    second = world.play(
        d0=reply(lambda m: world.packed(m, world.good(1e30))),
        d1=reply(world.packed),  # zero is a change like any other
        d2=reply(lambda m: with_bytes(world, m, b"\x93NUMPY\x01\x00garbage")),
        d3=reply(lambda m: one_more(world.packed(m))),
        d4=reply(lambda m: RecordDict({"refusal": ConfigRecord({"code": "my diary says"})})),
        d5=reply(lambda m: Error(code=0, reason="my diary says")),
    )
    line = world.end_of(second)
    assert dict(line.rejected) == {"NORM": 1, "ARRAY": 1, "SCHEMA": 1, "INTERNAL": 1, "ERROR": 1}
    assert world.check(second, given={HONEST + 1: good}) == [0, 1, HONEST + 1]
    assert "diary" not in world.said("server")


@pytest.mark.fault("R8")
def test_a_reply_counts_once_for_its_round_its_policy_and_its_sender(world):
    """Doubled, old, of the future, of another base's policy, or in another's name."""
    forged = threading.Event()

    def twice(device, message):
        assert device.reply(message, world.packed(message))
        device.reply(message, world.packed(message, world.good(0.01)))

    def same_twice(device, message):
        assert device.reply(message, world.packed(message))
        device.reply(message, world.packed(message))

    def in_anothers_name(device, message):
        while len(other.heard) == heard:
            time.sleep(0.05)
        try:
            device.reply(other.heard[-1], world.packed(message, world.good(0.02)))
        except httpx.HTTPStatusError as error:
            refused.append(error.response.status_code)
        finally:
            forged.set()
        device.reply(message, wire.pack_refusal("PAUSED"))

    def waits(device, message):
        assert forged.wait(TIMEOUT_S)
        device.reply(message, wire.pack_refusal("BUDGET"))

    other, refused = world.devices[5], []
    heard = len(other.heard)
    number = world.play(
        d0=twice,
        d1=same_twice,
        d2=reply(lambda m: world.packed(m, round=number - 1)),
        d3=reply(lambda m: world.packed(m, policy="0" * 64)),
        d4=in_anothers_name,
        d5=waits,
    )
    line = world.end_of(number)
    assert refused == [403]
    assert dict(line.rejected) == {"ROUND": 1, "POLICY": 1, "PAUSED": 1, "BUDGET": 1}
    given = dict.fromkeys((HONEST, HONEST + 1), world.good())
    assert world.check(number, given=given) == [0, 1, *given]
    with pytest.raises(AssertionError, match="Mismatched elements"):  # the check would see the second reply
        world.check(number, given=given | {HONEST: world.good(0.01)})


@pytest.mark.fault("R14")
@pytest.mark.parametrize("fault", ["cut", "silent", "twice", "slow", "delay", "away"])
def test_a_bad_line_costs_time_and_no_round(world, record_property, fault):
    """The same bytes arrive in the end, once, and before the deadline; the line's faults are its device's alone."""
    line = world.line
    line.tripped.clear()
    number = world.play()
    world.end_of(number - 1)
    began = time.monotonic()
    if fault in ("cut", "silent", "twice"):  # each in the middle of the largest part
        line.trip, line.times = fault, 1 if fault == "silent" else 3
    elif fault == "slow":
        line.bytes_per_s = 1000.0
    elif fault == "delay":
        line.delay_s = 0.2
    else:
        line.away = True
        time.sleep(10.0)
        line.away = False
    done = world.end_of(number)
    record_property("recover_s", time.monotonic() - (line.tripped[-1] if line.tripped else began))
    assert not line.times
    assert world.check(number) == [0, 1]
    assert done.seconds < TIMEOUT_S
    sent = [event.round_number for event in world.ledger(0) if event.kind == "release"]
    assert len(sent) == len(set(sent))


@pytest.mark.fault("R6", "R9")
def test_a_round_closes_without_who_is_late_or_promises_what_never_comes(world, record_property):
    """What comes after the deadline is refused by Flower and counts in no round; the late device comes back."""
    over, late = threading.Event(), []

    def answers_late(device, message):
        assert over.wait(2 * TIMEOUT_S)
        try:
            late.append(device.reply(message, world.packed(message)))
        except httpx.HTTPStatusError as error:
            late.append(error.response.status_code)

    def promises(device, message):
        answer, _ = answered(device, message)
        device.push(answer, get_object_tree(answer), {})

    def another_content(device, message):
        answer, parts = answered(device, message)
        device.push(answer, get_object_tree(answer), dict.fromkeys(parts, b"garbage"))

    def answered(device, message):
        answer = Message(world.packed(message), reply_to=message)
        answer.metadata.__dict__["_message_id"] = answer.object_id
        return answer, {name: part.deflate() for name, part in get_all_nested_objects(answer).items()}

    number = world.play(d0=answers_late, d1=promises, d2=another_content, d3=reply(world.packed), d4=lambda *_: None)
    world.end_of(number - 1)
    world.line.trip, world.line.times = "silent", 1000  # it is asked and trains, and no upload arrives
    line = world.end_of(number)
    world.line.heal()
    over.set()
    healed = time.monotonic()
    assert line.seconds < TIMEOUT_S + LATE_S
    assert dict(line.rejected) == {"NO_REPLY": 5, "PAUSED": 1}
    assert world.check(number, given={HONEST + 3: world.good()}) == [1, HONEST + 3]
    assert (0, number) in world.released  # spent and released, for nothing
    after = world.end_of(number + 1)
    record_property("recover_s", time.monotonic() - healed)
    assert late == [False]
    assert dict(after.rejected) == {"PAUSED": LIARS}
    assert world.check(number + 1) == [0, 1]


@pytest.mark.fault("R9")
def test_a_gigabyte_is_not_taken_and_moves_no_memory(world, record_property):
    """As one body, as a body without a length, and as the parts of a reply that Flower asks for one by one."""
    before, peak, done = world.memory_bytes(), [0], threading.Event()
    kept = []

    def watch():
        while not done.wait(0.1):
            peak[0] = max(peak[0], world.memory_bytes())

    def chunk(number):
        return b"ArrayChunk  1048576\x00" + number.to_bytes(8, "big") + bytes(MB - 8)

    def in_parts(device, message):
        numbers = {hashlib.sha256(chunk(number)).hexdigest(): number for number in range(1024)}
        answer = Message(world.packed(message), reply_to=message)
        answer.metadata.__dict__["_message_id"] = answer.object_id
        tree = ObjectTree(object_id=answer.object_id, children=[ObjectTree(object_id=name) for name in numbers])
        session, wanted = device.announce(answer, tree)
        for name in numbers.keys() & set(wanted):  # the message that holds them never comes
            if done.is_set():
                break
            with contextlib.suppress(httpx.HTTPError):  # the server may say that it is busy
                kept.append(device.push_part(message.metadata.run_id, session, name, chunk(numbers[name])))

    number = world.play(d0=in_parts)
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        address, place = f"https://127.0.0.1:{world.port}", "/v1/fleet/push-object"
        trust = ssl.create_default_context(cafile=world.fleet.server / "ca.crt")
        with httpx.Client(base_url=address, verify=trust, trust_env=False) as stranger:
            claims = {"content-length": str(2**30)}
            assert stranger.post(place, content=iter([bytes(MB)] * 4), headers=claims).status_code == 413
            with contextlib.suppress(httpx.TransportError):  # cut off before all is said
                assert stranger.post(place, content=iter([bytes(MB)] * 1024)).status_code == 413
        line = world.end_of(number)
        after = world.end_of(number + 1)
    finally:
        done.set()
        watching.join()
    record_property("memory_bytes", peak[0] - before)
    record_property("kept_bytes", MB * sum(kept))
    assert 0 < sum(kept) < 64
    assert dict(line.rejected) in ({"NO_REPLY": 1, "PAUSED": 5}, {"ERROR": 1, "PAUSED": 5})
    assert world.check(number) == world.check(number + 1) == [0, 1]
    assert after.accepted == HONEST
    assert peak[0] - before < MEMORY_BYTES
