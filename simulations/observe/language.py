"""The observer of task ``generation``: how likely held-out responses are, with and without private parts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from client.personal.personalize import check_task, fit_lora
from client.training.site import TextFeatures, asked_with_profiles
from shared.config import Scenario
from shared.datasets import Dataset, Record, UserData
from shared.datasets.candidates import with_candidates
from shared.errors import ScenarioError
from shared.heads.adapter import Arrays, load_shared, load_start, read_shared, read_start
from shared.heads.causal import CausalHead
from shared.heads.scoring import response_scores
from shared.metrics.language import (
    LANGUAGE_METRICS,
    NEXT_UTTERANCE,
    TokenScores,
    perplexity_difference,
    score_tokens,
)
from shared.metrics.ratings import Described, Interval
from shared.privacy.noise import seeded_generator
from shared.progress import track
from simulations.observe.next_utterance import NextUtterance

PROFILE = " + profile"  # of a row whose prompts have before them what [prompt] says
SWAPPED = "personal of another"  # row of private parts on the records of a user they were not fitted to


class LanguageObserver:
    """Evaluates shared arrays on held-out responses, and those of users after fine-tuning on their own.

    Args:
        head: A head of the campaign at its public start; its trainable tensors are overwritten.
        quiet: No progress on stderr.

    Raises:
        ScenarioError: The personal method has no form for language models, or there is nobody to swap private parts
            with.
    """

    def __init__(
        self, head: CausalHead, texts: TextFeatures, dataset: Dataset, scenario: Scenario, *, quiet: bool = False
    ) -> None:
        if scenario.evaluation.candidates:
            dataset = with_candidates(dataset, count=scenario.evaluation.candidates)
        self._quiet = quiet
        self.head: CausalHead = head
        self._texts, self._dataset, self._scenario = texts, dataset, scenario
        self._start = read_shared(head)
        self._public = read_start(head)
        check_task(scenario.personal.method, scenario.task.name)
        self._profiled: tuple[Dataset, TextFeatures] | None = None
        if scenario.prompt.used:
            with_profiles = asked_with_profiles(dataset, scenario)
            self._profiled = with_profiles, TextFeatures(head.base[0], scenario, with_profiles, quiet=quiet)
        self._candidates: dict[str, NextUtterance] = {}
        if scenario.evaluation.candidates:
            self._candidates = {
                addition: NextUtterance(head.base[0], scenario, shown, quiet=quiet)
                for addition, (shown, _) in self._prompts().items()
            }
        self._test_users = np.array([i for i, user in enumerate(dataset.users) for _ in user.test], dtype=np.int64)
        if scenario.evaluation.swapped and len(dataset.users) < 2:
            raise ScenarioError(f"evaluation.swapped needs two users or more, got {len(dataset.users)}; set it false.")
        self._other = another(len(dataset.users), seed=scenario.seed)

    def asked(self) -> dict[str, Dataset]:
        """What is added to a row's name -> the users with the test prompts of such rows."""
        return {addition: dataset for addition, (dataset, _) in self._prompts().items()}

    @property
    def metrics(self) -> Mapping[str, Described]:  # noqa: D102
        return {**LANGUAGE_METRICS, **(NEXT_UTTERANCE if self._candidates else {})}

    def validate(self, arrays: Arrays) -> dict[str, float | None]:
        """Perplexity of ``federated``; fine-tuning everybody every round would cost more than the federation."""
        load_shared(self.head, arrays)
        scores = self._evaluate([r for user in self._dataset.users for r in user.validation])
        return {"federated": scores.perplexity, "personal": None}

    def baselines(self) -> dict[str, TokenScores]:  # noqa: D102
        load_start(self.head, self._public)
        return self._shared("base", self._start) | self._personal("local", self._start)

    def federated(self, arrays: Arrays) -> dict[str, TokenScores]:  # noqa: D102
        return self._shared("federated", arrays) | self._personal("personal", arrays)

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
        """The LoRA of one user; see ``fine_tuned``."""
        return fine_tuned(self.head, arrays, self._texts, self._dataset, self._scenario, user=user)

    def _shared(self, name: str, arrays: Arrays) -> dict[str, TokenScores]:
        """The row of shared arrays, and with what stands before the users' prompts."""
        load_shared(self.head, arrays)
        return {
            name + addition: self._test(_all(dataset, lambda user: user.test), texts, addition)
            for addition, (dataset, texts) in self._prompts().items()
        }

    def _personal(self, name: str, arrays: Arrays) -> dict[str, TokenScores]:
        """The same of every user's own tensors."""
        prompts = self._prompts()
        parts: dict[str, list[TokenScores]] = {name + addition: [] for addition in prompts}
        users = track(self._dataset.users, description="fine-tuning", unit="user", quiet=self._quiet)
        swapped: dict[int, TokenScores] = {}
        for i, _ in enumerate(users):
            load_shared(self.head, self.private_arrays(arrays, i))
            for addition, (dataset, texts) in prompts.items():
                parts[name + addition].append(self._test(dataset.users[i].test, texts, addition))
            if name == "personal" and self._scenario.evaluation.swapped:
                other = self._other[i]
                swapped[other] = self._test(self._dataset.users[other].test, self._texts, "")
        if swapped:
            parts[SWAPPED] = [swapped[i] for i in sorted(swapped)]
        return {row: TokenScores.joined(of_users) for row, of_users in parts.items()}

    def _prompts(self) -> dict[str, tuple[Dataset, TextFeatures]]:
        """What is added to a row's name -> the users with such prompts, and the outputs of their texts."""
        plain = {"": (self._dataset, self._texts)}
        return plain | ({PROFILE: self._profiled} if self._profiled else {})

    def _test(self, records: Sequence[Record], texts: TextFeatures, addition: str) -> TokenScores:
        """As ``_evaluate``, and whether test responses are told from their candidates, where those are asked for."""
        scores = self._evaluate(records, texts)
        return self._candidates[addition].told(self.head, scores, records) if self._candidates else scores

    def _evaluate(self, records: Sequence[Record], texts: TextFeatures | None = None) -> TokenScores:
        """Likelihood of every record's response at the head's present parameters, in the records' order."""
        texts = texts or self._texts
        micro_batch = self._scenario.performance.micro_batch
        return response_scores(self.head, texts.of(records), texts.targets(records), micro_batch=micro_batch)


def fine_tuned(
    head: CausalHead, arrays: Arrays, texts: TextFeatures, dataset: Dataset, scenario: Scenario, *, user: int
) -> Arrays:
    """The private tensors of one user, fine-tuned from shared arrays on all of the user's training rows."""
    records = dataset.users[user].train
    order = seeded_generator(seed=scenario.seed, purpose="fine-tuning", device=user, round_number=0)
    return fit_lora(
        head, arrays, texts.of(records), texts.targets(records), personal=scenario.personal, generator=order
    )


def another(users: int, *, seed: int) -> list[int]:
    """For each of so many users another one, drawn, nobody twice.

    Example:
        >>> found = another(5, seed=1)
        >>> sorted(found), any(i == other for i, other in enumerate(found))
        ([0, 1, 2, 3, 4], False)
    """
    order = np.random.default_rng(seed).permutation(users)
    found = np.empty(users, dtype=np.int64)
    found[order] = np.roll(order, 1)  # one cycle through everybody
    return [int(other) for other in found]


def _all(dataset: Dataset, part: Callable[[UserData], Sequence[Record]]) -> list[Record]:
    return [record for user in dataset.users for record in part(user)]
