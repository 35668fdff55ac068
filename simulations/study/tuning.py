"""What a study says of its choices: what was tuned on which records, and what that would cost in privacy."""

from collections.abc import Sequence
from typing import Any

from shared.privacy.accounting import epsilon_together
from shared.privacy.mechanisms import AnyMechanism, Mechanism
from shared.privacy.policy import Policy
from simulations.study.config import Study
from simulations.study.plan import Run

_GEOMETRIC = 1.0  # shape of the negative binomial number of trials


def composed(mechanisms: Sequence[AnyMechanism], *, delta: float) -> float:
    """Epsilon of all trials together: an upper bound of what their models release, were each run on the same users."""
    return epsilon_together(mechanisms, delta=delta)


def private_choice(mechanism: Mechanism, *, trials: int, delta: float) -> float:
    """Epsilon of the best of a random number of trials, where each scores itself within its own privacy.

    Args:
        mechanism: What the costliest trial releases.
        trials: Mean of the number of trials, which is drawn from a geometric distribution and not fixed.
        delta: Of the whole choice.

    Returns:
        Its epsilon, by Rényi divergences. It is no bound for the search of a study: there the number of trials is
        fixed, they learn from each other, and scores are exact.

    Source:
        Papernot & Steinke 2022, arXiv:2110.03620, Theorem 2 with eta = 1; Liu & Talwar 2019, arXiv:1811.07971. The
        accountant is Google's dp-accounting.
    """
    import dp_accounting
    from dp_accounting.dp_event import RepeatAndSelectDpEvent
    from dp_accounting.rdp import RdpAccountant

    once: Any = dp_accounting.GaussianDpEvent(mechanism.noise_multiplier)
    if mechanism.sampling_rate < 1:
        once = dp_accounting.PoissonSampledDpEvent(mechanism.sampling_rate, once)
    repeated = dp_accounting.SelfComposedDpEvent(once, mechanism.releases)
    accountant = RdpAccountant()
    accountant.compose(RepeatAndSelectDpEvent(repeated, mean=float(trials), shape=_GEOMETRIC))
    return float(accountant.get_epsilon(delta)) + mechanism.choice_epsilon


def price_of(policies: Sequence[Policy]) -> dict[str, Any]:
    """What trials would spend of the same users.

    Args:
        policies: Of every trial's campaigns that a trial trained, in the order of the trials.

    Returns:
        ``trials``, ``epsilon_each`` (the largest of one), ``delta``, ``epsilon_together`` and ``epsilon_private``
        (see ``private_choice``; null where a trial's noise is in shares). Nothing where no trial makes a claim.
    """
    private = [policy for policy in policies if policy.epsilon is not None and policy.delta is not None]
    if not private:
        return {}
    delta = max(policy.delta for policy in private if policy.delta is not None)
    mechanisms = [policy.mechanism for policy in private]
    worst = max(private, key=lambda policy: policy.epsilon or 0.0)
    return {
        "trials": len(private),
        "unit": worst.unit,
        "epsilon_each": worst.epsilon,
        "delta": delta,
        "epsilon_together": composed(mechanisms, delta=delta),
        "epsilon_private": private_choice(worst.mechanism, trials=len(private), delta=delta)
        if isinstance(worst.mechanism, Mechanism)
        else None,
    }


def said(study: Study, runs: Sequence[Run], tuning: dict[str, Any] | None) -> list[str]:
    """What a study says of its choices, in sentences, for its output and its report."""
    points = len(dict.fromkeys(run.point for run in runs if run.trial is None))
    if tuning is None and study.search:
        return ["The search of this study has chosen nothing yet; what its trials read are validation records."]
    if tuning is None:
        return [
            f"This sweep tuned nothing: all {points} points are shown as the study file lists them, scored on test "
            "records. "
            "Whoever takes the best of them for their own campaign chooses by these users' records, and no ε here "
            "covers that choice."
        ]
    over = sum(each["score"] is not None for each in tuning["trials"])
    names = ", ".join(tuning["settings"])
    lines = [
        f"Tuned: {names}; {over} of {len(tuning['trials'])} trials finished ({tuning['sampler']}, seed "
        f"{tuning['seed']}), chosen by {tuning['metric']} of the row {tuning['row']} on validation records, which are "
        "cut from the users' training records. No trial read a test record; the settings chosen were run on test "
        "records once for each seed.",
        "No ε of this study covers the choice: it was made by exact scores of users' validation records. On public or "
        "invented data that harms nobody; on users' own records the scores would have to be private, too.",
    ]
    price = tuning.get("price") or {}
    if price:
        per, delta = f"per {price['unit']}", f"δ = {price['delta']:g}"
        lines.append(
            f"The {price['trials']} trained models alone, each with ε ≤ {price['epsilon_each']:g} {per}, would spend "
            f"ε = {price['epsilon_together']:.2f} ({delta}) together of the same users: the upper bound for publishing "
            "all of them or choosing one, scores not counted."
        )
        if price["epsilon_private"] is not None:
            lines.append(
                "With scores inside the same privacy and a number of trials drawn at random (geometric, mean "
                f"{price['trials']}), publishing the best alone would spend ε = {price['epsilon_private']:.2f} "
                f"({delta}; Papernot and Steinke 2022). This search is not of that kind: its trials learn from each "
                "other."
            )
    return lines
