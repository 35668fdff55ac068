"""Measure what LoRA adds at user level on MovieLens 100k: under a linear and under a kernel head, at three epsilons.

Every side has constants of its own, chosen on validation rows. Rounds are computed in a shorter way than devices do,
which one step a round allows: a distinct text's gradient is taken once, and a user's is a weighted sum of those.
Clipping, noise, sums and server optimiser are the devices' and the server's own functions, with the same draws.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus import GradSampleModule

from client.training.contribution import contribute
from client.training.site import resident_base, resident_dataset, use_threads
from client.training.train import quiet_hooks
from server.aggregate import SERVER_OPTIMIZERS, OptimizerState, mean_of_sum, noised_sum, ring_sum
from shared.config import Scenario, load_scenario
from shared.datasets import Dataset
from shared.errors import ScenarioError
from shared.heads.adapter import Arrays, load_shared, load_start, shared_parameters
from shared.heads.rating import RatingHead
from shared.heads.registry import make_head
from shared.heads.scoring import rmse
from shared.models.features import micro_batches
from shared.models.model import Base
from shared.privacy.noise import SeededRandomness
from shared.progress import progress
from simulations.campaigns import Plan, plan_campaigns
from simulations.machine import about
from simulations.observe.observe import RatingObserver
from simulations.observe.rows import Rows

_SCENARIO = Path(__file__).parents[1] / "scenarios" / "movielens-user.toml"
_TOKENS = 4096  # a pass
_LINEAR = ('adapter.whitened_features="all"', "adapter.kernel_features=0", "federation.server_momentum=0.0")
_KERNEL: Mapping[float, Sequence[str]] = {
    8.0: (),
    3.0: ("federation.rounds=12", "privacy.max_participations=12", "federation.server_learning_rate=8.0"),
    1.0: ("federation.rounds=8", "privacy.max_participations=8", "federation.server_learning_rate=5.0"),
}


def _linear(constant: float, clip_norm: float, rate: float) -> tuple[str, ...]:
    return (
        *_LINEAR,
        "federation.rounds=12",
        "privacy.max_participations=12",
        f"adapter.constant_feature={constant}",
        f"privacy.clip_norm={clip_norm}",
        f"federation.server_learning_rate={rate}",
    )


def _lora(share: float) -> tuple[str, ...]:
    """One block with LoRA, whose rate is a share of the output's."""
    return "model.head_blocks=1", f"federation.lora_learning_rate_factor={share}"


# Head -> epsilon -> what it changes in the shipped scenario.
HEADS: Mapping[str, Mapping[float, Sequence[str]]] = {
    "linear": {8.0: _linear(0.1, 1.0, 13.0), 3.0: _linear(0.1, 0.7, 8.65), 1.0: _linear(0.1, 0.7, 3.85)},
    "linear-lora": {
        8.0: (*_linear(0.03, 1.0, 8.65), *_lora(0.25)),
        3.0: (*_linear(0.1, 0.7, 8.65), *_lora(0.5)),
        1.0: (*_linear(0.1, 0.7, 3.85), *_lora(0.12)),
    },
    "kernel": _KERNEL,
    "kernel-lora": {
        epsilon: (*_KERNEL[epsilon], *_lora(share)) for epsilon, share in ((8, 0.025), (3, 0.04), (1, 0.06))
    },
}


def measure(*, rounds: int, quiet: bool = False, scenario: Path = _SCENARIO) -> dict[str, Any]:
    """Run every head at every epsilon.

    Args:
        rounds: Seeds: everything that is drawn is drawn anew for each.
        quiet: No progress on stderr.
        scenario: A scenario of ratings at unit user with one step a round.

    Returns:
        ``cells``: epsilon, rounds, and head -> ``mean``, ``sd``, ``values`` over seeds of the pooled RMSE of
        ``personal`` on test rows; ``added``: what LoRA adds to each head, seed by seed. Machine and versions.
    """
    cells = []
    with progress(total=len(HEADS) * 3 * rounds, description="bench lora", unit="run", quiet=quiet) as bar:
        for epsilon in HEADS["linear"]:
            scores: dict[str, list[float]] = {name: [] for name in HEADS}
            for name, changes in HEADS.items():
                one = load_scenario(scenario, (f"privacy.epsilon={epsilon}", "linear.enabled=false", *changes[epsilon]))
                for seed in range(rounds):
                    scores[name].append(score(one.model_copy(update={"seed": seed})))
                    bar.update(1)
            added = {head: _spread(np.subtract(scores[f"{head}-lora"], scores[head])) for head in ("linear", "kernel")}
            tests = {name: _spread(np.array(values)) for name, values in scores.items()}
            cells.append({"epsilon": epsilon, "test": tests, "added": added})
    return {"seeds": rounds, "cells": cells, **about("numpy", "torch", "opacus", "dp-accounting")}


def score(scenario: Scenario) -> float:
    """Pooled RMSE of ``personal`` on the test rows after all rounds."""
    use_threads(scenario.performance.threads)
    dataset, base = resident_dataset(scenario.data), resident_base(scenario.model.base)
    [plan] = plan_campaigns(scenario, base, dataset, quiet=True)
    head = fresh_head(plan, base, dataset)
    observer = RatingObserver(head, plan.texts, dataset, scenario)
    arrays = federate(plan, head, observer.fit, users=len(dataset.users))
    return rmse(observer.federated(arrays)["personal"], observer.test.target)


def fresh_head(plan: Plan, base: Base, dataset: Dataset) -> RatingHead:
    """A campaign's head at its public start."""
    head = make_head(base, plan.scenario, public_texts=len(dataset.public_texts))
    if not isinstance(head, RatingHead):
        raise ScenarioError("what LoRA adds is measured on ratings, the scenario has another task.")
    load_start(head, plan.start)
    return head


def federate(plan: Plan, head: RatingHead, rows: Rows, *, users: int) -> Arrays:
    """The shared arrays after all rounds with everybody, up to the last bits those of the campaign itself.

    Args:
        plan: At unit user, with one step a round.
        head: Of the plan; its trainable tensors are overwritten.
        rows: What everybody trains on.
        users: How many there are.
    """
    policy, scenario = plan.policy, plan.scenario
    if policy.unit != "user" or policy.steps != 1 or policy.cohort_size != users:
        raise ScenarioError("the shorter way needs privacy.unit = 'user', training.steps = 1 and cohort_size = 'all'.")
    module = GradSampleModule(head.train(), loss_reduction="sum")
    inputs = head.prepare(plan.texts.all)
    arrays: Arrays = {slot.name: plan.start[slot.name] for slot in policy.array_slots()}
    optimizer = OptimizerState()
    sizes = np.cumsum([array.size for array in arrays.values()])[:-1]
    counts = np.maximum(np.bincount(rows.user, minlength=users), 1)
    for number in range(1, policy.rounds + 1):
        load_shared(head, arrays)
        predicted, gradients = _gradients(module, head, inputs)
        weights = (predicted[rows.text] - rows.target) * counts[rows.user] ** -policy.record_exponent
        contributions = []
        for user in range(users):
            own = rows.of(user)
            flat = -policy.learning_rate * (weights[own] @ gradients[rows.text[own]])
            parts = zip(arrays.items(), np.split(flat, sizes), strict=True)
            change = {name: part.reshape(array.shape) for (name, array), part in parts}
            contributions.append(contribute(change, policy=policy, randomness=_draws(scenario, user, number)))
        if policy.trust == "central":
            total = noised_sum(contributions, randomness=_draws(scenario, -1, number))
        else:
            total = ring_sum(each.astype(np.uint32) for each in contributions)
        step = SERVER_OPTIMIZERS[scenario.federation.server_optimizer]
        arrays, optimizer = step(
            arrays, optimizer, mean_of_sum(total, policy=policy, round_number=1), scenario.federation
        )
    return arrays


def _draws(scenario: Scenario, device: int, round_number: int) -> SeededRandomness:
    return SeededRandomness(seed=scenario.seed, campaign=scenario.name, device=device, round_number=round_number)


def _gradients(module: GradSampleModule, head: RatingHead, inputs: Any) -> tuple[np.ndarray, np.ndarray]:
    """Prediction (M,) of every distinct text, and its gradient (M, P) in the order of the slots."""
    predicted = np.empty(len(inputs))
    gradients = np.empty((len(inputs), sum(p.numel() for p in shared_parameters(head).values())))
    for batch in micro_batches(np.arange(len(inputs)), inputs.lengths, _TOKENS):
        hidden, mask = inputs.batch(batch)
        with torch.no_grad():
            known = head.predict(hidden, mask)
        with quiet_hooks():
            module(hidden, mask, known - 1).sum().backward()  # half the squared error, whose slope is 1 there
        predicted[batch] = known.double().numpy()
        parts = []
        for parameter in shared_parameters(head).values():
            found: Any = parameter.grad_sample  # type: ignore[attr-defined]
            parts.append((found[-1] if isinstance(found, list) else found).reshape(len(batch), -1))
            parameter.grad_sample = parameter.grad = None  # type: ignore[attr-defined]
        gradients[batch] = torch.cat(parts, dim=1).double().numpy()
    return predicted, gradients


def _spread(values: np.ndarray) -> dict[str, Any]:
    sd = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "sd": sd, "values": values.tolist()}


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [
        f"RMSE of personal on test rows, mean of {measured['seeds']} seeds (sd); what LoRA adds: below 0 it helps",
        f"{'epsilon':>8}  " + "  ".join(f"{name:>16}" for name in HEADS) + "   to linear   to kernel",
    ]
    for cell in measured["cells"]:
        words = [f"{cell['test'][name]['mean']:.4f} ({cell['test'][name]['sd']:.4f})" for name in HEADS]
        added = [f"{cell['added'][head]['mean']:+.4f}" for head in ("linear", "kernel")]
        out.append(f"{cell['epsilon']:>8g}  " + "  ".join(f"{w:>16}" for w in words) + "   " + "     ".join(added))
    return out
