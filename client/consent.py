"""An owner agrees to a campaign: it is checked, its whole price is reserved, and from then on the device answers it.

Needs what trains: the price is certified here.
"""

import math
import os
import shutil
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors.numpy import save

from client.home import Home
from client.owner import checked_ledger
from shared.campaign import Campaign, verify_campaign
from shared.errors import LedgerError, PrivacyError
from shared.signing import fingerprint

_FILES = ("scenario.json", "policy.json", "policy.sig", "start.safetensors")


@dataclass(frozen=True)
class Offer:
    """What a campaign asks of an owner, certified on this device.

    Attributes:
        operator: Fingerprint of the key that signed it.
        rounds: Of the whole campaign; this device joins at most ``max_participations``.
        payload_bytes: What leaves the device in one round, as ``history`` counts it.
        left_epsilon: Of the owner's cap, after this consent.
        left_delta: Likewise.
    """

    campaign: str
    policy: str
    operator: str
    task: str
    unit: str
    relation: str
    epsilon: float
    delta: float
    rounds: int
    max_participations: int
    reply_fields: tuple[str, ...]
    numbers: int
    payload_bytes: int
    extensions: tuple[str, ...]
    until: date
    left_epsilon: float
    left_delta: float


def examine_offer(home: Home, folder: Path, *, operator: Ed25519PublicKey, until: date) -> Offer:
    """Check a campaign as the device will, and say what it asks; nothing is written.

    Raises:
        PrivacyError, CampaignError: It is not what it must be; see ``shared.campaign.verify_campaign``.
        LedgerError: It was consented to before, does not fit under the caps, or ends before today.
    """
    campaign = verify_campaign(folder, trusted=operator)
    policy = campaign.policy
    if policy.epsilon is None or policy.delta is None:
        raise PrivacyError("a private policy must state epsilon and delta; do not take part.")
    with checked_ledger(home) as ledger:
        totals, standings = ledger.totals(), ledger.consents()
    if policy.sha256 in {standing.consent.policy for standing in standings}:
        raise LedgerError(f"a consent is given once; this campaign, {policy.campaign!r}, has had it. See: status.")
    today = home.clock().date()
    if not today <= until:
        raise LedgerError(f"--until must be today or later, got {until}; today is {today}.")
    left_epsilon, left_delta = totals.left_epsilon - policy.epsilon, totals.left_delta - policy.delta
    if not (left_epsilon >= 0 and left_delta >= 0):
        raise LedgerError(
            f"a campaign must fit under your caps: {totals.left_epsilon:g} of epsilon {totals.cap_epsilon:g} and "
            f"{totals.left_delta:g} of delta {totals.cap_delta:g} are left, this one asks for epsilon "
            f"{policy.epsilon:g} and delta {policy.delta:g}. What was reserved is never given back."
        )
    return Offer(
        campaign=policy.campaign,
        policy=policy.sha256,
        operator=fingerprint(operator),
        task=campaign.scenario.task.name,
        unit=policy.unit,
        relation=policy.relation,
        epsilon=policy.epsilon,
        delta=policy.delta,
        rounds=policy.rounds,
        max_participations=policy.max_participations,
        reply_fields=policy.reply_fields,
        numbers=sum(math.prod(shape) for _, shape in policy.slots),
        payload_bytes=_payload_bytes(campaign),
        extensions=policy.extensions,
        until=until,
        left_epsilon=left_epsilon,
        left_delta=left_delta,
    )


def _payload_bytes(campaign: Campaign) -> int:
    return len(save({slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}))


def agree(home: Home, folder: Path, *, operator: Ed25519PublicKey, until: date) -> Campaign:
    """Reserve a campaign's whole (epsilon, delta) and keep what the owner agreed to.

    Args:
        home: The owner's home.
        folder: The campaign as the operator published it.
        operator: The key that must have signed it; the ledger keeps its fingerprint.
        until: The last day the owner agrees to.

    Returns:
        The campaign as it is kept.

    Raises:
        PrivacyError, CampaignError: See ``verify_campaign``.
        LedgerError: The price does not fit under the owner's caps, or the consent was given before.
    """
    examine_offer(home, folder, operator=operator, until=until)
    new = home.folder / "campaigns" / f".new.{os.getpid()}"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name in _FILES:
        shutil.copyfile(folder / name, new / name)
    policy = verify_campaign(new, trusted=operator).policy  # the very bytes that are kept
    if policy.epsilon is None or policy.delta is None:
        raise PrivacyError("a private policy must state epsilon and delta; do not take part.")
    kept = home.campaign_folder(policy.sha256)
    shutil.rmtree(kept, ignore_errors=True)  # of a consent that was cut before it was given
    new.rename(kept)
    with home.ledger() as ledger:
        ledger.consent(
            policy=policy.sha256,
            campaign=policy.campaign,
            epsilon=policy.epsilon,
            delta=policy.delta,
            max_participations=policy.max_participations,
            until=until,
            operator=fingerprint(operator),
        )
    return verify_campaign(kept, trusted=operator)
