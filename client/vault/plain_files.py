"""Read a file that must be nothing but a file of its own: no link, no pipe, no device, no other folder's.

It is opened once and read through that descriptor, so that what takes its place later changes nothing.
"""

import errno
import os
import stat
from pathlib import Path

from shared.errors import HeadError


def read_plain(folder: Path, name: str, *, limit: int) -> bytes | None:
    """At most so many bytes of a file that lies directly in a folder; None where there is none.

    Args:
        folder: Chosen by whoever calls; it may be reached through links.
        name: Of the file, without a separator.
        limit: Bytes to read; give one more than wanted to see whether a file is longer.

    Raises:
        HeadError: The name leads elsewhere, it is a symbolic or a hard link, no regular file, or unreadable.
    """
    path = folder / name
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise HeadError(f"a file must lie directly in {folder}, got the name {name!r}; export or copy it again.")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        linked = error.errno == errno.ELOOP
        problem = "a symbolic link" if linked else (error.strerror or "an unreadable file")
        raise HeadError(f"{path} must be a file of its own, got: {problem}; copy the file itself there.") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise HeadError(f"{path} must be a regular file, got something else; copy the file itself there.")
        if found.st_nlink != 1:
            raise HeadError(f"{path} must be a file of its own, got one with {found.st_nlink} names; copy it.")
        with open(descriptor, "rb", closefd=False) as file:
            return file.read(limit)
    finally:
        os.close(descriptor)
