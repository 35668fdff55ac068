"""Per-sample gradients: Opacus' hooks, linear layers multiplied the way that suits thin ones such as LoRA factors."""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from opacus import GradSampleModule
from torch import Tensor, nn


def linear_grad_sample(layer: nn.Linear, activations: Sequence[Tensor], backprops: Tensor) -> dict[Tensor, Tensor]:
    """Gradient of every sample's loss by a linear layer, one batched product.

    Args:
        layer: Its weight is (out, in).
        activations: What went in, (n, ..., in), as a sequence of one.
        backprops: Gradient by what came out, (n, ..., out).

    Returns:
        Parameter that trains -> (n, *parameter).

    Source:
        As Opacus' own sampler (Goodfellow 2015, arXiv:1510.01799, before the norm is taken). The longer side of the
        result lies along memory, which for a LoRA factor of rank 4 is several times as fast.
    """
    x, g = (_positions(each.to(backprops.dtype)) for each in (activations[0], backprops))  # (n, T, in), (n, T, out)
    found: dict[Tensor, Tensor] = {}
    if layer.weight.requires_grad:
        wide = x.shape[2] >= g.shape[2]
        found[layer.weight] = torch.bmm(g.mT, x) if wide else torch.bmm(x.mT, g).mT
    if layer.bias is not None and layer.bias.requires_grad:
        found[layer.bias] = g.sum(1)
    return found


def _positions(each: Tensor) -> Tensor:
    """(n, ..., d) -> (n, T, d), one position where there is none."""
    return each.reshape(len(each), math.prod(each.shape[1:-1]), each.shape[-1])


class PerSample(GradSampleModule):  # type: ignore[misc]
    """A module whose parameters get ``grad_sample``, (n, *parameter); its table of samplers is its own.

    Opacus' table is of the process: what is registered there would be everybody's.
    """

    GRAD_SAMPLERS: ClassVar[dict[type[nn.Module], Callable[..., Any]]] = {
        **GradSampleModule.GRAD_SAMPLERS,
        nn.Linear: linear_grad_sample,
    }
