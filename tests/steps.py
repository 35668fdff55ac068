"""One noisy step for tests: real heads of both tasks, and randomness that is silent, replayed or counted."""

from collections.abc import Sequence

import numpy as np
import torch

import client.training.optimizer
from client.training.optimizer import PolicyOptimizer
from client.training.train import make_trainable, train_shared
from shared.config import AdapterConfig, FederationConfig, ModelConfig, PersonaConfig, Scenario, TaskConfig
from shared.heads.adapter import load_start, make_start, read_shared, shared_parameters, trained_slots
from shared.heads.head import Head
from shared.heads.registry import make_head
from shared.heads.tasks import Labels, Scores, encode_dialogues
from shared.models.features import Features, compute_hidden
from shared.models.model import Base
from shared.privacy.noise import GRID_SIGMA
from shared.privacy.policy import Policy

PAIRS = (
    ("how are you ?", "i am well ."),
    ("tea ?", "yes , i like tea more than rain and trains ."),
    ("who are you", "nobody ."),
    ("a long question about boats and hills and songs and cake and dogs and trains", "i do not know ."),
    ("", "hello there !"),
)


class Silent:
    """Every record and no noise: what is left of a step is its clipped sum."""

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        return np.ones(count, dtype=bool)

    def gaussian_integers(self, count: int) -> np.ndarray:
        return np.zeros(count, dtype=np.int64)


class Replay:
    """The same draws for every data set: a record's inclusion depends on the step and its place, noise on neither.

    Args:
        seed: Of everything.
        scale: Of the noise; 0 draws none, and includes the same records.

    Attributes:
        asked: Every draw that was asked for, without the number of records.
        noise: What was drawn.
    """

    def __init__(self, seed: int = 0, *, scale: float = 1.0) -> None:
        self._seed, self._noise, self._sigma = seed, np.random.default_rng(seed), scale * GRID_SIGMA
        self.asked: list[tuple[str, float]] = []
        self.noise: list[np.ndarray] = []

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        draw = np.random.default_rng([self._seed, len(self.asked)]).random(count)  # n + 1 numbers begin with those of n
        self.asked.append(("bernoulli", probability))
        return draw < probability

    def gaussian_integers(self, count: int) -> np.ndarray:
        self.asked.append(("noise", count))
        self.noise.append(np.rint(self._noise.standard_normal(count) * self._sigma).astype(np.int64))
        return self.noise[-1].copy()


class Setting:
    """A head away from its public start (there LoRA has no gradient), and records for it.

    Args:
        base: Under the head.
        scenario: Of the head.
        features: Backbone outputs of the records, not prepared.
        targets: One a record.
        wrap: ``Scores`` or ``Labels``.
    """

    def __init__(
        self,
        base: Base,
        scenario: Scenario,
        features: Features,
        targets: Sequence,
        wrap: type[Scores] | type[Labels],
    ) -> None:
        self._base, self.scenario, self.targets, self.wrap = base, scenario, list(targets), wrap
        self.head = make_head(base, scenario)
        self.public = make_start(self.head, features, ridge=0.05, seed=1)
        self.features = self.head.prepare(features)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in shared_parameters(self.head).values():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        self.start = read_shared(self.head)
        self.size = sum(array.size for array in self.start.values())

    def __len__(self) -> int:
        return len(self.targets)

    def policy(self, **changes) -> Policy:
        constants = {
            "protocol": 3, "campaign": "c", "trust": "local", "unit": "record", "relation": "add-or-remove-one",
            "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.5, "noise_multiplier": 2.0, "sampling_rate": 1.0, "steps": 1,
            "denominator": 4.0, "max_participations": 5, "max_update_norm": 1e9, "learning_rate": 0.7, "rounds": 5,
            "cohort_size": 2, "federation_method": "ffa-lora", "personal_method": "none", "head_blocks": 1,
            "technique": "lora", "reply_fields": ("arrays", "config.policy", "config.round"), "settings_sha256": "h",
            "base_sha256": "b", "start_sha256": "s", "public_texts_sha256": "p",
            "slots": tuple((slot.name, slot.shape) for slot in trained_slots(self.head)),
        } | changes  # fmt: skip
        return Policy(grid=constants["noise_multiplier"] * constants["clip_norm"] / GRID_SIGMA, **constants)

    def fresh_head(self) -> Head:
        """A head at the public start."""
        head = make_head(self._base, self.scenario)
        load_start(head, self.public)
        return head

    def train(
        self,
        policy,
        *,
        rows=None,
        features=None,
        targets=None,
        micro_batch=1024,
        randomness=None,
        module=None,
        start=None,
    ):
        """The update, by name; all records unless ``rows`` or other ``features`` and ``targets`` are given."""
        features = self.features if features is None else features
        targets = self.targets if targets is None else targets
        if rows is not None:
            features, targets = features.select(rows), [targets[row] for row in rows]
        return train_shared(
            module or make_trainable(self.fresh_head(), policy),
            self.start if start is None else start,
            features,
            self.wrap(targets),
            policy=policy,
            micro_batch=micro_batch,
            randomness=randomness or Silent(),
        )

    def gradients(self, row: int) -> list[np.ndarray]:
        """Gradients of one record alone by plain autograd, at the start: the slow, obvious way."""
        hidden, mask = self.features.batch([row])
        loss = self.head(hidden, mask, self.wrap(self.targets).batch(np.array([row]), hidden.shape[1])).sum()
        return [g.numpy() for g in torch.autograd.grad(loss, list(shared_parameters(self.head).values()))]

    def moved(self, policy, one, other) -> float:
        """How far two updates are apart, in units of the summed gradient."""
        return float(np.linalg.norm(flat(one) - flat(other))) * policy.denominator / policy.learning_rate


def flat(update) -> np.ndarray:
    """All values of an update."""
    return np.concatenate([array.ravel() for array in update.values()]).astype(np.float64)


def rating(base, texts, *, blocks=1, method="ffa-lora", rank=2, targets=("output.dense",), **adapter) -> Setting:
    """Ratings of texts on an encoder; ``adapter`` is more of its table."""
    scenario = Scenario(
        name="tiny",
        model=ModelConfig(head_blocks=blocks),
        adapter=AdapterConfig(rank=rank, whitened_features=8, targets=targets, **adapter),
        federation=FederationConfig(method=method),
        persona=PersonaConfig(count=2 if method == "ifca" else 0),
    )
    features = compute_hidden(base, base.tokenize(texts, max_tokens=32), head_blocks=blocks)
    return Setting(base, scenario, features, [1.0 + i % 5 for i in range(len(texts))], Scores)


def language(base, *, blocks=1, method="ffa-lora", **adapter) -> Setting:
    """Responses of a language model; ``adapter`` is more of its table."""
    scenario = Scenario(
        name="tiny",
        task=TaskConfig(name="generation", template="<|im_start|>{text}<|im_end|>"),
        model=ModelConfig(head_blocks=blocks, max_tokens=128 - adapter.get("prompt_tokens", 0)),
        adapter=AdapterConfig(rank=2, targets=("mlp.down_proj", "self_attn.q_proj"), **adapter),
        federation=FederationConfig(method=method),
    )
    encoded = encode_dialogues(base, PAIRS, scenario)
    features = compute_hidden(base, encoded.token_ids, head_blocks=blocks)
    return Setting(base, scenario, features, encoded.labels, Labels)


class Sums:
    """Watches ``clipped_sum``: per-sample gradients as they came in, and the integer sum of every step."""

    def __init__(self, monkeypatch) -> None:
        self.per_sample, self.of_step, self.clip_norms = [], [], []
        real = client.training.optimizer.clipped_sum

        def watched(per_sample, *, clip_norm, grid):
            found = real(per_sample, clip_norm=clip_norm, grid=grid)
            self.per_sample.append([x.clone() for x in per_sample])
            self.of_step.append([x.numpy().copy() for x in found])
            self.clip_norms.append(clip_norm)
            return found

        monkeypatch.setattr(client.training.optimizer, "clipped_sum", watched)


def use(monkeypatch, optimizer: type[PolicyOptimizer]) -> None:
    """Train with another optimizer."""
    monkeypatch.setattr("client.training.optimizer.PolicyOptimizer", optimizer)
