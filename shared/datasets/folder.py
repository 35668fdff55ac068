"""Records from a folder of JSONL, CSV, Parquet or plain text with a column map; the folder is only read.

A row that is no record is left out and counted by a fixed reason. It never is an error: what a device answers must not
depend on a row (rule P2). No message holds anything of a row.
"""

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from shared.datasets.records import Record, is_text
from shared.datasets.rows import MAX_ROW_BYTES, PARAGRAPH, ROWS, Row, load_pyarrow, open_file
from shared.errors import DataError, StoreError

SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv",),
    "parquet": (".parquet",),
    "text": (".txt", ".md"),
}
FIELDS = ("text", "target", "response", "rejected", "item", "timestamp")
MAX_RECORDS = 100_000  # many times what a device is expected to hold
# Why a row, or a whole file, was left out.
REASONS: Mapping[str, str] = {
    "file": "files that are links, damaged or cannot be read",
    "columns": "files without the columns named",
    "malformed": "rows that are not what the format says",
    "too-long": f"rows of more than {MAX_ROW_BYTES:,} bytes",
    "text": "rows without the text, the response or what was rejected",
    "target": "rows whose target is no usable number",
    "item": "rows whose item is neither text nor number",
    "timestamp": "rows whose timestamp is neither seconds nor a date",
    "equal": "rows equal to an earlier one",
    "beyond": f"records beyond the first {MAX_RECORDS:,}",
}
_USUAL = 2**53  # numbers are smaller than this


@dataclass(frozen=True)
class FolderRecords:
    """What a folder holds.

    Attributes:
        records: Distinct, in the order of the files' paths and of the rows.
        skipped: A key of ``REASONS`` -> how many rows or files were left out for it.
    """

    records: tuple[Record, ...]
    skipped: Mapping[str, int]


def read_folder(path: Path, *, format: str, columns: Mapping[str, str]) -> FolderRecords:
    """Read the records of every file of a format in a folder and below it.

    Files whose name begins with a dot are none, links are not followed. One row is one record (rule P7); of plain text,
    one paragraph between blank lines.

    Args:
        path: The folder.
        format: ``jsonl`` (one object a line), ``csv`` (comma, with a header), ``parquet`` or ``text``; UTF-8.
        columns: Field of ``Record`` -> column of the source; a dotted name goes into nested objects. A field that is
            not mapped has its empty value: a source for language models needs no target. Plain text has the column
            ``paragraph``, which is the response unless the map says otherwise.

    Raises:
        DataError: Format or column map are impossible.
        StoreError: The folder is missing or cannot be listed, or Parquet is asked for and pyarrow is not installed.

    Guarantee:
        Nothing is written. A row that is no record changes nothing but a count. One record more adds that record and,
        but for a folder of ``MAX_RECORDS``, changes no other; an equal one changes nothing.
    """
    columns = check_columns(format, columns)
    if format == "parquet":
        load_pyarrow()
    found: dict[Record, None] = {}
    skipped: Counter[str] = Counter()
    for row in _rows(path, format, columns):
        made = row if isinstance(row, str) else record_of(row, columns)
        if isinstance(made, str):
            skipped[made] += 1
        elif made in found:
            skipped["equal"] += 1
        elif len(found) >= MAX_RECORDS:
            skipped["beyond"] += 1
        else:
            found[made] = None
    return FolderRecords(tuple(found), {reason: skipped[reason] for reason in REASONS if skipped[reason]})


def check_columns(format: str, columns: Mapping[str, str]) -> dict[str, str]:
    """The column map as it is used.

    Raises:
        DataError: An unknown format or field, or a map that gives a record no words.

    Example:
        >>> check_columns("text", {})
        {'response': 'paragraph'}
    """
    if format not in SUFFIXES:
        raise DataError(f"a folder's format must be one of {', '.join(SUFFIXES)}, got {format!r}.")
    if format == "text" and not columns:
        return {"response": PARAGRAPH}
    unknown = sorted(set(columns) - set(FIELDS))
    if unknown or not all(columns.values()):
        raise DataError(f"columns must map {', '.join(FIELDS)} to names of columns, got {unknown or 'an empty name'}.")
    if "rejected" in columns and "response" not in columns:
        raise DataError("columns must name the column of response where they name that of rejected, got it alone.")
    if not {"text", "response"} & set(columns):
        raise DataError("columns must name the column of text or of response, got neither; such as text=review.")
    if format == "text" and (set(columns) - {"text", "response"} or set(columns.values()) != {PARAGRAPH}):
        raise DataError(f"plain text has one column, {PARAGRAPH}, for text or response; got another.")
    return dict(columns)


def _rows(folder: Path, format: str, columns: Mapping[str, str]) -> Iterator[Row]:
    for path in _files(folder, SUFFIXES[format]):
        try:
            with open_file(path) as file:
                yield from ROWS[format](file, columns)
        except OSError:
            yield "file"


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    try:
        os.listdir(folder)  # noqa: PTH208
    except OSError as error:
        raise StoreError(
            f"the data folder {folder} must be a folder that can be read, got: {error.strerror}; put it back, or name "
            "another with sottovoce client source."
        ) from None
    found: list[Path] = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(top, name) for name in names if not name.startswith(".") and name.lower().endswith(suffixes)]
    return sorted(found)


def record_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> Record | str:
    """The record of a row, or the reason why there is none."""
    values = {field: find(row, column) for field, column in columns.items()}
    text, response, rejected = (values.get(field, "") for field in ("text", "response", "rejected"))
    if not all(isinstance(value, str) and is_text(value) for value in (text, response, rejected)):
        return "text"
    if "rejected" in columns and not rejected.strip():
        return "text"
    if not (response if "response" in columns else text).strip():
        return "text"
    target = _number(values["target"]) if "target" in columns else 0.0
    if target is None:
        return "target"
    item = plain_text(values.get("item"))
    if item is None:
        return "item"
    timestamp = _seconds(values.get("timestamp"))
    if timestamp is None:
        return "timestamp"
    return Record(text, target, item, timestamp, response, rejected)


def find(row: Mapping[str, Any], column: str) -> Any:
    """A value by the name of its column, or by its path in nested objects; None where there is none."""
    if column in row:
        return row[column]
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return find(inner, rest) if rest and isinstance(inner, Mapping) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number + 0.0 if abs(number) < _USUAL else None  # not -0.0, which is written otherwise and equal


def plain_text(value: object) -> str | None:
    """A text or whole number as text, nothing as the empty text; None for anything else."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    try:
        item = str(value)
    except ValueError:  # thousands of digits
        return None
    return item if is_text(item) else None


def _seconds(value: object) -> int | None:
    """Whole seconds since 1970, of a number or a date; a date without a zone is UTC."""
    if value is None or value == "":
        return 0
    number = _number(value)
    if number is not None:
        return math.floor(number)
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if not isinstance(value, datetime):
        return None
    try:
        return math.floor((value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp())
    except (ValueError, OverflowError):
        return None
