"""L0 at unit user: a small cohort with one user's contribution, and with zero in its place."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import numpy as np

import client.app
from client.training.site import open_workbench
from shared.config import Scenario
from shared.heads.adapter import Arrays
from shared.privacy.calibration import share_noise
from shared.privacy.noise import Randomness
from shared.privacy.policy import Policy
from simulations.audit.assumptions import Taped, draws_as_priced
from simulations.audit.neighbours import (
    SERVER,
    Findings,
    Row,
    Seat,
    Side,
    away,
    bare_campaign,
    bound_for,
    copy_campaign,
    few_devices,
    flat,
    play_seats,
    real_rows,
    same_but_for_values,
)
from simulations.audit.stage import Subject

_USERS, _RECORDS = 5, 4
_CUT = 4
_RATE = _USERS / 64  # of the server: shared arrays then move by a 64th of the sum, which their bound allows
_ROUNDING = 1e-6
_ALL = ("real", "loud", "nan", "empty", "quiet")
_QUICK = ("loud", "empty", "quiet")
_VICTIM = 0


class UserStand:
    """Plays of a cohort in which one user's contribution is zero, its own, far too long, or none at all."""

    def __init__(self, subject: Subject, *, seed: int) -> None:
        self._seed = seed
        self._start = away(subject.arrays, seed=seed)
        bare = bare_campaign(subject, "bare", clients=2)
        bench = open_workbench(bare)
        self._users = real_rows(subject, bench.head, devices=_USERS, most=_RECORDS)
        seats = [Seat([], bench), Seat([row.loud() for row in self._users[_VICTIM]], bench)]
        side = play_seats(bare, seats, start=self._start, seed=seed)
        self._loudest = float(np.linalg.norm(side.vector(0) - side.vector(1)))
        few = few_devices(subject.scenario, "users", clients=_USERS, rate=_RATE)
        few = few.model_copy(update={"federation": few.federation.model_copy(update={"server_momentum": 0.0})})
        bound = bound_for(subject, loudest=self._loudest)
        noise = _shared_noise(few, subject.campaign.policy)
        self._campaign = copy_campaign(subject, few, clip_norm=bound, **noise)
        rounds = min(2, subject.campaign.policy.max_participations)
        later = few.model_copy(
            update={"name": "l0-rounds", "federation": few.federation.model_copy(update={"rounds": rounds})}
        )
        self._rounds = copy_campaign(subject, later, clip_norm=bound, **noise)
        self._bench = open_workbench(self._campaign)

    @property
    def mutants(self) -> tuple[str, ...]:
        """Those of a user's contribution, of noise, and of the log."""
        return ("user-twice", "no-clip", "no-noise", "quarter-noise", "tells-count")

    def real(self) -> Findings:
        """With whole records, in every way."""
        return self._look(self._users, _ALL) | self._noise_alone()

    def _noise_alone(self) -> Findings:
        """Where nobody has a record, every round shows its noise and nothing else."""
        policy, seats = self._rounds.policy, [Seat([], self._bench)] * _USERS
        side = play_seats(self._rounds, seats, start=self._start, seed=self._seed)
        held = []
        for number in range(1, policy.rounds + 1):
            if policy.secure_sum:
                held += [
                    np.array_equal(
                        flat(side.played.update(number, seat)).astype(np.uint32),
                        side.tapes[seat].noise(number).astype(np.uint32),
                    )
                    for seat in range(_USERS)
                ]
            else:
                before, after = (flat(arrays) for arrays in side.played.arrays[number - 1 : number + 1])
                error = (after - before) * (_USERS / _RATE) - side.tapes[SERVER].noise(number) * (policy.grid or np.nan)
                held.append(bool(np.linalg.norm(error) <= self._rounding() * (policy.clip_norm or np.nan)))
        draws = [
            draws_as_priced(tape, policy, rounds=policy.rounds, server=place == SERVER)
            for place, tape in side.tapes.items()
        ]
        return Findings({"noise": all(held), "draws": all(draws)})

    def quick(self, fault: str) -> Findings:
        """With records of a few tokens."""
        del fault
        return self._look([[row.cut(_CUT) for row in rows[:2]] for rows in self._users], _QUICK)

    def control(self) -> float:
        """As the same user moved an update without clipping and noise."""
        return self._loudest / self.bound

    @property
    def bound(self) -> float:
        """Clip norm of the plays."""
        return self._policy.clip_norm or np.nan

    @property
    def _policy(self) -> Policy:
        return self._campaign.policy

    def _look(self, users: list[list[Row]], kinds: tuple[str, ...]) -> Findings:
        """One play with zero in the user's place, and one of each kind against it."""
        zero = self._play(users, "zero")
        others = {kind: self._play(users, kind) for kind in kinds}
        found = Findings()
        for side in others.values():
            found |= Findings(same_but_for_values(zero, side) | self._is_alone(zero, side))
            found |= Findings({"draws": self._draws_as_priced(side)})
        real = {kind: side for kind, side in others.items() if kind != "quiet"}
        moved = {kind: self._moved(zero, side) for kind, side in real.items()}
        found.moved.update({kind: max(pair) for kind, pair in moved.items()})
        allowed = 1 + _ROUNDING, 1 + _ROUNDING + self._rounding()
        found.checks["bound"] = all(sent <= allowed[0] and out <= allowed[1] for sent, out in moved.values())
        found.checks["no contribution"] = all(moved[kind][0] == 0 for kind in ("nan", "empty") if kind in moved)
        found.checks["noise"] = self._is_noise(zero, others["quiet"])
        return found

    def _play(self, users: list[list[Row]], kind: str) -> Side:
        quiet = int(kind != "quiet")
        own = users[_VICTIM]
        rows = {"loud": [row.loud() for row in own], "nan": [row.broken() for row in own], "empty": []}.get(kind, own)
        seats = [Seat(rows, self._bench, scale=quiet), *(Seat(other, self._bench) for other in users[1:])]
        with _zeroed() if kind in ("zero", "quiet") else nullcontext():
            return play_seats(self._campaign, seats, start=self._start, seed=self._seed, server_scale=quiet)

    def _sent(self, side: Side, seat: int) -> np.ndarray:
        """A contribution in steps of the grid, its noise included."""
        return side.vector(seat).astype(np.int64)

    def _apart(self, one: Side, other: Side, seat: int) -> np.ndarray:
        """How two contributions differ, in the ring of 32 bits."""
        apart = (self._sent(other, seat) - self._sent(one, seat)).astype(np.uint32).view(np.int32)
        return np.asarray(apart.astype(np.float64))

    def _released(self, side: Side) -> np.ndarray:
        """The sum in units of the change, as the server's next arrays show it."""
        before, after = (flat(arrays) for arrays in side.played.arrays[:2])
        return np.asarray((after - before) * (_USERS / _RATE))

    def _moved(self, zero: Side, side: Side) -> tuple[float, float]:
        """How far the user moved the sum of what devices sent, and of what the server went on with, in clip norms."""
        clip_norm, grid = self._policy.clip_norm or np.nan, self._policy.grid or np.nan
        sent = np.linalg.norm(self._apart(zero, side, _VICTIM)) * grid / clip_norm
        out = np.linalg.norm(self._released(side) - self._released(zero)) / clip_norm
        return float(sent), float(out)

    def _is_alone(self, zero: Side, side: Side) -> dict[str, bool]:
        """Nobody else's contribution depends on the user."""
        return {"others": not any(self._apart(zero, side, seat).any() for seat in range(1, _USERS))}

    def _is_noise(self, zero: Side, quiet: Side) -> bool:
        """Whether what was drawn, by the device or by the server, is what was added."""
        if self._policy.secure_sum:
            return bool(np.array_equal(-self._apart(zero, quiet, _VICTIM), zero.tapes[_VICTIM].noise(1)))
        added = zero.tapes[SERVER].noise(1) * (self._policy.grid or np.nan)
        error = np.linalg.norm(self._released(zero) - self._released(quiet) - added)
        return bool(error <= self._rounding() * (self._policy.clip_norm or np.nan))

    def _rounding(self) -> float:
        """What float32 arrays of the server may lose, in clip norms."""
        largest = max(float(np.abs(array).max()) for array in self._start.values()) + 16 * _RATE
        lost = 4 * np.finfo(np.float32).eps * largest * np.sqrt(self._policy.size) * _USERS / _RATE
        return float(lost / (self._policy.clip_norm or np.nan))

    def _draws_as_priced(self, side: Side) -> bool:
        return all(
            draws_as_priced(tape, self._policy, rounds=1, server=place == SERVER) for place, tape in side.tapes.items()
        )


def _shared_noise(scenario: Scenario, policy: Policy) -> dict[str, object]:
    """Shares of noise for so few devices, calibrated to the same epsilon."""
    if policy.secure_sum is None:
        return {}
    noise_multiplier, terms = share_noise(scenario.privacy, cohort_size=_USERS, size=policy.size)
    return {"noise_multiplier": noise_multiplier, "secure_sum": terms}


@contextmanager
def _zeroed() -> Iterator[None]:
    """The victim's change is zero, whatever its records; all else goes its way."""
    contribute: Callable[..., np.ndarray] = vars(client.app)["contribute"]  # perhaps a mutant's

    def contribute_zero(change: Arrays, *, policy: Policy, randomness: Randomness) -> np.ndarray:
        if isinstance(randomness, Taped) and randomness.place == _VICTIM:
            change = {name: np.zeros_like(array) for name, array in change.items()}
        return contribute(change, policy=policy, randomness=randomness)

    with patch("client.app.contribute", contribute_zero):
        yield
