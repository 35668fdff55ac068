"""The owner's schedule: kept, changed, refused; the gate over it, and waits between tries, by a clock of the test."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Message, RecordDict

from client.home.home import create_home
from client.service.back_off import BackOff
from client.service.conditions import Surroundings
from client.service.join import Service
from client.service.schedule import CpuWatch, Gate, change_schedule, clear_schedule, read_schedule
from client.service.supernode import AWAY, NOT_ENROLLED, OFFLINE, ONLINE, STARTING, STUCK, SuperNode
from shared.errors import ScenarioError, StoreError
from shared.flower.grid import InlineGrid
from shared.protocol.wire import refusal_code
from sottovoce.cli import main

MORNING = datetime(2026, 11, 23, 8, 0, tzinfo=UTC)
NIGHT = {"window": "22:00-06:00"}


@pytest.fixture
def home(tmp_path):
    return create_home(tmp_path / "home", keystore="file", cap_epsilon=8.0, cap_delta=1e-4)


class Clock:
    """Seconds of the test, and the time of day that goes with them."""

    def __init__(self, start=MORNING):
        self.start, self.seconds, self.looks = start, 0.0, 0

    def __call__(self):
        return self.seconds

    def look(self):
        self.looks += 1
        return Surroundings(now=self.start + timedelta(seconds=self.seconds), others_busy=0.0)


def test_a_schedule_is_kept_changed_and_cleared(tmp_path):
    assert read_schedule(tmp_path) == {}
    assert change_schedule(tmp_path, put=NIGHT | {"power": "mains"}) == NIGHT | {"power": "mains"}
    assert (tmp_path / "schedule.json").stat().st_mode & 0o777 == 0o600
    assert change_schedule(tmp_path, put={"idle": "5"}, drop=frozenset({"power"})) == NIGHT | {"idle": "5"}
    assert read_schedule(tmp_path) == NIGHT | {"idle": "5"}
    clear_schedule(tmp_path)
    assert read_schedule(tmp_path) == {}


@pytest.mark.parametrize(
    ("put", "drop", "error", "words"),
    [
        ({"window": "at night"}, (), StoreError, "HH:MM-HH:MM.*nothing was changed"),
        ({"absent": "x"}, (), ScenarioError, "condition must be"),
        ({}, ("idle",), StoreError, "'idle' is not; nothing was changed"),
        ({"idle": "5"}, ("idle",), StoreError, "'idle' is not; nothing was changed"),
    ],
)
def test_an_impossible_change_changes_nothing(tmp_path, put, drop, error, words):
    change_schedule(tmp_path, put=NIGHT)
    with pytest.raises(error, match=words):
        change_schedule(tmp_path, put={"power": "mains"} | put, drop=frozenset(drop))
    assert read_schedule(tmp_path) == NIGHT


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"conditions": {"window": 3}}', '{"conditions": {}, "more": 1}', '{"conditions": {}} x']
)
def test_a_damaged_schedule_keeps_a_device_away(tmp_path, text):
    (tmp_path / "schedule.json").write_text(text)
    clock = Clock()
    gate = Gate(tmp_path, look=clock.look, clock=clock)
    assert not gate.is_open()
    assert "--clear" in gate.reasons["schedule"]
    with pytest.raises(StoreError, match="must hold a schedule"):
        change_schedule(tmp_path, put=NIGHT)
    clear_schedule(tmp_path)
    assert gate.is_open()


def test_without_a_schedule_the_gate_is_open_and_nothing_is_looked_at(tmp_path):
    clock = Clock()
    gate = Gate(tmp_path, look=clock.look, clock=clock)
    for _ in range(100):
        assert gate.is_open()
        clock.seconds += 1.0
    assert clock.looks == 0


def test_the_gate_follows_the_window_looks_seldom_and_settles_before_it_opens(tmp_path):
    change_schedule(tmp_path, put=NIGHT)
    clock = Clock(MORNING.replace(hour=21, minute=30))
    gate = Gate(tmp_path, look=clock.look, clock=clock, settle=lambda: 50.0)
    was = []
    for second in range(0, 9 * 3600, 5):
        clock.seconds = float(second)
        found = gate.is_open()
        assert found == (not gate.reasons)
        if not was or found != was[-1][1]:
            was.append((second, found))
    opens, closes = 1800, 1800 + 8 * 3600
    assert [state for _, state in was] == [False, True, False]
    assert opens + 50 <= was[1][0] <= opens + 80
    assert closes <= was[2][0] <= closes + 15
    assert clock.looks == 9 * 3600 / 15


def test_a_condition_that_comes_and_goes_does_not_open_the_gate(tmp_path):
    change_schedule(tmp_path, put={"idle": "1"})
    clock = Clock()
    busy = [0.9, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0]

    def look():
        seen = clock.look()
        return Surroundings(now=seen.now, others_busy=busy[clock.looks - 1], root=tmp_path, ask=lambda _: "b true\nt 0")

    gate = Gate(tmp_path, look=look, clock=clock, settle=lambda: 40.0)
    found = []
    for _ in busy:
        found.append(gate.is_open())
        clock.seconds += 15.0
    assert found == [False] * 6 + [True, True]


def test_the_gate_follows_its_owner_at_once(tmp_path):
    clock = Clock()
    gate = Gate(tmp_path, look=clock.look, clock=clock, settle=lambda: 1e9)
    assert gate.is_open()
    change_schedule(tmp_path, put=NIGHT)
    assert not gate.is_open()
    assert "begins at 22:00" in gate.reasons["window"]
    change_schedule(tmp_path, put={"window": "07:00-09:00"})
    assert gate.is_open()
    change_schedule(tmp_path, put=NIGHT)
    assert not gate.is_open()
    clear_schedule(tmp_path)
    assert gate.is_open()


def stat(root, *, user=0, nice=0, system=0, idle=0):
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text(f"cpu  {user} {nice} {system} {idle} 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")


def test_work_of_others_is_a_mean_of_a_minute_and_polite_work_is_not_in_it(tmp_path):
    clock = Clock()
    stat(tmp_path)
    watch = CpuWatch(tmp_path, clock=clock, now=lambda: MORNING)
    assert watch.surroundings().others_busy is None  # nothing has passed
    clock.seconds = 15.0
    stat(tmp_path, nice=1500, idle=1500)
    assert watch.surroundings().others_busy == 0.0
    clock.seconds = 30.0
    stat(tmp_path, user=1000, system=500, nice=1500, idle=3000)
    assert watch.surroundings().others_busy == 1500 / 6000
    for seconds in (45.0, 60.0, 75.0, 90.0, 105.0):
        clock.seconds = seconds
        stat(tmp_path, user=1000, system=500, nice=1500, idle=int(3000 + 200 * (seconds - 30)))
        found = watch.surroundings().others_busy
    assert found == 0.0  # it was longer ago than a minute
    (tmp_path / "proc/stat").write_text("nothing of the kind\n")
    assert watch.surroundings().others_busy is None


def test_waits_double_to_a_bound_at_random_and_begin_anew_after_a_good_time():
    drawn = []

    def draw(low, high):
        drawn.append((low, high))
        return high

    back_off = BackOff(first_s=1.0, cap_s=300.0, steady_s=60.0, draw=draw)
    assert [back_off.failed(went_well_s=0.0) for _ in range(11)] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert all(low == high / 2 for low, high in drawn)
    assert back_off.failed(went_well_s=59.9) == 300
    assert back_off.failed(went_well_s=60.0) == 1
    assert back_off.failures == 1
    for _ in range(3000):
        assert back_off.failed(went_well_s=0.0) <= 300
    own = BackOff(first_s=8.0, cap_s=8.0, steady_s=60.0)
    waits = [own.failed(went_well_s=0.0) for _ in range(200)]
    assert 4.0 <= min(waits) < 5.0
    assert 7.0 < max(waits) <= 8.0
    with pytest.raises(ValueError, match="first_s"):
        BackOff(first_s=0.0, cap_s=1.0, steady_s=1.0)


@pytest.fixture
def node(tmp_path, monkeypatch):
    """A SuperNode that starts no program: its lives are played, and its waits are noted."""
    clock, states, waits = Clock(), [], []
    node = SuperNode(
        tmp_path / "flower",
        server="127.0.0.1:1",
        certificate=tmp_path / "ca.crt",
        key=tmp_path / "device.key",
        on_state=states.append,
        clock=clock,
    )
    lives = []

    def run(log):
        if not lives:
            node._stopping.set()
            return
        for passed, state in lives.pop(0):
            clock.seconds += passed
            if isinstance(state, Exception):
                raise state
            node._tell(state)

    def wait(seconds):
        waits.append(seconds)
        assert node.retry == (node._back_off.failures, pytest.approx(seconds))
        clock.seconds += seconds
        return False

    monkeypatch.setattr(node, "_run", run)
    monkeypatch.setattr(node._stopping, "wait", wait)
    monkeypatch.setattr("client.service.back_off.random.uniform", max)
    node._back_off._draw = lambda low, high: high
    return SimpleNamespace(node=node, lives=lives, waits=waits, states=states, clock=clock)


def test_a_supernode_that_fails_is_started_again_later_and_later(node):
    node.lives += [[(1.0, NOT_ENROLLED)]] * 4
    node.node._keep_up()
    assert node.waits[:4] == [1.0, 2.0, 4.0, 8.0]
    assert node.states == [NOT_ENROLLED]
    assert node.node.retry is None


def test_only_a_good_connection_makes_waits_short_again(node):
    node.lives += [
        [(120.0, OFFLINE)],  # it tried for two minutes in vain
        [(120.0, OFFLINE)],
        [(3.0, ONLINE)],  # it fell at once
        [(3.0, ONLINE), (70.0, OFFLINE)],
        [(3.0, ONLINE), (30.0, OFFLINE), (5.0, ONLINE), (31.0, OFFLINE)],
    ]
    node.node._keep_up()
    assert node.waits[:5] == [1.0, 2.0, 4.0, 1.0, 1.0]
    assert node.states[:3] == [OFFLINE, ONLINE, OFFLINE]


def test_a_supernode_that_cannot_be_started_is_tried_again(node, tmp_path):
    node.lives += [[(0.0, OSError(28, "No space left on device"))], [(1.0, ONLINE)]]
    node.node._keep_up()
    assert node.states[:2] == [STUCK, ONLINE]
    assert node.waits[0] == 1.0


class PlayedTask:
    """A task with a message of some kind; notes what it was answered."""

    def __init__(self, kind):
        InlineGrid(lambda message, context: message, devices=1, run_config={})  # speak as the server
        self.message = Message(RecordDict(), dst_node_id=1, message_type=kind)
        self.message.metadata.__dict__["_message_id"] = "3f2a"
        self.code = None

    def answer(self, reply):
        self.code = refusal_code(reply)


class Played:
    """A SuperNode whose child runs until it is told to end, and says what the test has it say."""

    def __init__(self, node, monkeypatch):
        self.node, self.clock, self.states, self.ended = node.node, node.clock, node.states, False
        self.waiting, self.stubborn = [], False
        tasks = SimpleNamespace(take=lambda: self.waiting.pop(0) if self.waiting else None)
        self.node._child = SimpleNamespace(
            poll=lambda: 0 if self.ended else None, terminate=self._end, kill=lambda: self._end(kill=True)
        )
        self.node._tasks = tasks
        monkeypatch.setattr("client.service.supernode.is_ours", lambda port: True)

    def _end(self, *, kill=False):
        self.ended = kill or not self.stubborn

    def rests(self):
        """Whether it was let go, and is away as soon as its child has ended."""
        if self.node.rest():
            return True
        return self.ended and self.node.rest()

    def says(self, line):
        self.node._follow(f"\x1b[92mINFO \x1b[0m:      {line}")

    def receives(self, kind):
        """A message comes, and is taken; what became of it."""
        self.says(f"Receiving: {kind} message (ID: 3f2a)")
        self.says("Received successfully")
        task = PlayedTask(kind)
        self.waiting.append(task)
        taken = self.node.take()
        assert taken in (None, task)
        return "taken" if taken else task.code

    def answers(self, kind):
        assert self.receives(kind) == "taken"
        self.says(f"Sending: {kind} message (ID: 4b1c)")
        self.says("Sent successfully")

    def passes(self, seconds):
        self.clock.seconds += seconds


@pytest.fixture
def alive(node, monkeypatch):
    return Played(node, monkeypatch)


def test_what_is_idle_rests_at_once_and_wakes(alive):
    assert alive.rests()
    assert alive.ended
    assert alive.states == [AWAY]
    alive.node.wake()
    assert alive.states == [AWAY, STARTING]


def test_a_child_that_does_not_end_is_killed(alive):
    alive.stubborn = True
    assert not alive.rests()
    alive.passes(10.0)
    assert not alive.rests()
    alive.passes(0.1)
    assert alive.rests()


def test_what_was_received_is_answered_first_and_the_server_collects_it(alive):
    assert alive.receives("train") == "taken"
    alive.passes(10_000.0)
    assert not alive.rests()
    alive.says("Sent successfully")
    alive.passes(29.9)
    assert not alive.rests()
    alive.passes(0.1)
    assert alive.rests()
    assert alive.ended


@pytest.mark.parametrize(
    "end", ["Failed to send message 3f2a: gone", "Ignoring reply message 3f2a.", "Failed to create task for run ID 1."]
)
def test_a_message_that_fails_holds_nobody(alive, end):
    assert alive.receives("train") == "taken"
    alive.says(f"Run ID 1 is over. {end}")
    alive.passes(30.0)
    assert alive.rests()


SUM = ["query.secure_keys", "query.secure_shares", "train", "query.secure_unmask"]


def test_a_secure_sum_is_ended_first(alive):
    alive.answers(SUM[0])
    for kind in SUM[1:]:
        alive.passes(299.0)
        assert not alive.rests()
        alive.answers(kind)
    alive.passes(29.0)
    assert not alive.rests()
    alive.passes(1.0)
    assert alive.rests()


def test_a_device_that_leaves_begins_nothing_and_a_server_cannot_hold_it(alive):
    alive.answers("train")
    assert not alive.rests()
    for number in range(30):
        alive.passes(1.0)
        assert alive.receives(("train", SUM[0], SUM[1], "evaluate")[number % 4]) == "PAUSED"
        alive.says("Sent successfully")
    assert alive.rests()
    assert alive.ended


def test_a_stage_that_comes_twice_or_out_of_order_is_not_the_next_one(alive):
    alive.answers(SUM[0])
    alive.answers(SUM[1])
    assert not alive.rests()
    assert alive.receives(SUM[1]) == "PAUSED"
    assert alive.receives(SUM[2]) == "PAUSED"
    alive.passes(30.0)
    assert alive.rests()


def test_a_next_stage_is_waited_for_five_minutes(alive):
    alive.answers(SUM[0])
    alive.passes(299.9)
    assert not alive.rests()
    alive.passes(0.1)
    assert alive.rests()


def test_a_device_that_is_there_answers_anything(alive):
    for kind in (*SUM, "train", "train", SUM[0], SUM[0], SUM[2], "evaluate"):
        alive.answers(kind)


def test_a_service_loads_no_torch_and_no_telemetry_of_flowers():
    code = "import sys, client.service.join, client.service.schedule; from flwr.supercore import telemetry; "
    code += "print({'torch', 'transformers', 'onnxruntime'} & set(sys.modules), telemetry.FLWR_TELEMETRY_ENABLED)"
    environment = {name: value for name, value in os.environ.items() if name != "FLWR_TELEMETRY_ENABLED"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set() 0\n"


def test_a_service_says_why_it_is_away_and_when_it_tries_again(home, monkeypatch):
    service = Service(home)
    clock = Clock()
    calls = []
    node = SimpleNamespace(retry=None, wake=lambda: calls.append("wake"), rest=lambda: calls.append("rest"))
    gate = Gate(home.folder, look=clock.look, clock=clock)
    service.follow(node, gate)
    found = service.status()["service"]
    assert (found["schedule"], found["unmet"], found["retry"]) == ({}, {}, None)
    change_schedule(home.folder, put=NIGHT)
    node.retry = (3, 4.04)
    service.follow(node, gate)
    assert calls == ["wake", "rest"]
    found = service.status()["service"]
    assert found["schedule"] == NIGHT
    assert found["retry"] == {"failures": 3, "in_s": 4.0}
    assert "22:00" in found["unmet"]["window"]


def test_the_command_sets_shows_and_clears(home, capsys):
    def said(*arguments):
        code = main(["client", "schedule", "--home", str(home.folder), *arguments])
        return code, capsys.readouterr()

    assert said() == (0, ("takes part at any time\n", ""))
    code, shown = said("--window", "22:00-06:00,06:00-22:00", "--on", "mains")
    assert code == 0
    assert "window 22:00-06:00,06:00-22:00: holds now" in shown.out
    assert "takes part while all of it holds" in shown.out
    code, shown = said("--network", "nosuch0", "--remove", "power", "--json")
    told = json.loads(shown.out)
    assert told["conditions"].keys() == {"window", "network"}
    assert told["unmet"].keys() == {"network"}
    assert said("--window", "late")[0] == 2
    assert said("--clear", "--idle", "3")[0] == 2
    assert said("--when", "idle")[0] == 2
    assert said("--when", "idle=3", "--idle", "4")[0] == 2
    code, shown = said("--when", "absent=1")
    assert code == 2
    assert "condition must be" in shown.err
    assert read_schedule(home.folder).keys() == {"window", "network"}
    (home.folder / "schedule.json").write_text("damaged")
    assert said()[0] == 2
    assert said("--clear") == (0, ("takes part at any time\n", ""))
