"""LaMP's files as records, on small invented ones, and what is asked of a file that is not as published."""

import json
import tracemalloc

import pytest

from shared import datasets
from shared.datasets.lamp import question_labels
from shared.errors import DataError

SCORE = "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5. review: "
TAG = "Which tag does this movie relate to among the following tags? tags: [classic, based on a book] description: "
NEWS = "Which category does this article relate to? categories: [food & drink, sports] article: "


def write(folder, split, questions, golds, *, task="LaMP_3"):
    (folder / f"{split}_questions.json").write_text(json.dumps(questions), encoding="utf-8")
    answers = {"task": task, "golds": [{"id": name, "output": output} for name, output in golds.items()]}
    (folder / f"{split}_outputs.json").write_text(json.dumps(answers), encoding="utf-8")
    (folder / "public.txt").write_text("A lid.\nA mug.\n", encoding="utf-8")
    return folder


def ask(name, text, profile=(), *, prompt=SCORE, **more):
    return {"id": name, "input": prompt + text, "profile": list(profile), **more}


def review(name, text, score, **more):
    return {"id": name, "text": text, "score": score, **more}


def rows(folder, *, number=3):
    return {user.user: user for user in datasets.read(f"lamp-{number}", folder).users}


def keys(records):
    return [(record.item, record.text, record.target, record.response) for record in records]


def refused(folder, *, number=3):
    with pytest.raises(DataError) as caught:
        datasets.read(f"lamp-{number}", folder)
    message = str(caught.value)
    assert "SECRET" not in message
    assert "\n" not in message
    return message


def test_in_the_user_split_every_question_is_a_user(tmp_path):
    profile = [review("3100", "Good: very.", "5"), review("3101", "Bad.", "1"), review("3102", "So so.", 3)]
    folder = write(
        tmp_path, "dev", [ask("310", "Why: broken.", profile), ask("320", "Fine.")], {"320": "4", "310": "2"}
    )
    found = rows(folder)
    assert list(found) == ["dev-310", "dev-320"]
    assert keys(found["dev-310"].fit) == [("3100", "Good: very.", 5.0, ""), ("3101", "Bad.", 1.0, "")]
    assert keys(found["dev-310"].validation) == [("3102", "So so.", 3.0, "")]
    assert keys(found["dev-310"].test) == [("310", "Why: broken.", 2.0, "")]
    assert (found["dev-320"].train, keys(found["dev-320"].test)) == ((), [("320", "Fine.", 4.0, "")])
    times = [record.timestamp for record in found["dev-310"].train + found["dev-310"].test]
    assert times == sorted(set(times))
    assert datasets.read("lamp-3", folder).public_texts == ("A lid.", "A mug.")


def test_in_the_time_split_questions_of_a_user_are_one_history(tmp_path):
    first = [review("a0", "New.", "4", date="2014-03-02"), review("a1", "Old.", "2", date="2013")]
    later = [*first, review("b2", "Asked first.", "5", date="2015-01-01")]  # the same items, under other ids
    later = [item | {"id": f"b{i}"} for i, item in enumerate(later)]
    write(tmp_path, "train", [ask("1", "Asked first.", first, user_id="u 7")], {"1": "5"})
    write(tmp_path, "dev", [ask("1", "Asked last.", later, user_id="u 7")], {"1": "1"})
    [user] = rows(tmp_path).values()
    assert user.user == "u 7"
    assert keys(user.train) == [("a1", "Old.", 2.0, ""), ("a0", "New.", 4.0, ""), ("b2", "Asked first.", 5.0, "")]
    assert keys(user.test) == [("1", "Asked last.", 1.0, "")]
    assert user.train[0].timestamp == 1356998400  # 2013-01-01
    assert user.test[0].timestamp > user.train[-1].timestamp


def test_an_earlier_question_without_a_place_in_the_profile_is_the_last_training_record(tmp_path):
    write(tmp_path, "train", [ask("1", "Asked first.", [review("0", "Old.", "2")], user_id="7")], {"1": "5"})
    write(tmp_path, "dev", [ask("2", "Asked last.", [review("0", "Old.", "2")], user_id="7")], {"2": "1"})
    [user] = rows(tmp_path).values()
    assert [record.text for record in user.train] == ["Old.", "Asked first."]


def test_no_training_record_is_a_question_asked(tmp_path):
    """A later question's profile holds the answer to an earlier one."""
    answered = review("9", "Asked.", "5", date="2015-01-01")
    questions = [ask("1", "Asked.", user_id="7"), ask("2", "Too.", [answered, review("8", "Old.", "5")], user_id="7")]
    [user] = rows(write(tmp_path, "dev", questions, {"1": "5", "2": "3"})).values()
    assert [record.text for record in user.train] == ["Old."]
    assert [record.text for record in user.test] == ["Asked.", "Too."]


def test_a_split_without_outputs_is_not_read(tmp_path):
    write(tmp_path, "dev", [ask("1", "A.")], {"1": "5"})
    (tmp_path / "test_questions.json").write_text("not read", encoding="utf-8")
    assert list(rows(tmp_path)) == ["dev-1"]


def test_items_without_text_or_answer_are_left_out(tmp_path):
    odd = [review("1", "", "5"), review("2", None, "5"), {"id": "3", "score": "5"}, review("4", 4, [5])]
    odd += [review("5", "No score.", ""), review("6", "Six.", "6"), "item", review("7", "Not a number.", "nan")]
    good = [review(str(n), f"Good {n}.", "5", date="soon") for n in range(10, 19)]
    [user] = rows(write(tmp_path, "dev", [ask("1", "A.", odd + good)], {"1": "5"})).values()
    assert [record.text for record in user.train] == [f"Good {n}." for n in range(10, 19)]
    assert "8 of 9 have none" in refused(write(tmp_path, "dev", [ask("1", "A.", odd + good[:1])], {"1": "5"}))


@pytest.mark.parametrize(
    ("prompt", "profile", "labels"),
    [
        (TAG, {"description": " A film. ", "tag": "based on a book"}, ("classic", "based on a book")),
        (NEWS, {"text": "A film.", "title": "Not read.", "category": "sports"}, ("food & drink", "sports")),
    ],
)
def test_lamp_2_is_read_in_both_forms(tmp_path, prompt, profile, labels):
    folder = write(
        tmp_path,
        "dev",
        [ask("1", "A place: [1].", [profile | {"id": "10"}], prompt=prompt)],
        {"1": labels[0]},
        task="LaMP-2",
    )
    [user] = rows(folder, number=2).values()
    assert keys(user.train) == [("10", "A film.", 1.0, "")]
    assert keys(user.test) == [("1", "A place: [1].", 0.0, "")]
    assert question_labels(folder) == labels


@pytest.mark.parametrize(
    ("number", "prompt", "item", "record"),
    [
        (1, 'For an author … [1]: "A" [2]: "B"', {"title": "T", "abstract": "Abs."}, ("Abs.", "T")),
        (4, "Generate a headline for the following article: ", {"text": "Art.", "title": "T"}, ("Art.", "T")),
        (5, "Generate a title for the following abstract: ", {"title": "T", "abstract": "Abs."}, ("Abs.", "T")),
        (6, "Generate a subject for the following email: ", {"text": "Mail.", "title": "T"}, ("Mail.", "T")),
        (7, "Paraphrase the following tweet: ", {"text": "hey you"}, ("", "hey you")),
    ],
)
def test_the_other_tasks_are_texts_and_responses(tmp_path, number, prompt, item, record):
    asked = "" if number == 1 else "What: it is."
    folder = write(tmp_path, "dev", [ask("1", asked, [item], prompt=prompt)], {"1": "[2] "}, task=f"LaMP_{number}")
    (folder / "public.txt").unlink()
    [user] = rows(folder, number=number).values()
    assert [each.key for each in user.train] == [record]
    assert [each.key for each in user.test] == [(asked or prompt, "[2]")]


@pytest.mark.parametrize(
    ("questions", "golds", "said"),
    [
        ([ask("1", "A.")], {"1": "5", "SEC": "3"}, "the ids of the questions, got 1 too many ('SEC')"),
        ([ask("1", "A."), ask("2", "A.")], {"1": "5"}, "the ids of the questions, got 1 too few ('2')"),
        ([ask("1", "A."), ask("1", "SECRET")], {"1": "5"}, "question 2: its id must occur once"),
        ([ask("1", "SECRET", prompt="Hm ")], {"1": "5"}, "question 1: its input must be a text as LaMP-3 puts it"),
        ([ask("1", "A.")], {"1": "SECRET"}, "question 1: its gold answer must be one that the task allows"),
        ([ask("1", "A.")], {"1": "6"}, "gold answer must be"),
        ([ask("1", "A."), ask("2", "A.", user_id="u")], {"1": "5", "2": "5"}, "question 2: all questions of a folder"),
        ([ask("1", "A.", user_id="")], {"1": "5"}, "question 1: all questions of a folder"),
        ([{"id": "1", "input": "A."}], {"1": "5"}, "question 1: its input"),
        ([{"id": "1", "input": SCORE, "profile": "SECRET"}], {"1": "5"}, "question 1: its profile must be a list"),
        (["SECRET"], {"1": "5"}, "question 1: must be an object"),
        ([], {}, "at least one question"),
        ({"SECRET": 1}, {"1": "5"}, "must be a JSON array"),
    ],
)
def test_files_that_do_not_belong_together_are_refused(tmp_path, questions, golds, said):
    assert said in refused(write(tmp_path, "dev", questions, golds))


def test_labels_must_be_the_same_in_every_question(tmp_path):
    questions = [ask("1", "A.", prompt=TAG), ask("2", "B.", prompt=TAG.replace("classic", "modern"))]
    folder = write(tmp_path, "dev", questions, {"1": "classic", "2": "modern"}, task="LaMP_2")
    assert "question 2: it must name distinct labels" in refused(folder, number=2)


def test_a_folder_of_something_else_is_refused(tmp_path):
    assert "dev_questions.json and dev_outputs.json" in refused(tmp_path)
    folder = write(tmp_path, "dev", [ask("1", "A.")], {"1": "5"})
    assert "must hold answers of LaMP_2, got LaMP_3" in refused(folder, number=2)
    (folder / "dev_questions.json").write_text(json.dumps([ask("1", "A.")])[:-3] + "SECRET", encoding="utf-8")
    assert "must be a JSON array, got something else after question 0" in refused(folder)
    (folder / "dev_questions.json").write_bytes(b'[{"id": "\xff"}]')
    assert "must be a JSON array" in refused(folder)
    (folder / "public.txt").write_text("Only one.\n", encoding="utf-8")
    assert "public.txt must hold at least two texts" in refused(folder)
    assert refused(folder, number=4)  # needs none


def test_a_large_file_is_never_in_memory_as_a_whole(tmp_path):
    """The profiles of a user's questions are the same items again and again, as in the published time-based files."""
    profile = [review(str(n), f"Review {n}: {'word ' * 20}", "4", date="2014-01-01") for n in range(60)]
    questions = [ask(str(n), f"Asked {n}.", profile, user_id="7") for n in range(150)]
    folder = write(tmp_path, "dev", questions, {str(n): "4" for n in range(150)})
    size = (folder / "dev_questions.json").stat().st_size
    del questions, profile
    tracemalloc.start()
    [user] = rows(folder).values()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (len(user.train), len(user.test)) == (60, 150)
    assert size > 1_500_000
    assert peak < size / 2
