"""Audit a scenario, a run or a published campaign: every level of attack, with its control and its mutants."""

import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from shared.errors import PrivacyError
from shared.privacy.mechanisms import AnyMechanism
from shared.progress import track
from shared.protocol.audits import FILE, Audit, LevelResult, PowerTable, hash_code
from simulations.audit import canaries, inversion, record_play, sentences
from simulations.audit.gaussian import is_gaussian
from simulations.audit.power import Bound, power_table
from simulations.audit.stage import Subject, open_subject
from simulations.machine import commit

Depth = Literal["quick", "full"]

LEVELS: dict[str, Callable[..., LevelResult]] = {
    "L0": record_play.audit,
    "L1": canaries.audit,
    "L2": sentences.audit,
    "L5": inversion.audit,
}
_QUICK = ("L0", "L1", "L5")
_VERSIONS = ("sottovoce", "torch", "opacus", "flwr", "dp-accounting", "scipy", "numpy")


def run_audit(
    source: Path,
    *,
    level: Depth = "quick",
    overrides: tuple[str, ...] = (),
    seed: int = 0,
    quiet: bool = False,
) -> Audit:
    """Attack what a scenario, a run or a campaign would send, and say what was found.

    Args:
        source: A scenario file, or the folder of a run or of a published campaign.
        level: ``quick`` is L0, L1 and L5; ``full`` adds L2.
        overrides: ``key=value`` settings over those of a scenario file.
        seed: Of coins, canaries and choices; the devices' noise is the operating system's.
        quiet: No progress on stderr.

    Returns:
        What ``audit.json`` holds.

    Raises:
        SottovoceError: There is nothing to attack, or it cannot be attacked.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="sottovoce-audit-") as folder:
        subject = open_subject(source, overrides=overrides, folder=Path(folder), seed=seed, quiet=quiet)
        names = [name for name in LEVELS if level == "full" or name in _QUICK]
        levels = {
            name: LEVELS[name](subject, seed=seed, quiet=quiet)
            for name in track(names, description="audit", unit="level", quiet=quiet)
        }
        return _collect(subject, levels, level=level, seed=seed, seconds=time.perf_counter() - started)


def _collect(subject: Subject, levels: dict[str, LevelResult], *, level: Depth, seed: int, seconds: float) -> Audit:
    policy = subject.campaign.policy
    if policy.trust == "none" or policy.epsilon is None or policy.delta is None:
        raise PrivacyError("an audit needs a promise to attack, the campaign makes none; set another privacy.trust.")
    return Audit(
        scenario=subject.scenario.name,
        policy_sha256=policy.sha256,
        settings_sha256=policy.settings_sha256,
        unit=policy.unit,
        trust=policy.trust,
        epsilon_claimed=policy.epsilon,
        delta=policy.delta,
        level=level,
        passed=all(each.passed is True for each in levels.values()),
        seed=seed,
        after_round=subject.after_round,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=seconds,
        versions={name: version(name) for name in _VERSIONS},
        commit=commit(),
        code_sha256=hash_code(),
        levels=levels,
        power=_power(policy.mechanism, delta=policy.delta, seed=seed),
    )


def _power(mechanism: AnyMechanism, *, delta: float, seed: int) -> dict[str, PowerTable]:
    """Bound -> its power table, for the bounds that hold for these releases."""
    bounds: tuple[Bound, ...] = ("one-run", "gaussian") if is_gaussian(mechanism) else ("one-run",)
    return {bound: PowerTable(**power_table(mechanism, delta=delta, bound=bound, seed=seed)) for bound in bounds}


def place_of(source: Path) -> Path | None:
    """Where a run, finished or not, keeps its audit; None for what is no run."""
    return source / FILE if (source / "run.json").is_file() else None
