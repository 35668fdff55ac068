"""The private part of task ``tagging``: logits a device adds to the shared ones, fitted in closed steps."""

from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.special import softmax

from shared.config import PersonalConfig

_STEPS = 500  # at most; 30 are usual
_PRECISION = 1e-7  # of a dual variable, which lies between -1 and 1
_LEAST_SHRINKAGE = 0.1  # a bias without any has no finite optimum where all records have one label


@dataclass(frozen=True)
class PrivateTags:
    """A private correction of scope ``private``: logits = shared logits + features @ weight + bias.

    Attributes:
        weight: (d, K) float64, on the head's pooled features.
        bias: (K,).
    """

    weight: np.ndarray
    bias: np.ndarray

    def predict(self, features: np.ndarray, shared: np.ndarray) -> np.ndarray:
        """Features (n, d) and shared logits (n, K) -> personal logits (n, K)."""
        return np.asarray(shared + features.astype(np.float64, copy=False) @ self.weight + self.bias)


def keep_tags(
    features: np.ndarray, shared: np.ndarray, targets: np.ndarray, *, mean: np.ndarray, personal: PersonalConfig
) -> PrivateTags:
    """No private part: the shared logits stand."""
    del targets, mean, personal
    labels = shared.shape[1]
    return PrivateTags(np.zeros((features.shape[1], labels)), np.zeros(labels))


def fit_tags(
    features: np.ndarray, shared: np.ndarray, targets: np.ndarray, *, mean: np.ndarray, personal: PersonalConfig
) -> PrivateTags:
    """Fit a multinomial logistic regression that starts from the shared logits and is pulled back to them.

    Args:
        features: (n, d) pooled features of this device's records; n = 0 is allowed.
        shared: (n, K) shared logits.
        targets: (n,) places in the list of labels; a record with another is of no account.
        mean: (d,) public centre of the features.
        personal: ``ridge``, the penalty of the weight; ``bias_shrinkage``, that of the bias, at least 0.1.

    Returns:
        The one minimum of sum of cross-entropies + ridge / 2 |weight|^2 + bias_shrinkage / 2 |bias|^2, the bias counted
        at the centre of the features; with no record it is zero.

    Source:
        Böhning 1992, "Multinomial logistic regression algorithm": no step of Newton's method with the bound I / 2 in
        place of the Hessian makes the loss larger, and its matrix is factored once. In dual form, as ``fit_ridge``.
    """
    labels = shared.shape[1]
    known = np.isin(targets, np.arange(labels))
    features, shared, wanted = features[known].astype(np.float64, copy=False), shared[known], targets[known]
    if not len(wanted):
        return keep_tags(features, shared, wanted, mean=mean, personal=personal)
    shrinkage = max(personal.bias_shrinkage, _LEAST_SHRINKAGE)
    truth = np.eye(labels)[wanted.astype(np.int64)]  # (n, K)
    centred = features - mean
    gram = centred @ centred.T / personal.ridge + 1 / shrinkage  # (n, n)
    factor = cho_factor(gram / 2 + np.eye(len(gram)))
    dual = np.zeros_like(truth)
    for _ in range(_STEPS):
        step = cho_solve(factor, truth - softmax(shared + gram @ dual, axis=1) - dual)
        dual += step
        if np.abs(step).max() < _PRECISION:
            break
    weight = centred.T @ dual / personal.ridge  # (d, K)
    return PrivateTags(weight, dual.sum(0) / shrinkage - mean @ weight)
