"""Kills, power cuts, wrong clocks and second copies, played on a server and three devices, each its own processes.

Noise comes from seeds, so that what a fleet has gone through must not show in the shared arrays: they are those of a
fleet that nothing happened to, to the last bit, wherever every device's answer could be had.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

DEVICES, ROUNDS = 3, 3
WRONG_CLOCK = Path(__file__).with_name("wrong_clock.c")
STOP_S = {"device-0": 5.0, "server": 60.0}  # which says first what the campaign has cost

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:GitWildMatchPattern"),  # of Flower's own way to build a bundle
]


@pytest.fixture(scope="module")
def template(fleets, tiny_world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return fleets.make_template(
            tmp_path_factory.mktemp("template"), tiny_world, patch, devices=DEVICES, rounds=ROUNDS
        )


@pytest.fixture(scope="module")
def whole(fleets, template, tmp_path_factory):
    """The last checkpoint of a fleet that nothing happened to."""
    with fleets.playing(template, tmp_path_factory.mktemp("whole") / "f") as fleet:
        fleet.start()
        fleet.wait_for_end()
        last = fleet.last()
    assert last.answered == dict.fromkeys(range(DEVICES), ROUNDS)
    return last


@pytest.fixture
def fleet(fleets, template, tmp_path):
    with fleets.playing(template, tmp_path / "f") as fleet:
        yield fleet


@pytest.fixture
def typed(fleets, template, tmp_path):
    """The same, with the commands an operator and owners type, and noise that nobody can foresee."""
    with fleets.playing(template, tmp_path / "f", seed=None) as fleet:
        yield fleet


ONCE = [(kind, n) for n in range(1, ROUNDS + 1) for kind in ("spend", "release")]


def check_as_if_nothing_had_happened(fleet, whole):
    """Every device spent and released each round once, and the server has exactly the arrays of ``whole``."""
    last = fleet.last()
    assert last.answered == last.participations == dict.fromkeys(range(DEVICES), ROUNDS), fleet.said()
    assert [line.accepted for line in fleet.rounds().values()] == [0, *[DEVICES] * ROUNDS]
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(last.arrays[name], array)
    for device in range(DEVICES):
        assert fleet.events(device) == ONCE


@pytest.mark.fault("R1")
@pytest.mark.parametrize("held", [(0, 1, 2), (0,)], ids=["nobody had answered", "two had answered"])
def test_a_server_killed_in_a_round_goes_on_from_its_checkpoint(fleets, fleet, whole, record_property, held):
    fleet.hold(*held, round_number=2)
    fleet.start()
    fleet.wait_held(*held, round_number=2)
    for seat in set(range(DEVICES)) - set(held):
        fleet.until(lambda seat=seat: ("release", 2) in fleet.events(seat), "an answer")
    left = fleet.children("server")
    fleet.kill("server")
    fleet.until(lambda: not fleets.alive(left), "the end of the server's children", timeout_s=10)
    assert fleet.last().round_number == 1
    fleet.let_go()
    began = time.monotonic()
    fleet.start("server")
    fleet.wait_for(2)
    record_property("recover_s", time.monotonic() - began)
    fleet.wait_for_end()
    check_as_if_nothing_had_happened(fleet, whole)


@pytest.mark.fault("R1", "R5")
def test_a_device_is_the_same_under_another_of_flowers_numbers(fleets, fleet, whole, record_property):
    """Flower's database is lost with the server: every device gets a new number, keeps its seat, and answers once."""
    fleet.hold(0, round_number=2)
    fleet.start()
    fleet.wait_held(0, round_number=2)
    before = fleets.node_ids(fleet.fleet)
    fleet.kill("server")
    fleet.until(lambda: not listening(fleet), "the server's port to be free", timeout_s=10)
    shutil.rmtree(fleet.fleet.server / "state")
    fleet.let_go()
    began = time.monotonic()
    fleet.start("server")
    fleet.wait_for(2)
    record_property("recover_s", time.monotonic() - began)
    after = fleets.node_ids(fleet.fleet)
    assert len(before) == len(after) == DEVICES
    assert not before & after
    fleet.wait_for_end()
    check_as_if_nothing_had_happened(fleet, whole)


@pytest.mark.fault("R2")
def test_a_superlink_killed_in_a_round_is_started_again_and_counts_nothing_twice(fleets, fleet, whole, record_property):
    fleet.hold(0, 1, round_number=2)
    fleet.start()
    fleet.wait_held(0, 1, round_number=2)
    fleet.until(lambda: ("release", 2) in fleet.events(2), "an answer")
    killed = fleet.superlink()
    os.kill(killed, signal.SIGKILL)
    began = time.monotonic()
    fleet.let_go()
    fleet.wait_for(2)
    record_property("recover_s", time.monotonic() - began)
    assert fleet.superlink() != killed
    fleet.wait_for_end()
    check_as_if_nothing_had_happened(fleet, whole)


@pytest.mark.fault("R3", "R7")
@pytest.mark.parametrize("held", [(0,), (0, 1, 2)], ids=["one at work", "all at work"])
def test_after_a_power_cut_everything_goes_on_and_nothing_was_spent_for_less(fleets, fleet, record_property, held):
    """Whoever was at work has burnt the round; where that leaves too few for it, it is void, and the next one comes."""
    fleet.hold(*held, round_number=2)
    fleet.start()
    fleet.wait_held(*held, round_number=2)
    for seat in set(range(DEVICES)) - set(held):
        fleet.until(lambda seat=seat: ("release", 2) in fleet.events(seat), "an answer")
    arrays = fleet.last().arrays
    all_of_it = [pid for name in fleet.everybody() for pid in (fleet.processes[name].pid, *fleet.children(name))]
    for pid in all_of_it:
        os.kill(pid, signal.SIGKILL)
    fleet.until(lambda: not fleets.alive(all_of_it), "the end of all processes", timeout_s=10)
    fleet.kill(*fleet.everybody())  # reaped
    fleet.let_go()
    began = time.monotonic()
    fleet.start()
    fleet.wait_for(2)
    record_property("recover_s", time.monotonic() - began)
    fleet.wait_for_end()

    for seat in range(DEVICES):
        second = ["spend", "burn"] if seat in held else ["spend", "release"]
        assert fleet.events(seat) == [("spend", 1), ("release", 1), *((kind, 2) for kind in second), *ONCE[4:]]
    rounds = fleet.rounds()
    assert [rounds[n].accepted for n in (1, 3)] == [DEVICES, DEVICES]
    burnt = {"BURNT": len(held)}
    if len(held) == DEVICES:
        assert (rounds[2].accepted, dict(rounds[2].rejected)) == (0, burnt | {"VOID": 1})
        for name, array in fleet.checkpoint(2).arrays.items():
            np.testing.assert_array_equal(array, arrays[name])
    else:
        assert (rounds[2].accepted, dict(rounds[2].rejected)) == (DEVICES - 1, burnt)


@pytest.mark.fault("R4")
def test_a_device_killed_at_work_loses_the_round_and_is_there_in_the_next(fleets, typed, record_property):
    """Its SuperNode dies with it; the others' round ends without it."""
    typed.hold(0, 1, round_number=2)  # the first so that the last round does not begin before the other is back
    typed.start()
    typed.wait_held(0, 1, round_number=2)
    [node] = typed.children("device-1")
    typed.kill("device-1")
    typed.until(lambda: not fleets.alive([node]), "the end of its SuperNode", timeout_s=10)
    began = time.monotonic()
    typed.start("device-1")
    typed.until(lambda: typed.state(1) == "waiting", "its return")
    record_property("recover_s", time.monotonic() - began)
    typed.let_go()
    typed.wait_for_end()
    rounds = typed.rounds()
    assert [rounds[n].accepted for n in (1, 2, 3)] == [DEVICES, DEVICES - 1, DEVICES], typed.said()
    assert sum(rounds[2].rejected.values()) == 1
    assert typed.events(1) == [("spend", 1), ("release", 1), ("spend", 2), ("burn", 2), ("spend", 3), ("release", 3)]
    assert typed.events(0) == typed.events(2) == ONCE


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory):
    """A library to preload, see ``tests/wrong_clock.c``."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, by which a clock could be put wrong")
    made = tmp_path_factory.mktemp("clock") / "wrong_clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(made), str(WRONG_CLOCK)], check=True, timeout=60)
    return made


@pytest.mark.fault("R13")
@pytest.mark.parametrize(
    ("seconds", "said"),
    [(3600, "wrong-clock"), (-3600, "wrong-clock"), (3653 * 86400, "distrusted")],  # by then certificates are over
    ids=["+1 h", "-1 h", "+10 years"],
)
def test_a_device_whose_clock_is_wrong_says_so_spends_nothing_and_recovers(
    fleet, wrong_clock, record_property, seconds, said
):
    clock = fleet.fleet.folder / "clock"
    clock.write_text(f"{seconds}\n")
    fleet.environment["device-1"] = {"LD_PRELOAD": str(wrong_clock), "WRONG_CLOCK": str(clock)}
    fleet.start()
    fleet.until(lambda: fleet.state(1) == said, said)
    for other in (0, 2):
        fleet.until(lambda other=other: fleet.state(other) == "waiting", "the others")
    assert fleet.events(1) == []
    assert not fleet.finished(1)
    clock.write_text("0\n")
    began = time.monotonic()
    fleet.wait_for(1)
    record_property("recover_s", time.monotonic() - began)
    fleet.wait_for_end()
    assert [fleet.events(n) for n in range(DEVICES)] == [ONCE] * DEVICES


@pytest.mark.fault("R18")
def test_of_two_services_or_servers_in_one_folder_the_second_is_refused(fleets, typed):
    """And a copy of a home, started beside it, is not let in: no round takes two answers of one device."""
    copy = typed.fleet.home(3)
    shutil.copytree(typed.fleet.home(1), copy)
    typed.hold(1, round_number=2)
    typed.start()
    typed.wait_held(1, round_number=2)
    typed.start("device-3")
    for name, words in (("device-1", "one service may run"), ("server", "another serves from it")):
        second = subprocess.run(typed.command(name), capture_output=True, text=True, timeout=fleets.WAIT_S, check=False)
        assert second.returncode != 0
        assert words in second.stderr
    typed.until(lambda: typed.state(3) == "not-enrolled", "the copy's refusal")
    typed.let_go()
    typed.wait_for_end()
    assert typed.events(3) == []
    assert [typed.events(n) for n in range(DEVICES)] == [ONCE] * DEVICES
    assert [line.accepted for line in typed.rounds().values()] == [0, *[DEVICES] * ROUNDS]


@pytest.mark.fault("R23")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_who_is_told_to_stop_at_work_is_gone_in_seconds_and_leaves_no_lock(fleets, typed, record_property, number):
    """A device burns its round, a server loses it; both go on where they were when they are started again."""
    typed.hold(0, 1, round_number=2)
    typed.start()
    typed.wait_held(0, 1, round_number=2)
    for name, limit_s in STOP_S.items():
        left = typed.children(name)
        began = time.monotonic()
        typed.processes[name].send_signal(number)
        typed.processes[name].wait(limit_s)
        typed.until(lambda left=left: not fleets.alive(left), f"the end of what {name} started", timeout_s=limit_s)
        record_property(f"stop_s_{name}", time.monotonic() - began)
        assert time.monotonic() - began < limit_s
    assert typed.processes["device-0"].returncode == 0
    home = fleets.open_home(typed.fleet.home(0))
    with home.lock(), home.ledger(round_running=False) as ledger:
        assert [event.kind for event in ledger.history()][-2:] == ["spend", "burn"]
    typed.let_go()
    began = time.monotonic()
    typed.start("device-0", "server")
    typed.wait_for(2)
    record_property("recover_s", time.monotonic() - began)
    typed.wait_for_end()
    rounds = typed.rounds()
    assert [(rounds[n].accepted, dict(rounds[n].rejected)) for n in (1, 2, 3)] == [
        (DEVICES, {}),
        (DEVICES - 1, {"BURNT": 1}),
        (DEVICES, {}),
    ]


def listening(fleet):
    """Whether anybody has the server's port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", fleet.port)) == 0
