"""The lock of a server's folder: one process serves from it, or rolls back; it dies with its holder."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from server.folder import ServerFolder
from shared.errors import ServerError

_TRIES, _PAUSE_S = 5, 0.1  # whoever only looks holds it for a moment


@contextmanager
def alone(server: ServerFolder) -> Iterator[None]:
    """Be the one process that serves from a folder.

    Raises:
        ServerError: Another one is at it.
    """
    descriptor = os.open(server.lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for _ in range(_TRIES):
            if _take(descriptor):
                break
            time.sleep(_PAUSE_S)
        else:
            raise ServerError(f"{server.folder} must be in one process's hands, another serves from it; stop it first.")
        yield
    finally:
        os.close(descriptor)


def is_served(server: ServerFolder) -> bool:
    """Whether a process serves from a folder now."""
    try:
        descriptor = os.open(server.lock, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _take(descriptor)
    finally:
        os.close(descriptor)


def _take(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
