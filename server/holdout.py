"""Public or operator-owned records that every round's shared arrays are scored on: no user's data, no user's metric."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from server.rounds import Score
from shared.assets import resolve
from shared.config import DataConfig, Scenario
from shared.datasets import Record, choose_users, read
from shared.datasets.folder import SUFFIXES, read_folder
from shared.errors import DataError
from shared.heads.adapter import Arrays, load_shared, load_start, within_bound
from shared.heads.head import Head
from shared.heads.pairs import join, joined_labels
from shared.heads.scoring import cross_entropy, pair_scores, response_scores, rmse, text_predictions
from shared.heads.tasks import TASKS, Labels, Scores, Targets
from shared.metrics.tagging import score_tags
from shared.models.features import Features, cached_features
from shared.models.model import Base, load_base
from shared.protocol.campaign import Campaign

_SAMPLE_SEED = 5
MAX_RECORDS = 2_000  # by default; more digits than anybody decides by


@dataclass(frozen=True)
class Holdout:
    """Records to score on.

    Attributes:
        records: At least one.
        source: Where they come from, in words.
    """

    records: tuple[Record, ...]
    source: str

    @property
    def sha256(self) -> str:
        """Hash of everything a score depends on."""
        rows = [[record.text, record.response, record.target] for record in self.records]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_holdout(
    format_name: str,
    source: str,
    *,
    columns: Mapping[str, str] | None = None,
    records: int = MAX_RECORDS,
    data: DataConfig | None = None,
) -> Holdout:
    """Read a hold-out.

    Args:
        format_name: A published format, whose test rows of all users are pooled; or the format of a folder of the
            operator's own records, see ``shared.datasets.folder``.
        source: ``asset:NAME`` or a folder.
        columns: Of own records: what stands in which column.
        records: At most so many; of more, the same random ones every time.
        data: Of the campaign's scenario. Where it sets users aside for tuning, a published hold-out is of them alone:
            whether to go on is a choice too, and it must not be made on the campaign's own users.

    Raises:
        DataError: There is no record, or a file is not as its format says.
        ScenarioError, AssetError, StoreError: No such format, or no such source.
    """
    if not records >= 1:
        raise DataError(f"--holdout-records must be at least 1, got {records}.")
    if format_name in SUFFIXES:
        found: Sequence[Record] = read_folder(Path(source), format=format_name, columns=columns or {}).records
    else:
        dataset = read(format_name, resolve(source))
        if data is not None and data.users != "all":
            dataset = choose_users(dataset, "tuning", tuning_share=data.tuning_share)
        found = [record for user in dataset.users for record in user.test]
    if not found:
        raise DataError(f"a hold-out must hold at least one record, {source} ({format_name}) has none; name another.")
    rows = np.random.default_rng(_SAMPLE_SEED).permutation(len(found))[:records]
    return Holdout(tuple(found[row] for row in np.sort(rows)), f"{source} ({format_name})")


class Examiner:
    """Scores shared arrays on a hold-out: the bare shared part, without anything private.

    The base is loaded and the backbone run once; a score after that touches the head only.

    Args:
        campaign: Whose arrays.
        holdout: The records.
        cache: Folder for backbone outputs of the hold-out, which are as telling as its texts.

    Raises:
        CampaignError: The base is not the campaign's.
        DataError: A record does not fit the task.
    """

    def __init__(self, campaign: Campaign, holdout: Holdout, *, cache: Path) -> None:
        scenario = campaign.scenario
        _check_records(holdout, scenario)
        torch.set_num_threads(scenario.performance.threads)
        base = load_base(resolve(scenario.model.base))
        self.holdout, self._scenario = holdout, scenario
        self._holdout_id = holdout.sha256[:16]
        self._head = campaign.new_head(base)
        load_start(self._head, campaign.start)
        self._features, self._targets = _encode(base, holdout.records, scenario, cache=cache)

    def knows(self, score: Score | None) -> bool:
        """Whether a score is one on this hold-out."""
        return score is not None and score.holdout == self._holdout_id

    def score(self, arrays: Arrays) -> Score:
        """The score of shared arrays; its value is None unless it is finite."""
        others: Mapping[str, float] = {}
        metric, value = _METRIC[self._scenario.task.name], math.nan
        if within_bound(arrays):
            value, others = _SCORERS[self._scenario.task.name](
                self._head, arrays, self._features, self._targets, self._scenario
            )
        return Score(
            metric=metric,
            value=_finite(value),
            records=len(self.holdout.records),
            holdout=self._holdout_id,
            others={name: _finite(other) for name, other in others.items()},
        )


def _check_records(holdout: Holdout, scenario: Scenario) -> None:
    if scenario.task.name == "preference" and not all(r.response and r.rejected for r in holdout.records):
        raise DataError(
            f"a hold-out for task 'preference' must have response and rejected in every record, {holdout.source} has "
            "not."
        )
    if scenario.task.name == "generation" and not all(record.response for record in holdout.records):
        raise DataError(
            f"a hold-out for task 'generation' must have a response in every record, {holdout.source} has not."
        )
    low, high = scenario.task.low, scenario.task.high
    if scenario.task.name == "rating" and not all(low <= record.target <= high for record in holdout.records):
        raise DataError(f"ratings of a hold-out must be from {low:g} to {high:g}, in {holdout.source} one is not.")
    liked = any(record.target >= scenario.task.liked for record in holdout.records)
    if scenario.task.name == "ranking" and not liked:
        raise DataError(
            f"a hold-out must hold a record with a target of task.liked or more, {holdout.source} has none."
        )
    places = range(len(scenario.task.labels))
    if scenario.task.name == "tagging" and not all(record.target in places for record in holdout.records):
        raise DataError(
            f"targets of a hold-out must be places in task.labels, 0 to {len(places) - 1}, in {holdout.source} one is "
            "not."
        )


def _encode(base: Base, records: Sequence[Record], scenario: Scenario, *, cache: Path) -> tuple[Features, Targets]:
    """Backbone outputs and targets of records; equal texts share one array."""
    encoded = TASKS[scenario.task.name](base, [record.key for record in records], scenario)
    blocks = base.head_blocks(scenario.model.head_blocks)
    features = cached_features(base, encoded.token_ids, head_blocks=blocks, cache=cache, quiet=True)
    if encoded.rejected is not None:
        rejected = cached_features(base, encoded.rejected.token_ids, head_blocks=blocks, cache=cache, quiet=True)
        micro_batch = scenario.performance.micro_batch
        return join(base, features, rejected, joined_labels(encoded), blocks=blocks, micro_batch=micro_batch)
    if encoded.labels is not None:
        return features, Labels(encoded.labels)
    return features, Scores([record.target for record in records])


def _score_ratings(
    head: Any, arrays: Arrays, features: Features, targets: Targets, scenario: Scenario
) -> tuple[float, Mapping[str, float]]:
    """RMSE and MAE of predictions clipped to the scale."""
    _, predicted = text_predictions(head, arrays, features)
    predicted = np.clip(predicted, scenario.task.low, scenario.task.high)
    wanted = targets.batch(np.arange(len(targets)), 0).numpy().astype(np.float64)
    return rmse(predicted, wanted), {"mae": float(np.mean(np.abs(predicted - wanted)))}


def _score_labels(
    head: Any, arrays: Arrays, features: Features, targets: Targets, scenario: Scenario
) -> tuple[float, Mapping[str, float]]:
    """Mean cross-entropy, which a go or no-go is judged by; accuracy and macro-F1."""
    _, logits = text_predictions(head, arrays, features)
    wanted = targets.batch(np.arange(len(targets)), 0).numpy().astype(np.int64)
    nobody = np.zeros_like(wanted)  # records of a hold-out are nobody's
    found = score_tags(logits.argmax(1), wanted, nobody, labels=len(scenario.task.labels), seed=0, resamples=1)
    others = {name: found[name].value for name in ("accuracy", "macro_f1")}
    return float(np.mean(cross_entropy(logits, wanted))), others


def _score_responses(
    head: Any, arrays: Arrays, features: Features, targets: Targets, scenario: Scenario
) -> tuple[float, Mapping[str, float]]:
    """Perplexity, and the share of tokens that were the likeliest."""
    load_shared(head, arrays)
    scores = response_scores(head, features, targets, micro_batch=scenario.performance.micro_batch)
    return scores.perplexity, {"token_accuracy": float(scores.hits.sum() / scores.tokens.sum())}


def _score_pairs(
    head: Any, arrays: Arrays, features: Features, targets: Targets, scenario: Scenario
) -> tuple[float, Mapping[str, float]]:
    """Mean loss of DPO; how often the chosen answer gained on the other, and by how much."""
    load_shared(head, arrays)
    scores = pair_scores(head, features, targets, micro_batch=scenario.performance.micro_batch)
    others = {"accuracy": float(np.mean(scores.right)), "reward_margin": float(np.mean(scores.reward))}
    return float(np.mean(scores.losses)), others


def _score_liked(
    head: Any, arrays: Arrays, features: Features, targets: Targets, scenario: Scenario
) -> tuple[float, Mapping[str, float]]:
    """Mean negative log-likelihood of liked texts among the catalogue."""
    _, scores = text_predictions(head, arrays, features)
    wanted = targets.batch(np.arange(len(targets)), 0).numpy()
    return float(np.mean(head.log_sum() - scores[wanted >= scenario.task.liked])), {}


_METRIC = {
    "rating": "rmse",
    "tagging": "cross_entropy",
    "ranking": "cross_entropy",
    "generation": "perplexity",
    "preference": "dpo_loss",
}
_SCORERS: dict[str, Callable[[Head, Arrays, Features, Targets, Scenario], tuple[float, Mapping[str, float]]]] = {
    "rating": _score_ratings,
    "tagging": _score_labels,
    "ranking": _score_liked,
    "generation": _score_responses,
    "preference": _score_pairs,
}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
