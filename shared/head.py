"""The head: the base's top blocks with the adapter, and the output of the task; one class a task.

``forward`` gives the loss of every example, so that the training step never asks which task it trains.
"""

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.config import Scenario
from shared.errors import ScenarioError
from shared.features import Features
from shared.kernel import Kernel
from shared.lora import FEDERATION_METHODS, FederationMethod, inject
from shared.model import Base
from shared.registry import lookup
from shared.tasks import IGNORE

_NO_KERNEL = np.zeros(0, dtype=np.float32)
_CHUNK_TOKENS = 128  # whose logits are in memory at once: 25 MB each for a vocabulary of 50,000


class Head(nn.Module):
    """Copies of the base's top blocks with the adapter on them; a task's head adds its output.

    Args:
        base: The frozen base; its top blocks are copied, so heads never share state with it or with each other.
        scenario: Number of blocks, adapter and federation method.
        public_texts: How many the campaign has: the anchors of a kernel, where the head has one.

    Raises:
        ScenarioError: The scenario does not fit the base.
    """

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0) -> None:
        super().__init__()
        del public_texts
        self.base = (base,)  # a tuple, so that the whole base is not registered as a submodule
        count = base.head_blocks(scenario.model.head_blocks)
        self.first_block = base.num_blocks - count
        if scenario.adapter.rank > base.hidden_size:
            raise ScenarioError(
                f"adapter.rank must be at most the base's width {base.hidden_size}, got {scenario.adapter.rank}."
            )
        top = list(base.family.blocks(base.model))[self.first_block :]
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in top)
        if count:
            inject(self.blocks, scenario.adapter)
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # so that training and evaluation, here and on the exported graph, are one function

    def _train_only(self, method: str) -> None:
        """Mark what the federation method trains; everything else is frozen."""
        parts = lookup("federation_methods", method, FEDERATION_METHODS, FederationMethod).parts
        for name, parameter in self.named_parameters():
            # "output" is the task output only: BERT's blocks have layers of that name too
            part = next((p for p in name.split(".") if p.startswith("lora_")), name.split(".")[0])
            parameter.requires_grad_(part in parts)
        if not any(parameter.requires_grad for parameter in self.parameters()):
            raise ScenarioError("a head must train something: with this task model.head_blocks must be at least 1.")

    @property
    def device(self) -> torch.device:
        """Where the head lies."""
        return next(self.parameters()).device

    def run_blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Backbone outputs (B, T, d) with mask (B, T) -> output of the last block (B, T, d)."""
        (base,) = self.base
        for block in self.blocks:
            hidden = base.family.run(base.model, block, hidden, mask)
        return hidden

    def whiten(self, public: Features, *, ridge: float) -> None:
        """Fit what the head derives from public texts."""

    def prepare(self, features: Features) -> Features:
        """Backbone outputs as ``forward`` takes them."""
        return features


class OutputLayer(NamedTuple):
    """The output folded onto pooled features x: prediction = x @ weight + bias + k(x, anchors) @ kernel.

    Attributes:
        weight: (d,).
        kernel: (M,), one for each public text; (0,) where the head has no kernel.
    """

    weight: np.ndarray
    bias: float
    kernel: np.ndarray = _NO_KERNEL


class RatingHead(Head):
    """Pooling, public whitening and kernel features, and one linear output; the loss is half the squared error."""

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0) -> None:
        super().__init__(base, scenario)
        adapter = scenario.adapter
        width = base.hidden_size if adapter.whitened_features == "all" else adapter.whitened_features
        if width > base.hidden_size:
            raise ScenarioError(
                f"adapter.whitened_features must be at most the base's width {base.hidden_size}, got {width}."
            )
        self.centre = scenario.task.centre
        # Parameters, not buffers: per-sample gradients refuse buffers, and these are never trained.
        self.mean = nn.Parameter(torch.zeros(base.hidden_size))
        self.whitening = nn.Parameter(torch.zeros(base.hidden_size, width))
        self.constant = nn.Parameter(torch.tensor([adapter.constant_feature]))
        self.kernel = Kernel(base.hidden_size, public_texts, adapter) if adapter.kernel_features else None
        count = len(self.kernel.offset) if self.kernel else 0
        self.output = nn.Linear(width + count + 1, 1, bias=False)
        nn.init.zeros_(self.output.weight)
        self._train_only(scenario.federation.method)

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
            raise ScenarioError(f"whitening needs at least two public texts, got {len(public)}.")
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

    @torch.no_grad()
    def prepare(self, features: Features) -> Features:
        """Backbone outputs as ``forward`` takes them; a linear head projects its own here, once."""
        if len(self.blocks):
            return features
        pooled, _ = features.batch(range(len(features)))  # (n, 1, d)
        projected = self.project(pooled[:, 0].to(self.device))
        return Features(list(projected[:, None, :].cpu().numpy()))

    def predict(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .) with mask (B, T) -> predictions (B,)."""
        projected = self.project(self.features(hidden, mask)) if len(self.blocks) else hidden[:, 0]
        prediction: Tensor = self.output(projected)  # (B, 1)
        return self.centre + prediction[:, 0]

    def forward(self, hidden: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .), mask (B, T) and targets (B,) -> losses (B,)."""
        errors = self.predict(hidden, mask) - targets
        return 0.5 * errors * errors

    def output_layer(self) -> OutputLayer:
        """The output folded onto pooled features that are neither whitened nor projected."""
        weight = self.output.weight[0].detach().double()
        width = self.whitening.shape[1]
        folded, rest = self.whitening.double() @ weight[:width], weight[width:-1]
        bias = self.centre + weight[-1] * self.constant[0].double() - self.mean.double() @ folded
        if self.kernel:
            bias = bias - self.kernel.offset.double() @ rest
            rest = self.kernel.projection.double() @ rest
        return OutputLayer(folded.float().cpu().numpy(), float(bias), rest.float().cpu().numpy())

    @torch.no_grad()
    def apply_output(self, pooled: np.ndarray, output: OutputLayer) -> np.ndarray:
        """Pooled features (n, d) -> predictions (n,) float64 of a folded output, which may hold a private part."""
        predictions: np.ndarray = pooled.astype(np.float64) @ output.weight + output.bias
        if self.kernel:
            centred = torch.from_numpy(pooled).to(self.device).double() - self.mean.double()
            columns = torch.from_numpy(output.kernel).to(centred)[:, None]  # (M, 1)
            predictions += self.kernel.combine(centred, columns)[:, 0].cpu().numpy()
        return predictions


class CausalHead(Head):
    """A language model's own output over its vocabulary, frozen; the loss is that of the response alone."""

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0) -> None:
        if scenario.adapter.kernel_features:
            raise ScenarioError(f"adapter.kernel_features must be 0 with task.name = {scenario.task.name!r}.")
        if base.family.vocabulary(base.model) is None:
            raise ScenarioError(
                f"task.name = {scenario.task.name!r} needs a base that predicts tokens, got {base.folder.name}."
            )
        super().__init__(base, scenario, public_texts=public_texts)
        self._train_only(scenario.federation.method)

    def states(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Backbone outputs (B, T, d) with mask (B, T) -> what the vocabulary is applied to, (B, T, d)."""
        (base,) = self.base
        return base.family.finish(base.model, self.run_blocks(hidden, mask))

    def forward(self, hidden: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Backbone outputs (B, T, d), mask (B, T) and labels (B, T) -> losses (B,).

        The loss of an example is the mean over its own response tokens: a mean over the batch's would let one example
        change another's gradient, which no clipping repairs.
        """
        nll, owner = self.token_losses(hidden, mask, labels)
        counts = (labels != IGNORE).sum(1)
        sums: Tensor = torch.zeros_like(counts, dtype=nll.dtype).index_add(0, owner, nll)
        return sums / counts.clamp(min=1)

    def token_losses(self, hidden: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood (N,) of every response token, and the row (N,) of the batch each belongs to."""
        (base,) = self.base
        asked = labels != IGNORE
        weight: Any = base.family.vocabulary(base.model)
        nll: Tensor = _TokenLoss.apply(self.states(hidden, mask)[asked], weight, labels[asked])  # type: ignore[no-untyped-call]
        return nll, asked.nonzero()[:, 0]

    @torch.no_grad()
    def token_scores(self, hidden: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``token_losses``, and whether each response token (N,) was the likeliest one."""
        (base,) = self.base
        asked = labels != IGNORE
        states, wanted, weight = self.states(hidden, mask)[asked], labels[asked], base.family.vocabulary(base.model)
        nll, hit = torch.empty(len(states)), torch.empty(len(states), dtype=torch.bool)
        for start in range(0, len(states), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            logits = states[rows] @ weight.T  # type: ignore[union-attr]
            nll[rows] = F.cross_entropy(logits, wanted[rows], reduction="none").cpu()
            hit[rows] = (logits.argmax(1) == wanted[rows]).cpu()
        return nll, hit, asked.nonzero()[:, 0].cpu()


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy of each state (N, d) against a frozen vocabulary (V, d), its logits never all in memory.

    The gradient of a token's loss touches its own state only, so it is computed in the forward pass, chunk by chunk.
    torch's own chunked ``linear_cross_entropy`` gives the same per-token losses; on a CPU it took 36 times as long.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        nll = states.new_empty(len(states))
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            logits, wanted = states[rows] @ weight.T, labels[rows, None]  # (c, V), (c, 1)
            total = logits.logsumexp(1)
            nll[rows] = total - logits.gather(1, wanted)[:, 0]
            if gradient is not None:
                errors = (logits - total[:, None]).exp_()  # softmax
                errors.scatter_add_(1, wanted, errors.new_full(wanted.shape, -1.0))
                gradient[rows] = errors @ weight
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0][:, None] * gradient, None, None


HEADS: dict[str, type[Head]] = {"rating": RatingHead, "generation": CausalHead}


def make_head(base: Base, scenario: Scenario, *, public_texts: int = 0) -> Head:
    """The head a scenario describes on a base, its public tensors still zero; arguments as for ``Head``."""
    return HEADS[scenario.task.name](base, scenario, public_texts=public_texts)


@torch.inference_mode()
def pooled_features(head: RatingHead, features: Features, *, batch: int = 64) -> np.ndarray:
    """Pooled features (n, d) float32 of every text at the head's present parameters."""
    pooled = np.empty((len(features), head.mean.shape[0]), dtype=np.float32)
    order = np.argsort(features.lengths, kind="stable")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        hidden, mask = features.batch(rows)
        pooled[rows] = head.features(hidden.to(head.device), mask.to(head.device)).cpu().numpy()
    return pooled
