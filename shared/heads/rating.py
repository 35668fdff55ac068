"""The head of ratings: one number a text, squared error."""

from torch import Tensor

from shared.config import Scenario
from shared.heads.output import OutputHead, OutputLayer
from shared.models.model import Base


class RatingHead(OutputHead):
    """One number on a public scale; the loss is half the squared error."""

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0) -> None:
        super().__init__(base, scenario, public_texts=public_texts)
        self.centre = scenario.task.centre

    def predict(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .) with mask (B, T) -> predictions (B,)."""
        return self.centre + self.outputs(hidden, mask)[:, 0]

    def forward(self, hidden: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .), mask (B, T) and targets (B,) -> losses (B,)."""
        errors = self.predict(hidden, mask) - targets
        return 0.5 * errors * errors

    def output_layer(self) -> OutputLayer:
        """The output folded onto pooled features that are neither whitened nor projected."""
        return self.fold(self.weight(), centre=self.centre)
