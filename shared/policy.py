"""The privacy policy: every constant the guarantee rests on, public and fixed for a campaign.

A device knows the policy before the first round and checks every request against its hash; the server cannot loosen it
in a message. Nothing in it depends on any user's data (rule P2). Operators sign it: ``shared/signing.py``.
"""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict

from shared.accounting import Mechanism, calibrate_noise, epsilon
from shared.adapter import Arrays, Slot
from shared.config import Scenario
from shared.datasets import READERS
from shared.errors import CampaignError, PrivacyError
from shared.lora import FEDERATION_METHODS, TECHNIQUES
from shared.noise import GRID_SIGMA
from shared.registry import KINDS, check_name, extension, lookup

PROTOCOL = 3
REPLY_FIELDS = ("arrays", "config.policy", "config.round")  # the noised change and what it answers: all that is priced
# Where a device's contribution is cut even after noise, so that the gate has a public bound: no device is expected to
# hold more records than this, and one that does only sees its (already private) update scaled down.
_RECORDS_BOUND = 2_000
_UNCLIPPED_GRADIENT = 100.0  # a generous bound on one record's gradient under trust ``none``
_COARSEST = 0.02  # half of it, in units of the clip norm, is what rounding to the grid may take from a record
_FAMILY = KINDS["families"]
_NOISE_TAIL = 6.0  # standard deviations the noise's norm may lie above sqrt(parameters)
_SMALLEST, _LARGEST = 1e-9, 1e9  # of the constants of a step; no sensible value comes near them
_MOST_STEPS = 10_000


class Policy(BaseModel):
    """The constants of one campaign. The equation they enter: see ``client.train``.

    Attributes:
        campaign: Its name: two campaigns never share a policy, nor a device's count of rounds.
        noise_multiplier: Standard deviation of the noise in units of ``clip_norm``; 0 only under trust ``none``.
        sampling_rate: Probability with which each record enters a step, independently (Poisson); 1 = all of them.
        steps: Noisy steps per round, exactly this many.
        denominator: What the clipped, noised sum is divided by; never a count of records.
        grid: Step of the grid on which contributions are rounded and noise is drawn, in gradient units.
        max_participations: Rounds a device may join in the whole campaign.
        added_records: From when on a record is used that a device gets during the campaign: the next round it joins, or
            only the next campaign. One that is gone is used in no later round, either way.
        reply_fields: What a device may send, and nothing else.
        max_update_norm: L2 bound on what a device sends.
        slots: The tensors that may travel: (name, shape), float32, in this order, and nothing else.
        settings_sha256: Hash of the settings both sides agree on, see ``hash_settings``.
        extensions: Choices that are not built in, each with package and version, so that a device sees them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    protocol: int
    campaign: str
    trust: Literal["local", "none"]
    unit: Literal["record"]
    relation: Literal["add-or-remove-one"]
    epsilon: float | None
    delta: float | None
    clip_norm: float | None
    noise_multiplier: float
    grid: float | None
    sampling_rate: float
    steps: int
    denominator: float
    max_participations: int
    max_update_norm: float
    learning_rate: float
    rounds: int
    cohort_size: int
    reply_fields: tuple[str, ...]
    federation_method: str
    personal_method: str
    technique: str
    head_blocks: int
    settings_sha256: str
    base_sha256: str
    start_sha256: str
    public_texts_sha256: str
    slots: tuple[tuple[str, tuple[int, ...]], ...]
    extensions: tuple[str, ...] = ()
    added_records: Literal["next-round", "next-campaign"] = "next-round"

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON (sorted keys, no spaces)."""
        return _hash_policy(self)

    @property
    def mechanism(self) -> Mechanism:
        """What one device releases over the campaign."""
        return Mechanism(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps,
            max_participations=self.max_participations,
            coordinates=sum(math.prod(shape) for _, shape in self.slots),
            grid_sigma=GRID_SIGMA,
        )

    def array_slots(self) -> tuple[Slot, ...]:
        """The arrays of a request and of a reply."""
        return tuple(Slot(name, shape, "float32", "global") for name, shape in self.slots)


@lru_cache(maxsize=64)  # by value: a copy with another constant has another hash
def _hash_policy(policy: Policy) -> str:
    canonical = json.dumps(policy.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


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
    cohort_size = clients if federation.cohort_size == "all" else federation.cohort_size
    if cohort_size > clients:
        raise PrivacyError(f"federation.cohort_size must be at most the {clients} clients, got {cohort_size}.")
    needed = -(-federation.rounds * cohort_size // clients)
    if needed > privacy.max_participations:
        raise PrivacyError(
            f"privacy.max_participations must be at least {needed} for {federation.rounds} rounds of {cohort_size} of "
            f"{clients} clients, got {privacy.max_participations}; raise it (at the price of more noise) or ask fewer."
        )
    private = privacy.trust != "none"
    size = sum(math.prod(slot.shape) for slot in slots)
    noise_multiplier = 0.0
    if private:
        if privacy.delta > 1 / (10 * clients):
            raise PrivacyError(
                f"privacy.delta must be at most 1 / (10 x {clients} clients) = {1 / (10 * clients):.1e}, "
                f"got {privacy.delta}."
            )
        noise_multiplier = calibrate_noise(
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            sampling_rate=privacy.sampling_rate,
            steps=training.steps,
            max_participations=privacy.max_participations,
            coordinates=size,
            grid_sigma=GRID_SIGMA,
        )
    per_record = privacy.clip_norm if private else _UNCLIPPED_GRADIENT
    bound = per_record * (_RECORDS_BOUND + noise_multiplier * (size**0.5 + _NOISE_TAIL))
    policy = Policy(
        protocol=PROTOCOL,
        campaign=f"{scenario.name}, seed {scenario.seed}",
        trust=privacy.trust,
        unit=privacy.unit,
        relation="add-or-remove-one",
        epsilon=privacy.epsilon if private else None,
        delta=privacy.delta if private else None,
        clip_norm=privacy.clip_norm if private else None,
        noise_multiplier=noise_multiplier,
        grid=noise_multiplier * privacy.clip_norm / GRID_SIGMA if private else None,
        sampling_rate=privacy.sampling_rate,
        steps=training.steps,
        denominator=privacy.denominator,
        max_participations=privacy.max_participations,
        added_records=privacy.added_records,
        max_update_norm=training.learning_rate * training.steps * bound / privacy.denominator,
        learning_rate=training.learning_rate,
        rounds=federation.rounds,
        cohort_size=cohort_size,
        reply_fields=REPLY_FIELDS,
        federation_method=federation.method,
        personal_method=scenario.personal.method,
        technique=scenario.adapter.technique,
        head_blocks=head_blocks,
        settings_sha256=hash_settings(scenario),
        base_sha256=base_sha256,
        start_sha256=hash_arrays(start),
        public_texts_sha256=hashlib.sha256("\0".join(public_texts).encode()).hexdigest(),
        slots=tuple((slot.name, slot.shape) for slot in slots),
        extensions=(*extensions(scenario), *([base_extension] if base_extension else [])),
    )
    if private:
        check_grid(policy)
    return policy


# Rule P1 at record level: the shared step reads base, public start, shared tensors, policy and raw records, never a
# tensor trained without noise on the same records. A federation method is data (``FederationMethod``) and cannot read
# more, a technique adds trainable factors of the shared tensors and nothing else (``inject``); a personal method says
# of itself whether it is read. Ours are named here, for a server has no client code.
SEQUENTIAL: tuple[str, ...] = ("none", "fine-tune")


@dataclass(frozen=True)
class Choices:
    """What must fit together for a guarantee to hold (rule P1)."""

    federation_method: str
    personal_method: str
    technique: str
    unit: str
    trust: str


def choices(source: Scenario | Policy) -> Choices:
    """What a scenario, or a policy, combines."""
    if isinstance(source, Policy):
        stated = (source.federation_method, source.personal_method, source.technique, source.unit, source.trust)
        return Choices(*stated)
    privacy = source.privacy
    return Choices(
        source.federation.method, source.personal.method, source.adapter.technique, privacy.unit, privacy.trust
    )


def check_compatible(chosen: Choices) -> None:
    """The one check of rule P1: no shared, accounted step may read what was trained without noise on the same records.

    Raises:
        ScenarioError: A method or technique is known to nobody.
        PrivacyError: A private part would reach back into the shared step, or the unit is one without a mechanism; the
            message names what is allowed.
    """
    check_name("federation_methods", chosen.federation_method, FEDERATION_METHODS)
    check_name("techniques", chosen.technique, TECHNIQUES)
    reads = read_by_shared_step(chosen.personal_method)
    if chosen.trust == "none":
        return
    if chosen.unit != "record" or chosen.trust != "local":
        raise PrivacyError(
            f"a guarantee for unit {chosen.unit!r} under trust {chosen.trust!r} has no mechanism in this version; "
            "allowed: unit 'record' under trust 'local'."
        )
    if reads is not False:
        raise PrivacyError(
            f"personal.method = {chosen.personal_method!r} with federation.method = {chosen.federation_method!r} and "
            f"adapter.technique = {chosen.technique!r} is not private at unit {chosen.unit!r}; allowed personal "
            f"methods here: {list(SEQUENTIAL)}, or one that declares read_by_shared_step = False."
        )


def read_by_shared_step(personal_method: str) -> object:
    """What a personal method declares; only ``False`` means that shared training never reads what it fits."""
    ours = dict.fromkeys(SEQUENTIAL, False)
    if check_name("personal_methods", personal_method, ours) is None:
        return False
    return getattr(lookup("personal_methods", personal_method, {}, object), "read_by_shared_step", None)


def extensions(scenario: Scenario) -> tuple[str, ...]:
    """Every choice of a scenario that is not built in, with its package: ``personal method 'x' of PACKAGE VERSION``."""
    chosen = (
        ("federation_methods", scenario.federation.method, FEDERATION_METHODS),
        ("personal_methods", scenario.personal.method, SEQUENTIAL),
        ("techniques", scenario.adapter.technique, TECHNIQUES),
        ("readers", scenario.data.format, READERS),
    )
    found = [extension(kind, name, own) for kind, name, own in chosen]
    return tuple(each for each in found if each)


def check_extensions(policy: Policy, scenario: Scenario) -> None:
    """Raise ``CampaignError`` unless this machine has exactly the packages a policy names for its scenario."""
    _compare_packages([each for each in policy.extensions if not each.startswith(_FAMILY)], extensions(scenario))


def check_family(policy: Policy, base_extension: str | None) -> None:
    """The same for the package of the base's model family, which is known once the base is loaded."""
    named = [each for each in policy.extensions if each.startswith(_FAMILY)]
    _compare_packages(named, (base_extension,) if base_extension else ())


def _compare_packages(named: Sequence[str], found: Sequence[str]) -> None:
    if list(named) != list(found):
        wanted = json.dumps(", ".join(named))[1:-1]  # its maker's words may hold control characters
        raise CampaignError(
            f"the policy names {wanted or 'no extension'}; here is "
            f"{', '.join(found) or 'none'}. Install what the policy names."
        )


def hash_arrays(arrays: Arrays) -> str:
    """Hash over names, dtypes, shapes and bytes, in the arrays' order."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode() + array.tobytes())
    return digest.hexdigest()


def hash_settings(scenario: Scenario) -> str:
    """Hash over every setting that server and devices must agree on.

    Not among them: how fast one computes, and where one's data and base lie (the base has a hash of its own).
    """
    content = scenario.model_dump(
        mode="json",
        exclude={
            "performance": True,
            "evaluation": True,
            "export": True,
            "linear": True,
            "data": True,
            "model": {"base"},
        },
    )
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def check_price(policy: Policy) -> None:
    """Certify that a policy's constants give the epsilon it states; a device does this before it takes part.

    Raises:
        PrivacyError: They do not, an impossible constant stands among them, or a reply would hold a field that is not
            priced.
    """
    if policy.reply_fields != REPLY_FIELDS:
        raise PrivacyError(f"a reply may hold {REPLY_FIELDS} and nothing else, the policy says {policy.reply_fields}.")
    if policy.trust == "none":
        return
    if policy.epsilon is None or policy.delta is None or policy.clip_norm is None or not policy.clip_norm > 0:
        raise PrivacyError("a policy of trust 'local' must state epsilon, delta and clip_norm; do not take part.")
    _check_constants(policy)
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
    if not re.fullmatch("[ -~]{1,120}", policy.campaign):
        raise PrivacyError("a campaign's name must be 1 to 120 printable ASCII characters; do not take part.")


def check_grid(policy: Policy) -> None:
    """Raise ``PrivacyError`` unless noise on the policy's grid has the standard deviation that is priced."""
    if policy.clip_norm is None or policy.grid != policy.noise_multiplier * policy.clip_norm / GRID_SIGMA:
        raise PrivacyError(
            f"a policy's grid must be noise_multiplier x clip_norm / {GRID_SIGMA}, got {policy.grid} "
            f"with {policy.noise_multiplier} x {policy.clip_norm}; do not take part."
        )
    if not policy.grid * policy.mechanism.coordinates**0.5 <= _COARSEST * policy.clip_norm:
        raise PrivacyError(
            f"noise must leave a record visible on its grid, got a noise multiplier of {policy.noise_multiplier:g} for "
            f"{policy.mechanism.coordinates} numbers; raise privacy.epsilon or train fewer numbers."
        )


def read_policy(text: str) -> Policy:
    """Read a policy from JSON.

    Raises:
        CampaignError: Not a policy, or one of another protocol version.
    """
    try:
        policy = Policy.model_validate_json(text)
    except ValueError as error:
        raise CampaignError(f"the policy must be readable: {str(error).splitlines()[0]}.") from None
    if policy.protocol != PROTOCOL:
        raise CampaignError(
            f"the policy must be of protocol {PROTOCOL}, got {policy.protocol}; update Sottovoce, or make it anew."
        )
    return policy
