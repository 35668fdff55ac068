"""The observer of a simulation: stands outside the federation, may read everybody's held-out rows, sends nothing in.

It is the only source of metrics; devices reply with none (rule P2).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from client.personalize import PERSONAL_METHODS, PrivateOutput
from client.site import TextFeatures
from shared.adapter import Arrays, Head, load_shared, pooled_features
from shared.config import PersonalConfig, Scenario, TaskConfig
from shared.datasets import Dataset, Record, UserData


@dataclass(frozen=True)
class Rows:
    """Rows of all users laid end to end: text row, target and user index, each (n,)."""

    text: np.ndarray
    target: np.ndarray
    user: np.ndarray

    def of(self, user: int) -> slice:
        """Where one user's rows lie; users are in ascending order."""
        first, last = np.searchsorted(self.user, [user, user + 1])
        return slice(int(first), int(last))


def lay_out(dataset: Dataset, row_of: dict[str, int], part: Callable[[UserData], Sequence[Record]]) -> Rows:
    """Lay one part (fit, validation, train, test) of every user end to end."""
    pairs = [(i, record) for i, user in enumerate(dataset.users) for record in part(user)]
    return Rows(
        text=np.array([row_of[record.text] for _, record in pairs], dtype=np.int64),
        target=np.array([record.target for _, record in pairs]),
        user=np.array([i for i, _ in pairs], dtype=np.int64),
    )


@dataclass(frozen=True)
class Predictions:
    """Predictions of the shared part alone and with every user's private part, clipped to the scale, (n,) each."""

    shared: np.ndarray
    personal: np.ndarray


class Observer:
    """Evaluates shared arrays on held-out rows, with and without a private part fitted per user.

    Args:
        head: A head of the campaign at its public start; its trainable tensors are overwritten.
    """

    def __init__(self, head: Head, texts: TextFeatures, dataset: Dataset, scenario: Scenario) -> None:
        self.head, self._texts, self._scenario, self._dataset = head, texts, scenario, dataset
        self.fit = lay_out(dataset, texts.row, lambda user: user.fit)
        self.validation = lay_out(dataset, texts.row, lambda user: user.validation)
        self.train = lay_out(dataset, texts.row, lambda user: user.train)
        self.test = lay_out(dataset, texts.row, lambda user: user.test)

    def predict(self, arrays: Arrays, *, known: Rows, asked: Rows) -> Predictions:
        """Fit every user's private part on the rows known, predict the rows asked."""
        features, shared = self.text_predictions(arrays)
        return predict_personal(
            features,
            shared,
            known=known,
            asked=asked,
            users=len(self._dataset.users),
            mean=self.public_mean(),
            personal=self._scenario.personal,
            task=self._scenario.task,
        )

    def text_predictions(self, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features (M, d) and shared predictions (M,) of every distinct text."""
        load_shared(self.head, arrays)
        features = pooled_features(self.head, self._texts.all)
        weight, bias = self.head.output_layer()
        return features, features.astype(np.float64) @ weight + bias

    def public_mean(self) -> np.ndarray:
        """Public centre (d,) of the pooled features."""
        mean: np.ndarray = self.head.mean.numpy()
        return mean

    def private_output(self, arrays: Arrays, user: int) -> PrivateOutput:
        """The private part of one user, fitted on all of the user's training rows."""
        features, shared = self.text_predictions(arrays)
        rows = self.train.of(user)
        text = self.train.text[rows]
        return PERSONAL_METHODS[self._scenario.personal.method](
            features[text],
            self.train.target[rows] - shared[text],
            mean=self.public_mean(),
            personal=self._scenario.personal,
        )


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
) -> Predictions:
    """Fit a private part per user on the rows known, predict the rows asked.

    Args:
        features: (M, d) pooled features of every distinct text.
        shared: (M,) shared predictions of every distinct text.
        mean: (d,) public centre of the features.
    """
    fit = PERSONAL_METHODS[personal.method]
    features = features.astype(np.float64)  # once, not once a user
    predicted = np.empty(len(asked.text))
    for user in range(users):
        have, want = known.of(user), asked.of(user)
        text = known.text[have]
        private = fit(features[text], known.target[have] - shared[text], mean=mean, personal=personal)
        text = asked.text[want]
        predicted[want] = private.predict(features[text], shared[text])
    low, high = task.low, task.high
    return Predictions(np.clip(shared[asked.text], low, high), np.clip(predicted, low, high))


def rmse(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Root mean squared error over all rows."""
    return float(np.sqrt(np.mean((predictions - targets) ** 2)))
