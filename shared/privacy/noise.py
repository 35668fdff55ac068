"""Randomness of a private step: exact Bernoulli draws and integer Gaussian noise; seeded in simulations only.

Noise is an integer, because floating-point noise has bits that tell what it was added to (Mironov 2012): contributions
are rounded to multiples of a grid first, the grid being the wanted standard deviation over ``GRID_SIGMA``.

**What an accountant of the continuous Gaussian says about it.** With s = GRID_SIGMA and X ~ N(0, s^2), adding
floor(X + 1/2) to integers is post-processing of the continuous Gaussian mechanism, so its price holds for the rounded
Gaussian r(k). The discrete Gaussian p(k) = exp(-k^2 / 2 s^2) / Z is not the same, but for every integer k

    -1 / (24 s^2)  <=  ln(r(k) / p(k)) - ln(Z / (sqrt(2 pi) s))  <=  k^2 / (24 s^4),

because sqrt(2 pi) s r(k) / exp(-k^2 / 2 s^2) is the mean of exp(-(2 k x + x^2) / 2 s^2) over x uniform in
[-1/2, 1/2]: Jensen below; above, exp(-x^2 / 2 s^2) <= 1 and sinh(a) / a <= exp(a^2 / 6). For s >= 1,
0 < ln(Z / (sqrt(2 pi) s)) < 3 exp(-2 pi^2 s^2), which is less than what the upper bound gives away, so that
|ln(r(k) / p(k))| <= t^2 / (24 s^2) wherever |k| <= t s, t >= 1. Beyond, p has at most 2 exp(-t^2 / 2), and so has r if
t <= s. If N draws with r make a release (epsilon, delta), the same N draws with p therefore make it

    (epsilon + 2 eta, e^eta delta + (1 + e^(epsilon + eta)) beta), eta = N t^2 / (24 s^2), beta = 2 N exp(-t^2 / 2),

adaptively chosen releases included. N = 10^8 and t = 12 give eta < 2.2e-6 and beta < 1.1e-23.

Shares of noise that many devices add to one sum are coarser, so that the sum fits 32 bits; ``zcdp.py`` prices it.
"""

import functools
import hashlib
import json
import math
import operator
import os
from collections.abc import Callable
from typing import Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from shared.errors import PrivacyError

_LOG2_SIGMA = 24
GRID_SIGMA = 2**_LOG2_SIGMA  # standard deviation of the noise in steps of the grid, which is stddev / GRID_SIGMA

_BYTES_PER_KEY = 2**36  # a quarter of what ChaCha20's 32-bit block counter reaches
_BATCH = 2**14  # candidates drawn at once: their arrays stay in a processor's cache
_MAX_WHOLE = 128  # a Laplace candidate of 128 standard deviations, so that squares stay below 2^62

Words = Callable[[int], np.ndarray]  # count -> (count,) uint64, uniform and independent, never the same bits twice


class Randomness(Protocol):
    """What a private step draws: who is in the batch, and the noise."""

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        """(count,) bool, independent, each true with exactly ``probability``."""
        ...

    def gaussian_integers(self, count: int, *, log2_sigma: int = _LOG2_SIGMA) -> np.ndarray:
        """(count,) int64, independent, discrete Gaussian of parameter 2^``log2_sigma``, by default ``GRID_SIGMA``."""
        ...


class SeededRandomness:
    """Reproducible draws, **for simulations only**: whoever knows the seed can subtract the noise.

    Fast instead of exact: the noise is a float64 Gaussian rounded to integers, and ends where float64 draws end.
    Batches and noise come from two streams of :func:`seeded_generator`: neither depends on how much of the other was
    drawn.

    Args:
        seed: Seed of the run.
        campaign: Its name: two campaigns of one seed share no noise.
        device: Index of the simulated device.
        round_number: Round of the campaign.

    Example:
        >>> randomness = SeededRandomness(seed=0, campaign="c", device=3, round_number=1)
        >>> (randomness.gaussian_integers(3) / GRID_SIGMA).round(3).tolist()
        [-0.225, 0.045, -0.433]
    """

    def __init__(self, *, seed: int, campaign: str, device: int, round_number: int) -> None:
        self._sampling, self._noise = (
            seeded_generator(seed=seed, purpose=f"{purpose} of {campaign}", device=device, round_number=round_number)
            for purpose in ("sampling", "noise")
        )

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        """(count,) bool: what ``random(count) < probability`` gives, read to the last digit of ``probability``.

        Raises:
            PrivacyError: ``probability`` is not in [0, 1], or ``count`` is negative.
        """
        return _bernoulli(self._words, probability, _checked(count))

    def gaussian_integers(self, count: int, *, log2_sigma: int = _LOG2_SIGMA) -> np.ndarray:
        """(count,) int64, the same stream at every ``log2_sigma``.

        Raises:
            PrivacyError: ``count`` is negative, or ``log2_sigma`` is not in 0 to 24.
        """
        sigma = 2 ** _checked_log2(log2_sigma)
        noise: np.ndarray = np.rint(self._noise.standard_normal(_checked(count)) * sigma).astype(np.int64)
        return noise

    def _words(self, count: int) -> np.ndarray:
        return self._sampling.integers(2**64, size=count, dtype=np.uint64)


class SecureRandomness:
    """Draws that nobody can foresee or repeat: ChaCha20 under a key of the operating system, exact samplers.

    Every object has its own 256-bit key from ``os.urandom``, another one after a fork (noticed by the process id) and
    after 64 GiB. No seed reaches it. It is not noticed when a whole virtual machine is copied while it runs.

    Guarantee:
        Given uniform bits, every draw has exactly its distribution: integers are compared, nothing is computed in
        floating point. No bit of the key stream is used twice.
    """

    def __init__(self) -> None:
        self._rekey()

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        """(count,) bool, independent, each true with exactly ``probability``.

        Raises:
            PrivacyError: ``probability`` is not in [0, 1], or ``count`` is negative.
        """
        return _bernoulli(self._words, probability, _checked(count))

    def gaussian_integers(self, count: int, *, log2_sigma: int = _LOG2_SIGMA) -> np.ndarray:
        """(count,) int64, independent, discrete Gaussian of parameter 2^``log2_sigma``, by default ``GRID_SIGMA``.

        Raises:
            PrivacyError: ``count`` is negative, ``log2_sigma`` is not in 0 to 24, or a candidate was beyond 128
                standard deviations (probability e^-128).
        """
        return _discrete_gaussian(self._words, log2_sigma=_checked_log2(log2_sigma), count=_checked(count))

    def _rekey(self) -> None:
        self._stream, self._left, self._process = _chacha20(os.urandom(32)), _BYTES_PER_KEY, os.getpid()

    def _words(self, count: int) -> np.ndarray:
        if self._process != os.getpid() or self._left < 8 * count:
            self._rekey()
        self._left -= 8 * count
        return self._stream(count)


def _chacha20(key: bytes) -> Words:
    """The ChaCha20 key stream of a key, from block 0 of nonce 0: a key is used for one stream only (RFC 8439)."""
    encryptor = Cipher(ChaCha20(key, nonce=bytes(16)), mode=None).encryptor()
    return lambda count: np.frombuffer(encryptor.update(bytes(8 * count)), dtype=np.uint64)


def _checked(count: int) -> int:
    count = operator.index(count)
    if not count >= 0:
        raise PrivacyError(f"count must be >= 0, got {count}; ask for as many draws as there are coordinates.")
    return count


def _checked_log2(log2_sigma: int) -> int:
    log2_sigma = operator.index(log2_sigma)
    if not 0 <= log2_sigma <= _LOG2_SIGMA:
        raise PrivacyError(f"log2_sigma must be 0 to {_LOG2_SIGMA}, got {log2_sigma}; take it from the policy.")
    return log2_sigma


def _bernoulli(words: Words, probability: float, count: int) -> np.ndarray:
    """Compare uniform bits with every binary digit of a float; one word a draw, unless it is below 2^-11."""
    probability = float(probability)
    if not 0 <= probability <= 1:
        raise PrivacyError(f"probability must be in [0, 1], got {probability}; take it from the policy.")
    numerator, denominator = probability.as_integer_ratio()
    limbs = max(1, -(-(denominator.bit_length() - 1) // 64))
    threshold = (numerator << 64 * limbs) // denominator  # exact: the denominator is a power of two
    if threshold == 1 << 64 * limbs:
        return np.ones(count, dtype=bool)
    below = np.zeros(count, dtype=bool)
    for limb in range(limbs):  # the least significant first: equal words leave the decision to those before
        digit, drawn = np.uint64((threshold >> 64 * limb) & (2**64 - 1)), words(count)
        below = (drawn < digit) | ((drawn == digit) & below)
    return below


def _bernoulli_exp(words: Words, numerators: np.ndarray, *, bits: int, first: int = 1) -> np.ndarray:
    """Independent Bernoulli(exp(-g)) with g = numerator / 2^bits < 1.

    Canonne et al. 2020, Algorithm 1: draw Bernoulli(g / k) for k = 1, 2, ... until one fails; true if that k is odd.
    A larger ``first`` goes on from that k; g = 1 is allowed then.
    """
    accepted = np.full(numerators.size, first % 2 == 1)
    alive, k = np.arange(numerators.size), first
    while alive.size:
        going_on = np.flatnonzero(_bernoulli_share(words, numerators, k=k, bits=bits))
        alive, numerators, k = alive[going_on], numerators[going_on], k + 1
        accepted[alive] = k % 2 == 1
    return accepted


def _bernoulli_share(words: Words, numerators: np.ndarray, *, k: int, bits: int) -> np.ndarray:
    """Independent Bernoulli(numerator / (k 2^bits)): a word in k 2^bits equal shares; others are drawn again."""
    share = 2 ** (64 - bits) // k  # > 0: the series would have to reach k = 2^15, of probability 1 / (2^15)!
    drawn = words(numerators.size)
    hit = drawn < numerators * np.uint64(share)
    shares_end = (share * k) << bits
    if shares_end < 2**64:
        void = np.flatnonzero(drawn >= np.uint64(shares_end))
        if void.size:
            hit[void] = _bernoulli_share(words, numerators[void], k=k, bits=bits)
    return hit


def _bernoulli_inverse_e(words: Words, count: int, *, steps: int = 13) -> np.ndarray:
    """Independent Bernoulli(1/e): the first ``steps`` (odd) of Algorithm 1 with g = 1, decided by one word.

    Of ``steps``! equal shares as many as there are derangements end at an odd k and one goes on; the others end at an
    even k.
    """
    ends_odd, ends_even, goes_on = _shares(steps)
    drawn = words(count)
    accepted = drawn < ends_odd
    rare = np.flatnonzero(drawn >= ends_even)
    if rare.size:
        void = drawn[rare] >= goes_on
        accepted[rare[void]] = _bernoulli_inverse_e(words, int(void.sum()), steps=steps)
        undecided = rare[~void]
        ones = np.ones(undecided.size, dtype=np.uint64)
        accepted[undecided] = _bernoulli_exp(words, ones, bits=0, first=steps + 1)
    return accepted


@functools.cache
def _shares(steps: int) -> tuple[np.uint64, np.uint64, np.uint64]:
    """Where the words end that decide: ended at an odd k, ended at an even k, goes on."""
    factorial = math.factorial(steps)
    deranged = sum((-1) ** k * (factorial // math.factorial(k)) for k in range(steps + 1))
    share = 2**64 // factorial
    return np.uint64(share * deranged), np.uint64(share * (factorial - 1)), np.uint64(share * factorial)


def _geometric(words: Words, count: int) -> np.ndarray:
    """(count,) int64 >= 0 with P(V >= v) = e^-v: lengths of the runs of successes in a stream of Bernoulli(1/e)."""
    ends, read = np.zeros(0, dtype=np.int64), 0
    while ends.size < count:  # the same stream is read on: to keep the runs that fit would favour short ones
        size = 8 * (count - ends.size) // 5 + 32
        found = np.flatnonzero(~_bernoulli_inverse_e(words, size))
        ends = np.append(ends, read + found) if read else found
        read += size
    runs: np.ndarray = np.diff(ends[:count], prepend=-1) - 1
    return runs


def _discrete_gaussian(words: Words, *, log2_sigma: int, count: int) -> np.ndarray:
    """Independent draws of P(k) proportional to exp(-k^2 / 2 s^2), s = 2^log2_sigma, log2_sigma <= 24.

    Canonne, Kamath & Steinke 2020, arXiv:2004.00010, Algorithms 1 to 3 with t = s, where every probability is
    exp(-n / 2^b). We differ in drawing many candidates at once and in rejecting once instead of twice: a candidate
    y = u + s v is kept with exp(-u / s) (Algorithm 2) and exp(-(y - s)^2 / 2 s^2) (Algorithm 3), a product with the
    exponent n / (2 s^2), n = 2 s u + (y - s)^2 an integer. About 48 in 100 are kept.
    """
    kept, missing = [np.zeros(0, dtype=np.int64)], count
    while missing > 0:
        candidates = _candidates(words, log2_sigma, min(43 * missing // 20 + 64, _BATCH))
        kept.append(candidates[:missing])
        missing -= kept[-1].size
    return np.concatenate(kept)


def _candidates(words: Words, log2_sigma: int, count: int) -> np.ndarray:
    """Those of ``count`` Laplace candidates that are kept."""
    sigma, bits = 1 << log2_sigma, 2 * log2_sigma + 1
    drawn = words(count)  # lowest bits: u; highest bit: sign
    u = (drawn & np.uint64(sigma - 1)).view(np.int64)
    v = _geometric(words, count)
    if not v.max(initial=0) < _MAX_WHOLE:
        raise PrivacyError(f"a candidate must be below {_MAX_WHOLE} standard deviations; draw again.")
    y = u + (v << log2_sigma)
    exponent = (y - sigma) ** 2 + (u << (log2_sigma + 1))  # n < 2^63
    fraction = (exponent & ((1 << bits) - 1)).view(np.uint64)
    keep = _bernoulli_exp(words, fraction, bits=bits)
    whole = exponent >> bits
    large = np.flatnonzero(whole)
    keep[large] &= _geometric(words, large.size) >= whole[large]  # Bernoulli(exp(-whole))
    sign = 1 - 2 * (drawn >> np.uint64(63)).view(np.int64)
    keep &= (y > 0) | (sign > 0)  # zero has one sign, or it would come twice as often
    kept: np.ndarray = (sign * y)[keep]
    return kept


def seeded_generator(*, seed: int, purpose: str, device: int, round_number: int) -> np.random.Generator:
    """Open the random stream of one purpose on one device in one round, **for simulations only**.

    Whoever knows the seed can subtract the noise: a run that protects somebody draws from a cryptographic generator
    instead. Streams come from numpy, because torch keeps only the low 32 bits of a seed on CPU, so that among 100,000
    streams two would be expected to be equal.

    Args:
        seed: Seed of the run.
        purpose: What the stream is for, such as ``"noise"`` or ``"sampling"``; not empty.
        device: Index of the simulated device.
        round_number: Round of the campaign.

    Returns:
        A new generator at the start of its stream; the same key gives the same stream.

    Raises:
        ValueError: ``purpose`` is empty.

    Guarantee:
        Streams of different keys differ, and are as independent as SHA-256 is random.
    """
    if not purpose:
        raise ValueError("purpose must name what the stream is for, got an empty string.")
    key = json.dumps([operator.index(seed), purpose, operator.index(device), operator.index(round_number)])
    return np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest(), "little"))
