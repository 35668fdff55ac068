"""The words of a secure sum: what a round is about, its terms, and the messages of its four stages.

    1 advert      device -> server   two public keys of this round alone, signed by the device
    2 shares      server -> device   Roster: who takes part, and the keys of the device's neighbours
                  device -> server   Parcels: shares of its two secrets, one ciphertext a neighbour
    3 mask        server -> device   Parcels: what its neighbours sent it
                  device -> server   its vector plus a mask of its own and one with every neighbour, modulo 2^32
    4 unmask      server -> device   Survivors: whose vectors arrived, whose did not
                  device -> server   Shares: of the own mask of those that did, of the pair masks of those that did not

A device has a share of each neighbour and of nobody else, itself included: ``neighbours`` shares exist of a secret, and
``threshold`` of them give it back. What this hides from whom, and what it assumes, is in docs/privacy.md.
Source: Bonawitz et al. 2017, eprint 2017/281, Figure 4, without the consistency check against a server that lies, and
with the neighbours of Bell et al. 2020, eprint 2020/704; there too a device holds no share of itself.
"""

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from shared.secure_sum.strict_bytes import (
    MAX_FIELD,
    Reader,
    check_seats,
    malformed,
    pack_field,
    pack_number,
    pack_seats,
)

KEY_BYTES = 32
MAX_COORDINATES = 2**28
_DOMAIN = b"sottovoce secure sum 1"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Terms:
    """Public constants of a campaign's sums.

    Args:
        threshold: Shares that give a secret back; more than half of ``neighbours``.
        neighbours: With how many others a device exchanges keys; all others, where a roster has no more.
        min_survivors: Vectors a sum must hold, or it is not unmasked; at least 2.

    Raises:
        ValueError: They contradict each other.
    """

    threshold: int
    neighbours: int
    min_survivors: int

    def __post_init__(self) -> None:
        if not self.neighbours / 2 < self.threshold <= self.neighbours:
            raise ValueError(
                f"threshold must be more than half of neighbours ({self.neighbours}) and no more, got {self.threshold}."
            )
        if not self.min_survivors >= 2:
            raise ValueError(f"min_survivors must be at least 2, got {self.min_survivors}: a sum of one is a vector.")

    def degree(self, count: int) -> int:
        """Neighbours of every device in a roster of ``count``: ``neighbours`` made even, or all others."""
        return min(count - 1, self.neighbours + self.neighbours % 2)


@dataclass(frozen=True)
class Setting:
    """What one sum is about; every key and signature is bound to it.

    Args:
        policy_sha256: Hash of the campaign's policy, 64 hexadecimal digits.
        round_number: From 1.
        coordinates: Length of every vector.

    Raises:
        ValueError: A value is impossible.
    """

    policy_sha256: str
    round_number: int
    coordinates: int

    def __post_init__(self) -> None:
        if not _SHA256.fullmatch(self.policy_sha256):
            raise ValueError("policy_sha256 must be 64 hexadecimal digits.")
        if not 1 <= self.round_number < 2**32:
            raise ValueError(f"round_number must be within 1..2^32 - 1, got {self.round_number}.")
        if not 1 <= self.coordinates <= MAX_COORDINATES:
            raise ValueError(f"coordinates must be within 1..{MAX_COORDINATES}, got {self.coordinates}.")

    def to_bytes(self) -> bytes:
        """Always 40 bytes."""
        return bytes.fromhex(self.policy_sha256) + pack_number(self.round_number) + pack_number(self.coordinates)

    def context(self, seats: Collection[int]) -> bytes:
        """Hash (32 bytes) of policy, round, length and sorted roster; two sums that differ in any have two."""
        return hashlib.sha256(_DOMAIN + b" context" + self.to_bytes() + pack_seats(sorted(seats))).digest()


def signed_message(setting: Setting, seat: int, cipher_key: bytes, mask_key: bytes) -> bytes:
    """What a device signs when it advertises two keys; every part has a fixed length."""
    return _DOMAIN + b" advert" + setting.to_bytes() + pack_number(seat) + cipher_key + mask_key


@dataclass(frozen=True)
class Advert:
    """Public keys of one device for one round: for the parcels it is sent, and for the masks it shares.

    Raises:
        SecureSumError: A part has another size (``MALFORMED``).
    """

    seat: int
    cipher_key: bytes
    mask_key: bytes
    signature: bytes

    def __post_init__(self) -> None:
        check_seats([self.seat])
        if not len(self.cipher_key) == len(self.mask_key) == KEY_BYTES or len(self.signature) > MAX_FIELD:
            raise malformed(f"keys must have {KEY_BYTES} bytes and a signature at most {MAX_FIELD}, they do not.")

    def to_bytes(self) -> bytes:
        """The message."""
        return b"SSA1" + pack_number(self.seat) + self.cipher_key + self.mask_key + pack_field(self.signature)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Back from bytes, or SecureSumError (``MALFORMED``)."""
        reader = Reader(content, tag=b"SSA1")
        advert = cls(reader.number(), reader.take(KEY_BYTES), reader.take(KEY_BYTES), reader.field())
        reader.end()
        return advert


@dataclass(frozen=True)
class Credential:
    """How a device is known: its public key as one OpenSSH line, and the operator's certificate; empty in simulations.

    Raises:
        SecureSumError: A part is too long, or the key is not ASCII (``MALFORMED``).
    """

    public_key: str = ""
    certificate: bytes = b""

    def __post_init__(self) -> None:
        if not (self.public_key.isascii() and max(len(self.public_key), len(self.certificate)) <= MAX_FIELD):
            raise malformed(f"a key must be ASCII and, like a certificate, of at most {MAX_FIELD} bytes, it is not.")

    def to_bytes(self) -> bytes:
        """The message."""
        return b"SSC1" + pack_field(self.public_key.encode("ascii")) + pack_field(self.certificate)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Back from bytes, or SecureSumError (``MALFORMED``)."""
        reader = Reader(content, tag=b"SSC1")
        public_key, certificate = reader.field(), reader.field()
        reader.end()
        if not public_key.isascii():
            raise malformed("a public key must be ASCII, it is not.")
        return cls(public_key.decode("ascii"), certificate)


@dataclass(frozen=True)
class Roster:
    """Who takes part in a sum, and the adverts of the receiving device and its neighbours, both by ascending seat.

    Raises:
        SecureSumError: Seats are not ascending, or a member is not of the roster (``MALFORMED``).
    """

    seats: tuple[int, ...]
    members: tuple[tuple[Advert, Credential], ...]

    def __post_init__(self) -> None:
        check_seats(self.seats)
        of_members = [advert.seat for advert, _ in self.members]
        check_seats(of_members)
        if not set(of_members) <= set(self.seats):
            raise malformed("every member must have a seat of the roster, one has not.")

    def to_bytes(self) -> bytes:
        """The message."""
        members = (pack_field(a.to_bytes()) + pack_field(c.to_bytes()) for a, c in self.members)
        return b"SSR1" + pack_seats(self.seats) + pack_number(len(self.members)) + b"".join(members)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Back from bytes, or SecureSumError (``MALFORMED``)."""
        reader = Reader(content, tag=b"SSR1")
        seats, members = reader.seats(), []
        for _ in range(reader.count()):
            advert = Advert.from_bytes(reader.field(limit=3 * MAX_FIELD))
            members.append((advert, Credential.from_bytes(reader.field(limit=3 * MAX_FIELD))))
        reader.end()
        return cls(seats, tuple(members))


@dataclass(frozen=True)
class _Items:
    """Byte strings by the seat of the other end, ascending.

    Raises:
        SecureSumError: Seats are not ascending, or an item is too long (``MALFORMED``).
    """

    items: tuple[tuple[int, bytes], ...]

    def __post_init__(self) -> None:
        check_seats([seat for seat, _ in self.items])
        if any(len(content) > MAX_FIELD for _, content in self.items):
            raise malformed(f"an item must have at most {MAX_FIELD} bytes, one has more.")

    @classmethod
    def _tag(cls) -> bytes:
        raise NotImplementedError

    def to_bytes(self) -> bytes:
        """The message."""
        items = (pack_number(seat) + pack_field(content) for seat, content in self.items)
        return self._tag() + pack_number(len(self.items)) + b"".join(items)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Back from bytes, or SecureSumError (``MALFORMED``)."""
        reader = Reader(content, tag=cls._tag())
        items = tuple((reader.number(), reader.field()) for _ in range(reader.count()))
        reader.end()
        return cls(items)


@dataclass(frozen=True)
class Parcels(_Items):
    """Ciphertexts of shares, by the seat of the other end."""

    @classmethod
    def _tag(cls) -> bytes:
        return b"SSP1"


@dataclass(frozen=True)
class Shares(_Items):
    """One share each, by the seat of the device it is a share of."""

    @classmethod
    def _tag(cls) -> bytes:
        return b"SSS1"


@dataclass(frozen=True)
class Survivors:
    """Seats of all whose shares went round: ``alive`` those whose masked vectors arrived, ``dead`` the others.

    That the two do not overlap is for the device to check.

    Raises:
        SecureSumError: Seats are not ascending (``MALFORMED``).
    """

    alive: tuple[int, ...]
    dead: tuple[int, ...]

    def __post_init__(self) -> None:
        check_seats(self.alive)
        check_seats(self.dead)

    def to_bytes(self) -> bytes:
        """The message."""
        return b"SSV1" + pack_seats(self.alive) + pack_seats(self.dead)

    @classmethod
    def from_bytes(cls, content: bytes) -> Self:
        """Back from bytes, or SecureSumError (``MALFORMED``)."""
        reader = Reader(content, tag=b"SSV1")
        survivors = cls(reader.seats(), reader.seats())
        reader.end()
        return survivors
