"""Noise has the calibrated scale, is independent between streams, and refuses what it cannot protect."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats as st
import torch

from shared.errors import PrivacyError
from shared.noise import add_gaussian_noise, seeded_generator

KEY = {"seed": 7, "purpose": "noise", "device": 3, "round_number": 5}
STDDEV = 0.55
COORDINATES = 100_000
LEVEL = 1e-3  # some twenty tests of scale below: at .01 one in six runs with another key would fail by chance


def draw(size: int = COORDINATES, stddev: float = 1.0, **changed: object) -> np.ndarray:
    generator = seeded_generator(**{**KEY, **changed})  # type: ignore[arg-type]
    return add_gaussian_noise(torch.zeros(size), stddev=stddev, generator=generator).numpy()


def chi_square_p(noise: np.ndarray, stddev: float) -> float:
    """Two-sided p-value of the sum of squares."""
    statistic = float(np.sum((noise.astype(np.float64) / stddev) ** 2))
    return 2 * min(st.chi2.cdf(statistic, noise.size), st.chi2.sf(statistic, noise.size))


def test_noise_has_the_calibrated_scale():
    noise = draw(stddev=STDDEV)
    assert st.kstest(noise, st.norm(scale=STDDEV).cdf).pvalue > LEVEL
    assert chi_square_p(noise, STDDEV) > LEVEL
    for wrong in (0.95 * STDDEV, 1.05 * STDDEV):  # a test without power proves nothing
        assert st.kstest(noise, st.norm(scale=wrong).cdf).pvalue < 1e-6
        assert chi_square_p(noise, wrong) < 1e-6


@pytest.mark.parametrize("shape", [(), (1,), (15,), (16,), (17,), (3, 5)])
def test_scale_holds_for_small_tensors(shape):
    generator = seeded_generator(**KEY)
    zeros = torch.zeros(shape)
    drawn = [
        add_gaussian_noise(zeros, stddev=STDDEV, generator=generator).flatten()
        for _ in range(20_000 // max(1, zeros.numel()))
    ]
    noise = torch.cat(drawn).numpy()
    assert drawn[0].shape == (zeros.numel(),)
    assert st.kstest(noise, st.norm(scale=STDDEV).cdf).pvalue > LEVEL
    assert chi_square_p(noise, STDDEV) > LEVEL
    assert chi_square_p(noise, 0.95 * STDDEV) < 1e-6


def test_noise_is_added_to_the_value_and_leaves_it_alone():
    value = torch.linspace(-3, 3, 1000)
    before = value.clone()
    noised = add_gaussian_noise(value, stddev=2.0, generator=seeded_generator(**KEY))
    np.testing.assert_allclose(noised.numpy(), value.numpy() + draw(1000, stddev=2.0), atol=1e-5)
    assert torch.equal(value, before)
    silent = add_gaussian_noise(value, stddev=0.0, generator=seeded_generator(**KEY))
    assert torch.equal(silent, value)
    assert silent.data_ptr() != value.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_result_is_float32_whatever_came_in(dtype):
    value = torch.ones(64, dtype=dtype, requires_grad=True)
    noised = add_gaussian_noise(value, stddev=1.0, generator=seeded_generator(**KEY))
    assert noised.dtype == torch.float32
    assert not noised.requires_grad
    np.testing.assert_allclose(noised.numpy(), 1 + draw(64), atol=1e-6)


def test_the_same_key_gives_the_same_stream():
    assert np.array_equal(draw(), draw())


def test_every_part_of_the_key_counts():
    changes = [{}, {"seed": 8}, {"purpose": "sampling"}, {"device": 4}, {"round_number": 6}]
    changes += [{"device": 5, "round_number": 3}, {"seed": 3, "device": 7}]  # swapped fields
    changes += [{"seed": 7 + 2**32}, {"device": 3 + 2**32}]
    streams = [draw(**change) for change in changes]
    for one, other in itertools.combinations(streams, 2):
        assert np.intersect1d(one, other).size < 0.02 * COORDINATES  # chance: float32 values are few
        assert np.sum(one == other) < 5
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(COORDINATES)


def test_steps_of_one_stream_are_independent():
    generator = seeded_generator(**KEY)
    zeros = torch.zeros(COORDINATES)
    one, other = (add_gaussian_noise(zeros, stddev=1.0, generator=generator).numpy() for _ in range(2))
    assert np.sum(one == other) < 5
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(COORDINATES)


def test_noise_of_many_devices_sums_as_independent_noise():
    devices = 400
    total = sum(draw(2000, stddev=STDDEV, device=device) for device in range(devices))
    assert chi_square_p(total, STDDEV * math.sqrt(devices)) > LEVEL
    assert chi_square_p(total, 0.9 * STDDEV * math.sqrt(devices)) < 1e-6


def test_many_streams_never_start_alike():
    # through a 32-bit seed, 100,000 streams would hold an equal pair with probability .69
    starts = {
        int(seeded_generator(seed=0, purpose="noise", device=d, round_number=r).integers(2**62))
        for d in range(500)
        for r in range(20)
    }
    assert len(starts) == 10_000


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_a_value_that_is_not_finite_is_refused(bad):
    value = torch.tensor([1.0, bad, 2.0], dtype=torch.float64)
    with pytest.raises(PrivacyError, match=r"must be finite and fit float32, got NaN, inf or an overflow; release"):
        add_gaussian_noise(value, stddev=1.0, generator=seeded_generator(**KEY))


@pytest.mark.parametrize("stddev", [-1.0, math.nan, math.inf])
def test_an_impossible_scale_is_refused(stddev):
    with pytest.raises(PrivacyError, match=r"stddev must be finite and >= 0, got"):
        add_gaussian_noise(torch.zeros(3), stddev=stddev, generator=seeded_generator(**KEY))


def test_an_empty_tensor_stays_empty():
    assert add_gaussian_noise(torch.zeros(0, 4), stddev=1.0, generator=seeded_generator(**KEY)).shape == (0, 4)


def test_keys_that_could_be_mistaken_are_refused():
    with pytest.raises(ValueError, match="purpose must name what the stream is for"):
        seeded_generator(**{**KEY, "purpose": ""})
    with pytest.raises(TypeError):
        seeded_generator(**{**KEY, "device": 1.5})
