"""Bound how much one sample can move a sum of gradients, and how far one update can move the mean."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

_ROUNDING_MARGIN = 1e-5  # far more than norm, factor and product can lose to rounding
_SMALLEST_FACTOR = torch.finfo(torch.float32).tiny


@torch.no_grad()
def clipped_sum(per_sample: Sequence[torch.Tensor], *, clip_norm: float, grid: float) -> list[torch.Tensor]:
    """Clip every sample over all tensors jointly, round it to a grid, then sum over the samples, in integers.

    Args:
        per_sample: One floating tensor per parameter, shape (n, *parameter), the same n for all, 0
            included. Left as they are.
        clip_norm: Bound C on the L2 norm of one sample's contribution, in gradient units; finite and > 0.
        grid: Step of the grid in gradient units; finite, > 0, and far below C / sqrt(number of coordinates).

    Returns:
        One int64 tensor per parameter without the leading n: the sum in steps of the grid. A sample that
        holds NaN or inf contributes exactly zero, and so does one whose norm is beyond 1e38 times C.

    Raises:
        ValueError: ``clip_norm`` or ``grid`` is impossible, a tensor is not floating, or n differs.

    Guarantee:
        Adding or removing one sample moves the returned vector, times ``grid``, by at most ``clip_norm``: each
        sample is rounded on its own and integers are summed without rounding (up to 2^53).

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1. We scale by min(1, r / norm) with r = C (1 - 1e-5) minus the
        half diagonal of a grid cell, so that rounding cannot carry a sample past C.

    Example:
        >>> gradients = torch.tensor([[3.0, 4.0], [0.0, 0.5], [torch.nan, 1.0]])
        >>> [total] = clipped_sum([gradients], clip_norm=1.0, grid=2**-20)
        >>> [round(x * 2**-20, 3) for x in total.tolist()]
        [0.6, 1.3]
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm must be finite and > 0, got {clip_norm}.")
    if not per_sample or any(x.ndim == 0 or not x.is_floating_point() for x in per_sample):
        raise ValueError("per_sample must hold floating tensors of shape (n, *parameter), at least one.")
    counts = {x.shape[0] for x in per_sample}
    if len(counts) != 1:
        raise ValueError(f"per_sample must have the same number of samples in every tensor, got {sorted(counts)}.")
    (count,) = counts
    # float64, so that squares neither overflow nor lose the small ones in a long sum
    rows = [x.reshape(count, math.prod(x.shape[1:])).to(torch.float64) for x in per_sample]  # (n, p_i)
    radius = clip_norm * (1 - _ROUNDING_MARGIN) - grid * math.sqrt(sum(x.shape[1] for x in rows)) / 2
    if not (math.isfinite(grid) and grid > 0 and radius > clip_norm / 2):
        raise ValueError(f"grid must be > 0 and so fine that rounding a sample moves it little, got {grid}.")
    norms = torch.stack([torch.linalg.vector_norm(x, dim=1) for x in rows]).norm(dim=0)  # (n,)
    factors = (radius / norms).clamp(max=1.0)
    usable = factors >= _SMALLEST_FACTOR  # False for NaN
    if not bool(usable.all()):  # 0 * NaN is NaN: the rows themselves must go
        factors = factors.where(usable, 0.0)
        rows = [x.where(usable[:, None], 0.0) for x in rows]
    scale = (factors / grid)[:, None]
    return [
        (x * scale).round_().sum(0).to(torch.int64).reshape(original.shape[1:])
        for x, original in zip(rows, per_sample, strict=True)
    ]


def clip_by_norm(update: Mapping[str, np.ndarray], *, clip_norm: float) -> tuple[dict[str, np.ndarray], float]:
    """Scale an update so that its global L2 norm is at most ``clip_norm``.

    Args:
        update: Parameter name -> array, any shape. Read as one long vector.
        clip_norm: Bound on the L2 norm, in parameter units; finite and > 0.

    Returns:
        The scaled update (same names, shapes, dtypes) and its norm before scaling.

    Raises:
        ValueError: ``clip_norm`` is not finite and positive, or the update holds NaN or inf.

    Guarantee:
        The returned norm is <= ``clip_norm``, up to float32 rounding.

    Source:
        McMahan et al. 2018, arXiv:1710.06963, Algorithm 1 (FlatClip).

    Example:
        >>> clipped, norm = clip_by_norm({"w": np.array([6.0, 8.0])}, clip_norm=5.0)
        >>> norm, clipped["w"].tolist()
        (10.0, [3.0, 4.0])
    """
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"clip_norm must be finite and > 0, got {clip_norm}.")
    norm = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in update.values()))
    if not math.isfinite(norm):
        raise ValueError("update must be finite, got NaN or inf; drop this client for the round.")
    scale = min(1.0, clip_norm / norm) if norm > 0 else 1.0
    return {name: (x * scale).astype(x.dtype) for name, x in update.items()}, norm
