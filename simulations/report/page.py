"""The page of a report: plots and scores on a page that loads nothing from anywhere (``shared/page.py``)."""

import html
import json
from collections.abc import Mapping
from typing import Any

from plotly.offline import get_plotlyjs

from shared.metrics.ratings import Interval
from shared.page import details, document, is_ours, items, plain, table, text, write

__all__ = [
    "amount",
    "details",
    "gap",
    "heading",
    "is_ours",
    "items",
    "page",
    "plain",
    "plot",
    "score",
    "table",
    "text",
    "write",
]

Figure = dict[str, Any]

# Colours in a figure name variables of the style: plots follow the reader's scheme, also when it changes.
_DRAW = """
'use strict';
function draw() {
  const style = getComputedStyle(document.documentElement);
  const colour = (key, value) => /color$/.test(key) && String(value).startsWith('--')
    ? style.getPropertyValue(value).trim() : value;
  const figures = JSON.parse(document.getElementById('figures').textContent, colour);
  for (const [id, figure] of Object.entries(figures)) {
    Plotly.react(id, figure.data, figure.layout, {responsive: true, displayModeBar: false});
  }
}
draw();
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
"""


def page(title: str, body: str, *, figures: Mapping[str, Figure], kind: str = "report") -> str:
    """A whole HTML page that may load nothing: its content policy refuses every address and other script.

    Args:
        title: Plain text.
        body: HTML; whatever came from data is escaped in it.
        figures: Id of an element of ``body`` -> plotly figure, its colours named ``--c0`` and so on.
        kind: What the page is, by which ``is_ours`` knows it again.
    """
    data = json.dumps(figures, allow_nan=False).replace("<", "\\u003c")  # no text can close the script
    described = f'<script type="application/json" id="figures">{data}</script>'
    return document(title, body, kind=kind, data=described, scripts=(get_plotlyjs(), _DRAW))


def plot(identifier: str, *, title: str, described: str, caption: str | None = None, height: int | None = None) -> str:
    """The place of one figure: a heading, an empty element to draw into, and in words what is to be seen.

    Args:
        identifier: Id of the figure.
        title: Plain text of the heading.
        described: Plain text; what a screen reader says instead of the plot.
        caption: Plain text below it; by default ``described``.
        height: In pixels; by default that of the style.
    """
    words = html.escape(described)
    size = f' style="height: {height}px"' if height else ""
    return (
        f"<h3>{html.escape(title)}</h3>\n<figure>"
        f'<div id="{identifier}" role="img" aria-label="{html.escape(title)}. {words}"{size}></div>'
        f"<figcaption>{words if caption is None else html.escape(caption)}</figcaption></figure>"
    )


def amount(value: Any) -> str:
    """A number with thousands set apart; two decimals where it is small enough to matter. Plain text."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return plain(value)
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:,.2f}"


HEADINGS = {
    "rmse": "RMSE",
    "mae": "MAE",
    "accuracy": "Accuracy",
    "user_rmse": "RMSE per user",
    "worst_decile": "Worst tenth of users",
    "share_gaining": "Users gaining",
    "perplexity": "Perplexity",
    "macro_f1": "Macro-F1",
    "user_accuracy": "Accuracy per user",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "meteor": "METEOR",
    "bertscore": "BERTScore",
    "hits@1": "hits@1",
    "dpo_loss": "DPO loss",
}
PERCENT = ("accuracy", "user_accuracy", "share_gaining")


def heading(metric: str) -> str:
    """Name of a metric for a reader, plain text; its key where it has none."""
    return HEADINGS.get(metric, metric)


def gap(metric: str, value: float) -> str:
    """By how much two values of a metric differ; shares in percentage points.

    Example:
        >>> gap("accuracy", 0.055), gap("rmse", 0.055)
        ('5.5 points', '0.0550')
    """
    return f"{100 * value:.1f} points" if metric in PERCENT else f"{value:.4f}"


def score(metric: str, value: Interval, *, digits: int = 3, sign: bool = False) -> str:
    """``1.234 [1.201, 1.267]``; shares in per cent.

    Example:
        >>> score("accuracy", Interval(0.4, 0.375, 0.425))
        '40.0 % [37.5, 42.5]'
    """
    factor, digits = (100, 1) if metric in PERCENT else (1, digits)
    form = f"{'+' if sign else ''}.{digits}f"
    middle, low, high = (format(factor * x, form) for x in (value.value, value.low, value.high))
    return f"{middle}{' %' if metric in PERCENT else ''} [{low}, {high}]"
