"""What a device adds to the sum at unit user: its whole change clipped, as integers, with its share of the noise."""

import math

import numpy as np
import torch

from shared.errors import PrivacyError
from shared.heads.adapter import Arrays
from shared.privacy.clipping import clipped_sum
from shared.privacy.noise import Randomness
from shared.privacy.policy import Policy
from shared.privacy.promise import check_grid


def contribute(change: Arrays, *, policy: Policy, randomness: Randomness) -> np.ndarray:
    """Clip a user's change over all tensors jointly, round it to the grid, add this device's share of the noise.

    Args:
        change: Slot name -> change of the shared arrays in this round, read as one vector of P numbers; a change that
            is not finite contributes zero, for refusing would tell of it.
        policy: Clip norm C, grid, trust. Under ``central`` no noise is added here: the server is trusted to do so.
        randomness: Source of the noise.

    Returns:
        (P,) int64, in steps of the grid.

    Raises:
        PrivacyError: The policy's grid is not the one its noise needs, or the rounded vector is longer than C.

    Guarantee:
        Without the noise, the returned vector times the grid is at most C long: replacing a user's contribution by
        zero moves the sum over users by no more. Under ``distributed`` the noise is discrete Gaussian of
        2^share_log2_sigma steps, so that of ``honest`` devices together has a standard deviation of at least zC.

    Source:
        User-level clipping: McMahan et al. 2018, arXiv:1710.06963. Integers and noise in shares: Kairouz et al. 2021,
        arXiv:2102.06387, with rounding to the nearest and the norm bounded after it, in place of conditional rounding.
    """
    check_grid(policy)
    clip_norm, grid = policy.clip_norm or math.nan, policy.grid or math.nan
    vector = np.concatenate([array.astype(np.float64).ravel() for array in change.values()])
    [clipped] = clipped_sum([torch.from_numpy(vector)[None]], clip_norm=clip_norm, grid=grid)
    whole: np.ndarray = clipped.numpy()
    norm = math.hypot(*whole.tolist()) * grid  # in floating point, but without overflow
    if not norm <= clip_norm:
        raise PrivacyError(f"a contribution must be at most {clip_norm} long, got {norm}.")
    if policy.secure_sum is not None:
        whole += randomness.gaussian_integers(len(whole), log2_sigma=policy.secure_sum.share_log2_sigma)
    return whole
