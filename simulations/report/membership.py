"""The part of a report that says how well records, and users, of the run are told from others, and what that proves."""

import html
from collections.abc import Iterator

from shared.metrics.ratings import Interval
from simulations.report import page
from simulations.report.figures import Point, row_by_row
from simulations.report.page import Figure
from simulations.report.parts import AttackOn, Membership
from simulations.report.results import Summary

TARGETS = {"private": "with privacy", "unprotected": "without privacy", "untrained": "nothing trained"}
_REFERENCES = {
    "rating": "of a ridge regression that was fitted to records of the other half of the users",
    "ranking": "by how often users of the other half like the text",
    "generation": "of the base as published",
}


def section(summary: Summary) -> tuple[dict[str, Figure], list[str]]:
    """The section with its figure; nothing for a run that was not attacked."""
    found = summary.membership
    if found is None:
        return {}, []
    attacked = {who: on for who, on in (("records", found.records), ("users", found.users)) if on}
    points = [
        Point(TARGETS.get(target, target), f"{who}, {attack}", score.auc)
        for who, on in attacked.items()
        for target, attacks in on.attacked.items()
        for attack, score in attacks.items()
    ]
    figures, places = row_by_row(
        points,
        metric="AUC",
        identifier="membership-auc",
        title="AUC of each attack: 0.5 is a coin toss, 1 tells everybody",
        caption="Bars are 95 % intervals. The numbers stand in the table below.",
        line=0.5,
    )
    body = [*_opening(summary, found)]
    for who, on in attacked.items():
        body += [f'<p id="membership-{who}">{html.escape(verdict(who, on))}</p>', *_warnings(who, on)]
    body += places
    for who, on in attacked.items():
        body += [_table(who, on, found.fpr), f'<p class="dim">{html.escape(_promise(who, on, found.fpr))}</p>']
    return figures, [*body, *_reading(found)]


def headline(found: Membership) -> str:
    """The outcome for records in one line; the attack shown is the one that does best without privacy."""
    on = found.records
    control = on.attacked["unprotected"]
    attack = max(control, key=lambda name: control[name].auc.value)
    shown = on.attacked.get("private", control)[attack].auc
    words = f"membership attack ({attack}), 0.5 is a coin toss"
    if "private" in on.attacked:
        words += f"; without privacy {page.score('auc', control[attack].auc)}"
    if not on.detected("unprotected"):
        words += "; NO POWER: no evidence of privacy"
    return f"AUC of records        {page.score('auc', shown)}  {words}"


def verdict(who: str, on: AttackOn) -> str:
    """What the numbers say, and whether they say anything, in plain text."""
    control, private = on.detected("unprotected"), on.detected("private")
    if not control:
        seen = f"No power over {who}: even without privacy the attack does not tell members from others "
        seen += f"({_aucs(on, 'unprotected')})."
        if "private" not in on.attacked:
            return f"{seen} That is no evidence that the run protects anybody."
        return f"{seen} What it finds with privacy ({_aucs(on, 'private')}) is therefore no evidence of privacy."
    if "private" not in on.attacked:
        return f"This run has no privacy, and the attack finds {who}: {_aucs(on, 'unprotected')}."
    scores = [(on.attacked["private"][attack].auc, on.attacked["unprotected"][attack].auc) for attack in control]
    weak = all(mine.high >= theirs.low for mine, theirs in scores)
    overlap = " The intervals overlap: the attack is too weak to show what privacy changes." if weak else ""
    if private:
        return (
            f"The attack finds {who} in spite of the noise: {_aucs(on, 'private')}; "
            f"without privacy {_aucs(on, 'unprotected')}.{overlap} ε limits what an attack may find; it does not "
            "promise that it finds nothing."
        )
    seen = f"Without privacy the attack finds {who} ({_aucs(on, 'unprotected')}); with privacy it tells them from "
    seen += f"others no better than a coin would ({_aucs(on, 'private')})."
    return f"{seen}{overlap or ' That speaks of these attacks; ε speaks of all.'}"


def _aucs(on: AttackOn, target: str) -> str:
    scores = (f"{attack} {page.score('auc', score.auc)}" for attack, score in on.attacked[target].items())
    return "AUC " + ", ".join(scores)


def _opening(summary: Summary, found: Membership) -> Iterator[str]:
    yield "<h2>Membership attack</h2>"
    reference = _REFERENCES.get(summary.task, "of a model that has not seen the user's records")
    yield (
        "<p>Do the shared arrays that everybody gets, those of the row <code>federated</code>, tell what they were "
        f"trained on? A public hash held out {100 * found.held_out_share:g} % of every user's fit records, and nobody "
        "trained on them: but for chance, nothing else tells them from the others. Whoever has the arrays takes a "
        "record for one they were trained on the lower its <strong>loss</strong> is; or the lower its loss is "
        f"compared with that {reference}, the <strong>reference</strong>, for some records are easy for every model. "
        "Both are also tried on the same campaign run without privacy, to see whether they can find anything, and on "
        "the public start, where there is nothing to find.</p>"
    )


def _warnings(who: str, on: AttackOn) -> Iterator[str]:
    for attack in on.biased():
        seen = page.score("auc", on.attacked["untrained"][attack].auc)
        yield (
            f'<p class="warn"><strong>BIASED.</strong> With nothing trained, the attack by {html.escape(attack)} on '
            f"{who} already has an AUC of {seen}: members and others differ by chance, and by as much in every number "
            "of it below.</p>"
        )
    score = _broken(on)
    if score is not None and on.tpr_limit is not None:
        yield (
            f'<p class="warn"><strong>PROMISE BROKEN.</strong> The attack finds {_percent(score)} of the {who}; under '
            f"the claim no attack may find more than {100 * on.tpr_limit:.2f} %. Trust no number of this run.</p>"
        )


def _broken(on: AttackOn) -> Interval | None:
    """A TPR that the claim rules out, if there is one."""
    rates = (score.tpr for score in on.attacked.get("private", {}).values())
    return next((rate for rate in rates if rate and on.tpr_limit is not None and rate.low > on.tpr_limit), None)


def _table(who: str, on: AttackOn, fpr: float) -> str:
    rows = [
        [
            f"{html.escape(attack)}, {html.escape(TARGETS.get(target, target))}",
            _auc(on, attack, score.auc),
            "–" if score.tpr is None else _cell(score.tpr, "{:.2f} %", 100),
            _limit(on) if target == "private" else "–",
        ]
        for target, attacks in on.attacked.items()
        for attack, score in attacks.items()
    ]
    caption = (
        f"Attack on {who}: {on.members:,} members and {on.non_members:,} others, of {on.users:,} users in all. "
        f"95 % intervals: {on.interval}."
    )
    return page.table(caption, ["attack", "AUC", f"TPR at {100 * fpr:g} % FPR", "ε allows at most"], rows)


def _auc(on: AttackOn, attack: str, auc: Interval) -> str:
    bias = (
        f"<small>bias {on.attacked['untrained'][attack].auc.value - 0.5:+.3f}</small>" if attack in on.biased() else ""
    )
    return f"{_cell(auc, '{:.3f}')}{bias}"


def _cell(score: Interval, form: str, factor: float = 1) -> str:
    value, low, high = (form.format(factor * end) for end in (score.value, score.low, score.high))
    return f"{value}<small>{low.removesuffix(' %')} – {high.removesuffix(' %')}</small>"


def _limit(on: AttackOn) -> str:
    if on.tpr_limit is None:
        return "nothing promised"
    return f"{100 * on.tpr_limit:.2f} %" if on.tpr_limit < 1 else "100 %"


def _promise(who: str, on: AttackOn, fpr: float) -> str:
    if on.epsilon is None or on.delta is None or on.tpr_limit is None:
        return f"Nothing is promised of {who} in this run."
    rule = (
        f"Of {who} the claim says ε = {on.epsilon:.4g}, δ = {on.delta:.2g}: at {100 * fpr:g} % FPR no attack whatever "
    )
    rule += f"has a TPR above e^ε × {100 * fpr:g} % + δ"
    return f"{rule} = {100 * on.tpr_limit:.2f} %." if on.tpr_limit < 1 else f"{rule}, which is above 100 %: no limit."


def _reading(found: Membership) -> Iterator[str]:
    words = {
        "AUC": "of a member and another, the chance that the member looks more like one; 0.5 is a coin toss",
        f"TPR at {100 * found.fpr:g} % FPR": "share of the members who are found where one in "
        f"{1 / found.fpr:.0f} others is taken for a member; a coin toss finds {100 * found.fpr:g} %",
        "without privacy": "the same campaign, same rounds, devices and seed, without clipping and noise; it exists "
        "for this comparison alone and stands in no row",
        "no power": "where an attack finds nothing even without privacy, its finding nothing proves nothing",
    }
    lines = (f"<dt>{html.escape(key)}</dt><dd>{html.escape(text)}</dd>" for key, text in words.items())
    yield f"<dl>{''.join(lines)}</dl>"


def _percent(rate: Interval) -> str:
    return f"{100 * rate.value:.2f} % [{100 * rate.low:.2f}, {100 * rate.high:.2f}]"
