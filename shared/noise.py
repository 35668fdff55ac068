"""Gaussian noise of a given scale from a given generator; the seeded generator is for simulations only."""

import hashlib
import json
import math
import operator

import numpy as np
import torch

from shared.errors import PrivacyError


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


def add_gaussian_noise(value: torch.Tensor, *, stddev: float, generator: np.random.Generator) -> torch.Tensor:
    """Add independent Gaussian noise to every coordinate.

    Args:
        value: Any shape, finite; left as it is.
        stddev: Standard deviation in units of ``value`` (noise multiplier times clip bound), finite, >= 0.
        generator: Source of the noise; advanced by one draw per coordinate.

    Returns:
        A new float32 tensor. Noise is drawn and added in float64 and rounded once: a float32 draw never
        leaves 5.8 standard deviations.

    Raises:
        PrivacyError: ``stddev`` is not finite and >= 0, or the result would hold NaN or inf.

    Source:
        Dwork & Roth 2014, Appendix A (the Gaussian mechanism). Floating point is not covered by that proof.
    """
    if not (math.isfinite(stddev) and stddev >= 0):
        raise PrivacyError(f"stddev must be finite and >= 0, got {stddev}; take it from the calibrated policy.")
    noise = torch.from_numpy(np.asarray(generator.standard_normal(tuple(value.shape)))).to(value.device)
    noised = (value.detach().to(torch.float64) + stddev * noise).to(torch.float32)
    if not bool(torch.isfinite(noised).all()):
        raise PrivacyError(
            "A value to be noised must be finite and fit float32, got NaN, inf or an overflow; "
            "release nothing from this step."
        )
    return noised
