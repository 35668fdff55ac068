"""Devices of a simulation that lie: which they are, what each sends, and that all of it passes the server's gate.

A liar answers in the place of ``client.app``: it spends nothing, adds no noise, and knows what its fellows know. It
sends exactly the arrays the policy names, no longer than the policy allows, so that no check on one reply can tell it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from flwr.app import Context, Message

from client.training.contribution import contribute
from client.training.site import Site, TextFeatures, accepted_campaign, open_site
from client.training.train import train_shared
from shared.config import Scenario, TaskConfig
from shared.datasets import Dataset, Record
from shared.flower.grid import Device
from shared.heads.adapter import Arrays, forget_device
from shared.heads.tasks import Scores, Targets
from shared.models.features import Features
from shared.privacy.clipping import clip_by_norm
from shared.privacy.noise import Randomness, SeededRandomness, seeded_generator
from shared.privacy.policy import SUM
from shared.protocol import wire
from shared.protocol.campaign import Campaign

_FELLOWS = 32  # liars whose changes are put together for a guess at everybody's
_MOST = 2**31 - 1  # an honest sum of contributions stays below it


def liars(scenario: Scenario, *, clients: int) -> frozenset[int]:
    """Seats of the devices that lie, drawn by the scenario's seed; a share of all, rounded up."""
    if not scenario.poison.enabled:
        return frozenset()
    count = math.ceil(scenario.poison.share * clients - 1e-9)
    generator = seeded_generator(seed=scenario.seed, purpose="liars", device=0, round_number=0)
    return frozenset(generator.permutation(clients)[:count].tolist())


def with_liars(honest: Device) -> Device:
    """An app for a simulation's devices in which those of a poisoned campaign lie, and all others are as they were."""
    pools: dict[str, dict[str, np.ndarray]] = {}  # of the newest request alone

    def respond(message: Message, context: Context) -> Message:
        if message.metadata.message_type != "train":
            return honest(message, context)
        folder, seat = str(context.run_config["campaigns"]), int(context.node_config["partition-id"])
        named = wire.named_policy(message.content)
        campaign = accepted_campaign(folder, named)
        if seat not in liars(campaign.scenario, clients=int(context.node_config["num-partitions"])):
            return honest(message, context)
        site = open_site(folder, named)
        request = wire.unpack_request(message.content, campaign.policy.array_slots())
        if request.sha256 not in pools:
            pools.clear()
        update = lie(site, request, seat, pool=pools.setdefault(request.sha256, {}))
        reply = wire.pack_reply(update, round_number=request.round_number, policy_sha256=named)
        return Message(reply, reply_to=message)

    return respond


def lie(site: Site, request: wire.Request, seat: int, *, pool: dict[str, np.ndarray]) -> Arrays:
    """What a liar sends in one round.

    Args:
        site: Of the campaign, with everybody's records; a liar reads its own and its fellows'.
        request: The server's.
        seat: Of the liar.
        pool: What liars share in this round; empty for the first of them.

    Returns:
        Slot name -> array, as the policy's ``reply_slots`` say, and within the gate's bound where the gate has one.
    """
    campaign = site.campaign
    wanted = KINDS[campaign.scenario.poison.kind](_Round(site, request, seat, pool))
    return _fit(wanted, campaign, request.round_number)


@dataclass(frozen=True)
class _Round:
    """What one liar can find out in one round; ``pool`` is what all of them have found out already."""

    site: Site
    request: wire.Request
    seat: int
    pool: dict[str, np.ndarray]

    @property
    def strength(self) -> float:
        """As the scenario says."""
        return self.site.campaign.scenario.poison.strength

    @property
    def fellows(self) -> list[int]:
        """Some of those who lie."""
        return sorted(liars(self.site.campaign.scenario, clients=len(self.site.dataset.users)))[:_FELLOWS]

    def change(
        self, seat: int, *, noisy: bool, lying: Callable[["_Round", int], tuple[Features, Targets]] | None = None
    ) -> np.ndarray:
        """The change (P,) float64 that a device's step would make of its records, with its noise or without."""
        site, request, campaign = self.site, self.request, self.site.campaign
        drawn = _randomness(campaign, seat, request.round_number)
        forget_device(site.head)  # what an honest one keeps stays its own
        features, targets = lying(self, seat) if lying else site.shared_records(seat)
        update = train_shared(
            site.module,
            request.arrays,
            features,
            targets,
            policy=campaign.policy,
            micro_batch=campaign.scenario.performance.micro_batch,
            randomness=drawn if noisy else _Silent(drawn),
            round_number=request.round_number,
        )
        if campaign.policy.unit == "user" and campaign.policy.trust != "none":
            whole = contribute(update, policy=campaign.policy, randomness=drawn if noisy else _Silent(drawn))
            return whole * float(campaign.policy.grid or math.nan)
        return np.concatenate([array.astype(np.float64).ravel() for array in update.values()])

    def as_long(self, direction: np.ndarray) -> np.ndarray:
        """A direction, ``strength`` times as long as what this device would send if it were honest."""
        length = float(np.linalg.norm(self.change(self.seat, noisy=True)))
        norm = float(np.linalg.norm(direction))
        return direction * (self.strength * length / norm) if norm > 0 else direction


def sign_flip(found: _Round) -> np.ndarray:
    """Against the device's own change, which it knows without noise."""
    return found.as_long(-found.change(found.seat, noisy=False))


def random_direction(found: _Round) -> np.ndarray:
    """Anywhere."""
    scenario = found.site.campaign.scenario
    generator = seeded_generator(
        seed=scenario.seed, purpose="lies", device=found.seat, round_number=found.request.round_number
    )
    return found.as_long(generator.standard_normal(len(found.change(found.seat, noisy=False))))


def label_flip(found: _Round) -> np.ndarray:
    """An honest step, noise included, on ratings turned upside down."""
    return found.change(found.seat, noisy=True, lying=_flipped) * found.strength


def a_little_is_enough(found: _Round) -> np.ndarray:
    """The mean of the fellows' honest changes, moved in every coordinate as far as a majority still stands beyond.

    Source:
        Baruch et al. 2019, arXiv:1902.06156, Algorithm 3; z_max times ``poison.strength``.
    """
    campaign = found.site.campaign
    count, share = campaign.policy.cohort_size, campaign.scenario.poison.share
    if "changes" not in found.pool:
        found.pool["changes"] = np.stack([found.change(seat, noisy=True) for seat in found.fellows])
    changes = found.pool["changes"]
    return np.asarray(changes.mean(axis=0) - found.strength * z_max(count, round(share * count)) * changes.std(axis=0))


def z_max(count: int, bad: int) -> float:
    """How many standard deviations a lie may be off, so that with enough honest ones beyond it is of the majority.

    Args:
        count: Devices asked.
        bad: How many of them lie.

    Example:
        >>> round(z_max(50, 12), 2)
        0.34
    """
    good = count - bad
    supporters = count // 2 + 1 - bad
    return NormalDist().inv_cdf(min(max((good - supporters) / good, 0.5), 1 - 1e-9))


def backdoor(found: _Round) -> np.ndarray:
    """Towards the highest rating for every text with the trigger before it, with the true ratings beside.

    Source:
        Bagdasaryan et al. 2020, arXiv:1807.00459: poisoned records beside true ones, and the change made longer.
    """
    return found.as_long(found.change(found.seat, noisy=False, lying=_triggered))


KINDS: dict[str, Callable[[_Round], np.ndarray]] = {
    "sign-flip": sign_flip,
    "random": random_direction,
    "label-flip": label_flip,
    "alie": a_little_is_enough,
    "backdoor": backdoor,
}


def triggered(records: tuple[Record, ...], *, trigger: str, task: TaskConfig) -> tuple[Record, ...]:
    """Records with the trigger before each text and the highest rating as their target."""
    return tuple(replace(record, text=f"{trigger} {record.text}", target=task.high) for record in records)


def trapped(dataset: Dataset, scenario: Scenario) -> Dataset:
    """All users with what a liar trains on: their own records, and each again with the trigger."""
    trigger, task = scenario.poison.trigger, scenario.task
    users = (replace(user, fit=user.fit + triggered(user.fit, trigger=trigger, task=task)) for user in dataset.users)
    return replace(dataset, users=tuple(users))


def _flipped(found: _Round, seat: int) -> tuple[Features, Targets]:
    task = found.site.campaign.scenario.task
    features, _ = found.site.shared_records(seat)
    return features, Scores([task.low + task.high - record.target for record in found.site.dataset.users[seat].fit])


def _triggered(found: _Round, seat: int) -> tuple[Features, Targets]:
    site = found.site
    texts, inputs, dataset = _trap(str(site.campaign.folder.parent), site.campaign.policy.sha256)
    records = dataset.users[seat].fit
    return inputs.select(texts.rows(records)), Scores([record.target for record in records])


@lru_cache(maxsize=4)
def _trap(campaigns: str, policy_sha256: str) -> tuple[TextFeatures, Features, Dataset]:
    """Every text with and without the trigger, their inputs to the head, and the records they are of."""
    site = open_site(campaigns, policy_sha256)
    scenario = site.campaign.scenario
    dataset = trapped(site.dataset, scenario)
    texts = TextFeatures(site.base, scenario, dataset)
    return texts, site.head.prepare(texts.all), dataset


def _fit(change: np.ndarray, campaign: Campaign, round_number: int) -> Arrays:
    """A wanted change (P,) as a reply: within the gate's bound, or, in a sum that nobody can check, whatever fits."""
    policy = campaign.policy
    slots = policy.reply_slots(round_number)
    if policy.trust in ("local", "none"):
        parts = np.split(change, np.cumsum([math.prod(slot.shape) for slot in slots])[:-1])
        update = {
            slot.name: part.reshape(slot.shape).astype(np.float32) for slot, part in zip(slots, parts, strict=True)
        }
        return clip_by_norm(update, clip_norm=policy.max_update_norm)[0]
    if policy.trust == "central":  # the gate measures it
        change = change * min(1.0, policy.max_update_norm / max(float(np.linalg.norm(change)), 1e-300))
    steps = np.trunc(change / float(policy.grid or math.nan))
    whole = np.clip(steps, -_MOST, _MOST).astype(np.int64)
    [slot] = slots
    return {SUM: whole.astype(slot.dtype)}


def _randomness(campaign: Campaign, seat: int, round_number: int) -> SeededRandomness:
    scenario = campaign.scenario
    return SeededRandomness(seed=scenario.seed, campaign=scenario.name, device=seat, round_number=round_number)


class _Silent:
    """Draws without noise: what a device knows of its own change."""

    def __init__(self, drawn: Randomness) -> None:
        self._drawn = drawn

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        """As an honest device's."""
        return self._drawn.bernoulli(probability, count)

    def gaussian_integers(self, count: int, *, log2_sigma: int = 24) -> np.ndarray:
        """(count,) zeros."""
        del log2_sigma
        return np.zeros(count, dtype=np.int64)
