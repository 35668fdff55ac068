"""Amazon Reviews of 2014, 2018 and 2023 as published: the text is a review's own words, or its product."""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shared.errors import DataError

from .lines import MAX_RECORDS, at, json_rows, public_texts
from .records import Dataset, Record, UserData, is_text, is_user_id, split_by_time

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
META = "meta"  # how names of files with products begin
MAX_LINE_BYTES = 4 << 20  # descriptions of products hold whole pages
MAX_PRODUCTS = 2_000_000
MAX_PUBLIC = 10_000  # products whose texts are the catalogue: the backbone runs on each
_FIRST_MS = 10**11  # as seconds the year 5138, as milliseconds 1973: tells one from the other


@dataclass(frozen=True)
class _Release:
    """What a release calls the columns that every review has, and those that it may have."""

    rating: str
    user: str
    item: str
    time: str
    per_second: int
    words: tuple[str, ...]  # the first that is not empty is what the user wrote


_RELEASES = {  # by the column that only it has
    "reviewerID": _Release("overall", "reviewerID", "asin", "unixReviewTime", 1, ("reviewText", "summary")),
    "user_id": _Release("rating", "user_id", "parent_asin", "timestamp", 1000, ("text", "title")),
}


def read_reviews(folder: Path) -> Dataset:
    """Read Amazon reviews: what a user wrote is the text, the stars are the target.

    The text is the review (``reviewText``, in 2023 ``text``), or its headline where it has no other words.

    Args:
        folder: Holds one file or more of a release, JSON lines, plain or ``.gz``, and ``public.txt`` with public texts,
            one a line, or files ``meta*`` whose products' texts are the public ones; see ``docs/data.md``.

    Returns:
        Users by id, each split by time; reviews without a word and equal ones are left out and counted. Without
        ``public.txt`` and products there is no public text, which some tasks need.

    Raises:
        DataError: There is no file, or a line is not as published, which is named and not quoted.

    Source:
        He and McAuley 2016, arXiv:1602.01585 (2014); Ni, Li and McAuley 2019 (2018); Hou et al. 2024,
        arXiv:2403.03952 (2023). Rating from a review's text: Salemi et al. 2024, arXiv:2304.11406, LaMP-3.
    """
    rows, left_out = _read(folder, None)
    texts = public_texts(folder) or _catalogue(_products(folder))
    return Dataset("amazon-reviews", _users(rows), texts, left_out)


def read_products(folder: Path) -> Dataset:
    """Read Amazon ratings: the product is the text, ``Title. Category, Category``, the stars are the target.

    Args:
        folder: Holds reviews as for ``amazon-reviews``, and at least one file ``meta*`` of the same release.

    Returns:
        Users by id, each split by time; reviews of products without a title and equal ones are left out and counted.
        The catalogue is of the products, rated or not; of more than 10,000 those first by a public hash of their ids.

    Raises:
        DataError: A file is missing, or a line is not as published, which is named and not quoted.

    Source:
        As ``read_reviews``.
    """
    products = _products(folder)
    if not products:
        raise DataError(f"amazon-products needs a file meta* with titles in {folder}, got none; see docs/data.md.")
    rows, left_out = _read(folder, products)
    return Dataset("amazon-products", _users(rows), _catalogue(products), left_out)


def _users(rows: Mapping[str, dict[Record, None]]) -> tuple[UserData, ...]:
    return tuple(UserData(user, *split_by_time(rows[user])) for user in sorted(rows))


def _read(folder: Path, products: Mapping[str, str] | None) -> tuple[dict[str, dict[Record, None]], dict[str, int]]:
    """Records by user, and how many reviews are none; texts are the products' where there are products."""
    files = _files(folder, meta=False)
    if not files:
        raise DataError(f"Amazon reviews need a file of JSON lines ({', '.join(SUFFIXES)}); {folder} holds none.")
    found: dict[str, dict[Record, None]] = {}
    left_out: Counter[str] = Counter()
    count = 0
    for path in files:
        for line, row in json_rows(path, max_bytes=MAX_LINE_BYTES):
            try:
                user, record = _review(row)
            except ValueError as error:
                raise at(path, line, str(error)) from None
            if products is not None:
                record = replace(record, text=products.get(record.item, ""))
            own = found.setdefault(user, {})
            if not record.text:
                left_out["reviews without words" if products is None else "reviews of products without a title"] += 1
            elif record in own:
                left_out["reviews equal to an earlier one"] += 1
            else:
                own[record] = None
                count += 1
            if count > MAX_RECORDS:
                raise at(path, line, f"a simulation holds at most {MAX_RECORDS:,} reviews, got more", do="Take fewer.")
    return {user: own for user, own in found.items() if own}, dict(left_out)


def _review(row: Mapping[str, Any]) -> tuple[str, Record]:
    release = next((release for column, release in _RELEASES.items() if column in row), None)
    if release is None:
        raise ValueError(f"a review must have {' or '.join(_RELEASES)}, got neither")
    user, item = row[release.user], row.get(release.item) or row.get("asin")
    if not (isinstance(user, str) and is_user_id(user)):
        raise ValueError(f"{release.user} must be a plain name, got another")
    if not (isinstance(item, str) and item and is_text(item)):
        raise ValueError(f"{release.item} must be a text, got none")
    stars: Any = row.get(release.rating)
    time: Any = row.get(release.time)
    if not (type(stars) in (int, float) and 1 <= stars <= 5):
        raise ValueError(f"{release.rating} must be a number in 1..5, got another")
    if not (type(time) is int and time >= 0 and (time >= _FIRST_MS) == (release.per_second > 1)):
        unit = "milliseconds" if release.per_second > 1 else "seconds"
        raise ValueError(f"{release.time} must be whole {unit} since 1970, got another")
    words = next((text for column in release.words if (text := _optional(row, column))), "")
    return user, Record(words, float(stars), item, time // release.per_second)


def _optional(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if not (isinstance(value, str) and is_text(value)):
        raise ValueError(f"{column} must be a text or missing, got another")
    return value.strip()


def _products(folder: Path) -> dict[str, str]:
    """Product id -> text, of all products with a title; the first of a product that is there twice."""
    found: dict[str, str] = {}
    for path in _files(folder, meta=True):
        for line, row in json_rows(path, max_bytes=MAX_LINE_BYTES):
            try:
                item, text = _product(row)
            except ValueError as error:
                raise at(path, line, str(error)) from None
            if text and len(found) >= MAX_PRODUCTS:
                raise at(path, line, f"at most {MAX_PRODUCTS:,} products are read, got more", do="Take fewer.")
            if text:
                found.setdefault(item, text)
    return found


def _product(row: Mapping[str, Any]) -> tuple[str, str]:
    item = row.get("parent_asin") or row.get("asin")
    if not (isinstance(item, str) and item):
        raise ValueError("a product must have parent_asin or asin, got neither")
    title, categories = _optional(row, "title"), row.get("categories") or row.get("category") or []
    if not isinstance(categories, list):
        raise ValueError("categories must be a list or missing, got another")
    known = dict.fromkeys(_categories(categories))
    return item, f"{title}. {', '.join(known)}" if title and known else title


def _categories(listed: list[Any]) -> Iterator[str]:
    for each in listed:
        if isinstance(each, list):  # of 2014: one list a path in the tree
            yield from _categories(each)
        elif isinstance(each, str) and each.strip() and is_text(each):
            yield each.strip()


def _catalogue(products: Mapping[str, str]) -> tuple[str, ...]:
    """Texts of products, chosen by nothing that a user did."""
    chosen = heapq.nsmallest(MAX_PUBLIC, products, key=lambda item: hashlib.sha256(item.encode()).digest())
    return tuple(dict.fromkeys(products[item] for item in sorted(chosen)))


def _files(folder: Path, *, meta: bool) -> list[Path]:
    return sorted(
        path
        for path in folder.glob("*")
        if path.name.endswith(SUFFIXES) and path.name.startswith(META) == meta and not path.name.startswith(".")
    )
