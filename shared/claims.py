"""Say in words, and in fields, what a campaign's price promises: unit, relation, trust, sampling, accountant, noise."""

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from importlib.metadata import version

from shared.accounting import Mechanism, epsilon
from shared.errors import PrivacyError

RELATION = "one training record added or removed"
TRUST = {"local": "nobody (local noise on each device)", "none": "everyone"}
NOISE = {
    "seeded": "this is what a deployment with these settings would spend; this simulation's noise is seeded, "
    "its seeds are in the run folder",
    "secure": "integers from the operating system's cryptographic generator",
    "none": "none",
}


@dataclass(frozen=True)
class Claim:
    """What a run may say about privacy; under ``trust = "none"``, that it claims nothing.

    Args:
        trust: Key of ``TRUST``.
        unit: What is protected, such as ``"record"``; ``"none"`` without a claim.
        relation: What neighbours differ in.
        epsilon: Certified epsilon for the whole campaign; None without a claim.
        delta: The delta it holds with; None without a claim.
        sampling: How records enter a step.
        accountant: What priced it, with version.
        max_participations: Rounds one device may join.
        noise: Key of ``NOISE``.

    Raises:
        PrivacyError: Trust or noise is unknown, or the fields contradict each other.
    """

    trust: str
    unit: str
    relation: str
    epsilon: float | None
    delta: float | None
    sampling: str
    accountant: str
    max_participations: int
    noise: str

    def __post_init__(self) -> None:
        if self.trust not in TRUST or self.noise not in NOISE:
            raise PrivacyError(
                f"A claim must have a trust of {', '.join(TRUST)} and a noise of {', '.join(NOISE)}, "
                f"got {self.trust!r} and {self.noise!r}."
            )
        if self.trust == "none":
            sound = self.epsilon is None and self.delta is None and self.noise == "none"
        else:
            finite = self.epsilon is not None and math.isfinite(self.epsilon) and self.epsilon >= 0
            sound = finite and self.delta is not None and 0 < self.delta < 1 and self.noise != "none"
        if not sound:
            raise PrivacyError(
                'A claim must have a finite epsilon, a delta and noise, or none of them and trust "none", '
                f"got trust {self.trust!r}, epsilon {self.epsilon}, delta {self.delta}, noise {self.noise!r}."
            )

    def sentence(self) -> str:
        """Say the claim in one sentence that names every field; epsilon is rounded up to three digits."""
        details = (
            f"neighbours: {self.relation}; trust: {TRUST[self.trust]}; sampling: {self.sampling}; "
            f"accountant: {self.accountant}; rounds per device: at most {self.max_participations}; "
            f"noise: {NOISE[self.noise]}."
        )
        if self.epsilon is None or self.delta is None:
            return f"NOT PRIVATE: no epsilon, no delta; unit: {self.unit}; {details}"
        bounds = f"(epsilon = {_round_up(self.epsilon)}, delta = {float(self.delta)})"
        return f"{self.unit.capitalize()}-level {bounds}-differential privacy, {details}"


def record_claim(mechanism: Mechanism, *, delta: float, noise: str = "seeded") -> Claim:
    """Price a campaign under ``privacy.trust = "local"`` and state all of it.

    Args:
        mechanism: What one device releases.
        delta: In [1e-12, 1).
        noise: Key of ``NOISE``: where the bits come from.

    Returns:
        The claim, its epsilon from ``epsilon()``.

    Raises:
        PrivacyError: ``delta`` is impossible, or the mechanism has no finite price.
    """
    if mechanism.sampling_rate < 1:
        how = f"Poisson, each record enters a step with probability {mechanism.sampling_rate}"
    else:
        how = "none, every record enters every step"
    return Claim(
        trust="local",
        unit="record",
        relation=RELATION,
        epsilon=epsilon(mechanism, delta=delta),
        delta=delta,
        sampling=f"{how} ({mechanism.steps} per round)",
        accountant=f"dp-accounting {version('dp-accounting')}, privacy loss distributions",
        max_participations=mechanism.max_participations,
        noise=noise,
    )


def no_claim(*, max_participations: int) -> Claim:
    """Return what a run under ``privacy.trust = "none"`` may say."""
    return Claim(
        trust="none",
        unit="none",
        relation="none",
        epsilon=None,
        delta=None,
        sampling="not accounted",
        accountant="none",
        max_participations=max_participations,
        noise="none",
    )


def _round_up(value: float) -> str:
    """Write a number with three digits, never below it."""
    exact = Decimal(str(value))
    return str(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), rounding=ROUND_CEILING)) if value else "0"
