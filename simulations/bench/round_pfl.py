"""Rounds of federated averaging by pfl, a script for the Python of an environment that has it and nothing of ours.

``python -I round_pfl.py TASK.npz RESULT.npz``. The task holds ``x`` (N, p) and ``y`` (N,) of all users in a row,
``counts`` (users,), ``divisors`` (users,) of a user's summed loss, ``start`` (p,), ``centre``, ``rounds``,
``learning_rate``, ``server_learning_rate``, ``clip_norm`` and ``noise_multiplier`` (0 for clipping alone). The result
holds ``weight`` (p,) after the rounds, ``cpu_s`` and ``wall_s`` of them, and pfl's ``version``.
"""

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Linear(torch.nn.Module):
    """A linear head and half its squared error, as pfl asks for a model."""

    def __init__(self, start: np.ndarray, centre: float) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.from_numpy(start.copy()))
        self.centre = centre

    def loss(self, x: torch.Tensor, y: torch.Tensor, divisor: float) -> torch.Tensor:
        """Summed over a user's records, over what the sum is divided by."""
        return 0.5 * (x @ self.weight + self.centre - y).square().sum() / divisor

    def metrics(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Nothing is evaluated."""
        return {}


def main(task: Path, result: Path) -> None:
    """Run the rounds of a task and write their result."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import MinimizeReuseUserSampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel
    from pfl.privacy.gaussian_mechanism import GaussianMechanism
    from pfl.privacy.privacy_mechanism import CentrallyAppliedPrivacyMechanism, NormClippingOnly

    torch.set_num_threads(1)
    given = np.load(task)
    ends = np.cumsum(given["counts"])
    x, y = torch.from_numpy(given["x"]), torch.from_numpy(given["y"])
    users = {
        str(user): Dataset(
            raw_data=[x[end - count : end], y[end - count : end]],
            user_id=str(user),
            train_kwargs={"divisor": float(divisor)},
        )
        for user, (end, count, divisor) in enumerate(zip(ends, given["counts"], given["divisors"], strict=True))
    }
    clip_norm, noise_multiplier = float(given["clip_norm"]), float(given["noise_multiplier"])
    privacy: Any = NormClippingOnly(2, clip_norm)
    if noise_multiplier > 0:
        privacy = CentrallyAppliedPrivacyMechanism(GaussianMechanism(clip_norm, noise_multiplier))
    module = Linear(given["start"], float(given["centre"]))
    model = PyTorchModel(
        module,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(module.parameters(), lr=float(given["server_learning_rate"])),
    )
    backend = SimulatedBackend(
        training_data=FederatedDataset(users.__getitem__, MinimizeReuseUserSampler(list(users))),
        val_data=None,
        postprocessors=[privacy],
    )
    rounds = int(given["rounds"])
    wall, cpu = time.perf_counter(), time.process_time()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds,
            evaluation_frequency=rounds + 1,
            train_cohort_size=len(users),
            val_cohort_size=0,
        ),
        backend=backend,
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=1, local_learning_rate=float(given["learning_rate"]), local_batch_size=None
        ),
        model_eval_params=None,
        callbacks=[],
    )
    np.savez(
        result,
        weight=module.weight.detach().numpy(),
        cpu_s=time.process_time() - cpu,
        wall_s=time.perf_counter() - wall,
        version=version("pfl"),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
