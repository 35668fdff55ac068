"""Numbers with their source: how a card's cells are made, and how each is found and computed again."""

import base64
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shared.card.sources import Sources
from shared.errors import DataError
from shared.privacy.accounting import epsilon
from shared.privacy.claims import NOISE, TRUST, Claim, claim_of
from shared.privacy.policy import Policy, SecureSum, read_policy
from shared.protocol.signing import fingerprint

Cell = dict[str, Any]
MECHANISM = ("noise_multiplier", "sampling_rate", "steps", "unit", "slots", "secure_sum", "delta")


def _epsilon(
    noise_multiplier: float,
    sampling_rate: float,
    steps: int,
    unit: str,
    slots: list[Any],
    secure_sum: dict[str, int] | None,
    delta: float,
    rounds: int,
) -> float:
    """What so many rounds of one device cost, by the campaign's accountant."""
    if not rounds:
        return 0.0
    policy = Policy.model_construct(
        noise_multiplier=noise_multiplier,
        sampling_rate=sampling_rate,
        steps=steps,
        unit=unit,
        slots=slots,
        secure_sum=SecureSum.model_validate(secure_sum) if secure_sum else None,
        max_participations=rounds,
    )
    return epsilon(policy.mechanism, delta=delta)


def _noise(place: str) -> str:
    return "seeded" if place == "experiment" else "secure"


def _claim(policy: Any, place: str) -> Claim:
    return claim_of(read_policy(json.dumps(policy)), noise=_noise(place))


def _fingerprint(key: str) -> str:
    return fingerprint(Ed25519PublicKey.from_public_bytes(base64.b64decode(key)))


def audit_of(audit: Mapping[str, Any], policy: Mapping[str, Any], code_sha256: str) -> str:
    """Whether an audit is of a card's campaign and of the code beside it; only then is it evidence."""
    if audit["policy_sha256"] != read_policy(json.dumps(policy)).sha256:
        return "another policy"
    return "this campaign" if audit["code_sha256"] == code_sha256 else "other code"


def verdict(level: Mapping[str, Any]) -> str:
    """What a level of an audit says."""
    if level["passed"] is None:
        return "no result"
    return "held" if level["passed"] else "FAILED"


# What a cell's "computed" names: a function of the values at its "from".
COMPUTED: Mapping[str, Callable[..., Any]] = {
    "accounting.epsilon": _epsilon,
    "claims.relation": lambda policy, place: _claim(policy, place).relation,
    "claims.sampling": lambda policy, place: _claim(policy, place).sampling,
    "claims.accountant": lambda policy, place: _claim(policy, place).accountant,
    "claims.terms": lambda policy, place: _claim(policy, place).terms,
    "claims.sentence": lambda policy, place: _claim(policy, place).sentence(),
    "claims.trusted": lambda trust: TRUST[trust],
    "claims.noise": lambda place: NOISE[_noise(place)],
    "policy.sha256": lambda policy: read_policy(json.dumps(policy)).sha256,
    "policy.size": lambda slots: sum(math.prod(shape) for _, shape in slots),
    "signing.fingerprint": _fingerprint,
    "audit.of": audit_of,
    "audit.verdict": verdict,
    "product": lambda one, other: one * other,
    "difference": lambda one, other: one - other,
    "total": lambda counts: sum(counts.values()),
    "total.size_bytes": lambda releases: sum(release["size_bytes"] for release in releases),
    "exp": math.exp,
    "group.epsilon": lambda once: 2 * once,
    "group.delta": lambda once, delta: (1 + math.exp(once)) * delta,
}


def quoted(sources: Sources, pointer: str) -> Cell:
    """A value as it stands in a source."""
    return {"value": sources.at(pointer), "source": pointer}


def computed(sources: Sources, name: str, *pointers: str) -> Cell:
    """A value of one of ``COMPUTED``."""
    return {"value": COMPUTED[name](*map(sources.at, pointers)), "computed": name, "from": list(pointers)}


def price(sources: Sources, rounds: str) -> Cell:
    """Epsilon after as many rounds as a pointer names."""
    return computed(sources, "accounting.epsilon", *(f"policy.json#/{field}" for field in MECHANISM), rounds)


def is_cell(value: Any) -> bool:
    """Whether a value of a card is a cell."""
    return isinstance(value, dict) and "value" in value


def cells(card: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every cell of a card with its place in it; a number outside of a cell is given as it is."""
    if is_cell(card) or (isinstance(card, int | float) and not isinstance(card, bool)):
        yield path, card
    elif isinstance(card, dict):
        for key, value in card.items():
            yield from cells(value, f"{path}/{key}")
    elif isinstance(card, list):
        for number, value in enumerate(card):
            yield from cells(value, f"{path}/{number}")


def check_cells(card: Mapping[str, Any], sources: Sources) -> None:
    """Find every number of a card again in its sources, or compute it again.

    Raises:
        DataError: One has no source, or is not what its source says.
    """
    for path, cell in cells({key: value for key, value in card.items() if key != "schema"}):
        if not is_cell(cell):
            raise DataError(f"every number of a card must name its source, {path} does not; make the card again.")
        if cell.keys() == {"value", "source"}:
            again = quoted(sources, cell["source"])
        elif cell.keys() == {"value", "computed", "from"} and cell["computed"] in COMPUTED:
            again = computed(sources, cell["computed"], *cell["from"])
        else:
            raise DataError(f"{path} must have a source or say how it was computed, got {sorted(cell)}.")
        if not _same(again["value"], cell["value"]):
            raise DataError(
                f"{path} must be what its source says, {again['value']!r:.120}, got {cell['value']!r:.120}."
            )


def _same(one: Any, other: Any) -> bool:
    """Equal, also in kind: True is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
