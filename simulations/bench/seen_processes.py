"""Memory, CPU time and descriptors of a running program and its children, read from /proc."""

import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Seen:
    """A process at one moment.

    Attributes:
        rss_mib: Resident memory, pages shared with others included.
        pss_mib: Resident memory, each shared page divided by the number of its users.
        peak_mib: The largest resident memory it has had.
        cpu_s: CPU time since its start.
        descriptors: Open files, sockets and pipes.
        threads: Of the kernel.
    """

    pid: int
    rss_mib: float
    pss_mib: float
    peak_mib: float
    cpu_s: float
    descriptors: int = 0
    threads: int = 0


def see(pid: int) -> list[Seen]:
    """A program and all below it, itself first; what has ended meanwhile is left out."""
    return [seen for each in _family(pid) if (seen := _see(each))]


def _family(pid: int) -> Iterable[int]:
    yield pid
    for thread in _PROC.glob(f"{pid}/task/[0-9]*/children"):
        with suppress(OSError):
            for child in thread.read_text().split():
                yield from _family(int(child))


def _see(pid: int) -> Seen | None:
    folder = _PROC / str(pid)
    try:
        status, rollup = _fields(folder / "status"), _fields(folder / "smaps_rollup")
        # The name in parentheses may hold blanks; user and system ticks are fields 14 and 15.
        ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        descriptors = sum(1 for _ in (folder / "fd").iterdir())
    except OSError:
        return None
    if "VmRSS" not in status or "Pss" not in rollup:  # it has ended, nobody has asked how
        return None
    cpu_s = sum(map(int, ticks)) / _TICKS
    return Seen(
        pid,
        _mib(status["VmRSS"]),
        _mib(rollup["Pss"]),
        _mib(status["VmHWM"]),
        cpu_s,
        descriptors,
        int(status["Threads"]),
    )


def _fields(path: Path) -> dict[str, str]:
    return {name: value for name, _, value in (line.partition(":") for line in path.read_text().splitlines())}


def _mib(value: str) -> float:
    """``12345 kB`` in MiB."""
    return int(value.split()[0]) / 1024
