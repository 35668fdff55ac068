"""The journal of rounds: whole lines only, in order, and the line of descent across roll-backs."""

import json

import pytest

from server.aggregate import OptimizerState
from server.checkpoint import Checkpoint
from server.rounds import Round, Score, append_round, descent, last_begun, note_begun, read_rounds
from shared.errors import CampaignError


def done(number, *, after=None, value=1.0):
    return Round(
        round=number,
        after=number - 1 if after is None and number else after,
        time="2030-05-01T12:00:00+00:00",
        seconds=1.5,
        asked=3,
        accepted=2,
        rejected={"NORM": 1},
        bytes_up=10,
        bytes_down=20,
        score=Score(metric="rmse", value=value, records=4, holdout="ab", others={"mae": 0.5}),
        go=True,
    )


def test_lines_are_read_back_in_order_and_the_last_one_of_a_round_counts(tmp_path):
    for line in (done(0), done(2), done(1), done(2, value=3.0)):
        append_round(tmp_path, line)
    assert read_rounds(tmp_path) == {0: done(0), 1: done(1), 2: done(2, value=3.0)}
    assert list(read_rounds(tmp_path)) == [0, 1, 2]
    assert read_rounds(tmp_path / "none") == {}


@pytest.mark.parametrize("left", [1, 40, -2])
def test_a_line_that_a_kill_cut_is_left_out_and_the_next_one_is_whole(tmp_path, left):
    append_round(tmp_path, done(1))
    path = tmp_path / "rounds.jsonl"
    whole = path.read_bytes()
    append_round(tmp_path, done(2))
    path.write_bytes(whole + path.read_bytes()[len(whole) :][:left])
    assert list(read_rounds(tmp_path)) == [1]
    append_round(tmp_path, done(3))
    assert read_rounds(tmp_path) == {1: done(1), 3: done(3)}


def test_lines_that_are_no_rounds_are_left_out(tmp_path):
    append_round(tmp_path, done(1))
    with (tmp_path / "rounds.jsonl").open("ab") as file:
        file.write(b'[1]\n{"round": "2"}\n\xff\xfe\n\n')
    append_round(tmp_path, done(3))
    assert list(read_rounds(tmp_path)) == [1, 3]


def test_a_number_that_is_not_finite_is_no_line(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        append_round(tmp_path, done(1, value=float("nan")).model_copy(update={"seconds": float("nan")}))
    assert not (tmp_path / "rounds.jsonl").exists() or not read_rounds(tmp_path)


def test_the_line_of_descent_leaves_out_what_was_rolled_back():
    rounds = {line.round: line for line in (*map(done, range(6)), done(6, after=2), done(7))}
    numbers = [[line.round for line in descent(rounds, at)] for at in (0, 2, 5, 7)]
    assert numbers == [[0], [0, 1, 2], [0, 1, 2, 3, 4, 5], [0, 1, 2, 6, 7]]
    assert [line.round for line in descent({n: rounds[n] for n in (0, 1, 3)}, 3)] == [0, 1, 3]  # 2 has no line


def test_the_round_that_was_begun_is_known(tmp_path):
    newest = Checkpoint(4, "p", {}, OptimizerState(), {})
    assert last_begun(tmp_path, newest) == 5  # nobody noted it: it may have been
    for noted, expected in ((3, 4), (4, 4), (5, 5), (3, 5)):  # what was noted of a later one stands
        note_begun(tmp_path, noted)
        assert last_begun(tmp_path, newest) == expected
    for damage in ("", "[]", json.dumps({"round": None})):
        (tmp_path / "begun.json").write_text(damage)
        with pytest.raises(CampaignError, match="damaged"):
            last_begun(tmp_path, newest)
