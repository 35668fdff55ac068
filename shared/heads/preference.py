"""The head of task ``preference``: a language model that is to find the chosen answer likelier than the other."""

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.config import Scenario
from shared.errors import ScenarioError
from shared.heads.causal import CausalHead
from shared.heads.pairs import check_apart, margins, unpack
from shared.models.model import Base


class PreferenceHead(CausalHead):
    """Direct preference optimisation (DPO) against the frozen base; what it trains is a language model's adapter.

    The loss of a record is -log sigmoid(beta (m - m_base)) with m = log p(chosen) - log p(rejected), each the sum over
    an answer's tokens and its end. It is a function of that record and of public tensors alone: the reference is
    the base as published, never a model that anybody's records have trained.

    Raises:
        ScenarioError: The base predicts no tokens or cannot keep two answers apart, or there are soft tokens, which
            would have to stand before both answers of a row.

    Source:
        Rafailov et al. 2023, arXiv:2305.18290, equation 7.
    """

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0) -> None:
        if scenario.adapter.prompt_tokens or scenario.adapter.technique == "prompt-tuning":
            raise ScenarioError(
                "adapter.prompt_tokens must be 0 and adapter.technique another than prompt-tuning with task.name = "
                "'preference', whose rows hold two texts; choose lora."
            )
        super().__init__(base, scenario, public_texts=public_texts)
        check_apart(base)
        self.beta = scenario.task.beta

    def forward(self, hidden: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Backbone outputs (B, T, d) and mask (B, T) of pairs, and their targets (B, 2 + T) -> losses (B,)."""
        margin, reference = self.margins(hidden, mask, targets)
        return F.softplus(-self.beta * (margin - reference))

    def margins(self, hidden: Tensor, mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(chosen) - log p(rejected) of pairs by this head, and by the base as published, (B,) each."""
        segments, labels, reference = unpack(mask, targets)
        nll, owner = self.token_losses(hidden, segments, labels)
        return margins(nll, owner, segments=segments, labels=labels), reference.to(nll)

    @torch.no_grad()
    def pair_margins(self, hidden: Tensor, mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """As ``margins``, without a gradient."""
        return self.margins(hidden, mask, targets)
