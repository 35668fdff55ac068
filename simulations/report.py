"""Turn a run folder into ``report.html``: what is claimed, what came out, and where privacy loses."""

import html
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.metrics import Interval
from simulations import page
from simulations.figures import by_round, by_user
from simulations.results import RunFolder, Summary, check_summary, read_run

ROWS = {
    "constant": "the mean of all training ratings, for everyone",
    "user-mean": "each user's own mean rating",
    "pooled": "all data in one place, no privacy",
    "local": "the personal method alone, no federation",
    "federated": "the shared part alone",
    "personal": "the shared part and a private part",
    "federated-linear": "linear head: the shared part alone",
    "personal-linear": "linear head: shared and private part",
}
METRICS = {  # key -> heading, whether less is better, percent
    "rmse": ("RMSE", True, False),
    "mae": ("MAE", True, False),
    "accuracy": ("Accuracy", False, True),
    "user_rmse": ("RMSE per user", True, False),
    "worst_decile": ("Worst tenth of users", True, False),
    "share_gaining": ("Users gaining", False, True),
}
COSTS = {
    "wall_s": "Wall time, s",
    "client_rounds": "Client rounds (clients × rounds)",
    "engine_ms_per_client_round": "Engine time per client round, ms",
    "device_ms_per_client_round": "Device time per client round, ms",
    "bytes_up_per_client_round": "Bytes up per client round",
    "bytes_down_per_client_round": "Bytes down per client round",
    "peak_rss_mib": "Peak memory, MiB",
}
STAMPS = {
    "tuning: not covered": "Settings were tuned on validation rows of the campaign's own users; "
    "ε does not cover that choice.",
}
LEAVES = {
    "local": "clipped per record and noised on the device",
    "distributed": "clipped, with the device's share of the noise, masked so that the server sees the sum",
    "central": "clipped on the device; the server adds the noise",
    "none": "without any noise",
}
NOT_PRIVATE = "NOT PRIVATE"


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` from the files of a run folder, and from nothing else.

    Args:
        run_folder: As ``sottovoce simulate`` writes it; its files are described in ``docs/summary.md``.

    Returns:
        Path of the page, replaced as a whole.

    Raises:
        DataError: A file of the folder is missing or broken; the message names it.

    Guarantee:
        The page loads nothing: its content policy refuses every address and every script but its own two.
    """
    folder = read_run(run_folder)
    round_figures, round_plots = by_round(folder.rounds)
    user_figures, user_plots = by_user(folder.users)
    sections = [
        *_opening(folder),
        *_outcome(folder.summary),
        *("<h2>User by user</h2>", *user_plots),
        *("<h2>Round by round</h2>", *round_plots),
        *_flows(folder.summary),
        *_repeat(folder),
    ]
    title = f"{folder.summary.scenario}: a Sottovoce run"
    target = run_folder / "report.html"
    partial = target.with_suffix(".html.partial")
    partial.write_text(
        page.page(title, "\n".join(sections), figures=round_figures | user_figures),
        encoding="utf-8",
        newline="\n",
    )
    partial.replace(target)
    return target


def headline(summary: Mapping[str, Any]) -> list[str]:
    """What a run found, in four to six lines of plain text.

    Args:
        summary: What ``summary.json`` holds.

    Raises:
        DataError: A key is missing or has a wrong value.
    """
    checked = check_summary(summary)
    said = checked.private or checked.claim.startswith(NOT_PRIVATE)
    lines = [checked.claim if said else f"{NOT_PRIVATE}. {checked.claim}"]
    for row in ("local", "federated", "personal", "personal-linear"):
        if row in checked.rows:
            score = _number(checked.rows[row]["rmse"], digits=3)
            lines.append(f"RMSE {row:<15}  {score}  {ROWS[row]}")
    if (difference := checked.difference("personal", "local")) is not None:
        lines.append(f"RMSE personal - local  {_number(difference, digits=4, sign=True)}  below 0: personal is better")
    return lines


def _opening(folder: RunFolder) -> Iterator[str]:
    summary, privacy = folder.summary, folder.summary.privacy
    yield f'<p class="eyebrow">Sottovoce run report</p>\n<h1>{html.escape(summary.scenario)}</h1>'
    if not summary.private:
        yield (
            f'<p class="warn"><strong>{NOT_PRIVATE}.</strong> This run makes no privacy claim: '
            "nothing limits what a reply reveals about the records behind it.</p>"
        )
    data = summary.data
    yield (
        f'<p class="dim">{html.escape(data.name)}: {data.users:,} users, {data.fit:,} records to fit, '
        f"{data.validation:,} to validate, {data.test:,} to test<br>run {html.escape(folder.run.created)}</p>"
    )
    if summary.stamps:
        yield f'<ul class="stamps" aria-label="Stamps">{_items(html.escape(s) for s in summary.stamps)}</ul>'
    yield f'<h2>This is a simulation</h2>\n<p class="claim">{html.escape(summary.claim)}</p>'
    if privacy.sentence != summary.claim:
        yield f"<p>{html.escape(privacy.sentence)}</p>"
    yield "<p>Every device of this run was simulated on one machine, which held the data of all of them."
    if summary.private:
        yield (
            "The ε is what a deployment with these settings <em>would</em> spend on what leaves a device. "
            "It is no promise about this folder: whoever has the seeds kept in it can compute the noise and "
            "take it away "
            f"(<code>privacy.noise</code> reads <code>{_text(privacy.noise)}</code>)."
        )
    if summary.private and privacy.unit == "record":
        yield (
            "One record is hidden; traits that many records of a person share, and the fact of taking part, are not."
        )
    yield "</p>"
    yield from (f"<p>{html.escape(STAMPS[stamp])}</p>" for stamp in summary.stamps if stamp in STAMPS)
    campaigns = {"claim": privacy.model_dump()}
    if summary.privacy_linear is not None and summary.privacy_linear != privacy:
        campaigns["linear head"] = summary.privacy_linear.model_dump()
    keys = dict.fromkeys(key for terms in campaigns.values() for key in terms if key != "sentence")
    yield page.details(
        "The terms of the claim",
        page.table(
            "What the claim rests on",
            ["term", *campaigns],
            [[html.escape(key), *(_text(terms.get(key)) for terms in campaigns.values())] for key in keys],
            words=True,
        ),
    )


def _outcome(summary: Summary) -> Iterator[str]:
    yield "<h2>What came out</h2>"
    own = _own_row(summary)
    if own is not None:
        yield f"<p>{_verdict(summary, own)}</p>"
        yield f"<h3>Where {'private' if summary.private else 'it'} loses</h3>"
        losses = list(_losses(summary, own))
        if losses:
            yield f'<ul id="losses">{_items(losses)}</ul>'
        else:
            yield f'<p id="no-losses">Nowhere: no other row beats <code>{own}</code> in any metric.</p>'
    metrics = dict.fromkeys(name for scores in summary.rows.values() for name in scores)
    best = {name: value for name in metrics if (value := _best(summary, name)) is not None}
    yield page.table(
        "Test rows, each with its 95 % interval from a bootstrap over users. "
        "★ marks the best of a column: the least error, the highest share.",
        ["row", *(html.escape(METRICS[m][0] if m in METRICS else m) for m in metrics)],
        [
            [
                f"{html.escape(row)} <small>{ROWS.get(row, 'no description in this version')}</small>",
                *(_cell(name, scores.get(name), best.get(name)) for name in metrics),
            ]
            for row, scores in summary.rows.items()
        ],
    )
    yield (
        '<p class="dim">RMSE, MAE and accuracy are pooled over test ratings; a prediction is accurate when '
        "the nearest whole rating, halves up, is the true one. Users gaining: the share whose own RMSE is "
        "below that of the row <code>local</code>.</p>"
    )


def _own_row(summary: Summary) -> str | None:
    """The row that the run is about: what a user gets from the private campaign."""
    return next((row for row in ("personal", "federated") if row in summary.rows), None)


def _verdict(summary: Summary, own: str) -> str:
    """Own row against the ones that matter most, in one paragraph."""
    scores = summary.rows[own]
    parts = [
        f"On {summary.data.test:,} test ratings, <code>{own}</code> ({ROWS[own]}) reaches an RMSE of "
        f"<strong>{_number(scores['rmse'], digits=3)}</strong>."
    ]
    for other in ("local", "personal-linear", "pooled"):
        if other in summary.rows:
            words = _against(summary, own, other)
            parts.append(f"{words[0].upper()}{words[1:]}.")
    if "share_gaining" in scores:
        gaining = _number(scores["share_gaining"], digits=1, percent=True)
        parts.append(f"With it, {gaining} of users have a lower error than with <code>local</code>; the others do not.")
    return " ".join(parts)


def _against(summary: Summary, own: str, other: str) -> str:
    """How the RMSE of ``own`` compares with that of ``other``, with the paired interval if there is one."""
    theirs = summary.rows[other]["rmse"]
    gap = summary.rows[own]["rmse"].value - theirs.value
    difference = summary.difference(own, other)
    kind = "worse" if gap > 0 else "better" if gap < 0 else "equal"
    size = f"{abs(gap):.4f}"
    if difference is None:
        interval = "no paired interval recorded"
    else:
        low, high = difference.low, difference.high
        if gap < 0:
            low, high = -high, -low
        interval = f"95 % interval {low:.4f} to {high:.4f}"
        if low <= 0 <= high:
            interval += ", which does not exclude zero"
    against = f"<code>{html.escape(other)}</code> ({_number(theirs, digits=3)})"
    if kind == "equal":
        return f"its RMSE equals that of {against}"
    return f"it is {kind} than {against} by {size} ({interval})"


def _losses(summary: Summary, own: str) -> Iterator[str]:
    """One sentence for every row that beats ``own`` in a metric."""
    for other, scores in summary.rows.items():
        if other == own:
            continue
        worse = [name for name in METRICS if name != "share_gaining" and _worse(summary, own, other, name)]
        mine = summary.rows[own]
        others = [
            f"{METRICS[name][0]} {_metric(name, mine[name])} against {_metric(name, scores[name])}"
            for name in worse
            if name != "rmse"
        ]
        if "rmse" in worse:
            tail = f" Also: {'; '.join(others)}." if others else ""
            yield f"On RMSE {_against(summary, own, other)}.{tail}"
        elif others:
            yield f"Against <code>{html.escape(other)}</code>, though not on RMSE: {'; '.join(others)}."


def _worse(summary: Summary, own: str, other: str, metric: str) -> bool:
    mine, theirs = summary.rows[own].get(metric), summary.rows[other].get(metric)
    if mine is None or theirs is None:
        return False
    return mine.value > theirs.value if METRICS[metric][1] else mine.value < theirs.value


def _best(summary: Summary, metric: str) -> float | None:
    if metric not in METRICS:
        return None
    values = [scores[metric].value for scores in summary.rows.values() if metric in scores]
    return min(values) if METRICS[metric][1] else max(values)


def _cell(metric: str, score: Interval | None, best: float | None) -> str:
    if score is None:
        return "–"
    percent = metric in METRICS and METRICS[metric][2]
    factor, digits = (100, 1) if percent else (1, 3)
    value, low, high = (f"{factor * x:.{digits}f}" for x in (score.value, score.low, score.high))
    value += " %" if percent else ""
    if score.value == best:
        star = '<b aria-hidden="true">★</b><span class="unseen">best: </span>'
        value = f'<span class="best">{star} {value}</span>'
    return f"{value}<small>{low} – {high}</small>"


def _metric(metric: str, score: Interval) -> str:
    percent = METRICS[metric][2]
    return _number(score, digits=1 if percent else 3, percent=percent)


def _number(score: Interval, *, digits: int, sign: bool = False, percent: bool = False) -> str:
    """``1.234 [1.201, 1.267]``."""
    form, factor = f"{'+' if sign else ''}.{digits}f", 100 if percent else 1
    value, low, high = (format(factor * x, form) for x in (score.value, score.low, score.high))
    return f"{value}{' %' if percent else ''} [{low}, {high}]"


def _flows(summary: Summary) -> Iterator[str]:
    """What a device gives away, what it keeps, and what the run cost."""
    federation, trust = summary.federation, summary.privacy.trust
    yield "<h2>What leaves a device, and what does not</h2>"
    leaves = (
        f"<strong>Leaves:</strong> the change of the shared tensors that the policy names, {LEAVES[trust]}; "
        "the round number; the hash of the policy. Or, instead of these, one of a fixed set of refusal "
        "codes. That the device takes part, and when, shows by itself.",
        "<strong>Stays:</strong> texts, ratings, how many records there are, losses, every private tensor.",
        "<strong>Not hidden:</strong> a personal head holds what its owner's records taught it. It is "
        "made for the owner's device; whoever reads it reads the owner.",
    )
    yield f"<ul>{_items(leaves)}</ul>"
    yield (
        '<p class="dim">The scores on this page come from an observer outside the federation, '
        "which a deployment does not have.</p>"
    )
    rejected = ", ".join(f"{code} {count:,}" for code, count in federation.rejected.items()) or "none"
    yield (
        f"<p>{html.escape(federation.method)}, then {html.escape(federation.personal_method)}: "
        f"{federation.rounds:,} rounds, {federation.clients:,} clients, {federation.replies:,} replies; "
        f"rejected: {html.escape(rejected)}.</p>"
    )
    costs = {"this run": summary.cost} | ({"linear head": summary.cost_linear} if summary.cost_linear else {})
    yield "<h2>Cost</h2>"
    yield page.table(
        "What the run cost on the machine below",
        ["", *costs],
        [
            [html.escape(COSTS.get(key, key)), *(_amount(cost.get(key)) for cost in costs.values())]
            for key in dict.fromkeys(key for cost in costs.values() for key in cost)
        ],
    )
    if summary.heads:
        yield "<h2>Personal heads</h2>"
        base = summary.heads_base
        if base is not None:
            size = _amount(base.get("bytes"))
            yield f"<p>One base for the fleet: <code>{_text(base.get('path'))}</code>, {size} bytes.</p>"
        yield page.table(
            "Exported heads; parity is the largest difference between ONNX and torch on real texts",
            ["user", "folder", "bytes", "parity"],
            [
                [
                    html.escape(head.user),
                    f"<code>{html.escape(head.path)}</code>",
                    f"{head.bytes:,}",
                    f"{head.parity_max_abs:.1e}",
                ]
                for head in summary.heads
            ],
        )


def _repeat(folder: RunFolder) -> Iterator[str]:
    """All that is needed to run it again."""
    run = folder.run
    command = run.command if isinstance(run.command, str) else shlex.join(run.command)
    yield f'<h2>To repeat it</h2>\n<pre tabindex="0"><code>{html.escape(command)}</code></pre>'
    facts = {"commit": run.commit, "created": run.created, **run.machine, **run.versions}
    for caption, values in (("Versions and machine", facts), ("Seeds", run.seeds)):
        rows = [[html.escape(key), _text(value)] for key, value in values.items()]
        yield page.details(caption, page.table(caption, ["what", "value"], rows, words=True))
    settings = html.escape(json.dumps(folder.settings, indent=2, ensure_ascii=False))
    yield page.details("All settings", f'<pre tabindex="0">{settings}</pre>')


def _items(texts: Iterable[str]) -> str:
    return "".join(f"<li>{text}</li>" for text in texts)


def _text(value: Any) -> str:
    """A value of a JSON file as HTML."""
    if value is None:
        return "–"
    return html.escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _amount(value: Any) -> str:
    """A number with thousands set apart; one decimal where it is small enough to matter."""
    if not isinstance(value, int | float):
        return _text(value)
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.2f}"
