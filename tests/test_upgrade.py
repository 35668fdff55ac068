"""From one version to the next: old files are read and brought up to date, newer ones are refused and left alone.

And from one base model to the next: a new campaign, while the old head answers on its old base until it is replaced.
"""

import hashlib
import json
import shutil
import tarfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import client.home.store
import client.ledger.schema
import server.checkpoint
from client.export.encoder import export_base
from client.export.private_head import personalize
from client.home.home import open_home
from client.owner.verify import open_home_base, open_personal, reactivate
from client.runtime.artifact import MANIFEST, read_manifest
from client.runtime.runtime import open_base
from client.vault.vault import MAGIC
from server.aggregate import OptimizerState
from server.checkpoint import (
    Checkpoint,
    NewerCheckpointError,
    last_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from shared.config import TaskConfig
from shared.datasets.records import Record
from shared.errors import HeadError, LedgerError, StoreError
from shared.protocol import wire
from sottovoce.cli import main

FORMATS = Path(__file__).parent / "formats"

TEXTS = ["Fargo (1996). Crime, Drama, Thriller", "Heat (1995). Action", "It rained for three days."]


@pytest.fixture
def first(homes, tmp_path):
    """What the first version that knew an owner's home left on disk."""
    with tarfile.open(FORMATS / "first.tar.gz") as archive:
        archive.extractall(tmp_path / "first", filter="data")
    return tmp_path / "first"


@pytest.fixture
def old(first, homes):
    return open_home(first / "home", clock=homes.clock)


def everything_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


pytestmark = pytest.mark.fault("R19")

# N -> N+1: real files of the first version


def test_a_ledger_of_the_first_version_goes_on(old):
    with old.ledger(round_running=False) as ledger:
        [standing] = ledger.consents()
        assert (standing.spent, standing.released, standing.burnt) == (2, 2, 0)
        assert (standing.consent.epsilon, standing.consent.max_participations) == (8.0, 3)
        totals = ledger.totals()
        assert (totals.epsilon, totals.cap_epsilon, totals.paused) == (8.0, 20.0, True)
        ledger.resume()
        policy = standing.consent.policy
        [first, second] = [event for event in ledger.history() if event.kind == "release"]
        kept = ledger.kept_reply(policy=policy, round_number=2)
        assert hashlib.sha256(kept).hexdigest() == second.detail["sha256"] != first.detail["sha256"]
        assert ledger.spend(policy=policy, round_number=3, request_sha256="a", answered=2) is None
    with open_home(old.folder, clock=old.clock).ledger(round_running=False) as ledger:
        [standing] = ledger.consents()
    assert (standing.spent, standing.state) == (3, "exhausted")
    anchor = json.loads((old.folder / "keys" / "anchor").read_bytes())
    assert anchor["cap_nano_epsilon"] == 20 * 10**9  # as it is written today


def test_an_older_copy_of_a_first_ledger_is_still_noticed(old, tmp_path):
    earlier = tmp_path / "earlier.db"
    shutil.copy(old.folder / "ledger.db", earlier)
    with old.ledger(round_running=False) as ledger:
        ledger.resume()
    shutil.copy(earlier, old.folder / "ledger.db")
    with pytest.raises(LedgerError, match="older copy"):
        old.ledger(round_running=False)


@pytest.mark.parametrize("change", [{"nano_epsilon": 0}, {"seq": 1}, {"cap_nano_epsilon": 1}, {"ledger_id": "other"}])
def test_a_first_anchor_that_was_altered_is_refused(old, change):
    path = old.folder / "keys" / "anchor"
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change, sort_keys=True, separators=(",", ":")))
    with pytest.raises(LedgerError):
        old.ledger(round_running=False)


def test_a_first_ledger_that_is_lost_gives_no_new_room(old):
    """Its anchor knows what was reserved and not of what cap, so that nothing more can be agreed to."""
    (old.folder / "ledger.db").unlink()
    with old.recover(cap_epsilon=20.0, cap_delta=1e-3) as ledger:
        totals = ledger.totals()
    assert (totals.epsilon, totals.cap_epsilon) == (8.0, 8.0)


def test_records_of_the_first_version_are_read_and_added_to(old):
    records = old.records().read()
    assert [record.item for record in records] == ["27", "23", "28", "16"]
    assert records[0] == Record("Film number 27 (1977). Action, Horror", 4.0, "27", 355)
    more = Record("t", 1.0, "i", 1, rejected="a later field")
    old.records().add([more])
    assert old.records().read() == (*records, more)


def test_heads_of_the_first_version_stay_on_the_shelf_and_answer_nothing_unsigned(old, tiny_fleet):
    heads = old.heads()
    assert [version.number for version in heads.versions()] == [1, 2]
    assert heads.read(1)[MANIFEST] == b'{"n": 1}'
    heads.roll_back()
    assert heads.current() == 1
    base = open_base(tiny_fleet)
    opened = open_personal(old, base)
    assert opened.problem is not None
    np.testing.assert_array_equal(opened.model.raw(TEXTS), base.run(TEXTS)[1])


def test_an_owner_of_the_first_version_sees_everything_and_can_forget(old, capsys):
    place = ["--home", str(old.folder)]
    assert main(["client", "status", *place]) == 0
    said = capsys.readouterr().out
    assert "epsilon 8 of 20" in said
    assert "rounds: 2 of 3 used, 2 sent" in said
    assert main(["client", "history", *place]) == 0
    assert capsys.readouterr().out.count("left the device") == 2
    assert main(["client", "forget", "--yes", *place]) == 0
    with old.ledger() as ledger:
        assert ledger.totals().epsilon == 8.0
    assert not (old.folder / "vault" / "records").exists()


def test_a_policy_of_an_earlier_protocol_trains_nothing(old, homes):
    """Its campaign ended with its version: a device says so, and spends nothing on it."""
    with old.ledger(round_running=False) as ledger:
        ledger.resume()
        [standing] = ledger.consents()
    fields = {"round": 3, "policy": standing.consent.policy, "answered": 2}
    grid = homes.grid_of([old.folder])
    request = Message(RecordDict({"config": ConfigRecord(fields)}), dst_node_id=1000, message_type="train")
    [reply] = grid.send_and_receive([request])
    assert wire.refusal_code(reply) == "POLICY"
    with old.ledger() as ledger:
        [standing] = ledger.consents()
    assert standing.spent == 2


def test_a_campaign_of_the_first_version_s_server_goes_on_where_it_was(first):
    folder = first / "checkpoints"
    [policy] = {json.loads(path.read_text())["policy_sha256"] for path in folder.glob("*/state.json")}
    last = last_checkpoint(folder, policy_sha256=policy)
    assert (last.round_number, last.arrays_of) == (2, 2)
    assert (last.participations, last.answered) == ({0: 2, 1: 1}, {0: 2, 1: 1})
    assert last.optimizer.steps == dict.fromkeys(last.arrays, 2)  # one count for all slots, as it was
    assert sorted(path.name for path in folder.iterdir()) == ["round-0001", "round-0002"]  # none taken for damaged
    again = load_checkpoint(save_checkpoint(first / "again", last))
    np.testing.assert_equal(asdict(again), asdict(last))


# N + 1 -> N: what a newer version wrote is refused by name, and not a byte of it is changed


@pytest.fixture
def home(homes, tmp_path):
    home = homes.make_home(tmp_path / "home")
    home.records().add([Record("text", 3.0, "item", 1)])
    home.heads().add({"a": b"b"}, {"created": "", "campaign": "", "round": ""})
    return home


def newer_ledger(home):
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(home.folder / "ledger.db")) as connection:
        connection.execute(f"PRAGMA user_version = {len(client.ledger.schema.MIGRATIONS) + 1}")
    return lambda: home.ledger(round_running=False)


def newer_sealed_file(home):
    path = home.folder / "vault" / "records" / "000001"
    path.write_bytes(MAGIC[:-1] + bytes([MAGIC[-1] + 1]) + path.read_bytes()[len(MAGIC) :])
    return lambda: home.records().read()


def newer_vault_key(home):
    path = home.folder / "vault" / "key"
    path.write_bytes(MAGIC[:-1] + bytes([MAGIC[-1] + 1]) + path.read_bytes()[len(MAGIC) :])
    return lambda: home.vault()


def newer_record(home):
    home.vault().seal("records/000002", b'{"item":"i","later":1,"response":"","target":1.0,"text":"t","timestamp":1}\n')
    return lambda: home.records().read()


def newer_shelf(home):
    vault = home.vault()
    index = json.loads(vault.open("heads/index")) | {"later": 1}
    vault.seal("heads/index", json.dumps(index).encode())
    return lambda: home.heads().add({"a": b"c"}, {"created": "", "campaign": "", "round": ""})


NEWER = {
    newer_ledger: "a newer Sottovoce wrote it. Install that version",
    newer_sealed_file: "a newer Sottovoce wrote it",
    newer_vault_key: "a newer Sottovoce wrote it",
    newer_record: "upgrade sottovoce",
    newer_shelf: "upgrade sottovoce",
}


@pytest.mark.parametrize("made", NEWER, ids=lambda made: made.__name__)
def test_what_a_newer_version_wrote_in_a_home_is_refused_and_left_alone(home, made):
    use = made(home)
    before = everything_in(home.folder / "vault"), (home.folder / "ledger.db").read_bytes()
    for _ in range(2):
        with pytest.raises((StoreError, LedgerError), match=NEWER[made]):
            use()
    assert (everything_in(home.folder / "vault"), (home.folder / "ledger.db").read_bytes()) == before


def test_a_device_whose_home_is_newer_answers_nothing(homes, published, tmp_path):
    for made, code in ((newer_ledger, "LEDGER"), (newer_vault_key, "STORE")):
        home = homes.make_home(tmp_path / made.__name__, published)
        made(home)
        assert homes.ask(home, published.campaign)[0] == code


def test_a_newer_checkpoint_stops_a_server_and_is_not_taken_for_a_damaged_one(tmp_path, monkeypatch):
    """Else an older version would begin the campaign anew, or go on from an older round."""
    made = [Checkpoint(number, "p", {"a": np.ones(1)}, OptimizerState(), {}) for number in (1, 2)]
    save_checkpoint(tmp_path, made[0])
    with monkeypatch.context() as patch:
        patch.setattr(server.checkpoint, "_FORMAT", server.checkpoint._FORMAT + 1)
        save_checkpoint(tmp_path, made[1])
    before = everything_in(tmp_path)
    for use in (
        lambda: last_checkpoint(tmp_path, policy_sha256="p"),
        lambda: newest_checkpoint(tmp_path),
        lambda: load_checkpoint(tmp_path / "round-0002"),
    ):
        with pytest.raises(NewerCheckpointError, match=r"a newer Sottovoce wrote it\. Install that"):
            use()
    assert everything_in(tmp_path) == before
    assert newest_checkpoint(tmp_path, before=2).round_number == 1
    state = tmp_path / "round-0002" / "state.json"
    state.write_text(state.read_text().replace('"format": 2', '"format": 3'))  # a flipped bit is damage, and no version
    assert last_checkpoint(tmp_path, policy_sha256="p").round_number == 1


def test_a_head_s_manifest_of_another_schema_says_whose_it_is(tmp_path):
    for schema, words in (
        (99, "a newer Sottovoce wrote it"),
        (1, "an earlier Sottovoce wrote it, export or personalize"),
    ):
        (tmp_path / MANIFEST).write_text(json.dumps({"schema": schema, "kind": "adapter"}))
        with pytest.raises(HeadError, match=words):
            read_manifest(tmp_path, "adapter")


# From one base to the next


@pytest.fixture(scope="module")
def next_world(homes, tiny, make_tiny_base, tiny_base, tiny_fleet, tiny_texts, tmp_path_factory):
    """Two campaigns of one operator, the second on another base; and both bases as the fleet runs them, signed."""
    folder = tmp_path_factory.mktemp("next")
    data = tiny.tiny_movielens(folder / "data")
    other = make_tiny_base(folder / "other-base", seed=1)
    assert other.sha256 != tiny_base.sha256
    published = {}
    for name, base in (("old", tiny_base), ("new", other)):
        place = folder / name
        place.mkdir()
        if name == "new":
            for key in (folder / "old").glob("operator.key*"):
                shutil.copy(key, place)
        scenario = tiny.tiny_scenario(place, base=base.folder, data=data)
        published[name] = homes.publish(
            scenario, place, overrides=("privacy.max_participations=2", "federation.cohort_size=2", f"name={name}")
        )
    export_base(
        other,
        folder / "exported",
        blocks=[0, 1],
        targets=("attention.output.dense", "output.dense"),
        max_tokens=48,
        task=TaskConfig(),
        probe_texts=tiny_texts,
    )
    bases = {"old": tiny_fleet, "new": folder / "exported"}
    signed = {name: homes.sign_base(base, published[name], folder / f"{name}-fleet") for name, base in bases.items()}
    return published, signed


def answers(home, folder):
    """What the home's model says on a base, and why it is the bare one."""
    opened = open_personal(home, open_home_base(home, folder, kind="base"))
    return opened.model.raw(TEXTS), opened.problem


def test_an_old_head_answers_on_its_base_until_a_head_on_the_new_one_takes_its_place(homes, next_world, tmp_path):
    published, bases = next_world
    old, new = published["old"].campaign, published["new"].campaign
    assert old.policy.base_sha256 != new.policy.base_sha256
    assert old.policy.sha256 != new.policy.sha256
    home = homes.make_home(tmp_path / "home", published["old"])
    assert homes.ask(home, old)[0] is None
    personalize(home, base_folder=bases["old"])
    before, problem = answers(home, bases["old"])
    assert problem is None

    # The operator publishes a campaign on a new base: nothing is asked of a device whose owner has not agreed.
    assert homes.ask(home, new)[0] == "POLICY"
    homes.consent(home, published["new"])
    with home.ledger() as ledger:
        reserved = ledger.totals().epsilon
        assert reserved == sum(standing.consent.epsilon for standing in ledger.consents())  # the old price stays
    assert homes.ask(home, new)[0] is None
    assert homes.ask(home, old, round_number=2, answered=1)[0] is None  # the old campaign may go on meanwhile
    found, problem = answers(home, bases["old"])
    assert problem is None
    np.testing.assert_array_equal(found, before)  # what answers is still the old head, to the last bit

    # A head of the new campaign on the old base is none, and the shelf stays as it is.
    for name in ("new", "old"):
        other = {"new": "old", "old": "new"}[name]
        with pytest.raises(HeadError):
            personalize(home, base_folder=bases[other], prefix=published[name].campaign.policy.sha256[:12])
    assert home.heads().current() == 1
    with pytest.raises(LedgerError, match="--campaign must name one"):
        personalize(home, base_folder=bases["new"])
    np.testing.assert_array_equal(answers(home, bases["old"])[0], before)

    personalize(home, base_folder=bases["new"], prefix=new.policy.sha256[:12])
    after, problem = answers(home, bases["new"])
    assert problem is None
    assert np.abs(after - before).max() > 1e-3
    bare, problem = answers(home, bases["old"])  # replaced: the old base answers alone, and says why
    assert "with the base it was exported for" in problem
    np.testing.assert_array_equal(bare, open_home_base(home, bases["old"], kind="base").run(TEXTS)[1])

    reactivate(home, None)  # the owner may go back, and forward again
    found, problem = answers(home, bases["old"])
    assert problem is None
    np.testing.assert_array_equal(found, before)
    reactivate(home, 2)
    np.testing.assert_array_equal(answers(home, bases["new"])[0], after)


def test_the_same_by_the_owner_s_commands(homes, next_world, tmp_path, capsys):
    """A withdrawal ends the old campaign; the head it gave goes on answering all the same."""
    published, bases = next_world
    home = homes.make_home(tmp_path / "home", published["old"])
    place = ["--home", str(home.folder)]
    personalize(home, base_folder=bases["old"])
    old, new = (published[name].campaign for name in ("old", "new"))

    def predict(base):
        assert main(["client", "predict", "--base", str(bases[base]), "--text", TEXTS[0], "--json", *place]) == 0
        return capsys.readouterr()

    first = predict("old")
    key = published["new"].private.with_name("operator.key.pub")
    words = ["--operator", str(key), "--until", "2099-01-01", "--yes"]
    assert main(["client", "consent", str(new.folder), *words, *place]) == 0
    assert main(["client", "withdraw", old.policy.sha256[:12], *place]) == 0
    capsys.readouterr()
    assert homes.ask(home, old)[0] == "CONSENT"
    assert predict("old") == first
    chosen = ["--campaign", new.policy.sha256[:12], "--base", str(bases["new"])]
    assert main(["client", "personalize", *chosen, *place]) == 0
    capsys.readouterr()
    assert predict("new").out != first.out
    assert "exported for" in "".join(predict("old"))
