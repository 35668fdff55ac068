"""Measure the audits: false alarms of every bound, which faults are found at which epsilon, and the time of an audit.

A null run is one whose claim is true. Beside Gaussian noise stands randomised response, which is as bad as its epsilon
and delta allow: there a bound that were too high would be seen at once.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from shared.config import load_scenario
from shared.errors import SottovoceError
from shared.metrics.ratings import Interval
from shared.privacy.mechanisms import AnyMechanism, DistributedMechanism, Mechanism
from shared.progress import progress
from simulations.audit.bounds import Coins, Scores, auc, count_correct, one_run_bound, tpr_at_fpr
from simulations.audit.gaussian import gdp_one_run_bound
from simulations.audit.power import CANARIES, EPSILONS, GUESSES, Bound, noise_for, power_table
from simulations.machine import about, goal, goal_lines, spread

EPSILON, DELTA = 2.0, 1e-5
_ALARMS = 0.08  # of all null runs, where .05 is promised: 16 of 200, which chance exceeds in 2 % of measurements
_SECONDS = 120.0
_TABLES = 5  # power tables, one a seed
_SCENARIO = Path(__file__).parents[1] / "scenarios" / "movielens.toml"
MECHANISMS: dict[str, tuple[AnyMechanism, Bound]] = {
    "full batch": (Mechanism(1.0, 1.0, 1, 1), "one-run"),
    "full batch, gaussian bound": (Mechanism(1.0, 1.0, 1, 1), "gaussian"),
    "sampled, rate .1, 20 steps": (Mechanism(1.0, 0.1, 20, 1), "one-run"),
    "secure sum, 800 shares, 16 rounds": (DistributedMechanism(1.0, 16, 800, 800, 256.0), "one-run"),
}

Draw = Callable[[Coins, np.random.Generator], Scores]


def measure(*, rounds: int = 200, quiet: bool = False) -> dict[str, Any]:
    """Measure everything.

    Args:
        rounds: Null runs of every bound.
        quiet: Show no progress.

    Returns:
        ``false_alarms.<bound and mechanism>``, ``seconds`` and their limits, ``power.<mechanism>.<epsilon>.<fault>``
        (shares of trials, median and range over seeds), machine, versions, commit.

    Raises:
        SottovoceError: An audit cannot be made.
    """
    alarms = dict.fromkeys((*_bounds(), *_INTERVALS), 0)
    with progress(total=rounds, description="bench audits", unit="null run", quiet=quiet) as bar:
        for number in range(rounds):
            generator = np.random.default_rng([20230515, number])
            for name, is_false in {**_bounds(), **_INTERVALS}.items():
                alarms[name] += is_false(generator)
            bar.update(1)
    alarms["one-run, real code"] = real_false_alarms(rounds)
    limit = math.floor(_ALARMS * rounds)
    return {
        "mode": "one thread",
        "rounds": rounds,
        "epsilon": EPSILON,
        "delta": DELTA,
        "canaries": CANARIES,
        "guesses": dict(GUESSES),
        "false_alarms": {name: goal(count, at_most=limit) for name, count in alarms.items()},
        "power": {name: _spread_of_tables(*each) for name, each in MECHANISMS.items()},
        "seconds": {"quick audit of movielens": goal(_audit_seconds(), at_most=_SECONDS)},
        **about("numpy", "scipy", "dp-accounting"),
    }


def response(coins: Coins, generator: np.random.Generator) -> Scores:
    """Randomised response: every coin told truly with chance e^eps / (1 + e^eps), and beyond doubt with delta."""
    truth = np.where(coins, 1.0, -1.0)
    kept = generator.random(coins.shape) < 1 / (1 + math.exp(-EPSILON))
    sure = generator.random(coins.shape) < DELTA
    return np.where(sure, 2 * truth, np.where(kept, truth, -truth))


def gaussian(coins: Coins, generator: np.random.Generator) -> Scores:
    """A release with the noise that epsilon needs."""
    noise = noise_for(Mechanism(1.0, 1.0, 1, 1), epsilon=EPSILON, delta=DELTA)
    return coins + generator.normal(0.0, noise, coins.shape)


def _bounds() -> dict[str, Callable[[np.random.Generator], bool]]:
    """Every bound on every mechanism it is a bound for -> whether it exceeds the true epsilon in one run."""

    def one_run(draw: Draw, bound: Callable[..., float], guesses: int) -> Callable[[np.random.Generator], bool]:
        def run(generator: np.random.Generator) -> bool:
            coins = generator.random(CANARIES) < 0.5
            correct = count_correct(draw(coins, generator), coins, guesses=guesses)
            return bound(canaries=CANARIES, guesses=guesses, correct=correct, delta=DELTA) > EPSILON

        return run

    return {
        "one-run, gaussian noise": one_run(gaussian, one_run_bound, GUESSES["one-run"]),
        "one-run, randomised response": one_run(response, one_run_bound, GUESSES["one-run"]),
        "gaussian, gaussian noise": one_run(gaussian, gdp_one_run_bound, GUESSES["gaussian"]),
    }


def _misses(interval: Interval, true: float) -> bool:
    return not interval.low <= true <= interval.high


_INTERVALS: dict[str, Callable[[np.random.Generator], bool]] = {
    "interval of the AUC, nothing to tell": lambda g: _misses(auc(g.normal(size=300), g.normal(size=500)), 0.5),
    "interval of the AUC, something to tell": lambda g: _misses(
        auc(g.normal(1.0, size=300), g.normal(size=500)), float(stats.norm.cdf(math.sqrt(0.5)))
    ),
    "interval of the TPR at 1 % FPR, nothing to tell": lambda g: _misses(
        tpr_at_fpr(g.normal(size=500), g.normal(size=1000)), 0.01
    ),
}


def real_false_alarms(rounds: int) -> int:
    """Null runs of the record-level campaign of canaries, played over the wire by the real code."""
    from simulations.audit.canary_stand import attack, open_stand  # opens models' libraries: only for those who measure

    scenario = load_scenario(_SCENARIO, (f"privacy.epsilon={EPSILON}",))
    with tempfile.TemporaryDirectory(prefix="sottovoce-bench-") as folder:
        stand = open_stand(scenario, name="null", folder=Path(folder))
        return sum(attack(stand, seed=seed).epsilon_lower > EPSILON for seed in range(rounds))


def _spread_of_tables(mechanism: AnyMechanism, bound: Bound) -> dict[str, Any]:
    """Shares of trials by epsilon and fault, over seeds."""
    tables = [power_table(mechanism, delta=DELTA, bound=bound, seed=100 * seed) for seed in range(_TABLES)]
    return {
        f"{epsilon:g}": {
            fault: spread([table["rows"][i]["found"][fault] for table in tables])
            for fault in tables[0]["rows"][i]["found"]
        }
        for i, epsilon in enumerate(EPSILONS)
    }


def _audit_seconds() -> float:
    """Wall seconds of a quick audit of the shipped scenario, its data fetched before."""
    from simulations.audit.run import run_audit

    started = time.perf_counter()
    audit = run_audit(_SCENARIO, level="quick", seed=0, quiet=True)
    if any(level.passed is None for level in audit.levels.values()):
        raise SottovoceError("a quick audit must have a result on every level, got none on one; run sottovoce audit.")
    return time.perf_counter() - started


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; false alarms in {measured['rounds']} null runs at epsilon {measured['epsilon']:g}:"]
    out += goal_lines(measured["false_alarms"])
    for name, rows in measured["power"].items():
        faults = list(next(iter(rows.values())))
        out += [f"share of runs found, {name}:", f"  {'epsilon':>8}" + "".join(f"{fault:>20}" for fault in faults)]
        out += [
            f"  {epsilon:>8}" + "".join(f"{_cell(row[fault]):>20}" for fault in faults) for epsilon, row in rows.items()
        ]
    return [*out, "wall seconds:", *goal_lines(measured["seconds"])]


def _cell(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
