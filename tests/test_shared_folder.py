"""A folder of records: four formats, one row a record, and rows that are none change nothing but a count."""

import csv
import hashlib
import json
import os
import sys
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.datasets import folder as module
from shared.datasets import rows
from shared.datasets.folder import MAX_ROW_BYTES, REASONS, SUFFIXES, check_columns, read_folder
from shared.datasets.records import Record
from shared.errors import DataError, StoreError

COLUMNS = {"text": "review.body", "target": "stars", "item": "asin", "timestamp": "when"}
FLAT = COLUMNS | {"text": "body"}
RATED = (
    Record("A quiet film, slow and blue.", 4.0, "7", 1_000_000_000),
    Record('She said "no"\nand left.', 1.5, "x-9", 1_000_000_060),
    Record("Übermut 🎬", -3.0, "", 0),
)


def write_jsonl(path, records=RATED):
    lines = [
        {"review": {"body": r.text}, "stars": r.target, "asin": r.item, "when": r.timestamp, "more": [1]}
        for r in records
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_csv(path, records=RATED):
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["stars", "body", "asin", "when", "unused"])
        writer.writerows([r.target, r.text, r.item, r.timestamp, "-"] for r in records)


def write_parquet(path, records=RATED):
    whole = [{"review": {"body": r.text, "n": 1}, "stars": r.target, "asin": r.item or None} for r in records]
    dates = [{"when": datetime.fromtimestamp(r.timestamp, UTC).replace(tzinfo=None)} for r in records]
    pq.write_table(pa.Table.from_pylist([row | when for row, when in zip(whole, dates, strict=True)]), path)


def tree(folder):
    """Every file and folder with its bytes and the times of its last change."""
    return {
        path.relative_to(folder).as_posix(): (
            path.lstat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in (folder, *folder.rglob("*"))
    }


@pytest.mark.parametrize(
    ("format", "write", "columns"),
    [("jsonl", write_jsonl, COLUMNS), ("csv", write_csv, FLAT), ("parquet", write_parquet, COLUMNS)],
)
def test_the_formats_say_the_same_records(tmp_path, format, write, columns):
    write(tmp_path / f"mine.{format}")
    found = read_folder(tmp_path, format=format, columns=columns)
    assert found.records == RATED
    assert found.skipped == {}


def test_a_paragraph_of_plain_text_is_a_record(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffFirst line,\r\nits second.\r\n\r\n \t\r\n\r\nAnother.".encode())
    (tmp_path / "b.md").write_text("# Title\n\nAnother.\n\n\n")
    found = read_folder(tmp_path, format="text", columns={})
    assert [(r.text, r.response) for r in found.records] == [
        ("", "First line,\nits second."),
        ("", "Another."),
        ("", "# Title"),
    ]
    assert found.skipped == {"equal": 1}
    prompts = read_folder(tmp_path, format="text", columns={"text": "paragraph"})
    assert [(r.text, r.response) for r in prompts.records][2] == ("# Title", "")


def test_dates_are_seconds_and_numbers_may_be_written_as_text(tmp_path):
    said = ["2001-09-09", "2001-09-09T01:46:40Z", "2001-09-09 03:46:40+02:00", "1e9", "1000000000", 1e9, None]
    lines = [json.dumps({"t": str(number), "n": "4", "w": when}) for number, when in enumerate(said)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = read_folder(tmp_path, format="jsonl", columns={"text": "t", "target": "n", "timestamp": "w"})
    assert [r.timestamp for r in found.records] == [999_993_600, *[1_000_000_000] * 5, 0]
    assert {r.target for r in found.records} == {4.0}


BAD_LINES = {
    "malformed": [b"{", b"[1, 2]", b'"text"', b"{} {}", b"[" * 100_000, b'{"t": 1' + b"0" * 5000 + b"}"],
    "too-long": [b'{"t": "' + b"a" * MAX_ROW_BYTES + b'", "n": 1}', b"x" * (3 * MAX_ROW_BYTES)],
    "text": [
        b"{}",
        b'{"t": 7, "n": 1}',
        b'{"t": null, "n": 1}',
        b'{"t": " \\n ", "n": 1}',
        b'{"t": "caf\xe9", "n": 1}',  # latin-1
        b'{"t": "half \\ud83d", "n": 1}',
        b'{"t.u": "x", "n": 1}',
    ],
    "target": [
        b'{"t": "x"}',
        b'{"t": "x", "n": null}',
        b'{"t": "x", "n": true}',
        b'{"t": "x", "n": NaN}',
        b'{"t": "x", "n": "inf"}',
        b'{"t": "x", "n": 1e300}',
        b'{"t": "x", "n": 1' + b"0" * 400 + b"}",
        b'{"t": "x", "n": "four"}',
        b'{"t": "x", "n": [4]}',
    ],
    "item": [b'{"t": "x", "n": 1, "i": [1]}', b'{"t": "x", "n": 1, "i": true}', b'{"t": "x", "n": 1, "i": "\\udc00"}'],
    "timestamp": [b'{"t": "x", "n": 1, "w": "soon"}', b'{"t": "x", "n": 1, "w": {}}', b'{"t": "x", "n": 1, "w": true}'],
    "equal": [b'{"t": "good", "n": 1}', b'{"n": 1.0, "t": "good", "other": 3}', b'{"t": "zero", "n": -0.0}'],
}


@pytest.mark.parametrize(("reason", "line"), [(reason, line) for reason, many in BAD_LINES.items() for line in many])
def test_a_line_that_is_no_record_changes_nothing_but_a_count(tmp_path, reason, line):
    good = [b'{"t": "good", "n": 1}', b'{"t": "zero", "n": 0}', b'{"t": "more\\u2028", "n": 2}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join([*good[:2], line, b"", good[2]]))
    columns = {"text": "t", "target": "n", "item": "i", "timestamp": "w"}
    found = read_folder(tmp_path, format="jsonl", columns=columns)
    assert [r.text for r in found.records] == ["good", "zero", "more\u2028"]
    assert found.skipped == {reason: 1}


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("malformed", b"x"),
        ("malformed", b"x,1,2"),
        ("malformed", b'"' + b"y" * 100_000 + b"\n" + b"z" * 100_000 + b'",1'),
        ("too-long", b"x" * (2 * MAX_ROW_BYTES) + b",1"),
        ("text", b"caf\xe9,1"),
        ("text", b",1"),
        ("target", b"x,"),
        ("target", b"x,nan"),
    ],
)
def test_a_row_of_csv_that_is_no_record_changes_nothing_but_a_count(tmp_path, reason, row):
    (tmp_path / "a.csv").write_bytes(b"t,n\r\n" + b"good,1\r\n" + row + b"\r\n\r\n" + b'"b, c",2\r\n')
    found = read_folder(tmp_path, format="csv", columns={"text": "t", "target": "n"})
    assert [r.text for r in found.records] == ["good", "b, c"]
    assert set(found.skipped) == {reason}


def test_rows_of_parquet_that_are_no_record(tmp_path):
    broken = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xe9b"))
    columns = {"text": "t", "target": "n"}
    pq.write_table(pa.table({"t": broken, "n": pa.array([1, 2, 3])}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"t": ["c", None, "d"], "n": [None, 1.0, 2.0]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"other": ["c"]}), tmp_path / "c.parquet")
    whole = (tmp_path / "b.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[:-20])
    (tmp_path / "e.parquet").write_bytes(b"PAR1")
    found = read_folder(tmp_path, format="parquet", columns=columns)
    assert [(r.text, r.target) for r in found.records] == [("a", 1.0), ("b", 3.0), ("d", 2.0)]
    assert found.skipped == {"file": 2, "malformed": 1, "text": 2, "target": 1}


def test_a_file_without_the_columns_is_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("t,n\nx,1\n")
    for number, header in enumerate(("t,m", "t,n,n", "", '"' + "t" * 200_000)):
        (tmp_path / f"b{number}.csv").write_text(f"{header}\ny,2\n")
    found = read_folder(tmp_path, format="csv", columns={"text": "t", "target": "n"})
    assert [r.text for r in found.records] == ["x"]
    assert found.skipped == {"columns": 4}


_LINE = st.sampled_from([
    b'{"t": "a"}', b'{"t": "b"}', b'{"t": "c"}', b'{"t": ""}', b"{", b"\xff\xfe", b'{"t": "\xe9"}', b"",
    b'{"t": "d"}\r', b"\xef\xbb\xbf", b'"', b"\x00", b'{"t": "e\\u0085"}', b'{"t": "f' + b"f" * MAX_ROW_BYTES + b'"}',
])  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(_LINE, min_size=1, max_size=8), data=st.data())
def test_a_line_more_is_at_most_that_record_more(tmp_path, lines, data):
    """What noise hides is a record: no line may make another come or go."""

    def read(some):
        (tmp_path / "a.jsonl").write_bytes(b'{"t": "first"}\n' + b"\n".join(some))
        return set(read_folder(tmp_path, format="jsonl", columns={"text": "t"}).records)

    cut = data.draw(st.integers(0, len(lines) - 1))
    with_it, without = read(lines), read(lines[:cut] + lines[cut + 1 :])
    assert without <= with_it
    assert len(with_it - without) <= 1


def test_at_the_most_records_one_more_takes_the_place_of_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_RECORDS", 3)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"t": "{word}"}}\n' for word in "abcde"))
    before = read_folder(tmp_path, format="jsonl", columns={"text": "t"})
    assert [r.text for r in before.records] == ["a", "b", "c"]
    assert before.skipped == {"beyond": 2}
    path.write_text('{"t": "new"}\n' + path.read_text())
    after = read_folder(tmp_path, format="jsonl", columns={"text": "t"})
    assert set(after.records) ^ set(before.records) == {Record("new", 0.0, "", 0), Record("c", 0.0, "", 0)}


def test_which_files_are_read_and_in_which_order(tmp_path):
    data, outside = tmp_path / "data", tmp_path / "outside"
    names = ("b.jsonl", "a/z.NDJSON", "a/deep/er.jsonl", ".hidden.jsonl", ".git/x.jsonl", "note.txt", "a.jsonl.bak")
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_text(json.dumps({"t": name}))
    outside.mkdir()
    (outside / "secret.jsonl").write_text('{"t": "outside"}')
    (data / "linked").symlink_to(outside)
    (data / "link.jsonl").symlink_to(outside / "secret.jsonl")
    (data / "dangling.jsonl").symlink_to(outside / "nothing")
    (data / "folder.jsonl").mkdir()
    os.mkfifo(data / "pipe.jsonl")  # opening it to read would wait for a writer for ever
    found = read_folder(data, format="jsonl", columns={"text": "t"})
    assert [r.text for r in found.records] == ["a/deep/er.jsonl", "a/z.NDJSON", "b.jsonl"]
    assert found.skipped == {"file": 3}


def test_a_file_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"t": name}) + "\n")
    real = rows.open_file

    def fails(path):
        if path.name == "b.jsonl":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(module, "open_file", fails)
    found = read_folder(tmp_path, format="jsonl", columns={"text": "t"})
    assert [r.text for r in found.records] == ["a", "c"]
    assert found.skipped == {"file": 1}


def test_nothing_is_written_beside_the_files(tmp_path):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    write_jsonl(data / "a.jsonl")
    write_csv(data / "b.csv")
    write_parquet(data / "sub" / "c.parquet")
    (data / "d.txt").write_text("A paragraph.")
    for path in (*data.rglob("*"), data):
        path.chmod(0o500 if path.is_dir() else 0o400)
    before = tree(data)
    for format, columns in (("jsonl", COLUMNS), ("csv", FLAT), ("parquet", COLUMNS), ("text", {})):
        assert read_folder(data, format=format, columns=columns).records
    assert tree(data) == before
    for path in (data, data / "sub"):
        path.chmod(0o700)


def test_a_folder_that_is_not_there_is_an_error_and_an_empty_one_is_not(tmp_path):
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(StoreError, match="must be a folder that can be read"):
            read_folder(wrong, format="jsonl", columns={"text": "t"})
    (tmp_path / "empty").mkdir()
    for format in SUFFIXES:
        assert read_folder(tmp_path / "empty", format=format, columns={"text": "paragraph"}).records == ()


def test_parquet_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreError, match=r"pip install 'sottovoce\[parquet\]'"):
        read_folder(tmp_path, format="parquet", columns={"text": "t"})


@pytest.mark.parametrize(
    ("format", "columns", "words"),
    [
        ("xml", {"text": "t"}, "one of jsonl, csv, parquet, text"),
        ("jsonl", {}, "must name the column of text or of response"),
        ("jsonl", {"target": "n"}, "must name the column of text or of response"),
        ("jsonl", {"text": "t", "stars": "n"}, r"\['stars'\]"),
        ("jsonl", {"text": ""}, "an empty name"),
        ("text", {"text": "line"}, "one column, paragraph"),
        ("text", {"text": "paragraph", "target": "paragraph"}, "one column, paragraph"),
    ],
)
def test_an_impossible_map_is_refused(format, columns, words):
    with pytest.raises(DataError, match=words):
        check_columns(format, columns)


def test_what_is_read_at_a_time_is_bounded(tmp_path):
    """A file without a line's end, far larger than a row, is read in pieces and kept nowhere."""
    import tracemalloc

    with (tmp_path / "a.jsonl").open("wb") as file:
        file.truncate(64 * 2**20)
    tracemalloc.start()
    found = read_folder(tmp_path, format="jsonl", columns={"text": "t"})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.skipped == {"too-long": 1}
    assert peak < 4 * 2**20


def test_every_reason_has_words():
    assert set(BAD_LINES) | {"file", "columns", "beyond"} == set(REASONS)
