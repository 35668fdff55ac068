"""A device's own place in a round: the tensors it keeps and the persona it is of, before training and after."""

from typing import cast

import numpy as np

from client.personal.persona import choose_persona, declared_persona, one_persona, persona_losses
from client.training.device import Device
from client.training.site import Workbench
from shared.errors import CampaignError, RefusedError
from shared.heads.adapter import Arrays, forget_device, load_private, load_shared, private_parameters, read_private
from shared.heads.rating import RatingHead
from shared.heads.tasks import Targets
from shared.models.features import Features
from shared.privacy.noise import Randomness
from shared.protocol.wire import Request

_CHOICE = "persona"


def take_place(
    bench: Workbench,
    request: Request,
    features: Features,
    targets: Targets,
    *,
    device: Device,
    randomness: Randomness,
) -> Arrays:
    """Load what the device kept into the head, and let the head be of the device's persona.

    Args:
        bench: The campaign's; its head is changed.
        request: Shared arrays and round.
        features: Prepared backbone outputs of the device's records.
        targets: What they are to predict.
        device: Whose state and profile.
        randomness: Of a choice that has a price.

    Returns:
        What is to be kept beside the private tensors: a choice that is made once.

    Raises:
        RefusedError: ``STORE``: what was kept is not of this campaign, or is gone with a choice that is made once.
    """
    campaign, head = bench.campaign, bench.head
    policy, persona = campaign.policy, campaign.scenario.persona
    if not policy.private and not persona.count:
        return {}
    kept = device.state(campaign, request.round_number)
    if kept:
        try:
            load_private(head, {name: kept[name] for name in private_parameters(head)})
        except (CampaignError, KeyError):
            raise RefusedError("STORE") from None
    else:
        forget_device(head)
    if not persona.count:
        return {}
    rating = cast(RatingHead, head)
    if persona.choice == "declared":
        choice = declared_persona(device.profile(campaign), persona)
    elif policy.choice_epsilon is not None and kept:
        choice = int(kept[_CHOICE].item())
    else:
        load_shared(head, request.arrays)
        losses = persona_losses(rating, features, targets, micro_batch=device.micro_batch(campaign))
        choice = choose_persona(losses, policy=policy, bound=persona.loss_bound, randomness=randomness)
    rating.membership = one_persona(choice, persona.count)
    return {_CHOICE: np.array([choice])} if policy.choice_epsilon is not None else {}


def keep_place(bench: Workbench, request: Request, once: Arrays, *, device: Device) -> None:
    """Keep the private tensors as training left them, and what is chosen once, before anything is sent."""
    state = read_private(bench.head) | once
    if state:
        device.keep_state(bench.campaign, request.round_number, state)
