"""The head of task ``tagging``: one of a public list of labels for a text."""

import torch.nn.functional as F
from torch import Tensor

from shared.config import Scenario
from shared.heads.output import OutputHead, OutputLayer
from shared.heads.tasks import IGNORE
from shared.models.model import Base


class TaggingHead(OutputHead):
    """One logit a label (K) on an output that starts at zero; the loss is the cross-entropy of a record's label."""

    centre = 0.0  # of a logit

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0) -> None:
        super().__init__(base, scenario, public_texts=public_texts, outputs=len(scenario.task.labels))

    def forward(self, hidden: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .), mask (B, T) and places in the list of labels (B,) -> losses (B,).

        A record whose target is no place of the list has loss and gradient zero: an error would tell that it is there.
        """
        logits = self.outputs(hidden, mask)  # (B, K)
        known = (targets >= 0) & (targets < logits.shape[1])  # False for NaN
        return F.cross_entropy(logits, targets.where(known, IGNORE).long(), ignore_index=IGNORE, reduction="none")

    def output_layer(self) -> OutputLayer:
        """All logits folded onto pooled features that are neither whitened nor projected: (d, K), (K,) and (M, K)."""
        return self.fold(self.output.weight.T)
