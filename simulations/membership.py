"""The membership attack on a run's shared arrays: telling records, and users, they were trained on from others.

Members and non-members are told apart by a public hash alone (``hold_out``, ``choose_users``), so that an attack on the
public start, where nothing was trained, finds nothing; it is made too, and so is one on a campaign without privacy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from client.training.site import TextFeatures, resident_dataset
from shared.config import Scenario
from shared.datasets import Dataset, Record, UserData, hold_out
from shared.errors import DataError
from shared.heads.adapter import load_start
from shared.heads.tasks import teaches
from shared.metrics.ratings import Interval, draw_users
from shared.models.model import Base
from shared.progress import track
from simulations.audit.bounds import auc, tpr_at_fpr
from simulations.campaigns import Result
from simulations.observe.observe import make_observer
from simulations.score import mean_over_seeds

FPR = 0.01
PRIVATE, UNPROTECTED, UNTRAINED = "private", "unprotected", "untrained"  # whose arrays are attacked
LOSS, REFERENCE = "loss", "reference"
RECORDS, USERS = "records", "users"  # who is guessed
_BOOTSTRAP = "bootstrap over users"
_INDEPENDENT = "users taken as independent: Wilson's for AUC, exact ends for TPR"

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Scores = dict[str, Interval | None]  # auc, tpr


@dataclass(frozen=True)
class Asked:
    """The records an attack scores, and what it is to find out, (n,) each.

    Attributes:
        dataset: Holds all of them.
        records: Of users in ascending order.
        user: Index of the record's user; users of the run come first, in its order.
        kept: Whether it may have been trained on: it was not held out.
        users: How many users the run has; those beyond were set aside and took part in nothing.
    """

    dataset: Dataset
    records: list[Record]
    user: npt.NDArray[np.int64]
    kept: Bools
    users: int

    @property
    def half(self) -> npt.NDArray[np.int64]:
        """Which half of the users the record's is in; a reference model is fitted to the other."""
        return self.user % 2


def attack_membership(
    scenario: Scenario,
    base: Base,
    dataset: Dataset,
    results: Sequence[Result],
    unprotected: Sequence[Result],
    *,
    quiet: bool = False,
) -> dict[str, Any]:
    """Attack the last shared arrays of the scenario's own campaign, for every seed.

    Args:
        scenario: Of the run.
        dataset: What was trained on, without the records held out.
        results: The campaigns of the run.
        unprotected: Its own campaigns again without privacy, one a seed; none where the run makes no claim itself.

    Returns:
        ``membership`` of ``summary.json``; see ``docs/summary.md``.

    Raises:
        DataError: Too few records were held out to attack anything.

    Source:
        Loss threshold: Yeom et al. 2018, arXiv:1709.01604. Reference model: Watson et al. 2022, arXiv:2111.08440, and
        Ye et al. 2022, arXiv:2111.09679, with one reference model in the place of many. TPR at a small FPR: Carlini et
        al. 2022, arXiv:2112.03570.
    """
    asked = _ask(scenario, dataset)
    mine = [result for result in results if not result.plan.suffix]
    texts = TextFeatures(base, scenario, asked.dataset, quiet=quiet)
    found = []
    for result in track(mine, description="membership", unit="seed", quiet=quiet):
        seed = result.plan.scenario.seed
        twin = next((each for each in unprotected if each.plan.scenario.seed == seed), None)
        found.append(_attack_seed(result, twin, asked, texts))
    policy = mine[0].plan.policy
    promised = {USERS: _promise_for_users, RECORDS: _promise_for_records}
    return {
        "membership": {
            "held_out_share": scenario.attack.held_out_share,
            "fpr": FPR,
            **{
                who: found[0][who]["counts"]
                | promised[who](policy.unit, policy.epsilon, policy.delta)
                | {"attacked": _mean([each[who]["attacked"] for each in found])}
                for who in found[0]
            },
        }
    }


def _ask(scenario: Scenario, dataset: Dataset) -> Asked:
    """Every record of ``dataset`` that may be trained on, those held out, and those of users who were set aside."""
    share = scenario.attack.held_out_share
    _, held = hold_out(resident_dataset(scenario.data), share)
    aside: tuple[UserData, ...] = ()
    if scenario.data.users == "campaign":
        aside = resident_dataset(scenario.data.model_copy(update={"users": "tuning"}), held_out=share).users
    pairs = [
        *((user.fit, out.fit) for user, out in zip(dataset.users, held.users, strict=True)),
        *((user.fit, ()) for user in aside),
    ]
    parts = [tuple(tuple(each for each in part if teaches(each, scenario.task)) for part in pair) for pair in pairs]
    users = tuple(
        UserData(user.user, fit + out, (), ()) for user, (fit, out) in zip((*dataset.users, *aside), parts, strict=True)
    )
    return Asked(
        dataset=replace(dataset, users=users),
        records=[record for user in users for record in user.fit],
        user=np.repeat(np.arange(len(users)), [len(user.fit) for user in users]),
        kept=np.array([kept for fit, out in parts for kept in [True] * len(fit) + [False] * len(out)], dtype=bool),
        users=len(dataset.users),
    )


def _attack_seed(result: Result, twin: Result | None, asked: Asked, texts: TextFeatures) -> dict[str, Any]:
    """Counts and scores of every attack on every target, for one seed."""
    scenario = result.plan.scenario
    seats = [seat for seat, rounds in result.last.answered.items() if rounds]
    taken = np.isin(asked.user, seats)
    here = taken & (asked.user < asked.users)
    scores = _score(result, twin, asked, texts, known=here & asked.kept)
    bootstrap = {"seed": scenario.seed, "resamples": scenario.evaluation.bootstrap_resamples}
    found = {
        RECORDS: {
            "counts": {
                "members": int((here & asked.kept).sum()),
                "non_members": int((here & ~asked.kept).sum()),
                "users": len(seats),
                "interval": _BOOTSTRAP,
            },
            "attacked": _each(scores, lambda of: separation(of[here], asked.kept[here], asked.user[here], **bootstrap)),
        }
    }
    if asked.users < len(asked.dataset.users):
        fit = asked.kept & (taken | (asked.user >= asked.users))
        index, place = np.unique(asked.user[fit], return_inverse=True)
        inside = index < asked.users

        def of_users(of: Floats) -> Scores:
            mean = np.bincount(place, of[fit]) / np.bincount(place)
            return {"auc": auc(mean[inside], mean[~inside]), "tpr": tpr_at_fpr(mean[inside], mean[~inside], fpr=FPR)}

        found[USERS] = {
            "counts": {
                "members": int(inside.sum()),
                "non_members": int((~inside).sum()),
                "users": index.size,
                "interval": _INDEPENDENT,
            },
            "attacked": _each(scores, of_users),
        }
    return found


def _score(
    result: Result, twin: Result | None, asked: Asked, texts: TextFeatures, *, known: Bools
) -> dict[str, dict[str, Floats]]:
    """Target -> attack -> a score of every record (n,), higher where it looks more like one that was trained on."""
    plan, head = result.plan, result.observer.head
    load_start(head, plan.start)
    observer = make_observer(head, texts, asked.dataset, plan.scenario, quiet=True)
    start = {slot.name: plan.start[slot.name] for slot in plan.policy.array_slots()}
    targets = {(PRIVATE if plan.policy.delta else UNPROTECTED): result.last.arrays}
    if twin:
        targets[UNPROTECTED] = twin.last.arrays
    targets[UNTRAINED] = start
    reference = observer.reference_losses(asked.records, half=asked.half, known=known)
    scores = {}
    for name, arrays in targets.items():
        losses = observer.losses(arrays, asked.records)
        scores[name] = {LOSS: -losses, REFERENCE: reference - losses}
    return scores


def _each(scores: dict[str, dict[str, Floats]], measure: Callable[[Floats], Scores]) -> dict[str, dict[str, Scores]]:
    """Measure every score that says anything; a reference that is the start itself does not, of the start."""
    return {
        target: {attack: measure(score) for attack, score in each.items() if np.ptp(score) > 0}
        for target, each in scores.items()
    }


def separation(scores: Floats, inside: Bools, user: npt.NDArray[np.int64], *, seed: int, resamples: int) -> Scores:
    """How well scores tell members from non-members, with 95 % intervals from a bootstrap over users.

    Args:
        scores: (n,), higher where a record looks more like a member.
        inside: (n,), which ones are members.
        user: (n,), whose they are: records of a user hang together, so users are drawn and not records.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.

    Returns:
        ``auc``: chance that a member scores higher than a non-member, equal scores counting half. ``tpr``: share of the
        members above the lowest threshold with at most ``FPR`` of the non-members above it, chosen anew in every
        resample; None where there are fewer than 1 / ``FPR`` non-members.

    Raises:
        DataError: There is no member or no non-member, or a score is NaN.
    """
    outside = int((~inside).sum())
    if not 0 < outside < inside.size:
        raise DataError(
            f"a membership attack needs records on both sides, got {inside.size - outside} that were trained on and "
            f"{outside} held out; change attack.held_out_share."
        )
    if np.isnan(scores).any():
        raise DataError("every record must have a score in a membership attack, got NaN; the shared arrays diverged.")
    whose = np.unique(user, return_inverse=True)[1]
    rows_in, rows_out = (np.flatnonzero(side)[np.argsort(-scores[side], kind="stable")] for side in (inside, ~inside))
    higher, as_high = (np.searchsorted(-scores[rows_in], -scores[rows_out], side=side) for side in ("left", "right"))

    def measure(drawn: Floats) -> tuple[float, float]:
        hits = np.append(0.0, np.cumsum(drawn[whose[rows_in]]))
        weight = drawn[whose[rows_out]]
        alarms = np.cumsum(weight)
        if not (hits[-1] > 0 and alarms[-1] > 0):
            return math.nan, math.nan  # a resample without one side says nothing
        first = np.searchsorted(alarms, FPR * alarms[-1], side="right")  # of the non-members: one alarm too many
        area = weight @ (hits[higher] + hits[as_high]) / 2
        return float(area / (hits[-1] * alarms[-1])), float(hits[higher[first]] / hits[-1])

    users = int(whose.max()) + 1
    value = measure(np.ones(users))
    spread = np.array([measure(drawn) for drawn in draw_users(users, seed=seed, resamples=resamples)])
    low, high = np.nanquantile(spread, [0.025, 0.975], axis=0)
    found = [Interval(*map(float, ends)) for ends in zip(value, low, high, strict=True)]
    return {"auc": found[0], "tpr": found[1] if outside * FPR >= 1 else None}


def _promise_for_records(unit: str, epsilon: float | None, delta: float | None) -> dict[str, float | None]:
    """What is promised of one record; at unit user it is part of two steps: its user leaves, and comes back without."""
    if epsilon is None or delta is None:
        return _limit(None, None)
    if unit == "record":
        return _limit(epsilon, delta)
    return _limit(2 * epsilon, min(1.0, delta * (1 + math.exp(min(epsilon, 50.0)))))


def _promise_for_users(unit: str, epsilon: float | None, delta: float | None) -> dict[str, float | None]:
    """What is promised of one user: nothing at unit record."""
    return _limit(epsilon, delta) if unit == "user" else _limit(None, None)


def _limit(epsilon: float | None, delta: float | None) -> dict[str, float | None]:
    """The promise, and the TPR no attack may exceed at ``FPR`` under it: e^epsilon FPR + delta."""
    if epsilon is None or delta is None:
        return {"epsilon": None, "delta": None, "tpr_limit": None}
    return {"epsilon": epsilon, "delta": delta, "tpr_limit": min(1.0, math.exp(min(epsilon, 50.0)) * FPR + delta)}


def _mean(seeds: Sequence[dict[str, dict[str, Scores]]]) -> dict[str, Any]:
    """Mean over the seeds, as JSON."""
    return {
        target: {
            attack: {name: _mean_interval([seed[target][attack][name] for seed in seeds]) for name in each}
            for attack, each in attacks.items()
        }
        for target, attacks in seeds[0].items()
    }


def _mean_interval(intervals: Sequence[Interval | None]) -> dict[str, float] | None:
    known = [each for each in intervals if each is not None]
    return asdict(mean_over_seeds(known)) if len(known) == len(intervals) else None
