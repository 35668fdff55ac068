"""What a waiting device costs a server: processor time, requests and memory, with a few devices and with more.

A real server and real devices over TLS on loopback, a cohort of one device more than there are: nothing happens, all of
them wait. The difference between the sizes, over the difference in devices, is what one more device costs.
"""

import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from client.training.site import resident_dataset
from shared.config import DataConfig
from shared.errors import CampaignError
from shared.progress import progress
from simulations.bench.loopback import Fleet, federation, live, make_fleet
from simulations.bench.seen_processes import Seen, see
from simulations.machine import about

DEVICES = (2, 8)
_NAME = "waiting"
_RECORDS = 5
_SCENARIO = """\
name = "{name}"

[model]
head_blocks = 0

[federation]
rounds = 1
cohort_size = {cohort}

[linear]
enabled = false

[export]
users = 0
"""
_START_S, _SETTLE_S, _POLL_S = 300.0, 10.0, 0.5
_PROGRAMS = ("supervisor", "superlink")  # of the server: itself, its children


def measure(*, rounds: int = 60, devices: Sequence[int] = DEVICES, quiet: bool = False) -> dict[str, Any]:
    """Let devices wait.

    Args:
        rounds: Seconds they are watched for, at least 10.
        devices: How many wait, two different numbers.
        quiet: No progress on stderr.

    Returns:
        ``sizes.N``: ``cpu_s_per_minute`` and ``rss_mib`` of ``supervisor`` and ``superlink``, ``requests_per_minute``
        through the front; ``per_device``: the slopes; machine, versions and commit.

    Raises:
        CampaignError: Impossible sizes, or a process did not do its part.
    """
    few, many = min(devices), max(devices)
    if not (rounds >= 10 and 1 <= few < many):
        raise CampaignError(f"two numbers of devices must wait for at least 10 s, got {list(devices)} for {rounds} s.")
    with progress(total=2, description="bench waiting", unit="size", quiet=quiet) as bar:
        found = {}
        for size in (few, many):
            found[size] = _of_size(size, seconds=rounds)
            bar.update(1)
    return {
        "mode": "a server and devices that wait, on one machine, TLS on loopback",
        "seconds": rounds,
        "sizes": {str(size): each for size, each in found.items()},
        "per_device": _slopes(found[few], found[many], more=many - few),
        **about("flwr", "grpcio", "uvicorn"),
    }


def _of_size(size: int, *, seconds: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="sv-") as place:  # short: a socket's path has 107 bytes
        folder = Path(place)
        scenario = folder / "scenario.toml"
        scenario.write_text(_SCENARIO.format(name=_NAME, cohort=size + 1), encoding="utf-8")
        users = resident_dataset(DataConfig()).users[:size]
        records = [user.fit[:_RECORDS] for user in users]
        fleet = make_fleet(folder / "f", scenario, name=_NAME, records=records, clients=size + 1)
        with federation(fleet) as processes:
            _wait_until_joined(fleet, processes)
            time.sleep(_SETTLE_S)
            server = processes["server"].pid
            before, asked, began = see(server), _requests(fleet), time.monotonic()
            time.sleep(seconds)
            after, asked_after = see(server), _requests(fleet)
            minutes = (time.monotonic() - began) / 60
    return _while_waiting(before, after, requests=asked_after - asked, minutes=minutes)


def _requests(fleet: Fleet) -> int:
    """Requests through the front so far."""
    return int(live(fleet).get("front", {}).get("requests", 0))


def _while_waiting(before: Sequence[Seen], after: Sequence[Seen], *, requests: int, minutes: float) -> dict[str, Any]:
    """What the server's programs took in these minutes; of one that began meanwhile, all."""
    cpu = dict.fromkeys(_PROGRAMS, 0.0)
    rss = dict(cpu)
    earlier = {each.pid: each.cpu_s for each in before}
    for nth, each in enumerate(after):
        program = _PROGRAMS[min(nth, 1)]
        cpu[program] += (each.cpu_s - earlier.get(each.pid, 0.0)) / minutes
        rss[program] += each.rss_mib
    return {"cpu_s_per_minute": cpu, "rss_mib": rss, "requests_per_minute": requests / minutes}


def _wait_until_joined(fleet: Fleet, processes: Mapping[str, "subprocess.Popen[bytes]"]) -> None:
    deadline = time.monotonic() + _START_S
    devices = [f"device-{number}" for number in range(fleet.devices)]
    while not all(b'"state": "waiting"' in fleet.log(name).read_bytes() for name in devices):
        ended = [name for name, process in processes.items() if process.poll() is not None]
        if ended or time.monotonic() > deadline:
            name = ended[0] if ended else "a device"
            said = fleet.log(ended[0] if ended else devices[-1]).read_text(encoding="utf-8", errors="replace")[-1000:]
            raise CampaignError(f"all devices must wait, {name} does not: {said}")
        time.sleep(_POLL_S)


def _slopes(few: Mapping[str, Any], many: Mapping[str, Any], *, more: int) -> dict[str, Any]:
    """What one device more costs."""
    found: dict[str, Any] = {
        what: {program: (many[what][program] - few[what][program]) / more for program in _PROGRAMS}
        for what in ("cpu_s_per_minute", "rss_mib")
    }
    return found | {"requests_per_minute": (many["requests_per_minute"] - few["requests_per_minute"]) / more}


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}, watched for {measured['seconds']} s"]
    named = [(f"{size} devices", each) for size, each in measured["sizes"].items()]
    for name, each in [*named, ("one device more", measured["per_device"])]:
        cpu, rss = each["cpu_s_per_minute"], each["rss_mib"]
        out.append(
            f"  {name:<16}"
            + ", ".join(
                f"{program} {cpu[program]:6.3f} CPU-s a minute {rss[program]:7.2f} MiB" for program in _PROGRAMS
            )
            + f", {each['requests_per_minute']:.1f} requests a minute"
        )
    return out
