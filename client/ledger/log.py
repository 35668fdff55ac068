"""An append-only log on disk whose end the keystore remembers: checked, committed, anchored, one transaction at a time.

A commit is on disk before the anchor is moved forward, and the anchor is moved before a call returns. So a crash leaves
a log that is at most one commit ahead of its anchor, never behind it; a log that is behind was rolled back.
"""

import secrets
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client.ledger.book import Book, add_up, anchor_of, check_anchor, follows_anchor, read_anchor, rebase_event
from client.ledger.events import (
    DamagedError,
    Event,
    chain_key,
    femto_delta,
    nano_epsilon,
    next_event,
    read_chain,
    utc_text,
)
from client.ledger.schema import (
    MIGRATIONS,
    insert_event,
    is_damage,
    is_unused,
    open_file,
    select_events,
    write_new_file,
)
from shared.errors import LedgerError, StoreError

if TYPE_CHECKING:
    from client.vault.keystore import Keystore

Clock = Callable[[], datetime]

LEDGER_KEY, ANCHOR = "ledger-key", "anchor"  # entries of the keystore
_KEY_BYTES = 32


class Log:
    """An open log; made by `open_log`.

    Args:
        path: Its file.
        connection: To that file.
        key: Of the chain.
        keystore: Holds the anchor.
        clock: What events are dated by.
    """

    def __init__(
        self, path: Path, connection: sqlite3.Connection, *, key: bytes, keystore: "Keystore", clock: Clock
    ) -> None:
        self.connection = connection
        self.events: list[Event] = []  # read and checked so far
        self._path = path
        self._inode = path.stat().st_ino
        self._key = key
        self._keystore = keystore
        self._clock = clock

    def close(self) -> None:
        """Close the file; may be called again."""
        self.connection.close()

    def load(self) -> Book:
        """Read what was appended since, check chain and anchor, and add everything up.

        Raises:
            LedgerError: The log cannot be used.
        """
        with file_errors(self._path):
            stored = self._keystore.read(ANCHOR)  # before the events: another process may commit in between
            self.read()
            check_anchor(self.events, stored)
        return add_up(self.events)

    def read(self) -> None:
        """Read what was appended since and check the chain; the anchor is not looked at."""
        known, last = self.events[:-1], self.events[-1] if self.events else None
        rows = select_events(self.connection, since=last.seq if last else 0)
        fresh = read_chain(rows, key=self._key, previous=known[-1] if known else None)
        if last and (not fresh or fresh[0].mac != last.mac):
            raise LedgerError("the ledger must only grow, events it held a moment ago are gone.", code="ROLLBACK")
        self.events = known + fresh

    @contextmanager
    def transaction(self) -> Iterator[Book]:
        """One transaction over checked events; what was appended is committed, then anchored.

        Raises:
            LedgerError: The log cannot be used. What was appended may be there, and then it stays.
        """
        with file_errors(self._path):
            with self._lock():
                book = self.load()
                before = self.events
                self.events = list(before)
                try:
                    yield book
                    if len(self.events) > len(before):
                        self._commit()
                except BaseException:
                    self.events = before
                    raise
            if len(self.events) > len(before):
                self.advance_anchor()

    def append(
        self,
        kind: str,
        *,
        policy: str | None = None,
        round_number: int | None = None,
        detail: Mapping[str, Any] | None = None,
    ) -> None:
        """Append an event, inside a transaction."""
        event = next_event(
            self.events[-1],
            key=self._key,
            at=utc_text(self._clock()),
            kind=kind,
            policy=policy,
            round_number=round_number,
            detail=detail or {},
        )
        insert_event(self.connection, event)
        self.events.append(event)

    def advance_anchor(self) -> None:
        """Let the keystore remember the newest event; under SQLite's lock, so that it never moves back."""
        with file_errors(self._path), self._lock():
            self.load()
            newest = anchor_of(self.events)
            if self._keystore.read(ANCHOR) != newest:
                self._keystore.write(ANCHOR, newest)

    def rebase(self, stored: bytes) -> None:
        """Take over what the keystore remembers of a history this log no longer has.

        Raises:
            LedgerError: Nothing is wrong with the log, or it cannot be used.
        """
        with file_errors(self._path):
            with self._lock():
                self.read()
                if follows_anchor(self.events, stored):
                    raise LedgerError(f"{self._path} must need recovery, nothing is wrong with it. Nothing was done.")
                rebase = rebase_event(self.events, read_anchor(stored), key=self._key, at=utc_text(self._clock()))
                insert_event(self.connection, rebase)
                self._commit()
            self._keystore.write(ANCHOR, anchor_of([*self.events, rebase]))

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Keep every other process from writing; what is not committed is undone."""
        self._begin()
        try:
            yield
        finally:
            if self.connection.in_transaction:
                self.connection.rollback()

    def _begin(self) -> None:
        if self._path.stat().st_ino != self._inode:
            raise LedgerError(f"{self._path} must stay in place while it is open, another file has taken its place.")
        self.connection.execute("BEGIN IMMEDIATE")

    def _commit(self) -> None:
        self.connection.execute("COMMIT")


def create_log(path: Path, *, keystore: "Keystore", cap_epsilon: float, cap_delta: float, clock: Clock) -> None:
    """Write a new log with a new key; see `client.ledger.ledger.create_ledger`."""
    detail = _opening(secrets.token_hex(16), cap_epsilon=cap_epsilon, cap_delta=cap_delta)
    with file_errors(path):
        stored = keystore.read(ANCHOR)
        if path.exists() and (stored is not None or not is_unused(path)):
            raise LedgerError(f"{path} must not exist, there is a ledger. It is never begun anew.")
        if stored is not None:
            raise LedgerError(
                "the keystore must not remember a ledger of this home, it does, and the file is gone: what was spent "
                "would be forgotten. Recover it, or put the file back."
            )
        key = _new_key(keystore)
        opening = next_event(None, key=chain_key(key), at=utc_text(clock()), kind="open", detail=detail)
        write_new_file(path, [opening])
        keystore.write(ANCHOR, anchor_of([opening]))


def open_log(path: Path, *, keystore: "Keystore", clock: Clock) -> Log:
    """Open a log whose file and chain are whole; the anchor is not looked at.

    Raises:
        LedgerError: It is missing, locked, of a newer schema, or without its key.
        DamagedError: File or chain are not as they were written.
    """
    with file_errors(path):
        if not path.is_file():
            raise LedgerError(f"{path} must exist, there is no ledger.")
        key = keystore.read(LEDGER_KEY)
        if key is None:
            raise LedgerError(f"the keystore must hold the key of {path}, it does not: the ledger cannot be checked.")
        log = Log(path, open_file(path), key=chain_key(key), keystore=keystore, clock=clock)
        try:
            log.read()
            add_up(log.events)
        except BaseException:
            log.close()
            raise
        return log


def recover_log(path: Path, *, keystore: "Keystore", cap_epsilon: float, cap_delta: float, clock: Clock) -> None:
    """Make a log follow the keystore's anchor again; see `client.ledger.ledger.recover_ledger`."""
    with file_errors(path):
        stored = keystore.read(ANCHOR)
        if stored is None:
            raise LedgerError("the keystore must remember what was spent, it has no anchor: begin a new home.")
        anchor = read_anchor(stored)
        key = chain_key(keystore.read(LEDGER_KEY) or _new_key(keystore))
        log = _open_intact(path, keystore=keystore, clock=clock)
        if log is not None:
            try:
                log.rebase(stored)
            finally:
                log.close()
            return
        at = utc_text(clock())
        detail = _opening(anchor["ledger_id"], cap_epsilon=cap_epsilon, cap_delta=cap_delta)
        for cap in ("cap_nano_epsilon", "cap_femto_delta"):
            detail[cap] = min(detail[cap], anchor[cap])  # losing the file raises no cap
        opening = next_event(None, key=key, at=at, kind="open", detail=detail, after=anchor["seq"])
        events = [opening, rebase_event([opening], anchor, key=key, at=at)]
        write_new_file(path, events)
        keystore.write(ANCHOR, anchor_of(events))


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Whatever SQLite, disk or keystore complain of is one error, and the ledger cannot be used."""
    try:
        yield
    except sqlite3.Error as error:
        if is_damage(error):
            raise DamagedError(f"{path} must be readable and writable, SQLite says: {error}.") from error
        raise LedgerError(
            f"{path} must be readable and writable, SQLite says: {error}. If another command is at work wait for it; "
            "else free space on the disk or mend its permissions, then try again."
        ) from error
    except UnicodeDecodeError as error:  # SQLite quotes a damaged file, whose bytes may be no text
        raise DamagedError(f"{path} must be readable, it holds text that is not UTF-8.") from error
    except OSError as error:
        raise LedgerError(f"{path} and the keystore must be readable and writable: {error}.") from error
    except StoreError as error:
        raise LedgerError(f"the ledger's key and anchor must be at hand: {error}") from error


def _open_intact(path: Path, *, keystore: "Keystore", clock: Clock) -> Log | None:
    """None where the file is gone or damaged."""
    try:
        return open_log(path, keystore=keystore, clock=clock) if path.exists() else None
    except DamagedError:
        return None


def _new_key(keystore: "Keystore") -> bytes:
    key = secrets.token_bytes(_KEY_BYTES)
    keystore.write(LEDGER_KEY, key)
    return key


def _opening(ledger_id: str, *, cap_epsilon: float, cap_delta: float) -> dict[str, Any]:
    return {
        "schema": len(MIGRATIONS),
        "ledger_id": ledger_id,
        "cap_nano_epsilon": nano_epsilon(cap_epsilon, up=False),
        "cap_femto_delta": femto_delta(cap_delta, up=False),
    }
