"""Who is asked, what is accepted, how it is averaged: the server's side of one round."""

from collections import Counter
from collections.abc import Iterable

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from server.aggregate import SERVER_OPTIMIZERS, mean_update
from server.checkpoint import Checkpoint
from server.gate import RejectedReply, check_reply
from shared import wire
from shared.adapter import MAX_ABS_VALUE, within_bound
from shared.campaign import Campaign
from shared.errors import CampaignError


class EqualWeights(Strategy):
    """Federated averaging with equal weights, a constant denominator and a gate before every reply.

    Flower's own strategies weight by a count the client reports, divide by whoever replied and lose a round to one bad
    reply; each of these voids a guarantee or a night's work, so only their interface is used.

    Args:
        campaign: Policy and settings.
        checkpoint: Where to go on from.

    Attributes:
        checkpoint: The state after the last finished round.
        accepted: Replies used in the last round.
        rejected: Replies not used in the last round, by code.
    """

    def __init__(self, campaign: Campaign, checkpoint: Checkpoint) -> None:
        self.campaign = campaign
        self.checkpoint = checkpoint
        self.accepted = 0
        self.rejected: Counter[str] = Counter()
        self._policy_sha256 = campaign.policy.sha256
        self._cohort: list[int] = []

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One request for each device of the round's cohort; ``arrays`` and ``config`` are those of the checkpoint."""
        del arrays, config
        content = wire.pack_request(
            self.checkpoint.arrays, round_number=server_round, policy_sha256=self._policy_sha256
        )
        timeout_s = self.campaign.scenario.federation.round_timeout_s
        for node in self._choose_cohort(server_round, sorted(grid.get_node_ids())):
            # ttl and group keep a device that comes back late from answering an old round
            yield Message(content, dst_node_id=node, message_type="train", ttl=timeout_s, group_id=str(server_round))

    def _choose_cohort(self, server_round: int, nodes: list[int]) -> list[int]:
        """The devices asked least often so far, ties broken by a seeded shuffle: nobody is asked twice in a pass."""
        counts = self.checkpoint.participations
        seed = self.campaign.scenario.seed
        shuffled = np.random.default_rng([seed, server_round]).permutation(nodes).tolist()
        cohort = sorted(shuffled, key=lambda node: counts.get(node, 0))[: self.campaign.policy.cohort_size]
        self._cohort = cohort
        return cohort

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Pass replies through the gate, average the good ones, move the shared arrays.

        Raises:
            CampaignError: Fewer good replies than ``federation.min_reply_share`` of the cohort.
        """
        policy, federation = self.campaign.policy, self.campaign.scenario.federation
        self.rejected = Counter()
        updates = {}
        for reply in replies:
            node = reply.metadata.src_node_id
            try:
                if node in updates or node not in self._cohort:
                    raise RejectedReply("DUPLICATE" if node in updates else "NOT_ASKED")
                updates[node] = check_reply(
                    reply, policy=policy, policy_sha256=self._policy_sha256, round_number=server_round
                )
            except RejectedReply as rejection:
                self.rejected[rejection.code] += 1
        self.accepted = len(updates)
        if self.accepted < federation.min_reply_share * policy.cohort_size:
            raise CampaignError(
                f"round {server_round} needs {federation.min_reply_share:.0%} of {policy.cohort_size} replies, got "
                f"{self.accepted} (rejected: {dict(self.rejected) or 'none'}); the last checkpoint is kept."
            )
        # Sorted, so that the sum does not depend on the order in which replies came in.
        mean = mean_update((updates[node] for node in sorted(updates)), denominator=policy.cohort_size)
        arrays, optimizer = SERVER_OPTIMIZERS[federation.server_optimizer](
            self.checkpoint.arrays, self.checkpoint.optimizer, mean, federation
        )
        if not within_bound(arrays):
            raise CampaignError(
                f"the shared arrays must stay finite and within {MAX_ABS_VALUE:g} after round {server_round}; training "
                "diverged or a device sent poison. Lower the learning rates; the last checkpoint is kept."
            )
        counts = dict(self.checkpoint.participations)
        counts.update({node: counts.get(node, 0) + 1 for node in self._cohort})
        self.checkpoint = Checkpoint(server_round, self._policy_sha256, arrays, optimizer, counts)
        return None, None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nobody is asked to evaluate: a device's metrics are its data."""
        del server_round, arrays, config, grid
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing was asked, so there is nothing to aggregate."""
        del server_round, replies
        return None

    def summary(self) -> None:
        """Flower's log of a strategy's settings; the run folder holds them all."""
