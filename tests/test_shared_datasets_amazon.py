"""Amazon reviews of 2014, 2018 and 2023, on small invented files and on a real one where it lies."""

import gzip
import json
from pathlib import Path

import pytest

from shared import datasets
from shared.datasets import Record
from shared.errors import DataError

DATA = Path(__file__).parents[2] / "shared" / "data" / "amazon-giftcards-5core"
SECRET = "my secret words"


def old(**other):
    review = {"overall": 5.0, "vote": "1,024", "verified": True, "reviewTime": "01 1, 2018", "reviewerID": "A1",
              "asin": "B1", "style": {"Size:": "L"}, "reviewerName": "x", "reviewText": SECRET, "summary": "ok",
              "unixReviewTime": 1514764800, "image": ["u"]}  # fmt: skip
    return {key: value for key, value in (review | other).items() if value != "drop"}


def new(**other):
    review = {"rating": 2.0, "title": "t", "text": SECRET, "images": [], "asin": "B1", "parent_asin": "B0",
              "user_id": "AE1", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True}  # fmt: skip
    return {key: value for key, value in (review | other).items() if value != "drop"}


def write(path, *rows, end="\n"):
    content = "".join((row if isinstance(row, str) else json.dumps(row)) + end for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path.parent


def records(data):
    return {user.user: user.train + user.test for user in data.users}


def refused(folder, release="amazon-reviews"):
    with pytest.raises(DataError) as caught:
        datasets.read(release, folder)
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("name", "end"), [("R_5.json.gz", "\n"), ("R.json", "\r\n"), ("R.jsonl", "\n")])
def test_reviews_of_2018_and_2014(tmp_path, name, end):
    bare = {"overall": 1, "reviewerID": "A1", "asin": "B2", "unixReviewTime": 1514764799, "summary": " bad "}
    folder = write(tmp_path / name, old(), bare, old(reviewerID="A0", helpful=[2, 3], vote="drop"), end=end)
    data = datasets.read("amazon-reviews", folder)
    assert records(data) == {
        "A0": (Record(SECRET, 5.0, "B1", 1514764800),),
        "A1": (Record("bad", 1.0, "B2", 1514764799), Record(SECRET, 5.0, "B1", 1514764800)),
    }
    assert data.public_texts == ()


def test_reviews_of_2023_have_milliseconds_and_a_parent(tmp_path):
    folder = write(tmp_path / "R.jsonl", new(), new(user_id="AE2", text="", parent_asin=None))
    assert records(datasets.read("amazon-reviews", folder)) == {
        "AE1": (Record(SECRET, 2.0, "B0", 1588687728),),
        "AE2": (Record("t", 2.0, "B1", 1588687728),),
    }


def test_equal_reviews_and_those_without_words_are_left_out_and_counted(tmp_path):
    wordless = old(reviewText="drop", summary=None)
    later = old(unixReviewTime=1514764801)  # the same words again, another day: another review
    write(tmp_path / "a.json", old(), old(vote="drop"), wordless, later)
    data = datasets.read("amazon-reviews", write(tmp_path / "b.json.gz", old()))
    assert [len(rows) for rows in records(data).values()] == [2]
    assert data.left_out == {"reviews equal to an earlier one": 2, "reviews without words": 1}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("{'overall': 5}", "must be one JSON object"),
        ("[]", "must be one JSON object"),
        ({"stars": 5}, "a review must have reviewerID or user_id, got neither"),
        (old(overall=6), "overall must be a number in 1..5"),
        (old(overall=float("nan")), "overall must be a number in 1..5"),
        (old(overall=True), "overall must be a number in 1..5"),
        (old(overall="5"), "overall must be a number in 1..5"),
        (old(overall="drop"), "overall must be a number in 1..5"),
        (old(asin="drop"), "asin must be a text"),
        (old(reviewerID="a/b"), "reviewerID must be a plain name"),
        (old(reviewerID=7), "reviewerID must be a plain name"),
        (old(reviewText=[SECRET]), "reviewText must be a text or missing"),
        (old(reviewText="\ud800 " + SECRET), "reviewText must be a text or missing"),
        (old(unixReviewTime=1514764800000), "unixReviewTime must be whole seconds"),
        (old(unixReviewTime=-1), "unixReviewTime must be whole seconds"),
        (new(timestamp=1588687728), "timestamp must be whole milliseconds"),
        (new(timestamp="1588687728923"), "timestamp must be whole milliseconds"),
    ],
)
def test_a_broken_review_is_named_by_file_and_line_and_not_quoted(tmp_path, bad, says):
    message = refused(write(tmp_path / "r.json", old(), bad, old()))
    assert message.startswith(f"{tmp_path / 'r.json'}, line 2: ")
    assert says in message


def test_a_file_must_be_there_whole_and_not_longer_than_held(tmp_path, monkeypatch):
    assert "need a file of JSON lines" in refused(tmp_path)
    assert "need a file of JSON lines" in refused(write(tmp_path / "meta_R.json", {"asin": "B1", "title": "T"}))
    monkeypatch.setattr("shared.datasets.amazon.MAX_RECORDS", 1)
    folder = write(tmp_path / "R.json", old(), old(), old(reviewerID="A2"))
    assert "line 3: a simulation holds at most 1 reviews" in refused(folder)
    monkeypatch.setattr("shared.datasets.amazon.MAX_LINE_BYTES", 100)
    assert "line 1: must be at most 100 bytes long" in refused(folder)


# Products


META = (
    {"parent_asin": "B0", "title": "Mug", "main_category": "Home", "categories": ["Kitchen", "Cups"], "price": None},
    {"parent_asin": "B5", "title": "Lamp", "categories": []},
    {"parent_asin": "B6", "title": None},
    {"parent_asin": "B0", "title": "Another"},
)


def test_products_are_joined_by_the_parent(tmp_path):
    write(tmp_path / "meta_R.jsonl.gz", *META)
    folder = write(tmp_path / "R.jsonl", new(), new(parent_asin="B6"), new(parent_asin="B9"), new())
    data = datasets.read("amazon-products", folder)
    assert records(data) == {"AE1": (Record("Mug. Kitchen, Cups", 2.0, "B0", 1588687728),)}
    assert data.public_texts == ("Mug. Kitchen, Cups", "Lamp")  # rated or not
    assert data.left_out == {"reviews of products without a title": 2, "reviews equal to an earlier one": 1}


def test_products_of_2018_and_2014_are_joined_by_asin(tmp_path):
    write(tmp_path / "meta_R.json", {"asin": "B1", "title": "Card", "category": ["Gifts"]},
          {"asin": "B2", "title": "Pen", "categories": [["Office", "Pens"], ["Office"]]})  # fmt: skip
    data = datasets.read("amazon-products", write(tmp_path / "R.json", old(), old(asin="B2")))
    assert data.public_texts == ("Card. Gifts", "Pen. Office, Pens")


def test_the_catalogue_does_not_depend_on_what_users_did(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.datasets.amazon.MAX_PUBLIC", 3)
    write(tmp_path / "meta.json", *({"asin": f"B{n}", "title": f"T{n}"} for n in range(9)))
    first = datasets.read("amazon-products", write(tmp_path / "R.json", old(asin="B1"))).public_texts
    assert len(first) == 3
    assert datasets.read("amazon-products", write(tmp_path / "R.json", old(asin="B7"))).public_texts == first


def test_broken_products_are_named_and_missing_ones_asked_for(tmp_path):
    write(tmp_path / "R.json", old())
    assert "needs a file meta* with titles" in refused(tmp_path, "amazon-products")
    write(tmp_path / "meta.json", {"asin": "B1", "title": "T"}, {"title": "T"})
    assert "meta.json, line 2: a product must have parent_asin or asin" in refused(tmp_path, "amazon-products")
    write(tmp_path / "meta.json", {"asin": "B1", "title": "T", "category": "Gifts"})
    assert "meta.json, line 1: categories must be a list" in refused(tmp_path, "amazon-products")


def test_public_texts_are_the_folder_s_own_or_those_of_products(tmp_path):
    write(tmp_path / "R.json", old())
    write(tmp_path / "meta.json", {"asin": "B1", "title": "T"})
    assert datasets.read("amazon-reviews", tmp_path).public_texts == ("T",)
    (tmp_path / "public.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \r\none\r\n")
    assert datasets.read("amazon-reviews", tmp_path).public_texts == ("one", "two")


@pytest.mark.skipif(not DATA.is_dir(), reason="the user supplies the file")
def test_the_real_gift_cards():
    data = datasets.read("amazon-reviews", DATA)
    sizes = sorted(len(rows) for rows in records(data).values())
    assert (len(sizes), sum(sizes), sizes[0], sizes[-1], sum(size >= 10 for size in sizes)) == (458, 2972, 5, 32, 38)
    stars = [record.target for rows in records(data).values() for record in rows]
    assert round(stars.count(5.0) / len(stars), 2) == 0.93
