"""What a campaign asks of an owner, in numbers, and the owner's yes. Needs what trains: the price is certified here."""

import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors import SafetensorError
from safetensors.numpy import save

from client.consent import agree
from client.home import Home
from client.owner import checked_ledger
from shared.campaign import Campaign
from shared.errors import CampaignError, LedgerError, PrivacyError
from shared.signing import fingerprint


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
    campaign = _examine(folder, operator)
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


def _examine(folder: Path, operator: Ed25519PublicKey) -> Campaign:

    from shared.campaign import verify_campaign

    try:
        return verify_campaign(folder, trusted=operator)
    except (SafetensorError, UnicodeDecodeError):
        raise CampaignError(f"{folder} must hold a campaign, a file in it is damaged; get it again.") from None


def _payload_bytes(campaign: Campaign) -> int:
    return len(save({slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}))


def accept(home: Home, folder: Path, *, operator: Ed25519PublicKey, until: date) -> None:
    """Give consent; raises as ``client.consent.agree``."""
    agree(home, folder, operator=operator, operator_name=fingerprint(operator), until=until)
