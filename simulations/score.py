"""Score a finished run: every row of the table with its intervals, differences, privacy and cost."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from shared.config import Scenario
from shared.datasets import Dataset
from shared.metrics.ratings import Interval
from shared.privacy.accounting import epsilon_together
from shared.progress import track
from simulations.campaigns import Plan, Result
from simulations.fairness import measure_fairness
from simulations.folder import write_json
from simulations.lamp import write_predictions
from simulations.observe.dp_statistics import Promise, promise, sensitivity
from simulations.observe.ranking import RankingObserver

SCHEMA = 2
_COMPARED = (
    ("personal", "local"),
    ("personal", "federated"),
    ("personal", "personal of another"),
    ("personal", "pooled"),
    ("personal", "persona"),
    ("persona", "federated"),
    ("persona", "pooled"),
    ("persona", "local"),
    ("federated", "pooled"),
    ("federated", "base"),
    ("personal", "base"),
    ("personal", "personal-linear"),
    ("personal-linear", "local"),
    ("personal", "dp-statistics"),
    ("federated", "popularity"),
    ("personal", "popularity + profile"),
    ("popularity + profile", "popularity"),
    ("personal-linear", "dp-statistics"),
    ("base + profile", "base"),
    ("federated + profile", "federated"),
    ("personal + profile", "personal"),
    ("personal + profile", "base + profile"),
    ("personal + profile", "base"),
)
_TUNING = {
    "all": "tuning: not covered",
    "tuning": "tuning run: these users take part in no campaign",
    "campaign": "tuning: constants chosen on users outside the campaign, as the scenario states",
}
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
    primary, described = next(iter(observer.metrics.items()))
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
    write_predictions(scenario, dataset, by_seed[0]["personal"], folder=out)
    released = None
    if "dp-statistics" in names:
        released = promise(scenario.privacy, texts=len(dataset.public_texts), users=len(dataset.users))
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "scenario": scenario.name,
        "task": scenario.task.name,
        "metric": primary,
        "metrics": {
            name: {"better": each.better, "description": each.description} for name, each in observer.metrics.items()
        },
        "claim": main.plan.claim.sentence(),
        "stamps": [
            *_stamp_noise(main.plan),
            *_stamp_masks(main.plan),
            _TUNING[scenario.data.users],
            *_stamp_part(scenario),
            *_stamp_attack(scenario),
            *_stamp_poison(scenario),
            *_price_together(results, released),
        ],
        "seeds": scenario.seeds(),
        "rows": {
            name: {metric: asdict(mean_over_seeds([s[metric] for s in each])) for metric in each[0]}
            for name, each in scores.items()
        },
        "differences": {name: {primary: asdict(mean_over_seeds(each))} for name, each in differences.items()},
        "fairness": measure_fairness(scenario, dataset, observer.scored_users(), per_user, better=described.better),
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
    if isinstance(observer, RankingObserver):
        each = [{name: observer.exposure(row) for name, row in rows.items()} for rows in by_seed]
        summary["exposure"] = {name: _mean_of([found[name] for found in each]) for name in names}
    if released:
        summary["privacy_statistics"] = _describe_release(released, clip_norm=_bound_of_release(scenario))
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


def _mean_of(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([each[name] for each in found])) for name in found[0]}


def _over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Mean with Student's 95 % interval: how the number varies when everything that is drawn is drawn anew."""
    mean, spread = float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5
    half = spread * float(scipy.stats.t.ppf(0.975, len(values) - 1))
    return {"value": mean, "low": mean - half, "high": mean + half, "values": list(values)}


def _stamp_noise(plan: Plan) -> list[str]:
    """Whoever has the run folder can subtract seeded noise."""
    return ["noise: seeded"] if plan.claim.noise == "seeded" else []


def _stamp_masks(plan: Plan) -> list[str]:
    """A deployment never leaves them out, and a simulation's sum is the same without."""
    if plan.policy.secure_sum is None or plan.scenario.performance.secure_sum == "masked":
        return []
    return ["secure sum: masks left out; bytes are without its messages"]


def _stamp_part(scenario: Scenario) -> list[str]:
    """The scores are there to choose by."""
    if scenario.data.scored == "test":
        return []
    return ["scored on validation records, for choosing constants: no result; the test records were dropped"]


def _stamp_attack(scenario: Scenario) -> list[str]:
    """The scores are those of a run with fewer records."""
    share = scenario.attack.held_out
    return [f"membership attack: {100 * share:g} % of every user's fit records held out, for nobody"] if share else []


def _stamp_poison(scenario: Scenario) -> list[str]:
    """The scores are those of a campaign under attack."""
    poison = scenario.poison
    return [f"liars: {100 * poison.share:g} % of the devices ({poison.kind})"] if poison.enabled else []


def _price_together(results: Sequence[Result], released: Promise | None) -> list[str]:
    """Each claim is its campaign's or release's own; whoever ran all on the same data would have spent more."""
    spent = [(result.plan.folder, result.plan.policy.mechanism) for result in results if result.plan.policy.delta]
    if released and released.mechanism:
        seeds = dict.fromkeys(result.plan.scenario.seed for result in results)
        names = (f"dp-statistics-seed-{seed}" if len(seeds) > 1 else "dp-statistics" for seed in seeds)
        spent += [(name, released.mechanism) for name in names]
    policy = results[0].plan.policy
    if len(spent) < 2 or policy.delta is None:
        return []
    together = epsilon_together([mechanism for _, mechanism in spent], delta=policy.delta)
    everything = " and ".join(name for name, _ in spent)
    return [f"each is priced alone; {everything} on the same {policy.unit}s would together spend ε = {together:.2f}"]


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


def _bound_of_release(scenario: Scenario) -> float:
    """Norm of a contribution: of ratings with their counts, or of likes."""
    return sensitivity(scenario.statistics) if scenario.task.name == "rating" else 1.0


def _describe_release(released: Promise, *, clip_norm: float) -> dict[str, Any]:
    private = released.mechanism
    return asdict(released.claim) | {
        "noise_multiplier": private.noise_multiplier if private else 0.0,
        "clip_norm": clip_norm if private else None,
        "steps": 1,
        "rounds": 1,
        "sentence": released.claim.sentence(),
    }
