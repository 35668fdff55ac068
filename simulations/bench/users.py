"""Measure what user-level privacy costs on MovieLens 100k: ours, the linear head, ``dp-statistics``, at three epsilons.

Not a matter of speed. Constants were chosen on validation rows for each epsilon; test rows are read once a seed.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shared.config import Scenario, load_scenario
from shared.progress import progress
from simulations.machine import about
from simulations.run import simulate

_SCENARIO = Path(__file__).parents[1] / "scenarios" / "movielens-user.toml"
ROWS = ("local", "dp-statistics", "personal", "personal-linear", "federated")
_RIVALS = ("dp-statistics", "personal-linear")

# Epsilon -> what the shipped scenario, which is tuned for 8, changes.
TUNED: Mapping[float, Sequence[str]] = {
    8.0: (),
    3.0: (
        "federation.rounds=12",
        "federation.server_learning_rate=8.0",
        "privacy.max_participations=12",
        "linear.clip_norm=0.7",
        "linear.server_learning_rate=8.65",
    ),
    1.0: (
        "federation.rounds=8",
        "federation.server_learning_rate=5.0",
        "privacy.max_participations=8",
        "linear.clip_norm=0.7",
        "linear.server_learning_rate=3.85",
    ),
}


def measure(*, rounds: int, quiet: bool = False, scenario: Path = _SCENARIO) -> dict[str, Any]:
    """Run the scenario at every epsilon.

    Args:
        rounds: Seeds: everything that is drawn is drawn anew for each.
        quiet: No progress on stderr.
        scenario: A scenario at unit user, tuned for epsilon 8.

    Returns:
        ``cells``: epsilon, trust, the noise multiplier, ``test``: row -> ``mean``, ``sd`` and ``values`` of the pooled
        RMSE over seeds; ``margin``: ours minus the better of the rivals. Machine and versions.
    """
    cells = {epsilon: load_scenario(scenario, (f"privacy.epsilon={epsilon}", *TUNED[epsilon])) for epsilon in TUNED}
    return measure_cells(cells, seeds=rounds, name="bench users", quiet=quiet)


def measure_cells(cells: Mapping[float, Scenario], *, seeds: int, name: str, quiet: bool) -> dict[str, Any]:
    """Run one scenario an epsilon, and describe what came out."""
    measured = []
    with (
        tempfile.TemporaryDirectory() as folder,
        progress(total=len(cells), description=name, unit="epsilon", quiet=quiet) as bar,
    ):
        for epsilon, cell in cells.items():
            measured.append(_measure(cell, out=Path(folder) / f"epsilon-{epsilon:g}", seeds=seeds))
            bar.update(1)
    return {"seeds": seeds, "cells": measured, **about("numpy", "torch", "flwr", "dp-accounting")}


def _measure(scenario: Scenario, *, out: Path, seeds: int) -> dict[str, Any]:
    evaluation = scenario.evaluation.model_copy(update={"seeds": seeds, "every_rounds": scenario.federation.rounds})
    export = scenario.export.model_copy(update={"users": 0})
    changed = scenario.model_copy(update={"evaluation": evaluation, "export": export})
    summary = simulate(changed, out=out, command="bench", quiet=True)
    scores = {row: _values(summary, row, seeds) for row in ROWS if row in summary["rows"]}
    privacy = scenario.privacy
    return {
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "trust": privacy.trust,
        "survivors": privacy.survivors,
        "colluders": privacy.colluders,
        "rounds": scenario.federation.rounds,
        "noise_multiplier": summary["privacy"]["noise_multiplier"],
        "certified": summary["privacy"]["epsilon"],
        "test": {row: _spread(values) for row, values in scores.items()},
        "margin": _mean(scores["personal"]) - min(_mean(scores[row]) for row in _RIVALS if row in scores),
        "device_ms_per_client_round": summary["cost"]["device_ms_per_client_round"],
    }


def _values(summary: Mapping[str, Any], row: str, seeds: int) -> list[float]:
    if seeds == 1:
        return [summary["rows"][row]["rmse"]["value"]]
    return list(summary["over_seeds"][row]["rmse"]["values"])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _spread(values: list[float]) -> dict[str, Any]:
    mean = _mean(values)
    squares = sum((value - mean) ** 2 for value in values)
    return {"mean": mean, "sd": (squares / max(len(values) - 1, 1)) ** 0.5, "values": values}


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    rows = [row for row in ROWS if row in measured["cells"][0]["test"]]
    out = [
        f"RMSE on test rows, mean of {measured['seeds']} seeds (sd); margin: personal minus the better rival",
        f"{'epsilon':>8}  {'rounds':>6}  " + "  ".join(f"{row:>16}" for row in rows) + f"  {'margin':>8}",
    ]
    for cell in measured["cells"]:
        words = [f"{cell['test'][row]['mean']:.4f} ({cell['test'][row]['sd']:.4f})" for row in rows]
        out.append(
            f"{cell['epsilon']:>8g}  {cell['rounds']:>6}  "
            + "  ".join(f"{word:>16}" for word in words)
            + f"  {cell['margin']:>+8.4f}"
        )
    return out
