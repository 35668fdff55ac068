"""The page of a study: filters, figures and one table that follow them, on a page that loads nothing from anywhere."""

import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

from plotly.offline import get_plotlyjs

from shared.page import STYLE, document
from simulations.report import page
from simulations.report.figures import layout
from simulations.report.page import PERCENT, heading
from simulations.report.report import ROWS
from simulations.study.points import ALONE, Curve, Found, Gain, Group, Result, series_of
from simulations.study.script import SCRIPT

KIND = "study"
NONE = "none"
_STYLE = (
    STYLE
    + """
#filters { display: flex; flex-wrap: wrap; gap: .75rem 1.25rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; padding: .75rem 1rem; margin: 1rem 0; }
fieldset { border: 0; padding: 0; margin: 0; min-width: 0; }
legend, #filters > label { font-weight: 600; font-size: .9rem; padding: 0; }
fieldset label { display: block; font-size: .9rem; line-height: 1.7; overflow-wrap: anywhere; }
#filters input { accent-color: var(--c0); margin: 0 .35rem 0 0; }
#filters select, #filters button { font: inherit; font-size: .9rem; color: var(--ink); background: var(--paper);
  border: 1px solid var(--dim); border-radius: .35rem; padding: .25rem .6rem; }
#filters button { cursor: pointer; margin: .25rem .5rem 0 0; }
fieldset.rows { max-width: 30rem; }
fieldset.rows label { display: inline-block; margin-right: .9rem; }
.key { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.25rem; font-size: .875rem;
  max-width: none; }
.key li { margin: 0; }
.key svg { vertical-align: middle; margin-right: .2rem; }
section > figure > div { height: 380px; }
table.results td { white-space: nowrap; }
table.words td { min-width: 8.5rem; }
table.words td small { white-space: normal; }
table.words tbody th { min-width: 11rem; }
@media (max-width: 40rem) { section > figure > div { height: 330px; } }
"""
)
_FIGURES = {
    "frontier": (
        "Privacy and utility",
        "Bands and bars are 95 % intervals over users. An open mark, joined to its claim by a dotted line, is the "
        "lower bound on ε that an audit found: left of the claim it agrees with it, right of it the claim is wrong. "
        "Points at “none” promise nothing. A line across, with its mark at “none”, needs no campaign.",
    ),
    "communication": (
        "Communication and score",
        "Bytes to and from one device over the whole campaign. Filled marks, joined by a line, are the Pareto front: "
        "no other point shown costs as little and scores better. Points that claim nothing are no rivals of those that "
        "do, and never on it; it does not weigh one claim against another, so choose ε and trust above.",
    ),
    "cpu": (
        "Computing and score",
        "CPU-seconds of the whole run, all devices and the scoring in one process; a comparison between the runs of "
        "this machine, no forecast of a phone. Filled marks are the Pareto front, as above.",
    ),
    "cold": (
        "Cold start",
        "The score of users of whom a device holds only the first records. Up to six curves have bands, 95 % intervals "
        "over users; the files for a paper have the numbers of all.",
    ),
    "gain": (
        "Gain per user",
        "The share of users who gain at most so much on the row local. Who stands left of zero would have done better "
        "alone.",
    ),
}
_FIRST = ("personal", "persona", "dp-statistics", "local")  # rows that are shown before anybody chooses


def study_page(title: str, body: Sequence[str], found: Found) -> str:
    """A whole page: what ``body`` says, then the filters with all that they move.

    Args:
        title: Plain text.
        body: HTML; whatever came from data is escaped in it.
        found: What the study found.

    Guarantee:
        The content policy of the page refuses every address, and every script but its own two.
    """
    sections = [*body, *_filters(found), *_figures(), *_table(found)]
    data = json.dumps(_data(found), allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    described = f'<script type="application/json" id="study">{data}</script>'
    text = "\n".join(sections)
    return document(title, text, kind=KIND, style=_STYLE, data=described, scripts=(get_plotlyjs(), SCRIPT))


def level_of(epsilon: float | None) -> str:
    """The claim as it is filtered by: a target of 8 is priced at 7.99 here and at 8.00 there.

    Example:
        >>> level_of(7.9936), level_of(0.5), level_of(None)
        ('8', '0.5', 'none')
    """
    return NONE if epsilon is None else f"{epsilon:.2g}"


def _keys(group: Group, row: str) -> dict[str, str]:
    """What the filters know of a point; empty where a row needs no campaign."""
    if group.trust == ALONE:
        return {"method": "", "trust": "", "epsilon": "", "row": row}
    return {"method": group.method, "trust": group.trust, "epsilon": level_of(group.epsilon), "row": row}


def _filters(found: Found) -> Iterator[str]:
    groups = {one.group for one in found.results if one.group.trust != ALONE}
    metrics = list(dict.fromkeys(one.metric for one in found.results))
    levels = sorted(
        {level_of(group.epsilon) for group in groups}, key=lambda word: float("inf") if word == NONE else float(word)
    )
    kept = [row for row in found.rows if row in _FIRST] or found.rows
    options = "".join(
        f'<option value="{html.escape(key)}"{" selected" if key == found.metric else ""}>{html.escape(heading(key))}'
        "</option>"
        for key in metrics
    )
    yield "<h2>Choose what is shown</h2>"
    yield '<form id="filters" aria-label="What is shown" autocomplete="off">'
    yield f'<label>Metric<br><select name="metric">{options}</select></label>'
    yield _boxes("method", "Method", list(dict.fromkeys(one.group.method for one in found.results if one.group.method)))
    yield _boxes("trust", "Trust", sorted({group.trust for group in groups}))
    yield _boxes("epsilon", "ε", levels)
    yield _boxes("row", "Row", found.rows, checked=kept, look="rows")
    yield (
        '<p><button type="button" id="everything">Show everything</button>'
        '<button type="reset">As at first</button><br>'
        '<output id="count" class="dim" aria-live="polite"></output></p></form>'
    )


def _boxes(name: str, title: str, values: Sequence[str], *, checked: Sequence[str] = (), look: str = "") -> str:
    boxes = "".join(
        f'<label><input type="checkbox" name="{name}" value="{html.escape(value)}"'
        f"{' checked' if not checked or value in checked else ''}>{html.escape(value)}</label>"
        for value in values
    )
    return f'<fieldset class="{look}"><legend>{title}</legend>{boxes}</fieldset>'


def _figures() -> Iterator[str]:
    for name, (title, caption) in _FIGURES.items():
        yield (
            f'<section hidden><h2>{title}</h2>\n<figure><div id="{name}" role="img"></div>'
            f'<ul class="key" aria-label="Key of {title}"></ul><figcaption>{caption}</figcaption></figure></section>'
        )


def _table(found: Found) -> Iterator[str]:
    costs = list(dict.fromkeys(cost for one in found.results for cost in one.cost))
    head = ["row", "point", "series", "ε claimed", "ε audited, at least", "score [95 % over users]", "seeds"]
    head += [_COST.get(cost, cost) for cost in costs]
    lines = "".join(_line(one, costs) for one in found.results)
    name = "Scores, cost and audits"
    yield (
        f'<h2>The numbers</h2>\n<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table class="results" id="results"><caption><span>{name}</span></caption><thead><tr>'
        + "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
        + f"</tr></thead><tbody>\n{lines}</tbody></table></div>"
    )
    known = [row for row in found.rows if row in ROWS]
    yield page.details(
        "What the rows are",
        "<dl>" + "".join(f"<dt>{html.escape(row)}</dt><dd>{html.escape(ROWS[row])}</dd>" for row in known) + "</dl>",
    )


_COST = {
    "bytes_per_device": "bytes per device",
    "cpu_s": "CPU-seconds",
    "wall_s": "seconds",
    "participations": "rounds per device, at most",
}


def _line(one: Result, costs: Sequence[str]) -> str:
    keys = _keys(one.group, one.row) | {"metric": one.metric}
    data = "".join(f' data-{key}="{html.escape(value)}"' for key, value in keys.items())
    least, most = one.spread
    seeds = f"{one.seeds}" + (f" <small>{_ends(one.metric, least, most)}</small>" if one.seeds > 1 else "")
    claim = NONE if one.group.epsilon is None else f"{one.group.epsilon:.3g}"
    if one.group.trust == ALONE:
        claim = "–"
    if one.delta is not None:
        claim += f" <small>δ = {one.delta:g}</small>"
    cells = [
        html.escape(one.group.label),
        html.escape(series_of(one.group)),
        claim,
        "–" if one.audit is None else f"{one.audit:.3g}",
        html.escape(page.score(one.metric, one.score)),
        seeds,
        *(page.amount(one.cost.get(cost)) for cost in costs),
    ]
    return (
        f'<tr{data}><th scope="row">{html.escape(one.row)}</th>'
        + "".join(f"<td>{cell}</td>" for cell in cells)
        + "</tr>\n"
    )


def _data(found: Found) -> dict[str, Any]:
    """What the script draws; colours are names of the style."""
    metrics = dict.fromkeys(one.metric for one in found.results)
    name = heading(found.gain_metric)
    return {
        "series": found.series,
        "rows": found.rows,
        "points": list(
            dict.fromkeys([*(one.group.label for one in found.curves), *(one.group.label for one in found.gains)])
        ),
        "metrics": {
            key: {"name": heading(key), "less": found.less.get(key, True), "percent": key in PERCENT} for key in metrics
        },
        "results": [_result(found, one) for one in found.results],
        "curves": [_curve(found, one) for one in found.curves],
        "gains": [_gain(one) for one in found.gains],
        "layouts": {
            "frontier": _layout("ε (less is more private)", ""),
            "communication": _layout("bytes per device", ""),
            "cpu": _layout("CPU-seconds", ""),
            "cold": _layout("a user's own records", heading(found.metric), kind="category"),
            "gain": _layout(f"{name} gained over local", "share of users"),
        },
    }


def _layout(x: str, y: str, *, kind: str = "-") -> dict[str, Any]:
    figure = layout(x, y, whole=False)
    # room for half of the last tick's words; a margin that grows to the right by itself is never done on a phone
    figure["margin"] = {"l": 8, "r": 28, "t": 8, "b": 8}
    figure["xaxis"] |= {"type": kind, "automargin": "bottom"}
    figure["yaxis"] |= {"automargin": "left"}
    return figure | {"showlegend": False, "hovermode": "closest"}


def _result(found: Found, one: Result) -> dict[str, Any]:
    return _keys(one.group, one.row) | {
        "series": found.series.index(series_of(one.group)),
        "point": html.escape(one.group.label),  # plotly reads a little HTML in its labels
        "metric": one.metric,
        "claim": one.group.epsilon,
        "value": one.score.value,
        "low": one.score.low,
        "high": one.score.high,
        "audit": one.audit,
        "bytes": one.cost.get("bytes_per_device"),
        "cpu": one.cost.get("cpu_s"),
    }


def _curve(found: Found, one: Curve) -> dict[str, Any]:
    first, last = one.scores[0], one.scores[-1]
    return _keys(one.group, one.row) | {
        "point": one.group.label,
        "who": one.who.replace("_", " "),
        "counts": [f"{count}" for count in one.counts],
        "values": [score.value for score in one.scores],
        "low": [score.low for score in one.scores],
        "high": [score.high for score in one.scores],
        "words": f"{page.score(found.metric, first)} with {one.counts[0]} records, "
        f"{page.score(found.metric, last)} with {one.counts[-1]}",
    }


def _gain(one: Gain) -> dict[str, Any]:
    last = len(one.quantiles) - 1
    return _keys(one.group, one.row) | {
        "point": one.group.label,
        "gains": list(one.quantiles),
        "shares": [i / last for i in range(len(one.quantiles))],
        "words": f"{100 * one.gaining:.0f} % of users gain, median {one.quantiles[last // 2]:+.3f}",
    }


def _ends(metric: str, least: float, most: float) -> str:
    factor, digits = (100, 1) if metric in PERCENT else (1, 4)
    return f"from {factor * least:.{digits}f} to {factor * most:.{digits}f}"
