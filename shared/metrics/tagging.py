"""Score predicted labels, with intervals from the bootstrap over users of ``shared.metrics.ratings``."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shared.metrics.ratings import (
    Described,
    Floats,
    Interval,
    Scored,
    Statistic,
    draw_users,
    interval,
    over_ratings,
    over_users,
    scored,
    worst_decile,
)

TAGGING_METRICS: Mapping[str, Described] = {
    "accuracy": Described("share of test records whose predicted label is the user's", better="more"),
    "macro_f1": Described("F1 of each label over all test records, then the mean over the list of labels", "more"),
    "user_accuracy": Described("accuracy of each user, then the mean over users", better="more"),
    "worst_decile": Described("mean of the users' accuracy over the worst tenth of users", better="more"),
    "share_gaining": Described("share of users whose accuracy is above that of the row local", better="more"),
}


def score_tags(
    predictions: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    users: npt.NDArray[np.int64],
    *,
    labels: int,
    reference: npt.NDArray[np.int64] | None = None,
    seed: int,
    resamples: int = 2000,
) -> dict[str, Interval]:
    """Score one row of the report: every metric of ``TAGGING_METRICS`` with its interval.

    Args:
        predictions: Places in the list of labels (n,).
        targets: The true ones (n,).
        users: Index of the user of each record (n,).
        labels: How many there are (K).
        reference: Predictions (n,) of the row that a user gains against; None leaves ``share_gaining`` out.
        seed: Of the bootstrap; the same for rows that are to be paired.
        resamples: Of the bootstrap.

    Raises:
        ValueError: Shapes differ, or there is no record.

    Example:
        >>> row = score_tags(np.array([0, 1, 1]), np.array([0, 1, 0]), np.array([4, 4, 9]), labels=2, seed=1)
        >>> round(row["accuracy"].value, 3), row["worst_decile"].value
        (0.667, 0.0)
    """
    rows = scored(predictions, targets, users, reference=reference)
    each = _accuracy_of_users(rows, rows.predictions)
    found: dict[str, Statistic] = {
        "accuracy": over_ratings(rows, rows.predictions == rows.targets),
        "macro_f1": macro_f1(rows, labels=labels),
        "user_accuracy": over_users(each),
        "worst_decile": lambda draws: 1 - worst_decile(1 - each, draws),
    }
    if rows.reference is not None:
        found["share_gaining"] = over_users(each > _accuracy_of_users(rows, rows.reference))
    draws = draw_users(rows.count.size, seed=seed, resamples=resamples)
    return {name: interval(statistic, draws) for name, statistic in found.items()}


def macro_f1(rows: Scored, *, labels: int) -> Statistic:
    """F1 of each label from its counts over the users drawn, then the mean; 0 where nobody has or predicts a label.

    As scikit-learn's ``f1_score(labels=range(K), average="macro", zero_division=0)``.
    """
    said, wanted = (_by_label(rows, values, labels) for values in (rows.predictions, rows.targets))  # (U, K)
    hits = _by_label(rows, np.where(rows.predictions == rows.targets, rows.targets, -1.0), labels)
    either = said + wanted

    def statistic(draws: Floats) -> Floats:
        return np.asarray(np.mean(2 * (draws @ hits) / np.maximum(draws @ either, 1), axis=1))

    return statistic


def accuracy_difference(
    a: npt.NDArray[np.int64],
    b: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    users: npt.NDArray[np.int64],
    *,
    seed: int,
    resamples: int = 2000,
) -> Interval:
    """Accuracy of ``a`` minus that of ``b``, on the same resamples; above 0, ``a`` is better."""
    rows = scored(a, targets, users, reference=b)
    gains = (a == targets).astype(np.float64) - (b == targets)
    return interval(over_ratings(rows, gains), draw_users(rows.count.size, seed=seed, resamples=resamples))


def user_accuracy(
    predictions: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], users: npt.NDArray[np.int64]
) -> Floats:
    """Accuracy of each user that occurs in ``users``, in ascending order of the index."""
    rows = scored(predictions, targets, users)
    return _accuracy_of_users(rows, rows.predictions)


def _accuracy_of_users(rows: Scored, predictions: Floats) -> Floats:
    return rows.user_sums(predictions == rows.targets) / rows.count


def _by_label(rows: Scored, values: Floats, labels: int) -> Floats:
    """How often each user (U,) has each label (K,); -1 is none."""
    known = values >= 0
    cells = rows.index[known] * labels + values[known].astype(np.int64)
    counts = np.bincount(cells, minlength=rows.count.size * labels)
    return counts.reshape(rows.count.size, labels).astype(np.float64)
