"""Time one coordinate of noise: the device's cryptographic exact draws beside the simulation's seeded ones.

CPU-time of one thread (``time.process_time``); the sources take turns within a round, ratios are taken within a round,
and the median of the rounds is reported with its range. That both draw the same noise is checked first.
"""

import math
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np

from shared.errors import CampaignError
from shared.privacy.noise import GRID_SIGMA, Randomness, SecureRandomness, SeededRandomness
from shared.progress import progress
from simulations.machine import spread

COUNTS = (400, 1_000, 10_000, 100_000)
_DRAWS = 200_000  # per timing, so that one call of some microseconds is not lost in the clock
_SIX_SIGMA = 6 * math.sqrt(2 / _DRAWS)  # of a mean square


def measure(*, rounds: int = 7, counts: Sequence[int] = COUNTS, quiet: bool = False) -> dict[str, Any]:
    """Measure noise and batch draws of both sources.

    Args:
        rounds: How often every variant is timed.
        counts: Coordinates drawn by one call.
        quiet: Show no progress.

    Returns:
        ``ns_per_coordinate.<count>.<source>.<median|low|high>``, ``ratios.<count>`` (secure over seeded),
        ``ns_per_inclusion.<source>``, what was compared, machine and versions.

    Raises:
        CampaignError: The two sources do not draw noise of the same scale.
    """
    sources: dict[str, Randomness] = {
        "secure": SecureRandomness(),
        "seeded": SeededRandomness(seed=0, campaign="bench", device=0, round_number=1),
    }
    mean_squares = compare_scales(sources)
    times: dict[tuple[int, str], list[float]] = {(count, name): [] for count in (*counts, 0) for name in sources}
    with progress(total=rounds, description="bench noise", unit="round", quiet=quiet) as bar:
        for _ in range(rounds):
            for count in counts:
                for name, source in sources.items():
                    times[count, name].append(_nanoseconds(source.gaussian_integers, count))
            for name, source in sources.items():
                times[0, name].append(_nanoseconds(lambda size, source=source: source.bernoulli(0.1, size), 400))  # type: ignore[misc]
            bar.update(1)
    ratios = {
        str(count): spread([x / y for x, y in zip(times[count, "secure"], times[count, "seeded"], strict=True)])
        for count in counts
    }
    return {
        "mode": "one thread, CPU-time, interleaved",
        "rounds": rounds,
        "ns_per_coordinate": {str(c): {name: spread(times[c, name]) for name in sources} for c in counts},
        "ratios": ratios,
        "ns_per_inclusion": {name: spread(times[0, name]) for name in sources},
        "mean_squares": mean_squares,
        "machine": {"platform": f"{platform.system()} {platform.machine()}", "python": platform.python_version()},
        "versions": {name: version(name) for name in ("cryptography", "numpy")},
    }


def compare_scales(sources: dict[str, Randomness]) -> dict[str, float]:
    """Mean square of each source's noise in units of the variance it must have."""
    found = {
        name: float(np.mean((source.gaussian_integers(_DRAWS) / GRID_SIGMA) ** 2)) for name, source in sources.items()
    }
    for name, mean_square in found.items():
        if not abs(mean_square - 1) <= _SIX_SIGMA:
            raise CampaignError(
                f"the mean square of {name} noise must be 1 +- {_SIX_SIGMA:.4f}, got {mean_square:.4f}."
            )
    return found


def _nanoseconds(draw: Callable[[int], np.ndarray], count: int) -> float:
    """CPU-time of one coordinate."""
    draw(count)  # warm-up
    calls = max(1, _DRAWS // count)
    started = time.process_time()
    for _ in range(calls):
        draw(count)
    return (time.process_time() - started) / (calls * count) * 1e9


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements for a reader."""
    out = [f"{measured['mode']}; {measured['rounds']} rounds"]
    for count, sources in measured["ns_per_coordinate"].items():
        out += [
            f"  {f'{name}, {int(count):,} coordinates':<44} {v['median']:9.1f} ns  [{v['low']:.1f}, {v['high']:.1f}]"
            for name, v in sources.items()
        ]
        v = measured["ratios"][count]
        out += [f"  {'secure over seeded':<44} {v['median']:9.1f} x   [{v['low']:.1f}, {v['high']:.1f}]"]
    out += [
        f"  {f'{name}, one inclusion of 400':<44} {v['median']:9.1f} ns  [{v['low']:.1f}, {v['high']:.1f}]"
        for name, v in measured["ns_per_inclusion"].items()
    ]
    out += [f"  mean square of {name} noise: {value:.4f}" for name, value in measured["mean_squares"].items()]
    return out
