"""A head's tensors as named, checked arrays, and the public start of a campaign.

Every tensor of the head is of one kind: *frozen* (the base's blocks), *public* (part of the campaign's start, computed
from public texts or a public seed, the same for everyone, never trained) or *trainable* with a scope. Only arrays of
scope ``global`` have a way to the wire; the private output layer (client/personalize.py) is not part of this module.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from shared.errors import CampaignError
from shared.features import Features
from shared.head import Head

Scope = Literal["global", "persona", "private"]
Arrays = dict[str, np.ndarray]

MAX_ABS_VALUE = 16.0  # of a shared tensor; trained ones stay below 10


@dataclass(frozen=True)
class Slot:
    """One trainable tensor: its name on the wire, shape, dtype and who may see it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scope: Scope


def wire_name(parameter_name: str, *, first_block: int) -> str:
    """Peft's parameter name -> the name used on the wire and in files, with the block's absolute number."""
    parts = parameter_name.replace(".default.weight", "").split(".")
    if parts[0] == "blocks":
        parts[:2] = ["block", str(int(parts[1]) + first_block)]
    return ".".join(parts)


def _named(head: Head, *, trainable: bool) -> dict[str, nn.Parameter]:
    """Trainable parameters, or those of the public start (trainable or not), by wire name in a fixed order."""
    known = _NAMED.setdefault(head, {})  # a walk over all modules, and a device's round would take four
    if trainable not in known:
        found = {}
        for name, parameter in head.named_parameters():
            of_start = "lora_" in name or not name.startswith("blocks.")
            if parameter.requires_grad if trainable else of_start:
                found[wire_name(name, first_block=head.first_block)] = parameter
        known[trainable] = dict(sorted(found.items()))
    return known[trainable]


_NAMED: WeakKeyDictionary[Head, dict[bool, dict[str, nn.Parameter]]] = WeakKeyDictionary()


def shared_parameters(head: Head) -> dict[str, nn.Parameter]:
    """The trainable parameters by wire name, in the order of the slots."""
    return _named(head, trainable=True)


def shared_slots(head: Head) -> tuple[Slot, ...]:
    """Name, shape, dtype and scope of every trainable tensor, in a fixed order."""
    return tuple(Slot(n, tuple(p.shape), "float32", "global") for n, p in shared_parameters(head).items())


def read_shared(head: Head) -> Arrays:
    """Copy the trainable tensors out of the head."""
    return {name: p.detach().cpu().numpy().copy() for name, p in shared_parameters(head).items()}


def load_shared(head: Head, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy trainable tensors into the head.

    Raises:
        CampaignError: Names, order, shapes or dtypes are not the head's, or a value is not finite.
    """
    check_arrays(arrays, shared_slots(head))
    with torch.no_grad():
        for name, parameter in shared_parameters(head).items():
            parameter.copy_(torch.from_numpy(np.array(arrays[name])))


def within_bound(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether every value is finite and at most ``MAX_ABS_VALUE`` in size.

    A server that sends huge values can make predictions pure rounding error; which error depends on who shares a batch.
    An owner's device takes every record alone, so that nobody shares one; a simulation batches.
    """
    return all(bool((np.abs(array) <= MAX_ABS_VALUE).all()) for array in arrays.values())  # NaN fails


def check_arrays(arrays: Mapping[str, np.ndarray], slots: Sequence[Slot]) -> None:
    """Raise ``CampaignError`` unless the arrays are exactly these slots, in their order, and finite."""
    wanted = [slot.name for slot in slots]
    if list(arrays) != wanted:
        raise CampaignError(f"arrays must be {wanted} in this order, got {list(arrays)}.")
    for slot in slots:
        array = arrays[slot.name]
        if array.shape != slot.shape or array.dtype != np.dtype(slot.dtype):
            raise CampaignError(
                f"{slot.name} must be {slot.dtype} of shape {slot.shape}, got {array.dtype} of shape {array.shape}."
            )
        if not np.isfinite(array).all():
            raise CampaignError(f"{slot.name} must be finite, got NaN or infinity.")


def make_start(head: Head, public: Features, *, ridge: float, seed: int) -> Arrays:
    """Compute the campaign's public start: whitening and kernel of public texts, LoRA A of a public seed, else zeros.

    Args:
        head: A fresh head; left with the start loaded.
        public: Backbone outputs of the texts the policy names as public.
        ridge: Of the whitening, where the head has one (``RatingHead.whiten``).
        seed: Public seed of LoRA's A.

    Raises:
        ScenarioError: Too few public texts for this head.
    """
    head.whiten(public, ridge=ridge)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in _named(head, trainable=False).items():
            if name.endswith("lora_A"):
                drawn = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
                parameter.copy_(drawn)
    return read_start(head)


def read_start(head: Head) -> Arrays:
    """Copy every tensor of the public start out of the head."""
    return {name: p.detach().cpu().numpy().copy() for name, p in _named(head, trainable=False).items()}


def load_start(head: Head, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy a public start into the head.

    Raises:
        CampaignError: It is not a start of this head.
    """
    parameters = _named(head, trainable=False)
    check_arrays(arrays, [Slot(n, tuple(p.shape), "float32", "global") for n, p in parameters.items()])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(arrays[name])))
