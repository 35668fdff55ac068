"""JSONL, CSV and Parquet of many users by a map of columns: one table in every format gives the same records."""

import gzip
import json

import pytest

from shared import datasets
from shared.config import DataConfig
from shared.datasets import Record
from shared.errors import DataError, ScenarioError

COLUMNS = {"user": "who", "text": "said", "target": "mark", "item": "id", "timestamp": "day", "profile.age": "years"}
SECRET = "my secret words"
ROWS = [
    {"who": "b", "said": f"{SECRET}, é", "mark": 4.5, "id": 7, "day": "1970-01-02", "years": 30},
    {"who": "a", "said": "x", "mark": 1.0, "id": 8, "day": 5, "years": None},
    {"who": "b", "said": "y", "mark": 2.0, "id": 9, "day": "1970-01-01T00:00:05", "years": 30},
]
EXPECTED = {
    "a": ({}, (Record("x", 1.0, "8", 5),)),
    "b": ({"age": "30"}, (Record("y", 2.0, "9", 5), Record(f"{SECRET}, é", 4.5, "7", 86400))),
}


def jsonl(folder, rows, name="t.jsonl"):
    content = "".join(json.dumps(row) + "\r\n" for row in rows).encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else b"\xef\xbb\xbf" + content)


def csv(folder, rows, name="t.csv"):
    def cell(value):
        return "" if value is None else '"' + str(value).replace('"', '""') + '"'

    lines = [",".join(rows[0]), *(",".join(map(cell, row.values())) for row in rows)]
    content = ("\r\n".join(lines) + "\r\n").encode()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else b"\xef\xbb\xbf" + content)


def parquet(folder, rows):
    arrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = [row | {"day": str(row["day"])} for row in rows]
    writer.write_table(arrow.Table.from_pylist(texts), folder / "t.parquet")


def read(format, folder, columns=COLUMNS):
    return datasets.read(format, folder, columns=columns)


def found(data):
    return {user.user: (dict(user.profile), user.train + user.test) for user in data.users}


def refused(format, folder, columns=COLUMNS):
    with pytest.raises(DataError) as caught:
        read(format, folder, columns)
    assert SECRET not in str(caught.value)
    return str(caught.value)


WRITERS = {"jsonl": jsonl, "csv": csv, "parquet": parquet}


@pytest.mark.parametrize("format", WRITERS)
def test_every_format_gives_the_same(tmp_path, format):
    WRITERS[format](tmp_path, ROWS)
    data = read(format, tmp_path)
    assert found(data) == EXPECTED
    assert (data.name, data.public_texts, data.left_out) == (format, (), {})


def test_gz_several_files_equal_rows_and_public_texts(tmp_path):
    jsonl(tmp_path, ROWS[:2], "1.jsonl.gz")
    jsonl(tmp_path, ROWS[1:], "2.ndjson")
    (tmp_path / "public.txt").write_text("p\nq\np\n")
    data = read("jsonl", tmp_path)
    assert found(data) == EXPECTED
    assert (data.public_texts, data.left_out) == (("p", "q"), {"rows equal to an earlier one": 1})
    csv(tmp_path, ROWS, "3.csv.gz")
    assert found(read("csv", tmp_path)) == EXPECTED


def test_a_quoted_text_may_go_over_lines_and_the_first_is_named(tmp_path):
    (tmp_path / "t.csv").write_text('who,said,mark\na,"one\ntwo",3\n\nb,"three\nfour",five\n')
    columns = {"user": "who", "text": "said", "target": "mark"}
    assert "t.csv, line 5: every row must be a record, got one of the rows whose target" in refused(
        "csv", tmp_path, columns
    )
    columns.pop("target")
    assert [user.test[0].text for user in read("csv", tmp_path, columns).users] == ["one\ntwo", "three\nfour"]


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"who": "a/b"}, "user must be a plain name"),
        ({"who": None}, "user must be a plain name"),
        ({"said": None}, "rows without the text, the response or what was rejected"),
        ({"mark": None}, "rows whose target is no usable number"),
        ({"day": "soon"}, "rows whose timestamp is neither seconds nor a date"),
        ({"years": 31}, "a user's profile must be the same in every row"),
    ],
)
def test_a_broken_row_is_named_by_file_and_line_and_not_quoted(tmp_path, format, bad, says):
    WRITERS[format](tmp_path, [*ROWS, ROWS[0] | bad])
    line = {"jsonl": 4, "csv": 5, "parquet": 4}[format]
    message = refused(format, tmp_path)
    assert f"t.{format}, line {line}: " in message
    assert says in message


@pytest.mark.parametrize(
    ("format", "content", "says"),
    [
        ("jsonl", b'{"who": "a", "said": "x"}\n{"who": \n', "line 2: must be one JSON object"),
        ("jsonl", b'{"who": "a", "said": "\xe9"}\n', "line 1: text must be utf-8, got byte 0xe9"),
        ("csv", b"who,said\na,x,y\n", "line 2: must have 2 columns as the header, got 3"),
        ("csv", b'who,said\na,"x" y\n', "line 2: must be CSV"),
        ("csv", b"who,what\na,x\n", "line 1: the header must name ['said'] once"),
        ("csv", b"who,said,said\na,x,y\n", "line 1: the header must name ['said'] once"),
        ("csv", b"", "line 1: the header must name ['said', 'who'] once"),
        ("jsonl", b'{"who": "a", "said": "' + b"x" * 140_000 + b'"}\n', "line 1: must be at most 131072 bytes"),
        ("parquet", b"PAR1 broken", "line 1: every row must be as Parquet says, got one of the files that are"),
    ],
)
def test_a_broken_file_is_named(tmp_path, format, content, says):
    if format == "parquet":
        pytest.importorskip("pyarrow")
    (tmp_path / f"t.{format}").write_bytes(content)
    assert f"t.{format}, {says}" in refused(format, tmp_path, {"user": "who", "text": "said"})


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"text": "said"},
        {"user": "who"},
        {"user": "who", "text": ""},
        {"user": "who", "text": "said", "age": "years"},
        {"user": "who", "text": "said", "profile.": "years"},
    ],
)
def test_an_impossible_map_is_refused(tmp_path, columns):
    jsonl(tmp_path, ROWS)
    assert "data.columns must map user, text or response" in refused("jsonl", tmp_path, columns)


def test_a_folder_without_files_and_columns_of_a_published_format_are_refused(tmp_path):
    jsonl(tmp_path, ROWS)
    assert "format 'csv' needs files .csv, .csv.gz" in refused("csv", tmp_path)
    with pytest.raises(ScenarioError, match=r"data.columns is for formats jsonl, csv, parquet, got it for 'sotu'"):
        read("sotu", tmp_path)


def test_nested_columns_and_responses(tmp_path):
    jsonl(tmp_path, [{"meta": {"id": 3}, "q": "hello", "a": "hi"}])
    data = read("jsonl", tmp_path, {"user": "meta.id", "text": "q", "response": "a"})
    assert found(data) == {"3": ({}, (Record("hello", 0.0, "", 0, "hi"),))}


def test_a_simulation_reads_columns_and_min_records(tmp_path):
    from client.training.site import resident_dataset

    jsonl(tmp_path, ROWS)
    data = DataConfig(format="jsonl", source=str(tmp_path), columns=COLUMNS, min_records=2)
    assert found(resident_dataset(data)) == {"b": EXPECTED["b"]}
    assert resident_dataset(data) is resident_dataset(data.model_copy())  # read once
