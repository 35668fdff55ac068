"""The privacy card of a campaign that an owner agreed to: what this device promised itself, spent and sent."""

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from client.home.home import Home
from client.home.place import open_owner_home
from client.ledger.ledger import Ledger, Standing
from client.owner.owner import checked_ledger, find_consent
from shared.card.options import write
from shared.card.sources import LEDGER, Sources, as_json, campaign_files, gather
from shared.errors import CampaignError, LedgerError
from shared.protocol.signing import fingerprint, signed_by


def device_sources(
    home: Home, *, prefix: str | None = None, audits: Sequence[Path] = (), created: datetime | None = None
) -> Sources:
    """What a card of one campaign quotes on a device: campaign, ledger, keystore, audits.

    Args:
        home: The owner's.
        prefix: First digits of the campaign's policy; by default the only one agreed to.
        audits: Files of ``sottovoce audit``.
        created: The time; by default now.

    Raises:
        LedgerError: The ledger cannot be used, or no consent is meant.
        CampaignError, PrivacyError: The home's copy of the campaign is gone, altered, or does not hold what it states.
        DataError: An audit is damaged.

    Guarantee:
        No text of a record and no path of the owner's is in it.
    """
    with checked_ledger(home) as ledger:
        standing = _chosen(ledger.consents(), prefix)
        extract = _extract(home, ledger, standing)
    folder = home.campaign_folder(standing.consent.policy)
    if not folder.is_dir():
        raise CampaignError(
            f"the home must hold the campaign {standing.consent.campaign!r}, its copy is gone (forgotten, or deleted); "
            "while the consent is in force, put it back with: sottovoce client consent."
        )
    campaign, files = campaign_files(folder)
    key = signed_by(folder)
    agreed = (standing.consent.policy, standing.consent.operator)
    found = (campaign.policy.sha256, fingerprint(key) if key else None)
    if found != agreed:
        raise CampaignError(
            f"{folder} must hold the campaign and the operator agreed to, it holds others; put it back."
        )
    return gather(files | {LEDGER: as_json(extract)}, place="device", audits=audits, created=created)


def _chosen(standings: Sequence[Standing], prefix: str | None) -> Standing:
    if prefix is not None:
        return find_consent(standings, prefix)
    if len(standings) != 1:
        known = ", ".join(standing.consent.policy[:12] for standing in standings) or "none"
        raise LedgerError(f"--campaign must name a policy you consented to ({known}) by its first digits.")
    return standings[0]


def _extract(home: Home, ledger: Ledger, standing: Standing) -> dict[str, Any]:
    """What the ledger says of one campaign, and of all together."""
    consent, totals, keys = standing.consent, ledger.totals(), home.keystore
    return {
        "policy": consent.policy,
        "campaign": consent.campaign,
        "operator": consent.operator,
        "consent": {
            "at": consent.at,
            "until": consent.until.isoformat(),
            "epsilon": consent.epsilon,
            "delta": consent.delta,
            "max_participations": consent.max_participations,
        },
        "state": "paused" if totals.paused and standing.state == "in force" else standing.state,
        "rounds": {
            "spent": standing.spent,
            "released": standing.released,
            "burnt": standing.burnt,
            "pending": standing.pending,
            "lost": standing.lost,
        },
        "releases": [
            {"round": event.round_number, "at": event.at, **event.detail}
            for event in ledger.history()
            if event.kind == "release" and event.policy == consent.policy
        ],
        "all_campaigns": {
            "epsilon": {"reserved": totals.epsilon, "cap": totals.cap_epsilon, "left": totals.left_epsilon},
            "delta": {"reserved": totals.delta, "cap": totals.cap_delta, "left": totals.left_delta},
        },
        "keys": {"where": keys.name, "weak": keys.weak, "rollback_detectable": keys.detects_rollback},
    }


def run(options: argparse.Namespace) -> int:
    """The command ``client card``."""
    home = open_owner_home(options.home)
    return write(device_sources(home, prefix=options.campaign, audits=options.audit), options)
