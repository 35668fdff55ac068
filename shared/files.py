"""Files that are whole or absent, whenever the power goes, and those that only their owner may read."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the place, flush to disk, rename: a reader sees the old file or the new one, never half of it.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_durably(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Wait until the disk has a folder's entries."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def private_folder(folder: Path) -> None:
    """Make the folder where it is missing, with its parents, each readable by the owner alone."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(mode=0o700, exist_ok=True)
        path.chmod(0o700)  # a strict umask takes the owner's own rights away
        flush_folder(path.parent)


def write_private(path: Path, content: bytes) -> None:
    """Write beside the place, flush to disk, rename; whoever calls holds the lock of the folder.

    Raises:
        OSError: The disk is full or the folder cannot be written; the old file is as it was.

    Guarantee:
        After a crash at any point the file is the old or the new one, whole; what may be left beside it is one
        temporary file, ``temporary_of`` the path, which the next write takes.
    """
    temporary = temporary_of(path)
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, 0o600)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """Where a file is written before it takes its place."""
    return path.with_name(f".{path.name}.tmp")


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait until no other process writes in the folder; the kernel gives the lock up when the process ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def append_json_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add a line to a journal, durably; what a kill left of the last one stays a line of its own.

    Raises:
        OSError: The disk is full or the file cannot be written.
        ValueError: A number is not finite.
    """
    text = json.dumps(line, allow_nan=False) + "\n"
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            text = text if file.read(1) == b"\n" else "\n" + text
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())
    flush_folder(path.parent)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal, without what a kill cut short; none where there is no file."""
    found = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        found += [line] if isinstance(line, dict) else []
    return found
