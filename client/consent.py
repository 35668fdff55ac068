"""An owner agrees to a campaign: it is checked, its whole price is reserved, and from then on the device answers it."""

import shutil
from datetime import date
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client.home import Home
from shared.campaign import Campaign, verify_campaign
from shared.errors import PrivacyError

_FILES = ("scenario.json", "policy.json", "policy.sig", "start.safetensors")


def agree(home: Home, folder: Path, *, operator: Ed25519PublicKey, operator_name: str, until: date) -> Campaign:
    """Reserve a campaign's whole (epsilon, delta) and keep what the owner agreed to.

    Args:
        home: The owner's home.
        folder: The campaign as the operator published it.
        operator: The key that must have signed it.
        operator_name: What the ledger calls its holder, such as the key's fingerprint.
        until: The last day the owner agrees to.

    Returns:
        The campaign as it is kept.

    Raises:
        PrivacyError, CampaignError: See ``verify_campaign``.
        LedgerError: The price does not fit under the owner's caps, or the consent was given before.
    """
    policy = verify_campaign(folder, trusted=operator).policy
    kept = home.campaign_folder(policy.sha256)
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for name in _FILES:
        shutil.copyfile(folder / name, kept / name)
    agreed = verify_campaign(kept, trusted=operator)  # the very bytes that are kept
    if agreed.policy.epsilon is None or agreed.policy.delta is None:
        raise PrivacyError("a private policy must state epsilon and delta; do not take part.")
    with home.ledger() as ledger:
        ledger.consent(
            policy=agreed.policy.sha256,
            campaign=agreed.policy.campaign,
            epsilon=agreed.policy.epsilon,
            delta=agreed.policy.delta,
            max_participations=agreed.policy.max_participations,
            until=until,
            operator=operator_name,
        )
    return agreed
