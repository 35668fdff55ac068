"""Aggregation: pure functions from accepted updates to the next shared arrays."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import DTypeLike

from shared.config import FederationConfig
from shared.heads.adapter import Arrays
from shared.privacy.noise import Randomness
from shared.privacy.policy import SUM, Policy


@dataclass(frozen=True)
class OptimizerState:
    """What a server optimiser carries from round to round, by slot: steps taken, first and second moments (float64)."""

    steps: Mapping[str, int] = field(default_factory=dict)
    first: Mapping[str, np.ndarray] = field(default_factory=dict)
    second: Mapping[str, np.ndarray] = field(default_factory=dict)


def mean_update(updates: Iterable[Mapping[str, np.ndarray]], *, denominator: int) -> dict[str, np.ndarray]:
    """Sum updates with equal weights and divide by a public constant.

    Args:
        updates: One mapping a device, all with the same names and shapes.
        denominator: The policy's cohort size, however many replied: dividing by the replies would let one device's
            presence change everyone's weight (rule P2).

    Returns:
        Slot name -> float64 array.

    Raises:
        ValueError: There is no update.

    Example:
        >>> mean_update([{"w": np.ones(2)}, {"w": np.full(2, 3.0)}], denominator=4)["w"].tolist()
        [1.0, 1.0]
    """
    total = sum_updates(updates, dtype=np.float64)
    if not total:
        raise ValueError("a mean needs at least one update, got none.")
    return {name: array / denominator for name, array in total.items()}


def sum_updates(updates: Iterable[Mapping[str, np.ndarray]], *, dtype: DTypeLike) -> dict[str, np.ndarray]:
    """Add updates up, one after the other and holding one at a time; integers wrap around as their type does.

    Args:
        updates: One mapping a device, all with the same names and shapes, in an order that is always the same: a sum of
            floats depends on it.
        dtype: Of the sum.

    Returns:
        Slot name -> array; empty where there is no update.

    Example:
        >>> sum_updates(({"w": np.array([n])} for n in range(4)), dtype=np.float64)
        {'w': array([6.])}
    """
    total: dict[str, np.ndarray] = {}
    for update in updates:
        for name, array in update.items():
            if name not in total:
                total[name] = np.zeros(array.shape, dtype)
            total[name] += array.astype(dtype)
    return total


def mean_of_sum(total: np.ndarray, *, policy: Policy, round_number: int) -> dict[str, np.ndarray]:
    """The mean change that a noised sum of contributions stands for.

    Args:
        total: (P,) integers, in steps of the policy's grid.
        policy: Grid, devices asked for a sum, slots.
        round_number: Which of them it changes.

    Returns:
        Slot name -> float64 array: the sum over the devices asked for it, however many contributed (rule P2).
    """
    mean = total.astype(np.float64) * (float(policy.grid or 0) / policy.sum_size)
    slots = policy.turn_slots(round_number)
    parts = np.split(mean, np.cumsum([math.prod(slot.shape) for slot in slots])[:-1])
    return {slot.name: part.reshape(slot.shape) for slot, part in zip(slots, parts, strict=True)}


def ring_sum(contributions: Iterable[np.ndarray]) -> np.ndarray:
    """Sum vectors (P,) uint32 modulo 2^32, at least one; (P,) int64, the ring's upper half being the negative numbers.

    Example:
        >>> ring_sum([np.array([5, 2**32 - 3], dtype=np.uint32), np.array([1, 1], dtype=np.uint32)]).tolist()
        [6, -2]
    """
    total = sum_updates(({SUM: each} for each in contributions), dtype=np.uint32)[SUM]
    return np.asarray(total.view(np.int32).astype(np.int64))


def noised_sum(contributions: Iterable[np.ndarray], *, randomness: Randomness) -> np.ndarray:
    """Sum integers and add the noise of trust ``central``.

    Args:
        contributions: (P,) integers each, of L2 norm at most the clip norm in steps of the grid; at least one.
        randomness: Source of the noise; of the operating system's outside simulations.

    Returns:
        (P,) int64, the only thing about the contributions that may be kept.

    Guarantee:
        With a grid of zC / GRID_SIGMA this is the discrete Gaussian mechanism of noise multiplier z.
    """
    total = sum_updates(({SUM: each} for each in contributions), dtype=np.int64)[SUM]
    return np.asarray(total + randomness.gaussian_integers(len(total)))


def momentum_step(
    arrays: Arrays, state: OptimizerState, update: Mapping[str, np.ndarray], federation: FederationConfig
) -> tuple[Arrays, OptimizerState]:
    """Move the shared arrays along the mean update with momentum.

    Args:
        arrays: The shared arrays, float32.
        state: ``first`` is the velocity; empty mappings before the first round.
        update: The mean update, float64, of all or some of the arrays; the others stay, and so does their state.
        federation: ``server_learning_rate``, ``lora_learning_rate_factor`` and ``server_momentum``.

    Returns:
        The next arrays and the next state.

    Source:
        FedAvgM, Hsu et al. 2019, arXiv:1909.06335, Algorithm 1.
    """
    first = {name: federation.server_momentum * state.first.get(name, 0.0) + update[name] for name in update}
    return _move(arrays, first, federation), OptimizerState(_one_more(state, update), {**state.first, **first})


def adam_step(
    arrays: Arrays, state: OptimizerState, update: Mapping[str, np.ndarray], federation: FederationConfig
) -> tuple[Arrays, OptimizerState]:
    """Move the shared arrays by Adam, with bias correction; parameters as in ``momentum_step``.

    Noise is the same in every coordinate and signal is not, so a step per coordinate is worth more here than without
    privacy. Like momentum it reads only what was already released: post-processing, no cost in privacy.

    Source:
        FedAdam, Reddi et al. 2021, arXiv:2003.00295, Algorithm 2, with the bias correction of Kingma & Ba 2015.
    """
    beta1, beta2 = federation.server_momentum, federation.adam_beta2
    steps = _one_more(state, update)
    first = {n: beta1 * state.first.get(n, 0.0) + (1 - beta1) * update[n] for n in update}
    second = {n: beta2 * state.second.get(n, 0.0) + (1 - beta2) * update[n] ** 2 for n in update}
    unbiased = {n: (first[n] / (1 - beta1 ** steps[n]), second[n] / (1 - beta2 ** steps[n])) for n in update}
    direction = {n: mean / (np.sqrt(square) + federation.adam_epsilon) for n, (mean, square) in unbiased.items()}
    moments = {**state.first, **first}, {**state.second, **second}
    return _move(arrays, direction, federation), OptimizerState(steps, *moments)


def _one_more(state: OptimizerState, update: Mapping[str, np.ndarray]) -> dict[str, int]:
    return {**state.steps, **{name: state.steps.get(name, 0) + 1 for name in update}}


def _move(arrays: Arrays, direction: Mapping[str, np.ndarray], federation: FederationConfig) -> Arrays:
    rate = federation.server_learning_rate
    rates = {name: rate * federation.lora_learning_rate_factor if "lora_" in name else rate for name in arrays}
    return {
        name: (array + rates[name] * direction[name]).astype(np.float32) if name in direction else array
        for name, array in arrays.items()
    }


SERVER_OPTIMIZERS = {"momentum": momentum_step, "adam": adam_step}
