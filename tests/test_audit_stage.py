"""Where an audit plays: real app, real server, the bytes between them; and what it writes."""

import json
import logging

import numpy as np
import pytest
from pydantic import ValidationError

import sottovoce.cli
from client.training.site import open_workbench
from shared.config import load_scenario
from shared.errors import CampaignError, DataError, PrivacyError
from shared.heads.adapter import read_shared
from shared.protocol.audits import Audit, LevelResult, conclude, hash_code, read_audit
from simulations.audit import stage
from simulations.audit.words import lines
from simulations.report.audit import section


@pytest.fixture(scope="module")
def subject(tiny_world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("audited")
    return stage.open_subject(tiny_world(folder), folder=folder, seed=5, quiet=True)


def part_of(subject, campaign, *, seat=0, **more):
    bench = open_workbench(campaign)
    records = subject.dataset.users[seat].fit
    return stage.Part(bench, bench.head.prepare(subject.texts.of(records)), subject.texts.targets(records), **more)


def small(subject, name, *, clients, **privacy):
    scenario = subject.scenario.model_copy(
        update={
            "name": name,
            "federation": subject.scenario.federation.model_copy(update={"rounds": 2, "cohort_size": "all"}),
            "privacy": subject.scenario.privacy.model_copy(update={"max_participations": 2, **privacy}),
        }
    )
    policy = subject.campaign.policy
    return stage.make_campaign(
        scenario,
        folder=subject.folder / "campaigns",
        slots=policy.array_slots(),
        start=subject.campaign.start,
        clients=clients,
        head_blocks=policy.head_blocks,
        base=subject.base,
        public_texts=subject.dataset.public_texts,
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("federation.method=rolora",), "whose rounds take turns"),
        (("federation.method=fedavg", "personal.method=fedper"), "keeps tensors between rounds"),
        (("federation.method=ifca", "persona.count=2"), "persona.choice = 'loss'"),
    ],
)
def test_what_cannot_be_played_with_and_without_a_record_is_refused(tiny_world, tmp_path, settings, says):
    with pytest.raises(PrivacyError, match=says):
        stage.open_subject(tiny_world(tmp_path), overrides=settings, folder=tmp_path, seed=0, quiet=True)


def test_a_play_shows_the_bytes_of_every_request_and_reply(subject):
    campaign = small(subject, "shown", clients=2)
    parts = [part_of(subject, campaign, seat=seat) for seat in (0, 1)]
    played = stage.play(campaign, parts)
    assert sorted(played.replies) == [(1, 0), (1, 1), (2, 0), (2, 1)] == sorted(played.requests)
    assert len(played.arrays) == 3
    for (round_number, seat), payload in played.replies.items():
        update = played.update(round_number, seat)
        assert all(array.tobytes() in payload for array in update.values())
        assert all(played.arrays[round_number - 1][n].tobytes() in played.requests[round_number, seat] for n in update)


def test_two_plays_draw_other_noise_unless_they_are_given_it(subject, steps):
    campaign = small(subject, "noise", clients=1)
    part = part_of(subject, campaign)
    free = [stage.play(campaign, [part]).update(1, 0) for _ in range(2)]
    assert not any(np.array_equal(free[0][name], free[1][name]) for name in free[0])
    fixed = part_of(subject, campaign, randomness=lambda _: steps.Replay(7))
    same = [stage.play(campaign, [fixed]).update(1, 0) for _ in range(2)]
    assert all(np.array_equal(same[0][name], same[1][name]) for name in same[0])


def test_a_play_begins_where_it_is_told(subject):
    campaign = small(subject, "begins", clients=1)
    start = {name: array + 0.25 for name, array in read_shared(open_workbench(campaign).head).items()}
    played = stage.play(campaign, [part_of(subject, campaign)], start=start)
    assert all(np.array_equal(played.arrays[0][name], start[name]) for name in start)
    assert all(start[name].tobytes() in played.requests[1, 0] for name in start)


def test_a_device_may_be_silent_and_may_not_fail(subject, monkeypatch):
    campaign = small(subject, "silent", clients=2)
    played = stage.play(campaign, [part_of(subject, campaign), part_of(subject, campaign, seat=1, silent=True)])
    with pytest.raises(CampaignError, match="must send arrays"):
        played.update(1, 1)
    monkeypatch.setattr("client.app.train_shared", lambda *_, **__: 1 / 0)
    with pytest.raises(CampaignError, match="INTERNAL"):
        stage.play(campaign, [part_of(subject, campaign), part_of(subject, campaign)])


def test_a_play_hears_every_logger_and_leaves_them_as_they_were(subject, monkeypatch):
    campaign = small(subject, "heard", clients=1)
    before = logging.getLogger().level, list(logging.getLogger().handlers)
    from client.training.train import train_shared

    def tells(*positional, **named):
        logging.getLogger("anything").debug("trained on %d", 12345)
        return train_shared(*positional, **named)

    monkeypatch.setattr("client.app.train_shared", tells)
    played = stage.play(campaign, [part_of(subject, campaign)])
    assert stage.Line("anything", logging.DEBUG, "trained on 12345") in played.log
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == before


def test_what_cannot_be_audited_is_said(tiny_world, tmp_path):
    path = tiny_world(tmp_path)
    options = {"folder": tmp_path / "f", "seed": 0, "quiet": True}
    with pytest.raises(PrivacyError, match="promise to attack"):
        stage.open_subject(path, overrides=("privacy.trust=none",), **options)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="folder of a run or of a campaign"):
        stage.open_subject(tmp_path / "empty", **options)


def test_a_published_campaign_is_audited_as_it_is(subject, tmp_path):
    found = stage.open_subject(subject.campaign.folder, folder=tmp_path, seed=0, quiet=True)
    assert found.campaign.policy == subject.campaign.policy
    with pytest.raises(DataError, match="settings of what was published are fixed"):
        stage.open_subject(subject.campaign.folder, overrides=("seed=1",), folder=tmp_path, seed=0, quiet=True)


def level(**changes):
    return LevelResult(
        **{
            "title": "t",
            "passed": True,
            "epsilon_lower": 0.5,
            "control_detected": True,
            "mutants_caught": ("no-noise",),
            "mutants_missed": (),
            "seconds": 1.0,
            "facts": {"m": 1000},
            "words": ("nothing was found.",),
        }
        | changes
    )


def audit(**changes):
    return Audit(
        **{
            "scenario": "s",
            "policy_sha256": "p",
            "settings_sha256": "q",
            "unit": "record",
            "trust": "local",
            "epsilon_claimed": 8.0,
            "delta": 1e-5,
            "level": "quick",
            "passed": True,
            "seed": 0,
            "after_round": 0,
            "created": "now",
            "seconds": 3.0,
            "versions": {},
            "commit": None,
            "code_sha256": hash_code(),
            "levels": {"L1": level()},
            "power": {},
        }
        | changes
    )


@pytest.mark.parametrize("lacking", [{"control_detected": False}, {"mutants_missed": ("no-noise",)}])
def test_nothing_is_a_result_without_its_control(lacking):
    level(passed=None, epsilon_lower=None, **lacking)
    with pytest.raises(ValidationError, match="epsilon_lower must be null"):
        level(passed=None, **lacking)
    for claimed in (True, False):
        with pytest.raises(ValidationError, match="must be null"):
            level(passed=claimed, **lacking)


def test_an_audit_is_read_as_it_was_written_and_says_no_more_than_its_levels(tmp_path):
    path = tmp_path / "audit.json"
    path.write_text(audit().to_json())
    assert read_audit(path) == audit()
    assert json.loads(path.read_text())["levels"]["L1"]["passed"] is True
    for wrong in (
        {"passed": False},
        {"levels": {"L1": level(passed=None, epsilon_lower=None, control_detected=False)}},
        {"levels": {}},
        {"epsilon_claimed": float("nan")},
    ):
        with pytest.raises(ValidationError):
            audit(**wrong)
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2'))
    with pytest.raises(DataError, match="audit again"):
        read_audit(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_audit(tmp_path / "none.json")


def test_the_words_show_no_result_as_none():
    assert "result: every level passed" in lines(audit())
    missed = level(passed=None, epsilon_lower=None, mutants_missed=("no-noise",))
    text = "\n".join(lines(audit(passed=False, levels={"L1": missed})))
    assert all(said in text for said in ("NO RESULT", "faults MISSED: no-noise", "NOT PASSED: L1 NO RESULT"))
    assert "FAILED" in "\n".join(lines(audit(passed=False, levels={"L1": level(passed=False)})))


def test_wrong_input_to_the_command_is_said_in_one_line(tmp_path, capsys):
    for arguments, said in (
        (["audit", str(tmp_path / "none.toml")], "it is not there"),
        (["audit", str(tmp_path)], "folder of a run or of a campaign"),
        (["audit", str(tmp_path), "--out", str(tmp_path)], "--out must name a file"),
    ):
        assert sottovoce.cli.main(arguments) == 2
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        sottovoce.cli.main(["audit", "x", "--seed", "-1"])


def test_the_code_is_known_by_its_hash():
    assert len(hash_code()) == 64


def test_an_unprotected_twin_has_no_promise(subject):
    twin = stage.unprotected(subject.scenario)
    assert twin.privacy.trust == "none"
    assert twin.model_copy(update={"privacy": subject.scenario.privacy}) == subject.scenario
    assert load_scenario(subject.campaign.folder / "scenario.json").privacy.trust == "local"


def concluded(**changes):
    found = {
        "title": "t", "held": True, "control_detected": True, "caught": {"no-noise": True, "no-clip": True},
        "started": 0.0, "facts": {"seen": 0.72}, "words": ("Epsilon is at least 0.72.",), "epsilon_lower": 0.72,
        "epsilon_audited": 2.0,
    }  # fmt: skip
    return conclude(**(found | changes))


def test_a_level_says_nothing_of_what_it_found_without_its_control_or_a_mutant():
    assert concluded().passed is True
    assert concluded(held=False, epsilon_lower=2.5).passed is False
    assert concluded(caught={"no-noise": True, "no-clip": False}, required=("no-noise",)).passed is True
    for lacking, why in (
        ({"control_detected": False}, "the same attack without privacy was not detected"),
        ({"caught": {"no-noise": True, "no-clip": False}}, "missed: no-clip"),
    ):
        found = concluded(**lacking)
        assert (found.passed, found.epsilon_lower) == (None, None)
        whole = audit(passed=False, levels={"L1": found})
        shown = "\n".join([*lines(whole), *section(whole, policies=("p",))])
        assert why in shown
        assert "0.72" not in shown


def test_a_level_that_found_more_than_was_attacked_cannot_have_passed():
    level(passed=False, epsilon_lower=2.5, epsilon_audited=2.0)
    with pytest.raises(ValidationError, match="passed must be false"):
        level(epsilon_lower=2.5, epsilon_audited=2.0)


def test_no_surface_says_passed_without_saying_that_it_is_no_proof():
    assert "proves no epsilon" in lines(audit())[-1]
    assert any("proves no ε" in part for part in section(audit(), policies=("p",)))
    assert "L0 at the public start" in lines(audit())[0]
    assert "L0 at the arrays of round 7" in lines(audit(after_round=7))[0]


def test_what_an_audit_found_is_shown_before_it_is_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr("simulations.audit.run.run_audit", lambda *_, **__: audit())
    assert sottovoce.cli.main(["audit", str(tmp_path), "--out", "/proc/audit.json"]) == 2
    said = capsys.readouterr()
    assert "result: every level passed" in said.out
    assert "could not be read or written" in said.err
    assert read_audit(tmp_path / "audit.json") == audit()  # an unfinished run keeps its audit; it has no report yet
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
