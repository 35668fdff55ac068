"""A head's tensors as named, checked arrays, and the public start of a campaign.

Every tensor of the head is of one kind: *frozen* (the base's blocks), *public* (part of the campaign's start, computed
from public texts or a public seed, the same for everyone, never trained) or *trainable* with a scope. Only arrays of
scope ``global`` have a way to the wire; the private output layer (client/personal/personalize.py) is no part of it.
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
from shared.heads.head import Head
from shared.heads.lora import part_of
from shared.models.features import Features

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


def _named(head: Head, kind: Literal["shared", "private", "start"]) -> dict[str, nn.Parameter]:
    """Parameters that are shared, trained and kept, or of the public start (trained or not), by wire name, sorted."""
    known = _NAMED.setdefault(head, {})  # a walk over all modules, and a device's round would take four
    if kind not in known:
        parts = {"shared": head.trained.shared, "private": frozenset(head.trained.private), "start": None}[kind]
        found = {}
        for name, parameter in head.named_parameters():
            of_start = "lora_" in name or not name.startswith("blocks.")
            if of_start and (parts is None or part_of(name) in parts):
                found[wire_name(name, first_block=head.first_block)] = parameter
        known[kind] = dict(sorted(found.items()))
    return known[kind]


_NAMED: WeakKeyDictionary[Head, dict[str, dict[str, nn.Parameter]]] = WeakKeyDictionary()


def shared_parameters(head: Head) -> dict[str, nn.Parameter]:
    """The parameters that travel, by wire name, in the order of the slots."""
    return _named(head, "shared")


def private_parameters(head: Head) -> dict[str, nn.Parameter]:
    """The parameters that are trained in the step of the shared ones and never leave a device, by wire name."""
    return _named(head, "private")


def trained_slots(head: Head) -> tuple[Slot, ...]:
    """Name, shape, dtype and scope of every tensor a campaign trains: the shared ones, then those a device keeps."""
    shared = (
        Slot(name, tuple(p.shape), "float32", "persona" if part_of(name) == "persona" else "global")
        for name, p in shared_parameters(head).items()
    )
    private = (Slot(name, tuple(p.shape), "float32", "private") for name, p in private_parameters(head).items())
    return (*shared, *private)


def shared_slots(head: Head) -> tuple[Slot, ...]:
    """Name, shape, dtype and scope of every tensor that travels, in a fixed order."""
    return tuple(slot for slot in trained_slots(head) if slot.scope != "private")


def read_shared(head: Head) -> Arrays:
    """Copy the tensors that travel out of the head."""
    return _read(shared_parameters(head))


def load_shared(head: Head, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy the tensors that travel into the head.

    Raises:
        CampaignError: Names, order, shapes or dtypes are not the head's, or a value is not finite.
    """
    _load(shared_parameters(head), arrays)


def read_private(head: Head) -> Arrays:
    """Copy the tensors a device keeps out of the head."""
    return _read(private_parameters(head))


def load_private(head: Head, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy the tensors a device keeps into the head; errors as of ``load_shared``."""
    _load(private_parameters(head), arrays)


def forget_device(head: Head) -> None:
    """Put the tensors a device keeps back to zero and weigh the personas alike, as every device begins."""
    with torch.no_grad():
        for parameter in private_parameters(head).values():
            parameter.zero_()
    head.weigh_alike()


def _read(parameters: Mapping[str, nn.Parameter]) -> Arrays:
    return {name: p.detach().cpu().numpy().copy() for name, p in parameters.items()}


def _load(parameters: Mapping[str, nn.Parameter], arrays: Mapping[str, np.ndarray]) -> None:
    check_arrays(arrays, [Slot(name, tuple(p.shape), "float32", "global") for name, p in parameters.items()])
    with torch.no_grad():
        for name, parameter in parameters.items():
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

    Personas, a user's factors and an output that stays frozen start at random: equal personas would never part, and
    below an output of zero nothing learns. Soft tokens start as hidden states of drawn words.

    Args:
        head: A fresh head; left with the start loaded.
        public: Backbone outputs of the texts the policy names as public.
        ridge: Of the whitening, where the head has one (``RatingHead.whiten``).
        seed: Public seed of what is drawn.

    Raises:
        ScenarioError: Too few public texts for this head.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in _named(head, "start").items():
            spread = head.drawn_at_start(part_of(name))
            if name.endswith("lora_A"):
                drawn = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
                parameter.copy_(drawn)
            elif spread:
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    head.start_prompt(generator)
    head.whiten(public, ridge=ridge)  # last: soft tokens move what it reads
    return read_start(head)


def read_start(head: Head) -> Arrays:
    """Copy every tensor of the public start out of the head."""
    return _read(_named(head, "start"))


def load_start(head: Head, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy a public start into the head.

    Raises:
        CampaignError: It is not a start of this head.
    """
    _load(_named(head, "start"), arrays)
