"""Show how far long work has come, on stderr: a bar on a terminal, elsewhere a plain line now and then."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

SHORT_WORK_S = 2.0  # work that ends sooner shows nothing
LINE_EVERY_S = 10.0  # where there is no terminal, a log should not fill with lines


class Progress(Protocol):
    """What ``progress`` hands out."""

    def update(self, n: int = 1, /) -> object:
        """Say that ``n`` more units are done; 0 is allowed and only refreshes the display."""


def track(
    items: Iterable[T], *, description: str, total: int | None = None, unit: str = "it", quiet: bool = False
) -> Iterator[T]:
    """Pass ``items`` on, showing how many have been worked through.

    Args:
        items: What to go through, once.
        description: What the work is, in a word or two.
        total: Number of items; by default ``len(items)`` where there is one.
        unit: Name of one item.
        quiet: Show nothing at all.

    Returns:
        The items, in their order.

    Example:
        >>> sum(track([1, 2, 3], description="adding"))
        6
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(total=total, description=description, unit=unit, quiet=quiet) as bar:
        for item in items:
            yield item
            bar.update(1)


@contextmanager
def progress(
    *,
    total: int | None,
    description: str,
    unit: str = "it",
    quiet: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Progress]:
    """Show the progress of work that reports itself by ``update``.

    Args:
        total: Units to be done; None where that is not known, then no time left is shown.
        description: What the work is, in a word or two.
        unit: Name of one unit, shown on a terminal.
        quiet: Show nothing at all.
        clock: Seconds that only grow, for the plain lines.

    Returns:
        A context manager that gives an object with ``update(n)``.

    Guarantee:
        Nothing is written to stdout, and nothing at all for work that ends within two seconds.
    """
    if quiet or _is_terminal():
        tqdm.monitor_interval = 0  # its watchdog thread would outlive the bar, and every update looks at the clock
        with tqdm(
            total=total,
            desc=description,
            unit=unit,
            disable=quiet,
            delay=SHORT_WORK_S,
            miniters=1,
            dynamic_ncols=True,
        ) as bar:
            yield bar
        return
    lines = _Lines(description=description, total=total, stream=sys.stderr, clock=clock)
    try:
        yield lines
    except BaseException:
        lines.close(stopped=True)
        raise
    lines.close(stopped=False)


def _is_terminal() -> bool:
    """Whether stderr is a terminal that knows its width; on one that does not, a bar would be drawn 0 wide."""
    if not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):
        return True


@dataclass
class _Lines:
    """Progress as whole lines, for logs and pipes."""

    description: str
    total: int | None
    stream: TextIO
    clock: Callable[[], float]
    done: int = 0
    start_s: float = field(init=False)
    next_line_s: float = field(init=False)

    def __post_init__(self) -> None:
        self.start_s = self.clock()
        self.next_line_s = self.start_s + SHORT_WORK_S

    def update(self, n: int = 1) -> None:
        self.done += n
        now_s = self.clock()
        # The last unit is left to close(), so that the end is told once.
        if now_s >= self.next_line_s and self.done != self.total:
            self.next_line_s = now_s + LINE_EVERY_S
            self._write(now_s - self.start_s, state="")

    def close(self, *, stopped: bool) -> None:
        gone_s = self.clock() - self.start_s
        if gone_s >= SHORT_WORK_S:
            self._write(gone_s, state="stopped at " if stopped else "done, ")

    def _write(self, gone_s: float, *, state: str) -> None:
        count = f"{self.done}" if self.total is None else f"{self.done}/{self.total}"
        line = f"{self.description}: {state}{count}, {_duration(gone_s)} gone"
        if not state and self.total is not None and 0 < self.done < self.total:
            line += f", about {_duration(gone_s * (self.total - self.done) / self.done)} left"
        print(line, file=self.stream, flush=True)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
