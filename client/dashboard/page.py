"""The parts of the owner's page: what was spent and sent, the personal model, the data, forgetting.

Functions of plain data that make HTML; what came from outside is escaped here.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client.dashboard.guard import Session
from client.dashboard.parts import Said, bar, button, day, form, nav, rows, said_box, sentence, text, when, whole
from client.owner.words import (
    LOST_WITH_DATA,
    PROMISES,
    STATES,
    history_lines,
    key_lines,
    loss_words,
    plain,
    source_lines,
)
from shared.page import details, items

NEWEST = 10  # rows of what left that the first page shows


@dataclass(frozen=True)
class View:
    """What the page shows of a home.

    Attributes:
        home: Its folder.
        found: As ``client status --json``; None where the ledger cannot be used.
        problem: Why it cannot.
        events: As ``client history --json``, oldest first.
        kept: Policy and round of the replies whose bytes are kept.
        service: What the service is doing, in a line; None where none runs.
        loss: How many files of each kind ``forget`` would delete.
        receipts: Names of the receipts of earlier deletions.
        trial: HTML of the form that asks both models; see ``trial_form``.
    """

    home: str
    found: Mapping[str, Any] | None
    problem: str | None
    events: Sequence[Mapping[str, Any]]
    kept: frozenset[tuple[str, int]]
    service: str | None
    loss: Mapping[str, int]
    receipts: Sequence[str]
    trial: str


def overview(session: Session, view: View, said: Said | None) -> str:
    """The first page."""
    found = view.found
    parts = [
        '<p class="eyebrow">Sottovoce · owner\'s page · only on this device</p>',
        "<h1>What this device does with your data</h1>",
        f'<p class="dim">{text(view.home)}</p>',
        said_box(said),
        nav(("Spent and left", "#spent"), ("What left", "#sent"), ("Try it", "#try"), ("Forget", "#forget")),
    ]
    if found is None:
        parts.append(
            f'<p class="warn" role="alert">The ledger cannot be used, so nothing is trained and nothing is sent: '
            f"{text(view.problem)}</p>"
        )
    else:
        parts += [
            _state(session, found, view.service),
            _spent(session, found),
            _sent(session, view),
            _models(session, view),
        ]
        parts.append(_data(found))
    parts.append(_forget(session, view))
    return whole("Your data", "\n".join(parts))


def history_page(session: Session, view: View) -> str:
    """Everything that left and happened."""
    lines = history_lines([dict(event) for event in view.events])
    body = [
        "<h1>What left this device, and when</h1>",
        nav(("Back", session.path())),
        _releases(session, view, list(reversed(view.events))),
        f"<h2>Everything in the ledger</h2>\n<ul>{items(text(line) for line in reversed(lines))}</ul>",
    ]
    return whole("History", "\n".join(body))


def reply_page(session: Session, event: Mapping[str, Any], arrays: Sequence[Mapping[str, Any]]) -> str:
    """What is in the bytes that left in one round.

    Args:
        session: Of the browser.
        event: The release, as in ``client history --json``.
        arrays: ``name``, ``shape``, ``dtype``, ``low``, ``high`` and ``first`` of each.
    """
    lines = [
        (
            f"<code>{text(array['name'])}</code>",
            text(" × ".join(map(str, array["shape"])) or "1"),
            text(array["dtype"]),
            f"{_number(array['low'])} … {_number(array['high'])}",
            text(", ".join(map(_number, array["first"]))),
        )
        for array in arrays
    ]
    where = session.path(f"sent/{event['policy']}/{event['round']}/bytes")
    body = [
        f"<h1>Round {event['round']} of {text(event.get('campaign', ''))}</h1>",
        nav(("Back", session.path())),
        f"<p>These {event['size_bytes']:,} bytes left on {when(event['at'])}; their SHA-256 is "
        f"<code>{text(event['sha256'])}</code>. They hold numbers and nothing else: no text, no count, no score.</p>",
        f'<p><a href="{text(where)}" download>Download the very bytes</a> (safetensors)</p>',
        rows("What is in them", ("Name", "Shape", "Type", "From … to", "The first numbers"), lines),
    ]
    return whole("What left", "\n".join(body))


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _state(session: Session, found: Mapping[str, Any], service: str | None) -> str:
    force = [campaign for campaign in found["campaigns"] if campaign["state"] == "in force"]
    if found["paused"]:
        word, why = "Paused", "Nothing leaves this device until you resume."
    elif force:
        count = "one campaign" if len(force) == 1 else f"{len(force)} campaigns"
        word, why = "Taking part", f"The device answers {count} you agreed to."
    elif any(campaign["state"] == "exhausted" for campaign in found["campaigns"]):
        word = "Taking part in nothing new"
        why = (
            "Every round you allowed is used. If a server asks for its last round again, it gets the same bytes again."
        )
    else:
        word, why = "Taking part in nothing", "No consent is in force, so nothing can leave."
    runs = sentence(service or "service: none runs now; it is started with sottovoce client join")
    change = button(session, "resume", "Resume") if found["paused"] else button(session, "pause", "Pause")
    look = "state paused" if found["paused"] else "state"
    return (
        f'<div class="{look}"><div><p class="word">{word}</p><p>{why}</p>'
        f'<p class="dim">{text(runs)}</p></div>{change}</div>'
    )


def _spent(session: Session, found: Mapping[str, Any]) -> str:
    epsilon, delta = found["epsilon"], found["delta"]
    cards = "\n".join(_campaign(session, campaign) for campaign in found["campaigns"])
    none = "<p>You never agreed to a campaign; nothing was spent and nothing can leave.</p>"
    return "\n".join(
        [
            '<section id="spent"><h2>Spent and left</h2>',
            '<div class="cards">',
            _amount("Epsilon, of all campaigns and for ever", "epsilon", epsilon),
            _amount("Delta, of all campaigns and for ever", "delta", delta),
            "</div>",
            details(
                "What these numbers mean",
                "<p>Epsilon bounds how much better than by guessing anybody can tell whether what a campaign hides was "
                "there, by a factor of at most e<sup>epsilon</sup> in the odds; delta is the chance left for that to "
                "fail. A campaign's whole price is reserved when you agree and never given back. The caps are yours, "
                "from the beginning, and cannot be raised.</p>",
            ),
            "<h3>Campaigns you agreed to</h3>",
            f'<div class="cards">{cards}</div>' if cards else none,
            "</section>",
        ]
    )


def _amount(title: str, name: str, amount: Mapping[str, float]) -> str:
    said = f"{amount['reserved']:g} of {amount['cap']:g} reserved, {amount['left']:g} left"
    return (
        f'<div class="card"><h3>{title}</h3>{bar(f"{name}: {said}", amount["reserved"], amount["cap"])}'
        f'<p class="figures"><span>spent <b>{amount["reserved"]:g}</b> of {amount["cap"]:g}</span>'
        f"<span>left <b>{amount['left']:g}</b></span></p></div>"
    )


def _campaign(session: Session, campaign: Mapping[str, Any]) -> str:
    used, allowed = campaign["rounds_used"], campaign["rounds_allowed"]
    others = {
        "sent": campaign["rounds_sent"],
        "burnt (spent, nothing sent)": campaign["rounds_burnt"],
        "at work, or cut by a crash": campaign["rounds_pending"],
        "lost with an older ledger, counted again": campaign["rounds_lost"],
    }
    counted = ", ".join(f"{count} {what}" for what, count in others.items() if count)
    promise = PROMISES.get((campaign["unit"], campaign["trust"]))
    open_still = campaign["state"] in ("in force", "exhausted")
    return "\n".join(
        [
            f'<article class="card"><h3>{text(campaign["campaign"])}</h3>',
            f'<p class="dim">{text(STATES[campaign["state"]])} · agreed {day(campaign["consented"])}</p>',
            f"<p>Until <b>{text(campaign['until'])}</b> (UTC){'' if open_still else ', but it is over'}</p>",
            bar(f"{used} of {allowed} rounds used", used, allowed),
            f'<p class="figures"><span>rounds <b>{used}</b> of {allowed} used</span><span>left <b>{allowed - used}</b>'
            "</span></p>",
            f'<p class="dim">{counted}</p>' if counted else "",
            f"<p>Reserved: epsilon <b>{campaign['epsilon']:g}</b>, delta <b>{campaign['delta']:g}</b></p>",
            f"<p>It {text(promise)}.</p>" if promise else "",
            f'<p class="dim">policy <code>{text(campaign["policy"][:12])}</code>, signed by '
            f"<code>{text(campaign['operator'])}</code></p>",
            _withdraw(session, campaign) if open_still else "",
            "</article>",
        ]
    )


def _withdraw(session: Session, campaign: Mapping[str, Any]) -> str:
    name = f"sure-{campaign['policy'][:12]}"
    asked = form(
        session,
        "withdraw",
        f'<label class="sure" for="{name}"><input type="checkbox" id="{name}" name="sure" value="yes" required> '
        "I want this campaign to get nothing more from this device, for ever</label>"
        f'<input type="hidden" name="policy" value="{text(campaign["policy"])}">',
        "Withdraw for ever",
        grave=True,
        label=f"Withdraw for ever from {plain(campaign['campaign'])}",
    )
    return details(
        "Withdraw your consent", f"<p>What was reserved stays reserved: what was sent cannot be called back.</p>{asked}"
    )


def _sent(session: Session, view: View) -> str:
    newest = list(reversed(view.events))
    count = sum(event["event"] == "release" for event in newest)
    more = f'<p><a href="{text(session.path("history"))}">All {count} replies, and everything in the ledger</a></p>'
    shown = [event for event in newest if event["event"] == "release"][:NEWEST]
    body = _releases(session, view, shown) if count else "<p>Nothing has left this device.</p>"
    return f'<section id="sent"><h2>What left this device</h2>\n{body}\n{more}</section>'


def _releases(session: Session, view: View, newest: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        (
            when(event["at"]),
            text(event.get("campaign", "")),
            str(event["round"]),
            f"{event['size_bytes']:,}",
            _contents(session, view, event),
        )
        for event in newest
        if event["event"] == "release"
    ]
    head = ("When (UTC)", "Campaign", "Round", "Bytes", "SHA-256 of the bytes")
    note = (
        '<p class="dim">The bytes themselves are kept for the newest reply of each campaign, to be sent again if the '
        "server asks, and not at all where they left without noise.</p>"
    )
    return rows("Replies, the newest first", head, lines) + note


def _contents(session: Session, view: View, event: Mapping[str, Any]) -> str:
    kept = (event["policy"], event["round"]) in view.kept
    if not kept and event["sha256"] == hashlib.sha256(b"").hexdigest():
        return "not kept: they were not noised"
    link = (
        f'<br><a href="{text(session.path("sent/{policy}/{round}".format(**event)))}">Look at the bytes</a>'
        if kept
        else ""
    )
    return f"<code>{text(event['sha256'])}</code>{link}"


def _models(session: Session, view: View) -> str:
    data = (view.found or {})["data"]
    lines = [
        (
            f"Version {version['number']}",
            when(version["created"]),
            f"{text(version['campaign'])}, round {text(version['round'])}",
            "<b>in use</b>"
            if version["number"] == data["current_head"]
            else button(
                session,
                "rollback",
                "Use it",
                label=f"Use version {version['number']}",
                hidden={"version": str(version["number"])},
            ),
        )
        for version in reversed(data["heads"])
    ]
    shelf = (
        rows("Versions of your private head", ("Version", "Made", "From", ""), lines)
        if lines
        else "<p>You have no private head yet. Make one with <code>sottovoce client personalize</code>.</p>"
    )
    return (
        '<section id="try"><h2>Your personal model</h2>\n<p>It holds personal data, is kept encrypted, and never '
        f"leaves this device.</p>\n{shelf}\n<h3>Try it beside the base</h3>\n{view.trial}</section>"
    )


def _data(found: Mapping[str, Any]) -> str:
    data, keys = found["data"], found["keys"]
    records = (
        "they cannot be read" if data["problem"] else f"{data['records']}, encrypted" if data["records"] else "none"
    )
    lines = [
        f"records: {records}",
        *(source_lines(found["source"]) if found["source"] else []),
        *key_lines(keys["where"], weak=keys["weak"], detects=keys["rollback_detectable"]),
    ]
    warn = f'<p class="warn">{text(data["problem"])}</p>' if data["problem"] else ""
    return f'<section id="data"><h2>Your data</h2>{warn}<ul>{items(map(text, lines))}</ul></section>'


def _forget(session: Session, view: View) -> str:
    cut = bool(view.found and view.found["forget_was_cut"])
    asked = form(
        session,
        "forget",
        '<label for="confirm">Type the word <i>forget</i> to confirm</label>'
        '<input type="text" id="confirm" name="confirm" required pattern="\\s*[Ff][Oo][Rr][Gg][Ee][Tt]\\s*" '
        'autocomplete="off" autocapitalize="none" spellcheck="false">',
        "Delete for good",
        grave=True,
    )
    receipts = "".join(
        f'<li><a href="{text(session.path(f"receipts/{name}"))}" download>{text(name)}</a></li>'
        for name in view.receipts
    )
    return "\n".join(
        [
            '<section id="forget"><h2>Forget everything</h2>',
            '<p class="warn">A deletion was cut; it must be run again.</p>' if cut else "",
            details(
                "Delete keys, records and private heads",
                f"<p>Files to be deleted for good: {text(loss_words(view.loss))}.</p>"
                f"<p>{text(sentence(LOST_WITH_DATA))}</p>{asked}",
            ),
            f"<h3>Receipts of earlier deletions</h3><ul>{receipts}</ul>" if receipts else "",
            "</section>",
        ]
    )
