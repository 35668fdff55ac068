"""Files of LaMP answers, LaMP's own scores, stand-ins in its format, and a run that ends in a file of predictions."""

import json
import math

import numpy as np
import pytest

from shared.assets import resolve
from shared.config import TaskConfig, load_scenario
from shared.datasets import Dataset, Record, UserData, read
from shared.errors import DataError, ScenarioError
from shared.metrics.lamp import MOVIE_TAGS, NEWS_CATEGORIES, Answers, read_answers, score, write_answers
from shared.metrics.text import rouge
from simulations.lamp import TAGS, check_labels, make, write_predictions
from simulations.run import simulate
from sottovoce.cli import main


def of(task, *outputs):
    return Answers(task, {str(i): output for i, output in enumerate(outputs)})


def test_macro_f1_is_over_every_label_there_is():
    """By hand: of three golds two are right; F1 is 1 for classic, 2/3 for action, 0 for comedy and 12 others."""
    gold, predicted = of(2, "classic", "action", "comedy"), of(2, " classic\n", "action", "action")
    assert score(predicted, gold) == pytest.approx({"accuracy": 2 / 3, "f1": (1 + 2 / 3) / 15})
    unknown = of(2, "classic", "action", "Comedy!")  # exact, and wrong for every label
    assert score(unknown, gold) == pytest.approx({"accuracy": 2 / 3, "f1": 2 / 15})
    assert score(of(1, "[1]", "2"), of(1, "[1]", "[2]")) == pytest.approx({"accuracy": 0.5, "f1": 0.5})


def test_the_labels_are_those_of_the_golds():
    assert len(set(MOVIE_TAGS)) == len(set(NEWS_CATEGORIES)) == 15
    assert score(of(2, "sports"), of(2, "sports"))["f1"] == pytest.approx(1 / 15)
    gold = of(2, "loved", "fine")
    with pytest.raises(DataError, match="--labels"):
        score(gold, gold)
    assert score(gold, gold, labels=TAGS) == pytest.approx({"accuracy": 1, "f1": 2 / 3})
    with pytest.raises(DataError, match="one of the 2 labels"):
        score(gold, gold, labels=("loved", "disliked"))


@pytest.mark.parametrize(("gold", "error"), [("1", 4), ("2", 3), ("3", 2), ("4", 3), ("5", 4)])
@pytest.mark.parametrize("answer", ["", "four", "nan", "inf"])
def test_a_prediction_that_is_no_number_counts_as_the_farther_end(gold, error, answer):
    assert score(of(3, answer), of(3, gold)) == {"MAE": error, "RMSE": error}


def test_scores_are_compared_as_numbers():
    assert score(of(3, "4.5", " 2 "), of(3, "4", "4.0")) == pytest.approx({"MAE": 1.25, "RMSE": math.sqrt(4.25 / 2)})


def test_texts_are_scored_by_rouge_without_stemming():
    assert rouge("running", "runs", "rouge1") == 0.0
    assert rouge("", "a", "rougeL") == rouge("!", "?", "rouge1") == 0.0
    assert score(of(7, "a b", "c"), of(7, "b a", "d")) == pytest.approx({"rouge-1": 0.5, "rouge-L": 0.25})


def test_the_ids_must_be_exactly_those_of_the_golds():
    gold = Answers(3, {"1": "5", "2": "4"})
    with pytest.raises(DataError, match=r"got 1 too few \('2'\), 1 too many \('3'\)"):
        score(Answers(3, {"1": "5", "3": "4"}), gold)
    with pytest.raises(DataError, match="must be of LaMP_3 as the golds are, got LaMP_2"):
        score(Answers(2, gold.outputs), gold)
    with pytest.raises(DataError, match="at least one gold answer"):
        score(Answers(3, {}), Answers(3, {}))
    with pytest.raises(DataError, match="gold score"):
        score(of(3, "5"), of(3, "nan"))


def test_answers_are_read_as_they_were_written(tmp_path):
    path = tmp_path / "answers.json"
    write_answers(path, Answers(4, {"b": "Übermut", "a": ""}))
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "task": "LaMP_4", "golds": [{"id": "b", "output": "Übermut"}, {"id": "a", "output": ""}]
    }  # fmt: skip
    assert read_answers(path) == Answers(4, {"b": "Übermut", "a": ""})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[", "must be JSON"),
        ("[]", "must hold an object"),
        ('{"task": "LaMP_3"}', "must hold an object"),
        ('{"task": "LaMP_8", "golds": []}', "task must be LaMP_1 to LaMP_7, got 'LaMP_8'"),
        ('{"task": "LaMP-3", "golds": [{"id": "1"}]}', "answer 1: must be an object with id and output"),
        ('{"task": "LaMP-3", "golds": [{"id": "1", "output": ["SECRET"]}]}', "answer 1: must be"),
        (
            '{"task": "LaMP-3", "golds": [{"id": 1, "output": 2}, {"id": "1", "output": 3}]}',
            "answer 2: an id must occur",
        ),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, said):
    path = tmp_path / "answers.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=said) as caught:
        read_answers(path)
    assert "SECRET" not in str(caught.value)
    with pytest.raises(DataError, match="readable"):
        read_answers(tmp_path / "none.json")


@pytest.fixture(scope="module")
def ratings(tiny, tmp_path_factory):
    return tiny.tiny_movielens(tmp_path_factory.mktemp("ratings"))


@pytest.mark.parametrize("split", ["time", "user"])
def test_a_stand_in_holds_the_ratings_it_was_made_of(ratings, tmp_path, split):
    made = make("movielens-100k", str(ratings), task="lamp-3", out=tmp_path / "a" / "lamp", split=split)
    source = {user.user: user.train + user.test for user in read("movielens-100k", ratings).users}
    found = read("lamp-3", made.folder)
    assert found.public_texts == read("movielens-100k", ratings).public_texts
    histories = [user.train + user.test for user in found.users]
    want = list(source.values())
    if split == "time":
        assert [user.user for user in found.users] == list(source)
        assert made.questions == {"train": 12, "dev": 12}
        assert all(len(user.test) == 1 for user in found.users)
    else:
        assert made.questions == {"train": 9, "dev": 3}
        assert [len(user.test) for user in found.users] == [0] * 9 + [1] * 3
        want = [each for i, each in enumerate(want) if i % 5] + want[::5]
    for mine, theirs in zip(histories, want, strict=True):
        assert [(r.text, r.target) for r in mine] == [(r.text, r.target) for r in theirs]
    with pytest.raises(DataError, match="does not exist yet"):
        make("movielens-100k", str(ratings), task="lamp-3", out=made.folder)
    assert [path.name for path in made.folder.parent.iterdir()] == ["lamp"]


def test_a_tag_is_how_this_user_takes_the_film(ratings, tmp_path):
    made = make("movielens-100k", str(ratings), task="lamp-2", out=tmp_path / "lamp")
    source = {user.user: user.train + user.test for user in read("movielens-100k", ratings).users}
    seen = set()
    for user in read("lamp-2", made.folder).users:
        before = [record.target for record in source[user.user]][:-1]
        for mine, theirs in zip(user.train + user.test, source[user.user], strict=True):
            apart = theirs.target - sum(before) / len(before)
            assert TAGS[int(mine.target)] == ("loved" if apart > 0.5 else "disliked" if apart < -0.5 else "fine")
            seen.add(mine.target)
    assert seen == {0.0, 1.0, 2.0}


@pytest.mark.parametrize(("task", "said"), [("lamp-3", "ratings of 1, 2, 3, 4 or 5"), ("lamp-2", "made of ratings")])
def test_what_is_no_rating_makes_no_stand_in(tmp_path, tiny, task, said):
    folder = tiny.tiny_dialogues(tmp_path / "dialogues")
    with pytest.raises(DataError, match=said):
        make("convai2", str(folder), task=task, out=tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dialogues"]


def test_a_headline_is_what_the_user_wrote_after_a_text(tmp_path):
    made = make("sotu", "builtin:sotu", task="lamp-4", out=tmp_path / "lamp")
    source = {user.user: user.train + user.test for user in read("sotu", resolve("builtin:sotu")).users}
    found = read("lamp-4", made.folder)
    assert made.questions == {"train": 43, "dev": 43}
    for user in found.users:
        wrote = [(" ".join(record.text.split()), " ".join(record.response.split())) for record in source[user.user]]
        assert [(record.text, record.response) for record in user.train + user.test] == wrote
        assert len(user.test) == 1


@pytest.mark.slow
def test_the_answers_of_a_run_score_in_lamps_way_as_in_ours(tiny, tiny_llama, tiny_base, tmp_path, capsys):
    """LaMP-4 on a stand-in: what the devices' runtime answers is in the file of predictions, and scores alike."""
    folder = tmp_path / "lamp"
    dialogues = tiny.tiny_dialogues(tmp_path / "dialogues")
    command = ["lamp", "make", str(dialogues), "--from", "convai2", "--task", "lamp-4", "--out", str(folder)]
    assert main(command) == 0
    body = f"""
evaluation.answers = 1
evaluation.answer_tokens = 6
evaluation.swapped = true
prompt.records = 1
prompt.encoder = "{tiny_base.folder}"
"""
    scenario = load_scenario(
        tiny.tiny_generation(tmp_path, base=tiny_llama, data=folder, body=body),
        ("export.users=0", "data.format=lamp-4"),
    )
    summary = simulate(scenario, out=tmp_path / "run", quiet=True)
    capsys.readouterr()
    files = [str(tmp_path / "run" / "predictions.json"), str(folder / "dev_outputs.json")]
    assert main(["lamp", "score", *files, "--json"]) == 0
    found, row = json.loads(capsys.readouterr().out), summary["answers"]["rows"]["personal + profile"]
    assert found["questions"] == summary["answers"]["answers"]
    assert found["rouge-1"] == pytest.approx(row["rouge_1"]["value"], abs=1e-12)
    assert found["rouge-L"] == pytest.approx(row["rouge_l"]["value"], abs=1e-12)
    rows = summary["rows"]
    assert rows["personal of another"]["nll"]["value"] != rows["personal"]["nll"]["value"]
    assert "personal - personal of another" in summary["differences"]


def test_predicted_scores_are_written_to_the_last_digit(tiny_world, ratings, tmp_path):
    folder = make("movielens-100k", str(ratings), task="lamp-3", out=tmp_path / "lamp").folder
    scenario = load_scenario(tiny_world(tmp_path, body='data.format = "lamp-3"'), (f"data.source={folder}",))
    dataset = read("lamp-3", folder)
    truth = np.array([record.target for user in dataset.users for record in user.test])
    row = np.random.default_rng(1).uniform(1, 5, len(truth))
    path = write_predictions(scenario, dataset, row, folder=tmp_path)
    found = score(read_answers(path), read_answers(folder / "dev_outputs.json"))
    assert found["RMSE"] == pytest.approx(np.sqrt(np.mean((row - truth) ** 2)), rel=1e-12)


@pytest.mark.slow
def test_the_predictions_of_a_run_score_in_lamps_way_as_in_ours(tiny_world, ratings, tmp_path, capsys):
    folder = tmp_path / "lamp"
    command = ["lamp", "make", str(ratings), "--from", "movielens-100k", "--task", "lamp-3", "--out", str(folder)]
    assert main(command) == 0
    scenario = load_scenario(
        tiny_world(tmp_path, body='data.format = "lamp-3"\nlinear.enabled = false\nmodel.head_blocks = 0'),
        (f"data.source={folder}", "export.users=0", "federation.rounds=1"),
    )
    summary = simulate(scenario, out=tmp_path / "run", quiet=True)
    capsys.readouterr()
    files = [str(tmp_path / "run" / "predictions.json"), str(folder / "dev_outputs.json")]
    assert main(["lamp", "score", *files, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    personal = summary["rows"]["personal"]
    assert found["questions"] == 12
    assert found["RMSE"] == pytest.approx(personal["rmse"]["value"], rel=1e-9)
    assert found["MAE"] == pytest.approx(personal["mae"]["value"], rel=1e-9)
    assert main(["lamp", "score", files[0], str(folder / "train_outputs.json")]) == 0  # the ids are the same by chance
    assert "RMSE" in capsys.readouterr().out
    assert main(["lamp", "score", files[0], files[0] + "x"]) == 2


def tagging(path, tiny_world, labels):
    body = f'data.format = "lamp-2"\ntask.name = "tagging"\ntask.labels = {json.dumps(labels)}'
    return load_scenario(tiny_world(path.parent, body=body), (f"data.source={path}",))


def test_labels_are_written_as_the_data_name_them(tiny_world, ratings, tmp_path):
    folder = make("movielens-100k", str(ratings), task="lamp-2", out=tmp_path / "lamp").folder
    scenario = tagging(folder, tiny_world, TAGS)
    check_labels(scenario)
    dataset = read("lamp-2", folder)
    truth = np.array([record.target for user in dataset.users for record in user.test])
    for row in (truth, np.eye(3)[truth.astype(int)]):
        path = write_predictions(scenario, dataset, row, folder=tmp_path)
        assert read_answers(path) == read_answers(folder / "dev_outputs.json")
    with pytest.raises(ScenarioError, match=r'in their order: \["loved", "fine", "disliked"\]; got \["fine"'):
        check_labels(tagging(folder, tiny_world, ["fine", "loved", "disliked"]))


def test_other_data_get_no_file_of_predictions(tiny_world, tmp_path):
    scenario = load_scenario(tiny_world(tmp_path))
    record = Record(text="", target=1.0, item="1", timestamp=0)
    dataset = Dataset("movielens-100k", (UserData("1", (), (), (record,)),), ())
    assert scenario.task.name == TaskConfig().name == "rating"
    assert write_predictions(scenario, dataset, np.array([3.0]), folder=tmp_path) is None
    check_labels(scenario)
