"""What all releases of MovieLens have in common: films as texts, stars as targets, what users state of themselves."""

import bisect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from shared.errors import DataError

from .lines import MAX_RECORDS, at, numbered_lines
from .records import Dataset, Record, UserData, split_by_time

MAX_DIGITS = 18  # fits 64 bits
AGE_BANDS = (1, 18, 25, 35, 45, 50, 56)  # MovieLens 1M states the first year of a band, 100k the age in years
RELEASES = {  # which files a release has, for whoever asks for another
    "movielens-100k": (("ml-100k.inter", "ml-100k.item"), ("u.data", "u.item")),
    "movielens-1m": (("ratings.dat", "movies.dat"),),
    "movielens-latest": (("ratings.csv", "movies.csv"),),
}

Rows = Iterable[tuple[int, list[str]]]  # line number, columns
Profiles = Mapping[int, Mapping[str, str]]
_T = TypeVar("_T")


def find_files(folder: Path, release: str) -> tuple[Path, Path]:
    """The two files of a release; of two layouts the first that is there.

    Raises:
        DataError: They are not there; what is, is named.
    """
    for pair in RELEASES[release]:
        if all((folder / name).is_file() for name in pair):
            return folder / pair[0], folder / pair[1]
    expected = " or ".join(" and ".join(pair) for pair in RELEASES[release])
    raise DataError(f"{release} needs {expected}; {folder} {_found(folder)}. Give the folder that holds them.")


def separated(
    path: Path, separator: str, num_columns: int, *, encoding: str, header: str | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Line number and columns of each line after the header.

    Raises:
        DataError: Another header, no row, or a line with another number of columns or not as ``numbered_lines`` gives.
    """
    lines = numbered_lines(path, encoding=encoding)
    if header is not None:
        _, first = next(lines, (1, ""))
        if first != header:
            raise at(path, 1, f"header must be {header!r}, got {short(first)!r}")
    for number, text in not_empty(lines, path):
        columns = text.split(separator)
        if len(columns) != num_columns:
            raise at(path, number, f"must have {num_columns} columns, got {len(columns)}")
        yield number, columns


def not_empty(rows: Iterable[_T], path: Path) -> Iterator[_T]:
    """The rows, of which there must be one."""
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path} must hold at least one row, got none; fetch or copy the file again.")


def read_films(path: Path, rows: Rows, text: Callable[[list[str]], str]) -> dict[int, str]:
    """Film id -> text, by what makes a text of the columns after the id.

    Raises:
        DataError: A line is not as published, or a film is there twice.
    """
    texts: dict[int, str] = {}
    for line, columns in rows:
        try:
            item = whole_number("item id", columns[0])
            if item in texts:
                raise ValueError(f"item id {item} must occur once, got it a second time")
            texts[item] = text(columns[1:])
        except ValueError as error:
            raise at(path, line, str(error)) from None
    return texts


def read_ratings(
    path: Path, rows: Rows, texts: Mapping[int, str], *, films: str, step: float = 1.0
) -> dict[int, list[Record]]:
    """User id -> records, of rows of user, film, stars and seconds.

    Args:
        path: The file, for messages.
        rows: Its rows.
        texts: Of the films.
        films: Name of the file they come from.
        step: Between two ratings; also the lowest one.

    Raises:
        DataError: A line is not as published, rates a film that is not listed, or one its user has rated before.
    """
    found: dict[int, dict[int, Record]] = {}
    for count, (line, columns) in enumerate(rows, start=1):
        try:
            user = whole_number("user id", columns[0])
            item = whole_number("item id", columns[1])
            if item not in texts:
                raise ValueError(f"item id must be listed in {films}, got {item}")
            own = found.setdefault(user, {})
            if item in own:
                raise ValueError(f"user {user} must rate item {item} once, got a second rating")
            if count > MAX_RECORDS:
                raise ValueError(f"a simulation holds at most {MAX_RECORDS:,} ratings, got more; take fewer users")
            stars = _stars(columns[2], step)
            own[item] = Record(texts[item], stars, str(item), whole_number("timestamp", columns[3]))
        except ValueError as error:
            raise at(path, line, str(error)) from None
    return {user: list(own.values()) for user, own in found.items()}


def read_profiles(path: Path, rows: Rows, profile: Callable[[list[str]], dict[str, str]]) -> Profiles:
    """User id -> what the user states, by what makes a profile of the columns after the id; none without a file.

    Raises:
        DataError: A line is not as published, or a user is there twice.
    """
    found: dict[int, dict[str, str]] = {}
    for line, columns in rows if path.is_file() else ():
        try:
            user = whole_number("user id", columns[0])
            if user in found:
                raise ValueError(f"user {user} must occur once, got it a second time")
            found[user] = profile(columns[1:])
        except ValueError as error:
            raise at(path, line, str(error)) from None
    return found


def make_dataset(
    release: str, ratings: Mapping[int, list[Record]], texts: Mapping[int, str], profiles: Profiles
) -> Dataset:
    """Users by ascending id, each split by time; the catalogue by ascending film id, each text once.

    Raises:
        DataError: There are profiles, and none of a user who rated.
    """
    if profiles and (unknown := sorted(ratings.keys() - profiles.keys())):
        raise DataError(f"{release} must have a profile of every user who rated, user {unknown[0]} has none.")
    users = tuple(
        UserData(str(user), *split_by_time(ratings[user]), profiles.get(user, {})) for user in sorted(ratings)
    )
    return Dataset(release, users, tuple(dict.fromkeys(texts[item] for item in sorted(texts))))


def film_text(title_and_year: str, genres: Iterable[str]) -> str:
    """``Title (year). Genre, Genre``; ValueError where one is missing."""
    title_and_year, listed = title_and_year.strip(), ", ".join(genres)  # some published titles end in a blank
    if not title_and_year or not listed:
        raise ValueError(f"a film must have a title and a genre, got {short(title_and_year)!r} and {listed!r}")
    return f"{title_and_year}. {listed}"


def stated(gender: str, age: str, occupation: str) -> dict[str, str]:
    """A profile, in whose ``age`` 100k and 1M agree: the first year of a band."""
    if gender not in ("F", "M") or not occupation.strip():
        raise ValueError("a user must have gender F or M and an occupation, got others")
    years = whole_number("age", age)
    if not 1 <= years < 150:
        raise ValueError("age must be in 1..149, got another")
    band = AGE_BANDS[bisect.bisect_right(AGE_BANDS, years) - 1]
    return {"gender": gender, "age": str(band), "occupation": occupation.strip()}


def whole_number(name: str, text: str) -> int:
    """A number of plain digits; ValueError for another."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name} must be a whole number, got {short(text)!r}")
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{name} must have at most {MAX_DIGITS} digits, got {len(text)}")
    return int(text)


def short(text: str) -> str:
    """A value quoted in a message: never a whole line of a user's file, nor what a terminal would obey."""
    text = text if len(text) <= 60 else f"{text[:59]}…"
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in text)


def _stars(text: str, step: float) -> float:
    try:
        stars = float(text) if text.isascii() and "_" not in text else math.nan  # Python takes more for a number
    except ValueError:
        raise ValueError(f"rating must be a number, got {short(text)!r}") from None
    if not step <= stars <= 5:
        raise ValueError(f"rating must be in {step:g}..5, got {short(text)}")
    if stars % step:
        raise ValueError(f"rating must be a multiple of {step:g}, got {short(text)}")
    return stars


def _found(folder: Path) -> str:
    if not folder.is_dir():
        return "is not a folder"
    names = sorted(path.name for path in folder.iterdir())
    for release, layouts in RELEASES.items():
        for pair in layouts:
            if set(pair) <= set(names):
                return f"holds {' and '.join(sorted(pair))}, which data.format = {release!r} reads"
    shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    return f"does not hold both, but {shown or 'nothing'}"
