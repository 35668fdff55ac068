"""The head of task ``ranking``: which text of the catalogue a user likes, scored as log popularity."""

import numpy as np
import torch
from torch import Tensor, nn

from shared.config import Scenario
from shared.errors import ScenarioError
from shared.heads.output import OutputLayer, pooled_features
from shared.heads.rating import RatingHead
from shared.models.features import Features
from shared.models.model import Base


class RankingHead(RatingHead):
    """One score s(x) a text; a liked record costs -log softmax of its score over all public texts.

    What a liked text is compared with is the whole public catalogue, never another record: the loss of a record, and so
    its gradient, is a function of that record and of public tensors alone. It learns log popularity, smoothed by the
    features. A record below ``task.liked`` costs nothing and moves nothing.

    Args:
        base: As for ``Head``; likewise the others.
        scenario: Its ``model.head_blocks`` must be 0: the catalogue's features are part of the public start.

    Raises:
        ScenarioError: The head has blocks, or there is no public catalogue.

    Source:
        The multinomial likelihood of log-linear choice models, McFadden 1974; over a whole catalogue as in Liang et al.
        2018, arXiv:1802.05814, section 2.1.
    """

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0) -> None:
        super().__init__(base, scenario, public_texts=public_texts)
        if len(self.blocks):
            raise ScenarioError(f"model.head_blocks must be 0 with task.name = 'ranking', got {len(self.blocks)}.")
        if public_texts < 2:
            raise ScenarioError(
                f"task.name = 'ranking' needs a public catalogue of at least two texts, got {public_texts}; choose "
                "data that have one."
            )
        self.centre, self.liked = 0.0, scenario.task.liked
        width = self.output.in_features
        self.catalogue = nn.Parameter(torch.zeros(public_texts, width), requires_grad=False)  # projected
        self.directions = nn.Parameter(torch.zeros(public_texts, base.hidden_size), requires_grad=False)

    def whiten(self, public: Features, *, ridge: float) -> None:
        """As ``OutputHead.whiten``, and keep the catalogue's features."""
        super().whiten(public, ridge=ridge)
        pooled = torch.from_numpy(pooled_features(self, public)).to(self.device)
        with torch.no_grad():
            self.catalogue.copy_(self.project(pooled))
            self.directions.copy_(torch.from_numpy(unit(pooled.cpu().numpy(), self.mean.detach().cpu().numpy())))

    def forward(self, hidden: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Prepared backbone outputs (B, 1, P), mask (B, 1) and targets (B,) -> losses (B,).

        The gradient of log-sum-exp is the catalogue's expected feature: subtracted as a constant from the record's own,
        it gives the exact gradient in one pass through the output, which is all that per-sample hooks see.
        """
        with torch.no_grad():
            scores = self.catalogue @ self.weight()  # (M,)
            share = torch.softmax(scores, dim=0)
            typical = share @ self.catalogue  # (P,)
            level = torch.logsumexp(scores, dim=0) - share @ scores
        losses = level - self.outputs(hidden - typical, mask)[:, 0]
        return losses * (targets >= self.liked)

    @torch.no_grad()
    def typical(self) -> np.ndarray:
        """Expected direction (d,) of a text that the shared part thinks liked, at the head's present parameters."""
        share = torch.softmax((self.catalogue @ self.weight()).double(), dim=0)
        found: np.ndarray = (share @ self.directions.double()).cpu().numpy()
        return found

    @torch.no_grad()
    def log_sum(self) -> float:
        """Log of the sum of exp(score) over the catalogue, at the head's present parameters."""
        return float(torch.logsumexp((self.catalogue @ self.weight()).double(), dim=0))

    def output_layer(self) -> OutputLayer:
        """The score, folded onto pooled features that are neither whitened nor projected."""
        return self.fold(self.weight())


def unit(pooled: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Pooled features (n, d), centred and of unit norm; one at the centre stays there."""
    centred = pooled.astype(np.float64) - mean
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    return np.asarray(centred / np.maximum(norms, 1e-6))
