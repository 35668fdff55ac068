"""The commands that look before anything is run: what a scenario may name, and what a reader finds in a folder."""

import json
from pathlib import Path
from typing import get_args

import pytest

from shared.config import TaskConfig
from shared.registry import KINDS
from simulations.listing import SCENARIOS
from sottovoce.cli import main

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
KEYS = {
    "federation_methods",
    "personal_methods",
    "techniques",
    "formats",
    "metrics",
    "tasks",
    "scenarios",
    "families",
    "judges",
    "conditions",
    "aggregators",
}


def run(capsys, *arguments):
    """Exit code, standard output, standard error of a command."""
    code = main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    return code, out, err


def refused(capsys, *arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("sottovoce: ")
    assert err.count("\n") == 1
    return err


@pytest.fixture
def films(tmp_path):
    """Two films, and five ratings of them: three users with 2, 2 and 1."""
    folder = tmp_path / "films"
    folder.mkdir()
    item = ITEM + "1\tSecret Garden\t1993\tDrama\n2\tHeat\t1995\tCrime\n3\tHeat\t1995\tCrime\n"
    (folder / "ml-100k.item").write_text(item, encoding="utf-8")
    inter = INTER + "7\t1\t5\t100\n7\t2\t1\t200\n8\t1\t4\t100\n8\t3\t3\t50\n9\t2\t2\t10\n"
    (folder / "ml-100k.inter").write_text(inter, encoding="utf-8")
    return folder


# sottovoce list


def test_the_list_has_what_scenarios_may_name(capsys):
    code, out, _ = run(capsys, "list", "--json")
    found = json.loads(out)
    assert (code, set(found)) == (0, KEYS)
    names = {kind: [entry["name"] for entry in entries] for kind, entries in found.items()}
    assert names["personal_methods"][:2] == ["none", "fine-tune"]
    assert {"fedavg", "ffa-lora"} <= set(names["federation_methods"])
    assert "lora" in names["techniques"]
    assert "movielens-100k" in names["formats"]
    assert {"rmse", "worst_decile", "share_gaining", "perplexity"} <= set(names["metrics"])
    assert len(names["metrics"]) == len(set(names["metrics"]))
    assert names["tasks"] == list(get_args(TaskConfig.model_fields["name"].annotation))
    assert names["scenarios"] == sorted(path.stem for path in SCENARIOS.glob("*.toml"))
    for entries in found.values():
        for entry in entries:
            assert set(entry) == {"name", "description", "origin"}
            assert entry["origin"] == "built-in"
            assert entry["description"]
            assert "\n" not in entry["description"]


def test_the_list_for_a_reader_has_every_name(capsys):
    _, as_json, _ = run(capsys, "list", "--json")
    _, text, _ = run(capsys, "list")
    for entries in json.loads(as_json).values():
        for entry in entries:
            assert any(line.split()[:1] == [entry["name"]] for line in text.splitlines())


def test_what_is_installed_is_listed_with_its_package(capsys, install_package):
    code = 'def thing(*_):\n    """Does a thing.\n\n    And more."""\n'
    install_package("ext", code, {kind: {"outside": "thing"} for kind in ("readers", "metrics", "techniques")})
    _, out, _ = run(capsys, "list", "--json")
    found = json.loads(out)
    for kind in ("formats", "metrics", "techniques"):
        assert found[kind][-1] == {"name": "outside", "description": "Does a thing.", "origin": "ext 1.2"}
    _, out, _ = run(capsys, "list")
    assert "Does a thing.  [ext 1.2]" in out


def test_a_broken_package_does_not_hide_the_others(capsys, install_package):
    install_package("ext", "import nowhere_at_all", {kind: {"outside": "thing"} for kind in KINDS})
    install_package("twin", "", {"readers": {"movielens-100k": "x"}})
    code, out, _ = run(capsys, "list", "--json")
    found = json.loads(out)
    assert code == 0
    for kind in KEYS - {"tasks", "scenarios"}:
        broken = found[kind][-1]
        assert broken["name"] == "outside"
        assert "cannot be used: " in broken["description"]
        assert "nowhere_at_all" in broken["description"]
        assert broken["origin"] == "ext 1.2"
    assert "twin 1.2 registers it too" in found["formats"][0]["description"]


# sottovoce data inspect


def test_inspect_counts_what_is_there(capsys, films):
    code, out, _ = run(capsys, "data", "inspect", "movielens-100k", "--source", films, "--json")
    assert code == 0
    assert json.loads(out) == {
        "format": "movielens-100k",
        "source": str(films),
        "folder": str(films),
        "users": 3,
        "records": 5,
        "records_per_user": {"min": 1, "median": 2, "max": 2},
        "parts": {"fit": 2, "validation": 0, "test": 3},
        "users_without_test_records": 0,
        "text_characters": {"min": 18, "median": 18, "max": 27},
        "response_characters": {"min": 0, "median": 0, "max": 0},
        "target": {"min": 1.0, "median": 3.0, "max": 5.0},
        "distinct_texts": 2,
        "distinct_public_texts": 2,
        "left_out": {},
        "profiles": {},
        "first_record": {
            "user": "7",
            "item": "1",
            "timestamp": 100,
            "target": 5.0,
            "text": "(27 characters; --show-text shows them)",
            "response": "",
        },
    }


def test_inspect_shows_profiles_and_what_is_left_out(capsys, tmp_path):
    rows = [f"u{n},good,{n % 3}" for n in range(10)]
    (tmp_path / "t.csv").write_text("\n".join(["id,words,group", *rows, rows[0]]))
    columns = "user=id,text=words,profile.group=group"
    code, out, _ = run(capsys, "data", "inspect", "csv", "--source", tmp_path, "--columns", columns)
    assert code == 0
    assert "users:                10, 0 without a test record" in out
    assert "left out:             1 rows equal to an earlier one" in out
    assert "profile:              group: 0 4, 1 3, 2 3" in out


@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_text_is_shown_only_where_asked_for(capsys, films, form):
    command = ("data", "inspect", "movielens-100k", "--source", films, *form)
    _, out, err = run(capsys, *command)
    assert "Secret" not in out + err
    assert "27 characters" in out
    _, out, _ = run(capsys, *command, "--show-text")
    assert "Secret Garden (1993). Drama" in out


def test_a_long_text_is_shortened(capsys, films):
    path = films / "ml-100k.item"
    path.write_text(path.read_text().replace("Secret", "Secret " * 50))
    _, out, _ = run(capsys, "data", "inspect", "movielens-100k", "--source", films, "--show-text")
    assert out.rstrip().endswith("…")
    assert max(map(len, out.splitlines())) < 250


def test_a_scenario_names_its_own_format_and_source(capsys, films, tmp_path):
    scenario = tmp_path / "mine.toml"
    scenario.write_text(f'data.source = "{films}"\n')
    code, out, _ = run(capsys, "data", "inspect", scenario)
    assert code == 0
    assert "3, 0 without a test record" in out
    assert "5 (2 fit, 0 validation, 3 test)" in out
    assert "nowhere" in refused(capsys, "data", "inspect", scenario, "--source", tmp_path / "nowhere")


def test_inspect_refuses_what_is_neither_scenario_nor_format(capsys, tmp_path):
    assert "FORMAT must be 'movielens-100k'" in refused(capsys, "data", "inspect", "movielens-1b", "--source", tmp_path)
    assert "--source must name" in refused(capsys, "data", "inspect", "movielens-100k")
    assert "must be a readable scenario file" in refused(capsys, "data", "inspect", tmp_path / "nowhere.toml")


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("ml-100k.inter", lambda content: content + b"7\t3\n", "line 7: must have 4 columns, got 2"),
        ("ml-100k.inter", lambda content: content.replace(b"\t5\t", b"\tnan\t"), "line 2: rating must be in 1..5"),
        ("ml-100k.inter", lambda content: content.replace(b"\t5\t", b"\tinf\t"), "line 2: rating must be in 1..5"),
        ("ml-100k.inter", lambda content: content.replace(b"\t5\t", b"\t5\0\t"), "line 2: text must hold no NUL byte"),
        ("ml-100k.inter", lambda content: content + b"7" * 100_000 + b"\n", "line 7: must be at most 10000 bytes"),
        ("ml-100k.inter", lambda content: b"", "line 1: header must be"),
        ("ml-100k.inter", lambda content: INTER.encode(), "must hold at least one row"),
        ("ml-100k.item", lambda content: content.replace(b"Heat", b"H\xe9at"), "line 3: text must be utf-8"),
        ("ml-100k.item", lambda content: content.decode().encode("utf-16"), "line 1: text must hold no NUL byte"),
        ("ml-100k.item", None, "does not hold both, but"),
    ],
)
@pytest.mark.parametrize("command", ["data inspect", "simulate --quiet --dry-run", "simulate --quiet"])
def test_a_broken_file_is_one_line_and_exit_2(capsys, films, tmp_path, tiny_world, command, name, change, says):
    path = films / name
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    scenario = tiny_world(tmp_path)
    scenario.write_text(scenario.read_text().replace("data.source", "# data.source") + f'data.source = "{films}"\n')
    out = ("--out", tmp_path / "out") if command == "simulate --quiet" else ()
    message = refused(capsys, *command.split(), scenario, *out)
    assert str(films) in message
    assert says in message
    assert len(message) < 500
    assert not (tmp_path / "out").exists()


def test_real_files_of_other_formats_are_named(capsys, tmp_path):
    for name in ("links.csv", "movies.csv", "ratings.csv", "tags.csv"):
        Path(tmp_path / name).touch()
    message = refused(capsys, "data", "inspect", "movielens-100k", "--source", tmp_path)
    assert "data.format = 'movielens-latest' reads" in message


@pytest.mark.slow
def test_the_real_asset(capsys):
    code, out, _ = run(capsys, "data", "inspect", "movielens-100k", "--source", "asset:ml-100k", "--json")
    found = json.loads(out)
    assert code == 0
    assert (found["users"], found["records"], found["distinct_public_texts"]) == (943, 100_000, 1664)
    assert found["records_per_user"]["min"] == 20
