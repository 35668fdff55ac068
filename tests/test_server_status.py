"""``server status`` and ``server rollback``: what the operator is told, and that nothing is touched by looking."""

import argparse
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from server.aggregate import OptimizerState
from server.app import start_checkpoint
from server.checkpoint import Counts, last_checkpoint, save_checkpoint
from server.folder import create_server
from server.judge import Judge
from server.lock import alone, is_served
from server.rounds import Score, note_begun
from server.status import lines, status
from shared.errors import CampaignError, ServerError, SottovoceError
from shared.protocol.campaign import read_campaign
from shared.protocol.signing import load_private, sign_policy
from sottovoce.server_cli import add_parser
from sottovoce.server_run import _judge, round_line

CURVE = (1.0, 0.9, 0.95, 0.94)
LIVE = {
    "pid": 4711,
    "since": "2030-05-01T12:00:00+00:00",
    "time": "2030-05-01T12:10:00+00:00",
    "campaign": "tiny, seed 3",
    "round": 4,
    "cohort": 2,
    "devices": [{"name": "kitchen", "seat": 0, "online": True}, {"name": "hall", "seat": 1, "online": False}],
    "front": {"requests": 1234, "refused": 5, "bytes_in": 6789, "bytes_out": 10},
    "problem": None,
}


class Curve:
    """An examiner whose scores are given."""

    def __init__(self, *values):
        self._values = list(values)

    def knows(self, score):
        return score is not None

    def score(self, arrays):
        return Score(metric="rmse", value=self._values.pop(0), records=9, holdout="a")


@pytest.fixture(scope="module")
def made(published, tmp_path_factory):
    """A server with the tiny campaign, signed, before its first round; read only."""
    server = create_server(tmp_path_factory.mktemp("status") / "server", address="127.0.0.1")
    names = ("scenario.json", "policy.json", "start.safetensors")
    (server.campaigns / "tiny").mkdir()
    for name in names:
        shutil.copy(published.campaign.folder / name, server.campaigns / "tiny" / name)
    sign_policy(server.campaigns / "tiny", load_private(server.operator_key))
    return server


@pytest.fixture
def server(made, tmp_path):
    shutil.copytree(made.folder, tmp_path / "server")
    return replace(made, folder=tmp_path / "server")


@pytest.fixture
def campaign(server):
    """After three rounds of which the last two were bad."""
    campaign = read_campaign(server.campaigns / "tiny")
    judge = Judge(campaign, Curve(*CURVE), stop=False)
    judge.begin()
    start = start_checkpoint(campaign)
    total = Counts()
    for number in range(1, len(CURVE)):
        latest = Counts(2, {"NORM": 1} if number == 2 else {"PAUSED": 2}, bytes_up=1000, bytes_down=2000)
        total = total + latest
        arrays = {name: np.full_like(array, number) for name, array in start.arrays.items()}
        checkpoint = replace(
            start,
            round_number=number,
            arrays=arrays,
            optimizer=OptimizerState({"output.weight": number}),
            participations={0: min(number, 2), 1: 1},
            latest=latest,
            total=total,
        )
        save_checkpoint(campaign.folder / "checkpoints", checkpoint)
        judge.on_round(checkpoint)
    return campaign


def tree(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def command(*arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    options = parser.parse_args(["server", *arguments])
    return options.handler(options)


def test_rounds_replies_rejects_bytes_scores_and_cost_are_told(server, campaign):
    before = tree(server.folder)
    (server.folder / "campaigns" / "tiny" / "checkpoints" / ".round-0004.1").mkdir()  # a running server writes here
    found = status(server)
    [told] = found["campaigns"]
    assert (told["round"], told["rounds"], told["replies"]) == (3, 3, 6)
    assert told["rejected"] == {"PAUSED": 4, "NORM": 1}
    assert (told["bytes_up"], told["bytes_down"]) == (3000, 6000)
    assert told["holdout"] | {"curve": None, "why": None} == {
        "metric": "rmse", "records": 9, "start": 1.0, "best": 0.9, "best_round": 1, "last": 0.94, "last_round": 3,
        "go": False, "why": None, "curve": None,
    }  # fmt: skip
    assert told["holdout"]["curve"] == list(enumerate(CURVE))
    assert told["cost"]["most_rounds"] == 2
    assert [line["round"] for line in told["history"]] == [0, 1, 2, 3]
    said = "\n".join(lines(found))
    assert "round 3 of 3" in said
    assert "replies: 6 used, 5 not (PAUSED 4, NORM 1)" in said
    assert "bytes: 3,000 up, 6,000 down" in said
    assert "start 1, best 0.9 (round 1), now 0.94" in said
    assert "NO-GO: rmse 0.94 is more than 2.0% worse" in said
    assert "released by the most-asked device: at most epsilon" in said
    assert json.loads(json.dumps(found, allow_nan=False))["campaigns"]
    (server.folder / "campaigns" / "tiny" / "checkpoints" / ".round-0004.1").rmdir()
    touched = {path for path, at in tree(server.folder).items() if before.get(path) != at}
    assert touched <= {campaign.folder / "checkpoints"}  # by this test


@pytest.mark.fault("R11")
def test_a_checkpoint_that_was_put_aside_is_told(server, campaign):
    folder = campaign.folder / "checkpoints"
    assert "DAMAGED checkpoints" not in "\n".join(lines(status(server)))
    (folder / "round-0003" / "state.json").write_text("{}")
    last_checkpoint(folder, policy_sha256=campaign.policy.sha256)
    found = status(server)
    assert [told["put_aside"] for told in found["campaigns"]] == [["round-0003"]]
    assert "DAMAGED checkpoints: round-0003" in "\n".join(lines(found))


def test_a_new_server_and_a_damaged_campaign_have_a_status(server):
    said = "\n".join(lines(status(server)))
    assert "not running; start" in said
    assert "round 0 of 3" in said
    assert "hold-out: none" in said
    (server.campaigns / "tiny" / "start.safetensors").write_bytes(b"")
    shutil.copytree(server.campaigns / "tiny", server.campaigns / ".tiny.1")  # one that is being made
    said = "\n".join(lines(status(server)))
    assert said.count("DAMAGED") == 1


def test_void_rounds_are_counted_apart_from_replies(server, campaign):
    place = campaign.folder / "checkpoints"
    newest = last_checkpoint(place, policy_sha256=campaign.policy.sha256)
    latest = Counts(0, {"VOID": 1, "NO_REPLY": 2})
    void = replace(newest, round_number=4, latest=latest, total=newest.total + latest)
    save_checkpoint(place, void)
    [told] = status(server)["campaigns"]
    assert (told["void"], told["rejected"]) == (1, {"PAUSED": 4, "NORM": 1, "NO_REPLY": 2})
    said = "\n".join(lines(status(server)))
    assert "replies: 6 used, 7 not (PAUSED 4, NO_REPLY 2, NORM 1)" in said
    assert "void rounds: 1 (too few devices stayed, so no sum was opened" in said
    assert "hides one record, trust local" in said
    assert round_line(void, None, rounds=9).startswith(
        "round 4 of 9: VOID, nothing was opened or used; replies 0, rejected 2 NO_REPLY, "
    )
    assert "VOID" not in round_line(newest, None, rounds=9)


def test_who_is_live_is_told_only_while_a_server_runs(server):
    assert not is_served(server)
    assert not server.lock.exists()
    with alone(server):
        assert is_served(server)
        assert "starting" in "\n".join(lines(status(server)))
        server.live.write_text(json.dumps(LIVE))
        found = status(server)
        assert found["live"]["state"] == "running"
        said = "\n".join(lines(found))
        assert "running since 2030-05-01T12:00:00+00:00 (pid 4711)" in said
        assert "live: 1 of 2 devices" in said
        assert "kitchen" in said
        assert "hall" not in said
        assert "1,234 requests, 5 refused, 6,789 bytes in, 10 out" in said
        server.live.write_text(json.dumps(LIVE | {"problem": "Flower is away"}))
        assert "PROBLEM: Flower is away" in "\n".join(lines(status(server)))
    found = status(server)
    assert found["live"]["state"] == "killed"
    said = "\n".join(lines(found))
    assert "not running: it ended without a word, last heard of 2030-05-01T12:10:00+00:00" in said
    assert "kitchen" not in said
    for damage in ("", "[]", '{"pid": '):
        server.live.write_text(damage)
        assert status(server)["live"]["state"] == "stopped"


def test_the_commands(server, campaign, capsys):
    place = ["--server", str(server.folder)]
    assert command("status", "--json", *place) == 0
    assert json.loads(capsys.readouterr().out)["campaigns"][0]["round"] == 3
    with alone(server), pytest.raises(ServerError, match="another serves from it; stop it first"):
        command("rollback", "1", *place)
    note_begun(campaign.folder, 2)
    assert command("rollback", "1", *place) == 0
    said = capsys.readouterr().out
    assert "its arrays are those of round 1; no round is left" in said
    assert "reserved by every device that agreed" in said
    assert last_checkpoint(campaign.folder / "checkpoints", policy_sha256=campaign.policy.sha256).arrays_of == 1
    assert command("status", *place) == 0
    said = capsys.readouterr().out
    assert "rolled back to round 1" in said
    assert "best 0.9 (round 1), now 0.9" in said
    assert "\n  go\n" in said
    with pytest.raises(CampaignError, match="got 7"):
        command("rollback", "7", *place)
    with pytest.raises(SottovoceError, match="tiny"):
        command("rollback", "1", "--campaign", "other", *place)


def judge(server, campaign, *arguments):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return _judge(server, campaign, parser.parse_args(["server", "run", *arguments]))


def test_a_run_is_scored_on_the_hold_out_it_names(server, tmp_path):
    campaign = read_campaign(server.campaigns / "tiny")
    (tmp_path / "own.csv").write_text("review,stars\na film,4\nanother,2\nthird,5\n")
    given = ["--holdout", str(tmp_path), "--holdout-format", "csv", "--holdout-columns", "text=review,target=stars"]
    assert judge(server, campaign, *given, "--holdout-records", "2").begin().score.records == 2
    assert judge(server, campaign, *given).begin().score.records == 3
    assert judge(server, campaign, "--no-holdout").begin().score.records == 3  # blind: the line there is stays
    with pytest.raises(ServerError, match="both"):
        judge(server, campaign, "--holdout", str(tmp_path))
    with pytest.raises(ServerError, match="blind because you say so"):
        judge(server, campaign)
    for tolerance in ("nan", "-1"):
        with pytest.raises(CampaignError, match="tolerance"):
            judge(server, campaign, "--no-holdout", "--tolerance", tolerance)
