"""Run a scenario: campaigns over the inline engine, the rows beside them, personal heads, summary and report.

A run folder holds everything the report is made of; ``docs/summary.md`` describes its files.
"""

import json
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from client.site import resident_base, resident_dataset, use_threads
from shared.accounting import epsilon_together
from shared.adapter import load_start, pooled_features
from shared.assets import resolve
from shared.config import Scenario
from shared.datasets import Dataset
from shared.errors import ScenarioError
from shared.metrics import paired_difference, score_row, user_rmse
from shared.model import Base
from shared.progress import track
from simulations import baselines
from simulations.campaigns import Plan, Result, exported_users, mechanism_of, plan_campaigns, run_campaign

VERSIONS = (
    "sottovoce",
    "flwr",
    "torch",
    "opacus",
    "peft",
    "transformers",
    "dp-accounting",
    "onnxruntime",
    "numpy",
)


def simulate(scenario: Scenario, *, out: Path, command: str = "", quiet: bool = False) -> dict[str, Any]:
    """Run a scenario from its data to its report.

    Args:
        scenario: The settings, from ``load_scenario``.
        out: The run folder; must not exist.
        command: What was typed, for the record.
        quiet: No progress on stderr.

    Returns:
        The content of ``summary.json``.

    Raises:
        SottovoceError: Anything that is the user's to mend; finished rounds stay in the folder.
    """
    started = time.perf_counter()
    _make_folder(out)
    try:
        plans, base, dataset, exported = _prepare(scenario, quiet=quiet)
    except BaseException:
        out.rmdir()  # nothing was written yet
        raise
    _write_json(out / "scenario.json", scenario.model_dump(mode="json"))
    _write_json(out / "run.json", _describe_run(scenario, command))
    results = [run_campaign(plan, base, dataset, out=out, quiet=quiet) for plan in plans]
    predictions = _predict_rows(results, scenario, dataset, quiet=quiet)
    from simulations.heads import export_heads  # onnx is slow to import, and not needed before

    heads = export_heads(results[0], exported, base, dataset, folder=out / "heads", quiet=quiet)
    summary = _summarise(scenario, dataset, results, predictions, out=out, started=started) | heads
    _write_json(out / "summary.json", summary)
    from simulations.report import write_report

    write_report(out)
    return summary


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True)
    except FileExistsError:
        raise ScenarioError(
            f"{out} must be a new folder; it exists. Choose another with --out, or remove it."
        ) from None
    except OSError as error:
        raise ScenarioError(f"{out} must be a folder that can be made: {error.strerror}. Choose another.") from None


def _prepare(scenario: Scenario, *, quiet: bool) -> tuple[list[Plan], Base, Dataset, list[int]]:
    """Everything that can be refused before a run begins."""
    use_threads(scenario.performance.threads)
    for reference in (scenario.data.source, scenario.model.base):
        resolve(reference, quiet=quiet)
    dataset = resident_dataset(scenario.data.format, scenario.data.source)
    base = resident_base(scenario.model.base)
    exported = exported_users(scenario, dataset)
    return plan_campaigns(scenario, base, dataset, quiet=quiet), base, dataset, exported


def _predict_rows(
    results: Sequence[Result], scenario: Scenario, dataset: Dataset, *, quiet: bool
) -> dict[str, np.ndarray]:
    """Test predictions of every row of the table; the only time the test part is read."""
    observer = results[0].observer
    train, test = observer.train, observer.test
    bare = pooled_features_at_start(results[0])
    mean = observer.public_mean()
    low, high = scenario.task.low, scenario.task.high
    rows = {
        "constant": baselines.constant(train, test),
        "user-mean": baselines.user_mean(train, test, centre=scenario.task.centre),
        "pooled": baselines.pooled(bare, train, test, ridge=1.0),
        "local": baselines.local(bare, train, test, mean=mean, users=len(dataset.users), scenario=scenario),
    }
    for result in track(results, description="test rows", unit="campaign", quiet=quiet):
        seen = result.observer.predict(result.arrays, known=train, asked=test)
        rows["federated" + result.plan.suffix] = seen.shared
        rows["personal" + result.plan.suffix] = seen.personal
    return {name: np.clip(row, low, high) for name, row in rows.items()}


def pooled_features_at_start(result: Result) -> np.ndarray:
    """Pooled features (M, d) of every distinct text at the public start, where LoRA changes nothing."""
    head = result.observer.head
    load_start(head, result.plan.start)
    return pooled_features(head, result.plan.texts.all)


def _summarise(
    scenario: Scenario,
    dataset: Dataset,
    results: Sequence[Result],
    predictions: dict[str, np.ndarray],
    *,
    out: Path,
    started: float,
) -> dict[str, Any]:
    """Score every row and put the run's numbers in one place; also writes the RMSE of every user."""
    test = results[0].observer.test
    scoring = {"seed": scenario.seed, "resamples": scenario.evaluation.bootstrap_resamples}
    rows = {
        name: score_row(row, test.target, test.user, reference=predictions["local"], **scoring)
        for name, row in predictions.items()
    }
    wanted = [
        ("personal", "local"),
        ("personal", "federated"),
        ("personal", "pooled"),
        ("federated", "pooled"),
    ]
    wanted += [("personal", "personal-linear"), ("personal-linear", "local")]
    differences = {
        f"{a} - {b}": {
            "rmse": asdict(paired_difference(predictions[a], predictions[b], test.target, test.user, **scoring))
        }
        for a, b in wanted
        if a in predictions and b in predictions
    }
    per_user = {name: user_rmse(row, test.target, test.user).tolist() for name, row in predictions.items()}
    scored = [dataset.users[i].user for i in np.unique(test.user)]
    _write_json(out / "user_rmse.json", {"users": scored, "rows": per_user})
    main = results[0]
    summary: dict[str, Any] = {
        "schema": 1,
        "scenario": scenario.name,
        "claim": main.plan.claim.sentence(),
        "stamps": ["tuning: not covered", *_price_together(results)],
        "rows": {name: {metric: asdict(value) for metric, value in row.items()} for name, row in rows.items()},
        "differences": differences,
        "federation": {
            "method": scenario.federation.method,
            "personal_method": scenario.personal.method,
            "rounds": main.plan.policy.rounds,
            "clients": len(dataset.users),
            "replies": main.replies,
            "rejected": main.rejected,
        },
        "data": {
            "name": dataset.name,
            "users": len(dataset.users),
            "fit": sum(len(user.fit) for user in dataset.users),
            "validation": sum(len(user.validation) for user in dataset.users),
            "test": sum(len(user.test) for user in dataset.users),
        },
    }
    for result in results:
        summary[f"privacy{result.plan.suffix.replace('-', '_')}"] = _describe_privacy(result.plan)
        summary[f"cost{result.plan.suffix.replace('-', '_')}"] = result.cost
    summary["cost"] = main.cost | {"wall_s": time.perf_counter() - started}
    return summary


def _price_together(results: Sequence[Result]) -> list[str]:
    """Each campaign's claim is its own; whoever ran all of them on the same records would have spent more."""
    policies = [result.plan.policy for result in results]
    if len(policies) < 2 or policies[0].delta is None:
        return []
    both = epsilon_together([mechanism_of(policy) for policy in policies], delta=policies[0].delta)
    names = " and ".join(result.plan.name for result in results)
    return [f"each campaign is priced alone; {names} on the same records would together spend ε = {both:.2f}"]


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


def _describe_run(scenario: Scenario, command: str) -> dict[str, Any]:
    return {
        "scenario_name": scenario.name,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "versions": {name: version(name) for name in VERSIONS},
        "seeds": {"scenario": scenario.seed},
        "machine": {
            "cpus": torch.multiprocessing.cpu_count(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "platform": f"{platform.system()} {platform.machine()}",
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of the checkout the code runs from, None where it is none."""
    git = shutil.which("git")
    if git is None:
        return None
    root = Path(__file__).parent.parent
    found = subprocess.run([git, "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
