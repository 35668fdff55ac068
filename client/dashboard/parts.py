"""What every part of the owner's page is made of: its style, its head, forms, bars, words. No script, nothing loaded.

Every button is a form of its own, so that the page works by keyboard, without a script and without a mouse.
"""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from client.dashboard.guard import Session
from client.owner.words import plain
from shared.page import STYLE, document, items, table

KIND = "owner's page"

_MORE_STYLE = """
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; list-style: none; padding: 0; margin: 1rem 0 0; }
a { color: var(--c0); text-underline-offset: .2em; }
section { scroll-margin-top: 1rem; }
.said { border: 2px solid var(--c2); border-radius: .5rem; padding: .6rem 1rem; margin: 1rem 0; max-width: none; }
.said p { margin: .2rem 0; }
.said.warn { border-color: var(--warn-ink); }
.state { display: flex; flex-wrap: wrap; align-items: center; justify-content: space-between; gap: .75rem 1.5rem;
  background: var(--card); border-left: 4px solid var(--c0); padding: .75rem 1rem; margin: 1rem 0; }
.state p { margin: 0; }
.state .word { font-size: 1.25rem; font-weight: 600; line-height: 1.3; }
.paused { border-left-color: var(--c1); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .25rem 1rem .9rem; min-width: 0; }
.card h3 { margin: .75rem 0 .25rem; overflow-wrap: anywhere; }
.bar { display: block; width: 100%; height: .7rem; margin: .35rem 0; }
.bar rect { fill: var(--line); }
.bar .used { fill: var(--c0); }
.figures { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem; margin: .25rem 0 0; }
.figures b { font-variant-numeric: tabular-nums; }
form { margin: .75rem 0 0; }
.state form { margin: 0; }
label { display: block; font-weight: 600; margin: .5rem 0 .25rem; }
label.sure { font-weight: 400; display: flex; gap: .5rem; align-items: baseline; }
button, input, textarea, select { font: inherit; color: inherit; }
button { background: var(--paper); border: 2px solid var(--c0); color: var(--c0); font-weight: 600;
  border-radius: .4rem; padding: .35rem .9rem; cursor: pointer; min-height: 2.75rem; }
button:hover { background: var(--card); }
button.grave { border-color: var(--warn-ink); color: var(--warn-ink); }
input[type=text], textarea, select { background: var(--paper); border: 1px solid var(--dim); border-radius: .4rem;
  padding: .45rem .6rem; width: 100%; max-width: 46rem; }
input[type=text], select { max-width: 16rem; display: block; min-height: 2.75rem; }
textarea { min-height: 6rem; resize: vertical; display: block; }
summary { min-height: 2.75rem; display: list-item; padding: .5rem 0; }
details { padding-top: .1rem; padding-bottom: .1rem; }
details[open] { padding-bottom: .9rem; }
.beside { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem;
  margin-top: 1rem; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 3rem; margin: .25rem 0; max-width: none; }
td form, td form p { margin: 0; }
table.words td { min-width: 0; }
.narrow { display: none; }
@media (max-width: 40rem) {
  .rows, .rows tbody, .rows tr, .rows th, .rows td { display: block; border: 0; padding: 0; }
  .rows caption { display: block; }
  .rows thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .rows tr { padding: .6rem .75rem; border-top: 1px solid var(--line); }
  .rows td { margin-top: .25rem; }
  .rows .narrow { display: inline; color: var(--dim); }
}
"""
_ALL_STYLE = STYLE + _MORE_STYLE
_STYLE_HASH = base64.b64encode(hashlib.sha256(_ALL_STYLE.encode()).digest()).decode()
POLICY = (
    f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; img-src data:; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Said:
    """What an action came to, shown once.

    Attributes:
        lines: Sentences, plain text.
        wrong: Whether it failed.
    """

    lines: tuple[str, ...]
    wrong: bool = False


def whole(title: str, body: str) -> str:
    """A page of ours."""
    return document(f"{title} – Sottovoce", body, kind=KIND, style=_ALL_STYLE)


def refusal_page(words: str) -> str:
    """What is said to a request that is not answered."""
    return whole("Not answered", f'<h1>Not answered</h1>\n<p class="warn" role="alert">{text(words)}</p>')


def welcome_page(session: Session) -> str:
    """Goes on to the page, from this origin: a cookie is not shown to a page that another one led to."""
    there = html.escape(session.path())
    return whole("Opening", f'<h1>Your page opens</h1>\n<p><a href="{there}">Open it</a></p>').replace(
        "<head>", f'<head>\n<meta http-equiv="refresh" content="0; url={there}">', 1
    )


def rows(caption: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table whose rows are blocks where the page is narrow; every cell is HTML, the first of a row is its heading."""
    named = [
        [first, *(f'<span class="narrow">{name} </span>{cell}' for name, cell in zip(head[1:], rest, strict=True))]
        for first, *rest in lines
    ]
    return table(caption, head, named, look="words rows")


def nav(*links: tuple[str, str]) -> str:
    """Links, each a name and where it leads."""
    shown = items(f'<a href="{text(to)}">{text(name)}</a>' for name, to in links)
    return f'<nav aria-label="Parts of the page"><ul>{shown}</ul></nav>'


def said_box(said: Said | None) -> str:
    """What an action came to; nothing where there was none."""
    if said is None:
        return ""
    look = "said warn" if said.wrong else "said"
    role = "alert" if said.wrong else "status"
    lines = "".join(f"<p>{text(sentence(line))}</p>" for line in said.lines)
    return f'<div class="{look}" role="{role}" tabindex="-1" autofocus>{lines}</div>'


def button(
    session: Session, action: str, word: str, *, label: str | None = None, hidden: Mapping[str, str] | None = None
) -> str:
    """A form that is one button."""
    fields = "".join(
        f'<input type="hidden" name="{name}" value="{text(value)}">' for name, value in (hidden or {}).items()
    )
    return form(session, action, fields, word, label=label)


def form(
    session: Session, action: str, fields: str, word: str, *, grave: bool = False, label: str | None = None
) -> str:
    """A form of ours.

    Args:
        session: Of the browser.
        action: What it asks for.
        fields: HTML of its fields.
        word: On the button.
        grave: Whether it cannot be undone.
        label: Of the button, for a screen reader, where ``word`` says too little.
    """
    look = ' class="grave"' if grave else ""
    name = "" if label is None else f' aria-label="{text(label)}"'
    return (
        f'<form method="post" action="{text(session.path(action))}"><input type="hidden" name="form" '
        f'value="{session.form}">{fields}<p><button{look}{name}>{text(word)}</button></p></form>'
    )


def bar(said: str, used: float, cap: float) -> str:
    """How much of a cap is used; ``said`` is what a screen reader says."""
    share = 100.0 * min(1.0, max(0.0, used / cap)) if cap > 0 else 0.0
    return (
        f'<svg class="bar" role="img" aria-label="{text(said)}" viewBox="0 0 100 4" preserveAspectRatio="none">'
        f'<rect width="100" height="4"></rect><rect class="used" width="{share:.3f}" height="4"></rect></svg>'
    )


def when(at: str) -> str:
    """A time of the ledger, in UTC, to the minute."""
    return f'<time datetime="{text(at)}">{text(at[:16].replace("T", " "))}</time>'


def day(at: str) -> str:
    """Likewise, to the day."""
    return f'<time datetime="{text(at)}">{text(at[:10])}</time>'


def sentence(words: str) -> str:
    """With a capital letter."""
    return words[:1].upper() + words[1:]


def text(value: object) -> str:
    """A value from anywhere as HTML, on one line."""
    return html.escape(plain(value))
