"""Published data formats by name, each read into users and their records."""

from collections.abc import Callable
from pathlib import Path

from shared.errors import DataError
from shared.registry import lookup

from . import convai2, movielens, sotu
from .records import Dataset, Record, UserData, check_dataset, split_by_time
from .users import choose_users, hold_out

__all__ = ["READERS", "Dataset", "Record", "UserData", "choose_users", "hold_out", "read", "split_by_time"]

READERS: dict[str, Callable[[Path], Dataset]] = {
    "movielens-100k": movielens.read_100k,
    "convai2": convai2.read_convai2,
    "sotu": sotu.read_sotu,
}


def read(format_name: str, folder: Path) -> Dataset:
    """Read a data set by the name of its format.

    Args:
        format_name: A key of ``READERS``, or one that an installed package registers.
        folder: Where its files lie, named as they were published.

    Returns:
        The users with their records, split, and the public catalogue.

    Raises:
        ScenarioError: The format is unknown, or its package is broken.
        DataError: A file is missing or not as its format says.
    """
    reader = lookup("readers", format_name, READERS, Callable)
    try:
        found = reader(folder)
    except ValueError as error:  # ours say file and line; one from outside may stop at a row it did not expect
        reason = (str(error).splitlines() or [""])[0][:200]
        raise DataError(f"{folder} must hold data of format {format_name!r}, its reader says: {reason}.") from error
    return check_dataset(found, format_name)
