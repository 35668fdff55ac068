"""The frozen base model, cut into a backbone that runs once per text and a head that trains.

    text -> tokens -> embeddings -> lower blocks | top k blocks -> pooling -> (B, d) features
                      \\________ backbone _______/ \\_____________ head _____________/

A model family is one small object in ``FAMILIES``: how to load it, embed tokens and run one block. Whatever is common
to all of them (cut, pooling, cache, adapter, export) never asks which family it has.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertModel, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from shared.errors import AssetError, ScenarioError
from shared.registry import extension, lookup, names

BASE_FILES = ("config.json", "model.safetensors", "tokenizer.json")


@runtime_checkable
class Family(Protocol):
    """What the rest of the project needs to know of one model architecture."""

    def load(self, folder: Path) -> nn.Module:
        """The model in float32 without any task head."""

    def embed(self, model: nn.Module, token_ids: Tensor) -> Tensor:
        """Token ids (B, T) -> hidden states (B, T, d) that enter block 0."""

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The model's blocks, lowest first."""

    def run(self, model: nn.Module, block: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
        """One block: hidden (B, T, d) and mask (B, T), True at real tokens -> hidden (B, T, d).

        ``block`` may be a copy of one of the model's; padding stands on the right. A mask of whole numbers says that a
        row holds several texts one after the other: 0 is padding, equal numbers are one text, which sees nothing of the
        others and whose positions begin at 0. A family without a vocabulary need not know of it.
        """

    def finish(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """What the model does after its last block, hidden (B, T, d) -> states (B, T, d)."""

    def vocabulary(self, model: nn.Module) -> Tensor | None:
        """Weight (V, d) that turns states into logits, None where the model predicts no tokens."""


class BertFamily:
    """BERT and its distillates (MiniLM): bidirectional, post-norm encoder blocks."""

    def load(self, folder: Path) -> nn.Module:  # noqa: D102
        # The checkpoint's pooler is not ours.
        return _load_whole(BertModel, folder, add_pooling_layer=False)

    def embed(self, model: nn.Module, token_ids: Tensor) -> Tensor:  # noqa: D102
        hidden: Tensor = model.embeddings(input_ids=token_ids)  # type: ignore[operator]
        return hidden

    def blocks(self, model: nn.Module) -> nn.ModuleList:  # noqa: D102
        layers = model.encoder.layer  # type: ignore[union-attr]
        if not isinstance(layers, nn.ModuleList):
            raise AssetError(f"a BERT encoder must hold its blocks in encoder.layer, got {type(layers).__name__}.")
        return layers

    def run(self, model: nn.Module, block: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        del model
        out: Tensor = block(hidden, attention_mask=mask[:, None, None, :])  # (B, 1, 1, T): keys a query may see
        return out

    def finish(self, model: nn.Module, hidden: Tensor) -> Tensor:  # noqa: D102
        del model
        return hidden  # each block ends with its own norm

    def last_product(self, block: nn.Module) -> nn.Module:
        """The second layer of the feed-forward part; with the two below, the block in pieces (see ``ahead.py``)."""
        return cast(nn.Module, block.output.dense)  # type: ignore[union-attr]

    def until_last(  # noqa: D102
        self, model: nn.Module, block: nn.Module, hidden: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        del model
        attended, _ = block.attention(hidden, attention_mask=mask[:, None, None, :])  # type: ignore[operator]
        return block.intermediate(attended), attended  # type: ignore[operator]

    def after_last(self, model: nn.Module, block: nn.Module, summed: Tensor) -> Tensor:  # noqa: D102
        del model
        return cast(Tensor, block.output.LayerNorm(summed))  # type: ignore[union-attr, operator]

    def vocabulary(self, model: nn.Module) -> Tensor | None:  # noqa: D102
        del model
        return None


class LlamaFamily:
    """Llama and what is built like it (SmolLM2): causal, pre-norm decoder blocks with rotary positions."""

    def load(self, folder: Path) -> nn.Module:  # noqa: D102
        return _load_whole(LlamaForCausalLM, folder)

    def embed(self, model: nn.Module, token_ids: Tensor) -> Tensor:  # noqa: D102
        hidden: Tensor = model.model.embed_tokens(token_ids)  # type: ignore[union-attr, operator]
        return hidden

    def blocks(self, model: nn.Module) -> nn.ModuleList:  # noqa: D102
        layers = model.model.layers  # type: ignore[union-attr]
        if not isinstance(layers, nn.ModuleList):
            raise AssetError(f"a Llama must hold its blocks in model.layers, got {type(layers).__name__}.")
        return layers

    def run(self, model: nn.Module, block: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:  # noqa: D102
        length = hidden.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=hidden.device).tril()
        if mask.dtype == torch.bool:
            positions = torch.arange(length, device=hidden.device)[None]  # (1, T)
            # A padded query sees the first token at least: a row without any key would be NaN.
            visible = causal[None, None] & mask[:, None, None, :]  # (B, 1, T, T)
        else:
            visible = (causal & (mask[:, :, None] == mask[:, None, :]))[:, None]  # padding sees itself
            positions = visible.sum(3)[:, 0] - 1  # (B, T)
        rotary = model.model.rotary_emb(hidden, positions)  # type: ignore[union-attr, operator]
        out: Tensor = block(hidden, attention_mask=visible, position_ids=positions, position_embeddings=rotary)
        return out

    def finish(self, model: nn.Module, hidden: Tensor) -> Tensor:  # noqa: D102
        states: Tensor = model.model.norm(hidden)  # type: ignore[operator, arg-type]
        return states

    def vocabulary(self, model: nn.Module) -> Tensor | None:  # noqa: D102
        weight: Tensor = model.lm_head.weight  # type: ignore[union-attr, assignment]
        return weight


def _load_whole(kind: Any, folder: Path, **options: object) -> nn.Module:
    """Load a transformers model in float32 and make sure that nothing of it was filled at random."""
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it reports what is none of ours
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model, info = kind.from_pretrained(
        folder,
        local_files_only=True,
        dtype=torch.float32,
        attn_implementation="sdpa",
        output_loading_info=True,
        **options,
    )
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them at random, in silence
        raise AssetError(f"model.safetensors must hold every weight, {missing[0]} is missing.")
    loaded: nn.Module = model
    return loaded


FAMILIES: dict[str, Family] = {"bert": BertFamily(), "llama": LlamaFamily()}


@dataclass(frozen=True)
class Base:
    """A frozen base model with its tokenizer.

    Attributes:
        sha256: Hash over the files that decide its outputs; binds caches, policies and personal heads to it.
        pooling: ``mean`` over real tokens or the first (``cls``) token, as the model's own files say.
        normalize: Whether the pooled features are scaled to unit L2 norm, as the model's own files say.
        eos_id: Token that ends a text, None where the model's files name none. It is often the padding token too, so
            what is padding is told by masks and lengths, never by the id.
        positions: The longest text it knows positions for, in tokens.
        extension: The package its family comes from, None for one that is built in.
    """

    family: Family
    model: nn.Module
    tokenizer: Tokenizer
    sha256: str
    folder: Path
    hidden_size: int
    pooling: Literal["mean", "cls"]
    normalize: bool
    eos_id: int | None = None
    positions: int = 512
    extension: str | None = None

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @property
    def num_blocks(self) -> int:
        """How many blocks the model has."""
        return len(self.family.blocks(self.model))

    def head_blocks(self, wanted: int | Literal["all"]) -> int:
        """The number of top blocks the head takes.

        Raises:
            ScenarioError: More blocks are wanted than the model has.
        """
        count = self.num_blocks if wanted == "all" else wanted
        if not 0 <= count <= self.num_blocks:
            raise ScenarioError(
                f'model.head_blocks must be "all" or between 0 and {self.num_blocks} for this base, got {wanted}.'
            )
        return count

    def tokenize(self, texts: Sequence[str], *, max_tokens: int) -> list[list[int]]:
        """Token ids per text with the model's special tokens, cut after ``max_tokens``."""
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(max_length=max_tokens)
        return [encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))]

    def backbone(self, token_ids: Tensor, mask: Tensor, *, head_blocks: int) -> Tensor:
        """What enters the head: (B, T, d) hidden states, or (B, 1, d) pooled features when ``head_blocks`` is 0."""
        hidden = self.family.embed(self.model, token_ids)  # (B, T, d)
        for block in self.family.blocks(self.model)[: self.num_blocks - head_blocks]:
            hidden = self.family.run(self.model, block, hidden, mask)
        return hidden if head_blocks else self.pool(hidden, mask)[:, None, :]

    def pool(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Output of the last block (B, T, d) -> one feature vector a text (B, d)."""
        hidden = self.family.finish(self.model, hidden)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            # filled, not multiplied by zero: a NaN in the padding of one text must not reach its neighbours
            pooled = hidden.masked_fill(~mask[:, :, None], 0.0).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(pooled, dim=1) if self.normalize else pooled


def load_base(folder: Path) -> Base:
    """Read a base model from a folder in the hub's layout.

    Args:
        folder: Holds ``config.json``, ``model.safetensors``, ``tokenizer.json``; ``modules.json`` and
            ``1_Pooling/config.json`` where the model is a sentence encoder.

    Raises:
        AssetError: A file or weight is missing or unreadable, a weight is not finite, or no family is registered for
            its architecture.
    """
    missing = [name for name in BASE_FILES if not (folder / name).is_file()]
    if missing:
        raise AssetError(f"{folder} must hold {', '.join(BASE_FILES)}; missing: {', '.join(missing)}.")
    try:
        return _load_base(folder)
    except (AssetError, ScenarioError):
        raise
    except Exception as error:  # transformers and tokenizers raise whatever a broken file makes them stumble over
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AssetError(f"{folder} must be a readable base model, got: {reason}; fetch or copy it again.") from error


def _load_base(folder: Path) -> Base:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    known = names("families", FAMILIES)
    if config.get("model_type") not in known:
        raise AssetError(
            f"{folder} must be a model of a known family ({', '.join(known)}), got {config.get('model_type')!r}."
        )
    family = lookup("families", config["model_type"], FAMILIES, Family)
    model = family.load(folder).eval().requires_grad_(False)
    broken = [name for name, parameter in model.named_parameters() if not bool(torch.isfinite(parameter).all())]
    if broken:
        raise AssetError(f"{folder} must hold finite weights, {broken[0]} holds NaN or infinity; fetch it again.")
    pooling, normalize = _read_pooling(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    eos = config.get("eos_token_id")
    return Base(
        family,
        model,
        tokenizer,
        _hash_base(folder),
        folder,
        int(config["hidden_size"]),
        pooling,
        normalize,
        eos[0] if isinstance(eos, list) else eos,
        int(config["max_position_embeddings"]),
        extension=extension("families", config["model_type"], FAMILIES),
    )


def _read_pooling(folder: Path) -> tuple[Literal["mean", "cls"], bool]:
    """Pooling as a sentence encoder's own files say; mean without normalisation where they say nothing."""
    modules_file, pooling_file = folder / "modules.json", folder / "1_Pooling" / "config.json"
    modules = json.loads(modules_file.read_text(encoding="utf-8")) if modules_file.is_file() else []
    normalize = any(str(module.get("type", "")).endswith("Normalize") for module in modules)
    if not pooling_file.is_file():
        return "mean", normalize
    modes = json.loads(pooling_file.read_text(encoding="utf-8"))
    chosen = {key for key, on in modes.items() if key.startswith("pooling_mode_") and on}
    if chosen == {"pooling_mode_mean_tokens"}:
        return "mean", normalize
    if chosen == {"pooling_mode_cls_token"}:
        return "cls", normalize
    raise AssetError(f"{pooling_file} must choose mean or cls pooling, got {sorted(chosen)}.")


def _hash_base(folder: Path) -> str:
    digest = hashlib.sha256()
    for name in (*BASE_FILES, "modules.json", "1_Pooling/config.json"):
        path = folder / name
        if path.is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
