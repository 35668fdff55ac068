"""Integer noise and Bernoulli draws are exact, unforeseeable, never repeated, and priced as the Gaussian is."""

import copy
import functools
import itertools
import math
import os
import pickle
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import scipy.stats as st
import torch

from shared.errors import CampaignError, PrivacyError
from shared.privacy import noise
from shared.privacy.noise import GRID_SIGMA, SecureRandomness, SeededRandomness
from simulations.bench import noise as bench_noise

LEVEL = 1e-3
POWER = 1e-6
KEYS = [bytes([n]) * 32 for n in range(8)]


def seeded() -> SeededRandomness:
    return SeededRandomness(seed=1, campaign="c", device=2, round_number=3)


def words(key: int = 0) -> noise.Words:
    """A key stream that is the same in every run, so that no test fails by chance on another day."""
    return noise._chacha20(KEYS[key])


def script(*values: int, then: noise.Words | None = None) -> noise.Words:
    """Words somebody chose, then those of a key stream."""
    left, rest = list(values), then or words()

    def take(count: int) -> np.ndarray:
        chosen, left[:count] = left[:count], []
        return np.concatenate([np.array(chosen, dtype=np.uint64), rest(count - len(chosen))])

    return take


def pmf(sigma: float, reach: int) -> np.ndarray:
    """Discrete Gaussian on -reach..reach."""
    k = np.arange(-20 * reach, 20 * reach + 1)
    weights = np.exp(-(k**2) / (2 * sigma**2))
    return (weights / weights.sum())[19 * reach : 21 * reach + 1]


def rounded(sigma: float, reach: int) -> np.ndarray:
    """Rounded continuous Gaussian on -reach..reach."""
    edges = np.arange(-reach - 0.5, reach + 1)
    return np.diff(st.norm(scale=sigma).cdf(edges))


def fit(drawn: np.ndarray, probabilities: np.ndarray) -> float:
    """p-value of the chi-square test; the middle of ``probabilities`` is zero, all beyond its ends is one more cell."""
    reach = probabilities.size // 2
    inside = drawn[abs(drawn) <= reach] + reach
    seen = np.append(np.bincount(inside, minlength=probabilities.size), drawn.size - inside.size)
    wanted = np.append(probabilities, 1 - probabilities.sum()) * drawn.size
    thin = wanted < 8
    if thin.any():
        seen = np.append(seen[~thin], seen[thin].sum())
        wanted = np.append(wanted[~thin], wanted[thin].sum())
    return float(st.chisquare(seen, wanted, sum_check=False).pvalue)


def binomial_p(hits: np.ndarray, probability: float) -> float:
    return float(st.binomtest(int(hits.sum()), hits.size, probability).pvalue)


# The discrete Gaussian


@pytest.mark.parametrize("log2_sigma", [0, 1, 2, 4])
def test_integers_have_exactly_the_discrete_gaussian(log2_sigma):
    sigma = 2**log2_sigma
    drawn = noise._discrete_gaussian(words(log2_sigma), log2_sigma=log2_sigma, count=1_000_000)
    assert drawn.dtype == np.int64
    assert drawn.shape == (1_000_000,)
    reach = 4 * sigma  # cells up to four standard deviations, both tails beyond
    assert fit(drawn, pmf(sigma, reach)) > LEVEL
    assert fit(drawn, pmf(1.05 * sigma, reach)) < POWER
    assert fit(drawn, pmf(0.95 * sigma, reach)) < POWER
    if sigma == 1:
        assert fit(drawn, rounded(sigma, reach)) < POWER  # the right scale is not enough: a rounded Gaussian fails
        assert fit(drawn[drawn != 0], pmf(sigma, reach)) < POWER


@pytest.mark.parametrize("log2_sigma", [0, 2])
def test_tails_hold_at_every_distance(log2_sigma):
    sigma, count = 2**log2_sigma, 1_000_000
    drawn = abs(noise._discrete_gaussian(words(5), log2_sigma=log2_sigma, count=count))
    probabilities = pmf(sigma, 8 * sigma)
    for distance in range(sigma, 5 * sigma):
        beyond = 2 * probabilities[8 * sigma + distance + 1 :].sum()
        assert binomial_p(drawn > distance, beyond) > LEVEL / 10
    assert drawn.max() <= 6 * sigma


def test_noise_of_the_grid_has_its_scale():
    drawn = noise._discrete_gaussian(words(), log2_sigma=24, count=200_000)
    for scale, holds in ((1.0, True), (1.02, False), (0.98, False)):
        statistic = float(np.sum((drawn / (scale * GRID_SIGMA)) ** 2))
        assert (2 * min(st.chi2.cdf(statistic, drawn.size), st.chi2.sf(statistic, drawn.size)) > LEVEL) == holds
    assert st.kstest(drawn / GRID_SIGMA, st.norm.cdf).pvalue > LEVEL
    assert st.kstest(drawn / GRID_SIGMA, st.norm(scale=1.05).cdf).pvalue < POWER
    assert st.kstest(drawn / GRID_SIGMA, st.t(df=8).cdf).pvalue < POWER
    residues = np.bincount(drawn & 255, minlength=256)  # every low bit is noise as well
    assert st.chisquare(residues).pvalue > LEVEL


class Fixed(SecureRandomness):
    """The generator of a device over a key stream that is the same in every run."""

    def __init__(self, key: int) -> None:
        super().__init__()
        self._words = words(key)  # type: ignore[method-assign]


@pytest.mark.parametrize("log2_sigma", [0, 4])
def test_a_share_of_noise_has_exactly_the_discrete_gaussian_of_its_own_scale(log2_sigma):
    sigma = 2**log2_sigma
    drawn = Fixed(6).gaussian_integers(300_000, log2_sigma=log2_sigma)
    assert drawn.dtype == np.int64
    assert fit(drawn, pmf(sigma, 4 * sigma)) > LEVEL
    assert fit(drawn, pmf(1.05 * sigma, 4 * sigma)) < POWER
    assert fit(drawn, pmf(0.95 * sigma, 4 * sigma)) < POWER
    if sigma == 1:  # what simulations draw, a rounded Gaussian, is not the same at so small a scale
        assert fit(drawn, rounded(sigma, 4)) < POWER
        assert fit(seeded().gaussian_integers(300_000, log2_sigma=0), pmf(sigma, 4)) < POWER


@pytest.mark.parametrize("randomness", [lambda: Fixed(7), seeded])
def test_a_share_of_noise_has_its_scale_in_both_generators(randomness):
    drawn = randomness().gaussian_integers(200_000, log2_sigma=16)
    for scale, holds in ((1.0, True), (1.02, False), (0.98, False)):
        statistic = float(np.sum((drawn / (scale * 2**16)) ** 2))
        assert (2 * min(st.chi2.cdf(statistic, drawn.size), st.chi2.sf(statistic, drawn.size)) > LEVEL) == holds
    assert st.kstest(drawn / 2**16, st.norm.cdf).pvalue > LEVEL
    assert st.kstest(drawn / 2**16, st.t(df=8).cdf).pvalue < POWER
    assert st.chisquare(np.bincount(drawn & 255, minlength=256)).pvalue > LEVEL


def test_shares_of_many_devices_have_the_sum_that_is_priced():
    shares = [Fixed(key).gaussian_integers(200_000, log2_sigma=0) for key in range(5)]
    together = functools.reduce(np.convolve, [pmf(1, 8)] * 5)
    middle = together.size // 2
    assert fit(sum(shares), together[middle - 9 : middle + 10]) > LEVEL
    assert fit(sum(shares[1:]), together[middle - 9 : middle + 10]) < POWER
    assert fit(5 * shares[0], together[middle - 9 : middle + 10]) < POWER  # the same share five times


def test_without_a_scale_it_is_the_grids_bit_for_bit():
    stream = noise.seeded_generator(seed=1, purpose="noise of c", device=2, round_number=3)
    usual = np.rint(stream.standard_normal(10_000) * 2**24).astype(np.int64)
    assert np.array_equal(seeded().gaussian_integers(10_000), usual)
    assert np.array_equal(seeded().gaussian_integers(10_000, log2_sigma=24), usual)
    assert np.array_equal(Fixed(1).gaussian_integers(10_000), Fixed(1).gaussian_integers(10_000, log2_sigma=24))


@pytest.mark.parametrize("randomness", [SecureRandomness, seeded])
def test_a_scale_that_no_sampler_has_is_refused(randomness):
    for wrong in (-1, 25):
        with pytest.raises(PrivacyError, match=f"log2_sigma must be 0 to 24, got {wrong}; take it from the policy"):
            randomness().gaussian_integers(3, log2_sigma=wrong)
    with pytest.raises(TypeError):
        randomness().gaussian_integers(3, log2_sigma=16.0)


def test_neighbouring_draws_are_independent():
    drawn = noise._discrete_gaussian(words(1), log2_sigma=24, count=200_000) / GRID_SIGMA
    for lag in (1, 2, 3, 7, 1000):
        assert abs(np.corrcoef(drawn[:-lag], drawn[lag:])[0, 1]) < 4.5 / math.sqrt(drawn.size)
        assert abs(np.corrcoef(drawn[:-lag] ** 2, drawn[lag:] ** 2)[0, 1]) < 4.5 / math.sqrt(drawn.size)


@pytest.mark.parametrize("count", [1, 2, 15])
def test_small_counts_are_not_favoured(count):
    stream = words(2)  # stopping at the first that fits would favour some values
    drawn = np.concatenate([noise._discrete_gaussian(stream, log2_sigma=0, count=count) for _ in range(1_500)])
    assert fit(drawn, pmf(1, 4)) > LEVEL
    assert fit(drawn, pmf(1.4, 4)) < POWER


def test_the_seeded_noise_is_the_same_noise_to_a_simulation():
    drawn = seeded().gaussian_integers(100_000)
    assert drawn.dtype == np.int64
    assert st.kstest(drawn / GRID_SIGMA, st.norm.cdf).pvalue > LEVEL
    assert np.array_equal(drawn, seeded().gaussian_integers(100_000))


def test_a_candidate_out_of_range_is_refused(monkeypatch):
    monkeypatch.setattr(noise, "_MAX_WHOLE", 3)
    with pytest.raises(PrivacyError, match="candidate must be below 3 standard deviations; draw again"):
        SecureRandomness().gaussian_integers(1000)


# Its parts


@pytest.mark.parametrize(("numerator", "bits"), [(0, 3), (1, 3), (5, 3), (7, 3), (3 * 2**47 + 1, 49)])
def test_exponentials_are_exact(numerator, bits):
    count = 400_000
    hits = noise._bernoulli_exp(words(3), np.full(count, numerator, dtype=np.uint64), bits=bits)
    probability = math.exp(-numerator / 2**bits)
    assert binomial_p(hits, probability) > LEVEL
    assert binomial_p(hits, 0.98 * probability) < POWER


@pytest.mark.parametrize("steps", [3, 5, 13])
def test_one_word_decides_the_first_steps_of_the_series(steps):
    hits = noise._bernoulli_inverse_e(words(4), 1_000_000, steps=steps)
    assert binomial_p(hits, math.exp(-1)) > LEVEL
    assert binomial_p(hits, math.exp(-1) + 0.004) < POWER


def test_a_word_that_decides_nothing_is_followed_by_others():
    factorial = math.factorial(13)
    share = 2**64 // factorial
    undecided, void = share * factorial - 1, share * factorial
    assert bool(noise._bernoulli_inverse_e(script(undecided, 0, 2**63), 1)[0]) is True  # k = 15 fails: odd
    assert bool(noise._bernoulli_inverse_e(script(undecided, 2**63), 1)[0]) is False  # k = 14 fails: even
    assert bool(noise._bernoulli_inverse_e(script(void, 0), 1)[0]) is True  # drawn again
    assert bool(noise._bernoulli_inverse_e(script(2**64 - 1, share * (factorial - 1) - 1), 1)[0]) is False


def test_words_beyond_equal_shares_are_drawn_again():
    numerators = np.array([2**48], dtype=np.uint64)  # 1/2 of 2^49; k = 3
    share = 2**15 // 3
    end = (3 * share) << 49
    assert not noise._bernoulli_share(script(end - 1), numerators, k=3, bits=49)[0]
    assert noise._bernoulli_share(script(end, 0), numerators, k=3, bits=49)[0]
    assert noise._bernoulli_share(script(share * 2**48 - 1), numerators, k=3, bits=49)[0]
    assert not noise._bernoulli_share(script(share * 2**48), numerators, k=3, bits=49)[0]


@pytest.mark.parametrize("count", [1, 3, 100_000])
def test_runs_are_geometric(count):
    stream = words(6)
    drawn = np.concatenate([noise._geometric(stream, count) for _ in range(max(1, 6_000 // count))])
    assert drawn.size >= 6_000
    for value in range(4):
        assert binomial_p(drawn >= value, math.exp(-value)) > LEVEL
    assert binomial_p(drawn >= 1, 0.42) < POWER


# Bernoulli draws


@pytest.mark.parametrize("randomness", [SecureRandomness, seeded])
@pytest.mark.parametrize("probability", [0.1, 0.5, 1 / 3, 2**-9])
def test_inclusions_have_the_policy_s_rate(randomness, probability):
    hits = randomness().bernoulli(probability, 400_000)
    assert hits.dtype == np.bool_
    assert binomial_p(hits, probability) > LEVEL / 100  # of another key every time
    assert binomial_p(hits, 1.5 * probability) < POWER


@pytest.mark.parametrize("randomness", [SecureRandomness, seeded])
def test_certain_and_impossible_inclusions(randomness):
    assert randomness().bernoulli(1.0, 1000).all()
    assert not randomness().bernoulli(0.0, 1000).any()
    assert randomness().bernoulli(0.3, 0).shape == (0,)
    assert randomness().gaussian_integers(0).shape == (0,)


@pytest.mark.parametrize("probability", [0.1, 0.75, 2**-11 * 1.1, 1e-300, 5e-324, 1 - 2**-53])
def test_every_digit_of_a_probability_is_compared(probability):
    numerator, denominator = probability.as_integer_ratio()
    limbs = max(1, -(-(denominator.bit_length() - 1) // 64))
    threshold = numerator * 2 ** (64 * limbs) // denominator

    def compared(value: int) -> bool:
        digits = [value >> 64 * limb & (2**64 - 1) for limb in range(limbs)]
        return bool(noise._bernoulli(script(*digits), probability, 1)[0])

    assert not compared(threshold)
    assert compared(threshold - 1)
    assert compared(0)
    assert not compared(2 ** (64 * limbs) - 1)


def test_a_seeded_inclusion_is_numpy_s_own_draw():
    streams = {"seed": 1, "purpose": "sampling of c", "device": 2, "round_number": 3}
    usual = noise.seeded_generator(**streams).random(10_000) < 0.1
    assert np.array_equal(seeded().bernoulli(0.1, 10_000), usual)


@pytest.mark.parametrize("randomness", [SecureRandomness, seeded])
def test_what_cannot_be_drawn_is_refused(randomness):
    for probability in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(PrivacyError, match=r"probability must be in \[0, 1\], got .*; take it from the policy"):
            randomness().bernoulli(probability, 3)
    for draw in (lambda: randomness().bernoulli(0.5, -1), lambda: randomness().gaussian_integers(-1)):
        with pytest.raises(PrivacyError, match="count must be >= 0, got -1"):
            draw()
    with pytest.raises(TypeError):
        randomness().gaussian_integers(1.5)


# Where the bits come from

RFC8439 = {  # appendix A.1, test vectors 1 and 2 (blocks 0 and 1 of one stream), 3 and 4 (blocks 1 and 2)
    (bytes(32), 0): "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586",
    (bytes(32), 1): "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
    "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f",
    (bytes(31) + b"\x01", 1): "3aeb5224ecf849929b9d828db1ced4dd832025e8018b8160b82284f3c949aa5a"
    "8eca00bbb4a73bdad192b5c42f73f2fd4e273644c8b36125a64addeb006c13a0",
    (b"\x00\xff" + bytes(30), 2): "72d54dfbf12ec44b362692df94137f328fea8da73990265ec1bbbea1ae9af0ca"
    "13b25aa26cb4a648cb9b9d1be65b2c0924a66c54d545ec1b7374f4872e99f096",
}


@pytest.mark.parametrize(("key", "block"), RFC8439)
def test_the_key_stream_is_chacha20(key, block):
    stream = noise._chacha20(key)
    stream(8 * block)
    assert np.concatenate([stream(3), stream(5)]).tobytes().hex() == RFC8439[key, block]


def test_a_new_key_for_each_object(monkeypatch):
    asked: list[bytes] = []
    real = os.urandom
    monkeypatch.setattr(os, "urandom", lambda size: asked.append(real(size)) or asked[-1])
    streams = [SecureRandomness()._words(1000) for _ in range(50)]
    assert [len(key) for key in asked] == [32] * 50
    assert np.unique(np.concatenate(streams)).size == 50_000  # chance of two equal words: 7e-11


def test_no_bit_is_used_twice():
    stream = noise._chacha20(KEYS[0])
    used: list[np.ndarray] = []
    randomness = SecureRandomness()
    randomness._stream = lambda count: used.append(stream(count)) or used[-1]
    for _ in range(3):
        randomness.gaussian_integers(400)
        randomness.bernoulli(0.1, 100)
    whole = np.concatenate(used)
    assert np.array_equal(whole, noise._chacha20(KEYS[0])(whole.size))  # in order, nothing twice
    assert np.unique(whole).size == whole.size


def differ(draw: Callable[[], np.ndarray], times: int = 4) -> None:
    drawn = [draw() for _ in range(times)]
    for one, other in itertools.combinations(drawn, 2):
        assert np.sum(one == other) < 5
        assert abs(np.corrcoef(one, other)[0, 1]) < 6 / math.sqrt(one.size)


def test_objects_and_calls_are_independent():
    one = SecureRandomness()
    differ(lambda: one.gaussian_integers(20_000))
    differ(lambda: SecureRandomness().gaussian_integers(20_000))


def test_seeds_do_not_reach_it():
    def draw() -> np.ndarray:
        torch.manual_seed(0)
        np.random.seed(0)
        return SecureRandomness().gaussian_integers(20_000)

    differ(draw)


def test_a_key_is_replaced_before_its_stream_ends(monkeypatch):
    monkeypatch.setattr(noise, "_BYTES_PER_KEY", 80)
    randomness = SecureRandomness()
    stream = randomness._stream
    randomness._words(8)
    randomness._words(2)
    assert randomness._stream is stream
    randomness._words(1)
    assert randomness._stream is not stream


def in_a_fork(randomness: SecureRandomness) -> np.ndarray:
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writable, randomness.gaussian_integers(400).tobytes())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        drawn = np.frombuffer(pipe.read(), dtype=np.int64)
    os.waitpid(child, 0)
    return drawn


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_draws_other_noise():
    randomness = SecureRandomness()
    randomness.gaussian_integers(10)
    drawn = [in_a_fork(randomness), in_a_fork(randomness), randomness.gaussian_integers(400)]
    assert [part.size for part in drawn] == [400] * 3
    for one, other in itertools.combinations(drawn, 2):
        assert not np.isin(one, other).sum() > 3


def test_a_key_is_not_written_down():
    with pytest.raises((TypeError, AttributeError)):
        pickle.dumps(SecureRandomness())
    one = SecureRandomness()
    other = copy.copy(one)  # shares the stream: neither repeats the other
    assert not np.isin(one._words(100), other._words(100)).any()


# The price


def log_ratio(k: int, sigma: int) -> tuple[mpmath.mpf, mpmath.mpf]:
    """ln(r(k) / p(k)) and ln(Z / (sqrt(2 pi) sigma)), to some hundred digits."""
    s = mpmath.mpf(sigma)
    tail = lambda x: mpmath.erfc(x / (s * mpmath.sqrt(2))) / 2  # noqa: E731
    r = tail(mpmath.mpf(k) - 0.5) - tail(mpmath.mpf(k) + 0.5)
    z = mpmath.fsum(mpmath.exp(-(mpmath.mpf(j) ** 2) / (2 * s**2)) for j in range(-28 * sigma, 28 * sigma + 1))
    return mpmath.log(r * z) + k**2 / (2 * s**2), mpmath.log(z / (mpmath.sqrt(2 * mpmath.pi) * s))


@pytest.mark.parametrize("sigma", [1, 2, 4])
def test_rounded_and_discrete_gaussian_are_as_close_as_stated(sigma):
    with mpmath.workdps(160):
        for k in range(8 * sigma + 1):
            ratio, constant = log_ratio(k, sigma)
            assert -1 / mpmath.mpf(24 * sigma**2) <= ratio - constant <= mpmath.mpf(k) ** 2 / (24 * sigma**4)
            assert 0 < constant < 3 * mpmath.exp(-2 * mpmath.pi**2 * sigma**2)
            t = max(mpmath.mpf(1), mpmath.mpf(k) / sigma)
            assert abs(ratio) <= t**2 / (24 * sigma**2)
        at_zero, constant = log_ratio(0, sigma)
        assert at_zero - constant < -0.95 / mpmath.mpf(24 * sigma**2)  # neither bound is loose
        far, constant = log_ratio(5 * sigma, sigma)
        assert far - constant > 0.75 * mpmath.mpf(25) / (24 * sigma**2)


@pytest.mark.parametrize("sigma", [1, 2, 8])
def test_tails_are_as_thin_as_stated(sigma):
    with mpmath.workdps(60):
        z = mpmath.fsum(mpmath.exp(-mpmath.mpf(j**2) / (2 * sigma**2)) for j in range(-25 * sigma, 25 * sigma + 1))
        for k in range(sigma, 10 * sigma):  # |K| > t sigma is |K| > k for t sigma just below k + 1: the worst t
            t = mpmath.mpf(k + 1) / sigma
            weights = (mpmath.exp(-mpmath.mpf(j**2) / (2 * sigma**2)) for j in range(k + 1, 25 * sigma))
            assert 2 * mpmath.fsum(weights) / z <= 2 * mpmath.exp(-(t**2) / 2)
            beyond_rounded = mpmath.erfc((mpmath.mpf(k) + 0.5) / (sigma * mpmath.sqrt(2)))
            if t <= sigma:
                assert beyond_rounded <= 2 * mpmath.exp(-(t**2) / 2)
        if sigma == 1:  # where it does not hold, and is not claimed
            assert beyond_rounded > 2 * mpmath.exp(-(t**2) / 2)


# The benchmark


def test_the_benchmark_compares_the_noise_before_it_measures():
    measured = bench_noise.measure(rounds=1, counts=(400,), quiet=True)
    assert measured["ratios"]["400"]["median"] > 1
    assert any("secure, 400 coordinates" in line for line in bench_noise.lines(measured))

    class Wrong(SeededRandomness):
        def gaussian_integers(self, count: int, *, log2_sigma: int = 24) -> np.ndarray:
            return super().gaussian_integers(count, log2_sigma=log2_sigma) * 21 // 20

    with pytest.raises(CampaignError, match="mean square of wrong noise must be 1"):
        bench_noise.compare_scales({"wrong": Wrong(seed=1, campaign="c", device=2, round_number=3)})
