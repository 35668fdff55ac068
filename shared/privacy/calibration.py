"""Fix a campaign's constants: from settings and a target epsilon to a policy."""

import hashlib
import math

import numpy as np
from scipy.stats import hypergeom

from shared.config import PrivacyConfig, Scenario
from shared.errors import PrivacyError
from shared.heads.adapter import Arrays, Slot
from shared.heads.lora import trained_parts
from shared.privacy.accounting import calibrate_distributed, calibrate_noise
from shared.privacy.compatible import (
    check_aggregation,
    check_compatible,
    check_prompt,
    choices,
    extensions,
    priced_choice,
)
from shared.privacy.noise import GRID_SIGMA
from shared.privacy.policy import (
    PROTOCOL,
    RELATIONS,
    REPLY_FIELDS,
    Policy,
    SecureSum,
    fits_ring,
    grid_of,
    hash_arrays,
    hash_settings,
    num_values,
)
from shared.privacy.promise import check_grid
from shared.secure_sum.graph import make_terms

# Where a device's contribution is cut even after noise, so that the gate has a public bound: no device is expected to
# hold more records than this, and one that does only sees its (already private) update scaled down.
_RECORDS_BOUND = 2_000
_UNCLIPPED_GRADIENT = 100.0  # a generous bound on one record's gradient under trust ``none``
_NOISE_TAIL = 6.0  # standard deviations the noise's norm may lie above sqrt(parameters)
_MOST_SHARE_BITS, _LEAST_SHARE_BITS = 16, 3  # of a device's noise: finer is of no use, coarser costs privacy


def make_policy(
    scenario: Scenario,
    *,
    clients: int,
    head_blocks: int,
    slots: tuple[Slot, ...],
    base_sha256: str,
    base_extension: str | None,
    start: Arrays,
    public_texts: tuple[str, ...],
) -> Policy:
    """Fix a campaign's constants and calibrate its noise.

    Args:
        scenario: The settings.
        clients: Size of the public roster.
        head_blocks: Blocks of the head for this base.
        slots: What the federation method trains.

    Raises:
        PrivacyError: The target cannot be met, the combination breaks rule P1, or the rounds need more participations
            than ``privacy.max_participations`` allows.
    """
    privacy, federation, training = scenario.privacy, scenario.federation, scenario.training
    check_compatible(choices(scenario))
    check_prompt(scenario, choices(scenario))
    cohort_size = clients if federation.cohort_size == "all" else federation.cohort_size
    if cohort_size > clients:
        raise PrivacyError(f"federation.cohort_size must be at most the {clients} clients, got {cohort_size}.")
    check_aggregation(scenario, cohort_size=cohort_size)
    needed = -(-federation.rounds * cohort_size // clients)
    if needed > privacy.max_participations:
        raise PrivacyError(
            f"privacy.max_participations must be at least {needed} for {federation.rounds} rounds of {cohort_size} of "
            f"{clients} clients, got {privacy.max_participations}; raise it (at the price of more noise) or ask fewer."
        )
    private = privacy.trust != "none"
    shared = [slot for slot in slots if slot.scope != "private"]
    kept = [slot for slot in slots if slot.scope == "private"]
    size = num_values(slots if privacy.unit == "record" else shared)
    turns = trained_parts(scenario).turns
    choice_epsilon = scenario.persona.epsilon if priced_choice(scenario) else None
    noise_multiplier, terms = 0.0, None
    if private:
        if privacy.delta > 1 / (10 * clients):
            raise PrivacyError(
                f"privacy.delta must be at most 1 / (10 x {clients} clients) = {1 / (10 * clients):.1e}, "
                f"got {privacy.delta}."
            )
        if privacy.unit == "user" and privacy.sampling_rate != 1:
            raise PrivacyError(
                f"privacy.sampling_rate must be 1 with privacy.unit = 'user', got {privacy.sampling_rate}: a device's "
                "draw of its records amplifies nothing there."
            )
        if privacy.trust == "distributed":
            noise_multiplier, terms = share_noise(
                privacy, cohort_size=cohort_size, size=size, groups=federation.groups, rounds=federation.rounds
            )
        else:
            noise_multiplier = calibrate_noise(
                epsilon=privacy.epsilon,
                delta=privacy.delta,
                sampling_rate=privacy.sampling_rate,
                steps=training.steps if privacy.unit == "record" else 1,
                max_participations=privacy.max_participations,
                coordinates=size,
                grid_sigma=GRID_SIGMA,
                choice_epsilon=choice_epsilon or 0.0,
            )
    policy = Policy(
        protocol=PROTOCOL,
        campaign=f"{scenario.name}, seed {scenario.seed}",
        trust=privacy.trust,
        unit=privacy.unit,
        relation=RELATIONS[privacy.unit],
        epsilon=privacy.epsilon if private else None,
        delta=privacy.delta if private else None,
        clip_norm=privacy.clip_norm if private else None,
        noise_multiplier=noise_multiplier,
        grid=None,  # follows from the rest, below
        sampling_rate=privacy.sampling_rate,
        steps=training.steps,
        denominator=privacy.denominator,
        max_participations=privacy.max_participations,
        added_records=privacy.added_records,
        max_update_norm=_update_bound(scenario, size=size, noise_multiplier=noise_multiplier),
        learning_rate=training.learning_rate,
        rounds=federation.rounds,
        cohort_size=cohort_size,
        record_exponent=training.record_exponent,
        secure_sum=terms,
        reply_fields=REPLY_FIELDS[privacy.trust],
        federation_method=federation.method,
        personal_method=scenario.personal.method,
        technique=scenario.adapter.technique,
        head_blocks=head_blocks,
        settings_sha256=hash_settings(scenario),
        base_sha256=base_sha256,
        start_sha256=hash_arrays(start),
        public_texts_sha256=hashlib.sha256("\0".join(public_texts).encode()).hexdigest(),
        slots=tuple((slot.name, slot.shape) for slot in shared),
        turns=turns if len(turns) > 1 else (),
        choice_epsilon=choice_epsilon,
        private=tuple((slot.name, slot.shape) for slot in kept),
        extensions=(*extensions(scenario), *([base_extension] if base_extension else [])),
    )
    if private:
        policy = policy.model_copy(update={"grid": grid_of(policy)})
        check_grid(policy)
    return policy


def _update_bound(scenario: Scenario, *, size: int, noise_multiplier: float) -> float:
    """A public bound on the norm of what a device sends."""
    privacy, training = scenario.privacy, scenario.training
    private = privacy.trust != "none"
    if privacy.unit == "user" and private:
        return privacy.clip_norm
    per_record = privacy.clip_norm if private else _UNCLIPPED_GRADIENT
    bound = per_record * (_RECORDS_BOUND + noise_multiplier * (math.sqrt(size) + _NOISE_TAIL))
    denominator = privacy.denominator if privacy.unit == "record" else 1.0
    return training.learning_rate * training.steps * bound / denominator


def share_noise(
    privacy: PrivacyConfig, *, cohort_size: int, size: int, groups: int = 1, rounds: int = 1
) -> tuple[float, SecureSum]:
    """Noise multiplier and terms of a secure sum: who survives, who hides whom, how fine a device's noise is.

    Args:
        privacy: Target, shares of survivors and colluders.
        cohort_size: Devices asked in a round.
        size: Numbers of a contribution.
        groups: Sums of a round. Each is seen, so that the devices of each must make up the whole noise: the mean of all
            sums then has the square root of ``groups`` times the standard deviation that one sum would have.
        rounds: Of the campaign, in each of which the groups are drawn anew.
    """
    colluders = math.floor(privacy.colluders * cohort_size + 1e-9)  # .29 x 100 is 28.999...
    if groups > 1:
        colluders = _colluders_of_group(cohort_size, colluders, groups=groups, rounds=rounds)
        cohort_size //= groups
    min_survivors = math.ceil(privacy.survivors * cohort_size - 1e-9)  # .55 x 100 is 55.00...1
    if not (cohort_size >= 3 and colluders < min_survivors):
        raise PrivacyError(
            f"privacy.trust = 'distributed' needs at least 3 devices a sum and more survivors than colluders, got "
            f"{cohort_size} with {min_survivors} survivors and {colluders} colluders; use more devices, raise "
            "privacy.survivors or lower privacy.colluders."
        )
    try:
        hidden = make_terms(
            cohort_size,
            min_survivors=min_survivors,
            colluders=colluders,
            neighbours=None if privacy.neighbours == "auto" else privacy.neighbours,
        )
    except ValueError as error:
        raise PrivacyError(f"privacy.survivors, colluders and neighbours must suit a secure sum: {error}") from None
    for bits in range(_MOST_SHARE_BITS, _LEAST_SHARE_BITS - 1, -1):
        terms = SecureSum(
            neighbours=hidden.neighbours,
            threshold=hidden.threshold,
            min_survivors=min_survivors,
            colluders=colluders,
            share_log2_sigma=bits,
            groups=groups,
        )
        noise_multiplier = calibrate_distributed(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            max_participations=privacy.max_participations,
            coordinates=size,
            shares=terms.honest,
            share_sigma=2.0**bits,
        )
        if fits_ring(terms, cohort_size=cohort_size, noise_multiplier=noise_multiplier):
            return noise_multiplier, terms
    raise PrivacyError(
        f"a sum of {cohort_size} contributions must fit 32 bits at privacy.epsilon = {privacy.epsilon:g}; lower it, or "
        "ask fewer devices a round."
    )


def _colluders_of_group(cohort_size: int, colluders: int, *, groups: int, rounds: int) -> int:
    """The most colluders that any group of any round has, but for one chance in 2^40: groups are drawn at random."""
    counts = np.arange(colluders + 1)
    chance = groups * rounds * hypergeom.sf(counts, cohort_size, colluders, cohort_size // groups)
    return int(counts[chance < 2.0**-40][0])
