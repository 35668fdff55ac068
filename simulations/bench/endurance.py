"""Measure whether a deployment grows: memory, open files and disk of a server and two devices over many rounds.

A real server and real devices, each its own processes, over TLS on loopback; a linear head, so that a round is short
and what is measured is what stays from one round to the next. Every process is looked at after every round.
"""

import math
import os
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from client.training.site import resident_dataset
from server.rounds import Round, read_rounds
from shared.config import DataConfig
from shared.errors import CampaignError
from shared.progress import Progress, progress
from simulations.bench.deployment import checked_rounds
from simulations.bench.loopback import Fleet, federation, make_fleet
from simulations.bench.seen_processes import see
from simulations.machine import about, spread

DEVICES = 2
_NAME = "endurance"
_RECORDS = 20  # a device
_SCENARIO = """\
name = "{name}"

[model]
head_blocks = 0

[federation]
rounds = {rounds}
cohort_size = {devices}

[privacy]
max_participations = {rounds}

[linear]
enabled = false

[export]
users = 0
"""
_POLL_S = 0.2
_ROUND_S, _START_S = 300.0, 900.0
_WARM_UP = 0.2  # of the rounds: caches fill, torch is loaded
_BLOCKS = 10
_PROGRAMS = {"server": ("supervisor", "superlink"), "device": ("executor", "supernode")}  # itself, its children
_FEWEST = 10


@dataclass
class Course:
    """One number after every round.

    Attributes:
        rounds: Numbers of the rounds (n,).
        values: What was seen after each (n,).
    """

    rounds: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def add(self, number: int, value: float) -> None:
        """What was seen after a round."""
        self.rounds.append(number)
        self.values.append(value)

    def growth(self) -> dict[str, float]:
        """How it grew once it was warm.

        Returns:
            ``first`` and ``last``: means of the first and the last block of the warm rounds; ``per_100_rounds``, a line
            through the means of all blocks, and the ends ``low`` and ``high`` of its 95 % interval; ``peak``.

        Source:
            Batch means (Law and Kelton, Simulation Modeling and Analysis, section 9.5.3): what is seen after one round
            is like what was seen after the one before, so that single rounds would make the interval too narrow.
        """
        rounds, values = np.array(self.rounds, dtype=np.float64), np.array(self.values)
        warm = rounds > _WARM_UP * rounds.max()
        blocks = [
            (numbers.mean(), seen.mean())
            for numbers, seen in zip(
                np.array_split(rounds[warm], _BLOCKS), np.array_split(values[warm], _BLOCKS), strict=True
            )
            if len(seen)
        ]
        at, means = np.array(blocks).T
        centred = at - at.mean()
        slope = float(centred @ means / (centred @ centred))
        residuals = means - means.mean() - slope * centred
        error = math.sqrt(float(residuals @ residuals) / (len(at) - 2) / float(centred @ centred))
        half = float(scipy.stats.t.ppf(0.975, len(at) - 2)) * error
        return {
            "first": float(means[0]),
            "last": float(means[-1]),
            "per_100_rounds": 100 * slope,
            "low": 100 * (slope - half),
            "high": 100 * (slope + half),
            "peak": float(values.max()),
        }


def measure(*, rounds: int = 200, quiet: bool = False) -> dict[str, Any]:
    """Serve a campaign of many rounds and watch what grows.

    Args:
        rounds: Of the campaign, at least 10.
        quiet: No progress on stderr.

    Returns:
        ``rss_mib``, ``descriptors`` and ``threads`` by program, ``disk_kib`` by folder, each as ``Course.growth``;
        ``seconds`` of a round; machine, versions and commit.

    Raises:
        CampaignError: Too few rounds are asked for, a process ended, or a round took fewer answers than there are
            devices.
    """
    if not rounds >= _FEWEST:
        raise CampaignError(f"rounds must be at least {_FEWEST}, got {rounds}: a slope needs points.")
    with tempfile.TemporaryDirectory(prefix="sv-") as place:  # short: a socket's path has 107 bytes
        folder = Path(place)
        scenario = folder / "scenario.toml"
        scenario.write_text(_SCENARIO.format(name=_NAME, rounds=rounds, devices=DEVICES), encoding="utf-8")
        users = [user for user in resident_dataset(DataConfig()).users if len(user.fit) >= _RECORDS][:DEVICES]
        fleet = make_fleet(folder / "f", scenario, name=_NAME, records=[user.fit[:_RECORDS] for user in users])
        with (
            progress(total=rounds, description="bench endurance", unit="round", quiet=quiet) as bar,
            federation(fleet) as processes,
        ):
            courses = _watch(fleet, processes, rounds=rounds, bar=bar)
        done = checked_rounds(fleet, rounds)
    growing = {kind: {name: course.growth() for name, course in each.items()} for kind, each in courses.items()}
    return {
        "mode": f"a server and {DEVICES} devices on one machine, TLS on loopback; linear head, {_RECORDS} records each",
        "rounds": rounds,
        "warm_up": _WARM_UP,
        **growing,
        "seconds": _seconds(done.values()),
        **about("flwr", "torch", "grpcio", "uvicorn"),
    }


def _watch(
    fleet: Fleet, processes: Mapping[str, "subprocess.Popen[bytes]"], *, rounds: int, bar: Progress
) -> dict[str, dict[str, Course]]:
    """What every program and folder was like after each round, until the last is there."""
    courses: dict[str, dict[str, Course]] = {"rss_mib": {}, "descriptors": {}, "threads": {}, "disk_kib": {}}
    seen, deadline = 0, time.monotonic() + _START_S
    while seen < rounds:
        number = max(read_rounds(fleet.campaign), default=0)
        if number > seen:
            bar.update(number - seen)
            seen, deadline = number, time.monotonic() + _ROUND_S
            for kind, name, value in _look(fleet, processes):
                courses[kind].setdefault(name, Course()).add(number, value)
        ended = [name for name, process in processes.items() if process.poll() is not None]
        if time.monotonic() > deadline or (ended and seen < rounds):
            what = f"{ended[0]} ended" if ended else "no further round ended in time"
            said = fleet.log(ended[0] if ended else "server").read_text(encoding="utf-8", errors="replace")[-1000:]
            raise CampaignError(f"{rounds} rounds must be served, {what} after round {seen}: {said}")
        time.sleep(_POLL_S)
    return courses


def _look(fleet: Fleet, processes: Mapping[str, "subprocess.Popen[bytes]"]) -> list[tuple[str, str, float]]:
    """(kind, name, value) of everything that may grow; programs of one kind are told apart by their number."""
    found: list[tuple[str, str, float]] = []
    for name, process in processes.items():
        family = see(process.pid)
        for program, each in zip(_PROGRAMS[name.partition("-")[0]], (family[:1], family[1:]), strict=True):
            label = f"{program} {name.partition('-')[2]}".strip()
            if each:
                found.append(("rss_mib", label, sum(one.rss_mib for one in each)))
                found.append(("descriptors", label, float(sum(one.descriptors for one in each))))
                found.append(("threads", label, float(sum(one.threads for one in each))))
    places = {"server": fleet.server} | {f"home {device}": fleet.home(device) for device in range(fleet.devices)}
    for name, folder in tuple(places.items()):
        places |= {f"{name}/{entry.name}": entry for entry in folder.iterdir() if _may_grow(entry)}
    places |= {f"said by {name}": fleet.log(name) for name in processes}
    return found + [("disk_kib", name, _size_bytes(path) / 1024) for name, path in places.items()]


def _may_grow(entry: Path) -> bool:
    """Whether something in a home or a server's folder is worth a line of its own."""
    return entry.is_dir() or entry.name.startswith(("ledger.db", "log"))


def _size_bytes(path: Path) -> int:
    """Bytes of a file, or of all below a folder; what goes away meanwhile counts nothing."""
    if not path.is_dir():
        return path.stat().st_size if path.is_file() else 0
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                total += (Path(folder) / name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def _seconds(done: Iterable[Round]) -> dict[str, float]:
    return spread([line.seconds for line in done if line.seconds is not None])


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['rounds']} rounds of {measured['seconds']['median']:.1f} s"]
    for kind, unit in (("rss_mib", "MiB"), ("descriptors", "open"), ("threads", ""), ("disk_kib", "KiB")):
        out += [
            f"  {name:<20} {g['first']:9.1f} -> {g['last']:9.1f} {unit:<5} {g['per_100_rounds']:+9.2f} "
            f"[{g['low']:+.2f}, {g['high']:+.2f}] per 100 rounds"
            for name, g in measured[kind].items()
        ]
    return out
