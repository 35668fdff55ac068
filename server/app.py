"""A campaign's rounds over any of Flower's grids: ask, gate, average, checkpoint; an observer stands outside."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord

from server.aggregate import OptimizerState
from server.checkpoint import Checkpoint, save_checkpoint
from server.secure_strategy import SecureWeights
from server.strategy import EqualWeights
from shared.errors import CampaignError, TooFewRepliesError, VoidRoundError
from shared.flower.grid import Metered
from shared.heads.adapter import Arrays
from shared.privacy.noise import Randomness
from shared.protocol.campaign import Campaign
from shared.secure_sum.messages import Credential

_MOST_VOID = 2  # rounds running


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
    before_round: Callable[[int], object] | None = None,
    attempts: int = 1,
    credentials: Mapping[int, Credential] | None = None,
    noise: Callable[[int], Randomness] | None = None,
    accept_seeded: bool = False,
) -> Checkpoint:
    """Run a campaign's rounds over any grid, with a checkpoint after each.

    Args:
        grid: Flower's way to the devices: the inline one, Ray's, or a SuperLink's.
        campaign: What was published.
        roster: Node id -> seat of every device; may grow and shrink while rounds run.
        start: Where to go on; by default the public start.
        fatal: Rejection codes that stop the campaign, see ``EqualWeights``.
        on_round: Called after every checkpoint; for an observer or a progress bar. It cannot change the campaign, but
            end it with an error.
        before_round: Called with the number of a round before it is asked for, such as to wait for devices.
        attempts: How often a round with too few good replies is asked for. Devices that have answered it answer with
            the same bytes, so asking again costs nobody anything. Under trust ``distributed`` and ``central`` such a
            round is void instead, for the same contributions in two sums would show who was in one and not in the
            other, or be noised twice: the shared arrays stay, the next number is asked for, and the third void round
            running ends the campaign. Under ``local`` a round is void where too many devices were cut in it and will
            never answer it.
        credentials: Seat -> what the operator certified, for a secure sum under masks. None leaves the masks out, which
            only simulated devices agree to: the sum is the same.
        noise: For simulations, see ``EqualWeights``.
        accept_seeded: For tests, see ``check_reply``.

    Returns:
        The last checkpoint.

    Raises:
        CampaignError: Too few devices or too few good replies; finished rounds stay on disk.
    """
    if len(roster) < campaign.policy.cohort_size and before_round is None:
        raise CampaignError(f"a round needs {campaign.policy.cohort_size} devices, the roster holds {len(roster)}.")
    strategy = _strategy(
        campaign,
        start or start_checkpoint(campaign),
        credentials,
        {"roster": roster, "fatal": fatal, "noise": noise, "accept_seeded": accept_seeded},
    )
    void = 0
    for server_round in range(strategy.checkpoint.round_number + 1, campaign.policy.rounds + 1):
        bytes_up, bytes_down = grid.bytes_up, grid.bytes_down
        for attempt in range(attempts, 0, -1):
            if before_round:
                before_round(server_round)
            try:
                _run_round(grid, strategy, server_round)
                void = 0
                break
            except VoidRoundError as error:
                strategy.void(server_round, error)
                void += 1
                break
            except TooFewRepliesError:
                if attempt == 1:
                    raise
        strategy.count_bytes(up=grid.bytes_up - bytes_up, down=grid.bytes_down - bytes_down)
        save_checkpoint(campaign.folder / "checkpoints", strategy.checkpoint)
        if on_round:
            on_round(strategy.checkpoint)
        if void > _MOST_VOID:
            raise TooFewRepliesError(
                f"{void} rounds running are void, the last is round {server_round}; ask when more devices are there."
            )
    return strategy.checkpoint


def _strategy(
    campaign: Campaign, start: Checkpoint, credentials: Mapping[int, Credential] | None, options: dict[str, Any]
) -> EqualWeights:
    if credentials is None or campaign.policy.secure_sum is None:
        return EqualWeights(campaign, start, **options)
    return SecureWeights(campaign, start, credentials=credentials, **options)


def _run_round(grid: Metered, strategy: EqualWeights, server_round: int) -> None:
    nothing = ArrayRecord(), ConfigRecord()  # the strategy's checkpoint holds the arrays
    requests = strategy.configure_train(server_round, *nothing, grid)
    replies = grid.send_and_receive(requests, timeout=strategy.campaign.scenario.federation.round_timeout_s)
    strategy.aggregate_train(server_round, replies)
