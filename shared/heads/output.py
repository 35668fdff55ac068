"""A linear output on pooled features, with what stands beside it: a kernel, personas, a user's vector."""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from shared.config import Scenario
from shared.errors import ScenarioError
from shared.heads.head import Head
from shared.heads.lora import trained_parts
from shared.models.features import Features
from shared.models.kernel import Kernel
from shared.models.model import Base

_NO_KERNEL = np.zeros(0, dtype=np.float32)
_FROZEN_OUTPUT = 0.5  # spread of predictions, about the centre, of an output that stays at its public start
FACTOR_SPREAD = 0.3  # of what a user's vector reads of the public texts, at the start
_LARGEST_FACTOR = 8.0  # entry of that start: devices refuse shared values that are twice as large


class OutputLayer(NamedTuple):
    """Outputs folded onto pooled features x: prediction = x @ weight + bias + k(x, anchors) @ kernel.

    Attributes:
        weight: (d,) of one output; (d, K) of several, and likewise below.
        kernel: (M,), one for each public text; (0,) where the head has no kernel.
    """

    weight: np.ndarray
    bias: float | np.ndarray
    kernel: np.ndarray = _NO_KERNEL


class OutputHead(Head):
    """Pooling, public whitening and kernel features, and a linear output; a task adds its loss.

    With one output there may be more terms: of personas, weighed by ``membership``, and of a user's vector. All are
    linear in the same features, so that together they are one output again.

    Attributes:
        membership: (K,) weights of the personas; equal ones unless a device has chosen.
    """

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0, outputs: int = 1) -> None:
        super().__init__(base, scenario)
        adapter = scenario.adapter
        width = base.hidden_size if adapter.whitened_features == "all" else adapter.whitened_features
        if width > base.hidden_size:
            raise ScenarioError(
                f"adapter.whitened_features must be at most the base's width {base.hidden_size}, got {width}."
            )
        # Parameters, not buffers: per-sample gradients refuse buffers, and these are never trained.
        self.mean = nn.Parameter(torch.zeros(base.hidden_size))
        self.whitening = nn.Parameter(torch.zeros(base.hidden_size, width))
        self.constant = nn.Parameter(torch.tensor([adapter.constant_feature]))
        self.kernel = Kernel(base.hidden_size, public_texts, adapter) if adapter.kernel_features else None
        count = len(self.kernel.offset) if self.kernel else 0
        self.output = nn.Linear(width + count + 1, outputs, bias=False)
        nn.init.zeros_(self.output.weight)
        self._add_terms(scenario)
        self._train_only(scenario)

    def _add_terms(self, scenario: Scenario) -> None:
        """Tensors of personas and of a user's vector, where the scenario has them."""
        trained = trained_parts(scenario)
        count, width = scenario.persona.count, self.output.in_features
        has_vectors = "offset" in trained.private
        if scenario.task.name != "rating" and (count or has_vectors):
            raise ScenarioError(
                f"persona.count must be 0 and personal.method another with task.name = {scenario.task.name!r}: "
                "personas and users' vectors are for task 'rating'."
            )
        self.persona = nn.Linear(width, count, bias=False) if count else None
        self.membership = torch.zeros(count)
        self.weigh_alike()
        dimensions = scenario.personal.dimensions if has_vectors else 0
        self.factors = nn.Linear(width, dimensions, bias=False) if has_vectors else None
        self.user, self.offset = (nn.Linear(dimensions, 1, bias=False) if has_vectors else None for _ in range(2))
        self._drawn = {"persona": scenario.persona.spread}
        if "output" in trained.frozen:
            self._drawn["output"] = _FROZEN_OUTPUT
        for layer in (self.persona, self.factors, self.user, self.offset):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def weigh_alike(self) -> None:
        """Let no persona, where there are any, count more than others."""
        self.membership = torch.full((len(self.membership),), 1 / max(len(self.membership), 1))

    def drawn_at_start(self, part: str) -> float:
        """Equal personas would never part, and below an output of zero nothing learns."""
        return self._drawn.get(part, 0.0)

    def features(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Backbone outputs (B, T, d) with mask (B, T) -> pooled features (B, d)."""
        (base,) = self.base
        return base.pool(self.run_blocks(hidden, mask), mask) if len(self.blocks) else hidden[:, 0]

    def project(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, d) -> whitened features, kernel features and the constant, (B, their number)."""
        centred = pooled - self.mean
        parts = [centred @ self.whitening, self.constant.expand(len(centred), 1)]
        if self.kernel:
            parts.insert(1, self.kernel(centred))
        return torch.cat(parts, dim=1)

    def whiten(self, public: Features, *, ridge: float) -> None:
        """Divide the leading principal directions of the public texts' pooled features by their spread; fit the kernel.

        One clipping bound then suits them all; their size makes the mean squared norm of a whitened feature 1.

        Args:
            public: Backbone outputs of the public texts (M of them).
            ridge: Added to every eigenvalue, as a share of the largest.

        Raises:
            ScenarioError: Fewer than two public texts.
        """
        if len(public) < 2:
            raise ScenarioError(
                f"the public start needs two public texts or more, got {len(public)}; put public.txt, one text a line, "
                "beside the data (docs/data.md)."
            )
        features = pooled_features(self, public).astype(np.float64)  # (M, d); B is zero, so this is the bare base
        mean = features.mean(0)
        values, vectors = np.linalg.eigh(np.cov((features - mean).T))  # ascending
        leading = np.argsort(-values)[: self.whitening.shape[1]]
        whitening = vectors[:, leading] / np.sqrt(values[leading] + ridge * values.max())
        whitening /= math.sqrt(float(np.mean(np.sum(((features - mean) @ whitening) ** 2, axis=1))))
        with torch.no_grad():
            self.mean.copy_(torch.from_numpy(mean))
            self.whitening.copy_(torch.from_numpy(whitening))
        if self.kernel:
            self.kernel.fit(features - mean)
        if self.factors is not None:
            self._start_factors(features)

    @torch.no_grad()
    def _start_factors(self, public: np.ndarray) -> None:
        """Let a user's vector read the constant and the widest directions of the public texts, each of one spread."""
        weight = self.factors.weight.zero_()  # type: ignore[union-attr]
        spread = self.project(torch.from_numpy(public.astype(np.float32)).to(self.device))[:, :-1].std(0)
        first = int(bool(self.constant[0]))
        if first:
            weight[0, -1] = FACTOR_SPREAD / self.constant[0]
        for row, column in enumerate(spread.argsort(descending=True)[: len(weight) - first].tolist(), start=first):
            weight[row, column] = FACTOR_SPREAD / spread[column]
        weight.clamp_(max=_LARGEST_FACTOR)

    @torch.no_grad()
    def prepare(self, features: Features) -> Features:
        """Backbone outputs as ``forward`` takes them; a linear head projects its own here, once."""
        if len(self.blocks):
            return features
        pooled, _ = features.batch(range(len(features)))  # (n, 1, d)
        projected = self.project(pooled[:, 0].to(self.device))
        return Features(list(projected[:, None, :].cpu().numpy()))

    def projected(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .) with mask (B, T) -> what the output reads, (B, P)."""
        return self.project(self.features(hidden, mask)) if len(self.blocks) else hidden[:, 0]

    def outputs(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .) with mask (B, T) -> all terms together, (B, outputs)."""
        projected = self.projected(hidden, mask)
        found: Tensor = self.output(projected)
        if self.persona is not None:
            found = found + self.persona(projected) @ self.membership.to(projected)[:, None]
        if self.factors is not None and self.user is not None and self.offset is not None:
            factors = self.factors(projected)
            found = found + self.user(factors) + self.offset(factors)
        return found

    @torch.no_grad()
    def weight(self) -> Tensor:
        """The one weight (P,) that all terms of a head with one output amount to."""
        found = self.output.weight[0].detach().clone()
        if self.persona is not None:
            found += self.membership.to(found) @ self.persona.weight
        if self.factors is not None and self.user is not None and self.offset is not None:
            found += (self.user.weight + self.offset.weight)[0] @ self.factors.weight
        return found

    def fold(self, weight: Tensor, *, centre: float = 0.0) -> OutputLayer:
        """An output weight (P,), or several (P, K), folded onto pooled features, neither whitened nor projected.

        Args:
            weight: One column an output.
            centre: Added to the predictions.
        """
        weight = weight.detach().double()
        width = self.whitening.shape[1]
        folded, rest = self.whitening.double() @ weight[:width], weight[width:-1]
        bias = centre + weight[-1] * self.constant[0].double() - self.mean.double() @ folded
        if self.kernel:
            bias = bias - self.kernel.offset.double() @ rest
            rest = self.kernel.projection.double() @ rest
        level = bias.cpu().numpy() if bias.ndim else float(bias)
        return OutputLayer(folded.float().cpu().numpy(), level, rest.float().cpu().numpy())

    @torch.no_grad()
    def apply_output(self, pooled: np.ndarray, output: OutputLayer) -> np.ndarray:
        """Pooled features (n, d) -> predictions (n,) or (n, K) float64 of an output that may hold a private part."""
        predictions: np.ndarray = pooled.astype(np.float64) @ output.weight + output.bias
        if self.kernel:
            centred = torch.from_numpy(pooled).to(self.device).double() - self.mean.double()
            columns = torch.from_numpy(output.kernel).to(centred).reshape(len(output.kernel), -1)  # (M, K)
            predictions += self.kernel.combine(centred, columns).cpu().numpy().reshape(predictions.shape)
        return predictions


@torch.inference_mode()
def pooled_features(head: OutputHead, features: Features, *, batch: int = 64) -> np.ndarray:
    """Pooled features (n, d) float32 of every text at the head's present parameters."""
    pooled = np.empty((len(features), head.mean.shape[0]), dtype=np.float32)
    order = np.argsort(features.lengths, kind="stable")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        hidden, mask = features.batch(rows)
        pooled[rows] = head.features(hidden.to(head.device), mask.to(head.device)).cpu().numpy()
    return pooled
