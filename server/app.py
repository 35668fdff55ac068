"""The coordinator's Flower ServerApp: rounds, checkpoints, and an optional observer who stands outside."""

import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from server.aggregate import OptimizerState
from server.checkpoint import Checkpoint, save_checkpoint
from server.strategy import EqualWeights
from shared.adapter import Arrays
from shared.campaign import Campaign, read_campaign
from shared.errors import CampaignError
from shared.flower import Metered, metered

_NODE_WAIT_S = 120.0


def start_checkpoint(campaign: Campaign) -> Checkpoint:
    """The state before the first round: the public start, nobody asked."""
    arrays: Arrays = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    return Checkpoint(0, campaign.policy.sha256, arrays, OptimizerState(), {})


def run_rounds(
    grid: Metered,
    campaign: Campaign,
    *,
    roster: Mapping[int, int],
    start: Checkpoint | None = None,
    fatal: Collection[str] = (),
    on_round: Callable[[Checkpoint], object] | None = None,
) -> Checkpoint:
    """Run a campaign's rounds over any grid, with a checkpoint after each.

    Args:
        grid: Flower's way to the devices: the inline one, Ray's, or a SuperLink's.
        campaign: What was published.
        roster: Node id -> seat of every device.
        start: Where to go on; by default the public start.
        fatal: Rejection codes that stop the campaign, see ``EqualWeights``.
        on_round: Called after every checkpoint; for an observer or a progress bar, it cannot change the campaign.

    Returns:
        The last checkpoint.

    Raises:
        CampaignError: Too few devices or too few good replies; finished rounds stay on disk.
    """
    if len(roster) < campaign.policy.cohort_size:
        raise CampaignError(f"a round needs {campaign.policy.cohort_size} devices, the roster holds {len(roster)}.")
    strategy = EqualWeights(campaign, start or start_checkpoint(campaign), roster=roster, fatal=fatal)
    nothing = ArrayRecord(), ConfigRecord()  # the strategy's checkpoint holds the arrays
    for server_round in range(strategy.checkpoint.round_number + 1, campaign.policy.rounds + 1):
        bytes_up, bytes_down = grid.bytes_up, grid.bytes_down
        requests = strategy.configure_train(server_round, *nothing, grid)
        replies = grid.send_and_receive(requests, timeout=campaign.scenario.federation.round_timeout_s)
        strategy.aggregate_train(server_round, replies)
        strategy.count_bytes(up=grid.bytes_up - bytes_up, down=grid.bytes_down - bytes_down)
        save_checkpoint(campaign.folder / "checkpoints", strategy.checkpoint)
        if on_round:
            on_round(strategy.checkpoint)
    return strategy.checkpoint


def wait_for_nodes(grid: Grid, wanted: int) -> list[int]:
    """The node ids of the devices, once enough of them are there."""
    deadline = time.monotonic() + _NODE_WAIT_S
    while len(nodes := sorted(grid.get_node_ids())) < wanted:
        if time.monotonic() > deadline:
            raise CampaignError(f"a round needs {wanted} devices, got {len(nodes)} after {_NODE_WAIT_S:.0f} s.")
        time.sleep(0.1)
    return nodes


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the campaign that the run config names; every node that is there at the start has a seat."""
    campaign = read_campaign(Path(str(context.run_config["campaign"])))
    nodes = wait_for_nodes(grid, campaign.policy.cohort_size)
    run_rounds(metered(grid), campaign, roster={node: seat for seat, node in enumerate(nodes)})
