"""Show how far a study has come: a table that stays in its place on a terminal, elsewhere a line a finished run."""

import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TextIO

from simulations.study.plan import Run

Status = Literal["waiting", "preparing", "running", "done", "kept", "failed"]
_REDRAW_S = 1.0


@dataclass
class Line:
    """One run as the table shows it."""

    run: Run
    status: Status = "waiting"
    began: float = 0.0
    seconds: float | None = None
    words: str = ""


def time_left(lines: Sequence[Line], *, workers: int, now: float) -> float | None:
    """Seconds until the last run ends, by how long the finished ones took; None before the first of them.

    Args:
        lines: All runs; a run's time is taken to be in proportion to its ``weight``.
        workers: How many are played at once.
        now: By the clock that ``began`` was taken from.
    """
    timed = [line for line in lines if line.seconds is not None and line.status == "done"]
    if not timed:
        return None
    rate = sum(line.seconds or 0.0 for line in timed) / sum(line.run.weight for line in timed)
    running = [max(0.0, rate * line.run.weight - (now - line.began)) for line in lines if line.status == "running"]
    waiting = [rate * line.run.weight for line in lines if line.status in ("waiting", "preparing")]
    total = sum(running) + sum(waiting)
    return max([total / workers, *running, *waiting]) if total else 0.0


def duration(seconds: float) -> str:
    """A length of time for a reader.

    Example:
        >>> duration(42.4), duration(100), duration(7300)
        ('42 s', '1 min 40 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s" if whole % 60 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class Board:
    """The live table of a study.

    Args:
        name: Of the study.
        workers: How many runs are played at once.
        quiet: Show nothing.
        stream: Where to; by default stderr.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        workers: int,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.workers, self.lines = name, workers, list[Line]()
        self._quiet, self._stream, self._clock = quiet, stream or sys.stderr, clock
        self._live = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._height, self._drawn = 0, -_REDRAW_S

    def add(self, runs: Sequence[Run]) -> list[Line]:
        """Show more runs."""
        added = [Line(run) for run in runs]
        self.lines += added
        return added

    def prepares(self, line: Line, *, over: bool = False) -> None:
        """What a run shares with others is being computed for it, or has been."""
        line.status = "waiting" if over else "preparing"
        self.draw(now=True)

    def began(self, line: Line) -> None:
        """A run has begun."""
        line.status, line.began = "running", self._clock()
        self.draw(now=True)

    def ended(self, line: Line, status: Status, words: str = "") -> None:
        """A run is over, or was there from an earlier sweep."""
        line.seconds = self._clock() - line.began if status in ("done", "failed") else None
        line.status, line.words = status, words
        if not self._live and not self._quiet:
            took = f" in {duration(line.seconds)}" if line.seconds is not None else ""
            said = f": {words}" if words else ""
            self._stream.write(
                f"{self.name}: {line.run.point}, seed {line.run.seed}: {status}{took}{said} ({self.head()})\n"
            )
            self._stream.flush()
        self.draw(now=True)

    def head(self) -> str:
        """How many runs are in which state, and the time left."""
        count = {
            status: sum(line.status == status for line in self.lines)
            for status in ("preparing", "running", "failed", "kept")
        }
        over = sum(line.status in ("done", "kept") for line in self.lines)
        words = [f"{over} of {len(self.lines)} runs done"]
        words += [f"{number} {status}" for status, number in count.items() if number and status != "kept"]
        words += [f"{count['kept']} from before"] if count["kept"] else []
        left = time_left(self.lines, workers=self.workers, now=self._clock())
        words += [f"{duration(left)} left"] if left else []
        return ", ".join(words)

    def draw(self, *, now: bool = False) -> None:
        """Draw the table over itself, at most once a second unless something happened."""
        if self._quiet or not self._live or not (now or self._clock() - self._drawn >= _REDRAW_S):
            return
        width, height = shutil.get_terminal_size()
        rows = [line[: width - 1] for line in [f"{self.name}: {self.head()}", *self._body(max(3, height - 3))]]
        up = f"\x1b[{self._height}F" if self._height else ""
        self._stream.write(up + "".join(f"\x1b[2K{row}\n" for row in rows) + "\x1b[0J")
        self._stream.flush()
        self._height, self._drawn = len(rows), self._clock()

    def _body(self, height: int) -> list[str]:
        """As many runs as fit: those that failed or are running, then the latest that ended, then the next."""
        order: dict[Status, int] = {"running": 0, "preparing": 1, "failed": 2, "done": 3, "waiting": 4, "kept": 5}
        ranked = sorted(range(len(self.lines)), key=lambda i: (order[self.lines[i].status], -self.lines[i].began, i))
        shown = sorted(ranked[:height])
        names = [f"{self.lines[i].run.point}, seed {self.lines[i].run.seed}" for i in shown]
        wide = max(map(len, names), default=0)
        return [f"  {name:<{wide}}  {self._state(self.lines[i])}" for name, i in zip(names, shown, strict=True)]

    def _state(self, line: Line) -> str:
        seconds = self._clock() - line.began if line.status == "running" else line.seconds
        took = duration(seconds) if seconds is not None else ""
        return f"{line.status:<9} {took:>12}  {line.words}".rstrip()
