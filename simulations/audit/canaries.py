"""L1: a thousand canaries through the real optimiser and the wire, and what guesses of their coins prove of epsilon."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.config import Scenario
from shared.protocol.audits import LevelResult, conclude
from simulations.audit.canary_stand import Attack, Stand, attack, open_stand
from simulations.audit.gaussian import is_gaussian
from simulations.audit.mutants import mutant
from simulations.audit.power import ENOUGH, Bound, find_faults
from simulations.audit.stage import Subject, unprotected

__all__ = ["AUDIT_EPSILON", "MUTANTS", "attack", "audit", "open_stand"]

AUDIT_EPSILON = 2.0  # at which 1,000 canaries tell a quarter of the noise from all of it, with hardly a chance to fail
MUTANTS = ("no-noise", "quarter-noise", "no-clip")
AUDIT_DELTA = 1e-5  # at 1e-3 a thousand canaries prove nothing, at 1e-12 the noise is so much that less of it is missed
_FEW = {"record": 1000, "user": 300}  # canaries for what nobody can miss: no bound, no privacy; each user is a device
_CONTROL = 3.0  # the bound without privacy must exceed it; 200 right guesses of 200 give 4.2 at a delta of 1e-5
_CONTROL_SHARE = 0.99
_SURE = 0.99  # share of trials in which a quarter of the noise must be found at the audit's policy

Power = dict[str, dict[str, float]]


def audit(subject: Subject, *, seed: int, quiet: bool) -> LevelResult:
    """Attack a subject's privacy with canaries: at the audit's epsilon, at the claimed one, and with every fault.

    Args:
        subject: Whose unit, trust, bound, sampling and steps are attacked.
        seed: Of coins and canaries.
        quiet: Nothing is shown either way.

    Raises:
        SottovoceError: The campaign of canaries cannot be made or played.

    Guarantee:
        Of a campaign that keeps what it states, a bound exceeds its epsilon with probability at most .05 each.
    """
    del quiet
    started, at = time.perf_counter(), subject.scenario.privacy.epsilon
    folder, few = subject.folder / "canaries", _FEW[subject.scenario.privacy.unit]
    stand, power = _open_audited(subject.scenario, folder=folder, seed=seed)
    scenario = stand.campaign.scenario
    bare = open_stand(unprotected(scenario), name="unprotected", folder=folder, canaries=few)
    weak = open_stand(scenario, name="few", folder=folder, canaries=few)
    claimed = open_stand(subject.scenario, name="claimed", folder=folder)
    power["claimed"] = _power(claimed, seed=seed)
    if _most(power["claimed"], "sigma/4") < ENOUGH:
        claimed = open_stand(subject.scenario, name="claimed-few", folder=folder, canaries=few)
    real, at_claim, control = (attack(each, seed=seed + i) for i, each in enumerate((stand, claimed, bare)))
    faulty = {name: _with_fault(name, weak if name == "no-clip" else stand, seed=seed + 3) for name in MUTANTS}
    caught = {name: found.epsilon_lower > AUDIT_EPSILON for name, found in faulty.items()}
    detected = control.epsilon_lower > _CONTROL and control.correct >= _CONTROL_SHARE * control.guesses
    held = real.highest <= AUDIT_EPSILON and at_claim.highest <= at
    facts = {
        "audit": _policy_facts(stand) | asdict(real),
        "claimed": _policy_facts(claimed) | asdict(at_claim),
        "control": asdict(control),
        "mutants": {name: asdict(found) for name, found in faulty.items()},
        "power": power,
    }
    return conclude(
        title=f"canary {scenario.privacy.unit}s through the real optimiser and the wire",
        held=held,
        epsilon_lower=real.epsilon_lower,
        epsilon_audited=AUDIT_EPSILON,
        power=_most(power["claimed"], "sigma/4") >= ENOUGH,
        control_detected=detected,
        caught=caught,
        started=started,
        facts=facts,
        words=_words(subject.scenario, facts),
    )


def _with_fault(name: str, stand: Stand, *, seed: int) -> Attack:
    with mutant(name):
        return attack(stand, seed=seed)


def _open_audited(scenario: Scenario, *, folder: Path, seed: int) -> tuple[Stand, dict[str, Power]]:
    """A campaign at the audit's epsilon: with the scenario's sampling where the attack has power then, else without."""
    at = {"epsilon": AUDIT_EPSILON, "delta": AUDIT_DELTA}
    stand = open_stand(_with(scenario, at), name="audited", folder=folder)
    power = _power(stand, seed=seed)
    if power["one-run"]["sigma/4"] >= _SURE or scenario.privacy.sampling_rate == 1:
        return stand, {"audit": power}
    stand = open_stand(_with(scenario, at | {"sampling_rate": 1.0}), name="audited-whole", folder=folder)
    return stand, {"audit": _power(stand, seed=seed), "sampled": power}


def _with(scenario: Scenario, privacy: dict[str, float]) -> Scenario:
    return scenario.model_copy(update={"privacy": scenario.privacy.model_copy(update=privacy)})


def _power(stand: Stand, *, seed: int) -> Power:
    """Bound -> fault -> in which share of trials the bound finds it on this stand."""
    privacy, mechanism = stand.campaign.scenario.privacy, stand.campaign.policy.mechanism
    bounds: tuple[Bound, ...] = ("one-run", "gaussian") if is_gaussian(mechanism) else ("one-run",)
    return {
        bound: find_faults(
            mechanism,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            canaries=stand.canaries,
            bound=bound,
            seed=seed,
        )
        for bound in bounds
    }


def _most(power: Power, fault: str) -> float:
    """The share of runs in which the better bound finds a fault."""
    return max(found[fault] for found in power.values())


def _policy_facts(stand: Stand) -> dict[str, Any]:
    policy = stand.campaign.policy
    return {
        "epsilon": policy.epsilon,
        "delta": policy.delta,
        "noise_multiplier": policy.noise_multiplier,
        "rounds": policy.rounds,
        "steps": policy.steps,
        "sampling_rate": policy.sampling_rate,
        "devices": policy.cohort_size,
        "colluders": stand.colluders,
        "silent": stand.silent,
    }


def _words(scenario: Scenario, facts: dict[str, Any]) -> tuple[str, ...]:
    """What was found, for a reader."""
    audited, claimed, power = facts["audit"], facts["claimed"], facts["power"]
    unit, quarter = scenario.privacy.unit, _most(power["claimed"], "sigma/4")
    halves = [f"{_most(power[policy], 'sigma/2'):.0%}" for policy in ("audit", "claimed")]
    words = [
        f"At an audit policy of epsilon {AUDIT_EPSILON:g}: {_found(audited, unit)}",
        f"At the claimed epsilon {claimed['epsilon']:g}: {_found(claimed, unit)} "
        f"{'A' if quarter >= ENOUGH else 'No power: a'} quarter of the noise would be found in {quarter:.0%} of runs.",
        f"Half of the noise, or a {unit} counted twice, would be found in {halves[0]} of runs at the audit policy, in "
        f"{halves[1]} at the claimed one: the tests of noise and of sensitivity, and L0, are for these.",
    ]
    rounds, steps = scenario.privacy.max_participations, scenario.training.steps
    if (audited["rounds"], audited["steps"]) != (rounds, steps):
        of_steps = f" of {audited['steps']} of {steps} steps" if audited["steps"] != steps else ""
        words.append(
            f"Played: {audited['rounds']} of {rounds} rounds{of_steps}, with noise for as many, at either policy."
        )
    if audited["sampling_rate"] != scenario.privacy.sampling_rate:
        words.append(
            f"The audit policy takes every record: at a sampling rate of {scenario.privacy.sampling_rate:g} a quarter "
            f"of the noise would be found in {power['sampled']['one-run']['sigma/4']:.0%} of runs only."
        )
    return tuple(words)


def _found(found: dict[str, Any], unit: str) -> str:
    """What the guesses prove."""
    sharp = found["gaussian"]
    more = f", by the bound for Gaussian noise at least {sharp['epsilon_lower']:.2f}" if sharp else ""
    return (
        f"{found['correct']} of {found['guesses']} guesses about {found['canaries']} canary {unit}s were right, so "
        f"that epsilon is at least {found['epsilon_lower']:.2f}{more} (95 % confidence)."
    )
