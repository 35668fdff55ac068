"""The privacy card: every number found again in its sources, nothing that is no promise, nothing of an owner's text."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from client.home.home import open_home
from client.owner.card import device_sources
from client.owner.owner import set_paused, status, withdraw
from server.app import start_checkpoint
from server.card import server_sources
from server.checkpoint import Counts, checkpoint_path, save_checkpoint
from server.folder import CAMPAIGN_FILES, create_server
from shared.card.card import build_card, check_card, make_card
from shared.card.cells import cells, check_cells, is_cell
from shared.card.page import render, shown
from shared.card.sources import CARD, FOLDER, PAGE, Sources, as_json, gather
from shared.errors import CampaignError, DataError, LedgerError, PrivacyError, SottovoceError
from shared.privacy.accounting import epsilon
from shared.protocol.campaign import read_campaign
from shared.protocol.signing import fingerprint, load_private, sign_policy, signed_by
from simulations.card import folder_sources
from sottovoce.cli import main


@pytest.fixture(scope="module")
def played(homes, published, tmp_path_factory):
    """A home that answered one of its two rounds."""
    home = homes.make_home(tmp_path_factory.mktemp("card") / "home", published)
    assert homes.ask(home, published.campaign)[0] is None
    return home


@pytest.fixture(scope="module")
def device(played, published, cards, tmp_path_factory):
    """The sources of that home's card, with an audit of it, one of other code and one of another policy."""
    folder, policy = tmp_path_factory.mktemp("audits"), published.campaign.policy
    audits = [
        cards.audit(policy, folder / "own.json"),
        cards.audit(policy, folder / "code.json", code_sha256="0" * 64),
        cards.audit(policy, folder / "policy.json", policy_sha256="0" * 64),
    ]
    return device_sources(played, audits=audits, created=cards.CREATED)


@pytest.fixture(scope="module")
def run_folder(cards, published, invented, tmp_path_factory):
    return cards.run_folder(tmp_path_factory.mktemp("run") / "run", published.campaign.folder, invented)


def resolve(folder: Path, pointer: str):
    """What a pointer names, by code that the card does not use."""
    name, path = pointer.split("#")
    value = json.loads((folder / FOLDER / name).read_text())
    for step in filter(None, path.split("/")):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return value


def test_every_number_is_in_a_file_or_computed_from_files(device, published, played, tmp_path):
    card = make_card(device, tmp_path / "card")
    assert json.loads((tmp_path / "card" / CARD).read_text()) == card
    policy = published.campaign.policy
    one, most = (epsilon(replace(policy.mechanism, max_participations=n), delta=policy.delta) for n in (1, 2))
    expected = {  # by hand, by name of the function
        "exp": {2980.9579870417283},
        "accounting.epsilon": {one, most},
        "policy.sha256": {policy.sha256},
        "policy.size": {policy.size},
        "product": {policy.noise_multiplier * policy.clip_norm},
        "difference": {1},
        "signing.fingerprint": {fingerprint(published.key)},
    }
    found = {name: set() for name in expected}
    quoted = 0
    for path, cell in cells({key: value for key, value in card.items() if key != "schema"}):
        assert is_cell(cell), path
        if "source" in cell:
            assert cell["value"] == resolve(tmp_path / "card", cell["source"]), path
            quoted += 1
        elif cell["computed"] in found:
            found[cell["computed"]].add(cell["value"])
            for pointer in cell["from"]:
                resolve(tmp_path / "card", pointer)
    assert quoted > 60
    assert found == expected
    spent = card["spent"]
    assert (spent["rounds_used"]["value"], spent["rounds_left"]["value"]) == (1, 1)
    assert (
        0 < spent["epsilon_spent"]["value"] < spent["epsilon_at_most"]["value"] <= card["promise"]["epsilon"]["value"]
    )
    [told] = status(played)["campaigns"]
    assert (told["rounds_used"], told["policy"]) == (1, card["campaign"]["policy_sha256"]["value"])
    assert {path.name for path in (tmp_path / "card" / FOLDER).iterdir()} == set(card["sources"])
    assert (tmp_path / "card").stat().st_mode & 0o077 == 0
    assert check_card(tmp_path / "card") == card


def test_an_altered_number_word_source_or_page_is_seen(device, tmp_path):
    card = build_card(device)
    altered = 0
    for _, cell in cells({key: value for key, value in card.items() if key != "schema"}):
        if not isinstance(cell["value"], int | float) or isinstance(cell["value"], bool):
            continue
        before, cell["value"] = cell["value"], cell["value"] * 1.001 + 1e-9
        with pytest.raises(DataError, match="must be what its source says"):
            check_cells(card, device)
        cell["value"] = before
        altered += 1
    assert altered > 40
    check_cells(card, device)
    for mutant in (
        {"spent": {"rounds_left": 3}},  # no source
        {"spent": {"rounds_left": {"value": 1}}},
        {"spent": {"rounds_left": {"value": 1, "computed": "eval", "from": []}}},
        {"spent": {"rounds_left": {"value": 1, "source": "policy.json#/nothing"}}},
        {"spent": {"rounds_left": {"value": True, "source": "ledger.json#/rounds/spent"}}},
    ):
        with pytest.raises(DataError):
            check_cells(mutant, device)
    make_card(device, tmp_path / "card")
    for name, old, new in (
        (CARD, '"held"', '"fine"'),
        (CARD, "the private head", "the private hand"),
        (CARD, '"status": "promise"', '"status": "a vow"'),
        (PAGE, "What is not", "What else is"),
        (CARD, '"policy.json#/epsilon"', "8"),
        (CARD, '"computed": "exp"', '"computed": "total"'),
        (f"{FOLDER}/ledger.json", '"spent": 1', '"spent": 0'),
        (f"{FOLDER}/ledger.json", '"spent": 1', '"spent": "x"'),
        (f"{FOLDER}/made.json", '"place"', '"places"'),
        (f"{FOLDER}/policy.json", '"delta": 0.0001', '"delta": 0.00001'),
        (f"{FOLDER}/audit-1.json", "found nothing", "found much"),
    ):
        shutil.copytree(tmp_path / "card", tmp_path / "copy")
        text = (tmp_path / "copy" / name).read_text()
        assert old in text, (name, old)
        (tmp_path / "copy" / name).write_text(text.replace(old, new))
        with pytest.raises(SottovoceError):
            check_card(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")


def test_a_ledger_that_does_not_fit_its_campaign_or_itself_has_no_card(device):
    build_card(device)
    said = json.loads(device.files["ledger.json"])
    for change in (
        {"policy": "0" * 64},
        {"operator": "0000"},
        {"releases": []},
        {"rounds": said["rounds"] | {"spent": 0}},
        {"rounds": said["rounds"] | {"spent": 3, "released": 3}, "releases": said["releases"] * 3},  # two are the cap
        {"rounds": said["rounds"] | {"spent": -1, "released": -1}, "releases": []},
        {"consent": said["consent"] | {"max_participations": 9}},
    ):
        with pytest.raises(DataError, match="make the card again"):
            build_card(Sources(dict(device.files) | {"ledger.json": as_json(said | change)}))


def test_sources_that_do_not_belong_together_have_no_card_even_made_anew(device, cards, published, tmp_path):
    def altered(name, **changes):
        return Sources(dict(device.files) | {name: as_json(json.loads(device.files[name]) | changes)})

    scenario = json.loads(device.files["scenario.json"])
    scenario["training"]["learning_rate"] *= 2
    for sources, why in (
        (altered("audit-1.json", epsilon_claimed=99.0), "must claim what its policy claims"),
        (altered("audit-1.json", delta=0.5), "must claim what its policy claims"),
        (altered("audit-1.json", unit="user"), "must claim what its policy claims"),
        (altered("audit-1.json", trust="central"), "must claim what its policy claims"),
        (altered("scenario.json", training=scenario["training"]), "must hold the settings the policy names"),
        (altered("made.json", place="campaign"), "must name the place"),
        (Sources({k: v for k, v in device.files.items() if k != "ledger.json"}), "must name the place"),
    ):
        with pytest.raises(DataError, match=why):
            build_card(sources)
    make_card(device, tmp_path / "card")
    held = json.loads(device.files["audit-1.json"])
    held["levels"]["L1"] |= {"control_detected": False}
    (tmp_path / "card" / FOLDER / "audit-1.json").write_bytes(as_json(held))
    with pytest.raises(DataError, match="audit again"):
        check_card(tmp_path / "card")


def test_the_same_sources_give_the_same_card(device, played, cards, tmp_path):
    assert build_card(device) == build_card(Sources(dict(reversed(device.files.items()))))
    again = device_sources(played, created=cards.CREATED)
    assert again.files.items() <= device.files.items()
    assert render(build_card(device)) == render(json.loads(json.dumps(build_card(device))))


def test_an_audit_is_evidence_only_for_its_policy_and_code_and_with_its_control(device, cards, published, tmp_path):
    card = build_card(device)
    own, code, policy = card["audits"]
    assert [each["of"]["value"] for each in card["audits"]] == ["this campaign", "other code", "another policy"]
    assert code["levels"] == policy["levels"] == []
    assert [each["result"]["value"] for each in own["levels"]] == ["held", "held", "no result"]
    assert [each["power"]["value"] for each in own["levels"]] == [None, False, None]
    assert "epsilon_lower" not in own["levels"][2]
    assert "NO POWER at the epsilon claimed: L1." in card["audit_verdict"]
    assert "No result: L5." in card["audit_verdict"]
    page = render(card)
    assert "Of other code." in page
    assert "Of another policy." in page
    assert page.count("no power at the epsilon claimed") == 1
    assert "7.5" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)  # what L5 found without its control
    quiet = cards.level("canaries", epsilon_lower=0.25, power=False, words=("Said otherwise.",))
    failed = cards.level("one record more", passed=False)
    path = cards.audit(published.campaign.policy, tmp_path / "a.json", levels={"L0": failed, "L1": quiet})
    card = build_card(gather({n: device.files[n] for n in ("policy.json", "scenario.json", "policy.sig")},
                             place="campaign", audits=[path]))  # fmt: skip
    assert card["audit_verdict"].startswith("FAILED: an attack found more than it may (L0).")
    assert "NO POWER at the epsilon claimed: L1." in card["audit_verdict"]
    bare = build_card(gather({n: device.files[n] for n in ("policy.json", "scenario.json", "policy.sig")},
                             place="campaign", audits=[]))  # fmt: skip
    assert bare["audit_verdict"].startswith("Nobody attacked this campaign")
    path.write_text(path.read_text().replace('"passed": false', '"passed": true', 1))
    with pytest.raises(DataError, match="audit again"):
        gather({}, place="campaign", audits=[path])


def test_what_is_not_covered_stands_first_for_each_trust(device, hiding_users, cards):
    first = {"local": build_card(device)["not_covered"][:3]}
    for trust, made in hiding_users.items():
        card = build_card(folder_sources(made.campaign.folder, experiment=False, created=cards.CREATED))
        first[trust] = card["not_covered"][:3]
        assert ("trust_terms" in card["promise"]) is (trust == "distributed")
        assert card["status"] == "promise"
        assert len(card["questions"]) == 15
        assert "{" not in render(card).partition("<body>")[2].replace("{'", "")
    assert first["central"][0]["what"] == "the server"
    assert first["distributed"][0]["what"] == "a server that breaks the protocol"
    for gaps in first.values():
        assert any("taking part" in gap["what"] for gap in gaps)
        assert any(gap["what"] == "the private head" for gap in gaps)
    everything = json.dumps(build_card(device)["not_covered"])
    for word in ("how long it takes", "home made anew", "floating point", "public by assumption", "several devices",
                 "tried out on the campaign's own users", "outputs"):  # fmt: skip
        assert word in everything


def test_a_simulation_has_no_card_unless_it_is_marked(
    run_folder, cards, published, homes, tiny_world, tmp_path, capsys
):
    for folder in (run_folder, run_folder / "campaigns" / "tiny"):
        with pytest.raises(PrivacyError, match="--experiment"):
            folder_sources(folder, experiment=False)
    card = make_card(folder_sources(run_folder, experiment=True, created=cards.CREATED), tmp_path / "card")
    page = (tmp_path / "card" / PAGE).read_text()
    assert (card["status"], card["experiment"], card["place"]) == ("EXPERIMENT", True, "experiment")
    assert "<title>EXPERIMENT." in page
    assert 'class="band"' in page
    assert card["not_covered"][0]["what"].startswith("everything")
    assert "would promise" in card["claim"][0]
    assert "seeded" in card["promise"]["noise"]["value"]
    assert [stamp["value"] for stamp in card["stamps"]] == ["noise: seeded", "tuning: not covered"]
    assert card["utility"]["personal"] == {"value": 1.05, "source": "summary.json#/rows/personal/rmse/value"}
    assert card["campaign"]["name"]["value"] == published.campaign.policy.campaign
    plain = render(build_card(folder_sources(published.campaign.folder, experiment=False)))
    assert "EXPERIMENT" not in plain.partition("</head>")[2]
    unsigned = tmp_path / "unsigned"
    shutil.copytree(published.campaign.folder, unsigned)
    (unsigned / "policy.sig").unlink()
    with pytest.raises(PrivacyError, match="nobody signed"):
        build_card(folder_sources(unsigned, experiment=False))
    assert main(["card", str(run_folder), "--out", str(tmp_path / "out")]) == 2
    assert not (tmp_path / "out").exists()
    assert main(["card", str(run_folder), "--experiment", "--out", str(tmp_path / "out")]) == 0
    assert "EXPERIMENT: a promise to nobody" in capsys.readouterr().out
    assert main(["card", "--check", str(tmp_path / "out")]) == 0
    assert main(["card", str(run_folder), "--experiment", "--campaign", "other", "--out", str(tmp_path / "out")]) == 2
    other = homes.publish(tiny_world(tmp_path), tmp_path / "loose", overrides=("privacy.epsilon=20.0",)).campaign
    shutil.copytree(run_folder, tmp_path / "run")
    shutil.copytree(other.folder, tmp_path / "run" / "campaigns" / "loose")
    sources = folder_sources(tmp_path / "run", experiment=True, campaign="loose")
    foreign = build_card(sources)
    assert foreign["promise"]["epsilon"]["value"] == 20.0
    assert not foreign["utility"]  # the scores are of the other campaign
    assert foreign["stamps"] == []
    with pytest.raises(DataError, match="must be of the campaign beside it"):
        build_card(Sources(dict(sources.files) | {"summary.json": (run_folder / "summary.json").read_bytes()}))


def test_what_promises_nothing_has_no_card_but_one_that_says_so(tiny_world, homes, tmp_path, cards):
    none = homes.publish(tiny_world(tmp_path), tmp_path / "none", overrides=("privacy.trust=none",))
    with pytest.raises(PrivacyError, match="NOT PRIVATE"):
        folder_sources(none.campaign.folder, experiment=False)
    card = build_card(folder_sources(none.campaign.folder, experiment=True, created=cards.CREATED))
    assert card["status"] == "EXPERIMENT, NOT PRIVATE"
    assert "epsilon" not in card["promise"]
    assert card["questions"] == []
    assert "<title>EXPERIMENT, NOT PRIVATE." in render(card)


def test_a_ledger_or_campaign_that_is_not_whole_has_no_card(played, published, homes, tmp_path, capsys):
    shutil.copytree(played.folder, tmp_path / "home")
    home = open_home(tmp_path / "home", clock=homes.clock)
    kept = home.campaign_folder(published.campaign.policy.sha256)
    policy = kept / "policy.json"
    text = policy.read_text()
    less = json.loads(text) | {"noise_multiplier": published.campaign.policy.noise_multiplier / 2}
    policy.write_text(json.dumps(less, indent=2) + "\n")
    with pytest.raises(PrivacyError, match="do not take part"):
        device_sources(home)
    policy.write_text(text)
    sign_policy(kept, load_private(other_key(tmp_path)))
    with pytest.raises(CampaignError, match="the operator agreed to"):
        device_sources(home)
    shutil.rmtree(kept)
    with pytest.raises(CampaignError, match="client consent"):
        device_sources(home)
    (home.folder / "ledger.db").write_bytes(b"SQLite format 3\0" + bytes(4000))
    with pytest.raises(LedgerError, match="client recover"):
        device_sources(home)
    assert main(["client", "card", "--home", str(home.folder), "--out", str(tmp_path / "out")]) == 2
    assert "ledger" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    fresh = homes.make_home(tmp_path / "fresh")
    with pytest.raises(LedgerError, match="consented to"):
        device_sources(fresh)


def other_key(folder: Path) -> Path:
    from shared.protocol.signing import new_key

    new_key(folder / "other")
    return folder / "other"


def test_an_owners_card_has_no_text_and_no_path_of_the_owner(device, played, published):
    records = published.dataset.users[0].train
    everything = b"".join([*device.files.values(), render(build_card(device)).encode()]).decode()
    assert str(played.folder) not in everything
    assert str(Path.home()) not in everything
    assert not [record for record in records if record.text in everything]
    assert everything.count(json.loads(device.files["ledger.json"])["releases"][0]["sha256"]) >= 2


def test_the_state_of_a_consent_is_told(played, published, homes, cards, hiding_users, tmp_path):
    shutil.copytree(played.folder, tmp_path / "home")
    home = open_home(tmp_path / "home", clock=homes.clock)
    set_paused(home, True)
    spent = build_card(device_sources(home))["spent"]
    assert (spent["state"]["value"], spent["rounds_left"]["value"]) == ("paused", 1)
    withdraw(home, published.campaign.policy.sha256)
    spent = build_card(device_sources(home))["spent"]
    assert spent["state"]["value"] == "withdrawn"
    assert "rounds_left" not in spent
    central = hiding_users["central"]
    home = homes.make_home(tmp_path / "central", central)
    assert homes.ask(home, central.campaign)[0] is None
    page = render(build_card(device_sources(home, prefix=central.campaign.policy.sha256[:8], created=cards.CREATED)))
    assert "not kept: a hash would confirm a guess" in page


@pytest.fixture(scope="module")
def server(published, tmp_path_factory):
    """A server whose campaign has had two rounds."""
    server = create_server(tmp_path_factory.mktemp("card-server") / "server", address="127.0.0.1")
    folder = server.campaigns / "tiny"
    folder.mkdir()
    for name in set(CAMPAIGN_FILES) - {"policy.sig"}:
        shutil.copy(published.campaign.folder / name, folder / name)
    sign_policy(folder, load_private(server.operator_key))
    total = Counts(3, {"NORM": 1, "PAUSED": 2}, bytes_up=1000, bytes_down=2000)
    start = start_checkpoint(read_campaign(folder))
    at = replace(start, round_number=2, participations={0: 2, 1: 1}, latest=total, total=total)
    save_checkpoint(folder / "checkpoints", at)
    return server


def test_an_operators_card_counts_and_names_no_device(server, cards, tmp_path, capsys):
    campaign = read_campaign(server.campaigns / "tiny")
    card = build_card(server_sources(server, campaign, created=cards.CREATED))
    spent = {name: cell["value"] for name, cell in card["spent"].items()}
    assert (spent["rounds_done"], spent["replies"], spent["rejected"], spent["bytes_up"]) == (2, 3, 3, 1000)
    assert (spent["asked_devices"], spent["most_rounds"]) == (2, 2)
    assert spent["epsilon_median"] <= spent["epsilon_most"] <= card["promise"]["epsilon"]["value"]
    assert card["campaign"]["operator"]["value"] == fingerprint(signed_by(campaign.folder))
    assert "participations" not in json.dumps(sorted(card["sources"])) + json.dumps(spent)
    assert main(["server", "card", "--server", str(server.folder), "--out", str(tmp_path / "card")]) == 0
    assert check_card(tmp_path / "card")["place"] == "server"
    capsys.readouterr()
    state = checkpoint_path(campaign.folder / "checkpoints", 2) / "state.json"
    before = state.read_text()
    state.write_text(before.replace('"round": 2', '"round": 1'))
    with pytest.raises(CampaignError, match="altered"):
        server_sources(server, campaign)
    state.write_text(before)


def test_a_folder_that_holds_anything_else_is_not_replaced(device, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="--out"):
        make_card(device, tmp_path / "own")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    with pytest.raises(DataError, match="--out"):
        make_card(device, tmp_path / "link")
    make_card(device, tmp_path / "card")
    make_card(device, tmp_path / "card")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card", "link", "own"]


def test_a_price_is_never_shown_below_what_it_is():
    for value in (7.9931, 1e-7, 0.29819, 2980.958, 12345.6, 5.0, 0.0):
        text = shown({"value": value, "computed": "accounting.epsilon", "from": []})
        assert value <= float(text.replace(",", "")) <= value * 1.001
