"""Comparisons made of ratings: of two things one user rated clearly apart, which the user likes better."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from .movielens import read_100k
from .records import Dataset, Record, UserData, split_by_time

QUESTION = "Which film would you rather see?"  # public, and the same for every pair
LEAST_APART = 2.0  # stars: nearer ones are told apart by mood rather than by taste


def pairs_of_ratings(
    records: Iterable[Record], *, question: str = QUESTION, least_apart: float = LEAST_APART
) -> tuple[Record, ...]:
    """Pair one user's ratings by time, each with the earliest one before it that waits and lies far enough apart.

    Args:
        records: Of one user, in any order.
        question: The text of every pair.
        least_apart: By how much the ratings of a pair differ at least.

    Returns:
        Records whose response is the text rated higher and ``rejected`` the other one; their time is that of the later
        rating, their item both items, their target how far the ratings lie apart.

    Guarantee:
        A rating is in one pair at most: what hides a pair hides the ratings in it (rule P7).

    Example:
        >>> rows = [Record(f"film {n}", stars, str(n), n) for n, stars in enumerate([5.0, 4.0, 1.0, 2.0, 2.0])]
        >>> [(pair.response, pair.rejected, pair.timestamp) for pair in pairs_of_ratings(rows, question="?")]
        [('film 0', 'film 2', 2), ('film 1', 'film 3', 3)]
    """
    waiting: list[Record] = []
    found = []
    for late in sum(split_by_time(records), ()):  # in the order of time, ties by item
        far = (i for i, early in enumerate(waiting) if abs(early.target - late.target) >= least_apart)
        place = next(far, None)
        if place is None:
            waiting.append(late)
            continue
        early = waiting.pop(place)
        better, worse = (late, early) if late.target > early.target else (early, late)
        if better.text != worse.text:
            apart = better.target - worse.target
            item = f"{better.item}-{worse.item}"
            found.append(Record(question, apart, item, late.timestamp, better.text, worse.text))
    return tuple(found)


def read_movielens_pairs(folder: Path) -> Dataset:
    """Read MovieLens 100k as comparisons of films that one user rated at least two stars apart.

    Args:
        folder: As for ``read_100k``.

    Returns:
        The users who have such a pair, split by time, with their profiles; there are no public texts.

    Raises:
        DataError: As ``read_100k``.
    """
    return as_pairs(read_100k(folder), name="movielens-pairs")


def as_pairs(ratings: Dataset, *, name: str) -> Dataset:
    """Comparisons made of ratings; whoever has none is left out."""
    users = ((user, pairs_of_ratings(user.train + user.test)) for user in ratings.users)
    kept = tuple(UserData(user.user, *split_by_time(pairs), user.profile) for user, pairs in users if pairs)
    return replace(ratings, name=name, users=kept, public_texts=())
