"""From a study file to its runs: every point with every seed, each keyed by a hash of all its settings."""

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.config import Scenario, load_scenario
from shared.errors import ScenarioError
from simulations.flower_app import find_scenario
from simulations.study.config import Study, Value

CHOSEN = "chosen"  # label of the point that a search ends with
# Where and how fast a run is played, and nothing of what comes out.
_PLACE = {"performance": {"engine", "workers", "ray_address", "threads"}}
# Seconds of one core of the machine of docs/measurements: what every run takes with its scores and its report, and one
# device's round by what a head is made of: an output alone, a block of a small encoder, a block of a language model.
_RUN_S, _OUTPUT_S, _BLOCK_S, _WORDS_S = 10.0, 0.0015, 0.012, 2.5
_WORDS = ("generation", "preference")
_WORKER = ("performance.engine=inline", "performance.threads=1")  # the runs are played beside each other


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        key: Hash of its scenario and audit; name of its folder.
        point: Label of its settings, the same for all seeds.
        scenario: Resolved, with one seed.
        settings: Setting that differs within the study -> its value here.
        trial: Number of the trial it is of; None outside a search.
    """

    key: str
    point: str
    scenario: Scenario
    settings: Mapping[str, Value] = field(hash=False)
    trial: int | None = None

    @property
    def seed(self) -> int:
        """Of everything that is drawn."""
        return self.scenario.seed

    @property
    def weight(self) -> float:
        """Seconds it may take on one core, a guess by its rounds, its cohort and its head; twice where it is attacked.

        Good for how long runs of one study take beside each other; how long they take is known when one is finished.
        """
        scenario, cohort = self.scenario, self.scenario.federation.cohort_size
        blocks = _WORDS_S if scenario.task.name in _WORDS else _BLOCK_S
        each = (blocks if scenario.model.head_blocks else _OUTPUT_S) + (_OUTPUT_S if scenario.linear.enabled else 0.0)
        seconds = _RUN_S + each * scenario.federation.rounds * (1000 if cohort == "all" else cohort)
        return seconds * (2 if scenario.attack.membership else 1)


def plan_runs(study: Study, path: Path) -> list[Run]:
    """All runs of the grid and the points, in their order, the seeds of a point one after the other.

    Args:
        study: As read from ``path``.
        path: Of the study file; the scenario lies beside it, or is a shipped one.

    Raises:
        ScenarioError: A point is no scenario, two points have the same settings, or the ends of what a search looks
            through are no scenario; the message names them.
    """
    if study.search:
        for last in (False, True):
            ends = {key: each.end(last=last) for key, each in study.search.settings.items()}
            make_run(study, path, point=f"search, {label_of(ends)}", settings=ends, seed=study.seeds[0], trial=0)
    runs: list[Run] = []
    for label, settings in _points(study):
        for seed in study.seeds:
            runs.append(make_run(study, path, point=label, settings=settings, seed=seed))
    labels: dict[str, str] = {}
    for run in runs:
        if run.key in labels:
            raise ScenarioError(
                f"{path.name}: every point must have settings of its own, {labels[run.key]!r} and {run.point!r} have "
                "the same; leave one out."
            )
        labels[run.key] = run.point
    return runs


def make_run(
    study: Study,
    path: Path,
    *,
    point: str,
    settings: Mapping[str, Value],
    seed: int,
    trial: int | None = None,
) -> Run:
    """One run: the study's scenario with its settings and those of the point, of one seed.

    A trial is scored on validation records; every other run on test records.

    Raises:
        ScenarioError: The settings make no scenario; the message names the point.
    """
    scored = "test" if trial is None else "validation"
    laid = {"export.users": 0, **study.settings, **settings}  # no heads, unless the study wants them
    overrides = [f"{key}={json.dumps(value)}" for key, value in laid.items()]
    overrides += [f"seed={seed}", "evaluation.seeds=1", f"data.scored={scored}", *_WORKER]
    try:
        scenario = load_scenario(scenario_path(study, path), tuple(overrides))
    except ScenarioError as error:
        raise ScenarioError(f"{path.name}: point {point!r}: {error}") from None
    return Run(_key(scenario, study.audit), point, scenario, settings, trial)


def scenario_path(study: Study, path: Path) -> Path:
    """The scenario file of a study: beside its own file, or a shipped one by its name."""
    beside = path.parent / study.scenario
    return beside if beside.is_file() else find_scenario(study.scenario)


def varied(study: Study) -> list[str]:
    """The settings that differ within a study, in the order of its file."""
    keys = [*study.grid, *(key for point in study.points for key in point.settings)]
    return list(dict.fromkeys([*keys, *(study.search.settings if study.search else ())]))


def settings_of(run: Run, keys: Sequence[str]) -> dict[str, Any]:
    """What the settings that differ within a study are in one run, whether its point names them or not."""
    found = {}
    for key in keys:
        place: Any = run.scenario.model_dump(mode="json")
        for part in key.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        found[key] = place
    return found


def label_of(settings: Mapping[str, Value]) -> str:
    """A point of a grid in words: the last part of each name, with its table where two would read the same.

    Example:
        >>> label_of({"privacy.epsilon": 1.0, "federation.method": "fedavg"})
        'epsilon=1, method=fedavg'
        >>> label_of({"personal.method": "ditto", "federation.method": "fedavg"})
        'personal.method=ditto, federation.method=fedavg'
    """
    last = [key.rpartition(".")[2] for key in settings]
    names = [key if last.count(short) > 1 else short for key, short in zip(settings, last, strict=True)]
    return ", ".join(f"{name}={_word(value)}" for name, value in zip(names, settings.values(), strict=True))


def _points(study: Study) -> Iterator[tuple[str, dict[str, Value]]]:
    if study.grid:
        for values in itertools.product(*study.grid.values()):
            settings = dict(zip(study.grid, values, strict=True))
            yield label_of(settings), settings
    for point in study.points:
        yield point.label, dict(point.settings)


def _key(scenario: Scenario, audit: str) -> str:
    """Equal for two runs that come out the same, whatever study they are of."""
    content = {"scenario": scenario.model_dump(mode="json", exclude=_PLACE), "audit": audit}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _word(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:g}"
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)
