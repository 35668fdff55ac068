"""What every head is: the base's top blocks with the adapter on them.

A task's head adds its output. ``forward`` gives the loss of every example, so that the training step never asks which
task it trains.
"""

import copy

import torch
from peft import PromptEmbedding
from torch import Tensor, nn

from shared.config import Scenario
from shared.errors import ScenarioError
from shared.heads.lora import PROMPT, TERMS, inject, part_of, soft_tokens, trained_parts
from shared.models.ahead import Ahead, find_ahead, run_ahead
from shared.models.features import Features
from shared.models.model import Base
from shared.models.products import Precision, quicken

_SMALLEST_SCALE = 1e-6  # of a soft token's coordinate, so that none is divided by zero
_DRAWN_WORDS = 64  # at least, whose hidden states tell how large soft tokens are


class Head(nn.Module):
    """Copies of the base's top blocks with the adapter on them; a task's head adds its output.

    Soft tokens, where the scenario asks for any, stand before every text at the input of the first block, take the
    first positions and are seen by all that follows; nothing is read off them.

    Args:
        base: The frozen base; its top blocks are copied, so heads never share state with it or with each other.
        scenario: Number of blocks, adapter and federation method.
        public_texts: How many the campaign has: the anchors of a kernel, where the head has one.

    Raises:
        ScenarioError: The scenario does not fit the base.
    """

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0) -> None:
        super().__init__()
        del public_texts
        self.base = (base,)  # a tuple, so that the whole base is not registered as a submodule
        count = base.head_blocks(scenario.model.head_blocks)
        self.first_block = base.num_blocks - count
        if scenario.adapter.rank > base.hidden_size:
            raise ScenarioError(
                f"adapter.rank must be at most the base's width {base.hidden_size}, got {scenario.adapter.rank}."
            )
        top = list(base.family.blocks(base.model))[self.first_block :]
        self.blocks = nn.ModuleList(copy.deepcopy(block) for block in top)
        self.prompt: PromptEmbedding | None = None
        if scenario.adapter.prompt_tokens or scenario.adapter.technique == "prompt-tuning":
            self._check_room(scenario, blocks=count)
        if count:
            inject(self.blocks, scenario.adapter)
        if scenario.adapter.prompt_tokens:
            self.prompt = soft_tokens(scenario.adapter.prompt_tokens, base.hidden_size)
            self.prompt_scale = nn.Parameter(torch.ones(base.hidden_size))  # public, never trained
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # so that training and evaluation, here and on the exported graph, are one function

    def _check_room(self, scenario: Scenario, *, blocks: int) -> None:
        """Raise ScenarioError unless soft tokens have a block to enter, and positions beside the text's."""
        (base,) = self.base
        if not blocks >= 1:
            raise ScenarioError(
                f"model.head_blocks must be at least 1 with soft tokens (adapter.prompt_tokens), got {blocks}: they "
                "stand before the text at the head's first block."
            )
        tokens = scenario.model.max_tokens + scenario.adapter.prompt_tokens
        if not tokens <= base.positions:
            raise ScenarioError(
                f"model.max_tokens and adapter.prompt_tokens must together be at most the {base.positions} positions "
                f"of the base, got {tokens}."
            )

    def _train_only(self, scenario: Scenario) -> None:
        """Mark what the scenario's methods train, and what of it never leaves; everything else is frozen."""
        self.trained = trained_parts(scenario)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(part_of(name) in {*self.trained.shared, *self.trained.private})
        found = {part_of(name) for name, parameter in self.named_parameters() if parameter.requires_grad}
        missing = sorted((self.trained.shared | set(self.trained.private)) & {*TERMS, PROMPT} - found)
        if self.trained.private and not found & set(self.trained.private):
            missing = sorted(self.trained.private)
        if missing:
            raise ScenarioError(
                f"federation.method = {scenario.federation.method!r} with personal.method = "
                f"{scenario.personal.method!r} trains {missing}, which a head of task {scenario.task.name!r} has not; "
                "choose others."
            )
        for turn in self.trained.turns:
            if not found & set(turn):
                raise ScenarioError(
                    f"a head must train something in every round, and this one has none of {list(turn)}: with this "
                    "task and these methods model.head_blocks must be at least 1."
                )

    @property
    def device(self) -> torch.device:
        """Where the head lies."""
        return next(self.parameters()).device

    def run_blocks(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Backbone outputs (B, T, d) with mask (B, T) -> output of the last block (B, T, d)."""
        (base,) = self.base
        length, blocks = hidden.shape[1], list(self.blocks)
        if hidden.shape[2] != base.hidden_size:
            hidden, blocks = self._finish_first(hidden), blocks[1:]
        if self.prompt is not None:
            soft = self.soft_states(len(hidden))
            hidden = torch.cat([soft, hidden], dim=1)  # (B, P + T, d)
            mask = torch.cat([mask.new_ones(soft.shape[:2]), mask], dim=1)
        for block in blocks:
            hidden = base.family.run(base.model, block, hidden, mask)
        return hidden[:, hidden.shape[1] - length :]

    def _ahead(self) -> Ahead | None:
        """The frozen start of the first block, where it has one that no soft token enters."""
        (base,) = self.base
        possible = len(self.blocks) and self.prompt is None
        return find_ahead(base.family, base.model, self.blocks[0]) if possible else None

    def _finish_first(self, kept: Tensor) -> Tensor:
        """What ``run_ahead`` kept (B, T, .) -> output of the first block (B, T, d)."""
        (base,) = self.base
        ahead = self._ahead()
        if ahead is None or kept.shape[2] != ahead.width:
            wanted = f"{base.hidden_size}" + (f" or {ahead.width}" if ahead else "")
            raise ScenarioError(f"what enters a head must be {wanted} wide, got {kept.shape[2]}; prepare it with it.")
        return ahead.finish(kept)

    def soft_states(self, texts: int) -> Tensor:
        """The soft tokens before so many texts, (texts, P, d): one lookup a text, for its own gradient."""
        if self.prompt is None:
            raise ScenarioError("adapter.prompt_tokens must be at least 1 for soft tokens, got 0.")
        rows = torch.arange(self.prompt.embedding.num_embeddings, device=self.device).expand(texts, -1)
        states: Tensor = self.prompt(rows) * self.prompt_scale
        return states

    @torch.no_grad()
    def start_prompt(self, generator: torch.Generator) -> None:
        """Let soft tokens, where there are any, begin as hidden states of drawn words at the head's first block.

        What is trained is in units of their root mean square in each coordinate, for hidden states grow from block to
        block, some of them a thousandfold; one learning rate and one bound then suit every cut. The first word is left
        out: models put their largest values there.

        Source:
            Lester et al. 2021, arXiv:2104.08691, section 3.1 (sampled vocabulary), where the first block is the base's.
        """
        if self.prompt is None:
            return
        (base,) = self.base
        count = self.prompt.embedding.num_embeddings
        length = min(1 + max(count, _DRAWN_WORDS), base.positions)
        drawn = torch.randint(base.tokenizer.get_vocab_size(), (1, length), generator=generator).to(base.device)
        mask = torch.ones_like(drawn, dtype=torch.bool)
        hidden = base.backbone(drawn, mask, head_blocks=len(self.blocks))[0, 1:]  # (length - 1, d)
        self.prompt_scale.copy_(hidden.square().mean(0).sqrt().clamp(min=_SMALLEST_SCALE))
        self.prompt.embedding.weight.copy_(hidden[:count] / self.prompt_scale)

    def whiten(self, public: Features, *, ridge: float) -> None:
        """Fit what the head derives from public texts."""

    def weigh_alike(self) -> None:
        """Let no persona, where there are any, count more than others."""

    def drawn_at_start(self, part: str) -> float:
        """Standard deviation of the public draws a part starts at; 0: it starts at zero."""
        del part
        return 0.0

    def prepare(self, features: Features) -> Features:
        """Backbone outputs as ``forward`` takes them."""
        return features

    def quicken(self, precision: Precision) -> None:
        """Compute products with frozen weights as fast as this processor can, see ``shared/models/products.py``.

        What is frozen must not change afterwards.
        """
        quicken(self.blocks, precision=precision)

    def run_ahead(self, features: Features) -> Features:
        """Backbone outputs as ``forward`` takes them too, with all that is frozen of the head run already.

        Where the same texts are trained on again and again: it costs one pass over all of them, and saves what is
        frozen of every later one. With other public tensors in the head it must be done again.
        """
        ahead = self._ahead()
        kept = run_ahead(ahead, features, device=self.device) if ahead else None
        return self.prepare(features) if kept is None else kept
