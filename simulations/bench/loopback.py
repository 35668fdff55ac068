"""A real federation on this machine: a server and a few devices, each its own processes, through the typed commands.

For measurements and whole-system tests. Everything listens on loopback; every process is ended with the block that
started it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.datasets.records import Record
from shared.errors import CampaignError
from shared.files import private_folder
from shared.flower.processes import free_port, running

ADDRESS = "127.0.0.1"
_UNTIL = "2099-12-31"
_COMMAND_S = 300.0
_FIELDS = ("text", "target", "item", "timestamp")  # of ratings


@dataclass(frozen=True)
class Fleet:
    """A server's folder, its campaign and its devices' homes.

    Attributes:
        folder: Holds ``server``, ``homes/N``, ``data/N`` and ``logs``.
        scenario: What the campaign was made of.
        name: The campaign's.
        devices: How many homes there are.
    """

    folder: Path
    scenario: Path
    name: str
    devices: int

    @property
    def server(self) -> Path:
        """The server's folder."""
        return self.folder / "server"

    @property
    def campaign(self) -> Path:
        """The campaign's folder, where its checkpoints lie."""
        return self.server / "campaigns" / self.name

    def home(self, device: int) -> Path:
        """A device's home."""
        return self.folder / "homes" / str(device)

    def log(self, who: str) -> Path:
        """What a process said."""
        return self.folder / "logs" / f"{who}.log"


def make_fleet(
    folder: Path, scenario: Path, *, name: str, records: Sequence[Sequence[Record]], clients: int | None = None
) -> Fleet:
    """Make a server, enrol a device for each list of records, and have each owner agree to the campaign.

    Args:
        folder: A new folder; what must be short in it is the path of a socket.
        scenario: Its ``name`` is ``name``.
        records: One list a device, which becomes its folder of JSONL.
        clients: Devices the campaign is for, where others will be enrolled beside these.

    Raises:
        CampaignError: A command failed; the message is the command's own.
    """
    fleet = Fleet(folder, scenario, name, len(records))
    for made in (fleet.folder / "logs", fleet.folder / "homes"):
        private_folder(made)
    server = ["--server", str(fleet.server)]
    sottovoce("server", "init", str(scenario), "--address", ADDRESS, "--port", str(free_port()),
              "--clients", str(clients or len(records)), "--quiet", *server)  # fmt: skip
    invitation = fleet.server / "invitation"
    for device, rows in enumerate(records):
        data = folder / "data" / str(device)
        data.mkdir(parents=True)
        lines = [json.dumps({field: getattr(row, field) for field in _FIELDS}) for row in rows]
        (data / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        home = ["--home", str(fleet.home(device))]
        sottovoce("client", "init", "--keystore", "file", "--source", str(data), "--format", "jsonl",
                  "--columns", ",".join(f"{field}={field}" for field in _FIELDS), *home)  # fmt: skip
        sottovoce("server", "enrol", str(fleet.home(device) / "device.pub"), "--name", f"device-{device}", *server)
        sottovoce("client", "consent", str(invitation / "campaigns" / name), "--operator",
                  str(invitation / "operator.pub"), "--until", _UNTIL, "--yes", *home)  # fmt: skip
    return fleet


def sottovoce(*arguments: str) -> str:
    """Run one command to its end; returns what it printed.

    Raises:
        CampaignError: It failed.
    """
    command = [sys.executable, "-m", "sottovoce.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_COMMAND_S)
    if done.returncode:
        raise CampaignError(f"{' '.join(arguments[:2])} must succeed, got exit code {done.returncode}: {done.stderr}")
    return done.stdout


def server_command(fleet: Fleet) -> list[str]:
    """What the operator types."""
    place = ["--server", str(fleet.server), "--host", ADDRESS]
    return ["sottovoce", "server", "run", str(fleet.scenario), *place, "--no-holdout"]


def device_command(fleet: Fleet, device: int) -> list[str]:
    """What starts a device's service."""
    invitation = str(fleet.server / "invitation")
    return ["sottovoce", "client", "join", invitation, "--home", str(fleet.home(device))]


@contextmanager
def federation(
    fleet: Fleet,
    *,
    server: Callable[[Fleet], Sequence[str]] = server_command,
    device: Callable[[Fleet, int], Sequence[str]] = device_command,
) -> Iterator[dict[str, "subprocess.Popen[bytes]"]]:
    """The server and all devices, running; by name ``server`` and ``device-N``."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with ExitStack() as stack:

        def start(who: str, command: Sequence[str]) -> "subprocess.Popen[bytes]":
            entering = running(command, environment=environment, folder=fleet.folder, log=fleet.log(who))
            return stack.enter_context(entering)

        processes = {"server": start("server", server(fleet))}
        processes |= {f"device-{n}": start(f"device-{n}", device(fleet, n)) for n in range(fleet.devices)}
        yield processes


def wait_for_end(fleet: Fleet, processes: dict[str, "subprocess.Popen[bytes]"], *, timeout_s: float) -> None:
    """Wait until the server has served its campaign.

    Raises:
        CampaignError: It failed or took longer; the message holds the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    while (code := processes["server"].poll()) is None and time.monotonic() < deadline:
        time.sleep(0.2)
    if code != 0:
        said = fleet.log("server").read_text(encoding="utf-8", errors="replace")[-2000:]
        raise CampaignError(f"the server must end with exit code 0 within {timeout_s:g} s, got {code}: {said}")


def live(fleet: Fleet) -> dict[str, Any]:
    """What the running server last wrote down of itself; empty before the first time."""
    try:
        found: dict[str, Any] = json.loads((fleet.server / "live.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return found
