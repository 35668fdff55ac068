"""Which tokens of a vocabulary lie in the span of what was seen: the linear algebra of reading text out of gradients.

The gradient of LoRA's A (r, d) is B^T G^T X, with G the gradients at the layer's outputs and X (T, d) its inputs: its
rows lie in the span of what the T tokens put into the layer. Below the first block that is a public function of the
token (and of its place), so whoever sees the change can try every token of the vocabulary against that span.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shared.models.model import Base

_RELATIVE_RANK = 1e-6  # singular values below this share of the largest are rounding
_CHUNK_VALUES = 2**22  # of candidates' inputs in memory at once


@dataclass(frozen=True)
class Layer:
    """The first linear layer of the base's first block, and the public inputs a text can give it.

    Attributes:
        base: The frozen base.
        name: Of the layer within its block.
        placed: Whether an input depends on the token's place in the text, as with BERT's positions.
    """

    base: Base
    name: str
    placed: bool

    def inputs(self, token_ids: Tensor) -> Tensor:
        """What token ids (B, T) put into the layer, (B, T, d)."""
        family, model = self.base.family, self.base.model
        block = family.blocks(model)[0]
        handle = block.get_submodule(self.name).register_forward_pre_hook(_stop)
        try:
            hidden = family.embed(model, token_ids)
            family.run(model, block, hidden, torch.ones(token_ids.shape, dtype=torch.bool))
        except _Reached as reached:
            return reached.inputs
        finally:
            handle.remove()
        raise ValueError(f"a block must call its layer {self.name}, it did not.")


class _Reached(Exception):  # noqa: N818 - not an error: it ends a forward pass where the rest is of no use
    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs


def _stop(_: nn.Module, arguments: tuple[Any, ...]) -> None:
    raise _Reached(arguments[0])


@torch.inference_mode()
def find_layer(base: Base) -> Layer:
    """The first linear layer that the first block calls: a query or what stands for it."""
    block = base.family.blocks(base.model)[0]
    called: list[str] = []
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    ]
    twice = torch.ones(1, 2, dtype=torch.int64)
    hidden = base.family.embed(base.model, twice)
    base.family.run(base.model, block, hidden, torch.ones(1, 2, dtype=torch.bool))
    for handle in handles:
        handle.remove()
    return Layer(base, called[0], placed=not torch.equal(hidden[0, 0], hidden[0, 1]))


def row_space(change: np.ndarray, *, largest: float) -> np.ndarray:
    """Orthonormal basis of the rows of a change.

    Args:
        change: (r, d) float32, or integers of a sum.
        largest: Size of the largest of the parameters that changed, whose rounding is in the change too.

    Returns:
        (k, d) float64, k the numerical rank.
    """
    _, values, rows = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    rounding = 2.0**-24 * largest * sum(math.sqrt(n) for n in change.shape)
    rank = int((values > max(_RELATIVE_RANK * values[0], 2 * rounding)).sum())
    basis: np.ndarray = rows[:rank]
    return basis


@torch.inference_mode()
def span_check(
    layer: Layer, spaces: Sequence[np.ndarray], *, places: int, project: np.ndarray | None = None
) -> list[list[tuple[int, int]]]:
    """Guess the tokens whose inputs lie in a space: as many as it has dimensions, those that stand out of it least.

    Args:
        layer: The layer whose change was seen.
        spaces: Orthonormal bases (k, d), from ``row_space``; one that is the whole space excludes no token.
        places: Longest text to look for; of no account where an input does not depend on its place.
        project: (m, d), where the change is of what this matrix makes of the inputs, as that of B is of A x.

    Returns:
        For each space its guesses: (place, token), the place 0 where it is of no account.

    Source:
        Span checks of attention inputs: Petrov et al. 2024, arXiv:2405.15586, here on LoRA's A.
    """
    config: Any = layer.base.model.config
    vocabulary = int(config.vocab_size)
    places = places if layer.placed else 1
    width = layer.base.hidden_size if project is None else len(project)
    exact = torch.float32 if project is None else torch.float64  # few dimensions leave room for many near misses
    bases = [torch.from_numpy(space).to(exact) for space in spaces]
    outside = [torch.empty(vocabulary, places, dtype=exact) for _ in spaces]  # squared sine of the angle to the space
    chunk = max(1, _CHUNK_VALUES // (places * layer.base.hidden_size))
    for start in range(0, vocabulary, chunk):
        tokens = torch.arange(start, min(start + chunk, vocabulary))
        found = layer.inputs(tokens[:, None].expand(-1, places)).to(exact)  # (n, P, d)
        if project is not None:
            found = found @ torch.from_numpy(project).to(exact).T
        found = found / found.norm(dim=-1, keepdim=True)
        for basis, sines in zip(bases, outside, strict=True):
            sines[tokens] = 1 - (found @ basis.T).square().sum(-1)
    return [
        _best(sines, len(basis), placed=layer.placed) if len(basis) < width else []
        for sines, basis in zip(outside, bases, strict=True)
    ]


def _best(sines: Tensor, count: int, *, placed: bool) -> list[tuple[int, int]]:
    """The ``count`` likeliest tokens; one for each place, where places are told apart."""
    if not placed:
        return [(0, int(token)) for token in sines[:, 0].topk(count, largest=False).indices]
    least, tokens = sines.min(0)  # (P,)
    return [(int(p), int(tokens[p])) for p in least.argsort()[:count]]
