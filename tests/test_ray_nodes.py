"""A simulation spread over two Ray nodes: each plays devices, and the result is that of one process, byte for byte."""

import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from server.checkpoint import last_checkpoint
from shared.config import load_scenario
from shared.flower.grid import seats
from shared.flower.processes import free_port, running
from shared.flower.ray_engine import run_ray
from shared.protocol.campaign import read_campaign
from simulations.run import simulate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray"),
]
LOOPBACK = "127.0.0.1"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster():
    """The address of a head node, and a second node that has joined it, one processor each; both end with the test."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder, ExitStack() as stack:
        environment = os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(sys.path)}

        def start(name, *options):
            command = ["ray", "start", "--block", "--num-cpus=1", f"--node-ip-address={LOOPBACK}", *options]
            log = Path(folder) / f"{name}.log"
            entering = running(command, environment=environment, folder=Path(folder), log=log)
            return stack.enter_context(entering), log

        head, head_log = start(
            "head", "--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={folder}/h",
            "--object-store-memory=100000000",
        )  # fmt: skip
        address = f"{LOOPBACK}:{port}"
        _wait(lambda: "Ray runtime started" in head_log.read_text(), head, head_log)
        second, second_log = start("second", f"--address={address}", "--object-store-memory=100000000")
        _wait(lambda: "Ray runtime started" in second_log.read_text(), second, second_log)
        _wait(lambda: _nodes(address) == 2, second, second_log)
        yield address


def _wait(reached, process, log):
    deadline = time.monotonic() + 90
    while not reached():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def _nodes(address):
    """How many nodes of a cluster are alive, as a process of its own sees it."""
    code = (
        f"import ray; ray.init(address={address!r}, log_to_driver=False, logging_level=50); "
        "print('alive', sum(node['Alive'] for node in ray.nodes()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=os.environ | QUIET, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    found = [line for line in done.stdout.splitlines() if line.startswith("alive")]
    return int(found[-1].split()[1]) if found else 0


def where(message, context):
    """A device that tells on which node it is played."""
    import ray

    from shared.flower.grid import answer_seat

    if message.metadata.message_type != "train":
        return answer_seat(message, context)
    time.sleep(0.2)  # so that one node alone would not be done first
    told = ConfigRecord({"node": ray.get_runtime_context().get_node_id()})
    return Message(RecordDict({"told": told}), reply_to=message)


def test_devices_are_played_on_both_nodes(cluster):
    told = []

    def main(grid):
        roster = seats(grid, devices=8)
        asked = [
            Message(RecordDict(), dst_node_id=node, message_type="train", group_id="1", ttl=60.0) for node in roster
        ]
        told.extend(reply.content["told"]["node"] for reply in grid.send_and_receive(asked, timeout=60))

    run_ray(main, where, devices=8, run_config={}, address=cluster)
    assert len(told) == 8
    assert len(set(told)) == 2


def test_two_nodes_give_what_one_process_gives(cluster, tiny_world, tmp_path):
    found = {}
    for engine in ("inline", "ray"):
        overrides = [f'performance.engine="{engine}"', "linear.enabled=false", "export.users=0"]
        overrides += [f'performance.ray_address="{cluster}"'] if engine == "ray" else []
        scenario = load_scenario(tiny_world(tmp_path), tuple(overrides))
        summary = simulate(scenario, out=tmp_path / engine, quiet=True)
        [folder] = (tmp_path / engine / "campaigns").iterdir()
        policy = read_campaign(folder).policy.sha256
        last = last_checkpoint(folder / "checkpoints", policy_sha256=policy)
        arrays = {name: array.tobytes() for name, array in last.arrays.items()}
        found[engine] = (policy, arrays, last.participations, last.answered, summary["rows"], summary["claim"])
    assert found["inline"] == found["ray"]
