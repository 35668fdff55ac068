"""Next-utterance ranking: whether a language model finds likelier what was answered than every other candidate."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from client.training.site import TextFeatures
from shared.config import Scenario
from shared.datasets import Dataset, Record, UserData
from shared.heads.causal import CausalHead
from shared.heads.scoring import response_scores
from shared.metrics.language import TokenScores
from shared.models.model import Base


class NextUtterance:
    """The backbone outputs of every test prompt with every candidate that was not the answer.

    Args:
        dataset: Its test records have candidates; see ``shared.datasets.candidates``.
        quiet: No progress on stderr.
    """

    def __init__(self, base: Base, scenario: Scenario, dataset: Dataset, *, quiet: bool = False) -> None:
        self._micro_batch = scenario.performance.micro_batch
        asked = tuple(UserData(user.user, (), (), tuple(_others(user.test)[0])) for user in dataset.users)
        self._texts = TextFeatures(base, scenario, replace(dataset, users=asked, public_texts=()), quiet=quiet)

    def told(self, head: CausalHead, scores: TokenScores, records: Sequence[Record]) -> TokenScores:
        """Likelihoods of responses, and whether each was told from its candidates.

        Args:
            head: With the tensors to be scored loaded.
            scores: Of the records' responses.
            records: Test records.

        Returns:
            ``scores`` with ``told``: 1 where the mean log-likelihood of a response's tokens, its end included, is above
            that of each other candidate. A tie is not told, nor is what is not a number.

        Source:
            Dinan et al. 2019, arXiv:1902.00098, hits@1; a model that does not classify ranks by likelihood.
        """
        others, owner = _others(records)
        found = response_scores(
            head, self._texts.of(others), self._texts.targets(others), micro_batch=self._micro_batch
        )
        best = np.full(len(records), np.inf)
        np.minimum.at(best, owner, found.nll / found.tokens)
        return replace(scores, told=(scores.nll / scores.tokens < best).astype(np.float64))


def _others(records: Sequence[Record]) -> tuple[list[Record], np.ndarray]:
    """Each record once for every candidate that is not its response; and which record each is of."""
    found = [
        (replace(record, response=other, candidates=()), place)
        for place, record in enumerate(records)
        for other in record.candidates
        if other != record.response
    ]
    return [record for record, _ in found], np.array([place for _, place in found], dtype=np.int64)
