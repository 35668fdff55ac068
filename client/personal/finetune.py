"""Train a private copy of the shared tensors on the device's own records. It never leaves, so it needs no noise."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from shared.config import PersonalConfig
from shared.errors import ScenarioError
from shared.heads.adapter import (
    Arrays,
    Slot,
    check_arrays,
    forget_device,
    load_shared,
    private_parameters,
    read_private,
    read_shared,
    shared_parameters,
    wire_name,
)
from shared.heads.head import Head
from shared.heads.output import FACTOR_SPREAD
from shared.heads.rating import RatingHead
from shared.heads.tasks import Targets
from shared.models.features import Features


def keep(
    head: Head,
    start: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """No private part: the shared arrays stand."""
    del head, features, targets, personal, generator
    return start


def fine_tune(
    head: Head,
    start: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """Pass over the records with Adam, starting from the shared arrays.

    Args:
        head: The campaign's head; its trainable tensors are overwritten.
        start: The shared arrays; left as they are.
        features: Prepared backbone outputs of the device's records (n of them, 0 is allowed).
        targets: What they are to predict.
        personal: Passes, records a step, and Adam's rate.
        generator: Of the order of the records.

    Returns:
        Private arrays of the same names and shapes.

    Source:
        Fine-tuning after federation, the strong simple baseline of Yu et al. 2020, arXiv:2002.04758.
    """
    load_shared(head, start)
    _descend(head, shared_parameters(head), features, targets, personal=personal, generator=generator)
    return read_shared(head)


def ditto(
    head: Head,
    start: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """A copy that fits the records and stays near the shared arrays; arguments as for ``fine_tune``.

    Returns:
        argmin over v of the records' mean loss + proximal / 2 |v - start|^2: exactly, for a rating head that shares its
        output alone; else what ``epochs`` passes of proximal Adam make of it.

    Guarantee:
        Without ``proximal`` these passes are those of ``fine_tune``; as it grows the arrays go to the shared ones.

    Source:
        Li et al. 2021, arXiv:2012.04221, equation 1. The pull is a proximal step in Adam's own metric (Yun, Lozano and
        Yang 2020, arXiv:2007.07484, ProxGen), which no strength makes unstable; Ditto adds it to the gradient of SGD.
    """
    load_shared(head, start)
    parameters = shared_parameters(head)
    if not len(targets):
        return read_shared(head)
    if isinstance(head, RatingHead) and not len(head.blocks) and list(parameters) == ["output.weight"]:
        parameters["output.weight"].data += _nearest_output(head, features, targets, personal.proximal)
    else:
        _descend(head, parameters, features, targets, personal=personal, generator=generator, pull=personal.proximal)
    return read_shared(head)


def fine_tune_second(
    head: Head,
    start: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """A second adapter, trained from the shared one; arguments as for ``fine_tune``.

    LoRA's A stays the shared one: where two adapters share it, weighing their outputs in every layer is weighing their
    tensors, so that a text's mixture is one adapter again (``client.personal.personalize.mixed``).

    Source:
        Yang et al. 2024, arXiv:2403.19211, FedDPA-F: the local adapter is trained after the federation, the global one
        frozen. There A is trained too, and both are weighed by a half while the second is trained.
    """
    load_shared(head, start)
    second = {name: p for name, p in shared_parameters(head).items() if not name.endswith("lora_A")}
    _descend(head, second, features, targets, personal=personal, generator=generator)
    return read_shared(head)


def fine_tune_private(
    head: Head,
    start: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """Pass over the records with Adam, moving only the tensors a device keeps; arguments as for ``fine_tune``.

    They begin at zero, for those of the last round hold the noise of their steps.

    Source:
        Arivazhagan et al. 2019, arXiv:1912.00818 (FedPer), and Guo et al. 2024, arXiv:2410.01463 (FedSA-LoRA), where
        they go on from the last round.
    """
    load_shared(head, start)
    forget_device(head)
    _descend(head, private_parameters(head), features, targets, personal=personal, generator=generator)
    return {**start, **read_private(head)}


def fit_offset(
    head: Head,
    start: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """A user's own offset to the shared vector, in closed form; arguments as for ``fine_tune``.

    Source:
        The user model of Li et al. 2024, arXiv:2402.05133 (P-RLHF): a vector shared by all plus one of the user's own.
        Ridge regression on the factors of the device's records, in its dual form.
    """
    del generator  # a closed form
    load_shared(head, start)
    forget_device(head)
    if not isinstance(head, RatingHead) or head.factors is None or head.offset is None:
        raise ScenarioError(f"personal.method = {personal.method!r} needs a head with users' vectors.")
    if len(targets):
        hidden, mask = features.batch(range(len(features)))
        wanted = targets.batch(np.arange(len(targets)), hidden.shape[1])
        with torch.no_grad():
            factors = head.factors(head.projected(hidden.to(head.device), mask.to(head.device)))  # (n, dimensions)
            residuals = wanted.to(head.device) - head.predict(hidden.to(head.device), mask.to(head.device))
            gram = (factors @ factors.T).double()
            gram += personal.ridge * FACTOR_SPREAD**2 * torch.eye(len(gram)).to(gram)
            dual = torch.linalg.solve(gram, residuals.double())
            head.offset.weight.copy_((factors.T.double() @ dual)[None])
    return {**start, **read_private(head)}


def load_tensors(head: Head, arrays: Arrays) -> None:
    """Copy any tensors of a head, by wire name, into it.

    Raises:
        CampaignError: One is not a tensor of this head, or not finite.
    """
    known = {wire_name(name, first_block=head.first_block): parameter for name, parameter in head.named_parameters()}
    check_arrays(arrays, [Slot(n, tuple(known[n].shape), "float32", "private") for n in arrays if n in known])
    with torch.no_grad():
        for name, array in arrays.items():
            known[name].copy_(torch.from_numpy(np.array(array)))


@torch.no_grad()
def predict_with(head: RatingHead, arrays: Arrays, inputs: Features, *, batch: int = 64) -> np.ndarray:
    """Predictions (n,) float64 for prepared inputs, through a head with these tensors in it; they stay in it."""
    load_tensors(head, arrays)
    found = np.empty(len(inputs))
    order = np.argsort(inputs.lengths, kind="stable")
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        hidden, mask = inputs.batch(rows)
        found[rows] = head.predict(hidden.to(head.device), mask.to(head.device)).cpu().numpy()
    return found


def _nearest_output(head: RatingHead, features: Features, targets: Targets, proximal: float) -> torch.Tensor:
    """Ditto's step (1, P) away from the head's output, in its dual form: an n x n system."""
    hidden, mask = features.batch(range(len(features)))
    with torch.no_grad():
        wanted = targets.batch(np.arange(len(targets)), 1)
        residuals = (wanted - head.predict(hidden.to(head.device), mask.to(head.device)).cpu()).double().numpy()
    projected = hidden[:, 0].double().numpy()  # (n, P)
    gram = projected @ projected.T + len(features) * proximal * np.eye(len(features))
    solve = np.linalg.solve if proximal else _least_norm
    dual = solve(gram, residuals)
    return torch.from_numpy(projected.T @ dual)[None].to(head.output.weight)


def _least_norm(gram: np.ndarray, residuals: np.ndarray) -> np.ndarray:
    """Of all that fit, the nearest."""
    return np.asarray(np.linalg.lstsq(gram, residuals, rcond=None)[0])


def _descend(
    head: Head,
    parameters: Mapping[str, nn.Parameter],
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
    pull: float = 0.0,
) -> None:
    optimizer = torch.optim.Adam(parameters.values(), lr=personal.learning_rate)
    anchors = [parameter.detach().clone() for parameter in parameters.values()]
    for _ in range(personal.epochs):
        order = generator.permutation(len(targets))
        for first in range(0, len(order), personal.batch_size):
            rows = order[first : first + personal.batch_size]
            hidden, mask = features.batch(rows)
            wanted = targets.batch(rows, hidden.shape[1])
            loss = head(hidden.to(head.device), mask.to(head.device), wanted.to(head.device)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if pull:
                _pull_back(optimizer, anchors, pull)
    optimizer.zero_grad()


@torch.no_grad()
def _pull_back(optimizer: torch.optim.Adam, anchors: list[torch.Tensor], pull: float) -> None:
    """The proximal step of pull / 2 |v - anchor|^2 in the metric of Adam's last step."""
    (group,) = optimizer.param_groups
    strength = group["lr"] * pull
    for parameter, anchor in zip(group["params"], anchors, strict=True):
        state = optimizer.state[parameter]
        if state:  # a tensor without a gradient has not moved
            metric = (state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"])).sqrt() + group["eps"]
            parameter.copy_((metric * parameter + strength * anchor) / (metric + strength))
