"""Score rating predictions, with intervals from a bootstrap over users. Metrics stand in ``METRICS`` by name.

Ratings of one user hang together, so users are resampled and not ratings. Every statistic is a function of
a few sums per user; a resample is then one row of counts, "how often was each user drawn", and all resamples
are one matrix product. Of the ``n`` users in ascending order, resample ``r`` draws
``default_rng(seed).integers(n, size=(resamples, n))[r]``: the same users and seed give the same resamples, so
rows scored apart are paired.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from shared.errors import ScenarioError
from shared.registry import describe, lookup

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interval:
    """A statistic with the ends of its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Described:
    """A metric for people: what it is, and whether less or more of it is better."""

    description: str
    better: Literal["less", "more"] = "less"


def described(name: str) -> Described:
    """What a metric says of itself: its docstring's first line, and an attribute ``better`` where more is better."""
    metric = lookup("metrics", name, METRICS, Callable)
    return Described(describe(metric), getattr(metric, "better", "less"))


@dataclass(frozen=True)
class Scored:
    """One row of the report as a metric sees it: n ratings of U users.

    Attributes:
        predictions: (n,), clipped to the scale.
        targets: (n,).
        index: Position of each rating's user among the users (n,).
        count: Ratings of each user (U,).
        reference: Predictions (n,) of the row that a user gains against, or None.
    """

    predictions: Floats
    targets: Floats
    index: Ints
    count: Floats
    reference: Floats | None = None

    def user_sums(self, values: npt.NDArray[Any]) -> Floats:
        """A value per rating (n,) -> its sum over each user (U,)."""
        return np.asarray(np.bincount(self.index, values), dtype=np.float64)

    def by_user(self) -> Iterator[tuple[Floats, Floats]]:
        """Predictions and targets of each user, in the order of the users."""
        order = np.argsort(self.index, kind="stable")
        for rows in np.split(order, np.cumsum(self.count[:-1]).astype(np.int64)):
            yield self.predictions[rows], self.targets[rows]


Statistic = Callable[[Floats], Floats]  # draws (R, U), how often each user counts -> its R values
Metric = Callable[[Scored], Statistic | None]  # None: not defined for this row


def over_ratings(rows: Scored, values: npt.NDArray[Any]) -> Statistic:
    """Mean of a value per rating (n,) over all ratings drawn."""
    sums = rows.user_sums(values)
    return lambda draws: np.asarray(draws @ sums / (draws @ rows.count))


def over_users(values: npt.ArrayLike) -> Statistic:
    """Mean of a value per user (U,) over the users drawn."""
    each = np.asarray(values, dtype=np.float64)
    return lambda draws: np.asarray(draws @ each / each.size)


def _rmse(rows: Scored) -> Statistic:
    """Root mean squared error over all ratings."""
    mse = over_ratings(rows, (rows.predictions - rows.targets) ** 2)
    return lambda draws: np.sqrt(mse(draws))


def _mae(rows: Scored) -> Statistic:
    """Mean absolute error over all ratings."""
    return over_ratings(rows, np.abs(rows.predictions - rows.targets))


def _accuracy(rows: Scored) -> Statistic:
    """Share of predictions whose nearest whole rating is the target."""
    return over_ratings(rows, np.floor(rows.predictions + 0.5) == rows.targets)


def _user_rmse(rows: Scored) -> Statistic:
    """Mean over users of each user's RMSE."""
    return over_users(_rmse_of_users(rows, rows.predictions))


def _worst_decile_rmse(rows: Scored) -> Statistic:
    """Mean over the worst tenth of the users of each user's RMSE."""
    per_user = _rmse_of_users(rows, rows.predictions)
    return lambda draws: worst_decile(per_user, draws)


def _share_gaining(rows: Scored) -> Statistic | None:
    """Share of users with an RMSE strictly below the reference row's."""
    if rows.reference is None:
        return None
    return over_users(_rmse_of_users(rows, rows.predictions) < _rmse_of_users(rows, rows.reference))


METRICS: dict[str, Metric] = {
    "rmse": _rmse,
    "mae": _mae,
    "accuracy": _accuracy,
    "user_rmse": _user_rmse,
    "worst_decile": _worst_decile_rmse,
    "share_gaining": _share_gaining,
}


def score_row(
    predictions: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    users: npt.NDArray[Any],
    *,
    reference: npt.NDArray[Any] | None = None,
    seed: int,
    resamples: int = 2000,
    metrics: Sequence[str] = tuple(METRICS),
) -> dict[str, Interval]:
    """Score one row of the report: every metric with its interval.

    Args:
        predictions: Predicted ratings (n,), already clipped to the scale.
        targets: True ratings (n,).
        users: Index of the user of each rating (n,), integers.
        reference: Predictions (n,) of the row that a user gains against; None leaves ``share_gaining`` out.
        seed: Of the bootstrap; the same for rows that are to be paired.
        resamples: Of the bootstrap; needs 16 bytes x resamples x users of memory.
        metrics: Keys of ``METRICS`` or names that installed packages register.

    Returns:
        A value for each metric. The built-in ones, pooled over ratings: ``rmse``, ``mae`` and ``accuracy``, the share
        of predictions whose nearest whole rating (halves round up) is the target. Over users: ``user_rmse``, the mean
        of each user's RMSE; ``worst_decile``, its mean over the ceil(users / 10) worst; ``share_gaining``, the share
        with an RMSE strictly below the reference's.

    Raises:
        ValueError: Shapes differ, an array is empty or not finite, users are no integers, resamples < 1.
        ScenarioError: A metric is unknown, broken, or gives a value that is not finite.

    Source:
        Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile interval); here the
        sampling unit is the user.

    Example:
        >>> row = score_row(np.array([3.5, 2.0]), np.array([4.0, 2.0]), np.array([0, 1]), seed=1)
        >>> row["mae"].value, row["accuracy"].value
        (0.25, 1.0)
    """
    rows = scored(predictions, targets, users, reference=reference)
    draws = draw_users(rows.count.size, seed=seed, resamples=resamples)
    found = {name: lookup("metrics", name, METRICS, Callable)(rows) for name in metrics}
    for name, statistic in found.items():
        if not (statistic is None or callable(statistic)):
            raise ScenarioError(
                f"metric {name!r} must give a function of draws, as over_users does, got {type(statistic).__name__}."
            )
    scores = {name: interval(statistic, draws) for name, statistic in found.items() if statistic is not None}
    for name, score in scores.items():
        if not np.isfinite([score.value, score.low, score.high]).all():
            raise ScenarioError(f"metric {name!r} must give finite values, got {score.value}; mend it or leave it out.")
    return scores


def scored(
    predictions: npt.NDArray[Any],
    targets: npt.NDArray[Any],
    users: npt.NDArray[Any],
    *,
    reference: npt.NDArray[Any] | None = None,
) -> Scored:
    """A row as metrics see it; arguments and errors as of ``score_row``."""
    predictions, targets, users = _checked(predictions, targets, users)
    if reference is not None:
        reference, _, _ = _checked(reference, targets, users)
    return Scored(predictions, targets, *_by_user(users), reference)


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

    return interval(difference, draw_users(n.size, seed=seed, resamples=resamples))


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


def draw_users(num_users: int, *, seed: int, resamples: int) -> Floats:
    """How often each resample draws each user, (resamples, num_users); every row sums to num_users."""
    if not resamples >= 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}; 2000 is a common choice.")
    drawn = np.random.default_rng(seed).integers(num_users, size=(resamples, num_users))
    drawn += num_users * np.arange(resamples)[:, None]  # one range of cells per resample: one bincount does all
    counts = np.bincount(drawn.ravel(), minlength=resamples * num_users)
    return counts.reshape(resamples, num_users).astype(np.float64)


def _rmse_of_users(rows: Scored, predictions: Floats) -> Floats:
    return np.sqrt(rows.user_sums((predictions - rows.targets) ** 2) / rows.count)


def worst_decile(per_user: Floats, draws: Floats) -> Floats:
    """Mean of the worst ceil(U / 10) values of each resample of the U users, drawn with repetition."""
    worst_first = np.argsort(-per_user, kind="stable")
    size = -(-per_user.size // 10)
    # Walk from the worst user on, taking each as often as it was drawn, until `size` are taken.
    taken = np.minimum(np.cumsum(draws[:, worst_first], axis=1), size)  # (R, U)
    return np.asarray(np.diff(taken, axis=1, prepend=0.0) @ per_user[worst_first] / size)


def interval(statistic: Callable[[Floats], Floats], draws: Floats) -> Interval:
    """The statistic on all users once, and the percentiles 2.5 and 97.5 of it over the draws."""
    low, high = np.quantile(statistic(draws), [0.025, 0.975])
    everyone = np.ones((1, draws.shape[1]))
    return Interval(float(statistic(everyone)[0]), float(low), float(high))
