"""The part of a report about users with few records and about groups of users: curves, the worst tenth, gaps."""

import html
from collections.abc import Iterator, Sequence

from shared.metrics.ratings import Interval
from simulations.fairness import MIN_GROUP, OTHER
from simulations.report import page
from simulations.report.figures import layout
from simulations.report.page import Figure, heading
from simulations.report.parts import ColdStart, Curve, Fairness, Groups
from simulations.report.results import Summary

TITLE = "New users and groups"
WHO = {"participants": "the users of the run", "set_aside": "users who took part in nothing"}
_LINES = {"personal": ("--c0", "solid"), "federated": ("--c1", "dash"), "local": ("--c2", "dot")}
_PAIR = "personal - federated"


def section(summary: Summary) -> tuple[dict[str, Figure], list[str]]:
    """The section with its figures; nothing for a run that measured neither."""
    cold, fairness, figures = summary.cold_start, summary.fairness, {}
    body: list[str] = []
    if cold is not None:
        body.append(
            "<p>How well is a person served who has just begun? Every user is given only their first records in time, "
            "the private part is fitted to these, and the same test records are predicted: <code>personal</code>. "
            "<code>federated</code> is the shared part alone, <code>local</code> the private part without any "
            "federation. A user who has fewer records has all of theirs.</p>"
        )
        for who, curve in cold.curves.items():
            name = f"cold-{who.replace('_', '-')}"
            figures[name] = _figure(summary.metric, cold, curve)
            body += _curve(summary, cold, who, name)
    if fairness is not None:
        body += [*_worst(summary, fairness), *_groups(summary, fairness)]
    body += _popularity(summary)
    return figures, [f"<h2>{TITLE}</h2>", *body] if body else []


def headline(summary: Summary) -> list[str]:
    """The cold start of every kind of user in one line each, plain text."""
    if summary.cold_start is None:
        return []
    curves = summary.cold_start.curves
    return [f"cold start, {WHO.get(who, who)}: {_verdict(summary, summary.cold_start, curves[who])}" for who in curves]


def _verdict(summary: Summary, cold: ColdStart, curve: Curve) -> str:
    """Where own records help least, in plain text."""
    sign = 1 if summary.less_is_better(summary.metric) else -1
    worst, count = max(
        (sign * point.value, count) for point, count in zip(curve.differences[_PAIR], cold.counts, strict=True)
    )
    name = heading(summary.metric)
    if worst > 0:
        return f"personal is worse than federated by up to {page.gap(summary.metric, worst)} {name}, at {count} records"
    clear = [sign * (point.high if sign > 0 else point.low) < 0 for point in curve.differences[_PAIR]]
    sure = next((count for i, count in enumerate(cold.counts) if all(clear[i:])), None)
    words = "at none of them" if sure is None else f"from {sure} records on"
    return f"personal is at no number of records worse than federated, by {name}; better by its whole interval {words}"


def _curve(summary: Summary, cold: ColdStart, who: str, identifier: str) -> Iterator[str]:
    curve, metric = cold.curves[who], summary.metric
    title = f"{heading(metric)} by number of own records: {WHO.get(who, who)}"
    ends = ", ".join(
        f"{row} {page.score(metric, points[0])} with {cold.counts[0]} records, "
        f"{page.score(metric, points[-1])} with {cold.counts[-1]}"
        for row, points in curve.rows.items()
    )
    yield page.plot(identifier, title=title, described=f"{ends}.", caption="Bars are 95 % intervals over users.")
    verdict = _verdict(summary, cold, curve)
    yield f'<p id="{identifier}-verdict">{html.escape(verdict[0].upper() + verdict[1:])}. {_seen(curve)}</p>'
    rows = [
        [
            f"{count}",
            f"{reaching:,}",
            *(_cell(page.score(metric, points[i])) for points in curve.rows.values()),
            _cell(page.score(metric, curve.differences[_PAIR][i], digits=4, sign=True)),
        ]
        for i, (count, reaching) in enumerate(zip(cold.counts, curve.reaching, strict=True))
    ]
    head = ["own records", "users who have so many", *map(html.escape, curve.rows), html.escape(_PAIR)]
    better = "below" if summary.less_is_better(metric) else "above"
    caption = f"{heading(metric)} of {curve.users:,} users at every number of records; {better} 0, personal is better"
    yield page.details("The same by numbers", page.table(caption, head, rows))


def _seen(curve: Curve) -> str:
    """Whether the shared part has seen these users."""
    if not curve.took_part:
        return f"The shared part has never seen any of these {curve.users:,} users."
    return (
        f"{curve.took_part:,} of these {curve.users:,} users took part in the federation, with all of their fit "
        "records: the shared part has seen them, and only the private part is new to them."
    )


def _figure(metric: str, cold: ColdStart, curve: Curve) -> Figure:
    """A line a row; counts stand at equal distances, for they grow like powers."""
    x = [str(count) for count in cold.counts]
    look = layout("own records", heading(metric), whole=False)
    look["xaxis"] |= {"type": "category"}
    traces = [_trace(row, x, points) for row, points in curve.rows.items()]
    return {"data": traces, "layout": look}


def _trace(row: str, x: list[str], points: Sequence[Interval]) -> Figure:
    colour, dash = _LINES.get(row, ("--c3", "dashdot"))
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": html.escape(row),
        "x": x,
        "y": [point.value for point in points],
        "line": {"color": colour, "width": 2, "dash": dash},
        "marker": {"size": 7, "color": colour, "symbol": "circle" if row == "personal" else "diamond"},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [point.high - point.value for point in points],
            "arrayminus": [point.value - point.low for point in points],
            "color": colour,
            "thickness": 1,
            "width": 3,
        },
        "hovertemplate": "%{y:.3f}",
    }


def _worst(summary: Summary, fairness: Fairness) -> Iterator[str]:
    yield "<h3>The worst-off tenth of the users</h3>"
    name = html.escape(heading(summary.metric))
    scores = ", ".join(
        f"<code>{html.escape(row)}</code> {page.score(summary.metric, score)}"
        for row, score in fairness.worst_tenth.items()
    )
    yield f"<p>Mean of each user's own {name} over the tenth whom a row serves worst: {scores}.</p>"


def _groups(summary: Summary, fairness: Fairness) -> Iterator[str]:
    if not fairness.groups:
        return
    yield "<h3>Groups of users</h3>"
    yield (
        "<p>Groups are of users who opted in to be compared: they state the attribute themselves. The observer of this "
        "simulation, who may read everything, computes them; no device sends its user's group or score. A value is the "
        "mean of the users' own scores, with a bootstrap over users. Any groups differ by chance: a gap is held "
        "against the one that one in twenty random regroupings of the same users exceeds.</p>"
    )
    for attribute, groups in fairness.groups.items():
        yield from _attribute(summary.metric, attribute, groups)


def _attribute(metric: str, attribute: str, groups: Groups) -> Iterator[str]:
    scores = groups.rows.values()
    cells = [
        [html.escape(group), f"{size:,}", *(_cell(page.score(metric, row.means[group])) for row in scores)]
        for group, size in groups.users.items()
    ]
    gaps = ["–" if row.gap is None else _cell(page.score(metric, row.gap)) for row in scores]
    chance = ["–" if row.by_chance is None else page.gap(metric, row.by_chance) for row in scores]
    cells += [["gap between best and worst", "", *gaps], ["gap that chance makes, up to", "", *chance]]
    caption = f"{heading(metric)} of users by {attribute}"
    yield page.table(caption, [html.escape(attribute), "users", *map(html.escape, groups.rows)], cells)
    yield f'<p id="gap-{html.escape(attribute)}">{_gap_words(groups)} {html.escape(_left_out(groups))}</p>'


def _gap_words(groups: Groups) -> str:
    if len(groups.users) < 2:
        return "There are not two groups to compare."
    larger = [
        f"<code>{html.escape(name)}</code>"
        for name, row in groups.rows.items()
        if row.gap is not None and row.by_chance is not None and row.gap.value > row.by_chance
    ]
    return f"The gap is larger than chance makes it in {', '.join(larger)}." if larger else "No gap is beyond chance."


def _left_out(groups: Groups) -> str:
    """Who is in no group of their own, in plain text."""
    words = []
    if groups.merged:
        done = "merged" if OTHER in groups.users else "left out, too few even together"
        words.append(f"Of fewer than {MIN_GROUP} users, so {done}: {', '.join(groups.merged)}.")
    if groups.silent:
        words.append(f"{groups.silent:,} users state nothing and are in no group.")
    return " ".join(words)


def _cell(score: str) -> str:
    """A score with its interval below it."""
    value, _, interval = score.partition(" [")
    return f"{value}<small>[{interval}</small>"


def _popularity(summary: Summary) -> Iterator[str]:
    """How much rows prefer what many like: the metrics of the task that are named so."""
    names = [name for name in summary.metrics if name.startswith("popularity")]
    rows = {row: [scores.get(name) for name in names] for row, scores in summary.rows.items()}
    if not any(score for scores in rows.values() for score in scores):
        return
    yield "<h3>Popularity</h3>"
    yield "".join(
        f"<p>{html.escape(heading(name))}: {html.escape(summary.metrics[name].description)}.</p>" for name in names
    )
    cells = [
        [html.escape(row), *("–" if s is None else _cell(page.score(n, s)) for n, s in zip(names, scores, strict=True))]
        for row, scores in rows.items()
    ]
    yield page.table("Popularity by row", ["row", *(html.escape(heading(name)) for name in names)], cells)
