"""The observer of task ``ranking``: where a liked held-out text stands among texts that its user has no record of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from client.personal.personalize import PrivateOutput, check_task
from client.personal.profile import fit_profile, profile_of
from client.training.site import TextFeatures
from shared.config import Scenario
from shared.datasets import Dataset, Record, UserData
from shared.errors import DataError
from shared.heads.adapter import Arrays, load_start, read_start
from shared.heads.output import pooled_features
from shared.heads.ranking import RankingHead, unit
from shared.heads.scoring import text_predictions
from shared.metrics.ranking import (
    GAINS,
    PRIMARY,
    RANKING_METRICS,
    expected_gain,
    exposure,
    percentiles,
    popularity_bias,
    ranking_difference,
    score_ranking,
    top,
)
from shared.metrics.ratings import Described, Interval
from shared.privacy.noise import seeded_generator
from simulations.observe import dp_popularity, dp_statistics
from simulations.observe.rows import Rows, lay_out

_TOP = 10  # texts that a user is recommended


@dataclass(frozen=True)
class Lists:
    """What is ranked: for each of U users the row of a liked held-out text, then those of the negatives.

    Attributes:
        users: Index of each user (U,), ascending.
        texts: (U, 1 + negatives).
        known: Catalogue texts each user has a training record of, which are not recommended.
    """

    users: np.ndarray
    texts: np.ndarray
    known: list[np.ndarray]


@dataclass(frozen=True)
class RankedRow:
    """Scores (U, 1 + negatives) of the lists, and the texts (U, 10) recommended from the whole catalogue."""

    scores: np.ndarray
    recommended: np.ndarray


class RankingObserver:
    """Ranks held-out texts by shared arrays, with and without a private profile fitted per user.

    One liked held-out record a user is asked, ``task.held_out`` says which: the next one after the training rows, the
    last, or one drawn; a text the user has a training record of is never asked. It is ranked among ``task.negatives``
    texts of the catalogue that the user has no record of, neither training nor held out, drawn once by the seed of the
    scenario, so that all rows rank the same lists.

    Args:
        head: A head of the campaign at its public start; its trainable tensors are overwritten.

    Raises:
        DataError: A text is not in the catalogue, a user knows too much of it, or nobody likes a held-out text.
        ScenarioError: The personal method has no form for this task.
    """

    def __init__(
        self, head: RankingHead, texts: TextFeatures, dataset: Dataset, scenario: Scenario, *, quiet: bool = False
    ) -> None:
        del quiet  # everybody is fitted in seconds
        check_task(scenario.personal.method, scenario.task.name)
        self.head: RankingHead = head
        self._texts, self._scenario, self._dataset = texts, scenario, dataset
        self._size = len(dataset.public_texts)
        if len(texts.row) != self._size:
            raise DataError(
                f"every text of a record must stand in the public catalogue with task.name = 'ranking', in "
                f"{dataset.name} {len(texts.row) - self._size} do not; choose data whose catalogue is whole."
            )
        self._start = read_start(head)
        self.fit = self._lay_out(lambda user: user.fit)
        self.train = self._lay_out(lambda user: user.train)
        self._test = self._lists("test")
        counts = np.bincount(self.train.text, minlength=self._size).astype(np.float64)
        self._percentile = percentiles(counts)

    @cached_property
    def _validation(self) -> Lists:
        """Made when first asked for: where validation records are scored in place of test records there are none."""
        return self._lists("validation")

    @property
    def metrics(self) -> Mapping[str, Described]:  # noqa: D102
        return RANKING_METRICS

    def validate(self, arrays: Arrays) -> dict[str, float]:  # noqa: D102
        features, shared = text_predictions(self.head, arrays, self._texts.all)
        plain, personal = (
            self._rank(features, shared, known=self.fit, lists=self._validation, with_profile=with_profile)
            for with_profile in (False, True)
        )
        return {
            "federated": float(expected_gain(plain.scores, GAINS[PRIMARY]).mean()),
            "personal": float(expected_gain(personal.scores, GAINS[PRIMARY]).mean()),
        }

    def baselines(self) -> dict[str, RankedRow]:
        """Rows that owe nothing to the federation; ``popularity`` and its sum with a profile are not private."""
        load_start(self.head, self._start)
        bare = pooled_features(self.head, self._texts.all)
        nothing = np.zeros(self._size)
        likes = np.log1p(np.bincount(self.train.text, minlength=self._size))
        rows = {
            "random": self._row(bare, nothing, with_profile=False),
            "local": self._row(bare, nothing),
            "popularity": self._row(bare, likes, with_profile=False),
            "popularity + profile": self._row(bare, likes),
        }
        if dp_statistics.applies(self._scenario, self._dataset):
            cosine, users = dp_statistics.cosines(bare, self._mean()), len(self._dataset.users)
            private = dp_popularity.log_popularity(self.train, cosine, users=users, scenario=self._scenario)
            rows |= {
                "dp-statistics-shared": self._row(bare, private, with_profile=False),
                "dp-statistics": self._row(bare, private),
            }
        return rows

    def federated(self, arrays: Arrays) -> dict[str, RankedRow]:  # noqa: D102
        features, shared = text_predictions(self.head, arrays, self._texts.all)
        return {
            "federated": self._row(features, shared, with_profile=False),
            "personal": self._row(features, shared),
        }

    def cold_rows(self, arrays: Arrays, counts: Sequence[int]) -> dict[int, dict[str, RankedRow]]:
        """Test rows where every user has only so many training rows; see ``simulations.cold_start``."""
        features, shared = text_predictions(self.head, arrays, self._texts.all)
        plain, nothing = self._row(features, shared, with_profile=False), np.zeros(self._size)
        found = {}
        for count in counts:
            known = self._lay_out(lambda user, count=count: user.train[:count])  # type: ignore[misc]
            found[count] = {
                "federated": plain,
                "local": self._row(features, nothing, known=known),
                "personal": self._row(features, shared, known=known),
            }
        return found

    def score(self, row: Any, *, reference: Any, seed: int, resamples: int) -> dict[str, Interval]:  # noqa: D102
        liked = [self.train.text[self.train.of(user)] for user in self._test.users]
        bias = popularity_bias(row.recommended, liked, self._percentile)
        other = None if reference is None else reference.scores
        return score_ranking(row.scores, bias=bias, reference=other, seed=seed, resamples=resamples)

    def difference(self, a: Any, b: Any, *, seed: int, resamples: int) -> Interval:  # noqa: D102
        return ranking_difference(a.scores, b.scores, seed=seed, resamples=resamples)

    def per_user(self, row: Any) -> np.ndarray:  # noqa: D102
        return expected_gain(row.scores, GAINS[PRIMARY])

    def scored_users(self) -> np.ndarray:  # noqa: D102
        return self._test.users

    def exposure(self, row: Any) -> dict[str, float]:
        """How a row's recommendations spread over the catalogue; see ``shared.metrics.ranking.exposure``."""
        return exposure(row.recommended, texts=self._size)

    def losses(self, arrays: Arrays, records: Sequence[Record]) -> np.ndarray:
        """Negative log-likelihood of each record's text among the catalogue, whether it is liked or not."""
        _, shared = text_predictions(self.head, arrays, self._texts.all)
        return np.asarray(_log_sum(shared) - shared[self._texts.rows(records)])

    def reference_losses(self, records: Sequence[Record], *, half: np.ndarray, known: np.ndarray) -> np.ndarray:
        """The same by the counts of the known liked records of the other half of the users."""
        text = np.array(self._texts.rows(records))
        liked = np.array([record.target for record in records]) >= self._scenario.task.liked
        losses = np.empty(len(records))
        for side in (0, 1):
            counts = np.bincount(text[known & liked & (half != side)], minlength=self._size)
            losses[half == side] = (_log_sum(np.log1p(counts)) - np.log1p(counts))[text[half == side]]
        return losses

    def private_output(self, arrays: Arrays, user: int) -> PrivateOutput:
        """The private part of one user, fitted on all of the user's training rows."""
        features, _ = text_predictions(self.head, arrays, self._texts.all)
        records = self._dataset.users[user].train
        said = np.array([record.target for record in records])
        return profile_of(self.head, features[self._texts.rows(records)], said, personal=self._scenario.personal)

    def _row(
        self, features: np.ndarray, shared: np.ndarray, *, known: Rows | None = None, with_profile: bool = True
    ) -> RankedRow:
        return self._rank(features, shared, known=known or self.train, lists=self._test, with_profile=with_profile)

    def _rank(
        self, features: np.ndarray, shared: np.ndarray, *, known: Rows, lists: Lists, with_profile: bool
    ) -> RankedRow:
        """Rank the lists by shared scores (M,), and by every user's profile fitted on the liked rows known."""
        every = np.tile(shared, (len(lists.users), 1))
        personal, mean = self._scenario.personal, self._mean()
        if with_profile and personal.method != "none":
            share = np.exp(shared - _log_sum(shared))
            typical = share @ unit(features, mean)
            for place, user in enumerate(lists.users):
                own = features[known.text[known.of(user)]]
                private = fit_profile(own, mean=mean, typical=typical, personal=personal)
                every[place] = private.predict(features, shared)
        return RankedRow(np.take_along_axis(every, lists.texts, axis=1), top(every, lists.known, k=_TOP))

    def _lay_out(self, part: Callable[[UserData], Sequence[Record]]) -> Rows:
        """The liked records of a part of every user, end to end."""
        return lay_out(self._dataset, self._texts.row, lambda user: self._liked(part(user)))

    def _liked(self, records: Sequence[Record]) -> list[Record]:
        return [record for record in records if record.target >= self._scenario.task.liked]

    def _mean(self) -> np.ndarray:
        return np.asarray(self.head.mean.detach().cpu().numpy())

    def _lists(self, part: str) -> Lists:
        """The lists of one held-out part; none where nothing is held out, as where records are attacked."""
        users, texts, known = [], [], []
        task = self._scenario.task
        for user, data in enumerate(self._dataset.users):
            before = data.fit if part == "validation" else data.train
            own = np.unique(self._texts.rows(before)).astype(np.int64)
            asked = [row for row in self._texts.rows(self._liked(getattr(data, part))) if row not in own]
            if not asked:
                continue
            draw = seeded_generator(seed=self._scenario.seed, purpose=f"{part} lists", device=user, round_number=0)
            chosen = {"next": 0, "last": -1, "drawn": int(draw.integers(len(asked)))}[task.held_out]
            others = np.setdiff1d(np.arange(self._size), self._texts.rows((*data.train, *data.test)))
            if len(others) < max(task.negatives, _TOP):
                raise DataError(
                    f"task.negatives = {task.negatives} needs at least so many texts, and {_TOP}, that a user has no "
                    f"record of, user {data.user} has {len(others)}; set fewer."
                )
            users.append(user)
            texts.append([asked[chosen], *draw.choice(others, task.negatives, replace=False)])
            known.append(own)
        if not users and any(getattr(user, part) for user in self._dataset.users):
            raise DataError(f"at least one {part} record must be liked, task.liked = {task.liked:g}; none is.")
        return Lists(np.array(users), np.array(texts, dtype=np.int64), known)


def _log_sum(scores: np.ndarray) -> float:
    return float(np.logaddexp.reduce(scores))
