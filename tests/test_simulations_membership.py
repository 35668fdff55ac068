"""The membership attack: who counts as a member, what a leak and no leak look like, and what the report makes of it."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import client.training.site
from client.training.site import resident_dataset
from shared.config import Scenario, load_scenario
from shared.datasets import Dataset, Record, UserData, hold_out
from shared.errors import DataError, ScenarioError
from shared.privacy.policy import hash_settings
from simulations.dry_run import describe, lines
from simulations.membership import _promise_for_records, _promise_for_users, separation
from simulations.observe.observe import RatingObserver
from simulations.report import membership as membership_page
from simulations.report.parts import AttackOn
from simulations.report.report import headline, write_report
from simulations.report.results import check_summary
from simulations.run import simulate

LEAN = ("linear.enabled=false", "statistics.enabled=false", "export.users=0", "evaluation.every_rounds=3")
ATTACKED = (*LEAN, "attack.membership=true", "attack.held_out_share=0.4")
SET_ASIDE = ("data.users=campaign", "data.tuning_share=0.4", "federation.cohort_size=2")
TERMS = {"seed": 1, "resamples": 100}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def run_and_see(scenario, out):
    """A finished run, and what its devices trained on: campaign's trust -> user -> records."""
    trained = {}
    real = client.training.site.Site.shared_records

    def spy(site, device):
        features, targets = real(site, device)
        records = site.dataset.users[device].fit
        assert len(features) == len(targets) == len(records)
        trained.setdefault(site.campaign.policy.trust, {})[site.dataset.users[device].user] = records
        return features, targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.training.site.Site, "shared_records", spy)
        return simulate(scenario, out=out, quiet=True), trained


def plant_a_leak(monkeypatch, trained):
    """Trained arrays fit what devices were given perfectly, whatever the attack believes; the start fits nothing."""
    members = {(user, record) for user, records in trained.items() for record in records}

    def remember(observer, arrays, records):
        owners = [user.user for user in observer._dataset.users for _ in user.fit]
        seen = np.array([(user, record) in members for user, record in zip(owners, records, strict=True)])
        untrained = not any(array.any() for name, array in arrays.items() if "lora_A" not in name)
        return np.arange(len(records)) % 7.0 if untrained else 9.0 - 9.0 * seen

    monkeypatch.setattr(RatingObserver, "losses", remember)
    monkeypatch.setattr(RatingObserver, "reference_losses", lambda _, records, **__: np.full(len(records), 9.0))


@pytest.fixture(scope="module")
def run(tiny_world, tmp_path_factory):
    """Scenario, folder, summary and what devices trained on."""
    folder = tmp_path_factory.mktemp("attacked")
    scenario = load_scenario(tiny_world(folder), ATTACKED)
    return scenario, folder / "out", *run_and_see(scenario, folder / "out")


def test_auc_and_tpr_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    scores, user = rng.integers(0, 30, 500).astype(float), rng.integers(0, 20, 500)  # many are equal
    inside = rng.random(500) < 0.6
    scores[inside] += rng.integers(0, 9, inside.sum())
    found = separation(scores, inside, user, **TERMS)
    pairs = np.sign(scores[inside][:, None] - scores[~inside])
    assert found["auc"].value == pytest.approx((pairs + 1).mean() / 2)
    thresholds = [t for t in np.unique(scores) if (scores[~inside] >= t).mean() <= 0.01]
    assert found["tpr"].value == pytest.approx(max((scores[inside] >= t).mean() for t in thresholds))
    assert found["tpr"].low <= found["tpr"].value <= found["tpr"].high


def test_a_leak_is_found_and_chance_is_not():
    rng = np.random.default_rng(1)
    user, inside = np.repeat(np.arange(40), 20), rng.random(800) < 0.8
    leak = separation(inside + 0.0, inside, user, **TERMS)
    assert (leak["auc"].value, leak["auc"].low, leak["tpr"].low) == (1, 1, 1)
    reversed_ = separation(0.0 - inside, inside, user, **TERMS)
    assert (reversed_["auc"].high, reversed_["tpr"].high) == (0, 0)
    held = [separation(rng.normal(size=800), inside, user, **TERMS)["auc"] for _ in range(40)]
    assert sum(each.low <= 0.5 <= each.high for each in held) >= 33  # 38 expected


def test_records_of_a_user_hang_together():
    """A hard user with few held out is one piece of news, not twenty: a bootstrap over records would call it a leak."""
    rng = np.random.default_rng(2)
    user, missed = np.repeat(np.arange(30), 10), {"users": 0, "records": 0}
    for _ in range(25):
        inside = rng.random(300) < rng.beta(1, 1, 30)[user]
        scores = rng.normal(size=30)[user] + 0.1 * rng.normal(size=300)
        for kind, unit in (("users", user), ("records", np.arange(300))):
            found = separation(scores, inside, unit, **TERMS)["auc"]
            missed[kind] += not found.low <= 0.5 <= found.high
    assert missed["users"] <= 5
    assert missed["records"] >= 8


def test_what_cannot_be_attacked_is_refused():
    user = np.zeros(4, dtype=np.int64)
    for inside in (np.ones(4, dtype=bool), np.zeros(4, dtype=bool)):
        with pytest.raises(DataError, match=r"needs records on both sides.*attack\.held_out_share"):
            separation(np.ones(4), inside, user, **TERMS)
    with pytest.raises(DataError, match="NaN"):
        separation(np.array([1, np.nan]), np.array([True, False]), user[:2], **TERMS)
    few = separation(np.arange(4.0), np.array([True, False, True, False]), user, **TERMS)
    assert few["tpr"] is None  # one of two cannot be 1 %


def test_records_are_held_out_by_their_content_alone():
    def record(n, time=0):
        return Record(text=f"text {n % 150}", target=1.0, item=str(n), timestamp=time)

    users = tuple(UserData(name, tuple(map(record, range(200))), (record(3),), (record(4),)) for name in "ab")
    data = Dataset("format", users, ("text 0",))
    kept, held = hold_out(data, 0.3)
    for before, stays, goes in zip(data.users, kept.users, held.users, strict=True):
        assert sorted(stays.fit + goes.fit, key=lambda r: int(r.item)) == list(before.fit)
        assert 30 < len(goes.fit) < 90
        assert (stays.validation, stays.test, goes.train, goes.test) == (
            before.validation, before.test, goes.fit, (),
        )  # fmt: skip
        assert not {r.text for r in stays.fit} & {r.text for r in goes.fit}  # equal ones on one side
    assert {r.text for r in held.users[0].fit} != {r.text for r in held.users[1].fit}
    later = replace(data, users=tuple(replace(u, fit=tuple(record(n, 9) for n in reversed(range(200)))) for u in users))
    assert {r.item for r in hold_out(later, 0.3)[1].users[0].fit} == {r.item for r in held.users[0].fit}
    more = hold_out(data, 0.6)[1].users[0].fit
    assert {r.item for r in held.users[0].fit} < {r.item for r in more}
    assert hold_out(data, 0.0)[0] == data


def test_settings_are_checked_and_no_device_sees_them():
    for value in ("0", "1", "nan", "-0.1"):
        with pytest.raises(ScenarioError, match=r"attack\.held_out_share"):
            load_scenario_of(f"attack.held_out_share={value}")
    with pytest.raises(ScenarioError, match=r"attack\.membership"):
        load_scenario_of("attack.membership=1")
    assert hash_settings(load_scenario_of("attack.membership=true")) == hash_settings(load_scenario_of())
    assert Scenario(name="x").attack.held_out == 0


def load_scenario_of(*changes):
    from pathlib import Path

    return load_scenario(Path(__file__).parent.parent / "simulations" / "scenarios" / "movielens.toml", changes)


def test_nobody_trains_on_what_was_held_out(run):
    scenario, _, summary, trained = run
    kept, held = hold_out(resident_dataset(scenario.data), 0.4)
    wanted = {user.user: user.fit for user in kept.users}
    assert trained == {"local": wanted, "none": wanted}
    found = summary["membership"]["records"]
    assert found["members"] == sum(map(len, wanted.values())) == summary["data"]["fit"]
    assert found["non_members"] == sum(len(user.fit) for user in held.users) > 20
    assert found["users"] == 12
    assert any("40 % of every user's fit records held out" in stamp for stamp in summary["stamps"])


def test_the_comparison_is_the_same_campaign_without_privacy(run):
    _, out, summary, _ = run
    ours, theirs = (read_json(out / "campaigns" / name / "policy.json") for name in ("lora", "unprotected"))
    differ = {key for key in ours if ours[key] != theirs[key]}
    assert differ == {
        "campaign", "trust", "epsilon", "delta", "clip_norm", "noise_multiplier", "grid", "max_update_norm",
        "settings_sha256",
    }  # fmt: skip
    assert theirs["trust"] == "none"
    lines_ = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["campaign"] for line in lines_] == ["lora"] * 2 + ["unprotected"] * 2
    assert lines_[0]["validation"] == lines_[2]["validation"]  # one start
    assert not any("unprotected" in row for row in summary["rows"])
    assert summary["privacy"]["trust"] == "local"


def test_a_model_that_remembers_what_devices_trained_on_is_found(run, tmp_path, monkeypatch):
    scenario, _, summary, trained = run
    plant_a_leak(monkeypatch, trained["local"])
    again = simulate(scenario, out=tmp_path / "out", quiet=True)["membership"]["records"]["attacked"]
    for target in ("private", "unprotected"):
        assert [again[target][attack]["auc"]["value"] for attack in ("loss", "reference")] == [1, 1]
    null = again["untrained"]["loss"]["auc"]
    assert null["low"] <= 0.5 <= null["high"]
    assert summary["membership"]["records"]["attacked"]["private"]["loss"]["auc"]["value"] < 0.8


def test_users_are_told_from_those_whom_the_scenario_sets_aside(tiny_world, tmp_path, monkeypatch):
    changes = (*ATTACKED, *SET_ASIDE, "privacy.unit=user", "privacy.trust=central")
    scenario = load_scenario(tiny_world(tmp_path), changes)
    real, trained = run_and_see(scenario, tmp_path / "out")
    plant_a_leak(monkeypatch, trained["central"])
    leaky = simulate(scenario, out=tmp_path / "leaky", quiet=True)["membership"]["users"]["attacked"]
    assert [leaky["private"][attack]["auc"]["value"] for attack in ("loss", "reference")] == [1, 1]
    assert leaky["private"]["loss"]["auc"]["low"] < 1  # of so few
    assert 0.1 < leaky["untrained"]["loss"]["auc"]["value"] < 0.9
    found = real["membership"]
    assert found["users"]["members"] == found["records"]["users"] == len(trained["central"]) == 6  # who took part
    assert real["data"]["users"] + found["users"]["non_members"] == 12
    assert (found["users"]["epsilon"], found["records"]["epsilon"]) == (8.0, 16.0)
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert 'id="membership-users"' in text
    assert "users taken as independent" in text


def test_numbers_of_the_summary_stand_on_the_page_and_in_the_terminal(run):
    _, out, summary, _ = run
    text = re.sub("<[^>]+>", "", (out / "report.html").read_text(encoding="utf-8").split("Membership attack</h2>")[1])
    attacked = summary["membership"]["records"]["attacked"]
    assert list(attacked) == ["private", "unprotected", "untrained"]
    assert {tuple(attacks) for attacks in attacked.values()} == {("loss", "reference")}
    for attacks in attacked.values():
        for score in attacks.values():
            assert "{value:.3f}{low:.3f} – {high:.3f}".format(**score["auc"]) in text
            assert 0 <= score["auc"]["low"] <= score["auc"]["value"] <= score["auc"]["high"] <= 1
    null = attacked["untrained"]["loss"]["auc"]
    assert (not null["low"] <= 0.5 <= null["high"]) == ("the attack by loss on records already has" in text)
    assert f"{summary['membership']['records']['non_members']:,} others" in text
    assert "which is above 100 %: no limit." in text
    assert headline(summary)[-1].startswith("AUC of records")


def test_a_run_without_privacy_is_its_own_control(tiny_world, tmp_path):
    path = tiny_world(tmp_path)
    several = (*ATTACKED, *SET_ASIDE, "privacy.trust=none", "evaluation.seeds=2")
    summary = simulate(load_scenario(path, several), out=tmp_path / "out", quiet=True)
    found = summary["membership"]
    assert sorted(each.name for each in (tmp_path / "out" / "campaigns").iterdir()) == ["lora-seed-3", "lora-seed-4"]
    for who in ("records", "users"):
        assert set(found[who]["attacked"]) == {"unprotected", "untrained"}
        assert found[who]["tpr_limit"] is None
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "no evidence that the run protects anybody" in text or "This run has no privacy" in text


def test_a_run_cut_in_the_comparison_ends_as_the_whole_one(run, tmp_path, monkeypatch):
    scenario, _, whole, _ = run

    class PowerCut(BaseException):
        pass

    real, saved = __import__("server.app", fromlist=["save_checkpoint"]).save_checkpoint, []

    def cut(*arguments, **named):
        saved.append(1)
        if len(saved) == 5:  # three rounds of the campaign, the second of the other
            raise PowerCut
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr("server.app.save_checkpoint", cut)
        patch.setattr("simulations.folder.shutil", SimpleNamespace(rmtree=lambda *_, **__: None))
        with pytest.raises(PowerCut):
            simulate(scenario, out=tmp_path / "out", quiet=True)
    summary = simulate(scenario, out=tmp_path / "out", quiet=True, resume=True)
    assert [(each["campaign"], each["round"]) for each in summary["resumed"]] == [("lora", 3), ("unprotected", 1)]
    assert summary["membership"] == whole["membership"]
    attack = scenario.attack.model_copy(update={"held_out_share": 0.5})
    other = scenario.model_copy(update={"attack": attack})
    with pytest.raises(ScenarioError, match=r"attack\.held_out_share = 0\.4, here 0\.5"):
        simulate(other, out=tmp_path / "out", quiet=True, resume=True)


def test_a_dry_run_tells_of_the_second_campaign(tiny_world, tmp_path):
    path = tiny_world(tmp_path)
    plain, attacked = (describe(load_scenario(path, changes), quiet=True) for changes in (LEAN, ATTACKED))
    assert list(plain["campaigns"]) == ["lora"]
    assert list(attacked["campaigns"]) == ["lora", "unprotected"]
    assert attacked["campaigns"]["unprotected"]["epsilon"] is None
    assert any(line.startswith("campaign unprotected: 3 rounds") for line in lines(attacked))
    assert "NOT PRIVATE" in attacked["campaigns"]["unprotected"]["claim"]


def test_a_language_model_is_attacked_by_the_likelihood_of_responses(tiny, tiny_llama, tmp_path):
    data = tiny.tiny_dialogues(tmp_path / "data")
    path = tiny.tiny_generation(tmp_path, base=tiny_llama, data=data)
    changes = ("attack.membership=true", "attack.held_out_share=0.4", "export.users=0", "privacy.trust=none")
    summary = simulate(load_scenario(path, changes), out=tmp_path / "out", quiet=True)
    attacked = summary["membership"]["records"]["attacked"]
    assert {target: list(attacks) for target, attacks in attacked.items()} == {
        "unprotected": ["loss", "reference"],
        "untrained": ["loss"],  # its reference is the start itself
    }
    assert "of the base as published" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_what_is_promised_of_a_record_and_of_a_user():
    assert _promise_for_records("record", 1.0, 1e-5)["tpr_limit"] == pytest.approx(0.01 * np.e + 1e-5)
    assert _promise_for_users("user", 1.0, 1e-5)["tpr_limit"] == pytest.approx(0.01 * np.e + 1e-5)
    twice = _promise_for_records("user", 1.0, 1e-5)
    assert (twice["epsilon"], twice["delta"]) == (2.0, pytest.approx(1e-5 * (1 + np.e)))
    assert _promise_for_records("record", 1e6, 1e-5)["tpr_limit"] == 1
    assert _promise_for_users("record", 1.0, 1e-5)["tpr_limit"] is None
    assert _promise_for_records("record", None, None)["epsilon"] is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "no better than a coin would (AUC loss 0.500 [0.490, 0.510]). That speaks of these attacks; ε speaks"),
        ({"control": 0.505}, "No power over records: even without privacy"),
        ({"control": 0.505}, "is therefore no evidence of privacy"),
        ({"private": 0.5, "control": 0.515}, "The intervals overlap: the attack is too weak"),
        ({"private": 0.55}, "in spite of the noise: AUC loss 0.550 [0.540, 0.560]; without privacy AUC loss 0.600"),
        ({"null": 0.52}, "BIASED"),
        ({"null": 0.52}, "bias +0.020"),
        ({"null": 0.52, "control": 0.535}, "No power over records"),  # not above its bias
        ({"null": 0.48, "control": 0.495}, "No power over records"),
        ({"tpr": 0.04}, "PROMISE BROKEN"),
        ({}, "has a TPR above e^ε × 1 % + δ = 2.72 %"),
        ({"limit": 1.0}, "above 100 %: no limit"),
        ({"private": None}, "This run has no privacy, and the attack finds records: AUC loss 0.600"),
        ({"private": None, "control": 0.5}, "no evidence that the run protects anybody"),
    ],
)
def test_the_report_says_what_the_numbers_prove(tmp_path, invented, changes, said):
    folder = invented.invented_run(tmp_path)
    summary = read_json(invented.add_membership(folder, **changes) / "summary.json")
    text = " ".join(re.sub("<[^>]+>", "", write_report(folder).read_text(encoding="utf-8")).split())
    assert said in text
    if not changes:
        for other in ("BIASED", "BROKEN", "No power", "spite"):
            assert other not in text
        assert "900 members and 100 others, of 30 users in all. 95 % intervals: bootstrap over users." in text
        line = membership_page.headline(check_summary(summary).membership)
        assert "0.500 [0.490, 0.510]" in line
        assert "without privacy 0.600 [0.590, 0.610]" in line
        assert "NO POWER" not in line


def test_an_attack_without_its_control_is_not_shown(invented):
    whole = invented.attack()
    for missing in ("unprotected", "untrained"):
        attacked = {name: each for name, each in whole["attacked"].items() if name != missing}
        with pytest.raises(ValueError, match="without privacy, and on the untrained start"):
            AttackOn.model_validate(whole | {"attacked": attacked})
