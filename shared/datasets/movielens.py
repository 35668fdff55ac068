"""MovieLens as GroupLens publishes it, or RecBole copied it: films as texts, stars as targets, one reader a release."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .lines import at, csv_rows
from .movielens_rows import (
    Profiles,
    Rows,
    film_text,
    find_files,
    make_dataset,
    not_empty,
    read_films,
    read_profiles,
    read_ratings,
    separated,
    short,
    stated,
    whole_number,
)
from .records import Dataset

# In the order of the flags in u.item.
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
# By the number that stands for it in users.dat.
OCCUPATIONS = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip
NO_GENRES = "(no genres listed)"


def read_100k(folder: Path) -> Dataset:
    """Read MovieLens 100k from either layout; RecBole's wins where both are there.

    Args:
        folder: Holds ``ml-100k.inter`` and ``ml-100k.item``, or ``u.data`` and ``u.item``; for profiles also
            ``ml-100k.user`` or ``u.user``.

    Returns:
        Users by ascending id, each split by time; the catalogue is the text of every film, rated or not, by
        ascending item id, each text once (18 films are listed under two ids). A profile has gender, age (the first
        year of the band of MovieLens 1M) and occupation.

    Raises:
        DataError: A file is missing, empty, or holds a line that is not as published, which is named.

    Guarantee:
        Both layouts give the same texts for the same film, and the same profile of the same user.

    Source:
        Harper and Konstan 2015, The MovieLens Datasets, and the README of ml-100k.
    """
    ratings, films = find_files(folder, "movielens-100k")
    layout = _LAYOUTS[ratings.name]
    texts = read_films(films, layout.films(films), layout.text)
    rows = read_ratings(ratings, layout.ratings(ratings), texts, films=films.name)
    users = folder / layout.users_file
    return make_dataset("movielens-100k", rows, texts, read_profiles(users, layout.users(users), _profile_100k))


def read_1m(folder: Path) -> Dataset:
    """Read MovieLens 1M: ratings.dat and movies.dat, and users.dat for profiles, parted by ``::``, latin-1.

    Args:
        folder: Holds the files.

    Returns:
        As ``read_100k``; a profile's occupation is the name that the README gives to the number.

    Raises:
        DataError: A file is missing, empty, or holds a line that is not as published, which is named.

    Source:
        Harper and Konstan 2015, The MovieLens Datasets, and the README of ml-1m.
    """
    ratings, films = find_files(folder, "movielens-1m")
    texts = read_films(films, _dat(films, 3), lambda columns: film_text(columns[0], _genres(columns[1])))
    rows = read_ratings(ratings, _dat(ratings, 4), texts, films=films.name)
    users = folder / "users.dat"
    profiles: Profiles = read_profiles(users, _dat(users, 5), _profile_1m)
    return make_dataset("movielens-1m", rows, texts, profiles)


def read_latest(folder: Path) -> Dataset:
    """Read MovieLens latest, or another release with ratings.csv and movies.csv (20M, 25M, 32M): stars from 0.5 to 5.

    Args:
        folder: Holds the two files.

    Returns:
        As ``read_100k``, without profiles, which these releases do not have; a film without a genre has ``unknown``.
        Targets are half stars as published: the scale is ``task.low = 0.5``.

    Raises:
        DataError: A file is missing, empty, or holds a line that is not as published, which is named; or the release
            holds more ratings than a simulation does.

    Source:
        Harper and Konstan 2015, The MovieLens Datasets, and the README of ml-latest-small.
    """
    ratings, films = find_files(folder, "movielens-latest")
    texts = read_films(
        films, _csv(films, "movieId,title,genres"), lambda columns: film_text(columns[0], _genres(columns[1]))
    )
    rows = read_ratings(ratings, _csv(ratings, "userId,movieId,rating,timestamp"), texts, films=films.name, step=0.5)
    return make_dataset("movielens-latest", rows, texts, {})


@dataclass(frozen=True)
class _Layout:
    """One way MovieLens 100k was published: how its files are parted, and what makes a text of a film's columns."""

    ratings: Callable[[Path], Rows]
    films: Callable[[Path], Rows]
    users: Callable[[Path], Rows]
    users_file: str
    text: Callable[[list[str]], str]


def _recbole(num_columns: int, header: str) -> Callable[[Path], Rows]:
    return lambda path: separated(path, "\t", num_columns, encoding="utf-8", header=header)


def _grouplens(num_columns: int, separator: str) -> Callable[[Path], Rows]:
    return lambda path: separated(path, separator, num_columns, encoding="latin-1")


def _dat(path: Path, num_columns: int) -> Rows:
    return separated(path, "::", num_columns, encoding="latin-1")


def _csv(path: Path, header: str) -> Rows:
    rows = csv_rows(path)
    _, first = next(rows, (1, []))
    if first != header.split(","):
        raise at(path, 1, f"header must be {header!r}, got {short(','.join(first))!r}")
    return not_empty(rows, path)


def _text_recbole(columns: list[str]) -> str:
    title, year, genres = columns
    if year == "unkonwn":  # so spelt by RecBole, for the one film without title, date and genre
        title, year = title.replace("unkonwn", "unknown"), ""
    return film_text(f"{title} ({year})" if year else title, genres.split())


def _text_grouplens(columns: list[str]) -> str:
    title, _release, _video_release, _url, *flags = columns
    if not set(flags) <= {"0", "1"}:
        raise ValueError(f"the {len(GENRES)} genre flags must be 0 or 1, got {short('|'.join(flags))}")
    return film_text(title, [genre for genre, flag in zip(GENRES, flags, strict=True) if flag == "1"])


def _genres(text: str) -> list[str]:
    return ["unknown"] if text == NO_GENRES else text.split("|")


def _profile_100k(columns: list[str]) -> dict[str, str]:
    age, gender, occupation, _zip_code = columns
    return stated(gender, age, occupation)


def _profile_1m(columns: list[str]) -> dict[str, str]:
    gender, age, occupation, _zip_code = columns
    number = whole_number("occupation", occupation)
    if number >= len(OCCUPATIONS):
        raise ValueError(f"occupation must be in 0..{len(OCCUPATIONS) - 1}, got another")
    return stated(gender, age, OCCUPATIONS[number])


_LAYOUTS = {
    "ml-100k.inter": _Layout(
        ratings=_recbole(4, "user_id:token\titem_id:token\trating:float\ttimestamp:float"),
        films=_recbole(4, "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"),
        users=_recbole(5, "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"),
        users_file="ml-100k.user",
        text=_text_recbole,
    ),
    "u.data": _Layout(
        ratings=_grouplens(4, "\t"),
        films=_grouplens(5 + len(GENRES), "|"),
        users=_grouplens(5, "|"),
        users_file="u.user",
        text=_text_grouplens,
    ),
}
