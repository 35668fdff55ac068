"""Time a sweep against the same runs typed one by one: what playing them as a study costs, report included.

Both ways are commands in processes of their own, one run at a time, wall time and CPU-seconds of all their children,
interleaved. Scores are compared first: they must be equal to the last digit.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.errors import CampaignError
from shared.progress import progress
from simulations.machine import about, goal, goal_lines, spread
from simulations.report.results import read_run
from simulations.study.store import finished_runs

_EPSILONS = (2.0, 4.0, 8.0)
_SCENARIO = "movielens"
_SETTINGS: dict[str, Any] = {
    "federation.rounds": 4,
    "federation.cohort_size": 100,
    "privacy.max_participations": 1,
    "evaluation.every_rounds": 4,
    "export.users": 0,
    "linear.enabled": False,
    "statistics.enabled": False,
}


def measure(*, rounds: int = 2, quiet: bool = False, scenario: str = _SCENARIO) -> dict[str, Any]:
    """Play three runs as a study and one by one.

    Args:
        rounds: How often both ways are timed.
        quiet: No progress on stderr.
        scenario: Of the runs: a shipped one by its name, or a file.

    Returns:
        ``wall_s`` and ``cpu_s`` of ``sweep``, of ``simulate`` and of the sweep's ``report``, ``overhead`` (wall time of
        the sweep over that of the single runs, less one), ``goals``, machine, versions and commit.

    Raises:
        CampaignError: The two ways end with other scores, or a command fails.
    """
    wall: dict[str, list[float]] = {"sweep": [], "report": [], "simulate": []}
    cpu: dict[str, list[float]] = {name: [] for name in wall}
    with (
        tempfile.TemporaryDirectory() as folder,
        progress(total=rounds, description="bench sweep", unit="round", quiet=quiet) as bar,
    ):
        for number in range(rounds):
            here = Path(folder) / str(number)
            here.mkdir()
            study = here / "study.toml"
            study.write_text(_study(scenario), encoding="utf-8")
            ways = {
                "sweep": [["sweep", str(study), "--out", str(here / "study"), "--workers", "1", "--quiet"]],
                "simulate": [_simulate(scenario, epsilon, here) for epsilon in _EPSILONS],
                "report": [["sweep", str(study), "--out", str(here / "study"), "--report-only"]],
            }
            first = ("sweep", "simulate") if number % 2 else ("simulate", "sweep")
            for name in (*first, "report"):
                took, worked = _timed(ways[name])
                wall[name].append(took)
                cpu[name].append(worked)
            _compare(here)
            bar.update(1)
    overhead = [a / b - 1 for a, b in zip(wall["sweep"], wall["simulate"], strict=True)]
    return {
        "mode": "one run at a time, wall and CPU-seconds of the commands with all their children, interleaved",
        "runs": len(_EPSILONS),
        "rounds": rounds,
        "wall_s": {name: spread(each) for name, each in wall.items()},
        "cpu_s": {name: spread(each) for name, each in cpu.items()},
        "overhead": spread(overhead),
        "goals": {"overhead of a sweep, report included": goal(spread(overhead)["median"], at_most=0.05)},
        **about("torch", "flwr", "optuna", "matplotlib"),
    }


def _study(scenario: str) -> str:
    settings = "".join(f"{json.dumps(key)} = {json.dumps(value)}\n" for key, value in _SETTINGS.items())
    grid = f'"privacy.epsilon" = {json.dumps(list(_EPSILONS))}\n'
    return f"scenario = {json.dumps(scenario)}\n[settings]\n{settings}[grid]\n{grid}"


def _simulate(scenario: str, epsilon: float, folder: Path) -> list[str]:
    file = scenario if scenario.endswith(".toml") else str(Path(__file__).parents[1] / "scenarios" / f"{scenario}.toml")
    settings = _SETTINGS | {"privacy.epsilon": epsilon, "performance.threads": 1}
    laid = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return ["simulate", file, "--out", str(folder / f"run-{epsilon:g}"), "--quiet", *laid]


def _timed(commands: Sequence[Sequence[str]]) -> tuple[float, float]:
    """Wall time and CPU-seconds of commands, one after the other."""
    began, before = time.perf_counter(), _cpu_s()
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "sottovoce.cli", *command], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise CampaignError(f"sottovoce {command[0]} must end well to be timed: {done.stderr.strip()[-300:]}")
    return time.perf_counter() - began, _cpu_s() - before


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _compare(folder: Path) -> None:
    """Raise where a study's runs have other scores than the single ones."""
    played = {run.settings["privacy"]["epsilon"]: run for [run] in finished_runs(folder / "study").values()}
    for epsilon in _EPSILONS:
        one = read_run(folder / f"run-{epsilon:g}").summary.rows
        if played[epsilon].summary.rows != one:
            raise CampaignError(
                f"a study's run must have the scores of the same run alone, at epsilon {epsilon:g} not."
            )


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['runs']} runs, {measured['rounds']} rounds"]
    for name, wall in measured["wall_s"].items():
        worked = measured["cpu_s"][name]["median"]
        spans = f"{wall['median']:8.1f} s  [{wall['low']:.1f}, {wall['high']:.1f}]"
        out.append(f"  {name:<10}{spans}{worked:10.1f} CPU-s")
    return [*out, *goal_lines(measured["goals"])]
