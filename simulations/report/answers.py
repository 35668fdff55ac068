"""The part of a report about answers in words: how near they come to what the users wrote, and which ones win."""

import html
from collections.abc import Iterator

from simulations.report import page
from simulations.report.parts import AnswerScores
from simulations.report.results import Summary

TITLE = "Answers in words"


def section(summary: Summary) -> list[str]:
    """The section; nothing for a run that was not asked for answers."""
    found = summary.answers
    return [f"<h2>{TITLE}</h2>", *_body(found)] if found is not None else []


def _body(found: AnswerScores) -> Iterator[str]:
    yield (
        f"<p>The first {found.per_user} test prompts of {found.users:,} users, {found.answers:,} in all, were answered "
        f"greedily by the devices' own runtime, in at most {found.longest} tokens, and compared with what the users "
        "wrote themselves. The texts of the answers are in <code>answers.json</code>.</p>"
    )
    metrics = list(found.metrics)
    best = {name: max(row[name].value for row in found.rows.values()) for name in metrics}
    yield page.table(
        "Answers, each score with its 95 % interval from a bootstrap over users. ★ marks the best of a column.",
        ["row", *(html.escape(page.heading(name)) for name in metrics)],
        [
            [
                html.escape(row),
                *(page.score(name, each[name]) + (" ★" if each[name].value == best[name] else "") for name in metrics),
            ]
            for row, each in found.rows.items()
        ],
    )
    words = "".join(
        f"<dt>{html.escape(page.heading(name))}</dt><dd>{html.escape(each.description)}</dd>"
        for name, each in found.metrics.items()
    )
    yield f"<dl>{words}</dl>"
    yield page.table(
        f"Share of prompts where the judge “{html.escape(found.judge)}” finds the first row's answer better than the "
        "second's, a draw counting half: 0.5 is a draw over all.",
        ["rows", "win rate"],
        [[html.escape(pair), page.score("win_rate", rate)] for pair, rate in found.win_rates.items()],
    )
