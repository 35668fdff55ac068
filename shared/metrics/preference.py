"""Score which of two answers a model prefers, with intervals from the same bootstrap over users as ratings."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from shared.metrics.ratings import (
    Described,
    Floats,
    Interval,
    Statistic,
    draw_users,
    interval,
    over_users,
    worst_decile,
)

PREFERENCE_METRICS: Mapping[str, Described] = {
    "accuracy": Described(
        "share of test pairs whose margin, log p(chosen) - log p(rejected), is above the base's; equal: a half",
        better="more",
    ),
    "dpo_loss": Described("mean of -log sigmoid(beta x (margin - the base's)) over test pairs; the base's is log 2"),
    "reward_margin": Described("mean of beta x (margin - the base's)", better="more"),
    "margin": Described("mean margin in nats", better="more"),
    "likelier": Described("share of test pairs whose chosen answer is likelier than the rejected one", better="more"),
    "user_accuracy": Described("accuracy of each user, then the mean over users", better="more"),
    "worst_decile": Described("mean of the users' dpo_loss over the worst tenth of users"),
    "share_gaining": Described("share of users whose dpo_loss is below that of the row local", better="more"),
}
_SAME_NATS = 1e-3  # margins of one model that differ by less: texts of other lengths shared their batches


@dataclass(frozen=True)
class PairScores:
    """What a model made of a list of pairs, (n,) each.

    Attributes:
        margin: log p(chosen) - log p(rejected).
        reference: The same by the base as published.
        beta: Of the loss.
    """

    margin: Floats
    reference: Floats
    beta: float

    @property
    def reward(self) -> Floats:
        """The implicit reward of the chosen answer over that of the rejected one."""
        return self.beta * (self.margin - self.reference)

    @property
    def losses(self) -> Floats:
        """-log sigmoid of the reward."""
        return np.logaddexp(0.0, -self.reward)

    @property
    def right(self) -> Floats:
        """Whether the margin is above the base's; one half where it is the same but for rounding."""
        apart = self.margin - self.reference
        return np.where(np.abs(apart) <= _SAME_NATS, 0.5, (1 + np.sign(apart)) / 2)


def score_pairs(
    scores: PairScores, users: np.ndarray, *, reference: PairScores, seed: int, resamples: int
) -> dict[str, Interval]:
    """Every metric of ``PREFERENCE_METRICS`` with its interval.

    Args:
        scores: Of the row.
        users: Index of the user of each pair (n,).
        reference: Of the row that a user gains against.
        seed: Of the bootstrap; the same for rows that are to be paired.
        resamples: Of the bootstrap.

    Raises:
        ValueError: There is no pair, or a margin is not finite.

    Example:
        >>> row = PairScores(np.array([3.0, -1.0]), np.array([1.0, -1.0]), beta=0.5)
        >>> found = score_pairs(row, np.array([0, 1]), reference=row, seed=1, resamples=10)
        >>> found["accuracy"].value, found["likelier"].value, found["reward_margin"].value
        (0.75, 0.5, 0.5)
    """
    check_finite(scores)
    count, loss = by_user(users, np.ones(len(users))), by_user(users, scores.losses)
    pooled = {
        "accuracy": scores.right,
        "dpo_loss": scores.losses,
        "reward_margin": scores.reward,
        "margin": scores.margin,
        "likelier": (scores.margin > 0).astype(np.float64),
    }
    statistics: dict[str, Statistic] = {
        name: _pooled(by_user(users, values), count) for name, values in pooled.items()
    } | {
        "user_accuracy": over_users(by_user(users, scores.right) / count),
        "worst_decile": lambda draws: worst_decile(loss / count, draws),
        "share_gaining": over_users(loss < by_user(users, reference.losses)),
    }
    draws = draw_users(len(count), seed=seed, resamples=resamples)
    return {name: interval(statistics[name], draws) for name in PREFERENCE_METRICS}


def accuracy_difference(a: PairScores, b: PairScores, users: np.ndarray, *, seed: int, resamples: int) -> Interval:
    """Accuracy of ``a`` minus that of ``b`` on the same resamples; above 0, ``a`` is better."""
    check_finite(a)
    check_finite(b)
    count = by_user(users, np.ones(len(users)))
    difference = _pooled(by_user(users, a.right - b.right), count)
    return interval(difference, draw_users(len(count), seed=seed, resamples=resamples))


def by_user(users: np.ndarray, values: Floats) -> Floats:
    """Values (n,) summed over each user in ``numpy.unique(users)``."""
    return np.bincount(np.unique(users, return_inverse=True)[1], values).astype(np.float64)


def check_finite(scores: PairScores) -> None:
    """Raise ``ValueError`` unless there is a pair and every margin is finite."""
    if not len(scores.margin):
        raise ValueError("there must be at least one test pair, got none; check the split.")
    if not (np.isfinite(scores.margin).all() and np.isfinite(scores.reference).all()):
        raise ValueError("every pair must have finite margins; mend the model.")


def _pooled(sums: Floats, count: Floats) -> Statistic:
    return lambda draws: draws @ sums / (draws @ count)
