"""The operator's hold-out: what is scored is the bare shared part, and harm stops a campaign."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from server.app import start_checkpoint
from server.checkpoint import Counts, save_checkpoint
from server.holdout import Examiner, Holdout, read_holdout
from server.judge import Judge, NoGoError, Rule
from server.rounds import Score, last_begun, read_rounds
from shared.assets import resolve
from shared.datasets import Record, read
from shared.errors import CampaignError, DataError
from shared.heads.adapter import load_shared, load_start
from shared.heads.tasks import IGNORE, TASKS
from shared.models.features import compute_hidden
from shared.models.model import load_base


def moved(campaign, seed=0):
    """Shared arrays some rounds away from the start."""
    draw = np.random.default_rng(seed)
    slots = campaign.policy.array_slots()
    return {slot.name: draw.normal(scale=0.3, size=slot.shape).astype(np.float32) for slot in slots}


@pytest.fixture(scope="module")
def world(published):
    """The campaign over the tiny base with its hold-out."""
    data = published.campaign.scenario.data
    return published.campaign, read_holdout(data.format, data.source, records=25)


@pytest.fixture(scope="module")
def examiner(world, tmp_path_factory):
    return Examiner(*world, cache=tmp_path_factory.mktemp("features"))


def test_a_published_hold_out_is_test_rows_only_and_a_fixed_sample_of_them(published):
    data = published.campaign.scenario.data
    users = read(data.format, resolve(data.source)).users
    test_rows = [record for user in users for record in user.test]
    whole = read_holdout(data.format, data.source)
    assert list(whole.records) == test_rows
    some = read_holdout(data.format, data.source, records=7)
    assert len(some.records) == 7
    assert set(some.records) <= set(test_rows)
    assert some.records == read_holdout(data.format, data.source, records=7).records
    assert some.records != tuple(test_rows[:7])
    assert some.sha256 != whole.sha256


def test_own_records_come_from_a_folder(tmp_path):
    rows = [{"review": "a film", "stars": 4}, {"review": "another", "stars": 2}]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_holdout("jsonl", str(tmp_path), columns={"text": "review", "target": "stars"})
    assert [(record.text, record.target) for record in found.records] == [("a film", 4.0), ("another", 2.0)]


def test_ratings_are_scored_as_one_by_one(world, examiner):
    campaign, holdout = world
    base = load_base(resolve(campaign.scenario.model.base))
    head = campaign.new_head(base)
    load_start(head, campaign.start)
    for arrays in (start_checkpoint(campaign).arrays, moved(campaign)):
        load_shared(head, arrays)
        errors = []
        for record in holdout.records:
            ids = TASKS["rating"](base, [record.key], campaign.scenario).token_ids
            hidden, mask = head.prepare(compute_hidden(base, ids, head_blocks=len(head.blocks))).batch([0])
            with torch.no_grad():
                errors.append(min(5.0, max(1.0, float(head.predict(hidden, mask)))) - record.target)
        score = examiner.score(arrays)
        assert (score.metric, score.records) == ("rmse", 25)
        assert score.value == pytest.approx(math.sqrt(np.mean(np.square(errors))), abs=1e-5)
        assert score.others["mae"] == pytest.approx(np.mean(np.abs(errors)), abs=1e-5)
    assert examiner.score(moved(campaign)) == score  # nothing is left of the scores between
    assert examiner.score(start_checkpoint(campaign).arrays).value != score.value


def test_arrays_that_are_not_finite_have_no_score(world, examiner):
    campaign, _ = world
    for wrong in (np.nan, np.inf, 1e9):
        arrays = moved(campaign)
        next(iter(arrays.values())).flat[0] = wrong
        assert examiner.score(arrays).value is None


def test_responses_are_scored_as_one_by_one(tiny, homes, tiny_llama, tmp_path):
    data = tiny.tiny_dialogues(tmp_path / "data")
    scenario = tiny.tiny_generation(tmp_path, base=tiny_llama, data=data)
    campaign = homes.publish(scenario, tmp_path).campaign
    holdout = read_holdout("convai2", str(data), records=6)
    examiner = Examiner(campaign, holdout, cache=tmp_path / "cache")
    base = load_base(tiny_llama)
    head = campaign.new_head(base)
    load_start(head, campaign.start)
    arrays = moved(campaign)
    load_shared(head, arrays)
    total, tokens = 0.0, 0
    for record in holdout.records:
        encoded = TASKS["generation"](base, [record.key], campaign.scenario)
        hidden, mask = compute_hidden(base, encoded.token_ids, head_blocks=len(head.blocks)).batch([0])
        with torch.no_grad():
            logits = head.states(hidden, mask)[0] @ base.family.vocabulary(base.model).T
        labels = torch.from_numpy(encoded.labels[0])
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"))
        tokens += int((labels != IGNORE).sum())
    score = examiner.score(arrays)
    assert score.metric == "perplexity"
    assert score.value == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert score.value != pytest.approx(examiner.score(start_checkpoint(campaign).arrays).value, rel=1e-3)
    with pytest.raises(DataError, match="must have a response"):
        Examiner(campaign, Holdout((Record("a", 1.0, "1", 0),), "own"), cache=tmp_path)


def test_what_cannot_be_scored_is_refused(published, tmp_path):
    with pytest.raises(DataError, match="from 1 to 5"):
        Examiner(published.campaign, Holdout((Record("a", 0.0, "1", 0),), "own"), cache=tmp_path)
    with pytest.raises(DataError, match="at least one record"):
        read_holdout("jsonl", str(tmp_path), columns={"text": "review"})
    with pytest.raises(DataError, match="at least 1, got 0"):
        read_holdout("jsonl", str(tmp_path), columns={"text": "review"}, records=0)


def scores(*values):
    return [Score(metric="rmse", value=value, records=9, holdout="a") for value in values]


@pytest.mark.parametrize(
    ("curve", "go"),
    [
        ([1.0], True),
        ([1.0, 0.9, 0.93, 0.91], True),  # one unlucky round
        ([1.0, 0.9, 0.93, 0.92], False),
        ([1.0, 0.9, 0.93, 0.91, 0.93], True),  # not running
        ([1.0, 1.019, 1.019, 1.019], True),
        ([1.0, 1.021, 1.021], False),  # worse than no training
        ([1.0, 0.9, 0.91, 0.915, 0.919, 0.925, 0.93], False),  # little by little
        ([1.0, 0.9, 1.5, 1.5, 0.9], True),  # it came back
        ([1.0, None], False),
        ([None], False),
        ([1.0, None, 0.9], True),
    ],
)
def test_the_rule(curve, go):
    assert (Rule().objection(scores(*curve)) is None) is go


@pytest.mark.parametrize(
    "wrong", [{"tolerance": math.nan}, {"tolerance": -0.1}, {"tolerance": math.inf}, {"patience": 0}]
)
def test_an_impossible_rule_is_refused(wrong):
    with pytest.raises(CampaignError, match="tolerance of at least 0"):
        Rule(**wrong)


class Scripted:
    """An examiner whose scores are given, in the order in which they are asked for."""

    def __init__(self, *values, holdout="a"):
        self._values, self._holdout = list(values), holdout

    def knows(self, score):
        return score is not None and score.holdout == self._holdout

    def score(self, arrays):
        return Score(metric="rmse", value=self._values.pop(0), records=9, holdout=self._holdout)


@pytest.fixture
def campaign(published, tmp_path):
    return replace(published.campaign, folder=tmp_path)


def finish(campaign, number, *, judge=None, asked=2):
    """A round as ``run_rounds`` ends it: the checkpoint is on disk when the observer is called."""
    latest = Counts(asked - 1, {"NORM": 1}, bytes_up=10, bytes_down=20)
    checkpoint = replace(
        start_checkpoint(campaign), round_number=number, participations={0: number, 1: number}, latest=latest
    )
    save_checkpoint(campaign.folder / "checkpoints", checkpoint)
    if judge:
        judge.on_round(checkpoint)


def test_every_round_has_its_line_and_harm_stops_the_campaign(campaign):
    judge = Judge(campaign, Scripted(1.0, 0.9, 0.95, 0.94))
    start = judge.begin()
    assert (start.round, start.score.value, start.go) == (0, 1.0, True)
    finish(campaign, 1, judge=judge)
    finish(campaign, 2, judge=judge)
    with pytest.raises(NoGoError, match=r"round 3: rmse 0.94 is more than 2.0% worse .* 0.9, 2 rounds running"):
        finish(campaign, 3, judge=judge)
    lines = read_rounds(campaign.folder)
    assert [(n, line.after, line.score.value, line.go) for n, line in lines.items()] == [
        (0, None, 1.0, True), (1, 0, 0.9, True), (2, 1, 0.95, True), (3, 2, 0.94, False),
    ]  # fmt: skip
    assert (lines[2].asked, lines[2].accepted, lines[2].rejected, lines[2].bytes_up) == (2, 1, {"NORM": 1}, 10)
    assert lines[2].seconds > 0
    newest = replace(start_checkpoint(campaign), round_number=3)
    assert last_begun(campaign.folder, newest) == 3  # nobody was asked in round 4
    with pytest.raises(NoGoError):  # and nobody will be, because somebody types the command again
        Judge(campaign, Scripted()).begin()
    Judge(campaign, Scripted(), stop=False).begin()
    assert last_begun(campaign.folder, replace(newest, round_number=2)) == 3  # three rounds is all there is


def test_a_round_whose_line_a_kill_left_out_is_scored_at_the_next_start(campaign):
    judge = Judge(campaign, Scripted(1.0, 0.9))
    judge.begin()
    finish(campaign, 1, judge=judge)
    finish(campaign, 2)
    with pytest.raises(NoGoError, match="not finite"):
        Judge(campaign, Scripted(None)).begin()
    line = read_rounds(campaign.folder)[2]
    assert (line.after, line.seconds, line.asked, line.go) == (1, None, 2, False)
    assert line.score.value is None


def test_scores_on_another_hold_out_do_not_count(campaign):
    judge = Judge(campaign, Scripted(1.0, 0.5))
    judge.begin()
    finish(campaign, 1, judge=judge)
    other = Judge(campaign, Scripted(2.0, 1.9, 1.91, holdout="b"))
    assert other.begin().score.value == 1.9  # start and newest arrays are scored anew
    finish(campaign, 2, judge=other)
    assert read_rounds(campaign.folder)[2].go
    assert read_rounds(campaign.folder)[1].accepted == 1


def test_without_a_hold_out_lines_are_written_and_nothing_is_stopped(campaign):
    judge = Judge(campaign, None)
    judge.begin()
    finish(campaign, 1, judge=judge)
    line = read_rounds(campaign.folder)[1]
    assert (line.score, line.go, line.accepted) == (None, None, 1)
    assert Judge(campaign, None).begin() == line
