"""Metrics: hand cases, the bootstrap against an obvious loop, pairing, coverage, refusals."""

import math
import time

import numpy as np
import numpy.typing as npt
import pytest

from shared.metrics.ratings import Interval, paired_difference, score_row, user_rmse

Floats = npt.NDArray[np.float64]


def ratings(
    seed: int, *, num_users: int = 30, user_spread: float = 0.5
) -> tuple[Floats, Floats, npt.NDArray[np.int64]]:
    """Predictions with an error of their own for each user, targets, and shuffled users of unequal size."""
    rng = np.random.default_rng(seed)
    users = rng.permutation(np.repeat(np.arange(num_users), rng.integers(1, 9, size=num_users)))
    targets = rng.integers(1, 6, size=users.size).astype(np.float64)
    errors = rng.normal(scale=user_spread, size=num_users)[users] + rng.normal(scale=0.7, size=users.size)
    return targets + errors, targets, users


def test_hand_case() -> None:
    predictions, targets = np.array([1.0, 3.0, 4.0, 4.0]), np.array([1.0, 5.0, 4.0, 5.0])
    users = np.array([5, 5, 2, 2])
    reference = np.array([1.0, 3.0, 2.0, 4.0])  # equal for user 5, worse for user 2
    row = score_row(predictions, targets, users, reference=reference, seed=0)
    assert row["rmse"].value == pytest.approx(math.sqrt(5 / 4))
    assert row["mae"].value == pytest.approx(3 / 4)
    assert row["accuracy"].value == pytest.approx(1 / 2)
    assert user_rmse(predictions, targets, users) == pytest.approx([math.sqrt(1 / 2), math.sqrt(2)])
    assert row["user_rmse"].value == pytest.approx((math.sqrt(1 / 2) + math.sqrt(2)) / 2)
    assert row["worst_decile"].value == pytest.approx(math.sqrt(2))
    assert row["share_gaining"].value == pytest.approx(1 / 2)
    assert "share_gaining" not in score_row(predictions, targets, users, seed=0)
    # two users: a resample is one of them twice, or both
    assert (row["rmse"].low, row["rmse"].high) == pytest.approx((math.sqrt(1 / 2), math.sqrt(2)))


def test_accuracy_rounds_halves_up_and_to_whole_ratings() -> None:
    predictions = np.array([2.5, 3.5, 3.49, 4.5, 1.2])
    assert score_row(predictions, np.array([3.0, 4.0, 3.0, 5.0, 1.0]), np.arange(5), seed=0)["accuracy"].value == 1.0
    assert score_row(predictions, np.array([2.0, 3.0, 3.5, 4.0, 1.5]), np.arange(5), seed=0)["accuracy"].value == 0.0


@pytest.mark.parametrize(("num_users", "size"), [(1, 1), (10, 1), (11, 2), (20, 2), (21, 3)])
def test_worst_decile_is_the_ceiling_of_a_tenth(num_users: int, size: int) -> None:
    errors = np.arange(num_users, dtype=np.float64)
    row = score_row(errors, np.zeros(num_users), np.arange(num_users), seed=0, resamples=5)
    assert row["worst_decile"].value == pytest.approx(errors[-size:].mean())


@pytest.mark.parametrize("num_users", [1, 9, 30])
def test_bootstrap_equals_the_obvious_loop(num_users: int) -> None:
    predictions, targets, users = ratings(3, num_users=num_users)
    reference = ratings(4, num_users=num_users)[0]
    reference = targets + np.resize(reference - reference.mean(), targets.size)
    resamples = 60
    samples: dict[str, list[float]] = {}
    differences = []
    for drawn in np.random.default_rng(11).integers(num_users, size=(resamples, num_users)):
        parts = [np.flatnonzero(users == user) for user in drawn]
        rows = np.concatenate(parts)
        error = predictions[rows] - targets[rows]
        each = [math.sqrt(np.mean((predictions[p] - targets[p]) ** 2)) for p in parts]
        other = [math.sqrt(np.mean((reference[p] - targets[p]) ** 2)) for p in parts]
        slow = {
            "rmse": math.sqrt(np.mean(error**2)),
            "mae": np.mean(np.abs(error)),
            "accuracy": np.mean(
                [math.floor(p + 0.5) == t for p, t in zip(predictions[rows], targets[rows], strict=True)]
            ),
            "user_rmse": np.mean(each),
            "worst_decile": np.mean(sorted(each)[-math.ceil(num_users / 10) :]),
            "share_gaining": np.mean([x < y for x, y in zip(each, other, strict=True)]),
        }
        for name, value in slow.items():
            samples.setdefault(name, []).append(float(value))
        differences.append(slow["rmse"] - math.sqrt(np.mean((reference[rows] - targets[rows]) ** 2)))
    row = score_row(predictions, targets, users, reference=reference, seed=11, resamples=resamples)
    assert list(row) == list(samples)
    for name, values in samples.items():
        assert [row[name].low, row[name].high] == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=1e-12)
    paired = paired_difference(predictions, reference, targets, users, seed=11, resamples=resamples)
    assert [paired.low, paired.high] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=1e-12)
    assert paired.value == pytest.approx(row["rmse"].value - score_row(reference, targets, users, seed=0)["rmse"].value)


def test_pairing_narrows_the_interval_of_correlated_rows() -> None:
    a, targets, users = ratings(5, num_users=200)
    b = targets + 1.05 * (a - targets)
    paired = paired_difference(a, b, targets, users, seed=1)
    row_a, row_b = (score_row(x, targets, users, seed=1)["rmse"] for x in (a, b))
    unpaired = math.hypot(row_a.high - row_a.low, row_b.high - row_b.low)
    assert paired.high < 0  # a is better, and the pairing shows it although the rows' own intervals overlap
    assert row_a.high > row_b.low
    assert paired.high - paired.low < unpaired / 5


def test_same_seed_same_intervals_whatever_the_order_of_ratings() -> None:
    predictions, targets, users = ratings(6)
    order = np.random.default_rng(0).permutation(users.size)
    row = score_row(predictions, targets, users, seed=2)
    shuffled = score_row(predictions[order], targets[order], 10 * users[order] + 3, seed=2)
    for name, interval in row.items():
        assert [shuffled[name].low, shuffled[name].high] == pytest.approx([interval.low, interval.high])
    assert score_row(predictions, targets, users, seed=3)["rmse"].low != row["rmse"].low
    same = paired_difference(predictions, predictions, targets, users, seed=2)
    assert same == Interval(0.0, 0.0, 0.0)
    assert score_row(predictions, targets, users, reference=predictions, seed=2)["share_gaining"].value == 0.0


def test_coverage_needs_users_as_units() -> None:
    truth = math.sqrt(1.0 + 0.5**2)  # spread between users 1, within 0.5
    trials, num_users, per_user = 200, 80, 20
    by_user = by_rating = 0
    for trial in range(trials):
        rng = np.random.default_rng(1000 + trial)
        users = np.repeat(np.arange(num_users), per_user)
        errors = rng.normal(size=num_users)[users] + rng.normal(scale=0.5, size=users.size)
        zero = np.zeros(users.size)
        interval = score_row(errors, zero, users, seed=trial, resamples=300)["rmse"]
        by_user += interval.low <= truth <= interval.high
        if trial < 40:
            naive = score_row(errors, zero, np.arange(users.size), seed=trial, resamples=200)["rmse"]
            by_rating += naive.low <= truth <= naive.high
    assert 0.88 <= by_user / trials <= 0.985
    assert by_rating / 40 < 0.7  # the same check rejects a bootstrap over ratings


def test_a_row_of_the_published_size_takes_well_under_a_second() -> None:
    rng = np.random.default_rng(0)
    users = rng.permutation(np.repeat(np.arange(943), 21))
    targets = rng.integers(1, 6, size=users.size).astype(np.float64)
    start = time.process_time()
    score_row(targets + rng.normal(size=users.size), targets, users, reference=targets, seed=0)
    assert time.process_time() - start < 1.0


def test_float32_and_integers_are_scored_in_float64() -> None:
    predictions, targets, users = ratings(8)
    single = predictions.astype(np.float32)
    exact = score_row(single.astype(np.float64), targets, users, seed=0)
    assert score_row(single, targets.astype(np.int32), users.astype(np.uint16), seed=0) == exact


ONE = np.array([1.0])


@pytest.mark.parametrize(
    ("predictions", "targets", "users", "message"),
    [
        (np.array([]), np.array([]), np.array([], dtype=int), "at least one test rating"),
        (np.array([np.nan]), ONE, np.array([0]), "predictions must be finite, got 1 of 1"),
        (ONE, np.array([np.inf]), np.array([0]), "targets must be finite"),
        (ONE, np.array([1.0, 2.0]), np.array([0, 1]), "equally long"),
        (np.ones((1, 1)), np.ones((1, 1)), np.zeros((1, 1), dtype=int), "one-dimensional"),
        (ONE, ONE, np.array([0.0]), "users must be integers"),
    ],
)
def test_refusals(predictions: Floats, targets: Floats, users: npt.NDArray[np.int64], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_row(predictions, targets, users, seed=0)
    with pytest.raises(ValueError, match=message):
        user_rmse(predictions, targets, users)
    with pytest.raises(ValueError, match=message):
        paired_difference(predictions, predictions, targets, users, seed=0)


def test_refuses_a_bad_second_row_and_no_resamples() -> None:
    users = np.array([0])
    with pytest.raises(ValueError, match="must be finite"):
        paired_difference(ONE, np.array([np.nan]), ONE, users, seed=0)
    with pytest.raises(ValueError, match="must be finite"):
        score_row(ONE, ONE, users, reference=np.array([np.nan]), seed=0)
    with pytest.raises(ValueError, match="resamples must be at least 1, got 0"):
        score_row(ONE, ONE, users, seed=0, resamples=0)
