"""Programs of Flower's that we start: whose a port is, one that waits in vain, what a log says."""

import logging
import os
import socket
import time
from types import SimpleNamespace

import pytest

from client.service.supernode import NOT_ENROLLED, OFFLINE, ONLINE, WRONG_CLOCK, SuperNode
from client.vault.private_files import private_folder
from shared.flower.processes import free_port, is_ours, running, trim
from shared.flower.tasks import StalledError


def test_a_port_is_ours_where_a_process_of_this_user_listens(monkeypatch):
    assert not is_ours(free_port())
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert is_ours(port)
        with socket.create_connection(("127.0.0.1", port)) as caller:
            assert not is_ours(caller.getsockname()[1])
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        assert not is_ours(port)


CHATTERBOX = """
import os, time
for chunk in range(5):
    for number in range(100):
        print(f"{number:0999d}", flush=True)
    while os.fstat(1).st_size > 50_000:  # its own log
        time.sleep(0.005)
"""


def test_what_a_running_program_says_stays_bounded(tmp_path):
    log = tmp_path / "said.log"
    command = ["python", "-c", CHATTERBOX]
    deadline = time.monotonic() + 30.0
    with running(command, environment=dict(os.environ), folder=tmp_path, log=log) as program:
        while program.poll() is None and time.monotonic() < deadline:
            trim(log, limit_bytes=50_000)
            time.sleep(0.005)
        assert program.poll() == 0  # half a megabyte said
    assert {file.name for file in tmp_path.iterdir()} == {"said.log", "said.log.1"}
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 200_000
    assert log.read_bytes()[:1] in (b"0", b"")  # no hole where the old lines were


class Child:
    killed = False

    def kill(self):
        self.killed = True


@pytest.fixture
def node(tmp_path):
    """A SuperNode whose program listens."""
    private_folder(tmp_path / "flower")
    found = SuperNode(tmp_path / "flower", server="a:1", certificate=tmp_path, key=tmp_path, on_state=str)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        found._child, found._port = Child(), listening.getsockname()[1]
        yield found


def test_no_task_is_taken_of_another_users_program(node, monkeypatch):
    """The port is chosen before the SuperNode listens on it, and everybody can read it from its command line."""
    task = SimpleNamespace(message=SimpleNamespace(metadata=SimpleNamespace(message_type="train")))
    node._tasks = SimpleNamespace(take=lambda: task)
    assert node.take() is task
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert node.take() is None


def test_a_supernode_that_waits_for_what_never_comes_is_ended(node):
    def stalled():
        raise StalledError("it did not come")

    node._tasks = SimpleNamespace(take=stalled)
    with pytest.raises(StalledError):
        node.take()
    assert node._child.killed


def test_a_wrong_clock_is_told_from_a_device_that_is_shut_out(node):
    states = []
    node._on_state = states.append
    log = logging.NullHandler()
    node._read("SuperNode ID: 7", log)
    node._read("SuperNode terminated gracefully.", log)  # revoked while it ran
    assert states == [ONLINE]
    node._tell(OFFLINE)
    node._read("SuperNode terminated gracefully.", log)
    assert states == [ONLINE, OFFLINE, WRONG_CLOCK]
    node._read("[code: 2004] Failed to activate SuperNode.", log)
    node._stopping.set()
    node._read("SuperNode terminated gracefully.", log)
    assert states == [ONLINE, OFFLINE, WRONG_CLOCK, NOT_ENROLLED]
