"""Clipping bounds one sample's contribution over all tensors jointly, whatever the sample holds."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from shared.privacy.clipping import clipped_sum as clipped_integers

FINE = 2.0**-26  # of the clip norm: the grid of these tests, unless they say otherwise
DENORMAL = 1e-42
SHAPES = [(2, 3), (4,), ()]


def clipped_sum(per_sample: list[torch.Tensor], *, clip_norm: float, grid: float | None = None) -> list[torch.Tensor]:
    """The sum in gradient units, which float64 holds exactly."""
    grid = clip_norm * FINE if grid is None else grid
    return [total.double() * grid for total in clipped_integers(per_sample, clip_norm=clip_norm, grid=grid)]


def joint_norm(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(sum(float(x.double().square().sum()) for x in tensors))


def samples(count: int, scale: float = 1.0, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(count, *shape, generator=generator) for shape in SHAPES]


def slow_clipped_sum(per_sample: list[torch.Tensor], clip_norm: float) -> list[torch.Tensor]:
    """Read the definition aloud, in float64."""
    total = [torch.zeros(x.shape[1:], dtype=torch.float64) for x in per_sample]
    for i in range(per_sample[0].shape[0]):
        sample = [x[i].double() for x in per_sample]
        norm = joint_norm(sample)
        if math.isfinite(norm):
            for t, x in zip(total, sample, strict=True):
                t += x * (min(1.0, clip_norm / norm) if norm else 1.0)
    return total


def test_hand_case_is_clipped_jointly():
    kept = torch.tensor([[0.3], [3.0]])  # norms over both tensors: .5 and 5; a clip per tensor would give 1 and 1
    other = torch.tensor([[0.4], [4.0]])
    first, second = clipped_sum([kept, other], clip_norm=1.0)
    assert first.tolist() == pytest.approx([0.3 + 0.6], rel=2e-5)
    assert second.tolist() == pytest.approx([0.4 + 0.8], rel=2e-5)


def test_a_sample_spread_over_many_tensors_is_one_vector():
    many = [torch.ones(1, 1) for _ in range(100)]  # joint norm 10: each tensor alone is within the bound
    assert joint_norm(clipped_sum(many, clip_norm=1.0)) == pytest.approx(1.0, rel=2e-5)


@pytest.mark.parametrize("clip_norm", [0.01, 1.0, 3.0, 100.0])
def test_equals_the_loop(clip_norm):
    per_sample = samples(17)
    per_sample[0][3, 0, 0] = torch.nan
    per_sample[1][5, 2] = -torch.inf
    for fast, slow in zip(
        clipped_sum(per_sample, clip_norm=clip_norm), slow_clipped_sum(per_sample, clip_norm), strict=True
    ):
        torch.testing.assert_close(fast, slow, rtol=2e-5, atol=2e-5 * clip_norm)


ENTRY = st.one_of(
    st.floats(width=32),
    st.sampled_from([0.0, DENORMAL, -DENORMAL, 1e-25, 1e19, 3e38, -3e38, math.nan, math.inf, -math.inf]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    added=st.lists(ENTRY, min_size=11, max_size=11),
    clip_norm=st.sampled_from([1e-30, 1e-3, 1.0, 50.0]),
    count=st.integers(0, 6),
    seed=st.integers(0, 99),
)
@example(added=[0.0] * 11, clip_norm=1.0, count=3, seed=0)
@example(added=[DENORMAL] * 11, clip_norm=1e-30, count=0, seed=0)
@example(added=[1e-25] * 11, clip_norm=1e-30, count=0, seed=0)  # squares vanish in float32
@example(added=[3e38] * 11, clip_norm=1.0, count=3, seed=0)  # squares overflow in float32
@example(added=[math.nan] + [1.0] * 10, clip_norm=1.0, count=3, seed=0)
@example(added=[1.0] * 10 + [math.inf], clip_norm=1.0, count=3, seed=0)
def test_one_sample_moves_the_sum_by_at_most_the_bound(added, clip_norm, count, seed):
    others = samples(count, seed=seed)
    sizes = [math.prod(shape) for shape in SHAPES]
    sample = [x.reshape(1, *shape) for x, shape in zip(torch.tensor(added).split(sizes), SHAPES, strict=True)]
    without = clipped_sum(others, clip_norm=clip_norm)
    together = clipped_sum([torch.cat([x, y]) for x, y in zip(others, sample, strict=True)], clip_norm=clip_norm)
    alone = clipped_sum(sample, clip_norm=clip_norm)
    moved = joint_norm([b.double() - a.double() for a, b in zip(without, together, strict=True)])
    assert joint_norm(alone) <= clip_norm
    assert moved <= clip_norm  # exactly: integers are summed
    if not all(map(math.isfinite, added)):
        assert joint_norm(alone) == 0
        assert moved == 0


def test_rounding_cannot_carry_a_sample_past_the_bound():
    """On a coarse grid many coordinates round up at once; clipping to C and then rounding would exceed C."""
    generator, past = torch.Generator().manual_seed(0), []
    for _ in range(40):
        sample = torch.rand(1, 64, generator=generator) + 0.5
        [total] = clipped_integers([sample], clip_norm=1.0, grid=2**-6)
        assert total.dtype == torch.int64
        assert float(total.double().norm()) * 2**-6 <= 1.0
        past.append(float((sample / sample.norm() * 2**6).round().norm()) * 2**-6 > 1.0)
    assert sum(past) > 10


@pytest.mark.parametrize("grid", [0.0, -1.0, math.nan, math.inf, 0.5])
def test_a_grid_too_coarse_to_say_anything_is_refused(grid):
    with pytest.raises(ValueError, match="grid must be > 0 and so fine"):
        clipped_integers([torch.ones(2, 16)], clip_norm=1.0, grid=grid)


@pytest.mark.parametrize("size", [20_000, 1_000_000])
def test_long_vectors_do_not_slip_past_the_bound(size):
    # one float32 accumulator loses 6e-4 of the norm of the longer one
    head = torch.cat([torch.tensor([[1000.0]]), torch.full((1, size - 1), 0.1)], dim=1)
    for sample in (head, torch.full((1, size), 0.1)):
        assert 1 - 3e-5 <= joint_norm(clipped_sum([sample], clip_norm=1.0)) <= 1


def test_half_precision_does_not_overflow():
    big = torch.full((2, 3), 60_000.0, dtype=torch.float16)  # the norm is beyond float16
    [total] = clipped_sum([big], clip_norm=1.0)
    assert total.tolist() == pytest.approx([2 / math.sqrt(3)] * 3, rel=2e-5)
    [brain] = clipped_sum([torch.full((1, 4), 1e30, dtype=torch.bfloat16)], clip_norm=1.0)
    assert brain.tolist() == pytest.approx([0.5] * 4, rel=2e-5)


def test_double_precision_may_exceed_float32():
    [total] = clipped_sum([torch.tensor([[3e30, 4e30], [0.0, 1e-5]], dtype=torch.float64)], clip_norm=1.0)
    assert total.tolist() == pytest.approx([0.6, 0.80001], rel=2e-5)
    [total] = clipped_sum([torch.tensor([[1e200], [0.25]], dtype=torch.float64)], clip_norm=1.0)
    assert total.tolist() == [0.25]  # beyond any scaling: counts as zero


def test_an_empty_batch_gives_zeros_of_the_parameters_shapes():
    sums = clipped_sum(samples(0), clip_norm=1.0)
    assert [tuple(x.shape) for x in sums] == SHAPES
    assert joint_norm(sums) == 0


def test_inputs_are_left_alone_and_no_graph_is_kept():
    per_sample = [x.requires_grad_() for x in samples(4, scale=100.0)]
    before = [x.detach().clone() for x in per_sample]
    sums = clipped_sum(per_sample, clip_norm=1.0)
    assert all(torch.equal(x, y) for x, y in zip(per_sample, before, strict=True))
    assert not any(x.requires_grad for x in sums)
    [total] = clipped_sum([before[1][:1]], clip_norm=1e6)
    total.zero_()
    assert before[1][0].norm() > 0


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_impossible_bounds_are_refused(clip_norm):
    with pytest.raises(ValueError, match="clip_norm must be finite and > 0, got"):
        clipped_sum(samples(1), clip_norm=clip_norm)


def test_tensors_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"same number of samples in every tensor, got \[2, 3\]"):
        clipped_sum([torch.ones(2, 4), torch.ones(3, 4)], clip_norm=1.0)
    for wrong in ([], [torch.tensor(1.0)], [torch.ones(2, 2, dtype=torch.int64)]):
        with pytest.raises(ValueError, match="per_sample must hold floating tensors"):
            clipped_sum(wrong, clip_norm=1.0)
