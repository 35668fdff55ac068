"""The plots of a report: by round, by user, and of several runs side by side."""

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from shared.metrics.ratings import Interval
from simulations.report.page import Figure, details, heading, plot, table
from simulations.report.results import Round, Users


@dataclass(frozen=True)
class _Curve:
    """One quantity by round: the mean over the seeds of a run, and their range."""

    x: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]

    @property
    def last(self) -> str:
        """Its last value, in words."""
        ends = f" [{self.low[-1]:,.3f} to {self.high[-1]:,.3f}]" if self.low[-1] < self.high[-1] else ""
        return f"{self.mean[-1]:,.3f}{ends}"


def by_round(campaigns: dict[str, dict[int, list[Round]]], *, metric: str) -> tuple[dict[str, Figure], list[str]]:
    """Validation score, ε and bytes by round.

    Args:
        campaigns: Name -> seed -> its rounds, ascending.
        metric: Key of the metric that the validation rows were scored by.

    Returns:
        Figure by the id of its place, and the places as HTML, each with what is to be seen in words.
    """
    data: dict[str, list[Figure]] = {"error": [], "epsilon": [], "wire": []}
    seen: dict[str, list[str]] = {"error": [], "epsilon": [], "wire": []}
    for colour, (campaign, seeds) in enumerate(campaigns.items()):
        parts: dict[str, Callable[[Round], float | None]] = {
            f"{campaign}, shared and private": lambda one: one.validation.personal,
            f"{campaign}, shared alone": lambda one: one.validation.federated,
        }
        for second, (name, pick) in enumerate(parts.items()):
            if (curve := _over_seeds(seeds, pick)) is not None:
                data["error"] += _lines(name, curve, colour=colour, dotted=second > 0)
                seen["error"].append(f"{name}: from {curve.mean[0]:,.3f} to {curve.last}")
        if (curve := _over_seeds(seeds, lambda one: one.epsilon)) is not None:
            data["epsilon"] += _lines(campaign, curve, colour=colour, dotted=colour > 0, shape="hv")
            seen["epsilon"].append(f"{campaign}: {curve.last} after round {curve.x[-1]}")
        ways: dict[str, Callable[[Round], float | None]] = {
            "up": lambda one: one.bytes_up / 1e6,
            "down": lambda one: one.bytes_down / 1e6,
        }
        for second, (way, pick) in enumerate(ways.items()):
            if (curve := _over_seeds(seeds, pick)) is not None:
                data["wire"] += _lines(f"{campaign}, {way}", curve, colour=colour, dotted=second > 0)
                seen["wire"].append(f"{campaign}, {way}: {curve.mean[-1]:,.1f} MB")
    axes = {
        "error": ("round (0: before training)", f"validation {heading(metric)}"),
        "epsilon": ("round", "ε spent so far"),
        "wire": ("round", "MB so far, all clients"),
    }
    titles = {
        "error": f"Validation {heading(metric)} by round",
        "epsilon": "ε by round",
        "wire": "Bytes on the wire, summed over rounds and clients",
    }
    figures = {name: {"data": traces, "layout": layout(*axes[name])} for name, traces in data.items() if traces}
    places = [_place(name, titles[name], seen) if name in figures else _NOTHING[name] for name in data]
    if any(len(seeds) > 1 for seeds in campaigns.values()):
        places.insert(0, "<p>Lines show the mean over the seeds of the run, bands the range from least to most.</p>")
    return figures, [*places, details("The same by numbers", _numbers(campaigns, metric))]


def _over_seeds(seeds: dict[int, list[Round]], pick: Callable[[Round], float | None]) -> _Curve | None:
    """Mean and range over the seeds, at the rounds where every seed has a value; None where there is none."""
    values: dict[int, list[float]] = {}
    for rounds in seeds.values():
        for one in rounds:
            if (value := pick(one)) is not None:
                values.setdefault(one.round, []).append(value)
    shared = {x: y for x, y in sorted(values.items()) if len(y) == len(seeds)}
    if not shared:
        return None
    return _Curve(
        x=list(shared),
        mean=[float(np.mean(y)) for y in shared.values()],
        low=[min(y) for y in shared.values()],
        high=[max(y) for y in shared.values()],
    )


def by_user(users: Users, *, less: bool) -> tuple[dict[str, Figure], list[str]]:
    """Distribution over users of what each personal row gains over ``local``, as ``by_round`` returns it.

    Args:
        users: The score of every user in every row.
        less: Whether less of the metric is better.
    """
    own = [row for row in users.rows if row.startswith("personal")]
    if "local" not in users.rows or not own or not users.users:
        return {}, ["<h3>Gain over local</h3><p>The run has no pair of rows to show it by.</p>"]
    sign = 1 if less else -1
    gains = {row: sign * np.subtract(users.rows["local"], users.rows[row]) for row in own}
    spread = np.concatenate(list(gains.values()))
    width = max(float(np.ptp(spread)) / 40, 1e-3)
    bins = np.arange(np.floor(spread.min() / width), np.floor(spread.max() / width) + 2)  # zero is an edge
    middles = ((bins[:-1] + 0.5) * width).round(6).tolist()
    data: list[Figure] = []
    seen = []
    counted: list[list[int]] = []
    for colour, (row, gain) in enumerate(gains.items()):
        counts = np.histogram(np.floor(gain / width), bins=bins)[0].tolist()
        counted.append(counts)
        trace: Figure = {"name": html.escape(row), "x": middles, "y": counts}
        if colour == 0:
            trace |= {"type": "bar", "marker": {"color": "--c0"}}
        else:
            trace |= {"type": "scatter", "mode": "lines", "line": {"color": f"--c{colour % 4}", "shape": "hvh"}}
        data.append(trace)
        seen.append(f"{row}: {int((gain > 0).sum())} of {gain.size} users gain, median {np.median(gain):+.3f}")
    look = layout(f"{heading(users.metric)} gained over local", "users", whole=False)
    zero = {"type": "line", "x0": 0, "x1": 0, "yref": "paper", "y0": 0, "y1": 1}
    look["shapes"] = [zero | {"line": {"color": "--ink", "width": 1.5}}]
    better = "lower" if less else "higher"
    numbers = table(
        f"Users by what they gain in {heading(users.metric)} over local, in steps of {width:.3g}",
        ["gain about", *(html.escape(row) for row in gains)],
        [
            [f"{middle:+.3f}", *(f"{count:,}" for count in counts)]
            for middle, *counts in zip(middles, *counted, strict=True)
        ],
    )
    return {"gain": {"data": data, "layout": look}}, [
        _place("gain", f"Gain over local: right of zero, the user has the {better} score", {"gain": seen}),
        details("The same by numbers", numbers),
    ]


@dataclass(frozen=True)
class Point:
    """A score of one row of one run, as the comparison of runs draws it."""

    run: str
    row: str
    score: Interval
    epsilon: float | None = None
    unit: str = ""


def row_by_row(
    points: Sequence[Point],
    *,
    metric: str,
    identifier: str = "rows",
    title: str = "Row by row",
    caption: str = "",
    line: float | None = None,
) -> tuple[dict[str, Figure], list[str]]:
    """Every row with the score of each run beside the others, as ``by_round`` returns it.

    Args:
        points: The scores.
        metric: What they are of.
        identifier: Id of the figure.
        title: Of the figure.
        caption: Of the figure; by default where the numbers of a comparison of runs stand.
        line: Where a line is drawn to compare with.
    """
    rows = list(dict.fromkeys(point.row for point in points))
    runs = list(dict.fromkeys(point.run for point in points))
    data, seen = [], []
    for number, run in enumerate(runs):
        mine = [point for point in points if point.run == run]
        shift = 0.7 * ((number + 0.5) / len(runs) - 0.5)
        trace = _dots(run, mine, colour=number, error="error_x")
        trace["x"] = [point.score.value for point in mine]
        trace["y"] = [rows.index(point.row) + shift for point in mine]
        trace["hovertemplate"] = "%{text}: %{x:.3f}"
        trace["text"] = [html.escape(point.row) for point in mine]
        data.append(trace)
        seen.append(f"{run}: " + ", ".join(f"{point.row} {point.score.value:.3f}" for point in mine))
    look = layout(heading(metric), "", whole=False)
    look["yaxis"] |= {
        "tickvals": list(range(len(rows))),
        "ticktext": [html.escape(row) for row in rows],
        "range": [len(rows) - 0.5, -0.5],
        "zeroline": False,
    }
    look["hovermode"] = "closest"
    if line is not None:
        upright = {"type": "line", "x0": line, "x1": line, "yref": "paper", "y0": 0, "y1": 1}
        look["shapes"] = [upright | {"line": {"color": "--ink", "width": 1.5}}]
    height = 110 + 24 * len(runs) + len(rows) * (14 + 12 * len(runs))
    numbers = f"Bars are 95 % intervals over users. The numbers stand in the table {heading(metric)} below."
    return {identifier: {"data": data, "layout": look}}, [
        plot(
            identifier,
            title=title,
            described="; ".join(seen) + ".",
            caption=caption or numbers,
            height=height,
        )
    ]


def privacy_utility(points: Sequence[Point], *, metric: str) -> tuple[dict[str, Figure], list[str]]:
    """ε against the score, a line for every row and unit; nothing where all runs spend the same.

    Args:
        points: Rows that stand for a campaign; those without an ε are named and not drawn.
        metric: Key of the metric.
    """
    priced = [point for point in points if point.epsilon is not None]
    spent = {point.epsilon for point in priced if point.epsilon is not None}
    if len(spent) < 2:
        return {}, []
    lines: dict[str, list[Point]] = {}
    for point in priced:
        lines.setdefault(f"{point.row}, per {point.unit}", []).append(point)
    data, seen = [], []
    for colour, (name, mine) in enumerate(lines.items()):
        trace = _dots(name, mine, colour=colour, error="error_y")
        trace["x"] = [point.epsilon for point in mine]
        trace["y"] = [point.score.value for point in mine]
        trace["text"] = [html.escape(point.run) for point in mine]
        trace["hovertemplate"] = "%{text}: ε = %{x:.3g}, %{y:.3f}"
        data.append(trace)
        seen.append(f"{name}: " + ", ".join(f"{point.score.value:.3f} at ε = {point.epsilon:.3g}" for point in mine))
    left_out = list(dict.fromkeys(point.run for point in points if point.epsilon is None))
    if left_out:
        seen.append(f"without ε, NOT PRIVATE, not drawn: {', '.join(left_out)}")
    look = layout("ε (less is more private)", heading(metric), whole=False)
    if min(spent) > 0 and max(spent) >= 10 * min(spent):
        marks = [digit * 10.0**power for power in range(-4, 7) for digit in (1, 2, 5)]
        look["xaxis"] |= {"type": "log", "tickvals": marks, "ticktext": [f"{mark:g}" for mark in marks]}
    look["hovermode"] = "closest"
    return {"utility": {"data": data, "layout": look}}, [
        _place("utility", "Privacy and utility: the score by what it costs in ε", {"utility": seen})
    ]


def _dots(name: str, points: Sequence[Point], *, colour: int, error: str) -> Figure:
    """Markers with the ends of their intervals."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": html.escape(name),
        "marker": {"symbol": _SYMBOLS[colour % len(_SYMBOLS)], "size": 9, "color": f"--c{colour % 4}"},
        error: {
            "type": "data",
            "symmetric": False,
            "array": [point.score.high - point.score.value for point in points],
            "arrayminus": [point.score.value - point.score.low for point in points],
            "color": f"--c{colour % 4}",
            "thickness": 1.5,
            "width": 3,
        },
    }


_SYMBOLS = ("circle", "diamond", "square", "triangle-up", "cross", "star", "x")
_NOTHING = {
    "error": "<h3>Validation by round</h3><p>None: the run scored no round on validation rows.</p>",
    "epsilon": "<h3>ε by round</h3><p>None: the run makes no claim, so there is no ε to show.</p>",
    "wire": "",
}


def _place(identifier: str, title: str, seen: dict[str, list[str]]) -> str:
    return plot(identifier, title=title, described="; ".join(seen[identifier]) + ".")


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _numbers(campaigns: dict[str, dict[int, list[Round]]], metric: str) -> str:
    rows = [
        [
            f"{html.escape(campaign)}, {seed}, {one.round}",
            _plain(one.validation.federated),
            _plain(one.validation.personal),
            _plain(one.epsilon),
            f"{one.bytes_up:,}",
            f"{one.bytes_down:,}",
            f"{one.replies:,}",
            html.escape(", ".join(f"{code} {count}" for code, count in one.rejected.items())) or "none",
        ]
        for campaign, seeds in campaigns.items()
        for seed, rounds in seeds.items()
        for one in rounds
    ]
    name = html.escape(heading(metric))
    head = [
        "campaign, seed, round",
        f"shared {name}",
        f"personal {name}",
        "ε so far",
        "bytes up so far",
        "bytes down so far",
        "replies",
        "rejected",
    ]
    return table("Every round: score on the validation rows, ε and bytes so far, replies in this round", head, rows)


def _lines(name: str, curve: _Curve, *, colour: int, dotted: bool, shape: str = "linear") -> list[Figure]:
    """The mean as a line, told apart by dash and marker as well as by colour; with several seeds a band behind it."""
    line: Figure = {
        "type": "scatter",
        "mode": "lines+markers" if len(curve.x) <= 50 else "lines",
        "name": html.escape(name),  # plotly reads a little HTML in its labels
        "x": curve.x,
        "y": curve.mean,
        "line": {"color": f"--c{colour % 4}", "width": 2, "dash": "dot" if dotted else "solid", "shape": shape},
        "marker": {"symbol": "diamond" if dotted else "circle", "size": 6, "color": f"--c{colour % 4}"},
    }
    if curve.low == curve.high:
        return [line]
    edge = {"color": f"--c{colour % 4}", "width": 0, "shape": shape}
    band: Figure = {"type": "scatter", "mode": "lines", "x": curve.x, "line": edge, "showlegend": False}
    band |= {"name": html.escape(f"range of {name}"), "hoverinfo": "skip"}
    below = band | {"y": curve.low}
    above = band | {"y": curve.high, "fill": "tonexty", "fillcolor": f"--b{colour % 4}"}
    return [below, above, line]


def layout(x: str, y: str, *, whole: bool = True) -> Figure:
    """Transparent, in the reader's colours, the legend above the plot; ``whole``: x counts rounds."""
    axis = {
        "gridcolor": "--line",
        "zerolinecolor": "--line",
        "linecolor": "--line",
        "automargin": True,
        "fixedrange": True,  # a swipe scrolls the page
    }
    counts: Figure = {"tickformat": ",d", "nticks": 8} if whole else {}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "--ink"},
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "hovermode": "x unified",
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--line", "font": {"color": "--ink"}},
        # nothing in a plot answers to a click, so nothing is out of reach of the keyboard
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": 1,
            "yref": "container",  # relative to the plot it lands on the data when a phone is turned
            "yanchor": "top",
            "itemclick": False,
            "itemdoubleclick": False,
        },
        "showlegend": True,
        "bargap": 0.05,
        "xaxis": {**axis, **counts, "title": {"text": x}},
        "yaxis": {**axis, "separatethousands": True, "title": {"text": y}},
    }
