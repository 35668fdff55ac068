"""The part of the owner's page that asks the personal model and the base alone, and shows both answers side by side."""

import html
from collections.abc import Iterator, Sequence
from typing import Any

from client.dashboard.beside import MAX_TEXTS, Beside, Compared, Numbers, Words, read_pieces
from client.dashboard.guard import Session
from client.dashboard.parts import bar, form, nav, rows, text, whole
from client.serve.answer import Answer
from shared.errors import HeadError

LENGTHS, LENGTH = (16, 32, 64, 128, 256), 64  # new tokens of an answer in words
MAX_CHARACTERS = 20_000

_HERE = "<!-- here -->"
_MINE, _BASE = "Your model", "The base alone"


def trial_form(session: Session, beside: Beside | None, *, asked: str = "", length: int = LENGTH) -> str:
    """What to type a text into.

    Args:
        session: Of the browser.
        beside: What answers; None where the page was opened without a base.
        asked: What was typed before.
        length: Of an answer in words.
    """
    if beside is None:
        return (
            "<p>To ask both, open this page with the fleet's base: "
            "<code>sottovoce client dashboard --base DIR</code></p>"
        )
    if isinstance(beside, Words):
        label, hint = "Your prompt", "Both answer with their likeliest words; nothing you type or read is kept."
    else:
        label, hint = f"Texts, one a line, at most {MAX_TEXTS}", "Nothing you type is kept."
    fields = (
        f'<label for="asked">{label}</label><textarea id="asked" name="asked" required maxlength="{MAX_CHARACTERS}" '
        f'aria-describedby="asked-hint">\n{html.escape(asked)}</textarea><p class="dim" id="asked-hint">{hint}</p>'
    )
    if isinstance(beside, Words):
        options = "".join(f"<option{' selected' if n == length else ''}>{n}</option>" for n in LENGTHS)
        fields += (
            f'<label for="length">At most so many tokens</label><select id="length" name="length">{options}</select>'
        )
    return form(session, "try", fields, "Ask both")


def numbers_page(session: Session, beside: Numbers, compared: Compared, *, asked: str) -> str:
    """Both answers to each text, as numbers or labels; scores without a scale are ranked by the personal ones."""
    lines = [
        (
            text(line),
            "–" if compared.personal is None else _said(beside, compared.personal[row]),
            _said(beside, compared.base[row]),
        )
        for row, line in enumerate(compared.texts)
    ]
    if beside.task == "ranking":
        scores = compared.base if compared.personal is None else compared.personal
        lines = [lines[row] for row in sorted(range(len(lines)), key=lambda row: -scores[row])]
    mine = _MINE if compared.version is None else f"{_MINE} (version {compared.version})"
    body = [
        "<h1>Both answers</h1>",
        nav(("Back", session.path() + "#try")),
        _problem(compared.problem),
        rows("What each says", ("Text", mine, _BASE), lines),
        f'<p class="dim">{_meaning(beside)}</p>',
        "<h2>Ask again</h2>",
        trial_form(session, beside, asked=asked),
    ]
    return whole("Both answers", "\n".join(body))


def words_page(
    session: Session, beside: Words, answers: tuple[Answer | str, Answer], *, asked: str, length: int
) -> Iterator[str]:
    """Both answers to a prompt, in pieces of one page as they come: a browser shows what it has."""
    head, foot = whole("Both answers", _HERE).split(_HERE)
    personal, base = answers
    name = "" if isinstance(personal, str) else f" <small>{text(personal.chosen.name)}</small>"
    yield (
        f"{head}<h1>Both answers</h1>\n{nav(('Back', session.path() + '#try'))}\n<h2>You asked</h2>\n"
        f'<p class="answer claim">{html.escape(asked)}</p>\n<div class="beside">\n<section class="card" id="personal">'
        f"<h3>{_MINE}{name}</h3>"
    )
    if isinstance(personal, str):
        yield _problem(personal)
    else:
        yield from _answer(personal)
    yield f'</section>\n<section class="card" id="base"><h3>{_BASE}</h3>'
    yield from _answer(base)
    yield f"</section>\n</div>\n<h2>Ask again</h2>\n{trial_form(session, beside, asked=asked, length=length)}{foot}"


def _answer(answer: Answer) -> Iterator[str]:
    yield '<p class="answer">'
    problem = None
    try:
        yield from (html.escape(piece) for piece in read_pieces(answer))
    except HeadError as error:
        problem = str(error)
    yield f"</p>{_problem(problem)}"
    if problem is None:
        made = answer.usage()["completion_tokens"]
        ended = "it ended there" if answer.finish == "stop" else "it was cut there"
        yield f'<p class="dim">{made} tokens; {ended}</p>'


def _problem(words: str | None) -> str:
    return "" if words is None else f'<p class="warn">No private head answers: {text(words)}</p>'


def _said(beside: Numbers, answer: Any) -> str:
    if beside.labels:
        return _likeliest(beside.labels, answer)
    if beside.ends is None:
        return f"<b>{float(answer):.2f}</b>"
    low, high = beside.ends
    said = f"{float(answer):.2f}"
    return f"<b>{said}</b>{bar(f'{said} between {low:g} and {high:g}', float(answer) - low, high - low)}"


def _likeliest(labels: Sequence[str], shares: Sequence[float]) -> str:
    ordered = sorted(zip(labels, shares, strict=True), key=lambda one: -one[1])
    (first, share), others = ordered[0], ", ".join(f"{text(label)} {share:.0%}" for label, share in ordered[1:3])
    return f"<b>{text(first)}</b> {share:.0%}{bar(f'{share:.0%}', float(share), 1.0)}<small>{others}</small>"


def _meaning(beside: Numbers) -> str:
    if beside.labels:
        return "The likeliest label and how likely it is, then the next two. The base alone finds all alike."
    if beside.ends is None:
        return "Scores without a scale, the highest first: only their order means anything. The base alone has none."
    low, high = beside.ends
    return f"Between {low:g} and {high:g}. The base alone knows nobody: it says the middle for every text."
