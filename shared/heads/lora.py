"""What is trained: the technique that puts LoRA on the head's blocks, and the parts each federation method averages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from peft import LoraConfig, PromptEmbedding, PromptTuningConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from shared.config import PERSONAL_NAMES, AdapterConfig, Scenario
from shared.errors import ScenarioError
from shared.registry import check_name, lookup

TERMS = ("persona", "factors", "user", "offset")  # of a head with one output, beside the output itself
PROMPT = "prompt"  # soft tokens: trained with every federation method, in all of its turns, where a head has any
PARTS = ("lora_A", "lora_B", "output", PROMPT, *TERMS)


@dataclass(frozen=True)
class FederationMethod:
    """What is trained and averaged; everything else of the adapter stays at its public start value.

    Data and no code, so that the shared step is ours whichever method is named, and reads nothing private (rule P1).

    Attributes:
        parts: Some of ``PARTS``.
        summary: One line for people.
        turns: What of it is trained in rounds 1, 2, … and over again; empty: all of it in every round.

    Raises:
        ScenarioError: ``parts`` is empty or names something else, or the turns are not made of them.
    """

    parts: tuple[str, ...]
    summary: str
    turns: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self) -> None:
        if not self.parts or not set(self.parts) <= set(PARTS):
            raise ScenarioError(f"the parts of a federation method must be some of {PARTS}, got {self.parts}.")
        if self.turns and {part for turn in self.turns for part in turn} != set(self.parts):
            raise ScenarioError(f"the turns of a federation method must hold its parts {self.parts}, got {self.turns}.")


FEDERATION_METHODS: dict[str, FederationMethod] = {
    "fedavg": FederationMethod(("lora_A", "lora_B", "output"), "FedIT: both LoRA factors averaged on their own"),
    "ffa-lora": FederationMethod(
        ("lora_B", "output"), "Sun et al. 2024, arXiv:2403.12313: A frozen, the mean of B is exact"
    ),
    "rolora": FederationMethod(
        ("lora_A", "lora_B", "output"),
        "Chen et al. 2025, arXiv:2502.01755: B and A in turn, so that each mean is exact and half travels",
        turns=(("lora_B", "output"), ("lora_A", "output")),
    ),
    "ifca": FederationMethod(
        ("lora_B", "persona"),
        "Ghosh et al. 2020, arXiv:2006.04088: an output for each group of users, the layers below it shared",
    ),
}

# Parts that a personal method trains in the very step of the shared ones, clipped and noised with them, and keeps on
# the device; and parts it leaves at their public start. They stand here, for a server has no client code.
PRIVATE_PARTS: dict[str, tuple[str, ...]] = {
    "fedper": ("output",),
    "fedsa-lora": ("lora_B", "output"),
    "user-embedding": ("offset",),
}
FROZEN_PARTS: dict[str, tuple[str, ...]] = {"fedbabu": ("output",)}
_EMBEDDING = ("factors", "user")  # shared beside the rest where users have a vector


@dataclass(frozen=True)
class Trained:
    """Which parts of a head a campaign trains.

    Attributes:
        turns: Shared parts of rounds 1, 2, … and over again.
        private: Parts that are trained beside them in every round and never leave a device.
        frozen: Parts that stay at the public start, whatever the federation method says.
    """

    turns: tuple[tuple[str, ...], ...]
    private: tuple[str, ...]
    frozen: tuple[str, ...]

    @property
    def shared(self) -> frozenset[str]:
        """All shared parts."""
        return frozenset(part for turn in self.turns for part in turn)


def trained_parts(scenario: Scenario) -> Trained:
    """What a scenario's methods train together.

    Raises:
        ScenarioError: A method is known to nobody, or they leave nothing to share.
    """
    federation, personal = scenario.federation.method, scenario.personal.method
    method = lookup("federation_methods", federation, FEDERATION_METHODS, FederationMethod)
    kept, frozen = _declared("private", personal, PRIVATE_PARTS), _declared("frozen", personal, FROZEN_PARTS)
    apart = {*kept, *frozen}
    more = (
        *(_EMBEDDING if "offset" in kept else ()),
        *(("persona",) if scenario.persona.count else ()),
        *((PROMPT,) if scenario.adapter.prompt_tokens else ()),
    )
    turns = [
        tuple(part for part in dict.fromkeys((*turn, *more)) if part not in apart)
        for turn in method.turns or (method.parts,)
    ]
    found = Trained(tuple(turns), kept, frozen)
    if not all(turns):
        raise ScenarioError(
            f"federation.method = {federation!r} must share something in every round, and personal.method = "
            f"{personal!r} keeps {sorted(apart)} apart; choose another federation method, such as fedavg."
        )
    if ("persona" in found.shared) is not (scenario.persona.count > 1):
        raise ScenarioError(
            f"persona.count must be at least 2 where there are personas (federation.method = 'ifca'), and 0 where "
            f"there are none, got {scenario.persona.count}."
        )
    return found


def _declared(attribute: str, personal_method: str, built_in: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Parts that a personal method names, built in or installed."""
    if check_name("personal_methods", personal_method, PERSONAL_NAMES) is None:
        return built_in.get(personal_method, ())
    method: object = lookup("personal_methods", personal_method, {}, object)
    return tuple(getattr(method, attribute, ()))


def part_of(name: str) -> str:
    """The part that a parameter, by its own name or its name on the wire, belongs to; others than ours have none.

    Example:
        >>> part_of("block.5.output.dense.lora_B"), part_of("output.weight")
        ('lora_B', 'output')
    """
    steps = name.split(".")  # BERT's blocks have layers called output too
    return next((step for step in steps if step.startswith("lora_")), steps[0])


def inject(blocks: nn.ModuleList, adapter: AdapterConfig) -> None:
    """Put the adapter's technique on the blocks, in place.

    Raises:
        ScenarioError: The technique adds parameters that are not LoRA factors, which have no way to the wire or the
            exported head; or there is nothing to train, neither these nor soft tokens.
    """
    before = {id(parameter) for parameter in blocks.parameters()}
    lookup("techniques", adapter.technique, TECHNIQUES, Callable)(blocks, adapter)
    added = {name: p for name, p in blocks.named_parameters() if id(p) not in before}
    strange = sorted(name for name in added if not name.endswith(("lora_A.default.weight", "lora_B.default.weight")))
    if strange or not (added or adapter.prompt_tokens):
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


def leave_blocks(blocks: nn.ModuleList, adapter: AdapterConfig) -> None:
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): soft tokens before the text, and frozen blocks."""
    del blocks
    if not adapter.prompt_tokens >= 1:
        raise ScenarioError(
            f"adapter.prompt_tokens must be at least 1 with adapter.technique = 'prompt-tuning', got "
            f"{adapter.prompt_tokens}; 10 is a common choice."
        )


def soft_tokens(count: int, width: int) -> PromptEmbedding:
    """So many soft tokens (count, width), zero until the public start is drawn."""
    make: Any = PromptEmbedding  # which has no types
    prompt: PromptEmbedding = make(
        PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=count, token_dim=width, num_transformer_submodules=1
        ),
        None,  # the embeddings of words, which peft's own ways to start would read
    )
    nn.init.zeros_(prompt.embedding.weight)
    return prompt


TECHNIQUES: dict[str, Callable[[nn.ModuleList, AdapterConfig], None]] = {
    "lora": inject_lora,
    "prompt-tuning": leave_blocks,
}
