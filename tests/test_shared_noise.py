"""The seeded streams of a simulation: the calibrated scale, independence between keys, one stream a key."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats as st

from shared.privacy.noise import GRID_SIGMA, SeededRandomness, seeded_generator

KEY = {"seed": 7, "campaign": "c", "device": 3, "round_number": 5}
COORDINATES = 100_000
LEVEL = 1e-3


def draw(size: int = COORDINATES, **changed: object) -> np.ndarray:
    """Noise in standard deviations."""
    return SeededRandomness(**{**KEY, **changed}).gaussian_integers(size) / GRID_SIGMA  # type: ignore[arg-type]


def chi_square_p(noise: np.ndarray, stddev: float) -> float:
    """Two-sided p-value of the sum of squares."""
    statistic = float(np.sum((noise / stddev) ** 2))
    return 2 * min(st.chi2.cdf(statistic, noise.size), st.chi2.sf(statistic, noise.size))


def test_noise_has_the_calibrated_scale():
    noise = draw()
    assert st.kstest(noise, st.norm.cdf).pvalue > LEVEL
    assert chi_square_p(noise, 1.0) > LEVEL
    for wrong in (0.95, 1.05):  # a test without power proves nothing
        assert st.kstest(noise, st.norm(scale=wrong).cdf).pvalue < 1e-6
        assert chi_square_p(noise, wrong) < 1e-6


def test_the_same_key_gives_the_same_stream():
    assert np.array_equal(draw(), draw())


def test_every_part_of_the_key_counts():
    changes = [{}, {"seed": 8}, {"campaign": "d"}, {"device": 4}, {"round_number": 6}]
    changes += [{"device": 5, "round_number": 3}, {"seed": 3, "device": 7}]  # swapped fields
    changes += [{"seed": 7 + 2**32}, {"device": 3 + 2**32}]
    streams = [draw(**change) for change in changes]
    for one, other in itertools.combinations(streams, 2):
        assert np.sum(one == other) < 5
        assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(COORDINATES)


def test_steps_of_one_stream_are_independent():
    randomness = SeededRandomness(**KEY)
    one, other = (randomness.gaussian_integers(COORDINATES) / GRID_SIGMA for _ in range(2))
    assert np.sum(one == other) < 5
    assert abs(np.corrcoef(one, other)[0, 1]) < 5 / math.sqrt(COORDINATES)


def test_noise_of_many_devices_sums_as_independent_noise():
    devices = 400
    total = sum(draw(2000, device=device) for device in range(devices))
    assert chi_square_p(total, math.sqrt(devices)) > LEVEL
    assert chi_square_p(total, 0.85 * math.sqrt(devices)) < 1e-6


def test_many_streams_never_start_alike():
    # through a 32-bit seed, 100,000 streams would hold an equal pair with probability .69
    starts = {
        int(seeded_generator(seed=0, purpose="noise", device=d, round_number=r).integers(2**62))
        for d in range(500)
        for r in range(20)
    }
    assert len(starts) == 10_000


def test_keys_that_could_be_mistaken_are_refused():
    key = {"seed": 7, "purpose": "noise", "device": 3, "round_number": 5}
    with pytest.raises(ValueError, match="purpose must name what the stream is for"):
        seeded_generator(**{**key, "purpose": ""})
    with pytest.raises(TypeError):
        seeded_generator(**{**key, "device": 1.5})
