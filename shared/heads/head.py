"""The head: the base's top blocks with the adapter, and the output of the task; one class a task.

``forward`` gives the loss of every example, so that the training step never asks which task it trains.
"""

import copy
import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from peft import PromptEmbedding
from torch import Tensor, nn

from shared.config import Scenario
from shared.errors import ScenarioError
from shared.heads.lora import PROMPT, TERMS, inject, part_of, soft_tokens, trained_parts
from shared.heads.tasks import IGNORE
from shared.models.ahead import Ahead, find_ahead, run_ahead
from shared.models.features import Features
from shared.models.kernel import Kernel
from shared.models.model import Base
from shared.models.products import Frozen, Precision, quicken

_NO_KERNEL = np.zeros(0, dtype=np.float32)
_FROZEN_OUTPUT = 0.5  # spread of predictions, about the centre, of an output that stays at its public start
FACTOR_SPREAD = 0.3  # of what a user's vector reads of the public texts, at the start
_LARGEST_FACTOR = 8.0  # entry of that start: devices refuse shared values that are twice as large
_SMALLEST_SCALE = 1e-6  # of a soft token's coordinate, so that none is divided by zero
_DRAWN_WORDS = 64  # at least, whose hidden states tell how large soft tokens are
_CHUNK_TOKENS = 128  # whose logits are in memory at once: 25 MB each for a vocabulary of 50,000


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


class OutputLayer(NamedTuple):
    """Outputs folded onto pooled features x: prediction = x @ weight + bias + k(x, anchors) @ kernel.

    Attributes:
        weight: (d,) of one output; (d, K) of several, and likewise below.
        kernel: (M,), one for each public text; (0,) where the head has no kernel.
    """

    weight: np.ndarray
    bias: float | np.ndarray
    kernel: np.ndarray = _NO_KERNEL


class OutputHead(Head):
    """Pooling, public whitening and kernel features, and a linear output; a task adds its loss.

    With one output there may be more terms: of personas, weighed by ``membership``, and of a user's vector. All are
    linear in the same features, so that together they are one output again.

    Attributes:
        membership: (K,) weights of the personas; equal ones unless a device has chosen.
    """

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0, outputs: int = 1) -> None:
        super().__init__(base, scenario)
        adapter = scenario.adapter
        width = base.hidden_size if adapter.whitened_features == "all" else adapter.whitened_features
        if width > base.hidden_size:
            raise ScenarioError(
                f"adapter.whitened_features must be at most the base's width {base.hidden_size}, got {width}."
            )
        # Parameters, not buffers: per-sample gradients refuse buffers, and these are never trained.
        self.mean = nn.Parameter(torch.zeros(base.hidden_size))
        self.whitening = nn.Parameter(torch.zeros(base.hidden_size, width))
        self.constant = nn.Parameter(torch.tensor([adapter.constant_feature]))
        self.kernel = Kernel(base.hidden_size, public_texts, adapter) if adapter.kernel_features else None
        count = len(self.kernel.offset) if self.kernel else 0
        self.output = nn.Linear(width + count + 1, outputs, bias=False)
        nn.init.zeros_(self.output.weight)
        self._add_terms(scenario)
        self._train_only(scenario)

    def _add_terms(self, scenario: Scenario) -> None:
        """Tensors of personas and of a user's vector, where the scenario has them."""
        trained = trained_parts(scenario)
        count, width = scenario.persona.count, self.output.in_features
        has_vectors = "offset" in trained.private
        if scenario.task.name != "rating" and (count or has_vectors):
            raise ScenarioError(
                f"persona.count must be 0 and personal.method another with task.name = {scenario.task.name!r}: "
                "personas and users' vectors are for task 'rating'."
            )
        self.persona = nn.Linear(width, count, bias=False) if count else None
        self.membership = torch.zeros(count)
        self.weigh_alike()
        dimensions = scenario.personal.dimensions if has_vectors else 0
        self.factors = nn.Linear(width, dimensions, bias=False) if has_vectors else None
        self.user, self.offset = (nn.Linear(dimensions, 1, bias=False) if has_vectors else None for _ in range(2))
        self._drawn = {"persona": scenario.persona.spread}
        if "output" in trained.frozen:
            self._drawn["output"] = _FROZEN_OUTPUT
        for layer in (self.persona, self.factors, self.user, self.offset):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def weigh_alike(self) -> None:
        """Let no persona, where there are any, count more than others."""
        self.membership = torch.full((len(self.membership),), 1 / max(len(self.membership), 1))

    def drawn_at_start(self, part: str) -> float:
        """Equal personas would never part, and below an output of zero nothing learns."""
        return self._drawn.get(part, 0.0)

    def features(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Backbone outputs (B, T, d) with mask (B, T) -> pooled features (B, d)."""
        (base,) = self.base
        return base.pool(self.run_blocks(hidden, mask), mask) if len(self.blocks) else hidden[:, 0]

    def project(self, pooled: Tensor) -> Tensor:
        """Pooled features (B, d) -> whitened features, kernel features and the constant, (B, their number)."""
        centred = pooled - self.mean
        parts = [centred @ self.whitening, self.constant.expand(len(centred), 1)]
        if self.kernel:
            parts.insert(1, self.kernel(centred))
        return torch.cat(parts, dim=1)

    def whiten(self, public: Features, *, ridge: float) -> None:
        """Divide the leading principal directions of the public texts' pooled features by their spread; fit the kernel.

        One clipping bound then suits them all; their size makes the mean squared norm of a whitened feature 1.

        Args:
            public: Backbone outputs of the public texts (M of them).
            ridge: Added to every eigenvalue, as a share of the largest.

        Raises:
            ScenarioError: Fewer than two public texts.
        """
        if len(public) < 2:
            raise ScenarioError(
                f"the public start needs two public texts or more, got {len(public)}; put public.txt, one text a line, "
                "beside the data (docs/data.md)."
            )
        features = pooled_features(self, public).astype(np.float64)  # (M, d); B is zero, so this is the bare base
        mean = features.mean(0)
        values, vectors = np.linalg.eigh(np.cov((features - mean).T))  # ascending
        leading = np.argsort(-values)[: self.whitening.shape[1]]
        whitening = vectors[:, leading] / np.sqrt(values[leading] + ridge * values.max())
        whitening /= math.sqrt(float(np.mean(np.sum(((features - mean) @ whitening) ** 2, axis=1))))
        with torch.no_grad():
            self.mean.copy_(torch.from_numpy(mean))
            self.whitening.copy_(torch.from_numpy(whitening))
        if self.kernel:
            self.kernel.fit(features - mean)
        if self.factors is not None:
            self._start_factors(features)

    @torch.no_grad()
    def _start_factors(self, public: np.ndarray) -> None:
        """Let a user's vector read the constant and the widest directions of the public texts, each of one spread."""
        weight = self.factors.weight.zero_()  # type: ignore[union-attr]
        spread = self.project(torch.from_numpy(public.astype(np.float32)).to(self.device))[:, :-1].std(0)
        first = int(bool(self.constant[0]))
        if first:
            weight[0, -1] = FACTOR_SPREAD / self.constant[0]
        for row, column in enumerate(spread.argsort(descending=True)[: len(weight) - first].tolist(), start=first):
            weight[row, column] = FACTOR_SPREAD / spread[column]
        weight.clamp_(max=_LARGEST_FACTOR)

    @torch.no_grad()
    def prepare(self, features: Features) -> Features:
        """Backbone outputs as ``forward`` takes them; a linear head projects its own here, once."""
        if len(self.blocks):
            return features
        pooled, _ = features.batch(range(len(features)))  # (n, 1, d)
        projected = self.project(pooled[:, 0].to(self.device))
        return Features(list(projected[:, None, :].cpu().numpy()))

    def projected(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .) with mask (B, T) -> what the output reads, (B, P)."""
        return self.project(self.features(hidden, mask)) if len(self.blocks) else hidden[:, 0]

    def outputs(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Prepared backbone outputs (B, T, .) with mask (B, T) -> all terms together, (B, outputs)."""
        projected = self.projected(hidden, mask)
        found: Tensor = self.output(projected)
        if self.persona is not None:
            found = found + self.persona(projected) @ self.membership.to(projected)[:, None]
        if self.factors is not None and self.user is not None and self.offset is not None:
            factors = self.factors(projected)
            found = found + self.user(factors) + self.offset(factors)
        return found

    @torch.no_grad()
    def weight(self) -> Tensor:
        """The one weight (P,) that all terms of a head with one output amount to."""
        found = self.output.weight[0].detach().clone()
        if self.persona is not None:
            found += self.membership.to(found) @ self.persona.weight
        if self.factors is not None and self.user is not None and self.offset is not None:
            found += (self.user.weight + self.offset.weight)[0] @ self.factors.weight
        return found

    def fold(self, weight: Tensor, *, centre: float = 0.0) -> OutputLayer:
        """An output weight (P,), or several (P, K), folded onto pooled features, neither whitened nor projected.

        Args:
            weight: One column an output.
            centre: Added to the predictions.
        """
        weight = weight.detach().double()
        width = self.whitening.shape[1]
        folded, rest = self.whitening.double() @ weight[:width], weight[width:-1]
        bias = centre + weight[-1] * self.constant[0].double() - self.mean.double() @ folded
        if self.kernel:
            bias = bias - self.kernel.offset.double() @ rest
            rest = self.kernel.projection.double() @ rest
        level = bias.cpu().numpy() if bias.ndim else float(bias)
        return OutputLayer(folded.float().cpu().numpy(), level, rest.float().cpu().numpy())

    @torch.no_grad()
    def apply_output(self, pooled: np.ndarray, output: OutputLayer) -> np.ndarray:
        """Pooled features (n, d) -> predictions (n,) or (n, K) float64 of an output that may hold a private part."""
        predictions: np.ndarray = pooled.astype(np.float64) @ output.weight + output.bias
        if self.kernel:
            centred = torch.from_numpy(pooled).to(self.device).double() - self.mean.double()
            columns = torch.from_numpy(output.kernel).to(centred).reshape(len(output.kernel), -1)  # (M, K)
            predictions += self.kernel.combine(centred, columns).cpu().numpy().reshape(predictions.shape)
        return predictions


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


class CausalHead(Head):
    """A language model's own output over its vocabulary, frozen; the loss is that of the response alone."""

    def __init__(self, base: Base, scenario: Scenario, *, public_texts: int = 0) -> None:
        if scenario.adapter.kernel_features:
            raise ScenarioError(f"adapter.kernel_features must be 0 with task.name = {scenario.task.name!r}.")
        if base.family.vocabulary(base.model) is None:
            raise ScenarioError(
                f"task.name = {scenario.task.name!r} needs a base that predicts tokens, got {base.folder.name}."
            )
        super().__init__(base, scenario, public_texts=public_texts)
        self._train_only(scenario)
        self._vocabulary: Frozen | None = None  # as the products of training need it

    def quicken(self, precision: Precision) -> None:
        """As of every head, and products with the vocabulary too."""
        super().quicken(precision)
        (base,) = self.base
        self._vocabulary = Frozen(base.family.vocabulary(base.model), precision=precision)  # type: ignore[arg-type]

    def states(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Backbone outputs (B, T, d) with mask (B, T) -> what the vocabulary is applied to, (B, T, d)."""
        (base,) = self.base
        return base.family.finish(base.model, self.run_blocks(hidden, mask))

    def forward(self, hidden: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Backbone outputs (B, T, d), mask (B, T) and labels (B, T) -> losses (B,).

        The loss of an example is the mean over its own response tokens: a mean over the batch's would let one example
        change another's gradient, which no clipping repairs.
        """
        nll, owner = self.token_losses(hidden, mask, labels)
        counts = (labels != IGNORE).sum(1)
        sums: Tensor = torch.zeros_like(counts, dtype=nll.dtype).index_add(0, owner, nll)
        return sums / counts.clamp(min=1)

    def token_losses(self, hidden: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-likelihood (N,) of every response token, and the row (N,) of the batch each belongs to."""
        (base,) = self.base
        asked = labels != IGNORE
        weight: Any = self._vocabulary or base.family.vocabulary(base.model)
        return token_nll(self.states(hidden, mask)[asked], weight, labels[asked]), asked.nonzero()[:, 0]

    @torch.no_grad()
    def token_scores(self, hidden: Tensor, mask: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``token_losses``, and whether each response token (N,) was the likeliest one."""
        (base,) = self.base
        asked = labels != IGNORE
        states, wanted, weight = self.states(hidden, mask)[asked], labels[asked], base.family.vocabulary(base.model)
        nll, hit = torch.empty(len(states)), torch.empty(len(states), dtype=torch.bool)
        for start in range(0, len(states), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            logits = states[rows] @ weight.T  # type: ignore[union-attr]
            nll[rows] = F.cross_entropy(logits, wanted[rows], reduction="none").cpu()
            hit[rows] = (logits.argmax(1) == wanted[rows]).cpu()
        return nll, hit, asked.nonzero()[:, 0].cpu()


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy of each state (N, d) against a frozen vocabulary (V, d), its logits never all in memory.

    The gradient of a token's loss touches its own state only, so it is computed in the forward pass, chunk by chunk.
    torch's own chunked ``linear_cross_entropy`` gives the same per-token losses; on a CPU it took 36 times as long.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, frozen: Frozen, labels: Tensor) -> Tensor:
        nll = states.new_empty(len(states))
        gradient = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        for start in range(0, len(states), _CHUNK_TOKENS):
            rows = slice(start, start + _CHUNK_TOKENS)
            logits, wanted = frozen.forward(states[rows], None), labels[rows, None]  # (c, V), (c, 1)
            total = logits.logsumexp(1)
            nll[rows] = total - logits.gather(1, wanted)[:, 0]
            if gradient is not None:
                errors = (logits - total[:, None]).exp_()  # softmax
                errors.scatter_add_(1, wanted, errors.new_full(wanted.shape, -1.0))
                gradient[rows] = frozen.backward(errors)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return nll

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return outer[0][:, None] * gradient, None, None


def token_nll(states: Tensor, vocabulary: Tensor | Frozen, labels: Tensor) -> Tensor:
    """Negative log-likelihood (N,) of labels at states (N, d) under a frozen vocabulary (V, d)."""
    frozen = Frozen(vocabulary, precision="fp32") if isinstance(vocabulary, Tensor) else vocabulary
    nll: Tensor = _TokenLoss.apply(states, frozen, labels)  # type: ignore[no-untyped-call]
    return nll


def make_head(base: Base, scenario: Scenario, *, public_texts: int = 0) -> Head:
    """The head a scenario describes on a base, its public tensors still zero; arguments as for ``Head``."""
    from shared.heads.registry import HEADS  # which are made of what stands above

    return HEADS[scenario.task.name](base, scenario, public_texts=public_texts)


@torch.inference_mode()
def pooled_features(head: OutputHead, features: Features, *, batch: int = 64) -> np.ndarray:
    """Pooled features (n, d) float32 of every text at the head's present parameters."""
    pooled = np.empty((len(features), head.mean.shape[0]), dtype=np.float32)
    order = np.argsort(features.lengths, kind="stable")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        hidden, mask = features.batch(rows)
        pooled[rows] = head.features(hidden.to(head.device), mask.to(head.device)).cpu().numpy()
    return pooled
