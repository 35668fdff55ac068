"""Turn a run folder into ``report.html``: what is claimed, what came out, and where privacy loses."""

import html
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.metrics.ratings import Interval
from shared.privacy.policy import read_policy
from shared.protocol.audits import FILE as AUDIT
from shared.protocol.audits import read_audit
from simulations.report import answers as answers_page
from simulations.report import membership as membership_page
from simulations.report import new_users as new_users_page
from simulations.report import page
from simulations.report import poison as poison_page
from simulations.report.audit import section as audit_section
from simulations.report.figures import by_round, by_user
from simulations.report.results import OverSeeds, RunFolder, Summary, check_summary, read_run

ROWS = {
    "constant": "the mean of all training ratings, or their most frequent label, for everyone",
    "user-mean": "each user's own mean rating",
    "user-majority": "each user's own most frequent label",
    "base": "the base model as published",
    "random": "an order without an opinion",
    "popularity": "how often everybody likes a text, counted in one place, no privacy",
    "popularity + profile": "the same and a private profile; the counts have no privacy",
    "pooled": "all data in one place, no privacy",
    "local": "the personal method alone, no federation",
    "dp-statistics-shared": "one private release of ratings, or likes, per text, smoothed: shared part alone",
    "dp-statistics": "one private release of ratings, or likes, per text, and the private part: the rival to match",
    "federated": "the shared part alone",
    "persona": "the shared part with the personas of a user's group",
    "personal of another": "the shared part and the private part of another user",
    "personal": "the shared part and a private part",
    "base + profile": "the base, the user's own records or statements before each prompt",
    "local + profile": "the personal method alone, with them",
    "federated + profile": "the shared part, with them",
    "personal + profile": "the shared part and a private part, with them",
    "federated-linear": "linear head: the shared part alone",
    "personal-linear": "linear head: shared and private part",
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
    "noise: seeded": "Whoever has this run's folder can compute its noise: it protects nobody. "
    "A device with an owner draws noise that nobody can repeat.",
    "tuning: not covered": "Settings were tuned on validation rows of the campaign's own users; "
    "ε does not cover that choice.",
    "tuning run: these users take part in no campaign": "This run is for choosing constants: its users are those whom "
    "the scenario sets aside for that, by a public hash of their ids.",
    "tuning: constants chosen on users outside the campaign, as the scenario states": "The scenario states that its "
    "constants were chosen on other users, set aside by a public hash of their ids; nothing in this run can prove it.",
}
LEAVES = {
    "local": "clipped per record and noised on the device",
    "distributed": "clipped, with the device's share of the noise, masked so that the server sees the sum",
    "central": "clipped on the device; the server adds the noise",
    "none": "without any noise",
}
NOT_PRIVATE = "NOT PRIVATE"
_HEADLINE = (
    "base",
    "base + profile",
    "local",
    "dp-statistics",
    "federated",
    "federated + profile",
    "persona",
    "personal",
    "personal + profile",
    "personal-linear",
)


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
    summary = folder.summary
    own = {name: rounds for name, rounds in folder.rounds.items() if not poison_page.is_rival(name)}
    round_figures, round_plots = by_round(own, metric=summary.metric)
    user_figures, user_plots = by_user(folder.users, less=summary.less_is_better(folder.users.metric))
    people_figures, people = new_users_page.section(summary)
    attack_figures, attack = membership_page.section(summary)
    sections = [
        *_opening(folder),
        *_outcome(summary),
        *("<h2>User by user</h2>", *user_plots),
        *("<h2>Round by round</h2>", *round_plots),
        *answers_page.section(summary),
        *people,
        *attack,
        *poison_page.section(summary),
        *_audited(run_folder),
        *_flows(summary),
        *_cost(summary),
        *_repeat(folder),
    ]
    title = f"{summary.scenario}: a Sottovoce run"
    figures = round_figures | user_figures | people_figures | attack_figures
    target = run_folder / "report.html"
    page.write(target, page.page(title, "\n".join(sections), figures=figures))
    return target


def headline(summary: Mapping[str, Any]) -> list[str]:
    """What a run found, in a few lines of plain text.

    Args:
        summary: What ``summary.json`` holds.

    Raises:
        DataError: A key is missing or has a wrong value.
    """
    checked = check_summary(summary)
    said = checked.private or checked.claim.startswith(NOT_PRIVATE)
    lines = [checked.claim if said else f"{NOT_PRIVATE}. {checked.claim}"]
    name = page.heading(checked.metric)
    shown = [row for row in _HEADLINE if row in checked.rows]
    width = max(15, *map(len, shown)) if shown else 15
    for row in shown:
        found = page.score(checked.metric, checked.rows[row][checked.metric])
        lines.append(f"{name} {row:<{width}}  {found}  {ROWS[row]}")
    if (difference := checked.difference("personal", "local")) is not None:
        side = "below" if checked.less_is_better(checked.metric) else "above"
        found = page.score(checked.metric, difference, digits=4, sign=True)
        lines.append(f"{name} personal - local  {found}  {side} 0: personal is better")
    lines += new_users_page.headline(checked)
    if checked.membership is not None:
        lines.append(membership_page.headline(checked.membership))
    if checked.poison is not None:
        lines.append(poison_page.headline(checked.metric, checked.poison))
    return lines


def _audited(run_folder: Path) -> Iterator[str]:
    """What ``sottovoce audit`` found on the run's own campaign, where somebody asked it."""
    if (run_folder / AUDIT).is_file():
        policies = [
            read_policy(path.read_text(encoding="utf-8")) for path in run_folder.glob("campaigns/*/policy.json")
        ]
        yield from audit_section(read_audit(run_folder / AUDIT), policies={policy.sha256 for policy in policies})


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
        f"{data.validation:,} to validate, {data.test:,} to test<br>"
        f"task {html.escape(summary.task)}, {_seeds(summary)}, run {html.escape(folder.run.created)}</p>"
    )
    if summary.stamps:
        yield f'<ul class="stamps" aria-label="Stamps">{page.items(html.escape(s) for s in summary.stamps)}</ul>'
    yield f'<h2>This is a simulation</h2>\n<p class="claim">{html.escape(summary.claim)}</p>'
    if privacy.sentence != summary.claim:
        yield f"<p>{html.escape(privacy.sentence)}</p>"
    yield "<p>Every device of this run was simulated on one machine, which held the data of all of them."
    if summary.private:
        yield (
            "The ε is what a deployment with these settings <em>would</em> spend on what leaves a device. "
            "It is no promise about this folder: whoever has the seeds kept in it can compute the noise and "
            "take it away "
            f"(<code>privacy.noise</code> reads <code>{page.text(privacy.noise)}</code>)."
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
    if summary.privacy_statistics is not None:
        campaigns["dp-statistics"] = summary.privacy_statistics.model_dump()
    keys = dict.fromkeys(key for terms in campaigns.values() for key in terms if key != "sentence")
    yield page.details(
        "The terms of the claim",
        page.table(
            "What the claim rests on",
            ["term", *campaigns],
            [[html.escape(key), *(page.text(terms.get(key)) for terms in campaigns.values())] for key in keys],
            look="words",
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
            yield f'<ul id="losses">{page.items(losses)}</ul>'
        else:
            yield f'<p id="no-losses">Nowhere: no other row beats <code>{own}</code> in any metric.</p>'
    yield from _table_of_rows(summary)


def _table_of_rows(summary: Summary) -> Iterator[str]:
    """Every row and metric with its interval over users; over seeds too, where the run has several."""
    metrics = list(dict.fromkeys(name for scores in summary.rows.values() for name in scores))
    seeds = len(summary.seeds)
    head, cells = [], []
    for name in metrics:
        head.append(html.escape(page.heading(name)))
        cells.append([_cell(name, scores.get(name), summary.best(name)) for scores in summary.rows.values()])
        if seeds > 1 and name == summary.metric:
            head.append(f"{html.escape(page.heading(name))}, {seeds} seeds")
            cells.append([_spread(name, summary.over_seeds.get(row, {}).get(name)) for row in summary.rows])
    caption = (
        f"Test rows{f', mean over {seeds} seeds' if seeds > 1 else ''}, each with its 95 % interval from a "
        "bootstrap over users. ★ marks the best of a column."
    )
    yield page.table(
        caption,
        ["row", *head],
        [
            [f"{html.escape(row)} <small>{ROWS.get(row, 'no description in this version')}</small>", *line]
            for row, line in zip(summary.rows, zip(*cells, strict=True), strict=True)
        ],
    )
    if summary.privacy_statistics is not None:
        yield (
            '<p id="statistics"><code>dp-statistics</code> is no federation of a model: every device sends, once, a '
            "clipped sum of its ratings and a count for each public text, or of its likes. The noised sums are "
            "smoothed over similar texts, and every device adds the private part of <code>personal</code>. It is "
            "another release on the same "
            f"data, with a claim of its own: {html.escape(summary.privacy_statistics.sentence)}</p>"
        )
    if seeds > 1:
        yield (
            f'<p class="dim">The column “{html.escape(page.heading(summary.metric))}, {seeds} seeds” holds the 95 % '
            f"t-interval of the mean over the seeds {', '.join(map(str, summary.seeds))}, and below it the least and "
            "the largest value of a seed: it says how much training and noise matter for the same users. "
            "The others say how much the users matter for the same seeds.</p>"
        )
        yield page.details("Every metric over the seeds", _table_of_seeds(summary))
    described = [(name, summary.metrics[name].description) for name in metrics if name in summary.metrics]
    words = "".join(
        f"<dt>{html.escape(page.heading(name))}</dt><dd>{html.escape(text)} "
        f"({summary.metrics[name].better} is better)</dd>"
        for name, text in described
    )
    yield f"<dl>{words}</dl>"


def _table_of_seeds(summary: Summary) -> str:
    found = [(row, name, spread) for row, scores in summary.over_seeds.items() for name, spread in scores.items()]
    return page.table(
        "Mean over the seeds with its 95 % t-interval, and the value of each seed",
        ["row and metric", "mean", *(f"seed {seed}" for seed in summary.seeds)],
        [
            [
                f"{html.escape(row)}, {html.escape(page.heading(name))}",
                _cell(name, Interval(spread.value, spread.low, spread.high), None),
                *(_value(name, value) for value in spread.values),
            ]
            for row, name, spread in found
        ],
    )


def _seeds(summary: Summary) -> str:
    numbers = ", ".join(str(seed) for seed in summary.seeds)
    return f"seed{'s' if len(summary.seeds) > 1 else ''} {numbers}"


def _own_row(summary: Summary) -> str | None:
    """The row that the run is about: what a user gets from the private campaign."""
    return next((row for row in ("personal", "federated") if row in summary.rows), None)


def _verdict(summary: Summary, own: str) -> str:
    """Own row against the ones that matter most, in one paragraph."""
    scores = summary.rows[own]
    reached = page.score(summary.metric, scores[summary.metric])
    parts = [
        f"On {summary.data.test:,} test records, <code>{own}</code> ({ROWS[own]}) reaches: "
        f"{html.escape(page.heading(summary.metric))} <strong>{reached}</strong>."
    ]
    for other in ("base", "local", "dp-statistics", "personal-linear", "pooled"):
        if other in summary.rows:
            words = _against(summary, own, other)
            parts.append(f"{words[0].upper()}{words[1:]}.")
    if "share_gaining" in scores:
        gaining = page.score("share_gaining", scores["share_gaining"])
        parts.append(f"With it, {gaining} of users are better off than with <code>local</code>; the others are not.")
    return " ".join(parts)


def _against(summary: Summary, own: str, other: str) -> str:
    """How ``own`` compares with ``other`` by the primary metric, with the paired interval if there is one."""
    metric = summary.metric
    mine, theirs = summary.rows[own][metric], summary.rows[other][metric]
    against = f"<code>{html.escape(other)}</code> ({page.score(metric, theirs)})"
    if mine.value == theirs.value:
        return f"it equals {against}"
    difference = summary.difference(own, other)
    if difference is None:
        interval = "no paired interval recorded"
    else:
        low, high = difference.low, difference.high
        if mine.value < theirs.value:
            low, high = -high, -low
        interval = f"95 % interval {page.gap(metric, low).removesuffix(' points')} to {page.gap(metric, high)}"
        if low <= 0 <= high:
            interval += ", which does not exclude zero"
    kind = "better" if summary.better(metric, mine.value, theirs.value) else "worse"
    return f"it is {kind} than {against} by {page.gap(metric, abs(mine.value - theirs.value))} ({interval})"


def _losses(summary: Summary, own: str) -> Iterator[str]:
    """One sentence for every row that beats ``own`` in a metric."""
    mine, primary = summary.rows[own], summary.metric
    for other, scores in summary.rows.items():
        worse = [
            name
            for name in mine
            if name in scores and name != "share_gaining" and summary.better(name, scores[name].value, mine[name].value)
        ]
        others = [
            f"{html.escape(page.heading(name))} {page.score(name, mine[name])} against {page.score(name, scores[name])}"
            for name in worse
            if name != primary
        ]
        named = html.escape(page.heading(primary))
        if primary in worse:
            tail = f" Also: {'; '.join(others)}." if others else ""
            yield f"By {named}, {_against(summary, own, other)}.{tail}"
        elif others:
            yield f"Against <code>{html.escape(other)}</code>, though not by {named}: {'; '.join(others)}."


def _cell(metric: str, score: Interval | None, best: float | None) -> str:
    if score is None:
        return "–"
    value, low, high = (_value(metric, x) for x in (score.value, score.low, score.high))
    if score.value == best:
        star = '<b aria-hidden="true">★</b><span class="unseen">best: </span>'
        value = f'<span class="best">{star} {value}</span>'
    return f"{value}<small>{low.removesuffix(' %')} – {high.removesuffix(' %')}</small>"


def _spread(metric: str, spread: OverSeeds | None) -> str:
    if spread is None:
        return "–"
    low, high, least, most = (
        _value(metric, x) for x in (spread.low, spread.high, min(spread.values), max(spread.values))
    )
    return f"{low} – {high}<small>seeds {least} to {most}</small>"


def _value(metric: str, value: float) -> str:
    return f"{100 * value:.1f} %" if metric in page.PERCENT else f"{value:.3f}"


def _flows(summary: Summary) -> Iterator[str]:
    """What a device gives away, and what it keeps."""
    federation, trust = summary.federation, summary.privacy.trust
    yield "<h2>What leaves a device, and what does not</h2>"
    leaves = (
        f"<strong>Leaves:</strong> the change of the shared tensors that the policy names, {LEAVES[trust]}; "
        "the round number; the hash of the policy. Or, instead of these, one of a fixed set of refusal "
        "codes. That the device takes part, and when, shows by itself.",
        "<strong>Stays:</strong> the records, how many there are, losses, every private tensor.",
        "<strong>Not hidden:</strong> a personal head holds what its owner's records taught it. It is "
        "made for the owner's device; whoever reads it reads the owner.",
    )
    yield f"<ul>{page.items(leaves)}</ul>"
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


def _cost(summary: Summary) -> Iterator[str]:
    """What the run took, and the heads it left."""
    costs = {"this run": summary.cost} | ({"linear head": summary.cost_linear} if summary.cost_linear else {})
    yield "<h2>Cost</h2>"
    yield page.table(
        "What the run cost on the machine below",
        ["", *costs],
        [
            [html.escape(COSTS.get(key, key)), *(page.amount(cost.get(key)) for cost in costs.values())]
            for key in dict.fromkeys(key for cost in costs.values() for key in cost)
        ],
    )
    if summary.resumed:
        yield "<p>The run was interrupted and continued there; the cost is that of the last process only.</p>"
        where = (f"{one.campaign}, seed {one.seed}: after round {one.round:,}, at {one.at}" for one in summary.resumed)
        yield f'<ul id="resumed">{page.items(html.escape(one) for one in where)}</ul>'
    if summary.heads:
        yield "<h2>Personal heads</h2>"
        base = summary.heads_base
        if base is not None:
            size = html.escape(page.amount(base.get("bytes")))
            yield f"<p>One base for the fleet: <code>{page.text(base.get('path'))}</code>, {size} bytes.</p>"
        yield page.table(
            "Exported heads; parity is the largest difference between ONNX and torch on real texts",
            ["user", "folder", "bytes", "parity"],
            [
                [
                    html.escape(head.user),
                    f"<code>{html.escape(head.path)}</code>",
                    f"{head.bytes:,}",
                    "–" if head.parity_max_abs is None else f"{head.parity_max_abs:.1e}",
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
        rows = [[html.escape(key), page.text(value)] for key, value in values.items()]
        yield page.details(caption, page.table(caption, ["what", "value"], rows, look="words"))
    settings = html.escape(json.dumps(folder.settings, indent=2, ensure_ascii=False))
    yield page.details("All settings", f'<pre tabindex="0">{settings}</pre>')
