"""The local training step, differential privacy included, on one screen."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from opacus import GradSampleModule

from client.training.optimizer import make_optimizer
from client.training.per_sample import PerSample
from shared.errors import PrivacyError, RefusedError
from shared.heads.adapter import Arrays, load_shared, private_parameters, read_shared, shared_parameters
from shared.heads.head import Head
from shared.heads.tasks import Targets
from shared.models.features import Features, micro_batches
from shared.models.products import Precision
from shared.privacy.clipping import clip_by_norm
from shared.privacy.noise import Randomness
from shared.privacy.policy import Policy


def make_trainable(head: Head, policy: Policy, *, precision: Precision = "fp32") -> GradSampleModule | Head:
    """Give the head per-sample gradients where the policy clips them, and fast products with what is frozen of it.

    Once per process: hooks are not free.

    Args:
        head: At its public start or any other; what is frozen of it must not change afterwards.
        policy: Says whether gradients are clipped one by one.
        precision: Of products with frozen weights; whatever it is, per-sample gradients are float32.
    """
    head.quicken(precision)
    head.train()  # Opacus records activations in this mode only; the head has no dropout that it could switch on
    per_sample = policy.unit == "record" and policy.trust != "none"
    return PerSample(head, loss_reduction="sum") if per_sample else head


def train_shared(
    module: GradSampleModule | Head,
    start: Arrays,
    features: Features,
    targets: Targets,
    *,
    policy: Policy,
    micro_batch: int,
    randomness: Randomness,
    round_number: int = 1,
) -> Arrays:
    """Take the policy's steps from the server's arrays and return the change, and nothing else.

    Tensors that a device keeps (``policy.private``) are trained in the same steps, from what the head holds; at unit
    record they are clipped and noised with the shared ones as one vector, so that what is kept tells no more of a
    record than what is sent. They are left in the head.

    Args:
        module: The head, from ``make_trainable``; its shared tensors are overwritten.
        start: The shared arrays of the request.
        features: Prepared backbone outputs of this device's records (n of them, 0 is allowed).
        targets: What they are to predict.
        policy: All constants; at unit record nothing is taken from n.
        micro_batch: Tokens per forward pass, padding included; moves the last bits of the sum alone, and at 1, where
            every record has a pass of its own, no record moves another's gradient at all.
        randomness: Source of the Poisson draws and of the noise.
        round_number: Which of the shared tensors have their turn.

    Returns:
        Name of every slot of the turn -> change after ``policy.steps`` steps. At unit record it is noised and of L2
        norm at most ``policy.max_update_norm``; at unit user it is neither, may be NaN, and leaves through
        ``contribute`` alone.

    Raises:
        RefusedError: The noised state is not finite.

    Guarantee:
        At unit record, releasing the change is ``policy.steps`` steps of the (Poisson-subsampled) Gaussian mechanism
        on the records.
    """
    head = module._module if isinstance(module, GradSampleModule) else module
    device = head.device
    load_shared(head, start)
    shared, turn = shared_parameters(head), [slot.name for slot in policy.turn_slots(round_number)]
    parameters = [*(shared[name] for name in turn), *private_parameters(head).values()]
    optimizer = make_optimizer(parameters, policy, randomness, records=len(targets))
    idle = [parameter for name, parameter in shared.items() if name not in turn]
    with quiet_hooks():
        for _ in range(policy.steps):
            rows = _draw(len(targets), policy.sampling_rate, randomness)
            for batch in micro_batches(rows, features.lengths, micro_batch):
                hidden, mask = features.batch(batch)  # (B, T, d), (B, T)
                wanted = targets.batch(batch, hidden.shape[1])
                losses = module(hidden.to(device), mask.to(device), wanted.to(device))  # (B,)
                losses.sum().backward()  # a sum of per-sample losses: none touches another's gradient
                for (
                    parameter
                ) in idle:  # whose turn it is not; Opacus' hooks would miss a tensor that is frozen meanwhile
                    parameter.grad = parameter.grad_sample = None  # type: ignore[attr-defined]
                optimizer.accumulate()
            try:
                optimizer.step()
            except PrivacyError:
                raise RefusedError("NOT_FINITE") from None
    update = {name: after - start[name] for name, after in read_shared(head).items() if name in turn}
    if policy.unit == "user" and policy.trust != "none":
        return update
    if not all(np.isfinite(change).all() for change in update.values()):
        raise RefusedError("NOT_FINITE")
    return clip_by_norm(update, clip_norm=policy.max_update_norm)[0]


@contextmanager
def quiet_hooks() -> Iterator[None]:
    """Frozen inputs need no gradient: that is the point of the cut, and torch warns of it at every backward."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        yield


def _draw(count: int, rate: float, randomness: Randomness) -> np.ndarray:
    """Each record independently with probability ``rate``; all of them at 1. Empty draws are legal and must happen."""
    if rate == 1.0:
        return np.arange(count)
    return np.flatnonzero(randomness.bernoulli(rate, count))
