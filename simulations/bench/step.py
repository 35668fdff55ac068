"""Time one local step: ours, the same without privacy, and plain Opacus over all layers. Answers are compared first.

Every figure is CPU-seconds of one thread (``time.process_time``), which a busy machine distorts least; variants are
interleaved, ratios are taken within a round, and the median of the rounds is reported with its spread.
"""

import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.training.site import TextFeatures, resident_base, resident_dataset, use_threads
from client.training.train import make_trainable, quiet_hooks, train_shared
from shared.config import Scenario
from shared.datasets import Dataset, Record
from shared.errors import CampaignError
from shared.heads.adapter import Arrays, load_start, make_start, read_shared, shared_parameters, trained_slots
from shared.heads.head import Head
from shared.heads.rating import RatingHead
from shared.heads.tasks import Scores
from shared.models.features import compute_features, micro_batches
from shared.models.model import Base
from shared.privacy.calibration import make_policy
from shared.privacy.noise import Randomness, SecureRandomness, SeededRandomness
from shared.progress import progress
from simulations.machine import spread, spread_lines

_STEPS = 8  # of ours per timing, so that a linear step of a millisecond is not lost in the clock
_TOLERANCE = 1e-4


class AllLayers(nn.Module):
    """The plain way: the whole model runs at every step, LoRA in every block, every text padded to the longest.

    Args:
        head: A head over all blocks; its parameters are used as they are.
    """

    def __init__(self, head: RatingHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids (B, T) and mask (B, T) -> predictions (B,)."""
        (base,) = self.head.base
        prediction: Tensor = self.head.predict(base.family.embed(base.model, token_ids), mask)
        return prediction


def measure(*, rounds: int = 7, quiet: bool = False) -> dict[str, Any]:
    """Measure a training step on the records of an average device of MovieLens 100k.

    Args:
        rounds: How often every variant is timed.

    Returns:
        ``ratios.<name>.<median|low|high>``, ``cpu_ms_per_step``, what was compared, machine and versions.

    Raises:
        CampaignError: Two variants that must give the same answer do not.
    """
    use_threads(1)
    scenario = Scenario(name="bench-step")
    base = resident_base(scenario.model.base)
    dataset = resident_dataset(scenario.data)
    counts = np.array([len(user.fit) for user in dataset.users])
    records = dataset.users[int(np.argmin(abs(counts - counts.mean())))].fit
    variants: dict[str, Callable[[], float]] = {
        "cached_last_block": _ours(scenario, base, dataset, records, blocks=1),
        "cached_last_block_nonprivate": _ours(scenario, base, dataset, records, blocks=1, trust="none"),
        "linear_head": _ours(scenario, base, dataset, records, blocks=0),
        "cached_last_block_secure": _ours(scenario, base, dataset, records, blocks=1, randomness=SecureRandomness()),
        "cached_last_block_alone": _ours(scenario, base, dataset, records, blocks=1, micro_batch=1),
        "linear_head_alone": _ours(scenario, base, dataset, records, blocks=0, micro_batch=1),
        "linear_head_secure": _ours(scenario, base, dataset, records, blocks=0, randomness=SecureRandomness()),
        "opacus_all_layers": _opacus(scenario, base, dataset, records),
    }
    differences = compare_answers(scenario, base, dataset, records)
    times: dict[str, list[float]] = {name: [] for name in variants}
    with progress(total=rounds, description="bench step", unit="round", quiet=quiet) as bar:
        for run in variants.values():
            run()  # warm-up
        for _ in range(rounds):
            for name, run in variants.items():
                times[name].append(run())
            bar.update(1)
    pairs = {
        "dp_over_nonprivate": ("cached_last_block", "cached_last_block_nonprivate"),
        "secure_over_seeded_cached_last_block": ("cached_last_block_secure", "cached_last_block"),
        "alone_over_batched_last_block": ("cached_last_block_alone", "cached_last_block"),
        "alone_over_batched_linear_head": ("linear_head_alone", "linear_head"),
        "secure_over_seeded_linear_head": ("linear_head_secure", "linear_head"),
        "opacus_all_layers_over_cached_last_block": ("opacus_all_layers", "cached_last_block"),
        "opacus_all_layers_over_linear_head": ("opacus_all_layers", "linear_head"),
    }
    ratios = {name: spread([x / y for x, y in zip(times[a], times[b], strict=True)]) for name, (a, b) in pairs.items()}
    padded = _padding(scenario, base, dataset)
    ratios["padded_over_real_tokens"] = {"median": padded, "low": padded, "high": padded}
    return {
        "mode": "fp32, one thread, CPU-seconds, interleaved",
        "records": len(records),
        "rounds": rounds,
        "ratios": ratios,
        "cpu_ms_per_step": {name: spread([1000 * s for s in seconds]) for name, seconds in times.items()},
        "answers_agree": differences,
        "machine": {"platform": f"{platform.system()} {platform.machine()}", "python": platform.python_version()},
        "versions": {name: version(name) for name in ("torch", "opacus", "peft", "transformers")},
    }


def _with(scenario: Scenario, *, blocks: int, trust: str) -> Scenario:
    model = scenario.model.model_copy(update={"head_blocks": blocks})
    privacy = scenario.privacy.model_copy(update={"trust": trust})
    return scenario.model_copy(update={"model": model, "privacy": privacy})


class Silent:
    """No noise and every record, so that answers can be compared."""

    def bernoulli(self, probability: float, count: int) -> np.ndarray:  # noqa: D102
        del probability
        return np.ones(count, dtype=bool)

    def gaussian_integers(self, count: int, *, log2_sigma: int = 24) -> np.ndarray:  # noqa: D102
        del log2_sigma
        return np.zeros(count, dtype=np.int64)


class _Prepared:
    """A head at a start where LoRA has gradients, with policy, features and targets of the device."""

    def __init__(
        self,
        scenario: Scenario,
        base: Base,
        dataset: Dataset,
        records: tuple[Record, ...],
        *,
        randomness: Randomness | None = None,
    ) -> None:
        blocks = base.head_blocks(scenario.model.head_blocks)
        self.head = RatingHead(base, scenario)
        texts = TextFeatures(base, scenario, dataset) if blocks < 2 else None  # a cache of every layer is not kept
        public = compute_features(base, dataset.public_texts[:400], head_blocks=blocks, max_tokens=64)
        self.public_start = make_start(self.head, public, ridge=scenario.adapter.whitening_ridge, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in shared_parameters(self.head).values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        self.start: Arrays = read_shared(self.head)
        policy = make_policy(
            scenario,
            clients=len(dataset.users),
            head_blocks=blocks,
            slots=trained_slots(self.head),
            base_sha256=base.sha256,
            base_extension=base.extension,
            start=self.public_start,
            public_texts=dataset.public_texts,
        )
        self.policy = policy
        self._randomness = randomness or SeededRandomness(seed=0, campaign="bench", device=0, round_number=1)
        features = (
            texts.of(records)
            if texts
            else compute_features(base, [r.text for r in records], head_blocks=blocks, max_tokens=64)
        )
        self.features = self.head.prepare(features)
        self.targets = Scores([record.target for record in records])

    def train(self, module: GradSampleModule | Head, *, steps: int, micro_batch: int = 512) -> Arrays:
        """``steps`` steps of the device's own training function."""
        return train_shared(
            module,
            self.start,
            self.features,
            self.targets,
            policy=self.policy.model_copy(update={"steps": steps}),
            micro_batch=micro_batch,
            randomness=self._randomness,
        )


def _ours(
    scenario: Scenario,
    base: Base,
    dataset: Dataset,
    records: tuple[Record, ...],
    *,
    blocks: int,
    trust: str = "local",
    randomness: Randomness | None = None,
    micro_batch: int = 512,
) -> Callable[[], float]:
    scenario = _with(scenario, blocks=blocks, trust=trust)
    prepared = _Prepared(scenario, base, dataset, records, randomness=randomness)
    module = make_trainable(prepared.head, prepared.policy)

    def run() -> float:
        started = time.process_time()
        prepared.train(module, steps=_STEPS, micro_batch=micro_batch)
        return (time.process_time() - started) / _STEPS

    return run


def _opacus(scenario: Scenario, base: Base, dataset: Dataset, records: tuple[Record, ...]) -> Callable[[], float]:
    """One step of Opacus' own module and optimizer over all layers, built from its documented parts."""
    scenario = _with(scenario, blocks=base.num_blocks, trust="local")
    prepared = _Prepared(scenario, base, dataset, records)
    padded = pad(prepared, base, records)
    step = plain_step(prepared, *padded, noise_multiplier=prepared.policy.noise_multiplier)

    def run() -> float:
        started = time.process_time()
        step()
        return time.process_time() - started

    return run


def pad(prepared: _Prepared, base: Base, records: tuple[Record, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask (n, T) of all records as one batch, padded to the longest, and targets (n,)."""
    ids = base.tokenize([record.text for record in records], max_tokens=64)
    longest = max(map(len, ids))
    return (
        torch.tensor([row + [0] * (longest - len(row)) for row in ids]),
        torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in ids]),
        prepared.targets.batch(np.arange(len(records)), longest),
    )


def plain_step(
    prepared: _Prepared,
    token_ids: Tensor,
    mask: Tensor,
    targets: Tensor,
    *,
    noise_multiplier: float,
    functorch: bool = False,
) -> Callable[[], None]:
    """One step of Opacus' own module and optimizer over all layers; arguments as ``pad`` gives them."""
    policy = prepared.policy
    prepared.head.train()
    module = GradSampleModule(AllLayers(prepared.head), loss_reduction="sum", force_functorch=functorch)
    optimizer = DPOptimizer(
        torch.optim.SGD(list(shared_parameters(prepared.head).values()), lr=policy.learning_rate),
        noise_multiplier=noise_multiplier,
        max_grad_norm=policy.clip_norm,
        expected_batch_size=policy.denominator,
    )

    def step() -> None:
        optimizer.zero_grad()
        loss = 0.5 * (module(token_ids, mask) - targets).square().sum()
        with quiet_hooks():
            loss.backward()
        optimizer.step()

    return step


def compare_answers(scenario: Scenario, base: Base, dataset: Dataset, records: tuple[Record, ...]) -> dict[str, float]:
    """Relative distance of answers that must agree, without noise: ours and Opacus', ours with and without privacy."""
    everything = _Prepared(
        _with(scenario, blocks=base.num_blocks, trust="local"), base, dataset, records, randomness=Silent()
    )
    ours = everything.train(make_trainable(everything.head, everything.policy), steps=1)
    again = _Prepared(
        _with(scenario, blocks=base.num_blocks, trust="local"), base, dataset, records, randomness=Silent()
    )
    plain_step(again, *pad(again, base, records), noise_multiplier=0.0)()
    plain = {name: after - again.start[name] for name, after in read_shared(again.head).items()}
    loose = scenario.model_copy(update={"privacy": scenario.privacy.model_copy(update={"clip_norm": 10.0})})
    updates = []
    for trust in ("local", "none"):
        prepared = _Prepared(_with(loose, blocks=1, trust=trust), base, dataset, records, randomness=Silent())
        load_start(prepared.head, prepared.public_start)
        updates.append(prepared.train(make_trainable(prepared.head, prepared.policy), steps=1))
    found = {
        "ours_all_layers_and_opacus": distance(ours, plain),
        "clipped_beyond_reach_and_nonprivate": distance(*updates),
    }
    for name, apart in found.items():
        if not apart <= _TOLERANCE:
            raise CampaignError(f"{name} must agree to {_TOLERANCE}, they differ by {apart:.1e}.")
    return found


def distance(a: Arrays, b: Arrays) -> float:
    """Relative L2 distance of two updates."""
    x, y = (np.concatenate([update[name].ravel() for name in sorted(update)]).astype(np.float64) for update in (a, b))
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def _padding(scenario: Scenario, base: Base, dataset: Dataset) -> float:
    """Tokens computed over real tokens, over one round of every device."""
    texts = TextFeatures(base, scenario, dataset)
    padded = real = 0
    for user in dataset.users:
        lengths = texts.of(user.fit).lengths
        real += int(lengths.sum())
        for batch in micro_batches(np.arange(len(lengths)), lengths, scenario.performance.micro_batch):
            padded += len(batch) * int(lengths[batch].max())
    return padded / real


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['records']} records, {measured['rounds']} rounds"]
    out += spread_lines(measured["cpu_ms_per_step"], unit="ms")
    out += spread_lines(measured["ratios"], unit="x")
    out += [f"  {name} differ by {distance:.1e}" for name, distance in measured["answers_agree"].items()]
    return out
