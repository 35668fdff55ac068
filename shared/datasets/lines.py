"""Lines of a published file, plain or gz, one at a time with their numbers; a broken one is named, never quoted."""

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from shared.errors import DataError

MAX_LINE_BYTES = 10_000  # the longest line of a MovieLens file has 500
MAX_EMPTY = 100_000  # lines in a row; a small file of gzip holds millions
MAX_RECORDS = 5_000_000  # of a data set; with their texts about 2 GB
PUBLISHED = "Compare the file with the published one, or fetch it again."
OWN_FILE = "Mend it, or leave it out."


def at(path: Path, line: int, what: str, *, do: str = PUBLISHED) -> DataError:
    """The error that a line of a file is: what must hold and what was got, then what to do."""
    return DataError(f"{path}, line {line}: {what}. {do}")


def numbered_lines(
    path: Path, *, encoding: str = "utf-8", max_bytes: int = MAX_LINE_BYTES, do: str = PUBLISHED
) -> Iterator[tuple[int, str]]:
    """Number and text of each line, without its end; empty lines at the end of the file are none.

    Args:
        path: A file; gzip where its name ends in ``.gz``.
        encoding: ``utf-8``, with or without a byte order mark, or ``latin-1``.
        max_bytes: What a line may have; also all that is held of the file.
        do: What a message tells to do.

    Raises:
        DataError: The file cannot be read, or holds a line that is too long, not of the encoding, or with a NUL byte.
            One that must be latin-1 and was converted to utf-8 is refused at its end.
    """
    empty = 0
    others, utf8 = False, True  # latin-1 itself refuses nothing, so what would be utf-8 is told by all lines
    try:
        with _open(path) as file:
            number = 0
            while line := file.readline(max_bytes + 2):
                number += 1
                if len(line.removesuffix(b"\n").removesuffix(b"\r")) > max_bytes:
                    raise at(path, number, f"must be at most {max_bytes} bytes long, got more", do=do)
                text = _decoded(line, encoding, path, number, do)
                if not line.isascii():
                    others, utf8 = True, utf8 and _is_utf8(line)
                if not text:
                    empty += 1
                    if empty > MAX_EMPTY:
                        raise at(path, number, f"must not be the last of more than {MAX_EMPTY:,} empty lines", do=do)
                    continue
                for before in range(number - empty, number):
                    yield before, ""
                empty = 0
                yield number, text
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} must be whole and of gzip, got: {error}; fetch or copy the file again.") from None
    except OSError as error:
        raise DataError(f"{path} must be readable, got: {error.strerror}; check its permissions.") from error
    if encoding == "latin-1" and others and utf8:
        raise DataError(f"{path} must be latin-1 as published, got utf-8; fetch or copy the file again.")


def csv_rows(path: Path, *, max_bytes: int = MAX_LINE_BYTES, do: str = PUBLISHED) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line and columns of each row of a CSV file, the header first; empty lines are no rows.

    Raises:
        DataError: As ``numbered_lines``; or a row is not CSV, or has more or fewer columns than the header.
    """
    lines = (f"{text}\n" for _, text in numbered_lines(path, max_bytes=max_bytes, do=do))
    rows = csv.reader(lines, strict=True)
    header: list[str] = []
    while True:
        first = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise at(path, first, f"must be CSV, got: {error}", do=do) from None
        if row is None:
            return
        if row:
            header = header or row
            if len(row) != len(header):
                raise at(path, first, f"must have {len(header)} columns as the header, got {len(row)}", do=do)
            yield first, row


def json_rows(path: Path, *, max_bytes: int, do: str = PUBLISHED) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of each line of a file of JSON lines; empty lines are no rows.

    Raises:
        DataError: As ``numbered_lines``, or a line is not one JSON object.
    """
    for number, text in numbered_lines(path, max_bytes=max_bytes, do=do):
        if text.strip():
            try:
                row: object = json.loads(text)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise at(path, number, "must be one JSON object, got something else", do=do)
            yield number, row


def public_texts(folder: Path) -> tuple[str, ...]:
    """The distinct lines of ``public.txt`` in a folder, for formats that have no catalogue; none where it is missing.

    Raises:
        DataError: The file is there and cannot be read as utf-8.
    """
    path = folder / "public.txt"
    if not path.exists():
        return ()
    lines = numbered_lines(path, max_bytes=1 << 17, do=OWN_FILE)
    return tuple(dict.fromkeys(text.strip() for _, text in lines if text.strip()))


def _open(path: Path) -> BinaryIO:
    return cast("BinaryIO", gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _decoded(line: bytes, encoding: str, path: Path, number: int, do: str) -> str:
    if b"\0" in line:
        raise at(path, number, "text must hold no NUL byte, got one", do=do)
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError as error:
        raise at(path, number, f"text must be {encoding}, got byte 0x{line[error.start]:02x}", do=do) from None
    if number == 1 and encoding == "utf-8":
        text = text.removeprefix("\ufeff")
    return text.removesuffix("\n").removesuffix("\r")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
