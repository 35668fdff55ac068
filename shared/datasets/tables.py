"""Many users' records in JSON lines, CSV or Parquet of anybody's making, by a map of columns.

A device passes over a broken row of its owner's folder in silence (``shared.datasets.folder``). A data set that
somebody measures on must be whole: here a broken row is an error that names file and line.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from shared.errors import DataError

from .folder import FIELDS, REASONS, check_columns, find, plain_text, record_of
from .lines import MAX_RECORDS, OWN_FILE, at, csv_rows, json_rows, public_texts
from .records import Dataset, Record, UserData, is_user_id, split_by_time
from .rows import MAX_ROW_BYTES, ROWS, open_file

USER, PROFILE = "user", "profile."
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "jsonl": (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz"),
    "csv": (".csv", ".csv.gz"),
    "parquet": (".parquet",),
}
Rows = Iterator[tuple[int, Mapping[str, Any]]]


def read_jsonl(folder: Path, columns: Mapping[str, str]) -> Dataset:
    """Read JSON lines of many users, plain or gz, by data.columns; further arguments as ``read_table``."""
    return read_table(folder, format="jsonl", columns=columns)


def read_csv(folder: Path, columns: Mapping[str, str]) -> Dataset:
    """Read CSV with a header, of many users, plain or gz, by data.columns; further arguments as ``read_table``."""
    return read_table(folder, format="csv", columns=columns)


def read_parquet(folder: Path, columns: Mapping[str, str]) -> Dataset:
    """Read Parquet of many users by data.columns; needs pyarrow; further arguments as ``read_table``."""
    return read_table(folder, format="parquet", columns=columns)


def read_table(folder: Path, *, format: str, columns: Mapping[str, str]) -> Dataset:
    """Read every file of a format in a folder; one row is one record.

    Args:
        folder: Holds the files, UTF-8, and ``public.txt`` with public texts, one a line, where the task needs them.
        format: A key of ``SUFFIXES``.
        columns: ``user`` and fields of ``Record`` -> column; ``text`` or ``response`` must be among them.
            ``profile.NAME`` -> column of what a user states, the same in every row. A dotted column goes into nested
            objects.

    Returns:
        Users by id, each split by time, rows without a time in their order; rows equal to an earlier one of the user
        are left out and counted.

    Raises:
        DataError: The map is impossible, there is no file, or a row is no record, which is named and not quoted.
        StoreError: Parquet is asked for and pyarrow is not installed.
    """
    fields = _check(format, columns)
    paths = sorted(path for path in folder.glob("*") if path.name.lower().endswith(SUFFIXES[format]))
    if not paths:
        raise DataError(f"format {format!r} needs files {', '.join(SUFFIXES[format])}; {folder} holds none.")
    found: dict[str, dict[Record, None]] = {}
    profiles: dict[str, dict[str, str]] = {}
    seen = equal = 0
    for path in paths:
        for line, row in _READ[format](path, columns):
            try:
                user, record, profile = _user(row, columns[USER]), _record(row, fields), _profile(row, columns)
                if profiles.setdefault(user, profile) != profile:
                    raise ValueError("a user's profile must be the same in every row, got another")
            except ValueError as error:
                raise at(path, line, str(error), do=OWN_FILE) from None
            own = found.setdefault(user, {})
            seen, equal = seen + 1, equal + (record in own)
            own[record] = None
            if seen - equal > MAX_RECORDS:
                raise at(path, line, f"a simulation holds at most {MAX_RECORDS:,} records, got more", do=OWN_FILE)
    users = tuple(UserData(user, *split_by_time(found[user]), profiles[user]) for user in sorted(found))
    return Dataset(format, users, public_texts(folder), {"rows equal to an earlier one": equal} if equal else {})


def _check(format: str, columns: Mapping[str, str]) -> dict[str, str]:
    """The columns of a record."""
    own = {field: column for field, column in columns.items() if not field.startswith(PROFILE) and field != USER}
    known = set(own) <= set(FIELDS) and all(columns.values()) and PROFILE not in columns
    if not (known and columns.get(USER) and {"text", "response"} & set(own)):
        raise DataError(
            f"data.columns must map user, text or response, and any of {', '.join(FIELDS)} and {PROFILE}NAME to names "
            f'of columns, got {sorted(columns) or "nothing"}; such as columns = {{user = "id", text = "review"}}.'
        )
    return check_columns(format, own)


def _user(row: Mapping[str, Any], column: str) -> str:
    user = plain_text(find(row, column))
    if user is None or not is_user_id(user):
        raise ValueError("user must be a plain name or a whole number, got another")
    return user


def _record(row: Mapping[str, Any], fields: Mapping[str, str]) -> Record:
    record = record_of(row, fields)
    if isinstance(record, str):
        raise ValueError(f"every row must be a record, got one of the {REASONS[record]}")
    return record


def _profile(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for field, column in columns.items():
        if field.startswith(PROFILE):
            value = plain_text(find(row, column))
            if value is None:
                raise ValueError("what a user states must be a text or a whole number, got another")
            if value:
                found[field.removeprefix(PROFILE)] = value
    return found


def _jsonl(path: Path, columns: Mapping[str, str]) -> Rows:
    del columns
    return json_rows(path, max_bytes=MAX_ROW_BYTES, do=OWN_FILE)


def _csv(path: Path, columns: Mapping[str, str]) -> Rows:
    rows = csv_rows(path, max_bytes=MAX_ROW_BYTES, do=OWN_FILE)
    line, header = next(rows, (1, []))
    if missing := sorted({column for column in columns.values() if header.count(column) != 1}):
        raise at(path, line, f"the header must name {missing} once, as data.columns says", do=OWN_FILE)
    for number, row in rows:
        yield number, dict(zip(header, row, strict=True))


def _parquet(path: Path, columns: Mapping[str, str]) -> Rows:
    with open_file(path) as file:
        for number, row in enumerate(ROWS["parquet"](file, columns), start=1):
            if isinstance(row, str):
                raise at(path, number, f"every row must be as Parquet says, got one of the {REASONS[row]}", do=OWN_FILE)
            yield number, row


_READ: dict[str, Callable[[Path, Mapping[str, str]], Rows]] = {"jsonl": _jsonl, "csv": _csv, "parquet": _parquet}
