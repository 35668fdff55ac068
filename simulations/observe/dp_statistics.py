"""The row ``dp-statistics``: one private release of item statistics, smoothed over public texts: the rival to match.

For every public text a user sends a sum of ratings and a count, both weighted, in one vector of bounded norm. What is
released of the sum over all users is as private as the campaign: same unit, trust, epsilon and delta. All that follows
is post-processing: a Gaussian process over the texts' features, and on each device the private part of ``personal``.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import scipy.linalg
import scipy.sparse

from shared.config import PrivacyConfig, Scenario, StatisticsConfig, TaskConfig
from shared.datasets import Dataset
from shared.privacy.accounting import AnyMechanism, DistributedMechanism, Mechanism, calibrate_noise
from shared.privacy.calibration import share_noise
from shared.privacy.claims import Claim, no_claim, record_claim, user_claim
from shared.privacy.noise import seeded_generator
from shared.privacy.policy import SecureSum
from simulations.observe.rows import Rows

_MOST_TEXTS = 10_000  # beyond it the texts' covariance takes gigabytes
_LEAST_VARIANCE = 1e-3  # of what is released about a text: keeps the equations solvable without noise


def applies(scenario: Scenario, dataset: Dataset) -> bool:
    """Whether a run has the row: every rated text must stand in the public catalogue, or its statistic has no place."""
    public = set(dataset.public_texts)
    return (
        scenario.statistics.enabled
        and scenario.task.name in ("rating", "ranking")
        and 2 <= len(public) <= _MOST_TEXTS
        and all(record.text in public for user in dataset.users for record in (*user.train, *user.test))
    )


@dataclass(frozen=True)
class Promise:
    """What the release spends.

    Attributes:
        privacy: Of the campaign that it is a rival of.
        mechanism: What the accountant is told; None where nothing is promised.
        secure_sum: Under trust ``distributed``: terms of the one sum over everybody.
        sum_noise: Standard deviation of the noise in the sum over all users, divided by ``sensitivity``.
    """

    privacy: PrivacyConfig
    mechanism: AnyMechanism | None
    secure_sum: SecureSum | None
    sum_noise: float

    @cached_property
    def claim(self) -> Claim:
        """The same in words; it holds for this release alone."""
        privacy, mechanism = self.privacy, self.mechanism
        if mechanism is None:
            return no_claim(max_participations=1)
        if isinstance(mechanism, Mechanism) and privacy.unit == "record":
            return record_claim(mechanism, delta=privacy.delta)
        return user_claim(mechanism, delta=privacy.delta, trust=privacy.trust, secure_sum=self.secure_sum)


@lru_cache(maxsize=32)
def promise(privacy: PrivacyConfig, *, texts: int, users: int) -> Promise:
    """Calibrate one release to the unit, trust, epsilon and delta of a campaign.

    Args:
        privacy: Of the campaign.
        texts: Number of public texts; a release holds two numbers of each.
        users: All of them take part. Under trust ``local`` each adds the whole noise; under ``distributed`` each adds a
            share, so many that those suffice which survive and do not collude, as in the campaign.

    Raises:
        PrivacyError: Epsilon or delta is out of reach.
    """
    if privacy.trust == "none":
        return Promise(privacy, None, None, 0.0)
    if privacy.trust == "distributed":
        once, size = privacy.model_copy(update={"max_participations": 1}), 2 * texts
        noise, terms = share_noise(once, cohort_size=users, size=size)
        shares = DistributedMechanism(noise, 1, size, terms.honest, 2.0**terms.share_log2_sigma)
        return Promise(privacy, shares, terms, noise * math.sqrt(users / terms.honest))
    noise = calibrate_noise(
        epsilon=privacy.epsilon, delta=privacy.delta, sampling_rate=1.0, steps=1, max_participations=1
    )
    added = users if privacy.trust == "local" else 1
    return Promise(privacy, Mechanism(noise, 1.0, 1, 1), None, noise * math.sqrt(added))


@dataclass(frozen=True)
class Statistics:
    """What is released, as post-processing sees it.

    Attributes:
        sums: (M,) of weighted ratings on [-1, 1], midpoint 0.
        counts: (M,) of the weights; noisy, so that one may be negative.
        noise_stddev: Of every sum.
        weight: Of one record, where its owner has as many as the settings guess.
    """

    sums: np.ndarray
    counts: np.ndarray
    noise_stddev: float
    weight: float


def sensitivity(settings: StatisticsConfig) -> float:
    """How far one unit, a user or a record, can move the sums: the norm every contribution is clipped to."""
    return math.hypot(1.0, settings.count_weight)


def clipped_sums(rows: Rows, *, texts: int, unit: str, settings: StatisticsConfig, task: TaskConfig) -> np.ndarray:
    """Sum of all contributions, (2 M,): weighted ratings of every text, then weighted counts.

    Args:
        rows: What the units have; their texts are below ``texts``.
        texts: Number of public texts M.
        unit: ``user``: a contribution holds all records of a user, each weighted by 1 / sqrt(their number). ``record``:
            a contribution is one record.
        settings: The weight of a count.
        task: The public scale.

    Guarantee:
        Leaving out one unit, whatever its records are, moves the result by at most ``sensitivity``: the whole
        contribution is clipped, for a user may have rated a text twice.
    """
    _, owner = np.unique(rows.user if unit == "user" else np.arange(len(rows.user)), return_inverse=True)
    weight = 1 / np.sqrt(np.bincount(owner)[owner])
    rating = np.clip((rows.target - task.centre) / (task.high - task.centre), -1, 1)
    values = np.concatenate([weight * rating, weight * settings.count_weight])
    places = np.concatenate([owner, owner]), np.concatenate([rows.text, rows.text + texts])
    each = scipy.sparse.csr_array((values, places), shape=(int(owner.max(initial=-1)) + 1, 2 * texts))
    norms = np.sqrt(each.multiply(each).sum(axis=1))
    summed: np.ndarray = np.minimum(1, sensitivity(settings) / np.maximum(norms, 1e-12)) @ each
    return summed


def release(
    rows: Rows,
    *,
    texts: int,
    unit: str,
    sum_noise: float,
    settings: StatisticsConfig,
    task: TaskConfig,
    generator: np.random.Generator,
) -> Statistics:
    """The sums over all users with their noise.

    Args:
        rows: Records of all users.
        texts: Number of public texts.
        unit: ``user`` or ``record``.
        sum_noise: As in ``Promise``; where users are added up in visible groups, each with the whole noise, times the
            root of the number of groups.
        settings: Of the row.
        task: The public scale.
        generator: Of the noise; seeded, for this is a simulation.
    """
    sums = clipped_sums(rows, texts=texts, unit=unit, settings=settings, task=task)
    stddev = sum_noise * sensitivity(settings)
    sums = sums + stddev * generator.standard_normal(len(sums))
    weight = 1 / math.sqrt(settings.records_per_user) if unit == "user" else 1.0
    return Statistics(sums[:texts], sums[texts:] / settings.count_weight, stddev, weight)


def smooth(released: Statistics, cosine: np.ndarray, *, settings: StatisticsConfig, task: TaskConfig) -> np.ndarray:
    """Predicted rating of every public text (M,): the mean of a Gaussian process, given what was released.

    Args:
        released: Noisy sums and counts.
        cosine: (M, M) of the texts' centred features.
        settings: The prior: variance of a text's mean rating, which share of it similar texts have in common, and how
            similar they must be.
        task: The public scale.

    Source:
        Rasmussen & Williams 2006, Gaussian Processes for Machine Learning, eq. 2.23, with observation
        sum = count x mean + noise; the noisy counts are taken as they are, which is post-processing too.
    """
    counts = np.maximum(released.counts, 0)
    common = float(np.clip(released.sums.sum() / max(counts.sum(), 1e-12), -1, 1))
    kernel = settings.text_share * np.exp((cosine - 1) / settings.width)
    kernel[np.diag_indices_from(kernel)] += 1 - settings.text_share
    kernel *= settings.variance
    variance = released.noise_stddev**2 + settings.rating_variance * released.weight * counts + _LEAST_VARIANCE
    observed = kernel * counts[:, None] * counts + np.diag(variance)
    dual = scipy.linalg.solve(observed, released.sums - counts * common, assume_a="pos", overwrite_a=True)
    mean = common + kernel @ (counts * dual)
    return np.asarray(task.centre + (task.high - task.centre) * mean)


def cosines(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Cosine of every pair of centred features (M, d), as (M, M); a feature at the centre is like no other."""
    centred = features.astype(np.float64) - mean
    unit = centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
    return np.asarray(unit @ unit.T)


def text_predictions(
    rows: Rows, features: np.ndarray, mean: np.ndarray, *, users: int, scenario: Scenario
) -> np.ndarray:
    """Release, then smooth: predicted ratings (M,) of the public texts with features (M, d) and centre ``mean``."""
    texts, settings, task = len(features), scenario.statistics, scenario.task
    generator = seeded_generator(seed=scenario.seed, purpose="noise of dp-statistics", device=0, round_number=0)
    released = release(
        rows,
        texts=texts,
        unit=scenario.privacy.unit,
        sum_noise=promise(scenario.privacy, texts=texts, users=users).sum_noise,
        settings=settings,
        task=task,
        generator=generator,
    )
    return smooth(released, cosines(features, mean), settings=settings, task=task)
