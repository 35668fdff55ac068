"""What a ledger survives: kill -9 at C0 to C8, a full disk, damaged files, other processes (I1 to I4, I7, I8)."""

import os
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest

import client.ledger.schema
from client.ledger.log import Log
from shared.errors import LedgerError, RefusedError

UNTOUCHED = (0, 0, 0, 0, 0)  # spent, released, burnt, pending, lost
BURNT = (1, 0, 1, 0, 0)
RELEASED = (1, 1, 0, 0, 0)

BEFORE_BEGIN = "ledger._log._begin = die\n"
BEFORE_COMMIT = "ledger._log._commit = die\n"
BEFORE_ANCHOR = "ledger._log.advance_anchor = die\n"
AFTER_ANCHOR = """
write = keystore.write
def write_and_die(*entry):
    write(*entry)
    die()
keystore.write = write_and_die
"""
OPEN = """
keystore = ledgers.keystore_of(home)
ledger = ledgers.reopen(home, keystore)
"""
SPEND = "ledgers.spend(ledger)\n"
STEP = "(home / 'touched').write_bytes(b'records were read')\n"
PAYLOAD = b"\x00noised\xff" * 1000
RELEASE = "ledger.release(policy='p', round_number=1, payload=b'\\x00noised\\xff' * 1000)\n"
SEND = "(home / 'sent').write_bytes(ledgers.spend(ledger))\n"
DIE = "die()\n"

CRASHES = {
    "C0 before BEGIN": (BEFORE_BEGIN + SPEND, UNTOUCHED),
    "C1 before COMMIT": (BEFORE_COMMIT + SPEND, UNTOUCHED),
    "C2 after COMMIT": (BEFORE_ANCHOR + SPEND, BURNT),
    "C2 after the anchor": (AFTER_ANCHOR + SPEND, BURNT),
    "C3 in the middle of a step": (SPEND + STEP + DIE, BURNT),
    "C4 before the release begins": (SPEND + STEP + BEFORE_BEGIN + RELEASE, BURNT),
    "C4 before the release is committed": (SPEND + STEP + BEFORE_COMMIT + RELEASE, BURNT),
    "C5 after the release is committed": (SPEND + STEP + BEFORE_ANCHOR + RELEASE, RELEASED),
    "C5 after the anchor": (SPEND + STEP + AFTER_ANCHOR + RELEASE, RELEASED),
    "C6 before it is sent": (SPEND + STEP + RELEASE + DIE, RELEASED),
    "C7 sent": (SPEND + STEP + RELEASE + SEND + DIE, RELEASED),
    "C8 acknowledged": (SPEND + STEP + RELEASE + SEND + "ledger.close()\n" + DIE, RELEASED),
}


@pytest.fixture
def home(ledgers, tmp_path):
    """A home outside this process, with a consent to ``p``."""
    home = tmp_path / "home"
    with ledgers.begin(home) as ledger:
        ledgers.agree(ledger)
    return home


def kill(ledgers, home, code):
    status, out, err = ledgers.run(home, code)
    assert status == ledgers.KILLED, out + err


@pytest.mark.fault("R4")
@pytest.mark.parametrize("point", CRASHES)
def test_i1_to_i4_hold_when_killed_at(ledgers, home, point):
    code, expected = CRASHES[point]
    kill(ledgers, home, OPEN + code)
    with ledgers.reopen(home) as ledger:
        assert ledgers.counts(ledger) == expected
        assert ledger.totals().epsilon == 3.0  # I3
        if expected == UNTOUCHED:
            assert not (home / "touched").exists()  # I1: nothing was read that was not spent before
            assert ledgers.spend(ledger) is None
        elif expected == BURNT:
            with pytest.raises(RefusedError, match="BURNT"):
                ledgers.spend(ledger)
        else:
            assert ledgers.spend(ledger) == PAYLOAD  # I4: the bytes that may have been sent
            if (home / "sent").exists():
                assert (home / "sent").read_bytes() == PAYLOAD
        with pytest.raises(RefusedError, match="CONFLICT"):
            ledgers.spend(ledger, request="another")
        assert ledgers.spend(ledger, 2, answered=ledgers.standing(ledger).released) is None


@pytest.mark.fault("R4")
@pytest.mark.parametrize("seam", [BEFORE_COMMIT, BEFORE_ANCHOR])
def test_i3_a_second_kill_while_the_first_is_cleared_up_changes_nothing(ledgers, home, seam):
    kill(ledgers, home, OPEN + SPEND + DIE)
    patch = seam.replace("ledger._log.", "client.ledger.log.Log.")
    for _ in range(2):
        status, _, _ = ledgers.run(home, "import client.ledger.log\n" + patch + OPEN)
        assert status == ledgers.KILLED
    with ledgers.reopen(home) as ledger:
        assert ledgers.counts(ledger) == BURNT
        assert [event.kind for event in ledger.history()].count("burn") == 1


@pytest.mark.fault("R4")
@pytest.mark.parametrize("seam", [BEFORE_COMMIT, BEFORE_ANCHOR, AFTER_ANCHOR])
def test_i2_a_consent_is_whole_or_absent_when_killed(ledgers, home, seam):
    kill(ledgers, home, OPEN + seam + "ledgers.agree(ledger, 'q', epsilon=2.0)")
    with ledgers.reopen(home) as ledger:
        assert ledger.totals().epsilon == (3.0 if seam == BEFORE_COMMIT else 5.0)


@pytest.mark.fault("R4")
@pytest.mark.parametrize("seam", [BEFORE_COMMIT, BEFORE_ANCHOR, AFTER_ANCHOR])
def test_i3_forgetting_is_whole_or_absent_when_killed(ledgers, home, seam):
    with ledgers.reopen(home) as ledger:
        ledgers.answer(ledger)
    kill(ledgers, home, OPEN + seam + "ledger.forgotten({'files': 2})")
    with ledgers.reopen(home) as ledger:
        forgotten = seam != BEFORE_COMMIT
        assert ledgers.standing(ledger).state == ("withdrawn" if forgotten else "in force")
        assert ledgers.counts(ledger) == RELEASED
        kept = ledger._log.connection.execute("SELECT count(*) FROM outbox").fetchone()
        assert kept == ((0,) if forgotten else (1,))


WORK = """
for number in range(1, 1000):
    ledgers.spend(ledger, number, answered=number - 1)
    print("spent", number, flush=True)
    ledger.release(policy="p", round_number=number, payload=bytes([number % 251]) * 5000)
    print("released", number, flush=True)
"""


def killed_at_random(ledgers, folder, rng):
    home = folder / f"home-{rng.random()}"
    with ledgers.begin(home) as ledger:
        ledgers.agree(ledger, max_participations=1000)
    process = ledgers.start(home, OPEN + WORK)
    seen = [process.stdout.readline().split()]
    deadline = time.monotonic() + rng.uniform(0, 0.15)
    while time.monotonic() < deadline:
        seen.append(process.stdout.readline().split())
    os.kill(process.pid, signal.SIGKILL)
    seen += [line.split() for line in process.stdout]  # what it had said; `communicate` would lose what is buffered
    process.communicate()
    seen = [line for line in seen if len(line) == 2]
    told = {kind: {int(number) for what, number in seen if what == kind} for kind in ("spent", "released")}
    with ledgers.reopen(home) as ledger:
        found = ledgers.standing(ledger)
        assert found.spent - len(told["spent"]) in (0, 1)  # at most the one being committed
        assert found.released - len(told["released"]) in (0, 1)
        assert found.burnt == found.spent - found.released
        if found.released:
            newest = max(e.round_number for e in ledger.history() if e.kind == "release")
            again = ledgers.spend(ledger, newest, answered=found.released)
            assert again == bytes([newest % 251]) * 5000


@pytest.mark.fault("R4")
def test_i3_a_kill_at_a_random_time_loses_nothing_that_was_told(ledgers, tmp_path):
    rng = random.Random(1)
    for _ in range(4):
        killed_at_random(ledgers, tmp_path, rng)


@pytest.mark.fault("R4")
@pytest.mark.slow
def test_i3_many_kills_at_random_times_lose_nothing_that_was_told(ledgers, tmp_path):
    rng = random.Random(2)
    for _ in range(60):
        killed_at_random(ledgers, tmp_path, rng)


# I7 full disk, read-only folder

LIMIT = """
size = max(path.stat().st_size for path in home.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (size + {room}, resource.RLIM_INFINITY))
"""
REFUSED = """
try:
    {call}
except LedgerError as error:
    print(error.code, error)
else:
    print("went through")
"""


def without_room(call, *, room):
    """No file of the home may grow by more than ``room`` bytes."""
    return LIMIT.format(room=room) + REFUSED.format(call=call.strip())


@pytest.mark.fault("R10")
def test_i7_a_full_disk_stops_a_spend(ledgers, home):
    # events of a kind that fills the write-ahead log beyond the largest file of the home
    grown = "for _ in range(40):\n    ledger.pause(); ledger.resume()\n"
    status, out, err = ledgers.run(home, OPEN + grown + without_room(SPEND, room=0))
    assert (status, out.split()[:1]) == (0, ["LEDGER"]), out + err
    with ledgers.reopen(home) as ledger:
        assert ledgers.counts(ledger) in (UNTOUCHED, BURNT)  # the write may have come through before the error
        assert ledgers.spend(ledger, 2) is None  # and with room again it goes on


@pytest.mark.fault("R10")
def test_i7_a_full_disk_stops_a_release_and_the_round_is_burnt(ledgers, home):
    release = "ledger.release(policy='p', round_number=1, payload=bytes(1_000_000))"
    status, out, err = ledgers.run(home, OPEN + SPEND + without_room(release, room=100_000))
    assert (status, out.split()[:1]) == (0, ["LEDGER"]), out + err
    with ledgers.reopen(home) as ledger:
        assert ledgers.counts(ledger) == BURNT


def test_i7_the_same_release_goes_through_where_there_is_room(ledgers, home):
    release = "ledger.release(policy='p', round_number=1, payload=bytes(1_000_000))"
    status, out, err = ledgers.run(home, OPEN + SPEND + without_room(release, room=1_200_000))
    assert (status, out) == (0, "went through\n"), err
    with ledgers.reopen(home) as ledger:
        assert ledgers.spend(ledger) == bytes(1_000_000)


@pytest.mark.fault("R10")
@pytest.mark.parametrize("room", range(0, 24_000, 4_000))
def test_i7_wherever_a_beginning_runs_out_of_room_it_can_be_begun_again(ledgers, tmp_path, room):
    home = tmp_path / "home"
    home.mkdir()
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({room}, resource.RLIM_INFINITY))\n"
    status, out, err = ledgers.run(home, limit + REFUSED.format(call="ledgers.begin(home)"))
    assert status == 0, err
    assert out.startswith("LEDGER"), out
    with ledgers.begin(home) as ledger:
        ledgers.agree(ledger)


@pytest.mark.fault("R10")
def test_i7_a_database_that_may_not_grow_stops_spend_and_release(ledgers, home):
    """SQLITE_FULL itself, which RLIMIT_FSIZE does not give."""
    with ledgers.reopen(home) as ledger:
        ledgers.spend(ledger)
        [pages] = ledger._log.connection.execute("PRAGMA page_count").fetchone()
        ledger._log.connection.execute(f"PRAGMA max_page_count = {pages}")
        before = ledger.history()
        with pytest.raises(LedgerError, match="full"):
            ledger.release(policy="p", round_number=1, payload=bytes(20_000))
        assert ledger.history() == before
        ledger._log.connection.execute(f"PRAGMA max_page_count = {pages + 100}")
        ledger.release(policy="p", round_number=1, payload=b"smaller")
        assert ledgers.spend(ledger) == b"smaller"


@pytest.mark.fault("R20")
def test_i7_a_spend_whose_anchor_cannot_be_kept_is_refused_and_burnt(ledgers, tmp_path):
    keystore = ledgers.MemoryKeystore()
    with ledgers.begin(tmp_path, keystore) as ledger:
        ledgers.agree(ledger)
        commit = ledger._log._commit

        def commit_and_break():
            commit()
            keystore.broken = True

        ledger._log._commit = commit_and_break
        with pytest.raises(LedgerError, match="keyring is locked"):
            ledgers.spend(ledger)
    keystore.broken = False
    with ledgers.reopen(tmp_path, keystore) as ledger:
        assert ledgers.counts(ledger) == BURNT


@pytest.mark.fault("R10")
@pytest.mark.parametrize("locked", ["folder", "file"])
def test_i7_a_read_only_ledger_is_not_used(ledgers, locked):
    folder = Path(tempfile.mkdtemp())
    home = folder / "home"
    try:
        with ledgers.begin(home) as ledger:
            ledgers.agree(ledger)
        (home / "ledger.db").chmod(0o444 if locked == "file" else 0o666)
        home.chmod(0o555 if locked == "folder" else 0o777)
        folder.chmod(0o755)
        (folder / "home-keys").chmod(0o777)
        drop = "os.setgid(65534); os.setuid(65534)\n" if os.geteuid() == 0 else ""  # root may write everywhere
        status, out, err = ledgers.run(home, drop + REFUSED.format(call="ledgers.spend(ledgers.reopen(home))"))
        assert (status, out.split()[:1]) == (0, ["LEDGER"]), out + err
    finally:
        home.chmod(0o700)
        shutil.rmtree(folder)


# I7, I8 damaged files


@pytest.fixture
def images(ledgers, tmp_path):
    """A home of many rounds, closed, and copied while open with its newest in the write-ahead log; both anchored."""
    keystore = ledgers.MemoryKeystore()
    home = tmp_path / "home"
    with ledgers.begin(home, keystore) as ledger:
        ledgers.agree(ledger, max_participations=30)
        for number in range(1, 10):
            ledgers.answer(ledger, number, bytes([number]) * 3000, answered=number - 1)
    with ledgers.reopen(home, keystore) as ledger:
        for number in range(10, 13):
            ledgers.answer(ledger, number, bytes([number]) * 3000, answered=number - 1)
        shutil.copytree(home, tmp_path / "open")
        events = ledger.history()
    shutil.copytree(home, tmp_path / "closed")
    (tmp_path / "closed" / "ledger.db-wal").unlink(missing_ok=True)
    return tmp_path, keystore, events


def opens_with_less(ledgers, home, keystore, events) -> bool | None:
    """None: refused. Otherwise whether a ledger opened shows anything else than the whole history."""
    try:
        with ledgers.reopen(home, ledgers.MemoryKeystore(keystore.entries)) as ledger:
            return ledger.history() != events
    except LedgerError:
        return None


@pytest.mark.fault("R12")
@pytest.mark.parametrize(("image", "name"), [("closed", "ledger.db"), ("open", "ledger.db"), ("open", "ledger.db-wal")])
@pytest.mark.parametrize("damage", ["flip", "truncate", "zero"])
def test_i7_a_damaged_file_shows_everything_or_nothing(ledgers, images, image, name, damage):
    folder, keystore, events = images
    whole = (folder / image / name).read_bytes()
    rng = random.Random(f"{image} {name} {damage}")
    seen = []
    for case in range(25):
        home = folder / f"case-{case}"
        shutil.copytree(folder / image, home)
        at = rng.randrange(len(whole))
        content = bytearray(whole)
        if damage == "flip":
            content[at] ^= 1 << rng.randrange(8)
        elif damage == "truncate":
            del content[at:]
        else:
            content[at : at + 512] = bytes(len(content[at : at + 512]))
        (home / name).write_bytes(content)
        seen.append(opens_with_less(ledgers, home, keystore, events))
        shutil.rmtree(home)
    assert True not in seen
    if (image, name) != ("open", "ledger.db"):  # most of that file is superseded by its log
        assert None in seen  # the damage was real


@pytest.mark.fault("R12")
def test_i7_every_flip_within_the_events_is_refused(ledgers, images):
    """Where an event's own bytes lie, no flip may pass: not one of the chain's inputs is left out of it."""
    folder, keystore, events = images
    whole = (folder / "closed" / "ledger.db").read_bytes()
    spend = next(event for event in events if event.kind == "spend" and event.round_number == 5)
    start = whole.index(spend.mac) - len(spend.row()[5]) - len("p") - len("spend") - len(spend.at)
    home = folder / "closed"
    for at in range(start - 1, start + 110):
        content = bytearray(whole)
        content[at] ^= 1 << (at % 8)
        (home / "ledger.db").write_bytes(content)
        assert opens_with_less(ledgers, home, keystore, events) is None, at
    (home / "ledger.db").write_bytes(whole)
    assert opens_with_less(ledgers, home, keystore, events) is False


@pytest.mark.fault("R12")
def test_i7_a_damaged_index_is_refused_though_every_event_is_whole(ledgers, images):
    """The rule that a round is spent once rests on an index, which the chain does not cover."""
    folder, keystore, _ = images
    path = folder / "closed" / "ledger.db"
    connection = sqlite3.connect(path)
    [[page]] = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'one_spend'")
    [[size]] = connection.execute("PRAGMA page_size")
    connection.close()
    content = bytearray(path.read_bytes())
    content[page * size - 2] ^= 1  # in the entry of the first round: its key, or the number of its event
    path.write_bytes(content)
    with pytest.raises(LedgerError, match="SQLite finds it damaged"):
        ledgers.reopen(folder / "closed", keystore)


@pytest.mark.fault("R12")
def test_i8_a_deleted_write_ahead_log_is_a_rollback(ledgers, images):
    folder, keystore, events = images
    home = folder / "open"
    assert opens_with_less(ledgers, shutil.copytree(home, folder / "whole"), keystore, events) is False
    (home / "ledger.db-wal").unlink()
    with pytest.raises(LedgerError) as caught:
        ledgers.reopen(home, keystore)
    assert caught.value.code == "ROLLBACK"


@pytest.mark.fault("R12")
def test_i8_an_older_write_ahead_log_is_a_rollback(ledgers, tmp_path):
    keystore, home = ledgers.MemoryKeystore(), tmp_path / "home"
    with ledgers.begin(home, keystore) as ledger:
        ledgers.agree(ledger)
        older = (home / "ledger.db-wal").read_bytes()
        ledgers.spend(ledger)
        shutil.copytree(home, tmp_path / "copy")
    (tmp_path / "copy" / "ledger.db-wal").write_bytes(older)
    with pytest.raises(LedgerError) as caught:
        ledgers.reopen(tmp_path / "copy", keystore)
    assert caught.value.code == "ROLLBACK"


# Two processes

RACE = """
keystore = ledgers.keystore_of(home)
ledger = ledgers.reopen(home, keystore, round_running=True)
number, request = int(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
sys.stdin.readline()
try:
    print(ledgers.spend(ledger, number, request=request), flush=True)
except (RefusedError, LedgerError) as error:
    print(error.code, flush=True)
sys.stdin.readline()
"""


def race(ledgers, home, *asked):
    """What processes that spend at the same moment are told."""
    processes = [ledgers.start(home, RACE, str(number), request) for number, request in asked]
    for process in processes:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.stdout.readline().strip() for process in processes]
    for process in processes:
        process.communicate("done\n", timeout=30)
    return told


@pytest.mark.fault("R18")
def test_i2_of_two_processes_racing_for_the_last_round_exactly_one_wins(ledgers, tmp_path):
    for attempt in range(4):
        home = tmp_path / f"home-{attempt}"
        with ledgers.begin(home) as ledger:
            ledgers.agree(ledger, max_participations=1)
        told = race(ledgers, home, (1, "a"), (2, "b"))
        assert told.count("None") == 1, told
        assert set(told) <= {"None", "BUDGET", "ROUND"}
        with ledgers.reopen(home) as ledger:
            assert ledgers.standing(ledger).spent == 1


@pytest.mark.fault("R18")
@pytest.mark.parametrize(("requests", "loser"), [("aa", "BURNT"), ("ab", "CONFLICT")])
def test_i4_of_two_processes_racing_for_the_same_round_exactly_one_trains_it(ledgers, home, requests, loser):
    told = race(ledgers, home, *((1, request) for request in requests))
    assert sorted(told) == sorted(["None", loser])


@pytest.mark.fault("R18")
def test_i3_processes_that_spend_different_rounds_are_all_counted(ledgers, home):
    told = race(ledgers, home, (1, "a"), (2, "b"), (3, "c"))
    assert set(told) <= {"None", "ROUND"}  # rounds only go forward: a lower one may come too late
    with ledgers.reopen(home) as ledger:
        assert ledgers.standing(ledger).spent == told.count("None") >= 1


@pytest.mark.fault("R18")
def test_i8_the_anchor_never_moves_back_however_two_processes_interleave(ledgers, tmp_path):
    """A commits, B commits and anchors, A anchors: A must remember B's event, not its own."""
    keystore = ledgers.MemoryKeystore()
    written = []
    with (
        ledgers.begin(tmp_path, keystore) as a,
        ledgers.reopen(tmp_path, keystore, round_running=True) as b,
        pytest.MonkeyPatch.context() as patch,
    ):
        ledgers.agree(a)
        write, advance = keystore.write, a._log.advance_anchor

        def advance_late():
            ledgers.spend(b, 2)
            advance()

        patch.setattr(a._log, "advance_anchor", advance_late)
        patch.setattr(keystore, "write", lambda entry, secret: (written.append(secret), write(entry, secret)))
        ledgers.spend(a, 1)
        newest = a.history()[-1]
    assert newest.round_number == 2
    assert newest.mac.hex().encode() in keystore.read("anchor")
    assert len(set(written)) == 1


@pytest.mark.fault("R12")
def test_i7_a_ledger_another_process_holds_is_not_waited_for_for_ever(ledgers, home, monkeypatch):
    monkeypatch.setattr(client.ledger.schema, "_BUSY_TIMEOUT_S", 0.05)
    with ledgers.reopen(home) as ledger:
        other = sqlite3.connect(home / "ledger.db", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(LedgerError, match="locked"):
            ledgers.spend(ledger)
        assert ledgers.counts(ledger) == UNTOUCHED  # reading goes on
        with pytest.raises(LedgerError, match="locked"):
            ledgers.recover(home)  # and busy is not taken for damaged
        other.rollback()
        other.close()
        assert ledgers.spend(ledger) is None
    assert sorted(path.name for path in home.iterdir()) == ["ledger.db"]


def test_an_error_within_a_transaction_leaves_the_open_ledger_as_the_disk_has_it(ledgers, home, monkeypatch):
    with ledgers.reopen(home) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(Log, "_commit", lambda _: (_ for _ in ()).throw(OSError("the disk is gone")))
            with pytest.raises(LedgerError, match="the disk is gone"):
                ledgers.spend(ledger)
        assert ledgers.counts(ledger) == UNTOUCHED
        assert ledgers.spend(ledger) is None
