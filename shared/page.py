"""A self-contained page of HTML that loads nothing from anywhere: head, style, words, tables."""

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

# Okabe & Ito's palette, which the colour-blind tell apart; the lighter pair is for the dark scheme.
STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --paper: #fff; --card: #f6f8fa;
  --line: #d8dee4; --c0: #0072b2; --c1: #c75000; --c2: #00795a; --c3: #8a4a78;
  --b0: #0072b233; --b1: #c7500033; --b2: #00795a33; --b3: #8a4a7833; --warn-ink: #7a1f00; --warn-paper: #fff0e8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9aa5b1; --paper: #0f1318;
  --card: #181d24; --line: #30363d; --c0: #56b4e9; --c1: #f0a030; --c2: #2cc295; --c3: #d99ac5;
  --b0: #56b4e940; --b1: #f0a03040; --b2: #2cc29540; --b3: #d99ac540;
  --warn-ink: #ffc9ae; --warn-paper: #3a1c10; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .75rem; }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .4rem; }
p, ul { margin: .5rem 0; max-width: 46rem; }
ul { padding-left: 1.25rem; }
li { margin: .25rem 0; }
p, li, dd, td, th { overflow-wrap: break-word; }
.eyebrow, .dim, figcaption, caption { color: var(--dim); font-size: .875rem; }
.eyebrow { margin: 0; }
.stamps { display: flex; flex-wrap: wrap; gap: .4rem; list-style: none; padding: 0; }
.stamps li { border: 1px solid var(--line); border-radius: 1rem; padding: .05rem .75rem; font-size: .875rem;
  margin: 0; }
.warn { border: 2px solid var(--warn-ink); background: var(--warn-paper); color: var(--warn-ink);
  border-radius: .5rem; padding: .75rem 1rem; margin: 1rem 0; max-width: none; }
.claim { border-left: 4px solid var(--c0); background: var(--card); padding: .75rem 1rem;
  font-size: 1.05rem; }
.scroll { position: relative; overflow-x: auto; border: 1px solid var(--line); border-radius: .5rem; margin: .75rem 0; }
.scroll, summary, pre { outline-offset: 2px; }
:focus-visible { outline: 3px solid var(--c0); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .6rem .75rem; }
caption span { display: inline-block; position: sticky; left: .75rem; max-width: min(100%, 100vw - 4rem); }
figcaption { margin-top: .6rem; }
th, td { text-align: right; vertical-align: top; padding: .5rem .75rem; border-top: 1px solid var(--line); }
thead th { background: var(--card); white-space: nowrap; font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
tbody th { font-weight: 600; min-width: 9.5rem; }
tbody th small { display: block; font-weight: 400; line-height: 1.35; }
small { color: var(--dim); font-size: .8rem; }
td small { display: block; white-space: nowrap; }
table.words td { text-align: left; min-width: 10rem; overflow-wrap: anywhere; }
table.words thead th { text-align: left; }
table.runs thead th { white-space: normal; overflow-wrap: anywhere; min-width: 7rem; max-width: 16rem; }
table.runs td { white-space: nowrap; }
/* nothing in a plot can be clicked, whatever its library thinks */
figure .cursor-pointer, figure .legendtoggle { cursor: default !important; }
.best { font-weight: 700; white-space: nowrap; }
.best b { color: var(--c0); }
figure { margin: 1.5rem 0; }
figure > div { height: 340px; }
details { border: 1px solid var(--line); border-radius: .5rem; padding: .5rem 1rem; margin: .75rem 0; }
details .scroll { border: 0; margin: 0 -1rem; border-radius: 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.45; background: var(--card); border-radius: .5rem;
  padding: .75rem 1rem; }
code { font-size: max(.9em, .78rem); overflow-wrap: anywhere; }
dl { margin: .75rem 0; max-width: 46rem; color: var(--dim); font-size: .875rem; }
dt { font-weight: 600; float: left; clear: left; margin-right: .5em; }
dt::after { content: ":"; }
dd { margin: 0; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
@media (max-width: 40rem) { main { padding: 1.25rem 1rem 3rem; } h1 { font-size: 1.5rem; }
  th, td { padding: .4rem .6rem; } tbody th small { display: none; } tbody th { min-width: 6rem; }
  figure > div { height: 320px; } }
@media (prefers-reduced-motion: reduce) { *, *::before, *::after { animation: none !important;
  transition: none !important; scroll-behavior: auto !important; } }
"""


def document(
    title: str, body: str, *, kind: str, style: str = STYLE, data: str = "", scripts: Sequence[str] = ()
) -> str:
    """A whole page that may load nothing: its content policy refuses every address, and every script but its own.

    Args:
        title: Plain text.
        body: HTML; whatever came from data is escaped in it.
        kind: What the page is, by which ``is_ours`` knows it again.
        style: CSS.
        data: HTML after the body's ``main``, before the scripts.
        scripts: JavaScript; without any, the page runs none.
    """
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    policy += f" blob:; script-src {hashes}" if scripts else ""
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            _generator(kind),
            f'<title>{html.escape(title)}</title>\n<link rel="icon" href="data:,">',
            f"<style>{style}</style>\n</head>",
            f"<body>\n<main>\n{body}\n</main>",
            *([data] if data else []),
            *(f"<script>{script}</script>" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def is_ours(path: Path, *, kind: str) -> bool:
    """Whether a file is a page of this kind, which may be replaced."""
    with path.open("rb") as file:
        return _generator(kind).encode() in file.read(2000)


def write(path: Path, text: str) -> None:
    """Put a page where it belongs, as a whole or not at all."""
    partial = path.with_suffix(".html.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    partial.replace(path)


def _generator(kind: str) -> str:
    return f'<meta name="generator" content="sottovoce {html.escape(kind)}">'


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], *, look: str = "") -> str:
    """A table that scrolls inside its own box; every cell is HTML, the first of a row is its heading.

    Args:
        caption: Plain text, also the name of the box for a screen reader.
        head: HTML of the column headings.
        rows: HTML of the cells, as many as ``head``.
        look: ``words``: cells hold words, flush left; ``runs``: a column a run, under a heading of any length.
    """
    name = html.escape(caption)
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>\n'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{name}">'
        f'<table class="{look}"><caption><span>{name}</span></caption>'
        f"<thead><tr>{header}</tr></thead><tbody>\n{lines}</tbody></table></div>"
    )


def details(title: str, content: str) -> str:
    """A part of the page that opens on a click or with the Enter key."""
    return f"<details><summary>{html.escape(title)}</summary>\n{content}\n</details>"


def items(texts: Iterable[str]) -> str:
    """Items of a list, each HTML."""
    return "".join(f"<li>{text}</li>" for text in texts)


def text(value: Any) -> str:
    """A value of a JSON file as HTML."""
    return html.escape(plain(value))


def plain(value: Any) -> str:
    """A value of a JSON file as words."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
