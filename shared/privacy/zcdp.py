"""Price sums to which many devices each add discrete Gaussian noise, in concentrated differential privacy."""

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np

from shared.errors import PrivacyError
from shared.privacy.mechanisms import MAX_EPSILON, DistributedMechanism, check_delta

_ORDERS = (1e-4, 1e12, 20_000)  # Rényi orders minus one, and how many: the price is within 1e-6 of the best order's
_LEAST_EXPONENT = -700.0  # of a term of tau: an upper bound must not underflow to 0


def zcdp_epsilon(rho: float, delta: float) -> float:
    """Convert zero-concentrated to approximate differential privacy.

    Args:
        rho: Every Rényi divergence of order a > 1 is at most rho a; finite and >= 0.
        delta: In [1e-12, 1).

    Returns:
        An epsilon that holds with ``delta``.

    Raises:
        PrivacyError: A value is impossible.

    Guarantee:
        Every order gives a valid epsilon; the least over a fixed set of orders is returned, so it is monotone.

    Source:
        Canonne, Kamath & Steinke 2020, arXiv:2004.00010, Proposition 12: with x = a - 1, epsilon = rho (1 + x)
        + log(x / (1 + x)) - (log(delta) + log(1 + x)) / x.

    Example:
        >>> round(zcdp_epsilon(0.1, 1e-5), 4)
        1.9142
    """
    check_delta(delta)
    if not (math.isfinite(rho) and rho >= 0):
        raise PrivacyError(f"rho must be finite and >= 0, got {rho}. Add up what the releases cost.")
    x, rest = _orders()
    return max(0.0, float(np.min(rho * (1 + x) + rest - math.log(delta) / x)))


def distributed_epsilon(mechanisms: Sequence[DistributedMechanism], *, delta: float) -> float:
    """Price what secure sums release of one user, over one campaign or several together.

    Args:
        mechanisms: One campaign each; at least one.
        delta: In [1e-12, 1).

    Returns:
        An epsilon that all releases together satisfy with ``delta``, one user's contributions replaced by zero; ``inf``
        above 200.

    Raises:
        PrivacyError: ``delta`` is impossible.

    Guarantee:
        Holds for requests that depend on earlier answers, and not less private with more shares of noise than priced.

    Source:
        Kairouz, Liu & Steinke 2021, arXiv:2102.06387, Proposition 14, first and third bound: with Delta the L2
        sensitivity and s the parameter of a share in steps of the grid, z = sqrt(h) s / Delta, in d coordinates, the
        Rényi divergence of order a is at most a / 2 z^2 + tau d, and at most (a / 2)(1 / z + tau sqrt(d))^2. We keep
        tau d apart from what grows with a, instead of writing both as one epsilon^2 / 2. docs/privacy.md has the proof.
    """
    terms = [(m.releases, 1 / m.noise_multiplier, tau_of(m.shares, m.share_sigma), m.coordinates) for m in mechanisms]
    beside = sum(n * d * tau for n, _, tau, d in terms)
    apart = beside + zcdp_epsilon(sum(n * mu**2 / 2 for n, mu, _, _ in terms), delta)
    joint = zcdp_epsilon(sum(n * (mu + tau * math.sqrt(d)) ** 2 / 2 for n, mu, tau, d in terms), delta)
    price = min(apart, joint)
    return price if price <= MAX_EPSILON else math.inf


@lru_cache(maxsize=256)
def tau_of(shares: int, share_sigma: float) -> float:
    """How far the logarithm of the density of a sum of shares is from one discrete Gaussian's, twice; rounded up."""
    k = np.arange(1, shares)
    exponents = -2 * math.pi**2 * share_sigma**2 * k / (k + 1)
    return 10 * (1 + 1e-9) * float(np.exp(np.maximum(exponents, _LEAST_EXPONENT)).sum())


@cache
def _orders() -> tuple[np.ndarray, np.ndarray]:
    """Rényi orders minus one, x, and what the conversion adds at each that depends on neither rho nor delta."""
    x = np.geomspace(*_ORDERS)
    return x, np.log(x) - np.log1p(x) * (1 + 1 / x)
