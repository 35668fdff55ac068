"""The rows every report carries beside the federated ones; each says what it may see. None of them is private."""

import numpy as np

from simulations.rows import Rows


def constant(train: Rows, test: Rows) -> np.ndarray:
    """The mean of everybody's training targets, for every row."""
    return np.full(len(test.text), train.target.mean())


def user_mean(train: Rows, test: Rows, *, centre: float) -> np.ndarray:
    """Each user's own mean; the centre of the scale for a user without training rows."""
    users = int(max(train.user.max(), test.user.max())) + 1
    count = np.bincount(train.user, minlength=users)
    total = np.bincount(train.user, weights=train.target, minlength=users)
    means = np.where(count > 0, total / np.maximum(count, 1), centre)
    return np.asarray(means[test.user])


def pooled(features: np.ndarray, train: Rows, test: Rows, *, ridge: float) -> np.ndarray:
    """One linear head for all users, fitted in closed form on everybody's rows in one place, without privacy.

    Args:
        features: (M, d) pooled features of the frozen base, one row a distinct text.
        ridge: Penalty on the weight, not on the bias.
    """
    counts = np.bincount(train.text, minlength=len(features)).astype(np.float64)
    sums = np.bincount(train.text, weights=train.target, minlength=len(features))
    mean = counts @ features / counts.sum()
    level = sums.sum() / counts.sum()
    centred = features.astype(np.float64) - mean
    gram = centred.T @ (centred * counts[:, None])
    weight = np.linalg.solve(gram + ridge * np.eye(len(gram)), centred.T @ (sums - counts * level))
    return np.asarray(level + centred[test.text] @ weight)
