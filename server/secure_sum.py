"""The server's half of a secure sum: one round; it learns the sum of the survivors' vectors, or nothing.

Adverts, parcels, masked vectors and shares are added as they arrive; closing a stage fixes who is still in it. A device
whose message is refused, or comes too late, has dropped out; a stage that is left with too few raises ``TOO_FEW``, and
the round is void. Masked vectors are added up as they come, so that none is kept.
"""

from collections.abc import Container, Mapping
from enum import IntEnum

import numpy as np

from shared.errors import SecureSumError
from shared.secure_sum.graph import make_graph
from shared.secure_sum.masks import Words, load_key, own_mask, pair_mask, public_bytes
from shared.secure_sum.messages import Advert, Credential, Parcels, Roster, Setting, Shares, Survivors, Terms
from shared.secure_sum.shamir import is_share, join


class _Stage(IntEnum):
    ADVERTS = 1
    PARCELS = 2
    MASKED = 3
    SHARES = 4


class Collector:
    """One sum.

    Args:
        setting: Campaign, round, and length of the vectors.
        terms: The campaign's.
        credentials: Of every device that was asked, by seat; sent on to its neighbours.
        generator: Draws the graph; outside a simulation from the system's entropy.

    Guarantee:
        ``survivors_for`` gives nothing to unmask with below ``min_survivors`` or below the threshold of any device.
        ``total`` is the exact sum of the survivors' vectors modulo 2^32, or raises, as long as survivors mask as they
        should.
    """

    def __init__(
        self,
        setting: Setting,
        terms: Terms,
        *,
        credentials: Mapping[int, Credential],
        generator: np.random.Generator,
    ) -> None:
        self._setting, self._terms, self._generator = setting, terms, generator
        self._credentials = dict(credentials)
        self._stage = _Stage.ADVERTS
        self._adverts: dict[int, Advert] = {}
        self._keys: set[bytes] = set()  # of all adverts
        self._graph: dict[int, tuple[int, ...]] = {}
        self._parcels: dict[int, dict[int, bytes]] = {}  # sender -> receiver -> parcel
        self._shares: dict[int, dict[int, bytes]] = {}  # whose -> from whom -> share
        self._alive: set[int] = set()
        self._answered: set[int] = set()
        self._sum = np.zeros(setting.coordinates, dtype=np.uint32)

    @property
    def survivors(self) -> frozenset[int]:
        """Seats whose masked vectors are in the sum."""
        return frozenset(self._alive)

    def add_advert(self, seat: int, advert: Advert) -> None:
        """Take the advert of the device on a seat; SecureSumError (``ROSTER``) leaves it out."""
        self._expect(_Stage.ADVERTS)
        if seat not in self._credentials or seat in self._adverts or advert.seat != seat:
            raise SecureSumError(f"seat {seat} must be asked and advertise itself, once.", code="ROSTER")
        keys = {advert.cipher_key, advert.mask_key}
        if len(keys) < 2 or keys & self._keys:
            raise SecureSumError(f"seat {seat} must have two keys of its own, it has not.", code="ROSTER")
        self._adverts[seat] = advert
        self._keys |= keys

    def close_adverts(self) -> None:
        """Fix the roster and draw the graph; SecureSumError (``TOO_FEW``) if it has too few seats."""
        self._expect(_Stage.ADVERTS)
        degree = self._terms.degree(len(self._adverts))
        self._enough(len(self._adverts), degree, "advertised")
        self._graph = make_graph(sorted(self._adverts), degree, self._generator)
        self._stage = _Stage.PARCELS

    def roster_for(self, seat: int) -> Roster:
        """The roster as the device on a seat gets it."""
        self._expect(_Stage.PARCELS, seat, self._adverts)
        members = sorted({seat, *self._graph[seat]})
        return Roster(tuple(sorted(self._adverts)), tuple((self._adverts[m], self._credentials[m]) for m in members))

    def add_parcels(self, seat: int, parcels: Parcels) -> None:
        """Take the parcels of a device; SecureSumError (``PARCELS``) leaves it out."""
        self._expect(_Stage.PARCELS, seat, self._adverts)
        if seat in self._parcels or tuple(receiver for receiver, _ in parcels.items) != self._graph[seat]:
            raise SecureSumError(f"seat {seat} must send one parcel to every neighbour, once.", code="PARCELS")
        self._parcels[seat] = dict(parcels.items)

    def close_parcels(self) -> None:
        """Fix who may send a vector; SecureSumError (``TOO_FEW``) if too few shared."""
        self._expect(_Stage.PARCELS)
        self._enough(len(self._parcels), self._fewest(self._parcels), "shared")
        self._stage = _Stage.MASKED

    def parcels_for(self, seat: int) -> Parcels:
        """What its neighbours sent the device on a seat."""
        self._expect(_Stage.MASKED, seat, self._parcels)
        return Parcels(tuple((sender, self._parcels[sender][seat]) for sender in self._sharing(seat)))

    def add_masked(self, seat: int, vector: Words) -> None:
        """Add a masked vector to the sum; SecureSumError (``MALFORMED``, ``STAGE``) leaves the device out."""
        self._expect(_Stage.MASKED, seat, self._parcels)
        if seat in self._alive:
            raise SecureSumError(f"seat {seat} must send one vector, it sent another.", code="STAGE")
        if not (isinstance(vector, np.ndarray) and vector.dtype == np.uint32 and vector.shape == self._sum.shape):
            raise SecureSumError(
                f"a masked vector must be uint32 of shape {self._sum.shape}, it is not; leave the device out.",
                code="MALFORMED",
            )
        self._sum += vector
        self._alive.add(seat)

    def survivors_for(self, seat: int) -> Survivors:
        """Who survived, as the device on a seat gets it; the first call that succeeds ends the taking of vectors.

        Raises:
            SecureSumError: Too few survived to unmask (``TOO_FEW``); more vectors may still be added.
        """
        if self._stage == _Stage.MASKED:
            self._enough(len(self._alive), self._fewest(self._alive), "survived")
            self._stage = _Stage.SHARES
        self._expect(_Stage.SHARES, seat, self._alive)
        return Survivors(tuple(sorted(self._alive)), tuple(sorted(self._parcels.keys() - self._alive)))

    def add_shares(self, seat: int, shares: Shares) -> None:
        """Take the shares a survivor hands out; SecureSumError (``UNMASK``) does without them."""
        self._expect(_Stage.SHARES, seat, self._alive)
        whose = tuple(owner for owner, _ in shares.items)
        if seat in self._answered or whose != self._sharing(seat) or not all(is_share(s) for _, s in shares.items):
            raise SecureSumError(f"seat {seat} must hand out a share of every neighbour, once.", code="UNMASK")
        self._answered.add(seat)
        for owner, share in shares.items:
            self._shares.setdefault(owner, {})[seat] = share

    def total(self) -> Words:
        """Unmask the sum.

        Returns:
            (P,) uint32: the sum of the survivors' vectors modulo 2^32.

        Raises:
            SecureSumError: Too few shares came (``TOO_FEW``), or a wrong one (``UNMASK``).
        """
        self._expect(_Stage.SHARES)
        total = self._sum.copy()
        for seat in sorted(self._parcels):
            total -= self.left_by(seat)
        return total

    def left_by(self, seat: int) -> Words:
        """What one device leaves in the sum: a survivor its own mask, one that dropped out the masks of its pairs.

        Raises:
            SecureSumError: As ``total``.
        """
        self._expect(_Stage.SHARES, seat, self._parcels)
        context, count = self._setting.context(self._adverts.keys()), self._setting.coordinates
        secret = join(self._shares.get(seat, {}), threshold=self._terms.threshold)
        if seat in self._alive:
            return own_mask(secret, seat=seat, context=context, count=count)
        private, own = load_key(secret), self._adverts[seat]
        if public_bytes(private) != own.mask_key:
            raise SecureSumError(f"shares of seat {seat} must give its key, they do not.", code="UNMASK")
        left = np.zeros(count, dtype=np.uint32)
        for other in (other for other in self._sharing(seat) if other in self._alive):
            pair = pair_mask(private, own, self._adverts[other], context=context, count=count)
            if other < seat:
                left += pair
            else:
                left -= pair
        return left

    def _sharing(self, seat: int) -> tuple[int, ...]:
        return tuple(other for other in self._graph[seat] if other in self._parcels)

    def _fewest(self, present: Container[int]) -> int:
        """The fewest neighbours among those present that anybody who shared has."""
        return min((sum(other in present for other in self._graph[seat]) for seat in self._parcels), default=0)

    def _enough(self, count: int, neighbours: int, what: str) -> None:
        if count < self._terms.min_survivors or neighbours < self._terms.threshold:
            raise SecureSumError(
                f"at least {self._terms.min_survivors} devices, and {self._terms.threshold} neighbours of each, must "
                f"have {what}, got {count} and {neighbours}; wait for more, or take the next round.",
                code="TOO_FEW",
            )

    def _expect(self, stage: _Stage, seat: int | None = None, among: Container[int] | None = None) -> None:
        if self._stage != stage or (among is not None and seat not in among):
            raise SecureSumError(
                f"this must be at stage {stage.name} and of a device still in the sum, it is at {self._stage.name}.",
                code="STAGE",
            )
