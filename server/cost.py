"""What a campaign has cost its devices, wherever it ends: what they reserved for good, and what was really released."""

import math
import statistics
from dataclasses import dataclass, replace

from server.checkpoint import Checkpoint
from server.rounds import last_begun
from shared.privacy.accounting import epsilon
from shared.protocol.campaign import Campaign


@dataclass(frozen=True)
class Cost:
    """The price of a campaign so far, per device.

    Attributes:
        reserved_epsilon: What every device that agreed has set aside, and never gets back; None: nothing was promised.
        delta: Of every epsilon here.
        max_participations: Rounds a device agreed to at most.
        asked_devices: Devices asked at least once.
        most_rounds: Rounds the most-asked device may have answered, one that was begun and not finished included.
        most_epsilon: At most what that device has released.
        median_rounds: The same for the device in the middle of those asked.
        median_epsilon: The same for it.
        unfinished: The round that was begun and not finished; None where there is none.
    """

    reserved_epsilon: float | None
    delta: float | None
    max_participations: int
    asked_devices: int
    most_rounds: int
    most_epsilon: float | None
    median_rounds: int
    median_epsilon: float | None
    unfinished: int | None


def campaign_cost(campaign: Campaign, checkpoint: Checkpoint) -> Cost:
    """Price a campaign as if it ended here.

    A device counts as having answered every round it was asked in: what it released may have come late, or been thrown
    away at the gate.

    Args:
        campaign: Its policy has the price.
        checkpoint: The newest.
    """
    policy = campaign.policy
    begun = last_begun(campaign.folder, checkpoint) if checkpoint.round_number else 0
    unfinished = begun if checkpoint.round_number < begun <= policy.rounds else None
    asked = sorted(min(n + bool(unfinished), policy.max_participations) for n in checkpoint.participations.values())
    most, median = max(asked, default=0), statistics.median_high(asked) if asked else 0

    def price(rounds: int) -> float | None:
        if policy.delta is None:
            return None
        return epsilon(replace(policy.mechanism, max_participations=rounds), delta=policy.delta) if rounds else 0.0

    return Cost(
        reserved_epsilon=policy.epsilon,
        delta=policy.delta,
        max_participations=policy.max_participations,
        asked_devices=len(asked),
        most_rounds=most,
        most_epsilon=price(most),
        median_rounds=median,
        median_epsilon=price(median),
        unfinished=unfinished,
    )


def cost_lines(cost: Cost) -> list[str]:
    """The same in words, for the operator of a campaign that ended or is stopped here."""
    if cost.reserved_epsilon is None or cost.most_epsilon is None or cost.median_epsilon is None:
        return ["NOT PRIVATE: the campaign promised nothing"]
    rounds = f"of {cost.max_participations} round{'s' * (cost.max_participations != 1)}"
    said = [
        f"reserved by every device that agreed: epsilon {_up(cost.reserved_epsilon)} (delta {cost.delta:g}), for good, "
        "however early the campaign ends; another campaign costs anew",
        f"released by the most-asked device: at most epsilon {_up(cost.most_epsilon)} ({cost.most_rounds} {rounds}); "
        f"by the median of the {cost.asked_devices} asked: {_up(cost.median_epsilon)} ({cost.median_rounds} {rounds})",
    ]
    if cost.unfinished is not None:
        said.append(f"round {cost.unfinished} was begun and is not finished: it counts as answered by all of them")
    return said


def _up(value: float) -> str:
    """Three digits after the point, never below the value."""
    return f"{math.ceil(value * 1000 - 1e-9) / 1000:g}"
