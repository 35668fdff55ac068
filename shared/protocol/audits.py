"""What an audit found: ``audit.json``, written by ``sottovoce audit``, read by reports and privacy cards."""

import hashlib
import json
import math
import time
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from shared.errors import DataError

FILE = "audit.json"
ROOMS = ("client", "server", "shared")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class LevelResult(_Part):
    """What one attack found.

    Attributes:
        title: What was attacked, in a few words.
        passed: Whether the attack found no more than the claim allows; None where that is no evidence, because its
            control was not detected or a mutant was missed.
        epsilon_lower: Lower bound on epsilon at 95 % confidence; None where the level gives none.
        epsilon_audited: Of the policy that ``epsilon_lower`` is about: a level may attack a copy of the campaign whose
            noise is that of a smaller epsilon, where its bound has power.
        power: Whether a quarter of the noise shows at the epsilon claimed, in four runs of five at least (L1) or in
            this one (L2); None where the level gives no bound.
        control_detected: Whether the same attack succeeds without privacy.
        mutants_caught: Faults, put in on purpose, that the attack found.
        mutants_missed: Faults it should have found and did not.
        seconds: Wall time.
        facts: Every number that was seen, also where that is no result.
        words: What it means, in plain sentences.
    """

    title: str
    passed: bool | None
    epsilon_lower: FiniteFloat | None
    epsilon_audited: FiniteFloat | None = None
    power: bool | None = None
    control_detected: bool
    mutants_caught: tuple[str, ...]
    mutants_missed: tuple[str, ...]
    seconds: FiniteFloat
    facts: dict[str, Any]
    words: tuple[str, ...]

    @model_validator(mode="after")
    def _no_result_without_its_control(self) -> Self:
        if self.passed is not None and (not self.control_detected or self.mutants_missed):
            raise ValueError("passed must be null where the control was not detected or a mutant was missed")
        if self.passed is None and self.epsilon_lower is not None:
            raise ValueError("epsilon_lower must be null where passed is")
        if self.passed and (self.epsilon_lower or 0) > (self.epsilon_audited or math.inf):
            raise ValueError("passed must be false where epsilon_lower exceeds epsilon_audited")
        return self


class PowerRow(_Part):
    """Share of trials in which a bound exceeds the epsilon claimed: with the true noise, and with every fault."""

    epsilon: FiniteFloat
    noise_multiplier: FiniteFloat
    found: dict[str, FiniteFloat] = Field(min_length=1)
    power: bool


class PowerTable(_Part):
    """Which faults one bound finds at which epsilon, by trials on the mechanism itself."""

    bound: str
    canaries: int
    guesses: int
    delta: FiniteFloat
    confidence: FiniteFloat
    trials: int
    enough: FiniteFloat
    releases: int
    sampling_rate: FiniteFloat
    rows: tuple[PowerRow, ...] = Field(min_length=1)


class Audit(_Part):
    """Everything one audit found.

    Attributes:
        policy_sha256: The campaign that was audited.
        settings_sha256: Its settings, without what may differ between machines.
        epsilon_claimed: What its policy states.
        after_round: Round whose shared arrays L0 began from; 0 is the public start.
        code_sha256: Of the code that was attacked, see ``hash_code``.
        passed: Whether every level passed.
        power: Bound of L1 -> which faults it finds at which epsilon.
    """

    schema_version: Literal[1] = Field(default=1, alias="schema")
    scenario: str
    policy_sha256: str
    settings_sha256: str
    unit: Literal["record", "user"]
    trust: Literal["local", "distributed", "central"]
    epsilon_claimed: FiniteFloat
    delta: FiniteFloat
    level: Literal["quick", "full"]
    passed: bool
    seed: int
    after_round: int
    created: str
    seconds: FiniteFloat
    versions: dict[str, str]
    commit: str | None
    code_sha256: str
    levels: dict[str, LevelResult] = Field(min_length=1)
    power: dict[str, PowerTable]

    @model_validator(mode="after")
    def _passed_is_of_all_levels(self) -> Self:
        if self.passed != all(level.passed is True for level in self.levels.values()):
            raise ValueError("passed must be true where every level passed, and only there")
        return self

    def to_json(self) -> str:
        """As it is written to a file."""
        return json.dumps(self.model_dump(mode="json", by_alias=True), indent=2) + "\n"


def read_audit(path: Path) -> Audit:
    """Read what ``sottovoce audit`` wrote.

    Raises:
        DataError: There is no such file, or it is no audit of this version.
    """
    try:
        return Audit.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be an audit, it cannot be read: {error}. Run: sottovoce audit.") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise DataError(f"{path}: {where}: {first['msg']}; audit again with: sottovoce audit.") from None


@lru_cache(maxsize=1)
def hash_code() -> str:
    """Hash over the source files of ``client``, ``server`` and ``shared`` as they are installed here."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (root / room).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}|".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def conclude(
    *,
    title: str,
    held: bool,
    control_detected: bool,
    caught: Mapping[str, bool],
    required: Collection[str] | None = None,
    started: float,
    facts: dict[str, Any],
    words: tuple[str, ...],
    epsilon_lower: float | None = None,
    epsilon_audited: float | None = None,
    power: bool | None = None,
) -> LevelResult:
    """What a level may say: nothing of what it found where its control was not detected or a mutant was missed.

    Args:
        title: See ``LevelResult``.
        held: Whether the attack on the real code found no more than it may.
        control_detected: See ``LevelResult``.
        caught: Mutant -> whether the attack found it.
        required: Mutants it must find; by default all of them.
        started: When the level began, by ``time.perf_counter``.
        facts: See ``LevelResult``.
        words: What it means if there is a result.
        epsilon_lower: See ``LevelResult``.
        epsilon_audited: See ``LevelResult``.
        power: See ``LevelResult``.
    """
    missed = tuple(name for name, found in caught.items() if not found and (required is None or name in required))
    stands = control_detected and not missed
    why = [] if control_detected else ["the same attack without privacy was not detected"]
    why += [f"faults put in on purpose were missed: {', '.join(missed)}"] if missed else []
    return LevelResult(
        title=title,
        passed=held if stands else None,
        epsilon_lower=epsilon_lower if stands else None,
        epsilon_audited=epsilon_audited,
        power=power,
        control_detected=control_detected,
        mutants_caught=tuple(name for name, found in caught.items() if found),
        mutants_missed=missed,
        seconds=time.perf_counter() - started,
        facts=facts,
        words=words if stands else (f"No result: {'; '.join(why)}.",),
    )
