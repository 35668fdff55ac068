"""The head of responses: a language model's next tokens, its vocabulary's logits never all in memory."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.config import Scenario
from shared.errors import ScenarioError
from shared.heads.head import Head
from shared.heads.tasks import IGNORE
from shared.models.model import Base
from shared.models.products import Frozen, Precision

_CHUNK_TOKENS = 128  # whose logits are in memory at once: 25 MB each for a vocabulary of 50,000


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
        self._train_only(scenario)
        self._vocabulary: Frozen | None = None  # as the products of training need it

    def quicken(self, precision: Precision) -> None:
        """As of every head, and products with the vocabulary too."""
        super().quicken(precision)
        (base,) = self.base
        self._vocabulary = Frozen(base.family.vocabulary(base.model), precision=precision)  # type: ignore[arg-type]

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
        weight: Any = self._vocabulary or base.family.vocabulary(base.model)
        return token_nll(self.states(hidden, mask)[asked], weight, labels[asked]), asked.nonzero()[:, 0]

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
    def forward(ctx: Any, states: Tensor, frozen: Frozen, labels: Tensor) -> Tensor:
        nll = states.new_empty(len(states))
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            logits, wanted = frozen.forward(states[rows], None), labels[rows, None]  # (c, V), (c, 1)
            total = logits.logsumexp(1)
            nll[rows] = total - logits.gather(1, wanted)[:, 0]
            if gradient is not None:
                errors = (logits - total[:, None]).exp_()  # softmax
                errors.scatter_add_(1, wanted, errors.new_full(wanted.shape, -1.0))
                gradient[rows] = frozen.backward(errors)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0][:, None] * gradient, None, None


def token_nll(states: Tensor, vocabulary: Tensor | Frozen, labels: Tensor) -> Tensor:
    """Negative log-likelihood (N,) of labels at states (N, d) under a frozen vocabulary (V, d)."""
    frozen = Frozen(vocabulary, precision="fp32") if isinstance(vocabulary, Tensor) else vocabulary
    nll: Tensor = _TokenLoss.apply(states, frozen, labels)  # type: ignore[no-untyped-call]
    return nll
