"""The benchmark of a deployment: what it makes of processes and rounds, and a short run of the whole."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from shared.errors import CampaignError
from simulations.bench import deployment as bench_deployment
from simulations.bench.deployment import checked_rounds, cpu_per_minute, lines, measure, memory, peaks
from simulations.bench.loopback import Fleet
from simulations.bench.seen_processes import Seen, see


def seen(*, rss, cpu_s=0.0):
    return Seen(pid=1, rss_mib=rss, pss_mib=rss / 2, peak_mib=rss * 2, cpu_s=cpu_s)


PROCESSES = {
    "server": [seen(rss=100), seen(rss=50)],
    "device-0": [seen(rss=400), seen(rss=80)],
    "device-1": [seen(rss=600), seen(rss=60), seen(rss=40)],
}


def test_memory_is_told_by_role():
    assert memory(PROCESSES) == {
        "supervisor": {"rss": 100, "pss": 50},
        "superlink": {"rss": 50, "pss": 25},
        "executor": {"rss": 500, "pss": 250},
        "supernode": {"rss": 90, "pss": 45},
    }
    assert peaks(PROCESSES) == {"supervisor": 200, "superlink": 100, "executor": 1200, "supernode": 200}


def test_cpu_time_is_that_of_the_time_between():
    later = {name: [replace(each, cpu_s=0.5) for each in processes] for name, processes in PROCESSES.items()}
    found = cpu_per_minute(PROCESSES, later, 30.0)
    assert found == {"supervisor": 1.0, "superlink": 1.0, "executor": 1.0, "supernode": 1.5}


def test_a_process_and_its_children_are_seen():
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process:
        while len(found := see(process.pid)) < 2:
            assert process.poll() is None
        process.stdin.close()
    assert found[0].pid == process.pid != found[1].pid
    assert all(0 < each.pss_mib <= each.rss_mib <= each.peak_mib for each in found)
    assert see(process.pid) == []
    [itself, *_] = see(os.getpid())
    assert itself.cpu_s == pytest.approx(sum(os.times()[:2]), abs=0.5)


def round_line(number, *, accepted):
    line = {
        "round": number, "after": number - 1, "time": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "asked": 3,
        "accepted": accepted, "rejected": {"ERROR": 3 - accepted} if accepted < 3 else {}, "bytes_up": 30,
        "bytes_down": 60,
    }  # fmt: skip
    return bench_deployment.Round.model_validate(line)


def test_a_round_without_everybody_stops_the_benchmark(tmp_path, monkeypatch):
    fleet = Fleet(tmp_path, tmp_path / "scenario.toml", "deployment", 3)
    rounds = {1: round_line(1, accepted=3), 2: round_line(2, accepted=2)}
    monkeypatch.setattr(bench_deployment, "read_rounds", lambda folder: rounds)
    with pytest.raises(CampaignError, match=r"got \{1: 3, 2: 2\}; rejected: \{1: \{\}, 2: \{'ERROR': 1\}\}"):
        checked_rounds(fleet, 2)
    with pytest.raises(CampaignError, match="every round must take every answer"):
        checked_rounds(fleet, 3)


def test_one_round_tells_nothing_of_the_others():
    with pytest.raises(CampaignError, match="at least 2, got 1"):
        measure(rounds=1, quiet=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_deployment_is_measured():
    found = measure(rounds=2, idle_s=3.0, quiet=True)
    assert {"join until waiting", "round", "first round", "SIGTERM to exit, device"} <= found["seconds"].keys()
    for kind in ("waiting", "after the rounds"):
        assert found["memory_mib"][kind].keys() >= {"executor", "supernode"}
    assert found["memory_mib"]["peak"].keys() == {"executor", "supernode", "supervisor", "superlink"}
    front = found["bytes"]["through the front per device and round"]
    assert front["bytes_in"] > found["bytes"]["up per device and round"]["median"]
    assert lines(found)
