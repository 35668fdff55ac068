"""Time a private step of a language model: the last blocks on cached prefixes, and plain Opacus over all layers.

Measured as in ``bench_step``: CPU-seconds of one thread, variants interleaved, ratios within a round. Before that, ours
over all blocks and Opacus' own step, without noise, must give the same change.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from client.training.site import resident_base, resident_dataset, use_threads
from client.training.train import make_trainable, quiet_hooks, train_shared
from shared.config import Scenario, load_scenario
from shared.datasets import Record
from shared.errors import CampaignError
from shared.heads.adapter import Arrays, make_start, read_shared, shared_parameters, trained_slots
from shared.heads.causal import CausalHead
from shared.heads.registry import make_head
from shared.heads.tasks import IGNORE, Labels, encode_dialogues
from shared.models.features import compute_hidden
from shared.models.model import Base
from shared.models.products import resolve_precision
from shared.privacy.calibration import make_policy
from shared.privacy.noise import SeededRandomness
from shared.progress import progress
from simulations.bench.step import Silent, distance
from simulations.machine import about, goal, goal_lines, spread, spread_lines

_SCENARIO = Path(__file__).parents[1] / "scenarios" / "sotu.toml"
_RECORDS = 16  # of one author, in a step
_CLIENTS = 43  # that the noise is calibrated for; the time does not depend on it
_TOLERANCE = 5e-3  # ours rounds every record to the grid that its noise is drawn on
BLOCKS = (1, 4)  # of the head on cached prefixes
AT_LEAST = 6.0  # times as fast as plain Opacus, with four blocks


class WholeModel(nn.Module):
    """The plain way: every block at every step, logits of every token, padding to the longest text.

    Args:
        head: A head over all blocks; its parameters are used as they are.
    """

    def __init__(self, head: CausalHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids (B, T) and mask (B, T) -> logits (B, T, V)."""
        (base,) = self.head.base
        states = self.head.states(base.family.embed(base.model, token_ids), mask)
        return cast(Tensor, states @ base.family.vocabulary(base.model).T)  # type: ignore[union-attr]


class _Device:
    """A head of some blocks at a start where LoRA has gradients, with policy, prefixes and labels of one author."""

    def __init__(self, base: Base, records: tuple[Record, ...], scenario: Scenario, *, blocks: int) -> None:
        model = scenario.model.model_copy(update={"head_blocks": blocks})
        self.scenario = scenario.model_copy(update={"model": model})
        self.head = cast(CausalHead, make_head(base, self.scenario))
        encoded = encode_dialogues(base, [record.key for record in records], self.scenario)
        self.token_ids = encoded.token_ids
        self.features = compute_hidden(base, encoded.token_ids, head_blocks=blocks)
        self.targets = Labels(encoded.labels or [])
        start = make_start(self.head, self.features.select([0]), ridge=scenario.adapter.whitening_ridge, seed=0)
        self.policy = make_policy(
            self.scenario,
            clients=_CLIENTS,
            head_blocks=blocks,
            slots=trained_slots(self.head),
            base_sha256=base.sha256,
            base_extension=base.extension,
            start=start,
            public_texts=(),
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in shared_parameters(self.head).values():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        self.start: Arrays = read_shared(self.head)

    def ours(self, *, silent: bool = False) -> Callable[[], Arrays]:
        """The device's own training function, one step."""
        precision = resolve_precision(self.scenario.performance.precision)
        module = make_trainable(self.head, self.policy, precision=precision)
        seeded = SeededRandomness(seed=0, campaign="bench", device=0, round_number=1)
        return lambda: train_shared(
            module,
            self.start,
            self.features,
            self.targets,
            policy=self.policy,
            micro_batch=self.scenario.performance.micro_batch,
            randomness=Silent() if silent else seeded,
        )

    def plain(self, *, noise_multiplier: float) -> Callable[[], Arrays]:
        """Opacus' module and optimizer over the whole model, built from its documented parts."""
        longest = max(map(len, self.token_ids))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in self.token_ids])
        mask = torch.arange(longest)[None] < torch.tensor([len(row) for row in self.token_ids])[:, None]
        labels = self.targets.batch(np.arange(len(self.token_ids)), longest)
        self.head.train()
        module = GradSampleModule(WholeModel(self.head), loss_reduction="sum")
        optimizer = DPOptimizer(
            torch.optim.SGD(list(shared_parameters(self.head).values()), lr=self.policy.learning_rate),
            noise_multiplier=noise_multiplier,
            max_grad_norm=self.policy.clip_norm,
            expected_batch_size=self.policy.denominator,
        )

        def step() -> Arrays:
            optimizer.zero_grad()
            losses = F.cross_entropy(module(ids, mask).transpose(1, 2), labels, ignore_index=IGNORE, reduction="none")
            with quiet_hooks():
                torch.autograd.backward((losses.sum(1) / (labels != IGNORE).sum(1)).sum())
            optimizer.step()
            return {name: after - self.start[name] for name, after in read_shared(self.head).items()}

        return step


def measure(
    *, rounds: int = 5, quiet: bool = False, scenario: Scenario | None = None, blocks: Sequence[int] = BLOCKS
) -> dict[str, Any]:
    """Measure one private step on sixteen records of one author.

    Args:
        rounds: How often every variant is timed.
        quiet: No progress on stderr.
        scenario: Of task ``generation``; by default the shipped one.
        blocks: Of heads on cached prefixes; the goal is for the last of them.

    Returns:
        ``ratios.<name>.<median|low|high>``, ``cpu_s_per_step``, what was compared, machine and versions.

    Raises:
        CampaignError: Ours over all blocks and Opacus' own step differ.
    """
    use_threads(1)
    scenario = scenario or load_scenario(_SCENARIO)
    base = resident_base(scenario.model.base)
    records = resident_dataset(scenario.data).users[0].fit[:_RECORDS]
    differ = _compare(base, records, scenario)
    variants: dict[str, Callable[[], Arrays]] = {}
    for count in blocks:
        variants[f"cached_last_{count}"] = _Device(base, records, scenario, blocks=count).ours()
    every = base.num_blocks
    variants["ours_all_layers"] = _Device(base, records, scenario, blocks=every).ours()
    whole = _Device(base, records, scenario, blocks=every)
    variants["opacus_all_layers"] = whole.plain(noise_multiplier=whole.policy.noise_multiplier)
    times: dict[str, list[float]] = {name: [] for name in variants}
    with progress(total=rounds, description="bench language", unit="round", quiet=quiet) as bar:
        for run in variants.values():
            run()  # warm-up
        for _ in range(rounds):
            for name, run in variants.items():
                started = time.process_time()
                run()
                times[name].append(time.process_time() - started)
            bar.update(1)
    plain = times["opacus_all_layers"]
    ratios = {
        f"opacus_all_layers_over_{name}": spread([x / y for x, y in zip(plain, values, strict=True)])
        for name, values in times.items()
        if name != "opacus_all_layers"
    }
    fourth = f"opacus_all_layers_over_cached_last_{blocks[-1]}"
    return {
        "mode": "fp32, one thread, CPU-seconds, interleaved",
        "records": len(records),
        "tokens": int(whole.features.lengths.sum()),
        "targets": list(scenario.adapter.targets),
        "rounds": rounds,
        "ratios": ratios,
        "cpu_s_per_step": {name: spread(values) for name, values in times.items()},
        "answers_differ": differ,
        "goals": {fourth: goal(ratios[fourth]["median"], at_least=AT_LEAST)},
        **about("torch", "opacus", "peft", "transformers"),
    }


def _compare(base: Base, records: tuple[Record, ...], scenario: Scenario) -> float:
    """Relative distance of ours over all blocks from Opacus' own step, both without noise."""
    ours = _Device(base, records, scenario, blocks=base.num_blocks).ours(silent=True)()
    plain = _Device(base, records, scenario, blocks=base.num_blocks).plain(noise_multiplier=0.0)()
    found = distance(ours, plain)
    if not found <= _TOLERANCE:
        raise CampaignError(f"ours over all blocks and Opacus must agree to {_TOLERANCE}, they differ by {found:.1e}.")
    return found


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    size = f"{measured['records']} records, {measured['tokens']} tokens"
    return [
        f"{measured['mode']}; {size}, {measured['rounds']} rounds",
        *spread_lines(measured["cpu_s_per_step"], unit="s"),
        *spread_lines(measured["ratios"], unit="x"),
        f"  ours over all layers and opacus differ by {measured['answers_differ']:.1e}",
        *goal_lines(measured["goals"]),
    ]
