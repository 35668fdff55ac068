"""Cold start: every row of a run once more for users of whom a device holds only the first few records."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np

from client.training.site import TextFeatures, resident_dataset
from shared.config import Scenario
from shared.datasets import Dataset
from shared.heads.adapter import Arrays, load_start
from shared.metrics.ratings import Interval
from shared.models.model import Base
from shared.progress import track
from simulations.campaigns import Result
from simulations.observe.observe import Observer, make_observer
from simulations.score import mean_over_seeds

PARTICIPANTS, SET_ASIDE = "participants", "set_aside"  # whose curve: the run's users; those who took part in nothing
_COMPARED = (("personal", "federated"), ("personal", "local"))
Curve = dict[str, list[Interval]]  # row, or pair of rows -> an interval per count
_Found = tuple[Curve, Curve]  # rows, differences


@runtime_checkable
class ColdObserver(Observer, Protocol):
    """An observer whose private parts can be fitted to fewer records."""

    def cold_rows(self, arrays: Arrays, counts: Sequence[int]) -> Mapping[int, dict[str, Any]]:
        """Test rows ``federated``, ``personal`` and ``local`` where every user has only so many training rows.

        Args:
            arrays: Shared arrays.
            counts: How many of a user's training rows, the first in time, the private part is fitted to; a user
                with fewer has all of them.

        Returns:
            Count -> rows; empty where the task's private parts cannot be fitted so.
        """


def measure_cold_start(
    scenario: Scenario, base: Base, dataset: Dataset, results: Sequence[Result], *, quiet: bool = False
) -> dict[str, Any]:
    """The curves of the scenario's own campaign: for its users, and for those whom ``data.users`` sets aside.

    Args:
        scenario: Of the run.
        base: For the texts of users who were set aside.
        dataset: Of the run.
        results: The campaigns of the run.
        quiet: No progress on stderr.

    Returns:
        ``cold_start`` of ``summary.json``, see ``docs/summary.md``; nothing where the task has no such rows.

    Guarantee:
        Every count is scored with the same users, test rows and resamples. With 0 records the row ``personal`` is
        ``federated``, unless users declare their persona; with all of them it is the row of the same name of the run.
    """
    counts = sorted(set(scenario.evaluation.cold_start))
    mine = [result for result in results if not result.plan.suffix]
    if not counts or not isinstance(mine[0].observer, ColdObserver):
        return {}
    parts = {PARTICIPANTS: dataset}
    if scenario.data.users == "campaign":
        parts[SET_ASIDE] = resident_dataset(
            scenario.data.model_copy(update={"users": "tuning"}), held_out=scenario.attack.held_out
        )
    scoring = {"seed": scenario.seed, "resamples": scenario.evaluation.bootstrap_resamples}
    curves: dict[str, dict[str, Any]] = {}
    for who, users in parts.items():
        texts = None if who == PARTICIPANTS else TextFeatures(base, scenario, users)
        seeds = track(mine, description=f"cold start ({who.replace('_', ' ')})", unit="seed", quiet=quiet)
        curve = [_curve(_observer(each, texts, users), each.last.arrays, counts, **scoring) for each in seeds]
        if found := [each for each in curve if each]:
            seen = _took_part(mine, users) if who == PARTICIPANTS else 0
            curves[who] = _reach(users, counts) | {"took_part": seen} | _mean(found)
    return {"cold_start": {"counts": counts, "curves": curves}} if curves else {}


def _observer(result: Result, texts: TextFeatures | None, users: Dataset) -> ColdObserver:
    """The run's own observer; for other users a new one around the same head, which is set back to its start."""
    observer = result.observer
    if texts is not None:
        load_start(observer.head, result.plan.start)
        observer = make_observer(observer.head, texts, users, result.plan.scenario, quiet=True)
    return cast(ColdObserver, observer)


def _curve(observer: ColdObserver, arrays: Arrays, counts: Sequence[int], **scoring: int) -> _Found | None:
    """Primary metric of every row, and its differences between rows, at every count."""
    cold = observer.cold_rows(arrays, counts)
    if not cold:
        return None
    primary = next(iter(observer.metrics))
    rows: Curve = {name: [] for name in cold[counts[0]]}
    differences: Curve = {f"{a} - {b}": [] for a, b in _COMPARED}
    for count in counts:
        for name, row in cold[count].items():
            known = rows[name][:1] if name == "federated" else []  # the shared part does not see the count
            scored = known or [observer.score(row, reference=cold[count]["local"], **scoring)[primary]]
            rows[name] += scored
        for a, b in _COMPARED:
            differences[f"{a} - {b}"].append(observer.difference(cold[count][a], cold[count][b], **scoring))
    return rows, differences


def _took_part(results: Sequence[Result], users: Dataset) -> int:
    """Users with a test row who answered in a round of some seed: the shared part may have seen their records."""
    seats = {seat for result in results for seat, rounds in result.last.answered.items() if rounds}
    return sum(bool(users.users[seat].test) for seat in seats)


def _reach(users: Dataset, counts: Sequence[int]) -> dict[str, Any]:
    """How many users are scored, and how many of them have so many records."""
    sizes = np.array([len(user.train) for user in users.users if user.test])
    return {"users": int(sizes.size), "reaching": [int((sizes >= count).sum()) for count in counts]}


def _mean(found: Sequence[_Found]) -> dict[str, Any]:
    """The mean over seeds, ready for JSON."""

    def over_seeds(each: Sequence[Curve]) -> dict[str, Any]:
        return {
            name: [asdict(mean_over_seeds(point)) for point in zip(*(curve[name] for curve in each), strict=True)]
            for name in each[0]
        }

    rows, differences = zip(*found, strict=True)
    return {"rows": over_seeds(rows), "differences": over_seeds(differences)}
