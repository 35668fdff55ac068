"""Personal heads of the real models, fitted in seconds to one user's real records: what ``bench_head`` measures.

A head fitted to what its user said differs from one drawn at random in what matters here: its values are small and
correlated, as a device's are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import platformdirs
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM

from client.export.encoder import build_head
from client.export.fleet import export_fleet
from client.export.language_model import build_lm_head
from client.export.private_head import PROBES, encoder_parts, head_logits, language_parts
from client.personal.finetune import fine_tune
from client.personal.personalize import fit_output
from client.runtime.generation import Generator, open_generator
from client.runtime.language import LanguageBase, open_lm_base
from client.runtime.runtime import FleetBase, PersonalHead, open_base, open_head
from client.training.site import resident_base, resident_dataset
from shared.config import Scenario, load_scenario
from shared.datasets import Record
from shared.heads.adapter import load_shared, make_start, read_shared, read_start
from shared.heads.causal import CausalHead
from shared.heads.head import Head
from shared.heads.output import pooled_features
from shared.heads.rating import RatingHead
from shared.heads.registry import make_head
from shared.heads.scoring import text_predictions
from shared.heads.tasks import TASKS, Labels, Targets, scores_of
from shared.models.features import Features, compute_features, compute_hidden
from shared.models.model import Base

TOKENS = 128  # of the encoder's longest text
_SCENARIOS = Path(__file__).parents[1] / "scenarios"
_RECORDS = 32  # the head is fitted to
_PUBLIC = 400  # texts for the whitening
_CREATED = datetime(2026, 1, 1, tzinfo=UTC)

Fleet = FleetBase | LanguageBase
Personal = PersonalHead | Generator

# Which layers get LoRA: those of the shipped scenario, or two of every block, as LoRA's authors did.
SHIPPED, EVERY_BLOCK = "shipped", "every block"
_WIDE = {
    "minilm": ("attention.self.query", "attention.self.value"),
    "smollm2": ("self_attn.q_proj", "self_attn.v_proj"),
}
_SHIPPED = {"minilm": "movielens.toml", "smollm2": "sotu.toml"}


@dataclass(frozen=True)
class Trained:
    """A head fitted to a user's records.

    Attributes:
        texts: Real ones that it was not fitted to.
    """

    base: Base
    scenario: Scenario
    head: Head
    texts: list[str]
    _build: Callable[[Any], dict[str, bytes]]

    @property
    def language(self) -> bool:
        """Whether it generates."""
        return self.scenario.task.name == "generation"

    def export(self, folder: Path, *, precision: str) -> None:
        """Write the fleet's base; the graph is kept in the user's cache."""
        cache = platformdirs.user_cache_path("sottovoce") / "onnx"
        export_fleet(self.base, self.head, self.scenario, folder, probe_texts=PROBES, precision=precision, cache=cache)

    def open(self, folder: Path) -> Fleet:
        """Open the base."""
        return open_lm_base(folder) if self.language else open_base(folder)

    def build(self, fleet: Fleet) -> dict[str, bytes]:
        """Export the head for an opened base, behind its parity gate."""
        return self._build(fleet)

    def bind(self, files: dict[str, bytes], fleet: Fleet) -> Personal:
        """Open the head on an opened base, every check and the known answer included."""
        if isinstance(fleet, LanguageBase):
            return open_generator(files, base=fleet)
        return open_head(files, base=fleet)

    def outputs(self, *, adapted: bool) -> list[np.ndarray]:
        """What torch makes of the texts: pooled features (d,) or logits (T, V), with the head or on the bare base."""
        head = self.head if adapted else None
        if self.language:
            causal = cast(CausalHead | None, head)
            return [head_logits(causal, self.base, np.array([ids]))[0] for ids in self.token_ids()]
        blocks, tokens = len(head.blocks) if head else 0, self.scenario.model.max_tokens
        features = compute_features(self.base, self.texts, head_blocks=blocks, max_tokens=tokens)
        if head:
            return list(pooled_features(cast(RatingHead, head), features))
        return [features.batch([row])[0][0, 0].numpy() for row in range(len(features))]

    def found(self, fleet: Fleet, adapter: dict[str, np.ndarray]) -> list[np.ndarray]:
        """What the device's runtime makes of the texts."""
        if isinstance(fleet, LanguageBase):
            return [fleet.run(ids, fleet.cache.empty(), adapter=adapter)[0] for ids in self.token_ids()]
        return list(fleet.run_tokens(self.token_ids(), adapter=adapter)[0])

    def token_ids(self) -> list[list[int]]:
        """The texts as the base sees them."""
        return self.base.tokenize(self.texts, max_tokens=self.scenario.model.max_tokens)


def train(model: str, layers: str) -> Trained:
    """Fit a head.

    Args:
        model: ``minilm`` or ``smollm2``.
        layers: ``SHIPPED`` or ``EVERY_BLOCK``.
    """
    scenario = _scenario(model, layers)
    base = resident_base(scenario.model.base)
    dataset = resident_dataset(scenario.data)
    user = dataset.users[int(np.argmax([len(user.train) for user in dataset.users]))]
    records, unseen = user.train[:_RECORDS], user.test
    head = make_head(base, scenario)
    fit = _fit_language if scenario.task.name == "generation" else _fit_rating
    texts, build = fit(cast(Any, head), base, scenario, records, unseen, dataset.public_texts[:_PUBLIC])
    return Trained(base, scenario, head, texts, build)


def _scenario(model: str, layers: str) -> Scenario:
    scenario = load_scenario(_SCENARIOS / _SHIPPED[model])
    tables: dict[str, Any] = {}
    if layers == EVERY_BLOCK:
        tables["adapter"] = scenario.adapter.model_copy(update={"rank": 8, "targets": _WIDE[model]})
        tables["model"] = scenario.model.model_copy(update={"head_blocks": "all"})
    if model == "minilm":
        tables["model"] = tables.get("model", scenario.model).model_copy(update={"max_tokens": TOKENS})
    return scenario.model_copy(update=tables)


def _inputs(head: Head, base: Base, scenario: Scenario, records: Sequence[Record]) -> tuple[Features, Targets]:
    encoded = TASKS[scenario.task.name](base, [record.key for record in records], scenario)
    features = head.prepare(compute_hidden(base, encoded.token_ids, head_blocks=len(head.blocks)))
    return features, Labels(encoded.labels) if encoded.labels else scores_of(records)


def _settings(user: str) -> dict[str, Any]:
    return {"user": user, "privacy": {"claim": "a benchmark: nothing is released"}, "created": _CREATED}


def _fit_rating(
    head: RatingHead,
    base: Base,
    scenario: Scenario,
    records: Sequence[Record],
    unseen: Sequence[Record],
    public: Sequence[str],
) -> tuple[list[str], Callable[[Any], dict[str, bytes]]]:
    whiten = compute_features(base, public, head_blocks=len(head.blocks), max_tokens=scenario.model.max_tokens)
    make_start(head, whiten, ridge=scenario.adapter.whitening_ridge, seed=0)
    features, targets = _inputs(head, base, scenario, records)
    arrays = fine_tune(
        head, read_shared(head), features, targets, personal=scenario.personal, generator=np.random.default_rng(0)
    )
    pooled, shared = text_predictions(head, arrays, features)
    said = np.array([record.target for record in records], dtype=np.float64)
    parts = encoder_parts(head, fit_output(head, pooled, shared, said, personal=scenario.personal))
    texts = list(dict.fromkeys(record.text for record in unseen))[:64]
    return texts, lambda fleet: build_head(base_folder=fleet, probe_texts=PROBES, **parts, **_settings("user"))


def _fit_language(
    head: CausalHead,
    base: Base,
    scenario: Scenario,
    records: Sequence[Record],
    unseen: Sequence[Record],
    public: Sequence[str],
) -> tuple[list[str], Callable[[Any], dict[str, bytes]]]:
    del public
    make_start(head, Features([]), ridge=0.0, seed=0)
    features, targets = _inputs(head, base, scenario, records)
    arrays = fine_tune(
        head, read_shared(head), features, targets, personal=scenario.personal, generator=np.random.default_rng(0)
    )
    load_shared(head, arrays)
    template = scenario.task.template
    parts = language_parts(head, base, scenario)
    probes = [template.replace("{text}", text) for text in PROBES]
    texts = [template.replace("{text}", record.text) + record.response for record in unseen[:12]]
    return texts, lambda fleet: build_lm_head(base_folder=fleet, probe_texts=probes, **parts, **_settings("user"))


def peft_model(trained: Trained) -> Any:
    """The same language model and LoRA as transformers and peft run them, unmerged."""
    loader: Any = LlamaForCausalLM
    model = loader.from_pretrained(trained.base.folder, local_files_only=True, dtype=torch.float32).eval()
    adapter, first = trained.scenario.adapter, trained.head.first_block
    blocks = range(first, trained.base.num_blocks)
    names = [f"layers.{block}.{target}" for block in blocks for target in adapter.targets]
    inject_adapter_in_model(LoraConfig(r=adapter.rank, lora_alpha=1, target_modules=names), model.model)
    arrays = read_start(trained.head)
    with torch.no_grad():
        for name, module in model.model.named_modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] = adapter.scaling
                for factor in ("lora_A", "lora_B"):
                    wanted = arrays[f"block.{name.removeprefix('layers.')}.{factor}"]
                    getattr(module, factor)["default"].weight.copy_(torch.from_numpy(wanted))
    return model
