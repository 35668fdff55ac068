"""The observer of task ``generation``: how likely held-out responses are, with and without private parts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from client.personalize import check_task, fit_lora
from client.site import TextFeatures
from shared.adapter import Arrays, load_shared, load_start, read_shared, read_start
from shared.config import Scenario
from shared.datasets import Dataset, Record, UserData
from shared.head import CausalHead
from shared.language_metrics import LANGUAGE_METRICS, TokenScores, perplexity_difference, score_tokens
from shared.metrics import Described, Interval
from shared.noise import seeded_generator
from shared.progress import track
from shared.scoring import response_scores


class LanguageObserver:
    """Evaluates shared arrays on held-out responses, and those of users after fine-tuning on their own.

    Args:
        head: A head of the campaign at its public start; its trainable tensors are overwritten.
        quiet: No progress on stderr.

    Raises:
        ScenarioError: The personal method has no form for language models.
    """

    def __init__(
        self, head: CausalHead, texts: TextFeatures, dataset: Dataset, scenario: Scenario, *, quiet: bool = False
    ) -> None:
        self._quiet = quiet
        self.head: CausalHead = head
        self._texts, self._dataset, self._scenario = texts, dataset, scenario
        self._start = read_shared(head)
        self._public = read_start(head)
        check_task(scenario.personal.method, scenario.task.name)
        self._test_users = np.array([i for i, user in enumerate(dataset.users) for _ in user.test], dtype=np.int64)

    @property
    def metrics(self) -> Mapping[str, Described]:  # noqa: D102
        return LANGUAGE_METRICS

    def validate(self, arrays: Arrays) -> dict[str, float | None]:
        """Perplexity of ``federated``; fine-tuning everybody every round would cost more than the federation."""
        load_shared(self.head, arrays)
        scores = self._evaluate([r for user in self._dataset.users for r in user.validation])
        return {"federated": scores.perplexity, "personal": None}

    def baselines(self) -> dict[str, TokenScores]:  # noqa: D102
        load_start(self.head, self._public)
        return {"base": self._shared(self._start), "local": self._personal(self._start)}

    def federated(self, arrays: Arrays) -> dict[str, TokenScores]:  # noqa: D102
        return {"federated": self._shared(arrays), "personal": self._personal(arrays)}

    def score(self, row: Any, *, reference: Any, seed: int, resamples: int) -> dict[str, Interval]:  # noqa: D102
        return score_tokens(row, self._test_users, reference=reference, seed=seed, resamples=resamples)

    def difference(self, a: Any, b: Any, *, seed: int, resamples: int) -> Interval:  # noqa: D102
        return perplexity_difference(a, b, self._test_users, seed=seed, resamples=resamples)

    def per_user(self, row: Any) -> np.ndarray:  # noqa: D102
        nll, tokens, _ = row.of_users(self._test_users)
        return np.asarray(np.exp(nll / tokens))

    def scored_users(self) -> np.ndarray:  # noqa: D102
        return np.unique(self._test_users)

    def losses(self, arrays: Arrays, records: Sequence[Record]) -> np.ndarray:
        """Mean loss per token of each response."""
        load_shared(self.head, arrays)
        scores = self._evaluate(records)
        return np.asarray(scores.nll / np.maximum(scores.tokens, 1))

    def reference_losses(self, records: Sequence[Record], *, half: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Of the base as published, which nobody's records have trained.

        Source:
            Mireshghallah et al. 2022, arXiv:2203.03929: a pretrained model as the reference of a fine-tuned one.
        """
        del half, known
        return self.losses(self._start, records)

    def private_arrays(self, arrays: Arrays, user: int) -> Arrays:
        """The LoRA of one user, fine-tuned from shared arrays on all of the user's training rows."""
        records = self._dataset.users[user].train
        order = seeded_generator(seed=self._scenario.seed, purpose="fine-tuning", device=user, round_number=0)
        return fit_lora(
            self.head,
            arrays,
            self._texts.of(records),
            self._texts.targets(records),
            personal=self._scenario.personal,
            generator=order,
        )

    def _shared(self, arrays: Arrays) -> TokenScores:
        load_shared(self.head, arrays)
        return self._evaluate(_all(self._dataset, lambda user: user.test))

    def _personal(self, arrays: Arrays) -> TokenScores:
        parts = []
        users = track(self._dataset.users, description="fine-tuning", unit="user", quiet=self._quiet)
        for i, user in enumerate(users):
            load_shared(self.head, self.private_arrays(arrays, i))
            parts.append(self._evaluate(user.test))
        return TokenScores(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("nll", "tokens", "hits")))

    def _evaluate(self, records: Sequence[Record]) -> TokenScores:
        """Likelihood of every record's response at the head's present parameters, in the records' order."""
        features, targets = self._texts.of(records), self._texts.targets(records)
        micro_batch = self._scenario.performance.micro_batch
        return response_scores(self.head, features, targets, micro_batch=micro_batch)


def _all(dataset: Dataset, part: Callable[[UserData], Sequence[Record]]) -> list[Record]:
    return [record for user in dataset.users for record in part(user)]
