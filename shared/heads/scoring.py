"""What shared arrays make of records, without anything private: predictions of ratings, likelihoods of responses."""

import numpy as np
import torch
from scipy.special import logsumexp

from shared.heads.adapter import Arrays, forget_device, load_shared
from shared.heads.causal import CausalHead
from shared.heads.output import pooled_features
from shared.heads.preference import PreferenceHead
from shared.heads.rating import RatingHead
from shared.heads.tagging import TaggingHead
from shared.heads.tasks import Targets
from shared.metrics.language import TokenScores
from shared.metrics.preference import PairScores
from shared.models.features import Features, micro_batches


def text_predictions(
    head: RatingHead | TaggingHead, arrays: Arrays, features: Features
) -> tuple[np.ndarray, np.ndarray]:
    """Pooled features (n, d) and shared predictions (n,), or logits (n, K), of texts; the head keeps the arrays."""
    load_shared(head, arrays)
    forget_device(head)
    pooled = pooled_features(head, features)
    return pooled, head.apply_output(pooled, head.output_layer())


def persona_predictions(head: RatingHead, pooled: np.ndarray) -> np.ndarray:
    """Predictions (n, K) by each persona, of pooled features (n, d) at the arrays the head holds."""
    kept, found = head.membership, []
    for alone in torch.eye(len(kept)):
        head.membership = alone
        found.append(head.apply_output(pooled, head.output_layer()))
    head.membership = kept
    return np.stack(found, axis=1)


def rmse(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Root mean squared error over all rows."""
    return float(np.sqrt(np.mean((predictions - targets) ** 2)))


def cross_entropy(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Logits (n, K) and places in the list of labels (n,) -> losses (n,)."""
    losses: np.ndarray = logsumexp(logits, axis=1) - logits[np.arange(len(logits)), targets.astype(np.int64)]
    return losses


def response_scores(head: CausalHead, features: Features, targets: Targets, *, micro_batch: int) -> TokenScores:
    """Likelihood of every response at the head's present parameters, in the order of the records.

    Args:
        head: Of the campaign, with the arrays to be scored loaded.
        features: Backbone outputs of the records (n of them).
        targets: Labels of the same records.
        micro_batch: Tokens per forward pass, padding included.
    """
    nll, tokens, hits = (np.zeros(len(features)) for _ in range(3))
    for rows in micro_batches(np.arange(len(features)), features.lengths, micro_batch):
        hidden, mask = features.batch(rows)
        labels = targets.batch(rows, hidden.shape[1])
        device = head.device
        losses, right, owner = head.token_scores(hidden.to(device), mask.to(device), labels.to(device))
        np.add.at(nll, rows[owner.numpy()], losses.numpy())
        np.add.at(hits, rows[owner.numpy()], right.numpy())
        np.add.at(tokens, rows[owner.numpy()], 1.0)
    return TokenScores(nll, tokens, hits)


def pair_scores(head: PreferenceHead, features: Features, targets: Targets, *, micro_batch: int) -> PairScores:
    """Margins of every pair at the head's present parameters, in the order of the records; as ``response_scores``."""
    margin, reference = np.zeros(len(features)), np.zeros(len(features))
    for rows in micro_batches(np.arange(len(features)), features.lengths, micro_batch):
        hidden, mask = features.batch(rows)
        wanted = targets.batch(rows, hidden.shape[1])
        found = head.pair_margins(hidden.to(head.device), mask.to(head.device), wanted.to(head.device))
        margin[rows], reference[rows] = (each.double().cpu().numpy() for each in found)
    return PairScores(margin, reference, head.beta)
