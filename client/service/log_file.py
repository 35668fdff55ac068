"""A log file of bounded size that only its owner reads, and that others may rotate too."""

import logging
import os
from pathlib import Path
from types import TracebackType

LIMIT_BYTES = 1_000_000
KEPT = 3


class LogFile(logging.Handler):
    """Writes lines to a file; when it is full it becomes ``….1``, that one ``….2``, and the oldest goes.

    Whoever moves the file away, as logrotate does, or cuts it to nothing, loses no line: the next one goes to the file
    of that name. A disk that takes nothing loses lines, and stops nothing.

    Args:
        path: Of the file; made if missing, 0600.
        limit_bytes: Of each.
        kept: Old ones, beside it.
    """

    def __init__(self, path: Path, *, limit_bytes: int = LIMIT_BYTES, kept: int = KEPT) -> None:
        super().__init__()
        self._path, self._limit_bytes, self._kept = path, limit_bytes, kept
        self._descriptor = -1
        self._open()

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; an error of the disk is swallowed."""
        line = f"{self.format(record)}\n".encode(errors="replace")[-self._limit_bytes :]
        try:
            size_bytes = self._here()
            if size_bytes and size_bytes + len(line) > self._limit_bytes:
                self._turn()
            os.write(self._descriptor, line)
        except OSError:
            return

    def close(self) -> None:
        """Give the file up."""
        self._shut()
        super().close()

    def __enter__(self) -> "LogFile":
        """For a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End of the block."""
        self.close()

    def _open(self) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        self._descriptor = os.open(self._path, flags, 0o600)
        os.fchmod(self._descriptor, 0o600)

    def _shut(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _here(self) -> int:
        """Be at the file of that name; its size."""
        if self._descriptor >= 0:
            ours = os.fstat(self._descriptor)
            try:
                named = self._path.stat(follow_symlinks=False)
            except FileNotFoundError:
                named = None
            if named is not None and (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino):
                return ours.st_size
            self._shut()
        self._open()
        return os.fstat(self._descriptor).st_size

    def _turn(self) -> None:
        self._shut()
        for number in range(self._kept, 0, -1):
            before = self._path if number == 1 else self._old(number - 1)
            if before.exists():
                before.replace(self._old(number))
        self._open()

    def _old(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")
