"""Fairness: the worst-off users, and gaps between groups of users who opted in to be compared."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.config import Scenario
from shared.datasets import Dataset, UserData
from shared.errors import ScenarioError
from shared.metrics.ratings import Interval, draw_users, interval, worst_decile

MIN_GROUP = 20  # users; fewer are merged into OTHER
OTHER = "small groups together"
ROWS = ("federated", "local", "personal")
_SHUFFLES = 1000

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Grouping:
    """Users who state an attribute, in groups that are large enough to be compared.

    Attributes:
        place: Position of each user's group among ``names`` (U,), -1 for a user who is in none.
        names: Of the groups.
        merged: Values that were merged into ``OTHER``, or left out where they are too few even together.
        silent: How many users do not state the attribute.
    """

    place: npt.NDArray[np.int64]
    names: list[str]
    merged: list[str]
    silent: int


def check_groups(scenario: Scenario, dataset: Dataset) -> None:
    """Raise ``ScenarioError`` where nobody states an attribute that ``evaluation.groups`` names."""
    known = sorted({name for user in dataset.users for name in user.profile})
    for name in scenario.evaluation.groups:
        if name not in known:
            raise ScenarioError(
                f"evaluation.groups must name attributes that users of {dataset.name} state "
                f"({', '.join(known) or 'none'}), got {name!r}."
            )


def group_users(users: Sequence[UserData], attribute: str, *, least: int = MIN_GROUP) -> Grouping:
    """Group users by the value they state of an attribute.

    Args:
        users: The users who are scored.
        attribute: Of their profiles.
        least: Users of a group; smaller ones are merged into ``OTHER``.

    Example:
        >>> people = [UserData(str(n), (), (), (), {"job": job}) for n, job in enumerate("aaabbcddb")]
        >>> found = group_users(people, "job", least=3)
        >>> found.names, found.merged
        (['a', 'b', 'small groups together'], ['c', 'd'])
    """
    stated = [user.profile.get(attribute) for user in users]
    sizes = Counter(value for value in stated if value is not None)
    small = sorted(value for value, size in sizes.items() if size < least)
    names = sorted(set(sizes) - set(small), key=lambda value: (len(value) if value.isdecimal() else 0, value))
    rest = len(names) if sum(sizes[value] for value in small) >= least else -1
    where = {value: place for place, value in enumerate(names)} | dict.fromkeys(small, rest)
    place = np.array([-1 if value is None else where[value] for value in stated], dtype=np.int64)
    return Grouping(place, [*names, *([OTHER] if rest >= 0 else [])], small, stated.count(None))


def measure_fairness(
    scenario: Scenario, dataset: Dataset, scored: npt.NDArray[Any], per_user: Mapping[str, Floats], *, better: str
) -> dict[str, Any]:
    """The worst tenth of users and the gaps between groups, of the rows that stand for a choice a user has.

    Args:
        scenario: Of the run.
        dataset: Of the run.
        scored: Index of every user with a test row.
        per_user: Row -> primary metric of each of them, mean over seeds.
        better: ``less`` or ``more`` of it.

    Returns:
        ``fairness`` of ``summary.json``; see ``docs/summary.md``.
    """
    rows = {name: per_user[name] for name in ROWS if name in per_user}
    draws = draw_users(len(scored), seed=scenario.seed, resamples=scenario.evaluation.bootstrap_resamples)
    sign = 1.0 if better == "less" else -1.0  # the worst tenth is the one of the largest values
    users = [dataset.users[i] for i in scored]
    return {
        "worst_tenth": {name: asdict(_worst(values, draws, sign)) for name, values in rows.items()},
        "groups": {name: _attribute(users, name, rows, draws, scenario.seed) for name in scenario.evaluation.groups},
    }


def _worst(values: Floats, draws: Floats, sign: float) -> Interval:
    return interval(lambda some: sign * worst_decile(sign * values, some), draws)


def _attribute(
    users: Sequence[UserData], name: str, rows: Mapping[str, Floats], draws: Floats, seed: int
) -> dict[str, Any]:
    """Every group of one attribute, and the gap between them."""
    grouping = group_users(users, name)
    member = (grouping.place[:, None] == np.arange(len(grouping.names))).astype(np.float64)  # (U, G)
    return {
        "users": dict(zip(grouping.names, member.sum(axis=0).astype(int).tolist(), strict=True)),
        "merged": grouping.merged,
        "silent": grouping.silent,
        "rows": {row: _compare(values, member, grouping.names, draws, seed) for row, values in rows.items()},
    }


def _compare(values: Floats, member: Floats, names: Sequence[str], draws: Floats, seed: int) -> dict[str, Any]:
    """Mean of each group, the gap between the best and the worst, and the gap that chance alone makes."""

    def means(some: Floats) -> Floats:
        return np.asarray(some @ (member * values[:, None]) / (some @ member))  # (R, G)

    def gap(some: Floats) -> Floats:
        return np.asarray(np.ptp(means(some), axis=1))

    value, (low, high) = means(np.ones((1, len(values))))[0], np.quantile(means(draws), [0.025, 0.975], axis=0)
    compared = len(names) > 1
    return {
        "means": {
            name: {"value": float(value[g]), "low": float(low[g]), "high": float(high[g])}
            for g, name in enumerate(names)
        },
        "gap": asdict(interval(gap, draws)) if compared else None,
        "by_chance": gap_by_chance(values, member, seed=seed) if compared else None,
    }


def gap_by_chance(values: Floats, member: Floats, *, seed: int) -> float:
    """The gap that one in twenty random regroupings of the users exceeds.

    Args:
        values: Of each user (U,).
        member: Whether each user is in each group (U, G).
        seed: Of the regroupings.

    Source:
        A permutation test: Fisher 1935, The Design of Experiments, ch. 3. A bootstrap cannot say this: the largest of
        several means minus the smallest is above zero whether or not the groups differ.
    """
    inside = member.any(axis=1)
    mine, groups = values[inside], member[inside]
    rng = np.random.default_rng(seed)
    shuffled = rng.permuted(np.tile(mine, (_SHUFFLES, 1)), axis=1)  # (R, U)
    return float(np.quantile(np.ptp(shuffled @ groups / groups.sum(axis=0), axis=1), 0.95))
