"""Measure a deployment on this machine: a server and three devices over TLS, each its own processes, real data.

    server alone        how long it starts, and stops on SIGTERM
    two devices wait    how long they take to join; memory and CPU time while nothing happens; one stops and comes again
    the third joins     the rounds: seconds, bytes, memory at its peak
    afterwards          what the devices keep in memory, and how long they take to stop

Wall time, because a round waits for several processes that share this machine's processors. That every round took every
device's answer is checked before anything is reported.
"""

import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from os import environ
from pathlib import Path
from typing import Any

import numpy as np

from client.training.site import resident_dataset
from server.checkpoint import last_checkpoint
from server.rounds import Round, read_rounds
from shared.config import DataConfig
from shared.datasets import Record
from shared.errors import CampaignError
from shared.flower.processes import running
from shared.progress import Progress, progress
from shared.protocol.campaign import read_campaign
from simulations.bench.loopback import Fleet, device_command, live, make_fleet, server_command
from simulations.bench.seen_processes import Seen, see
from simulations.machine import about, spread

DEVICES = 3
_NAME = "deployment"
_SCENARIO = """\
name = "{name}"

[federation]
method = "ffa-lora"
rounds = {rounds}
cohort_size = {devices}

[privacy]
max_participations = {rounds}

[linear]
enabled = false

[export]
users = 0
"""
_POLL_S = 0.1
_START_S, _ROUND_S, _STOP_S = 120.0, 180.0, 60.0
_SETTLE_S = 5.0  # after joining, before it counts as waiting
_ROLES = {"server": ("supervisor", "superlink"), "device": ("executor", "supernode")}  # itself, its children


def measure(*, rounds: int = 5, idle_s: float = 60.0, quiet: bool = False) -> dict[str, Any]:
    """Measure a federation of MovieLens users on loopback.

    Args:
        rounds: Of the campaign, at least 2: the first pays for what devices compute once.
        idle_s: How long waiting is watched.

    Returns:
        ``seconds`` of everything that is waited for, ``bytes`` per round and device, ``memory_mib`` and
        ``cpu_s_per_minute_waiting`` by role; machine, versions and commit.

    Raises:
        CampaignError: A process did not do its part in time, or a round took fewer answers than there are devices.
    """
    if not rounds >= 2:
        raise CampaignError(f"rounds must be at least 2, got {rounds}: the first pays for what is computed once.")
    with (
        tempfile.TemporaryDirectory(prefix="sv-") as place,  # short: a socket's path has 107 bytes
        progress(total=6, description="bench deployment", unit="part", quiet=quiet) as bar,
    ):
        folder = Path(place)
        scenario = folder / "scenario.toml"
        scenario.write_text(_SCENARIO.format(name=_NAME, rounds=rounds, devices=DEVICES), encoding="utf-8")
        records = users_near_the_mean(DEVICES)
        fleet = make_fleet(folder / "f", scenario, name=_NAME, records=records)
        bar.update(1)
        with ExitStack() as stack:
            found = _Deployment(fleet, stack).measure(rounds=rounds, idle_s=idle_s, bar=bar)
    return {
        "mode": f"one server and {DEVICES} devices on one machine, TLS on loopback, one thread a device; wall time",
        "rounds": rounds,
        "records": [len(each) for each in records],
        **found,
        **about("flwr", "torch", "transformers", "grpcio", "uvicorn"),
    }


def users_near_the_mean(count: int) -> list[tuple[Record, ...]]:
    """The records of so many users whose number of records is nearest to the mean."""
    users = resident_dataset(DataConfig()).users
    counts = np.array([len(user.fit) for user in users])
    nearest = np.argsort(abs(counts - counts.mean()), kind="stable")[:count]
    return [users[int(i)].fit for i in nearest]


@dataclass
class _Deployment:
    """The running processes, and what was seen of them."""

    fleet: Fleet
    stack: ExitStack
    seconds: dict[str, list[float]] = field(default_factory=dict)
    _running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def measure(self, *, rounds: int, idle_s: float, bar: Progress) -> dict[str, Any]:
        """The whole story, as told at the top."""
        self._start_server()
        self._stop("server")
        self._start_server()
        bar.update(1)
        waiting = [f"device-{n}" for n in range(DEVICES - 1)]
        for name in waiting:
            self._join(name)
        time.sleep(_SETTLE_S)
        bar.update(1)
        before, front = self._see(waiting), self._front()
        time.sleep(idle_s)
        after, front_after = self._see(waiting), self._front()
        bar.update(1)
        self._stop(waiting[-1])
        self._join(waiting[-1])
        idle_front = _minus(front_after, front)
        front = self._front()
        self._join(f"device-{DEVICES - 1}")
        front_end, server_peak = self._follow(rounds)
        devices = [f"device-{n}" for n in range(DEVICES)]
        trained = self._see(devices)
        bar.update(1)
        done = checked_rounds(self.fleet, rounds)
        for name in devices:
            self._stop(name, what="device")
        bar.update(1)
        return {
            "seconds": {name: spread(values) for name, values in self.seconds.items()}
            | {"round": spread([done[number].seconds or 0.0 for number in range(2, rounds + 1)])},
            "bytes": {
                "up per device and round": _per_device(done, "bytes_up"),
                "down per device and round": _per_device(done, "bytes_down"),
                "through the front per device and round": {
                    name: value / rounds / DEVICES for name, value in _minus(front_end, front).items()
                },
                "through the front per waiting device and minute": {
                    name: value / len(waiting) * 60 / idle_s for name, value in idle_front.items()
                },
            },
            "memory_mib": {
                "waiting": memory(after),
                "after the rounds": memory(trained),
                "peak": {**peaks(trained), **peaks({"server": server_peak})},
            },
            "cpu_s_per_minute_waiting": cpu_per_minute(before, after, idle_s),
        }

    def _start(self, name: str, command: Sequence[str]) -> None:
        environment = {**environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        entering = running(command, environment=environment, folder=self.fleet.folder, log=self.fleet.log(name))
        self._running[name] = self.stack.enter_context(entering)

    def _start_server(self) -> None:
        began = time.perf_counter()
        self._start("server", server_command(self.fleet))
        self._wait("server", lambda: live(self.fleet).get("pid") == self._running["server"].pid, _START_S)
        self._took("server start", began)

    def _join(self, name: str) -> None:
        """Start a device, until it waits for rounds."""
        log = self.fleet.log(name)
        seen = log.stat().st_size if log.exists() else 0
        began = time.perf_counter()
        self._start(name, device_command(self.fleet, int(name.rpartition("-")[2])))
        self._wait(name, lambda: _joined(log.read_bytes()[seen:]), _START_S)
        self._took("join until waiting", began)

    def _stop(self, name: str, *, what: str | None = None) -> None:
        process = self._running.pop(name)
        began = time.perf_counter()
        process.send_signal(signal.SIGTERM)
        process.wait(_STOP_S)
        self._took(f"SIGTERM to exit, {what or name.partition('-')[0]}", began)

    def _follow(self, rounds: int) -> tuple[dict[str, int], list[Seen]]:
        """Wait for the end of the campaign; the last that was seen of the front and of the server's processes."""
        server = self._running["server"]
        front, seen = self._front(), see(server.pid)
        began = time.perf_counter()

        def ended() -> bool:
            nonlocal front, seen
            front = self._front() or front
            if "first round" not in self.seconds and 1 in read_rounds(self.fleet.campaign):
                self._took("first round", began)  # its own line counts the waiting for devices
            now = see(server.pid)
            seen = now if len(now) >= len(seen) else seen
            return server.poll() is not None

        self._wait("server", ended, _ROUND_S * rounds, ends=True)
        del self._running["server"]
        return front, seen

    def _wait(self, name: str, reached: Callable[[], bool], timeout_s: float, *, ends: bool = False) -> None:
        process, deadline = self._running[name], time.monotonic() + timeout_s
        while not reached():
            over = time.monotonic() > deadline
            if over or (process.poll() is not None and not ends):
                said = self.fleet.log(name).read_text(encoding="utf-8", errors="replace")[-1000:]
                how = f"took more than {timeout_s:g} s" if over else f"ended with code {process.returncode}"
                raise CampaignError(f"{name} must do its part, it {how}: {said}")
            time.sleep(_POLL_S)

    def _took(self, what: str, began: float) -> None:
        self.seconds.setdefault(what, []).append(time.perf_counter() - began)

    def _front(self) -> dict[str, int]:
        counts: dict[str, int] = live(self.fleet).get("front", {})
        return counts

    def _see(self, devices: Sequence[str]) -> dict[str, list[Seen]]:
        return {name: see(process.pid) for name, process in self._running.items() if name in (*devices, "server")}


def _joined(log: bytes) -> bool:
    return b'"state": "waiting"' in log or b'"state": "training"' in log


def _minus(after: dict[str, int], before: dict[str, int]) -> dict[str, int]:
    return {name: value - before.get(name, 0) for name, value in after.items()}


def checked_rounds(fleet: Fleet, rounds: int) -> dict[int, Round]:
    """The rounds' lines, once it is known that each took every device's answer and something was learnt.

    Raises:
        CampaignError: It is not so.
    """
    lines = {number: line for number, line in read_rounds(fleet.campaign).items() if number >= 1}
    accepted = {number: line.accepted for number, line in lines.items()}
    wanted = dict.fromkeys(range(1, rounds + 1), fleet.devices)
    if accepted != wanted:
        rejected = {number: dict(line.rejected) for number, line in lines.items()}
        raise CampaignError(f"every round must take every answer ({wanted}), got {accepted}; rejected: {rejected}.")
    campaign = read_campaign(fleet.campaign)
    last = last_checkpoint(fleet.campaign / "checkpoints", policy_sha256=campaign.policy.sha256)
    moved = last is not None and any(not np.array_equal(last.arrays[n], campaign.start[n]) for n in last.arrays)
    if not moved:
        raise CampaignError("the rounds must change the shared arrays, they did not.")
    return lines


def _per_device(lines: dict[int, Round], what: str) -> dict[str, float]:
    return spread([getattr(line, what) / line.asked for line in lines.values()])


def memory(seen: dict[str, list[Seen]]) -> dict[str, dict[str, float]]:
    """By role the resident memory and the proportional share, the mean over programs of the same kind."""
    return {role: {"rss": _mean(each, "rss_mib"), "pss": _mean(each, "pss_mib")} for role, each in _by_role(seen)}


def peaks(seen: dict[str, list[Seen]]) -> dict[str, float]:
    """By role the largest resident memory any had."""
    return {role: max(_of(each, "peak_mib")) for role, each in _by_role(seen)}


def cpu_per_minute(before: dict[str, list[Seen]], after: dict[str, list[Seen]], elapsed_s: float) -> dict[str, float]:
    """By role the CPU-seconds in a minute of what happened between, the mean over programs of the same kind."""
    began = {role: _mean(each, "cpu_s") for role, each in _by_role(before)}
    return {role: (_mean(each, "cpu_s") - began[role]) * 60 / elapsed_s for role, each in _by_role(after)}


def _by_role(seen: dict[str, list[Seen]]) -> list[tuple[str, list[list[Seen]]]]:
    """Role -> its processes, one list a program."""
    found: dict[str, list[list[Seen]]] = {}
    for name, (itself, *children) in seen.items():
        for role, each in zip(_ROLES[name.partition("-")[0]], ([itself], children), strict=True):
            found.setdefault(role, []).append(each)
    return list(found.items())


def _of(programs: list[list[Seen]], what: str) -> list[float]:
    """The sum over each program's processes."""
    return [sum(asdict(process)[what] for process in program) for program in programs]


def _mean(programs: list[list[Seen]], what: str) -> float:
    return sum(_of(programs, what)) / len(programs)


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['rounds']} rounds, {measured['records']} records"]
    out += [
        f"  {name:<44} {v['median']:9.2f} s    [{v['low']:.2f}, {v['high']:.2f}]"
        for name, v in measured["seconds"].items()
    ]
    for name, each in measured["bytes"].items():
        out.append(f"  {name}: " + ", ".join(f"{what} {value:,.0f}" for what, value in each.items()))
    for when in ("waiting", "after the rounds"):
        out += [
            f"  {f'{role}, {when}':<44} {v['rss']:9.1f} MiB resident, {v['pss']:.1f} its share"
            for role, v in measured["memory_mib"][when].items()
        ]
    out += [f"  {f'{role}, peak':<44} {value:9.1f} MiB" for role, value in measured["memory_mib"]["peak"].items()]
    out += [
        f"  {f'{role}, waiting':<44} {value:9.2f} CPU-s a minute"
        for role, value in measured["cpu_s_per_minute_waiting"].items()
    ]
    return out
