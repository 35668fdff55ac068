"""Say in words, and in fields, what a campaign's price promises: unit, relation, trust, sampling, accountant, noise."""

import math
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from importlib.metadata import version
from typing import TYPE_CHECKING, Protocol

from shared.errors import PrivacyError
from shared.privacy.accounting import AnyMechanism, DistributedMechanism, Mechanism, epsilon

if TYPE_CHECKING:
    from shared.privacy.policy import Policy

RELATION = "one training record added or removed"
USER_RELATION = "one user's contribution to every round replaced by zero, the roster being public"
TRUST = {
    "local": "nobody (local noise on each device)",
    "distributed": "a server that follows the protocol, with fewer than t of a device's neighbours and at most c "
    "devices colluding with it; it enrols devices, so it must not enrol fakes",
    "central": "the server (noise is added there)",
    "none": "everyone",
}
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
        terms: The numbers that the trust rests on, as ``"t = 7 of 10 neighbours"``; empty without any.

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
    terms: str = ""

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
        trust = TRUST[self.trust] + (f" ({self.terms})" if self.terms else "")
        details = (
            f"neighbours: {self.relation}; trust: {trust}; sampling: {self.sampling}; "
            f"accountant: {self.accountant}; rounds per device: at most {self.max_participations}; "
            f"noise: {NOISE[self.noise]}."
        )
        if self.epsilon is None or self.delta is None:
            return f"NOT PRIVATE: no epsilon, no delta; unit: {self.unit}; {details}"
        bounds = f"(epsilon = {_round_up(self.epsilon)}, delta = {float(self.delta)})"
        return f"{self.unit.capitalize()}-level {bounds}-differential privacy, {details}"


class SumTerms(Protocol):
    """What a policy says about its secure sum."""

    @property
    def neighbours(self) -> int:
        """Devices each device shares masks and secrets with."""

    @property
    def threshold(self) -> int:
        """Neighbours t who together can open a device's secrets."""

    @property
    def min_survivors(self) -> int:
        """Contributions a sum must have, or it is not opened."""

    @property
    def colluders(self) -> int:
        """Devices c among them whose noise may be known."""

    @property
    def groups(self) -> int:
        """Sums of a round, each of as many devices."""


def claim_of(policy: "Policy", *, noise: str = "seeded") -> Claim:
    """State what a policy promises, whatever its unit and trust.

    Args:
        policy: Its constants are priced, its stated epsilon is not read.
        noise: Key of ``NOISE``: where the bits come from; ``"none"`` is what a policy without a promise gets.

    Raises:
        PrivacyError: As ``record_claim`` and ``user_claim``.
    """
    if policy.delta is None:
        return no_claim(max_participations=policy.max_participations)
    if policy.unit == "user":
        return user_claim(
            policy.mechanism, delta=policy.delta, trust=policy.trust, secure_sum=policy.secure_sum, noise=noise
        )
    if not isinstance(policy.mechanism, Mechanism):
        raise PrivacyError("a secure sum must be claimed for users, the policy's unit is record; set privacy.unit.")
    return record_claim(policy.mechanism, delta=policy.delta, noise=noise)


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
        accountant=_accountant(mechanism),
        max_participations=mechanism.max_participations,
        noise=noise,
    )


def user_claim(
    mechanism: AnyMechanism, *, delta: float, trust: str, secure_sum: SumTerms | None = None, noise: str = "seeded"
) -> Claim:
    """Price a campaign under ``privacy.unit = "user"`` and state all of it.

    Args:
        mechanism: What is released of one user: one noisy sum a round.
        delta: In [1e-12, 1).
        trust: ``"central"`` with a ``Mechanism``, ``"distributed"`` with a ``DistributedMechanism``.
        secure_sum: Under ``"distributed"``: its terms.
        noise: Key of ``NOISE``: where the bits come from.

    Returns:
        The claim, its epsilon from ``epsilon()``.

    Raises:
        PrivacyError: ``delta`` is impossible, the mechanism has no finite price, or it is not what ``trust`` releases.
    """
    if isinstance(mechanism, DistributedMechanism):
        honest = secure_sum.min_survivors - secure_sum.colluders if secure_sum else None
        fits = trust == "distributed" and mechanism.shares == honest
    else:
        fits = trust == "central" and secure_sum is None and mechanism.sampling_rate == 1 == mechanism.steps
    if not fits:
        raise PrivacyError(
            "a claim for users must be of one whole sum a round, noised by the server under trust 'central', or under "
            "'distributed' by survivors who do not collude, as many as are priced; "
            f"got trust {trust!r} and {type(mechanism).__name__}."
        )
    return Claim(
        trust=trust,
        unit="user",
        relation=USER_RELATION,
        epsilon=epsilon(mechanism, delta=delta),
        delta=delta,
        sampling="none, every round that a device joins is priced",
        accountant=_accountant(mechanism),
        max_participations=mechanism.max_participations,
        noise=noise,
        terms=_words(secure_sum) if secure_sum else "",
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


def _accountant(mechanism: AnyMechanism) -> str:
    if isinstance(mechanism, DistributedMechanism):
        return (
            "zCDP of sums of discrete Gaussians, Kairouz et al. 2021 (arXiv:2102.06387), converted as in Canonne et "
            "al. 2020 (arXiv:2004.00010)"
        )
    return f"dp-accounting {version('dp-accounting')}, privacy loss distributions"


def _words(terms: SumTerms) -> str:
    groups = f"{terms.groups} sums a round, each carrying the whole noise; of each: " if terms.groups > 1 else ""
    return (
        f"{groups}t = {terms.threshold} of {terms.neighbours} neighbours; c = {terms.colluders} of at least "
        f"{terms.min_survivors} survivors, so that {terms.min_survivors - terms.colluders} shares of noise are unknown"
    )


def _round_up(value: float) -> str:
    """Write a number with three digits, never below it."""
    exact = Decimal(str(value))
    return str(exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), rounding=ROUND_CEILING)) if value else "0"
