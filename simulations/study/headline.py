"""A paper's claim beside what a study finds: the number it gives, the condition it was had under, and ours."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from pydantic import model_validator

from shared.config import FiniteFloat, Settings
from shared.errors import DataError
from shared.metrics.ratings import Interval
from simulations.report import page
from simulations.report.compare import user_differences
from simulations.report.results import RunFolder

HOLDS, FAILS, OPEN = "holds here", "does not hold here", "undecided here"
_USERS = "users."


class Side(Settings):
    """A number of one point of a study.

    ``of`` is a path into its ``summary.json`` that ends at a number or an interval, such as ``rows.personal.rmse`` or
    ``cost.bytes_up_per_client_round``; or ``users.ROW``, every user's own score.
    """

    point: str
    of: str


class Headline(Settings):
    """One claim of a paper, and the quantity of this study that speaks to it."""

    claim: str
    source: str  # authors, year, title, where
    paper: str  # the paper's number, or its words where it is no number
    condition: str  # under which the paper has it
    here: str  # under which we have it
    quantity: Literal["value", "difference", "ratio"] = "value"  # first; first - second; first / second
    first: Side
    second: Side | None = None
    below: FiniteFloat | None = None  # the claim holds where the whole interval is below
    above: FiniteFloat | None = None

    @model_validator(mode="after")
    def _decides(self) -> Self:
        if (self.quantity == "value") != (self.second is None):
            raise ValueError(f"headline.second is for a difference or a ratio, and needed there: {self.claim!r}.")
        if self.below is None and self.above is None:
            raise ValueError(f"headline.below or headline.above must say when a claim holds: {self.claim!r}.")
        return self


@dataclass(frozen=True)
class Answer:
    """What a study says to a claim; how the interval was made, in words."""

    headline: Headline
    ours: Interval
    made: str

    @property
    def verdict(self) -> str:
        """Whether the claim holds here: by the whole interval, or not at all."""
        low = -math.inf if self.headline.above is None else self.headline.above
        high = math.inf if self.headline.below is None else self.headline.below
        if low < self.ours.low and self.ours.high < high:
            return HOLDS
        if self.ours.high <= low or self.ours.low >= high:
            return FAILS
        return OPEN


def answer(headline: Headline, runs: Mapping[str, Sequence[RunFolder]]) -> Answer:
    """Compute our number for a claim.

    Args:
        headline: What is asked.
        runs: Label of a point -> its finished runs, one a seed.

    Returns:
        The quantity with its interval. A difference of ``users.ROW`` is paired: the mean over users of the difference
        of their own scores, by a bootstrap over users. Any other difference or ratio takes the ends of the two
        intervals that lie farthest apart, which is wider than need be.

    Raises:
        DataError: The study has no such point, or a run no such number; the message says what there is.
    """
    first = _runs(headline.first, runs)
    if headline.second is None:
        return Answer(headline, _mean([_number(run, headline.first.of) for run in first]), "interval of the run")
    second = _runs(headline.second, runs)
    if headline.quantity == "difference" and headline.first.of.startswith(_USERS):
        rows = (headline.first.of.removeprefix(_USERS), headline.second.of.removeprefix(_USERS))
        pairs = _same_seeds(first, second, headline)
        return Answer(headline, _mean([_paired(one, other, rows) for one, other in pairs]), "paired over users")
    a = _mean([_number(run, headline.first.of) for run in first])
    b = _mean([_number(run, headline.second.of) for run in second])
    if headline.quantity == "difference":
        ours = Interval(a.value - b.value, a.low - b.high, a.high - b.low)
    elif b.low > 0 and a.low >= 0:
        ours = Interval(a.value / b.value, a.low / b.high, a.high / b.low)
    else:
        raise DataError(f"{headline.second.of} of {headline.second.point} must be above 0 for a ratio, got {b}.")
    exact = a.low == a.high and b.low == b.high
    return Answer(headline, ours, "counted, without chance" if exact else "farthest ends of two intervals")


def section(answers: Sequence[Answer]) -> Iterator[str]:
    """The answers as HTML, the paper's number beside ours."""
    if not answers:
        return
    yield "<h2>The paper's claim, and what we find</h2>"
    yield (
        "<p>The number of a paper was had on other data, other models and often with many more users. Beside it stands "
        "ours, with its 95 % interval; “holds” and “does not hold” are said where the whole interval says so, about "
        "this study alone.</p>"
    )
    yield page.table(
        "Claims of papers beside this study",
        ["claim", "verdict", "we find", "the paper says", "the paper's condition", "our condition"],
        [
            [
                html.escape(one.headline.claim),
                f"<strong>{one.verdict}</strong>",
                f"{words(one)} <small>{_asked(one.headline)}; {html.escape(one.made)}</small>",
                f"{html.escape(one.headline.paper)} <small>{html.escape(one.headline.source)}</small>",
                html.escape(one.headline.condition),
                html.escape(one.headline.here),
            ]
            for one in answers
        ],
        look="words",
    )


def words(one: Answer) -> str:
    """Our number with its interval, plain text; no interval where nothing was left to chance."""
    sign = "+" if one.headline.quantity == "difference" else ""
    value = f"{one.ours.value:{sign}.4g}"
    if one.ours.low == one.ours.high:
        return value
    return f"{value} [{one.ours.low:{sign}.4g}, {one.ours.high:{sign}.4g}]"


def table(answers: Sequence[Answer]) -> list[list[Any]]:
    """The answers as rows for a CSV file, names first."""
    head = ["claim", "source", "paper", "condition", "here", "quantity", "value", "low", "high", "interval", "verdict"]
    return [
        head,
        *(
            [
                *(one.headline.claim, one.headline.source, one.headline.paper, one.headline.condition),
                *(one.headline.here, html.unescape(_asked(one.headline))),
                *(one.ours.value, one.ours.low, one.ours.high, one.made, one.verdict),
            ]
            for one in answers
        ),
    ]


def _asked(headline: Headline) -> str:
    first = f"{headline.first.of} of {headline.first.point}"
    if headline.second is None:
        return html.escape(first)
    sign = "−" if headline.quantity == "difference" else "÷"
    return html.escape(f"{first} {sign} {headline.second.of} of {headline.second.point}")


def _runs(side: Side, runs: Mapping[str, Sequence[RunFolder]]) -> Sequence[RunFolder]:
    if not runs.get(side.point):
        raise DataError(
            f"a headline must name a point of its study with a finished run, got {side.point!r}; "
            f"there are {', '.join(sorted(name for name, each in runs.items() if each)) or 'none'}."
        )
    return runs[side.point]


def _same_seeds(
    first: Sequence[RunFolder], second: Sequence[RunFolder], headline: Headline
) -> list[tuple[RunFolder, RunFolder]]:
    others = {tuple(run.summary.seeds): run for run in second}
    pairs = [(run, others[seeds]) for run in first if (seeds := tuple(run.summary.seeds)) in others]
    if not pairs:
        raise DataError(
            f"both sides of {headline.claim!r} must have a finished run of one seed, none has. Sweep again."
        )
    return pairs


def _number(run: RunFolder, path: str) -> Interval:
    """The number or interval at a path of ``summary.json``; a row's own scores by ``users.ROW``."""
    if path.startswith(_USERS) and (row := path.removeprefix(_USERS)) in run.users.rows:
        value = float(np.mean(run.users.rows[row]))
        return Interval(value, value, value)
    place: Any = run.summary.model_dump(mode="json")
    parts = path.split(".")
    while parts:
        if not isinstance(place, dict):
            break
        # a name may itself hold a dot: the longest that is there counts
        length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in place), 0)
        if not length:
            there = ", ".join(map(str, place))
            raise DataError(f"{run.path}: summary.json must hold {path}, it has {there:.300} there. Name one of them.")
        place, parts = place[".".join(parts[:length])], parts[length:]
    if isinstance(place, int | float) and not isinstance(place, bool):
        return Interval(float(place), float(place), float(place))
    if isinstance(place, dict) and {"value", "low", "high"} <= place.keys():
        return Interval(float(place["value"]), float(place["low"]), float(place["high"]))
    raise DataError(f"{run.path}: {path} must end at a number or an interval in summary.json, got {place!r:.80}.")


def _paired(run: RunFolder, other: RunFolder, rows: tuple[str, str]) -> Interval:
    mine, theirs = rows
    for where, row in ((run, mine), (other, theirs)):
        if row not in where.users.rows:
            raise DataError(f"{where.path}: user_scores.json must have the row {row}, it has {list(where.users.rows)}.")
    renamed = other.users.model_copy(update={"rows": {mine: other.users.rows[theirs]}})
    found = user_differences(run.users, renamed).get(mine)
    if found is None:
        raise DataError(f"{run.path} and {other.path} must hold the same users to be compared one by one.")
    return found


def _mean(values: Sequence[Interval]) -> Interval:
    """Over the seeds, ends as well."""
    return Interval(*(float(np.mean([getattr(one, end) for one in values])) for end in ("value", "low", "high")))
