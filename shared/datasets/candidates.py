"""The answers that a dialogue's next one is to be told from: as published, or what other users said."""

from dataclasses import replace

import numpy as np

from shared.errors import DataError

from .records import Dataset, Record, UserData


def with_candidates(dataset: Dataset, *, count: int, seed: int = 0) -> Dataset:
    """Give every test record the candidates that its response stands among.

    Args:
        dataset: Any.
        count: Candidates of a record that was published without; at least 2.
        seed: Of the draw; public.

    Returns:
        The same users. A record that was published with candidates keeps them, however many they are; each other has
        its response and ``count - 1`` drawn from the distinct test responses of other users, nothing its user ever
        said.

    Raises:
        DataError: Other users did not say as much.

    Guarantee:
        No distractor is a response that anybody trains on, unless it is also one of a test record: a model that was
        fitted to a distractor would take it for the answer.

    Source:
        Dinan et al. 2019, arXiv:1902.00098: hits@1, one response among 19 distractors. Those are published in some of
        the files; with a draw of ours numbers are not comparable with published ones.
    """
    said = sorted({record.response for user in dataset.users for record in user.test})
    draw = np.random.default_rng(seed)
    users = tuple(replace(user, test=_told_apart(user, said, count, draw)) for user in dataset.users)
    return replace(dataset, users=users)


def _told_apart(user: UserData, said: list[str], count: int, draw: np.random.Generator) -> tuple[Record, ...]:
    own = {record.response for record in user.train + user.test}
    others = [response for response in said if response not in own]
    if len(others) < count - 1 and not all(record.candidates for record in user.test):
        raise DataError(
            f"evaluation.candidates = {count} needs {count - 1} test responses of other users beside each, user "
            f"{user.user} has {len(others)}; set it lower, or take more users."
        )

    def drawn(record: Record) -> tuple[str, ...]:
        picked = draw.choice(len(others), size=count - 1, replace=False).tolist()
        return (record.response, *(others[place] for place in picked))

    return tuple(record if record.candidates else replace(record, candidates=drawn(record)) for record in user.test)
