"""The observer of task ``preference``: how often the answer a user chose gains on the other, on held-out pairs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from client.personal.personalize import check_task
from client.training.site import TextFeatures
from shared.config import Scenario
from shared.datasets import Dataset, Record
from shared.heads.adapter import Arrays, load_shared, load_start, read_shared, read_start
from shared.heads.preference import PreferenceHead
from shared.heads.scoring import pair_scores
from shared.metrics.preference import PREFERENCE_METRICS, PairScores, accuracy_difference, by_user, score_pairs
from shared.metrics.ratings import Described, Interval
from shared.progress import track
from simulations.observe.language import fine_tuned


class PreferenceObserver:
    """Evaluates shared arrays on held-out pairs, and those of users after fine-tuning on their own.

    Args:
        head: A head of the campaign at its public start; its trainable tensors are overwritten.
        quiet: No progress on stderr.

    Raises:
        ScenarioError: The personal method has no form for language models.
    """

    def __init__(
        self, head: PreferenceHead, texts: TextFeatures, dataset: Dataset, scenario: Scenario, *, quiet: bool = False
    ) -> None:
        self._quiet = quiet
        self.head: PreferenceHead = head
        self._texts, self._dataset, self._scenario = texts, dataset, scenario
        self._start = read_shared(head)
        self._public = read_start(head)
        check_task(scenario.personal.method, scenario.task.name)
        self._test_users = np.array([i for i, user in enumerate(dataset.users) for _ in user.test], dtype=np.int64)

    @property
    def metrics(self) -> Mapping[str, Described]:  # noqa: D102
        return PREFERENCE_METRICS

    def validate(self, arrays: Arrays) -> dict[str, float | None]:
        """Accuracy of ``federated``; fine-tuning everybody every round would cost more than the federation."""
        load_shared(self.head, arrays)
        scores = self._evaluate([r for user in self._dataset.users for r in user.validation])
        return {"federated": float(np.mean(scores.right)), "personal": None}

    def baselines(self) -> dict[str, PairScores]:  # noqa: D102
        load_start(self.head, self._public)
        test = self._evaluate([record for user in self._dataset.users for record in user.test])
        base = PairScores(test.reference, test.reference, test.beta)  # not what rounding makes of it
        return {"base": base, "local": self._personal(self._start)}

    def federated(self, arrays: Arrays) -> dict[str, PairScores]:  # noqa: D102
        load_shared(self.head, arrays)
        shared = self._evaluate([record for user in self._dataset.users for record in user.test])
        return {"federated": shared, "personal": self._personal(arrays)}

    def score(self, row: Any, *, reference: Any, seed: int, resamples: int) -> dict[str, Interval]:  # noqa: D102
        return score_pairs(row, self._test_users, reference=reference, seed=seed, resamples=resamples)

    def difference(self, a: Any, b: Any, *, seed: int, resamples: int) -> Interval:  # noqa: D102
        return accuracy_difference(a, b, self._test_users, seed=seed, resamples=resamples)

    def per_user(self, row: Any) -> np.ndarray:  # noqa: D102
        return by_user(self._test_users, row.right) / by_user(self._test_users, np.ones(len(self._test_users)))

    def scored_users(self) -> np.ndarray:  # noqa: D102
        return np.unique(self._test_users)

    def losses(self, arrays: Arrays, records: Sequence[Record]) -> np.ndarray:
        """Loss of each pair."""
        load_shared(self.head, arrays)
        return self._evaluate(records).losses

    def reference_losses(self, records: Sequence[Record], *, half: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Of the base as published: the same for every pair, so that the loss itself is compared."""
        del half, known
        return np.full(len(records), np.log(2.0))

    def private_arrays(self, arrays: Arrays, user: int) -> Arrays:
        """The LoRA of one user; see ``fine_tuned``."""
        return fine_tuned(self.head, arrays, self._texts, self._dataset, self._scenario, user=user)

    def _personal(self, arrays: Arrays) -> PairScores:
        parts = []
        users = track(self._dataset.users, description="fine-tuning", unit="user", quiet=self._quiet)
        for i, user in enumerate(users):
            load_shared(self.head, self.private_arrays(arrays, i))
            parts.append(self._evaluate(user.test))
        margin, reference = (np.concatenate([getattr(p, name) for p in parts]) for name in ("margin", "reference"))
        return PairScores(margin, reference, self.head.beta)

    def _evaluate(self, records: Sequence[Record]) -> PairScores:
        """Margins of every record's answers at the head's present parameters, in the records' order."""
        features, targets = self._texts.of(records), self._texts.targets(records)
        return pair_scores(self.head, features, targets, micro_batch=self._scenario.performance.micro_batch)
