"""The rows every report carries beside the federated ones; each says what it may see. None of them is private."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import logsumexp, softmax

from simulations.observe.rows import Rows


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


def constant_label(train: Rows, test: Rows, *, labels: int) -> np.ndarray:
    """The label that everybody's training rows have most often, for every row."""
    return np.full(len(test.text), np.bincount(train.target.astype(np.int64), minlength=labels).argmax())


def user_majority(train: Rows, test: Rows, *, labels: int) -> np.ndarray:
    """Each user's own most frequent label; of several, or without training rows, the one most frequent in all."""
    users = int(max(train.user.max(), test.user.max())) + 1
    target = train.target.astype(np.int64)
    counts = np.bincount(train.user * labels + target, minlength=users * labels).reshape(users, labels)
    overall = np.bincount(target, minlength=labels)
    return np.asarray((counts + overall / (overall.sum() + 1))[test.user].argmax(1))


def pooled_logits(features: np.ndarray, train: Rows, *, labels: int, ridge: float) -> np.ndarray:
    """Logits (M, K) of every text by one multinomial logistic regression on everybody's rows, without privacy.

    Args:
        features: (M, d) pooled features of the frozen base, one row a distinct text.
        ridge: Penalty on the weight, not on the bias.
    """
    cells = train.text * labels + train.target.astype(np.int64)
    counts = np.bincount(cells, minlength=len(features) * labels).reshape(len(features), labels)
    seen = counts.sum(1)
    centred = features.astype(np.float64) - seen @ features / seen.sum()
    known, counts, seen = centred[seen > 0], counts[seen > 0], seen[seen > 0]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[labels:].reshape(-1, labels), flat[:labels]
        logits = known @ weight + bias
        errors = seen[:, None] * softmax(logits, axis=1) - counts
        gradient = np.concatenate([errors.sum(0), (known.T @ errors + ridge * weight).ravel()])
        value = seen @ logsumexp(logits, axis=1) - (counts * logits).sum() + ridge / 2 * (weight**2).sum()
        return float(value), gradient

    found = minimize(loss, np.zeros((1 + centred.shape[1]) * labels), jac=True, method="L-BFGS-B").x
    return np.asarray(centred @ found[labels:].reshape(-1, labels) + found[:labels])
