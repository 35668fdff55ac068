"""MovieLens 100k, as GroupLens published it or RecBole copied it: films as texts, stars as targets."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shared.errors import DataError

from .records import Dataset, Record, UserData, split_by_time

# In the order of the flags in u.item.
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
MAX_LINE = 10_000  # the longest published one has 200
MAX_DIGITS = 18  # fits 64 bits
OTHER_RELEASES = {
    "MovieLens latest, 20M or 25M": ("movies.csv", "ratings.csv"),
    "MovieLens 1M or 10M": ("movies.dat", "ratings.dat"),
}


@dataclass(frozen=True)
class Layout:
    """One way the same data were published.

    Args:
        ratings: File with one rating a line: user, item, rating, timestamp, parted by TAB.
        films: File with one film a line.
        encoding: Of both files.
        ratings_header: First line of ``ratings``, or None where there is no header.
        films_header: First line of ``films``, or None.
        separator: Parts the columns of ``films``.
        num_columns: Columns of ``films``, the first being the item id.
        text: The other columns of a film -> its text; ValueError says what is wrong with them.
    """

    ratings: str
    films: str
    encoding: str
    ratings_header: str | None
    films_header: str | None
    separator: str
    num_columns: int
    text: Callable[[list[str]], str]


def read_100k(folder: Path) -> Dataset:
    """Read MovieLens 100k from either layout; RecBole's wins where both are there.

    Args:
        folder: Holds ``ml-100k.inter`` and ``ml-100k.item``, or ``u.data`` and ``u.item``.

    Returns:
        Users by ascending id, each split by time; the catalogue is the text of every film, rated or not, by
        ascending item id, each text once (18 films are listed under two ids).

    Raises:
        DataError: A file is missing, empty, or holds a line that is not as published, which is named.

    Guarantee:
        Both layouts give the same texts for the same film.

    Source:
        Harper and Konstan 2015, The MovieLens Datasets, and the README of ml-100k.
    """
    layout = _find_layout(folder)
    texts = _read_films(folder / layout.films, layout)
    rows = _read_ratings(folder / layout.ratings, layout, texts)
    users = tuple(UserData(str(user), *split_by_time(rows[user])) for user in sorted(rows))
    return Dataset("movielens-100k", users, tuple(dict.fromkeys(texts[item] for item in sorted(texts))))


def _find_layout(folder: Path) -> Layout:
    for layout in LAYOUTS:
        if (folder / layout.ratings).is_file() and (folder / layout.films).is_file():
            return layout
    expected = " or ".join(f"{layout.ratings} and {layout.films}" for layout in LAYOUTS)
    raise DataError(f"MovieLens 100k needs {expected}; {folder} {_found(folder)}. Give the folder that holds them.")


def _found(folder: Path) -> str:
    if not folder.is_dir():
        return "is not a folder"
    names = sorted(path.name for path in folder.iterdir())
    for release, files in OTHER_RELEASES.items():
        if set(files) <= set(names):
            return f"holds {' and '.join(files)}, as {release} has them, which this format does not read"
    shown = ", ".join(names[:6]) + (", …" if len(names) > 6 else "")
    return f"does not hold both files of either layout, but {shown or 'nothing'}"


def _read_films(path: Path, layout: Layout) -> dict[int, str]:
    texts: dict[int, str] = {}
    for line, columns in _rows(path, layout.encoding, layout.films_header, layout.separator, layout.num_columns):
        try:
            item = _whole_number("item id", columns[0])
            if item in texts:
                raise ValueError(f"item id {item} must occur once, got it a second time")
            texts[item] = layout.text(columns[1:])
        except ValueError as error:
            raise _at(path, line, str(error)) from None
    return texts


def _read_ratings(path: Path, layout: Layout, texts: dict[int, str]) -> dict[int, list[Record]]:
    rows: dict[int, list[Record]] = {}
    seen: set[tuple[int, int]] = set()
    for line, columns in _rows(path, layout.encoding, layout.ratings_header, "\t", 4):
        try:
            user = _whole_number("user id", columns[0])
            item = _whole_number("item id", columns[1])
            if item not in texts:
                raise ValueError(f"item id must be listed in {layout.films}, got {item}")
            if (user, item) in seen:
                raise ValueError(f"user {user} must rate item {item} once, got a second rating")
            seen.add((user, item))
            record = Record(
                text=texts[item],
                target=_stars(columns[2]),
                item=str(item),
                timestamp=_whole_number("timestamp", columns[3]),
            )
        except ValueError as error:
            raise _at(path, line, str(error)) from None
        rows.setdefault(user, []).append(record)
    return rows


def _rows(
    path: Path, encoding: str, header: str | None, separator: str, num_columns: int
) -> Iterator[tuple[int, list[str]]]:
    """Give line number and columns of each line after the header."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} must be readable, got: {error.strerror}; check its permissions.") from error
    if (nul := content.find(b"\0")) >= 0:
        raise _at(path, content.count(b"\n", 0, nul) + 1, "text must hold no NUL byte, got one")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise _at(path, line, f"text must be {encoding}, got byte 0x{content[error.start]:02x}") from None
    if encoding == "latin-1" and not content.isascii() and _is_utf8(content):  # latin-1 itself refuses nothing
        raise DataError(f"{path} must be latin-1 as published, got utf-8; fetch or copy the file again.")
    # Not splitlines(): it would also split at characters that titles may hold.
    lines = [row.removesuffix("\r") for row in text.rstrip("\r\n").split("\n")]
    if header is not None and lines[0] != header:
        raise _at(path, 1, f"header must be {header!r}, got {_short(lines[0])!r}")
    first = 0 if header is None else 1
    if lines[first:] in ([], [""]):
        raise DataError(f"{path} must hold at least one row, got none; fetch or copy the file again.")
    for number, row in enumerate(lines[first:], start=first + 1):
        if len(row) > MAX_LINE:
            raise _at(path, number, f"must be at most {MAX_LINE} characters long, got {len(row)}")
        columns = row.split(separator)
        if len(columns) != num_columns:
            raise _at(path, number, f"must have {num_columns} columns, got {len(columns)}")
        yield number, columns


def _text_recbole(columns: list[str]) -> str:
    title, year, genres = columns
    if year == "unkonwn":  # so spelt by RecBole, for the one film without title, date and genre
        title, year = title.replace("unkonwn", "unknown"), ""
    return _text(f"{title} ({year})" if year else title, genres.split())


def _text_grouplens(columns: list[str]) -> str:
    title, _release, _video_release, _url, *flags = columns
    if not set(flags) <= {"0", "1"}:
        raise ValueError(f"the {len(GENRES)} genre flags must be 0 or 1, got {_short('|'.join(flags))}")
    return _text(title, [genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1"])


def _text(title_and_year: str, genres: list[str]) -> str:
    title_and_year = title_and_year.strip()  # some published titles end in a blank
    if not title_and_year or not genres:
        raise ValueError(f"a film must have a title and a genre, got {_short(title_and_year)!r} and {genres}")
    return f"{title_and_year}. {', '.join(genres)}"


def _whole_number(name: str, text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name} must be a whole number, got {_short(text)!r}")
    if len(text) > MAX_DIGITS:
        raise ValueError(f"{name} must have at most {MAX_DIGITS} digits, got {len(text)}")
    return int(text)


def _stars(text: str) -> float:
    try:
        stars = float(text) if text.isascii() and "_" not in text else math.nan  # Python takes more for a number
    except ValueError:
        raise ValueError(f"rating must be a number, got {_short(text)!r}") from None
    if not 1 <= stars <= 5:
        raise ValueError(f"rating must be in 1..5, got {_short(text)}")
    return stars


def _short(text: str) -> str:
    """A value quoted in a message: never a whole line of a user's file."""
    return text if len(text) <= 60 else f"{text[:59]}…"


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _at(path: Path, line: int, what: str) -> DataError:
    return DataError(f"{path}, line {line}: {what}. Compare the file with the published one, or fetch it again.")


LAYOUTS = (
    Layout(
        ratings="ml-100k.inter",
        films="ml-100k.item",
        encoding="utf-8",
        ratings_header="user_id:token\titem_id:token\trating:float\ttimestamp:float",
        films_header="item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        separator="\t",
        num_columns=4,
        text=_text_recbole,
    ),
    Layout(
        ratings="u.data",
        films="u.item",
        encoding="latin-1",
        ratings_header=None,
        films_header=None,
        separator="|",
        num_columns=5 + len(GENRES),
        text=_text_grouplens,
    ),
)
