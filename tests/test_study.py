"""Studies: what a file means, that a search sees no test record, that no kill or failure costs a finished run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from client.training.site import campaign_dataset
from shared.config import load_scenario
from shared.errors import CampaignError, ScenarioError
from simulations.study.config import load_study
from simulations.study.plan import plan_runs
from simulations.study.run import sweep
from simulations.study.store import RUNS, read_store
from simulations.study.tuning import composed, price_of, said
from sottovoce.cli import main

SMALL = """
linear.enabled = false
statistics.enabled = false
evaluation.cold_start = []
model.head_blocks = 0
"""
GRID = """
seeds = [0, 1]

[settings]
"export.users" = 0

[grid]
"privacy.epsilon" = [2.0, 8.0]
"""
SEARCH = """
[settings]
"export.users" = 0

[search]
trials = 3
sampler = "random"
settings = {"federation.server_learning_rate" = {low = 0.01, high = 1.0, log = true}}
"""


@pytest.fixture
def study(tiny_world, tmp_path):
    """(text, **scenario lines) -> a study file over the tiny scenario beside it."""

    def write(text, *, folder=tmp_path, name="s", body=SMALL):
        folder.mkdir(exist_ok=True)
        tiny_world(folder, body=body)
        path = folder / f"{name}.toml"
        path.write_text(f'scenario = "tiny.toml"\n{text}', encoding="utf-8")
        return path

    return write


def test_a_grid_is_every_combination_and_points_are_themselves(study):
    path = study(
        'seeds = [3, 4]\n[grid]\n"privacy.epsilon" = [1.0, 8.0]\n"federation.rounds" = [1, 2, 3]\n'
        '[[points]]\nlabel = "mine"\nsettings = {"privacy.trust" = "none"}\n'
    )
    runs = plan_runs(load_study(path), path)
    assert len(runs) == 2 * (2 * 3 + 1)
    assert len({run.key for run in runs}) == len(runs)
    found = {(run.scenario.privacy.epsilon, run.scenario.federation.rounds, run.seed) for run in runs[:-2]}
    assert found == {(epsilon, rounds, seed) for epsilon in (1.0, 8.0) for rounds in (1, 2, 3) for seed in (3, 4)}
    assert [(run.point, run.scenario.privacy.trust, run.seed) for run in runs[-2:]] == [
        ("mine", "none", 3),
        ("mine", "none", 4),
    ]


def test_a_key_is_a_hash_of_what_comes_out_and_of_nothing_else(study, tmp_path):
    def keys(text):
        path = study(text)
        return {run.key for run in plan_runs(load_study(path), path)}

    plain = keys('[grid]\n"privacy.epsilon" = [8.0]\n')
    assert keys('[grid]\n"federation.rounds" = [3]\n') == plain  # what it was anyway
    assert keys('[settings]\n"performance.threads" = 2\n[grid]\n"privacy.epsilon" = [8.0]\n') == plain
    for other in (
        '[grid]\n"privacy.epsilon" = [8.5]\n',
        'seeds = [1]\n[grid]\n"privacy.epsilon" = [8.0]\n',
        'audit = "quick"\n[grid]\n"privacy.epsilon" = [8.0]\n',
        '[settings]\n"training.steps" = 2\n[grid]\n"privacy.epsilon" = [8.0]\n',
    ):
        assert keys(other).isdisjoint(plain), other


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs a grid, points or a search"),
        ("[grid]\n", "needs a grid, points or a search"),
        ('[grid]\n"privacy.epsilon" = []\n', "at least 1 item"),
        ('colour = "red"\n[grid]\n"privacy.epsilon" = [1.0]\n', "colour is not known in a study file"),
        ('[grid]\n"privacy.epsilom" = [1.0]\n', "epsilom"),
        ('[grid]\n"privacy.epsilon" = [-1.0]\n', "epsilon"),
        ('[grid]\n"evaluation.seeds" = [1]\n', "must not set evaluation.seeds"),
        ('[grid]\n"data.scored" = ["validation"]\n', "must not set data.scored"),
        ('seeds = [1, 1]\n[grid]\n"privacy.epsilon" = [1.0]\n', "each seed once"),
        ('[grid]\n"privacy.epsilon" = [1.0, 1.0]\n', "settings of its own"),
        ('[search]\nsettings = {"federation.rounds" = {low = 3}}\n', "needs low and high"),
        ('[search]\nsettings = {"federation.rounds" = {low = 3, high = 1}}\n', "low must be below high"),
        ('[search]\nsettings = {"federation.roundz" = {low = 1, high = 3}}\n', "federation.roundz"),
        ('[search]\nsettings = {"federation.rounds" = {low = 1, high = 3.5}}\n', "federation.rounds"),
        ('[search]\nsettings = {"federation.method" = {choices = ["fedavg", "fedsgd"]}}\n', "fedsgd"),
    ],
)
def test_a_file_that_is_no_study_is_refused_in_one_line(study, text, says):
    path = study(text)
    with pytest.raises(ScenarioError) as refused:
        plan_runs(load_study(path), path)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


def _with_other_test_ratings(source, folder, tests):
    """A copy of the invented data in which every user's newest records, as many as are tested, have other ratings."""
    shutil.copytree(source, folder)
    path = folder / "ml-100k.inter"
    head, *rows = path.read_text(encoding="utf-8").splitlines()
    split = [row.split("\t") for row in rows]
    for user, count in tests.items():
        newest = sorted((r for r in split if r[0] == user), key=lambda r: float(r[3]))[-count:]
        for row in newest:
            row[2] = "5" if row[2] == "1" else "1"
    path.write_text("\n".join([head, *("\t".join(row) for row in split)]) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def two_worlds(study, tmp_path):
    """A search over the tiny world, and the same with other test ratings: two study files."""
    paths = []
    for name in ("as-it-is", "other"):
        path = study(SEARCH, folder=tmp_path / name)
        scenario = load_scenario(path.with_name("tiny.toml"))
        if name == "other":
            dataset = campaign_dataset(scenario)
            tests = {user.user: len(user.test) for user in dataset.users}
            other = _with_other_test_ratings(Path(scenario.data.source), tmp_path / "data", tests)
            text = path.with_name("tiny.toml").read_text(encoding="utf-8")
            path.with_name("tiny.toml").write_text(text.replace(scenario.data.source, str(other)), encoding="utf-8")
        paths.append(path)
    return paths


def test_what_a_trial_reads_is_the_same_whatever_the_test_records_are(two_worlds):
    settings = [load_scenario(path.with_name("tiny.toml")) for path in two_worlds]
    tested = [campaign_dataset(each) for each in settings]
    differ = [a.test != b.test for a, b in zip(tested[0].users, tested[1].users, strict=True)]
    assert all(differ), "the two worlds must differ in the test records of every user, or this shows nothing"
    assert [u.fit for u in tested[0].users] == [u.fit for u in tested[1].users]
    trials = [
        campaign_dataset(each.model_copy(update={"data": each.data.model_copy(update={"scored": "validation"})}))
        for each in settings
    ]
    assert trials[0].users == trials[1].users
    for user, before in zip(trials[0].users, tested[0].users, strict=True):
        assert (user.fit, user.test, user.validation) == (before.fit, before.validation, ())


@pytest.mark.slow
def test_a_search_tries_and_chooses_the_same_whatever_the_test_records_are(two_worlds, tmp_path):
    found = [sweep(path, out=tmp_path / f"out-{n}", workers=1, quiet=True) for n, path in enumerate(two_worlds)]
    assert [len(each.failures) for each in found] == [0, 0]
    one, other = (each.tuning for each in found)
    assert one["trials"] == other["trials"]
    assert one["chosen"] == other["chosen"]
    assert len({trial["score"] for trial in one["trials"]}) == 3
    scores = []
    for n in range(2):
        table = read_store(tmp_path / f"out-{n}").to_pylist()
        trial = [row for row in table if row["trial"] is not None and row["kind"] == "score"]
        assert {row["part"] for row in trial} == {"validation"}
        final = [row for row in table if row["trial"] is None and row["kind"] == "score"]
        assert {row["part"] for row in final} == {"test"}
        scores.append({row["row"]: row["value"] for row in final if row["primary"]})
    assert scores[0]["personal"] != scores[1]["personal"]  # the chosen settings were scored on the records that differ


def test_trials_together_cost_at_least_one_and_the_words_say_what_is_counted(study, tiny_base):
    from simulations.campaigns import plan_campaigns

    path = study('[grid]\n"privacy.epsilon" = [1.0, 8.0]\n')
    runs = plan_runs(load_study(path), path)
    policies = [
        plan_campaigns(run.scenario, tiny_base, campaign_dataset(run.scenario), quiet=True)[0].policy for run in runs
    ]
    price = price_of(policies)
    assert price["epsilon_each"] == pytest.approx(8.0, rel=0.01)
    assert price["epsilon_together"] > price["epsilon_each"]
    alone = composed([policies[1].mechanism], delta=price["delta"])
    assert alone == pytest.approx(policies[1].epsilon, rel=0.01)
    assert price_of([]) == {}
    [words] = said(load_study(path), runs, None)
    assert "sweep tuned nothing" in words
    trials = [{"score": 1.0}, {"score": 2.0}]
    tuning = {"settings": {"x": {}}, "trials": trials, "sampler": "tpe", "seed": 0, "metric": "rmse", "row": "personal"}
    told = " ".join(said(load_study(path), runs, tuning | {"price": price}))
    assert "No ε of this study covers the choice" in told
    assert f"ε = {price['epsilon_together']:.2f}" in told


def _typed(path, out, *more):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sottovoce.cli", "sweep", str(path), "--out", str(out), "--workers", "1", *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _numbers(folder):
    """A store's scores, without what depends on the clock."""
    names = (
        "run",
        "point",
        "seed",
        "row",
        "metric",
        "value",
        "low",
        "high",
        "epsilon",
        "bytes_up",
        "kind",
        "at",
        "who",
    )
    return sorted(json.dumps([row[name] for name in names]) for row in read_store(folder).to_pylist())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_that_was_killed_goes_on_and_plays_no_finished_run_again(study, tmp_path):
    path, out = study(GRID), tmp_path / "killed"
    deadline = time.monotonic() + 300
    with _typed(path, out) as process:
        while not list(out.glob(f"{RUNS}/*/rows.parquet")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
    finished = {file: file.stat().st_mtime_ns for file in out.glob(f"{RUNS}/*/rows.parquet")}
    assert 1 <= len(finished) < 4
    for _ in range(50):  # its worker ends with it
        try:
            ended = sweep(path, out=out, workers=1, quiet=True)
            break
        except CampaignError:
            time.sleep(0.2)
    assert not ended.failures
    assert {file: file.stat().st_mtime_ns for file in finished} == finished
    whole = tmp_path / "whole"
    assert not sweep(path, out=whole, workers=2, quiet=True).failures
    assert _numbers(out) == _numbers(whole)
    assert len(set(read_store(whole).column("run").to_pylist())) == 4


def _children(pid):
    """Worker processes of a sweep."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(each) for each in found if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]


def _wait_until(holds, *, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves its processes unclosed
def test_a_sweep_on_ray_gives_the_same_numbers(study, tmp_path):
    path = study(GRID)
    for engine in ("processes", "ray"):
        assert not sweep(path, out=tmp_path / engine, workers=2, engine=engine, quiet=True).failures
    assert _numbers(tmp_path / "ray") == _numbers(tmp_path / "processes")


def test_an_address_is_refused_without_ray_and_where_nobody_answers(study, tmp_path, capsys):
    for more, says in (([], "--ray-address needs --engine ray"), (["--engine", "ray"], "host:port of its head node")):
        typed = ["sweep", str(study(GRID)), "--out", str(tmp_path / "out"), "--ray-address", "127.0.0.1:1", *more]
        assert main(typed) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_that_is_killed_costs_its_run_and_no_other(study, tmp_path):
    path, out = study(GRID), tmp_path / "out"
    with _typed(path, out, "--json", "--quiet") as process:
        _wait_until(lambda: list(out.glob(f"{RUNS}/*/scenario.json")))
        [worker] = _children(process.pid)
        os.kill(worker, signal.SIGKILL)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 1
    [failure] = json.loads((out / "study.json").read_text())["failures"]
    assert "its worker process was killed" in failure["error"]
    assert "fewer --workers" in said
    assert len(set(read_store(out).column("run").to_pylist())) == 3
    assert not sweep(path, out=out, workers=1, quiet=True).failures
    assert not sweep(path, out=tmp_path / "whole", workers=2, quiet=True).failures
    assert _numbers(out) == _numbers(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ctrl_c_ends_the_workers_and_the_same_command_goes_on(study, tmp_path):
    path, out = study(GRID), tmp_path / "out"
    with _typed(path, out) as process:
        _wait_until(lambda: list(out.glob(f"{RUNS}/*/scenario.json")))
        workers = _children(process.pid)
        began = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        said = process.communicate(timeout=60)[0]
        assert process.returncode == 130
        assert time.monotonic() - began < 20
    assert "interrupted; what was finished is kept" in said
    _wait_until(lambda: not any(Path(f"/proc/{each}").exists() for each in workers), seconds=10)
    assert not sweep(path, out=out, workers=1, quiet=True).failures
    assert len(set(read_store(out).column("run").to_pylist())) == 4


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(study, tmp_path, capsys):
    path = study('[settings]\n"export.users" = 0\n[grid]\n"federation.cohort_size" = [999, 4]\n')
    out = tmp_path / "out"
    assert main(["sweep", str(path), "--out", str(out), "--workers", "1", "--quiet", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    [failure] = found["failures"]
    assert "999" in json.dumps(failure)
    table = read_store(out)
    assert len(set(table.column("run").to_pylist())) == 1
    assert np.isfinite([row["value"] for row in table.to_pylist() if row["row"] == "personal" and row["primary"]]).all()
    assert (out / "report.html").exists()


def test_a_folder_that_is_something_else_is_not_written_to(study, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    with pytest.raises(ScenarioError, match="must be a new folder or that of a study"):
        sweep(study(GRID), out=tmp_path / "mine", quiet=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]
