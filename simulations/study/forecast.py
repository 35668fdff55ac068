"""What a study would play and take, before anything is played: ``sottovoce sweep --dry-run``."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from simulations.study.config import load_study
from simulations.study.plan import Run, make_run, plan_runs
from simulations.study.store import FILE, is_finished, read_store
from simulations.study.table import duration

_AUDIT_S = {"none": 0.0, "quick": 20.0, "full": 120.0}  # of one run with a claim; a rough guess


def forecast(file: Path, *, out: Path, workers: int | None = None) -> dict[str, Any]:
    """The runs of a study, what each claims, and how long those that are not finished may take.

    Args:
        file: The study.
        out: Its folder, whether there is one or not; times of finished runs in it make the forecast better.
        workers: Runs at once; by default one for each processor.

    Returns:
        ``name``, ``runs`` (key, point, seed, trust, unit, epsilon, rounds, finished), ``trials`` (of a search, played
        beside these), ``seconds`` (of all that is not finished, on ``workers``) and ``measured`` (whether by runs of
        this study or by a guess). A trial counts as the mean of the runs, or as the scenario itself.

    Raises:
        ScenarioError: The file is no study, or a point is no scenario.
    """
    study = load_study(file)
    runs = plan_runs(study, file)
    count = workers or os.cpu_count() or 1
    seconds, measured = _seconds_of(runs, out)
    pending = [
        took + (_AUDIT_S[study.audit] if run.scenario.privacy.trust != "none" else 0.0)
        for run, took in zip(runs, seconds, strict=True)
        if not is_finished(out, run.key)
    ]
    trials = study.search.trials if study.search else 0
    if study.search:
        plain = make_run(study, file, point="as it is", settings={}, seed=study.seeds[0], trial=0)
        each = sum(seconds) / len(seconds) if seconds else plain.weight
        pending += [each] * (trials + len(study.seeds))
    return {
        "name": study.name,
        "about": study.about,
        "runs": [
            {
                "key": run.key,
                "point": run.point,
                "seed": run.seed,
                "trust": run.scenario.privacy.trust,
                "unit": run.scenario.privacy.unit if run.scenario.privacy.trust != "none" else None,
                "epsilon": run.scenario.privacy.epsilon if run.scenario.privacy.trust != "none" else None,
                "rounds": run.scenario.federation.rounds,
                "finished": is_finished(out, run.key),
            }
            for run in runs
        ],
        "trials": trials,
        "chosen": len(study.seeds) if study.search else 0,
        "searched": list(study.search.settings) if study.search else [],
        "audit": study.audit,
        "workers": count,
        "seconds": max([sum(pending) / count, *pending]) if pending else 0.0,
        "measured": measured,
    }


def lines(plan: dict[str, Any]) -> list[str]:
    """The same for a reader."""
    runs, trials = plan["runs"], plan["trials"]
    over = sum(run["finished"] for run in runs)
    out = [f"{plan['name']}: {len(runs)} runs" + (f", {over} of them finished" if over else "")]
    if plan["about"]:
        out.append(f"  {plan['about']}")
    wide = max((len(run["point"]) for run in runs), default=0)
    for run in runs:
        claim = f"trust {run['trust']}, ε = {run['epsilon']:g} per {run['unit']}" if run["unit"] else "NOT PRIVATE"
        state = ", finished" if run["finished"] else ""
        out.append(f"  {run['point']:<{wide}}  seed {run['seed']}  {claim}, {run['rounds']} rounds{state}")
    if trials:
        out.append(
            f"  search: {trials} trials over {', '.join(plan['searched'])}, scored on validation records; then the "
            f"settings chosen on test records, {plan['chosen']} runs"
        )
    how = "by finished runs of this study" if plan["measured"] else "a rough guess before the first run is finished"
    if plan["audit"] != "none":
        out.append(f"  every run with a claim is audited ({plan['audit']})")
    out.append(f"time: about {duration(plan['seconds'])} with {plan['workers']} at once ({how})")
    return out


def _seconds_of(runs: Sequence[Run], out: Path) -> tuple[list[float], bool]:
    """Seconds of each run: by those of its study that are finished, else by a guess."""
    known = _measured(out) if (out / FILE).is_file() else {}
    timed = [(known[run.key], run.weight) for run in runs if run.key in known]
    if timed:
        rate = sum(took for took, _ in timed) / sum(weight for _, weight in timed)
        return [known.get(run.key, rate * run.weight) for run in runs], True
    return [run.weight for run in runs], False


def _measured(out: Path) -> dict[str, float]:
    table: pa.Table = read_store(out).select(["run", "wall_s"])
    pairs = table.group_by(["run", "wall_s"]).aggregate([]).to_pylist()
    return {each["run"]: each["wall_s"] for each in pairs if each["wall_s"] is not None}
