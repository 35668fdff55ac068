"""What is trained: the technique that puts LoRA on the head's blocks, and the parts each federation method averages."""

from collections.abc import Callable
from dataclasses import dataclass

from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from shared.config import AdapterConfig
from shared.errors import ScenarioError
from shared.registry import lookup

PARTS = ("lora_A", "lora_B", "output")


@dataclass(frozen=True)
class FederationMethod:
    """What is trained and averaged; everything else of the adapter stays at its public start value.

    Data and no code, so that the shared step is ours whichever method is named, and reads nothing private (rule P1).

    Attributes:
        parts: Some of ``PARTS``.
        summary: One line for people.

    Raises:
        ScenarioError: ``parts`` is empty or names something else.
    """

    parts: tuple[str, ...]
    summary: str

    def __post_init__(self) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ScenarioError(f"the parts of a federation method must be some of {PARTS}, got {self.parts}.")


FEDERATION_METHODS: dict[str, FederationMethod] = {
    "fedavg": FederationMethod(("lora_A", "lora_B", "output"), "FedIT: both LoRA factors averaged on their own"),
    "ffa-lora": FederationMethod(
        ("lora_B", "output"), "Sun et al. 2024, arXiv:2403.12313: A frozen, the mean of B is exact"
    ),
}


def inject(blocks: nn.ModuleList, adapter: AdapterConfig) -> None:
    """Put the adapter's technique on the blocks, in place.

    Raises:
        ScenarioError: The technique adds parameters that are not LoRA factors, which have no way to the wire or the
            exported head.
    """
    before = {id(parameter) for parameter in blocks.parameters()}
    lookup("techniques", adapter.technique, TECHNIQUES, Callable)(blocks, adapter)
    added = {name: p for name, p in blocks.named_parameters() if id(p) not in before}
    strange = sorted(name for name in added if not name.endswith(("lora_A.default.weight", "lora_B.default.weight")))
    if strange or not added:
        raise ScenarioError(
            f"technique {adapter.technique!r} must add peft's LoRA layers and nothing else, got {strange or 'none'}."
        )


def inject_lora(blocks: nn.ModuleList, adapter: AdapterConfig) -> None:
    """LoRA on the target layers of the head's blocks, through peft."""
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


TECHNIQUES: dict[str, Callable[[nn.ModuleList, AdapterConfig], None]] = {"lora": inject_lora}
