"""Kernel features: how near a text is to each public text, in orthonormal coordinates that one clipping bound suits."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.config import AdapterConfig
from shared.errors import ScenarioError

ANCHORS = "kernel.anchors"  # in a public start
SMALLEST_NORM = 1e-6  # a text nearer to the centre has no direction; its cosines go to zero with it
_RIDGE = 1e-6  # share of the largest eigenvalue added to every one: directions without spread stay finite
_ROWS = 1024  # whose kernel values are in memory at once


class Kernel(nn.Module):
    """k(x, z) = sum_j weight_j exp((cos(x, z) - 1) / width_j) between a text and the public ones, the anchors.

    Cosines are of features centred on the public texts' mean. A narrow width tells the very text from all others, a
    wide one spreads over similar ones. The features are those of Nyström's approximation, of mean zero over the public
    texts: their inner products are the doubly centred kernel, up to the directions left out. Centring takes the
    direction away in which all texts are alike; it would outweigh the others, and is what the constant feature is for.

    Args:
        width: Of pooled features (d).
        public_texts: How many anchors (M).
        adapter: Number of features (q, at most M - 1), the kernel's constants, and the features' scale.

    Raises:
        ScenarioError: More features are wanted than there are.

    Source:
        Williams and Seeger 2001, "Using the Nyström method to speed up kernel machines", section 2; centring as in
        Schölkopf, Smola and Müller 1998, "Nonlinear component analysis as a kernel eigenvalue problem", appendix B.
    """

    def __init__(self, width: int, public_texts: int, adapter: AdapterConfig) -> None:
        super().__init__()
        count = public_texts - 1 if adapter.kernel_features == "all" else adapter.kernel_features
        if not 1 <= count < public_texts:
            raise ScenarioError(
                f"adapter.kernel_features must be below the number of public texts {public_texts}, "
                f"got {adapter.kernel_features}."
            )
        self.widths, self.weights, self._scale = adapter.kernel_widths, adapter.kernel_weights, adapter.kernel_scale
        self.anchors = nn.Parameter(torch.zeros(public_texts, width), requires_grad=False)
        self.projection = nn.Parameter(torch.zeros(public_texts, count), requires_grad=False)
        self.offset = nn.Parameter(torch.zeros(count), requires_grad=False)

    def values(self, centred: Tensor) -> Tensor:
        """Centred pooled features (B, d) -> kernel with every anchor (B, M)."""
        unit = F.normalize(centred, dim=1, eps=SMALLEST_NORM)
        below = unit @ self.anchors.to(unit.dtype).T - 1.0  # (B, M)
        terms = [weight * torch.exp(below / width) for width, weight in zip(self.widths, self.weights, strict=True)]
        return torch.stack(terms).sum(0)

    def forward(self, centred: Tensor) -> Tensor:
        """Centred pooled features (B, d) -> kernel features (B, q)."""
        return self.combine(centred, self.projection) - self.offset

    def combine(self, centred: Tensor, columns: Tensor) -> Tensor:
        """Centred pooled features (B, d) -> kernel values times columns (M, .), as (B, .)."""
        return torch.cat([self.values(rows) @ columns for rows in torch.split(centred, _ROWS)])

    @torch.no_grad()
    def fit(self, centred: np.ndarray) -> None:
        """Take the public texts' centred pooled features (M, d) float64 for anchors."""
        unit = F.normalize(torch.from_numpy(centred), dim=1, eps=SMALLEST_NORM)
        self.anchors.copy_(unit)
        gram = self.values(unit)  # (M, M)
        means = gram.mean(0)
        variances, directions = torch.linalg.eigh(gram - means - means[:, None] + means.mean())  # ascending
        count = len(self.offset)
        leading, directions = variances.flip(0)[:count], directions.flip(1)[:, :count]
        projection = directions * self._scale / torch.sqrt(leading.clamp(min=0.0) + _RIDGE * leading[0])
        projection -= projection.mean(0)  # where public texts share their features, null directions are not centred
        self.projection.copy_(projection)
        self.offset.copy_(means @ projection)
