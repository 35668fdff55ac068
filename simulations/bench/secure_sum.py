"""Time a secure sum: what a device and a dropout cost, and how many bytes go round, by length of vector and group.

CPU-time of one thread (``time.process_time``). In every group a few devices are timed at every stage, signatures and
certificates included, and a few others drop out after they shared. All others take part for real, with one saving:
masks between two devices that are neither timed nor lost cancel in the sum and are left out. Every sum must be exact.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import client.training.secure_sum
from client.training.secure_sum import Participant
from server.secure_sum import Collector
from shared.errors import CampaignError
from shared.progress import progress
from shared.protocol.enrolment import certify_device, check_certificate, check_device_signature, sign_as_device
from shared.secure_sum import masks
from shared.secure_sum.graph import make_terms
from shared.secure_sum.messages import Advert, Credential, Setting, Terms
from simulations.machine import about, spread

COUNTS = (10_000, 100_000, 1_000_000)
GROUPS = (10, 50, 100, 943)  # the last: the users of ml-100k
SURVIVORS, COLLUDERS = 0.8, 0.1  # shares of a group
STAGES = ("advert", "share", "mask", "unmask")

_Answer = TypeVar("_Answer")


def measure(
    *, rounds: int = 5, counts: Sequence[int] = COUNTS, groups: Sequence[int] = GROUPS, quiet: bool = False
) -> dict[str, Any]:
    """Measure sums over every length and group.

    Args:
        rounds: Devices timed in every sum, and dropouts as far as the terms allow.
        counts: Lengths of a vector.
        groups: Devices of a sum.
        quiet: Show no progress.

    Returns:
        ``sums.<group>.<count>`` with ``device_ms`` by stage and in all, ``bytes`` up and down, ``server_ms`` for a
        dropout, a survivor and the whole; ``terms.<group>``; machine, versions, commit.

    Raises:
        CampaignError: A sum is not exact.
    """
    sums: dict[str, dict[str, Any]] = {}
    with progress(total=len(groups) * len(counts), description="bench secure-sum", unit="sum", quiet=quiet) as bar:
        for group in groups:
            people = _People(group)
            for count in counts:
                sums.setdefault(str(group), {})[str(count)] = _Sum(people, count, rounds).measure()
                bar.update(1)
    return {
        "mode": "one thread, CPU-time; signatures and certificates checked",
        "rounds": rounds,
        "survivors": SURVIVORS,
        "colluders": COLLUDERS,
        "terms": {str(group): vars(_terms(group)) for group in groups},
        "sums": sums,
        **about("cryptography", "numpy"),
    }


def _terms(group: int) -> Terms:
    return make_terms(group, min_survivors=math.ceil(SURVIVORS * group), colluders=math.floor(COLLUDERS * group))


class _People:
    """Enrolled devices of one operator."""

    def __init__(self, group: int) -> None:
        operator = Ed25519PrivateKey.generate()
        self.operator, self.group = operator.public_key(), group
        self.keys = {seat: ec.generate_private_key(ec.SECP384R1()) for seat in range(group)}
        self.credentials = {}
        for seat, key in self.keys.items():
            line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
            self.credentials[seat] = Credential(line, certify_device(operator, seat=seat, public_key=line))

    def verify(self, seat: int, credential: Credential, message: bytes, signature: bytes) -> None:
        """What a real device checks of every neighbour."""
        key = credential.public_key
        check_certificate(self.operator, seat=seat, public_key=key, certificate=credential.certificate)
        check_device_signature(key, message, signature)


class _Sum:
    """One sum, and what was timed of it."""

    def __init__(self, people: _People, count: int, rounds: int) -> None:
        self.people, self.count, terms = people, count, _terms(people.group)
        self.setting = Setting("0" * 64, 1, count)
        self.server = Collector(
            self.setting, terms, credentials=people.credentials, generator=np.random.default_rng(people.group)
        )
        order = [int(seat) for seat in np.random.default_rng(people.group + 1).permutation(people.group)]
        self.lost = set(order[: min(rounds, people.group - terms.min_survivors)])
        self.timed = set(order[len(self.lost) :][:rounds])
        self.terms, self.devices = terms, dict[int, Participant]()
        self.ms: dict[int, dict[str, float]] = {seat: {} for seat in self.timed}
        self.up, self.down = dict.fromkeys(self.timed, 0), dict.fromkeys(self.timed, 0)

    def measure(self) -> dict[str, Any]:
        expected = self._take_part()
        server_ms: dict[str, list[float]] = {
            what: [_milliseconds(lambda seat=seat: self.server.left_by(seat))[1] for seat in sorted(seats)]  # type: ignore[misc]
            for what, seats in (("dropout", self.lost), ("survivor", self.timed))
        }
        total, whole = _milliseconds(self.server.total)
        if not np.array_equal(total, expected):
            raise CampaignError(f"a sum of {self.people.group} vectors of {self.count} must be exact, it is not.")
        return {
            "device_ms": {stage: spread([self.ms[seat][stage] for seat in self.timed]) for stage in STAGES}
            | {"all": spread([sum(self.ms[seat].values()) for seat in self.timed])},
            "server_ms": {what: spread(values) for what, values in server_ms.items()} | {"all": whole},
            "bytes": {"up": max(self.up.values()), "down": max(self.down.values()), "vector": 4 * self.count},
            "lost": len(self.lost),
            "exact": True,
        }

    def _take_part(self) -> masks.Words:
        """All stages up to the shares; what the sum must be."""
        for seat in range(self.people.group):
            self.devices[seat] = self._timed("advert", seat, lambda seat=seat: self._begin(seat))  # type: ignore[misc]
            self.server.add_advert(seat, self._sent(seat, self.devices[seat].advert))
        self.server.close_adverts()
        for seat, device in self.devices.items():
            roster = self._received(seat, self.server.roster_for(seat))
            verify = self.people.verify if seat in self.timed else _trust
            parcels = self._timed("share", seat, lambda: device.share(roster, verify=verify))  # noqa: B023
            self.server.add_parcels(seat, self._sent(seat, parcels))
        self.server.close_parcels()
        generator, expected = np.random.default_rng(0), np.zeros(self.count, dtype=np.uint32)
        for seat, device in self.devices.items():
            if seat not in self.lost:
                vector = generator.integers(-(2**31), 2**31, self.count)
                expected += vector.astype(np.uint32)
                self.server.add_masked(seat, self._mask(seat, device, vector))
        for seat in sorted(self.server.survivors):
            survivors = self._received(seat, self.server.survivors_for(seat))
            shares = self._timed("unmask", seat, lambda: self.devices[seat].unmask(survivors))  # noqa: B023
            self.server.add_shares(seat, self._sent(seat, shares))
        return expected

    def _begin(self, seat: int) -> Participant:
        key = self.people.keys[seat]
        return Participant.begin(self.setting, seat=seat, terms=self.terms, sign=lambda m: sign_as_device(key, m))

    def _mask(self, seat: int, device: Participant, vector: np.ndarray) -> masks.Words:
        parcels = self._received(seat, self.server.parcels_for(seat))
        if seat in self.timed:
            self.up[seat] += 4 * self.count
            return self._timed("mask", seat, lambda: device.mask(vector, parcels))
        with _without_masks_that_cancel(self.timed | self.lost):
            return device.mask(vector, parcels)

    def _timed(self, stage: str, seat: int, call: Callable[[], _Answer]) -> _Answer:
        answer, self.ms.get(seat, {})[stage] = _milliseconds(call)
        return answer

    def _sent(self, seat: int, message: _Answer) -> _Answer:
        if seat in self.timed:
            self.up[seat] += len(message.to_bytes())  # type: ignore[attr-defined]
        return message

    def _received(self, seat: int, message: _Answer) -> _Answer:
        if seat in self.timed:
            self.down[seat] += len(message.to_bytes())  # type: ignore[attr-defined]
        return message


@contextmanager
def _without_masks_that_cancel(kept: set[int]) -> Iterator[None]:
    """Masks of pairs neither of which is kept are left out on both sides."""

    def pair_mask(private: Any, own: Advert, other: Advert, *, context: bytes, count: int) -> Any:
        if own.seat in kept or other.seat in kept:
            return masks.pair_mask(private, own, other, context=context, count=count)
        return np.uint32(0)

    with mock.patch.object(client.training.secure_sum, "pair_mask", pair_mask):
        yield


def _trust(*_: object) -> None:
    """Of devices that are not timed no signatures are checked."""


def _milliseconds(call: Callable[[], _Answer]) -> tuple[_Answer, float]:
    started = time.process_time()
    answer = call()
    return answer, 1e3 * (time.process_time() - started)


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['rounds']} devices timed; every sum exact"]
    for group, counts in measured["sums"].items():
        terms = measured["terms"][group]
        out.append(f"  {group} devices, {terms['neighbours']} neighbours, threshold {terms['threshold']}")
        for count, one in counts.items():
            device, dropout, size = one["device_ms"], one["server_ms"]["dropout"], one["bytes"]
            stages = ", ".join(f"{stage} {device[stage]['median']:.1f}" for stage in STAGES)
            out += [
                f"    {f'{int(count):,} values':<18} device {device['all']['median']:9.1f} ms  "
                f"[{device['all']['low']:.1f}, {device['all']['high']:.1f}]  ({stages})",
                f"    {'':<18} a dropout {dropout['median']:6.1f} ms  [{dropout['low']:.1f}, {dropout['high']:.1f}]; "
                f"{size['up']:,} bytes up, {size['down']:,} down, of which the vector {size['vector']:,}",
            ]
    return out
