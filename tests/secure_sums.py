"""Whole secure sums in one process, over bytes: devices drop out at any stage, and what the server saw is kept."""

import hashlib

import numpy as np
import pytest

from client.training.secure_sum import Participant
from server.secure_sum import Collector
from shared.errors import SecureSumError
from shared.secure_sum.messages import Advert, Credential, Parcels, Roster, Setting, Shares, Survivors, Terms

POLICY = "ab" * 32


def trusting(*_):
    """In place of a check of signatures."""


def entropy_of(name):
    """Bytes that depend on a name alone."""
    position = 0

    def entropy(size):
        nonlocal position
        position += 1
        return hashlib.shake_256(f"{name} {position}".encode()).digest(size)

    return entropy


class WholeSum:
    """Runs the stages one by one; every message goes through bytes, and is kept in ``seen`` as the server saw it."""

    def __init__(self, seats, terms, *, coordinates=3, round_number=1, policy=POLICY, name="", seed=0):
        self.setting = Setting(policy, round_number, coordinates)
        self.terms, self.seats, self.seen = terms, sorted(seats), []
        self.devices = {
            seat: Participant.begin(
                self.setting, seat=seat, terms=terms, sign=lambda m: b"signed", entropy=entropy_of(f"{name} {seat}")
            )
            for seat in self.seats
        }
        self.server = Collector(
            self.setting,
            terms,
            credentials={seat: Credential(f"key {seat}", b"certificate") for seat in self.seats},
            generator=np.random.default_rng(seed),
        )

    def _see(self, message):
        self.seen.append(content := message if isinstance(message, bytes) else message.to_bytes())
        return content

    def _reload(self, seat):
        device = self.devices[seat]
        self.devices[seat] = Participant.from_bytes(device.to_bytes(), entropy=device._entropy)

    def advertise(self, seats):
        for seat in seats:
            self.server.add_advert(seat, Advert.from_bytes(self._see(self.devices[seat].advert)))
        self.server.close_adverts()

    def share(self, seats):
        for seat in seats:
            self._reload(seat)
            roster = Roster.from_bytes(self.server.roster_for(seat).to_bytes())
            parcels = self.devices[seat].share(roster, verify=trusting)
            self.server.add_parcels(seat, Parcels.from_bytes(self._see(parcels)))
        self.server.close_parcels()

    def mask(self, vectors):
        for seat, vector in vectors.items():
            self._reload(seat)
            masked = self.devices[seat].mask(vector, Parcels.from_bytes(self.server.parcels_for(seat).to_bytes()))
            self._see(masked.tobytes())
            self.server.add_masked(seat, masked)

    def unmask(self, seats):
        shown = self.server.survivors_for(min(self.server.survivors, default=0)).to_bytes()
        for seat in seats:
            self._reload(seat)
            survivors = Survivors.from_bytes(shown)
            self.server.add_shares(seat, Shares.from_bytes(self._see(self.devices[seat].unmask(survivors))))
        return self.server.total()

    def run(self, vectors, *, lost=((), (), (), ())):
        """The whole sum; ``lost`` drop out before they answer at that stage."""
        stages, left = [], self.seats
        for gone in lost:
            left = [seat for seat in left if seat not in gone]
            stages.append(left)
        self.advertise(stages[0])
        self.share(stages[1])
        self.mask({seat: vectors[seat] for seat in stages[2]})
        return self.unmask(stages[3])


def refused(code, call, *arguments, **named):
    """Fail unless a call is refused with this code."""
    with pytest.raises(SecureSumError) as caught:
        call(*arguments, **named)
    assert caught.value.code == code, caught.value


def vectors_for(seats, *, coordinates=3, seed=0):
    """Vectors over the whole ring."""
    generator = np.random.default_rng(seed)
    return {seat: generator.integers(-(2**31), 2**31, coordinates) for seat in seats}


def added(vectors):
    """Their sum modulo 2^32, the slow way."""
    rows = [[int(x) for x in vector] for vector in vectors]
    return np.array([sum(column) % 2**32 for column in zip(*rows, strict=True)], dtype=np.uint32)


TEN = Terms(threshold=7, neighbours=9, min_survivors=8)
