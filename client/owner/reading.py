"""Records an owner gives: those of one user of a published data set, or a JSONL file. No message quotes a text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.datasets.records import Record, is_text
from shared.errors import DataError

_JSONL_FIELDS: dict[str, type | tuple[type, ...]] = {
    "text": str,
    "target": (int, float),
    "response": str,
    "item": str,
    "timestamp": int,
    "rejected": str,
}


@dataclass(frozen=True)
class Found:
    """Training records read for a home.

    Attributes:
        records: Those that may be trained on.
        held_out: How many more the source has for testing; they are left out.
    """

    records: tuple[Record, ...]
    held_out: int = 0


def read_published(format_name: str, source: str, user: str) -> Found:
    """The training records of one user of a published data set.

    Raises:
        SottovoceError: Format, source or user are not there, or a file is damaged.
    """
    from shared.assets import resolve
    from shared.datasets import read

    dataset = read(format_name, resolve(source))
    for candidate in dataset.users:
        if candidate.user == user:
            return Found(candidate.train, len(candidate.test))
    first, last = dataset.users[0].user, dataset.users[-1].user
    raise DataError(
        f"--user must be one of the {len(dataset.users)} users of {source} (such as {first!r} or {last!r}), "
        f"got {user!r}; nothing was stored."
    )


def read_jsonl(path: Path) -> Found:
    """Records from a file of one JSON object a line.

    Args:
        path: UTF-8; the fields of ``Record``: text, target, and optionally response, item, timestamp and rejected.

    Raises:
        DataError: A line is not a record; names file, line and field, and quotes nothing.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--jsonl must name a readable file, got {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} must be UTF-8, got bytes that are not; save it as UTF-8.") from None
    lines = text.removesuffix("\n").split("\n")  # not splitlines: a text may hold other separators
    if not text.strip():
        raise DataError(f"{path} must hold at least one record, got an empty file.")
    return Found(tuple(_read_line(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)))


def _read_line(line: str, place: str) -> Record:
    try:
        value = json.loads(line, object_pairs_hook=_unique)
    except _TwiceError:
        raise DataError(f"{place}: every field must occur once, one occurs again; nothing was stored.") from None
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise DataError(f"{place}: it must be one JSON object, got something else; nothing was stored.")
    missing = sorted({"text", "target"} - value.keys())
    if missing:
        raise DataError(f"{place}: it must have text and target, {' and '.join(missing)} missing; nothing was stored.")
    if not value.keys() <= _JSONL_FIELDS.keys():
        raise DataError(f"{place}: its fields must be among {', '.join(_JSONL_FIELDS)}; nothing was stored.")
    for name, wanted in _JSONL_FIELDS.items():
        if name in value:
            _check_field(value[name], wanted, f"{place}: {name}")
    return Record(
        text=value["text"],
        target=float(value["target"]),
        item=value.get("item", ""),
        timestamp=value.get("timestamp", 0),
        response=value.get("response", ""),
        rejected=value.get("rejected", ""),
    )


def _check_field(value: object, wanted: type | tuple[type, ...], place: str) -> None:
    words = {str: "a string", int: "a whole number"}.get(wanted, "a number") if isinstance(wanted, type) else "a number"
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise DataError(f"{place} must be {words}, got {type(value).__name__}; nothing was stored.")
    if isinstance(value, int | float) and not abs(value) < 2**53:
        raise DataError(f"{place} must be finite and of a usual size, got another; nothing was stored.")
    if isinstance(value, str) and not is_text(value):
        raise DataError(f"{place} must be valid text, got half of a surrogate pair; nothing was stored.")


class _TwiceError(Exception):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _TwiceError
    return value
