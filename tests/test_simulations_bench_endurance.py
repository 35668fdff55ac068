"""The benchmark of endurance: slopes and their intervals, a program that leaks, and a short run of the whole."""

import subprocess
import sys

import numpy as np
import pytest
import scipy.stats

from shared.errors import CampaignError
from shared.progress import progress
from simulations.bench import endurance as bench_endurance
from simulations.bench.endurance import Course, _watch, lines, measure
from simulations.bench.loopback import Fleet


def course(values):
    made = Course()
    for number, value in enumerate(values, start=1):
        made.add(number, float(value))
    return made


def test_a_line_has_its_slope_and_the_warm_up_does_not_count():
    numbers = np.arange(1, 201)
    found = course(np.where(numbers <= 40, 0, 3 + 0.5 * numbers)).growth()
    assert found["per_100_rounds"] == pytest.approx(50)
    assert found["low"] == pytest.approx(50) == found["high"]
    assert (found["first"], found["last"], found["peak"]) == pytest.approx((3 + 0.5 * 48.5, 3 + 0.5 * 192.5, 103))


def test_what_never_changes_has_an_interval_of_no_width():
    found = course([7.0] * 50).growth()
    assert (found["per_100_rounds"], found["low"], found["high"]) == (0.0, 0.0, 0.0)


def test_the_interval_is_that_of_a_line_through_the_means_of_blocks():
    values = np.random.default_rng(3).normal(size=100).cumsum()
    blocks = values[20:].reshape(10, 8).mean(axis=1)
    line = scipy.stats.linregress(np.arange(21, 101).reshape(10, 8).mean(axis=1), blocks)
    half = scipy.stats.t.ppf(0.975, 8) * line.stderr
    found = course(values).growth()
    assert found["per_100_rounds"] == pytest.approx(100 * line.slope)
    assert (found["low"], found["high"]) == pytest.approx((100 * (line.slope - half), 100 * (line.slope + half)))


def wander(seed, *, drift=0.0):
    """Memory of a program: what is seen after a round is like what was seen after the one before."""
    shocks, level, values = np.random.default_rng(seed).normal(size=200), 0.0, []
    for shock in shocks:
        level = 0.8 * level + shock
        values.append(300 + level)
    return np.array(values) + drift * np.arange(200)


def test_what_only_wanders_is_rarely_called_growing_and_a_leak_nearly_always():
    calm = [course(wander(seed)).growth() for seed in range(200)]
    wrong = np.mean([not growth["low"] <= 0 <= growth["high"] for growth in calm])
    assert wrong < 0.15
    numbers = np.arange(160)
    naive = [scipy.stats.linregress(numbers, wander(seed)[40:]).pvalue < 0.05 for seed in range(200)]
    assert np.mean(naive) > 0.3  # every round as evidence of its own
    leaking = [course(wander(seed, drift=0.05)).growth() for seed in range(200)]
    assert np.mean([growth["low"] > 0 for growth in leaking]) > 0.95


PROGRAM = """
import json, sys, time
kept = []
time.sleep(0.3)
for number in range(1, 21):
    kept.append((bytearray(b"x" * 2**20), open("/dev/null")))
    line = {"round": number, "after": number - 1, "time": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "asked": 1,
            "accepted": 1, "rejected": {}, "bytes_up": 1, "bytes_down": 1}
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps(line) + "\\n")
    time.sleep(0.05)
time.sleep(float(sys.argv[2]))
"""


def watch(tmp_path, monkeypatch, *, rounds, lives_s):
    monkeypatch.setattr(bench_endurance, "_POLL_S", 0.01)
    fleet = Fleet(tmp_path, tmp_path / "scenario.toml", "endurance", 0)
    for folder in (fleet.campaign, fleet.log("server").parent, fleet.server / "state"):
        folder.mkdir(parents=True)
    fleet.log("server").write_text("it said this\n")
    (fleet.server / "state" / "superlink.db").write_bytes(b"x" * 2048)
    command = [sys.executable, "-c", PROGRAM, str(fleet.campaign / "rounds.jsonl"), str(lives_s)]
    with subprocess.Popen(command) as process, progress(total=rounds, description="test", quiet=True) as bar:
        try:
            return _watch(fleet, {"server": process}, rounds=rounds, bar=bar)
        finally:
            process.kill()


def test_a_program_that_leaks_is_seen_to_leak(tmp_path, monkeypatch):
    courses = watch(tmp_path, monkeypatch, rounds=20, lives_s=60)
    assert courses["descriptors"]["supervisor"].growth()["per_100_rounds"] == pytest.approx(100, rel=0.1)
    assert courses["rss_mib"]["supervisor"].growth()["per_100_rounds"] == pytest.approx(100, rel=0.2)
    assert set(courses["threads"]["supervisor"].values) == {1.0}
    assert courses["disk_kib"]["server/state"].values[-1] == 2
    assert courses["disk_kib"]["server"].growth()["low"] > 0  # the journal
    assert {"said by server", "server/campaigns"} <= courses["disk_kib"].keys()


def test_a_program_that_ends_too_early_is_named(tmp_path, monkeypatch):
    with pytest.raises(CampaignError, match="30 rounds must be served, server ended after round 20: it said this"):
        watch(tmp_path, monkeypatch, rounds=30, lives_s=0)


def test_too_few_rounds_have_no_slope():
    with pytest.raises(CampaignError, match="at least 10, got 9"):
        measure(rounds=9, quiet=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_short_campaign_is_watched():
    found = measure(rounds=12, quiet=True)
    programs = {"supervisor", "superlink", "executor 0", "executor 1", "supernode 0", "supernode 1"}
    for kind in ("rss_mib", "descriptors", "threads"):
        assert found[kind].keys() == programs
        assert all(growth["first"] > 0 for growth in found[kind].values())
    assert {"server", "server/state", "server/campaigns", "home 0", "home 0/ledger.db"} <= found["disk_kib"].keys()
    assert found["disk_kib"]["home 0"]["first"] > 0
    assert lines(found)
