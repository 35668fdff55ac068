"""Federations for faults on the wire: a real server, real devices, and keys that speak by hand beside them."""

import io
import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.numpy import load

from client.home.home import open_home
from client.ledger.events import Event
from client.owner.device_key import make_device_key
from server.aggregate import SERVER_OPTIMIZERS, mean_of_sum, mean_update, ring_sum
from server.checkpoint import checkpoint_path, load_checkpoint
from server.rounds import Round, read_rounds
from shared.config import load_scenario
from shared.datasets import read
from shared.flower.processes import running
from shared.protocol import wire
from shared.protocol.campaign import read_campaign
from simulations.bench import loopback
from simulations.bench.loopback import Fleet, device_command, live, make_fleet, server_command


def typed(*arguments: str) -> str:
    """A command in this process; what it printed."""
    from sottovoce.cli import main

    with io.TextIOWrapper(io.BytesIO(), "utf-8") as said, redirect_stdout(said), redirect_stderr(said):
        code = main(list(arguments))
        said.flush()
        text = said.buffer.getvalue().decode()
    assert code == 0, (arguments, text)
    return text


def fleet_for(scenario: Path, *, homes: int, liars: int = 0, settings: Mapping[str, str]) -> tuple[Fleet, list[Path]]:
    """A server with its campaign, homes that agreed to it, and the key files of enrolled devices that have no home.

    Args:
        scenario: Of ``tiny_world``; what lies beside it is the fleet's.
        homes: Devices with an owner, in the first seats.
        liars: Keys, in the seats after them.
        settings: Lines of the scenario, by name, that become others.
    """
    lines = scenario.read_text(encoding="utf-8").splitlines()
    settings = {"cohort_size": str(homes + liars), "export.users": "0"} | dict(settings)
    for name, value in settings.items():
        [index] = [n for n, line in enumerate(lines) if line.partition(" = ")[0].endswith(name)]
        lines[index] = f"{lines[index].partition(' = ')[0]} = {value}"
    scenario.write_text("\n".join(lines), encoding="utf-8")
    loaded = load_scenario(scenario)
    records = [user.fit for user in read(loaded.data.format, Path(loaded.data.source)).users[:homes]]
    keys = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loopback, "sottovoce", typed)
        fleet = make_fleet(scenario.parent / "f", scenario, name="tiny", records=records, clients=homes + liars)
        for number in range(liars):
            folder = scenario.parent / f"liar-{number}"
            folder.mkdir()
            make_device_key(folder)
            place = ["--name", f"liar-{number}", "--server", str(fleet.server)]
            typed("server", "enrol", str(folder / "device.pub"), *place)
            keys.append(folder / "device.key")
    return fleet, keys


class World:
    """A running federation, and what is played to it.

    Args:
        fleet: Whose campaign is served.
        homes: How many of its devices have ledgers.

    Attributes:
        released: (device, round) -> the arrays it released, as its ledger keeps them.
        contributed: (seat, round) -> what went into a secure sum before it was masked; put there by a test.
        line: Of the first device, where it has one.
        begun: The newest round any device by hand was asked in.
    """

    def __init__(self, fleet: Fleet, *, homes: int) -> None:
        self.fleet, self.homes = fleet, homes
        self.campaign = read_campaign(fleet.campaign)
        self.policy = self.campaign.policy
        self.processes, self.devices, self.line = {}, [], None
        self.released, self.contributed = {}, {}
        self.begun, self._script, self._lock = 0, {}, threading.Lock()
        self._ends = ExitStack()
        self._stop = threading.Event()
        self._reader = threading.Thread(target=self._read_outboxes, daemon=True)
        self._reader.start()

    def start(self, who: str, command: list[str]) -> None:
        """Start a process, that ends with this world."""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        entering = running(command, environment=environment, folder=self.fleet.folder, log=self.fleet.log(who))
        self.processes[who] = self._ends.enter_context(entering)

    def start_server(self) -> None:
        """Start the server, once more where it has ended."""
        self.start("server", server_command(self.fleet))

    def start_device(self, number: int, *, through: int | None = None) -> None:
        """Start a real device, that calls another port than the server's where one is given."""
        command = device_command(self.fleet, number)
        if through is not None:
            certificate = str(self.fleet.server / "invitation" / "ca.crt")
            command[3:4] = [f"127.0.0.1:{through}", "--ca", certificate]
        self.start(f"device-{number}", command)

    @property
    def port(self) -> int:
        """The front's."""
        return int(json.loads((self.fleet.server / "server.json").read_text(encoding="utf-8"))["port"])

    def by_hand(self, make: Callable[..., object], keys: list[Path]) -> None:
        """Bring devices online that speak by hand, one for each key; their behaviour is the script's."""
        certificate = (self.fleet.server / "invitation" / "ca.crt").read_bytes()
        self.devices = [make(key, f"127.0.0.1:{self.port}", certificate, self._behave) for key in keys]
        for device in self.devices:
            device.start()

    def close(self) -> None:
        """End everything."""
        for device in self.devices:
            device.stop()
        self._ends.close()
        self._stop.set()
        self._reader.join()

    def play(self, **behaviours: Callable[..., object]) -> int:
        """Have devices by hand (``d0``, ``d1``, …) behave so in the next round that begins; its number."""
        with self._lock:
            number = self.begun + 1
            self._script[number] = {int(name[1:]): act for name, act in behaviours.items()}
        return number

    def _behave(self, device: object, message: Message) -> None:
        number, which = message.content["config"]["round"], self.devices.index(device)
        with self._lock:
            self.begun = max(self.begun, number)
            act = self._script.get(number, {}).get(which, self.otherwise)
        act(device, message)

    @staticmethod
    def otherwise(device: object, message: Message) -> None:
        """What a device by hand does where nothing is scripted: its owner paused."""
        device.reply(message, wire.pack_refusal("PAUSED"))

    def end_of(self, number: int, *, timeout_s: float = 240.0) -> Round:
        """The journal's line of a round, once it is over."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = read_rounds(self.fleet.campaign).get(number)
            if found is not None:
                return found
            assert self.processes["server"].poll() is None, self.said("server")
            time.sleep(0.1)
        return pytest.fail(f"round {number} does not end: {self.said('server')}")

    def said(self, who: str) -> str:
        """The end of a process's log."""
        return self.fleet.log(who).read_text(encoding="utf-8", errors="replace")[-3000:]

    def checkpoint(self, number: int):
        """The server's state after a round."""
        return load_checkpoint(checkpoint_path(self.fleet.campaign / "checkpoints", number))

    def check(self, number: int, *, given: Mapping[int, Mapping[str, np.ndarray]] | None = None) -> list[int]:
        """Work a round out once more, from what its devices released: the server's arrays must be those, bit for bit.

        Args:
            number: Of the round.
            given: Seat -> what a device by hand gave.

        Returns:
            The seats that were counted.
        """
        before, after = self.checkpoint(number - 1), self.checkpoint(number)
        counted = sorted(s for s in after.answered if after.answered[s] > before.answered.get(s, 0))
        assert all(after.answered[s] - before.answered.get(s, 0) == 1 for s in counted)
        federation = self.campaign.scenario.federation
        if self.policy.trust == "distributed":
            total = ring_sum(self.contributed[seat, number].astype(np.uint32) for seat in counted)
            mean = mean_of_sum(total, policy=self.policy, round_number=number)
        else:
            replies = {seat: self.released[seat, number] for seat in counted if seat < self.homes} | dict(given or {})
            assert sorted(replies) == counted
            mean = mean_update([replies[seat] for seat in counted], denominator=self.policy.cohort_size)
        arrays, _ = SERVER_OPTIMIZERS[federation.server_optimizer](before.arrays, before.optimizer, mean, federation)
        for name, array in arrays.items():
            np.testing.assert_array_equal(after.arrays[name], array)
        return counted

    def unchanged(self, number: int) -> None:
        """A round left the shared arrays as they were, bit for bit, and counted nobody."""
        before, after = self.checkpoint(number - 1), self.checkpoint(number)
        assert after.answered == before.answered
        assert all(array.tobytes() == before.arrays[name].tobytes() for name, array in after.arrays.items())

    def good(self, fill: float = 0.0, **changes: np.ndarray) -> dict[str, np.ndarray]:
        """Arrays of the right names, shapes and types."""
        return {s.name: np.full(s.shape, fill, s.dtype) for s in self.policy.reply_slots(1)} | changes

    def packed(self, message: Message, arrays: Mapping[str, np.ndarray] | None = None, **fields: object) -> RecordDict:
        """A reply to a message in the right form, with these arrays and fields."""
        told = {"round": message.content["config"]["round"], "policy": self.policy.sha256} | fields
        arrays = self.good() if arrays is None else arrays
        return RecordDict({"arrays": wire.pack_arrays(arrays), "config": ConfigRecord(told)})

    def ledger(self, device: int) -> tuple[Event, ...]:
        """What a device's ledger holds."""
        with open_home(self.fleet.home(device)).ledger() as ledger:
            return ledger.history()

    def memory_bytes(self) -> int:
        """Resident bytes of the server and its SuperLink."""
        pids = [self.processes["server"].pid, live(self.fleet)["superlink"]["pid"]]
        page = os.sysconf("SC_PAGE_SIZE")
        return sum(int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * page for pid in pids)

    def _read_outboxes(self) -> None:
        while not self._stop.wait(0.3):
            for device in range(self.homes):
                address = f"file:{self.fleet.home(device)}/ledger.db?mode=ro"
                with closing(sqlite3.connect(address, uri=True)) as ledger:
                    for number, payload in ledger.execute("SELECT round, payload FROM outbox").fetchall():
                        self.released[device, number] = load(payload)


@contextmanager
def world_of(fleet: Fleet, *, homes: int) -> Iterator[World]:
    """A world that ends with the block; nothing runs in it yet."""
    world = World(fleet, homes=homes)
    try:
        yield world
    finally:
        world.close()
