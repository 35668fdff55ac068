"""The part of a report that says what devices that lie did to a campaign, under which rule."""

import html
from collections.abc import Iterator

from simulations.report import page
from simulations.report.parts import Poison
from simulations.report.results import Summary

_KINDS = {
    "sign-flip": "send the opposite of what their records teach",
    "random": "send something at random",
    "label-flip": "train honestly on ratings turned upside down",
    "alie": "send the mean of what their own sort would honestly send, moved a little in every coordinate",
    "backdoor": "teach the highest rating for every text with a trigger word before it",
}
_PLAYED = {"attacked": "with liars", "honest": "without"}


def is_rival(campaign: str) -> bool:
    """Whether a campaign stands beside a run's own for this section alone."""
    return campaign.endswith(("-attacked", "-honest"))


def section(summary: Summary) -> list[str]:
    """The section; nothing for a run in which nobody lied."""
    found = summary.poison
    return [] if found is None else [*_opening(found), _table(summary, found), *_reading(found)]


def headline(metric: str, found: Poison) -> str:
    """The outcome for the run's own rule in one line."""
    rule, played = next(iter(found.rules.items()))
    attacked, honest = (page.score(metric, played[key].federated) for key in ("attacked", "honest"))
    words = (
        f"{page.heading(metric)} under {rule}, {found.liars} liars ({found.kind}): {attacked}; without them {honest}"
    )
    success = played["attacked"].success_federated
    return words if success is None else f"{words}; the backdoor opens for {_percent(success.value)} of low ratings"


def _opening(found: Poison) -> Iterator[str]:
    yield "<h2>Devices that lie</h2>"
    trigger = f" (the trigger is <code>{html.escape(found.trigger)}</code>)" if found.trigger else ""
    yield (
        f"<p>{found.liars} devices, {100 * found.share:g} % of all, {_KINDS[found.kind]}{trigger}; strength "
        f"{found.strength:g}. What each sends passes every check on a single reply. Every rule was played with them "
        "and without them.</p>"
    )


def _table(summary: Summary, found: Poison) -> str:
    metric = summary.metric
    door = any(each.success_federated for played in found.rules.values() for each in played.values())
    names = ["federated", "personal"]
    head = ["rule", "liars", *(f"{page.heading(metric)} {name}" for name in names)]
    if door:
        head += [f"backdoor opens, {name}" for name in names] + [f"shift by the trigger, {name}" for name in names]
    head.append("ε")
    rows: list[list[str]] = []
    for rule, played in found.rules.items():
        for key, each in played.items():
            cells = [
                html.escape(rule),
                _PLAYED[key],
                *(page.score(metric, score) for score in (each.federated, each.personal)),
            ]
            if door:
                cells += [
                    _percent(score.value) if score else "" for score in (each.success_federated, each.success_personal)
                ]
                cells += [
                    f"{score.value:+.2f}" if score else "" for score in (each.shift_federated, each.shift_personal)
                ]
            cells.append("–" if each.epsilon is None else f"{each.epsilon:g}")
            rows.append(cells)
    return page.table("What liars did, by rule", head, rows)


def _reading(found: Poison) -> Iterator[str]:
    if any(each.success_federated for played in found.rules.values() for each in played.values()):
        yield (
            '<p class="dim">The backdoor opens where a text that its user rated no higher than the middle of the scale '
            "is predicted nearer to the highest rating once the trigger stands before it.</p>"
        )
    noises = {each.groups: each.noise_in_mean for played in found.rules.values() for each in played.values()}
    if len(noises) > 1 and all(noises.values()):
        words = "; ".join(
            f"{groups} {'sums' if groups > 1 else 'sum'}: {noise:.2g}" for groups, noise in noises.items()
        )
        yield (
            f'<p class="dim">The price of groups is noise, at the same ε: the standard deviation that is left in every '
            f"coordinate of the mean, by sums a round: {html.escape(words)}.</p>"
        )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
