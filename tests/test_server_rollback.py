"""Going back to an earlier round: the arrays are old, the numbers are not, and every device answers."""

import hashlib
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import server.rollback
from client.home.home import open_home
from server.aggregate import SERVER_OPTIMIZERS, OptimizerState, mean_update
from server.app import run_rounds, start_checkpoint
from server.checkpoint import (
    Checkpoint,
    checkpoint_path,
    last_checkpoint,
    load_checkpoint,
    newest_checkpoint,
    newest_first,
    save_checkpoint,
)
from server.cost import campaign_cost, cost_lines
from server.judge import Judge, NoGoError
from server.rollback import roll_back
from server.rounds import Score, note_begun, read_rounds
from shared.errors import CampaignError
from shared.privacy.accounting import epsilon
from shared.protocol import wire

DEVICES = 2


class Curve:
    """An examiner whose scores are given."""

    def __init__(self, *values):
        self._values = list(values)

    def knows(self, score):
        return score is not None

    def score(self, arrays):
        return Score(metric="rmse", value=self._values.pop(0), records=9, holdout="a")


class Power(Exception):  # noqa: N818 - it goes out
    """A power cut."""


@pytest.fixture(scope="module")
def world(homes, tiny_world, tmp_path_factory):
    """A campaign of six rounds with two devices, each at home; read only."""
    folder = tmp_path_factory.mktemp("rollback")
    overrides = ("federation.rounds=6", "federation.cohort_size=2", "privacy.max_participations=6")
    published = homes.publish(tiny_world(folder), folder, overrides=overrides)
    for user in range(DEVICES):
        homes.make_home(folder / "homes" / str(user), published, user=user)
    return published, folder / "homes"


@pytest.fixture
def stage(world, homes, tmp_path):
    """The campaign with a folder of its own, and the grid of devices with fresh homes."""
    published, made = world
    shutil.copytree(made, tmp_path / "homes")
    folder = tmp_path / "campaign"
    shutil.copytree(published.campaign.folder, folder)
    grid = homes.grid_of([tmp_path / "homes" / str(user) for user in range(DEVICES)])
    return replace(published.campaign, folder=folder), grid


def run(campaign, grid, judge, *, start=None, cut=None):
    """Rounds as a server runs them; the power may go when a round's replies are there."""
    judge.begin()
    start = last_checkpoint(campaign.folder / "checkpoints", policy_sha256=campaign.policy.sha256)
    roster = {node: seat for seat, node in enumerate(grid.get_node_ids())}
    asked = []
    send = type(grid).send_and_receive

    def recorded(messages, **named):
        messages = list(messages)
        replies = list(send(grid, messages, **named))
        asked.append((messages, replies))
        if messages[0].content["config"]["round"] == cut:
            raise Power
        return replies

    grid.send_and_receive = recorded
    try:
        run_rounds(grid, campaign, roster=roster, start=start, on_round=judge.on_round)
    except (NoGoError, Power) as error:
        return asked, error
    finally:
        del grid.send_and_receive
    return asked, None


def test_after_a_no_go_and_a_roll_back_every_device_answers_from_the_old_arrays(stage, tmp_path):
    campaign, grid = stage
    folder = campaign.folder / "checkpoints"
    _, error = run(campaign, grid, Judge(campaign, Curve(1.0, 0.9, 1.5, 1.5)))
    assert isinstance(error, NoGoError)
    newest, old = newest_checkpoint(folder), load_checkpoint(checkpoint_path(folder, 1))
    assert newest.round_number == 3

    back = roll_back(campaign, 1)
    assert (back.round_number, back.arrays_of) == (3, 1)
    assert (back.participations, back.answered, back.total) == (newest.participations, newest.answered, newest.total)
    found = last_checkpoint(folder, policy_sha256=campaign.policy.sha256)
    assert found.arrays_of == 1
    for name, array in old.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)
        np.testing.assert_array_equal(found.optimizer.first[name], old.optimizer.first[name])
    assert found.optimizer.steps == old.optimizer.steps

    asked, error = run(campaign, grid, Judge(campaign, Curve(0.93, 1.4)))
    assert isinstance(error, NoGoError)
    (requests, replies), *_ = asked
    for request in requests:
        sent = wire.unpack_request(request.content, campaign.policy.array_slots())
        assert (sent.round_number, sent.answered) == (4, 3)
        assert all(np.array_equal(sent.arrays[name], array) for name, array in old.arrays.items())
    after = load_checkpoint(checkpoint_path(folder, 4))
    assert (after.latest.replies, after.latest.rejected, after.arrays_of) == (DEVICES, {}, 4)
    assert after.participations == {0: 4, 1: 4}
    updates = [wire.unpack_reply(reply.content, campaign.policy.array_slots())[0] for reply in replies]
    federation = campaign.scenario.federation
    mean = mean_update(updates, denominator=campaign.policy.cohort_size)
    expected, _ = SERVER_OPTIMIZERS[federation.server_optimizer](old.arrays, old.optimizer, mean, federation)
    for name, array in expected.items():
        np.testing.assert_allclose(after.arrays[name], array, atol=1e-6)
        assert not np.allclose(after.arrays[name], newest.arrays[name])
    lines = read_rounds(campaign.folder)
    assert lines[4].after == 1
    assert lines[4].go  # what was rolled back neither counts as bad nor as running
    with open_home(tmp_path / "homes" / "0").ledger() as ledger:
        assert sum(event.kind == "spend" for event in ledger.history()) == 5


def test_a_round_that_was_cut_is_passed_over(stage, monkeypatch):
    campaign, grid = stage
    _, error = run(campaign, grid, Judge(campaign, Curve(1.0, 0.9, 0.9)), cut=3)
    assert isinstance(error, Power)
    back = roll_back(campaign, 1)
    assert (back.round_number, back.arrays_of) == (3, 1)
    asked, _ = run(campaign, grid, Judge(campaign, Curve(0.9)), cut=4)
    assert [wire.refusal_code(reply) for reply in asked[0][1]] == [None] * DEVICES

    monkeypatch.setattr(server.rollback, "last_begun", lambda _, newest: newest.round_number)  # the same number again
    roll_back(campaign, 0)
    asked, _ = run(campaign, grid, Judge(campaign, Curve()), cut=4)
    assert [wire.refusal_code(reply) for reply in asked[0][1]] == ["CONFLICT"] * DEVICES


@pytest.fixture
def ran(world, tmp_path):
    """A campaign after four rounds of which nothing came back."""
    published, _ = world
    campaign = replace(published.campaign, folder=tmp_path)
    draw = np.random.default_rng(0)
    start = start_checkpoint(campaign)
    for number in range(1, 5):
        arrays = {name: draw.normal(size=array.shape).astype(np.float32) for name, array in start.arrays.items()}
        optimizer = OptimizerState(dict.fromkeys(arrays, number), arrays, arrays)
        seats = {0: number, 1: 1}
        checkpoint = replace(
            start, round_number=number, arrays=arrays, optimizer=optimizer, participations=seats, answered=seats
        )
        save_checkpoint(tmp_path / "checkpoints", checkpoint)
    note_begun(tmp_path, 4)
    return campaign


def newest_of(campaign):
    return last_checkpoint(campaign.folder / "checkpoints", policy_sha256=campaign.policy.sha256)


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_public_start_is_round_0(ran):
    roll_back(ran, 0)
    found, start = newest_of(ran), start_checkpoint(ran)
    assert (found.round_number, found.arrays_of, found.optimizer) == (4, 0, start.optimizer)
    for name, array in start.arrays.items():
        np.testing.assert_array_equal(found.arrays[name], array)


def test_nothing_is_lost_and_going_back_can_be_undone(ran):
    before = tree(ran.folder)
    for to_round in (2, 1, 3, 4):
        roll_back(ran, to_round)
        assert newest_of(ran).arrays_of == to_round
    assert tree(ran.folder).items() >= before.items()
    np.testing.assert_equal(newest_of(ran).arrays, load_checkpoint(ran.folder / "checkpoints" / "round-0004").arrays)


@pytest.mark.parametrize(
    ("to_round", "message"),
    [(5, "from 0 .* to 4, got 5"), (-1, "got -1"), (4, "goes on from round 4 already"), (2, "altered or cut short")],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(ran, to_round, message):
    (ran.folder / "checkpoints" / "round-0002" / "tensors.safetensors").write_bytes(b"damaged")
    before = tree(ran.folder)
    with pytest.raises(CampaignError, match=message):
        roll_back(ran, to_round)
    assert tree(ran.folder) == before


def test_a_campaign_without_a_round_or_of_another_policy_is_refused(ran, tmp_path):
    with pytest.raises(CampaignError, match="no finished round"):
        roll_back(replace(ran, folder=tmp_path / "other"), 0)
    other = replace(ran, policy=ran.policy.model_copy(update={"rounds": 7}))
    with pytest.raises(CampaignError, match="one is of another"):
        roll_back(other, 1)


def test_a_kill_leaves_the_campaign_as_it_was(ran, monkeypatch):
    def cut(*_):
        raise Power

    before = newest_of(ran)
    monkeypatch.setattr("shared.files.os.fsync", cut)
    with pytest.raises(Power):
        roll_back(ran, 1)
    monkeypatch.undo()
    assert newest_of(ran).arrays_of == before.arrays_of == 4
    roll_back(ran, 1)
    assert newest_of(ran).arrays_of == 1


@pytest.mark.fault("R11")
def test_a_damaged_roll_back_costs_no_count(ran):
    roll_back(ran, 1)
    (ran.folder / "checkpoints" / "round-0004.1" / "tensors.safetensors").write_bytes(b"damaged")
    assert newest_checkpoint(ran.folder / "checkpoints").arrays_of == 4
    assert newest_of(ran).participations == {0: 4, 1: 1}
    assert (ran.folder / "checkpoints" / "damaged-round-0004.1").is_dir()


def test_checkpoints_come_in_the_order_of_numbers(tmp_path):
    names = ("round-0004", "round-0004.9", "round-0004.10", "round-0005", "round-10000", "round-9999")
    for name in (*names, "round-4", "round-0004.x", "damaged-round-0006"):
        (tmp_path / name).mkdir()
    found = [path.name for path in newest_first(tmp_path)]
    assert found == ["round-10000", "round-9999", "round-0005", "round-0004.10", "round-0004.9", "round-0004"]


@pytest.mark.fault("R19")
def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    path = save_checkpoint(tmp_path, Checkpoint(2, "p", {"a": np.zeros(1)}, OptimizerState(), {}))
    state = json.loads((path / "state.json").read_text())
    del state["state_sha256"], state["rolled_back_to"]
    state["state_sha256"] = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(state))
    assert load_checkpoint(path).arrays_of == 2


def test_the_cost_is_what_was_reserved_and_at_most_what_was_released(ran):
    policy = ran.policy
    cost = campaign_cost(ran, newest_of(ran))
    assert (cost.reserved_epsilon, cost.asked_devices, cost.unfinished) == (policy.epsilon, 2, None)
    assert (cost.most_rounds, cost.median_rounds) == (4, 4)  # of an even number the upper one
    after = epsilon(replace(policy.mechanism, max_participations=4), delta=policy.delta)
    assert cost.most_epsilon == after < policy.epsilon
    three = replace(newest_of(ran), participations={0: 4, 1: 1, 2: 1})
    assert campaign_cost(ran, three).median_rounds == 1
    note_begun(ran.folder, 5)
    begun = campaign_cost(ran, three)
    assert (begun.most_rounds, begun.median_rounds, begun.unfinished) == (5, 2, 5)
    said = " ".join(cost_lines(begun))
    assert "reserved by every device that agreed: epsilon 8 (delta 0.0001), for good" in said
    assert "(5 of 6 rounds)" in said
    assert "round 5 was begun" in said
    nobody = campaign_cost(replace(ran, folder=ran.folder / "new"), start_checkpoint(ran))
    assert (nobody.asked_devices, nobody.most_epsilon, nobody.unfinished) == (0, 0.0, None)
    over = replace(newest_of(ran), participations={0: 40})
    assert campaign_cost(ran, over).most_epsilon == pytest.approx(policy.epsilon, rel=3e-3)
