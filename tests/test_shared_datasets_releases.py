"""MovieLens 1M and latest, and the profiles of 100k and 1M, on small invented files and on real ones where they lie."""

import gzip
from pathlib import Path

import pytest

from shared import datasets
from shared.datasets import Record
from shared.errors import DataError

DATA = Path(__file__).parents[2] / "shared" / "data"
INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
USER = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"

MOVIES_DAT = "10::Légende, La (1971)::unknown\n2::Toy: Bakery (1995) ::Animation|Children's\n"
RATINGS_DAT = "1::10::4::978300000\n1::2::5::978300001\n9::2::1::978300002\n"
USERS_DAT = "1::F::25::4::12345\n9::M::56::20::x\n10::M::1::0::x\n"

MOVIES_CSV = 'movieId,title,genres\r\n10,"Légende, La (1971)",Drama|War\r\n2,Clip,(no genres listed)\r\n'
RATINGS_CSV = "userId,movieId,rating,timestamp\r\n10,2,0.5,964982703\r\n2,10,4.5,964982704\r\n10,10,4.0,1\r\n"


def one_m(folder, *, ratings=RATINGS_DAT, movies=MOVIES_DAT, users=USERS_DAT):
    for name, text in (("ratings.dat", ratings), ("movies.dat", movies), ("users.dat", users)):
        (folder / name).write_text(text, encoding="latin-1", newline="")
    return folder


def latest(folder, *, ratings=RATINGS_CSV, movies=MOVIES_CSV):
    (folder / "ratings.csv").write_text(ratings, encoding="utf-8", newline="")
    (folder / "movies.csv").write_text(movies, encoding="utf-8", newline="")
    return folder


def refused(release, folder):
    with pytest.raises(DataError) as caught:
        datasets.read(release, folder)
    return str(caught.value)


def rows(data):
    return {user.user: user.train + user.test for user in data.users}


# 1M


def test_1m_is_read_as_published(tmp_path):
    data = datasets.read("movielens-1m", one_m(tmp_path))
    bakery, legend = "Toy: Bakery (1995). Animation, Children's", "Légende, La (1971). unknown"
    assert data.public_texts == (bakery, legend)
    assert rows(data) == {
        "1": (Record(legend, 4.0, "10", 978300000), Record(bakery, 5.0, "2", 978300001)),
        "9": (Record(bakery, 1.0, "2", 978300002),),
    }
    assert [dict(user.profile) for user in data.users] == [
        {"gender": "F", "age": "25", "occupation": "college/grad student"},
        {"gender": "M", "age": "56", "occupation": "writer"},
    ]


def test_1m_without_users_has_no_profiles(tmp_path):
    (one_m(tmp_path) / "users.dat").unlink()
    assert [dict(user.profile) for user in datasets.read("movielens-1m", tmp_path).users] == [{}, {}]


@pytest.mark.parametrize(
    ("file", "bad", "says"),
    [
        ("ratings", "1::2::4.5::3\n", "line 1: rating must be a multiple of 1, got 4.5"),
        ("ratings", "1::2::0::3\n", "line 1: rating must be in 1..5, got 0"),
        ("ratings", "1::2::4::3\n1::2::4::3\n", "line 2: user 1 must rate item 2 once"),
        ("ratings", "1:2:4:3\n", "line 1: must have 4 columns, got 1"),
        ("ratings", "7::2::4::3\n", "must have a profile of every user who rated, user 7 has none"),
        ("movies", "2::Film (1990)::\n", "line 1: a film must have a title and a genre"),
        ("users", "1::F::25::21::x\n", "line 1: occupation must be in 0..20"),
        ("users", "1::f::25::2::x\n", "line 1: a user must have gender F or M"),
        ("users", "1::F::0::2::x\n", "line 1: age must be in 1..149"),
        ("users", "1::F::25::2::x\n1::F::25::2::x\n", "line 2: user 1 must occur once"),
        ("users", "\n\n", "must hold at least one row"),
    ],
)
def test_1m_refuses_by_file_and_line(tmp_path, file, bad, says):
    message = refused("movielens-1m", one_m(tmp_path, **{file: bad}))
    assert says in message
    assert f"{file}.dat" in message or "profile of every user" in says


def test_1m_as_utf_8_is_refused(tmp_path):
    (one_m(tmp_path) / "movies.dat").write_text(MOVIES_DAT, encoding="utf-8")
    assert "movies.dat must be latin-1 as published, got utf-8" in refused("movielens-1m", tmp_path)


# Latest


def test_latest_is_read_as_published(tmp_path):
    data = datasets.read("movielens-latest", latest(tmp_path))
    clip, legend = "Clip. unknown", "Légende, La (1971). Drama, War"
    assert data.public_texts == (clip, legend)
    assert rows(data) == {
        "2": (Record(legend, 4.5, "10", 964982704),),
        "10": (Record(legend, 4.0, "10", 1), Record(clip, 0.5, "2", 964982703)),
    }


def test_a_byte_order_mark_and_other_line_ends_change_nothing(tmp_path):
    expected = datasets.read("movielens-latest", latest(tmp_path))
    ratings, movies = ("\ufeff" + text.replace("\r\n", "\n") for text in (RATINGS_CSV, MOVIES_CSV))
    assert datasets.read("movielens-latest", latest(tmp_path, ratings=ratings, movies=movies)) == expected


@pytest.mark.parametrize(
    ("file", "bad", "says"),
    [
        ("ratings", "1,2,4.3,3", "line 5: rating must be a multiple of 0.5, got 4.3"),
        ("ratings", "1,2,0.0,3", "line 5: rating must be in 0.5..5, got 0.0"),
        ("ratings", "1,2,nan,3", "line 5: rating must be in 0.5..5, got nan"),
        ("ratings", "1,77,4,3", "line 5: item id must be listed in movies.csv, got 77"),
        ("ratings", "10,2,4,3", "line 5: user 10 must rate item 2 once"),
        ("ratings", "1,2,4", "line 5: must have 4 columns as the header, got 3"),
        ("movies", '5,"Open,Drama', "line 4: must be CSV, got: unexpected end of data"),
        ("movies", "5,Film", "line 4: must have 3 columns"),
    ],
)
def test_latest_refuses_by_file_and_line(tmp_path, file, bad, says):
    good = {"ratings": RATINGS_CSV, "movies": MOVIES_CSV}[file]
    assert f"{file}.csv, {says}" in refused("movielens-latest", latest(tmp_path, **{file: good + bad}))


def test_latest_needs_its_header_and_a_row(tmp_path):
    swapped = RATINGS_CSV.replace("userId,movieId", "movieId,userId")
    assert "ratings.csv, line 1: header must be" in refused("movielens-latest", latest(tmp_path, ratings=swapped))
    assert "line 1: header must be" in refused("movielens-latest", latest(tmp_path, ratings=""))
    header = RATINGS_CSV.splitlines()[0]
    assert "must hold at least one row" in refused("movielens-latest", latest(tmp_path, ratings=header))


def test_more_ratings_than_a_simulation_holds_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("shared.datasets.movielens_rows.MAX_RECORDS", 2)
    assert "line 4: a simulation holds at most 2 ratings" in refused("movielens-latest", latest(tmp_path))


# Profiles of 100k


@pytest.mark.parametrize("layout", ["recbole", "grouplens"])
def test_ages_of_100k_are_bands_of_1m(tmp_path, layout):
    ages = {1: "1", 17: "1", 18: "18", 24: "18", 25: "25", 44: "35", 45: "45", 49: "45", 50: "50", 55: "50", 73: "56"}
    people = [(user, age) for user, age in enumerate(ages, start=1)]
    ratings = "".join(f"{user}\t1\t4\t9\n" for user, _ in people)
    if layout == "recbole":
        (tmp_path / "ml-100k.inter").write_text(INTER + ratings)
        (tmp_path / "ml-100k.item").write_text(ITEM + "1\tFilm\t1990\tDrama\n")
        (tmp_path / "ml-100k.user").write_text(USER + "".join(f"{u}\t{a}\tF\tnone\t1\n" for u, a in people))
    else:
        (tmp_path / "u.data").write_text(ratings)
        (tmp_path / "u.item").write_text("1|Film (1990)|||u|" + "|".join("0" * 8 + "1" + "0" * 10) + "\n")
        (tmp_path / "u.user").write_text("".join(f"{u}|{a}|F|none|1\n" for u, a in people))
    data = datasets.read("movielens-100k", tmp_path)
    assert [user.profile["age"] for user in data.users] == list(ages.values())
    assert data.users[0].profile == {"gender": "F", "age": "1", "occupation": "none"}  # no zip code


def test_min_records_leaves_users_out_and_the_catalogue_whole(tmp_path):
    data = datasets.read("movielens-latest", latest(tmp_path), min_records=2)
    assert [user.user for user in data.users] == ["10"]
    assert len(data.public_texts) == 2
    with pytest.raises(DataError, match=r"data.min_records = 3 must leave at least one user, it leaves none of 2"):
        datasets.read("movielens-latest", tmp_path, min_records=3)


# Damaged gz, and the real files


def test_gz_is_read_line_by_line_and_must_be_whole(tmp_path):
    from shared.datasets.lines import numbered_lines

    path = tmp_path / "lines.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfone\r\n\n three\n\n"))
    assert list(numbered_lines(path)) == [(1, "one"), (2, ""), (3, " three")]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="must be whole and of gzip"):
        list(numbered_lines(path))
    path.write_bytes(b"no gzip\n")
    with pytest.raises(DataError, match="must be whole and of gzip"):
        list(numbered_lines(path))


@pytest.mark.parametrize(("size", "fine"), [(10, True), (11, False)])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_longest_line_is_exact(tmp_path, size, fine, end):
    from shared.datasets.lines import numbered_lines

    path = tmp_path / "lines"
    path.write_bytes(b"x" * size + end)
    if fine:
        assert list(numbered_lines(path, max_bytes=10)) == [(1, "x" * size)]
    else:
        with pytest.raises(DataError, match="line 1: must be at most 10 bytes long, got more"):
            list(numbered_lines(path, max_bytes=10))


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "ml-latest-small").is_dir(), reason="the user supplies the file")
def test_real_latest_small():
    data = datasets.read("movielens-latest", DATA / "ml-latest-small")
    sizes = sorted(len(user.train + user.test) for user in data.users)
    assert (len(sizes), sum(sizes), sizes[0], sizes[-1]) == (610, 100_836, 20, 2698)
    assert len(data.public_texts) == 9742
    assert {record.target for user in data.users for record in user.train} == {n / 2 for n in range(1, 11)}
    assert "Toy Story (1995). Adventure, Animation, Children, Comedy, Fantasy" in data.public_texts
