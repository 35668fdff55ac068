"""Privacy cards for tests: an audit made up for a campaign, and the three places a card is made at."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.privacy.policy import Policy
from shared.protocol.audits import Audit, LevelResult, hash_code

CREATED = datetime(2030, 5, 2, 9, tzinfo=UTC)
NO_POWER = "No power at the claimed epsilon 8: no fault in the table would have been seen."


def level(title: str, *, passed: bool | None = True, control: bool = True, **changes: Any) -> LevelResult:
    """What one attack found."""
    said = {
        "title": title,
        "passed": passed,
        "epsilon_lower": None,
        "epsilon_audited": 2.0,
        "control_detected": control,
        "mutants_caught": ("no-noise",),
        "mutants_missed": (),
        "seconds": 1.5,
        "facts": {},
        "words": ("What was tried found nothing.",),
    }
    return LevelResult(**said | changes)


def power_table() -> dict[str, Any]:
    """The form of a power table, its shares made up."""
    rows = [{"epsilon": e, "noise_multiplier": 4 / e, "found": {"no noise": 1 / e}, "power": e < 8} for e in (2.0, 8.0)]
    about = {"bound": "one-run", "canaries": 1000, "guesses": 200, "delta": 1e-5, "confidence": 0.95, "trials": 100}
    return about | {"enough": 0.8, "releases": 1, "sampling_rate": 1.0, "rows": rows}


def audit(policy: Policy, path: Path, **changes: Any) -> Path:
    """Write an audit of a campaign: L0 held, L1 held without power, L5 without its control."""
    levels = changes.pop("levels", None) or {
        "L0": level("one record more"),
        "L1": level(
            "canaries in the gradients", epsilon_lower=0.25, words=(NO_POWER, "The bound is 0.25."), power=False
        ),
        "L5": level("inversion of a change", passed=None, control=False, words=("No result: its control.",)),
    }
    said = {
        "schema": 1,
        "scenario": "tiny",
        "policy_sha256": policy.sha256,
        "settings_sha256": policy.settings_sha256,
        "unit": policy.unit,
        "trust": policy.trust,
        "epsilon_claimed": policy.epsilon,
        "delta": policy.delta,
        "level": "quick",
        "passed": all(each.passed is True for each in levels.values()),
        "seed": 0,
        "after_round": 0,
        "created": "2030-05-01T13:00:00+00:00",
        "seconds": 4.5,
        "versions": {"sottovoce": "0"},
        "commit": None,
        "code_sha256": hash_code(),
        "levels": levels,
        "power": {"one-run": power_table()},
    }
    path.write_text(Audit(**said | changes).to_json(), encoding="utf-8")
    return path


def run_folder(folder: Path, campaign: Path, invented: Any) -> Path:
    """A run's folder, its scores made up, around a campaign."""
    run = invented.invented_run(folder)
    summary = json.loads((run / "summary.json").read_text())
    for name in ("tiny", "tiny-linear"):
        shutil.copytree(campaign, run / "campaigns" / name)
        (run / "campaigns" / name / "policy.sig").unlink(missing_ok=True)
    altered = run / "campaigns" / "tiny-linear" / "policy.json"
    altered.write_text(altered.read_text().replace('"rounds": ', '"rounds": 1'))
    from shared.protocol.signing import policy_sha256

    summary["privacy"]["policy_sha256"] = policy_sha256(run / "campaigns" / "tiny")
    (run / "summary.json").write_text(json.dumps(summary))
    return run
