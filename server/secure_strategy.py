"""The server's side of a round whose contributions it sees as one sum only: four stages, or none."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from server.aggregate import ring_sum
from server.gate import check_stage
from server.secure_sum import Collector
from server.strategy import EqualWeights
from shared.errors import SecureSumError, VoidRoundError
from shared.privacy.policy import SUM, num_values
from shared.protocol import wire
from shared.protocol.enrolment import check_device_signature
from shared.secure_sum.messages import Advert, Credential, Parcels, Setting, Shares, signed_message

_T = TypeVar("_T")


class SecureWeights(EqualWeights):
    """Equal weights over a secure sum; see ``EqualWeights``.

    Args:
        credentials: Seat -> what the operator certified; of every device of the roster.
        *positional: As of ``EqualWeights``.
        **named: As of ``EqualWeights``.

    Guarantee:
        Of contributions nothing but masked vectors and, of every group, the sum of at least ``min_survivors`` of them
        reaches this process, if fewer than ``threshold`` neighbours of a device tell it more.
    """

    def __init__(self, *positional: Any, credentials: Mapping[int, Credential], **named: Any) -> None:
        super().__init__(*positional, **named)
        self._credentials = credentials
        self._setting: Setting
        self._collectors: dict[int, Collector]  # of every sum that can still be opened, by group
        self._grid: Grid

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Exchange keys and shares among the cohort, then ask those who went along to train.

        Raises:
            VoidRoundError: Too few went along.
        """
        del arrays, config
        self._grid = grid
        self._begin(server_round, grid)
        policy = self.campaign.policy
        if policy.secure_sum is None:
            raise ValueError("a secure sum needs the policy's terms.")
        cohort = list(self._cohort.values())
        self._setting = Setting(
            policy_sha256=self._policy_sha256,
            round_number=server_round,
            coordinates=num_values(policy.turn_slots(server_round)),
        )
        groups: dict[int, dict[int, Credential]] = {}
        for seat in cohort:
            members = groups.setdefault(self._group[seat], {})
            if seat in self._credentials:
                members[seat] = self._credentials[seat]
        self._collectors = {
            group: Collector(
                self._setting, policy.secure_sum.terms, credentials=members, generator=np.random.default_rng()
            )
            for group, members in groups.items()
        }
        with _void(server_round, self.rejected):
            went_along = self._ask(
                server_round,
                wire.SECURE_KEYS,
                {seat: str(seat).encode() for seat in cohort},
                lambda seat, body: self._sum_of(seat).add_advert(seat, self._signed(seat, Advert.from_bytes(body))),
            )
            self._keep_sums(Collector.close_adverts)
            went_along = self._ask(
                server_round,
                wire.SECURE_SHARES,
                {seat: self._sum_of(seat).roster_for(seat).to_bytes() for seat in self._in_sums(went_along)},
                lambda seat, body: self._sum_of(seat).add_parcels(seat, Parcels.from_bytes(body)),
            )
            self._keep_sums(Collector.close_parcels)
            bodies = {seat: self._sum_of(seat).parcels_for(seat).to_bytes() for seat in self._in_sums(went_along)}
        self._check_faults(server_round)
        return self._requests(server_round, bodies)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Open the sum of the masked contributions, and move the shared arrays.

        Raises:
            VoidRoundError: Too few contributed, or too few helped to open the sum.
            CampaignError: As of ``EqualWeights``.
        """
        with _void(server_round, self.rejected):
            for seat, update in self._accept(server_round, replies):
                with self._counting():
                    self._sum_of(seat).add_masked(seat, update[SUM])
            self._check_faults(server_round)
            told = self._keep_sums(_survivors)
            self._ask(
                server_round,
                wire.SECURE_UNMASK,
                {seat: body for each in told.values() for seat, body in sorted(each.items())},
                lambda seat, body: self._sum_of(seat).add_shares(seat, Shares.from_bytes(body)),
            )
            self._check_faults(server_round)
            totals = {group: ring_sum([total]) for group, total in self._keep_sums(Collector.total).items()}
        survivors = sorted(seat for group in totals for seat in told[group])
        self.accepted = len(survivors)
        self._advance(server_round, self._of_sums(server_round, totals), survivors)
        return None, None

    def _sum_of(self, seat: int) -> Collector:
        """The sum that a seat is in; SecureSumError (``STAGE``) where it was given up."""
        collector = self._collectors.get(self._group[seat])
        if collector is None:
            raise SecureSumError(f"seat {seat} must be in a sum that can still be opened, it is not.", code="STAGE")
        return collector

    def _in_sums(self, seats: Iterable[int]) -> list[int]:
        """Those whose sum can still be opened."""
        return [seat for seat in seats if self._group[seat] in self._collectors]

    def _keep_sums(self, step: Callable[[Collector], _T]) -> dict[int, _T]:
        """Take a step of every sum; one that cannot take it is given up, and its devices' part of the round is void.

        Raises:
            SecureSumError: None is left.
        """
        found, failed = dict[int, _T](), None
        for group, collector in list(self._collectors.items()):
            try:
                found[group] = step(collector)
            except SecureSumError as error:
                failed = error
                del self._collectors[group]
        if failed is not None and not found:
            raise failed
        if failed is not None:
            self.rejected["GROUP"] = len(set(self._group.values())) - len(self._collectors)
        return found

    def _signed(self, seat: int, advert: Advert) -> Advert:
        """An advert its device has signed; another would make all its neighbours refuse. Simulated ones check alone."""
        known = self._credentials.get(seat)
        if known and known.public_key:
            message = signed_message(self._setting, advert.seat, advert.cipher_key, advert.mask_key)
            check_device_signature(known.public_key, message, advert.signature)
        return advert

    def _ask(
        self, server_round: int, kind: str, bodies: Mapping[int, bytes], take: Callable[[int, bytes], object]
    ) -> list[int]:
        """Send each seat its message of a stage, and take in the good answers; whose they were."""
        node_at = {seat: node for node, seat in self._cohort.items()}
        requests = [
            self._message(
                wire.pack_stage(body, round_number=server_round, policy_sha256=self._policy_sha256),
                node_at[seat],
                kind,
                server_round,
            )
            for seat, body in bodies.items()
        ]
        timeout_s = self.campaign.scenario.federation.round_timeout_s
        replies = self._grid.send_and_receive(requests, timeout=timeout_s)
        good = []
        for seat, reply in self._from(bodies, server_round, replies):
            with self._counting():
                body = check_stage(
                    reply,
                    policy_sha256=self._policy_sha256,
                    round_number=server_round,
                    accept_seeded=self._accept_seeded,
                )
                take(seat, body)
                good.append(seat)
        return good


def _survivors(collector: Collector) -> dict[int, bytes]:
    """What everybody whose vector is in a sum is told before it is opened."""
    return {seat: collector.survivors_for(seat).to_bytes() for seat in sorted(collector.survivors)}


@contextmanager
def _void(server_round: int, rejected: Mapping[str, int]) -> Iterator[None]:
    """What a secure sum cannot go on with makes its round void."""
    try:
        yield
    except SecureSumError as error:
        raise VoidRoundError(f"round {server_round} is void: {error} (rejected: {dict(rejected) or 'none'})") from None
