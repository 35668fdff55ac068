"""The one-run bound for mechanisms that are Gaussian: it sees at epsilon 8 what ``one_run_bound`` cannot."""

import math

from scipy import special
from scipy.optimize import brentq

from shared.errors import PrivacyError
from shared.privacy.mechanisms import MAX_EPSILON, AnyMechanism, Mechanism, check_delta
from shared.privacy.zcdp import tau_of
from simulations.audit.bounds import check_chances, check_counts

_MAX_MU = 40.0  # of a Gaussian trade-off curve: epsilon beyond 800
_FAR = 10.0  # standard deviations, beyond which a noise lies once in 10^22 draws
_NOTHING = 1e-5  # by which a logarithm of likelihoods may be off


def is_gaussian(mechanism: AnyMechanism) -> bool:
    """Whether the Gaussian trade-off curve is the mechanism's own but for a factor below 1 + 1e-5; not under sampling.

    n releases of z are one Gaussian of mu = sqrt(n) / z, and rounding that to a grid is post-processing. A discrete
    Gaussian of s steps differs from the rounded one, within t standard deviations, by a logarithm of at most
    (t^2 + 1) / 24 s^2 a number (``shared/privacy/noise.py``): nothing on a grid of sigma / 2^24. A sum of shares
    differs from one discrete Gaussian by half of tau a number (``zcdp.py``), which with fine shares is
    nothing either.
    """
    if isinstance(mechanism, Mechanism):
        return mechanism.sampling_rate == 1
    per_number = (_FAR**2 + 1) / (24 * mechanism.shares * mechanism.share_sigma**2)
    per_number += tau_of(mechanism.shares, mechanism.share_sigma)
    return mechanism.coordinates * mechanism.releases * per_number <= _NOTHING


def gdp_one_run_bound(*, canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """Lower bound on the epsilon of a Gaussian mechanism from a single run with many canaries.

    Args:
        canaries: See ``one_run_bound``.
        guesses: See ``one_run_bound``.
        correct: See ``one_run_bound``.
        delta: Where on the Gaussian's curve epsilon is read; in [1e-12, 1).
        confidence: In (0, 1).

    Returns:
        Epsilon at ``delta`` of the largest mu such that the guesses rule out mu-GDP; 0 where they rule out nothing.

    Raises:
        PrivacyError: A number is impossible.

    Guarantee:
        A mechanism that is mu-GDP gets a bound above its epsilon at ``delta`` with probability at most
        1 - ``confidence``. **Not so for any (epsilon, delta)-private mechanism**: ask ``is_gaussian`` first.

    Source:
        Mahloujifar, Melis, Chaudhuri 2024, arXiv:2410.22235, for k = 2, written in the tails M_i = P[V >= i]. Given the
        other coins, "canary j is guessed, and i - 1 others rightly" is an event of the output, for every i. Summed over
        i > u, over both guesses (the curve G(x) = Phi(Phi^-1(x) + mu) is concave) and over j:
            sum_{i > u} i p_i / m <= G(sum_{i >= u} (r - i) p_i / m),
        that is, with S_u = sum_{i > u} M_i,
            M_u >= (S_u + m G^-1(((u + 1) M_(u + 1) + S_(u + 1)) / m)) / (r - u).
        The right side grows with every M_i above, so that M_v >= 1 - confidence forces the tails found from below; had
        it forced M_0 > 1, it was impossible.

    Example:
        >>> round(gdp_one_run_bound(canaries=1000, guesses=100, correct=90, delta=1e-5), 4)
        2.4564
    """
    check_counts(canaries=canaries, guesses=guesses, correct=correct)
    check_chances(delta, confidence)
    check_delta(delta)
    low, high = 0.0, _MAX_MU
    if not _ruled_out(low, canaries=canaries, guesses=guesses, correct=correct, p=1 - confidence):
        return 0.0
    for _ in range(50):  # the tails forced never grow with mu
        middle = (low + high) / 2
        out = _ruled_out(middle, canaries=canaries, guesses=guesses, correct=correct, p=1 - confidence)
        low, high = (middle, high) if out else (low, middle)
    return epsilon_of_mu(low, delta=delta)


def fewest_correct_gaussian(
    *, canaries: int, guesses: int, epsilon: float, delta: float, confidence: float = 0.95
) -> int | None:
    """``fewest_correct`` of ``gdp_one_run_bound``.

    Raises:
        PrivacyError: A number is impossible.
    """
    check_counts(canaries=canaries, guesses=guesses, correct=0)
    check_chances(delta, confidence)
    check_delta(delta)
    if not 0 < epsilon <= MAX_EPSILON:
        raise PrivacyError(f"the claimed epsilon must be in (0, {MAX_EPSILON:.0f}], got {epsilon}.")
    mu = float(brentq(lambda x: epsilon_of_mu(x, delta=delta) - epsilon, 0.0, _MAX_MU, xtol=1e-12))
    low, high = 0, guesses + 1
    while high - low > 1:  # one right guess more forces no smaller tails
        middle = (low + high) // 2
        out = _ruled_out(mu, canaries=canaries, guesses=guesses, correct=middle, p=1 - confidence)
        low, high = (low, middle) if out else (middle, high)
    return high if high <= guesses else None


def epsilon_of_mu(mu: float, *, delta: float) -> float:
    """Smallest epsilon at which a mu-GDP mechanism is (epsilon, delta)-private.

    Source:
        Dong, Roth, Su 2019, arXiv:1905.02383, Corollary 1.
    """

    def excess(epsilon: float) -> float:
        far = math.exp(epsilon + special.log_ndtr(-epsilon / mu - mu / 2))
        return float(special.ndtr(-epsilon / mu + mu / 2)) - far - delta

    if not mu > 0 or excess(0.0) <= 0:
        return 0.0
    return float(brentq(excess, 0.0, mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / delta)) + 1, xtol=1e-12))


def _ruled_out(mu: float, *, canaries: int, guesses: int, correct: int, p: float) -> bool:
    """Whether no mu-GDP mechanism has ``correct`` right guesses or more with probability ``p``."""
    tail, above = p, 0.0  # M_(u + 1) and S_(u + 1)
    for u in range(correct - 1, -1, -1):
        right = min(1.0, ((u + 1) * tail + above) / canaries)
        wrong = float(special.ndtr(special.ndtri(right) - mu))
        above += tail
        tail = max(tail, (above + canaries * wrong) / (guesses - u))
        if tail > 1:
            return True
    return False
