"""``flwr run`` as we start it: what its bundle holds, that it runs without a network, and that it leaves nothing."""

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from shared.errors import CampaignError, ScenarioError
from simulations import flower_app, flower_run
from sottovoce import cli

ROOT = Path(__file__).parent.parent
PACKAGES = ("client", "server", "shared", "simulations", "sottovoce")
PLANTED = ("user.jsonl", "data.csv", "secrets.json", "weights.npz", "notes.md", "prompts.yaml", "dump.toml")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Names in the bundle of a copy of this tree with data lying about, and its pyproject."""
    tree = tmp_path_factory.mktemp("bundle") / "sottovoce"
    tree.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tree)
    places = [tree, *(tree / package for package in PACKAGES), tree / "shared" / "datasets", tree / "runs" / "first"]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        for name in PLANTED:
            (place / name).write_text('{"text": "my diary"}\n', encoding="utf-8")
    (tree / "runs" / "first" / "script.py").write_text("DIARY = 1\n", encoding="utf-8")
    environment = os.environ | {"FLWR_HOME": str(tmp_path_factory.mktemp("flwr"))}
    command = [str(Path(sys.executable).parent / "flwr"), "build", "--app", str(tree)]
    done = subprocess.run(
        command, cwd=tree.parent, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [fab] = tree.parent.glob("*.fab")
    with zipfile.ZipFile(fab) as archive:
        return set(archive.namelist()), tomllib.loads(archive.read("pyproject.toml").decode())


def test_nothing_but_code_and_scenarios_travels(bundle):
    names, _ = bundle
    for name in names - {"pyproject.toml", "README.md", "LICENSE", ".info/CONTENT"}:
        package, _, rest = name.partition("/")
        assert package in PACKAGES, name
        assert name.endswith(".py") or name.startswith("simulations/scenarios/"), name
        assert rest.rpartition("/")[2] not in PLANTED, name
    assert not [name for name in names if Path(name).name in PLANTED]


def modules_in(names):
    """Dotted name -> path of the modules among these files."""
    found = {}
    for name in names:
        if name.endswith(".py"):
            dotted = name.removesuffix(".py").replace("/", ".")
            found[dotted.removesuffix(".__init__")] = name
    return found


def imported_by(path):
    """Dotted names of our own modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] in PACKAGES)


def test_every_module_the_apps_import_travels(bundle):
    names, project = bundle
    here = modules_in(
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    )
    travelling = modules_in(names)
    components = project["tool"]["flwr"]["app"]["components"]
    todo, seen = [ref.partition(":")[0] for ref in components.values()], set()
    while todo:
        module = todo.pop()
        if module in here and module not in seen:
            seen.add(module)
            todo += [*imported_by(ROOT / here[module]), module.rpartition(".")[0]]
    entries = {"simulations.flower_app", "client.app", "simulations.run", "client.training.site", "shared.flower.grid"}
    assert entries <= seen
    assert seen <= set(travelling), seen - set(travelling)
    assert "simulations/scenarios/movielens.toml" in names


def test_the_app_is_the_one_flwr_run_needs():
    app = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "simulations.flower_app:app", "clientapp": "client.app:app"}
    assert app["config"] == {"scenario": "movielens", "overrides": "", "out": "runs/flwr-run"}


def test_a_scenario_is_found_by_path_and_by_name(tmp_path):
    (tmp_path / "mine.toml").touch()
    assert flower_app.find_scenario(str(tmp_path / "mine.toml")) == tmp_path / "mine.toml"
    assert flower_app.find_scenario("movielens").name == "movielens.toml"
    with pytest.raises(ScenarioError, match=r"scenario must be a file or one of .*movielens.*; got 'nowhere'"):
        flower_app.find_scenario("nowhere")


def test_the_server_app_hands_the_run_config_to_simulate(tmp_path, tiny_world, monkeypatch):
    seen = {}
    monkeypatch.setattr(flower_app, "simulate", lambda scenario, **rest: seen.update(rest, scenario=scenario))
    run_config = {"scenario": str(tiny_world(tmp_path)), "overrides": "seed=7 'model.base=two words'", "out": "there"}
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)
    grid = object()
    flower_app.app(grid, context)
    assert (seen["scenario"].seed, seen["scenario"].model.base) == (7, "two words")
    assert (seen["out"], seen["grid"]) == (Path("there"), grid)


def test_a_run_that_cannot_begin_starts_nothing(tmp_path, tiny_world, monkeypatch):
    monkeypatch.setattr(flower_run, "_run", lambda *_, **__: pytest.fail("started"))
    scenario = tiny_world(tmp_path)
    (tmp_path / "there").mkdir()
    for changes, error, says in (
        ({"out": tmp_path / "there"}, ScenarioError, "must be a new folder"),
        ({"overrides": ["seed=-1"]}, ScenarioError, "seed"),
        ({"root": tmp_path}, CampaignError, "needs the source tree"),
    ):
        with pytest.raises(error, match=says):
            flower_run.flwr_run(scenario, **({"out": tmp_path / "out"} | changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", ["finished:failed", "finished:stopped", "never started"])
def test_only_a_completed_run_is_a_success(tmp_path, tiny_world, monkeypatch, status):
    said = "\x1b[92mTraceback\x1b[0m\nshared.errors.PrivacyError: privacy.delta must be small, got 1.\n"

    def run(home, log, *_, **__):
        log.write_text(said, encoding="utf-8")
        return status

    monkeypatch.setattr(flower_run, "_run", run)
    with pytest.raises(CampaignError, match=r"^privacy\.delta must be small, got 1\. Log: .*flwr\.log$"):
        flower_run.flwr_run(tiny_world(tmp_path), out=tmp_path / "out")
    assert (tmp_path / "out" / "flwr.log").read_text(encoding="utf-8") == said
    monkeypatch.setattr(flower_run, "_run", lambda *_, **__: "finished:completed")
    assert flower_run.flwr_run(tiny_world(tmp_path), out=tmp_path / "other") == tmp_path / "other" / "report.html"


def test_everything_that_carries_the_mark_is_stopped():
    """A grandchild in a session of its own, whose parent is gone, as Flower's and Ray's are."""
    mark = f"test-{os.getpid()}"
    sleeper = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"
    )
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleeper!r}], start_new_session=True)"
    with subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"SOTTOVOCE_FLWR_RUN": mark}, stdout=subprocess.PIPE
    ) as parent:
        parent.stdout.read(1)
        parent.wait()
        assert len(flower_run.marked(mark)) == 1
        flower_run._stop_marked(mark)
        assert flower_run.marked(mark) == []
    assert flower_run.marked(f"{mark}0") == []


def test_the_environment_shuts_every_door(tmp_path, tiny_world):
    from shared.config import load_scenario

    scenario = load_scenario(tiny_world(tmp_path))
    told = flower_run._environment(tmp_path, 1234, scenario)
    wanted = {
        "FLWR_HOME": str(tmp_path),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "1234",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "local",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }
    assert wanted.items() <= told.items()
    joined = load_scenario(tiny_world(tmp_path), ('performance.ray_address="10.0.0.1:6379"',))
    assert flower_run._environment(tmp_path, 1, joined)["RAY_ADDRESS"] == "10.0.0.1:6379"


# Whole runs: a minute each.


def offline(tmp_path):
    """An environment in which every way out is shut, with a home of its own."""
    nowhere = "http://127.0.0.1:9"
    shut = {
        name: nowhere for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
    }
    return os.environ | shut | {"HOME": str(tmp_path), "PIP_INDEX_URL": nowhere, "UV_INDEX_URL": nowhere}


def command(*arguments):
    return [sys.executable, "-m", "sottovoce.cli", "flwr-run", *map(str, arguments)]


def home_of(pid):
    """Folders of the run that this process is."""
    return list(Path("/tmp").glob(f"sottovoce-flwr-{pid}-*"))


def run_to_the_end(tmp_path, *arguments):
    """Exit code, stdout and stderr of a run that must leave no folder of its own."""
    with subprocess.Popen(
        command(*arguments),
        cwd=ROOT,
        env=offline(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        said, complained = process.communicate(timeout=280)
    assert home_of(process.pid) == []
    return process.returncode, said, complained


def test_the_command_is_there(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["flwr-run", "--help"])
    assert stop.value.code == 0
    assert "--set" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_completes_offline_and_leaves_nothing(tmp_path, tiny_world):
    out = tmp_path / "out"
    code, said, complained = run_to_the_end(tmp_path, tiny_world(tmp_path), "--out", out, "--set", "seed=5")
    assert code == 0, complained[-3000:]
    assert said.strip() == f"report: {out / 'report.html'}"
    assert (out / "report.html").is_file()
    assert json.loads((out / "scenario.json").read_text(encoding="utf-8"))["seed"] == 5
    assert not (out / "flwr.log").exists()
    assert not (tmp_path / ".flwr").exists()


@pytest.mark.slow
def test_what_fails_in_the_server_app_is_one_line_and_exit_code_2(tmp_path, tiny_world):
    out = tmp_path / "out"
    arguments = (tiny_world(tmp_path), "--out", out, "--quiet", "--set", "federation.rounds=4")
    code, _, complained = run_to_the_end(tmp_path, *arguments)
    assert code == 2
    [line] = complained.strip().splitlines()
    assert line.startswith("sottovoce: privacy.max_participations must be at least 2")
    assert "Starting Flower Simulation" in (out / "flwr.log").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_what_was_started_ends_with_the_command(tmp_path, tiny_world, end):
    with subprocess.Popen(
        command(tiny_world(tmp_path), "--out", tmp_path / "out", "--quiet"),
        cwd=ROOT,
        env=offline(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "out" / "campaigns").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        [home] = home_of(process.pid)
        assert flower_run.marked(home.name)
        process.send_signal(end)
        said = process.communicate(timeout=60)[1]
    if end is signal.SIGKILL:  # the folder stays, the processes do not: Ray's agents look for a minute
        deadline = time.monotonic() + 100
        while flower_run.marked(home.name) and time.monotonic() < deadline:
            time.sleep(1)
        shutil.rmtree(home)
    else:
        assert process.returncode == 130
        assert said.strip() == "sottovoce: interrupted; what was finished is kept."
        assert (tmp_path / "out" / "flwr.log").is_file()
        assert home_of(process.pid) == []
    assert flower_run.marked(home.name) == []
