"""What a ledger's events are, and how they are chained.

Every event carries an HMAC-SHA256 over itself and the one before it: with the key in the keystore, no event can be
changed, moved, inserted or taken from the middle unseen. What is missing at the end the anchor sees
(`client/ledger/book.py`).
"""

import hashlib
import hmac
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from shared.errors import LedgerError

NANO, FEMTO = 9, 15  # decimals kept of epsilon and of delta

_PURPOSE = b"sottovoce ledger chain 1"
_MAX_EPSILON = 1e6  # far beyond any meaning; the sums stay within SQLite's integers


class DamagedError(LedgerError):
    """The file itself is not what was written, as opposed to busy, read-only or older than it was."""


@dataclass(frozen=True)
class Event:
    """One line of a ledger.

    Attributes:
        seq: Its number; only rises.
        at: When, by the device's clock, in UTC.
        kind: ``open``, ``consent``, ``withdraw``, ``spend``, ``release``, ``burn``, ``pause``, ``resume``, ``forget``
            or ``rebase``.
        policy: The campaign's policy, if it concerns one.
        round_number: The round, if it concerns one.
        detail: What else it says.
        mac: Over this event and the one before.
    """

    seq: int
    at: str
    kind: str
    policy: str | None
    round_number: int | None
    detail: Mapping[str, Any]
    mac: bytes

    def row(self) -> tuple[object, ...]:
        """Its columns."""
        return (self.seq, self.at, self.kind, self.policy, self.round_number, canonical(self.detail), self.mac)


def latest_time(events: Iterable[Event]) -> datetime:
    """The latest time at which something was agreed to, spent or released.

    Not a burn, which is written unasked after a crash, nor what an owner may do at any time: a clock that was ahead
    just then would end every consent for good.
    """
    witnesses = ("open", "consent", "spend", "release")
    return max(datetime.fromisoformat(event.at) for event in events if event.kind in witnesses)


def utc_text(moment: datetime) -> str:
    """A time as events hold it."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")


def nano_epsilon(epsilon: float, *, up: bool) -> int:
    """Epsilon, as its decimals are written, in units of 1e-9; what is spent is rounded up, a cap down.

    Example:
        >>> nano_epsilon(0.1, up=True), nano_epsilon(1.2345678901, up=True), nano_epsilon(1.2345678901, up=False)
        (100000000, 1234567891, 1234567890)
    """
    if not 0 < epsilon <= _MAX_EPSILON:
        raise LedgerError(f"epsilon must be in (0, {_MAX_EPSILON:.0e}], got {epsilon}.")
    return _units(epsilon, NANO, up=up)


def femto_delta(delta: float, *, up: bool) -> int:
    """Delta, as its decimals are written, in units of 1e-15; what is spent is rounded up, a cap down.

    Example:
        >>> femto_delta(1e-5, up=True), femto_delta(1.5e-15, up=True), femto_delta(1.5e-15, up=False)
        (10000000000, 2, 1)
    """
    if not 0 <= delta < 1:
        raise LedgerError(f"delta must be in [0, 1), got {delta}.")
    return _units(delta, FEMTO, up=up)


def _units(value: float, decimals: int, *, up: bool) -> int:
    scaled = Decimal(repr(float(value))).scaleb(decimals)
    return math.ceil(scaled) if up else math.floor(scaled)


def chain_key(ledger_key: bytes) -> bytes:
    """The key of the chain: the keystore's key also wraps the training data, and no key serves two purposes."""
    return hmac.digest(ledger_key, _PURPOSE, hashlib.sha256)


def next_event(
    previous: Event | None,
    *,
    key: bytes,
    at: str,
    kind: str,
    policy: str | None = None,
    round_number: int | None = None,
    detail: Mapping[str, Any],
    after: int = 0,
) -> Event:
    """The event that follows ``previous``; its number is also larger than ``after``."""
    seq = max(previous.seq if previous else 0, after) + 1
    link = previous.mac if previous else b""
    text = canonical(detail)
    mac = _mac(key, link, (seq, at, kind, policy, round_number, text))
    return Event(seq, at, kind, policy, round_number, json.loads(text), mac)


def read_chain(rows: Iterable[Sequence[Any]], *, key: bytes, previous: Event | None) -> list[Event]:
    """Turn rows into events.

    Raises:
        DamagedError: A row is not the one that was written after the one before it.
    """
    events = []
    for seq, at, kind, policy, round_number, detail, mac in rows:
        expected = _mac(key, previous.mac if previous else b"", (seq, at, kind, policy, round_number, detail))
        if not (isinstance(mac, bytes) and hmac.compare_digest(mac, expected)):
            raise DamagedError(
                f"every event of the ledger must be as it was written, number {seq} is not, or one before it is gone, "
                "or the key is another ledger's."
            )
        previous = Event(seq, at, kind, policy, round_number, json.loads(detail), mac)
        events.append(previous)
    return events


def _mac(key: bytes, link: bytes, row: Sequence[object]) -> bytes:
    return hmac.digest(key, link + json.dumps(list(row), default=repr).encode(), hashlib.sha256)


def canonical(value: Mapping[str, Any]) -> str:
    """JSON in one form only."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
