"""Who is asked, what is accepted, how it is averaged: the server's side of one round."""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from server.aggregate import SERVER_OPTIMIZERS, mean_update
from server.checkpoint import Checkpoint, Counts
from server.gate import RejectedReply, check_reply
from shared import wire
from shared.adapter import MAX_ABS_VALUE, Arrays, within_bound
from shared.campaign import Campaign
from shared.errors import CampaignError, TooFewRepliesError
from shared.flower import one_line

_log = logging.getLogger("sottovoce.server")


class EqualWeights(Strategy):
    """Federated averaging with equal weights, a constant denominator and a gate before every reply.

    Flower's own strategies weight by a count the client reports, divide by whoever replied and lose a round to one bad
    reply; each of these voids a guarantee or a night's work, so only their interface is used.

    Args:
        campaign: Policy and settings.
        checkpoint: Where to go on from.
        roster: Node id -> the device's seat, its fixed number in the public roster. Node ids are Flower's and may
            change from run to run; who is asked, and the order of a sum, depend on seats alone.
        fatal: Rejection codes that stop the campaign at once instead of losing one device.
        accept_seeded: For tests, see ``check_reply``.

    Attributes:
        checkpoint: The state after the last finished round.
        accepted: Replies used in the last round.
        rejected: Replies not used in the last round, by code; ``NO_REPLY`` counts the devices that sent none in time.
    """

    def __init__(
        self,
        campaign: Campaign,
        checkpoint: Checkpoint,
        *,
        roster: Mapping[int, int],
        fatal: Collection[str] = (),
        accept_seeded: bool = False,
    ) -> None:
        self.campaign = campaign
        self._accept_seeded = accept_seeded
        self.checkpoint = checkpoint
        self._roster = roster
        self._fatal = frozenset(fatal)
        self.accepted = 0
        self.rejected: Counter[str] = Counter()
        self._policy_sha256 = campaign.policy.sha256
        self._cohort: dict[int, int] = {}  # node id -> seat

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One request for each device of the round's cohort; ``arrays`` and ``config`` are those of the checkpoint."""
        del arrays, config
        shared, answered = wire.pack_arrays(self.checkpoint.arrays), self.checkpoint.answered
        timeout_s = self.campaign.scenario.federation.round_timeout_s
        roster = dict(self._roster)  # it may change meanwhile
        present = {roster[node]: node for node in grid.get_node_ids() if node in roster}
        self._cohort = self._choose_cohort(server_round, present)
        for node, seat in self._cohort.items():
            content = wire.pack_request(
                shared,
                round_number=server_round,
                policy_sha256=self._policy_sha256,
                answered=answered.get(seat, 0),
            )
            # ttl and group keep a device that comes back late from answering an old round
            yield Message(content, dst_node_id=node, message_type="train", ttl=timeout_s, group_id=str(server_round))

    def _choose_cohort(self, server_round: int, node_at: Mapping[int, int]) -> dict[int, int]:
        """The seats asked least often so far, ties broken by a seeded shuffle: nobody is asked twice in a pass."""
        counts = self.checkpoint.participations
        seed = self.campaign.scenario.seed
        shuffled = np.random.default_rng([seed, server_round]).permutation(sorted(node_at)).tolist()
        seats = sorted(shuffled, key=lambda seat: counts.get(seat, 0))[: self.campaign.policy.cohort_size]
        return {node_at[seat]: seat for seat in seats}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Pass replies through the gate, average the good ones, move the shared arrays.

        Raises:
            CampaignError: Fewer good replies than ``federation.min_reply_share`` of the cohort, or a fatal one.
        """
        policy, federation = self.campaign.policy, self.campaign.scenario.federation
        self.rejected = Counter()
        updates: dict[int, Arrays] = {}
        silent = set(self._cohort.values())
        for reply in replies:
            seat = self._cohort.get(reply.metadata.src_node_id)
            silent.discard(-1 if seat is None else seat)
            try:
                if reply.has_error():  # made by Flower, and not always in the device's name
                    _log.warning("round %d: %s", server_round, one_line(reply.error.reason))
                    raise RejectedReply("ERROR")
                if seat is None or seat in updates:
                    raise RejectedReply("NOT_ASKED" if seat is None else "DUPLICATE")
                updates[seat] = check_reply(
                    reply,
                    policy=policy,
                    policy_sha256=self._policy_sha256,
                    round_number=server_round,
                    accept_seeded=self._accept_seeded,
                )
            except RejectedReply as rejection:
                self.rejected[rejection.code] += 1
        if silent:
            self.rejected["NO_REPLY"] = len(silent)
        self.accepted = len(updates)
        broken = sorted(self._fatal & set(self.rejected))
        if broken:
            raise CampaignError(
                f"every device must answer in a simulation; in round {server_round} {self.rejected[broken[0]]} did not "
                f"({broken[0]}); a run with engine inline logs where. Finished rounds are kept: mend it, then --resume."
            )
        if self.accepted < federation.min_reply_share * policy.cohort_size:
            raise TooFewRepliesError(
                f"round {server_round} needs {federation.min_reply_share:.0%} of {policy.cohort_size} replies, got "
                f"{self.accepted} (rejected: {dict(self.rejected) or 'none'}); the last checkpoint is kept."
            )
        # Sorted, so that the sum does not depend on the order in which replies came in.
        mean = mean_update((updates[seat] for seat in sorted(updates)), denominator=policy.cohort_size)
        arrays, optimizer = SERVER_OPTIMIZERS[federation.server_optimizer](
            self.checkpoint.arrays, self.checkpoint.optimizer, mean, federation
        )
        if not within_bound(arrays):
            raise CampaignError(
                f"the shared arrays must stay finite and within {MAX_ABS_VALUE:g} after round {server_round}; training "
                "diverged or a device sent poison. Lower the learning rates; the last checkpoint is kept."
            )
        latest = Counts(self.accepted, dict(self.rejected))
        self.checkpoint = Checkpoint(
            server_round,
            self._policy_sha256,
            arrays,
            optimizer,
            participations=_one_more(self.checkpoint.participations, self._cohort.values()),
            answered=_one_more(self.checkpoint.answered, updates),
            latest=latest,
            total=self.checkpoint.total + latest,
        )
        return None, None

    def count_bytes(self, *, up: int, down: int) -> None:
        """Add what the last round sent to its checkpoint; only the grid knows."""
        sent = Counts(bytes_up=up, bytes_down=down)
        latest, total = self.checkpoint.latest + sent, self.checkpoint.total + sent
        self.checkpoint = replace(self.checkpoint, latest=latest, total=total)

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


def _one_more(counts: Mapping[int, int], seats: Iterable[int]) -> dict[int, int]:
    return dict(counts) | {seat: counts.get(seat, 0) + 1 for seat in seats}
