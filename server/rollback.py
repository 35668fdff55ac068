"""Go back to the shared arrays of an earlier round, wanted or not; devices never do: a number is asked for once."""

from dataclasses import replace

from server.app import start_checkpoint
from server.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from server.rounds import last_begun
from shared.errors import CampaignError
from shared.protocol.campaign import Campaign


def roll_back(campaign: Campaign, to_round: int) -> Checkpoint:
    """Make a campaign go on from the arrays and the optimiser's state of an earlier round.

    Round number and counts stay those of the newest checkpoint: a device answers no round at or before its last, and
    what it has spent stays spent. A round that was begun and not finished is passed over as well: devices that answered
    it would take the same number with other arrays for an attack (``CONFLICT``). Whoever calls is the one process that
    serves the campaign. No checkpoint is moved or deleted: going back to a round that was rolled back undoes it.

    Args:
        campaign: Its folder holds the checkpoints.
        to_round: The round; 0 is the public start.

    Returns:
        The new checkpoint; it is on disk.

    Raises:
        CampaignError: There is no such round or its checkpoint is damaged, nothing was run yet, or these are the
            arrays already. Nothing is written.

    Guarantee:
        A kill at any point leaves the campaign rolled back or as it was.
    """
    folder, policy_sha256 = campaign.folder / "checkpoints", campaign.policy.sha256
    newest = newest_checkpoint(folder)
    if newest is None:
        raise CampaignError(f"{campaign.folder.name} has no finished round to go back from.")
    if not 0 <= to_round <= newest.round_number:
        raise CampaignError(
            f"{campaign.folder.name} can go back to a round from 0 (the public start) to {newest.round_number}, "
            f"got {to_round}."
        )
    if to_round == newest.arrays_of:
        raise CampaignError(f"{campaign.folder.name} goes on from round {to_round} already.")
    source = load_checkpoint(checkpoint_path(folder, to_round)) if to_round else start_checkpoint(campaign)
    for checkpoint in (newest, source):
        if checkpoint.policy_sha256 != policy_sha256:
            raise CampaignError(f"{folder} must hold checkpoints of policy {policy_sha256[:12]}…, one is of another.")
    back = replace(
        newest,
        round_number=min(last_begun(campaign.folder, newest), campaign.policy.rounds),
        arrays=source.arrays,
        optimizer=source.optimizer,
        rolled_back_to=to_round,
    )
    save_checkpoint(folder, back)
    return back


def pass_over(campaign: Campaign, newest: Checkpoint | None) -> Checkpoint | None:
    """Where several rounds after the newest checkpoint are lost, go on from its arrays with a number that is new.

    A round is begun after the one before it is on disk. Was one begun that is not the next but one at most, then
    checkpoints are damaged or an older copy of the folder was put back. Devices keep the bytes of their newest answer
    alone and would refuse the lost rounds, one after the other, for ever. What they have spent on them stays spent. A
    single lost round is asked for again instead: those that have not gone on since send the same bytes.

    Args:
        campaign: Its folder holds checkpoints, and the note of the last round that was begun.
        newest: Its newest good checkpoint; None where there is none.

    Returns:
        ``newest`` where not more than one is lost; else the new checkpoint, which is on disk.

    Raises:
        CampaignError: The note is damaged.
    """
    at = newest or start_checkpoint(campaign)
    begun = last_begun(campaign.folder, at)
    if not begun > at.round_number + 2:
        return newest
    lost = replace(at, round_number=min(begun, campaign.policy.rounds), rolled_back_to=at.arrays_of)
    save_checkpoint(campaign.folder / "checkpoints", lost)
    return lost
