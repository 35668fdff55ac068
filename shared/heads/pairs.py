"""Two answers as one example: the chosen one and the rejected one stand one after the other in a row of the batch.

One record is one row, so that a gradient per row is a gradient per record, whatever is done with both answers.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from shared.errors import ScenarioError
from shared.heads.causal import token_nll
from shared.heads.tasks import IGNORE, Encoded
from shared.models.features import Features, micro_batches
from shared.models.model import Base

_LARGEST_ID = 2**24  # whole numbers up to here are float32 numbers


class PairedFeatures(Features):
    """Backbone outputs of chosen answers, each followed by that of the rejected one; joined when a batch is asked for.

    Each was computed as a text of its own, so that neither holds anything of the other.
    """

    def __init__(self, chosen: Features, rejected: Features) -> None:
        self._chosen, self._rejected = chosen, rejected
        self.lengths = chosen.lengths + rejected.lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def select(self, rows: Sequence[int]) -> "PairedFeatures":  # noqa: D102
        return PairedFeatures(self._chosen.select(rows), self._rejected.select(rows))

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:  # noqa: D102
        rows = np.asarray(rows)
        return Features([self._joined(int(row)) for row in rows]).batch(range(len(rows)))

    def _joined(self, row: int) -> np.ndarray:
        parts = [each.batch([row])[0][0].numpy() for each in (self._chosen, self._rejected)]
        return np.concatenate(parts)


class PairTargets:
    """What ``unpack`` takes apart; a batch is (B, 2 + T) float32.

    Args:
        labels: Of each row: the chosen answer's, then the rejected one's, the next token at every position.
        starts: Where the rejected answer's text begins in each row.
        reference: log p(chosen) - log p(rejected) by the frozen base, of each row.
    """

    def __init__(self, labels: Sequence[np.ndarray], starts: np.ndarray, reference: np.ndarray) -> None:
        self._labels, self._starts, self._reference = list(labels), starts, reference

    def __len__(self) -> int:
        return len(self._labels)

    @classmethod
    def of_rows(cls, packed: Sequence[np.ndarray]) -> "PairTargets":
        """Of single rows as ``batch`` gives them, (2 + T_i,) each."""
        labels = [row[2:].astype(np.int64) for row in packed]
        starts = np.array([row[1] for row in packed], dtype=np.int64)
        return cls(labels, starts, np.array([row[0] for row in packed], dtype=np.float64))

    def select(self, rows: Sequence[int]) -> "PairTargets":
        """Those of some rows, in the order given."""
        chosen = np.asarray(rows, dtype=np.int64)
        return PairTargets([self._labels[row] for row in rows], self._starts[chosen], self._reference[chosen])

    def batch(self, rows: np.ndarray, length: int) -> Tensor:  # noqa: D102
        packed = torch.full((len(rows), 2 + length), float(IGNORE))
        for i, row in enumerate(rows):
            packed[i, 0], packed[i, 1] = float(self._reference[row]), float(self._starts[row])
            packed[i, 2 : 2 + len(self._labels[row])] = torch.from_numpy(self._labels[row]).float()
        return packed


def unpack(mask: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What a batch of targets says.

    Args:
        mask: (B, T), True at real tokens.
        targets: (B, 2 + T) of ``PairTargets``.

    Returns:
        Segments (B, T): 1 at the chosen answer's text, 2 at the rejected one's, 0 at padding; labels (B, T); and the
        reference (B,).
    """
    places = torch.arange(mask.shape[1], device=mask.device)
    segments = torch.where(places >= targets[:, 1, None], 2, 1) * mask
    return segments, targets[:, 2:].long(), targets[:, 0]


def margins(nll: Tensor, owner: Tensor, *, segments: Tensor, labels: Tensor) -> Tensor:
    """Log p(chosen) - log p(rejected) (B,), of the loss of every labelled token (N,) and the row each belongs to."""
    sign = torch.where(segments[labels != IGNORE] == 1, -1.0, 1.0).to(nll)
    found: Tensor = torch.zeros(len(labels), dtype=nll.dtype, device=nll.device).index_add(0, owner, sign * nll)
    return found


def joined_labels(encoded: Encoded) -> list[np.ndarray]:
    """Labels of each pair: the chosen answer's, then the rejected one's.

    Raises:
        ScenarioError: These are no pairs.
    """
    if encoded.labels is None or encoded.rejected is None or encoded.rejected.labels is None:
        raise ScenarioError("task.name = 'preference' needs pairs of answers, got single ones; choose other data.")
    return [np.concatenate(both) for both in zip(encoded.labels, encoded.rejected.labels, strict=True)]


def join(
    base: Base, chosen: Features, rejected: Features, labels: Sequence[np.ndarray], *, blocks: int, micro_batch: int
) -> tuple[Features, PairTargets]:
    """Pairs as a head takes them, with what the base makes of each: the reference, computed once.

    Args:
        base: As published.
        chosen: Backbone outputs of the chosen answers after their prompts, each a text of its own.
        rejected: Of the rejected ones, in the same order.
        labels: As ``joined_labels`` gives them.
        blocks: How many of the base's top blocks the head has.
        micro_batch: Tokens per forward pass, padding included.

    Raises:
        ScenarioError: Lengths do not fit, or the base has no vocabulary or one that float32 cannot count.
    """
    if [len(label) for label in labels] != (chosen.lengths + rejected.lengths).tolist() or blocks < 1:
        raise ScenarioError(
            "task.name = 'preference' needs a label for every position of both answers, and model.head_blocks of at "
            "least 1; got others."
        )
    if base.tokenizer.get_vocab_size() > _LARGEST_ID:
        raise ScenarioError(f"a base for task 'preference' must have at most {_LARGEST_ID} tokens; choose another.")
    features = PairedFeatures(chosen, rejected)
    targets = PairTargets(labels, chosen.lengths, np.zeros(len(labels)))
    reference = base_margins(base, features, targets, blocks=blocks, micro_batch=micro_batch)
    return features, PairTargets(labels, chosen.lengths, reference)


@torch.inference_mode()
def base_margins(base: Base, features: Features, targets: PairTargets, *, blocks: int, micro_batch: int) -> np.ndarray:
    """Log p(chosen) - log p(rejected) (n,) float64 by the frozen base, of pairs whose outputs enter its top blocks."""
    found = np.zeros(len(features))
    weight = base.family.vocabulary(base.model)
    if weight is None:
        raise ScenarioError(f"task.name = 'preference' needs a base that predicts tokens, got {base.folder.name}.")
    for rows in micro_batches(np.flatnonzero(features.lengths), features.lengths, micro_batch):
        hidden, mask = (each.to(base.device) for each in features.batch(rows))
        segments, labels, _ = unpack(mask, targets.batch(rows, hidden.shape[1]).to(base.device))
        for block in base.family.blocks(base.model)[base.num_blocks - blocks :]:
            hidden = base.family.run(base.model, block, hidden, segments)
        asked = labels != IGNORE
        nll = token_nll(base.family.finish(base.model, hidden)[asked], weight, labels[asked])
        found[rows] = margins(nll, asked.nonzero()[:, 0], segments=segments, labels=labels).double().cpu().numpy()
    return found


@torch.inference_mode()
def check_apart(base: Base) -> None:
    """Raise ``ScenarioError`` unless the base's family keeps several texts of a row apart, as ``Family.run`` says."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 7, base.hidden_size, generator=generator).to(base.device)
    segments = torch.tensor([[1, 1, 1, 2, 2, 2, 0]], device=base.device)
    block = base.family.blocks(base.model)[-1]
    together = base.family.run(base.model, block, hidden, segments)
    for part in (slice(0, 3), slice(3, 6)):
        alone = torch.ones(1, 3, dtype=torch.bool, device=base.device)
        wanted = base.family.run(base.model, block, hidden[:, part], alone)
        if not torch.allclose(together[:, part], wanted, rtol=1e-3, atol=1e-3):
            raise ScenarioError(
                "task.name = 'preference' needs a model family that keeps the texts of a row apart where its mask says "
                f"so, got {type(base.family).__name__}; see Family.run."
            )
