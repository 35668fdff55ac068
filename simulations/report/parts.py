"""Parts of ``summary.json`` that have a section of the report of their own; ``docs/summary.md`` explains every key."""

from collections.abc import Sized
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, FiniteFloat, NonNegativeInt, model_validator

from shared.metrics.ratings import Interval


def _finite(interval: Interval) -> Interval:
    if not np.isfinite([interval.value, interval.low, interval.high]).all():
        raise ValueError("value, low and high must be finite")
    return interval


Checked = Annotated[Interval, AfterValidator(_finite)]


class Part(BaseModel):
    """A part of a file."""

    # A newer writer may add keys: they are kept, and shown where a whole part is shown.
    model_config = ConfigDict(extra="allow", frozen=True)


class AttackScore(Part):
    """How well a membership attack does: AUC, and TPR at the FPR of the attack, null where that is out of reach."""

    auc: Checked
    tpr: Checked | None


class AttackOn(Part):
    """A membership attack on records or on users: target -> attack -> score; its null check and its control."""

    members: int
    non_members: int
    users: int
    interval: str
    epsilon: FiniteFloat | None
    delta: FiniteFloat | None
    tpr_limit: FiniteFloat | None
    attacked: dict[str, dict[str, AttackScore]]

    @model_validator(mode="after")
    def _has_controls(self) -> Self:
        if not all(self.attacked.get(target) for target in ("unprotected", "untrained")):
            raise ValueError("an attack must have been made without privacy, and on the untrained start")
        return self

    def biased(self) -> list[str]:
        """Attacks that tell members from others where nothing was trained."""
        return [
            name for name, score in self.attacked["untrained"].items() if not score.auc.low <= 0.5 <= score.auc.high
        ]

    def detected(self, target: str) -> list[str]:
        """Attacks that tell members from others in a target, by more than their bias."""
        floor = {name: self.attacked["untrained"][name].auc.high for name in self.biased()}
        return [
            name
            for name, score in self.attacked.get(target, {}).items()
            if score.auc.low > max(0.5, floor.get(name, 0.5))
        ]


class Membership(Part):
    """The membership attack on the shared arrays of the run."""

    held_out_share: FiniteFloat
    fpr: FiniteFloat = Field(gt=0, lt=1)
    records: AttackOn
    users: AttackOn | None = None


class Poisoned(Part):
    """One campaign under one rule, with liars or without; the backdoor's numbers where there was one."""

    federated: Checked
    personal: Checked
    epsilon: FiniteFloat | None
    groups: int
    noise_in_mean: FiniteFloat | None = None
    success_federated: Checked | None = Field(default=None, alias="success federated")
    success_personal: Checked | None = Field(default=None, alias="success personal")
    shift_federated: Checked | None = Field(default=None, alias="shift federated")
    shift_personal: Checked | None = Field(default=None, alias="shift personal")


class Poison(Part):
    """Devices that lie: rule -> ``attacked`` or ``honest`` -> what came of it."""

    kind: Literal["sign-flip", "random", "label-flip", "alie", "backdoor"]
    strength: FiniteFloat
    share: FiniteFloat
    liars: NonNegativeInt
    trigger: str | None = None
    rules: dict[str, dict[Literal["attacked", "honest"], Poisoned]] = Field(min_length=1)

    @model_validator(mode="after")
    def _has_both(self) -> Self:
        wrong = [rule for rule, played in self.rules.items() if len(played) < 2]
        if wrong:
            raise ValueError(f"every rule must have been played with liars and without, not so: {', '.join(wrong)}")
        return self


class AnswerMetric(Part):
    """What a score of answers in words means."""

    description: str


class AnswerScores(Part):
    """Answers to the first test prompts of each user: row -> metric -> score, and pairs of rows before a judge."""

    per_user: int
    answers: int
    users: int
    longest: int
    metrics: dict[str, AnswerMetric] = Field(min_length=1)
    rows: dict[str, dict[str, Checked]] = Field(min_length=1)
    judge: str
    win_rates: dict[str, Checked]

    @model_validator(mode="after")
    def _same_metrics(self) -> Self:
        wrong = [row for row, scores in self.rows.items() if scores.keys() != self.metrics.keys()]
        if wrong:
            raise ValueError(f"every row must have a score for each metric, not so: {', '.join(wrong)}")
        return self


class Curve(Part):
    """Primary metric of the same users at every count of own records.

    Attributes:
        users: How many are scored.
        reaching: How many of them have so many records; the others are scored with all they have.
        took_part: Of how many the federation may have seen the records.
        rows: Row -> an interval per count.
        differences: ``a - b`` -> the same on paired resamples.
    """

    users: int
    reaching: list[NonNegativeInt]
    took_part: int
    rows: dict[str, list[Checked]]
    differences: dict[str, list[Checked]]


class ColdStart(Part):
    """Users of whom a device holds only the first few records: ``participants``, and ``set_aside``."""

    counts: list[NonNegativeInt] = Field(min_length=1)
    curves: dict[str, Curve] = Field(min_length=1)

    @model_validator(mode="after")
    def _one_point_per_count(self) -> Self:
        for who, curve in self.curves.items():
            lines: dict[str, Sized] = {"reaching": curve.reaching, **curve.rows, **curve.differences}
            wrong = [name for name, points in lines.items() if len(points) != len(self.counts)]
            if wrong:
                raise ValueError(f"{who} must have {len(self.counts)} points a line, not so: {', '.join(wrong)}")
        return self


class GroupScores(Part):
    """One row by group: means, the gap between best and worst, the gap of one in twenty random regroupings."""

    means: dict[str, Checked]
    gap: Checked | None
    by_chance: FiniteFloat | None


class Groups(Part):
    """The groups of one attribute."""

    users: dict[str, int]
    merged: list[str]
    silent: int
    rows: dict[str, GroupScores]

    @model_validator(mode="after")
    def _same_groups(self) -> Self:
        wrong = [row for row, scores in self.rows.items() if list(scores.means) != list(self.users)]
        if wrong:
            raise ValueError(f"every row must have a mean for each group, not so: {', '.join(wrong)}")
        return self


class Fairness(Part):
    """The worst tenth of the users, and gaps between groups of users who opted in."""

    worst_tenth: dict[str, Checked]
    groups: dict[str, Groups]
