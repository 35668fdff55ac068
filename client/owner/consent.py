"""An owner agrees to a campaign: it is checked, its whole price is reserved, and from then on the device answers it.

Needs what trains: the price is certified here.
"""

import shutil
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from safetensors.numpy import save

from client.home.home import Home
from client.owner.owner import alone, checked_ledger
from client.vault.private_files import disk_errors, private_folder, write_private
from shared.errors import CampaignError, LedgerError, PrivacyError
from shared.files import flush_folder
from shared.privacy.policy import Policy, SecureSum
from shared.protocol.campaign import Campaign, verify_campaign
from shared.protocol.signing import fingerprint

_FILES = ("scenario.json", "policy.json", "policy.sig", "start.safetensors")


@dataclass(frozen=True)
class Offer:
    """What a campaign asks of an owner, certified on this device.

    Attributes:
        operator: Fingerprint of the key that signed it.
        secure_sum: Under trust ``distributed``, on what it rests.
        rounds: Of the whole campaign; this device joins at most ``max_participations``.
        cohort_size: Devices asked in one.
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
    trust: str
    secure_sum: SecureSum | None
    epsilon: float
    delta: float
    rounds: int
    cohort_size: int
    max_participations: int
    added_records: str
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
        PrivacyError, CampaignError: It is not what it must be; see ``shared.protocol.campaign.verify_campaign``.
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
        trust=policy.trust,
        secure_sum=policy.secure_sum,
        epsilon=policy.epsilon,
        delta=policy.delta,
        rounds=policy.rounds,
        cohort_size=policy.cohort_size,
        max_participations=policy.max_participations,
        added_records=policy.added_records,
        reply_fields=policy.reply_fields,
        numbers=policy.size,
        payload_bytes=_payload_bytes(policy),
        extensions=policy.extensions,
        until=until,
        left_epsilon=left_epsilon,
        left_delta=left_delta,
    )


def _payload_bytes(policy: Policy) -> int:
    rounds = range(1, 1 + max(len(policy.turns), 1))
    replies = [{slot.name: np.zeros(slot.shape, slot.dtype) for slot in policy.reply_slots(turn)} for turn in rounds]
    return max(len(save(reply)) for reply in replies)


def check_trust(offer: Offer, *, trust_server: bool) -> None:
    """Raise ``PrivacyError`` where a campaign lets the server see what is not noised, unless the owner wants that."""
    if offer.trust == "central" and not trust_server:
        raise PrivacyError(
            "a campaign of trust 'central' must be agreed to with --trust-server, it was not given: the server would "
            "see this device's change without noise and only promises to add it to the sum. Nothing was changed."
        )


def agree(
    home: Home,
    folder: Path,
    *,
    operator: Ed25519PublicKey,
    until: date,
    shown: str | None = None,
    trust_server: bool = False,
) -> Campaign:
    """Reserve a campaign's whole (epsilon, delta) and keep what the owner agreed to.

    Args:
        home: The owner's home.
        folder: The campaign as the operator published it.
        operator: The key that must have signed it; the ledger keeps its fingerprint.
        until: The last day the owner agrees to.
        shown: Hash of the policy whose offer the owner has read; by default what the folder holds now.
        trust_server: Whether the owner agrees that the server sees changes without noise (trust ``central``).

    Returns:
        The campaign as it is kept.

    Raises:
        PrivacyError, CampaignError: See ``verify_campaign`` and ``check_trust``; or the folder holds another policy
            than was shown.
        LedgerError: The price does not fit under the owner's caps, or the consent was given before.
        StoreError: A round or another command is at work in the home, or the disk is full.

    Guarantee:
        What was agreed to is on disk before its price is reserved.
    """
    with alone(home):
        offer = examine_offer(home, folder, operator=operator, until=until)
        if shown not in (None, offer.policy):
            raise CampaignError(f"{folder} must stay as it was shown, it was changed; look at what it asks again.")
        check_trust(offer, trust_server=trust_server)
        campaign = _keep(home, folder, operator=operator, expected=offer.policy)
        with home.ledger() as ledger:
            ledger.consent(
                policy=campaign.policy.sha256,
                campaign=offer.campaign,
                epsilon=offer.epsilon,
                delta=offer.delta,
                max_participations=offer.max_participations,
                until=until,
                operator=offer.operator,
            )
    return campaign


def put_back(home: Home, folder: Path, *, operator: Ed25519PublicKey) -> bool:
    """Put back the home's copy of a campaign that was agreed to, where it is gone or altered; nothing is reserved.

    Returns:
        Whether there was need.

    Raises:
        PrivacyError, CampaignError, LedgerError, StoreError: As ``agree``.
    """
    policy = verify_campaign(folder, trusted=operator).policy.sha256
    kept = home.campaign_folder(policy)
    with checked_ledger(home) as ledger:
        given = {item.consent.policy for item in ledger.consents() if item.state in ("in force", "exhausted")}
    if policy not in given or all(_equal(kept / name, folder / name) for name in _FILES):
        return False
    with alone(home):
        _keep(home, folder, operator=operator, expected=policy)
    return True


def _equal(kept: Path, given: Path) -> bool:
    return kept.is_file() and kept.read_bytes() == given.read_bytes()


def _keep(home: Home, folder: Path, *, operator: Ed25519PublicKey, expected: str) -> Campaign:
    """Copy a campaign into the home, durably; whoever calls holds the home's lock."""
    new, kept = home.folder / "campaigns" / ".new", home.campaign_folder(expected)
    shutil.rmtree(new, ignore_errors=True)  # of a consent that was cut
    try:
        with disk_errors(new):
            private_folder(new)
            for name in _FILES:
                write_private(new / name, (folder / name).read_bytes())
            if verify_campaign(new, trusted=operator).policy.sha256 != expected:  # the very bytes that are kept
                raise CampaignError(f"{folder} must stay as it was shown, it was changed; look at what it asks again.")
            shutil.rmtree(kept, ignore_errors=True)  # of a consent that was cut before it was given
            new.rename(kept)
            flush_folder(kept.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return verify_campaign(kept, trusted=operator)
