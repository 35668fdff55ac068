"""Score a finished run: every row of the table with its intervals, differences, privacy and cost."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from shared.accounting import epsilon_together
from shared.config import Scenario
from shared.datasets import Dataset
from shared.metrics import Interval
from shared.progress import track
from simulations.campaigns import Plan, Result
from simulations.folder import write_json

SCHEMA = 2
_COMPARED = (
    ("personal", "local"),
    ("personal", "federated"),
    ("personal", "pooled"),
    ("federated", "pooled"),
    ("federated", "base"),
    ("personal", "base"),
    ("personal", "personal-linear"),
    ("personal-linear", "local"),
)
Rows = dict[str, Any]  # name -> what the task's observer scores


def score_run(
    scenario: Scenario, dataset: Dataset, results: Sequence[Result], *, out: Path, quiet: bool
) -> dict[str, Any]:
    """Predict and score every row for every seed; also writes the primary metric of every user.

    The only time the test part is read.

    Returns:
        ``summary.json`` without heads; see ``docs/summary.md``.
    """
    main = results[0]
    observer = main.observer
    by_seed = [_rows_of_seed(seed, results, quiet=quiet) for seed in scenario.seeds()]
    names = list(by_seed[0])
    scoring = {"seed": scenario.seed, "resamples": scenario.evaluation.bootstrap_resamples}
    scores = {
        name: [observer.score(rows[name], reference=rows["local"], **scoring) for rows in by_seed] for name in names
    }
    primary = next(iter(observer.metrics))
    differences = {
        f"{a} - {b}": [observer.difference(rows[a], rows[b], **scoring) for rows in by_seed]
        for a, b in _COMPARED
        if a in names and b in names
    }
    per_user = {name: np.mean([observer.per_user(rows[name]) for rows in by_seed], axis=0) for name in names}
    users = [dataset.users[i].user for i in observer.scored_users()]
    write_json(
        out / "user_scores.json",
        {"metric": primary, "users": users, "rows": {name: values.tolist() for name, values in per_user.items()}},
    )
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "scenario": scenario.name,
        "task": scenario.task.name,
        "metric": primary,
        "metrics": {
            name: {"better": each.better, "description": each.description} for name, each in observer.metrics.items()
        },
        "claim": main.plan.claim.sentence(),
        "stamps": [*_stamp_noise(main.plan), "tuning: not covered", *_price_together(results)],
        "seeds": scenario.seeds(),
        "rows": {
            name: {metric: asdict(mean_over_seeds([s[metric] for s in each])) for metric in each[0]}
            for name, each in scores.items()
        },
        "differences": {name: {primary: asdict(mean_over_seeds(each))} for name, each in differences.items()},
        "federation": {
            "method": scenario.federation.method,
            "personal_method": scenario.personal.method,
            "rounds": main.plan.policy.rounds,
            "clients": len(dataset.users),
            "replies": main.last.total.replies,
            "rejected": dict(main.last.total.rejected),
        },
        "data": {
            "name": dataset.name,
            "users": len(dataset.users),
            "fit": sum(len(user.fit) for user in dataset.users),
            "validation": sum(len(user.validation) for user in dataset.users),
            "test": sum(len(user.test) for user in dataset.users),
        },
    }
    if len(by_seed) > 1:
        summary["over_seeds"] = {
            name: {metric: _over_seeds([s[metric].value for s in each]) for metric in each[0]}
            for name, each in scores.items()
        }
    for result in results:
        if result.plan.scenario.seed == scenario.seed:
            suffix = result.plan.suffix.replace("-", "_")
            summary[f"privacy{suffix}"] = _describe_privacy(result.plan)
            summary[f"cost{suffix}"] = dict(result.cost)
    return summary


def _rows_of_seed(seed: int, results: Sequence[Result], *, quiet: bool) -> Rows:
    mine = [result for result in results if result.plan.scenario.seed == seed]
    rows = mine[0].observer.baselines()
    for result in track(mine, description="test rows", unit="campaign", quiet=quiet):
        found = result.observer.federated(result.last.arrays)
        rows |= {name + result.plan.suffix: row for name, row in found.items()}
    return rows


def mean_over_seeds(intervals: Sequence[Interval]) -> Interval:
    """Mean of a statistic over seeds, and of the ends of its interval over users.

    Every seed's bootstrap draws the same users, so the interval of the mean over seeds is at most as wide as this.
    """
    value, low, high = np.mean([[i.value, i.low, i.high] for i in intervals], axis=0)
    return Interval(float(value), float(low), float(high))


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean with Student's 95 % interval: how the number varies when everything that is drawn is drawn anew."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = spread * float(scipy.stats.t.ppf(0.975, len(values) - 1))
    return {"value": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def _stamp_noise(plan: Plan) -> list[str]:
    """Whoever has the run folder can subtract seeded noise."""
    return ["noise: seeded"] if plan.claim.noise == "seeded" else []


def _price_together(results: Sequence[Result]) -> list[str]:
    """Each campaign's claim is its own; whoever ran all of them on the same records would have spent more."""
    policies = [result.plan.policy for result in results]
    if len(policies) < 2 or policies[0].delta is None:
        return []
    together = epsilon_together([policy.mechanism for policy in policies], delta=policies[0].delta)
    names = " and ".join(result.plan.folder for result in results)
    return [f"each campaign is priced alone; {names} on the same records would together spend ε = {together:.2f}"]


def _describe_privacy(plan: Plan) -> dict[str, Any]:
    claim, policy = plan.claim, plan.policy
    return asdict(claim) | {
        "noise_multiplier": policy.noise_multiplier,
        "clip_norm": policy.clip_norm,
        "steps": policy.steps,
        "rounds": policy.rounds,
        "policy_sha256": policy.sha256,
        "sentence": claim.sentence(),
    }
