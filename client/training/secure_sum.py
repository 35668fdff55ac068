"""The device's half of a secure sum: one round, four steps, each of them once and in this order.

    begin    makes two key pairs and a seed of this round alone
    share    checks the roster; shares seed and mask key among the neighbours
    mask     opens their parcels, masks the vector, and forgets seed and keys: what is left unmasks others, never this
    unmask   checks who survived; hands out one share of each neighbour, and forgets the rest

A refusal leaves the state as it was and reveals nothing. Whoever keeps an old state could mask twice: it is kept in
memory, or in a simulation's context, and never on disk; a device that lost it sits the round out.
"""

import os
from collections.abc import Callable
from enum import IntEnum
from typing import Self

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from numpy.typing import NDArray

from shared.errors import SecureSumError
from shared.secure_sum.masks import NONCE_BYTES, Words, load_key, own_mask, pair_mask, public_bytes, seal, unseal
from shared.secure_sum.messages import (
    KEY_BYTES,
    Advert,
    Credential,
    Parcels,
    Roster,
    Setting,
    Shares,
    Survivors,
    Terms,
    signed_message,
)
from shared.secure_sum.shamir import SHARE_BYTES, Entropy, is_share, split
from shared.secure_sum.strict_bytes import Reader, malformed, pack_field, pack_number

Verify = Callable[[int, Credential, bytes, bytes], None]  # seat, credential, message, signature; or SecureSumError

_TAG = b"SSD1"
_HALF_RING = 2**31
_MAX_STATE = 2**28  # bytes of a roster in a state


class Stage(IntEnum):
    """The step a device has taken last."""

    ADVERTISED = 1
    SHARED = 2
    MASKED = 3
    DONE = 4


class Participant:
    """One device in one sum; made by ``begin``.

    Guarantee:
        ``mask`` and ``unmask`` succeed once. After ``mask`` neither the object nor its bytes hold the seed or the
        keys. No share leaves for a neighbour named both alive and dead, nor below ``min_survivors``.
    """

    def __init__(self, setting: Setting, terms: Terms, advert: Advert, secrets: bytes, entropy: Entropy) -> None:
        self._setting, self._terms, self.advert, self._entropy = setting, terms, advert, entropy
        self._secrets = secrets  # cipher key, mask key, seed of the own mask; nothing once masked
        self._stage = Stage.ADVERTISED
        self._roster = Roster((), ())
        self._held: dict[int, bytes] = {}  # neighbour -> share of its seed, share of its mask key

    @classmethod
    def begin(
        cls,
        setting: Setting,
        *,
        seat: int,
        terms: Terms,
        sign: Callable[[bytes], bytes],
        entropy: Entropy = os.urandom,
    ) -> Self:
        """Make keys for one round and advertise them.

        Args:
            setting: Campaign, round, and length of the vector.
            seat: This device's seat.
            terms: The campaign's, from the policy the device agreed to.
            sign: Signs with the device's key.
            entropy: Source of all secrets: that many bytes, uniform and unforeseeable.

        Returns:
            The participant; ``advert`` is what the server gets.

        Raises:
            SecureSumError: The seat or the signature cannot be written (``MALFORMED``).
        """
        secrets = entropy(3 * KEY_BYTES)
        cipher_key, mask_key, _ = _parts(secrets)
        keys = public_bytes(load_key(cipher_key)), public_bytes(load_key(mask_key))
        advert = Advert(seat, *keys, sign(signed_message(setting, seat, *keys)))
        return cls(setting, terms, advert, secrets, entropy)

    def share(self, roster: Roster, *, verify: Verify) -> Parcels:
        """Check who takes part, and share the secrets among the neighbours.

        Args:
            roster: As the server sent it.
            verify: Called for every member, this device included, with seat, credential, signed message and signature;
                raises SecureSumError unless the operator certified that key for that seat and it signed.

        Returns:
            One parcel a neighbour.

        Raises:
            SecureSumError: The roster is refused (``ROSTER``), or this was done before (``STAGE``).
        """
        self._expect(Stage.ADVERTISED)
        self._check_roster(roster)
        for advert, credential in roster.members:
            message = signed_message(self._setting, advert.seat, advert.cipher_key, advert.mask_key)
            verify(advert.seat, credential, message, advert.signature)
        cipher_key, mask_key, seed = _parts(self._secrets)
        neighbours = {advert.seat: advert for advert, _ in roster.members if advert.seat != self.advert.seat}
        of_seed, of_key = (
            split(secret, seats=neighbours, threshold=self._terms.threshold, entropy=self._entropy)
            for secret in (seed, mask_key)
        )
        private, context = load_key(cipher_key), self._setting.context(roster.seats)

        def parcel(receiver: Advert) -> bytes:
            both, nonce = of_seed[receiver.seat] + of_key[receiver.seat], self._entropy(NONCE_BYTES)
            return seal(both, private, sender=self.advert, receiver=receiver, context=context, nonce=nonce)

        parcels = Parcels(tuple((seat, parcel(receiver)) for seat, receiver in neighbours.items()))
        self._roster = Roster(roster.seats, tuple((advert, Credential()) for advert in neighbours.values()))
        self._stage = Stage.SHARED
        return parcels

    def mask(self, vector: NDArray[np.int64], parcels: Parcels) -> Words:
        """Mask the vector, and forget what the masks were made of.

        Args:
            vector: (P,) int64, every value within -2^31 .. 2^31 - 1.
            parcels: What the neighbours sent this device; who is missing dropped out and shares no mask.

        Returns:
            (P,) uint32: vector plus masks modulo 2^32; uniform whatever the vector is, to all who do not know a mask.

        Raises:
            ValueError: The vector does not fit the setting or the ring.
            SecureSumError: A parcel is a stranger's or not for this sum (``PARCELS``), they are fewer than the
                threshold (``TOO_FEW``), or this was done before, or too early (``STAGE``).
        """
        self._expect(Stage.SHARED)
        count = self._setting.coordinates
        if not (isinstance(vector, np.ndarray) and vector.dtype == np.int64 and vector.shape == (count,)):
            raise ValueError(f"a vector must be int64 of shape ({count},), got another.")
        if not (vector.min() >= -_HALF_RING and vector.max() < _HALF_RING):
            raise ValueError("a vector must be within -2^31 .. 2^31 - 1, it is not; use a coarser grid.")
        held = self.opened(parcels)
        context = self._setting.context(self._roster.seats)
        _, mask_key, seed = _parts(self._secrets)
        neighbours = self._neighbours()
        masked = vector.astype(np.uint32)  # wraps: two's complement
        masked += own_mask(seed, seat=self.advert.seat, context=context, count=count)
        private = load_key(mask_key)
        for seat in held:
            pair = pair_mask(private, self.advert, neighbours[seat], context=context, count=count)
            if self.advert.seat < seat:
                masked += pair
            else:
                masked -= pair
        self._secrets, self._held, self._stage = b"", held, Stage.MASKED
        return masked

    def opened(self, parcels: Parcels) -> dict[int, bytes]:
        """The shares in the neighbours' parcels, by seat; SecureSumError as of ``mask``. The state stays as it is."""
        self._expect(Stage.SHARED)
        neighbours = self._neighbours()
        if not {seat for seat, _ in parcels.items} <= neighbours.keys():
            raise SecureSumError("parcels must be of neighbours, one is a stranger's.", code="PARCELS")
        if len(parcels.items) < self._terms.threshold:
            raise SecureSumError(
                f"at least {self._terms.threshold} neighbours must have sent parcels, got {len(parcels.items)}; "
                "the round is void.",
                code="TOO_FEW",
            )
        context = self._setting.context(self._roster.seats)
        private = load_key(_parts(self._secrets)[0])
        return {seat: self._open(parcel, private, neighbours[seat], context) for seat, parcel in parcels.items}

    def unmask(self, survivors: Survivors) -> Shares:
        """Hand out a share of each neighbour: of its own mask if its vector arrived, of its pair masks if not.

        Args:
            survivors: As the server sent it.

        Returns:
            One share for every neighbour whose parcel this device opened.

        Raises:
            SecureSumError: The lists are refused (``UNMASK``), there are too few survivors (``TOO_FEW``), or this was
                done before, or too early (``STAGE``).
        """
        self._expect(Stage.MASKED)
        alive, dead = set(survivors.alive), set(survivors.dead)
        self._check_survivors(alive, dead)
        shares = Shares(
            tuple(
                (seat, both[:SHARE_BYTES] if seat in alive else both[SHARE_BYTES:])
                for seat, both in sorted(self._held.items())
            )
        )
        self._held, self._roster, self._stage = {}, Roster((), ()), Stage.DONE
        return shares

    def to_bytes(self) -> bytes:
        """The state, secrets included: for memory, never for a disk."""
        terms = self._terms
        numbers = (terms.threshold, terms.neighbours, terms.min_survivors, self._stage)
        held = Parcels(tuple(sorted(self._held.items())))
        fields = (self.advert.to_bytes(), self._secrets, self._roster.to_bytes(), held.to_bytes())
        return b"".join(
            (_TAG, self._setting.to_bytes(), *(pack_number(n) for n in numbers), *(pack_field(f) for f in fields))
        )

    @classmethod
    def from_bytes(cls, content: bytes, *, entropy: Entropy = os.urandom) -> Self:
        """Back from bytes.

        Raises:
            SecureSumError: They are not a state (``MALFORMED``).
        """
        reader = Reader(content, tag=_TAG)
        try:
            setting = Setting(reader.take(KEY_BYTES).hex(), reader.number(), reader.number())
            terms, stage = Terms(reader.number(), reader.number(), reader.number()), Stage(reader.number())
        except ValueError as error:
            raise malformed(f"a state must be of a possible round: {error}") from None
        advert, secrets = Advert.from_bytes(reader.field(limit=_MAX_STATE)), reader.field()
        roster = Roster.from_bytes(reader.field(limit=_MAX_STATE))
        held = Parcels.from_bytes(reader.field(limit=_MAX_STATE))
        reader.end()
        if len(secrets) != (3 * KEY_BYTES if stage < Stage.MASKED else 0):
            raise malformed("a state must hold secrets until it has masked, and none after.")
        if any(len(both) != 2 * SHARE_BYTES for _, both in held.items):
            raise malformed("a state must hold two shares of a neighbour.")
        participant = cls(setting, terms, advert, secrets, entropy)
        participant._stage, participant._roster, participant._held = stage, roster, dict(held.items)
        return participant

    @property
    def masked(self) -> bool:
        """Whether the vector of this round has left."""
        return self._stage >= Stage.MASKED

    def _neighbours(self) -> dict[int, Advert]:
        return {advert.seat: advert for advert, _ in self._roster.members}

    def _expect(self, stage: Stage) -> None:
        if self._stage != stage:
            raise SecureSumError(
                f"this step must follow {stage.name}, the device has {self._stage.name}; nothing is done twice.",
                code="STAGE",
            )

    def _check_roster(self, roster: Roster) -> None:
        adverts = [advert for advert, _ in roster.members]
        degree = self._terms.degree(len(roster.seats))
        keys = {key for advert in adverts for key in (advert.cipher_key, advert.mask_key)}
        if self.advert not in adverts:
            problem = "this device's own advert as it was sent"
        elif len(roster.seats) < self._terms.min_survivors:
            problem = f"at least {self._terms.min_survivors} seats"
        elif len(adverts) - 1 != degree:
            problem = f"{degree} neighbours"
        elif not degree / 2 < self._terms.threshold <= degree:
            problem = f"so many that {self._terms.threshold} neighbours are more than half and not too many"
        elif len(keys) != 2 * len(adverts):
            problem = "two keys of its own for every member"
        else:
            return
        raise SecureSumError(f"a roster must have {problem}, it has not; this device sits out.", code="ROSTER")

    def _open(self, parcel: bytes, private: X25519PrivateKey, sender: Advert, context: bytes) -> bytes:
        both = unseal(parcel, private, sender=sender, receiver=self.advert, context=context)
        if not (is_share(both[:SHARE_BYTES]) and is_share(both[SHARE_BYTES:])):
            raise SecureSumError(f"a parcel of seat {sender.seat} must hold two shares, it does not.", code="PARCELS")
        return both

    def _check_survivors(self, alive: set[int], dead: set[int]) -> None:
        neighbours = self._neighbours().keys()
        if alive & dead:
            problem = "alive and dead apart"
        elif not alive | dead <= set(self._roster.seats):
            problem = "no strangers"
        elif self.advert.seat not in alive:
            problem = "this device alive"
        elif (alive | dead) & neighbours != self._held.keys():
            problem = "exactly those neighbours whose parcels were sent on"
        else:
            if len(alive) >= self._terms.min_survivors and len(alive & neighbours) >= self._terms.threshold:
                return
            raise SecureSumError(
                f"at least {self._terms.min_survivors} devices and {self._terms.threshold} neighbours must survive, "
                f"got {len(alive)} and {len(alive & neighbours)}; the round is void.",
                code="TOO_FEW",
            )
        raise SecureSumError(f"the lists of survivors must have {problem}; nothing is unmasked.", code="UNMASK")


def _parts(secrets: bytes) -> tuple[bytes, bytes, bytes]:
    """Cipher key, mask key, seed of the own mask."""
    return secrets[:KEY_BYTES], secrets[KEY_BYTES : 2 * KEY_BYTES], secrets[2 * KEY_BYTES :]
