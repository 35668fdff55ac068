"""The privacy card of one campaign: what is promised, spent, attacked and not covered, every number with its source.

A number is a cell, ``{"value": 8, "source": "policy.json#/epsilon"}``, or ``{"value": 7.98, "computed":
"accounting.epsilon", "from": [pointers]}`` (``shared/card/cells.py``); there is none outside of one, but ``schema``.
A card is a function of its sources (``shared/card/sources.py``), so whoever has them can make it again and compare.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shared.card import questions, sections, words
from shared.card.cells import Cell, check_cells, computed, quoted
from shared.card.page import render
from shared.card.sources import LEDGER, MADE, POLICY, SCENARIO, SERVER, SUMMARY, Sources, read_folder, write_folder
from shared.config import Scenario
from shared.errors import DataError, PrivacyError
from shared.privacy.compatible import check_compatible, choices
from shared.privacy.policy import Policy, hash_settings, read_policy
from shared.privacy.promise import check_price
from shared.protocol.signing import SIGNATURE_FILE

SCHEMA = 1
_TOLD = {"device": [LEDGER], "server": [SERVER]}  # place -> what only it knows


def build_card(sources: Sources) -> dict[str, Any]:
    """Make a card from its sources, and from nothing else.

    Args:
        sources: As ``shared.card.sources.gather`` puts them together.

    Returns:
        What ``privacy-card.json`` holds; described in docs/privacy-card.md.

    Raises:
        PrivacyError: The policy's constants do not give the epsilon it states; or it promises nothing, or nobody
            signed it, and this is no experiment.
        DataError: A source lacks what the card quotes.

    Guarantee:
        The same sources give the same card; every number in it was found, or computed, twice.
    """
    place, policy = sources.at(f"{MADE}#/place"), read_policy(json.dumps(sources.at(f"{POLICY}#")))
    experiment = place == "experiment"
    _check(policy, sources, experiment=experiment)
    private = policy.trust != "none"
    promise = sections.promise_of(sources, policy)
    constants = sections.constants_of(sources, policy)
    audits = [_audit(sources, name) for name in sources.audits]
    gaps = words.gaps(unit=policy.unit, trust=policy.trust, experiment=experiment)
    card = {
        "schema": SCHEMA,
        "status": _status(experiment=experiment, private=private),
        "experiment": experiment,
        "place": place,
        "created": quoted(sources, f"{MADE}#/created"),
        "claim": _claim(promise, policy, experiment=experiment),
        "audit_verdict": _verdict(audits),
        "campaign": sections.campaign_of(sources),
        "promise": promise,
        "constants": constants,
        "spent": sections.spent_of(sources, place, private=private),
        "releases": sections.releases_of(sources),
        "keys": sections.keys_of(sources),
        "utility": sections.utility_of(sources),
        "stamps": sections.stamps_of(sources),
        "audits": audits,
        "not_covered": gaps,
        "questions_about": questions.NIST,
        "questions": _questions(promise | constants, policy, place, audits) if private else [],
        "law": words.LAW,
        "sources": {name: {"sha256": sources.sha256(name)} for name in sorted(sources.files)},
    }
    check_cells(card, sources)
    return card


def make_card(sources: Sources, out: Path) -> dict[str, Any]:
    """Build a card and write it: ``privacy-card.json``, ``privacy-card.html`` and ``sources/``, in one folder.

    Raises:
        SottovoceError: As ``build_card`` and ``shared.card.sources.write_folder``; then nothing is written.
    """
    card = build_card(sources)
    write_folder(out, card, render(card), sources)
    return card


def check_card(folder: Path) -> dict[str, Any]:
    """Make a card again from the sources beside it, and compare.

    Args:
        folder: As ``make_card`` wrote it.

    Returns:
        The card.

    Raises:
        SottovoceError: A number, a word or the page is not what the sources say; the message names the first number.
    """
    try:
        return _checked(folder)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:  # the files are anybody's
        raise DataError(f"{folder} must hold a card and sources as they are written, got: {error!r:.120}.") from None


def _checked(folder: Path) -> dict[str, Any]:
    card, page, sources = read_folder(folder)
    if not isinstance(card, dict):
        raise DataError(f"{folder} must hold a privacy card, its JSON is no object.")
    check_cells(card, sources)
    again = build_card(sources)
    if json.dumps(card, sort_keys=True) != json.dumps(again, sort_keys=True):
        wrong = [key for key in again.keys() | card.keys() if card.get(key) != again.get(key)]
        raise DataError(f"{folder} must be the card of its sources, it differs in: {', '.join(sorted(wrong))}.")
    if page != render(card):
        raise DataError(f"{folder} must hold the page of its card, it is another; make the card again.")
    return card


def _check(policy: Policy, sources: Sources, *, experiment: bool) -> None:
    """Refuse what must have no card."""
    if not experiment and policy.trust == "none":
        raise PrivacyError("a privacy card needs a promise, this campaign makes none: NOT PRIVATE.")
    if not experiment and SIGNATURE_FILE not in sources:
        raise PrivacyError(
            "a privacy card needs a campaign that its operator signed, nobody signed this one; sign it with: sottovoce "
            "policy sign DIR --key FILE. Of a simulation, say --experiment."
        )
    check_compatible(choices(policy))
    check_price(policy)
    for name in (LEDGER, SERVER):
        if name in sources and sources.at(f"{name}#/policy") != policy.sha256:
            raise DataError(f"{name} must be of the policy beside it, it is of another; make the card again.")
    if hash_settings(Scenario.model_validate_json(sources.files[SCENARIO])) != policy.settings_sha256:
        raise DataError(f"{SCENARIO} must hold the settings the policy names; it was altered.")
    if SUMMARY in sources and sources.at(f"{SUMMARY}#/privacy/policy_sha256") != policy.sha256:
        raise DataError(f"{SUMMARY} must be of the campaign beside it, it is of another; make the card again.")
    if [name for name in (LEDGER, SERVER) if name in sources] != _TOLD.get(sources.at(f"{MADE}#/place"), []):
        raise DataError(f"{MADE} must name the place where the other sources are from; make the card again.")
    if LEDGER in sources:
        _check_ledger(sources, policy)


def _check_ledger(sources: Sources, policy: Policy) -> None:
    """Refuse an extract of a ledger that does not fit its campaign, or itself."""
    agreed = [sources.at(f"{LEDGER}#/consent/{name}") for name in ("epsilon", "delta", "max_participations")]
    rounds, releases = sources.at(f"{LEDGER}#/rounds"), sources.at(f"{LEDGER}#/releases")
    operator = computed(sources, "signing.fingerprint", f"{SIGNATURE_FILE}#/key")["value"]
    fits = (
        agreed == [policy.epsilon, policy.delta, policy.max_participations]
        and sources.at(f"{LEDGER}#/operator") == operator
        and 0 <= rounds["spent"] <= policy.max_participations
        and rounds["spent"] == sum(rounds[name] for name in ("released", "burnt", "pending", "lost"))
        and rounds["released"] == len(releases)
    )
    if not fits:
        raise DataError(
            "a ledger must fit the campaign agreed to, and count every answer in it; it does not, or a round ended "
            "while it was read: make the card again."
        )


def _status(*, experiment: bool, private: bool) -> str:
    if not experiment:
        return "promise"
    return "EXPERIMENT" if private else "EXPERIMENT, NOT PRIVATE"


def _claim(promise: sections.Section, policy: Policy, *, experiment: bool) -> list[str | Cell]:
    """The claim in one plain sentence; text and cells in turn."""
    before = "What a deployment with these settings would promise. " if experiment and policy.trust != "none" else ""
    return _fill(before + words.CLAIM[policy.trust], promise)


def _fill(text: str, named: Mapping[str, Cell]) -> list[str | Cell]:
    """Text and cells in turn, a cell for every ``{name}``."""
    parts = re.split(r"\{(\w+)\}", text)
    return [named[part] if i % 2 else part for i, part in enumerate(parts) if part]


def _audit(sources: Sources, name: str) -> dict[str, Any]:
    """What one audit says; of another policy or other code, only that it does."""
    fields = ("scenario", "created", "epsilon_claimed", "delta", "level", "policy_sha256", "code_sha256")
    of = computed(sources, "audit.of", f"{name}#", f"{POLICY}#", f"{MADE}#/code_sha256")
    found: dict[str, Any] = {"file": name, "of": of} | {field: quoted(sources, f"{name}#/{field}") for field in fields}
    ours = of["value"] == "this campaign"
    claimed = {"epsilon_claimed": "epsilon", "delta": "delta", "unit": "unit", "trust": "trust"}
    if ours and any(sources.at(f"{name}#/{its}") != sources.at(f"{POLICY}#/{own}") for its, own in claimed.items()):
        raise DataError(f"{name} must claim what its policy claims; it was altered. Audit again: sottovoce audit.")
    found["levels"] = [_level(sources, name, key) for key in sources.at(f"{name}#/levels")] if ours else []
    found["power"] = quoted(sources, f"{name}#/power") if ours else None
    return found


def _level(sources: Sources, name: str, key: str) -> dict[str, Any]:
    at = f"{name}#/levels/{key}"
    fields = (
        "title",
        "epsilon_lower",
        "epsilon_audited",
        "power",
        "control_detected",
        "mutants_caught",
        "mutants_missed",
        "words",
    )
    found: dict[str, Any] = {"level": key, "result": computed(sources, "audit.verdict", at)}
    found |= {field: quoted(sources, f"{at}/{field}") for field in fields}
    if found["result"]["value"] == "no result":  # a number without its control must not be read as one
        del found["epsilon_lower"], found["epsilon_audited"]
    return found


def _verdict(audits: list[dict[str, Any]]) -> str:
    """All audits in a line."""
    levels = [level for audit in audits for level in audit["levels"]]

    def named(result: str) -> str:
        return ", ".join(dict.fromkeys(each["level"] for each in levels if each["result"]["value"] == result))

    if not levels:
        other = "; those that were given are of another policy or other code" if audits else ""
        return f"Nobody attacked this campaign and this code, as far as this card knows{other}."
    said = [f"FAILED: an attack found more than it may ({named('FAILED')})."] if named("FAILED") else []
    said += [f"Attacked, and held: {named('held')}. That is no proof: see the audits below."] if named("held") else []
    weak = ", ".join(dict.fromkeys(each["level"] for each in levels if each["power"]["value"] is False))
    said += [f"NO POWER at the epsilon claimed: {weak}."] if weak else []
    said += [f"No result: {named('no result')}."] if named("no result") else []
    return " ".join(said)


def _questions(
    named: sections.Section, policy: Policy, place: str, audits: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    audited = "audited" if any(audit["levels"] for audit in audits) else "unaudited"
    cases = (policy.unit, policy.trust, place, audited)
    return [
        {"topic": topic, "question": question, "answer": _fill(questions.answer(topic, cases), named)}
        for topic, (question, _) in questions.QUESTIONS.items()
    ]
