"""A small fleet of real processes for tests that play faults: made once, copied, started, held, and killed by pid."""

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from client.home.home import open_home
from server.checkpoint import Checkpoint, checkpoint_path, last_checkpoint, load_checkpoint
from server.rounds import Round, read_rounds
from shared.config import load_scenario
from shared.datasets import read
from shared.flower.processes import PROGRAMS, free_port, start, stop
from shared.protocol.campaign import read_campaign
from simulations.bench import loopback
from simulations.bench.loopback import Fleet, live, make_fleet, server_command

TESTS = Path(__file__).parent
SEED = 7
WAIT_S = 400.0  # for anything; a server thinks for a minute that a killed device is still there


def in_process(*arguments: str) -> str:
    """A command of ours without a process of its own; what it printed."""
    from sottovoce.cli import main

    with io.TextIOWrapper(io.BytesIO(), "utf-8") as said, redirect_stdout(said), redirect_stderr(said):
        code = main(list(arguments))
        said.flush()
        text = said.buffer.getvalue().decode()
    assert code == 0, (arguments, text)
    return text


def make_template(folder: Path, tiny_world, monkeypatch, *, devices: int, rounds: int, body: str = "") -> Fleet:
    """A fleet of the tiny base that nobody has started."""
    monkeypatch.setattr(loopback, "sottovoce", in_process)
    folder.mkdir(exist_ok=True)
    scenario = tiny_world(folder, body=f"linear.enabled = false\nstatistics.enabled = false\n{body}")
    text = scenario.read_text(encoding="utf-8")
    for was, now in (
        ("max_participations = 1", f"max_participations = {rounds}"),
        ("rounds = 3", f"rounds = {rounds}"),
        ("cohort_size = 4", f"cohort_size = {devices}"),
        ("export.users = 2", "export.users = 0"),
    ):
        assert was in text
        text = text.replace(was, now)
    scenario.write_text(text, encoding="utf-8")
    data = load_scenario(scenario).data
    users = read(data.format, Path(data.source)).users[:devices]
    return make_fleet(folder / "fleet", scenario, name="tiny", records=[user.fit for user in users])


@dataclass
class Playing:
    """The processes of a fleet of one's own, and what can be done to them.

    Attributes:
        fleet: The folder.
        seed: Of the noise of all devices and of a server that takes it; None is the real thing.
        environment: By ``server`` or ``device-N``, what it gets beside ours.
        processes: Those that were started, by name.
    """

    fleet: Fleet
    seed: int | None = None
    environment: dict[str, dict[str, str]] = field(default_factory=dict)
    processes: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    @property
    def holds(self) -> Path:
        """See ``tests/fault_device.py``."""
        return self.fleet.folder / "hold"

    def start(self, *names: str) -> None:
        """Start the server or devices, again or for the first time."""
        for name in names or self.everybody():
            command = self.command(name)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS.parent)}
            environment |= self.environment.get(name, {})
            log = self.fleet.log(name)
            self.processes[name] = start(command, environment=environment, folder=self.fleet.folder, log=log)

    def everybody(self) -> list[str]:
        """All names."""
        return ["server", *(f"device-{n}" for n in range(self.fleet.devices))]

    def command(self, name: str) -> list[str]:
        """What starts it."""
        if name == "server" and self.seed is None:
            program, *words = server_command(self.fleet)
            return [str(PROGRAMS / program), *words]
        if name == "server":
            return [sys.executable, str(TESTS / "seeded_server.py"), str(self.fleet.server), self.fleet.name]
        number = int(name.removeprefix("device-"))
        seed = "-" if self.seed is None else str(self.seed)
        place = [str(self.fleet.home(number)), str(self.fleet.server / "invitation")]
        words = [str(self.holds), str(number), seed, self.fleet.name, *place]
        return [sys.executable, str(TESTS / "fault_device.py"), *words]

    def hold(self, *seats: int, round_number: int) -> None:
        """Have devices stop in the middle of a round that they have not begun yet."""
        for seat in seats:
            (self.holds / f"{seat}-{round_number}").touch()

    def wait_held(self, *seats: int, round_number: int) -> None:
        """Wait until they have stopped there."""
        for seat in seats:
            self.until((self.holds / f"{seat}-{round_number}.held").exists, f"device {seat} at work")

    def let_go(self) -> None:
        """Let whoever was held go on, now and from now on."""
        for path in self.holds.iterdir():
            path.unlink()

    def kill(self, *names: str, number: int = signal.SIGKILL) -> None:
        """Kill by pid, all at once, and see them gone."""
        for name in names:
            os.kill(self.processes[name].pid, number)
        for name in names:
            self.processes[name].wait(10.0)

    def superlink(self) -> int:
        """The pid of Flower's SuperLink."""
        return int(live(self.fleet)["superlink"]["pid"])

    def children(self, name: str) -> list[int]:
        """Pids of what a process of ours has started."""
        return children(self.processes[name].pid)

    def until(self, look: Callable[[], object], what: str, *, timeout_s: float = WAIT_S):
        """Wait for something to be true; returns it."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = look()
            if found:
                return found
            time.sleep(0.1)
        raise AssertionError(f"waited {timeout_s:.0f} s in vain for {what}: {self.said()}")

    def finished(self, round_number: int) -> bool:
        """Whether a round's line is written."""
        return round_number in self.rounds()

    def wait_for(self, round_number: int) -> None:
        """Wait until a round is over."""
        self.until(lambda: self.finished(round_number), f"the end of round {round_number}")

    def wait_for_end(self) -> None:
        """Wait until the server has served its campaign."""
        server = self.processes["server"]
        self.until(lambda: server.poll() is not None, "the end of the campaign")
        assert server.returncode == 0, self.said()

    def rounds(self) -> dict[int, Round]:
        """The server's journal."""
        return dict(read_rounds(self.fleet.campaign))

    def last(self) -> Checkpoint:
        """The server's newest state."""
        policy = read_campaign(self.fleet.campaign).policy
        found = last_checkpoint(self.fleet.campaign / "checkpoints", policy_sha256=policy.sha256)
        assert found is not None
        return found

    def checkpoint(self, round_number: int) -> Checkpoint:
        """The server's state after a round."""
        return load_checkpoint(checkpoint_path(self.fleet.campaign / "checkpoints", round_number))

    @property
    def port(self) -> int:
        """The server's, which devices call."""
        return int(json.loads((self.fleet.server / "server.json").read_text(encoding="utf-8"))["port"])

    def events(self, device: int) -> list[tuple[str, int]]:
        """What a device's ledger says of rounds; opening it verifies every event, the anchor and the sums."""
        home = open_home(self.fleet.home(device))
        with home.ledger(round_running=True) as ledger:
            events = [(event.kind, event.round_number) for event in ledger.history() if event.round_number]
            [standing] = ledger.consents()
        assert standing.spent == len([kind for kind, _ in events if kind == "spend"])
        assert standing.released == len([kind for kind, _ in events if kind == "release"])
        assert standing.spent >= standing.released  # Σ cost ≥ releases
        return events

    def service(self, device: int) -> dict | None:
        """What a device's service says of itself."""
        from client.service.control import control_client
        from shared.errors import StoreError

        try:
            with control_client(self.fleet.home(device)) as owner:
                return dict(owner.status()["service"]) if owner else None
        except StoreError:
            return None

    def state(self, device: int) -> str | None:
        """In one word; None where no service runs."""
        found = self.service(device)
        return None if found is None else str(found["state"])

    def said(self) -> str:
        """The ends of all logs."""
        ends = {path.stem: path.read_text(errors="replace")[-1500:] for path in self.fleet.log("x").parent.iterdir()}
        return "\n".join(f"--- {name}\n{end}" for name, end in sorted(ends.items()))


@contextmanager
def playing(template: Fleet, folder: Path, *, seed: int | None = SEED) -> Iterator[Playing]:
    """A copy of a fleet in a new folder; what was started there is ended with the block."""
    shutil.copytree(template.folder, folder, symlinks=True)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as for a shell's background job; what we start inherits it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    made = Playing(Fleet(folder, template.scenario, template.name, template.devices), seed)
    made.holds.mkdir(exist_ok=True)
    move_to_port(made.fleet, free_port())
    with ExitStack() as stack:
        stack.callback(lambda: [stop(process) for process in made.processes.values()])
        yield made


def move_to_port(fleet: Fleet, port: int) -> None:
    """Where a copied server listens, in its settings and its invitation."""
    for path in (fleet.server / "server.json", fleet.server / "invitation" / "server.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(settings | {"port": port}) + "\n", encoding="utf-8")


def children(pid: int) -> list[int]:
    """Pids of a process's children."""
    tasks = Path(f"/proc/{pid}/task")
    return [int(child) for task in tasks.iterdir() for child in (task / "children").read_text().split()]


def alive(pids: Sequence[int]) -> list[int]:
    """Those that run still; a zombie does not."""
    running = []
    for pid in pids:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if stat.rpartition(")")[2].split()[0] != "Z":
            running.append(pid)
    return running


def node_ids(fleet: Fleet) -> set[int]:
    """The numbers under which Flower knows the devices."""
    path = fleet.server / "state" / "superlink.db"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return {row[0] for row in database.execute("SELECT node_id FROM node WHERE status != 'unregistered'")}
