"""Devices' services as programs, over Flower's own, and a run of a server that asks them; for tests."""

import io
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.supercore.fab import Fab

from client.service.control import control_client
from shared.flower.control import _BUNDLE

ROOT = Path(__file__).parent.parent
_WAIT_S = 90.0


def start_device(home, address, ca):
    """The program ``join_device.py``; what it says is appended to ``service.log`` in the home."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HTTP_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, str(ROOT / "tests" / "join_device.py"), str(home), address, str(ca)]
    with (home / "service.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def service_of(home, *, until):
    """What the home's service says of itself, once it is in that state."""

    def look():
        with control_client(home) as owner:
            found = owner and owner.status()["service"]
        return found if found and found["state"] == until else None

    return wait_until(look)


def wait_until(look):
    """What ``look`` finds, as soon as it finds anything."""
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.2)
    return pytest.fail("waited in vain")


def children_of(pid):
    """Process ids of the children."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def start_run(control, content=None):
    """Start a run whose bundle is these bytes, or the server's own."""
    if content is None:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as bundle:
            bundle.writestr("pyproject.toml", _BUNDLE)
        content = file.getvalue()
    assert control._client.StartRun(StartRunRequest(fab=fab_to_proto(Fab("", content, {})))).HasField("run_id")


def ask_devices(grid, nodes, number, *, sleep=False, kind="train", timeout=120.0, until=None, answers=True):
    """What devices answer to one round's message, or their replies; with ``until``, only wait for that file."""
    config = ConfigRecord({"round": number, "sleep": sleep})
    messages = [
        Message(RecordDict({"config": config}), dst_node_id=node, message_type=kind, ttl=600.0, group_id=str(number))
        for node in nodes
    ]
    if until is not None:
        list(grid.push_messages(messages))
        wait_until(until.exists)
        return []
    replies = {reply.metadata.src_node_id: reply for reply in grid.send_and_receive(messages, timeout=timeout)}
    if not answers:
        return [replies[node] for node in nodes]
    told = [dict(replies[node].content["config"]) for node in nodes]
    assert [one["round"] for one in told] == [number] * len(nodes)
    return told
