"""The record of privacy a device has spent: durable before a record is read, never lower than what was spent.

A campaign's whole price is reserved when its owner consents and never given back. A round is spent by a committed event
before any data is read; what it releases is committed together with the payload before anything is sent. State is what
the events (`client/ledger/events.py`) add up to (`client/ledger/book.py`); the log (`client/ledger/log.py`) commits and
anchors them; file and SQLite's own rules are in `client/ledger/schema.py`. Whatever is missing, damaged, locked, full,
older or newer than it should be raises, and then nothing is trained and nothing is sent.
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from client.ledger.book import Account, Book, Consent, Standing, Totals, check_caps
from client.ledger.events import DamagedError, Event, femto_delta, latest_time, nano_epsilon
from client.ledger.log import Clock, Log, create_log, file_errors, open_log, recover_log
from shared.errors import LedgerError, RefusedError

if TYPE_CHECKING:
    from client.vault.keystore import Keystore

__all__ = ["Consent", "Event", "Ledger", "Standing", "Totals", "create_ledger", "open_ledger", "recover_ledger"]

_MAX_ROUND = 2**31


class Ledger:
    """An open ledger; a context manager. Made by the functions below.

    Guarantee:
        I2 to I5 and I7 to I9 of the tests: capped, monotone, idempotent, conservative, failing closed, detecting an
        older copy as far as the keystore can, and free of the clock but for the end of a consent.
    """

    def __init__(self, path: Path, log: Log, *, clock: Clock) -> None:
        self.path = path
        self._log = log
        self._clock = clock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; may be called again."""
        self._log.close()

    def consent(
        self,
        *,
        policy: str,
        campaign: str,
        epsilon: float,
        delta: float,
        max_participations: int,
        until: date,
        operator: str,
    ) -> None:
        """Record the owner's consent and reserve the campaign's whole price.

        Args:
            policy: Hash of the policy; one consent for ever.
            campaign: Its name, public.
            epsilon: Price of the whole campaign, certified for ``max_participations`` rounds.
            delta: Likewise.
            max_participations: Rounds this device may take part in.
            until: The last day, in UTC.
            operator: Who runs it, public.

        Raises:
            LedgerError: A value is impossible, the consent was given before, a cap would be exceeded, or the ledger
                cannot be used.
        """
        nano, femto = nano_epsilon(epsilon, up=True), femto_delta(delta, up=True)
        if not (type(max_participations) is int and 1 <= max_participations < _MAX_ROUND):
            raise LedgerError(f"max_participations must be a whole number of at least 1, got {max_participations!r}.")
        if not policy:
            raise LedgerError("a consent must name its policy, got none.")
        if type(until) is not date:
            raise LedgerError(f"a consent must end on a day, got {until!r}.")
        with self._log.transaction() as book:
            if policy in book.accounts:
                raise LedgerError(
                    f"a consent is given once, this policy's was given on {book.accounts[policy].consent.at}."
                )
            if not self._now().date() <= until:
                raise LedgerError(f"a consent must end in the future, got {until}; today is {self._now().date()}.")
            check_caps(book, nano=nano, femto=femto)
            detail = {
                "campaign": campaign,
                "operator": operator,
                "epsilon": float(epsilon),
                "delta": float(delta),
                "nano_epsilon": nano,
                "femto_delta": femto,
                "max_participations": max_participations,
                "until": until.isoformat(),
            }
            self._log.append("consent", policy=policy, detail=detail)

    def withdraw(self, policy: str) -> None:
        """Take part no more, for ever; what was reserved stays reserved. Nothing happens the second time.

        Raises:
            LedgerError: There was no consent to this policy, or the ledger cannot be used.
        """
        with self._log.transaction() as book:
            if policy not in book.accounts:
                raise LedgerError(f"only a consent that was given can be withdrawn, none was given to {policy!r}.")
            if book.accounts[policy].closed != "withdrawn":
                self._log.append("withdraw", policy=policy)
                self._log.connection.execute("DELETE FROM outbox WHERE policy = ?", (policy,))

    def spend(self, *, policy: str, round_number: int, request_sha256: str, answered: int) -> bytes | None:
        """Spend one participation, durably, before any record is read.

        Args:
            policy: Hash of the policy.
            round_number: The round asked for.
            request_sha256: Hash of the whole request.
            answered: How many rounds of this campaign the server has this device's replies of. More than this ledger
                knows means that it was rolled back: the rounds it lost are counted again, up to the limit.

        Returns:
            None: train, then `release`. Bytes: what this very request was answered with; send it again, at no cost.

        Raises:
            RefusedError: ``CONSENT`` (none, withdrawn or past its end), ``PAUSED``, ``ROUND`` (not after the last),
                ``CONFLICT`` (this round, another request), ``BURNT`` (spent, nothing released), ``BUDGET``. Nothing is
                written, but for rounds the server remembers.
            LedgerError: The ledger cannot be used. The round may be spent.

        Guarantee:
            At most one None per policy and round, and at most ``max_participations`` per policy.
        """
        if not (type(answered) is int and answered >= 0):
            raise LedgerError(f"answered must be a whole number of at least 0, got {answered!r}.")
        if not (type(round_number) is int and 1 <= round_number < _MAX_ROUND):
            raise RefusedError("ROUND")
        with self._log.transaction() as book:
            account = self._in_force(book, policy)
            lost = min(answered - account.answered, account.left)
            if lost > 0:
                self._log.append("rebase", policy=policy, detail={"rounds": lost})
                account.lost += lost
            payload, refusal = self._repeat(account, round_number, request_sha256)
            if payload is None and refusal is None:
                if account.left > 0:
                    detail = {"request_sha256": request_sha256}
                    self._log.append("spend", policy=policy, round_number=round_number, detail=detail)
                else:
                    refusal = "BUDGET"
        if refusal is not None:
            raise RefusedError(refusal)
        return payload

    def release(self, *, policy: str, round_number: int, payload: bytes, keep: bool = True) -> None:
        """Record what is about to be sent, with the bytes themselves, in one commit.

        Args:
            policy: Hash of the policy.
            round_number: The round that was spent.
            payload: What is sent.
            keep: Whether bytes and hash are kept, to be sent again. Of what is not noised only the size is: a hash
                would confirm a guess.

        Raises:
            RefusedError: ``CONSENT`` or ``PAUSED``: the owner has said so meanwhile; ``BURNT``: the round was closed
                meanwhile.
            LedgerError: The round was not spent, or is released; or the ledger cannot be used. Send nothing.
        """
        with self._log.transaction() as book:
            account = self._in_force(book, policy)
            if round_number in account.burns:
                raise RefusedError("BURNT")
            if round_number not in account.pending:
                raise LedgerError(f"only a round that was spent and not yet released can be, got round {round_number}.")
            kept = payload if keep else b""
            detail = {"sha256": hashlib.sha256(kept).hexdigest(), "size_bytes": len(payload)}
            self._log.append("release", policy=policy, round_number=round_number, detail=detail)
            if keep:
                self._log.connection.execute("INSERT INTO outbox VALUES (?, ?, ?)", (policy, round_number, payload))
            self._log.connection.execute(
                "DELETE FROM outbox WHERE policy = ?1 AND round < (SELECT max(round) FROM outbox WHERE policy = ?1)",
                (policy,),
            )

    def burn(self, *, policy: str, round_number: int) -> None:
        """Close a round of which nothing will be released; it stays spent. Nothing happens if it is closed.

        Raises:
            LedgerError: The ledger cannot be used.
        """
        with self._log.transaction() as book:
            if policy in book.accounts and round_number in book.accounts[policy].pending:
                self._log.append("burn", policy=policy, round_number=round_number)

    def pause(self) -> None:
        """Take part in nothing until `resume`.

        Raises:
            LedgerError: The ledger cannot be used.
        """
        self._set_paused(True)

    def resume(self) -> None:
        """End a pause.

        Raises:
            LedgerError: The ledger cannot be used.
        """
        self._set_paused(False)

    def forgotten(self, receipt: Mapping[str, Any]) -> None:
        """Record that the owner's data were shredded: every consent is withdrawn, every counter stays.

        Args:
            receipt: What was deleted; JSON, public.

        Raises:
            LedgerError: The ledger cannot be used.
        """
        with self._log.transaction():
            self._log.append("forget", detail=receipt)
            self._log.connection.execute("DELETE FROM outbox")
        with file_errors(self.path):
            self._log.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def consents(self) -> tuple[Standing, ...]:
        """Every consent ever given, in their order, and what became of it.

        Raises:
            LedgerError: The ledger cannot be used.
        """
        book, now = self._log.load(), self._now()
        return tuple(account.standing(now) for account in book.accounts.values())

    def totals(self) -> Totals:
        """What is reserved and what the caps leave.

        Raises:
            LedgerError: The ledger cannot be used.
        """
        return self._log.load().totals()

    def history(self) -> tuple[Event, ...]:
        """Every event, oldest first.

        Raises:
            LedgerError: The ledger cannot be used.
        """
        self._log.load()
        return tuple(self._log.events)

    def kept_replies(self) -> frozenset[tuple[str, int]]:
        """Policy and round of every reply whose bytes are kept: the newest of each campaign, unless not noised.

        Raises:
            LedgerError: The ledger cannot be used.
        """
        with file_errors(self.path):
            found = self._log.connection.execute("SELECT policy, round FROM outbox").fetchall()
        return frozenset((str(policy), int(number)) for policy, number in found)

    def kept_reply(self, *, policy: str, round_number: int) -> bytes | None:
        """The very bytes that were released in a round; None where they are not kept.

        Raises:
            LedgerError: The ledger cannot be used, or they are not those that were released.
        """
        account = self._log.load().accounts.get(policy)
        if account is None:
            return None
        with file_errors(self.path):
            return self._kept(account, round_number)

    def _set_paused(self, paused: bool) -> None:
        with self._log.transaction() as book:
            if book.paused is not paused:
                self._log.append("pause" if paused else "resume")

    def _in_force(self, book: Book, policy: str) -> Account:
        account = book.accounts.get(policy)
        if account is None or account.state(self._now()) not in ("in force", "exhausted"):
            raise RefusedError("CONSENT")
        if book.paused:
            raise RefusedError("PAUSED")
        return account

    def _repeat(self, account: Account, round_number: int, request_sha256: str) -> tuple[bytes | None, str | None]:
        """What a round that is not new is answered with: a payload, or a code; neither for a new round."""
        if round_number not in account.spends:
            return None, None if round_number > max(account.spends, default=0) else "ROUND"
        if account.spends[round_number] != request_sha256:
            return None, "CONFLICT"
        if round_number not in account.releases:
            return None, "BURNT"
        payload = self._kept(account, round_number)
        return payload, "ROUND" if payload is None else None

    def _kept(self, account: Account, round_number: int) -> bytes | None:
        found = self._log.connection.execute(
            "SELECT payload FROM outbox WHERE policy = ? AND round = ?", (account.consent.policy, round_number)
        ).fetchone()
        if found is None:
            return None
        payload = bytes(found[0])
        if hashlib.sha256(payload).hexdigest() != account.releases.get(round_number):
            raise DamagedError(f"the reply of round {round_number} must be the one released, its bytes have changed.")
        return payload

    def _now(self) -> datetime:
        return max(self._clock().astimezone(UTC), latest_time(self._log.events))


def create_ledger(path: Path, *, keystore: "Keystore", cap_epsilon: float, cap_delta: float, clock: Clock) -> Ledger:
    """Begin a device's ledger, with a new key.

    Args:
        path: The file to make; its folder exists.
        keystore: Where key and anchor are kept.
        cap_epsilon: What all campaigns together may cost the owner, for ever.
        cap_delta: Likewise.
        clock: The time, for display and for the end of consents.

    Raises:
        LedgerError: There is a ledger, or the keystore remembers one that is gone (see `recover_ledger`), or it cannot
            be written.
    """
    create_log(path, keystore=keystore, cap_epsilon=cap_epsilon, cap_delta=cap_delta, clock=clock)
    return open_ledger(path, keystore=keystore, clock=clock)


def open_ledger(path: Path, *, keystore: "Keystore", clock: Clock, round_running: bool = False) -> Ledger:
    """Open a ledger and check it: file, schema, chain, anchor.

    Args:
        path: The file.
        keystore: Where its key and anchor are kept.
        clock: The time, for display and for the end of consents.
        round_running: Another process is in the middle of a round. Otherwise rounds left open are a crash's: they are
            closed as burnt.

    Raises:
        LedgerError: It is missing, damaged, locked, read-only, of a newer schema, without its key, or not the one the
            keystore remembers; ``ROLLBACK``: it is older than it was.
    """
    log = open_log(path, keystore=keystore, clock=clock)
    try:
        log.load()
        if not round_running:
            _burn_pending(log)
            log.advance_anchor()  # after a crash between a commit and its anchor
    except BaseException:
        log.close()
        raise
    return Ledger(path, log, clock=clock)


def recover_ledger(path: Path, *, keystore: "Keystore", cap_epsilon: float, cap_delta: float, clock: Clock) -> Ledger:
    """Go on after a ledger was lost, damaged or rolled back, with nothing spent forgotten.

    What is reserved becomes the larger of what the ledger and the keystore say; every campaign known is ended. A
    damaged file is put aside, not deleted.

    Args:
        path: The file.
        keystore: Where its anchor is kept.
        cap_epsilon: The owner's cap, if the file is gone, at most what it was; a ledger that is there keeps its own.
        cap_delta: Likewise.
        clock: The time.

    Raises:
        LedgerError: The keystore has no anchor, so that nobody knows what was spent; nothing is wrong with the ledger;
            or it cannot be used for another reason, such as a full disk.
    """
    recover_log(path, keystore=keystore, cap_epsilon=cap_epsilon, cap_delta=cap_delta, clock=clock)
    return open_ledger(path, keystore=keystore, clock=clock)


def _burn_pending(log: Log) -> None:
    with log.transaction() as book:
        for policy, account in book.accounts.items():
            for round_number in sorted(account.pending):
                log.append("burn", policy=policy, round_number=round_number)
