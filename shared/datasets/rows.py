"""Rows of JSONL, CSV, Parquet and plain text; one that cannot be read is a reason, never an error.

What is read at a time is bounded, whatever a file holds.
"""

import csv
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from shared.errors import StoreError

PARAGRAPH = "paragraph"  # the one column of plain text
MAX_ROW_BYTES = 131_072  # as the csv module bounds a field
_BATCH_ROWS = 256

Row = dict[str, Any] | str  # as the file has it, or why there is none: a key of ``shared.datasets.folder.REASONS``


def open_file(path: Path) -> BinaryIO:
    """A regular file, opened to be read; neither a link, nor a pipe that would wait for a writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("not a regular file")
    return os.fdopen(descriptor, "rb")


def _lines(file: BinaryIO) -> Iterator[str | None]:
    """Lines, None for one that is too long; bytes that are not UTF-8 become half surrogates, which no record takes."""
    first = True
    while line := file.readline(MAX_ROW_BYTES):
        long = False
        while not line.endswith(b"\n") and (more := file.readline(MAX_ROW_BYTES)):
            line, long = more, True
        text = line.decode("utf-8-sig" if first else "utf-8", "surrogateescape")
        first = False
        yield None if long else text


def _jsonl_rows(file: BinaryIO, columns: Mapping[str, str]) -> Iterator[Row]:
    del columns
    for line in _lines(file):
        if line is None:
            yield "too-long"
        elif line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            yield value if isinstance(value, dict) else "malformed"


def _csv_rows(file: BinaryIO, columns: Mapping[str, str]) -> Iterator[Row]:
    long: list[Row] = []
    rows = _csv_parsed(_short(_lines(file), long))
    header = next(rows, None)
    if not header or any(header.count(column) != 1 for column in columns.values()):
        yield "columns"
        return
    for row in rows:
        if row is None or (row and len(row) != len(header)):
            yield "malformed"
        elif row:  # an empty line is no row
            yield dict(zip(header, row, strict=True))
    yield from long


def _short(lines: Iterable[str | None], long: list[Row]) -> Iterator[str]:
    for line in lines:
        if line is None:
            long.append("too-long")
        else:
            yield line


def _csv_parsed(lines: Iterable[str]) -> Iterator[list[str] | None]:
    """Rows; None for one that the csv module cannot take, after which it goes on with the next line."""
    rows = csv.reader(lines)
    while True:
        try:
            yield next(rows)
        except csv.Error:
            yield None
        except StopIteration:
            return


def _parquet_rows(file: BinaryIO, columns: Mapping[str, str]) -> Iterator[Row]:
    arrow = load_pyarrow()
    try:
        table = arrow.parquet.ParquetFile(file)
        named = {part for column in columns.values() for part in (column, column.partition(".")[0])}
        wanted = [name for name in table.schema_arrow.names if name in named]
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted):
            for number in range(batch.num_rows):
                try:
                    yield batch.slice(number, 1).to_pylist()[0]
                except (ValueError, OverflowError):  # bytes that are not UTF-8, a date Python does not know
                    yield "malformed"
    except (arrow.ArrowException, OSError, ValueError, LookupError):  # ValueError: names that are not UTF-8
        yield "file"


def load_pyarrow() -> Any:
    """The optional package; ``StoreError`` where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise StoreError("a folder of Parquet needs pyarrow; run: pip install 'sottovoce[parquet]'.") from None
    return pyarrow


def _text_rows(file: BinaryIO, columns: Mapping[str, str]) -> Iterator[Row]:
    del columns
    paragraph: list[str] = []
    size = 0
    for line in chain(_lines(file), [""]):
        if line is None or line.strip():
            size += MAX_ROW_BYTES + 1 if line is None else len(line)
            paragraph.append(line or "")
            if size > MAX_ROW_BYTES:
                paragraph.clear()
        elif size:
            text = "".join(paragraph).replace("\r\n", "\n").strip()
            yield {PARAGRAPH: text} if size <= MAX_ROW_BYTES else "too-long"
            paragraph, size = [], 0


ROWS: dict[str, Callable[[BinaryIO, Mapping[str, str]], Iterator[Row]]] = {
    "jsonl": _jsonl_rows,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "text": _text_rows,
}
