"""What a study found, as its figures and tables show it: one score a point, a line a method, a curve a cold start."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from shared.metrics.ratings import Interval

ALONE = "no federation"  # the trust of rows that owe nothing to a campaign


@dataclass(frozen=True)
class Group:
    """What a point of a study is filtered and drawn by.

    Attributes:
        label: Name of the point in its study.
        method: How the shared part was trained and what a device added.
        trust: Who is trusted; ``none``: nothing is claimed; ``ALONE``: the row needs no campaign.
        unit: What is hidden; empty where nothing is.
        epsilon: The claim; None where there is none.
    """

    label: str
    method: str
    trust: str
    unit: str
    epsilon: float | None


@dataclass(frozen=True)
class Result:
    """One metric of one row of one point, over its seeds.

    Attributes:
        group: Of the campaign that the row stands for.
        row: As in a run's report.
        metric: Key of the metric.
        score: Mean over the seeds; its ends are those of the intervals over users, averaged over the seeds.
        spread: Least and largest value of a seed.
        seeds: How many there are.
        audit: Largest lower bound on epsilon that an audit of one of its runs gave; None where none was made.
        delta: Of the claim.
        cost: Name of a cost -> mean over the seeds; only costs that were measured.
    """

    group: Group
    row: str
    metric: str
    score: Interval
    spread: tuple[float, float]
    seeds: int
    audit: float | None = None
    delta: float | None = None
    cost: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """A row's score by the number of a user's own records, mean over the seeds of a point."""

    group: Group
    row: str
    who: str
    counts: tuple[int, ...]
    scores: tuple[Interval, ...]


@dataclass(frozen=True)
class Gain:
    """What users gain on the row ``local``: the hundred and one quantiles from the least to the largest.

    Attributes:
        group: Of the row.
        row: Of a run's report.
        quantiles: Above zero the user is better off; each user's mean over the seeds.
        gaining: Share of users above zero.
    """

    group: Group
    row: str
    quantiles: tuple[float, ...]
    gaining: float


@dataclass(frozen=True)
class Found:
    """Everything the figures of a study are drawn from.

    Attributes:
        metric: The primary one.
        less: Metric -> whether less of it is better.
        results: Every score.
        curves: Cold starts, where the runs measured them.
        gains: Of single users.
        gain_metric: What ``gains`` are in.
    """

    metric: str
    less: dict[str, bool]
    results: list[Result]
    curves: list[Curve] = field(default_factory=list)
    gains: list[Gain] = field(default_factory=list)
    gain_metric: str = ""

    @property
    def series(self) -> list[str]:
        """The names of all series in a stable order: colour and marker go by it, whatever is filtered."""
        return list(dict.fromkeys(series_of(result.group) for result in self.results))

    @property
    def rows(self) -> list[str]:
        """Every row that some point has, in the order of the first."""
        return list(dict.fromkeys(result.row for result in self.results))

    def of(self, metric: str, *rows: str) -> list[Result]:
        """The results in one metric, of all rows or of those named."""
        return [one for one in self.results if one.metric == metric and (not rows or one.row in rows)]


def series_of(group: Group) -> str:
    """The series of the frontier that a point lies on, whatever its row.

    Example:
        >>> series_of(Group("a", "ffa-lora + fine-tune", "local", "record", 8.0))
        'ffa-lora + fine-tune, trust local, per record'
        >>> series_of(Group("b", "ffa-lora + fine-tune", "none", "", None))
        'ffa-lora + fine-tune, NOT PRIVATE'
        >>> series_of(Group("b", "", ALONE, "", None))
        'no federation'
    """
    if group.trust == ALONE:
        return ALONE
    if group.trust == "none":
        return f"{group.method}, NOT PRIVATE"
    return f"{group.method}, trust {group.trust}, per {group.unit}"


def pareto(points: Sequence[tuple[float, float]], *, less: bool = True) -> list[int]:
    """Which points no other beats: none costs as little and scores better, or costs less and scores as well.

    Args:
        points: Cost and score of each; finite.
        less: Whether less of the score is better; less of the cost always is.

    Returns:
        Their places, by ascending cost. Of equal points all are among them.

    Example:
        >>> pareto([(3.0, 1.0), (1.0, 2.0), (2.0, 2.0), (4.0, 1.0)])
        [1, 0]
        >>> pareto([(1.0, 0.4), (2.0, 0.5)], less=False)
        [0, 1]
    """
    sign: Callable[[float], float] = (lambda score: score) if less else (lambda score: -score)
    costs = [(cost, sign(score)) for cost, score in points]
    kept = [
        i
        for i, (cost, score) in enumerate(costs)
        if not any((c <= cost and s < score) or (c < cost and s <= score) for c, s in costs)
    ]
    return sorted(kept, key=lambda i: costs[i])
