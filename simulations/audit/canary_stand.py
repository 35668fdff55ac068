"""Campaigns of canaries: each is in by a coin, all of them are played over the wire at once, and their coins guessed.

At unit record the canaries are records of one device, whose gradients are far longer than the bound, at right angles to
each other and spread over two tensors; the adversary is the server that reads every reply. At unit user each canary is
a device whose whole change is such a vector. Under trust ``distributed`` the adversary sees the sum, with the fewest
survivors, and the contributions of the colluders; under ``central`` it sees the shared arrays that are released.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from torch import Tensor, nn

from client.training.site import Workbench
from client.training.train import make_trainable
from server.aggregate import ring_sum
from shared.config import Scenario
from shared.heads.adapter import Arrays, read_start, trained_slots
from shared.heads.head import Head
from shared.heads.lora import Trained
from shared.heads.tasks import Scores
from shared.models.features import Features
from shared.models.model import Base
from shared.privacy.policy import SUM
from shared.protocol.campaign import Campaign
from simulations.audit.bounds import count_correct, one_run_bound
from simulations.audit.gaussian import gdp_one_run_bound, is_gaussian
from simulations.audit.power import CANARIES, GUESSES, Bound
from simulations.audit.stage import Part, Played, make_campaign, play

_BOUNDS: dict[Bound, Callable[..., float]] = {"one-run": one_run_bound, "gaussian": gdp_one_run_bound}
_LENGTH = 100.0  # of a canary's gradient, in bounds
_ORDINARY = 20  # records that are always in
_MOST_STEPS = 60  # of one play at unit record; at unit user a round takes seconds, and one is played
_NO_BASE = cast(Base, None)  # the canaries' head stands on none, and training never asks for it


class CanaryHead(Head):
    """Two linear layers whose gradient for a record is the record itself, one half each, whatever the parameters are.

    Canaries 2j and 2j + 1 share entry j of both halves: it has the same sign in one, and opposite signs in the other.
    """

    def __init__(self, canaries: int) -> None:
        nn.Module.__init__(self)
        self.trained = Trained((("left", "right"),), (), ())
        self.blocks = nn.ModuleList()  # none of a base's
        self.first_block, self.width = 0, -(-canaries // 2)
        self.left, self.right = (nn.Linear(self.width, 1, bias=False) for _ in range(2))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Records (B, 1, 2 x width) -> losses (B,), which fall along the record."""
        del mask, targets
        left, right = hidden[:, 0, : self.width], hidden[:, 0, self.width :]
        rise: Tensor = self.left(left) + self.right(right)  # (B, 1)
        return -rise[:, 0]

    def directions(self) -> np.ndarray:
        """Unit vectors (2 x width, 2 x width), one a canary, at right angles."""
        half = np.repeat(np.eye(self.width), 2, axis=0) / math.sqrt(2)
        return np.concatenate([half, half * np.tile([1.0, -1.0], self.width)[:, None]], axis=1)


@dataclass(frozen=True)
class Stand:
    """A campaign of canaries that can be attacked any number of times.

    Attributes:
        canaries: How many; the first of the records, or of the seats.
        colluders: At unit user, devices after the canaries that show the adversary what they contributed.
        silent: At unit user, devices after those that never answer.
    """

    campaign: Campaign
    bench: Workbench
    head: CanaryHead
    canaries: int
    colluders: int
    silent: int


@dataclass(frozen=True)
class Attack:
    """What an adversary guessed, and how much of it was right.

    Attributes:
        epsilon_lower: Lower bound on epsilon that the guesses prove, of whatever mechanism.
        gaussian: The same with more guesses and the bound of a Gaussian mechanism, where it is one.
    """

    canaries: int
    guesses: int
    correct: int
    epsilon_lower: float
    gaussian: "Attack | None" = None

    @property
    def highest(self) -> float:
        """The higher of the bounds."""
        return max(self.epsilon_lower, self.gaussian.epsilon_lower if self.gaussian else 0.0)


def open_stand(scenario: Scenario, *, name: str, folder: Path, canaries: int = CANARIES) -> Stand:
    """Publish a campaign of canaries with a scenario's privacy.

    Args:
        scenario: Unit, trust, epsilon, delta, bound, sampling and steps; the noise is calibrated to them.
        name: Of the campaign; new in ``folder``.
        folder: For its folder.
        canaries: How many.

    Raises:
        PrivacyError: The target cannot be met.
    """
    user = scenario.privacy.unit == "user"
    clients, colluders, silent = _seats(scenario, canaries) if user else (1, 0, 0)
    head = CanaryHead(canaries)
    campaign = make_campaign(
        _settings(scenario, name=name, clients=clients),
        folder=folder,
        slots=trained_slots(head),
        start=read_start(head),
        clients=clients,
    )
    bench = Workbench(campaign, _NO_BASE, head, make_trainable(head, campaign.policy))
    return Stand(campaign, bench, head, canaries, colluders, silent)


def attack(stand: Stand, *, seed: int) -> Attack:
    """Toss the coins, play the campaign over the wire, and guess ``GUESSES`` of the coins, half of them "in".

    Args:
        stand: What is attacked.
        seed: Of the coins and of the ordinary records; noise comes from the operating system, as on any device.
    """
    inside = np.random.default_rng([seed, 1]).random(stand.canaries) < 0.5
    directions = stand.head.directions()[: stand.canaries]
    canaries = directions * _LENGTH * stand.campaign.scenario.privacy.clip_norm
    if stand.campaign.policy.unit == "record":
        played = play(stand.campaign, [_device(stand, canaries[inside], seed=seed)])
    else:
        canaries /= stand.campaign.scenario.training.learning_rate
        played = play(stand.campaign, _devices(stand, canaries, inside))
    scores, policy = directions @ _seen(stand, played), stand.campaign.policy

    def guess(bound: Bound) -> Attack:
        count, guesses = stand.canaries, min(GUESSES[bound], stand.canaries)
        correct = count_correct(scores, inside, guesses=guesses)
        delta = stand.campaign.scenario.privacy.delta
        proved = _BOUNDS[bound](canaries=count, guesses=guesses, correct=correct, delta=delta)
        return Attack(count, guesses, correct, proved)

    found = guess("one-run")
    if policy.trust != "none" and is_gaussian(policy.mechanism):
        found = replace(found, gaussian=guess("gaussian"))
    return found


def _settings(scenario: Scenario, *, name: str, clients: int) -> Scenario:
    """The scenario's privacy over as many steps as can be played, and a server that changes nothing of note."""
    privacy, steps, rounds = scenario.privacy, scenario.training.steps, 1
    if privacy.unit == "record":
        steps = min(steps, _MOST_STEPS)
        rounds = min(privacy.max_participations, max(1, _MOST_STEPS // steps))
    changes = {
        "federation": {
            "method": "fedavg",
            "rounds": rounds,
            "cohort_size": "all",
            "server_optimizer": "momentum",
            "server_momentum": 0.0,
            "server_learning_rate": 1e-3 / max(1.0, privacy.clip_norm),
            "lora_learning_rate_factor": 1.0,
        },
        "privacy": {
            "max_participations": rounds,
            "delta": min(privacy.delta, 1 / (10 * clients)),
            "neighbours": "auto",
        },
        "training": {"steps": steps},
        "personal": {"method": "none"},
        "persona": {"count": 0},
        "performance": {"secure_sum": "plain", "device": "cpu", "micro_batch": 256},  # several to a sum
    }
    tables = {table: getattr(scenario, table).model_copy(update=update) for table, update in changes.items()}
    return scenario.model_copy(update=tables | {"name": name})


def _seats(scenario: Scenario, canaries: int) -> tuple[int, int, int]:
    """Devices of the smallest cohort with so many honest survivors; the colluders and the silent among them."""
    privacy = scenario.privacy
    if privacy.trust != "distributed":
        return canaries, 0, 0
    clients = canaries
    while True:
        survivors = math.ceil(privacy.survivors * clients - 1e-9)
        colluders = math.floor(privacy.colluders * clients + 1e-9)
        if survivors - colluders >= canaries:
            return clients, survivors - canaries, clients - survivors
        clients += 1


def _rows(rows: np.ndarray) -> Features:
    return Features(list(rows[:, None, :].astype(np.float32)))


def _device(stand: Stand, canaries: np.ndarray, *, seed: int) -> Part:
    """One device that holds these canaries, and ordinary records."""
    size = canaries.shape[1]
    ordinary = np.random.default_rng([seed, 2]).standard_normal((_ORDINARY, size)) / math.sqrt(size)
    rows = np.concatenate([canaries, ordinary])
    return Part(stand.bench, _rows(rows), Scores([0.0] * len(rows)))


def _devices(stand: Stand, canaries: np.ndarray, inside: np.ndarray) -> list[Part]:
    """A device a canary; one that is out contributes zero, and so do the colluders."""
    nothing = Part(stand.bench, Features([]), Scores([]))
    honest = [
        Part(stand.bench, _rows(row[None]), Scores([0.0])) if is_in else nothing
        for row, is_in in zip(canaries, inside, strict=True)
    ]
    silent = Part(stand.bench, Features([]), Scores([]), silent=True)
    return [*honest, *[nothing] * stand.colluders, *[silent] * stand.silent]


def _seen(stand: Stand, played: Played) -> np.ndarray:
    """What the adversary sees of the parameters' change in a play, in any unit, summed over rounds."""
    trust = stand.campaign.policy.trust
    if trust == "central":
        return np.asarray(_flat(played.arrays[-1]) - _flat(played.arrays[0]))
    replies: dict[int, list[Arrays]] = {}  # of the honest: the rest is known to the colluders
    for number, seat in played.replies:
        if seat < stand.canaries:
            replies.setdefault(number, []).append(played.update(number, seat))
    if trust == "distributed":
        rounds = [ring_sum(update[SUM] for update in updates) for updates in replies.values()]
    else:
        rounds = [np.sum([_flat(update) for update in updates], axis=0) for updates in replies.values()]
    return np.asarray(np.sum(rounds, axis=0, dtype=np.float64))


def _flat(arrays: Arrays) -> np.ndarray:
    vector: np.ndarray = np.concatenate([array.ravel() for array in arrays.values()], dtype=np.float64)
    return vector
