"""The split, the catalogue and both layouts of MovieLens 100k, on small invented files."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from shared import assets, datasets
from shared.datasets import Record, split_by_time
from shared.errors import DataError, ScenarioError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"

RATINGS = "10\t3\t4\t100\n2\t1\t5\t300\n2\t3\t1\t200\n2\t2\t3\t200\n"
RECBOLE_FILMS = (
    "3\tLa Légende (The Legend)\t1971\tunknown\n"
    "1\tToy Bakery\t1995\tAnimation Children's Sci-Fi\n"
    "2\tunkonwn\tunkonwn\tunknown\n"
    "4\tToy Bakery\t1995\tAnimation Children's Sci-Fi\n"
    "5\tLong Road Home (1995)\tV\tFilm-Noir\n"
)
GROUPLENS_FILMS = (
    "3|La Légende (The Legend) (1971)|01-Jan-1971||u|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "1|Toy Bakery (1995) |01-Jan-1995||u|0|0|0|1|1|0|0|0|0|0|0|0|0|0|0|1|0|0|0\n"
    "2|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
    "4|Toy Bakery (1995)|01-Jan-1995||u|0|0|0|1|1|0|0|0|0|0|0|0|0|0|0|1|0|0|0\n"
    "5|Long Road Home (1995) (V)|||u|0|0|0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0\n"
)
TEXTS = (
    "Toy Bakery (1995). Animation, Children's, Sci-Fi",
    "unknown. unknown",
    "La Légende (The Legend) (1971). unknown",
    "Long Road Home (1995) (V). Film-Noir",
)


def recbole(folder, *, ratings=RATINGS, films=RECBOLE_FILMS):
    (folder / "ml-100k.inter").write_text(INTER + ratings, encoding="utf-8")
    (folder / "ml-100k.item").write_text(ITEM + films, encoding="utf-8")
    return folder


def grouplens(folder, *, ratings=RATINGS, films=GROUPLENS_FILMS):
    (folder / "u.data").write_text(ratings, encoding="latin-1")
    (folder / "u.item").write_text(films, encoding="latin-1")
    return folder


def refused(folder):
    """The message a broken folder is refused with: one line, and not a long one whatever the file holds."""
    with pytest.raises(DataError) as caught:
        datasets.read("movielens-100k", folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value).replace(str(folder), "")) < 400
    return str(caught.value)


# The split


def row(item, timestamp):
    return Record(text=f"text of {item}", target=3.0, item=item, timestamp=timestamp)


def test_split_with_ties_worked_out_by_hand():
    # Ten rows, so eight to train, of which one validates. Four rows at time 5 lie across both boundaries;
    # as text "10" would come before "9".
    times = {"1": 1, "2": 2, "3": 3, "4": 4, "5": 4, "8": 5, "9": 5, "10": 5, "11": 5, "7": 6}
    rows = [row(item, time) for item, time in times.items()]
    random.Random(7).shuffle(rows)
    fit, validation, test = split_by_time(rows)
    assert [r.item for r in fit] == ["1", "2", "3", "4", "5", "8", "9"]
    assert [r.item for r in validation] == ["10"]
    assert [r.item for r in test] == ["11", "7"]


def test_split_does_not_depend_on_the_order_of_the_file():
    rows = [row(str(i), i % 3) for i in range(30)]
    expected = split_by_time(rows)
    random.Random(1).shuffle(rows)
    assert split_by_time(rows) == expected


def test_split_orders_ids_that_are_not_numbers_after_those_that_are():
    fit, validation, test = split_by_time([row("b", 1), row("a", 1), row("12", 1), row("3", 1), row("B", 1)])
    assert [r.item for r in fit + validation + test] == ["3", "12", "B", "a", "b"]


@pytest.mark.parametrize(
    ("n", "sizes"),
    [
        (0, (0, 0, 0)),
        (1, (0, 0, 1)),
        (2, (1, 0, 1)),  # one row to train: none is spared
        (3, (1, 1, 1)),
        (5, (3, 1, 1)),
        (24, (18, 1, 5)),  # 19 to train: a tenth is 1.9
        (25, (18, 2, 5)),
        (272, (196, 21, 55)),
    ],
)
def test_sizes_of_the_split(n, sizes):
    assert tuple(len(part) for part in split_by_time(row(str(i), i) for i in range(n))) == sizes


def test_whole_number_arithmetic_equals_the_stated_rule():
    rows = [row(str(i), i) for i in range(400)]
    for n in range(400):
        fit, validation, test = split_by_time(rows[:n])
        assert len(fit) + len(validation) == int(0.8 * n)
        assert fit + validation + test == tuple(rows[:n])


# Reading


@pytest.mark.parametrize("write", [recbole, grouplens])
def test_both_layouts_give_the_same_data(tmp_path, write):
    data = datasets.read("movielens-100k", write(tmp_path))
    assert data.name == "movielens-100k"
    assert data.public_texts == TEXTS  # by item id, not as in the file; the film listed twice once; the unrated too
    assert [user.user for user in data.users] == ["2", "10"]  # as numbers
    two, ten = data.users
    assert two.fit == (Record(text=TEXTS[1], target=3.0, item="2", timestamp=200),)
    assert two.validation == (Record(text=TEXTS[2], target=1.0, item="3", timestamp=200),)
    assert two.test == (Record(text=TEXTS[0], target=5.0, item="1", timestamp=300),)
    assert two.train == two.fit + two.validation
    assert (ten.train, len(ten.test)) == ((), 1)


def test_line_ends_of_other_systems_are_read(tmp_path):
    expected = datasets.read("movielens-100k", recbole(tmp_path))
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert datasets.read("movielens-100k", tmp_path) == expected


def test_a_title_may_hold_what_some_take_for_a_line_end(tmp_path):
    films = GROUPLENS_FILMS.replace("Toy Bakery", "Toy\x85Bakery")
    assert datasets.read("movielens-100k", grouplens(tmp_path, films=films)).public_texts[0].startswith("Toy\x85B")


# Refusals


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("2\t1\t5", "must have 4 columns, got 3"),
        ("2\t1\t5\t300\t0", "must have 4 columns, got 5"),
        ("", "must have 4 columns, got 1"),
        ("2\t1\tfive\t300", "rating must be a number, got 'five'"),
        ("2\t1\tnan\t300", "rating must be in 1..5, got nan"),
        ("2\t1\tinf\t300", "rating must be in 1..5, got inf"),
        ("2\t1\t0\t300", "rating must be in 1..5, got 0"),
        ("2\t1\t5.5\t300", "rating must be in 1..5, got 5.5"),
        ("2\t6\t5\t300", "item id must be listed in {films}, got 6"),
        ("2\tx\t5\t300", "item id must be a whole number, got 'x'"),
        ("-2\t1\t5\t300", "user id must be a whole number, got '-2'"),
        ("2\t1\t5\t3e2", "timestamp must be a whole number, got '3e2'"),
        ("10\t3\t2\t999", "user 10 must rate item 3 once, got a second rating"),
        ("2\t1\t0_4\t300", "rating must be in 1..5, got 0_4"),
        ("2\t1\t5\t" + "9" * 19, "timestamp must have at most 18 digits, got 19"),
        ("2\t1\t5\t" + "9" * 5000, "timestamp must have at most 18 digits, got 5000"),
        ("2\t1\t" + "a" * 500 + "\t300", "rating must be a number, got '" + "a" * 59 + "…'"),
        ("2\t1\t5\t3\0", "text must hold no NUL byte, got one"),
        ("2\t1\t5\t" + "9" * 20_000, "must be at most 10000 bytes long, got more"),
    ],
)
@pytest.mark.parametrize(
    ("write", "name", "films", "line"),
    [(recbole, "ml-100k.inter", "ml-100k.item", 3), (grouplens, "u.data", "u.item", 2)],
)
def test_a_bad_rating_is_refused_by_file_and_line(tmp_path, write, name, films, line, bad, says):
    first, _replaced, *rest = RATINGS.splitlines()
    message = refused(write(tmp_path, ratings="\n".join([first, bad, *rest, ""])))
    assert f"{tmp_path / name}, line {line}: {says.format(films=films)}." in message


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("6\tFilm\t1990", "must have 4 columns, got 3"),
        ("1\tFilm\t1990\tDrama", "item id 1 must occur once"),
        ("six\tFilm\t1990\tDrama", "item id must be a whole number, got 'six'"),
        ("6\t\t\tDrama", "must have a title and a genre, got ''"),
        ("6\tFilm\t1990\t", "must have a title and a genre, got 'Film (1990)' and ''"),
    ],
)
def test_a_bad_film_is_refused_in_the_recbole_copy(tmp_path, bad, says):
    message = refused(recbole(tmp_path, films=RECBOLE_FILMS + bad + "\n"))
    assert f"{tmp_path / 'ml-100k.item'}, line 7: " in message
    assert says in message


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("6|Film (1990)|||u|0|1", "must have 24 columns, got 7"),
        ("6|Film (1990)|||u|" + "|".join(["0"] * 19), "must have a title and a genre"),
        ("6|Film (1990)|||u|2|" + "|".join(["0"] * 18), "19 genre flags must be 0 or 1, got 2|0"),
    ],
)
def test_a_bad_film_is_refused_in_the_original(tmp_path, bad, says):
    message = refused(grouplens(tmp_path, films=GROUPLENS_FILMS + bad + "\n"))
    assert f"{tmp_path / 'u.item'}, line 6: " in message
    assert says in message


def test_only_plain_digits_are_a_number(tmp_path):
    message = refused(recbole(tmp_path, ratings=RATINGS.replace("10\t3", "\uff11\t3")))  # a full-width 1
    assert "line 2: user id must be a whole number" in message
    message = refused(recbole(tmp_path, ratings=RATINGS.replace("\t4\t", "\t\u0664\t")))  # an Arabic 4
    assert "line 2: rating must be in 1..5" in message


def test_a_film_without_a_year_has_no_parentheses(tmp_path):
    folder = recbole(tmp_path, films=RECBOLE_FILMS + "6\tFilm\t\tWar Drama\n")
    assert datasets.read("movielens-100k", folder).public_texts[-1] == "Film. War, Drama"


@pytest.mark.parametrize("name", ["ml-100k.inter", "ml-100k.item"])
def test_the_header_must_be_the_published_one(tmp_path, name):
    path = recbole(tmp_path) / name
    path.write_text(path.read_text(encoding="utf-8").replace(":token\t", "\t", 1), encoding="utf-8")
    assert f"{path}, line 1: header must be " in refused(tmp_path)


@pytest.mark.parametrize("name", ["ml-100k.inter", "ml-100k.item"])
def test_an_empty_file_is_refused(tmp_path, name):
    path = recbole(tmp_path) / name
    header = path.read_text(encoding="utf-8").splitlines()[0]
    path.write_bytes(b"")
    assert f"{path}, line 1: header must be " in refused(tmp_path)
    for content in (header, header + "\n"):
        path.write_text(content, encoding="utf-8")
        assert f"{path} must hold at least one row" in refused(tmp_path)


@pytest.mark.parametrize("name", ["u.data", "u.item"])
def test_an_empty_original_is_refused(tmp_path, name):
    path = grouplens(tmp_path) / name
    path.write_bytes(b"\n")
    assert f"{path} must hold at least one row" in refused(tmp_path)


def test_bytes_of_another_encoding_are_refused_by_line(tmp_path):
    path = recbole(tmp_path) / "ml-100k.item"
    path.write_bytes(path.read_bytes() + b"6\tMis\xe9rables\t1995\tDrama\n")
    assert f"{path}, line 7: text must be utf-8, got byte 0xe9" in refused(tmp_path)


def test_an_original_that_was_converted_is_refused(tmp_path):
    path = grouplens(tmp_path) / "u.item"
    path.write_text(GROUPLENS_FILMS, encoding="utf-8")  # "é" would be read as "Ã©"
    assert f"{path} must be latin-1 as published, got utf-8" in refused(tmp_path)


@pytest.mark.parametrize(("write", "name"), [(recbole, "ml-100k.item"), (grouplens, "u.item"), (grouplens, "u.data")])
def test_utf_16_is_refused(tmp_path, write, name):
    path = write(tmp_path) / name
    path.write_bytes(path.read_bytes().decode("latin-1").encode("utf-16"))
    assert f"{path}, line 1: text must hold no NUL byte" in refused(tmp_path)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (
            ["movies.csv", "ratings.csv", "tags.csv"],
            "holds movies.csv and ratings.csv, which data.format = 'movielens-latest' reads",
        ),
        (["movies.dat", "ratings.dat"], "holds movies.dat and ratings.dat, which data.format = 'movielens-1m' reads"),
        (["u.data", "notes.txt"], "does not hold both, but notes.txt, u.data."),
        ([f"{i}.txt" for i in range(9)], "but 0.txt, 1.txt, 2.txt, 3.txt, 4.txt, 5.txt, …."),
        ([], "but nothing."),
    ],
)
def test_files_of_another_format_are_named(tmp_path, names, says):
    for name in names:
        (tmp_path / name).touch()
    assert says in refused(tmp_path)


@pytest.mark.parametrize("name", ["ml-100k.inter", "ml-100k.item"])
def test_a_missing_file_names_what_is_expected(tmp_path, name):
    (recbole(tmp_path) / name).unlink()
    message = refused(tmp_path)
    assert "ml-100k.inter and ml-100k.item or u.data and u.item" in message
    assert f"{tmp_path} does not hold both, but" in message
    assert "is not a folder" in refused(tmp_path / "nowhere")


def test_an_unknown_format_names_the_known_ones(tmp_path):
    with pytest.raises(
        ScenarioError, match=r"data format must be 'movielens-100k', .* or 'parquet', got 'movielens-1b'"
    ):
        datasets.read("movielens-1b", tmp_path)


def test_the_base_install_is_enough():
    code = (
        "import sys, shared.datasets, shared.assets, shared.progress\n"
        "heavy = {'torch', 'transformers', 'flwr', 'huggingface_hub', 'recbole', 'pandas'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_real_data():
    data = datasets.read("movielens-100k", assets.fetch("ml-100k"))
    rows = [record for user in data.users for record in user.train + user.test]
    assert len(data.users) == 943
    assert len(rows) == 100_000
    assert len({record.item for record in rows}) == 1682
    assert len(data.public_texts) == 1682 - 18  # 18 films are listed under two ids
    assert "Fargo (1996). Crime, Drama, Thriller" in data.public_texts
    assert sum(user.train[-1].timestamp == user.test[0].timestamp for user in data.users) == 470
    assert min(len(user.train) + len(user.test) for user in data.users) == 20
