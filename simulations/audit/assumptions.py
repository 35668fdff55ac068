"""What the devices of a play really drew, and whether it is what the accountant priced."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from types import CodeType, FrameType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from torch import Tensor

from shared.errors import SottovoceError
from shared.models.features import Features
from shared.privacy.accounting import DistributedMechanism
from shared.privacy.noise import GRID_SIGMA, Randomness, SecureRandomness
from shared.privacy.policy import Policy, grid_of
from shared.privacy.promise import check_price
from shared.protocol.audits import ROOMS
from shared.protocol.campaign import Campaign, certify

_LOG2_SIGMA = GRID_SIGMA.bit_length() - 1
_NOISE = 2**17  # draws that are looked at for their size, which shows 2 % less
_FALSE_ALARM = 5.0  # standard deviations
_ROOMS = tuple(str(FilePath(__file__).parents[2] / room) for room in ROOMS)


class Event(NamedTuple):
    """Something a device did in a round: ``coins`` of a probability, ``noise`` of a size, or ``rows`` in a pass."""

    kind: Literal["coins", "noise", "rows"]
    asked: tuple[float, ...]
    values: np.ndarray


class Replay:
    """The same draws for every data set: a record's coin depends on the draw and its place, noise on the draw alone.

    Args:
        key: Of everything.
        scale: Of the noise; 0 draws none, and tosses the same coins.
    """

    def __init__(self, *key: int, scale: int = 1) -> None:
        self._key, self._scale, self._asked = key, scale, 0

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        """(count,) bool; those of n + 1 records begin with those of n."""
        tossed: np.ndarray = self._next().random(count) < probability
        return tossed

    def gaussian_integers(self, count: int, *, log2_sigma: int = _LOG2_SIGMA) -> np.ndarray:
        """(count,) int64."""
        noise: np.ndarray = np.rint(self._next().standard_normal(count) * 2**log2_sigma).astype(np.int64)
        return noise * self._scale

    def _next(self) -> np.random.Generator:
        self._asked += 1
        return np.random.default_rng([*self._key, self._asked])


@dataclass
class Tape:
    """Takes down every draw of one device, and every record that enters a pass.

    Attributes:
        source: Round -> where the draws come from.
        begin: Called with the round when the device begins to draw.
        place: Of the device in its play.
        rounds: Round -> what happened in it, in order.
    """

    source: Callable[[int], Randomness]
    begin: Callable[[int], object] = lambda _: None
    place: int = 0
    rounds: dict[int, list[Event]] = field(default_factory=dict)

    def randomness(self, round_number: int) -> Randomness:
        """Draws of the source, taken down."""
        self.begin(round_number)
        return Taped(self.source(round_number), self.rounds.setdefault(round_number, []), self.place)

    def watch(self, features: Features) -> Features:
        """Features that tell which rows are read."""
        return _Watched(features, self.hear)

    def hear(self, rows: np.ndarray) -> None:
        """Take down rows that enter a pass of the latest round."""
        [*self.rounds.values()][-1].append(Event("rows", (), rows))

    def trace(self) -> list[tuple[int, str, tuple[float, ...]]]:
        """Every draw that was asked for: round, kind, and probability or size; nothing that depends on a count."""
        return [(r, event.kind, event.asked) for r, kept in self.rounds.items() for event in kept if event.asked]

    def noise(self, round_number: int) -> np.ndarray:
        """The sum of all noise of a round, as it was drawn."""
        drawn: np.ndarray = np.sum([e.values for e in self.rounds.get(round_number, []) if e.kind == "noise"], axis=0)
        return drawn

    def entered(self, records: int) -> tuple[np.ndarray, np.ndarray]:
        """How often each record entered each noisy step, and what its coin said: (steps, records) int64 both."""
        steps: list[tuple[np.ndarray, np.ndarray]] = []
        rows, coins = np.zeros(records, dtype=np.int64), np.ones(records, dtype=np.int64)
        for event in (event for kept in self.rounds.values() for event in kept):
            if event.kind == "rows":
                np.add.at(rows, event.values, 1)
            elif event.kind == "coins":
                coins = event.values.astype(np.int64) if event.values.shape == rows.shape else np.full_like(rows, -1)
            else:
                steps.append((rows, coins))
                rows, coins = np.zeros_like(rows), np.ones(records, dtype=np.int64)
        none = np.zeros((0, records), dtype=np.int64)
        return (np.array([rows for rows, _ in steps]), np.array([c for _, c in steps])) if steps else (none, none)


class Taped:
    """Draws that are taken down.

    Attributes:
        place: Whose they are.
    """

    def __init__(self, source: Randomness, kept: list[Event], place: int) -> None:
        self._source, self._kept, self.place = source, kept, place

    def bernoulli(self, probability: float, count: int) -> np.ndarray:
        """As of the source."""
        tossed = self._source.bernoulli(probability, count)
        self._kept.append(Event("coins", (probability,), tossed.copy()))
        return tossed

    def gaussian_integers(self, count: int, *, log2_sigma: int = _LOG2_SIGMA) -> np.ndarray:
        """As of the source."""
        noise = self._source.gaussian_integers(count, log2_sigma=log2_sigma)
        self._kept.append(Event("noise", (count, log2_sigma), noise.copy()))
        return noise


class _Watched(Features):
    def __init__(self, features: Features, hear: Callable[[np.ndarray], object]) -> None:
        super().__init__([features.batch([row])[0][0].numpy() for row in range(len(features))])
        self._hear = hear

    def batch(self, rows: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        self._hear(np.array(rows))
        return super().batch(rows)


class Path:
    """While open, notes which functions of devices and server are entered, for whatever was begun last."""

    def __init__(self) -> None:
        self.entered: dict[tuple[int, int], set[str]] = {}
        self._now: set[str] = set()
        self._names: dict[CodeType, str | None] = {}

    def begin(self, key: tuple[int, int]) -> None:
        """What follows is of this round and place."""
        self._now = self.entered.setdefault(key, set())

    def __enter__(self) -> Self:
        self._before = sys.getprofile()
        sys.setprofile(self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self._before)

    def _hear(self, frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        code = frame.f_code
        if code not in self._names:
            place = code.co_filename
            ours = place.startswith(_ROOMS)
            self._names[code] = f"{place}:{code.co_qualname}" if ours else None
        if name := self._names[code]:
            self._now.add(name)


def draws_of(policy: Policy, *, server: bool = False) -> list[tuple[str, tuple[float, ...]]]:
    """What a device, or the server, must draw in one round for the price to hold, in order.

    A price with amplification rests on one coin a record and step; every noise is drawn whole, records or none.
    """
    noise = ("noise", (policy.size, _LOG2_SIGMA))
    if policy.unit == "record":
        coins = [("coins", (policy.sampling_rate,))] if policy.sampling_rate < 1 else []
        return [] if server else [*coins, noise] * policy.steps
    if policy.secure_sum:
        return [] if server else [("noise", (policy.size, policy.secure_sum.share_log2_sigma))]
    return [noise] if server else []


def draws_as_priced(tape: Tape, policy: Policy, *, rounds: int, server: bool = False) -> bool:
    """Whether the draws of every round are exactly those that are priced."""
    wanted = [(r, *draw) for r in range(1, rounds + 1) for draw in draws_of(policy, server=server)]
    return tape.trace() == wanted


def coins_decide(tape: Tape, records: int) -> bool:
    """Whether each record entered a step exactly once where its own coin said so, and not at all where it did not."""
    rows, coins = tape.entered(records)
    return rows.shape == coins.shape and bool((rows == coins).all())


def are_independent(entered: np.ndarray, rate: float) -> bool:
    """Whether (steps, records) zeros and ones look like independent coins of one probability.

    The rate of all, marginals, batch sizes (those of fixed size do not vary), pairs in a step, and steps in turn; each
    may be five standard deviations from what coins give, so that a false alarm takes a million audits or so.
    """
    steps, count = entered.shape
    if not (entered.min() >= 0 and entered.max() <= 1 and (entered.min(0) < entered.max(0)).all()):
        return False
    spread = math.sqrt(rate * (1 - rate))
    pairs = np.corrcoef(entered.T)[np.triu_indices(count, 1)]
    in_turn = np.corrcoef(entered[:-1].ravel(), entered[1:].ravel())[0, 1]
    return bool(
        abs(entered.mean() - rate) < _FALSE_ALARM * spread / math.sqrt(entered.size)
        and abs(entered.mean(0) - rate).max() < _FALSE_ALARM * spread / math.sqrt(steps)
        and abs(entered.sum(1).var() / (count * spread**2) - 1) < _FALSE_ALARM * math.sqrt(2 / steps)
        and abs(pairs).max() < 1.1 * _FALSE_ALARM / math.sqrt(steps)
        and abs(in_turn) < _FALSE_ALARM / math.sqrt(entered.size)
    )


def noise_as_asked(log2_sigma: int) -> bool:
    """Whether the operating system's noise has the size asked for, and is another in every round and device."""
    one, other = (SecureRandomness().gaussian_integers(_NOISE, log2_sigma=log2_sigma) / 2**log2_sigma for _ in range(2))
    limit = _FALSE_ALARM * math.sqrt(2 / _NOISE)
    return bool(
        abs((one**2).mean() - 1) < limit and abs((other**2).mean() - 1) < limit and abs((one * other).mean()) < limit
    )


def priced_as_stated(campaign: Campaign, *, devices: int) -> dict[str, bool]:
    """Whether the accountant's mechanism is the campaign's, and nothing else amplifies.

    Args:
        campaign: As published.
        devices: Size of its roster.

    Returns:
        Check -> whether it holds.
    """
    policy = campaign.policy
    mechanism = policy.mechanism
    steps = policy.steps if policy.unit == "record" else 1
    constants = mechanism.noise_multiplier == policy.noise_multiplier and mechanism.coordinates == policy.size
    if isinstance(mechanism, DistributedMechanism):
        terms = policy.secure_sum
        wanted = campaign.scenario.privacy
        constants = constants and terms is not None and mechanism.shares == terms.min_survivors - terms.colluders
        stated = (
            math.ceil(wanted.survivors * policy.cohort_size - 1e-9),
            math.floor(wanted.colluders * policy.cohort_size + 1e-9),
        )
        constants = constants and terms is not None and (terms.min_survivors, terms.colluders) == stated
    else:
        constants = constants and (mechanism.sampling_rate, mechanism.steps) == (policy.sampling_rate, steps)
    asked = -(-policy.rounds * policy.cohort_size // devices)
    return {
        "price": not _refused(lambda: certify(campaign)),
        "size of noise": noise_as_asked(policy.secure_sum.share_log2_sigma if policy.secure_sum else _LOG2_SIGMA),
        "constants": constants and policy.grid == grid_of(policy),
        "participations": asked <= mechanism.max_participations == policy.max_participations,
        "amplification": policy.unit == "record"
        or _refused(lambda: check_price(policy.model_copy(update={"sampling_rate": 0.5}))),
    }


def _refused(step: Callable[[], object]) -> bool:
    try:
        step()
    except SottovoceError:
        return True
    return False
