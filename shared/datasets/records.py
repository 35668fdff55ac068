"""What every data format is read into, and the one way a user's records are split."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from shared.errors import DataError


@dataclass(frozen=True, slots=True)
class Record:
    """One training row of one user.

    Args:
        text: What the model reads.
        target: What it is to predict.
        item: Published id of the thing the text describes.
        timestamp: Seconds since 1970.
        response: What the user answered to the text, or liked better; empty where the target is a number.
        rejected: What the user liked less than the response; empty where nothing was compared.
        candidates: Answers, the response among them, of which a dialogue's next one is to be found; for tests alone.
    """

    text: str
    target: float
    item: str
    timestamp: int
    response: str = ""
    rejected: str = ""
    candidates: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """What the model sees of the record."""
        return (self.text, self.response, self.rejected) if self.rejected else (self.text, self.response)


@dataclass(frozen=True, slots=True)
class UserData:
    """The records of one user, each part in the order of time.

    Args:
        user: Published id.
        fit: What may be trained on while choices are open.
        validation: For every choice and every curve by round.
        test: Read by the observer once per final model and seed.
        profile: What the user states of themself: attribute -> value; a device uses it where its owner opted in.
    """

    user: str
    fit: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]
    profile: Mapping[str, str] = field(default_factory=dict, hash=False)

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
        left_out: Why rows of the files are no records -> how many.
    """

    name: str
    users: tuple[UserData, ...]
    public_texts: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict, hash=False)


def check_dataset(found: object, format_name: str) -> Dataset:
    """What a reader gave, where it keeps what the rest of the project rests on.

    Raises:
        DataError: No data set, no user or no record in it, a user twice or with a name unfit for a folder, a text that
            is none, a target that is not finite, or a public text twice.
    """
    if not isinstance(found, Dataset):
        raise DataError(f"the reader of {format_name!r} must give a Dataset, got {type(found).__name__}; mend it.")
    if not any(user.train or user.test for user in found.users):
        raise DataError(f"data of format {format_name!r} must hold at least one user with a record, got none.")
    if len(set(found.public_texts)) != len(found.public_texts):
        raise DataError(f"public texts must be distinct in data of format {format_name!r}, got one twice.")
    seen: set[str] = set()
    for user in found.users:
        if not is_user_id(user.user):
            raise DataError(f"a user of format {format_name!r} must be a plain name, got {user.user[:100]!r}.")
        if user.user in seen:
            raise DataError(f"user {user.user!r} must occur once in data of format {format_name!r}, got it again.")
        seen.add(user.user)
        for record in user.train + user.test:
            for name, text in (("text", record.text), ("response", record.response), ("rejected", record.rejected)):
                if not isinstance(text, str):
                    raise DataError(f"user {user.user!r}: {name} must be a string, got {type(text).__name__}.")
            if not math.isfinite(record.target):
                raise DataError(f"user {user.user!r}: target must be finite, got {record.target}.")
    return found


def is_user_id(value: str) -> bool:
    """Whether a string can name a user, also as the name of a folder."""
    return value.isprintable() and "/" not in value and 0 < len(value) <= 100


def is_text(value: str) -> bool:
    """Whether a string can be written, as opposed to half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


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
