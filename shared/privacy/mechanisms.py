"""What is released of one unit over a campaign: the constants an accountant prices, checked once."""

import math
from dataclasses import dataclass, replace

from shared.errors import PrivacyError

MAX_EPSILON = 200.0  # beyond it nothing is promised: priced as infinite, refused as a target
_MAX_COUNT = 2**31
_MAX_SHARES = 1_000_000
_MIN_SHARE_SIGMA = 0.5  # below it sums of discrete Gaussians are not known to be nearly one
_MIN_DELTA = 1e-12  # the convolutions are exact to about 1e-15


@dataclass(frozen=True)
class Mechanism:
    """What one device releases over a campaign: a clipped sum plus Gaussian noise, several times a round.

    At user level with a trusted server it is what the server releases: one noisy sum a round, ``steps`` and
    ``sampling_rate`` 1.

    Args:
        noise_multiplier: Noise stddev divided by the clip bound; finite and > 0.
        sampling_rate: Chance that a record enters a step, independently of all else (Poisson); in (0, 1].
        steps: Noisy steps per round.
        max_participations: Rounds one device may join in the whole campaign.
        coordinates: Numbers in one noisy step, where the noise is discrete; 0 for the continuous Gaussian.
        grid_sigma: Standard deviation of discrete noise in steps of its grid.
        choice_epsilon: Spent once besides, by a choice that is private without delta (``client/personal/persona.py``).

    Raises:
        PrivacyError: A value is impossible; the message names the scenario's key.
    """

    noise_multiplier: float
    sampling_rate: float
    steps: int
    max_participations: int
    coordinates: int = 0
    grid_sigma: float = math.inf
    choice_epsilon: float = 0.0

    def __post_init__(self) -> None:
        if not (isinstance(self.coordinates, int) and self.coordinates >= 0 and self.grid_sigma >= 1):
            raise PrivacyError(
                "coordinates must be a whole number >= 0 and grid_sigma at least 1, "
                f"got {self.coordinates} and {self.grid_sigma}."
            )
        if not 0 <= self.choice_epsilon <= MAX_EPSILON:
            raise PrivacyError(f"persona.epsilon must be from 0 to {MAX_EPSILON:g}, got {self.choice_epsilon}.")
        _check_noise(self.noise_multiplier)
        if not 0 < self.sampling_rate <= 1:
            raise PrivacyError(
                f"privacy.sampling_rate must be in (0, 1], got {self.sampling_rate}. "
                "1 takes every record in every step."
            )
        _check_count("training.steps", self.steps)
        _check_count("privacy.max_participations", self.max_participations)

    @property
    def releases(self) -> int:
        """Noisy steps over the whole campaign."""
        return self.steps * self.max_participations

    @property
    def chance_of_a_draw(self) -> float:
        """Probability that a record enters any step at all: at a delta of as much even no noise would do."""
        if self.sampling_rate == 1:
            return 1.0
        return -math.expm1(self.releases * math.log1p(-self.sampling_rate))

    @property
    def continuous(self) -> "Mechanism":
        """The Gaussian noise alone, not rounded to a grid."""
        return replace(self, coordinates=0, grid_sigma=math.inf, choice_epsilon=0.0)


@dataclass(frozen=True)
class DistributedMechanism:
    """What a secure sum releases of one user over a campaign: a sum of integers to which every device adds noise.

    One user moves the sum by at most sqrt(``shares``) x ``share_sigma`` / ``noise_multiplier`` steps of the grid (L2).

    Args:
        noise_multiplier: Standard deviation of the ``shares`` together divided by the clip bound; finite and > 0.
        max_participations: Rounds one device may join in the whole campaign; each is one release.
        coordinates: Numbers in one sum.
        shares: Shares of noise h that a sum holds at the least and the adversary does not know; in [1, 1e6].
        share_sigma: Parameter of one share, a discrete Gaussian in every coordinate, in steps of the grid; >= .5.

    Raises:
        PrivacyError: A value is impossible.
    """

    noise_multiplier: float
    max_participations: int
    coordinates: int
    shares: int
    share_sigma: float

    def __post_init__(self) -> None:
        _check_noise(self.noise_multiplier)
        _check_count("privacy.max_participations", self.max_participations)
        _check_count("the number of shared coordinates", self.coordinates)
        if not (isinstance(self.shares, int) and 1 <= self.shares <= _MAX_SHARES):
            raise PrivacyError(
                f"a sum must hold 1 to {_MAX_SHARES} honest shares of noise, got {self.shares}. "
                "Raise privacy.survivors or lower privacy.colluders; ask at most a million devices."
            )
        if not (math.isfinite(self.share_sigma) and self.share_sigma >= _MIN_SHARE_SIGMA):
            raise PrivacyError(
                f"a share of noise must have a standard deviation of at least {_MIN_SHARE_SIGMA} steps of the grid, "
                f"got {self.share_sigma}. Take a finer grid."
            )

    @property
    def releases(self) -> int:
        """Noisy sums over the whole campaign that may hold the user's contribution."""
        return self.max_participations

    @property
    def chance_of_a_draw(self) -> float:
        """As ``Mechanism.chance_of_a_draw``: a user who joins is in the sum."""
        return 1.0


AnyMechanism = Mechanism | DistributedMechanism


def check_delta(delta: float) -> None:
    """Refuse a delta that is impossible or beyond the accountant's arithmetic.

    Raises:
        PrivacyError: ``delta`` is not in [1e-12, 1).
    """
    if not 0 < delta < 1:
        raise PrivacyError(
            f"privacy.delta must be in (0, 1), got {delta}. A common choice is below 1 / number of clients."
        )
    if delta < _MIN_DELTA:
        raise PrivacyError(
            f"privacy.delta must be at least {_MIN_DELTA}, got {delta}. Floating point cannot price less."
        )


def _check_noise(noise_multiplier: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier > 0):
        raise PrivacyError(f"noise_multiplier must be finite and > 0, got {noise_multiplier}. Calibrate it.")


def _check_count(key: str, count: int) -> None:
    """Refuse what is not a whole number of at least one, and what no campaign reaches."""
    if not (isinstance(count, int) and 1 <= count < _MAX_COUNT):
        shown = count if not isinstance(count, int) or abs(count) < _MAX_COUNT else "far more"
        raise PrivacyError(f"{key} must be a whole number >= 1, got {shown}. It fixes how often noise is added.")
