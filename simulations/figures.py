"""The plots of a report: by round, and by user."""

import html
from collections.abc import Sequence

import numpy as np

from simulations.page import Figure, details, plot, table
from simulations.results import Round, Users


def by_round(campaigns: dict[str, list[Round]]) -> tuple[dict[str, Figure], list[str]]:
    """Validation error, ε and bytes by round.

    Args:
        campaigns: Name -> its rounds, ascending.

    Returns:
        Figure by the id of its place, and the places as HTML, each with what is to be seen in words.
    """
    error: list[Figure] = []
    epsilon: list[Figure] = []
    wire: list[Figure] = []
    seen: dict[str, list[str]] = {"error": [], "epsilon": [], "wire": []}
    for colour, (campaign, rounds) in enumerate(campaigns.items()):
        x = [one.round for one in rounds]
        parts = {
            f"{campaign}, shared and private": [one.validation_rmse_personal for one in rounds],
            f"{campaign}, shared alone": [one.validation_rmse_federated for one in rounds],
        }
        for second, (name, y) in enumerate(parts.items()):
            error.append(_line(name, x, y, colour=colour, dotted=second > 0))
            seen["error"].append(f"{name}: from {_plain(y[0])} to {_plain(y[-1])}")
        spent = [one.epsilon for one in rounds]
        if spent[-1] is not None:
            epsilon.append(_line(campaign, x, spent, colour=colour, dotted=colour > 0, shape="hv"))
            seen["epsilon"].append(f"{campaign}: {_plain(spent[-1])} after round {x[-1]}")
        ways = {"up": [one.bytes_up for one in rounds], "down": [one.bytes_down for one in rounds]}
        for second, (way, sizes) in enumerate(ways.items()):
            total = [size / 1e6 for size in sizes]
            wire.append(_line(f"{campaign}, {way}", x, total, colour=colour, dotted=second > 0))
            seen["wire"].append(f"{campaign}, {way}: {total[-1]:,.1f} MB")
    figures = {
        "error": {"data": error, "layout": _layout("round (0: before training)", "validation RMSE")},
        "wire": {"data": wire, "layout": _layout("round", "MB so far, all clients")},
    }
    if epsilon:
        figures["epsilon"] = {"data": epsilon, "layout": _layout("round", "ε spent so far")}
    places = [
        _place("error", "Validation error by round", seen),
        _place("epsilon", "ε by round", seen) if epsilon else _NO_EPSILON,
        _place("wire", "Bytes on the wire, summed over rounds and clients", seen),
        details("The same by numbers", _numbers(campaigns)),
    ]
    return figures, places


def by_user(users: Users) -> tuple[dict[str, Figure], list[str]]:
    """Distribution over users of what each personal row gains over ``local``, as ``by_round`` returns it."""
    own = [row for row in users.rows if row.startswith("personal")]
    if "local" not in users.rows or not own or not users.users:
        return {}, ["<h3>Gain over local</h3><p>The run has no pair of rows to show it by.</p>"]
    gains = {row: np.subtract(users.rows["local"], users.rows[row]) for row in own}
    spread = np.concatenate(list(gains.values()))
    width = max(float(np.ptp(spread)) / 40, 1e-3)
    bins = np.arange(np.floor(spread.min() / width), np.floor(spread.max() / width) + 2)  # zero is an edge
    data: list[Figure] = []
    seen = []
    for colour, (row, gain) in enumerate(gains.items()):
        counts = np.histogram(np.floor(gain / width), bins=bins)[0]
        middles = ((bins[:-1] + 0.5) * width).round(6).tolist()
        trace: Figure = {"name": html.escape(row), "x": middles, "y": counts.tolist()}
        if colour == 0:
            trace |= {"type": "bar", "marker": {"color": "--c0"}}
        else:
            trace |= {
                "type": "scatter",
                "mode": "lines",
                "line": {"color": f"--c{colour % 4}", "shape": "hvh"},
            }
        data.append(trace)
        seen.append(f"{row}: {int((gain > 0).sum())} of {gain.size} users gain, median {np.median(gain):+.3f}")
    layout = _layout("RMSE gained over local", "users", whole=False)
    layout["shapes"] = [
        {
            "type": "line",
            "x0": 0,
            "x1": 0,
            "yref": "paper",
            "y0": 0,
            "y1": 1,
            "line": {"color": "--ink", "width": 1.5},
        }
    ]
    return {"gain": {"data": data, "layout": layout}}, [
        _place("gain", "Gain over local: right of zero, the user has the lower error", {"gain": seen})
    ]


_NO_EPSILON = "<h3>ε by round</h3><p>None: the run makes no claim, so there is no ε to show.</p>"


def _place(identifier: str, title: str, seen: dict[str, list[str]]) -> str:
    return plot(identifier, title=title, described="; ".join(seen[identifier]) + ".")


def _plain(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _numbers(campaigns: dict[str, list[Round]]) -> str:
    rows = [
        [
            f"{html.escape(campaign)} {one.round}",
            _plain(one.validation_rmse_federated),
            _plain(one.validation_rmse_personal),
            _plain(one.epsilon),
            f"{one.bytes_up:,}",
            f"{one.bytes_down:,}",
            f"{one.replies:,}",
            html.escape(", ".join(f"{code} {count}" for code, count in one.rejected.items())) or "none",
        ]
        for campaign, rounds in campaigns.items()
        for one in rounds
    ]
    head = [
        "campaign, round",
        "shared RMSE",
        "personal RMSE",
        "ε so far",
        "bytes up so far",
        "bytes down so far",
        "replies",
        "rejected",
    ]
    return table("Every round: error on the validation rows, ε and bytes so far, replies in this round", head, rows)


def _line(
    name: str,
    x: Sequence[int],
    y: Sequence[float | None],
    *,
    colour: int,
    dotted: bool,
    shape: str = "linear",
) -> Figure:
    """One line, told apart by dash and marker as well as by colour."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 50 else "lines",
        "name": html.escape(name),  # plotly reads a little HTML in its labels
        "x": list(x),
        "y": list(y),
        "line": {
            "color": f"--c{colour % 4}",
            "width": 2,
            "dash": "dot" if dotted else "solid",
            "shape": shape,
        },
        "marker": {"symbol": "diamond" if dotted else "circle", "size": 6, "color": f"--c{colour % 4}"},
    }


def _layout(x: str, y: str, *, whole: bool = True) -> Figure:
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
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "showlegend": True,
        "bargap": 0.05,
        "xaxis": {**axis, **counts, "title": {"text": x}},
        "yaxis": {**axis, "separatethousands": True, "title": {"text": y}},
    }
