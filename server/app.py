"""The coordinator's Flower ServerApp: rounds, checkpoints, and an optional observer who stands outside."""

import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from server.aggregate import OptimizerState
from server.checkpoint import Checkpoint, save_checkpoint
from server.strategy import EqualWeights
from shared.adapter import Arrays
from shared.campaign import Campaign, read_campaign
from shared.errors import CampaignError

_NODE_WAIT_S = 120.0


def start_checkpoint(campaign: Campaign) -> Checkpoint:
    """The state before the first round: the public start, nobody asked."""
    arrays: Arrays = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    return Checkpoint(0, campaign.policy.sha256, arrays, OptimizerState(), {})


def run_rounds(
    grid: Grid, campaign: Campaign, *, on_round: Callable[[EqualWeights], object] | None = None
) -> Checkpoint:
    """Run a campaign's rounds over any grid, with a checkpoint after each.

    Args:
        grid: Flower's way to the devices: the inline one, Ray's, or a SuperLink's.
        campaign: What was published.
        on_round: Called after every checkpoint; for an observer or a progress bar, it cannot change the campaign.

    Returns:
        The last checkpoint.

    Raises:
        CampaignError: Too few devices or too few good replies; finished rounds stay on disk.
    """
    _wait_for_nodes(grid, campaign.policy.cohort_size)
    strategy = EqualWeights(campaign, start_checkpoint(campaign))
    nothing = ArrayRecord(), ConfigRecord()  # the strategy's checkpoint holds the arrays
    for server_round in range(1, campaign.policy.rounds + 1):
        requests = strategy.configure_train(server_round, *nothing, grid)
        replies = grid.send_and_receive(requests, timeout=campaign.scenario.federation.round_timeout_s)
        strategy.aggregate_train(server_round, replies)
        save_checkpoint(campaign.folder / "checkpoints", strategy.checkpoint)
        if on_round:
            on_round(strategy)
    return strategy.checkpoint


def _wait_for_nodes(grid: Grid, wanted: int) -> None:
    deadline = time.monotonic() + _NODE_WAIT_S
    while (present := len(list(grid.get_node_ids()))) < wanted:
        if time.monotonic() > deadline:
            raise CampaignError(f"a round needs {wanted} devices, got {present} after {_NODE_WAIT_S:.0f} s.")
        time.sleep(0.1)


def make_server_app(*, on_round: Callable[[EqualWeights], object] | None = None) -> ServerApp:
    """A ServerApp that runs the campaign its run config names."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        run_rounds(grid, read_campaign(Path(str(context.run_config["campaign"]))), on_round=on_round)

    return server_app


app = make_server_app()
