"""Which persona a device belongs to: declared by its user, or chosen by losses.

A reply holds the tensors of every persona, those of the others unchanged but for noise. At unit user it is clipped,
noised and summed as one vector, zeros and all, and hides the choice with the rest. At unit record noise hides single
records, and a device's many together may show whose tensors moved: there the choice is no secret. It is declared, which
is no function of records, or made once by a mechanism of its own and paid for (``Policy.choice_epsilon``), because one
record more or less could move every other record's gradient to another persona.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from shared.config import PersonaConfig
from shared.errors import PrivacyError
from shared.heads.rating import RatingHead
from shared.heads.tasks import Targets
from shared.models.features import Features, micro_batches
from shared.privacy.noise import Randomness
from shared.privacy.policy import Policy


def declared_persona(profile: Mapping[str, str], persona: PersonaConfig) -> int | None:
    """The persona of a profile; None where its user declared nothing that the scenario knows.

    Example:
        >>> sexes = PersonaConfig(count=2, choice="declared", attribute="gender", values=(("F",), ("M",)))
        >>> declared_persona({"gender": "M"}, sexes), declared_persona({}, sexes)
        (1, None)
    """
    said = profile.get(persona.attribute)
    return next((k for k, values in enumerate(persona.values) if said in values), None)


def choose_persona(losses: np.ndarray, *, policy: Policy, bound: float, randomness: Randomness) -> int:
    """The persona of least loss, or where the policy prices the choice, a draw that prefers small losses.

    Args:
        losses: (n, K), of each record under each persona; n = 0 is allowed. One that is no number counts as the bound.
        policy: Its ``choice_epsilon`` makes the choice private.
        bound: A record's loss counts up to this.
        randomness: Source of the draw.

    Raises:
        PrivacyError: ``bound`` is not positive.

    Guarantee:
        With a ``choice_epsilon`` of e, the choice is e-differentially private for adding or removing one record:
        every persona's weight exp(-e sum_i min(loss_i, c) / c) is multiplied by a number in [exp(-e), 1], and so is
        their sum. Weights are float64, as the probability of every draw.

    Source:
        Ghosh et al. 2020, arXiv:2006.04088, Algorithm 1, line 6; the exponential mechanism of McSherry & Talwar 2007
        with a monotone utility.
    """
    if not bound > 0:
        raise PrivacyError(f"persona.loss_bound must be positive, got {bound}.")
    total = np.clip(np.nan_to_num(losses.astype(np.float64), nan=bound), 0.0, bound).sum(0)  # (K,)
    if policy.choice_epsilon is None:
        return int(total.argmin())
    weights = np.exp(-(total - total.min()) * (policy.choice_epsilon / bound))
    for k, weight in enumerate(weights[:-1]):
        if randomness.bernoulli(float(weight / weights[k:].sum()), 1)[0]:
            return k
    return len(weights) - 1


@torch.no_grad()
def persona_losses(head: RatingHead, features: Features, targets: Targets, *, micro_batch: int) -> np.ndarray:
    """Loss (n, K) of every record under each persona, at the head's present tensors.

    Args:
        head: Of the campaign, with the shared arrays loaded.
        features: Prepared backbone outputs of n records.
        targets: What they are to predict.
        micro_batch: Tokens per forward pass.
    """
    count = len(head.membership)
    losses = np.zeros((len(targets), count))
    kept = head.membership
    try:
        for rows in micro_batches(np.arange(len(targets)), features.lengths, micro_batch):
            hidden, mask = features.batch(rows)
            wanted = targets.batch(rows, hidden.shape[1])
            for k in range(count):
                head.membership = one_persona(k, count)
                inputs = (part.to(head.device) for part in (hidden, mask, wanted))
                losses[rows, k] = head(*inputs).cpu().numpy()
    finally:
        head.membership = kept
    return losses


def one_persona(k: int | None, count: int) -> torch.Tensor:
    """Weights (K,) of the personas: one, or of no choice all alike."""
    if k is None:
        return torch.full((count,), 1 / max(count, 1))
    return torch.nn.functional.one_hot(torch.tensor(k), count).to(torch.float32)


def weights_of(
    predictions: np.ndarray, targets: np.ndarray, *, persona: PersonaConfig, profile: Mapping[str, str]
) -> np.ndarray:
    """How much each persona counts in predictions for a user, (K,), adding up to 1.

    Args:
        predictions: (n, K) of the user's own texts by each persona.
        targets: (n,) what the user said of them.
        persona: Whether what counts is declared, or how well each predicts.
        profile: What the user declared.
    """
    if persona.choice == "declared":
        weights: np.ndarray = one_persona(declared_persona(profile, persona), persona.count).double().numpy()
        return weights
    return weigh_personas(0.5 * (targets[:, None] - predictions) ** 2, persona=persona)


def weigh_personas(losses: np.ndarray, *, persona: PersonaConfig) -> np.ndarray:
    """How much each persona counts for a user whose losses are known, (K,), adding up to 1; for predictions alone.

    A user without records weighs them alike, which is the shared model; one with few records nearly so.

    Args:
        losses: (n, K) half squared errors.
        persona: ``shrinkage`` s: n records count as n s / (n + s).

    Source:
        The posterior over groups of a mixture of Gaussians of variance 1, tempered, because a user's errors hang
        together and n of them tell less than n independent ones.

    Example:
        >>> weigh_personas(np.zeros((0, 4)), persona=PersonaConfig(count=4)).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    count, strength = len(losses), persona.shrinkage
    if not count or not strength:
        return np.full(losses.shape[1], 1 / losses.shape[1])
    logits = -losses.mean(0) * (count * strength / (count + strength))
    weights = np.exp(logits - logits.max())
    found: np.ndarray = weights / weights.sum()
    if not math.isfinite(float(found.sum())):
        raise ValueError("losses must be finite where personas are weighed.")
    return found
