"""Two plays beside each other, equal but for one record or one user: what may differ, and what may not."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path as FilePath
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord

from client.training.site import Workbench
from shared.config import Scenario
from shared.errors import DataError
from shared.flower.grid import read_wire
from shared.heads.adapter import Arrays
from shared.heads.head import Head
from shared.heads.pairs import PairTargets
from shared.heads.tasks import Labels, Scores, Targets
from shared.models.features import Features
from shared.privacy.policy import grid_of, hash_settings
from shared.protocol.campaign import Campaign, write_campaign
from simulations.audit.assumptions import Path, Replay, Tape
from simulations.audit.stage import Part, Played, Subject, make_campaign, play, unprotected

_AWAY = 0.05  # from the subject's arrays: at a public start LoRA has no gradient
_LOUD_TARGET = 1e4
_LOUD_SCALE = 1e-3  # a block adds as much to any state: it says most about small ones; smaller ones make slow denormals
_FAR = 8.0  # bounds that what is too long must be above
SERVER = -1  # its place beside the seats


@dataclass(frozen=True)
class Row:
    """One record as the head takes it.

    Attributes:
        hidden: Prepared backbone outputs (T, d).
        target: A number, or labels (T,).
    """

    hidden: np.ndarray
    target: Any

    def loud(self, share: float = 1.0) -> "Row":
        """As far from what the head expects as makes its gradient long; a rating may be a share of that far."""
        if isinstance(self.target, float):
            return replace(self, target=share * _LOUD_TARGET)
        return replace(self, hidden=self.hidden * np.float32(_LOUD_SCALE))

    def broken(self) -> "Row":
        """With a gradient that is not a number."""
        return replace(self, hidden=np.full_like(self.hidden, np.nan))

    def cut(self, tokens: int) -> "Row":
        """Its end alone, for plays that are many."""
        target = self.target if isinstance(self.target, float) else self.target[-tokens:]
        return Row(self.hidden[-tokens:], target)


@dataclass(frozen=True)
class Seat:
    """A device of a play: its records, its head, and how much of the noise that it draws it gets."""

    rows: Sequence[Row]
    bench: Workbench
    scale: int = 1


@dataclass(frozen=True)
class Side:
    """One of the two plays, with what every seat, and the server, drew and entered.

    Attributes:
        without: Seats that hold no record.
    """

    played: Played
    tapes: dict[int, Tape]
    path: Path
    without: frozenset[int]

    def entered(self, other: "Side") -> dict[Any, set[str]]:
        """Functions, for every seat that trains on something on both sides: without records fewer are needed."""
        return {key: names for key, names in self.path.entered.items() if key[1] not in self.without | other.without}

    def vector(self, seat: int) -> np.ndarray:
        """All numbers that a device sent in round 1."""
        return flat(self.played.update(1, seat))


def flat(arrays: Arrays) -> np.ndarray:
    """All values as one vector, float64 or integers as they are."""
    whole = np.concatenate([array.ravel() for array in arrays.values()])
    return whole.astype(np.float64) if whole.dtype.kind == "f" else whole


def away(arrays: Arrays, *, seed: int) -> Arrays:
    """Shared arrays as a server might send them: the subject's, and some way from a start without gradient."""
    draw = np.random.default_rng(seed)
    return {name: a + np.float32(_AWAY) * draw.standard_normal(a.shape, dtype=np.float32) for name, a in arrays.items()}


def real_rows(subject: Subject, head: Head, *, devices: int, most: int) -> list[list[Row]]:
    """The shortest records of the first users who have enough of them, ``most`` a user.

    Raises:
        DataError: Too few users have as many.
    """
    users = list(islice((user for user in subject.dataset.users if len(user.fit) >= most), devices))
    if len(users) < devices:
        raise DataError(f"an audit needs {devices} users with {most} records each, got {len(users)}; use more data.")
    found = []
    for user in users:
        lengths = subject.texts.of(user.fit).lengths
        records = [user.fit[row] for row in np.argsort(lengths, kind="stable")[:most]]
        features, targets = head.prepare(subject.texts.of(records)), subject.texts.targets(records)
        found.append([_row(features, targets, place) for place in range(most)])
    return found


def _row(features: Features, targets: Targets, place: int) -> Row:
    hidden = features.batch([place])[0][0].numpy()
    target = targets.batch(np.array([place]), len(hidden))[0].numpy()
    return Row(hidden, target if target.ndim else float(target))


def inputs(rows: Sequence[Row]) -> tuple[Features, Targets]:
    """Records as a device hands them to training."""
    features = Features([row.hidden for row in rows])
    if not rows or isinstance(rows[0].target, float):
        return features, Scores([row.target for row in rows])
    wrap = Labels if rows[0].target.dtype == np.int64 else PairTargets.of_rows
    return features, wrap([row.target for row in rows])


def few_devices(
    scenario: Scenario, name: str, *, clients: int, rounds: int = 1, micro_batch: int = 1, rate: float = 1e-9
) -> Scenario:
    """Settings of a play of a few devices, each asked in every round.

    Args:
        scenario: The subject's.
        name: Of the copy.
        clients: How many.
        rounds: How many.
        micro_batch: Tokens of a pass; at 1, as on owners' devices, no record touches another's gradient.
        rate: The server's, of plain averaging: so small that no attack leaves the bound on shared arrays.
    """
    federation = {"cohort_size": clients, "rounds": rounds, "server_optimizer": "momentum"}
    federation |= {"server_learning_rate": rate, "lora_learning_rate_factor": 1.0}
    return scenario.model_copy(
        update={
            "name": f"l0-{name}",
            "federation": scenario.federation.model_copy(update=federation),
            "performance": scenario.performance.model_copy(update={"micro_batch": micro_batch, "secure_sum": "plain"}),
        }
    )


def copy_campaign(subject: Subject, scenario: Scenario, **constants: Any) -> Campaign:
    """Publish the subject's policy again for a play of a few devices; they certify it as they would any.

    Args:
        subject: Whose policy and start are copied.
        scenario: Of ``few_devices``; its name is new in the subject's folder.
        constants: In place of the policy's; the grid follows.
    """
    federation = scenario.federation
    changed = {
        "campaign": scenario.name,
        "cohort_size": federation.cohort_size,
        "rounds": federation.rounds,
        "settings_sha256": hash_settings(scenario),
    }
    policy = subject.campaign.policy.model_copy(update=changed | constants)
    policy = policy.model_copy(update={"grid": grid_of(policy)})
    return write_campaign(folder_of(subject) / scenario.name, scenario, policy, subject.campaign.start)


def bare_campaign(subject: Subject, name: str, *, clients: int) -> Campaign:
    """The same without privacy, for the control."""
    policy = subject.campaign.policy
    few = few_devices(subject.scenario, name, clients=clients)
    one_step = few.training.model_copy(update={"steps": 1})  # in many, what is not clipped goes beyond all numbers
    return make_campaign(
        unprotected(few.model_copy(update={"training": one_step})),
        folder=folder_of(subject),
        slots=(*policy.array_slots(), *policy.private_slots()),
        start=subject.campaign.start,
        clients=clients,
        head_blocks=policy.head_blocks,
        base=subject.base,
    )


def bound_for(subject: Subject, *, loudest: float) -> float:
    """The clip norm of a play: the subject's, or less where what is loudest would hardly reach that.

    The loss of a language model has a gradient of bounded length: at the subject's own bound no play could show that
    anything is clipped. Nothing in the code depends on the bound's size.

    Args:
        subject: Whose bound it is.
        loudest: How far the loudest moves an unprotected update.
    """
    clip_norm = subject.campaign.policy.clip_norm or np.nan
    return float(min(clip_norm, max(loudest / _FAR, clip_norm / 1024)))


def folder_of(subject: Subject) -> FilePath:
    """Where this level's campaigns lie."""
    return subject.folder / "L0"


@dataclass
class Findings:
    """What one look at the code found.

    Attributes:
        checks: Name -> whether it holds.
        moved: What was changed -> how far it moved the sum, in clip norms.
    """

    checks: dict[str, bool] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)

    def __or__(self, other: "Findings") -> "Findings":
        """Both; a check holds where it holds in both, and a distance is the latter's."""
        names = [*self.checks, *(name for name in other.checks if name not in self.checks)]
        both = {name: self.checks.get(name, True) and other.checks.get(name, True) for name in names}
        return Findings(both, self.moved | other.moved)

    @property
    def failed(self) -> list[str]:
        """Checks that do not hold."""
        return [name for name, held in self.checks.items() if not held]


def play_seats(campaign: Campaign, seats: Sequence[Seat], *, start: Arrays, seed: int, server_scale: int = 1) -> Side:
    """Play a campaign with the draws of ``seed``, equal for equal seats whatever they hold."""
    path, tapes = Path(), {}
    for place, scale in [*((i, seat.scale) for i, seat in enumerate(seats)), (SERVER, server_scale)]:
        tapes[place] = _tape(path, place, seed=seed, scale=scale)
    parts = []
    for place, seat in enumerate(seats):
        features, targets = inputs(seat.rows)
        parts.append(Part(seat.bench, tapes[place].watch(features), targets, tapes[place].randomness))
    with path:
        played = play(campaign, parts, start=start, noise=tapes[SERVER].randomness)
    return Side(played, tapes, path, frozenset(place for place, seat in enumerate(seats) if not seat.rows))


def _tape(path: Path, place: int, *, seed: int, scale: int) -> Tape:
    return Tape(
        lambda round_number: Replay(seed, place + 1, round_number, scale=scale),
        lambda round_number: path.begin((round_number, place)),
        place,
    )


def same_but_for_values(one: Side, other: Side) -> dict[str, bool]:
    """What two plays must have in common whatever their records: draws, functions, log lines, fields, shapes, bytes."""
    keys = one.played.replies.keys()
    return {
        "same draws": all(one.tapes[place].trace() == other.tapes[place].trace() for place in one.tapes),
        "same path": one.entered(other) == other.entered(one),
        "same log": one.played.log == other.played.log,
        "same envelope": keys == other.played.replies.keys()
        and all(envelope(one.played.replies[key]) == envelope(other.played.replies[key]) for key in keys),
    }


def envelope(payload: bytes) -> tuple[Any, ...]:
    """Everything of a message on the wire but the values of its arrays and the envelope's own ids and times."""
    content = read_wire(payload).content
    found: list[Any] = [len(payload)]
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            found += [(name, key, a.dtype, tuple(a.shape), a.stype, len(a.data)) for key, a in record.items()]
        elif isinstance(record, ConfigRecord):
            found += [(name, key, type(value).__name__, value) for key, value in record.items()]
        else:
            found.append((name, repr(record)))
    return tuple(found)
