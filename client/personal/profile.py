"""The private part of task ``ranking``: what a user likes more than others do, as a direction of the features."""

import numpy as np

from client.personal.personalize import PrivateOutput, check_task
from shared.config import PersonalConfig
from shared.heads.ranking import RankingHead, unit


def fit_profile(liked: np.ndarray, *, mean: np.ndarray, typical: np.ndarray, personal: PersonalConfig) -> PrivateOutput:
    """One gradient step of the ranking loss from the shared scores, on the device's own liked records.

    Args:
        liked: (n, d) pooled features of the texts this user likes; n = 0 is allowed.
        mean: (d,) public centre of the features.
        typical: (d,) direction that the shared part expects of a liked text.
        personal: ``profile`` is the step's length, ``bias_shrinkage`` counts as so many records without an opinion.

    Returns:
        The private output: score = shared score + (features - mean) @ weight; with no record it is zero.

    Source:
        Gradient of a softmax likelihood, sum over own records of (feature - expected feature); the shape of a user
        profile by Rocchio 1971, whose negative part the shared model stands for.
    """
    count, width = liked.shape
    if not count:
        return PrivateOutput(np.zeros(width), 0.0)
    step = (unit(liked, mean) - typical).sum(0) / (count + personal.bias_shrinkage)
    weight = personal.profile * step
    return PrivateOutput(weight, -float(mean @ weight))


def profile_of(
    head: RankingHead, pooled: np.ndarray, targets: np.ndarray, *, personal: PersonalConfig
) -> PrivateOutput:
    """The private output of one user of a head that holds the shared arrays.

    Args:
        head: Of the campaign.
        pooled: (n, d) pooled features of the user's records, liked or not.
        targets: (n,) what the user said; those below ``task.liked`` are left out.
        personal: The method and its strengths.

    Raises:
        ScenarioError: The personal method has no form for this task.
    """
    check_task(personal.method, "ranking")
    liked = pooled[targets >= head.liked] if personal.method == "fine-tune" else pooled[:0]
    return fit_profile(liked, mean=head.mean.detach().cpu().numpy(), typical=head.typical(), personal=personal)
