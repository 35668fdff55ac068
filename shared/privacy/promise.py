"""What a device certifies before it takes part: that a policy's constants give the epsilon it states."""

import math
import re

from shared.errors import PrivacyError
from shared.privacy.accounting import epsilon
from shared.privacy.policy import RELATIONS, REPLY_FIELDS, Policy, fits_ring, grid_of
from shared.secure_sum.graph import make_terms

_COARSEST = 0.02  # half of it, in units of the clip norm, is what rounding to the grid may take from a contribution
_SMALLEST, _LARGEST = 1e-9, 1e9  # of the constants of a step; no sensible value comes near them
_MOST_STEPS = 10_000
_LEAST_SHARE_BITS, _MOST_SHARE_BITS = 3, 24
_MOST_DEVICES = 100_000


def check_price(policy: Policy) -> None:
    """Certify that a policy's constants give the epsilon it states; a device does this before it takes part.

    Raises:
        PrivacyError: They do not, an impossible constant stands among them, or a reply would hold a field that is not
            priced.
    """
    if policy.reply_fields != REPLY_FIELDS[policy.trust]:
        raise PrivacyError(
            f"a reply may hold {REPLY_FIELDS[policy.trust]} and nothing else, the policy says {policy.reply_fields}."
        )
    if policy.trust == "none":
        return
    if policy.epsilon is None or policy.delta is None or policy.clip_norm is None or not policy.clip_norm > 0:
        raise PrivacyError(
            f"a policy of trust {policy.trust!r} must state epsilon, delta and clip_norm; do not take part."
        )
    if policy.relation != RELATIONS[policy.unit]:
        raise PrivacyError(
            f"a policy of unit {policy.unit!r} must state the relation {RELATIONS[policy.unit]!r}, got "
            f"{policy.relation!r}; do not take part."
        )
    _check_constants(policy)
    _check_secure_sum(policy)
    check_grid(policy)
    if policy.delta >= policy.mechanism.chance_of_a_draw:
        raise PrivacyError(
            f"delta must be below the chance that a record is ever sampled, got {policy.delta:g}: the policy would "
            "hold without noise and protect nobody; do not take part."
        )
    price = epsilon(policy.mechanism, delta=policy.delta)
    if not price <= policy.epsilon:
        raise PrivacyError(
            f"a policy's constants must give the epsilon it states, {policy.epsilon:g}; they give {price:.3g}; "
            "do not take part."
        )


def _check_constants(policy: Policy) -> None:
    """Refuse constants with which a step overflows, underflows or does not end: whether it does may tell of records."""
    for name in ("clip_norm", "denominator", "learning_rate", "max_update_norm"):
        value = getattr(policy, name)
        if not _SMALLEST <= value <= _LARGEST:
            raise PrivacyError(
                f"a policy's {name} must be from {_SMALLEST:g} to {_LARGEST:g}, got {value:g}; do not take part."
            )
    if not 1 <= policy.steps <= _MOST_STEPS:
        raise PrivacyError(f"a policy's steps must be 1 to {_MOST_STEPS}, got {policy.steps}; do not take part.")
    if not 0 <= policy.record_exponent <= 1:
        raise PrivacyError(f"a policy's record_exponent must be 0 to 1, got {policy.record_exponent}.")
    if policy.unit == "user" and policy.sampling_rate != 1:
        raise PrivacyError(
            f"a policy of unit 'user' must use every record, got a sampling rate of {policy.sampling_rate}: only the "
            "device's own draw of records amplifies, and here the unit is the device's user; do not take part."
        )
    if not re.fullmatch("[ -~]{1,120}", policy.campaign):
        raise PrivacyError("a campaign's name must be 1 to 120 printable ASCII characters; do not take part.")


def _check_secure_sum(policy: Policy) -> None:
    """Refuse a secure sum whose shares would not hide, or whose survivors would not carry the noise that is priced."""
    terms = policy.secure_sum
    if (terms is None) is (policy.trust == "distributed"):
        raise PrivacyError("a policy must have terms of a secure sum under trust 'distributed' and no other.")
    if terms is None:
        return
    if not (terms.groups >= 1 and policy.cohort_size % terms.groups == 0):
        raise PrivacyError(
            f"a cohort must fall into groups of equal size, {policy.cohort_size} devices do not into {terms.groups}; "
            "do not take part."
        )
    if not 3 <= policy.sum_size <= _MOST_DEVICES:
        raise PrivacyError(
            f"a secure sum needs a cohort of 3 to {_MOST_DEVICES} devices, got {policy.sum_size}; do not take part."
        )
    if not _LEAST_SHARE_BITS <= terms.share_log2_sigma <= _MOST_SHARE_BITS:
        raise PrivacyError(
            f"a device's noise must have 2^{_LEAST_SHARE_BITS} to 2^{_MOST_SHARE_BITS} steps of its grid, got "
            f"2^{terms.share_log2_sigma}; do not take part."
        )
    try:
        wanted = make_terms(
            policy.sum_size,
            min_survivors=terms.min_survivors,
            colluders=terms.colluders,
            neighbours=terms.neighbours,
        )
    except ValueError as error:
        raise PrivacyError(f"a secure sum's terms must hide what they promise to: {error} Do not take part.") from None
    if (terms.neighbours, terms.threshold) != (wanted.neighbours, wanted.threshold):
        raise PrivacyError(
            f"a secure sum's terms must be a threshold of {wanted.threshold} of {wanted.neighbours} neighbours, got "
            f"{terms.threshold} of {terms.neighbours}; do not take part."
        )

    if not policy.noise_multiplier > 0 or not fits_ring(
        terms, cohort_size=policy.sum_size, noise_multiplier=policy.noise_multiplier
    ):
        raise PrivacyError(
            f"a sum of {policy.sum_size} contributions must fit 32 bits, it does not with shares of "
            f"2^{terms.share_log2_sigma} steps: whether a device could "
            "answer would tell of its records; do not take part."
        )


def check_grid(policy: Policy) -> None:
    """Raise ``PrivacyError`` unless noise on the policy's grid has the standard deviation that is priced."""
    wanted = grid_of(policy)
    if wanted is None or policy.grid != wanted:
        raise PrivacyError(
            f"a policy's grid must be {wanted}, as its noise, its bound and who adds noise say, got {policy.grid}; do "
            "not take part."
        )
    if policy.clip_norm is None or not policy.grid * math.sqrt(policy.trained) <= _COARSEST * policy.clip_norm:
        raise PrivacyError(
            f"noise must leave a contribution visible on its grid, got a noise multiplier of "
            f"{policy.noise_multiplier:g} for {policy.trained} numbers; raise privacy.epsilon or train fewer numbers."
        )
