"""Progress is told on stderr, rarely, and truly."""

import io
import sys

import pytest

from shared import progress as module
from shared.progress import progress, track


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(clock, seconds, *, total, quiet=False):
    with progress(total=total, description="federation", quiet=quiet, clock=clock) as bar:
        for s in seconds:
            clock.now += s
            bar.update(1)


def test_plain_lines_worked_out_by_hand(capfd):
    run(Clock(), [3.0] * 20, total=20)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "federation: 1/20, 3 s gone, about 57 s left",  # the first one after two seconds
        "federation: 5/20, 15 s gone, about 45 s left",  # then at most one in ten seconds: 3 + 10 = 13 <= 15
        "federation: 9/20, 27 s gone, about 33 s left",
        "federation: 13/20, 39 s gone, about 21 s left",
        "federation: 17/20, 51 s gone, about 9 s left",
        "federation: done, 20/20, 60 s gone",
    ]


def test_short_work_shows_nothing_and_the_bound_is_two_seconds(capfd):
    run(Clock(), [0.19] * 10, total=10)
    assert capfd.readouterr() == ("", "")
    run(Clock(), [0.21] * 10, total=10)
    assert capfd.readouterr() == ("", "federation: done, 10/10, 2 s gone\n")


def test_quiet_shows_nothing(capfd, monkeypatch):
    run(Clock(), [60.0] * 3, total=3, quiet=True)
    assert capfd.readouterr() == ("", "")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "SHORT_WORK_S", 0.0)
    assert list(track([1, 2], description="reading", quiet=True)) == [1, 2]
    assert terminal.getvalue() == ""


def test_without_a_total_there_is_no_time_left(capfd):
    run(Clock(), [5.0, 5.0], total=None)
    assert capfd.readouterr().err.splitlines() == [
        "federation: 1, 5 s gone",
        "federation: done, 2, 10 s gone",
    ]


def test_an_update_of_nothing_is_a_sign_of_life(capfd):
    clock = Clock()
    with progress(total=84, description="download", clock=clock) as bar:
        clock.now += 11
        bar.update(0)
    assert capfd.readouterr().err.splitlines()[0] == "download: 0/84, 11 s gone"


def test_interrupted_work_says_where_it_stopped(capfd):
    clock = Clock()

    def interrupted():
        with progress(total=20, description="federation", clock=clock) as bar:
            clock.now += 1
            bar.update(7)
            clock.now += 8
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert capfd.readouterr().err == "federation: stopped at 7/20, 9 s gone\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (119.4, "119 s"),
        (119.6, "2 min 00 s"),
        (605, "10 min 05 s"),
        (7199, "119 min 59 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert module._duration(seconds) == text


def test_a_terminal_gets_a_bar_with_time_left(monkeypatch, capfd):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(module, "SHORT_WORK_S", 0.0)
    with progress(total=20, description="federation", unit="round") as bar:
        bar.update(5)
        bar.update(15)
    shown = terminal.getvalue()
    assert "federation" in shown
    assert "20/20" in shown
    assert "round" in shown
    assert "<" in shown  # tqdm writes [gone<left, rate]
    assert capfd.readouterr().out == ""


def test_a_terminal_shows_nothing_for_short_work(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(track(range(3), description="reading")) == [0, 1, 2]
    assert terminal.getvalue().strip() == ""


def test_track_counts_items_after_their_work_and_knows_their_number(capfd, monkeypatch):
    monkeypatch.setattr(module, "SHORT_WORK_S", 0.0)
    monkeypatch.setattr(module, "LINE_EVERY_S", 0.0)
    seen = []
    for item in track("ab", description="reading"):
        seen.append((item, capfd.readouterr().err))
    assert seen[0] == ("a", "")
    assert seen[1][1].startswith("reading: 1/2, 0 s gone")
    assert capfd.readouterr().err == "reading: done, 2/2, 0 s gone\n"
    assert list(track(iter("ab"), description="reading", total=2)) == ["a", "b"]
    assert "done, 2/2" in capfd.readouterr().err
