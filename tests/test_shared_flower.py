"""Both engines: what arrives, what is counted, and that nothing ends as if it had gone well when it had not."""

import importlib
import logging
import os
import signal
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.app.error import Error

from shared.errors import CampaignError
from shared.flower.grid import (
    InlineGrid,
    MeteredGrid,
    answer_seat,
    in_simulation,
    metered,
    round_trip_bytes,
    run_inline,
    seats,
)
from shared.flower.ray_engine import run_ray

# Ray drops its handles of processes that it stops by other means.
unraisable = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
handles = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")


def slow_ray(test):
    return pytest.mark.slow(unraisable(handles(test)))


RUN_CONFIG = {"campaigns": "/some/campaigns"}


@pytest.fixture(scope="module")
def devices():
    """The module ``ray_devices``, importable here and in Ray's workers."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("ray_devices")
    finally:
        sys.path.remove(folder)


def ask(nodes, wanted="answer", *, round_number=1):
    record = RecordDict({"ask": ConfigRecord({"do": wanted})})
    return [Message(record, dst_node_id=n, message_type="train", ttl=60.0, group_id=str(round_number)) for n in nodes]


def about(replies):
    return [dict(reply.content["about"]) for reply in replies]


def descendants():
    """Pids of all children of this process and theirs, zombies left out."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(folder.name)] = int(fields[1])
    found, new = set(), {os.getpid()}
    while new:
        new = {pid for pid, parent in parents.items() if parent in new} - found
        found |= new
    return found


def context_of(**node_config):
    return Context(run_id=1, node_id=1, node_config=node_config, state=RecordDict(), run_config={"simulation": True})


def test_inline_devices_answer_with_their_seat_state_and_run_config(devices):
    seen = []

    def main(grid):
        assert seats(grid, devices=3) == grid.seats
        for _ in range(2):
            replies = about(grid.send_and_receive(ask(grid.seats)))
        seen.extend(replies)
        assert (grid.messages, grid.bytes_up > 0, grid.bytes_down > 0, grid.wall_s > 0) == (6, True, True, True)

    run_inline(main, devices.app, devices=3, run_config=RUN_CONFIG)
    assert [each["seat"] for each in seen] == [0, 1, 2]
    assert [each["seen"] for each in seen] == [2, 2, 2]
    assert all(each["simulation"] and each["campaigns"] == "/some/campaigns" for each in seen)


def test_what_arrives_is_a_copy():
    def scribble(message, context):
        message.content["ask"]["do"] = "changed"
        return Message(message.content, reply_to=message)

    def main(grid):
        [question] = ask([1000])
        [reply] = grid.send_and_receive([question])
        assert (question.content["ask"]["do"], reply.content["ask"]["do"]) == ("answer", "changed")

    run_inline(main, scribble, devices=1, run_config={})


def test_what_main_raises_comes_through_inline(devices):
    with pytest.raises(ZeroDivisionError):
        run_inline(lambda grid: 1 / 0, devices.app, devices=1, run_config={})


def echo(message, context):
    return Message(message.content, reply_to=message)


class SlowGrid(InlineGrid):
    """A grid whose replies come one at a time, as over a network."""

    def pull_messages(self, message_ids):
        return super().pull_messages([i for i in message_ids if i in self._replies][:1])


def test_a_wrapped_grid_counts_the_same_bytes_and_reports_each_reply_when_it_comes():
    plain = InlineGrid(echo, devices=3, run_config={})
    list(plain.send_and_receive(ask(plain.seats)))
    inner = SlowGrid(echo, devices=3, run_config={})
    outer = MeteredGrid(inner)
    waiting = []
    outer.on_reply = lambda: waiting.append(len(inner._replies))
    replies = list(outer.send_and_receive(ask(inner.seats), timeout=10))
    assert len(replies) == 3
    assert waiting == [2, 1, 0]
    assert (outer.messages, outer.bytes_down, outer.bytes_up) == (plain.messages, plain.bytes_down, plain.bytes_up)
    assert metered(outer) is outer
    assert isinstance(metered(_Plain(inner)), MeteredGrid)


class _Plain(InlineGrid):
    """Stands for a grid of Flower's own: one that counts nothing."""

    def __new__(cls, inner):
        from flwr.superlink.grid import InMemoryGrid

        return object.__new__(InMemoryGrid)


class SilentGrid(InlineGrid):
    """A grid nobody answers on."""

    def pull_messages(self, message_ids):
        return []


def test_waiting_for_replies_ends():
    grid = MeteredGrid(SilentGrid(echo, devices=1, run_config={}))
    started = time.monotonic()
    assert grid.send_and_receive(ask([1000]), timeout=0.2) == []
    assert 0.2 <= time.monotonic() - started < 5

    def stopped():
        raise CampaignError("stopped")

    with pytest.raises(CampaignError, match="stopped"):
        MeteredGrid(SilentGrid(echo, devices=1, run_config={}), check=stopped).send_and_receive(ask([1000]))


class ErrorGrid(InlineGrid):
    """A grid whose replies are all errors of one reason."""

    reason = ""

    def pull_messages(self, message_ids):
        for reply in super().pull_messages(message_ids):
            reply.metadata.__dict__["_message_type"] = "train"
            question = ask([reply.metadata.src_node_id])[0]
            question.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
            yield Message(Error(code=0, reason=self.reason), reply_to=question)


@pytest.mark.parametrize(
    ("reason", "dead"),
    [
        ("<class 'ray.exceptions.ActorDiedError'>:<'The actor died\n unexpectedly.'>", True),
        ("<class 'ray.exceptions.OutOfMemoryError'>:<'Task was killed'>", True),
        ("<class 'ray.exceptions.RayTaskError(ClientAppException)'>:<'the device could not'>", False),
        ("", False),
    ],
)
def test_a_dead_worker_is_told_from_an_error_of_the_app(reason, dead):
    inner = ErrorGrid(echo, devices=1, run_config={})
    inner.reason = reason
    if dead:
        with pytest.raises(CampaignError, match=r"must live .* one died: (The actor died unexpectedly\.|Task was)"):
            MeteredGrid(inner).send_and_receive(ask([1000]), timeout=5)
    else:
        [reply] = MeteredGrid(inner).send_and_receive(ask([1000]), timeout=5)
        assert reply.has_error()


def test_seats_are_asked_for_where_they_are_not_known(devices):
    asked = MeteredGrid(InlineGrid(devices.app, devices=4, run_config={}))
    assert seats(asked, devices=4) == {1000: 0, 1001: 1, 1002: 2, 1003: 3}
    assert asked.messages == 4


@pytest.mark.parametrize(
    ("app", "count", "says"),
    [
        (lambda m, c: answer_seat(m, context_of(**{"partition-id": 0})), 2, "got 0 seats from 2 nodes; .*NOT_A_SIM"),
        (lambda m, c: answer_seat(m, context_of(**{"partition-id": 0, "simulation": True})), 2, "needs an answer"),
        (lambda m, c: answer_seat(m, c), 3, "got 2 seats from 2 nodes"),
    ],
    ids=["real devices", "one seat twice", "too few"],
)
def test_wrong_seats_stop_a_simulation(app, count, says):
    grid = MeteredGrid(InlineGrid(app, devices=2, run_config={}))
    with pytest.raises(CampaignError, match=says):
        seats(grid, devices=count, timeout_s=0.3)


def test_no_message_and_no_run_config_makes_a_simulation():
    assert in_simulation(context_of(simulation=True))
    assert not in_simulation(context_of())  # its run config says simulation
    assert not in_simulation(context_of(simulation="true"))
    assert not in_simulation(context_of(simulation=1))


def test_a_device_imports_no_ray():
    import subprocess

    code = (
        "import sys; from shared.flower.grid import in_simulation; from flwr.app import Context, RecordDict; "
        "c = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={'simulation': True}); "
        "sys.exit(in_simulation(c) or 'ray' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, check=False)
    assert done.returncode == 0


def test_measuring_a_message_does_not_change_who_speaks():
    from flwr.supercore.task_identity import TaskIdentity

    InlineGrid(echo, devices=1, run_config={})
    before = TaskIdentity.run_id
    TaskIdentity.run_id = 77
    try:
        arrays = RecordDict({"arrays": ArrayRecord({"w": Array(np.zeros(2048, np.float32))})})
        down, up = round_trip_bytes(arrays, arrays)
        assert min(down, up) > 8192
        assert TaskIdentity.run_id == 77
    finally:
        TaskIdentity.run_id = before


# Engine ray. Starting it takes seconds, so what can share one start does.


def switches():
    """What this process's environment tells Ray and the processes it starts; importing ray adds one of its own."""
    told = {name: value for name, value in os.environ.items() if name.startswith(("RAY_", "PYTHONPATH"))}
    return {
        name: value for name, value in told.items() if name not in ("RAY_CLIENT_MODE", "RAY_ENABLE_UV_RUN_RUNTIME_ENV")
    }


@pytest.fixture
def nothing_left():
    """No process, no thread, no folder, no setting of an engine is left after a test."""
    before = descendants()
    threads, variables, level = set(threading.enumerate()), switches(), logging.getLogger("flwr").level
    terminate = signal.getsignal(signal.SIGTERM)
    filters = list(warnings.filters)
    yield
    deadline = time.monotonic() + 20
    while (left := descendants() - before) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    assert not {t for t in threading.enumerate() if not t.daemon} - threads
    assert switches() == variables
    assert signal.getsignal(signal.SIGTERM) is terminate
    assert logging.getLogger("flwr").level == level
    assert [f for f in warnings.filters if f not in filters] == []
    assert not list(Path("/tmp").glob(f"sottovoce-ray-{os.getpid()}-*"))


@slow_ray
def test_ray_devices_stay_resident_in_their_workers_and_are_found(devices, nothing_left):
    told, reported = [], []

    def main(grid):
        where = seats(grid, devices=6)
        assert sorted(where.values()) == list(range(6))
        grid.on_reply = lambda: reported.append(1)
        for number in (1, 2, 3):
            replies = list(grid.send_and_receive(ask(where, round_number=number), timeout=60))
            assert {r.metadata.src_node_id: r.content["about"]["seat"] for r in replies} == where
            told.extend(about(replies))
        assert (grid.messages, len(reported)) == (24, 18)
        assert listening_to_the_world(descendants()) == []

    run_ray(main, devices.app, devices=6, run_config=RUN_CONFIG, workers=2, address=None)
    workers = {each["pid"] for each in told}
    assert os.getpid() not in workers
    assert 1 <= len(workers) <= 2
    assert {each["loads"] for each in told} == {1}  # the base is loaded once in a worker, whatever the messages
    assert max(each["messages"] for each in told) >= 9
    assert {each["simulation"] for each in told} == {True}
    assert {each["campaigns"] for each in told} == {"/some/campaigns"}
    assert sorted(each["seen"] for each in told) == [1] * 6 + [2] * 6 + [3] * 6  # state follows the device


def listening_to_the_world(pids):
    """Sockets of these processes that accept connections from other machines."""
    inodes = set()
    for pid in pids:
        try:
            links = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        except OSError:
            continue
        inodes |= {link[8:-1] for link in links if link.startswith("socket:[")}
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address = fields[1].rpartition(":")[0]
            if fields[3] == "0A" and fields[9] in inodes and not address.endswith("00007F"):
                found.append(fields[1])
    return found


def raising(error):
    def main(grid):
        raise error

    return main


@slow_ray
@pytest.mark.parametrize("error", [CampaignError("as it is"), KeyboardInterrupt(), SystemExit(3)], ids=repr)
def test_what_main_raises_comes_through_ray(devices, nothing_left, error):
    with pytest.raises(type(error)) as caught:
        run_ray(raising(error), devices.app, devices=2, run_config={}, workers=1)
    assert caught.value is error


def demanding(wanted, *, timeout=60.0):
    """A campaign that sends one bad request among good ones and does not forgive."""

    def main(grid):
        first, *rest = sorted(seats(grid, devices=4))
        replies = list(grid.send_and_receive([*ask([first], wanted), *ask(rest)], timeout=timeout))
        if len(replies) < 4 or any(reply.has_error() for reply in replies):
            raise CampaignError(f"got {sum(not reply.has_error() for reply in replies)} good replies")

    return main


@slow_ray
@pytest.mark.parametrize(
    ("wanted", "timeout", "says"),
    [("die", 60.0, "must live .* one died: .*actor died"), ("fail", 60.0, "got 3 good"), ("hang", 6.0, "got 3 good")],
)
def test_a_device_that_fails_ends_the_campaign_in_bounded_time(devices, nothing_left, wanted, timeout, says):
    at_work = []

    def main(grid):
        at_work.append(time.monotonic())
        demanding(wanted, timeout=timeout)(grid)

    with pytest.raises(CampaignError, match=says):
        run_ray(main, devices.app, devices=4, run_config={}, workers=2)
    assert time.monotonic() - at_work[0] < 60


@slow_ray
def test_a_straggler_nobody_waits_for_does_not_hold_up_the_end(devices, nothing_left):
    def main(grid):
        grid.push_messages(ask(list(seats(grid, devices=2))[:1], "hang"))
        time.sleep(1)

    run_ray(main, devices.app, devices=2, run_config={}, workers=1)


@slow_ray
def test_an_engine_that_stops_early_is_no_finished_run(devices, nothing_left, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("An error was encountered.") from ValueError("ActorPool is empty.")

    monkeypatch.setattr("flwr.simulation.run_simulation", broken)
    with pytest.raises(CampaignError, match=r"until the campaign ends, it stopped: ValueError: ActorPool is empty"):
        run_ray(lambda grid: None, devices.app, devices=2, run_config={}, workers=1)


def test_ray_that_cannot_start_or_be_joined_is_said_in_a_line(devices, nothing_left):
    pytest.importorskip("ray")
    for address, says in (
        ("127.0.0.1:1", r"must be host:port of its head node, got '127\.0\.0\.1:1'"),
        ("ray://127.0.0.1:1", "must be host:port"),
        ("nonsense", "must be host:port"),
    ):
        with pytest.raises(CampaignError, match=says):
            run_ray(lambda grid: None, devices.app, devices=1, run_config={}, address=address)


def test_a_broken_start_of_ray_is_one_line(devices, nothing_left, monkeypatch):
    ray = pytest.importorskip("ray")

    def broken(**_):
        raise ConnectionError("no\nroom")

    monkeypatch.setattr(ray, "init", broken)
    with pytest.raises(CampaignError, match=r"Ray must start on this machine; got ConnectionError: no room"):
        run_ray(lambda grid: None, devices.app, devices=1, run_config={}, workers=1)


@slow_ray
def test_a_cluster_is_joined_and_left(devices, monkeypatch):
    """A cluster of one node on loopback, which both sides must be told: by default Ray looks for its real IP."""
    import shutil
    import socket
    import subprocess

    from ray._private import ray_constants

    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", False)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = Path(f"/tmp/sottovoce-test-{os.getpid()}")  # a socket's path must be short
    switches = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", f"--port={port}", "--num-cpus=1", "--block"]
    command += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", f"--temp-dir={home}"]
    with subprocess.Popen(
        command, env=os.environ | switches, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    ) as owner:
        try:
            deadline = time.monotonic() + 90
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    assert time.monotonic() < deadline
                    time.sleep(0.3)
            time.sleep(10)
            told = []
            for _ in range(2):
                run_ray(
                    lambda grid: told.extend(about(grid.send_and_receive(ask(seats(grid, devices=2)), timeout=60))),
                    devices.app,
                    devices=2,
                    run_config=RUN_CONFIG,
                    address=f"127.0.0.1:{port}",
                )
            assert owner.poll() is None
            assert {each["campaigns"] for each in told} == {"/some/campaigns"}
            assert len(told) == 4
        finally:
            owner.terminate()
            owner.wait(30)
            shutil.rmtree(home, ignore_errors=True)
