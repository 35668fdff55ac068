"""Mutants: the real code with one fault patched into this process, which an audit must notice before it may pass.

Each patches the names that the device and the server look up, and puts them back when its block ends, however it ends.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any
from unittest.mock import patch

import numpy as np

from client.training.optimizer import PolicyOptimizer
from shared.errors import ScenarioError
from shared.heads.adapter import Arrays
from shared.heads.tasks import Targets
from shared.models.features import Features
from shared.privacy.noise import GRID_SIGMA, Randomness
from shared.privacy.policy import Policy

_LOOSE = 64  # a power of two, so that noise and grid stay what they are, bit for bit


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: How others ask for it.
        what: What is wrong, in words a reader understands.
        units: Privacy units it applies to.
        apply: Opens a block in which the fault is there.
    """

    name: str
    what: str
    units: tuple[str, ...]
    apply: Callable[[], AbstractContextManager[object]]


def mutant(name: str) -> AbstractContextManager[object]:
    """A block in which one fault is there, by its name in ``MUTANTS``.

    Raises:
        ScenarioError: There is no such mutant.

    Guarantee:
        After the block, left by an exception too, the code is what it was.
    """
    if name not in MUTANTS:
        raise ScenarioError(f"a mutant must be one of {', '.join(MUTANTS)}, got {name!r}.")
    return MUTANTS[name].apply()


class _Scaled:
    """Draws of another source, its noise multiplied by a factor."""

    def __init__(self, randomness: Randomness, factor: float) -> None:
        self._randomness, self._factor = randomness, factor

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        return self._randomness.bernoulli(probability, count)

    def gaussian_integers(self, count: int, *, log2_sigma: int = GRID_SIGMA.bit_length() - 1) -> np.ndarray:
        noise = self._randomness.gaussian_integers(count, log2_sigma=log2_sigma)
        scaled: np.ndarray = np.rint(noise * self._factor).astype(np.int64)
        return scaled


def _wrap(**wrappers: Callable[[Any], Any]) -> Callable[[], AbstractContextManager[object]]:
    """Opens a block in which each of the named places holds its wrapper of what it held before."""

    @contextmanager
    def block() -> Iterator[None]:
        with ExitStack() as stack:
            for place, wrapper in wrappers.items():
                stack.enter_context(patch(_PLACES[place], wrapper(resolve_name(_PLACES[place]))))
            yield

    return block


def quieter(factor: float) -> Callable[[], AbstractContextManager[object]]:
    """All noise smaller: of a device's steps, of its share in a sum, and of the server."""

    def optimizer(make: Any) -> Any:
        return lambda parameters, policy, randomness, *, records: make(
            parameters, policy, _Scaled(randomness, factor), records=records
        )

    def contribution(contribute: Any) -> Any:
        return lambda change, *, policy, randomness: contribute(
            change, policy=policy, randomness=_Scaled(randomness, factor)
        )

    def total(noised_sum: Any) -> Any:
        return lambda contributions, *, randomness: noised_sum(contributions, randomness=_Scaled(randomness, factor))

    return _wrap(optimizer=optimizer, contribution=contribution, total=total)


def _loosely() -> Callable[[], AbstractContextManager[object]]:
    """Contributions up to 64 times too long; the gate of trust ``central``, which would refuse them, lets them in.

    Without any bound at all integers would overflow, which a device notices: that is not the fault meant here.
    """

    def clip(clipped_sum: Any) -> Any:
        return lambda per_sample, *, clip_norm, grid: clipped_sum(per_sample, clip_norm=clip_norm * _LOOSE, grid=grid)

    def contribution(contribute: Any) -> Any:
        return lambda change, *, policy, randomness: contribute(change, policy=_loose(policy), randomness=randomness)

    def gate(check: Any) -> Any:
        return lambda reply, *, policy, **echoed: check(
            reply,
            policy=policy.model_copy(update={"max_update_norm": policy.max_update_norm * _LOOSE}),
            **echoed,
        )

    return _wrap(clip=clip, contribution=contribution, gate=gate)


def _loose(policy: Policy) -> Policy:
    """A policy with a larger bound and the very same noise."""
    if policy.clip_norm is None:
        return policy
    loose = {"clip_norm": policy.clip_norm * _LOOSE, "noise_multiplier": policy.noise_multiplier / _LOOSE}
    return policy.model_copy(update=loose)


def _clip_each_tensor(clipped_sum: Any) -> Any:
    return lambda per_sample, *, clip_norm, grid: [
        clipped_sum([tensor], clip_norm=clip_norm, grid=grid)[0] for tensor in per_sample
    ]


def _contribute_twice(contribute: Any) -> Any:
    """Under one share of noise; under ``central`` the server would refuse a vector that is too long."""

    def twice(change: Arrays, *, policy: Policy, randomness: Randomness) -> np.ndarray:
        once: np.ndarray = contribute(change, policy=policy, randomness=randomness)
        if policy.trust == "distributed":
            once += contribute(change, policy=policy, randomness=_Scaled(randomness, 0.0))
        return once

    return twice


def _sum_twice(noised_sum: Any) -> Any:
    return lambda contributions, *, randomness: noised_sum(
        (2 * each.astype(np.int64) for each in contributions), randomness=randomness
    )


def _draw_twice(draw: Any) -> Any:
    return lambda count, rate, randomness: np.repeat(draw(count, rate, randomness), 2)


def _draw_shuffled(draw: Any) -> Any:
    """Batches of fixed size out of a shuffle, where the policy's price is that of independent draws."""
    del draw

    def shuffled(count: int, rate: float, randomness: Randomness) -> np.ndarray:
        keys = np.packbits(randomness.bernoulli(0.5, 64 * count)).view(np.uint64)
        return np.sort(np.argsort(keys)[: round(rate * count)])

    return shuffled


def _draw_by_count(draw: Any) -> Any:
    return lambda count, _, randomness: draw(count, max(count, 1) ** -0.5, randomness)


def _trained_with(change: Callable[[int], Mapping[str, object]]) -> Callable[[], AbstractContextManager[object]]:
    """Training under a policy some of whose constants come from the number of records."""

    def training(train_shared: Any) -> Any:
        def train(module: object, start: Arrays, features: Features, targets: Targets, **options: Any) -> Any:
            policy = options.pop("policy").model_copy(update=dict(change(len(targets))))
            return train_shared(module, start, features, targets, policy=policy, **options)

        return train

    return _wrap(training=training)


def _told(count: int) -> Mapping[str, object]:
    logging.getLogger("sottovoce.client").warning("trained on %d records", count)
    return {}


def _skip_empty(step: Any) -> Any:
    def step_if_any(self: PolicyOptimizer, closure: None = None) -> None:
        if self._waiting or any(parameter.summed_grad is not None for parameter in self.params):
            step(self, closure)

    return step_if_any


_PLACES = {  # where the real code looks up what is patched
    "optimizer": "client.training.train.make_optimizer",
    "clip": "client.training.optimizer.clipped_sum",
    "step": "client.training.optimizer.PolicyOptimizer.step",
    "draw": "client.training.train._draw",
    "training": "client.app.train_shared",
    "contribution": "client.app.contribute",
    "total": "server.strategy.noised_sum",
    "gate": "server.strategy.check_reply",
}
_BOTH = ("record", "user")
MUTANTS: Mapping[str, Mutant] = {
    each.name: each
    for each in (
        Mutant("no-noise", "no noise is added", _BOTH, quieter(0.0)),
        Mutant("quarter-noise", "a quarter of the noise is added", _BOTH, quieter(0.25)),
        Mutant("no-clip", "contributions are not clipped", _BOTH, _loosely()),
        Mutant("clip-each-tensor", "every tensor is clipped on its own", ("record",), _wrap(clip=_clip_each_tensor)),
        Mutant("record-twice", "a record counts twice", ("record",), _wrap(draw=_draw_twice)),
        Mutant("user-twice", "a user counts twice", ("user",), _wrap(contribution=_contribute_twice, total=_sum_twice)),
        Mutant(
            "wrong-sampler",
            "shuffled batches of fixed size pass for independent draws",
            ("record",),
            _wrap(draw=_draw_shuffled),
        ),
        Mutant(
            "data-rate", "the sampling rate comes from the number of records", ("record",), _wrap(draw=_draw_by_count)
        ),
        Mutant(
            "data-steps",
            "the number of steps comes from the number of records",
            ("record",),
            _trained_with(lambda count: {"steps": max(count, 1)}),
        ),
        Mutant(
            "data-denominator",
            "the sum is divided by the number of records",
            ("record",),
            _trained_with(lambda count: {"denominator": float(max(count, 1))}),
        ),
        Mutant("skip-empty", "a step without records adds no noise", ("record",), _wrap(step=_skip_empty)),
        Mutant("tells-count", "the log tells the number of records", _BOTH, _trained_with(_told)),
    )
}
