"""Ledgers for tests: keystores in memory and in a folder, a clock that is set, and child processes that are killed."""

import contextlib
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from client.ledger.ledger import create_ledger, open_ledger, recover_ledger
from client.ledger.schema import _SCHEMA_1
from shared.errors import StoreError

START = datetime(2026, 1, 1, 12, tzinfo=UTC)
CAPS = {"cap_epsilon": 10.0, "cap_delta": 1e-4}
KILLED = -9

_PRELUDE = """
import os, resource, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import ledgers
from shared.errors import LedgerError, RefusedError
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
home = Path(sys.argv[1])
"""


class MemoryKeystore:
    """A keystore of this process; a copy of ``entries`` is a backup of it."""

    name = "memory"
    weak = False
    detects_rollback = True

    def __init__(self, entries=None):
        self.entries = dict(entries or {})
        self.broken = False

    def read(self, entry):
        self._check()
        return self.entries.get(entry)

    def write(self, entry, secret):
        self._check()
        self.entries[entry] = secret

    def delete(self, entry):
        self.entries.pop(entry, None)

    def _check(self):
        if self.broken:
            raise StoreError("the keyring is locked")


class FolderKeystore(MemoryKeystore):
    """One that outlives a process, beside the home."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def read(self, entry):
        with contextlib.suppress(FileNotFoundError):
            return (self.folder / entry).read_bytes()

    def write(self, entry, secret):
        temporary = self.folder / f".{entry}"
        temporary.write_bytes(secret)
        temporary.replace(self.folder / entry)


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self, now=START):
        self.now = now

    def __call__(self):
        return self.now

    def jump(self, **delta):
        self.now += timedelta(**delta)


def keystore_of(home):
    return FolderKeystore(home.parent / f"{home.name}-keys")


def begin(home, keystore=None, clock=None, **caps):
    """A new ledger in a folder."""
    home.mkdir(exist_ok=True)
    keystore = keystore or keystore_of(home)
    return create_ledger(home / "ledger.db", keystore=keystore, clock=clock or Clock(), **(CAPS | caps))


def reopen(home, keystore=None, clock=None, **options):
    return open_ledger(home / "ledger.db", keystore=keystore or keystore_of(home), clock=clock or Clock(), **options)


def recover(home, keystore=None, clock=None, **caps):
    keystore = keystore or keystore_of(home)
    return recover_ledger(home / "ledger.db", keystore=keystore, clock=clock or Clock(), **(CAPS | caps))


def agree(ledger, policy="p", **changes):
    """The owner consents."""
    terms = {
        "campaign": "a campaign",
        "epsilon": 3.0,
        "delta": 1e-5,
        "max_participations": 4,
        "until": date(2027, 1, 1),
        "operator": "an operator",
    }
    ledger.consent(policy=policy, **(terms | changes))


def spend(ledger, round_number=1, *, policy="p", request="a request", answered=0):
    return ledger.spend(policy=policy, round_number=round_number, request_sha256=request, answered=answered)


def answer(ledger, round_number=1, payload=b"an answer", *, policy="p", **asked):
    """A whole round: spend, train, release."""
    spent = spend(ledger, round_number, policy=policy, **asked)
    if spent is not None:
        raise AssertionError("this round was answered before")
    ledger.release(policy=policy, round_number=round_number, payload=payload)


def standing(ledger, policy="p"):
    [found] = [each for each in ledger.consents() if each.consent.policy == policy]
    return found


def counts(ledger, policy="p"):
    """(spent, released, burnt, pending, lost)."""
    s = standing(ledger, policy)
    return s.spent, s.released, s.burnt, s.pending, s.lost


def tamper(home, *statements):
    """Change the file past its rules, and put the rules back as they were."""
    import sqlite3

    connection = sqlite3.connect(home / "ledger.db")
    triggers = [sql for sql in _SCHEMA_1 if sql.startswith("CREATE TRIGGER")]
    for sql in triggers:
        connection.execute(f"DROP TRIGGER {sql.split()[2]}")
    for statement in statements:
        connection.execute(statement)
    for sql in triggers:
        connection.execute(sql)
    connection.commit()
    connection.close()


def run(home, code, *arguments):
    """Run code in a child process, which finds ``home``, ``ledgers`` and ``die``."""
    process = start(home, code, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def start(home, code, *arguments):
    tests = Path(__file__).parent
    script = _PRELUDE.format(tests=str(tests)) + code
    return subprocess.Popen(
        [sys.executable, "-c", script, str(home), *arguments],
        cwd=tests.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
