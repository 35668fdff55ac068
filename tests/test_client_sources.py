"""A home's data folder: read only after the spend, never written; records that come and go as the policy says."""

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.clientapp import ClientApp
from safetensors.numpy import load, save

import client.home.sources
import client.training.device
import client.training.inputs
from client.app import answer
from client.home.home import open_home
from client.home.sources import SOURCE, make_source, read_source, records_of, set_source, training_records
from client.owner.consent import examine_offer
from client.owner.forget import forget
from client.owner.owner import choose_source, drop_source, status
from client.owner.words import offer_lines
from client.training.device import OwnedDevice
from shared.config import load_scenario
from shared.datasets.records import Record
from shared.errors import CampaignError, DataError, StoreError
from shared.privacy.policy import PROTOCOL, read_policy
from shared.protocol import wire
from simulations.publish import WORDS
from sottovoce.cli import main

COLUMNS = {"text": "said", "target": "stars"}
SECRET = "aardvark-sentinel-4711"
RULES = ("next-round", "next-campaign")


def lines(*pairs):
    return "".join(json.dumps({"said": text, "stars": stars}) + "\n" for text, stars in pairs)


FIRST = [
    ("a quiet crime drama", 4),
    ("war, and more war", 1),
    ("comedy of the sci fi", 2),
]  # 3 is the midpoint: no gradient
ADDED = ("a horror for children", 5)


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text(lines(*FIRST))
    return folder


@pytest.fixture(scope="module")
def rules(homes, tiny_world, tmp_path_factory):
    """A signed campaign for each value of ``added_records``; a device may join all three rounds."""
    made = {}
    for rule in RULES:
        folder = tmp_path_factory.mktemp(rule)
        changes = (f"privacy.added_records={rule}", "privacy.max_participations=3", "federation.cohort_size=2")
        made[rule] = homes.publish(tiny_world(folder), folder, overrides=changes)
    return made


@pytest.fixture
def world(homes, steps, tmp_path):
    """(published, name) -> a home with a data folder, and ``sums(round, *pairs)``: what it sends without noise."""

    def make(published, name):
        home = homes.make_home(tmp_path / name, published, user=None)
        folder = tmp_path / f"{name}-data"
        folder.mkdir()
        choose_source(home, make_source(folder, format="jsonl", columns=COLUMNS))
        app = ClientApp()

        @app.train()
        def train(message, context):
            return answer(message, context, find=lambda _: OwnedDevice(home, randomness=lambda *_: steps.Silent()))

        def sums(round_number, *pairs):
            (folder / "a.jsonl").write_text(lines(*pairs))
            code, reply = homes.ask(home, published.campaign, client=app, round_number=round_number)
            assert code is None
            assert wire.take_stamp(reply.content)
            return {name: array.tobytes() for name, array in homes.update_in(reply, published.campaign).items()}

        return SimpleNamespace(home=home, sums=sums, folder=folder)

    return make


def test_a_record_added_between_rounds_is_used_as_the_policy_says(rules, world):
    for rule, counted in (("next-round", [*FIRST, ADDED]), ("next-campaign", FIRST)):
        adds, expected, without = (world(rules[rule], f"{rule}-{who}") for who in ("adds", "expected", "without"))
        first = adds.sums(1, *FIRST)
        assert first == without.sums(1, *FIRST)
        assert expected.sums(1, *counted) == (first if counted is FIRST else expected.sums(1, *counted))
        second = adds.sums(2, *FIRST, ADDED)
        assert second == expected.sums(2, *counted)
        assert (second == without.sums(2, *FIRST)) is (rule == "next-campaign")


def test_a_record_that_is_gone_is_used_no_more_and_may_come_back(rules, world):
    for rule in RULES:
        device, other = world(rules[rule], f"{rule}-device"), world(rules[rule], f"{rule}-other")
        whole = device.sums(1, *FIRST)
        assert device.sums(2, *FIRST[:2]) == other.sums(1, *FIRST[:2]) != whole
        assert device.sums(3, *FIRST) == whole  # the same record, so still at most one a round


def test_an_edited_record_is_a_removal_and_an_addition(rules, world):
    edited = [*FIRST[:2], (FIRST[2][0], 5)]
    for rule, left in (("next-round", edited), ("next-campaign", FIRST[:2])):
        device, other = world(rules[rule], f"{rule}-device"), world(rules[rule], f"{rule}-other")
        device.sums(1, *FIRST)
        assert device.sums(2, *edited) == other.sums(1, *left)


def test_the_next_campaign_has_what_was_added_in_the_last(homes, data, tmp_path):
    home = homes.make_home(tmp_path / "home")
    choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))

    def texts(campaign, *, opened=home):
        settings = {"task": "rating", "added": "next-campaign"}
        return [record.text for record in training_records(opened, policy_sha256=campaign * 64, **settings)]

    before = texts("a")
    (data / "a.jsonl").write_text(lines(*FIRST, ADDED))
    assert texts("a") == texts("a", opened=open_home(home.folder)) == before == [text for text, _ in FIRST]
    assert texts("b") == [text for text, _ in (*FIRST, ADDED)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("there", [(1, 1, 1), (0, 1, 0), (1, 0, 1)])
def test_a_record_that_comes_and_goes_moves_each_round_by_at_most_the_clip_norm(rules, world, rule, there):
    """Streams that differ in one record, there in some rounds and beside copies of itself, whatever else changes."""
    campaign = rules[rule].campaign
    policy = campaign.policy
    one, other = world(rules[rule], "one"), world(rules[rule], "other")
    rest = [FIRST, [*FIRST[1:], ("a new one", 2)], [FIRST[0]]]
    moved = []
    for round_number, (is_there, pairs) in enumerate(zip(there, rest, strict=True), start=1):
        a = one.sums(round_number, *pairs, *[ADDED] * 2 * is_there, *[ADDED] * is_there)
        b = other.sums(round_number, *pairs)
        gap = [np.frombuffer(a[name], np.float32).astype(float) - np.frombuffer(b[name], np.float32) for name in a]
        moved.append(float(np.linalg.norm(np.concatenate(gap))) * policy.denominator / policy.learning_rate)
    used = [bool(is_there and (rule == "next-round" or there[0])) for is_there in there]
    assert all((distance > policy.clip_norm / 100) is is_used for distance, is_used in zip(moved, used, strict=True))
    assert max(moved) <= policy.clip_norm * (1 + 1e-6)


def test_a_row_that_is_no_record_does_not_change_the_answer(rules, world):
    device, other = world(rules["next-round"], "device"), world(rules["next-round"], "other")
    for name, content in (("b.jsonl", b"{\n[]\n\xff\n"), ("c.jsonl", lines(FIRST[0], (7, 1), ("x", "y")).encode())):
        (device.folder / name).write_bytes(content)
    (device.folder / "d.jsonl").symlink_to("nowhere")
    assert device.sums(1, *FIRST) == other.sums(1, *FIRST)


def test_a_folder_is_read_only_after_the_round_is_spent(homes, published, data, tmp_path, monkeypatch):
    home = homes.make_home(tmp_path / "home", published)
    choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))
    order = []
    spend, read = OwnedDevice.spend, client.home.sources.read_folder

    def spent():
        with home.ledger() as ledger:
            return [standing.spent for standing in ledger.consents()]

    monkeypatch.setattr(OwnedDevice, "spend", lambda *a: (spend(*a), order.append(("spent", spent())))[0])
    monkeypatch.setattr(
        client.home.sources, "read_folder", lambda *a, **k: order.append(("read", spent())) or read(*a, **k)
    )
    assert homes.ask(home, published.campaign, policy_sha256="0" * 64)[0] == "POLICY"
    assert homes.ask(home, published.campaign, round_number=99)[0] == "ROUND"
    assert order == []
    assert homes.ask(home, published.campaign)[0] is None
    assert order == [("spent", [1]), ("read", [1])]
    assert homes.ask(home, published.campaign)[0] is None  # repeated: the bytes of before
    assert order == [("spent", [1]), ("read", [1]), ("spent", [1])]


def test_a_folder_that_is_gone_burns_the_round_and_sends_a_code(homes, published, data, tmp_path):
    home = homes.make_home(tmp_path / "home", published)
    choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))
    data.rename(tmp_path / "moved")
    assert homes.ask(home, published.campaign)[0] == "STORE"
    with home.ledger() as ledger:
        [standing] = ledger.consents()
    assert (standing.spent, standing.burnt) == (1, 1)
    (tmp_path / "moved").rename(data)
    assert homes.ask(home, published.campaign, round_number=2)[0] is None


def test_a_round_leaves_the_folder_as_it_was(homes, published, data, tmp_path):
    home = homes.make_home(tmp_path / "home", published)
    (data / "sub").mkdir()
    (data / "sub" / "b.jsonl").write_text(lines(ADDED))

    def tree():
        return {
            path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "")
            for path in (data, *data.rglob("*"))
        }

    for path in (*data.rglob("*"), data):
        path.chmod(0o500 if path.is_dir() else 0o400)
    before = tree()
    choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))
    assert homes.ask(home, published.campaign)[0] is None
    assert status(home)["source"]["records"] == 4
    drop_source(home)
    assert tree() == before
    for path in (data, data / "sub"):
        path.chmod(0o700)


class TestRecords:
    """Store and folder together."""

    def test_an_equal_record_counts_once_and_the_order_is_fixed(self, homes, data, tmp_path):
        home = homes.make_home(tmp_path / "home")
        own, both = Record("mine", 2.0, "", 0), Record(FIRST[1][0], 1.0, "", 0)
        home.records().add([own, both])
        assert records_of(home) == (own, both)
        choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))
        (data / "0.jsonl").write_text(lines(FIRST[2], FIRST[2]))
        assert [r.text for r in records_of(home)] == ["mine", FIRST[1][0], FIRST[2][0], FIRST[0][0]]

    def test_a_folder_without_what_a_task_needs_has_nothing_for_it(self, homes, data, tmp_path):
        home = homes.make_home(tmp_path / "home")
        home.records().add([Record("mine", 2.0, "", 0)])
        choose_source(home, make_source(data, format="jsonl", columns={"text": "said"}))
        assert len(records_of(home)) == 4
        assert [r.text for r in records_of(home, task="rating")] == ["mine"]
        choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))
        assert len(records_of(home, task="rating")) == 4
        assert [r.text for r in records_of(home, task="generation")] == ["mine"]

    def test_a_home_that_forgot_reads_no_folder(self, homes, published, data, tmp_path):
        home = homes.make_home(tmp_path / "home", published)
        choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))
        assert homes.ask(home, published.campaign)[0] is None
        before = (data / "a.jsonl").read_bytes()
        receipt = forget(home)
        assert SOURCE in receipt["deleted"]["names"]
        assert any("data folder are yours" in line for line in receipt["out_of_reach"])
        assert read_source(home) is None
        assert records_of(home) == ()
        assert (data / "a.jsonl").read_bytes() == before
        choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))  # makes a new vault
        assert len(records_of(open_home(home.folder))) == 3

    def test_the_folder_alone_is_not_read_where_the_vault_is_gone(self, homes, data, tmp_path, monkeypatch):
        """A deletion that was cut has shredded the vault first."""
        home = homes.make_home(tmp_path / "home")
        choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))
        (home.folder / "vault").rename(tmp_path / "gone")
        monkeypatch.setattr(client.home.sources, "read_folder", lambda *_, **__: pytest.fail("the folder was read"))
        assert records_of(home) == ()
        assert training_records(home, policy_sha256="0" * 64, task="rating", added="next-campaign") == ()

    def test_the_kept_set_is_sealed(self, rules, world):
        device = world(rules["next-campaign"], "device")
        device.sums(1, *FIRST)
        [path] = (device.home.folder / "vault" / "fixed-records").iterdir()
        assert path.stat().st_mode & 0o777 == 0o600
        digests = device.home.vault().open(f"fixed-records/{path.name}")
        assert len(digests) == 32 * len(FIRST)
        assert not any(digests[i : i + 8] in path.read_bytes() for i in range(0, len(digests), 32))


class TestFeatures:
    """Backbone outputs of records that come and go."""

    def kept(self, home):
        [name] = home.vault().names("features/")
        return load(home.vault().open(name))

    def test_only_what_is_new_is_computed_and_what_is_gone_is_dropped(self, rules, world, monkeypatch):
        device, fresh = world(rules["next-round"], "device"), world(rules["next-round"], "fresh")
        computed = []
        real = client.training.inputs.compute_hidden
        monkeypatch.setattr(
            client.training.inputs, "compute_hidden", lambda b, ids, **k: computed.append(ids) or real(b, ids, **k)
        )
        twice = device.sums(1, *FIRST, (FIRST[0][0], 5))  # two records of one text
        assert (len(computed), len(self.kept(device.home)["lengths"])) == (3, 3)
        device.sums(2, *FIRST[1:])
        assert (len(computed), len(self.kept(device.home)["lengths"])) == (3, 2)
        third = device.sums(3, *FIRST[1:], ADDED)
        assert (len(computed), len(self.kept(device.home)["lengths"])) == (4, 3)
        assert third == fresh.sums(1, *FIRST[1:], ADDED)  # with every output computed anew
        assert twice != fresh.sums(2, *FIRST)
        fresh.sums(3)
        assert fresh.home.vault().names("features/") == []

    def test_outputs_sealed_by_an_earlier_version_are_computed_anew(self, rules, world):
        device, fresh = world(rules["next-round"], "device"), world(rules["next-round"], "fresh")
        first = device.sums(1, *FIRST)
        found = self.kept(device.home)
        [name] = device.home.vault().names("features/")
        old = {"key": np.zeros(32, np.uint8), "values": np.zeros_like(found["values"]), "lengths": found["lengths"]}
        device.home.vault().seal(name, save(old))
        assert device.sums(2, *FIRST) == first == fresh.sums(1, *FIRST)

    def test_more_than_fits_is_computed_in_every_round(self, rules, world, monkeypatch):
        monkeypatch.setattr(client.training.inputs, "_MOST_SEALED_BYTES", 100)
        device = world(rules["next-round"], "device")
        assert device.sums(1, *FIRST) == device.sums(2, *FIRST)
        assert device.home.vault().names("features/") == []


class TestSource:
    """What ``source.json`` may say."""

    def test_it_must_lie_outside_the_home(self, homes, tmp_path):
        home = homes.make_home(tmp_path / "home")
        (home.folder / "inner").mkdir()
        (tmp_path / "link").symlink_to(home.folder / "vault")
        for wrong in (home.folder, home.folder / "inner", tmp_path, tmp_path / "link"):
            with pytest.raises(DataError, match="must lie outside the home"):
                set_source(home, make_source(wrong, format="jsonl", columns=COLUMNS))
        assert read_source(home) is None

    @pytest.mark.parametrize("content", ["{", "[]", '{"path": "/x", "format": "xml", "columns": {"text": "t"}}', "{}"])
    def test_a_damaged_one_stops_and_says_what_to_do(self, homes, published, tmp_path, content):
        home = homes.make_home(tmp_path / "home", published)
        (home.folder / SOURCE).write_text(content)
        with pytest.raises(StoreError, match="sottovoce client source FOLDER"):
            records_of(home)
        assert homes.ask(home, published.campaign)[0] == "STORE"

    def test_a_relative_path_is_kept_whole_and_the_file_is_private(self, homes, data, tmp_path, monkeypatch):
        home = homes.make_home(tmp_path / "home")
        monkeypatch.chdir(tmp_path)
        choose_source(home, make_source(data.relative_to(tmp_path), format="jsonl", columns=COLUMNS))
        assert read_source(home).path == str(data)
        assert (home.folder / SOURCE).stat().st_mode & 0o777 == 0o600

    def test_a_round_at_work_is_not_disturbed(self, homes, data, tmp_path):
        home = homes.make_home(tmp_path / "home")
        with home.lock(), pytest.raises(StoreError, match="at rest"):
            choose_source(home, make_source(data, format="jsonl", columns=COLUMNS))
        assert read_source(home) is None


class TestCommands:
    """What an owner types, and what is never printed."""

    def run(self, capsys, *arguments):
        code = main(["client", *map(str, arguments)])
        out, err = capsys.readouterr()
        assert SECRET not in out + err
        return code, out, err

    def test_init_names_a_folder_and_source_and_status_show_counts(self, data, tmp_path, capsys):
        (data / "a.jsonl").write_text(lines(*FIRST, (SECRET, 4), (SECRET, SECRET), (SECRET, 4)) + SECRET)
        home = ("--home", tmp_path / "home")
        named = ("--source", data, "--format", "jsonl", "--columns", "text=said, target=stars")
        code, out, _ = self.run(capsys, "init", *home, "--keystore", "file", *named)
        assert code == 0
        code, again, _ = self.run(capsys, "source", *home)
        assert code == 0
        assert again in out
        for words in (f"data folder: {data} (jsonl; text=said, target=stars), read only", "records there now: 4",
                      "left out: 1 rows that are not", "left out: 1 rows whose target", "left out: 1 rows equal",
                      "of use to campaigns of ratings"):  # fmt: skip
            assert words in again
        _, text, _ = self.run(capsys, "status", *home)
        assert again.strip() in text
        _, found, _ = self.run(capsys, "source", "--json", *home)
        assert json.loads(found)["skipped"] == {"malformed": 1, "target": 1, "equal": 1}
        before = (data / "a.jsonl").read_bytes()
        assert self.run(capsys, "source", "--remove", *home)[:2] == (0, "data folder: none\n")
        assert (data / "a.jsonl").read_bytes() == before

    def test_another_folder_takes_the_place_of_the_first(self, data, tmp_path, capsys):
        home = ("--home", tmp_path / "home")
        self.run(capsys, "init", *home, "--keystore", "file", "--source", data, "--format", "text")
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "a.txt").write_text("One.\n\nTwo.")
        code, out, _ = self.run(capsys, "source", tmp_path / "notes", "--format", "text", *home)
        assert code == 0
        assert "records there now: 2" in out
        assert "of use to campaigns of language models" in out

    def test_a_folder_that_is_gone_is_said_by_source_and_status(self, data, tmp_path, capsys):
        home = ("--home", tmp_path / "home")
        self.run(capsys, "init", *home, "--keystore", "file", "--source", data, "--format", "text")
        data.rename(tmp_path / "moved")
        for command in ("source", "status"):
            code, out, err = self.run(capsys, command, *home)
            assert code == 2
            assert "cannot be read" in out
            assert err.startswith("sottovoce: the data folder")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (("--format", "jsonl", "--columns", "text=t"), "none is named"),
            (("DATA",), "--format must say"),
            (("DATA", "--format", "xml"), "format must be one of"),
            (("DATA", "--format", "jsonl"), "must name the column"),
            (("DATA", "--format", "jsonl", "--columns", "text=a,text=b"), "each field once"),
            (("DATA", "--format", "jsonl", "--columns", "text"), "an empty name"),
            (("DATA", "--format", "text", "--remove"), "got both"),
            (("NONE", "--format", "text"), "must be a folder that can be read"),
        ],
    )
    def test_what_cannot_be_is_refused_in_one_line_and_changes_nothing(self, data, tmp_path, capsys, arguments, words):
        home = ("--home", tmp_path / "home")
        self.run(capsys, "init", *home, "--keystore", "file", "--source", data, "--format", "text")
        before = (tmp_path / "home" / SOURCE).read_bytes()
        places = {"DATA": data, "NONE": tmp_path / "none"}
        code, _, err = self.run(capsys, "source", *(places.get(a, a) for a in arguments), *home)
        assert (code, err.count("\n")) == (2, 1)
        assert words in err
        assert (tmp_path / "home" / SOURCE).read_bytes() == before

    def test_init_makes_no_home_for_a_folder_that_cannot_be_read(self, tmp_path, capsys):
        named = ("--source", tmp_path / "none", "--format", "text")
        assert self.run(capsys, "init", "--home", tmp_path / "home", "--keystore", "file", *named)[0] == 2
        assert not (tmp_path / "home").exists()


class TestPolicy:
    """The rule is a constant of the campaign."""

    def test_the_policy_says_the_scenario_s_rule(self, rules):
        policies = {rule: rules[rule].campaign.policy for rule in RULES}
        assert {rule: policy.added_records for rule, policy in policies.items()} == {rule: rule for rule in RULES}
        assert policies["next-round"].settings_sha256 != policies["next-campaign"].settings_sha256
        other = policies["next-round"].model_copy(update={"added_records": "next-campaign"})
        assert other.sha256 != policies["next-round"].sha256
        assert "added_records" in WORDS

    def test_the_default_is_the_next_round(self, tiny_world, tmp_path):
        assert load_scenario(tiny_world(tmp_path)).privacy.added_records == "next-round"

    @pytest.mark.parametrize("rule", RULES)
    def test_an_owner_is_told_before_agreeing(self, homes, rules, tmp_path, rule):
        published = rules[rule]
        home = homes.make_home(tmp_path / "home")
        offer = examine_offer(home, published.campaign.folder, operator=published.key, until=homes.UNTIL)
        [line] = [line for line in offer_lines(offer) if line.startswith("your records:")]
        assert ("from the next round on" if rule == "next-round" else "not used in this campaign") in line

    def test_a_policy_of_the_protocol_before_is_refused(self, homes, rules, tmp_path):
        published = rules["next-round"]
        old = json.loads(published.campaign.policy.model_dump_json())
        del old["added_records"]
        with pytest.raises(CampaignError, match=f"must be of protocol {PROTOCOL}, got {PROTOCOL - 1}"):
            read_policy(json.dumps(old | {"protocol": PROTOCOL - 1}))
        home = homes.make_home(tmp_path / "home", published)
        path = home.campaign_folder(published.campaign.policy.sha256) / "policy.json"
        path.write_text(json.dumps(old | {"protocol": PROTOCOL - 1}))
        assert homes.ask(home, published.campaign)[0] == "POLICY"
        with home.ledger() as ledger:
            assert [standing.spent for standing in ledger.consents()] == [0]
