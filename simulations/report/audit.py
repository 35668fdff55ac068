"""The audit of a run as a section of its report."""

import html
from collections.abc import Collection, Iterator

from shared.page import details, items, table
from shared.protocol.audits import Audit, LevelResult, hash_code
from simulations.audit.words import began, power_tables, verdict

_WHAT = {
    True: "the attack found no more than it may",
    False: "the attack found more than it may",
    None: "no result: without its control, or with a fault it should have found and did not, an attack proves nothing",
}


def section(audit: Audit, *, policies: Collection[str]) -> Iterator[str]:
    """HTML of an audit, with a warning where it is of none of a run's campaigns, or of other code than is here.

    Args:
        audit: What was found.
        policies: Hashes of the run's policies.
    """
    yield "<h2>Audit</h2>"
    if audit.policy_sha256 not in policies:
        yield (
            '<p class="warn"><strong>Of another campaign.</strong> This audit is of a policy that is not this run\'s: '
            "it is no evidence here. Audit the run again.</p>"
        )
    elif audit.code_sha256 != hash_code():
        yield (
            '<p class="warn"><strong>Of other code.</strong> Sottovoce has changed since this audit: it says nothing '
            "of the code that is here now. Audit the run again.</p>"
        )
    yield (
        f"<p>{html.escape(audit.level.capitalize())} audit of {html.escape(audit.created)}, {began(audit)}, "
        f"{audit.seconds:.0f} s. "
        "Every level attacked the code that devices and server run, on the bytes between them; then the same without "
        "privacy (its control), and with faults put in on purpose. An audit finds gross faults; it proves no ε.</p>"
    )
    yield table(
        f"What was attacked; claimed: ε = {audit.epsilon_claimed:g} at δ = {audit.delta:g}, {audit.unit} level",
        ["level", "result", "ε is at least", "control", "faults found", "faults missed"],
        [_row(name, level) for name, level in audit.levels.items()],
        look="words",
    )
    for name, level in audit.levels.items():
        yield f"<h3>{html.escape(name)}: {html.escape(level.title)}</h3>"
        yield f"<p>{_WHAT[level.passed].capitalize()}.</p>"
        yield f"<ul>{items(html.escape(word) for word in level.words)}</ul>"
    tables = [
        table(caption.capitalize(), head, [[html.escape(cell) for cell in row] for row in rows])
        for caption, head, rows in power_tables(audit)
    ]
    if tables:
        yield details("Which faults L1 finds at which ε", "\n".join(tables))


def _row(name: str, level: LevelResult) -> list[str]:
    return [
        html.escape(name),
        html.escape(verdict(level)),
        _bound(level),
        "detected" if level.control_detected else "not detected",
        html.escape(", ".join(level.mutants_caught) or "–"),
        html.escape(", ".join(level.mutants_missed) or "–"),
    ]


def _bound(level: LevelResult) -> str:
    if level.epsilon_lower is None or level.epsilon_audited is None:
        return "–"
    power = "<br>no power at the ε claimed" if level.power is False else ""
    return f"{level.epsilon_lower:.2f}, attacked at {level.epsilon_audited:g}{power}"
