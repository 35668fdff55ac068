"""The ledger's file: its tables, the rules SQLite itself enforces on them, and how a connection is opened.

    event    seq, at, kind, policy, round, detail (JSON), mac      append-only; everything else is derived from it
    outbox   policy, round, payload                                the newest reply of each campaign, to be sent again

SQLite refuses to change or delete an event, to spend a round twice or beyond the consent's participations, to end a
round twice, and to reserve more than the owner's caps. These rules guard against mistakes of ours; against whoever can
write the file stands the chain (`client/ledger/events.py`).
"""

import functools
import itertools
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path

from client.ledger.events import DamagedError, Event
from shared.errors import LedgerError
from shared.files import flush_folder

Migration = Callable[[sqlite3.Connection], None]

_BUSY_TIMEOUT_S = 5.0
_OLDEST_SQLITE = (3, 37)  # STRICT tables
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_COLUMNS = "seq, at, kind, policy, round, detail, mac"

# A comparison with NULL is NULL, which WHEN and CHECK let pass: every rule below is an IS [NOT] TRUE.
_SCHEMA_1 = (
    """CREATE TABLE event (
        seq INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        kind TEXT NOT NULL CHECK (kind IN
            ('open', 'consent', 'withdraw', 'spend', 'release', 'burn', 'pause', 'resume', 'forget', 'rebase')),
        policy TEXT CHECK (policy IS NOT NULL OR kind IN ('open', 'pause', 'resume', 'forget', 'rebase')),
        round INTEGER CHECK ((round >= 1) IS (CASE WHEN kind IN ('spend', 'release', 'burn') THEN TRUE END)),
        detail TEXT NOT NULL CHECK (json_valid(detail)),
        mac BLOB NOT NULL CHECK (length(mac) = 32)
    ) STRICT""",
    """CREATE TABLE outbox (
        policy TEXT NOT NULL,
        round INTEGER NOT NULL,
        payload BLOB NOT NULL,
        PRIMARY KEY (policy, round)
    ) STRICT""",
    "CREATE UNIQUE INDEX one_consent ON event (policy) WHERE kind = 'consent'",
    "CREATE UNIQUE INDEX one_spend ON event (policy, round) WHERE kind = 'spend'",
    "CREATE UNIQUE INDEX one_end ON event (policy, round) WHERE kind IN ('release', 'burn')",
    """CREATE TRIGGER event_unchanged BEFORE UPDATE ON event
        BEGIN SELECT RAISE(ABORT, 'an event is never changed'); END""",
    """CREATE TRIGGER event_kept BEFORE DELETE ON event
        BEGIN SELECT RAISE(ABORT, 'an event is never deleted'); END""",
    """CREATE TRIGGER spend_within_consent BEFORE INSERT ON event WHEN NEW.kind = 'spend' AND (
            (SELECT count(*) FROM event WHERE kind = 'spend' AND policy = NEW.policy)
            + (SELECT coalesce(sum(json_extract(detail, '$.rounds')), 0)
               FROM event WHERE kind = 'rebase' AND policy = NEW.policy)
            < (SELECT json_extract(detail, '$.max_participations')
               FROM event WHERE kind = 'consent' AND policy = NEW.policy)
        ) IS NOT TRUE
        BEGIN SELECT RAISE(ABORT, 'no participation is left'); END""",
    """CREATE TRIGGER spend_forward BEFORE INSERT ON event WHEN NEW.kind = 'spend' AND (
            NEW.round > (SELECT coalesce(max(round), 0) FROM event WHERE kind = 'spend' AND policy = NEW.policy)
        ) IS NOT TRUE
        BEGIN SELECT RAISE(ABORT, 'rounds only go forward'); END""",
    """CREATE TRIGGER end_of_a_spend BEFORE INSERT ON event WHEN NEW.kind IN ('release', 'burn') AND NOT EXISTS (
            SELECT 1 FROM event WHERE kind = 'spend' AND policy = NEW.policy AND round = NEW.round)
        BEGIN SELECT RAISE(ABORT, 'the round was not spent'); END""",
    """CREATE TRIGGER consent_within_caps AFTER INSERT ON event WHEN NEW.kind = 'consent' AND (
            json_type(NEW.detail, '$.nano_epsilon') = 'integer' AND json_type(NEW.detail, '$.femto_delta') = 'integer'
            AND (SELECT sum(json_extract(detail, '$.nano_epsilon')) FROM event WHERE kind IN ('consent', 'rebase'))
                <= (SELECT json_extract(detail, '$.cap_nano_epsilon') FROM event WHERE kind = 'open')
            AND (SELECT sum(json_extract(detail, '$.femto_delta')) FROM event WHERE kind IN ('consent', 'rebase'))
                <= (SELECT json_extract(detail, '$.cap_femto_delta') FROM event WHERE kind = 'open')
        ) IS NOT TRUE
        BEGIN SELECT RAISE(ABORT, 'the caps are exceeded'); END""",
)


def _to_schema_1(connection: sqlite3.Connection) -> None:
    for statement in _SCHEMA_1:
        connection.execute(statement)


MIGRATIONS: tuple[Migration, ...] = (_to_schema_1,)  # from schema 0, 1, ...; a published one is never edited


def create_file(path: Path) -> sqlite3.Connection:
    """Make an empty ledger file that only its owner reads.

    Raises:
        FileExistsError: There is one.
    """
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
    connection = _connect(path)
    _migrate(connection)
    return connection


def open_file(path: Path) -> sqlite3.Connection:
    """Open a ledger file, bring it to this version's schema, and check that SQLite finds it whole.

    Raises:
        LedgerError: It was written by a newer version.
        DamagedError: It is not a ledger, or a damaged one.
        sqlite3.Error: It cannot be read or written.
    """
    connection = _connect(path)
    try:
        [version] = connection.execute("PRAGMA user_version").fetchone()
        if version > len(MIGRATIONS):
            raise LedgerError(
                f"{path} must be of schema {len(MIGRATIONS)} or older, it is of {version}: a newer Sottovoce wrote it. "
                "Install that version."
            )
        if not version >= 1:
            raise DamagedError(f"{path} must be a ledger, it names no schema. It is left as it is.")
        _migrate(connection)
        if _schema(connection) != _expected_schema(MIGRATIONS):
            raise DamagedError(f"{path} must hold the ledger's own tables and rules, they were changed.")
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != ("ok",):
            raise DamagedError(f"{path} must be whole, SQLite finds it damaged.")
    except BaseException:
        connection.close()
        raise
    return connection


def write_new_file(path: Path, events: Sequence[Event]) -> None:
    """Write a ledger beside its place, whole, then move it there; what was there is put aside, never deleted."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    for leftover in _files(temporary):
        leftover.unlink(missing_ok=True)
    try:
        with closing(create_file(temporary)) as connection:
            for event in events:
                insert_event(connection, event)
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # what stays in the log is not moved
        _put_aside(path)
        temporary.rename(path)
        flush_folder(path.parent)
    finally:
        for leftover in _files(temporary):
            leftover.unlink(missing_ok=True)


def _put_aside(path: Path) -> None:
    """Move a ledger and its write-ahead log, which a new ledger in that place would take for its own."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.aside-{number}")
        if not any(file.exists() for file in _files(aside)):
            break
    for old, new in zip(_files(path), _files(aside), strict=True):
        with suppress(FileNotFoundError):
            old.rename(new)


def _files(path: Path) -> list[Path]:
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal")]


def is_unused(path: Path) -> bool:
    """Whether a file has nothing but its opening: making it was interrupted before the keystore knew of it."""
    connection = open_file(path)
    try:
        return len(select_events(connection, since=0)) <= 1
    finally:
        connection.close()


def is_damage(error: sqlite3.Error) -> bool:
    """Whether SQLite says that the file itself is broken, rather than busy, read-only or out of room."""
    code = getattr(error, "sqlite_errorcode", None)
    return isinstance(code, int) and code & 0xFF in _DAMAGED


def insert_event(connection: sqlite3.Connection, event: Event) -> None:
    """Append one event."""
    connection.execute(f"INSERT INTO event ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", event.row())


def select_events(connection: sqlite3.Connection, *, since: int) -> list[tuple[object, ...]]:
    """Rows from number ``since`` on, that one included."""
    return connection.execute(f"SELECT {_COLUMNS} FROM event WHERE seq >= ? ORDER BY seq", (since,)).fetchall()


def _connect(path: Path) -> sqlite3.Connection:
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        raise LedgerError(f"SQLite must be 3.37 or newer, it is {sqlite3.sqlite_version}. Install a newer Python.")
    uri = f"{path.resolve().as_uri()}?mode=rw"
    connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None)
    try:
        for pragma in ("cell_size_check = ON", "secure_delete = ON", "recursive_triggers = ON"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        [mode] = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise LedgerError(f"{path} must be kept with a write-ahead log, this file system allows {mode} only.")
        for pragma in ("synchronous = FULL", "fullfsync = ON", "checkpoint_fullfsync = ON"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection) -> None:
    [version] = connection.execute("PRAGMA user_version").fetchone()
    if version == len(MIGRATIONS):
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        for step in MIGRATIONS[version:]:
            step(connection)
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def _schema(connection: sqlite3.Connection) -> list[tuple[object, ...]]:
    return connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_schema ORDER BY type, name").fetchall()


@functools.cache
def _expected_schema(migrations: tuple[Migration, ...]) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(":memory:", isolation_level=None)
    try:
        for step in migrations:
            step(connection)
        return _schema(connection)
    finally:
        connection.close()
