"""Score rating predictions, with intervals from a bootstrap over users.

Ratings of one user hang together, so users are resampled and not ratings. Every statistic is a function of
a few sums per user; a resample is then one row of counts, "how often was each user drawn", and all resamples
are one matrix product. Of the ``n`` users in ascending order, resample ``r`` draws
``default_rng(seed).integers(n, size=(resamples, n))[r]``: the same users and seed give the same resamples, so
rows scored apart are paired.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A statistic with the ends of its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


def score_row(
    predictions: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    users: npt.NDArray[Any],
    *,
    reference: npt.NDArray[Any] | None = None,
    seed: int,
    resamples: int = 2000,
) -> dict[str, Interval]:
    """Score one row of the report: every metric with its interval.

    Args:
        predictions: Predicted ratings (n,), already clipped to the scale.
        targets: True ratings (n,).
        users: Index of the user of each rating (n,), integers.
        reference: Predictions (n,) of the row that a user gains against; None leaves ``share_gaining`` out.
        seed: Of the bootstrap; the same for rows that are to be paired.
        resamples: Of the bootstrap; needs 16 bytes x resamples x users of memory.

    Returns:
        Pooled over ratings: ``rmse``, ``mae`` and ``accuracy``, the share of predictions whose nearest whole
        rating (halves round up) is the target. Over users: ``user_rmse``, the mean of each user's RMSE;
        ``worst_decile``, its mean over the ceil(users / 10) worst; ``share_gaining``, the share with an RMSE
        strictly below the reference's.

    Raises:
        ValueError: Shapes differ, an array is empty or not finite, users are no integers, resamples < 1.

    Source:
        Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval); here the
        sampling unit is the user.

    Example:
        >>> row = score_row(np.array([3.5, 2.0]), np.array([4.0, 2.0]), np.array([0, 1]), seed=1)
        >>> row["mae"].value, row["accuracy"].value
        (0.25, 1.0)
    """
    predictions, targets, users = _checked(predictions, targets, users)
    index, n = _by_user(users)
    errors = predictions - targets
    sse = np.bincount(index, errors**2)  # (U,)
    absolute = np.bincount(index, np.abs(errors))
    hits = np.bincount(index, np.floor(predictions + 0.5) == targets)
    per_user = np.sqrt(sse / n)
    # Each statistic maps draws (R, U), how often each user counts, to its R values.
    statistics: dict[str, Callable[[Floats], Floats]] = {
        "rmse": lambda draws: np.sqrt(draws @ sse / (draws @ n)),
        "mae": lambda draws: draws @ absolute / (draws @ n),
        "accuracy": lambda draws: draws @ hits / (draws @ n),
        "user_rmse": lambda draws: draws @ per_user / n.size,
        "worst_decile": lambda draws: _worst_decile(per_user, draws),
    }
    if reference is not None:
        gains = (per_user < user_rmse(reference, targets, users)).astype(np.float64)
        statistics["share_gaining"] = lambda draws: draws @ gains / n.size
    draws = _draws(n.size, seed=seed, resamples=resamples)
    return {name: _interval(statistic, draws) for name, statistic in statistics.items()}


def paired_difference(
    a: npt.NDArray[Any],
    b: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    users: npt.NDArray[Any],
    *,
    seed: int,
    resamples: int = 2000,
) -> Interval:
    """Pooled RMSE of predictions ``a`` minus that of ``b``, on the same resamples; below 0, ``a`` is better.

    Args:
        a: Predicted ratings (n,), already clipped to the scale.
        b: Those it is compared with (n,).
        targets: True ratings (n,).
        users: Index of the user of each rating (n,), integers.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        The difference with its interval.

    Raises:
        ValueError: As ``score_row``.
    """
    a, checked_targets, checked_users = _checked(a, targets, users)
    b, _, _ = _checked(b, targets, users)
    index, n = _by_user(checked_users)
    sse_a = np.bincount(index, (a - checked_targets) ** 2)
    sse_b = np.bincount(index, (b - checked_targets) ** 2)

    def difference(draws: Floats) -> Floats:
        ratings = draws @ n
        return np.asarray(np.sqrt(draws @ sse_a / ratings) - np.sqrt(draws @ sse_b / ratings))

    return _interval(difference, _draws(n.size, seed=seed, resamples=resamples))


def user_rmse(predictions: npt.NDArray[Any], targets: npt.NDArray[Any], users: npt.NDArray[Any]) -> Floats:
    """RMSE of each user that occurs in ``users``, in ascending order of the index.

    Args:
        predictions: Predicted ratings (n,).
        targets: True ratings (n,).
        users: Index of the user of each rating (n,), integers.

    Returns:
        One value for each of ``numpy.unique(users)``.

    Raises:
        ValueError: As ``score_row``.

    Example:
        >>> user_rmse(np.array([1.0, 2.0, 6.0]), np.array([1.0, 4.0, 6.0]), np.array([7, 3, 7])).tolist()
        [2.0, 0.0]
    """
    predictions, targets, users = _checked(predictions, targets, users)
    index, n = _by_user(users)
    return np.asarray(np.sqrt(np.bincount(index, (predictions - targets) ** 2) / n))


def _checked(
    predictions: npt.NDArray[Any], targets: npt.NDArray[Any], users: npt.NDArray[Any]
) -> tuple[Floats, Floats, Ints]:
    """Predictions and targets in float64, users in int64; raises ValueError where they cannot be scored."""
    predictions, targets, users = np.asarray(predictions), np.asarray(targets), np.asarray(users)
    if not (predictions.ndim == 1 and predictions.shape == targets.shape == users.shape):
        raise ValueError(
            "predictions, targets and users must be one-dimensional and equally long, "
            f"got shapes {predictions.shape}, {targets.shape}, {users.shape}; give one entry per test rating."
        )
    if not predictions.size > 0:
        raise ValueError("there must be at least one test rating, got none; check the split.")
    if not np.issubdtype(users.dtype, np.integer):
        raise ValueError(f"users must be integers, got {users.dtype}; give the index of each rating's user.")
    for name, values in (("predictions", predictions), ("targets", targets)):
        bad = int(np.count_nonzero(~np.isfinite(values)))
        if bad:
            raise ValueError(
                f"{name} must be finite, got {bad} of {values.size} NaN or inf; mend the model or the data "
                "that made them, dropping them would flatter the score."
            )
    return predictions.astype(np.float64), targets.astype(np.float64), users.astype(np.int64)


def _by_user(users: Ints) -> tuple[Ints, Floats]:
    """Position of each rating's user among the ascending users, and each user's number of ratings."""
    _, index, n = np.unique(users, return_inverse=True, return_counts=True)
    return index, n.astype(np.float64)


def _draws(num_users: int, *, seed: int, resamples: int) -> Floats:
    """How often each resample draws each user, (resamples, num_users); every row sums to num_users."""
    if not resamples >= 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}; 2000 is a common choice.")
    drawn = np.random.default_rng(seed).integers(num_users, size=(resamples, num_users))
    drawn += num_users * np.arange(resamples)[:, None]  # one range of cells per resample: one bincount does all
    counts = np.bincount(drawn.ravel(), minlength=resamples * num_users)
    return counts.reshape(resamples, num_users).astype(np.float64)


def _worst_decile(per_user: Floats, draws: Floats) -> Floats:
    """Mean of the worst ceil(U / 10) values of each resample of the U users, drawn with repetition."""
    worst_first = np.argsort(-per_user, kind="stable")
    size = -(-per_user.size // 10)
    # Walk from the worst user on, taking each as often as it was drawn, until `size` are taken.
    taken = np.minimum(np.cumsum(draws[:, worst_first], axis=1), size)  # (R, U)
    return np.asarray(np.diff(taken, axis=1, prepend=0.0) @ per_user[worst_first] / size)


def _interval(statistic: Callable[[Floats], Floats], draws: Floats) -> Interval:
    """The statistic on all users once, and the percentiles 2.5 and 97.5 of it over the draws."""
    low, high = np.quantile(statistic(draws), [0.025, 0.975])
    everyone = np.ones((1, draws.shape[1]))
    return Interval(float(statistic(everyone)[0]), float(low), float(high))
