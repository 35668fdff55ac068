"""Wrong input on purpose, as a user gives it: one line, exit code 2, and nothing that was there is lost."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shared.assets
from sottovoce.cli import main

ROOT = Path(__file__).parent.parent
SMALL = ("export.users=0", "linear.enabled=false", "federation.rounds=1", "evaluation.bootstrap_resamples=10")


@pytest.fixture
def world(tiny_world, tmp_path):
    """A scenario with a copy of the data and the base that may be broken."""
    path = tiny_world(tmp_path)
    text = path.read_text()
    for key in ("model.base", "data.source"):
        [line] = [each for each in text.splitlines() if each.startswith(key)]
        source = Path(line.split('"')[1])
        shutil.copytree(source, tmp_path / key)
        text = text.replace(str(source), str(tmp_path / key))
    path.write_text(text)
    return path


def changes(settings):
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture
def refused(world, capsys):
    """Run the command in this process; gives what it said."""

    def run(*arguments, settings=()):
        command = ["simulate", str(world), "--out", str(world.parent / "out"), "--quiet"]
        code = main([*(arguments or command), *changes((*SMALL, *settings))])
        said = capsys.readouterr()
        assert code == 2
        assert said.out == ""
        [line] = said.err.strip().splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("privacy.epsilon=0", "privacy.epsilon must be greater than 0, got 0"),
        ("privacy.epsilon=-1", "privacy.epsilon must be greater than 0, got -1"),
        ("privacy.epsilon=nan", "privacy.epsilon must be"),
        ("privacy.delta=1", "privacy.delta must be less than 1, got 1"),
        ("privacy.delta=2", "privacy.delta must be less than 1, got 2"),
        (
            "federation.method=fedsgd",
            "federation.method must be 'fedavg', 'ffa-lora', 'rolora' or 'ifca', got 'fedsgd'",
        ),
        ("personal.method=pfedme", "'user-embedding' or 'retrieval', got 'pfedme'"),
        ("adapter.technique=dora", "adapter.technique must be 'lora' or 'prompt-tuning', got 'dora'"),
        ("data.format=imdb", "'csv' or 'parquet', got 'imdb'"),
        (
            "task.name=poetry",
            "task.name must be 'rating', 'tagging', 'ranking', 'generation' or 'preference', got 'poetry'",
        ),
        ("task.name=generation", "must name eos_token_id for task 'generation'"),
        ("task.template=hello", "task.template must hold {text} exactly once, got 'hello'"),
        ("performance.engine=dask", "performance.engine must be 'inline' or 'ray', got 'dask'"),
        ("model.base=asset:GPT-9", "the asset must be one of"),
        ("model.base=/nowhere/base", "there is no such folder"),
        ("data.source=builtin:enron", "builtin:sotu, got builtin:enron"),
        ("evaluation.seeds=0", "evaluation.seeds must be greater than or equal to 1, got 0"),
    ],
)
def test_a_setting_that_cannot_be(refused, world, setting, says):
    assert says in refused(settings=(setting,))
    assert not (world.parent / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_is_refused_where_there_is_none(refused, world):
    said = refused(settings=("performance.device=cuda",))
    assert "performance.device = 'cuda' needs a GPU and a CUDA build of torch, got none; set cpu" in said
    assert not (world.parent / "out").exists()


def test_a_method_that_breaks_the_guarantee_names_the_allowed_ones(refused, install_package):
    code = (
        "from client.personal.personalize import PersonalMethod, fit_ridge\n"
        "joint = PersonalMethod(fit_ridge, read_by_shared_step=True, summary='read by the shared step')\n"
    )
    install_package("joint_package", code, {"personal_methods": {"joint": "joint"}})
    said = refused(settings=("personal.method=joint",))
    assert "'record'" in said
    assert "allowed personal methods here: ['none', 'fine-tune', " in said


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("ml-100k.inter", lambda b: b + b"7\tseven\n", "ml-100k.inter, line "),
        ("ml-100k.inter", lambda b: b.replace(b"\t5\t", b"\tnan\t", 1), "ml-100k.inter, line "),
        ("ml-100k.inter", lambda _: b"", "ml-100k.inter"),
        ("ml-100k.inter", lambda b: b.splitlines()[0] + b"\n", "ml-100k.inter"),
        ("ml-100k.item", None, "movielens-100k needs"),
    ],
    ids=["a broken row", "NaN", "empty", "a header only", "missing"],
)
def test_a_data_file_that_cannot_be_read(refused, world, file, damage, says):
    path = world.parent / "data.source" / file
    if damage:
        path.write_bytes(damage(path.read_bytes()))
    else:
        path.unlink()
    assert says in refused()
    assert not (world.parent / "out").exists()


@pytest.mark.parametrize("damage", ["missing", "truncated", "nan"])
def test_a_base_that_is_not_whole(refused, world, damage):
    path = world.parent / "model.base" / "model.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    else:
        path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")
    said = refused()
    assert "model.base" in said
    assert {"missing": "missing: model", "truncated": "readable base model", "nan": "NaN or infinity"}[damage] in said
    assert not (world.parent / "out").exists()


def test_no_network(refused, world, monkeypatch, tmp_path):
    """An asset that is not there yet, and a pip that reaches nobody."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    said = refused(settings=("model.base=asset:all-MiniLM-L6-v2",))
    assert "could not be downloaded" in said
    assert "Check network" in said
    assert not (world.parent / "out").exists()


def test_an_asset_somebody_changed(refused, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = shared.assets.cache_folder("ml-100k")
    folder.mkdir(parents=True)
    (folder / "ml-100k.inter").write_text("1\t1\t5\t0\n")
    said = refused(settings=("data.source=asset:ml-100k",))
    assert "must have sha256" in said
    assert (folder / "ml-100k.inter").exists()  # never replaced in silence


def test_a_run_folder_that_exists(refused, world):
    (world.parent / "out").mkdir()
    (world.parent / "out" / "mine.txt").write_text("mine")
    assert "must be a new folder; it exists" in refused()
    assert (world.parent / "out" / "mine.txt").read_text() == "mine"


def test_a_run_of_another_scenario_is_not_resumed(world, refused, capsys):
    out = world.parent / "out"
    assert main(["simulate", str(world), "--out", str(out), "--quiet", *changes(SMALL)]) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    resume = ("simulate", str(world), "--resume", str(out), "--quiet")
    assert "there privacy.epsilon = 8.0, here 3.0" in refused(*resume, settings=("privacy.epsilon=3",))
    policy = out / "campaigns" / "lora" / "policy.json"
    content = policy.read_text()
    policy.write_text(content.replace('"rounds":1', '"rounds":2').replace('"rounds": 1', '"rounds": 2'))
    assert "it belongs to another scenario, base or data" in refused(*resume)
    policy.write_text(content)
    state = out / "campaigns" / "lora" / "checkpoints" / "round-0001" / "state.json"
    other = json.loads(state.read_text())
    shutil.copytree(state.parent, state.parent.with_name("round-0002"))  # a round that was never run under this name
    assert "a checkpoint of another scenario" in refused(*resume)
    shutil.rmtree(state.parent.with_name("round-0002"))
    assert json.loads(state.read_text()) == other
    kept = {path: content for path, content in before.items() if path.name not in ("run.json", "resumed.json")}
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_a_device_without_rows_takes_part_with_noise_alone(world, capsys):
    """Refusing would reveal it; so would a reply that is all zero, or smaller than the others."""
    ratings = world.parent / "data.source" / "ml-100k.inter"
    lines = ratings.read_text().splitlines()
    first = [line for line in lines if line.startswith("1\t")]
    ratings.write_text("\n".join(line for line in lines if line not in first[1:]) + "\n")  # one rating: a test row
    out = world.parent / "out"
    assert main(["simulate", str(world), "--out", str(out), "--json", "--quiet", *changes((*SMALL[:2], SMALL[3]))]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["federation"]["replies"] == 12  # everybody, once
    assert summary["federation"]["rejected"] == {}


@pytest.mark.fault("R10")
@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_a_resumption_ends_it(world, tmp_path):
    """A real limit of the operating system on what may be written; the report is beyond it."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sottovoce.cli", "simulate", "--quiet"]
    assert main(["simulate", str(world), "--quiet", "--dry-run", *changes(SMALL)]) == 0  # the cache is beyond it too
    limited = subprocess.run(
        [*command, str(world), "--out", str(out), *changes(SMALL)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert limited.returncode == 2, limited.stderr
    assert limited.stderr.strip().startswith("sottovoce: a file could not be read or written: File too large")
    assert len(limited.stderr.strip().splitlines()) == 1
    assert (out / "campaigns" / "lora" / "checkpoints" / "round-0001" / "state.json").is_file()
    assert main(["simulate", "--resume", str(out), "--quiet"]) == 0
    assert (out / "report.html").is_file()
