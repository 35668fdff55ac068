"""What a run folder holds, read and checked; every key is explained in ``docs/summary.md``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self, TypeVar

from pydantic import (
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from shared.errors import DataError
from shared.metrics.ratings import Interval
from simulations.report.parts import AnswerScores, Checked, ColdStart, Fairness, Membership, Part, Poison

_T = TypeVar("_T")


Scores = dict[str, Checked]
SCHEMA = 2


class Privacy(Part):
    """The claim of one campaign; ``epsilon`` is null where there is none."""

    trust: Literal["local", "distributed", "central", "none"]
    unit: str | None
    relation: str | None
    epsilon: FiniteFloat | None
    delta: FiniteFloat | None
    sampling: str | None
    accountant: str | None
    max_participations: int | None
    noise: str | None
    sentence: str


class Head(Part):
    """One exported personal head."""

    user: str
    path: str
    bytes: int
    parity_max_abs: FiniteFloat | None = None


class Federation(Part):
    """How the shared part was trained, and what became of the replies."""

    method: str
    personal_method: str
    rounds: int
    clients: int
    replies: int
    rejected: dict[str, int]


class Data(Part):
    """The data set and the sizes of its parts, in records."""

    name: str
    users: int
    fit: int
    validation: int
    test: int


class Metric(Part):
    """What a metric is, and which of two values is the better one."""

    better: Literal["less", "more"]
    description: str = ""


class OverSeeds(Part):
    """Mean of a metric over the seeds of a run with its 95 % t-interval, and the value of each seed."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    values: list[FiniteFloat] = Field(min_length=2)


class Resumed(Part):
    """Where a run that was interrupted went on."""

    campaign: str
    seed: int
    round: int
    at: str


class Summary(Part):
    """``summary.json``."""

    scenario: str
    task: str
    metric: str
    metrics: dict[str, Metric]
    seeds: list[int] = Field(min_length=1)
    claim: str
    stamps: list[str]
    rows: dict[str, Scores] = Field(min_length=1)
    over_seeds: dict[str, dict[str, OverSeeds]] = Field(default_factory=dict)
    differences: dict[str, Scores]
    resumed: list[Resumed] = Field(default_factory=list)
    privacy: Privacy
    privacy_linear: Privacy | None = None
    privacy_statistics: Privacy | None = None
    cost: dict[str, FiniteFloat | None]
    cost_linear: dict[str, FiniteFloat | None] | None = None
    heads: list[Head]
    heads_base: dict[str, Any] | None = None
    federation: Federation
    data: Data
    membership: Membership | None = None
    poison: Poison | None = None
    cold_start: ColdStart | None = None
    fairness: Fairness | None = None
    answers: AnswerScores | None = None

    @property
    def private(self) -> bool:
        """Whether every campaign of the run makes a claim."""
        campaigns = (self.privacy, self.privacy_linear)
        return all(part.trust != "none" and part.epsilon is not None for part in campaigns if part)

    def claim_of(self, row: str) -> Privacy | None:
        """The claim that covers a row; None for rows that have none: they owe nothing to the federation."""
        if row.startswith("dp-statistics"):
            return self.privacy_statistics
        if not row.startswith(("federated", "persona")):  # personal, and the groups' own outputs
            return None
        return (self.privacy_linear or self.privacy) if row.endswith("-linear") else self.privacy

    def difference(self, row: str, other: str) -> Interval | None:
        """Primary metric of ``row`` minus that of ``other``, on paired resamples, where the run recorded it."""
        if (forward := self.differences.get(f"{row} - {other}", {}).get(self.metric)) is not None:
            return forward
        if (back := self.differences.get(f"{other} - {row}", {}).get(self.metric)) is not None:
            return Interval(-back.value, -back.high, -back.low)
        return None

    def better(self, metric: str, value: float, other: float) -> bool:
        """Whether ``value`` beats ``other``; never, where the run does not say what is better."""
        if metric not in self.metrics:
            return False
        return value < other if self.metrics[metric].better == "less" else value > other

    def less_is_better(self, metric: str) -> bool:
        """Errors are the rule: so it is where the run does not say."""
        return metric not in self.metrics or self.metrics[metric].better == "less"

    def best(self, metric: str) -> float | None:
        """Best value of a metric over the rows; None where the run does not say what is better."""
        values = [scores[metric].value for scores in self.rows.values() if metric in scores]
        if metric not in self.metrics or not values:
            return None
        return min(values) if self.metrics[metric].better == "less" else max(values)

    @model_validator(mode="after")
    def _metric_is_known(self) -> Self:
        if self.metric not in self.metrics:
            raise ValueError(f"metrics must describe the primary metric {self.metric}")
        missing = [row for row, scores in self.rows.items() if self.metric not in scores]
        if missing:
            raise ValueError(f"every row must have the metric {self.metric}, missing in {', '.join(missing)}")
        uneven = [
            f"{row} {metric}"
            for row, scores in self.over_seeds.items()
            for metric, spread in scores.items()
            if len(spread.values) != len(self.seeds)
        ]
        if uneven:
            raise ValueError(f"over_seeds must have {len(self.seeds)} values each, not so: {', '.join(uneven)}")
        return self


class Validation(Part):
    """Primary metric on the validation rows: shared part alone, with the private part; null where not computed."""

    federated: FiniteFloat | None
    personal: FiniteFloat | None


class Round(Part):
    """One line of ``metrics.jsonl``."""

    campaign: str
    seed: int
    round: int
    validation: Validation
    epsilon: FiniteFloat | None
    bytes_up: int
    bytes_down: int
    replies: int
    rejected: dict[str, int]


class Users(Part):
    """``user_scores.json``."""

    metric: str
    users: list[str]
    rows: dict[str, list[FiniteFloat]]

    @model_validator(mode="after")
    def _one_value_per_user(self) -> Self:
        wrong = [row for row, values in self.rows.items() if len(values) != len(self.users)]
        if wrong:
            raise ValueError(f"every row must have {len(self.users)} values, one per user, not so: {', '.join(wrong)}")
        if len(set(self.users)) < len(self.users):
            raise ValueError("users must be told apart by name, some occur twice")
        return self


class Run(Part):
    """``run.json``."""

    created: str
    command: str | list[str]
    versions: dict[str, Any]
    seeds: dict[str, Any]
    machine: dict[str, Any]
    commit: str | None


@dataclass(frozen=True)
class RunFolder:
    """The files of one run; ``rounds`` is campaign -> seed -> rounds in ascending order."""

    path: Path
    run: Run
    settings: dict[str, Any]
    rounds: dict[str, dict[int, list[Round]]]
    users: Users
    summary: Summary


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Args:
        folder: As ``sottovoce simulate`` writes it.

    Raises:
        DataError: A file is missing, is no JSON, lacks a key, or is of another version; the message names
            file and place.
    """
    if (folder / "scenario.json").is_file() and not (folder / "summary.json").is_file():
        raise DataError(f"{folder / 'summary.json'} must exist, the run is unfinished. Run the scenario again.")
    summary = _read_summary(_json(folder / "summary.json"), where=str(folder / "summary.json"))
    return RunFolder(
        path=folder,
        run=_read(folder / "run.json", Run),
        settings=_read(folder / "scenario.json", dict[str, Any]),
        rounds=_read_rounds(folder / "metrics.jsonl"),
        users=_read(folder / "user_scores.json", Users),
        summary=summary,
    )


def check_summary(summary: Mapping[str, Any]) -> Summary:
    """The typed form of what ``summary.json`` holds.

    Raises:
        DataError: A key is missing or has a wrong value.
    """
    return _read_summary(dict(summary), where="summary.json")


def _read_summary(value: Any, *, where: str) -> Summary:
    found = value.get("schema") if isinstance(value, dict) else None
    if found != SCHEMA or isinstance(found, bool):
        raise DataError(
            f"{where}: schema: must be {SCHEMA}, got {found!r:.80}; another version of sottovoce wrote this run. "
            "Run the scenario again."
        )
    return _checked(value, Summary, where=where)


def _read_rounds(path: Path) -> dict[str, dict[int, list[Round]]]:
    rounds: dict[str, dict[int, list[Round]]] = {}
    for number, text in enumerate(_text(path).splitlines(), start=1):
        if text.strip():
            where = f"{path}, line {number}"
            one = _checked(_parse(text, where=where), Round, where=where)
            rounds.setdefault(one.campaign, {}).setdefault(one.seed, []).append(one)
    if not rounds:
        raise DataError(f"{path} must hold at least one round, got none. Run the scenario again.")
    return {
        campaign: {seed: sorted(each, key=lambda one: one.round) for seed, each in seeds.items()}
        for campaign, seeds in rounds.items()
    }


def _read(path: Path, kind: type[_T]) -> _T:
    return _checked(_json(path), kind, where=str(path))


def _json(path: Path) -> Any:
    return _parse(_text(path), where=str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"{path} must exist, it does not. Name the folder of a finished run, or run the scenario again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be readable UTF-8 text: {error}. Run the scenario again.") from error


def _parse(text: str, *, where: str) -> Any:
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} must be JSON: {error}. Run the scenario again.") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _checked(value: Any, kind: type[_T], *, where: str) -> _T:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise DataError(f"{where}: {key}: {first['msg']}, got {first['input']!r:.80}.") from error
