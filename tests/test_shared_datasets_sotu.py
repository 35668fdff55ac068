"""The shipped extract of State of the Union addresses, its reader, and what made it."""

import gzip
import hashlib
import io
import json
import tarfile

import pytest

from shared import datasets
from shared.datasets import sotu
from shared.errors import DataError
from simulations import make_sotu

SHA256 = "aa77ff3cb305a1b71103685e73588368609b806dec42fd20d724479e08e15541"
UNPACKED_SHA256 = "25af692cd0bfa2d11d55f0c0babbcd19256241a2136204c9cedfa3e50b05a370"
NOTICE = (sotu.FOLDER / "sotu.NOTICE.md").read_text(encoding="utf-8")


def speech(**changed):
    passages = [["a1", "a2", "a3", "a4", "a5", "a6", "a7"], ["b1", "b2", "b3"]]
    return {"name": "B", "year": 1900, "passages": passages} | changed


def folder_with(folder, *speeches):
    lines = "".join(json.dumps(each) + "\n" for each in speeches)
    (folder / sotu.FILE_NAME).write_bytes(gzip.compress(lines.encode()))
    return folder


def refused(folder):
    with pytest.raises(DataError) as caught:
        datasets.read("sotu", folder)
    assert "\n" not in str(caught.value)
    assert "SECRET" not in str(caught.value)
    return str(caught.value)


def test_two_sentences_are_answered_by_the_third(tmp_path):
    second = speech(year=1901, passages=[["c1", "c2", "c3"]])
    dataset = datasets.read("sotu", folder_with(tmp_path, speech(), second, speech(name="A")))
    assert (dataset.name, dataset.public_texts) == ("sotu", ())
    assert [user.user for user in dataset.users] == ["A", "B"]
    author = dataset.users[1]
    assert [(row.key, row.item, row.timestamp, row.target) for row in author.train + author.test] == [
        (("a1 a2", "a3"), "1900-3", 1, 0.0),
        (("a4 a5", "a6"), "1900-6", 2, 0.0),  # no sentence in two records: one record is what the privacy hides
        (("b1 b2", "b3"), "1900-10", 3, 0.0),  # never over the end of a passage
        (("c1 c2", "c3"), "1901-3", 4, 0.0),
    ]
    assert [row.response for row in author.test] == ["c3"]


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (["SECRET"], "an object with name, year and passages"),
        (speech(SECRET=1), "an object with name, year and passages"),
        (speech(name=""), "name must be a text"),
        (speech(year="SECRET"), "year a whole number"),
        (speech(year=True), "year a whole number"),
        (speech(passages=[]), "passages must be lists of at least 3 sentences"),
        (speech(passages=[["SECRET", "b"]]), "passages must be lists of at least 3 sentences"),
        (speech(passages=[["SECRET", "b", " "]]), "passages must be lists of at least 3 sentences"),
        (speech(passages=[["SECRET", "b", 3]]), "passages must be lists of at least 3 sentences"),
        (speech(passages=["SECRET"]), "passages must be lists of at least 3 sentences"),
        (speech(name="A"), "a second time"),
    ],
)
def test_a_broken_line_is_named_and_not_quoted(tmp_path, bad, what):
    message = refused(folder_with(tmp_path, speech(name="A"), bad))
    assert "sotu.jsonl.gz, line 2: " in message
    assert what in message


def test_a_damaged_empty_or_missing_file_is_refused(tmp_path):
    path = tmp_path / sotu.FILE_NAME
    assert "must be readable, got: No such file" in refused(tmp_path)
    whole = (sotu.FOLDER / sotu.FILE_NAME).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"SECRET", whole[:1000], bytes(flipped), gzip.compress(b"\xff")):
        path.write_bytes(damaged)
        assert "must be gzip of utf-8" in refused(tmp_path)
    for empty in (b"", gzip.compress(b""), gzip.compress(b"\n")):
        path.write_bytes(empty)
        assert "at least one speech" in refused(tmp_path)
    path.write_bytes(gzip.compress(b"SECRET\n"))
    assert "line 1: must be JSON" in refused(tmp_path)


def test_the_shipped_file_is_the_one_of_the_notice():
    packed = (sotu.FOLDER / sotu.FILE_NAME).read_bytes()
    assert len(packed) <= 600_000
    assert hashlib.sha256(packed).hexdigest() == SHA256
    assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == UNPACKED_SHA256
    assert packed[3:8] == bytes(5)  # gzip's flags and time: none
    assert all(digest in NOTICE for digest in (SHA256, UNPACKED_SHA256, make_sotu.TARBALL_SHA256))


def test_the_shipped_extract():
    users = datasets.read("sotu", sotu.FOLDER).users
    sizes = sorted(len(user.train) + len(user.test) for user in users)
    assert (len(users), sum(sizes), sizes[0], sizes[-1]) == (43, 1880, 24, 49)
    assert {"George Washington", "Zachary Taylor", "Joseph R Biden"} <= {user.user for user in users}
    assert all(user.fit and user.validation and user.test for user in users)


def test_the_shipped_sentences():
    with gzip.open(sotu.FOLDER / sotu.FILE_NAME, "rt", encoding="utf-8") as file:
        speeches = [json.loads(line) for line in file]
    said = {}
    for each in speeches:
        said.setdefault(each["name"], []).extend(sentence for passage in each["passages"] for sentence in passage)
    assert (len(speeches), sum(map(len, said.values()))) == (67, 6310)
    for found in said.values():
        assert len(found) == len(set(found)) <= make_sotu.MAX_SENTENCES
        words = [len(sentence.split()) for sentence in found]
        assert 5 <= min(words) <= max(words) <= 40
        assert not any("[" in sentence or sentence != " ".join(sentence.split()) for sentence in found)


def test_sentences_end_where_a_reader_sees_it():
    text = 'The U. S. owes $3.5 million.\n Mr. J. Doe of St. Louis said  "Pay!" and "When?" We shall (soon.) 12 did.'
    assert make_sotu.sentences(text) == [
        "The U. S. owes $3.5 million.",
        'Mr. J. Doe of St. Louis said "Pay!" and "When?"',
        "We shall (soon.)",
        "12 did.",
    ]


def short(start, stop):
    return [f"We have {i} old ships." for i in range(start, stop)]


@pytest.mark.parametrize(
    "breaking",
    [
        "Too short by one.",
        "Word " * 40 + "more.",
        "So it is, my friends. [Applause]",
        "So (applause) it is, my friends.",
        "NATIONAL DEFENSE We have many old ships.",
        "AGRICULTURE The fields are green this year.",
        "THE PRESIDENT: We have many old ships.",
        "It was paid long before 1835.* And again.",
        "So it is, my friends, and",
        "We have 1 old ships.",
    ],
)
def test_a_passage_ends_before_an_unusable_sentence(breaking):
    assert list(make_sotu.passages([*short(0, 4), breaking, *short(4, 7), breaking, *short(7, 9)], set())) == [
        short(0, 4),
        short(4, 7),
    ]


def test_the_extract_takes_the_longest_speech_first_and_150_sentences():
    speeches = [
        {"name": "B", "year": 2, "text": " ".join(short(0, 100))},
        {"name": "B", "year": 1, "text": " ".join(short(200, 260))},
        {"name": "B", "year": 3, "text": " ".join(short(300, 310))},
        {"name": "A", "year": 9, "text": " ".join(short(0, 3))},
        {"name": "C", "year": 9, "text": " ".join(short(0, 148))},
        {"name": "C", "year": 10, "text": " ".join(short(200, 210))},  # two are left, too few for a passage
    ]
    assert make_sotu.extract(speeches) == [
        {"name": "A", "year": 9, "passages": [short(0, 3)]},
        {"name": "B", "year": 1, "passages": [short(200, 250)]},
        {"name": "B", "year": 2, "passages": [short(0, 100)]},
        {"name": "C", "year": 9, "passages": [short(0, 148)]},
    ]


def tarball(*speeches):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in [("package/package.json", {}), *((f"package/data/{s['year']}.json", s) for s in speeches)]:
            member = tarfile.TarInfo(name)
            member.size = len(body := json.dumps(content).encode())
            archive.addfile(member, io.BytesIO(body))
    return packed.getvalue()


def test_from_tarball_to_reader(tmp_path, monkeypatch):
    content = tarball({"name": "A", "year": 9, "party": "", "text": " ".join(short(0, 12))})
    (tmp_path / "in.tgz").write_bytes(content)
    with pytest.raises(DataError, match="must have sha256 ab03f909"):
        make_sotu.main(tmp_path / "in.tgz", tmp_path / sotu.FILE_NAME)
    assert not (tmp_path / sotu.FILE_NAME).exists()
    monkeypatch.setattr(make_sotu, "TARBALL_SHA256", hashlib.sha256(content).hexdigest())
    make_sotu.main(tmp_path / "in.tgz", tmp_path / sotu.FILE_NAME)
    first = (tmp_path / sotu.FILE_NAME).read_bytes()
    assert first[3:8] == bytes(5)  # neither name nor time
    (user,) = datasets.read("sotu", tmp_path).users
    assert [row.response for row in user.train + user.test] == short(2, 12)[::3]
