"""Soft tokens of a language model on their way to the device: what every block makes of them, as a key-value cache.

They stand first and see nothing of a text, so their keys and values are the same whatever follows: a device that starts
from them computes what the head does, on the graph of the whole fleet, and none of them is run there again.
"""

from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import DynamicCache

from shared.config import Scenario
from shared.errors import HeadError, ScenarioError
from shared.heads.causal import CausalHead
from shared.models.model import LlamaFamily


def check_soft_export(scenario: Scenario) -> None:
    """Raise ``ScenarioError`` where a scenario's soft tokens have no way to a device: early, before anybody trains."""
    if scenario.adapter.prompt_tokens and (scenario.task.name != "generation" or scenario.model.head_blocks != "all"):
        raise ScenarioError(
            "soft tokens (adapter.prompt_tokens) are exported as the first entries of a language model's key-value "
            f"cache: that needs task.name = 'generation' and model.head_blocks = 'all', got {scenario.task.name!r} and "
            f"{scenario.model.head_blocks!r}. Set export.users = 0 to simulate without exported heads."
        )


@torch.no_grad()
def soft_prefix(head: CausalHead) -> dict[str, np.ndarray]:
    """Keys and values of a head's soft tokens in every block, with its LoRA at work in them.

    Returns:
        ``prefix.<block>.key`` and ``.value``, each (heads, P, width) float32; empty without soft tokens.

    Raises:
        HeadError: The head is not the whole model, whose lower blocks have no keys for what enters above them; or its
            family keeps another cache than the exported graph does.
    """
    (base,) = head.base
    if head.prompt is None:
        return {}
    if len(head.blocks) != base.num_blocks:
        raise HeadError(
            f"soft tokens can be exported with model.head_blocks = 'all' alone, got {len(head.blocks)} of "
            f"{base.num_blocks} blocks: those below have no keys and values for them."
        )
    if not isinstance(base.family, LlamaFamily):
        raise HeadError(f"soft tokens are exported for models of family llama, got {base.folder.name}.")
    cache: Any = DynamicCache()
    hidden = head.soft_states(1)  # (1, P, d)
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
    for block in head.blocks:
        caching = cast(nn.Module, partial(block, past_key_values=cache, use_cache=True))
        hidden = base.family.run(base.model, caching, hidden, mask)
    return {
        f"prefix.{number}.{part}": np.ascontiguousarray(tensor[0].cpu().numpy())
        for number, layer in enumerate(cache.layers)
        for part, tensor in (("key", layer.keys), ("value", layer.values))
    }
