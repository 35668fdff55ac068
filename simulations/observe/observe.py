"""The observer of a simulation: stands outside the federation, may read everybody's held-out rows, sends nothing in.

It is the only source of metrics; devices reply with none (rule P2).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch

from client.personal.persona import weights_of
from client.personal.personalize import PrivateOutput, fit_private, personal_method, predict_user
from client.runtime.retrieval import Texts
from client.training.site import TextFeatures
from shared.config import PersonaConfig, PersonalConfig, Scenario, TaskConfig
from shared.datasets import Dataset, Record
from shared.heads.adapter import Arrays, forget_device, load_shared, load_start, read_shared, read_start
from shared.heads.head import Head
from shared.heads.output import pooled_features
from shared.heads.rating import RatingHead
from shared.heads.scoring import persona_predictions, rmse, text_predictions
from shared.heads.tasks import Scores
from shared.metrics.ratings import METRICS, Described, Interval, described, paired_difference, score_row, user_rmse
from shared.models.features import Features
from shared.privacy.noise import seeded_generator
from simulations.observe import baselines, dp_statistics
from simulations.observe.language import LanguageObserver
from simulations.observe.preference import PreferenceObserver
from simulations.observe.ranking import RankingObserver
from simulations.observe.rows import Rows, lay_out
from simulations.observe.tagging import TaggingObserver

RATING_METRICS: Mapping[str, Described] = {
    "rmse": Described("root mean squared error, pooled over all test ratings"),
    "mae": Described("mean absolute error, pooled over all test ratings"),
    "accuracy": Described("share of test ratings that equal the prediction rounded to a whole rating", better="more"),
    "user_rmse": Described("RMSE of each user, then the mean over users"),
    "worst_decile": Described("mean of the users' RMSE over the worst tenth of users"),
    "share_gaining": Described("share of users whose RMSE is below that of the row local", better="more"),
}


@dataclass(frozen=True)
class Predictions:
    """Predictions of the shared part alone and with every user's private part, clipped to the scale, (n,) each."""

    shared: np.ndarray
    personal: np.ndarray
    persona: np.ndarray | None = None  # with the user's weights of the personas, where there are any


@dataclass(frozen=True)
class Personas:
    """Predictions (M, K) of every distinct text by each persona, and how a user weighs them."""

    predictions: np.ndarray
    config: PersonaConfig
    profiles: Sequence[Mapping[str, str]]

    def weights(self, user: int, texts: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Of one user (K,) who said so of these texts."""
        return weights_of(self.predictions[texts], targets, persona=self.config, profile=self.profiles[user])


@dataclass(frozen=True)
class Bench:
    """What a personal method without a closed form works with.

    Attributes:
        head: Of the campaign.
        arrays: Shared arrays it held when features were pooled.
        inputs: Prepares the backbone outputs of every distinct text.
        words: Every distinct text.
        seed: Of the order of records.
    """

    head: RatingHead
    arrays: Arrays
    inputs: Callable[[], Features]
    words: Sequence[str]
    seed: int

    def texts(self, features: np.ndarray, shared: np.ndarray) -> Texts:
        """Every distinct text, from features (M, d) and shared predictions (M,), wherever these come from."""
        load_shared(self.head, self.arrays)
        own = self.head.apply_output(features.astype(np.float32), self.head.output_layer())
        return Texts(features, shared, self.words, self.inputs(), shared - own)

    def generator(self, user: int) -> np.random.Generator:
        """Of the order of one user's records."""
        return seeded_generator(seed=self.seed, purpose="fine-tuning", device=user, round_number=0)


class Observer(Protocol):
    """What a run asks of the observer of a task; a row is whatever its ``score`` understands."""

    @property
    def metrics(self) -> Mapping[str, Described]:
        """What ``score`` gives, and which of two values is the better one; the first is the primary metric."""

    @property
    def head(self) -> Head:
        """The head it predicts with."""

    def validate(self, arrays: Arrays) -> Mapping[str, float | None]:
        """Primary metric of ``federated`` and ``personal`` on everybody's validation rows."""

    def baselines(self) -> dict[str, Any]:
        """Test rows that owe nothing to the federation; ``local`` is among them."""

    def federated(self, arrays: Arrays) -> dict[str, Any]:
        """Test rows ``federated`` and ``personal``."""

    def score(self, row: Any, *, reference: Any, seed: int, resamples: int) -> dict[str, Interval]:
        """Every metric of a row; ``reference`` is the row a user gains against."""

    def difference(self, a: Any, b: Any, *, seed: int, resamples: int) -> Interval:
        """Primary metric of row ``a`` minus that of ``b``, on paired resamples."""

    def per_user(self, row: Any) -> np.ndarray:
        """Primary metric of every user with a test row, in ascending order of users."""

    def scored_users(self) -> np.ndarray:
        """Index of every user with a test row, ascending."""

    def losses(self, arrays: Arrays, records: Sequence[Record]) -> np.ndarray:
        """Loss of the shared part on every record (n,), as whoever has the arrays computes it."""

    def reference_losses(self, records: Sequence[Record], *, half: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Loss (n,) of a model that was trained on no record of the same user.

        Args:
            records: Any.
            half: Which half (n,) of the users each is of, 0 or 1.
            known: Which (n,) of them an attacker may train on.
        """


class RatingObserver:
    """Evaluates shared arrays on held-out ratings, with and without a private part fitted per user.

    Args:
        head: A head of the campaign at its public start; its trainable tensors are overwritten.
    """

    def __init__(
        self, head: RatingHead, texts: TextFeatures, dataset: Dataset, scenario: Scenario, *, quiet: bool = False
    ) -> None:
        del quiet  # everybody is fitted in seconds
        self.head: RatingHead = head
        self._texts, self._scenario, self._dataset = texts, scenario, dataset
        self._start = read_start(head)
        self.fit = lay_out(dataset, texts.row, lambda user: user.fit)
        self.validation = lay_out(dataset, texts.row, lambda user: user.validation)
        self.train = lay_out(dataset, texts.row, lambda user: user.train)
        self.test = lay_out(dataset, texts.row, lambda user: user.test)

    @property
    def metrics(self) -> Mapping[str, Described]:  # noqa: D102
        return dict(RATING_METRICS) | {name: described(name) for name in self._scenario.evaluation.metrics}

    def validate(self, arrays: Arrays) -> dict[str, float]:  # noqa: D102
        seen = self.predict(arrays, known=self.fit, asked=self.validation)
        return {
            "federated": rmse(seen.shared, self.validation.target),
            "personal": rmse(seen.personal, self.validation.target),
        }

    def baselines(self) -> dict[str, np.ndarray]:  # noqa: D102
        train, test, task = self.train, self.test, self._scenario.task
        bare = self.bare_features()
        public_start = np.full(len(bare), task.centre)  # no federation, nothing sent
        rows = {
            "constant": baselines.constant(train, test),
            "user-mean": baselines.user_mean(train, test, centre=task.centre),
            "pooled": baselines.pooled(bare, train, test, ridge=1.0),
            "local": self.personalize(bare, public_start, known=train, asked=test).personal,
        }
        if dp_statistics.applies(self._scenario, self._dataset):
            seen = self.personalize(bare, self.statistics(bare, train), known=train, asked=test)
            rows |= {"dp-statistics-shared": seen.shared, "dp-statistics": seen.personal}
        return {name: np.clip(row, task.low, task.high) for name, row in rows.items()}

    def bare_features(self) -> np.ndarray:
        """Pooled features (M, d) of every distinct text at the public start, where LoRA changes nothing."""
        load_start(self.head, self._start)
        return pooled_features(self.head, self._texts.all)

    def statistics(self, features: np.ndarray, known: Rows) -> np.ndarray:
        """Predictions (M,) of every text after a private release of item statistics; all of them must be public."""
        return dp_statistics.text_predictions(
            known, features, self.public_mean(), users=len(self._dataset.users), scenario=self._scenario
        )

    def federated(self, arrays: Arrays) -> dict[str, np.ndarray]:  # noqa: D102
        seen = self.predict(arrays, known=self.train, asked=self.test)
        persona = {} if seen.persona is None else {"persona": seen.persona}
        return {"federated": seen.shared, **persona, "personal": seen.personal}

    def cold_rows(self, arrays: Arrays, counts: Sequence[int]) -> dict[int, dict[str, np.ndarray]]:
        """Test rows where every user has only so many training rows; see ``simulations.cold_start``."""
        known, bare = {count: self.train.first(count) for count in counts}, self.bare_features()
        start = np.full(len(bare), self._scenario.task.centre)
        local = {count: self.personalize(bare, start, known=known[count], asked=self.test) for count in counts}
        features, shared = self.text_predictions(arrays)
        seen = {
            count: self.personalize(
                features, shared, known=known[count], asked=self.test, personas=self._personas(features)
            )
            for count in counts
        }
        return {
            count: {"federated": seen[count].shared, "local": local[count].personal, "personal": seen[count].personal}
            for count in counts
        }

    def score(  # noqa: D102
        self, row: Any, *, reference: Any, seed: int, resamples: int
    ) -> dict[str, Interval]:
        return score_row(
            row,
            self.test.target,
            self.test.user,
            reference=reference,
            seed=seed,
            resamples=resamples,
            metrics=(*METRICS, *self._scenario.evaluation.metrics),
        )

    def difference(self, a: Any, b: Any, *, seed: int, resamples: int) -> Interval:  # noqa: D102
        return paired_difference(a, b, self.test.target, self.test.user, seed=seed, resamples=resamples)

    def per_user(self, row: Any) -> np.ndarray:  # noqa: D102
        return user_rmse(row, self.test.target, self.test.user)

    def scored_users(self) -> np.ndarray:  # noqa: D102
        return np.unique(self.test.user)

    def losses(self, arrays: Arrays, records: Sequence[Record]) -> np.ndarray:  # noqa: D102
        _, shared = self.text_predictions(arrays)
        return np.asarray((shared[self._texts.rows(records)] - [record.target for record in records]) ** 2)

    def reference_losses(self, records: Sequence[Record], *, half: np.ndarray, known: np.ndarray) -> np.ndarray:
        """Squared error of the row ``pooled``, fitted to the known records of the other half of the users."""
        text, target = np.array(self._texts.rows(records)), np.array([record.target for record in records])
        bare, losses = self.bare_features(), np.empty(len(records))
        for side in (0, 1):
            fit, asked = (Rows(text[at], target[at], half[at]) for at in (known & (half != side), half == side))
            losses[half == side] = (baselines.pooled(bare, fit, asked, ridge=1.0) - asked.target) ** 2
        return losses

    def predict(self, arrays: Arrays, *, known: Rows, asked: Rows) -> Predictions:
        """Fit every user's private part on the rows known, predict the rows asked."""
        features, shared = self.text_predictions(arrays)
        return self.personalize(features, shared, known=known, asked=asked, personas=self._personas(features))

    def _personas(self, features: np.ndarray) -> Personas | None:
        config = self._scenario.persona
        if not config.count:
            return None
        profiles = [user.profile for user in self._dataset.users]
        return Personas(persona_predictions(self.head, features), config, profiles)

    def personalize(
        self,
        features: np.ndarray,
        shared: np.ndarray,
        *,
        known: Rows,
        asked: Rows,
        personas: Personas | None = None,
    ) -> Predictions:
        """Predictions with the scenario's private part, wherever the shared ones (M,) of the texts come from.

        Args:
            features: Of every distinct text, at the arrays that the head holds.
            shared: What the private part corrects, unless there are personas.
            known: What every user has said.
            asked: What is to be predicted.
            personas: Of the same arrays.
        """
        bench = self._bench()
        found = predict_personal(
            features,
            shared,
            known=known,
            asked=asked,
            users=len(self._dataset.users),
            mean=self.public_mean(),
            personal=self._scenario.personal,
            task=self._scenario.task,
            bench=bench,
            personas=personas,
        )
        load_shared(self.head, bench.arrays)  # a user's private part is left in it
        forget_device(self.head)
        return found

    def _bench(self) -> Bench:
        words = [text for text, *_ in self._texts.row]
        return Bench(self.head, read_shared(self.head), lambda: self._inputs, words, self._scenario.seed)

    @cached_property
    def _inputs(self) -> Features:
        return self.head.prepare(self._texts.all)

    def text_predictions(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features (M, d) and shared predictions (M,) of every distinct text."""
        return text_predictions(self.head, arrays, self._texts.all)

    def public_mean(self) -> np.ndarray:
        """Public centre (d,) of the pooled features."""
        mean: np.ndarray = self.head.mean.cpu().numpy()
        return mean

    def private_output(self, arrays: Arrays, user: int) -> PrivateOutput:
        """The private part of one user, made of all training rows; see ``client.personal.personalize.fit_private``."""
        rows = self.train.of(user)
        bench = self._bench()
        return fit_private(
            self.head,
            arrays,
            self._texts.all.select(self.train.text[rows].tolist()),
            Scores(self.train.target[rows].tolist()),
            personal=self._scenario.personal,
            generator=bench.generator(user),
            persona=self._scenario.persona,
            profile=self._dataset.users[user].profile,
            texts=[bench.words[text] for text in self.train.text[rows]],
        )


def make_observer(
    head: Head, texts: TextFeatures, dataset: Dataset, scenario: Scenario, *, quiet: bool = False
) -> Observer:
    """The observer of a scenario's task."""
    return OBSERVERS[scenario.task.name](head, texts, dataset, scenario, quiet=quiet)


def predict_personal(
    features: np.ndarray,
    shared: np.ndarray,
    *,
    known: Rows,
    asked: Rows,
    users: int,
    mean: np.ndarray,
    personal: PersonalConfig,
    task: TaskConfig,
    bench: Bench | None = None,
    personas: Personas | None = None,
) -> Predictions:
    """Make a private part per user of the rows known, predict the rows asked.

    Args:
        features: (M, d) pooled features of every distinct text.
        shared: (M,) shared predictions of every distinct text.
        known: In every user's order of time.
        mean: (d,) public centre of the features.
        bench: What methods need that have no closed form; by default there is none.
        personas: In place of ``shared``, where a user weighs several.

    Raises:
        ScenarioError: The personal method needs a bench, or has no form for this task.
    """
    features = features.astype(np.float64)  # once, not once a user
    if personal_method(personal.method).closed:
        bench = None
    texts = bench.texts(features, shared) if bench else Texts(features, shared)
    predicted = shared[asked.text].astype(np.float64)
    grouped = predicted.copy()
    for user in np.unique(asked.user).tolist() if users else ():
        have, want = known.of(user), asked.of(user)
        own, wanted = texts.take(known.text[have]), texts.take(asked.text[want])
        if personas:
            weights = personas.weights(user, known.text[have], known.target[have])
            own = replace(own, shared=personas.predictions[known.text[have]] @ weights)
            wanted = replace(wanted, shared=personas.predictions[asked.text[want]] @ weights)
            grouped[want] = wanted.shared
            if bench:
                bench.head.membership = torch.from_numpy(weights).float()
        predicted[want] = predict_user(
            own,
            known.target[have],
            wanted,
            mean=mean,
            personal=personal,
            head=bench.head if bench else None,
            arrays=bench.arrays if bench else None,
            generator=bench.generator(user) if bench else None,
        )
    low, high = task.low, task.high
    return Predictions(
        np.clip(shared[asked.text], low, high),
        np.clip(predicted, low, high),
        np.clip(grouped, low, high) if personas else None,
    )


OBSERVERS: dict[str, Callable[..., Observer]] = {
    "rating": RatingObserver,
    "tagging": TaggingObserver,
    "ranking": RankingObserver,
    "generation": LanguageObserver,
    "preference": PreferenceObserver,
}
