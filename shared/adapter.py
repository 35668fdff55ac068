"""The head: top blocks with LoRA, public projection, task output; and its tensors as named, checked arrays.

Every tensor of the head is of one kind: *frozen* (the base's blocks), *public* (part of the campaign's start, computed
from public texts or a public seed, the same for everyone, never trained) or *trainable* with a scope. Only arrays of
scope ``global`` have a way to the wire; the private output layer (client/personalize.py) is not part of this module.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from shared.config import AdapterConfig
from shared.errors import CampaignError, ScenarioError
from shared.features import Features
from shared.model import Base

Scope = Literal["global", "persona", "private"]
Arrays = dict[str, np.ndarray]

# What each federation method trains and averages; everything else of the adapter stays at its public start value.
SHARED_PARTS: dict[str, tuple[str, ...]] = {
    "fedavg": ("lora_A", "lora_B", "output"),  # FedIT: both factors averaged on their own
    "ffa-lora": ("lora_B", "output"),  # Sun et al. 2024, arXiv:2403.12313: A frozen, the mean of B is exact
}


MAX_ABS_VALUE = 1e3  # of a shared tensor; trained ones stay below 10


@dataclass(frozen=True)
class Slot:
    """One trainable tensor: its name on the wire, shape, dtype and who may see it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scope: Scope


class Head(nn.Module):
    """Top blocks with LoRA, pooling, public whitening and one linear output.

    Args:
        base: The frozen base; its top blocks are copied, so heads never share state with it or with each other.
        blocks: How many top blocks the head takes; 0 for a linear head on the backbone's pooled features.
        adapter: Rank, scaling, targets and size of the public projection.
        method: Federation method, a key of ``SHARED_PARTS``: decides what is trainable.
        centre: Prediction before any training.

    Raises:
        ScenarioError: A LoRA target does not exist in the blocks, or a size exceeds the base's width.
    """

    def __init__(self, base: Base, *, blocks: int, adapter: AdapterConfig, method: str, centre: float) -> None:
        super().__init__()
        self.base = (base,)  # a tuple, so that the whole base is not registered as a submodule
        self.centre = centre
        self.first_block = base.num_blocks - blocks
        features = base.hidden_size if adapter.whitened_features == "all" else adapter.whitened_features
        for key, size in (("whitened_features", features), ("rank", adapter.rank)):
            if size > base.hidden_size:
                raise ScenarioError(f"adapter.{key} must be at most the base's width {base.hidden_size}, got {size}.")
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in _top(base, blocks))
        if blocks:
            _inject_lora(self.blocks, adapter)
        # Parameters, not buffers: per-sample gradients refuse buffers, and these are never trained.
        self.mean = nn.Parameter(torch.zeros(base.hidden_size), requires_grad=False)
        self.whitening = nn.Parameter(torch.zeros(base.hidden_size, features), requires_grad=False)
        self.constant = nn.Parameter(torch.tensor([adapter.constant_feature]), requires_grad=False)
        self.output = nn.Linear(features + 1, 1, bias=False)
        nn.init.zeros_(self.output.weight)
        for name, parameter in self.named_parameters():
            # "output" is the task output only: BERT's blocks have layers of that name too
            part = next((p for p in name.split(".") if p.startswith("lora_")), name.split(".")[0])
            parameter.requires_grad_(part in SHARED_PARTS[method])
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # so that training and evaluation, here and on the exported graph, are one function

    def features(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Backbone outputs (B, T, d) with mask (B, T) -> pooled features (B, d)."""
        (base,) = self.base
        if not len(self.blocks):
            return hidden[:, 0]
        for block in self.blocks:
            hidden = base.family.run(block, hidden, mask)
        return base.pool(hidden, mask)

    def project(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, d) -> whitened features and the constant, (B, whitened_features + 1)."""
        whitened = (pooled - self.mean) @ self.whitening
        return torch.cat([whitened, self.constant.expand(len(whitened), 1)], dim=1)

    @torch.no_grad()
    def prepare(self, features: Features) -> Features:
        """Backbone outputs as ``forward`` takes them; a linear head projects its own here, once."""
        if len(self.blocks):
            return features
        pooled, _ = features.batch(range(len(features)))  # (n, 1, d)
        return Features(list(self.project(pooled[:, 0])[:, None, :].numpy()))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .) with mask (B, T) -> predictions (B,)."""
        projected = self.project(self.features(hidden, mask)) if len(self.blocks) else hidden[:, 0]
        prediction: Tensor = self.output(projected)  # (B, 1)
        return self.centre + prediction[:, 0]

    def output_layer(self) -> tuple[np.ndarray, float]:
        """The output folded onto unwhitened features: weight (d,) and bias, so that prediction = x @ w + b."""
        weight = self.output.weight[0].detach().double()
        folded = self.whitening.double() @ weight[:-1]
        bias = self.centre + weight[-1] * self.constant[0].double() - self.mean.double() @ folded
        return folded.float().numpy(), float(bias)


def _top(base: Base, blocks: int) -> Sequence[nn.Module]:
    return list(base.family.blocks(base.model))[base.num_blocks - blocks :]


def _inject_lora(blocks: nn.ModuleList, adapter: AdapterConfig) -> None:
    """Put LoRA on the target layers of the blocks, in place, through peft."""
    linear = {name for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)}
    unknown = sorted(set(adapter.targets) - linear)
    if unknown or not adapter.targets:
        raise ScenarioError(
            f"adapter.targets must name linear layers of a block ({', '.join(sorted(linear))}), "
            f"got {unknown or 'none'}."
        )
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=1,  # peft's scaling is alpha / rank; the real one is set below, as a float
        lora_dropout=0.0,  # a random mask per sample has no place in a clipped sum
        target_modules=[f"{i}.{target}" for i in range(len(blocks)) for target in adapter.targets],
    )
    inject_adapter_in_model(config, blocks)
    for module in blocks.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] = adapter.scaling


def wire_name(parameter_name: str, *, first_block: int) -> str:
    """Peft's parameter name -> the name used on the wire and in files, with the block's absolute number."""
    parts = parameter_name.replace(".default.weight", "").split(".")
    if parts[0] == "blocks":
        parts[:2] = ["block", str(int(parts[1]) + first_block)]
    return ".".join(parts)


def _named(head: Head, *, trainable: bool) -> dict[str, nn.Parameter]:
    """Trainable parameters, or those of the public start (trainable or not), by wire name in a fixed order."""
    found = {}
    for name, parameter in head.named_parameters():
        of_start = "lora_" in name or not name.startswith("blocks.")
        if parameter.requires_grad if trainable else of_start:
            found[wire_name(name, first_block=head.first_block)] = parameter
    return dict(sorted(found.items()))


def shared_parameters(head: Head) -> dict[str, nn.Parameter]:
    """The trainable parameters by wire name, in the order of the slots."""
    return _named(head, trainable=True)


def shared_slots(head: Head) -> tuple[Slot, ...]:
    """Name, shape, dtype and scope of every trainable tensor, in a fixed order."""
    return tuple(Slot(n, tuple(p.shape), "float32", "global") for n, p in shared_parameters(head).items())


def read_shared(head: Head) -> Arrays:
    """Copy the trainable tensors out of the head."""
    return {name: p.detach().numpy().copy() for name, p in shared_parameters(head).items()}


def load_shared(head: Head, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy trainable tensors into the head.

    Raises:
        CampaignError: Names, order, shapes or dtypes are not the head's, or a value is not finite.
    """
    check_arrays(arrays, shared_slots(head))
    with torch.no_grad():
        for name, parameter in shared_parameters(head).items():
            parameter.copy_(torch.from_numpy(np.array(arrays[name])))


def within_bound(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether every value is finite and at most ``MAX_ABS_VALUE`` in size.

    A server that sends huge values can make predictions pure rounding error; which error depends on who shares a batch,
    and then one record moves other records' gradients, past the clipping bound. Far below, rounding stays rounding.
    """
    return all(bool((np.abs(array) <= MAX_ABS_VALUE).all()) for array in arrays.values())  # NaN fails


def check_arrays(arrays: Mapping[str, np.ndarray], slots: Sequence[Slot]) -> None:
    """Raise ``CampaignError`` unless the arrays are exactly these slots, in their order, and finite."""
    wanted = [slot.name for slot in slots]
    if list(arrays) != wanted:
        raise CampaignError(f"arrays must be {wanted} in this order, got {list(arrays)}.")
    for slot in slots:
        array = arrays[slot.name]
        if array.shape != slot.shape or array.dtype != np.dtype(slot.dtype):
            raise CampaignError(
                f"{slot.name} must be {slot.dtype} of shape {slot.shape}, got {array.dtype} of shape {array.shape}."
            )
        if not np.isfinite(array).all():
            raise CampaignError(f"{slot.name} must be finite, got NaN or infinity.")


def make_start(head: Head, public: Features, *, ridge: float, seed: int) -> Arrays:
    """Compute the campaign's public start: whitening from public texts, LoRA A from a public seed, zeros elsewhere.

    The whitening divides the leading principal directions of the public texts' pooled features by their spread, so
    that one clipping bound suits them all; its size makes the mean squared norm of a whitened feature 1.

    Args:
        head: A fresh head; left with the start loaded.
        public: Backbone outputs of the texts the policy names as public (M of them).
        ridge: Added to every eigenvalue, as a share of the largest.
        seed: Public seed of LoRA's A.

    Raises:
        ScenarioError: Fewer than two public texts.
    """
    if len(public) < 2:
        raise ScenarioError(f"whitening needs at least two public texts, got {len(public)}.")
    features = pooled_features(head, public).astype(np.float64)  # (M, d); B is zero, so this is the bare base
    mean = features.mean(0)
    values, vectors = np.linalg.eigh(np.cov((features - mean).T))  # ascending
    leading = np.argsort(-values)[: head.whitening.shape[1]]
    whitening = vectors[:, leading] / np.sqrt(values[leading] + ridge * values.max())
    whitening /= math.sqrt(float(np.mean(np.sum(((features - mean) @ whitening) ** 2, axis=1))))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.mean.copy_(torch.from_numpy(mean))
        head.whitening.copy_(torch.from_numpy(whitening))
        for name, parameter in _named(head, trainable=False).items():
            if name.endswith("lora_A"):
                nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator)
    return read_start(head)


def read_start(head: Head) -> Arrays:
    """Copy every tensor of the public start out of the head."""
    return {name: p.detach().numpy().copy() for name, p in _named(head, trainable=False).items()}


def load_start(head: Head, arrays: Mapping[str, np.ndarray]) -> None:
    """Copy a public start into the head.

    Raises:
        CampaignError: It is not a start of this head.
    """
    parameters = _named(head, trainable=False)
    check_arrays(arrays, [Slot(n, tuple(p.shape), "float32", "global") for n, p in parameters.items()])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(arrays[name])))


@torch.inference_mode()
def pooled_features(head: Head, features: Features, *, batch: int = 64) -> np.ndarray:
    """Pooled features (n, d) float32 of every text at the head's present parameters."""
    width = head.mean.shape[0]
    pooled = np.empty((len(features), width), dtype=np.float32)
    order = np.argsort(features.lengths, kind="stable")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        pooled[rows] = head.features(*features.batch(rows)).numpy()
    return pooled
