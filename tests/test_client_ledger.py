"""What a ledger promises: invariants I1 to I9, each named where it is tested; I10 is the vault's, I6 the training's."""

import hashlib
import json
import math
import sqlite3
import stat
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone
from pathlib import Path

import pytest

import client.ledger.log
import client.ledger.schema
from client.ledger.book import add_up
from client.ledger.events import chain_key
from shared.errors import LedgerError, RefusedError


@pytest.fixture
def keystore(ledgers):
    return ledgers.MemoryKeystore()


@pytest.fixture
def clock(ledgers):
    return ledgers.Clock()


@pytest.fixture
def ledger(ledgers, tmp_path, keystore, clock):
    with ledgers.begin(tmp_path, keystore, clock) as ledger:
        yield ledger


@pytest.fixture
def reopen(ledgers, tmp_path, keystore, clock, ledger):
    """Close the ledger and open it again."""

    def again(**options):
        ledger.close()
        return ledgers.reopen(tmp_path, keystore, clock, **options)

    return again


def refusal(call, *args, **kwargs) -> str:
    with pytest.raises(RefusedError) as caught:
        call(*args, **kwargs)
    return caught.value.code


def other_connection(tmp_path):
    return sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)


# I1 spend before touch: what is durable when the calls return


def test_i1_a_spend_is_committed_and_anchored_before_the_call_returns(ledgers, ledger, keystore, tmp_path):
    ledgers.agree(ledger)
    assert ledgers.spend(ledger) is None
    [(kind, mac)] = other_connection(tmp_path).execute("SELECT kind, mac FROM event ORDER BY seq DESC LIMIT 1")
    anchor = json.loads(keystore.read("anchor"))
    assert (kind, anchor["seq"], anchor["mac"]) == ("spend", 3, mac.hex())


def test_i1_every_commit_waits_for_the_disk(ledger):
    def ask(name):
        [value] = ledger._log.connection.execute(f"PRAGMA {name}").fetchone()
        return value

    assert ask("journal_mode") == "wal"
    assert ask("synchronous") == 2  # FULL
    assert ask("fullfsync") == ask("checkpoint_fullfsync") == ask("secure_delete") == 1


def test_i1_nothing_is_released_of_a_round_that_was_not_spent(ledgers, ledger):
    ledgers.agree(ledger)
    with pytest.raises(LedgerError, match="only a round that was spent"):
        ledger.release(policy="p", round_number=1, payload=b"x")
    ledgers.answer(ledger)
    with pytest.raises(LedgerError, match="only a round that was spent"):
        ledger.release(policy="p", round_number=1, payload=b"x")
    assert refusal(ledger.release, policy="q", round_number=1, payload=b"x") == "CONSENT"


def test_i1_the_release_event_holds_hash_and_size_of_the_payload(ledgers, ledger):
    ledgers.agree(ledger)
    ledgers.answer(ledger, payload=b"12345")
    assert ledger.history()[-1].detail == {"sha256": hashlib.sha256(b"12345").hexdigest(), "size_bytes": 5}


# I2 cap


@pytest.mark.fault("R17")
def test_i2_rounds_stop_at_the_consent(ledgers, ledger):
    ledgers.agree(ledger, max_participations=2)
    ledgers.answer(ledger, 1)
    ledgers.spend(ledger, 2, answered=1)
    assert refusal(ledgers.spend, ledger, 3, answered=1) == "BUDGET"
    assert ledgers.standing(ledger).state == "exhausted"


def test_i2_campaigns_add_up_to_the_cap_and_no_further(ledgers, ledger):
    ledgers.agree(ledger, "p", epsilon=3.3, delta=5e-5)
    ledgers.agree(ledger, "q", epsilon=6.7, delta=5e-5)  # exactly 10 and 1e-4
    totals = ledger.totals()
    assert (totals.epsilon, totals.left_epsilon, totals.delta, totals.left_delta) == (10.0, 0.0, 1e-4, 0.0)
    with pytest.raises(LedgerError, match=r"cap of 10\.0: 10\.0 is reserved and 0\.0 left, .* asks for 1e-09"):
        ledgers.agree(ledger, "r", epsilon=1e-12, delta=0.0)


def test_i2_delta_has_a_cap_of_its_own(ledgers, ledger):
    ledgers.agree(ledger, "p", epsilon=0.1, delta=1e-4)
    with pytest.raises(LedgerError, match=r"delta of all campaigns must stay within the cap of 0\.0001"):
        ledgers.agree(ledger, "q", epsilon=0.1, delta=1e-15)


def test_i2_ten_tenths_are_one(ledgers, tmp_path):
    with ledgers.begin(tmp_path, cap_epsilon=1.0) as ledger:
        for number in range(10):
            ledgers.agree(ledger, f"p{number}", epsilon=0.1, delta=1e-6)
        assert ledger.totals().epsilon == 1.0


def test_i2_withdrawing_gives_nothing_back(ledgers, ledger):
    ledgers.agree(ledger, epsilon=8.0)
    ledger.withdraw("p")
    with pytest.raises(LedgerError, match=r"8\.0 is reserved"):
        ledgers.agree(ledger, "q", epsilon=3.0)


@pytest.mark.parametrize(
    "statement",
    [
        # beyond max_participations, for an unknown policy, twice, backwards
        "INSERT INTO event VALUES (90, 'x', 'spend', 'p', 9, '{}', zeroblob(32))",
        "INSERT INTO event VALUES (90, 'x', 'spend', 'unknown', 9, '{}', zeroblob(32))",
        "INSERT INTO event VALUES (90, 'x', 'spend', 'q', 1, '{}', zeroblob(32))",
        "INSERT INTO event VALUES (90, 'x', 'spend', 'r', 3, '{}', zeroblob(32))",
        # a second consent, one beyond the caps, one without a price, one with a price that is no whole number
        "INSERT INTO event SELECT 90, at, kind, policy, round, detail, mac FROM event WHERE policy = 'p' AND seq < 3",
        """INSERT INTO event VALUES (90, 'x', 'consent', 'new', NULL,
            '{"nano_epsilon": 9000000001, "femto_delta": 1, "max_participations": 1}', zeroblob(32))""",
        """INSERT INTO event VALUES (90, 'x', 'consent', 'new', NULL,
            '{"nano_epsilon": 1, "femto_delta": 100000000000, "max_participations": 1}', zeroblob(32))""",
        "INSERT INTO event VALUES (90, 'x', 'consent', 'new', NULL, '{\"max_participations\": 1}', zeroblob(32))",
        """INSERT INTO event VALUES (90, 'x', 'consent', 'new', NULL,
            '{"nano_epsilon": 0.5, "femto_delta": 1, "max_participations": 1}', zeroblob(32))""",
        # the end of a round never spent, a second end
        "INSERT INTO event VALUES (90, 'x', 'release', 'q', 3, '{}', zeroblob(32))",
        "INSERT INTO event VALUES (90, 'x', 'burn', 'q', 1, '{}', zeroblob(32))",
        # forms
        "INSERT INTO event VALUES (90, 'x', 'refund', 'p', NULL, '{}', zeroblob(32))",
        "INSERT INTO event VALUES (90, 'x', 'spend', 'q', NULL, '{}', zeroblob(32))",
        "INSERT INTO event VALUES (90, 'x', 'spend', 'q', 0, '{}', zeroblob(32))",
        "INSERT INTO event VALUES (90, 'x', 'withdraw', NULL, NULL, '{}', zeroblob(32))",
        "INSERT INTO event VALUES (90, 'x', 'pause', NULL, NULL, '{', zeroblob(32))",
        "INSERT INTO event VALUES (90, 'x', 'pause', NULL, NULL, '{}', zeroblob(31))",
        # append-only
        "UPDATE event SET detail = '{}' WHERE seq = 3",
        "DELETE FROM event WHERE seq = (SELECT max(seq) FROM event)",
        "INSERT OR REPLACE INTO event VALUES (3, 'x', 'pause', NULL, NULL, '{}', zeroblob(32))",
    ],
)
def test_i2_sqlite_itself_refuses_what_our_code_must_not_write(ledgers, ledger, tmp_path, statement):
    """A second line of defence, against our own mistakes; NULL in a comparison must not let anything through."""
    ledgers.agree(ledger, "p", epsilon=1.0, max_participations=1)
    for policy in "qr":
        ledgers.agree(ledger, policy, epsilon=0.0000001)
        ledgers.answer(ledger, 1 if policy == "q" else 5, policy=policy)
    ledgers.spend(ledger, 2, policy="q")
    ledgers.spend(ledger, policy="p")
    connection = other_connection(tmp_path)
    connection.execute("PRAGMA recursive_triggers = ON")
    before = connection.execute("SELECT * FROM event").fetchall()
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
    assert connection.execute("SELECT * FROM event").fetchall() == before


def test_i2_what_sqlite_refuses_is_possible_just_below_the_limit(ledgers, ledger, tmp_path):
    """The power of the test above: the same statements within the rules pass."""
    ledgers.agree(ledger, "p", epsilon=1.0, max_participations=2)
    ledgers.spend(ledger, 1)
    connection = other_connection(tmp_path)
    for statement in (
        "INSERT INTO event VALUES (90, 'x', 'spend', 'p', 9, '{}', zeroblob(32))",
        """INSERT INTO event VALUES (91, 'x', 'consent', 'new', NULL,
            '{"nano_epsilon": 9000000000, "femto_delta": 1, "max_participations": 1}', zeroblob(32))""",
        "INSERT INTO event VALUES (92, 'x', 'burn', 'p', 9, '{}', zeroblob(32))",
        "INSERT INTO event VALUES (93, 'x', 'withdraw', 'p', NULL, '{}', zeroblob(32))",
    ):
        connection.execute(statement)


# I3 monotone


def test_i3_no_call_lowers_what_is_reserved_or_spent(ledgers, ledger, reopen, clock):
    ledgers.agree(ledger)
    ledgers.answer(ledger, 1)
    ledgers.spend(ledger, 2, answered=1)
    ledger.burn(policy="p", round_number=2)
    clock.jump(days=3650)
    ledger.pause()
    ledger.resume()
    ledger.withdraw("p")
    clock.jump(days=-7300)
    ledger.forgotten({"records": 3})
    ledger._log.connection.execute("VACUUM")
    with reopen() as again:
        assert (again.totals().epsilon, again.totals().delta) == (3.0, 1e-5)
        assert ledgers.counts(again) == (2, 1, 1, 0, 0)


def test_i3_forgetting_withdraws_everything_and_keeps_the_counters_and_a_receipt(ledgers, ledger, tmp_path):
    ledgers.agree(ledger, "p")
    ledgers.agree(ledger, "q")
    ledgers.answer(ledger, payload=b"a payload that is unique")
    ledger.forgotten({"deleted": ["records/000001"]})
    assert ledger.history()[-1].detail == {"deleted": ["records/000001"]}
    assert [each.state for each in ledger.consents()] == ["withdrawn"] * 2
    assert ledgers.standing(ledger).released == 1
    assert ledger.totals().epsilon == 6.0
    assert refusal(ledgers.spend, ledger) == "CONSENT"
    found = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"a payload that is unique" not in found
    assert b"records/000001" in found


# I4 idempotence


def test_i4_the_same_request_again_gets_the_same_bytes_and_costs_nothing(ledgers, ledger, reopen):
    ledgers.agree(ledger, max_participations=1)
    ledgers.answer(ledger, payload=b"\x00 noised \xff")
    before = ledger.history()
    assert ledgers.spend(ledger) == ledgers.spend(ledger, answered=1) == b"\x00 noised \xff"
    assert ledger.history() == before
    with reopen() as again:
        assert ledgers.spend(again, answered=1) == b"\x00 noised \xff"
        assert ledgers.counts(again) == (1, 1, 0, 0, 0)


def test_i4_an_empty_answer_is_an_answer(ledgers, ledger):
    ledgers.agree(ledger)
    ledgers.answer(ledger, payload=b"")
    assert ledgers.spend(ledger) == b""


def test_i4_another_request_for_the_same_round_is_a_conflict(ledgers, ledger):
    ledgers.agree(ledger)
    ledgers.spend(ledger, request="one")
    assert refusal(ledgers.spend, ledger, request="two") == "CONFLICT"
    ledger.release(policy="p", round_number=1, payload=b"x")
    assert refusal(ledgers.spend, ledger, request="two") == "CONFLICT"


def test_i4_a_round_spent_and_not_released_is_never_trained_again(ledgers, ledger, reopen):
    ledgers.agree(ledger)
    ledgers.spend(ledger)
    assert refusal(ledgers.spend, ledger) == "BURNT"
    with reopen() as again:
        assert refusal(ledgers.spend, again) == "BURNT"
        assert refusal(again.release, policy="p", round_number=1, payload=b"late") == "BURNT"


def test_i4_rounds_only_go_forward(ledgers, ledger):
    ledgers.agree(ledger)
    ledgers.answer(ledger, 3, b"three")
    for number in (2, 1, 0, -1, 2**63, True, 4.0):
        assert refusal(ledgers.spend, ledger, number, answered=1) == "ROUND"
    ledgers.answer(ledger, 7, b"seven", answered=1)
    assert ledgers.spend(ledger, 7, answered=2) == b"seven"
    assert refusal(ledgers.spend, ledger, 3, answered=2) == "ROUND"  # its payload made room for the newer one


def test_i4_campaigns_do_not_share_rounds(ledgers, ledger):
    for policy in "pq":
        ledgers.agree(ledger, policy)
        ledgers.answer(ledger, 1, policy.encode(), policy=policy)
    assert [ledgers.spend(ledger, policy=policy) for policy in "pq"] == [b"p", b"q"]


def test_i4_a_late_release_does_not_push_out_a_newer_one(ledgers, ledger):
    ledgers.agree(ledger)
    ledgers.spend(ledger, 1)
    ledgers.answer(ledger, 2, b"two")
    ledger.release(policy="p", round_number=1, payload=b"one")
    assert ledgers.spend(ledger, 2, answered=2) == b"two"
    assert refusal(ledgers.spend, ledger, 1, answered=2) == "ROUND"


def test_i4_a_payload_that_is_not_the_one_released_is_not_sent(ledgers, ledger, tmp_path):
    ledgers.agree(ledger)
    ledgers.answer(ledger, payload=b"noised")
    other_connection(tmp_path).execute("UPDATE outbox SET payload = ?", (b"secret",))
    with pytest.raises(LedgerError, match="its bytes have changed"):
        ledgers.spend(ledger)


# I5 conservative


def test_i5_prices_are_rounded_up_and_caps_down(ledgers, tmp_path):
    with ledgers.begin(tmp_path, cap_epsilon=1.0000000019, cap_delta=1.9e-15) as ledger:
        ledgers.agree(ledger, "p", epsilon=1.0000000001, delta=0.1e-15)
        totals = ledger.totals()
        assert (totals.epsilon, totals.cap_epsilon) == (1.000000001, 1.000000001)
        assert (totals.delta, totals.cap_delta) == (1e-15, 1e-15)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epsilon": math.nan},
        {"epsilon": math.inf},
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"delta": math.nan},
        {"delta": -1e-9},
        {"delta": 1.0},
        {"max_participations": 0},
        {"max_participations": math.nan},
        {"max_participations": True},
        {"policy": ""},
        {"until": date(2025, 12, 31)},
        {"until": datetime(2027, 1, 1, tzinfo=UTC)},
        {"until": None},
    ],
)
def test_i5_a_consent_without_meaning_is_refused_and_leaves_nothing(ledgers, ledger, wrong):
    with pytest.raises(LedgerError, match="must"):
        ledgers.agree(ledger, **wrong)
    assert len(ledger.history()) == 1


@pytest.mark.parametrize("wrong", [{"cap_epsilon": math.nan}, {"cap_epsilon": 0.0}, {"cap_delta": 1.0}])
def test_i5_caps_without_meaning_are_refused(ledgers, tmp_path, wrong):
    with pytest.raises(LedgerError, match="must be in"):
        ledgers.begin(tmp_path, **wrong)
    assert not (tmp_path / "ledger.db").exists()


def test_i5_what_the_server_has_seen_must_be_a_number(ledgers, ledger):
    ledgers.agree(ledger)
    for wrong in (math.nan, -1, "3", None, True):
        with pytest.raises(LedgerError, match="answered"):
            ledgers.spend(ledger, answered=wrong)


def test_i5_an_event_of_an_unknown_kind_is_not_passed_over(ledgers, ledger):
    ledgers.agree(ledger)
    known = ledger.history()
    assert add_up(known).nano_epsilon == 3 * 10**9
    with pytest.raises(LedgerError, match="known kind, got 'refund'"):
        add_up([*known, replace(known[-1], kind="refund")])


# Consent, pause, refusals


def test_a_refusal_writes_nothing(ledgers, ledger, tmp_path, keystore):
    ledgers.agree(ledger)
    ledgers.answer(ledger)
    ledger.pause()
    before = other_connection(tmp_path).execute("SELECT * FROM event").fetchall(), keystore.read("anchor")
    assert refusal(ledgers.spend, ledger, 2, answered=4) == "PAUSED"
    assert refusal(ledgers.spend, ledger, policy="unknown") == "CONSENT"
    assert (other_connection(tmp_path).execute("SELECT * FROM event").fetchall(), keystore.read("anchor")) == before


def test_a_pause_holds_over_a_restart_and_stops_resending_and_releasing(ledgers, ledger, reopen):
    ledgers.agree(ledger)
    ledgers.answer(ledger)
    ledgers.spend(ledger, 2, answered=1)
    ledger.pause()
    ledger.pause()
    assert refusal(ledger.release, policy="p", round_number=2, payload=b"x") == "PAUSED"
    with reopen() as again:
        assert again.totals().paused
        assert refusal(ledgers.spend, again) == "PAUSED"
        again.resume()
        again.resume()
        assert ledgers.spend(again) == b"an answer"
        kinds = [event.kind for event in again.history()]
        assert kinds.count("pause") == kinds.count("resume") == 1


def test_a_consent_is_given_once_and_withdrawn_for_ever(ledgers, ledger):
    ledgers.agree(ledger)
    with pytest.raises(LedgerError, match="given once"):
        ledgers.agree(ledger)
    ledgers.answer(ledger)
    ledgers.spend(ledger, 2, answered=1)
    ledger.withdraw("p")
    ledger.withdraw("p")
    assert [event.kind for event in ledger.history()].count("withdraw") == 1
    assert refusal(ledgers.spend, ledger) == "CONSENT"
    assert refusal(ledger.release, policy="p", round_number=2, payload=b"x") == "CONSENT"
    with pytest.raises(LedgerError, match="given once"):
        ledgers.agree(ledger)
    with pytest.raises(LedgerError, match="none was given"):
        ledger.withdraw("q")


def test_a_reader_sees_what_was_agreed_and_what_became_of_it(ledgers, ledger):
    ledgers.agree(ledger, max_participations=3)
    ledgers.answer(ledger, 1)
    ledgers.spend(ledger, 2, answered=1)
    ledger.burn(policy="p", round_number=2)
    ledger.burn(policy="p", round_number=2)
    ledgers.spend(ledger, 3, answered=1)
    [found] = ledger.consents()
    assert (found.spent, found.released, found.burnt, found.pending, found.lost) == (3, 1, 1, 1, 0)
    assert found.state == "exhausted"
    assert found.consent.until == date(2027, 1, 1)
    assert (found.consent.epsilon, found.consent.operator) == (3.0, "an operator")
    assert [event.seq for event in ledger.history()] == list(range(1, 8))
    assert {event.at for event in ledger.history()} == {"2026-01-01T12:00:00+00:00"}


def test_beside_a_running_round_opening_burns_nothing(ledgers, ledger, tmp_path, keystore, clock):
    ledgers.agree(ledger)
    ledgers.spend(ledger)
    with ledgers.reopen(tmp_path, keystore, clock, round_running=True) as reader:
        assert ledgers.counts(reader) == (1, 0, 0, 1, 0)
        reader.pause()
        reader.resume()
    ledger.release(policy="p", round_number=1, payload=b"x")
    assert ledgers.counts(ledger) == (1, 1, 0, 0, 0)


# I7 fail closed (the rest of it is in test_client_ledger_faults.py)


@pytest.mark.fault("R12")
def test_i7_without_its_key_or_anchor_a_ledger_does_not_open(reopen, keystore):
    for entry in ("ledger-key", "anchor"):
        kept = keystore.read(entry)
        keystore.delete(entry)
        with pytest.raises(LedgerError, match="keystore must hold"):
            reopen()
        keystore.write(entry, kept)
    reopen().close()


@pytest.mark.parametrize(
    "anchor", [b"", b"{}", b"\xff", b"null", b"[1]", b'{"seq": NaN}', b'{"seq": 1.0, "nano_epsilon": 0}']
)
def test_i7_a_damaged_anchor_is_not_read_as_nothing_spent(ledgers, reopen, keystore, tmp_path, anchor):
    keystore.write("anchor", anchor)
    with pytest.raises(LedgerError, match="damaged"):
        reopen()
    with pytest.raises(LedgerError, match="damaged"):
        ledgers.recover(tmp_path, keystore)


@pytest.mark.parametrize(
    "field", ["mac", "nano_epsilon", "femto_delta", "cap_nano_epsilon", "cap_femto_delta", "ledger_id"]
)
def test_i7_an_anchor_of_another_history_is_not_this_ledgers(ledgers, ledger, reopen, keystore, field):
    ledgers.agree(ledger)
    anchor = json.loads(keystore.read("anchor"))
    anchor[field] = anchor[field] - 1 if isinstance(anchor[field], int) else anchor[field][::-1]
    keystore.write("anchor", json.dumps(anchor, sort_keys=True, separators=(",", ":")).encode())
    with pytest.raises(LedgerError, match="another history"):
        reopen()


@pytest.mark.fault("R20")
def test_i7_a_keystore_that_fails_stops_everything(ledgers, ledger, keystore):
    ledgers.agree(ledger)
    keystore.broken = True
    for call in (ledger.totals, ledger.consents, ledger.history, ledger.pause):
        with pytest.raises(LedgerError, match="the keyring is locked"):
            call()
    with pytest.raises(LedgerError, match="the keyring is locked"):
        ledgers.spend(ledger)
    keystore.broken = False
    assert ledgers.counts(ledger) == (0, 0, 0, 0, 0)


@pytest.mark.fault("R19")
def test_i7_a_newer_schema_is_refused_and_not_recovered_over(ledgers, ledger, reopen, tmp_path, keystore):
    ledger.close()
    connection = other_connection(tmp_path)
    connection.execute(f"PRAGMA user_version = {len(client.ledger.schema.MIGRATIONS) + 1}")
    connection.close()
    with pytest.raises(LedgerError, match="newer Sottovoce"):
        reopen()
    with pytest.raises(LedgerError, match="newer Sottovoce"):
        ledgers.recover(tmp_path, keystore)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.db"]


@pytest.mark.fault("R19")
def test_i7_a_ledger_of_an_older_schema_is_brought_up_to_date_and_nothing_else(
    ledgers, ledger, reopen, monkeypatch, tmp_path
):
    ledgers.agree(ledger)
    ledgers.answer(ledger)
    before = ledger.history()

    def to_schema_2(connection):
        connection.execute("CREATE TABLE note (text TEXT NOT NULL) STRICT")

    monkeypatch.setattr(client.ledger.schema, "MIGRATIONS", (*client.ledger.schema.MIGRATIONS, to_schema_2))
    with reopen() as again:
        assert again.history() == before
        assert other_connection(tmp_path).execute("PRAGMA user_version").fetchone() == (2,)
        assert ledgers.spend(again, answered=1) == b"an answer"


@pytest.mark.fault("R19")
def test_i7_a_migration_that_fails_leaves_the_older_ledger_whole(ledgers, ledger, reopen, monkeypatch):
    def broken(connection):
        connection.execute("DROP TRIGGER event_kept")
        connection.execute("SELECT * FROM nothing")

    ledgers.agree(ledger)
    with monkeypatch.context() as patch:
        patch.setattr(client.ledger.schema, "MIGRATIONS", (*client.ledger.schema.MIGRATIONS, broken))
        with pytest.raises(LedgerError, match="SQLite says"):
            reopen()
    with reopen() as again:
        assert ledgers.counts(again) == (0, 0, 0, 0, 0)


@pytest.mark.fault("R12")
def test_i7_changed_rules_are_refused(reopen, ledger, tmp_path):
    ledger.close()
    connection = other_connection(tmp_path)
    connection.execute("DROP TRIGGER spend_within_consent")
    connection.close()
    with pytest.raises(LedgerError, match="own tables and rules"):
        reopen()


@pytest.mark.fault("R12")
def test_i7_a_file_that_is_not_a_ledger_is_refused(ledgers, reopen, ledger, tmp_path):
    ledger.close()
    for content in (b"", b"not a database" * 1000):
        (tmp_path / "ledger.db").write_bytes(content)
        with pytest.raises(LedgerError):
            reopen()
    (tmp_path / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="must exist"):
        reopen()


def test_only_its_owner_reads_a_ledger(ledgers, ledger, tmp_path):
    ledgers.agree(ledger)
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_a_ledger_needs_neither_torch_nor_flower_nor_an_accountant():
    heavy = "{'torch', 'flwr', 'dp_accounting', 'numpy'}"
    code = f"import client.ledger.ledger, sys; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


# I8 tampering and roll-back


@pytest.fixture
def spent_home(ledgers, tmp_path, keystore, clock, ledger):
    """Two campaigns: p with rounds 1 (released) and 2 (burnt), q untouched; closed."""
    ledgers.agree(ledger, "p")
    ledgers.agree(ledger, "q", epsilon=1.0)
    ledgers.answer(ledger, 1)
    ledgers.spend(ledger, 2, answered=1)
    ledger.burn(policy="p", round_number=2)
    ledger.close()
    return tmp_path


@pytest.mark.fault("R12")
@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE event SET detail = json_set(detail, '$.max_participations', 400) WHERE kind = 'consent'",
        "UPDATE event SET detail = json_set(detail, '$.cap_nano_epsilon', 99000000000) WHERE kind = 'open'",
        "UPDATE event SET policy = 'q' WHERE kind = 'spend' AND round = 1",
        "UPDATE event SET round = 9 WHERE seq = 6",
        "UPDATE event SET at = '2020-01-01T12:00:00+00:00' WHERE seq = 6",
        "UPDATE event SET kind = 'release' WHERE kind = 'burn'",
        "UPDATE event SET mac = zeroblob(32) WHERE seq = 7",
        "UPDATE event SET seq = 8 WHERE seq = 7",
        "DELETE FROM event WHERE seq = 4",
        "DELETE FROM event WHERE kind = 'spend'",
        "INSERT INTO event SELECT 8, at, 'resume', NULL, NULL, '{}', mac FROM event WHERE seq = 7",
    ],
)
def test_i8_the_chain_sees_an_edit_past_all_rules(ledgers, spent_home, keystore, statement):
    ledgers.tamper(spent_home)
    ledgers.reopen(spent_home, keystore).close()  # the power of it: tampering with nothing opens
    ledgers.tamper(spent_home, statement)
    with pytest.raises(LedgerError, match="every event of the ledger must be as it was written"):
        ledgers.reopen(spent_home, keystore)


@pytest.mark.fault("R12")
@pytest.mark.parametrize("kept", range(1, 7))
def test_i8_the_anchor_sees_that_the_last_events_are_gone(ledgers, spent_home, keystore, kept):
    ledgers.tamper(spent_home, f"DELETE FROM event WHERE seq > {kept}")
    with pytest.raises(LedgerError, match=f"ends at event {kept} and the keystore remembers 7") as caught:
        ledgers.reopen(spent_home, keystore)
    assert caught.value.code == "ROLLBACK"


@pytest.mark.fault("R12")
def test_i8_a_copy_from_earlier_is_a_rollback(ledgers, ledger, reopen, tmp_path, keystore):
    ledgers.agree(ledger)
    ledger.close()
    yesterday = (tmp_path / "ledger.db").read_bytes()
    with reopen() as again:
        ledgers.spend(again)
    (tmp_path / "ledger.db").write_bytes(yesterday)
    with pytest.raises(LedgerError) as caught:
        reopen()
    assert caught.value.code == "ROLLBACK"


@pytest.mark.fault("R12")
def test_i8_a_copy_put_back_under_an_open_ledger_is_seen(ledgers, ledger, tmp_path):
    ledgers.agree(ledger)
    copy = tmp_path / "copy"
    copy.write_bytes((tmp_path / "ledger.db").read_bytes())
    copy.replace(tmp_path / "ledger.db")
    with pytest.raises(LedgerError, match="another file has taken its place"):
        ledgers.spend(ledger)


def test_i8_an_open_ledger_sees_events_vanish_under_it(ledgers, spent_home, keystore, clock):
    with ledgers.reopen(spent_home, keystore, clock) as ledger:
        ledgers.tamper(spent_home, "DELETE FROM event WHERE seq = 7")
        with pytest.raises(LedgerError) as caught:
            ledger.pause()
        assert caught.value.code == "ROLLBACK"


def test_i8_an_open_ledger_sees_events_vanish_even_when_the_keystore_forgot_them_too(
    ledgers, spent_home, keystore, clock
):
    with ledgers.reopen(spent_home, keystore, clock) as ledger:
        backup = dict(keystore.entries)
        ledger.pause()
        ledgers.tamper(spent_home, "DELETE FROM event WHERE kind = 'pause'")
        keystore.entries = backup
        with pytest.raises(LedgerError, match="a moment ago") as caught:
            ledgers.spend(ledger, 3, answered=1)
        assert caught.value.code == "ROLLBACK"


def test_i8_the_chain_does_not_use_the_key_that_wraps_the_owners_data(ledgers, ledger, keystore):
    key = keystore.read("ledger-key")
    assert len(key) == 32
    assert chain_key(key) not in (key, chain_key(key[::-1]))


def test_i8_another_ledger_of_the_same_key_is_not_this_one(ledgers, tmp_path, keystore):
    """A clone that went on by itself: same key, same length, another history."""
    with ledgers.begin(tmp_path / "a", keystore) as ledger:
        ledgers.agree(ledger)
    clone = ledgers.MemoryKeystore(keystore.entries)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ledger.db").write_bytes((tmp_path / "a" / "ledger.db").read_bytes())
    with ledgers.reopen(tmp_path / "b", clone) as other:
        ledgers.spend(other, request="one")
    with ledgers.reopen(tmp_path / "a", keystore) as ledger:
        ledgers.spend(ledger, request="two")
    with pytest.raises(LedgerError, match="another history") as caught:
        ledgers.reopen(tmp_path / "b", keystore)
    assert caught.value.code == "LEDGER"


def restored_whole(ledgers, tmp_path, clock):
    """A home put back with its keystore: a ledger that has lost two answered rounds and does not know it."""
    keystore = ledgers.MemoryKeystore()
    with ledgers.begin(tmp_path, keystore, clock) as ledger:
        ledgers.agree(ledger, max_participations=4)
        ledgers.spend(ledger, 1)
        ledger.burn(policy="p", round_number=1)
    backup, entries = (tmp_path / "ledger.db").read_bytes(), dict(keystore.entries)
    with ledgers.reopen(tmp_path, keystore, clock) as ledger:
        ledgers.answer(ledger, 2)
        ledgers.answer(ledger, 3, answered=1)
    (tmp_path / "ledger.db").write_bytes(backup)
    return ledgers.reopen(tmp_path, ledgers.MemoryKeystore(entries), clock)


def test_i8_a_copy_restored_with_its_keystore_is_seen_by_what_the_server_has(ledgers, tmp_path, clock):
    with restored_whole(ledgers, tmp_path, clock) as ledger:
        assert ledgers.counts(ledger) == (1, 0, 1, 0, 0)  # the limit: nothing on this device knows better
        assert ledgers.spend(ledger, 4, answered=2) is None
        assert ledgers.counts(ledger) == (4, 0, 1, 1, 2)  # one burnt before the copy, two lost, one spent now
        ledger.release(policy="p", round_number=4, payload=b"four")
        before = ledger.history()
        assert ledgers.spend(ledger, 4, answered=3) == b"four"
        assert ledger.history() == before  # told once, remembered for ever
        assert refusal(ledgers.spend, ledger, 5, answered=0) == "BUDGET"


def test_i8_what_the_server_has_counts_even_when_the_round_is_refused(ledgers, tmp_path, clock):
    with restored_whole(ledgers, tmp_path, clock) as ledger:
        assert refusal(ledgers.spend, ledger, 1, request="another", answered=2) == "CONFLICT"
        assert ledgers.counts(ledger) == (3, 0, 1, 0, 2)
        ledgers.spend(ledger, 4, answered=0)  # a server that later says less changes nothing
        assert refusal(ledgers.spend, ledger, 5, answered=0) == "BUDGET"


def test_i8_a_server_that_claims_too_much_only_ends_the_campaign(ledgers, ledger):
    ledgers.agree(ledger, max_participations=4)
    for claimed in (10**30, 10**31):
        assert refusal(ledgers.spend, ledger, 1, answered=claimed) == "BUDGET"
    assert ledgers.counts(ledger) == (4, 0, 0, 0, 4)
    assert len(ledger.history()) == 3


# Recovery: new device, re-installed device, restored backup


@pytest.mark.fault("R12")
def test_recovery_after_a_rollback_takes_the_larger_and_ends_campaigns(ledgers, ledger, reopen, tmp_path, keystore):
    ledgers.agree(ledger, "p")
    ledger.close()
    yesterday = (tmp_path / "ledger.db").read_bytes()
    with reopen() as again:
        ledgers.answer(again)
        ledgers.agree(again, "q", epsilon=2.5, delta=2e-5)
    (tmp_path / "ledger.db").write_bytes(yesterday)
    with ledgers.recover(tmp_path, keystore) as recovered:
        totals = recovered.totals()
        assert (totals.epsilon, totals.delta) == (5.5, 3e-5)
        assert [each.state for each in recovered.consents()] == ["ended"]
        assert recovered.history()[-1].kind == "rebase"
        assert recovered.history()[-1].seq == 6  # numbers go on after the last the keystore knew
        assert refusal(ledgers.spend, recovered) == "CONSENT"
        with pytest.raises(LedgerError, match=r"4\.5 left"):
            ledgers.agree(recovered, "r", epsilon=4.6)
        ledgers.agree(recovered, "r", epsilon=4.5)
        ledgers.answer(recovered, policy="r")
    ledgers.reopen(tmp_path, keystore).close()


def test_recovery_never_lowers_what_a_ledger_of_another_history_has_reserved(ledgers, tmp_path, keystore):
    with ledgers.begin(tmp_path / "a", keystore) as ledger:
        ledgers.agree(ledger, "p", epsilon=3.0)
    clone = ledgers.MemoryKeystore(keystore.entries)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ledger.db").write_bytes((tmp_path / "a" / "ledger.db").read_bytes())
    with ledgers.reopen(tmp_path / "b", clone) as other:
        ledgers.agree(other, "q", epsilon=4.0, delta=0.0)
    with ledgers.reopen(tmp_path / "a", keystore) as ledger:
        ledgers.agree(ledger, "q", epsilon=1.0, delta=5e-5)
    with ledgers.recover(tmp_path / "b", keystore) as recovered:
        assert (recovered.totals().epsilon, recovered.totals().delta) == (7.0, 6e-5)  # the larger of each


@pytest.mark.fault("R12")
def test_recovery_of_a_lost_file_starts_from_what_the_keystore_remembers(ledgers, ledger, tmp_path, keystore):
    ledgers.agree(ledger)
    ledgers.answer(ledger)
    key = keystore.read("ledger-key")
    ledger.close()
    (tmp_path / "ledger.db").unlink()
    with pytest.raises(LedgerError, match="would be forgotten"):
        ledgers.begin(tmp_path, keystore)
    with ledgers.recover(tmp_path, keystore, cap_epsilon=5.0) as recovered:
        assert (recovered.totals().epsilon, recovered.totals().left_epsilon) == (3.0, 2.0)
        assert recovered.consents() == ()
    assert keystore.read("ledger-key") == key  # it also opens the owner's data


def test_recovery_puts_a_damaged_file_aside(ledgers, ledger, tmp_path, keystore):
    ledgers.agree(ledger)
    ledger.close()
    (tmp_path / "ledger.db").write_bytes(b"damaged")
    ledgers.recover(tmp_path, keystore).close()
    assert (tmp_path / "ledger.db.aside-1").read_bytes() == b"damaged"
    ledgers.tamper(tmp_path, "DELETE FROM event WHERE seq = 3")
    ledgers.recover(tmp_path, keystore).close()
    assert (tmp_path / "ledger.db.aside-2").exists()
    with ledgers.reopen(tmp_path, keystore) as again:
        assert again.totals().epsilon == 3.0


def test_recovery_does_not_put_a_ledger_aside_because_the_disk_fails(ledgers, ledger, tmp_path, keystore, monkeypatch):
    def fails(path):
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE
        raise error

    ledger.close()
    monkeypatch.setattr(client.ledger.log, "open_file", fails)
    with pytest.raises(LedgerError, match="disk I/O error"):
        ledgers.recover(tmp_path, keystore)
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.db"]


def test_recovery_without_a_key_begins_a_new_chain_and_forgets_nothing(ledgers, ledger, tmp_path, keystore):
    ledgers.agree(ledger)
    ledger.close()
    keystore.delete("ledger-key")
    with ledgers.recover(tmp_path, keystore) as recovered:
        assert recovered.totals().epsilon == 3.0


def test_recovery_needs_a_reason_and_an_anchor(ledgers, ledger, tmp_path, keystore):
    ledgers.agree(ledger)
    with pytest.raises(LedgerError, match="nothing is wrong"):
        ledgers.recover(tmp_path, keystore)
    keystore.delete("anchor")
    with pytest.raises(LedgerError, match="no anchor"):
        ledgers.recover(tmp_path, keystore)


@pytest.mark.parametrize("lost", [True, False])
def test_recovery_cut_before_the_anchor_is_written_is_done_again_and_counts_once(
    ledgers, ledger, tmp_path, keystore, monkeypatch, lost
):
    ledgers.agree(ledger, "p")
    ledger.close()
    yesterday = (tmp_path / "ledger.db").read_bytes()
    with ledgers.reopen(tmp_path, keystore) as again:
        ledgers.agree(again, "q")
    (tmp_path / "ledger.db").write_bytes(yesterday)
    if lost:
        (tmp_path / "ledger.db").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(keystore, "write", lambda *_: keystore._missing)
        with pytest.raises(AttributeError):
            ledgers.recover(tmp_path, keystore)
    with pytest.raises(LedgerError):
        ledgers.reopen(tmp_path, keystore)
    with ledgers.recover(tmp_path, keystore) as recovered:
        assert recovered.totals().epsilon == 6.0


def test_a_ledger_is_never_begun_over_another(ledgers, ledger, tmp_path, keystore):
    for store in (keystore, ledgers.MemoryKeystore(), ledgers.MemoryKeystore(keystore.entries)):
        ledgers.agree(ledger, f"policy {id(store)}")
        with pytest.raises(LedgerError, match="never begun anew"):
            ledgers.begin(tmp_path, store)
    ledgers.reopen(tmp_path, keystore).close()


def test_a_beginning_that_was_cut_is_begun_again(ledgers, tmp_path, monkeypatch):
    keystore = ledgers.MemoryKeystore()
    write = keystore.write
    with monkeypatch.context() as patch:
        patch.setattr(keystore, "write", lambda entry, secret: write(entry, secret) if entry != "anchor" else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ledgers.begin(tmp_path, keystore)
    with pytest.raises(LedgerError, match="holds none"):
        ledgers.reopen(tmp_path, keystore)
    with ledgers.begin(tmp_path, keystore) as ledger:
        ledgers.agree(ledger)


def test_a_write_ahead_log_left_behind_is_not_taken_for_the_new_ledgers(ledgers, tmp_path):
    """The file was deleted and its log was not: SQLite would play the old log into the new file."""
    with ledgers.begin(tmp_path) as old:
        ledgers.agree(old)
        left_behind = (tmp_path / "ledger.db-wal").read_bytes()
    fresh = ledgers.MemoryKeystore()
    (tmp_path / "ledger.db").unlink()
    (tmp_path / "ledger.db-wal").write_bytes(left_behind)
    with ledgers.begin(tmp_path, fresh) as ledger:
        assert [event.kind for event in ledger.history()] == ["open"]
    assert (tmp_path / "ledger.db.aside-1-wal").exists()


# I9 clock-free


@pytest.mark.fault("R13")
@pytest.mark.parametrize("years", [-10, 10])
def test_i9_ten_years_change_nothing_but_the_display(ledgers, ledger, reopen, clock, years):
    ledgers.agree(ledger, until=date(2050, 1, 1), max_participations=3)
    ledgers.answer(ledger, 1)
    clock.jump(days=years * 365)
    assert ledgers.spend(ledger, 1, answered=1) == b"an answer"
    ledgers.answer(ledger, 2, answered=1)
    ledgers.spend(ledger, 3, answered=2)
    with reopen() as again:
        assert refusal(ledgers.spend, again, 4, answered=2) == "BUDGET"
        assert ledgers.counts(again) == (3, 2, 1, 0, 0)
        assert again.totals().epsilon == 3.0


def test_i9_a_consent_holds_to_the_end_of_its_last_day_and_no_longer(ledgers, ledger, clock):
    ledgers.agree(ledger, until=clock.now.date() + timedelta(days=1))
    clock.now = clock.now.replace(day=2, hour=23, minute=59)
    assert ledgers.standing(ledger).state == "in force"
    ledgers.answer(ledger, 1)
    clock.jump(minutes=2)
    assert refusal(ledgers.spend, ledger, 2, answered=1) == "CONSENT"
    assert ledgers.standing(ledger).state == "ended"


@pytest.mark.fault("R13")
def test_i9_a_clock_ahead_refuses_while_it_is_ahead_and_records_nothing(ledgers, ledger, reopen, clock):
    ledgers.agree(ledger)
    ledgers.spend(ledger, 1)
    before = ledger.history()
    clock.jump(days=3650)
    assert refusal(ledgers.spend, ledger, 2) == "CONSENT"
    assert ledger.history() == before
    with reopen() as again:  # burns round 1, unasked: that must not end the consent for ever
        clock.jump(days=-3650)
        assert ledgers.counts(again) == (1, 0, 1, 0, 0)
        assert ledgers.spend(again, 2) is None


@pytest.mark.fault("R13")
def test_i9_a_clock_set_back_revives_nothing(ledgers, ledger, reopen, clock):
    ledgers.agree(ledger)
    clock.jump(days=400)
    ledgers.agree(ledger, "longer", until=date(2040, 1, 1))
    clock.jump(days=-400)
    assert refusal(ledgers.spend, ledger) == "CONSENT"
    with pytest.raises(LedgerError, match="end in the future"):
        ledgers.agree(ledger, "q")
    with reopen() as again:
        assert refusal(ledgers.spend, again) == "CONSENT"


@pytest.mark.fault("R13")
def test_i9_what_an_owner_does_under_a_clock_ahead_ends_no_consent(ledgers, ledger, reopen, clock):
    ledgers.agree(ledger)
    ledgers.agree(ledger, "other")
    clock.jump(days=3650)
    ledger.pause()
    ledger.resume()
    ledger.withdraw("other")
    assert refusal(ledgers.spend, ledger) == "CONSENT"  # while the clock is ahead
    clock.jump(days=-3650)
    assert ledgers.spend(ledger) is None
    with reopen() as again:
        assert ledgers.counts(again)[0] == 1


def test_losing_the_file_raises_no_cap(ledgers, ledger, keystore, tmp_path):
    ledgers.agree(ledger)
    cap = ledger.totals().cap_epsilon
    ledger.close()
    for path in tmp_path.glob("**/ledger.db*"):
        path.unlink()
    with ledgers.recover(tmp_path, keystore, cap_epsilon=cap * 10, cap_delta=0.5) as again:
        assert again.totals().cap_epsilon == cap
        assert again.totals().cap_delta < 0.5


def test_times_are_told_in_utc(ledgers, ledger, clock):
    clock.now = clock.now.astimezone(timezone(timedelta(hours=9)))
    ledger.pause()
    assert ledger.history()[-1].at == "2026-01-01T12:00:00+00:00"
