"""The figures of a study for a paper: PNG and SVG by matplotlib, and as CSV the numbers that are drawn."""

import csv
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from shared.metrics.ratings import Interval
from simulations.report.page import PERCENT, heading
from simulations.study.points import ALONE, Found, Group, Result, pareto, series_of

# Okabe & Ito's palette, darkened as in the reports. No series is told by its colour alone: marker and colour together
# repeat after fifty-two of them.
COLOURS = ("#0072b2", "#c75000", "#00795a", "#8a4a78")
MARKERS = ("o", "D", "s", "^", "P", "X", "v", "*", "<", "p", "h", ">", "d")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
PANELS = {  # rows that one panel shows side by side, and what they have in common
    "the shared part": ("federated", "dp-statistics-shared", "persona"),
    "with a private part": ("personal", "dp-statistics"),
}
COSTS = {
    "communication": ("bytes_per_device", "bytes to and from a device, whole campaign"),
    "cpu": ("cpu_s", "CPU-seconds of the whole simulation"),
}
_STYLE: Any = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d8dee4",
    "grid.linewidth": 0.6,
    "lines.markersize": 4.5,
    "lines.linewidth": 1.3,
    "svg.hashsalt": "sottovoce",  # the same numbers give the same file
    "savefig.dpi": 200,
}
_WIDTH, _HEIGHT = 6.8, 2.7  # inches, the height without a legend: two columns of most proceedings
_Table = list[list[Any]]


def write_figures(found: Found, folder: Path) -> list[Path]:
    """Draw every figure that a study has the numbers for.

    Args:
        found: What the study found.
        folder: Where the files go; those of the same name are replaced.

    Returns:
        The files: ``frontier``, ``cold-start``, ``gain``, ``communication`` and ``cpu``, each as ``.png``, ``.svg`` and
        ``.csv``. A figure without a number is not drawn, and what an older report left of it is removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Callable[[Found], tuple[Figure, _Table] | None]] = {
        "frontier": frontier,
        "cold-start": cold_start,
        "gain": gain,
        "communication": lambda one: front(one, "communication"),
        "cpu": lambda one: front(one, "cpu"),
    }
    files = []
    for name, draw in drawn.items():
        for ending in ("png", "svg", "csv"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
        with mpl.rc_context(_STYLE):
            if (made := draw(found)) is None:
                continue
            figure, table = made
            for ending, notes in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
                figure.savefig(folder / f"{name}.{ending}", bbox_inches="tight", metadata=notes)
                files.append(folder / f"{name}.{ending}")
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(table)
        files.append(folder / f"{name}.csv")
    return files


def frontier(found: Found) -> tuple[Figure, _Table] | None:
    """Privacy and utility: epsilon on x, up to none at all, the primary metric on y, and what audits found.

    An audit's lower bound is an open marker at that epsilon, joined to the claim it is of by a dotted line.
    """
    claimed = [one for one in found.of(found.metric) if one.group.trust != ALONE]
    panels = {title: [one for one in claimed if one.row in rows] for title, rows in PANELS.items()}
    panels = {title: mine for title, mine in panels.items() if mine}
    if not panels:
        return None
    figure, axes = _axes(len(panels))
    for axis, (title, mine) in zip(axes, panels.items(), strict=True):
        place = _epsilon_axis(axis, mine)
        for (series, row), line in _by_line(mine).items():
            look = _look(found, series, row)
            xs = [place(one.group.epsilon) for one in line]
            _interval_line(axis, xs, [one.score for one in line], look)
            for one, x in zip(line, xs, strict=True):
                if one.audit is not None and one.group.epsilon is not None:
                    bound = place(max(one.audit, 1e-12))
                    axis.plot([bound, x], [one.score.value] * 2, ":", color=look["color"], linewidth=0.9)
                    axis.plot([bound], [one.score.value], look["marker"], color=look["color"], fillstyle="none")
        _reference(axis, found)
        axis.set_title(title)
        axis.set_xlabel("ε (less is more private)")
    axes[0].set_ylabel(_label(found.metric, found))
    audited = any(one.audit is not None for mine in panels.values() for one in mine)
    _legend(figure, axes, note="open: lower bound on ε by an audit" if audited else "")
    head = ["row", "series", "point", "epsilon", "delta", "audit_lower_bound", "value", "low", "high", "seeds"]
    rows = [
        [
            one.row,
            series_of(one.group),
            one.group.label,
            "none" if one.group.epsilon is None else one.group.epsilon,
            _blank(one.delta),
            _blank(one.audit),
            *(one.score.value, one.score.low, one.score.high, one.seeds),
        ]
        for mine in panels.values()
        for one in mine
    ]
    return figure, [head, *rows]


def _best_claims(groups: Iterable[Group]) -> list[str]:
    """The labels that stand for their series where every point would be too many: those of its largest epsilon."""
    kept: dict[str, Group] = {}
    for group in groups:
        other = kept.setdefault(series_of(group), group)
        if (group.epsilon or 0.0) > (other.epsilon or 0.0):
            kept[series_of(group)] = group
    return [group.label for group in kept.values()]


def cold_start(found: Found) -> tuple[Figure, _Table] | None:
    """The score of ``personal`` by the number of a user's own records: of each series the point that claims least."""
    curves = [curve for curve in found.curves if curve.row == "personal"]
    labels = _best_claims(curve.group for curve in curves)
    curves = [curve for curve in curves if curve.group.label in labels]
    whose = list(dict.fromkeys(curve.who for curve in curves))
    if not curves:
        return None
    figure, axes = _axes(len(whose))
    for axis, who in zip(axes, whose, strict=True):
        for curve in (curve for curve in curves if curve.who == who):
            look = _numbered(labels.index(curve.group.label)) | {"label": curve.group.label}
            _interval_line(axis, list(range(len(curve.counts))), list(curve.scores), look)
            axis.set_xticks(range(len(curve.counts)), [f"{count}" for count in curve.counts])
        axis.set_title({"participants": "users who took part", "set_aside": "users nobody trained on"}.get(who, who))
        axis.set_xlabel("a user's own records")
    axes[0].set_ylabel(_label(found.metric, found))
    _legend(figure, axes)
    head = ["point", "users", "row", "records", "value", "low", "high"]
    rows = [
        [curve.group.label, curve.who, curve.row, count, score.value, score.low, score.high]
        for curve in found.curves
        for count, score in zip(curve.counts, curve.scores, strict=True)
    ]
    return figure, [head, *rows]


def gain(found: Found) -> tuple[Figure, _Table] | None:
    """What users gain on ``local``: the share of them that gain at most so much, of each series one point."""
    gains = [one for one in found.gains if one.row == "personal"]
    labels = _best_claims(one.group for one in gains)
    gains = [one for one in gains if one.group.label in labels]
    if not gains:
        return None
    figure, (axis,) = _axes(1)
    for number, one in enumerate(gains):
        look = _numbered(number) | {"label": f"{one.group.label}: {100 * one.gaining:.0f} % gain", "markevery": 20}
        axis.plot(one.quantiles, [i / (len(one.quantiles) - 1) for i in range(len(one.quantiles))], **look)
    axis.axvline(0, color="#1b1f24", linewidth=0.9)
    axis.set_xlabel(f"{heading(found.gain_metric)} gained over local (right of 0: better off)")
    axis.set_ylabel("share of users at or below")
    _legend(figure, [axis])
    head = ["point", "row", "quantile", "gain"]
    rows = [
        [one.group.label, one.row, i / (len(one.quantiles) - 1), value]
        for one in found.gains
        for i, value in enumerate(one.quantiles)
    ]
    return figure, [head, *rows]


def front(found: Found, name: str) -> tuple[Figure, _Table] | None:
    """The primary metric of the row ``personal`` against a cost, with the Pareto front: what nothing else beats.

    What makes no privacy claim is drawn and is no rival of what does.
    """
    key, words = COSTS[name]
    row = "personal" if "personal" in found.rows else "federated"
    points = [one for one in found.of(found.metric, row) if key in one.cost and one.group.trust != ALONE]
    if not points:
        return None
    rivals = [i for i, one in enumerate(points) if one.group.trust != "none"] or list(range(len(points)))
    costs = [(points[i].cost[key], points[i].score.value) for i in rivals]
    best = [rivals[i] for i in pareto(costs, less=found.less[found.metric])]
    figure, (axis,) = _axes(1)
    axis.step(
        [points[i].cost[key] for i in best],
        [points[i].score.value for i in best],
        where="post",
        color="#57606a",
        linewidth=1.0,
        label="Pareto front",
    )
    for (series, one_row), line in _by_line(points).items():
        look = _look(found, series, one_row) | {"linestyle": "none"}
        for one in line:
            bars = [[one.score.value - one.score.low], [one.score.high - one.score.value]]
            filled = any(points[i] is one for i in best)
            axis.errorbar(
                [one.cost[key]],
                [one.score.value],
                yerr=bars,
                elinewidth=0.7,
                **look | {"fillstyle": "full" if filled else "none"},
            )
    for i in best:
        epsilon = points[i].group.epsilon
        words_of = "no ε" if epsilon is None else f"ε = {epsilon:.2g}"
        at = (points[i].cost[key], points[i].score.value)
        axis.annotate(words_of, at, xytext=(5, -9), textcoords="offset points", fontsize=7)
    spent = [one.cost[key] for one in points]
    if min(spent) > 0 and max(spent) >= 10 * min(spent):
        axis.set_xscale("log")
    else:
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel(words)
    axis.set_ylabel(_label(found.metric, found))
    _legend(figure, [axis], note="filled: on the front, of what makes a claim")
    head = ["point", "series", "row", "epsilon", key, "value", "low", "high", "on_front"]
    rows = [
        [
            *(one.group.label, series_of(one.group), one.row),
            "none" if one.group.epsilon is None else one.group.epsilon,
            *(one.cost[key], one.score.value, one.score.low, one.score.high, number in best),
        ]
        for number, one in enumerate(points)
    ]
    return figure, [head, *rows]


def _axes(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH if count > 1 else 0.68 * _WIDTH, _HEIGHT), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _by_line(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Series and row -> its points by ascending epsilon."""
    lines: dict[tuple[str, str], list[Result]] = {}
    for one in sorted(results, key=lambda one: float("inf") if one.group.epsilon is None else one.group.epsilon):
        lines.setdefault((series_of(one.group), one.row), []).append(one)
    return lines


def _epsilon_axis(axis: Axes, results: Sequence[Result]) -> Callable[[float | None], float]:
    """A logarithmic axis with a place for 'none' at its right end; returns where an epsilon stands."""
    claimed = [one.group.epsilon for one in results if one.group.epsilon is not None] or [1.0]
    bounds = [one.audit for one in results if one.audit]
    least, most = min([*claimed, *bounds]), max(claimed)
    left, none = max(least, min(claimed) / 20) / 1.4, 2.2 * most
    axis.set_xscale("log")
    axis.set_xlim(left / 1.15, 1.4 * (none if any(one.group.epsilon is None for one in results) else most))
    ticks = {epsilon: word for word, epsilon in {f"{epsilon:.2g}": epsilon for epsilon in sorted(claimed)}.items()}
    if any(one.group.epsilon is None for one in results):
        ticks[none] = "none"
        axis.axvline((most * none) ** 0.5, color="#57606a", linewidth=0.6, linestyle=(0, (2, 3)))
    axis.set_xticks(list(ticks), list(ticks.values()))
    axis.set_xticks([], minor=True)
    return lambda epsilon: none if epsilon is None else max(epsilon, left)


def _interval_line(axis: Axes, xs: Sequence[float], scores: Sequence[Interval], look: dict[str, Any]) -> None:
    """A line with its band; a point alone has bars."""
    values = [score.value for score in scores]
    if len(xs) > 1:
        axis.fill_between(
            xs, [s.low for s in scores], [s.high for s in scores], color=look["color"], alpha=0.13, linewidth=0
        )
        axis.plot(xs, values, **look)
        return
    bars = [[s.value - s.low for s in scores], [s.high - s.value for s in scores]]
    axis.errorbar(xs, values, yerr=bars, elinewidth=0.8, capsize=2, **look)


def _reference(axis: Axes, found: Found) -> None:
    """Where the row ``local`` stands, which needs no federation: a line for each private method, the first four."""
    alone = found.of(found.metric, "local")
    for number, one in enumerate(alone[: len(DASHES)]):
        name = "local: alone" if len(alone) == 1 else f"local, as in {one.group.label}"
        axis.axhline(one.score.value, color="#57606a", linewidth=0.9, linestyle=DASHES[number - 3], label=name)


def _look(found: Found, series: str, row: str) -> dict[str, Any]:
    """Colour and marker by the series; the dash tells the second and third row of a panel from its first."""
    rows = next((rows for rows in PANELS.values() if row in rows), (row,))
    look = _numbered(found.series.index(series))
    if rows.index(row) and not series.startswith(row):
        look["linestyle"] = DASHES[1 + rows.index(row) % 3]
    return look | {"label": series if series.startswith("dp-statistics") or not rows.index(row) else f"{row}: {series}"}


def _numbered(number: int) -> dict[str, Any]:
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": DASHES[number // len(COLOURS) % len(DASHES)],
    }


def _legend(figure: Figure, axes: Sequence[Axes], *, note: str = "") -> None:
    """Below the axes, each name once; the figure grows by it."""
    named = {name: handle for axis in axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    if note:
        look: Any = {"fillstyle": "none", "linestyle": ":"} if note.startswith("open") else {"linestyle": "none"}
        named[note] = Line2D([], [], color="#57606a", marker="o", **look)
    columns = 1 if max(map(len, named)) > 56 or len(axes) == 1 else 2
    figure.set_figheight(_HEIGHT + 0.17 * -(-len(named) // columns))
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns, frameon=False)


def _label(metric: str, found: Found) -> str:
    share = ", share" if metric in PERCENT else ""
    return f"{heading(metric)}{share} ({'less' if found.less[metric] else 'more'} is better)"


def _blank(value: float | None) -> float | str:
    return "" if value is None else value
