"""A device's home under crashes, full disks, partly restored backups and two terminals at once."""

import errno
import json
import os
import shutil
import sqlite3
from datetime import date
from pathlib import Path

import pytest

from client.home.home import Home, create_home, open_home
from client.home.store import RecordStore
from client.ledger import log as ledger_log
from client.ledger import schema as ledger_schema
from client.ledger.ledger import Ledger
from client.owner import consent, forget, owner
from client.vault.keystore import DATA_KEY
from shared.datasets.records import Record
from shared.errors import CampaignError, LedgerError, StoreError
from sottovoce.cli import main

RECORD = Record(text="heron-sentinel-2203", target=3.0, item="7", timestamp=12)
UNTIL = date(2099, 1, 1)
BEGIN = {"keystore": "file", "cap_epsilon": 16.0, "cap_delta": 1e-3}


@pytest.fixture
def home(tmp_path) -> Home:
    """A home with one record."""
    made = create_home(tmp_path / "home", **BEGIN)
    owner.add(made, [RECORD])
    return made


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_database(*_, **__):
    raise sqlite3.OperationalError("database or disk is full")


@pytest.mark.slow
def test_an_init_killed_at_any_step_can_be_run_again_or_has_made_a_home(tmp_path, crash_at_each_step):
    (tmp_path / "empty").mkdir()
    copies = crash_at_each_step(
        tmp_path / "empty",
        "import client.owner.owner; client.owner.owner.begin(home, keystore='file', cap_epsilon=16.0, cap_delta=1e-3)",
    )
    assert len(copies) > 20
    for folder in copies:
        made = (folder / "keys" / "anchor").exists()
        if not made:
            owner.begin(folder, **BEGIN)
        else:
            with pytest.raises(StoreError, match="use it"):
                owner.begin(folder, **BEGIN)
        found = owner.status(open_home(folder))
        assert found["data"]["problem"] is None
        assert found["epsilon"] == {"reserved": 0, "cap": 16, "left": 16}
        assert owner.add(open_home(folder), [RECORD]).total == 1


@pytest.mark.parametrize("left", [".keystore.json.tmp", "keys/.ledger-key.tmp", ".ledger.db.99-wal"])
def test_what_a_cut_init_left_does_not_use_up_the_folder(tmp_path, left):
    (tmp_path / left).parent.mkdir(exist_ok=True)
    (tmp_path / left).write_bytes(b"half")
    assert owner.begin(tmp_path, **BEGIN).ledger().totals().epsilon == 0


@pytest.mark.parametrize(
    ("owner_of", "name", "failure"),
    [(ledger_schema, "insert_event", full_database), (ledger_log, "anchor_of", full_disk)],
)
def test_an_init_on_a_full_disk_can_be_run_again_in_the_same_folder(tmp_path, monkeypatch, owner_of, name, failure):
    folder = tmp_path / "home"
    with monkeypatch.context() as patch:
        patch.setattr(owner_of, name, failure)
        with pytest.raises(LedgerError):
            owner.begin(folder, **BEGIN)
    assert not list(folder.glob(".ledger.db*"))
    owner.begin(folder, **BEGIN)
    assert owner.status(open_home(folder))["epsilon"]["cap"] == 16


def test_a_folder_with_a_ledger_in_use_is_never_begun_anew(home):
    with home.ledger() as ledger:
        ledger.pause()
    for lost in ("keystore.json", "vault", "keys"):
        path = home.folder / lost
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        with pytest.raises(StoreError, match="must"):
            owner.begin(home.folder, **BEGIN)
    assert (home.folder / "ledger.db").exists()


def test_a_keystore_that_remembers_a_ledger_is_never_begun_anew(home):
    for lost in ("keystore.json", "ledger.db"):
        (home.folder / lost).unlink()
    shutil.rmtree(home.folder / "vault")
    with pytest.raises(StoreError, match="holds other files"):
        owner.begin(home.folder, **BEGIN)


@pytest.mark.parametrize("content", [b"", b"no database at all"])
def test_a_damaged_ledger_in_a_cut_home_is_one_line(tmp_path, capsys, content):
    (tmp_path / "keystore.json").write_text('{"kind": "file"}')
    (tmp_path / "ledger.db").write_bytes(content)
    assert main(["client", "init", "--home", str(tmp_path), "--keystore", "file"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "ledger.db").exists()


def test_a_ledger_whose_log_cannot_be_emptied_does_not_take_its_place(tmp_path, monkeypatch):
    class Full:
        def __init__(self, connection):
            self._connection = connection

        def execute(self, statement, *values):
            return full_database() if "checkpoint" in statement else self._connection.execute(statement, *values)

        def close(self):
            self._connection.close()

    create = ledger_schema.create_file
    monkeypatch.setattr(ledger_schema, "create_file", lambda path: Full(create(path)))
    with pytest.raises(sqlite3.OperationalError):
        ledger_schema.write_new_file(tmp_path / "ledger.db", [])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_nobody_from_forgetting(home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(forget, "write_private", full_disk)
        with pytest.raises(StoreError, match="free space"):
            forget.forget(home)
    assert home.keystore.read(DATA_KEY) is None
    assert not (home.folder / "vault").exists()
    receipt = forget.forget(home)
    assert not owner.status(home)["forget_was_cut"]
    assert (home.folder / "receipts" / receipt["written"]["file"]).is_file()


def test_a_deletion_that_made_room_is_noted_before_the_ledger_is_asked(home, monkeypatch):
    write, calls = forget.write_private, []

    def full_at_first(path, content):
        calls.append(path.name)
        return full_disk() if len(calls) == 1 else write(path, content)

    def die(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(forget, "write_private", full_at_first)
        patch.setattr(Ledger, "forgotten", die)
        with pytest.raises(KeyboardInterrupt):
            forget.forget(home)
    assert owner.status(home)["forget_was_cut"]
    assert forget.forget(home)["deleted"]["records"] == 1


def agree(home, published, **changes):
    return consent.agree(home, published.campaign.folder, operator=published.key, until=UNTIL, **changes)


def reserved(home) -> float:
    with home.ledger() as ledger:
        return ledger.totals().epsilon


def test_what_was_not_shown_is_not_agreed_to(home, published):
    with pytest.raises(CampaignError, match="changed"):
        agree(home, published, shown="0" * 64)
    assert reserved(home) == 0
    assert not list(home.folder.glob("campaigns/*"))


def test_the_command_agrees_to_what_it_showed(home, published, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(consent, "agree", lambda *_, **named: asked.append(named["shown"]))
    key = published.private.with_name(f"{published.private.name}.pub")
    words = ["--operator", str(key), "--until", "2099-01-01", "--yes", "--home", str(home.folder)]
    assert main(["client", "consent", str(published.campaign.folder), *words]) == 0
    assert asked == [published.campaign.policy.sha256]
    capsys.readouterr()


def test_a_consent_waits_for_a_round_and_for_forget(home, published):
    with home.lock(), pytest.raises(StoreError, match="at rest"):
        agree(home, published)
    assert reserved(home) == 0
    assert not (home.folder / "campaigns").exists()


def test_what_was_agreed_to_is_on_disk_before_its_price_is_reserved(home, published, monkeypatch):
    flushed, sync, rename, reserve, seen = set(), os.fsync, os.rename, Ledger.consent, []

    def note(descriptor):
        flushed.add(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def move(old, new, **named):
        rename(old, new, **named)
        flushed.discard(Path(new).parent.stat().st_ino)

    def check(ledger, **named):
        kept = home.campaign_folder(named["policy"])
        seen.extend([kept.parent, kept, *kept.iterdir()])
        assert {path.stat().st_ino for path in seen} <= flushed
        reserve(ledger, **named)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", move)
    monkeypatch.setattr(Ledger, "consent", check)
    agree(home, published)
    assert len(seen) == 6


@pytest.mark.parametrize("damage", ["all", "one"])
def test_a_lost_copy_of_a_campaign_is_put_back_for_nothing(homes, published, tmp_path, capsys, damage):
    home = homes.make_home(tmp_path / "home", published)
    before, kept = reserved(home), home.campaign_folder(published.campaign.policy.sha256)
    shutil.rmtree(kept) if damage == "all" else (kept / "policy.json").write_text("{")
    assert homes.ask(home, published.campaign)[0] == "POLICY"
    key = published.private.with_name(f"{published.private.name}.pub")
    words = ["client", "consent", str(published.campaign.folder), "--operator", str(key), "--until", "2099-01-01"]
    words += ["--yes", "--home", str(home.folder)]
    assert main(words) == 0
    assert "nothing more is reserved" in capsys.readouterr().out
    assert reserved(home) == before
    assert homes.ask(home, published.campaign)[0] is None
    assert main(words) == 2
    assert "once" in capsys.readouterr().err


def test_a_withdrawn_campaign_is_not_put_back(homes, published, tmp_path):
    home = homes.make_home(tmp_path / "home", published)
    owner.withdraw(home, published.campaign.policy.sha256)
    shutil.rmtree(home.folder / "campaigns")
    assert not consent.put_back(home, published.campaign.folder, operator=published.key)
    assert not (home.folder / "campaigns").exists()


def test_no_command_burns_a_round_at_work(homes, published, tmp_path, capsys, monkeypatch):
    home = homes.make_home(tmp_path / "home", published)
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": "later", "target": 3}))
    codes, read = [], RecordStore.read

    def read_among_commands(store):
        with monkeypatch.context() as patch:
            patch.setattr(RecordStore, "read", read)
            for words in (
                ["status"],
                ["history"],
                ["add", "--jsonl", str(tmp_path / "one.jsonl")],
                ["pause"],
                ["resume"],
                ["forget", "--yes"],
                ["recover", "--yes", "--cap-epsilon", "9", "--cap-delta", "1e-3"],
            ):
                codes.append(main(["client", words[0], "--home", str(home.folder), *words[1:]]))
        return read(store)

    monkeypatch.setattr(RecordStore, "read", read_among_commands)
    assert homes.ask(home, published.campaign)[0] is None
    assert codes == [0, 0, 0, 0, 0, 2, 2]
    with home.ledger() as ledger:
        [standing] = ledger.consents()
    assert (standing.spent, standing.released, standing.burnt) == (1, 1, 0)
    capsys.readouterr()


def test_a_home_with_an_escape_in_its_name_does_not_command_the_terminal(tmp_path, capsys):
    folder = tmp_path / "h\x1b[2J"
    assert main(["client", "init", "--home", str(folder), "--keystore", "file"]) == 0
    assert main(["client", "status", "--home", str(folder)]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert Path(open_home(folder).folder) == folder
