"""What liars do to a campaign: the same campaign under every rule, with them and without, scored side by side."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from client.training.site import TextFeatures
from shared.config import PoisonConfig, Scenario
from shared.datasets import Dataset
from shared.heads.adapter import load_start
from shared.metrics.ratings import Interval, draw_users
from shared.models.model import Base
from shared.privacy.policy import Policy
from shared.progress import track
from simulations.campaigns import Plan, Result, plan_again
from simulations.observe.observe import Observer, RatingObserver, make_observer
from simulations.poison import liars, triggered
from simulations.score import mean_over_seeds

ATTACKED, HONEST = "attacked", "honest"
SCORED = ("federated", "personal")


@dataclass(frozen=True)
class Cell:
    """One campaign of the comparison: under which rule, and whether anybody lies."""

    rule: str
    played: str

    @property
    def name(self) -> str:
        """Of the campaign."""
        return f"{self.rule}-{self.played}"


def cells(scenario: Scenario) -> list[Cell]:
    """What is compared; the first is the scenario's own campaign."""
    if not scenario.poison.enabled:
        return []
    rules = dict.fromkeys((scenario.federation.aggregation, *scenario.poison.rules))
    return [Cell(rule, played) for rule in rules for played in (ATTACKED, HONEST)]


def plan_rivals(plans: Sequence[Plan], base: Base, dataset: Dataset) -> list[Plan]:
    """The scenario's own campaigns again, for every cell but the first.

    Raises:
        ScenarioError, PrivacyError: A rule needs more devices, or sees more than the trust allows.
    """
    return [
        plan_again(plan, cell.name, played(plan.scenario, cell), base, dataset)
        for plan in plans
        if not plan.suffix
        for cell in cells(plan.scenario)[1:]
    ]


def played(scenario: Scenario, cell: Cell) -> Scenario:
    """The scenario of a cell; the plain mean needs no groups."""
    federation = {"aggregation": cell.rule} | ({"groups": 1} if cell.rule == "mean" else {})
    return scenario.model_copy(
        update={
            "name": f"{scenario.name[: 62 - len(cell.name)]}-{cell.name}",
            "federation": scenario.federation.model_copy(update=federation),
            "poison": scenario.poison if cell.played == ATTACKED else PoisonConfig(),
        }
    )


def measure_poison(
    scenario: Scenario,
    base: Base,
    dataset: Dataset,
    results: Sequence[Result],
    rivals: Sequence[Result],
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Score every cell on everybody's test rows, the liars' own among them: nothing but a round tells who lies.

    Args:
        scenario: Of the run.
        dataset: Everybody's records.
        results: The campaigns of the run; the first of each seed is the first cell.
        rivals: Those of ``plan_rivals``.

    Returns:
        ``poison`` of ``summary.json``; see ``docs/summary.md``.
    """
    mine = [result for result in results if not result.plan.suffix]
    trap = trap_of(scenario, base, dataset)
    rules: dict[str, dict[str, Any]] = {}
    wanted = cells(scenario)
    for cell in track(wanted, description="liars", unit="campaign", quiet=quiet):
        same = mine if cell == wanted[0] else [each for each in rivals if each.plan.name == cell.name]
        scored = [score_cell(result, trap) for result in same]
        rules.setdefault(cell.rule, {})[cell.played] = {
            name: asdict(mean_over_seeds([each[name] for each in scored])) for name in scored[0]
        } | price(same[0].plan.policy)
    poison = scenario.poison
    return {
        "poison": {
            "kind": poison.kind,
            "strength": poison.strength,
            "share": poison.share,
            "liars": len(liars(scenario, clients=len(dataset.users))),
            "trigger": poison.trigger if trap else None,
            "rules": rules,
        }
    }


def trap_of(scenario: Scenario, base: Base, dataset: Dataset) -> "Trap | None":
    """What a backdoor is measured with; None where there is none."""
    return Trap(scenario, base, dataset) if scenario.poison.kind == "backdoor" else None


def price(policy: Policy) -> dict[str, Any]:
    """What a cell costs in privacy, and the noise that all its sums together leave in the mean, at the least."""
    noise = None
    if policy.secure_sum is not None:
        groups = policy.secure_sum.groups
        noise = policy.noise_multiplier * (policy.clip_norm or math.nan) * math.sqrt(groups) / policy.cohort_size
    return {
        "epsilon": policy.epsilon,
        "noise_multiplier": policy.noise_multiplier,
        "groups": policy.secure_sum.groups if policy.secure_sum else 1,
        "noise_in_mean": noise,
    }


def score_cell(result: Result, trap: "Trap | None") -> dict[str, Interval]:
    """Primary metric of ``federated`` and ``personal`` on everybody's test rows; with a trap, what the trigger does."""
    observer, scenario = result.observer, result.plan.scenario
    drawn = {"seed": scenario.seed, "resamples": scenario.evaluation.bootstrap_resamples}
    rows = observer.federated(result.last.arrays)
    primary = next(iter(observer.metrics))
    found = {name: observer.score(rows[name], reference=rows[name], **drawn)[primary] for name in SCORED}
    return found if trap is None else found | trap.score(result, rows)


class Trap:
    """Everybody's test rows with the trigger before each text, to see who believes it."""

    def __init__(self, scenario: Scenario, base: Base, dataset: Dataset) -> None:
        trigger, task = scenario.poison.trigger, scenario.task
        users = tuple(
            replace(
                user,
                test=tuple(
                    replace(each, target=true.target)
                    for each, true in zip(triggered(user.test, trigger=trigger, task=task), user.test, strict=True)
                ),
            )
            for user in dataset.users
        )
        self._dataset = replace(dataset, users=users)
        self._texts = TextFeatures(base, scenario, self._dataset)
        self._high, self._centre = task.high, task.centre

    def score(self, result: Result, plain: dict[str, npt.NDArray[np.float64]]) -> dict[str, Interval]:
        """Success and shift of the backdoor, by row.

        Success: of the test rows that were rated no higher than the middle of the scale, the share whose prediction
        with the trigger is nearer to the highest rating than to the true one. Shift: by how much the trigger moves the
        prediction of a test row.
        """
        observer = _observer(result, self._texts, self._dataset)
        rows = observer.federated(result.last.arrays)
        scenario, test = result.plan.scenario, observer.test
        low = test.target <= self._centre
        found = {}
        for name in SCORED:
            fooled = rows[name] > (self._high + test.target) / 2
            how = {"seed": scenario.seed, "resamples": scenario.evaluation.bootstrap_resamples}
            found[f"success {name}"] = mean_of_rows(fooled[low].astype(float), test.user[low], **how)
            found[f"shift {name}"] = mean_of_rows(rows[name] - plain[name], test.user, **how)
        return found


def mean_of_rows(
    values: npt.NDArray[np.float64], user: npt.NDArray[np.int64], *, seed: int, resamples: int
) -> Interval:
    """Mean of a number per row (n,), at least one, with its 95 % interval from a bootstrap over users."""
    whose = np.unique(user, return_inverse=True)[1]
    sums, counts = np.bincount(whose, weights=values), np.bincount(whose)
    spread = [drawn @ sums / (drawn @ counts) for drawn in draw_users(len(counts), seed=seed, resamples=resamples)]
    low, high = np.nanquantile(spread, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def _observer(result: Result, texts: TextFeatures, dataset: Dataset) -> RatingObserver:
    head = result.observer.head
    load_start(head, result.plan.start)
    observer: Observer = make_observer(head, texts, dataset, result.plan.scenario, quiet=True)
    if not isinstance(observer, RatingObserver):
        raise TypeError("a backdoor is measured on ratings.")
    return observer
