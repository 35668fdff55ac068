"""Files and folders that only the owner may read (0600, 0700, whatever the umask), written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from shared.errors import StoreError
from shared.files import flush_folder, locked_folder, private_folder, temporary_of, write_private

__all__ = ["disk_errors", "locked_folder", "private_folder", "remove_private", "temporary_of", "write_private"]


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
