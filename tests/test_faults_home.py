"""Faults at home: hostile policies, ledgers that cannot be used, keys that are gone; commands as processes."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest

from client.export.private_head import personalize
from client.home.store import RecordStore
from client.owner.consent import agree
from client.runtime.runtime import base_id
from client.training.device import forget_workbenches
from shared.errors import CampaignError, LedgerError, PrivacyError, SottovoceError
from shared.protocol.signing import load_private, sign_policy


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# R15


HOSTILE = {
    "no noise": {"noise_multiplier": 0.0},
    "hardly any noise": {"noise_multiplier": 1e-9},
    "noise that is no number": {"noise_multiplier": float("nan")},
    "a thousand million steps": {"steps": 10**9},
    "a clip of a thousand million": {"clip_norm": 1e9},
    "a price below what it costs": {"epsilon": 0.01},
    "a delta that allows everything": {"delta": 0.9},
    "every record always, said to be few": {"sampling_rate": 1e-9},
    "rounds without end": {"rounds": 10**12, "max_participations": 10**12},
    "updates without bound": {"max_update_norm": float("inf")},
    "no trust": {"trust": "none"},
    "a reply that says more": {"reply_fields": ["arrays", "config.policy", "config.round", "config.loss"]},
    "an unknown key": {"also": 1},
    "another start": {"start_sha256": "0" * 64},
    "other settings": {"settings_sha256": "0" * 64},
    "a package nobody has": {"extensions": ["evil 1.0"]},
}


@pytest.mark.fault("R15")
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_policy_is_refused_though_its_operator_signed_it(homes, published, tmp_path, monkeypatch, name):
    """Before a record is read, and nothing is reserved; and one swapped in after the consent answers nothing."""
    monkeypatch.setattr(RecordStore, "read", lambda _: pytest.fail("a record was read"))
    home = homes.make_home(tmp_path / "home")
    before = home_counts(home)
    folder = Path(shutil.copytree(published.campaign.folder, tmp_path / "campaign"))
    policy = json.loads((folder / "policy.json").read_text())
    assert policy | HOSTILE[name] != policy
    (folder / "policy.json").write_text(json.dumps(policy | HOSTILE[name]))
    with suppress(SottovoceError):  # some cannot even be signed
        sign_policy(folder, load_private(published.private))
    with pytest.raises((CampaignError, PrivacyError, LedgerError)) as refused:
        agree(home, folder, operator=published.key, until=homes.UNTIL)
    assert "\n" not in str(refused.value)
    assert home_counts(home) == before

    homes.consent(home, published)
    forget_workbenches()
    kept = home.campaign_folder(published.campaign.policy.sha256)
    reserved = home_counts(home)
    for file in ("policy.json", "policy.sig"):
        shutil.copy(folder / file, kept / file)
    assert homes.ask(home, published.campaign)[0] == "POLICY"
    assert home_counts(home) == reserved


def home_counts(home):
    with home.ledger() as ledger:
        return ledger.totals(), [standing.spent for standing in ledger.consents()]


# R12 and R20: a home whose ledger or keys are gone takes part in nothing, and what it has learnt still answers


@pytest.fixture(scope="module")
def learnt(homes, published, tiny_fleet, tmp_path_factory):
    """A home with a private head that has answered one round, and the signed base beside it."""
    folder = tmp_path_factory.mktemp("learnt")
    base = homes.sign_base(tiny_fleet, published, folder / "base")
    home = homes.make_home(folder / "home", published)
    assert homes.ask(home, published.campaign)[0] is None
    personalize(home, base_folder=base)
    return folder


def damaged(home):
    path = home / "ledger.db"
    path.write_bytes(path.read_bytes()[:3000])


def deleted(home):
    (home / "ledger.db").unlink()


def rolled_back(home):
    shutil.copy(home / "ledger.db", home.parent / "earlier.db")
    pause = run_cli("client", "pause", "--home", home)
    assert pause.returncode == 0, pause.stderr
    shutil.copy(home.parent / "earlier.db", home / "ledger.db")


def newer(home):
    with closing(sqlite3.connect(home / "ledger.db")) as connection:
        connection.execute("PRAGMA user_version = 99")


def locked(home):
    connection = sqlite3.connect(home / "ledger.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def run_cli(*arguments, **environment):
    """A typed command, as a process of its own."""
    command = [sys.executable, "-m", "sottovoce.cli", *map(str, arguments)]
    root = Path(__file__).parent.parent
    return subprocess.run(
        command, cwd=root, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=300
    )


TEXT = "Heat (1995). Action"


def predict(home, base):
    done = run_cli("client", "predict", "--home", home, "--base", base, "--text", TEXT, "--json")
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_another_base(path):
    """Sound in itself, and not the one the head was made for."""
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["max_tokens"] -= 1
    path.write_text(json.dumps(manifest | {"id": base_id(manifest)}))


@pytest.mark.fault("R12")
@pytest.mark.slow
@pytest.mark.parametrize("damage", [damaged, deleted, rolled_back, newer, locked], ids=lambda damage: damage.__name__)
def test_whatever_is_wrong_with_a_ledger_nothing_is_trained_and_what_was_learnt_answers(
    homes, published, learnt, tmp_path, damage, tiny_fleet
):
    place = Path(shutil.copytree(learnt, tmp_path / "copy"))
    home = place / "home"
    told = predict(home, place / "base")
    assert json.loads(told)["personal"]
    held = damage(home)
    before = everything_in(home / "vault")
    try:
        assert homes.ask(home, published.campaign, round_number=2)[0] in {"LEDGER", "ROLLBACK"}
        status = run_cli("client", "status", "--home", home)
        assert status.returncode == (0 if damage is locked else 2)  # who may not write may still read
        assert len(status.stderr.strip().splitlines()) == (0 if damage is locked else 1)
        assert "Traceback" not in status.stderr
        answer = predict(home, place / "base")
        if damage is not locked:  # which is over soon
            other = Path(shutil.copytree(tiny_fleet, place / "other"))
            make_another_base(other / "manifest.json")
            assert run_cli("client", "predict", "--home", home, "--base", other, "--text", TEXT).returncode == 2
    finally:
        if held is not None:
            held.close()
    assert answer == told  # the personal head, on the base it was made for and no other
    assert everything_in(home / "vault") == before


@pytest.mark.fault("R20")
@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["keyring.backends.fail.Keyring", "keyring.backends.null.Keyring", "no.such.Keyring"]
)
def test_without_its_keyring_a_home_is_closed_and_no_key_is_written_to_a_file(homes, published, tmp_path, backend):
    """Where the keyring is gone after a home was made with it, and where it was never there."""
    gone = {"PYTHON_KEYRING_BACKEND": backend}
    fresh_home = tmp_path / "fresh"
    made = run_cli("client", "init", "--home", fresh_home, "--keystore", "os", **gone)
    assert made.returncode == 2
    assert "--keystore file" in made.stderr
    assert len(made.stderr.strip().splitlines()) == 1
    assert not [path for path in fresh_home.rglob("*") if path.is_file()] or not (fresh_home / "keys").exists()

    home = homes.make_home(tmp_path / "home", published).folder
    keys = {path.name: path.read_bytes() for path in (home / "keys").iterdir()}
    (home / "keystore.json").write_text('{"kind": "os"}')
    kept = shutil.move(home / "keys", tmp_path / "a keyring that is locked")
    for command in (["status"], ["pause"], ["history"], ["forget", "--yes"]):
        refused = run_cli("client", *command, "--home", home, **gone)
        assert refused.returncode == 2, (command, refused.stdout)
        assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert homes.ask(home, published.campaign)[0] in {"STORE", "LEDGER"}
    assert not (home / "keys").exists()
    on_disk = everything_in(home)
    for name, key in keys.items():
        assert not any(key in content for content in on_disk.values()), name

    shutil.move(kept, home / "keys")  # the keys are back
    (home / "keystore.json").write_text('{"kind": "file"}')
    assert homes.ask(home, published.campaign)[0] is None
