"""From the store of a study to what its figures show: the mean over the seeds of every point, row and metric."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from shared.errors import DataError
from shared.metrics.ratings import Interval
from simulations.membership import UNPROTECTED, UNTRAINED
from simulations.study.points import ALONE, Curve, Found, Gain, Group, Result
from simulations.study.store import SETTING, read_store

STATISTICS = "dp-statistics"
EVERY = "every point"  # label of a row that is the same in all of them
_QUANTILES = np.linspace(0.0, 1.0, 101)
# Settings that a series is named by already, or that say no more than its trust and epsilon do.
_NAMED = ("privacy.", "seed", "federation.method", "personal.method")
_OF_USERS = [
    "point",
    "kind",
    "row",
    "who",
    "metric",
    "better",
    "value",
    "low",
    "high",
    "campaign",
    "method",
    "personal_method",
]
_OF_USERS += ["trust", "unit", "epsilon"]
_Row = dict[str, Any]


def read_found(folder: Path) -> Found:
    """Read everything the figures of a study are drawn from.

    Args:
        folder: Of a study, finished or not; runs that are not finished are not in it.

    Returns:
        What stands in the store on test rows. Trials of a search were scored on validation rows and are left out.

    Raises:
        DataError: There is no store, or no finished run in it.
    """
    table = read_store(folder)
    table = table.filter(pc.and_(pc.equal(table["part"], "test"), pc.is_null(table["trial"])))
    kinds = pa.array(["score", "membership"])
    scores: list[_Row] = table.filter(pc.is_in(table["kind"], value_set=kinds)).to_pylist()
    if not scores:
        raise DataError(f"{folder} must hold a finished run to be reported, there is none. Run the sweep again.")
    primary = next((row["metric"] for row in scores if row["primary"]), scores[0]["metric"])
    less = {row["metric"]: row["better"] != "more" for row in reversed(scores)}
    names = _methods(scores)
    # a row for every user of every run: without the columns nobody asks for
    users: list[_Row] = table.filter(pc.equal(table["kind"], "user")).select(_OF_USERS).to_pylist()
    gain_metric = users[0]["metric"] if users else ""
    return Found(
        metric=primary,
        less=less,
        results=_results(scores, names),
        curves=_curves(table.filter(pc.equal(table["kind"], "cold-start")).to_pylist(), names),
        gains=_gains(users, names, less=not users or users[0]["better"] != "more"),
        gain_metric=gain_metric,
    )


def _methods(scores: Sequence[_Row]) -> dict[str, str]:
    """Point -> its method in words, with every setting that tells points apart which would be one otherwise."""
    main = [row for row in scores if row["campaign"] == "main"]
    own = {row["point"]: row["personal_method"] for row in main if row["personal_method"]}
    words = {row["point"]: " + ".join(filter(None, (row["method"], own.get(row["point"])))) for row in main}
    alike: dict[tuple[Any, ...], dict[str, _Row]] = {}
    for row in main:
        place = (words[row["point"]], row["trust"], row["unit"], _level(row["epsilon"]))
        alike.setdefault(place, {})[row["point"]] = row
    settings = sorted(key for key in scores[0] if key.startswith(SETTING))
    free = [key for key in settings if not key.removeprefix(SETTING).startswith(_NAMED)]
    for points in alike.values():
        differ = _enough(points, [key for key in free if len({row[key] for row in points.values()}) > 1])
        for point, row in points.items():
            said = (f"{key.rpartition('.')[2]} = {_plain(row[key])}" for key in differ)
            words[point] = ", ".join([words[point], *said])
    return words


def _enough(points: Mapping[str, _Row], keys: Sequence[str]) -> list[str]:
    """As few of the settings as tell all points apart that can be; single values before lists and empty words."""
    simple = [key for key in keys if not any(str(row[key]).startswith(("[", '""')) for row in points.values())]
    kept: list[str] = []
    for key in dict.fromkeys([*simple, *keys]):
        if len({tuple(row[each] for each in [*kept, key]) for row in points.values()}) > len(
            {tuple(row[each] for each in kept) for row in points.values()}
        ):
            kept.append(key)
    return kept


def _level(epsilon: float | None) -> str:
    return "none" if epsilon is None else f"{epsilon:.2g}"


def _plain(value: str | None) -> str:
    """A setting as it stands in the store, JSON, without its quotes."""
    found = None if value is None else json.loads(value)
    return found if isinstance(found, str) else json.dumps(found)


def _group(row: _Row, names: Mapping[str, str]) -> Group:
    attacked = row["row"].split()[1] if row["kind"] == "membership" else ""
    if row["campaign"] == "none" or attacked == UNTRAINED:
        return Group(row["point"], "", ALONE, "", None)
    method = names.get(row["point"], row["method"])
    if row["campaign"] == "statistics":
        method = STATISTICS
    elif row["campaign"] == "linear":
        method = f"{method}, linear head"
    claimed = row["trust"] not in (None, "none") and row["epsilon"] is not None and attacked != UNPROTECTED
    if not claimed:
        return Group(row["point"], method, "none", "", None)
    return Group(row["point"], method, row["trust"], row["unit"] or "", row["epsilon"])


def _results(scores: Sequence[_Row], names: Mapping[str, str]) -> list[Result]:
    over_seeds = _by(scores, "point", "row", "metric")
    found = [_result(seeds, names) for seeds in over_seeds.values()]
    alone: dict[tuple[str, str], list[Result]] = {}
    for one in found:
        if one.group.trust == ALONE:
            alone.setdefault((one.row, one.metric), []).append(one)
    # one release of statistics stands beside every campaign of its trust and epsilon
    releases = {
        (replace(one.group, label=""), one.row, one.metric, one.score): one
        for one in reversed(found)
        if one.group.method == STATISTICS
    }
    once = {id(one) for one in releases.values()}
    kept = [one for one in found if one.group.trust != ALONE and (one.group.method != STATISTICS or id(one) in once)]
    for same in alone.values():  # a row without a campaign is as often in the store as there are points
        different: dict[Interval, Result] = {}
        for one in same:
            different.setdefault(one.score, one)
        kept += different.values() if len(different) > 1 else [_with_label(same[0], EVERY)]
    return kept


def _with_label(one: Result, label: str) -> Result:
    return Result(Group(label, "", ALONE, "", None), one.row, one.metric, one.score, one.spread, one.seeds)


def _result(seeds: Sequence[_Row], names: Mapping[str, str]) -> Result:
    first, values = seeds[0], [row["value"] for row in seeds]
    group = _group(first, names)
    audits = [row["audit_epsilon"] for row in seeds if row["audit_epsilon"] is not None]
    # of the campaign that was attacked, which is not what a membership attack trains
    audited = audits and group.epsilon is not None and (first["campaign"], first["kind"]) == ("main", "score")
    return Result(
        group=group,
        row=first["row"],
        metric=first["metric"],
        score=_mean(seeds),
        spread=(min(values), max(values)),
        seeds=len(seeds),
        audit=max(audits) if audited else None,
        delta=first["delta"] if group.epsilon is not None else None,
        cost=_cost(seeds) if first["campaign"] == "main" and first["kind"] == "score" else {},
    )


def _cost(seeds: Sequence[_Row]) -> dict[str, float]:
    """Means over the seeds; a cost that some seed lacks is left out."""
    measured = {name: [row[name] for row in seeds] for name in ("cpu_s", "wall_s", "participations")}
    measured["bytes_per_device"] = [
        (row["bytes_up"] + row["bytes_down"]) / row["clients"]
        if row["clients"] and row["bytes_up"] is not None and row["bytes_down"] is not None
        else None
        for row in seeds
    ]
    return {name: float(np.mean(values)) for name, values in measured.items() if None not in values}


def _mean(rows: Iterable[_Row]) -> Interval:
    """Of values and ends; a number without an interval is its own."""
    laid = [(row["value"], *((row["value"],) * 2 if row["low"] is None else (row["low"], row["high"]))) for row in rows]
    return Interval(*(float(mean) for mean in np.mean(laid, axis=0)))


def _curves(rows: Sequence[_Row], names: Mapping[str, str]) -> list[Curve]:
    found = []
    for (_, row, who), points in _by(rows, "point", "row", "who").items():
        at = _by(points, "at")
        counts = sorted(count for (count,) in at)
        found.append(Curve(_group(points[0], names), row, who, tuple(counts), tuple(_mean(at[(n,)]) for n in counts)))
    alone = [one for one in found if one.group.trust == ALONE]
    different: dict[tuple[Any, ...], Curve] = {}
    for one in alone:
        different.setdefault((one.row, one.who, one.scores), one)
    every = len(different) == len({(one.row, one.who) for one in alone})
    kept = [replace(one, group=replace(one.group, label=EVERY)) if every else one for one in different.values()]
    return [*(one for one in found if one.group.trust != ALONE), *kept]


def _gains(rows: Sequence[_Row], names: Mapping[str, str], *, less: bool) -> list[Gain]:
    sign = 1.0 if less else -1.0
    found = []
    by_point = {
        point: {
            row: {who: _mean(each).value for (who,), each in _by(mine, "who").items()} for (row,), mine in of.items()
        }
        for (point,), of in ((key, _by(mine, "row")) for key, mine in _by(rows, "point").items())
    }
    first = {(row["point"], row["row"]): row for row in reversed(rows)}
    for point, of in by_point.items():
        local = of.get("local", {})
        for row, own in of.items():
            shared = [who for who in own if who in local]
            if not shared or not row.startswith(("personal", "dp-statistics")) or row == "dp-statistics-shared":
                continue
            gain = np.array([sign * (local[who] - own[who]) for who in shared])
            quantiles = tuple(float(value) for value in np.quantile(gain, _QUANTILES))
            found.append(Gain(_group(first[point, row], names), row, quantiles, float(np.mean(gain > 0))))
    return found


def _by(rows: Iterable[_Row], *keys: str) -> dict[tuple[Any, ...], list[_Row]]:
    found: dict[tuple[Any, ...], list[_Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
