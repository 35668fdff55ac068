"""Parsers of data: published formats, an owner's own files, LaMP's answers; each with a small valid file made here."""

import gzip
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from client.owner.reading import read_jsonl
from shared import datasets
from shared.datasets.folder import read_folder
from shared.metrics.lamp import read_answers
from simulations.fuzz.mutations import Form
from simulations.fuzz.parsers import Parser, Target, file_parser

_PUBLIC = b"A public text.\nAnother public text.\n"
_INTER = b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
_ITEM = b"item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
_FILMS = _ITEM + b"1\tToy Bakery\t1995\tAnimation Comedy\n2\tHeat\t1996\tCrime\n"
_RATINGS = _INTER + b"".join(b"%d\t%d\t%d\t%d\n" % (u, i, 3 + (u + i) % 3, 9 * u + i) for u in (1, 2) for i in (1, 2))
_COLUMNS = {"user": "id", "text": "review", "target": "stars", "item": "product", "timestamp": "when"}
_ROWS = [
    {"id": f"u{i % 2}", "review": f"Words number {i}.", "stars": i % 5 + 1, "product": f"p{i}", "when": 1000 + i}
    for i in range(6)
]
_OWN = {field: column for field, column in _COLUMNS.items() if field != "user"}


def _jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
    return ("\n".join(lines) + "\n").encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    packed = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(rows), packed)
    return packed.getvalue()


def _published(format: str, name: str, valid: bytes, others: Mapping[str, bytes]) -> Callable[[Path], Parser]:
    columns = _COLUMNS if format in datasets.TABLES else None
    return lambda folder: file_parser(
        folder, name, [valid], lambda path: datasets.read(format, path.parent, columns=columns), others=others
    )


def _own(format: str, name: str, valid: bytes) -> Callable[[Path], Parser]:
    columns: Mapping[str, str] = {} if format == "text" else _OWN
    return lambda folder: file_parser(
        folder, name, [valid], lambda path: read_folder(path.parent, format=format, columns=columns)
    )


_REVIEW = {"overall": 5.0, "reviewerID": "A1", "asin": "B1", "reviewText": "Fine.", "unixReviewTime": 1514764800}
_REVIEWS = _jsonl([_REVIEW | {"asin": f"B{i}", "unixReviewTime": 1514764800 + i} for i in range(5)])
_REVIEW_2023 = {"rating": 2.0, "title": "t", "text": "Bad.", "asin": "B1", "parent_asin": "B0", "user_id": "AE1"}
_REVIEWS_2023 = _jsonl([_REVIEW_2023 | {"timestamp": 1588687728923 + i} for i in range(5)])
_PRODUCTS = _jsonl([{"asin": f"B{i}", "title": f"Thing {i}", "categories": [["Toys", "Games"]]} for i in range(5)])
_DIALOGUES = b"".join(
    b"1 your persona: i like %s .\n2 hello ?\thi .\n3 and you ?\tme too .\t\tno .|me too .\n" % word
    for word in (b"tea", b"rain", b"books")
)
_SPEECHES = gzip.compress(
    _jsonl([{"name": f"A{i}", "year": 1900 + i, "passages": [["One.", "Two.", "Three."] * 2]} for i in range(3)]),
    mtime=0,
)


def _conversation(number: int) -> dict[str, Any]:
    said = [("user", "Who?", None, None), ("model", "Me.", 80, True), ("model", "You.", 10, False)]
    turns = [{"turn": 0, "role": r, "content": c, "score": s, "if_chosen": t} for r, c, s, t in said]
    about = {"conversation_id": f"c{number}", "user_id": f"user{number % 2}", "conversation_history": turns}
    return about | {"generated_datetime": f"2023-11-2{number} 10:00:00.5"}


_CONVERSATIONS = _jsonl([_conversation(number) for number in range(5)])
_SURVEY = _jsonl([{"user_id": f"user{i}", "age": "25-34", "religion": {"simplified": "none"}} for i in range(2)])

_TAG = (
    "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
    "explanation. tags: [sci-fi, comedy, classic] description: A film."
)
_SCORE = (
    "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without further "
    "explanation. review: Fine."
)


def _questions(number: int) -> tuple[bytes, bytes]:
    """A file of questions of LaMP-2 or LaMP-3, and the one of its answers."""
    asked, answer = (_TAG, "comedy") if number == 2 else (_SCORE, "4")
    named = {"description": "Old.", "tag": "classic"} if number == 2 else {"text": "Old.", "score": "3"}
    profile = [named | {"id": str(10 + i), "date": f"2020-01-0{i + 1}"} for i in range(3)]
    questions = [{"id": str(i), "input": f"{asked} {i}", "profile": profile} for i in range(3)]
    golds = [{"id": str(i), "output": answer} for i in range(3)]
    return json.dumps(questions).encode(), json.dumps({"task": f"LaMP_{number}", "golds": golds}).encode()


def _format(
    format: str, name: str, form: Form, valid: bytes, others: Mapping[str, bytes] | None = None
) -> tuple[str, Target]:
    return f"{format}: {name}", Target("anybody", form, _published(format, name, valid, others or {}))


def _lamp(number: int) -> list[tuple[str, Target]]:
    (questions, answers), names = _questions(number), ("dev_questions.json", "dev_outputs.json")
    beside = {names[0]: questions, names[1]: answers, "public.txt": _PUBLIC}
    return [
        _format(f"lamp-{number}", name, "json", valid, beside)
        for name, valid in zip(names, (questions, answers), strict=True)
    ]


_PAIRS: tuple[tuple[str, Target], ...] = (
    _format("movielens-100k", "ml-100k.inter", "lines", _RATINGS, {"ml-100k.item": _FILMS}),
    _format("movielens-100k", "ml-100k.item", "lines", _FILMS, {"ml-100k.inter": _RATINGS}),
    _format(
        "movielens-1m",
        "ratings.dat",
        "lines",
        b"1::1::4::978300000\n1::2::5::978300001\n2::1::3::978300002\n2::2::1::1\n",
        {"movies.dat": b"1::Old (1971)::Drama\n2::New (1999)::War|Comedy\n"},
    ),
    _format(
        "movielens-latest",
        "movies.csv",
        "lines",
        b'movieId,title,genres\r\n10,"Film, A (1971)",Drama|War\r\n2,Clip,(no genres listed)\r\n',
        {"ratings.csv": b"userId,movieId,rating,timestamp\r\n1,2,0.5,964982703\r\n2,10,4.5,964982704\r\n"},
    ),
    _format("movielens-pairs", "ml-100k.inter", "lines", _RATINGS, {"ml-100k.item": _FILMS}),
    _format("movielens-planted", "ml-100k.inter", "lines", _RATINGS, {"ml-100k.item": _FILMS}),
    _format("amazon-reviews", "R.json", "lines", _REVIEWS),
    _format("amazon-reviews", "R.jsonl", "lines", _REVIEWS_2023),
    _format("amazon-reviews", "R.json.gz", "gzip", gzip.compress(_REVIEWS, mtime=0)),
    _format("amazon-products", "meta.json", "lines", _PRODUCTS, {"R.json": _REVIEWS}),
    _format("convai2", "valid_self_original.txt", "lines", _DIALOGUES),
    _format("sotu", "sotu.jsonl.gz", "gzip", _SPEECHES),
    _format("prism", "conversations.jsonl", "lines", _CONVERSATIONS),
    _format("prism", "survey.jsonl", "lines", _SURVEY, {"conversations.jsonl": _CONVERSATIONS}),
    *_lamp(2),
    *_lamp(3),
    _format("jsonl", "rows.jsonl", "lines", _jsonl(_ROWS), {"public.txt": _PUBLIC}),
    _format("csv", "rows.csv", "lines", _csv(_ROWS), {"public.txt": _PUBLIC}),
    _format("csv", "rows.csv.gz", "gzip", gzip.compress(_csv(_ROWS), mtime=0)),
    _format("csv", "public.txt", "lines", _PUBLIC, {"rows.csv": _csv(_ROWS)}),
)


def _with_parquet(folder: Path) -> Parser:
    valid = _parquet(_ROWS)
    return _published("parquet", "rows.parquet", valid, {})(folder)


def _own_parquet(folder: Path) -> Parser:
    return _own("parquet", "rows.parquet", _parquet(_ROWS))(folder)


_RECORDS = _jsonl([{"text": f"Words {i}.", "target": i, "item": "p", "timestamp": i} for i in range(4)])
DATA: dict[str, Target] = {
    **dict(_PAIRS),
    "parquet: rows.parquet": Target("anybody", "bytes", _with_parquet),
    "owner's folder: jsonl": Target("owner", "lines", _own("jsonl", "rows.jsonl", _jsonl(_ROWS))),
    "owner's folder: csv": Target("owner", "lines", _own("csv", "rows.csv", _csv(_ROWS))),
    "owner's folder: text": Target("owner", "lines", _own("text", "a.txt", b"A paragraph.\n\nAnother\none.\n")),
    "owner's folder: parquet": Target("owner", "bytes", _own_parquet),
    "client import --jsonl": Target(
        "owner", "lines", lambda folder: file_parser(folder, "own.jsonl", [_RECORDS], read_jsonl)
    ),
    "LaMP predictions": Target(
        "anybody", "json", lambda folder: file_parser(folder, "predictions.json", [_questions(3)[1]], read_answers)
    ),
}
