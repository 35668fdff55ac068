"""The owner's commands: what they say, what they refuse, what they never print, and what forgetting leaves."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from client.home.home import open_home
from client.home.place import default_home
from client.owner import consent, owner
from client.owner.forget import forget
from client.owner.verify import keep_head
from client.owner.words import status_lines
from shared.datasets.records import Record
from shared.errors import LedgerError, PrivacyError, StoreError
from shared.protocol.signing import new_key
from sottovoce.cli import main

ROOT = Path(__file__).parent.parent
SECRET = "aardvark-sentinel-4711"
GOOD = {"text": SECRET, "target": 4, "item": "7", "timestamp": 12}


def run(capsys, *arguments):
    """Exit code, standard output, standard error of a command."""
    code = main(["client", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    """The one line of a command that ends with exit code 2."""
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert err.startswith("sottovoce: ")
    assert err.count("\n") == 1
    assert SECRET not in err
    return err


def snapshot(folder):
    """Every file of a home with its bytes; SQLite's shared memory aside."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def home(tmp_path, capsys):
    """A home made by the command, with one record."""
    folder = tmp_path / "home"
    assert run(capsys, "init", "--home", folder, "--keystore", "file")[0] == 0
    owner.add(open_home(folder), [Record(text=SECRET, target=4.0, item="7", timestamp=12)])
    return folder


@pytest.fixture
def operator(published):
    """The operator's public key file."""
    return published.private.with_name(f"{published.private.name}.pub")


@pytest.fixture
def active(homes, published, tmp_path):
    """A home that agreed to a campaign, has answered one round and holds two private heads."""
    made = homes.make_home(tmp_path / "active", published)
    assert homes.ask(made, published.campaign)[0] is None
    for number in (1, 2):
        manifest = json.dumps({"schema": 2, "kind": "adapter", "sequence": number}).encode()
        files = {"manifest.json": manifest, "adapter.safetensors": SECRET.encode() * number}
        keep_head(made, files, {"created": "now", "campaign": "c", "round": str(number)})
    return made


def test_init_says_where_keys_are_and_what_cannot_be_noticed(tmp_path, capsys):
    code, out, _ = run(capsys, "init", "--home", tmp_path / "h", "--keystore", "file", "--cap-epsilon", "5")
    assert code == 0
    assert "roll-back not detectable" in out
    assert "weak" in out
    assert "epsilon 5, delta 0.0001" in out
    assert open_home(tmp_path / "h").ledger().totals().cap_epsilon == 5
    assert default_home().name == "home"


def test_init_refuses_what_it_cannot_make(home, tmp_path, capsys):
    before = snapshot(home)
    assert "already" not in refused(capsys, "init", "--home", home, "--keystore", "file")
    assert snapshot(home) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("mine")
    assert "new or an empty folder" in refused(capsys, "init", "--home", tmp_path / "other", "--keystore", "file")
    assert "must name a folder" in refused(
        capsys, "init", "--home", tmp_path / "other" / "letter.txt", "--keystore", "file"
    )
    for wrong in (["--cap-epsilon", "0"], ["--cap-epsilon", "nan"], ["--cap-delta", "1"], ["--cap-delta", "nan"]):
        refused(capsys, "init", "--home", tmp_path / "new", "--keystore", "file", *wrong)
    assert "--keystore must be one of" in refused(capsys, "init", "--home", tmp_path / "new", "--keystore", "paper")
    assert not (tmp_path / "new").exists() or not any((tmp_path / "new").iterdir())


def test_an_init_that_was_cut_can_be_run_again(tmp_path, capsys):
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "keystore.json").write_text('{"kind": "file"}')
    assert run(capsys, "init", "--home", folder, "--keystore", "file")[0] == 0
    assert run(capsys, "status", "--home", folder)[0] == 0


def test_a_home_that_the_keyring_remembers_is_recovered_and_not_begun_anew(home, capsys):
    for left in ("ledger.db", "keystore.json"):
        (home / left).unlink()
    shutil.rmtree(home / "vault")
    keys = home / "keys"
    keys.rename(home.parent / "keys")
    shutil.rmtree(home)
    home.mkdir()
    (home / "keystore.json").write_text('{"kind": "file"}')
    (home.parent / "keys").rename(keys)  # a lost home whose keyring survived
    refused(capsys, "init", "--home", home, "--keystore", "file")
    assert "recover" in refused(capsys, "status", "--home", home)
    assert run(capsys, "recover", "--home", home, "--cap-epsilon", 16, "--cap-delta", 1e-4, "--yes")[0] == 0
    assert run(capsys, "status", "--home", home)[0] == 0


def test_add_takes_the_training_rows_of_one_user_and_says_so(home, tiny, tmp_path, capsys):
    data = tiny.tiny_movielens(tmp_path / "films")
    code, out, _ = run(capsys, "add", "--home", home, "--format", "movielens-100k", "--source", data, "--user", 3)
    from shared.datasets import read

    [user] = [user for user in read("movielens-100k", data).users if user.user == "3"]
    assert code == 0
    assert f"added {len(user.train)} records" in out
    assert f"only training rows are taken; {len(user.test)} test rows" in out
    assert open_home(home).records().read()[1:] == user.train
    before = snapshot(home)
    code, out, _ = run(capsys, "add", "--home", home, "--format", "movielens-100k", "--source", data, "--user", 3)
    assert f"left out {len(user.train)} that are there already" in out  # a record counted twice would weigh twice
    assert snapshot(home) == before
    for wrong in (
        ["--format", "movielens-100k", "--source", data, "--user", 77],
        ["--format", "movielens-100k", "--source", data],
        ["--format", "no-such", "--source", data, "--user", 3],
        ["--format", "movielens-100k", "--source", tmp_path / "nowhere", "--user", 3],
        ["--format", "movielens-100k", "--source", data, "--user", 3, "--jsonl", tmp_path / "x"],
        [],
    ):
        refused(capsys, "add", "--home", home, *wrong)
    assert snapshot(home) == before


def test_add_reads_jsonl(home, tmp_path, capsys):
    lines = [
        {"text": "a\u2028b", "target": 1},  # a separator that is no end of a line
        {"text": "a\u2028b", "target": 1.0},
        {"text": "c", "target": 2.5, "response": "d", "item": "i", "timestamp": 3},
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n", encoding="utf-8")
    code, out, _ = run(capsys, "add", "--home", home, "--jsonl", path)
    assert code == 0
    assert "added 2 records; the home holds 3" in out
    assert "left out 1" in out
    assert open_home(home).records().read()[1:] == (
        Record(text="a\u2028b", target=1.0, item="", timestamp=0),
        Record(text="c", target=2.5, item="i", timestamp=3, response="d"),
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (SECRET, "one JSON object"),
        ("[1]", "one JSON object"),
        ("", "one JSON object"),
        (json.dumps(GOOD | {"mood": 1}), "fields must be among"),
        (json.dumps({"target": 1}), "text missing"),
        (json.dumps({"text": SECRET}), "target missing"),
        (json.dumps(GOOD | {"target": SECRET}), "target must be a number, got str"),
        (json.dumps(GOOD | {"target": True}), "target must be a number, got bool"),
        (json.dumps(GOOD | {"target": float("nan")}), "target must be finite"),
        (json.dumps(GOOD | {"target": float("inf")}), "target must be finite"),
        (json.dumps(GOOD | {"target": 10**400}), "target must be finite"),
        (json.dumps(GOOD | {"timestamp": 1.5}), "timestamp must be a whole number"),
        (json.dumps(GOOD | {"text": None}), "text must be a string"),
        (json.dumps(GOOD | {"text": "\ud800"}), "half of a surrogate pair"),
        ('{"text": "a", "text": "b", "target": 1}', "once"),
    ],
)
def test_one_wrong_line_stores_nothing_and_is_named_without_its_text(home, tmp_path, capsys, line, said):
    path = tmp_path / "wrong.jsonl"
    path.write_text(json.dumps({"text": "fine", "target": 1}) + "\n" + line + "\n" + json.dumps(GOOD), encoding="utf-8")
    before = snapshot(home)
    error = refused(capsys, "add", "--home", home, "--jsonl", path)
    assert "line 2" in error
    assert said in error
    assert snapshot(home) == before


def test_a_file_that_is_none_stores_nothing(home, tmp_path, capsys):
    (tmp_path / "empty").touch()
    (tmp_path / "latin").write_bytes('{"text": "é", "target": 1}'.encode("latin-1"))
    for name in ("empty", "latin", "nowhere", "."):
        refused(capsys, "add", "--home", home, "--jsonl", tmp_path / name)


def test_consent_shows_what_is_asked_and_needs_a_yes(home, operator, published, capsys):
    policy = published.campaign.policy
    arguments = ("consent", published.campaign.folder, "--home", home, "--operator", operator, "--until", "2099-12-31")
    before = snapshot(home)
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert "--yes" in err
    assert snapshot(home) == before
    for said in (
        f"epsilon {policy.epsilon:g}, delta {policy.delta:g}",
        "one record",
        f"at most {policy.max_participations} of {policy.rounds}",
        "until: 2099-12-31",
        f"left of your caps afterwards: epsilon {16 - policy.epsilon:g}, delta {1e-4 - policy.delta:g}",
        policy.sha256[:12],
    ):
        assert said in out
    assert run(capsys, *arguments, "--yes")[0] == 0
    [standing] = open_home(home).ledger().consents()
    assert (standing.consent.policy, standing.consent.until) == (policy.sha256, date(2099, 12, 31))
    kept = open_home(home).campaign_folder(policy.sha256)
    (kept / "shared.safetensors").write_bytes(b"newest")
    assert "once" in refused(capsys, *arguments, "--yes")
    assert (kept / "shared.safetensors").exists()  # a refused second consent changes nothing


def consent_words(home, campaign, *more):
    operator = campaign.private.with_name(f"{campaign.private.name}.pub")
    common = ("--home", home, "--operator", operator, "--until", "2099-12-31", "--yes")
    return ("consent", campaign.campaign.folder, *common, *more)


def test_a_server_that_sees_changes_without_noise_must_be_agreed_to_in_so_many_words(home, hiding_users, capsys):
    central = hiding_users["central"]
    before = snapshot(home)
    code, out, err = run(capsys, *consent_words(home, central))
    assert code == 2
    assert "trusts: THE SERVER. It sees this device's change WITHOUT noise" in out
    assert "leaves the device: the clipped change of the shared numbers WITHOUT noise; " in out
    assert "hides: all that this device contributes" in out
    assert "must be agreed to with --trust-server" in err
    assert "without noise and only promises to add it" in err
    assert snapshot(home) == before
    with pytest.raises(PrivacyError, match="--trust-server"):  # whoever calls it
        consent.agree(open_home(home), central.campaign.folder, operator=central.key, until=date(2099, 12, 31))
    assert not open_home(home).ledger().consents()
    assert not (home / "campaigns").exists()
    assert run(capsys, *consent_words(home, central, "--trust-server"))[0] == 0
    [standing] = open_home(home).ledger().consents()
    assert standing.consent.policy == central.campaign.policy.sha256
    assert "NOT FROM THE SERVER, which sees it without noise" in run(capsys, "status", "--home", home)[1]


def test_what_a_secure_sum_rests_on_is_said_before_it_is_agreed_to(home, hiding_users, capsys):
    campaign = hiding_users["distributed"]
    policy = campaign.campaign.policy
    code, out, _ = run(capsys, *consent_words(home, campaign))
    assert code == 0
    terms = policy.secure_sum
    for said in (
        "the server to keep to the protocol",
        "to enrol no device of its own invention",
        f"of a round's {policy.cohort_size} devices, at most {terms.colluders} tell it their noise",
        f"of this device's {terms.neighbours} neighbours fewer than {terms.threshold}",
        "a masked vector, which alone looks like random numbers",
        f"and the sum of at least {terms.min_survivors} devices with the noise of all of them",
        "With fewer the round is void: spent",
        "with a share of the noise, masked; one-time keys, and sealed shares of them for other devices; ",
    ):
        assert said in out
    for wrong in ("WITHOUT", "nobody; the noise", "one record"):
        assert wrong not in out
    assert "from a server that keeps to the protocol too" in run(capsys, "status", "--home", home)[1]
    [told] = json.loads(run(capsys, "status", "--home", home, "--json")[1])["campaigns"]
    assert (told["unit"], told["trust"]) == ("user", "distributed")


def test_status_says_nothing_of_a_copy_that_was_altered(active, published, capsys):
    assert "hides one record, from everybody" in run(capsys, "status", "--home", active.folder)[1]
    path = active.campaign_folder(published.campaign.policy.sha256) / "policy.json"
    path.write_text(path.read_text().replace('"trust": "local"', '"trust": "central"'))
    assert "hides" not in run(capsys, "status", "--home", active.folder)[1]
    path.unlink()
    assert "hides" not in run(capsys, "status", "--home", active.folder)[1]


@pytest.mark.parametrize("trust", ["central", "distributed"])
def test_the_bytes_of_a_sum_are_those_of_its_integers(homes, hiding_users, trust, tmp_path):
    campaign = hiding_users[trust]
    home = homes.make_home(tmp_path / "a")
    asked = consent.examine_offer(home, campaign.campaign.folder, operator=campaign.key, until=date(2099, 1, 1))
    size = sum(math.prod(shape) for _, shape in campaign.campaign.policy.slots)
    assert asked.numbers == size
    assert 4 * size < asked.payload_bytes < 4 * size + 200


def test_init_agrees_at_once_where_everything_for_it_is_given(operator, published, tmp_path, capsys):
    new, whole = tmp_path / "new", ("--campaign", published.campaign.folder, "--operator", operator)
    assert "belong together" in refused(capsys, "init", "--keystore", "file", "--home", new, *whole)
    assert not new.exists()
    code, out, _ = run(capsys, "init", "--keystore", "file", "--home", new, *whole, "--until", "2099-12-31", "--yes")
    assert code == 0
    assert f"epsilon {published.campaign.policy.epsilon:g}" in out  # shown before it is agreed to
    [standing] = open_home(new).ledger().consents()
    assert standing.consent.policy == published.campaign.policy.sha256


def test_the_bytes_consent_shows_are_those_history_counts(homes, published, tmp_path):
    home = homes.make_home(tmp_path / "a")
    until = date(2099, 1, 1)
    asked = consent.examine_offer(home, published.campaign.folder, operator=published.key, until=until)
    owner.add(home, published.dataset.users[0].train)
    consent.agree(home, published.campaign.folder, operator=published.key, until=until)
    assert homes.ask(home, published.campaign)[0] is None
    [sent] = [event for event in owner.history(home) if event["event"] == "release"]
    assert sent["size_bytes"] == asked.payload_bytes


def test_consent_refuses_another_key_an_end_past_and_a_price_above_the_cap(home, published, operator, tmp_path, capsys):
    folder = published.campaign.folder
    common = ("--home", home, "--yes")
    new_key(tmp_path / "stranger")
    before = snapshot(home)
    refused(capsys, "consent", folder, "--operator", tmp_path / "stranger.pub", "--until", "2099-01-01", *common)
    refused(capsys, "consent", tmp_path, "--operator", operator, "--until", "2099-01-01", *common)
    refused(capsys, "consent", folder, "--operator", folder / "policy.json", "--until", "2099-01-01", *common)
    for day in ("2001-01-01", "tomorrow", "2099-02-30", "20990101", "2099-W01-1"):
        assert "--until" in refused(capsys, "consent", folder, "--operator", operator, "--until", day, *common)
    assert snapshot(home) == before
    small = tmp_path / "small"
    run(capsys, "init", "--home", small, "--keystore", "file", "--cap-epsilon", "0.5")
    before = snapshot(small)
    error = refused(
        capsys, "consent", folder, "--operator", operator, "--until", "2099-01-01", "--home", small, "--yes"
    )
    assert "0.5 of epsilon 0.5" in error
    assert snapshot(small) == before


def test_a_damaged_campaign_is_refused_in_one_line(home, published, operator, tmp_path, capsys):
    for number, name in enumerate(("policy.json", "scenario.json", "start.safetensors", "policy.sig")):
        for content in (b"\xff\xfe", b"", b"{ }"):
            folder = tmp_path / f"damaged-{number}-{len(content)}"
            shutil.copytree(published.campaign.folder, folder)
            (folder / name).write_bytes(content)
            refused(capsys, "consent", folder, "--operator", operator, "--until", "2099-01-01", "--home", home, "--yes")


def test_withdraw_by_prefix_ends_a_campaign_and_gives_nothing_back(active, homes, published, capsys):
    policy = published.campaign.policy
    for prefix in ("", policy.sha256[:3], "f" * 12, policy.sha256 + "0"):
        refused(capsys, "withdraw", prefix, "--home", active.folder)
    reserved = active.ledger().totals()
    assert run(capsys, "withdraw", policy.sha256[:8].upper(), "--home", active.folder)[0] == 0
    assert active.ledger().totals() == reserved
    assert homes.ask(active, published.campaign, round_number=2)[0] == "CONSENT"


def test_pause_stops_and_resume_goes_on(active, homes, published, capsys):
    run(capsys, "pause", "--home", active.folder)
    assert "PAUSED" in run(capsys, "status", "--home", active.folder)[1]
    assert homes.ask(active, published.campaign, round_number=2)[0] == "PAUSED"
    run(capsys, "resume", "--home", active.folder)
    assert "not paused" in run(capsys, "status", "--home", active.folder)[1]
    assert homes.ask(active, published.campaign, round_number=2)[0] is None


def test_status_says_what_was_spent_and_what_is_left(active, published, capsys):
    policy = published.campaign.policy
    code, out, err = run(capsys, "status", "--home", active.folder)
    assert (code, err) == (0, "")
    for said in (
        f"spent: epsilon {policy.epsilon:g} of 20 and delta {policy.delta:g} of 0.001",
        f"left: epsilon {20 - policy.epsilon:g}",
        "rounds: 1 of 2 used, 1 sent",
        "until 2099-01-01",
        "private heads: 2 versions, current 2",
        "roll-back not detectable",
        f"records: {len(published.dataset.users[0].train)}",
    ):
        assert said in out
    found = json.loads(run(capsys, "status", "--home", active.folder, "--json")[1])
    assert found["epsilon"] == {"reserved": policy.epsilon, "cap": 20, "left": 20 - policy.epsilon}
    assert found["campaigns"][0]["rounds_used"] == 1
    for text in {record.text for record in published.dataset.users[0].train}:
        assert text not in out + json.dumps(found)


def test_history_shows_what_left_the_device(active, published, capsys):
    code, out, _ = run(capsys, "history", "--home", active.folder)
    events = json.loads(run(capsys, "history", "--home", active.folder, "--json")[1])
    [sent] = [event for event in events if event["event"] == "release"]
    assert code == 0
    assert [event["event"] for event in events] == ["open", "consent", "spend", "release"]
    assert (sent["campaign"], sent["round"]) == (published.campaign.policy.campaign, 1)
    [line] = [line for line in out.splitlines() if "left the device" in line]
    for said in (f"{sent['size_bytes']:,} bytes", sent["sha256"], "round 1", sent["at"]):
        assert said in line
    assert sum("round 1" in line for line in out.splitlines()) == 1  # its spending is not told twice


def test_history_names_burnt_rounds(active, homes, published, capsys):
    policy = published.campaign.policy.sha256
    with active.ledger() as ledger:
        ledger.spend(policy=policy, round_number=2, request_sha256="ab", answered=1)
    assert "at work, or cut by a crash" in run(capsys, "history", "--home", active.folder)[1]
    assert homes.ask(active, published.campaign, round_number=2, answered=1)[0] in ("CONFLICT", "BURNT")
    assert "burnt: " in run(capsys, "history", "--home", active.folder)[1]
    assert "1 burnt" in run(capsys, "status", "--home", active.folder)[1]


def test_a_name_from_outside_cannot_command_the_terminal(homes, published, tmp_path, capsys):
    home = homes.make_home(tmp_path / "h")
    with home.ledger() as ledger:
        ledger.consent(
            policy="ab" * 32, campaign="x\x1b[2J\n", epsilon=1.0, delta=1e-5, max_participations=1,
            until=homes.UNTIL, operator="y\x07",
        )  # fmt: skip
    for command in ("status", "history"):
        out = run(capsys, command, "--home", home.folder)[1]
        assert "\x1b" not in out
        assert "\x07" not in out


def test_rollback_takes_an_earlier_head(active, capsys):
    assert active.heads().current() == 2
    assert "version 1 is current, it was 2" in run(capsys, "rollback", "--home", active.folder)[1]
    assert active.heads().current() == 1
    before = snapshot(active.folder)
    refused(capsys, "rollback", "--home", active.folder)
    refused(capsys, "rollback", "--to", 9, "--home", active.folder)
    assert snapshot(active.folder) == before
    assert run(capsys, "rollback", "--to", 2, "--home", active.folder)[0] == 0
    assert active.heads().current() == 2


def test_rollback_without_a_head_is_refused(home, capsys):
    refused(capsys, "rollback", "--home", home)
    shutil.rmtree(home / "vault")
    assert "it has none" in refused(capsys, "rollback", "--home", home)
    assert "it has none" in refused(capsys, "predict", "--home", home, "--base", home, "--text", "x")


DAMAGES = {
    "gone": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "noise": lambda path: path.write_bytes(b"\x00" * 5000),
}


@pytest.mark.fault("R12")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_ledger_stops_everything_and_the_owner_is_told_what_to_do(damage, active, published, homes, capsys):
    for left in active.folder.glob("ledger.db-*"):
        left.unlink()
    DAMAGES[damage](active.folder / "ledger.db")
    for command in ("status", "history", "pause", "resume"):
        assert "sottovoce client recover" in refused(capsys, command, "--home", active.folder)
    caps = ("--cap-epsilon", 20, "--cap-delta", 1e-3)
    assert "--yes" in refused(capsys, "recover", "--home", active.folder, *caps)
    refused(capsys, "recover", "--home", active.folder, "--cap-epsilon", -1, "--cap-delta", 1e-3, "--yes")
    code, out, _ = run(capsys, "recover", "--home", active.folder, *caps, "--yes")
    assert code == 0
    assert f"epsilon {published.campaign.policy.epsilon:g} of 20" in out
    code, out, _ = run(capsys, "status", "--home", active.folder)
    assert code == 0
    assert f"spent: epsilon {published.campaign.policy.epsilon:g} of 20" in out
    assert homes.ask(active, published.campaign, round_number=2)[0] in ("CONSENT", "POLICY")


@pytest.mark.fault("R12")
def test_a_rolled_back_ledger_is_told_and_recovered(active, published, capsys):
    active.ledger().close()
    older = {path: path.read_bytes() for path in active.folder.glob("ledger.db*") if path.suffix != ".db-shm"}
    run(capsys, "pause", "--home", active.folder)
    for left in active.folder.glob("ledger.db*"):
        left.unlink()
    for path, content in older.items():
        path.write_bytes(content)
    error = refused(capsys, "status", "--home", active.folder)
    assert "no older than it was" in error
    assert "sottovoce client recover" in error
    code, out, _ = run(capsys, "recover", "--home", active.folder, "--cap-epsilon", 20, "--cap-delta", 1e-3, "--yes")
    assert code == 0
    assert f"ended: {published.campaign.policy.campaign}" in out
    assert ": ended, agreed" in run(capsys, "status", "--home", active.folder)[1]


def test_without_the_ledgers_key_nothing_is_forgotten_but_the_records_are_lost(active, published, capsys):
    (active.folder / "keys" / "ledger-key").unlink()
    assert "sottovoce client recover" in refused(capsys, "status", "--home", active.folder)
    caps = ("--cap-epsilon", 20, "--cap-delta", 1e-3)
    code, out, _ = run(capsys, "recover", "--home", active.folder, *caps, "--yes")
    assert code == 0
    assert f"epsilon {published.campaign.policy.epsilon:g} of 20" in out
    assert "cannot be read any more" in out  # nobody wipes the counters and trains on the old records again
    assert run(capsys, "forget", "--yes", "--home", active.folder)[0] == 0
    owner.add(active, [Record(text="new", target=1.0, item="", timestamp=0)])
    assert run(capsys, "status", "--home", active.folder)[0] == 0


def test_where_a_rollback_can_be_noticed_status_says_so(active, ledgers):
    keystore = ledgers.MemoryKeystore({path.name: path.read_bytes() for path in (active.folder / "keys").iterdir()})
    found = owner.status(type(active)(active.folder, keystore, active.clock))
    assert found["keys"] == {"where": "memory", "weak": False, "rollback_detectable": True}
    text = "\n".join(status_lines(found))
    assert "not detectable" not in text
    assert "is noticed" in text
    assert "strong" in text


def test_a_sound_ledger_is_not_recovered(active, capsys):
    before = snapshot(active.folder)
    error = refused(capsys, "recover", "--home", active.folder, "--cap-epsilon", 20, "--cap-delta", 1e-3, "--yes")
    assert "nothing is wrong" in error
    assert snapshot(active.folder) == before


def test_a_busy_ledger_is_not_called_damaged(active, ledgers):
    keystore = ledgers.MemoryKeystore()
    keystore.broken = True
    home = type(active)(active.folder, keystore, active.clock)
    with pytest.raises(LedgerError) as raised:
        owner.status(home)
    assert "recover" not in str(raised.value)


def test_status_says_when_only_the_records_cannot_be_read(active, capsys):
    (active.folder / "keys" / "data-key").unlink()
    code, out, err = run(capsys, "status", "--home", active.folder)
    assert code == 2
    assert "cannot be read" in out
    assert "data-key" in err


def test_forget_deletes_and_the_receipt_says_what_and_what_not(active, homes, published, tmp_path, capsys):
    policy = published.campaign.policy
    [sent] = [event for event in owner.history(active) if event["event"] == "release"]
    spent = active.ledger().totals()
    before = snapshot(active.folder)
    assert "--yes" in refused(capsys, "forget", "--home", active.folder)
    (tmp_path / "taken").write_text("mine")
    for wrong in (tmp_path / "taken", tmp_path / "nowhere" / "r.json", tmp_path):
        assert "--receipt" in refused(capsys, "forget", "--yes", "--home", active.folder, "--receipt", wrong)
    assert snapshot(active.folder) == before
    code, out, _ = run(capsys, "forget", "--yes", "--home", active.folder, "--receipt", tmp_path / "receipt.json")
    assert code == 0
    left = {path.name for path in active.folder.iterdir()}
    assert left <= {"keystore.json", "keys", "ledger.db", "ledger.db-wal", "ledger.db-shm", "lock", "receipts"}
    assert {path.name for path in (active.folder / "keys").iterdir()} == {"ledger-key", "anchor", "head-sequence"}
    [kept] = (active.folder / "receipts").iterdir()
    content = (tmp_path / "receipt.json").read_bytes()
    assert kept.read_bytes() == content
    receipt = json.loads(content)
    assert receipt["deleted"]["records"] == len(published.dataset.users[0].train)
    assert receipt["deleted"]["files"] == {"campaigns": 1, "features": 1, "heads": 3, "keys": 2, "records": 1}
    assert receipt["deleted"]["names"].count("keys/data-key") == 1
    [campaign] = receipt["left_the_device"]["campaigns"]
    assert (campaign["epsilon"], campaign["delta"]) == (policy.epsilon, policy.delta)
    assert campaign["replies"] == [{"round": 1, **{key: sent[key] for key in ("at", "sha256", "size_bytes")}}]
    assert receipt["remains"]
    texts = {record.text for record in published.dataset.users[0].train}
    for path in (tmp_path / "receipt.json", active.folder / "ledger.db"):
        assert not any(text.encode() in path.read_bytes() for text in (*texts, SECRET))
    event = owner.history(active)[-1]
    assert event["event"] == "forget"
    assert event["receipt"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert "stays out: 1 replies, together within epsilon" in out
    after = active.ledger().totals()
    assert (after.epsilon, after.delta) == (spent.epsilon, spent.delta)
    for command in ("status", "history"):
        assert run(capsys, command, "--home", active.folder)[0] == 0
    assert homes.ask(active, published.campaign, round_number=2)[0] in ("CONSENT", "POLICY")


def test_after_forget_add_makes_a_new_vault_with_a_new_key(active, published, capsys):
    old_key = (active.folder / "keys" / "data-key").read_bytes()
    old_file = (active.folder / "vault" / "records" / "000001").read_bytes()
    forget(active)
    owner.add(active, [Record(text="new", target=1.0, item="", timestamp=0)])
    assert (active.folder / "keys" / "data-key").read_bytes() != old_key
    assert [record.text for record in active.records().read()] == ["new"]
    (active.folder / "vault" / "records" / "000001").write_bytes(old_file)
    with pytest.raises(StoreError):
        active.records().read()


def test_a_receipt_lies_outside_of_what_is_deleted(active, capsys):
    before = snapshot(active.folder)
    inside = active.folder / "vault" / "receipt.json"
    assert "outside the home" in refused(capsys, "forget", "--yes", "--home", active.folder, "--receipt", inside)
    assert snapshot(active.folder) == before


def test_a_home_at_work_is_not_forgotten(active, capsys):
    before = snapshot(active.folder)
    with active.lock():
        for command in (("forget", "--yes"), ("recover", "--cap-epsilon", 20, "--cap-delta", 1e-3, "--yes")):
            assert "at work" in refused(capsys, *command, "--home", active.folder)
    assert snapshot(active.folder) == before


def test_forget_does_not_need_a_sound_ledger(active, capsys):
    for path in active.folder.glob("ledger.db*"):
        path.unlink()
    error = refused(capsys, "forget", "--yes", "--home", active.folder)
    assert "everything was deleted" in error
    assert not (active.folder / "vault").exists()
    assert not (active.folder / "keys" / "data-key").exists()
    [receipt] = (active.folder / "receipts").iterdir()
    assert "unknown" in json.loads(receipt.read_bytes())["left_the_device"]


@pytest.mark.slow
def test_a_forget_killed_at_any_step_has_lost_the_key_first_and_is_completed_by_the_next(active, crash_at_each_step):
    data = len([path for path in (active.folder / "vault").rglob("*") if path.is_file()])
    held = len(active.records().read())
    active.ledger().close()
    code = """
from client.owner.forget import forget
from client.home.home import open_home
forget(open_home(home))
"""
    copies = crash_at_each_step(active.folder, code)
    assert len(copies) > 15
    partial = cut = 0
    for folder in copies:
        files = [path for path in (folder / "vault").rglob("*") if path.is_file()]
        campaigns = list((folder / "campaigns").glob("*/*"))
        key = folder / "keys" / "data-key"
        if len(files) < data or len(campaigns) < 5:
            partial += 1
            assert not key.exists() or not any(key.read_bytes())
        if folder != copies[-1]:
            cut += owner.status(open_home(folder))["forget_was_cut"]
            forget(open_home(folder))
        assert not key.exists()
        assert not (folder / "vault").exists()
        assert not (folder / "campaigns").exists()
        assert not (folder / "receipts" / "begun.json").exists()
        names = [json.loads(path.read_bytes())["deleted"] for path in (folder / "receipts").glob("*.json")]
        assert any("records/000001" in found["names"] and found["records"] == held for found in names)
        with open_home(folder).ledger() as ledger:
            assert ledger.history()[-1].kind == "forget"
            assert {standing.state for standing in ledger.consents()} == {"withdrawn"}
    assert min(partial, cut) > 5


@pytest.mark.parametrize(("answer", "code"), [("y", 0), ("Yes", 0), ("", 2), ("no", 2), (None, 2)])
def test_on_a_terminal_the_owner_is_asked(active, monkeypatch, capsys, answer, code):
    def ask(question):
        assert question.endswith("[y/N] ")
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("builtins.input", ask)
    assert run(capsys, "forget", "--home", active.folder)[0] == code
    assert (active.folder / "vault").exists() is (code == 2)


def test_no_home_is_one_line(tmp_path, capsys, monkeypatch):
    for command in (("status",), ("history",), ("pause",), ("resume",), ("rollback",), ("forget", "--yes")):
        assert "sottovoce client init" in refused(capsys, *command, "--home", tmp_path / "nowhere")


def test_the_owners_commands_need_neither_torch_nor_flower(active, tmp_path):
    """On the base install: init, add, status, history, pause, resume, withdraw, rollback, recover, forget."""
    policy = active.ledger().consents()[0].consent.policy
    (tmp_path / "mine.jsonl").write_text(json.dumps(GOOD))
    caps = ["--cap-epsilon", "20", "--cap-delta", "1e-3"]
    home = ["--home", str(active.folder)]
    commands = [
        ["init", "--keystore", "file", "--home", str(tmp_path / "new")],
        ["add", "--jsonl", str(tmp_path / "mine.jsonl"), *home],
        *([command, *home] for command in ("status", "history", "pause", "resume", "rollback")),
        ["withdraw", policy[:12], *home],
        ["forget", "--yes", *home],
        ["status", *home],
    ]
    script = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "flwr", "dp_accounting", "opacus", "peft", "transformers", "onnx"):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Block())
from pathlib import Path
from sottovoce.cli import main
for command in {commands!r}:
    code = main(["client", *command])
    if code:
        sys.exit(f"{{command}} ended with {{code}}")
for left in Path({str(active.folder)!r}).glob("ledger.db*"):
    left.unlink()
sys.exit(main(["client", "recover", "--yes", *{caps + home!r}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
