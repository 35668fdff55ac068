"""The privacy card of a campaign as its operator knows it: what was promised, and what was asked of whom."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from server.checkpoint import load_checkpoint, newest_first
from server.folder import ServerFolder
from server.status import status
from shared.card.sources import SERVER, Sources, as_json, campaign_files, gather
from shared.errors import CampaignError
from shared.protocol.campaign import Campaign, verify_campaign
from shared.protocol.signing import load_public

_COUNTS = ("replies", "rejected", "void", "bytes_up", "bytes_down")
_COST = ("asked_devices", "most_rounds", "median_rounds")


def server_sources(
    server: ServerFolder, campaign: Campaign, *, audits: Sequence[Path] = (), created: datetime | None = None
) -> Sources:
    """What a card of one campaign quotes on a server: campaign, counts, hold-out, audits; nothing of a single device.

    Args:
        server: Whose operator must have signed the campaign.
        campaign: One of the server's.
        audits: Files of ``sottovoce audit``.
        created: The time; by default now.

    Raises:
        CampaignError, PrivacyError, ServerError: Campaign, newest checkpoint or register is damaged, or another key
            signed.
        DataError: An audit is damaged.
    """
    verify_campaign(campaign.folder, trusted=load_public(server.operator_public))
    for newest in newest_first(campaign.folder / "checkpoints")[:1]:
        load_checkpoint(newest)  # an older one would count too little
    found, files = campaign_files(campaign.folder)
    told = status(server)
    [said] = [each for each in told["campaigns"] if each["name"] == campaign.folder.name]
    if said["problem"] or said["policy_sha256"] != found.policy.sha256:
        raise CampaignError(f"{campaign.folder} must be readable and stay as it is: {said['problem'] or 'it changed'}.")
    counts = {"policy": said["policy_sha256"]} | _counts(said) | told["devices"]
    return gather(files | {SERVER: as_json(counts)}, place="server", audits=audits, created=created)


def _counts(said: dict[str, Any]) -> dict[str, Any]:
    scores = said["holdout"]
    holdout = {name: scores[name] for name in ("metric", "start", "last")} if scores else None
    return {
        "rounds_done": said["round"],
        **{name: said[name] for name in _COUNTS},
        **{name: said["cost"][name] for name in _COST},
        "holdout": holdout,
    }
