"""A privacy card as a page: the claim and its gaps first, then every number with its source; it loads nothing."""

import html
import re
from collections.abc import Iterator, Mapping
from math import ceil, floor, log10
from typing import Any

from shared.card.cells import Cell, cells, is_cell
from shared.card.words import LABELS
from shared.page import STYLE, details, document, items, plain, table

_STYLE = """
.box { border: 2px solid var(--c0); border-radius: .6rem; padding: .5rem 1.25rem 1rem; margin: 1.25rem 0; }
.box h2 { margin: 1rem 0 .25rem; }
.box p, .box li { font-size: 1.05rem; }
.box .claim { font-size: 1.15rem; }
.band { position: sticky; top: 0; z-index: 2; margin: 0; padding: .5rem 1.25rem; max-width: none; text-align: center;
  background: var(--warn-paper); color: var(--warn-ink); border-bottom: 3px solid var(--warn-ink); font-weight: 700;
  letter-spacing: .02em; }
.tag { display: inline-block; border: 1px solid currentColor; border-radius: .4rem; padding: 0 .5rem; font-weight: 700;
  white-space: nowrap; margin: 0 .35rem .25rem 0; }
.tag.bad { background: var(--warn-paper); color: var(--warn-ink); border-width: 2px; }
.tag.good { color: var(--c2); }
.num { font-weight: 600; }
.from, .from code { color: var(--dim); font-size: .8rem; }
table.cells { table-layout: fixed; } table.cells thead th { white-space: normal; }
table.cells thead th:first-child { width: 34%; }
table.cells td > div { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1.5rem; }
table.cells td > div > span { max-width: 100%; overflow-wrap: anywhere; } table.cells .from { margin-left: auto; }
table.gaps thead th:first-child { width: 34%; }
.level { border: 1px solid var(--line); border-radius: .5rem; padding: .25rem 1rem .5rem; margin: .75rem 0; }
.questions dt { float: none; margin-top: .9rem; font-size: 1rem; color: var(--ink); }
.questions dt::after { content: none; }
.questions { font-size: 1rem; color: var(--ink); }
@media print { :root { color-scheme: light; } body { font-size: 11pt; } main { max-width: none; padding: 0; }
  .scroll { overflow: visible; border: 0; } .box, .level, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .band { position: static; } .experiment h2::before { content: "EXPERIMENT: "; } }
@media (max-width: 40rem) { table.cells thead th:first-child, table.gaps thead th:first-child { width: 38%; } }
"""
_TIME = re.compile(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d\+00:00$")
_REPEATED = ("schema", "questions", "claim")  # these hold cells of other parts
_UP = ("accounting.epsilon", "exp", "group.epsilon", "group.delta")
_FEW = 2  # inputs of a computed value that are named beside it; all of them are below
_SHORT = 60  # characters of a value that is set in bold
_PLACES = {
    "device": "Made on a device, from its owner's ledger.",
    "server": "Made by the operator of the server, from what the server knows.",
    "campaign": "Made from the published campaign, before anything was spent.",
    "experiment": "Made from a simulation.",
}
_SPENT = {
    "device": "What this device has spent, and what is left",
    "server": "What was spent, as the server knows it",
    "campaign": "What it will cost at most",
    "experiment": "What was simulated",
}


def render(card: Mapping[str, Any]) -> str:
    """The page of a card.

    Args:
        card: As ``shared.card.card.build_card`` makes it.

    Returns:
        HTML that holds everything it needs; its content policy refuses every address and every script.
    """
    name = plain(card["campaign"]["name"]["value"])
    title = f"Privacy card: {name}"
    if card["experiment"]:
        title = f"{card['status']}. {title}"
    sections = [*_opening(card, name), *_numbers(card), *_audits(card), *_gaps(card), *_questions(card), *_trace(card)]
    look = "experiment" if card["experiment"] else "promise"
    body = "\n".join([f'<div class="{look}">', *sections, "</div>"])
    return document(title, body, kind="privacy card", style=STYLE + _STYLE)


def shown(cell: Cell) -> str:
    """The value of a cell as HTML. A computed price is rounded up, in its fourth digit; what is quoted is whole."""
    value = cell["value"]
    if cell.get("computed") in _UP:
        value = _up(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return html.escape(", ".join(value)) or "none"
    return html.escape(_TIME.sub(r"\1 \2 UTC", plain(value)))


def _up(value: float) -> float:
    """Four digits, never below the value."""
    if not value > 0:
        return float(value)
    digits = 3 - floor(log10(value))
    return ceil(value * 10**digits) / 10**digits if digits >= 0 else float(ceil(value))


def _from(cell: Cell) -> str:
    """Where a cell is from, as HTML."""
    if "source" in cell:
        return f"<code>{html.escape(cell['source'])}</code>"
    of = f" of {', '.join(cell['from'])}" if len(cell["from"]) <= _FEW else ""
    return f"computed: <code>{html.escape(cell['computed'] + of)}</code>"


def _prose(parts: list[Any]) -> str:
    """Text and cells in turn."""
    return "".join(
        f'<span class="num" title="{html.escape(_title(part))}">{shown(part)}</span>'
        if is_cell(part)
        else html.escape(part)
        for part in parts
    )


def _title(cell: Cell) -> str:
    return str(cell["source"]) if "source" in cell else f"{cell['computed']} of {', '.join(cell['from'])}"


def _opening(card: Mapping[str, Any], name: str) -> Iterator[str]:
    if card["experiment"]:
        yield (
            f'<p class="band" role="note">{html.escape(card["status"])}: a simulation. '
            "This card is a promise to nobody.</p>"
        )
    yield f'<p class="eyebrow">Sottovoce privacy card</p>\n<h1>{html.escape(name)}</h1>'
    made = f"{_PLACES[card['place']]} {shown(card['created'])}."
    yield f'<p class="dim">{made} Every number names the file it is from; the files are beside this page.</p>'
    if card["experiment"]:
        yield (
            f'<p class="warn"><strong>{html.escape(card["status"])}.</strong> Every device was simulated on one '
            "machine, with noise from seeds that lie in the run's folder. Do not show this page to owners of devices "
            "as what they are promised.</p>"
        )
    gaps = items(
        f"<strong>{_start(gap['what'])}.</strong> {html.escape(gap['why'])}" for gap in card["not_covered"][:3]
    )
    promised = "What would be promised" if card["experiment"] else "What is promised"
    yield (
        f'<div class="box"><h2>{promised}</h2>\n<p class="claim">{_prose(card["claim"])}</p>\n'
        f'<h2>What is not</h2>\n<ul id="first-gaps">{gaps}</ul>\n'
        f'<h2>Has it been attacked?</h2>\n<p id="verdict">{_tagged(card["audit_verdict"])}</p></div>'
    )
    if card["stamps"]:
        yield f'<ul class="stamps" aria-label="Stamps">{items(shown(stamp) for stamp in card["stamps"])}</ul>'


def _start(text: str) -> str:
    return html.escape(f"{text[0].upper()}{text[1:]}")


def _tagged(text: str) -> str:
    """The words nobody may overlook, as tags."""
    out = html.escape(text)
    for word in ("FAILED", "NO POWER"):
        out = out.replace(word, f'<span class="tag bad">{word}</span>')
    return out


def _section(caption: str, section: Mapping[str, Cell], *, labels: Mapping[str, str] = LABELS) -> str:
    rows = [[html.escape(labels.get(key, key)), _sourced(cell)] for key, cell in section.items()]
    return table(caption, ["what", "value, and where it is from"], rows, look="words cells")


def _sourced(cell: Cell) -> str:
    """A value, and beside or below it where it is from."""
    value = shown(cell)
    strong = "num" if len(value) <= _SHORT else "text"
    return f'<div><span class="{strong}">{value}</span><span class="from">{_from(cell)}</span></div>'


def _numbers(card: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>The campaign and its claim</h2>"
    yield _section("The campaign", card["campaign"])
    yield _section("The claim, in full", card["promise"])
    yield "<h2>The constants it rests on</h2>"
    yield _section("Constants of the policy; nothing in them depends on a user's data", card["constants"])
    if card["spent"]:
        yield "<h2>Spent and left</h2>"
        yield _section(_SPENT[card["place"]], card["spent"])
    if card["place"] == "device":
        yield "<h2>What left this device</h2>"
        yield _released(card)
        yield "<h2>Keys of this device</h2>"
        yield _section("Where the keys are, and whether a restored backup is noticed", card["keys"])
        yield _key_words(card["keys"])
    if card["utility"]:
        yield "<h2>What it is good for</h2>"
        yield _section("Scores", card["utility"])


_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # of no bytes: nothing was kept


def _released(card: Mapping[str, Any]) -> str:
    if not card["releases"]:
        return "<p>Nothing yet.</p>"
    rows = [
        [
            shown(one["round"]),
            shown(one["at"]),
            shown(one["size_bytes"]),
            "not kept: a hash would confirm a guess"
            if one["sha256"]["value"] == _EMPTY
            else f"<code>{shown(one['sha256'])}</code>",
            f"<code>{html.escape(one['round']['source'].rpartition('/')[0])}</code>",
        ]
        for one in card["releases"]
    ]
    return table(
        "Answers that were sent", ["round", "when", "bytes", "SHA-256 of the bytes", "source"], rows, look="words"
    )


def _key_words(keys: Mapping[str, Cell]) -> str:
    weak = "The keys are files beside the data: whoever reads the home's folder reads the records. "
    blind = (
        "A restored older copy is not noticed on this device: it would forget what was spent since, unless the server "
        "remembers."
    )
    said = (weak if keys["weak"]["value"] else "") + ("" if keys["rollback_detectable"]["value"] else blind)
    return f'<p class="warn">{said}</p>' if said else ""


def _audits(card: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Audits: attacks on this campaign</h2>"
    yield f"<p>{_tagged(card['audit_verdict'])}</p>"
    for audit in card["audits"]:
        yield f"<h3>{shown(audit['scenario'])}, {shown(audit['level'])} audit of {shown(audit['created'])}</h3>"
        about = {"of": "is of", "epsilon_claimed": "epsilon claimed", "delta": "delta", "code_sha256": "code"}
        if not audit["levels"]:
            yield (
                f'<p class="warn"><strong>Of {shown(audit["of"])}.</strong> It says nothing about this campaign as it '
                "runs here, and no result of it is shown.</p>"
            )
        yield _section(f"What {audit['file']} is about", {key: audit[key] for key in about}, labels=about)
        yield from (_level(level) for level in audit["levels"])
        if audit["power"] and audit["power"]["value"]:
            tables = "\n".join(_power(audit["power"], bound) for bound in audit["power"]["value"])
            yield details("Power: which faults the bound of L1 finds at which epsilon", tables)


def _level(level: Mapping[str, Any]) -> str:
    result = level["result"]["value"]
    look = {"held": "good", "FAILED": "bad"}.get(result, "bad")
    tags = [f'<span class="tag {look}">{html.escape(result)}</span>']
    tags += ['<span class="tag bad">no power at the epsilon claimed</span>'] if level["power"]["value"] is False else []
    said = [html.escape(word) for word in level["words"]["value"]]
    if "epsilon_lower" in level and level["epsilon_lower"]["value"] is not None:
        said.append(
            f"Attacked at epsilon {_prose([level['epsilon_audited']])}, of which at least "
            f"{_prose([level['epsilon_lower']])} was spent (95 % confidence)."
        )
    control = "detected" if level["control_detected"]["value"] else "NOT DETECTED, so there is no result"
    said.append(f"Control, the same attack without privacy: {control}.")
    said.append(f"Faults put in on purpose and found: {shown(level['mutants_caught'])}.")
    if level["mutants_missed"]["value"]:
        said.append(f"Faults missed, so there is no result: {shown(level['mutants_missed'])}.")
    where = level["title"]["source"].rpartition("/")[0]
    return (
        f'<div class="level"><h4>{html.escape(level["level"])}: {shown(level["title"])}</h4>\n<p>{"".join(tags)}</p>'
        f'<ul>{items(said)}</ul><p class="from"><code>{html.escape(where)}</code></p></div>'
    )


def _power(cell: Cell, bound: str) -> str:
    """One power table of an audit: which faults are found how often, were the claim another epsilon."""
    found = cell["value"][bound]["rows"]
    faults = list(found[0]["found"])
    rows = [
        [
            f"{row['epsilon']:g} " + ("" if row["power"] else '<span class="tag bad">no power</span>'),
            *(f"{row['found'][fault]:.0%}" for fault in faults),
        ]
        for row in found
    ]
    head = ["epsilon claimed", *(html.escape(fault) for fault in faults)]
    return table(f"Share of trials in which the {bound} bound finds the fault, from {cell['source']}", head, rows)


def _gaps(card: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>What is not covered</h2>"
    rows = [[_start(gap["what"]), html.escape(gap["why"])] for gap in card["not_covered"]]
    yield table("Not covered by the claim", ["what", "why"], rows, look="words gaps")


def _questions(card: Mapping[str, Any]) -> Iterator[str]:
    if card["questions"]:
        yield "<h2>Questions a claim must answer</h2>"
        yield f'<p class="dim">{html.escape(card["questions_about"])}</p>'
        said = "".join(
            f"<dt>{html.escape(one['question'])}</dt><dd>{_prose(one['answer'])}</dd>" for one in card["questions"]
        )
        yield f'<dl class="questions">{said}</dl>'
    yield f'<p class="dim">{html.escape(card["law"])}</p>'


def _trace(card: Mapping[str, Any]) -> Iterator[str]:
    yield "<h2>Where the numbers are from</h2>"
    yield (
        "<p>The files lie in the folder <code>sources</code> beside this page. "
        "<code>sottovoce card --check FOLDER</code> finds and computes every number again.</p>"
    )
    rows = [[html.escape(name), f"<code>{file['sha256']}</code>"] for name, file in card["sources"].items()]
    yield table("Source files", ["file", "SHA-256"], rows, look="words")
    found = [
        [f"<code>{html.escape(path[1:])}</code>", _short(cell), html.escape(_title(cell))]
        for path, cell in cells(
            {key: value for key, value in card.items() if key not in ("schema", "questions", "claim")}
        )
    ]
    yield details("Every cell of the card", table("Cells", ["place in the card", "value", "from"], found, look="words"))


def _short(cell: Cell) -> str:
    text = shown(cell)
    return text if len(text) <= 160 else f"{text[:150]}…".rpartition("&")[0] or text[:100]
