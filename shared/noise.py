"""Gaussian noise of a given scale from a given generator; the seeded generator is for simulations only."""

import hashlib
import json
import math
import operator

import numpy as np
import torch

from shared.errors import PrivacyError

_STATE_WORDS = 624  # 32-bit words in the state of MT19937, torch's CPU generator
_STATE_SLICE = slice(3, 3 + _STATE_WORDS)  # after seed, (left, seeded) and next, in 64-bit fields


def seeded_generator(*, seed: int, purpose: str, device: int, round_number: int) -> torch.Generator:
    """Open the random stream of one purpose on one device in one round, **for simulations only**.

    Whoever knows the seed can subtract the noise, and MT19937 can be predicted from its own output: a run
    that protects somebody draws from a cryptographic generator instead.

    The whole state is filled from the hash. ``torch.Generator.manual_seed`` keeps only the low 32 bits of a
    seed on CPU, so among 100,000 streams two would be expected to be equal.

    Args:
        seed: Seed of the run.
        purpose: What the stream is for, such as ``"noise"`` or ``"sampling"``; not empty.
        device: Index of the simulated device.
        round_number: Round of the campaign.

    Returns:
        A new CPU generator at the start of its stream; the same key gives the same stream.

    Raises:
        ValueError: ``purpose`` is empty.
        PrivacyError: This build of torch lays out the generator's state differently.

    Guarantee:
        Streams of different keys differ, and are as independent as SHAKE-256 is random.
    """
    if not purpose:
        raise ValueError("purpose must name what the stream is for, got an empty string.")
    key = json.dumps([operator.index(seed), purpose, operator.index(device), operator.index(round_number)])
    digest = hashlib.shake_256(key.encode()).digest(8 + 4 * _STATE_WORDS)
    number = int.from_bytes(digest[:8], "little")
    generator = torch.Generator().manual_seed(number)
    state = generator.get_state()  # (5056,) bytes
    fields = state.view(torch.int64).numpy()
    if int(fields[3]) != number & 0xFFFFFFFF:
        raise PrivacyError("torch's generator state must be the layout of torch 2.13; install that version.")
    fields[_STATE_SLICE] = np.frombuffer(digest, dtype="<u4", offset=8)
    generator.set_state(state)
    return generator


def add_gaussian_noise(value: torch.Tensor, *, stddev: float, generator: torch.Generator) -> torch.Tensor:
    """Add independent Gaussian noise to every coordinate.

    Args:
        value: Any shape, finite; left as it is.
        stddev: Standard deviation in units of ``value`` (noise multiplier times clip bound), finite, >= 0.
        generator: Source of the noise, on the device of ``value``; advanced by one draw per coordinate.

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
    noise = torch.randn(value.shape, generator=generator, dtype=torch.float64, device=value.device)
    noised = (value.detach().to(torch.float64) + stddev * noise).to(torch.float32)
    if not bool(torch.isfinite(noised).all()):
        raise PrivacyError(
            "A value to be noised must be finite and fit float32, got NaN, inf or an overflow; "
            "release nothing from this step."
        )
    return noised
