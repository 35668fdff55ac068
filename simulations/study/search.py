"""A seeded search: which settings to try next, told what the earlier ones scored on validation records alone."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared.errors import DataError, ScenarioError
from shared.privacy.policy import Policy
from shared.protocol.campaign import find_campaign
from simulations.report.results import read_run
from simulations.study.config import Range, Search, Value
from simulations.study.plan import CHOSEN, Run, label_of, make_run
from simulations.study.store import RUNS, is_finished
from simulations.study.tuning import price_of

if TYPE_CHECKING:
    import optuna

    from simulations.study.run import Sweep


def search(sweep: "Sweep") -> dict[str, Any]:
    """Play the trials of a study and then the settings chosen, on test records, with every seed of the study.

    Args:
        sweep: The study; it has a search.

    Returns:
        What was tuned and found: ``settings`` (setting -> where it was looked for), ``row``, ``metric``, ``better``,
        ``part``, ``sampler``, ``seed``, ``trials`` (number, settings, score or null), ``best`` (number of the trial),
        ``chosen`` (its settings) and ``price`` (see ``simulations/study/tuning.py``).

    Raises:
        ScenarioError: A trial's settings make no scenario, or its run has no such row or metric.
        DataError: No trial was finished.

    Guarantee:
        What is tried depends on the study file and on validation scores: on no clock, no number of workers, and on no
        test record. A search that was interrupted goes on as if it had not been.
    """
    import optuna

    asked = sweep.study.search
    if asked is None:
        raise ScenarioError(f"{sweep.file.name} must have a table [search] to be searched.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    less: bool | None = None
    sampler = _sampler(asked)
    told: list[dict[str, Any]] = []
    tried = optuna.create_study(sampler=sampler, direction="minimize")  # of the score, or of its negative
    for first in range(0, asked.trials, asked.at_once):
        numbers = range(first, min(first + asked.at_once, asked.trials))
        trials = [tried.ask(_space(asked)) for _ in numbers]
        runs = [_run(sweep, number, dict(trial.params)) for number, trial in zip(numbers, trials, strict=True)]
        sweep.play(runs)
        for number, trial, run in zip(numbers, trials, runs, strict=True):
            score, less_here = _score(sweep.folder, run, asked)
            less = less_here if less is None else less
            told.append({"trial": number, "settings": dict(trial.params), "score": score})
            if score is None:
                tried.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                tried.tell(trial, score if less_here else -score)
        if len(sweep.failures) >= sweep.study.most_failures:
            break
    scored = [each for each in told if each["score"] is not None]
    if not scored:
        raise DataError("at least one trial of a search must finish, none did; see failures in study.json.")
    best = min(scored, key=lambda each: (each["score"] if less else -each["score"], each["trial"]))
    found: dict[str, Any] = {
        "settings": {key: each.model_dump(mode="json") for key, each in asked.settings.items()},
        "row": asked.row,
        "metric": asked.metric or "the primary one",
        "better": "less" if less else "more",
        "part": "validation",
        "sampler": asked.sampler,
        "seed": asked.seed,
        "trials": told,
        "best": best["trial"],
        "chosen": best["settings"],
    }
    found["price"] = price_of(_policies(sweep, {each["trial"] for each in scored}))
    sweep.tuning = found
    sweep.play([_final(sweep, best["settings"], seed) for seed in sweep.study.seeds])
    return found


def _run(sweep: "Sweep", number: int, settings: Mapping[str, Value]) -> Run:
    asked = sweep.study.search
    seed = sweep.study.seeds[0] if asked is None or asked.run_seed is None else asked.run_seed
    label = f"trial {number}: {label_of(settings)}"
    return make_run(sweep.study, sweep.file, point=label, settings=settings, seed=seed, trial=number)


def _policies(sweep: "Sweep", trials: set[int]) -> list[Policy]:
    """Of the campaigns that finished trials trained, each once, though two trials may be the same run."""
    runs = {run.key: run for run in sweep.runs if run.trial in trials}
    found = []
    for key in runs:
        folder = sweep.folder / RUNS / key
        sha256 = read_run(folder).summary.privacy.model_dump()["policy_sha256"]
        campaign = find_campaign(folder / "campaigns", sha256)
        if campaign is None:
            raise DataError(f"{folder} must hold the campaign it scored, it is gone; remove the folder, run it again.")
        found.append(campaign.policy)
    return found


def _final(sweep: "Sweep", settings: Mapping[str, Value], seed: int) -> Run:
    return make_run(sweep.study, sweep.file, point=CHOSEN, settings=settings, seed=seed)


def _score(folder: Path, run: Run, asked: Search) -> tuple[float | None, bool]:
    """What a trial's run scored on validation records, None where it failed; and whether less of it is better."""
    if not is_finished(folder, run.key):
        return None, True
    summary = read_run(folder / RUNS / run.key).summary
    metric = asked.metric or summary.metric
    if asked.row not in summary.rows or metric not in summary.rows[asked.row]:
        raise ScenarioError(
            f"search.row and search.metric must name a score of the run, got {asked.row!r} and {metric!r}; it has rows "
            f"{', '.join(summary.rows)} and metrics {', '.join(summary.metrics)}."
        )
    value = summary.rows[asked.row][metric].value
    return (value if math.isfinite(value) else None), summary.less_is_better(metric)


def _sampler(asked: Search) -> "optuna.samplers.BaseSampler":
    import optuna

    if asked.sampler == "random":
        return optuna.samplers.RandomSampler(seed=asked.seed)
    return optuna.samplers.TPESampler(
        seed=asked.seed,
        n_startup_trials=max(4, min(10, asked.trials // 3)),
        constant_liar=asked.at_once > 1,
    )


def _space(asked: Search) -> "dict[str, optuna.distributions.BaseDistribution]":
    return {key: _distribution(each) for key, each in asked.settings.items()}


def _distribution(each: Range) -> "optuna.distributions.BaseDistribution":
    import optuna

    if each.low is None or each.high is None:
        return optuna.distributions.CategoricalDistribution(each.choices)
    if each.whole:
        return optuna.distributions.IntDistribution(int(each.low), int(each.high), log=each.log)
    return optuna.distributions.FloatDistribution(float(each.low), float(each.high), log=each.log)
