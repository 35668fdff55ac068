"""Records of all users laid end to end, as arrays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

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

    def first(self, count: int) -> "Rows":
        """The first ``count`` rows of every user, all of a user who has fewer."""
        place = np.arange(len(self.user)) - np.searchsorted(self.user, self.user)
        kept = place < count
        return Rows(self.text[kept], self.target[kept], self.user[kept])


def lay_out(dataset: Dataset, row_of: dict[tuple[str, ...], int], part: Callable[[UserData], Sequence[Record]]) -> Rows:
    """Lay one part (fit, validation, train, test) of every user end to end."""
    pairs = [(i, record) for i, user in enumerate(dataset.users) for record in part(user)]
    return Rows(
        text=np.array([row_of[record.key] for _, record in pairs], dtype=np.int64),
        target=np.array([record.target for _, record in pairs]),
        user=np.array([i for i, _ in pairs], dtype=np.int64),
    )
