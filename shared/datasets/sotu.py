"""State of the Union addresses, in the extract that ships with the package: how an author goes on."""

import gzip
import json
import zlib
from pathlib import Path
from typing import Any

from shared.errors import DataError

from .records import Dataset, Record, UserData, split_by_time

FOLDER = Path(__file__).parent  # holds the extract and its notice
FILE_NAME = "sotu.jsonl.gz"
NUM_BEFORE = 2  # sentences a record shows
_MAX_BYTES = 64 * 2**20  # unpacked; the extract has 5 MB
MIN_PASSAGE = NUM_BEFORE + 1  # sentences that make at least one record


def read_sotu(folder: Path) -> Dataset:
    """Read speeches as records of three consecutive sentences: two are the text, the third is the response.

    Args:
        folder: Holds ``sotu.jsonl.gz``, one speech a line: ``name``, ``year``, and ``passages``, each a list of
            consecutive sentences. ``FOLDER`` is the one that ships with the package.

    Returns:
        Authors by name, each split in the order of the file; a record's time is its running number, its item the year
        and the sentence's number in the speech's extract. There are no public texts and no targets.

    Raises:
        DataError: The file is missing, damaged or empty, or a line is not such a speech.

    Guarantee:
        A sentence is in one record at most, and no record reaches over the end of a passage.

    Source:
        The notice beside the file.
    """
    path = folder / FILE_NAME
    rows: dict[str, list[Record]] = {}
    seen: set[tuple[str, int]] = set()
    for number, line in enumerate(_lines(path), start=1):
        try:
            name, year, passages = _speech(line)
            if (name, year) in seen:
                raise ValueError("an author's speech of a year must be on one line, got it a second time")
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}. Install the package again, or mend the file.") from None
        seen.add((name, year))
        _add_records(rows.setdefault(name, []), year, passages)
    users = tuple(UserData(name, *split_by_time(rows[name])) for name in sorted(rows))
    return Dataset("sotu", users, ())


def _lines(path: Path) -> list[str]:
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
        lines = content.decode("utf-8").removesuffix("\n").split("\n")
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise DataError(f"{path} must be gzip of utf-8, got: {error}. Install the package again.") from None
    except OSError as error:
        raise DataError(f"{path} must be readable, got: {error.strerror}. Give the folder that holds it.") from error
    if len(content) > _MAX_BYTES:
        raise DataError(f"{path} must unpack to at most {_MAX_BYTES} bytes, got more. Install the package again.")
    if lines == [""]:
        raise DataError(f"{path} must hold at least one speech, got none. Install the package again.")
    return lines


def _speech(line: str) -> tuple[str, int, list[list[str]]]:
    try:
        found: Any = json.loads(line)
    except (ValueError, RecursionError):
        raise ValueError("must be JSON, got something else") from None
    if not (isinstance(found, dict) and found.keys() == {"name", "year", "passages"}):
        raise ValueError("must be an object with name, year and passages, got another")
    name, year, passages = found["name"], found["year"], found["passages"]
    if not (isinstance(name, str) and name and type(year) is int):
        raise ValueError("name must be a text and year a whole number, got others")
    if not (isinstance(passages, list) and passages and all(map(_is_passage, passages))):
        raise ValueError(f"passages must be lists of at least {MIN_PASSAGE} sentences, got others")
    return name, year, passages


def _is_passage(passage: object) -> bool:
    return (
        isinstance(passage, list)
        and len(passage) >= MIN_PASSAGE
        and all(isinstance(sentence, str) and sentence.strip() for sentence in passage)
    )


def _add_records(records: list[Record], year: int, passages: list[list[str]]) -> None:
    number = 0
    for passage in passages:
        for i in range(NUM_BEFORE, len(passage), MIN_PASSAGE):
            before, item = " ".join(passage[i - NUM_BEFORE : i]), f"{year}-{number + i + 1}"
            records.append(Record(before, 0.0, item, len(records) + 1, passage[i]))
        number += len(passage)
