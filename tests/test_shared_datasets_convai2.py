"""ConvAI2 dialogues as personas and exchanges, on small invented files and, where it lies, on the published one."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

from shared import datasets
from shared.errors import DataError
from simulations.inspect import inspect_data

NAME = "valid_self_original_no_cands.txt"
PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "convai2-valid"
BAKER = ["i bake bread.", "i own two cats."]
DIALOGUES = (
    "1 your persona: i bake bread.\n"
    "2 your persona: i own two cats.\n"
    "3 hi , how are you ?\tfine , baking bread .\n"
    "4 nice . what kind ?\trye .\n"
    "5 i like rye .\tme too .\n"
    "1 your persona: i sing.\n"
    "2 hello .\tlalala .\n"
    "1 your persona: i own two cats.\n"
    "2 your persona: i bake bread.\n"
    "3 any pets ?\tcats !\n"
)


def user_id(persona):
    return hashlib.sha256("\n".join(sorted(persona)).encode()).hexdigest()[:12]


def folder_with(folder, content=DIALOGUES, name=NAME):
    (folder / name).write_bytes(content.encode("utf-8"))
    return folder


def rows_of(folder):
    return {user.user: user.train + user.test for user in datasets.read("convai2", folder).users}


def refused(folder):
    """The message a broken folder is refused with: one line, and nothing of what was said."""
    with pytest.raises(DataError) as caught:
        datasets.read("convai2", folder)
    message = str(caught.value).replace(str(folder), "")
    assert "\n" not in message
    assert "SECRET" not in message
    return message


def test_an_exchange_is_a_record_of_its_persona(tmp_path):
    dataset = datasets.read("convai2", folder_with(tmp_path))
    assert [user.user for user in dataset.users] == sorted([user_id(BAKER), user_id(["i sing."])])
    assert (dataset.name, dataset.public_texts) == ("convai2", ())
    rows = rows_of(tmp_path)
    assert [(row.item, row.timestamp, row.target) for row in rows[user_id(BAKER)]] == [
        ("1-1", 3, 0.0), ("1-2", 4, 0.0), ("1-3", 5, 0.0), ("3-1", 10, 0.0)
    ]  # fmt: skip
    assert [row.key for row in rows[user_id(BAKER)]] == [
        ("hi , how are you ?", "fine , baking bread ."),
        ("nice . what kind ?", "rye ."),
        ("i like rye .", "me too ."),
        ("any pets ?", "cats !"),
    ]
    assert [row.key for row in rows[user_id(["i sing."])]] == [("hello .", "lalala .")]


def test_parts_are_split_in_the_order_of_the_file(tmp_path):
    turns = "".join(f"{i} q{i}\ta{i}\n" for i in range(2, 22))  # the numbers 10 … come after 9, not after 1
    (user,) = datasets.read("convai2", folder_with(tmp_path, "1 your persona: i count.\n" + turns)).users
    assert [row.response for row in user.train + user.test] == [f"a{i}" for i in range(2, 22)]
    assert (len(user.fit), len(user.validation), len(user.test)) == (15, 1, 4)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.removesuffix("\n"),
        lambda text: text + "\n\n",
        lambda text: text.replace("rye .\n", "rye .\t\n"),
    ],
)
def test_other_endings_change_nothing(tmp_path, change):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    changed = change(DIALOGUES)
    assert changed != DIALOGUES
    assert rows_of(folder_with(tmp_path / "a")) == rows_of(folder_with(tmp_path / "b", changed))


def test_test_records_have_the_candidates_of_the_file(tmp_path):
    """Those of training records are of no use, and would be most of a large file."""
    with_some = "".join(f"{row}\t\tno .| {row.split(chr(9))[1]}||no .|never .\n" if "\t" in row else f"{row}\n"
                        for row in DIALOGUES.splitlines())  # fmt: skip
    baker, singer = sorted(
        datasets.read("convai2", folder_with(tmp_path, with_some)).users, key=lambda u: -len(u.train)
    )
    assert baker.test[0].candidates == ("cats !", "no .", "never .")
    assert singer.test[0].candidates == ("lalala .", "no .", "never .")
    assert all(record.candidates == () for record in baker.train)
    plain = datasets.read("convai2", folder_with(tmp_path)).users
    assert all(record.candidates == () for user in plain for record in user.test)
    assert [record.key for user in plain for record in user.train + user.test] == [
        record.key for user in sorted((baker, singer), key=lambda u: u.user) for record in user.train + user.test
    ]


def test_the_persona_s_lines_are_what_its_user_states(tmp_path):
    found = {user.user: dict(user.profile) for user in datasets.read("convai2", folder_with(tmp_path)).users}
    assert found == {
        user_id(BAKER): {"persona": "i bake bread. i own two cats."},
        user_id(["i sing."]): {"persona": "i sing."},
    }


def test_an_inspection_shows_personas_only_where_asked(tmp_path):
    folder = folder_with(tmp_path, DIALOGUES.replace("i bake bread", "i bake SECRET bread every morning"))
    found = inspect_data("convai2", source=str(folder))
    assert "SECRET" not in json.dumps(found)
    assert list(found["profiles"]["persona"].values()) == [2]
    assert "SECRET" in json.dumps(inspect_data("convai2", source=str(folder), show_text=True)["profiles"])


def test_lines_of_the_partners_persona_are_not_read(tmp_path):
    content = "1 partner's persona: i ski.\n2 your persona: i sing.\n3 partner's persona: i run.\n4 hello .\tlalala .\n"
    rows = rows_of(folder_with(tmp_path, content, "train_both_self_original.txt"))
    assert [row.key for row in rows[user_id(["i sing."])]] == [("hello .", "lalala .")]
    assert len(rows) == 1


def test_a_persona_line_twice_is_one(tmp_path):
    content = "1 your persona: i sing.\n2 your persona:  i sing. \n3 hello .\tlalala .\n"
    assert list(rows_of(folder_with(tmp_path, content))) == [user_id(["i sing."])]


def test_the_order_of_persona_lines_does_not_matter(tmp_path):
    lines = [f"i own {i} cats." for i in range(10)]
    for i, order in enumerate((lines, lines[::-1])):
        content = "".join(f"{number} your persona: {line}\n" for number, line in enumerate(order, start=1))
        (tmp_path / str(i)).mkdir()
        assert list(rows_of(folder_with(tmp_path / str(i), content + "11 a\tb\n"))) == [user_id(lines)]


def test_utterances_may_hold_what_other_languages_take_for_line_ends(tmp_path):
    content = "1 your persona: i sing.\n2 a\u2028b\x85c\td\x0be\n"
    ((row,),) = rows_of(folder_with(tmp_path, content)).values()
    assert row.key == ("a\u2028b\x85c", "d\x0be")


PERSONA = "1 your persona: SECRET.\n"


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (PERSONA + "2 SECRET\n", 2, "2 to 4 columns parted by TAB, got 1"),
        (PERSONA + "2 SECRET\tb\t\tc\td\n", 2, "2 to 4 columns parted by TAB, got 5"),
        (PERSONA + "2 a\tSECRET\n4 c\tSECRET\n", 3, "must begin with 3 or 1"),
        (PERSONA + "2 a\tSECRET\n\n3 c\tSECRET\n", 3, "must begin with 3 or 1"),
        (PERSONA + "SECRET a\tb\n", 2, "must begin with 2 or 1"),
        ("2 your persona: SECRET\n3 a\tb\n", 1, "must begin with 1 or 1"),
        (PERSONA + "2 SECRET\t \n", 2, "the reply must be a text, got an empty one"),
        (PERSONA + "2 \tSECRET\n", 2, "the partner's utterance must be a text, got an empty one"),
        (PERSONA + "2 a\0\tSECRET\n", 2, "got a NUL byte"),
        ("1 your persona: \n2 a\tSECRET\n", 1, "a persona line must be a text"),
        ("1 SECRET\tb\n", 1, "must begin with lines 'your persona:'"),
        ("1 partner's persona: SECRET\n2 SECRET\tb\n", 2, "must begin with lines 'your persona:'"),
        (PERSONA + "2 a\tb\n1 SECRET\td\n", 3, "must begin with lines 'your persona:'"),  # none is inherited
        (PERSONA + "2 a\tb\n3 your persona: SECRET\n", 3, "before the dialogue's first exchange"),
    ],
)
def test_a_broken_line_is_named_and_not_quoted(tmp_path, content, line, what):
    message = refused(folder_with(tmp_path, content))
    assert f"{NAME}, line {line}: " in message
    assert what in message


@pytest.mark.parametrize("content", ["", "\n", "\r\n\r\n", PERSONA, PERSONA + PERSONA])
def test_a_file_without_an_exchange_is_refused(tmp_path, content):
    assert "at least one exchange" in refused(folder_with(tmp_path, content))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    (tmp_path / NAME).write_bytes(b"1 your persona: SECRET\n2 a\xff\tb\n")
    assert f"{NAME}, line 2: must be utf-8" in refused(tmp_path)


def test_there_must_be_one_file(tmp_path):
    assert "holds none" in refused(tmp_path)
    assert "holds none" in refused(tmp_path / "missing")
    folder_with(tmp_path, name="train_none_original.txt")
    assert "holds none" in refused(tmp_path)
    folder_with(tmp_path)
    folder_with(tmp_path, name="train_self_original.txt")
    assert f"holds train_self_original.txt, {NAME}." in refused(tmp_path)
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / NAME).mkdir()
    assert "must be readable" in refused(tmp_path / "dir")


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published file is not here")
def test_the_published_file():
    users = datasets.read("convai2", PUBLISHED).users
    rows = [row for user in users for row in user.train + user.test]
    sizes = Counter(len(user.train) + len(user.test) for user in users)
    assert (len(users), len(rows)) == (680, 7801)
    assert {row.item.split("-")[0] for row in rows} == {str(number) for number in range(1, 1001)}
    assert (min(sizes), max(sizes), sum(count for size, count in sizes.items() if size >= 20)) == (7, 54, 78)
    first = next(row for row in rows if row.item == "1-2")
    assert len({row.timestamp for row in rows}) == len(rows)  # one record, one line of the file
    assert max(len(user.profile["persona"]) for user in users) == 253
    assert first.response == "i rather read , i've read about 20 books this year ."
