"""Where clipping, noise and the policy's constants meet: one noisy step of DP-SGD, or one without privacy."""

import torch
from opacus.optimizers import DPOptimizer
from torch import nn

from shared.errors import PrivacyError
from shared.privacy.clipping import clipped_sum
from shared.privacy.noise import Randomness
from shared.privacy.policy import Policy
from shared.privacy.promise import check_grid

_MAX_WAITING = 4_000_000  # per-sample gradient values kept before they are clipped: bounds memory, not the sum


class PolicyOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus' optimizer with every constant taken from the policy.

    It differs from its parent where that one takes a constant from private data or falls over: the denominator is the
    policy's and counts no micro-batch, a sample with a NaN gradient contributes zero, an empty batch still takes a
    noisy step, micro-batches are added into one clipped sum, and a trainable tensor without a per-sample gradient stops
    the step. ``accumulate`` once per micro-batch (or not at all), then ``step`` once.

    Args:
        parameters: What trains; all of them are clipped as one vector.
        policy: Clip norm C, noise multiplier z, grid, denominator B.
        randomness: Source of the noise.

    Raises:
        PrivacyError: The policy's grid is not the one its noise needs.

    Guarantee:
        One step moves the parameters by -lr g (S + N) / B, with g the grid. S is a vector of integers and adding or
        removing one record changes g S by at most C in L2 norm; N is discrete Gaussian noise with g N of standard
        deviation zC. What is released is a function of S + N, whose bits say nothing more.

    Source:
        Abadi et al. 2016, arXiv:1607.00133, Algorithm 1, with B a constant in place of the lot size; integer noise on
        rounded contributions after Kairouz et al. 2021, arXiv:2102.06387.
    """

    def __init__(self, parameters: list[nn.Parameter], policy: Policy, randomness: Randomness) -> None:
        check_grid(policy)
        super().__init__(
            torch.optim.SGD(parameters, lr=policy.learning_rate),
            noise_multiplier=policy.noise_multiplier,
            max_grad_norm=policy.clip_norm,
            expected_batch_size=policy.denominator,
        )
        self._randomness, self._grid = randomness, float(policy.grid or 0)
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
        sums = clipped_sum(self.grad_samples, clip_norm=self.max_grad_norm, grid=self._grid)
        for parameter, clipped in zip(self.params, sums, strict=True):
            so_far = parameter.summed_grad
            parameter.summed_grad = clipped if so_far is None else so_far + clipped
            parameter.grad_sample = None
        self._waiting = 0

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Add the noise to the sum, divide by the constant, move the parameters, forget everything.

        Raises:
            PrivacyError: The parameters are not finite afterwards; release nothing.
        """
        if self._waiting:
            self._clip_waiting()
        sizes = [parameter.numel() for parameter in self.params]
        noise = torch.from_numpy(self._randomness.gaussian_integers(sum(sizes)))  # one draw costs less than many
        for parameter, noised in zip(self.params, noise.split_with_sizes(sizes), strict=True):
            if parameter.summed_grad is not None:
                noised += parameter.summed_grad.to(noised.device).view(-1)
            change = noised.to(torch.float64) * (-self._learning_rate * self._grid / self.expected_batch_size)
            parameter.add_(change.to(parameter).view_as(parameter))
            parameter.grad_sample = parameter.summed_grad = parameter.grad = None
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.params):
            raise PrivacyError("parameters must be finite after a noised step, got NaN or an overflow.")


class PlainOptimizer:
    """A step without clipping and noise: summed gradient over a denominator.

    For trust ``none``, and at unit user, where a whole round's change is clipped (``client/training/contribution.py``).
    """

    def __init__(self, parameters: list[nn.Parameter], *, learning_rate: float, denominator: float) -> None:
        self._parameters, self._learning_rate, self._denominator = parameters, learning_rate, denominator

    def accumulate(self) -> None:
        """Autograd has already added the micro-batch to the gradient."""

    @torch.no_grad()
    def step(self) -> None:
        """Divide by the constant, move the parameters, forget the gradient."""
        for parameter in self._parameters:  # torch's own SGD does the same in three times the time
            if parameter.grad is not None:
                parameter.add_(parameter.grad.div_(self._denominator), alpha=-self._learning_rate)
                parameter.grad = None


def make_optimizer(
    parameters: list[nn.Parameter], policy: Policy, randomness: Randomness, *, records: int
) -> PolicyOptimizer | PlainOptimizer:
    """The optimizer of a policy's unit and trust.

    Args:
        parameters: What trains.
        policy: All constants.
        randomness: Source of the noise of a step, where a step has any.
        records: How many this device has; read at unit user alone, where whatever comes of it is clipped.
    """
    if policy.unit == "user":
        denominator = max(records, 1) ** policy.record_exponent
        return PlainOptimizer(parameters, learning_rate=policy.learning_rate, denominator=denominator)
    if policy.trust == "none":
        return PlainOptimizer(parameters, learning_rate=policy.learning_rate, denominator=policy.denominator)
    return PolicyOptimizer(parameters, policy, randomness)
