"""The public split of a data set's users: those whom constants are chosen on, and those whom a campaign is about."""

import hashlib
from dataclasses import replace

from shared.errors import DataError, ScenarioError

from .records import Dataset

PARTS = ("all", "tuning", "campaign")


def choose_users(dataset: Dataset, part: str, *, tuning_share: float) -> Dataset:
    """One part of the users, in their order; the catalogue stays whole, for it is public whoever the users are.

    Args:
        dataset: All users.
        part: ``all``, ``tuning``, or ``campaign``: whoever is not among the tuning users.
        tuning_share: Of the users; in (0, 1).

    Raises:
        DataError: Nobody with a record is in the part.
        ScenarioError: There is no such part.

    Guarantee:
        Who is where depends on the format's name, the user's id and the share alone: on no seed, no record, no other
        user. A larger share keeps every tuning user.

    Example:
        >>> from shared.datasets import Record, UserData
        >>> record = Record(text="", target=1.0, item="1", timestamp=0)
        >>> everybody = Dataset("f", tuple(UserData(str(n), (record,), (), ()) for n in range(8)), ())
        >>> [user.user for user in choose_users(everybody, "tuning", tuning_share=0.3).users]
        ['7']
    """
    if part not in PARTS:
        raise ScenarioError(f"data.users must be one of {', '.join(PARTS)}, got {part!r}.")
    if part == "all":
        return dataset
    chosen = tuple(
        user for user in dataset.users if (_place(dataset.name, user.user) < tuning_share) == (part == "tuning")
    )
    if not any(user.train or user.test for user in chosen):
        raise DataError(
            f"data.users = {part!r} must leave at least one user with a record, it leaves none of "
            f"{len(dataset.users)}; change data.tuning_share, {tuning_share:g}."
        )
    return replace(dataset, users=chosen)


def _place(name: str, user: str) -> float:
    """In [0, 1): the first digits of a hash that nobody can steer without changing their id."""
    digest = hashlib.sha256(f"sottovoce tuning users\0{name}\0{user}".encode()).digest()
    return int.from_bytes(digest[:4]) / 2**32
