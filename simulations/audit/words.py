"""What an audit found, for a reader."""

from shared.protocol.audits import Audit, LevelResult, PowerTable


def lines(audit: Audit) -> list[str]:
    """The audit as text."""
    out = [
        f"{audit.scenario}: {audit.unit} level, trust {audit.trust}, epsilon {audit.epsilon_claimed:g} at delta "
        f"{audit.delta:g} claimed; policy {audit.policy_sha256[:12]}, {audit.level} audit {began(audit)}, "
        f"{audit.seconds:.0f} s",
    ]
    for name, level in audit.levels.items():
        out += ["", f"{name}  {verdict(level):<9}  {level.title}  ({level.seconds:.1f} s)"]
        out += [f"    {word}" for word in level.words]
        if level.power is False:
            out.append("    no power at the epsilon claimed: the bound would not show a quarter of the noise")
        out.append(f"    control: {'detected' if level.control_detected else 'NOT DETECTED'}; {_mutants(level)}")
    out += ["", *power_lines(audit)]
    result = (
        "every level passed"
        if audit.passed
        else "NOT PASSED: "
        + ", ".join(f"{name} {verdict(level)}" for name, level in audit.levels.items() if level.passed is not True)
    )
    return [*out, "", f"result: {result}", "an audit finds gross faults; it proves no epsilon: see docs/audits.md"]


def began(audit: Audit) -> str:
    """Which shared arrays L0 began from; the other levels have campaigns of their own."""
    return f"L0 at the arrays of round {audit.after_round}" if audit.after_round else "L0 at the public start"


def verdict(level: LevelResult) -> str:
    """One word or two on a level."""
    return {True: "passed", False: "FAILED", None: "NO RESULT"}[level.passed]


def _mutants(level: LevelResult) -> str:
    caught = f"faults found: {', '.join(level.mutants_caught) or 'none'}"
    return caught + (f"; faults MISSED: {', '.join(level.mutants_missed)}" if level.mutants_missed else "")


def power_tables(audit: Audit) -> list[tuple[str, list[str], list[list[str]]]]:
    """Which faults each bound of L1 finds at which epsilon: a caption, the heads of the columns, and the rows."""
    return [_power_table(bound, table) for bound, table in audit.power.items()]


def _power_table(bound: str, table: PowerTable) -> tuple[str, list[str], list[list[str]]]:
    faults = list(table.rows[0].found)
    caption = (
        f"share of {table.trials} trials in which the {bound} bound of L1 exceeds the epsilon claimed "
        f"({table.canaries} canaries, {table.guesses} guesses)"
    )
    rows = [
        [f"{row.epsilon:g}{'' if row.power else ' (no power)'}", *(f"{row.found[fault]:.0%}" for fault in faults)]
        for row in table.rows
    ]
    return caption, ["epsilon", *faults], rows


def power_lines(audit: Audit) -> list[str]:
    """The power tables for a terminal."""
    out: list[str] = []
    for caption, head, rows in power_tables(audit):
        widths = [max(len(line[i]) for line in [head, *rows]) for i in range(len(head))]
        out += [f"{caption}:"]
        out += [
            "    " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            for line in [head, *rows]
        ]
    return out
