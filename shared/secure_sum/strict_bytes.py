"""Numbers and byte strings to bytes and back, for messages whose sender may be hostile: one form each, and no other."""

import itertools
import struct
from collections.abc import Sequence

from shared.errors import SecureSumError

MAX_SEATS = 2**20
MAX_FIELD = 2**12  # bytes of a key, a signature, a certificate, a share
LARGEST_SEAT = 2**32 - 1


def malformed(text: str) -> SecureSumError:
    """The error of a message that is none."""
    return SecureSumError(f"{text} The sender is faulty or hostile; leave it out of the round.", code="MALFORMED")


def check_seats(seats: Sequence[int]) -> None:
    """Raise unless seats are few, within range, and strictly ascending."""
    ascending = all(a < b for a, b in itertools.pairwise(seats))
    if not (len(seats) <= MAX_SEATS and ascending and all(0 <= seat <= LARGEST_SEAT for seat in seats)):
        raise malformed("seats must be distinct, ascending and within 32 bits, they are not.")


def pack_number(value: int) -> bytes:
    """A number of 32 bits."""
    return struct.pack(">I", value)


def pack_field(content: bytes) -> bytes:
    """Bytes with their length."""
    return pack_number(len(content)) + content


def pack_seats(seats: Sequence[int]) -> bytes:
    """Seats with their number."""
    return struct.pack(f">I{len(seats)}I", len(seats), *seats)


class Reader:
    """Takes a message apart from its beginning; every read checks that there is enough left.

    Args:
        content: The message, of any origin.
        tag: What it must begin with.

    Raises:
        SecureSumError: It does not (``MALFORMED``); so does every method for what is not there.
    """

    def __init__(self, content: bytes, *, tag: bytes) -> None:
        self._content, self._at = content, 0
        if self.take(len(tag)) != tag:
            raise malformed(f"a message must begin with {tag.decode()}, it does not.")

    def take(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        taken = self._content[self._at : self._at + size]
        if len(taken) != size:
            raise malformed(f"a message must have {size} more bytes at {self._at}, got {len(taken)}.")
        self._at += size
        return taken

    def number(self) -> int:
        """The next number of 32 bits."""
        return int.from_bytes(self.take(4))

    def field(self, *, limit: int = MAX_FIELD) -> bytes:
        """The next bytes with their length."""
        size = self.number()
        if size > limit:
            raise malformed(f"a field must have at most {limit} bytes, got {size}.")
        return self.take(size)

    def seats(self) -> tuple[int, ...]:
        """The next seats, checked."""
        seats = struct.unpack(f">{(count := self.count())}I", self.take(4 * count))
        check_seats(seats)
        return seats

    def count(self) -> int:
        """How many entries follow."""
        count = self.number()
        if count > MAX_SEATS:
            raise malformed(f"a message must have at most {MAX_SEATS} entries, got {count}.")
        return count

    def end(self) -> None:
        """Raise unless everything was read."""
        if self._at != len(self._content):
            raise malformed(f"a message must end at byte {self._at}, got {len(self._content)} bytes.")
