"""Files and folders that only the owner may read (0600, 0700, whatever the umask), written whole or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from shared.errors import StoreError
from shared.files import flush_folder


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
        temporary file, which the next write takes and ``remove_private`` removes.
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


def remove_private(path: Path) -> bool:
    """Overwrite a small secret and remove it, with what a crash left of writing it.

    Returns:
        Whether there was anything. A disk that never writes in place may keep the old blocks all the same.
    """
    found = False
    for place in (temporary_of(path), path):
        try:
            with place.open("r+b") as file:
                file.write(bytes(place.stat().st_size))
                file.flush()
                os.fsync(file.fileno())
        except FileNotFoundError:
            continue
        place.unlink()
        found = True
    if found:
        flush_folder(path.parent)
    return found


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


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """What the disk says, as the error a command prints on one line."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            f"{path} must be on a disk with room that its owner may read and write, got: {error.strerror or error}; "
            "free space or mend the permissions, then try again."
        ) from error
