"""Where clipping, noise and the policy's constants meet: one noisy step of DP-SGD, or one without privacy."""

import numpy as np
import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from shared.clipping import clipped_sum
from shared.noise import add_gaussian_noise
from shared.policy import Policy

_MAX_WAITING = 4_000_000  # per-sample gradient values kept before they are clipped: bounds memory, not the sum


class PolicyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer with every constant taken from the policy.

    It differs from its parent where that one takes a constant from private data or falls over: the denominator is the
    policy's and counts no micro-batch, a sample with a NaN gradient contributes zero, an empty batch still takes a
    noisy step, micro-batches are added into one clipped sum, and a trainable tensor without a per-sample gradient stops
    the step. ``accumulate`` once per micro-batch (or not at all), then ``step`` once.

    Args:
        parameters: What trains; all of them are clipped as one vector.
        policy: Clip norm C, noise multiplier z, denominator B.
        generator: Source of the noise.

    Guarantee:
        One step moves the parameters by -lr (S + N(0, (zC)^2 I)) / B, where adding or removing one record changes S by
        at most C in L2 norm.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1, with B a constant in place of the lot size.
    """

    def __init__(self, parameters: list[nn.Parameter], policy: Policy, generator: np.random.Generator) -> None:
        super().__init__(
            torch.optim.SGD(parameters, lr=policy.learning_rate),
            noise_multiplier=policy.noise_multiplier,
            max_grad_norm=policy.clip_norm,
            expected_batch_size=policy.denominator,
            generator=generator,
        )
        self._learning_rate = policy.learning_rate
        self._waiting = 0  # numbers in the per-sample gradients not clipped yet

    def accumulate(self) -> None:
        """Take in one micro-batch: its per-sample gradients wait to be clipped and added with those of others."""
        for parameter in self.params:
            latest = parameter.grad_sample
            self._waiting += (latest[-1] if isinstance(latest, list) else latest).numel()
        if self._waiting > _MAX_WAITING:
            self._clip_waiting()

    def _clip_waiting(self) -> None:
        """Clip the per-sample gradients that wait and add them to the step's sum."""
        sums = clipped_sum(self.grad_samples, clip_norm=self.max_grad_norm)
        for parameter, clipped in zip(self.params, sums, strict=True):
            so_far = parameter.summed_grad
            parameter.summed_grad = clipped if so_far is None else so_far + clipped
            parameter.grad_sample = None
        self._waiting = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Add the noise to the sum, divide by the constant, move the parameters, forget everything."""
        if self._waiting:
            self._clip_waiting()
        for parameter in self.params:
            total = parameter.summed_grad if parameter.summed_grad is not None else torch.zeros_like(parameter)
            stddev = self.noise_multiplier * self.max_grad_norm
            noised = add_gaussian_noise(total, stddev=stddev, generator=self.generator)
            parameter.add_(noised, alpha=-self._learning_rate / self.expected_batch_size)
            parameter.grad_sample = parameter.summed_grad = parameter.grad = None


class PlainOptimizer:
    """The same step without clipping and noise, for trust ``none``: summed gradient over the same constant."""

    def __init__(self, parameters: list[nn.Parameter], policy: Policy, generator: np.random.Generator) -> None:
        del generator  # nothing is drawn; the signature is the one of PolicyOptimizer
        self._sgd = torch.optim.SGD(parameters, lr=policy.learning_rate)
        self._parameters, self._denominator = parameters, policy.denominator

    def accumulate(self) -> None:
        """Autograd has already added the micro-batch to the gradient."""

    def step(self) -> None:
        """Divide by the constant, move the parameters, forget the gradient."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad /= self._denominator
        self._sgd.step()
        self._sgd.zero_grad()


OPTIMIZERS: dict[str, type[PolicyOptimizer] | type[PlainOptimizer]] = {"local": PolicyOptimizer, "none": PlainOptimizer}
