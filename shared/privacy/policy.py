"""The privacy policy: every constant the guarantee rests on, public and fixed for a campaign.

A device knows the policy before the first round and checks every request against its hash; the server cannot loosen it
in a message. Nothing in it depends on any user's data (rule P2). Made by ``calibration.py``, certified by every device
(``promise.py``), signed by operators (``shared/protocol/signing.py``).
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from shared.config import Scenario
from shared.errors import CampaignError
from shared.heads.adapter import Arrays, Slot
from shared.heads.lora import part_of
from shared.privacy.accounting import AnyMechanism, DistributedMechanism, Mechanism
from shared.privacy.noise import GRID_SIGMA
from shared.secure_sum.messages import Terms

PROTOCOL = 5
_ADDED_LATER = ("aggregation", "malicious_share", "norm_bound", "groups")  # settings of the federation
Relation = Literal["add-or-remove-one", "zero-out-one"]
SUM = "sum"  # the one array of a contribution
RELATIONS: Mapping[str, Relation] = {"record": "add-or-remove-one", "user": "zero-out-one"}
# What a device may send, by trust: the noised change, or what a trusted server adds noise to, and what it answers; with
# a secure sum also the other messages of its stages.
_ONE_ANSWER = ("arrays", "config.policy", "config.round")
REPLY_FIELDS = {
    "local": _ONE_ANSWER,
    "central": _ONE_ANSWER,
    "distributed": ("arrays", "config.body", "config.policy", "config.round"),
    "none": _ONE_ANSWER,
}


class SecureSum(BaseModel):
    """Terms of a secure sum under trust ``distributed``.

    Attributes:
        neighbours: Devices each device shares masks and secrets with.
        threshold: Neighbours who together can open a device's secrets; as many must stay to the end.
        min_survivors: Contributions a sum must have, or it is not opened.
        colluders: Devices among them whose noise may be known to the server.
        share_log2_sigma: Binary logarithm of the standard deviation of one device's noise, in steps of the grid.
        groups: Sums of a round, each of as many devices; every device is in one of them, and every other number here is
            of one sum, for each is seen and must carry the whole noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    neighbours: int
    threshold: int
    min_survivors: int
    colluders: int
    share_log2_sigma: int
    groups: Annotated[int, Field(ge=1)] = 1

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``groups`` where there is one, as policies were spelled, and hashed, before there could be more."""
        found: dict[str, Any] = write(self)
        return found if self.groups != 1 else {key: value for key, value in found.items() if key != "groups"}

    @property
    def honest(self) -> int:
        """Shares of noise that a sum holds at the least and nobody knows."""
        return self.min_survivors - self.colluders

    @property
    def terms(self) -> Terms:
        """What the protocol itself needs."""
        return Terms(threshold=self.threshold, neighbours=self.neighbours, min_survivors=self.min_survivors)


class Policy(BaseModel):
    """The constants of one campaign. The equation they enter: see ``client.training.train``.

    Attributes:
        campaign: Its name: two campaigns never share a policy, nor a device's count of rounds.
        unit: What one contribution is of: a record (its gradient in one step) or a user (the change of a whole round).
        clip_norm: L2 bound on one contribution: of a gradient, or of a change of the parameters.
        noise_multiplier: Standard deviation of the noise in units of ``clip_norm``; 0 only under trust ``none``. At
            unit user the noise is that of the sum, under ``distributed`` at the least.
        sampling_rate: Probability with which each record enters a step, independently (Poisson); 1 = all of them.
        steps: Steps per round, exactly this many; at unit record each is noisy.
        denominator: At unit record, what the clipped, noised sum is divided by; never a count of records.
        record_exponent: At unit user, a gradient summed over n records is divided by n to this power.
        grid: Step of the grid on which contributions are rounded and noise is drawn, in units of the contribution.
        max_participations: Rounds a device may join in the whole campaign.
        added_records: From when on a record is used that a device gets during the campaign: the next round it joins, or
            only the next campaign. One that is gone is used in no later round, either way.
        secure_sum: Under trust ``distributed``: how the sum is formed that the server sees.
        reply_fields: What a device may send, and nothing else.
        max_update_norm: L2 bound on what a device sends.
        slots: The tensors that may travel: (name, shape), float32, in this order, and nothing else.
        turns: The parts of them that a reply holds in rounds 1, 2, … and over again; empty: all in every round.
        private: Tensors that are trained in the same steps and never leave a device: (name, shape), float32.
        choice_epsilon: At unit record, what a device's choice of its persona by the losses of records costs, once.
        settings_sha256: Hash of the settings both sides agree on, see ``hash_settings``.
        extensions: Choices that are not built in, each with package and version, so that a device sees them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    protocol: int
    campaign: str
    trust: Literal["local", "distributed", "central", "none"]
    unit: Literal["record", "user"]
    relation: Relation
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
    turns: tuple[tuple[str, ...], ...] = ()
    private: tuple[tuple[str, tuple[int, ...]], ...] = ()
    choice_epsilon: float | None = None
    extensions: tuple[str, ...] = ()
    added_records: Literal["next-round", "next-campaign"] = "next-round"
    record_exponent: float = 0.5
    secure_sum: SecureSum | None = None

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON (sorted keys, no spaces)."""
        return _hash_policy(self)

    @property
    def size(self) -> int:
        """Numbers in all the shared arrays; a round may change fewer of them (``turn_slots``)."""
        return sum(math.prod(shape) for _, shape in self.slots)

    @property
    def trained(self) -> int:
        """Numbers that one clipped, noised step or sum has at the most: at unit record also those a device keeps."""
        kept = self.private if self.unit == "record" else ()
        return self.size + sum(math.prod(shape) for _, shape in kept)

    @property
    def sum_size(self) -> int:
        """Devices asked for one sum: all of a round, or those of a group."""
        return self.cohort_size // (self.secure_sum.groups if self.secure_sum else 1)

    @property
    def mechanism(self) -> AnyMechanism:
        """What is released of one unit over the campaign."""
        if self.secure_sum:
            return DistributedMechanism(
                noise_multiplier=self.noise_multiplier,
                max_participations=self.max_participations,
                coordinates=self.trained,
                shares=self.secure_sum.honest,
                share_sigma=2.0**self.secure_sum.share_log2_sigma,
            )
        return Mechanism(
            noise_multiplier=self.noise_multiplier,
            sampling_rate=self.sampling_rate,
            steps=self.steps if self.unit == "record" else 1,
            max_participations=self.max_participations,
            coordinates=self.trained,
            grid_sigma=GRID_SIGMA,
            choice_epsilon=self.choice_epsilon or 0.0,
        )

    def array_slots(self) -> tuple[Slot, ...]:
        """The arrays of a request."""
        return tuple(
            Slot(name, shape, "float32", "persona" if part_of(name) == "persona" else "global")
            for name, shape in self.slots
        )

    def turn_slots(self, round_number: int) -> tuple[Slot, ...]:
        """The arrays that a round changes."""
        if not self.turns:
            return self.array_slots()
        parts = self.turns[(round_number - 1) % len(self.turns)]
        return tuple(slot for slot in self.array_slots() if part_of(slot.name) in parts)

    def reply_slots(self, round_number: int) -> tuple[Slot, ...]:
        """The arrays of a round's reply: those it changes, or one vector of integers where a sum of them is formed."""
        changed = self.turn_slots(round_number)
        dtype = {"central": "int32", "distributed": "uint32"}.get(self.trust)
        return (Slot(SUM, (num_values(changed),), dtype, "global"),) if dtype else changed

    def private_slots(self) -> tuple[Slot, ...]:
        """The arrays a device trains and keeps."""
        return tuple(Slot(name, shape, "float32", "private") for name, shape in self.private)


def num_values(slots: Iterable[Slot]) -> int:
    """Numbers in the arrays of some slots."""
    return sum(math.prod(slot.shape) for slot in slots)


@lru_cache(maxsize=64)  # by value: a copy with another constant has another hash
def _hash_policy(policy: Policy) -> str:
    canonical = json.dumps(policy.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def grid_of(policy: Policy) -> float | None:
    """The grid on which a policy's noise has the standard deviation it states; None without noise.

    Noise of one source has ``GRID_SIGMA`` steps; noise in shares has 2^share_log2_sigma a device, and that of the
    honest ones together makes up ``noise_multiplier`` x ``clip_norm``.
    """
    if policy.clip_norm is None:
        return None
    terms, stddev = policy.secure_sum, policy.noise_multiplier * policy.clip_norm
    if terms is None:
        return float(stddev / GRID_SIGMA)
    steps: float = math.sqrt(max(terms.honest, 1)) * 2.0**terms.share_log2_sigma
    return stddev / steps


def fits_ring(terms: SecureSum, *, cohort_size: int, noise_multiplier: float) -> bool:
    """Whether a sum of the longest contributions, and twelve deviations of its noise, fit 32 bits with a sign.

    A single contribution that does not fit would be refused, which tells of it.
    """
    longest = math.sqrt(terms.honest) * 2.0**terms.share_log2_sigma / noise_multiplier  # C in steps of the grid
    return cohort_size * longest + 12 * math.sqrt(cohort_size) * 2.0**terms.share_log2_sigma < 2**31


def hash_arrays(arrays: Arrays) -> str:
    """Hash over names, dtypes, shapes and bytes, in the arrays' order."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode() + array.tobytes())
    return digest.hexdigest()


def hash_settings(scenario: Scenario) -> str:
    """Hash over every setting that server and devices must agree on.

    Not among them: how fast one computes, what a simulation attacks, and where one's data and base lie (the base has a
    hash of its own). Nor, as long as it is the default, how replies are made robust: campaigns that were published
    before that could be chosen keep their hash.
    """
    content: dict[str, Any] = scenario.model_dump(
        mode="json",
        exclude={
            "performance": True,
            "evaluation": True,
            "attack": True,
            "poison": True,
            "export": True,
            "linear": True,
            "statistics": True,
            "data": True,
            "model": {"base"},
        },
    )
    for name in _ADDED_LATER:
        if getattr(scenario.federation, name) == type(scenario.federation).model_fields[name].default:
            del content["federation"][name]
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


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
