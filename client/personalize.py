"""What a device adds for itself: a private output on the shared features. It never leaves, so it needs no noise."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shared.config import PersonalConfig


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


PERSONAL_METHODS: dict[str, Callable[..., PrivateOutput]] = {"none": fit_none, "fine-tune": fit_ridge}
