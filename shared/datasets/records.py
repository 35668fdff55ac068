"""What every data format is read into, and the one way a user's records are split."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One training row of one user.

    Args:
        text: What the model reads.
        target: What it is to predict.
        item: Published id of the thing the text describes.
        timestamp: Seconds since 1970.
    """

    text: str
    target: float
    item: str
    timestamp: int


@dataclass(frozen=True, slots=True)
class UserData:
    """The records of one user, each part in the order of time.

    Args:
        user: Published id.
        fit: What may be trained on while choices are open.
        validation: For every choice and every curve by round.
        test: Read by the observer once per final model and seed.
    """

    user: str
    fit: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]

    @property
    def train(self) -> tuple[Record, ...]:
        """Everything before the test part."""
        return self.fit + self.validation


@dataclass(frozen=True, slots=True)
class Dataset:
    """A published data set, read.

    Args:
        name: Name of its format, a key of ``READERS``.
        users: One entry per user, in a stable order.
        public_texts: The catalogue, distinct, in a stable order; public whoever the users are.
    """

    name: str
    users: tuple[UserData, ...]
    public_texts: tuple[str, ...]


def split_by_time(
    records: Iterable[Record],
) -> tuple[tuple[Record, ...], tuple[Record, ...], tuple[Record, ...]]:
    """Split one user's records into fit, validation and test, the latest last.

    Args:
        records: All records of one user, in any order.

    Returns:
        ``(fit, validation, test)``: the first 80 % in time, rounded down, are for training, the rest is test;
        the last tenth of the training rows, at least one unless there is only one, is validation.

    Guarantee:
        The order of the input does not matter where items are distinct: equal times are ordered by item id,
        numerically where ids are numbers.

    Example:
        >>> times = {"10": 5, "9": 5, "1": 9, "2": 1, "3": 2}
        >>> rows = [Record(text="", target=1.0, item=item, timestamp=time) for item, time in times.items()]
        >>> [[row.item for row in part] for part in split_by_time(rows)]
        [['2', '3', '9'], ['10'], ['1']]
    """
    ordered = sorted(records, key=lambda record: (record.timestamp, *_item_order(record.item)))
    num_train = len(ordered) * 4 // 5  # int(0.8 * n), in whole numbers
    num_validation = max(1, num_train // 10) if num_train >= 2 else 0
    num_fit = num_train - num_validation
    return tuple(ordered[:num_fit]), tuple(ordered[num_fit:num_train]), tuple(ordered[num_train:])


def _item_order(item: str) -> tuple[bool, int, str]:
    return (False, int(item), item) if item.isdecimal() else (True, 0, item)
