"""Published data formats by name, each read into users and their records."""

from collections.abc import Callable
from pathlib import Path

from shared.errors import DataError

from . import movielens
from .records import Dataset, Record, UserData, split_by_time

__all__ = ["READERS", "Dataset", "Record", "UserData", "read", "split_by_time"]

READERS: dict[str, Callable[[Path], Dataset]] = {
    "movielens-100k": movielens.read_100k,
}


def read(format_name: str, folder: Path) -> Dataset:
    """Read a data set by the name of its format.

    Args:
        format_name: A key of ``READERS``.
        folder: Where its files lie, named as they were published.

    Returns:
        The users with their records, split, and the public catalogue.

    Raises:
        DataError: The format is unknown, or a file is missing or not as its format says.
    """
    if format_name not in READERS:
        raise DataError(f"the data format must be one of {', '.join(sorted(READERS))}, got {format_name!r}.")
    return READERS[format_name](folder)
