"""What a device adds for itself: a private output on the shared features. It never leaves, so it needs no noise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from client.finetune import fine_tune, keep
from shared.adapter import Arrays
from shared.config import PersonalConfig
from shared.errors import ScenarioError
from shared.features import Features
from shared.head import CausalHead, RatingHead
from shared.registry import lookup
from shared.tasks import Targets


@dataclass(frozen=True)
class PrivateOutput:
    """A private correction of scope ``private``: prediction = shared prediction + features @ weight + bias.

    Attributes:
        weight: (d,) float64, on the head's pooled features.
    """

    weight: np.ndarray
    bias: float

    def predict(self, features: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """Features (n, d) and shared predictions (n,) -> personal predictions (n,)."""
        return np.asarray(shared + features.astype(np.float64, copy=False) @ self.weight + self.bias)


def fit_none(
    features: np.ndarray, residuals: np.ndarray, *, mean: np.ndarray, personal: PersonalConfig
) -> PrivateOutput:
    """No private part: the shared prediction stands."""
    del residuals, mean, personal
    return PrivateOutput(np.zeros(features.shape[1]), 0.0)


def fit_ridge(
    features: np.ndarray, residuals: np.ndarray, *, mean: np.ndarray, personal: PersonalConfig
) -> PrivateOutput:
    """Fit a bias, then a ridge regression of what is left, both in closed form.

    Args:
        features: (n, d) pooled features of this device's records; n = 0 is allowed.
        residuals: (n,) target minus shared prediction.
        mean: (d,) public centre of the features.
        personal: Strengths of the two penalties.

    Returns:
        The private output; with no record it is zero.

    Source:
        Ridge regression in its dual form: w = X' (X X' + ridge I)^-1 y, an n x n system, n < d on most devices.
    """
    count, width = features.shape
    if not count:
        return PrivateOutput(np.zeros(width), 0.0)
    level = float(residuals.sum()) / (count + personal.bias_shrinkage)
    centred = features.astype(np.float64, copy=False) - mean
    gram = centred @ centred.T  # (n, n)
    dual = np.linalg.solve(gram + personal.ridge * np.eye(count), residuals - level)
    weight = centred.T @ dual
    return PrivateOutput(weight, level - float(mean @ weight))


@dataclass(frozen=True)
class PersonalMethod:
    """How a device fits its private part, and what rule P1 must know of it.

    Attributes:
        fit: As ``fit_ridge``: features (n, d), residuals (n,), ``mean``, ``personal`` -> a private output.
        read_by_shared_step: Whether shared training ever reads what ``fit`` made on the same records. Stated by the
            author; anything but False is refused where records are to be protected.
        summary: One line for people.
        adapt: As ``client.finetune.fine_tune``, where the task has no output layer to fit; None: not for such tasks.
    """

    fit: Callable[..., PrivateOutput]
    read_by_shared_step: bool
    summary: str
    adapt: Callable[..., Arrays] | None = None

    def __call__(
        self, features: np.ndarray, residuals: np.ndarray, *, mean: np.ndarray, personal: PersonalConfig
    ) -> PrivateOutput:
        """Fit.

        Raises:
            ScenarioError: The result is not a finite private output of the features' width.
        """
        # a copy: the centre is part of the public start, which nothing fitted on a device may change
        found = self.fit(features, residuals, mean=mean.copy(), personal=personal)
        width = features.shape[1]
        if not (
            isinstance(found, PrivateOutput)
            and _is_finite(found.weight, shape=(width,))
            and _is_finite(found.bias, shape=())
        ):
            raise ScenarioError(
                f"personal.method = {personal.method!r} must give a finite PrivateOutput of width {width}, "
                f"got {type(found).__name__}; choose another or mend it."
            )
        return found


def _is_finite(values: object, *, shape: tuple[int, ...]) -> bool:
    array = np.asarray(values)
    return array.shape == shape and array.dtype.kind in "fiu" and bool(np.isfinite(array).all())


def fit_output(
    head: RatingHead, pooled: np.ndarray, shared: np.ndarray, targets: np.ndarray, *, personal: PersonalConfig
) -> PrivateOutput:
    """The private output of one user, fitted on all of the user's training rows.

    Args:
        head: Holds the public centre of the features.
        pooled: (n, d), with ``shared`` (n,) as ``text_predictions`` gives them.
        shared: Shared predictions of the rows.
        targets: (n,) what the user said.
        personal: The method and its strengths.

    Raises:
        ScenarioError: See ``PersonalMethod``.
    """
    mean: np.ndarray = head.mean.detach().cpu().numpy()
    return personal_method(personal.method)(pooled, targets - shared, mean=mean, personal=personal)


def fit_lora(
    head: CausalHead,
    arrays: Arrays,
    features: Features,
    targets: Targets,
    *,
    personal: PersonalConfig,
    generator: np.random.Generator,
) -> Arrays:
    """The LoRA of one user, fine-tuned from shared arrays on all of the user's training rows; as ``fine_tune``.

    Raises:
        ScenarioError: The personal method has no form for language models.
    """
    check_task(personal.method, "generation")
    adapt = cast(Callable[..., Arrays], personal_method(personal.method).adapt)
    return adapt(head, arrays, features, targets, personal=personal, generator=generator)


PERSONAL_METHODS: dict[str, PersonalMethod] = {
    "none": PersonalMethod(fit_none, read_by_shared_step=False, summary="no private part", adapt=keep),
    "fine-tune": PersonalMethod(
        fit_ridge,
        read_by_shared_step=False,
        summary="a private output layer (a language model: a private copy of the LoRA), fitted after the federation",
        adapt=fine_tune,
    ),
}


def check_task(name: str, task: str) -> None:
    """Raise ``ScenarioError`` where a personal method has no form for a task."""
    if task == "generation" and personal_method(name).adapt is None:
        raise ScenarioError(f"personal.method = {name!r} has no form for task {task!r}; choose another.")


def personal_method(name: str) -> PersonalMethod:
    """A personal method by name, built in or installed.

    Raises:
        ScenarioError: Nobody registers it, or its package is broken.
    """
    return lookup("personal_methods", name, PERSONAL_METHODS, PersonalMethod)
