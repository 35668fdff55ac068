"""What a run folder holds, read and checked; every key is explained in ``docs/summary.md``."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

import numpy as np
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from shared.errors import DataError
from shared.metrics import Interval

_T = TypeVar("_T")


def _finite(interval: Interval) -> Interval:
    if not np.isfinite([interval.value, interval.low, interval.high]).all():
        raise ValueError("value, low and high must be finite")
    return interval


Scores = dict[str, Annotated[Interval, AfterValidator(_finite)]]


class _Part(BaseModel):
    # A newer writer may add keys: they are kept, and shown where a whole part is shown.
    model_config = ConfigDict(extra="allow", frozen=True)


class Privacy(_Part):
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


class Head(_Part):
    """One exported personal head."""

    user: str
    path: str
    bytes: int
    parity_max_abs: FiniteFloat


class Federation(_Part):
    """How the shared part was trained, and what became of the replies."""

    method: str
    personal_method: str
    rounds: int
    clients: int
    replies: int
    rejected: dict[str, int]


class Data(_Part):
    """The data set and the sizes of its parts, in records."""

    name: str
    users: int
    fit: int
    validation: int
    test: int


class Summary(_Part):
    """``summary.json``."""

    schema_version: Literal[1] = Field(alias="schema")
    scenario: str
    claim: str
    stamps: list[str]
    rows: dict[str, Scores] = Field(min_length=1)
    differences: dict[str, Scores]
    privacy: Privacy
    privacy_linear: Privacy | None = None
    cost: dict[str, FiniteFloat | None]
    cost_linear: dict[str, FiniteFloat | None] | None = None
    heads: list[Head]
    heads_base: dict[str, Any] | None = None
    federation: Federation
    data: Data

    @property
    def private(self) -> bool:
        """Whether every campaign of the run makes a claim."""
        campaigns = (self.privacy, self.privacy_linear)
        return all(part.trust != "none" and part.epsilon is not None for part in campaigns if part)

    def difference(self, row: str, other: str) -> Interval | None:
        """RMSE of ``row`` minus that of ``other``, on paired resamples, where the run recorded it."""
        if (forward := self.differences.get(f"{row} - {other}", {}).get("rmse")) is not None:
            return forward
        if (back := self.differences.get(f"{other} - {row}", {}).get("rmse")) is not None:
            return Interval(-back.value, -back.high, -back.low)
        return None

    @model_validator(mode="after")
    def _rows_have_rmse(self) -> Self:
        missing = [row for row, scores in self.rows.items() if "rmse" not in scores]
        if missing:
            raise ValueError(f"every row must have an rmse, missing in {', '.join(missing)}")
        return self


class Round(_Part):
    """One line of ``metrics.jsonl``."""

    campaign: str
    round: int
    validation_rmse_federated: FiniteFloat | None
    validation_rmse_personal: FiniteFloat | None
    epsilon: FiniteFloat | None
    bytes_up: int
    bytes_down: int
    replies: int
    rejected: dict[str, int]


class Users(_Part):
    """``user_rmse.json``."""

    users: list[str]
    rows: dict[str, list[FiniteFloat]]

    @model_validator(mode="after")
    def _one_value_per_user(self) -> Self:
        wrong = [row for row, values in self.rows.items() if len(values) != len(self.users)]
        if wrong:
            raise ValueError(f"every row must have {len(self.users)} values, one per user, not so: {', '.join(wrong)}")
        return self


class Run(_Part):
    """``run.json``."""

    created: str
    command: str | list[str]
    versions: dict[str, Any]
    seeds: dict[str, Any]
    machine: dict[str, Any]
    commit: str | None


@dataclass(frozen=True)
class RunFolder:
    """The files of one run; ``rounds`` is grouped by campaign, each in ascending order."""

    run: Run
    settings: dict[str, Any]
    rounds: dict[str, list[Round]]
    users: Users
    summary: Summary


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Args:
        folder: As ``sottovoce simulate`` writes it.

    Raises:
        DataError: A file is missing, is no JSON, or lacks a key; the message names file and place.
    """
    if (folder / "scenario.json").is_file() and not (folder / "summary.json").is_file():
        raise DataError(f"{folder / 'summary.json'} must exist, the run is unfinished. Run the scenario again.")
    rounds: dict[str, list[Round]] = {}
    path = folder / "metrics.jsonl"
    for number, text in enumerate(_text(path).splitlines(), start=1):
        if text.strip():
            one = _parse(text, Round, where=f"{path}, line {number}")
            rounds.setdefault(one.campaign, []).append(one)
    if not rounds:
        raise DataError(f"{path} must hold at least one round, got none. Run the scenario again.")
    return RunFolder(
        run=_read(folder / "run.json", Run),
        settings=_read(folder / "scenario.json", dict[str, Any]),
        rounds={name: sorted(each, key=lambda one: one.round) for name, each in rounds.items()},
        users=_read(folder / "user_rmse.json", Users),
        summary=_read(folder / "summary.json", Summary),
    )


def check_summary(summary: Mapping[str, Any]) -> Summary:
    """The typed form of what ``summary.json`` holds.

    Raises:
        DataError: A key is missing or has a wrong value.
    """
    return _checked(dict(summary), Summary, where="summary.json")


def _read(path: Path, kind: type[_T]) -> _T:
    return _parse(_text(path), kind, where=str(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(
            f"{path} must exist, it does not. Name the folder of a finished run, or run the scenario again."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be readable UTF-8 text: {error}. Run the scenario again.") from error


def _parse(text: str, kind: type[_T], *, where: str) -> _T:
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} must be JSON: {error}. Run the scenario again.") from error
    return _checked(value, kind, where=where)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _checked(value: Any, kind: type[_T], *, where: str) -> _T:
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise DataError(f"{where}: {key}: {first['msg']}, got {first['input']!r:.80}.") from error
