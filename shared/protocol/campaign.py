"""A campaign: one folder with everything server and devices must agree on before the first round.

scenario.json       the resolved settings
policy.json         the constants the guarantee rests on
start.safetensors   the public start: whitening, LoRA A, zeros elsewhere; its hash is in the policy
resumed.json        only in a simulation that was interrupted: what its devices had spent until then
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors import SafetensorError
from safetensors.numpy import load, save

from shared.config import Scenario, load_scenario
from shared.errors import CampaignError, PrivacyError
from shared.heads.adapter import Arrays, trained_slots
from shared.heads.head import Head
from shared.heads.registry import make_head
from shared.models.kernel import ANCHORS
from shared.models.model import Base
from shared.privacy.compatible import (
    check_compatible,
    check_extensions,
    check_family,
    check_prompt,
    choices,
    priced_choice,
)
from shared.privacy.policy import Policy, hash_arrays, hash_settings, read_policy
from shared.privacy.promise import check_price
from shared.protocol.signing import check_signature, policy_sha256

_MOST_LETTERS = 300  # of a campaign, a tensor, a package


@dataclass(frozen=True)
class Campaign:
    """What is published before the first round; nothing in it is secret or computed from users' data."""

    folder: Path
    scenario: Scenario
    policy: Policy
    start: Arrays

    def new_head(self, base: Base) -> Head:
        """A head of this campaign, at its public start once ``load_start`` is called.

        Raises:
            CampaignError: The base, or its family's package, is not the one the policy names, or the head has other
                slots.
        """
        if base.sha256 != self.policy.base_sha256:
            raise CampaignError(
                f"the base must be {self.policy.base_sha256[:12]}…, got {base.sha256[:12]}…; "
                "use the base the campaign was made with."
            )
        check_family(self.policy, base.extension)
        head = make_head(base, self.scenario, public_texts=len(self.start.get(ANCHORS, ())))
        if trained_slots(head) != (*self.policy.array_slots(), *self.policy.private_slots()):
            found = tuple((slot.name, slot.shape) for slot in trained_slots(head))
            raise CampaignError(
                f"what trains must be the policy's slots {self.policy.slots + self.policy.private}, the head has "
                f"{found}."
            )
        return head


def write_campaign(folder: Path, scenario: Scenario, policy: Policy, start: Arrays) -> Campaign:
    """Publish a campaign in a new folder, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        (temporary / "scenario.json").write_text(scenario.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (temporary / "policy.json").write_text(policy.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (temporary / "start.safetensors").write_bytes(save(start))
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Campaign(folder, scenario, policy, start)


def find_campaign(campaigns: Path, policy_sha256: str) -> Campaign | None:
    """The campaign with this policy among the folders in ``campaigns``; None where there is none.

    A folder whose policy cannot be read is none of this campaign: one that is damaged, cut by a crash or of another
    version must not stop the others.
    """
    for path in sorted(campaigns.glob("*/policy.json")):
        try:
            found = read_policy(path.read_text(encoding="utf-8")).sha256
        except (CampaignError, OSError, UnicodeDecodeError):
            continue
        if found == policy_sha256:
            return read_campaign(path.parent)
    return None


def certify(campaign: Campaign) -> None:
    """What a device checks itself before it takes part, whoever published or signed the campaign.

    Raises:
        PrivacyError: The policy's constants do not give the epsilon it states, or its methods break rule P1.
        CampaignError: Its methods are not the ones installed here.
    """
    _check_names(campaign.policy)
    check_price(campaign.policy)
    check_compatible(choices(campaign.policy))
    check_prompt(campaign.scenario, choices(campaign.policy))
    cost = campaign.scenario.persona.epsilon if priced_choice(campaign.scenario) else None
    if campaign.policy.choice_epsilon != cost:
        raise PrivacyError(
            f"a policy must price the choice of a persona as its settings do, choice_epsilon = {cost}, got "
            f"{campaign.policy.choice_epsilon}; do not take part."
        )
    check_extensions(campaign.policy, campaign.scenario)


def _check_names(policy: Policy) -> None:
    """An owner reads them in a terminal before agreeing, where control characters could say something else."""
    tensors = (name for name, _ in (*policy.slots, *policy.private))
    for name in (policy.campaign, *policy.extensions, *policy.reply_fields, *tensors):
        if not (name.isprintable() and 0 < len(name) <= _MOST_LETTERS):
            raise CampaignError(
                f"what a policy names must be 1 to {_MOST_LETTERS} printable characters, got {name[:40]!r}; do not "
                "take part."
            )


def check_promise(folder: Path) -> Campaign:
    """Read a campaign and certify that it promises something, and that what it states holds.

    Raises:
        CampaignError: A file is missing, unreadable or not the one the policy names, or a package it names is not here.
        PrivacyError: The price is not the one stated, the methods break rule P1, or nothing is promised.
    """
    campaign = read_campaign(folder)
    if campaign.policy.trust == "none":
        raise PrivacyError("a policy must promise something, got trust 'none': NOT PRIVATE; do not take part.")
    if campaign.scenario.poison.enabled:
        raise PrivacyError(
            f"{folder}/scenario.json must have poison.kind = 'none', got {campaign.scenario.poison.kind!r}: devices "
            "that lie are for simulations; do not take part."
        )
    if policy_sha256(folder) != campaign.policy.sha256:
        raise CampaignError(f"{folder}/policy.json must be spelled as 'sottovoce policy new' does; it was altered.")
    certify(campaign)
    return campaign


def verify_campaign(folder: Path, *, trusted: Ed25519PublicKey) -> Campaign:
    """Read a campaign that a trusted operator signed and whose promise holds.

    Raises:
        CampaignError, PrivacyError: As ``check_promise`` and ``check_signature``.
    """
    signed = check_signature(folder, trusted=trusted)
    campaign = check_promise(folder)
    if campaign.policy.sha256 != signed:
        raise CampaignError(f"{folder} must not change while it is read; its policy did.")
    return campaign


@dataclass(frozen=True)
class Resumed:
    """Where an interrupted simulation went on: after which round, and how often each device had taken part.

    A simulated device keeps its count in the memory of the simulation. When that dies in the middle of a round, the
    round is run again from its checkpoint with the same seeds: the same requests get the same replies, byte for byte,
    so nothing new is released. A real device never forgets: there the broken round stays spent.
    """

    round_number: int
    participations: Mapping[int, int]


def write_resumed(folder: Path, resumed: Resumed | None) -> None:
    """Note in a campaign's folder where it goes on, or that it starts anew."""
    path = folder / "resumed.json"
    if resumed is None:
        path.unlink(missing_ok=True)
        return
    content = {"round": resumed.round_number, "participations": resumed.participations}
    path.write_text(json.dumps(content) + "\n", encoding="utf-8")


def read_resumed(folder: Path) -> Resumed | None:
    """What ``write_resumed`` noted; None in a campaign that was never interrupted.

    Raises:
        CampaignError: It is damaged: how often devices took part is unknown.
    """
    path = folder / "resumed.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        counts = {int(seat): count for seat, count in content["participations"].items()}
        if not all(type(count) is int and count >= 0 for count in (content["round"], *counts.values())):
            raise ValueError("counts must be whole numbers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CampaignError(f"{path} must say where the simulation went on, it is damaged; start a new run.") from None
    return Resumed(content["round"], counts)


def read_campaign(folder: Path) -> Campaign:
    """Read a campaign and check that its start is the one its policy names.

    Raises:
        CampaignError: A file is missing, unreadable or not the one the policy names.
    """
    try:
        policy = read_policy((folder / "policy.json").read_text(encoding="utf-8"))
        arrays = load((folder / "start.safetensors").read_bytes())
    except OSError as error:
        raise CampaignError(f"{folder} must hold a campaign: {error.strerror} ({error.filename}).") from None
    except (SafetensorError, UnicodeDecodeError, KeyError) as error:  # KeyError: a type of number that numpy has not
        raise CampaignError(f"{folder} must hold a campaign, a file in it is damaged: {error}.") from None
    start = dict(sorted(arrays.items()))
    if hash_arrays(start) != policy.start_sha256:
        raise CampaignError(f"{folder}/start.safetensors must be the start the policy names; it was altered.")
    scenario = load_scenario(folder / "scenario.json")
    if hash_settings(scenario) != policy.settings_sha256:
        raise CampaignError(f"{folder}/scenario.json must hold the settings the policy names; it was altered.")
    if choices(scenario) != choices(policy):
        raise CampaignError(f"{folder}/scenario.json must name methods, trust and unit of the policy; it was altered.")
    for name, shape in policy.slots:
        if name not in start or start[name].shape != shape or start[name].dtype != np.float32:
            raise CampaignError(f"{folder}/start.safetensors must hold {name!r} as float32 of shape {shape}.")
    return Campaign(folder, scenario, policy, start)
