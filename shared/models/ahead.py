"""What of a head's first block is frozen, run once for every text: a training step begins behind it.

    hidden ─ attention ─ feed-forward ─ x ─┬─ W x ─(+ residual)─┐
                                           └─ A x ─── B ────────(+)─ norm ─ next block
             \\______________________ frozen ____________________/

Where LoRA is on the last product of the block alone, all of it but B (and A, where A is trained) is a function of the
text and of public tensors. It is computed in float32 once, and every step gives what it gave without it, up to the
order of a sum.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from shared.models.features import Features
from shared.models.products import FrozenLinear, in_float32

_MOST_BYTES = 2**30  # of what is kept: more would be worse than to compute it again
_BATCH_TEXTS = 64


@runtime_checkable
class SplitFamily(Protocol):
    """A model family whose blocks can be stopped before their last product; a family need not be one."""

    def last_product(self, block: nn.Module) -> nn.Module:
        """The linear layer whose output, added to the residual, is what the block ends with."""

    def until_last(self, model: nn.Module, block: nn.Module, hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden (B, T, d) and mask (B, T) -> what that layer reads (B, T, m), and the residual (B, T, d)."""

    def after_last(self, model: nn.Module, block: nn.Module, summed: Tensor) -> Tensor:
        """That layer's output plus the residual (B, T, d) -> output of the block (B, T, d)."""


@dataclass(frozen=True)
class Ahead:
    """The frozen start of one block.

    Attributes:
        family: Of the base.
        model: The base's.
        block: A head's first.
        layer: Its last product, with LoRA on it.
        width: Of what is kept for a token: the frozen sum (d), and what the first trained factor reads.
    """

    family: SplitFamily
    model: nn.Module
    block: nn.Module
    layer: LoraLinear
    width: int

    def start(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """What enters the block (B, T, d), with mask (B, T) -> what is kept (B, T, width)."""
        read, residual = self.family.until_last(self.model, self.block, hidden, mask)
        frozen = self.layer.base_layer(read) + residual  # (B, T, d)
        first, _ = _factors(self.layer)
        return torch.cat([frozen, read if first.weight.requires_grad else first(read)], dim=2)

    def finish(self, kept: Tensor) -> Tensor:
        """What is kept (B, T, width) -> output of the block (B, T, d), with gradients of what is trained."""
        first, second = _factors(self.layer)
        width = second.out_features
        frozen, read = kept[:, :, :width], kept[:, :, width:]
        low = first(read) if first.weight.requires_grad else read  # (B, T, r)
        scaling = float(self.layer.scaling["default"])
        return self.family.after_last(self.model, self.block, frozen + second(low) * scaling)


def find_ahead(family: object, model: nn.Module, block: nn.Module) -> Ahead | None:
    """The frozen start of a head's first block; None where training reaches further down, or nobody can tell.

    Args:
        family: Of the base.
        model: The base's.
        block: With the adapter on it, and marked what of it is trained.
    """
    if not isinstance(family, SplitFamily):
        return None
    layer = family.last_product(block)
    if not isinstance(layer, LoraLinear) or not _is_plain(layer):
        return None
    first, second = _factors(layer)
    inside = {id(first.weight), id(second.weight)}
    if not second.weight.requires_grad or any(p.requires_grad and id(p) not in inside for p in block.parameters()):
        return None
    read = first.in_features if first.weight.requires_grad else first.out_features
    return Ahead(family, model, block, layer, second.out_features + read)


def run_ahead(ahead: Ahead, features: Features, *, device: torch.device) -> Features | None:
    """Run the frozen start over texts, in batches of like length; None where it would take too much memory.

    Args:
        ahead: The frozen start.
        features: What enters the block, one array (T, d) a text.
        device: Where the block lies.
    """
    if int(features.lengths.sum()) * ahead.width * np.dtype(np.float32).itemsize > _MOST_BYTES:
        return None
    order = np.argsort(features.lengths, kind="stable")
    found: dict[int, np.ndarray] = {}
    with torch.no_grad(), in_float32(ahead.block):
        for begin in range(0, len(order), _BATCH_TEXTS):
            rows = order[begin : begin + _BATCH_TEXTS]
            hidden, mask = features.batch(rows)
            kept = ahead.start(hidden.to(device), mask.to(device)).cpu().numpy()
            found.update((int(row), kept[i, : features.lengths[row]].copy()) for i, row in enumerate(rows))
    return Features([found[row] for row in range(len(features))])


def _factors(layer: LoraLinear) -> tuple[nn.Linear, nn.Linear]:
    """A (r, m) and B (d, r), as peft keeps them."""
    first, second = cast(Any, layer.lora_A)["default"], cast(Any, layer.lora_B)["default"]
    return first, second


def _is_plain(layer: LoraLinear) -> bool:
    """Whether the layer gives W x + b + scaling B A x and nothing else."""
    return (
        type(layer) is LoraLinear
        and list(layer.lora_A) == ["default"]
        and all(type(each) is nn.Linear for each in _factors(layer))
        and type(layer.base_layer) in (nn.Linear, FrozenLinear)
        and all(factor.bias is None for factor in _factors(layer))
        and not any(getattr(each, "p", 0.0) for each in layer.lora_dropout.values())
        and not layer.lora_variant
        and not layer.merged
        and not layer.disable_adapters
    )
