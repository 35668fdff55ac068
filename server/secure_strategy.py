"""The server's side of a round whose contributions it sees as one sum only: four stages, or none."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from server.aggregate import mean_of_sum, ring_sum
from server.gate import check_stage
from server.secure_sum import Collector
from server.strategy import EqualWeights
from shared import wire
from shared.enrolment import check_device_signature
from shared.errors import SecureSumError, VoidRoundError
from shared.policy import SUM, num_values
from shared.secure_sum import Advert, Credential, Parcels, Setting, Shares, signed_message


class SecureWeights(EqualWeights):
    """Equal weights over a secure sum; see ``EqualWeights``.

    Args:
        credentials: Seat -> what the operator certified; of every device of the roster.
        positional, named: As of ``EqualWeights``.

    Guarantee:
        Of contributions nothing but masked vectors and the sum of at least ``min_survivors`` of them reaches this
        process, if fewer than ``threshold`` neighbours of a device tell it more.
    """

    def __init__(self, *positional: Any, credentials: Mapping[int, Credential], **named: Any) -> None:
        super().__init__(*positional, **named)
        self._credentials = credentials
        self._setting: Setting
        self._collector: Collector
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
        self._collector = collector = Collector(
            self._setting,
            policy.secure_sum.terms,
            credentials={seat: self._credentials[seat] for seat in cohort if seat in self._credentials},
            generator=np.random.default_rng(),
        )
        with _void(server_round, self.rejected):
            went_along = self._ask(
                server_round,
                wire.SECURE_KEYS,
                {seat: str(seat).encode() for seat in cohort},
                lambda seat, body: collector.add_advert(seat, self._signed(seat, Advert.from_bytes(body))),
            )
            collector.close_adverts()
            went_along = self._ask(
                server_round,
                wire.SECURE_SHARES,
                {seat: collector.roster_for(seat).to_bytes() for seat in went_along},
                lambda seat, body: collector.add_parcels(seat, Parcels.from_bytes(body)),
            )
            collector.close_parcels()
            bodies = {seat: collector.parcels_for(seat).to_bytes() for seat in went_along}
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
        collector = self._collector
        with _void(server_round, self.rejected):
            for seat, update in self._accept(server_round, replies).items():
                with self._counting():
                    collector.add_masked(seat, update[SUM])
            self._check_faults(server_round)
            survivors = sorted(collector.survivors)
            self._ask(
                server_round,
                wire.SECURE_UNMASK,
                {seat: collector.survivors_for(seat).to_bytes() for seat in survivors},
                lambda seat, body: collector.add_shares(seat, Shares.from_bytes(body)),
            )
            self._check_faults(server_round)
            total = collector.total()
        self.accepted = len(survivors)
        mean = mean_of_sum(ring_sum([total]), policy=self.campaign.policy, round_number=server_round)
        self._advance(server_round, mean, survivors)
        return None, None

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


@contextmanager
def _void(server_round: int, rejected: Mapping[str, int]) -> Iterator[None]:
    """What a secure sum cannot go on with makes its round void."""
    try:
        yield
    except SecureSumError as error:
        raise VoidRoundError(f"round {server_round} is void: {error} (rejected: {dict(rejected) or 'none'})") from None
