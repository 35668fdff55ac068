"""What a ledger's events add up to, and the anchor by which the keystore remembers it.

The anchor, kept in the keystore, names the newest event and what was reserved by then: events missing at the end are
seen, unless the anchor was restored together with them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import Any, Literal

from client.ledger.events import FEMTO, NANO, DamagedError, Event, canonical, next_event
from shared.errors import LedgerError

State = Literal["in force", "exhausted", "ended", "withdrawn"]


@dataclass(frozen=True)
class Consent:
    """What the owner agreed to, once.

    Attributes:
        policy: Hash of the policy.
        campaign: Its name.
        operator: Who runs it.
        epsilon: What the whole campaign may cost, whatever happens in it.
        delta: Likewise.
        max_participations: Rounds it may take.
        until: The last day, in UTC, on which this device takes part.
        at: When it was given.
    """

    policy: str
    campaign: str
    operator: str
    epsilon: float
    delta: float
    max_participations: int
    until: date
    at: str


@dataclass(frozen=True)
class Standing:
    """A consent and what became of it: ``spent == released + burnt + pending + lost``.

    Attributes:
        consent: What was agreed to.
        spent: Rounds used up, of ``consent.max_participations``.
        released: Rounds whose reply was released to be sent.
        burnt: Rounds spent of which nothing was released.
        pending: Rounds spent that are being trained.
        lost: Rounds the server has answers of and this ledger, once rolled back, no longer knew.
        state: What it is worth now.
        last_round: The latest that was spent; 0 before the first.
    """

    consent: Consent
    spent: int
    released: int
    burnt: int
    pending: int
    lost: int
    state: State
    last_round: int = 0


@dataclass(frozen=True)
class Totals:
    """Everything reserved so far, over all campaigns and for ever, and what the owner's caps leave."""

    epsilon: float
    delta: float
    cap_epsilon: float
    cap_delta: float
    left_epsilon: float
    left_delta: float
    paused: bool


@dataclass
class Account:
    """What the events say of one campaign."""

    consent: Consent
    spends: dict[int, str] = field(default_factory=dict)  # round -> hash of the request
    releases: dict[int, str] = field(default_factory=dict)  # round -> hash of the payload
    burns: set[int] = field(default_factory=set)
    lost: int = 0
    closed: Literal["ended", "withdrawn"] | None = None

    @property
    def spent(self) -> int:
        """Participations used up."""
        return len(self.spends) + self.lost

    @property
    def answered(self) -> int:
        """The most replies a server can have seen."""
        return len(self.releases) + self.lost

    @property
    def left(self) -> int:
        """Participations not yet used."""
        return self.consent.max_participations - self.spent

    @property
    def pending(self) -> set[int]:
        """Rounds spent and not ended."""
        return self.spends.keys() - self.releases.keys() - self.burns

    def state(self, now: datetime) -> State:
        """What the consent is worth at a time."""
        if self.closed:
            return self.closed
        if not now.date() <= self.consent.until:
            return "ended"
        return "in force" if self.left > 0 else "exhausted"

    def standing(self, now: datetime) -> Standing:
        """For a reader."""
        return Standing(
            self.consent,
            spent=self.spent,
            released=len(self.releases),
            burnt=len(self.burns),
            pending=len(self.pending),
            lost=self.lost,
            state=self.state(now),
            last_round=max(self.spends, default=0),
        )


@dataclass
class Book:
    """What the events add up to."""

    ledger_id: str
    cap_nano_epsilon: int
    cap_femto_delta: int
    nano_epsilon: int = 0
    femto_delta: int = 0
    paused: bool = False
    accounts: dict[str, Account] = field(default_factory=dict)

    def totals(self) -> Totals:
        """For a reader."""
        return Totals(
            epsilon=self.nano_epsilon / 10**NANO,
            delta=self.femto_delta / 10**FEMTO,
            cap_epsilon=self.cap_nano_epsilon / 10**NANO,
            cap_delta=self.cap_femto_delta / 10**FEMTO,
            left_epsilon=max(0, self.cap_nano_epsilon - self.nano_epsilon) / 10**NANO,
            left_delta=max(0, self.cap_femto_delta - self.femto_delta) / 10**FEMTO,
            paused=self.paused,
        )


def add_up(events: Iterable[Event]) -> Book:
    """Derive the whole state of a ledger from its events.

    Raises:
        DamagedError: The first event does not open a ledger, or a kind is unknown.
    """
    events = iter(events)
    first = next(events, None)
    if first is None or first.kind != "open":
        raise DamagedError("a ledger must begin with its opening, it does not.")
    opening = first.detail
    book = Book(opening["ledger_id"], opening["cap_nano_epsilon"], opening["cap_femto_delta"])
    for event in events:
        _apply(book, event)
    return book


def _apply(book: Book, event: Event) -> None:
    policy, number, detail = event.policy or "", event.round_number or 0, event.detail
    match event.kind:
        case "consent":
            book.accounts[policy] = Account(_consent(event))
            book.nano_epsilon += detail["nano_epsilon"]
            book.femto_delta += detail["femto_delta"]
        case "withdraw":
            book.accounts[policy].closed = "withdrawn"
        case "spend":
            book.accounts[policy].spends[number] = detail["request_sha256"]
        case "release":
            book.accounts[policy].releases[number] = detail["sha256"]
        case "burn":
            book.accounts[policy].burns.add(number)
        case "pause" | "resume":
            book.paused = event.kind == "pause"
        case "forget":
            _close(book, "withdrawn")
        case "rebase" if policy:
            book.accounts[policy].lost += detail["rounds"]
        case "rebase":
            book.nano_epsilon += detail["nano_epsilon"]
            book.femto_delta += detail["femto_delta"]
            _close(book, "ended")
        case unknown:
            raise DamagedError(f"every event of a ledger must be of a known kind, got {unknown!r}.")


def _close(book: Book, closed: Literal["ended", "withdrawn"]) -> None:
    for account in book.accounts.values():
        account.closed = account.closed or closed


def _consent(event: Event) -> Consent:
    said = event.detail
    return Consent(
        policy=event.policy or "",
        campaign=said["campaign"],
        operator=said["operator"],
        epsilon=said["epsilon"],
        delta=said["delta"],
        max_participations=said["max_participations"],
        until=date.fromisoformat(said["until"]),
        at=event.at,
    )


def check_caps(book: Book, *, nano: int, femto: int) -> None:
    """Check that a campaign's price fits into what the owner's caps leave.

    Raises:
        LedgerError: It does not; the text names cap, reserved and left.
    """
    for name, asked, reserved, cap, unit in (
        ("epsilon", nano, book.nano_epsilon, book.cap_nano_epsilon, 10**NANO),
        ("delta", femto, book.femto_delta, book.cap_femto_delta, 10**FEMTO),
    ):
        if not reserved + asked <= cap:
            raise LedgerError(
                f"{name} of all campaigns must stay within the cap of {cap / unit}: {reserved / unit} is reserved and "
                f"{max(0, cap - reserved) / unit} left, this campaign asks for {asked / unit}. What was reserved is "
                "never given back."
            )


_AMOUNTS = ("seq", "nano_epsilon", "femto_delta")
_CAPS = {"cap_nano_epsilon": "nano_epsilon", "cap_femto_delta": "femto_delta"}  # -> what is reserved of it


def anchor_of(events: Sequence[Event]) -> bytes:
    """What the keystore remembers of a ledger: how far it had come, what was reserved by then, of what caps."""
    book = add_up(events)
    anchor = {
        "seq": events[-1].seq,
        "mac": events[-1].mac.hex(),
        "nano_epsilon": book.nano_epsilon,
        "femto_delta": book.femto_delta,
        "cap_nano_epsilon": book.cap_nano_epsilon,
        "cap_femto_delta": book.cap_femto_delta,
        "ledger_id": book.ledger_id,
    }
    return canonical(anchor).encode()


def read_anchor(stored: bytes) -> dict[str, Any]:
    """The fields of an anchor. The first version's named no caps: of those, what was reserved is all that is known.

    Raises:
        LedgerError: It is not one.
    """
    try:
        anchor = json.loads(stored)
        if not anchor.keys() & _CAPS.keys():
            anchor |= {cap: anchor[reserved] for cap, reserved in _CAPS.items()}
        amounts = [anchor[name] for name in (*_AMOUNTS, *_CAPS)]
        if all(type(amount) is int and amount >= 0 for amount in amounts) and type(anchor["ledger_id"]) is str:
            return dict(anchor)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise LedgerError("the keystore's anchor of the ledger must be readable, it is damaged. What was spent is unknown.")


def check_anchor(events: Sequence[Event], stored: bytes | None) -> None:
    """Check that a ledger goes on from where the keystore last saw it.

    Raises:
        LedgerError: There is no anchor, or it is of another history; ``ROLLBACK``: the ledger is older than it was.
    """
    if stored is None:
        raise LedgerError("the keystore must hold the ledger's anchor, it holds none: how much was spent is unknown.")
    seq = read_anchor(stored)["seq"]
    if not events[-1].seq >= seq:
        raise LedgerError(
            f"the ledger must be no older than it was, it ends at event {events[-1].seq} and the keystore remembers "
            f"{seq}: an older copy was put back, or its newest part is gone. Put the newest copy back, or recover it.",
            code="ROLLBACK",
        )
    if not follows_anchor(events, stored):
        raise DamagedError("the ledger must be the one the keystore remembers, it has another history.")


def follows_anchor(events: Sequence[Event], stored: bytes) -> bool:
    """Whether the history the keystore remembers is the beginning of this one."""
    seq = read_anchor(stored)["seq"]
    remembered = [event for event in events if event.seq <= seq]
    return bool(remembered) and stored in (anchor_of(remembered), _first_anchor_of(remembered))


def _first_anchor_of(events: Sequence[Event]) -> bytes:
    """The same as the first version wrote it; the next opening of the ledger writes today's."""
    anchor = json.loads(anchor_of(events))
    return canonical({name: value for name, value in anchor.items() if name not in _CAPS}).encode()


def rebase_event(events: Sequence[Event], anchor: Mapping[str, Any], *, key: bytes, at: str) -> Event:
    """The event that raises what is reserved to what the keystore remembers, and ends every campaign."""
    book = add_up(events)
    detail = {
        "nano_epsilon": max(0, anchor["nano_epsilon"] - book.nano_epsilon),
        "femto_delta": max(0, anchor["femto_delta"] - book.femto_delta),
    }
    return next_event(events[-1], key=key, at=at, kind="rebase", detail=detail, after=anchor["seq"])
