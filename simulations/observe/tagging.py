"""The observer of task ``tagging``: how often held-out records get their label, with and without private parts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from client.personal.personalize import check_task, fit_labels
from client.personal.tagging import PrivateTags
from client.training.site import TextFeatures
from shared.config import Scenario
from shared.datasets import Dataset, Record
from shared.errors import DataError
from shared.heads.adapter import Arrays, load_start, read_start
from shared.heads.output import pooled_features
from shared.heads.scoring import cross_entropy, text_predictions
from shared.heads.tagging import TaggingHead
from shared.metrics.ratings import Described, Interval, described, score_row
from shared.metrics.tagging import TAGGING_METRICS, accuracy_difference, score_tags, user_accuracy
from simulations.observe import baselines
from simulations.observe.rows import Rows, lay_out


@dataclass(frozen=True)
class Tags:
    """Predicted labels of the shared part alone and with every user's private part: places in the list, (n,) each."""

    shared: np.ndarray
    personal: np.ndarray


class TaggingObserver:
    """Evaluates shared arrays on held-out labels, with and without a private part fitted per user.

    Args:
        head: A head of the campaign at its public start; its trainable tensors are overwritten.

    Raises:
        DataError: A record's target is no place of ``task.labels``.
        ScenarioError: The personal method has no form for this task.
    """

    def __init__(
        self, head: TaggingHead, texts: TextFeatures, dataset: Dataset, scenario: Scenario, *, quiet: bool = False
    ) -> None:
        del quiet  # everybody is fitted in seconds
        check_task(scenario.personal.method, scenario.task.name)
        self.head: TaggingHead = head
        self._texts, self._scenario, self._dataset = texts, scenario, dataset
        self._labels = len(scenario.task.labels)
        self._start = read_start(head)
        self.fit, self.validation, self.train, self.test = (
            lay_out(dataset, texts.row, part)
            for part in (lambda u: u.fit, lambda u: u.validation, lambda u: u.train, lambda u: u.test)
        )
        for rows in (self.train, self.test):
            if not np.isin(rows.target, np.arange(self._labels)).all():
                raise DataError(
                    f"the target of a record must be a place in task.labels, 0 to {self._labels - 1}, in "
                    f"{dataset.name} one is not; list every label of the data."
                )

    @property
    def metrics(self) -> Mapping[str, Described]:  # noqa: D102
        return dict(TAGGING_METRICS) | {name: described(name) for name in self._scenario.evaluation.metrics}

    def validate(self, arrays: Arrays) -> dict[str, float]:  # noqa: D102
        seen = self.predict(arrays, known=self.fit, asked=self.validation)
        truth = self.validation.target
        return {"federated": float(np.mean(seen.shared == truth)), "personal": float(np.mean(seen.personal == truth))}

    def baselines(self) -> dict[str, np.ndarray]:  # noqa: D102
        train, test, labels = self.train, self.test, self._labels
        bare = self.bare_features()
        public_start = np.zeros((len(bare), labels))  # no federation, nothing sent
        return {
            "constant": baselines.constant_label(train, test, labels=labels),
            "user-majority": baselines.user_majority(train, test, labels=labels),
            "pooled": baselines.pooled_logits(bare, train, labels=labels, ridge=1.0)[test.text].argmax(1),
            "local": self.personalize(bare, public_start, known=train, asked=test).personal,
        }

    def bare_features(self) -> np.ndarray:
        """Pooled features (M, d) of every distinct text at the public start, where LoRA changes nothing."""
        load_start(self.head, self._start)
        return pooled_features(self.head, self._texts.all)

    def federated(self, arrays: Arrays) -> dict[str, np.ndarray]:  # noqa: D102
        seen = self.predict(arrays, known=self.train, asked=self.test)
        return {"federated": seen.shared, "personal": seen.personal}

    def cold_rows(self, arrays: Arrays, counts: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
        """Test rows where every user has only so many training rows; see ``simulations.cold_start``."""
        bare = self.bare_features()
        start, (features, shared) = np.zeros((len(bare), self._labels)), self.text_predictions(arrays)
        rows = {}
        for count in counts:
            known = self.train.first(count)
            seen = self.personalize(features, shared, known=known, asked=self.test)
            local = self.personalize(bare, start, known=known, asked=self.test)
            rows[count] = {"federated": seen.shared, "local": local.personal, "personal": seen.personal}
        return rows

    def score(self, row: Any, *, reference: Any, seed: int, resamples: int) -> dict[str, Interval]:  # noqa: D102
        settings: dict[str, Any] = {"reference": reference, "seed": seed, "resamples": resamples}
        found = score_tags(row, self.test.target, self.test.user, labels=self._labels, **settings)
        others = self._scenario.evaluation.metrics
        return found | score_row(row, self.test.target, self.test.user, metrics=others, **settings)

    def difference(self, a: Any, b: Any, *, seed: int, resamples: int) -> Interval:  # noqa: D102
        return accuracy_difference(a, b, self.test.target, self.test.user, seed=seed, resamples=resamples)

    def per_user(self, row: Any) -> np.ndarray:  # noqa: D102
        return user_accuracy(row, self.test.target, self.test.user)

    def scored_users(self) -> np.ndarray:  # noqa: D102
        return np.unique(self.test.user)

    def losses(self, arrays: Arrays, records: Sequence[Record]) -> np.ndarray:  # noqa: D102
        _, shared = self.text_predictions(arrays)
        return cross_entropy(shared[self._texts.rows(records)], np.array([record.target for record in records]))

    def reference_losses(self, records: Sequence[Record], *, half: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Cross-entropy of the row ``pooled``, fitted to the known records of the other half of the users."""
        text, target = np.array(self._texts.rows(records)), np.array([record.target for record in records])
        bare, losses = self.bare_features(), np.empty(len(records))
        for side in (0, 1):
            at, asked = known & (half != side), half == side
            logits = baselines.pooled_logits(bare, Rows(text[at], target[at], half[at]), labels=self._labels, ridge=1.0)
            losses[asked] = cross_entropy(logits[text[asked]], target[asked])
        return losses

    def predict(self, arrays: Arrays, *, known: Rows, asked: Rows) -> Tags:
        """Fit every user's private part on the rows known, predict the rows asked."""
        features, shared = self.text_predictions(arrays)
        return self.personalize(features, shared, known=known, asked=asked)

    def personalize(self, features: np.ndarray, shared: np.ndarray, *, known: Rows, asked: Rows) -> Tags:
        """Labels with the scenario's private part, wherever the shared logits (M, K) of the texts come from."""
        features = features.astype(np.float64)  # once, not once a user
        found = np.empty(len(asked.text), dtype=np.int64)
        for user in range(len(self._dataset.users)):
            rows = known.of(user)
            private = self._fit(features, shared, known.text[rows], known.target[rows])
            text = asked.text[asked.of(user)]
            found[asked.of(user)] = private.predict(features[text], shared[text]).argmax(1)
        return Tags(shared[asked.text].argmax(1), found)

    def _fit(self, features: np.ndarray, shared: np.ndarray, text: np.ndarray, targets: np.ndarray) -> PrivateTags:
        return fit_labels(self.head, features[text], shared[text], targets, personal=self._scenario.personal)

    def text_predictions(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features (M, d) and shared logits (M, K) of every distinct text."""
        return text_predictions(self.head, arrays, self._texts.all)

    def private_output(self, arrays: Arrays, user: int) -> PrivateTags:
        """The private part of one user, fitted on all of the user's training rows."""
        features, shared = self.text_predictions(arrays)
        rows = self.train.of(user)
        return self._fit(features, shared, self.train.text[rows], self.train.target[rows])
