"""L0: the same play with and without one record, or one user: nothing may differ but a sum, by no more than the bound.

Draws are replayed, so that the two plays can be compared bit by bit (as dp-recorder does, arXiv:2602.17454). Records
and base are the subject's; the campaigns are copies of its own for a few devices, whose price is the same or lower.
"""

import time
from typing import Any, Protocol

import numpy as np
import torch

from client.training.site import open_workbench
from shared.errors import CampaignError
from shared.heads.adapter import shared_parameters
from shared.heads.tasks import IGNORE
from shared.privacy.noise import SecureRandomness
from shared.privacy.policy import Policy
from shared.protocol.audits import LevelResult, conclude
from shared.protocol.campaign import Campaign
from simulations.audit.assumptions import Tape, are_independent, coins_decide, draws_as_priced, priced_as_stated
from simulations.audit.mutants import mutant
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
    inputs,
    play_seats,
    real_rows,
    same_but_for_values,
)
from simulations.audit.stage import Part, Subject, play
from simulations.audit.user_play import UserStand

TIGHT = 0.99  # of the bound, in which something far too long must end: else the check would have no power
_CONTROL = 3.0  # bounds, by which the same must move what is not clipped
_ROUNDING = 1e-4
_RECORDS = 3  # of a device; the records of a play that looks for a fault are cut to a few tokens
_CUT = 4
_SAMPLED, _STEPS = 16, 80  # records and steps in which the draw of records is watched
_QUIET = 1000.0  # noise multiplier there: such a campaign costs next to nothing
_TITLE = {
    "record": "record-play: the same with and without one record",
    "user": "record-play: the same with a user's contribution and with zero",
}
_ALL = ("real", "loud", "nan", "empty", "quiet", "stale")
_NEAR = {"1.5 times too long": 1.5, "3 times too long": 3.0, "6 times too long": 6.0}  # about: of ratings alone
_QUICK = ("loud", "empty", "quiet")


class Stand(Protocol):
    """Where a unit's plays take place."""

    @property
    def mutants(self) -> tuple[str, ...]:
        """Faults that apply."""

    def real(self) -> Findings:
        """Everything there is to check."""

    def quick(self, fault: str) -> Findings:
        """As much of it as finds this fault, which is there; with none, nothing may fail."""

    def control(self) -> float:
        """How far what is too long moves an update without privacy, in clip norms."""

    @property
    def bound(self) -> float:
        """Clip norm of the plays, see ``bound_for``."""


def audit(subject: Subject, *, seed: int, quiet: bool = True) -> LevelResult:
    """Play a campaign with and without one record, or one user, and compare everything but values.

    Args:
        subject: What is audited.
        seed: Of the replayed draws.
        quiet: There is no progress to show: it takes seconds.

    Returns:
        L0. ``passed`` is None where something too long does not move an unprotected update by several bounds, or a
        protected one by nearly the bound, or a mutant is missed.
    """
    del quiet
    started = time.perf_counter()
    stand: Stand = (RecordStand if subject.campaign.policy.unit == "record" else UserStand)(subject, seed=seed)
    stated = Findings(priced_as_stated(subject.campaign, devices=len(subject.dataset.users)))
    found = stated | stand.quick("") | stand.real()  # in this order: what is done once in a process is done then
    control = stand.control()
    failed = {name: _failed_with(stand, name) for name in stand.mutants}
    caught = {name: bool(checks) for name, checks in failed.items()}
    detected = control > _CONTROL and found.moved["loud"] >= TIGHT
    facts: dict[str, Any] = {"moved": found.moved, "control_moved": control, "bound_played": stand.bound}
    facts |= {"checks": found.checks, "found_by": failed}
    return conclude(
        title=_TITLE[subject.campaign.policy.unit],
        held=not found.failed,
        control_detected=detected,
        caught=caught,
        started=started,
        facts=facts,
        words=_words(subject.campaign.policy, found, control=control, bound=stand.bound),
    )


def _failed_with(stand: Stand, name: str) -> list[str]:
    """The checks that fail where a fault is there."""
    try:
        with mutant(name):
            return stand.quick(name).failed
    except CampaignError:  # the play broke off: whatever that shows, it is not what is checked here
        return []


def _words(policy: Policy, found: Findings, *, control: float, bound: float) -> tuple[str, ...]:
    one = "One record more" if policy.unit == "record" else "A user's contribution in place of zero"
    words = [
        f"{one} moved the sum by at most {max(found.moved.values()):.4f} of the bound, with the same draws; one "
        f"that is far too long moved it by {found.moved['loud']:.4f} of it, and without privacy by {control:.3g} of it."
    ]
    if found.failed:
        return (f"What must hold does not: {', '.join(found.failed)}.", *words)
    words.append(
        "All else was the same: draws, functions entered, log lines, and fields, shapes and bytes of every message."
    )
    words.append("The noise that was drawn is what is priced, and all of it was added, with and without records.")
    if policy.unit == "record":
        own = (
            "this campaign" if policy.sampling_rate < 1 else "a copy of this campaign that samples (itself it does not)"
        )
        words.append(f"In {own}, each record entered a step by its own, independent coin, and once.")
    if bound != policy.clip_norm:
        words.append(
            f"Played with a bound of {bound:.3g} in place of {policy.clip_norm:g}, which hardly any gradient reaches."
        )
    return tuple(words)


class RecordStand:
    """Plays with one record more and less, on devices of a few real records."""

    def __init__(self, subject: Subject, *, seed: int) -> None:
        self._subject, self._seed = subject, seed
        policy = subject.campaign.policy
        bare = bare_campaign(subject, "bare", clients=2)
        bench = open_workbench(bare)
        self._start = away(subject.arrays, seed=seed)
        [self._rows] = real_rows(subject, bench.head, devices=1, most=_RECORDS)
        *own, extra = self._rows
        seats = [Seat(own, bench), Seat([*own, extra.loud()], bench)]
        side = play_seats(bare, seats, start=self._start, seed=seed)
        apart = float(np.linalg.norm(side.vector(0) - side.vector(1)))
        self._loudest = apart * bare.policy.denominator / bare.policy.learning_rate / bare.policy.steps
        self._kinds = (*_ALL, *(_NEAR if isinstance(extra.target, float) else ()))
        few = few_devices(subject.scenario, "step", clients=len(self._kinds))
        bound = bound_for(subject, loudest=self._loudest)
        self._step = copy_campaign(subject, few, steps=1, sampling_rate=1.0, clip_norm=bound)
        self._bench, self._other_bench = open_workbench(self._step), open_workbench(self._step)
        self._whole = None
        if policy.steps > 1 or policy.sampling_rate < 1 or policy.max_participations > 1:
            rounds = min(2, policy.max_participations)
            whole = few_devices(subject.scenario, "whole", clients=2, rounds=rounds)
            self._whole = copy_campaign(subject, whole, clip_norm=bound)
        self._sampled = _sampled(subject)

    @property
    def mutants(self) -> tuple[str, ...]:
        """All that can be there; with one tensor, clipping each is clipping all."""
        names = ("record-twice", "no-clip", "data-steps", "data-rate", "data-denominator", "skip-empty", "tells-count")
        noise = ("no-noise", "quarter-noise", "wrong-sampler")
        return names + noise + (("clip-each-tensor",) if len(self._step.policy.slots) > 1 else ())

    def real(self) -> Findings:
        """One step in every way, then the campaign as it is, then the sampler."""
        with torch.no_grad():  # what something else might have left in the head
            for parameter in shared_parameters(self._other_bench.head).values():
                parameter.fill_(3.0)
        found = self._in_one_step(self._rows, self._kinds)
        if self._whole:
            seats = [self._pair(kind, self._rows) for kind in ("real", "empty")]
            sides = [
                play_seats(self._whole, side, start=self._start, seed=self._seed) for side in zip(*seats, strict=True)
            ]
            found |= Findings(_as_priced(self._whole, seats, sides)) | self._in_all_steps(self._whole)
        return found | self._sampler()

    def quick(self, fault: str) -> Findings:
        """The draw of records is watched for itself, all else in one step of few tokens."""
        if fault == "wrong-sampler":
            return self._sampler()
        return self._in_one_step([row.cut(_CUT) for row in self._rows[-2:]], _QUICK)

    def control(self) -> float:
        """As the same moved an update without clipping and noise."""
        return self._loudest / self.bound

    @property
    def bound(self) -> float:
        """Clip norm of the plays."""
        return self._step.policy.clip_norm or np.nan

    def _pair(self, kind: str, rows: list[Row]) -> tuple[Seat, Seat]:
        """A device without and with the one record; or the same device, quiet or with something left in its head."""
        *own, extra = rows
        bench = self._bench
        fewer = Seat(own, bench)
        if kind in _NEAR:
            return fewer, Seat([*own, extra.loud(_NEAR[kind] * self.bound / max(self._loudest, self.bound))], bench)
        return {
            "real": (fewer, Seat(rows, bench)),
            "loud": (fewer, Seat([*own, extra.loud()], bench)),
            "nan": (fewer, Seat([*own, extra.broken()], bench)),
            "empty": (Seat([], bench), Seat([extra], bench)),
            "quiet": (fewer, Seat(own, bench, scale=0)),
            "stale": (fewer, Seat(own, self._other_bench)),
        }[kind]

    def _in_one_step(self, rows: list[Row], kinds: tuple[str, ...]) -> Findings:
        """Both plays of one step, compared in every way."""
        pairs = [self._pair(kind, rows) for kind in kinds]
        nobody = Seat([], self._bench)
        pairs += [(nobody, nobody)] * (len(self._kinds) - len(kinds))
        one, other = (
            play_seats(self._step, side, start=self._start, seed=self._seed) for side in zip(*pairs, strict=True)
        )
        vectors = {kind: (one.vector(seat), other.vector(seat)) for seat, kind in enumerate(kinds)}
        moved = {kind: self._distance(*pair) for kind, pair in vectors.items() if kind not in ("quiet", "stale")}
        checks = _as_priced(self._step, pairs, [one, other])
        checks["bound"] = max(moved.values()) <= 1 + _ROUNDING + self._rounding()
        checks["noise"] = self._is_noise(*vectors["quiet"], one.tapes[kinds.index("quiet")])
        if "nan" in moved:
            checks["nan"] = bool(np.array_equal(*vectors["nan"]))
            checks["stale"] = bool(np.array_equal(*vectors["stale"]))
        return Findings(checks, moved)

    def _in_all_steps(self, campaign: Campaign) -> Findings:
        """What a device without records sends is its noise, every step's; one record adds no more than C to each."""
        policy = campaign.policy
        nobody, loud = Seat([], self._bench), Seat([self._rows[-1].loud()], self._bench)
        one, other = (
            play_seats(campaign, seats, start=self._start, seed=self._seed)
            for seats in ((nobody, nobody), (nobody, loud))
        )
        checks, moved = {"noise": True, "bound": True}, 0.0
        for number in range(1, policy.rounds + 1):
            quiet = {name: np.zeros_like(array) for name, array in self._start.items()}
            checks["noise"] &= self._is_noise(
                flat(one.played.update(number, 1)), flat(quiet), one.tapes[1], number=number, steps=policy.steps
            )
            apart = self._distance(*(flat(side.played.update(number, 1)) for side in (one, other))) / policy.steps
            moved = max(moved, apart)
        checks["bound"] = moved <= 1 + _ROUNDING + self._rounding()
        return Findings(checks, {"loud in all steps": moved})

    def _scale(self) -> float:
        """From an update of one step to clip norms."""
        policy = self._step.policy
        return policy.denominator / policy.learning_rate / (policy.clip_norm or np.nan)

    def _distance(self, one: np.ndarray, other: np.ndarray) -> float:
        return float(np.linalg.norm(one - other)) * self._scale()

    def _rounding(self) -> float:
        """What float32 parameters may lose in two updates, in clip norms."""
        largest = max(float(np.abs(array).max()) for array in self._start.values())
        return float(2 * np.finfo(np.float32).eps * largest * np.sqrt(self._step.policy.size) * self._scale())

    def _is_noise(self, noised: np.ndarray, bare: np.ndarray, tape: Tape, *, number: int = 1, steps: int = 1) -> bool:
        """Whether two updates differ by what was drawn, on the grid that is priced."""
        policy = self._step.policy
        added = tape.noise(number) * (-policy.learning_rate * (policy.grid or np.nan) / policy.denominator)
        largest = max(float(np.abs(array).max()) for array in (*self._start.values(), noised, bare))
        return bool(np.abs(noised - bare - added).max() <= 8 * steps * np.finfo(np.float32).eps * largest)

    def _sampler(self) -> Findings:
        """Who enters the steps of one device, by the operating system's coins."""
        policy, bench = self._sampled.policy, self._bench
        row = self._rows[0].cut(1)
        if not isinstance(row.target, float):  # nothing to predict: the vocabulary would take a minute
            row = Row(row.hidden, np.full_like(row.target, IGNORE))
        features, targets = inputs([row] * _SAMPLED)
        tape = Tape(lambda _: SecureRandomness())
        play(self._sampled, [Part(bench, tape.watch(features), targets, tape.randomness)], start=self._start)
        entered, _ = tape.entered(_SAMPLED)
        return Findings(
            {
                "draws": draws_as_priced(tape, policy, rounds=1),
                "coins": coins_decide(tape, _SAMPLED),
                "independent": are_independent(entered, policy.sampling_rate),
            }
        )


def _sampled(subject: Subject) -> Campaign:
    """A copy that samples, at the campaign's own rate where it is neither all nor next to nothing."""
    rate = subject.campaign.policy.sampling_rate
    return copy_campaign(
        subject,
        few_devices(subject.scenario, "sampled", clients=1, micro_batch=1024),
        steps=_STEPS,
        sampling_rate=rate if 0.1 <= rate <= 0.9 else 0.5,
        noise_multiplier=_QUIET,
        learning_rate=1e-6,
        max_participations=1,
        max_update_norm=1e9,
    )


def _as_priced(campaign: Campaign, pairs: list[tuple[Seat, Seat]], sides: list[Side]) -> dict[str, bool]:
    """What two plays have in common, and that every device drew what is priced."""
    policy = campaign.policy
    tapes = [(sides[i].tapes[seat], len(pair[i].rows)) for seat, pair in enumerate(pairs) for i in (0, 1)]
    return same_but_for_values(*sides) | {
        "draws": all(draws_as_priced(tape, policy, rounds=policy.rounds) for tape, _ in tapes)
        and all(draws_as_priced(side.tapes[SERVER], policy, rounds=policy.rounds, server=True) for side in sides),
        "coins": all(coins_decide(tape, records) for tape, records in tapes),
    }
