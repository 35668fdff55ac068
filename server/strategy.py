"""Who is asked, what is accepted, how it is averaged: the server's side of one round."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import itemgetter

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from server.aggregate import (
    SERVER_OPTIMIZERS,
    OptimizerState,
    mean_of_sum,
    mean_update,
    noised_sum,
    ring_sum,
    sum_updates,
)
from server.checkpoint import Checkpoint, Counts
from server.gate import RejectedReply, check_reply
from server.robust import combine
from shared.errors import CampaignError, SecureSumError, TooFewRepliesError, VoidRoundError
from shared.flower.grid import one_line
from shared.heads.adapter import MAX_ABS_VALUE, Arrays, within_bound
from shared.privacy.compatible import liars_among
from shared.privacy.noise import Randomness, SecureRandomness
from shared.privacy.policy import SUM
from shared.protocol import wire
from shared.protocol.campaign import Campaign

_SUMS = {"central": np.int64, "distributed": np.uint32}  # by trust: integers, in a ring; others are floats
_FOR_EVER = ("BURNT", "CONFLICT", "ROUND")  # what a device says of a round whenever it is asked

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
        noise: Where the noise of a round comes from that trust ``central`` has the server add; for simulations.
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
        noise: Callable[[int], Randomness] | None = None,
        accept_seeded: bool = False,
    ) -> None:
        self.campaign = campaign
        self._noise = noise or (lambda _: SecureRandomness())
        self._simulated = noise is not None
        self._accept_seeded = accept_seeded
        self.checkpoint = checkpoint
        self._roster = roster
        self._fatal = frozenset(fatal)
        self.accepted = 0
        self.rejected: Counter[str] = Counter()
        self._policy_sha256 = campaign.policy.sha256
        self._cohort: dict[int, int] = {}  # node id -> seat
        self._group: dict[int, int] = {}  # seat -> which sum of the round it is in
        self._asked: Collection[int] = ()  # seats that were asked to train
        self._answered: Collection[int] = ()  # those of them whose reply is used

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """One request for each device of the round's cohort; ``arrays`` and ``config`` are those of the checkpoint."""
        del arrays, config
        self._begin(server_round, grid)
        return self._requests(server_round, dict.fromkeys(self._cohort.values(), b""))

    def _begin(self, server_round: int, grid: Grid) -> None:
        """Choose who is asked."""
        roster = dict(self._roster)  # it may change meanwhile
        present = {roster[node]: node for node in grid.get_node_ids() if node in roster}
        self._cohort = self._choose_cohort(server_round, present)
        self._group = self._draw_groups(server_round)
        self.rejected = Counter()

    def _requests(self, server_round: int, bodies: Mapping[int, bytes]) -> Iterator[Message]:
        """Requests to train, one for each seat with a body, packed when they are sent."""
        self._asked = bodies.keys()
        return self._packed(server_round, bodies)

    def _packed(self, server_round: int, bodies: Mapping[int, bytes]) -> Iterator[Message]:
        shared, answered = wire.pack_arrays(self.checkpoint.arrays), self.checkpoint.answered
        for node, seat in self._cohort.items():
            if seat in bodies:
                content = wire.pack_request(
                    shared,
                    round_number=server_round,
                    policy_sha256=self._policy_sha256,
                    answered=answered.get(seat, 0),
                    body=bodies[seat],
                )
                yield self._message(content, node, "train", server_round)

    def _message(self, content: RecordDict, node: int, kind: str, server_round: int) -> Message:
        """A message whose ttl and group keep a device that comes back late from answering an old round."""
        timeout_s = self.campaign.scenario.federation.round_timeout_s
        return Message(content, dst_node_id=node, message_type=kind, ttl=timeout_s, group_id=str(server_round))

    def _choose_cohort(self, server_round: int, node_at: Mapping[int, int]) -> dict[int, int]:
        """The seats asked least often so far, ties broken by a seeded shuffle: nobody is asked twice in a pass."""
        counts = self.checkpoint.participations
        seed = self.campaign.scenario.seed
        shuffled = np.random.default_rng([seed, server_round]).permutation(sorted(node_at)).tolist()
        seats = sorted(shuffled, key=lambda seat: counts.get(seat, 0))[: self.campaign.policy.cohort_size]
        return {node_at[seat]: seat for seat in sorted(seats)}  # asked in this order, added up in this order

    def _draw_groups(self, server_round: int) -> dict[int, int]:
        """Deal the cohort out into the policy's groups: by the system's entropy, or by the seed of a simulation."""
        terms, seats = self.campaign.policy.secure_sum, sorted(self._cohort.values())
        if terms is None or terms.groups == 1:
            return dict.fromkeys(seats, 0)
        seed = [self.campaign.scenario.seed, server_round, terms.groups] if self._simulated else None
        dealt = np.random.default_rng(seed).permutation(seats).tolist()
        return {seat: place % terms.groups for place, seat in enumerate(dealt)}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Pass replies through the gate, average the good ones, move the shared arrays.

        Raises:
            CampaignError: Fewer good replies than ``federation.min_reply_share`` of the cohort, or a fatal one.
            VoidRoundError: Too few of them under trust ``distributed`` and ``central``, or where so many devices refuse
                this round for ever that asking again would not help.
        """
        good = self._accept(server_round, replies)
        if self._adds_up():
            total = self._total(update for _, update in _by_seat(good, self._asked))
            self._check_faults(server_round)
            mean = self._of_total(server_round, total, count=self.accepted)
        else:
            updates = self._in_whole_groups(dict(good))
            self._check_faults(server_round)
            mean = self._mean(server_round, updates)
        self._advance(server_round, mean, sorted(self._answered))
        return None, None

    def _adds_up(self) -> bool:
        """Whether a round needs the sum of its replies alone, so that none has to be kept."""
        terms = self.campaign.policy.secure_sum
        return self.campaign.scenario.federation.aggregation == "mean" and (terms is None or terms.groups == 1)

    def _accept(self, server_round: int, replies: Iterable[Message]) -> Iterator[tuple[int, Arrays]]:
        """Good replies with their seats, as they come; the others are counted by code."""
        self._answered = accepted = set[int]()
        for seat, reply in self._from(self._asked, server_round, replies):
            update = None
            with self._counting():
                if seat in accepted:
                    raise RejectedReply("DUPLICATE")
                update = check_reply(
                    reply,
                    policy=self.campaign.policy,
                    policy_sha256=self._policy_sha256,
                    round_number=server_round,
                    accept_seeded=self._accept_seeded,
                )
            if update is not None:
                accepted.add(seat)
                yield seat, update
        self.accepted = len(accepted)

    def _from(
        self, asked: Iterable[int], server_round: int, replies: Iterable[Message]
    ) -> Iterator[tuple[int, Message]]:
        """Seat and reply of the seats that were asked; errors, strangers and the silent are counted."""
        silent = set(asked)
        for reply in replies:
            seat = self._cohort.get(reply.metadata.src_node_id)
            silent.discard(-1 if seat is None else seat)
            if reply.has_error():  # made by Flower, and not always in the device's name
                _log.warning("round %d: %s", server_round, one_line(reply.error.reason))
                if seat is not None:  # else it is about a device that is silent, and counted as such
                    self.rejected["ERROR"] += 1
            elif seat is None:
                self.rejected["NOT_ASKED"] += 1
            else:
                yield seat, reply
        if silent:
            self.rejected["NO_REPLY"] += len(silent)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """Lose one device to its bad reply, never the round."""
        try:
            yield
        except (RejectedReply, SecureSumError) as rejection:
            self.rejected[rejection.code] += 1

    def _check_faults(self, server_round: int) -> None:
        broken = sorted(self._fatal & set(self.rejected))
        if broken:
            raise CampaignError(
                f"every device must answer in a simulation; in round {server_round} {self.rejected[broken[0]]} did not "
                f"({broken[0]}); a run with engine inline logs where. Finished rounds are kept: mend it, then --resume."
            )

    def _in_whole_groups(self, updates: dict[int, Arrays]) -> dict[int, Arrays]:
        """Without the contributions to sums that have too few of them, where there are several sums."""
        terms = self.campaign.policy.secure_sum
        if terms is None or terms.groups == 1:
            return updates
        sizes = Counter(self._group[seat] for seat in updates)
        whole = {seat: each for seat, each in updates.items() if sizes[self._group[seat]] >= terms.min_survivors}
        lost = len(set(self._group.values())) - len({self._group[seat] for seat in whole})
        if lost:
            self.rejected["GROUP"] = lost
        self.accepted, self._answered = len(whole), whole.keys()
        return whole

    def _of_sums(self, server_round: int, totals: Mapping[int, np.ndarray]) -> Mapping[str, np.ndarray]:
        """What a round's sums together say.

        Args:
            totals: Group -> (P,) int64.

        Raises:
            VoidRoundError: Too few groups have a sum.
        """
        policy, scenario = self.campaign.policy, self.campaign.scenario
        groups = policy.secure_sum.groups if policy.secure_sum else 1
        if len(totals) < scenario.federation.min_reply_share * groups:
            raise VoidRoundError(
                f"round {server_round} is void: {scenario.federation.min_reply_share:.0%} of {groups} sums must have "
                f"enough contributions, {len(totals)} have (rejected: {dict(self.rejected) or 'none'})."
            )
        means = [mean_of_sum(totals[group], policy=policy, round_number=server_round) for group in sorted(totals)]
        if groups == 1:
            return means[0]
        try:
            return self._combine(means, asked=groups)
        except TooFewRepliesError as error:  # a sum is spent: asking again would bring refusals
            raise VoidRoundError(f"round {server_round} is void: {error}") from None

    def _combine(self, vectors: Sequence[Mapping[str, np.ndarray]], *, asked: int) -> dict[str, np.ndarray]:
        """By the campaign's rule."""
        scenario, cohort_size = self.campaign.scenario, self.campaign.policy.cohort_size
        liars = liars_among(scenario, cohort_size=cohort_size)
        return combine(vectors, federation=scenario.federation, asked=asked, liars=liars)

    def _mean(self, server_round: int, updates: Mapping[int, Arrays]) -> Mapping[str, np.ndarray]:
        """What the replies together say, noised where it is the server that noises."""
        # Sorted, so that a sum of floats does not depend on the order in which replies came in.
        ordered = [updates[seat] for seat in sorted(updates)]
        if self._adds_up():
            return self._of_total(server_round, self._total(ordered), count=len(ordered))
        self._check_enough(server_round, len(updates))
        policy = self.campaign.policy
        if policy.trust == "distributed":
            groups: dict[int, list[np.ndarray]] = {}
            for seat in sorted(updates):
                groups.setdefault(self._group[seat], []).append(updates[seat][SUM])
            return self._of_sums(server_round, {group: ring_sum(each) for group, each in groups.items()})
        return self._combine(ordered, asked=policy.cohort_size)

    def _total(self, updates: Iterable[Arrays]) -> dict[str, np.ndarray]:
        """Their sum, in the type that the campaign's kind of sum has."""
        return sum_updates(updates, dtype=_SUMS.get(self.campaign.policy.trust, np.float64))

    def _of_total(self, server_round: int, total: Mapping[str, np.ndarray], *, count: int) -> Mapping[str, np.ndarray]:
        """What the sum of so many replies says, noised where it is the server that noises."""
        policy = self.campaign.policy
        self._check_enough(server_round, count)
        if policy.trust == "central":
            noised = noised_sum([total[SUM]], randomness=self._noise(server_round))
            return mean_of_sum(noised, policy=policy, round_number=server_round)
        if policy.trust == "distributed":
            return self._of_sums(server_round, {0: ring_sum([total[SUM]])})
        return mean_update([total], denominator=policy.cohort_size)

    def _check_enough(self, server_round: int, count: int) -> None:
        """Raise where a round has too few good replies."""
        policy, federation = self.campaign.policy, self.campaign.scenario.federation
        if policy.secure_sum and count < policy.secure_sum.min_survivors:
            raise VoidRoundError(
                f"round {server_round} is void: a sum needs {policy.secure_sum.min_survivors} contributions, got "
                f"{count} (rejected: {dict(self.rejected) or 'none'})."
            )
        if count < federation.min_reply_share * policy.cohort_size:
            # A device gives what is not noised once: asking for the round again would bring its refusals. And one that
            # was killed in this round, or took another of its number for the real one, refuses it for ever.
            for_ever = sum(self.rejected[code] for code in _FOR_EVER)
            hopeless = policy.cohort_size - for_ever < federation.min_reply_share * policy.cohort_size
            too_few = VoidRoundError if policy.trust == "central" or hopeless else TooFewRepliesError
            raise too_few(
                f"round {server_round} needs {federation.min_reply_share:.0%} of {policy.cohort_size} replies, got "
                f"{count} (rejected: {dict(self.rejected) or 'none'}); the last checkpoint is kept."
            )

    def _advance(self, server_round: int, mean: Mapping[str, np.ndarray], answered: Iterable[int]) -> None:
        """Move the shared arrays along the mean change."""
        federation = self.campaign.scenario.federation
        arrays, optimizer = SERVER_OPTIMIZERS[federation.server_optimizer](
            self.checkpoint.arrays, self.checkpoint.optimizer, mean, federation
        )
        if not within_bound(arrays):
            raise CampaignError(
                f"the shared arrays must stay finite and within {MAX_ABS_VALUE:g} after round {server_round}; training "
                "diverged or a device sent poison. Lower the learning rates; the last checkpoint is kept."
            )
        self._finish(server_round, arrays, optimizer, answered)

    def void(self, server_round: int, reason: VoidRoundError) -> None:
        """End a round of which nothing may be used: the shared arrays stay, its number is never asked for again."""
        _log.warning("%s", reason)
        self.rejected["VOID"] += 1
        self.accepted = 0
        self._finish(server_round, self.checkpoint.arrays, self.checkpoint.optimizer, ())

    def _finish(self, server_round: int, arrays: Arrays, optimizer: OptimizerState, answered: Iterable[int]) -> None:
        latest = Counts(self.accepted, dict(self.rejected))
        self.checkpoint = Checkpoint(
            server_round,
            self._policy_sha256,
            arrays,
            optimizer,
            participations=_one_more(self.checkpoint.participations, self._cohort.values()),
            answered=_one_more(self.checkpoint.answered, answered),
            latest=latest,
            total=self.checkpoint.total + latest,
        )

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


def _by_seat(good: Iterable[tuple[int, Arrays]], asked: Iterable[int]) -> Iterator[tuple[int, Arrays]]:
    """Good replies by rising seat, each as soon as all asked before it are there; what comes early waits."""
    order = iter(sorted(asked))
    wanted, waiting = next(order, None), dict[int | None, tuple[int, Arrays]]()
    for seat, update in good:
        waiting[seat] = seat, update
        while wanted in waiting:
            yield waiting.pop(wanted)
            wanted = next(order, None)
    yield from sorted(waiting.values(), key=itemgetter(0))  # one before them never came


def _one_more(counts: Mapping[int, int], seats: Iterable[int]) -> dict[int, int]:
    return dict(counts) | {seat: counts.get(seat, 0) + 1 for seat in seats}
