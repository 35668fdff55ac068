"""The live table of a sweep: what it says of runs and of the time left, on terminals of any width and on none."""

import io
import os
import re
from dataclasses import replace

import pytest

from shared.config import FederationConfig, Scenario
from simulations.study.plan import Run
from simulations.study.table import Board, time_left


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(point, *, rounds=10, cohort=100):
    federation = FederationConfig(rounds=rounds, cohort_size=cohort)
    return Run(point, point, Scenario(name="s", federation=federation), {})


@pytest.fixture
def clock():
    class Clock:
        now = 0.0

        def __call__(self):
            return self.now

    return Clock()


@pytest.fixture
def board(clock, monkeypatch):
    """(columns, terminal or not) -> a board and its stream."""

    def make(*, columns=80, live=True, workers=2):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr("shutil.get_terminal_size", lambda: os.terminal_size((columns, 24)))
        stream = Terminal() if live else io.StringIO()
        return Board("s", workers=workers, stream=stream, clock=clock), stream

    return make


def test_no_line_is_wider_than_the_terminal_and_the_table_stays_in_its_place(board):
    table, stream = board(columns=40)
    lines = table.add([run("a point with a name that is far too long for it"), run("b")])
    table.began(lines[0])
    first = stream.getvalue()
    assert all(len(row) < 40 for row in re.sub(r"\x1b\[[0-9]*[A-Z]", "", first).splitlines())
    table.draw(now=True)
    assert stream.getvalue()[len(first) :].startswith("\x1b[3F")  # up over a head and two runs


def test_without_a_terminal_every_run_that_ends_is_a_line(board, clock):
    table, stream = board(live=False)
    lines = table.add([run("a"), run("b"), run("c")])
    table.prepares(lines[0])
    table.prepares(lines[0], over=True)
    table.began(lines[0])
    clock.now = 90.0
    table.ended(lines[0], "done")
    table.ended(lines[1], "kept")
    table.began(lines[2])
    table.ended(lines[2], "failed", "no room")
    assert stream.getvalue().splitlines() == [
        "s: a, seed 0: done in 1 min 30 s (1 of 3 runs done, 1 min 30 s left)",
        "s: b, seed 0: kept (2 of 3 runs done, 1 from before, 1 min 30 s left)",
        "s: c, seed 0: failed in 0 s: no room (2 of 3 runs done, 1 failed, 1 from before)",
    ]


def test_what_is_prepared_is_said_and_waits_again(board):
    table, stream = board()
    [line] = table.add([run("a")])
    table.prepares(line)
    assert "1 preparing" in stream.getvalue()
    table.prepares(line, over=True)
    assert line.status == "waiting"


def test_the_time_left_is_in_proportion_to_what_runs_weigh(board, clock):
    table, _ = board()
    small, large = run("a", rounds=10, cohort=100), run("b", rounds=100, cohort=1000)
    assert large.weight > 5 * small.weight
    lines = table.add([small, large, replace(large, key="c", point="c")])
    assert time_left(lines, workers=2, now=0.0) is None
    table.began(lines[0])
    clock.now = small.weight / 2  # twice as fast as guessed
    table.ended(lines[0], "done")
    assert time_left(lines, workers=2, now=clock.now) == pytest.approx(large.weight / 2)
    assert time_left(lines, workers=1, now=clock.now) == pytest.approx(large.weight)
    table.began(lines[1])
    later = clock.now + large.weight / 4
    assert time_left(lines, workers=1, now=later) == pytest.approx(0.75 * large.weight)
