"""A device's stages of a secure sum: keys, shares, its masked contribution, and what opens the sum.

What a device must remember from one message to the next lives in memory alone: one that is started again in the middle
of a round has dropped out of it.
"""

import numpy as np

from client.training.device import Device
from client.training.secure_sum import Participant
from shared.errors import RefusedError
from shared.privacy.policy import num_values
from shared.protocol.campaign import Campaign
from shared.protocol.wire import Request
from shared.secure_sum.messages import Parcels, Roster, Setting, Survivors

_MOST_SEAT_BYTES = 10


def advertise(body: bytes, round_number: int, campaign: Campaign, device: Device) -> bytes:
    """Begin a round with new keys.

    Args:
        body: The seat the server knows this device by, in decimal digits; its certificate proves it at the next stage.
    """
    policy = campaign.policy
    if not (body.isdigit() and len(body) <= _MOST_SEAT_BYTES):
        raise RefusedError("SCHEMA")
    if policy.secure_sum is None or not 1 <= round_number <= policy.rounds:
        raise RefusedError("ROUND")
    device.ready(campaign, round_number)
    seat = int(body)
    participant = Participant.begin(
        Setting(
            policy_sha256=policy.sha256,
            round_number=round_number,
            coordinates=num_values(policy.turn_slots(round_number)),
        ),
        seat=seat,
        terms=policy.secure_sum.terms,
        sign=device.signer(campaign, seat),
    )
    device.keep(campaign, round_number, participant.to_bytes())
    return participant.advert.to_bytes()


def share(body: bytes, round_number: int, campaign: Campaign, device: Device) -> bytes:
    """Check who takes part, and seal a share of this device's secrets for each of its neighbours."""
    participant = Participant.from_bytes(device.kept(campaign, round_number))
    roster = Roster.from_bytes(body)
    if len(roster.seats) > campaign.policy.sum_size:  # seats that nobody shows a certificate of
        raise RefusedError("ROSTER")
    parcels = participant.share(roster, verify=device.verifier(campaign))
    device.keep(campaign, round_number, participant.to_bytes())
    return parcels.to_bytes()


def expect(request: Request, campaign: Campaign, device: Device) -> None:
    """Refuse a request to train that could not be masked, before the round is spent on it."""
    participant = Participant.from_bytes(device.kept(campaign, request.round_number))
    if not participant.masked:
        participant.opened(Parcels.from_bytes(request.body))


def mask(vector: np.ndarray, request: Request, campaign: Campaign, device: Device) -> np.ndarray:
    """A noised contribution (P,) int64 under this round's masks, (P,) uint32."""
    participant = Participant.from_bytes(device.kept(campaign, request.round_number))
    masked = participant.mask(vector, Parcels.from_bytes(request.body))
    device.keep(campaign, request.round_number, participant.to_bytes())
    return masked


def unmask(body: bytes, round_number: int, campaign: Campaign, device: Device) -> bytes:
    """Hand over what opens the sum of the survivors, once."""
    participant = Participant.from_bytes(device.kept(campaign, round_number))
    shares = participant.unmask(Survivors.from_bytes(body))
    device.keep(campaign, round_number, participant.to_bytes())
    return shares.to_bytes()
