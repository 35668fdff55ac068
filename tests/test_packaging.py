"""What travels, what is imported, and that the documentation speaks of what is there."""

import ast
import json
import re
import shlex
import statistics
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path
from types import SimpleNamespace

import pytest

from shared.config import load_scenario
from shared.protocol.audits import read_audit
from sottovoce import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("client", "server", "shared", "simulations", "sottovoce")


def imports_of(package: str) -> set[str]:
    found: set[str] = set()
    for path in (ROOT / package).rglob("*.py"):
        found |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    return found & set(PACKAGES)


def test_server_and_client_never_import_each_other_and_shared_imports_neither():
    assert imports_of("shared") == {"shared"}
    assert imports_of("server") == {"server", "shared"}
    assert imports_of("client") == {"client", "shared"}
    assert "sottovoce" not in imports_of("simulations")


def rooms_and_imports() -> dict[str, set[str]]:
    """Every folder of modules, and every module that stands in none, with those it imports."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2]) if module.count(".") > 1 else module

    rooms: dict[str, set[str]] = {}
    for module in modules:
        path = ROOT / module.replace(".", "/")
        tree = ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text("utf-8"))
        for typed in [
            node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        ]:
            typed.body = []  # loaded by nobody
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
                for name in node.names:
                    full = f"{node.module}.{name.name}"
                    rooms.setdefault(room(module), set()).add(room(full if full in modules else node.module))
    return {name: taken - {name} for name, taken in rooms.items()}


def test_no_room_imports_one_that_imports_it():
    rooms = rooms_and_imports()
    assert {"client.ledger", "shared.privacy", "simulations.bench"} <= rooms.keys()
    TopologicalSorter(rooms).prepare()  # raises CycleError and names the circle


def test_only_shared_flower_modules_touch_the_internals_of_flower():
    internals = re.compile(r"^\s*(?:from|import) flwr(?!\.(?:app|clientapp|serverapp|simulation)[. ])", re.MULTILINE)
    assert internals.search("    from flwr.superlink.main import create_app")
    assert not internals.search("from flwr.app.user_config import UserConfig")
    touching = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
        if internals.search(path.read_text(encoding="utf-8"))
    }
    starts_its_command = {"client/service/supernode.py"}  # in the text of a program for a child
    assert starts_its_command < touching
    assert all(path.startswith("shared/flower") for path in touching - starts_its_command), touching


def test_the_bundle_is_an_allow_list_without_data():
    patterns = PROJECT["tool"]["flwr"]["app"]["fab-include"]
    assert all(pattern.endswith((".py", "scenarios/*.toml", "README.md")) for pattern in patterns)
    assert not any(pattern.startswith("*") for pattern in patterns)


def test_the_facade_loads_nothing_heavy():
    code = (
        "import sys, sottovoce, sottovoce.cli; "
        "heavy = {'torch', 'flwr', 'transformers', 'peft', 'opacus', 'onnx', 'ray'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_package_of_another_wheel_is_noticed(tmp_path):
    """The names are common; a stranger's `client` that comes first must not be used in silence."""
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "__init__.py").touch()
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import sottovoce"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "package 'client' must be the one beside" in done.stderr


def packages_of(extra: str) -> set[str]:
    """What ``pip install 'sottovoce[extra]'`` brings beyond the base."""
    found: set[str] = set()
    for line in PROJECT["project"]["optional-dependencies"][extra]:
        name, _, inner = re.match(r"([\w-]+)(\[([\w,]+)\])?", line).groups()
        found |= set().union(*map(packages_of, inner.split(","))) if name == "sottovoce" else {name}
    return found


@pytest.mark.parametrize(
    ("command", "missing", "extra"),
    [
        ("sweep", "torch", "study"),
        ("sweep", "pyarrow.parquet", "study"),
        ("report", "matplotlib", "study"),
        ("simulate", "plotly", "simulate"),
        ("client", "torch", "train"),
        ("server", "flwr.server", "train"),
    ],
)
def test_a_package_that_is_missing_is_named_with_the_extra_that_has_it(command, missing, extra, monkeypatch, capsys):
    def handler(_):
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(cli, "_parser", lambda: SimpleNamespace(parse_args=lambda _: SimpleNamespace(handler=handler)))
    assert cli.main([command]) == 2
    package = missing.partition(".")[0]
    assert package in packages_of(extra)
    assert f"needs the package {package}, which is not installed; run: pip install 'sottovoce[{extra}]'" in (
        capsys.readouterr().err
    )


def commands_of_readme() -> list[str]:
    lines = re.findall(r"^sottovoce .*", README, re.MULTILINE)
    return [line.split("#")[0].strip() for line in lines]


def test_the_readme_shows_commands():
    assert len(commands_of_readme()) >= 5


@pytest.mark.parametrize("line", commands_of_readme())
def test_every_command_of_the_readme_is_understood(line):
    options = cli._parser().parse_args(shlex.split(line)[1:])
    assert callable(options.handler)


def test_the_campaigns_of_the_readme_have_devices_enough():
    """Each device may be asked so often that the rounds are filled; ``server init`` refuses the rest."""
    for line in commands_of_readme():
        options = cli._parser().parse_args(shlex.split(line)[1:])
        if getattr(options, "clients", None) and options.scenario:
            scenario = load_scenario(ROOT / options.scenario)
            asked = scenario.federation.rounds * scenario.federation.cohort_size
            assert options.clients * scenario.privacy.max_participations >= asked, line


def test_the_scenarios_and_documents_the_readme_names_exist():
    named = re.findall(r"(?:simulations/scenarios|docs(?:/measurements)?)/[\w-]+\.\w+|shared/config\.py", README)
    assert len(named) >= 5
    for name in named:
        if "NAME" not in name:  # stands for each of the measured scenarios
            assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "measurements").glob("movielens*.json")), ids=lambda p: p.stem)
def test_the_results_quote_what_was_measured(path):
    measured = json.loads(path.read_text(encoding="utf-8"))
    for row in ("local", "federated", "personal", "personal-linear"):
        score = measured["rows"][row]["rmse"]
        assert f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in RESULTS


def test_the_results_quote_the_language_model():
    measured = json.loads((ROOT / "docs" / "measurements" / "sotu.json").read_text(encoding="utf-8"))
    for row in ("base", "local", "federated", "personal"):
        score = measured["rows"][row]["perplexity"]
        assert f"{score['value']:.2f} [{score['low']:.2f}, {score['high']:.2f}]" in RESULTS


def test_the_results_quote_the_benchmark():
    measured = json.loads((ROOT / "docs" / "measurements" / "bench-step.json").read_text(encoding="utf-8"))
    for ratio in measured["ratios"].values():
        assert f"{ratio['median']:.3g}" in RESULTS


def test_the_results_quote_the_benchmark_of_a_simulation():
    measured = json.loads((ROOT / "docs" / "measurements" / "bench-simulate.json").read_text(encoding="utf-8"))
    for ratio in measured["ratios"]["plain_over_ours"].values():
        assert f"{ratio['median']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]" in RESULTS
    for engine in measured["engine_ms_per_client_round"].values():
        assert f"{engine['median']:.2g} ms [{engine['low']:.2g}, {engine['high']:.2g}]" in RESULTS
    for seconds in measured["one_round_of_everybody"].values():
        assert f"{seconds:.0f} s" in RESULTS


def test_the_results_quote_the_benchmark_of_heads_and_names_what_fell_short():
    goals = json.loads((ROOT / "docs" / "measurements" / "bench-head.json").read_text(encoding="utf-8"))["goals"]
    said = RESULTS[RESULTS.index("## Personal heads") :]
    for words, digits in (("tokens over torch's", ".3g"), ("relative rms, adapted", ".3f"), ("s wall", ".2f")):
        for name in (name for name in goals if name.endswith(words) and "shipped" in name):
            if "export" not in name or "fp32" in name:
                assert f"{goals[name]['value']:{digits}}" in said, name
    missed = [goal for name, goal in goals.items() if not goal["met"]]
    assert len(missed) == 2
    for goal in missed:  # a share of the base, or of the time
        small = f"1/{1 / goal['value']:.0f}"
        assert small in said or f"{goal['value']:.0%}".replace("%", " %") in said


def leaf_parsers(parser=None, words=()):
    parser = parser or cli._parser()
    children = [action for action in parser._actions if hasattr(action, "choices") and isinstance(action.choices, dict)]
    if not children:
        yield " ".join(words), parser
    for action in children:
        for name, child in action.choices.items():
            yield from leaf_parsers(child, (*words, name))


@pytest.mark.parametrize(
    ("name", "parser"), list(leaf_parsers()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_command_has_help_and_is_in_the_readme(name, parser):
    assert "usage:" in parser.format_help()
    guides = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    assert f"sottovoce {name}" in README + guides or name.split()[-1] in README


def test_the_table_of_the_readme_is_what_was_measured():
    measured = ROOT / "docs" / "measurements"
    rows: dict[str, dict[str, float]] = {}
    for name in ("movielens", "movielens-nonprivate", "records-kernel"):
        scores = json.loads((measured / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        rows[name] = {row: score["rmse"]["value"] for row, score in scores.items()}
    [user] = [
        cell["test"]["personal"]["mean"]
        for cell in json.loads((measured / "bench-users.json").read_text(encoding="utf-8"))["cells"]
        if cell["epsilon"] == 8
    ]
    private, free = rows["movielens"], rows["movielens-nonprivate"]
    cells = {
        "`local`: each device alone": (private["local"], free["local"]),
        "`personal`, each record hidden from everybody, LoRA": (private["personal"], free["personal"]),
        "`personal`, each record hidden from everybody, kernel head on the catalogue's texts": (
            rows["records-kernel"]["personal"],
            None,
        ),
        "`personal`, each user hidden by a secure sum, kernel head on the catalogue's texts": (user, None),
        "`pooled`: one linear head on all data in one place": (None, free["pooled"]),
    }
    for words, values in cells.items():
        said = " | ".join("" if value is None else f"{value:.3f}" for value in values).strip()
        assert f"| {words} | {said} |".replace("|  |", "| |") in README, words
    sotu = json.loads((measured / "sotu.json").read_text(encoding="utf-8"))["rows"]
    base, personal = (sotu[row]["perplexity"]["value"] for row in ("base", "personal"))
    assert f"{base:.2f} as published and {personal:.2f} personal" in README
    peers = json.loads((measured / "peers.json").read_text(encoding="utf-8"))["over_opacus_hooks"]
    everybody = json.loads((measured / "bench-speed.json").read_text(encoding="utf-8"))["one_round_of_everybody_s"]
    assert f"{everybody:.1f} s in one process" in README
    for name, words in (("ours_fp32", "takes {} of the time"), ("ours_mixed", "and {} in mixed")):
        assert words.format(f"{peers[name]['median']:.2f}".lstrip("0")) in README


def test_the_repository_has_its_papers():
    for name in ("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "docs/architecture.md", "docs/summary.md"):
        assert (ROOT / name).is_file(), name
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_every_module_says_what_it_is_for():
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not text or text.startswith('"""'), path


def test_the_results_quote_the_kernel_head_on_records():
    rows = json.loads((ROOT / "docs" / "measurements" / "records-kernel.json").read_text(encoding="utf-8"))["rows"]
    for row in ("personal", "dp-statistics"):
        score = rows[row]["rmse"]
        assert f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in RESULTS


def test_the_results_quote_what_users_cost():
    cells = json.loads((ROOT / "docs" / "measurements" / "bench-users.json").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        for row in ("local", "personal-linear", "dp-statistics", "personal"):
            score = cell["test"][row]
            assert f"{score['mean']:.4f} ({score['sd']:.4f})" in RESULTS
        assert f"{cell['margin']:+.4f}" in RESULTS
        assert cell["certified"] <= cell["epsilon"]
    for cell in json.loads((ROOT / "docs" / "measurements" / "bench-lora.json").read_text(encoding="utf-8"))["cells"]:
        for head in ("linear", "kernel"):
            both = (cell["test"][head]["mean"], cell["test"][f"{head}-lora"]["mean"])
            assert f"{both[0]:.4f} / {both[1]:.4f}" in RESULTS


def test_the_results_quote_what_a_secure_sum_costs():
    sums = json.loads((ROOT / "docs" / "measurements" / "bench-secure-sum.json").read_text(encoding="utf-8"))["sums"]
    for group in sums.values():
        cells = [
            f"{c['device_ms']['all']['median']:.0f} / {c['server_ms']['dropout']['median']:.1f}" for c in group.values()
        ]
        assert " | ".join(cells) in RESULTS


def test_the_audits_page_quotes_what_was_measured():
    page = (ROOT / "docs" / "audits.md").read_text(encoding="utf-8")
    measured = ROOT / "docs" / "measurements"
    bench = json.loads((measured / "bench-audits.json").read_text(encoding="utf-8"))
    for name, alarms in bench["false_alarms"].items():
        assert alarms["met"]
        assert f"| {name} | {alarms['value']} |" in page
    for key, words in (("full batch", "any mechanism"), ("full batch, gaussian bound", "Gaussian noise")):
        for epsilon, row in bench["power"][key].items():
            shares = " | ".join(f"{100 * found['median']:.0f} %" for found in row.values())
            assert f"| {epsilon}, the bound for {words} | {shares} |" in page
    attacked = json.loads((measured / "membership-movielens.json").read_text(encoding="utf-8"))
    for attacks in attacked["membership"]["records"]["attacked"].values():
        for score in (attacks["loss"]["auc"], attacks["reference"]["auc"]):
            assert f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in page
    audits = sorted(measured.glob("audit-*.json"))
    assert len(audits) == 4
    for path in audits:
        audit = read_audit(path)
        assert audit.passed
        line = next(line for line in page.splitlines() if line.startswith(f"| `{audit.scenario}` |"))
        one, sentences, inversion = (audit.levels[name].facts for name in ("L1", "L2", "L5"))
        for policy in ("audit", "claimed"):
            assert f"{one[policy]['epsilon_lower']:.2f}" in line
        assert all(f"{sentences[play]['auc'][0]:.2f}" in line for play in ("control", "private", "no-noise"))
        hits = " / ".join(str(inversion[play]["hits"]) for play in ("control", "private", "no-noise"))
        assert f"{hits} of {inversion['control']['tokens']}" in line


def test_the_survey_page_quotes_what_was_measured():
    page = (ROOT / "docs" / "survey.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs" / "measurements" / "survey.json").read_text(encoding="utf-8"))
    privacy = {"none": "none", "8": "record, 8", "8, user level": "user, 8"}
    for name, runs in measured.items():
        for epsilon, run in runs.items():
            if name == "cold-start":
                for curve in run["cold_start"]["curves"].values():
                    found = [f"{each['value']:+.3f}" for each in curve["differences"]["personal - federated"]]
                    assert f"{privacy[epsilon]} | {' | '.join(found)} |" in page
                    assert max(each["value"] for each in curve["differences"]["personal - federated"]) <= 0.002
                continue
            score = run["rows"]["personal"][run["metric"]]
            quoted = f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]"
            lines = [
                line
                for line in page.splitlines()
                if line.startswith((f"| {name} | {privacy[epsilon]} |", f"| `{name}`"))
            ]
            assert any(quoted in line for line in lines), (name, epsilon)
    methods = json.loads((ROOT / "docs" / "measurements" / "methods.json").read_text(encoding="utf-8"))
    for cell in methods["cells"]:
        [line] = [line for line in page.splitlines() if line.startswith(f"| {cell['method']} |")]
        assert f"{cell['rmse'][0]:.4f}" in line


def test_the_survey_page_quotes_what_was_measured_of_language():
    page = (ROOT / "docs" / "survey.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "docs" / "measurements" / "language.json").read_text(encoding="utf-8"))
    factor = {"perplexity": (1, 2), "accuracy": (100, 1)}
    for runs in measured.values():
        for run in runs.values():
            scale, digits = factor[run["metric"]]
            for row, scores in run["rows"].items():
                if "shuffled" in run["command"] and row not in ("base", "federated", "personal"):
                    continue
                value, low, high = (scale * scores[run["metric"]][key] for key in ("value", "low", "high"))
                assert f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]" in page, (run["command"], row)
    for runs in (measured["sotu, three epochs"], measured["sotu-shuffled, three epochs"]):
        found = runs["none"]["differences"]["personal - personal of another"]["perplexity"]
        quoted = f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
        assert quoted in page
        assert quoted in " ".join(RESULTS.split())
    speed = json.loads((ROOT / "docs" / "measurements" / "bench-language.json").read_text(encoding="utf-8"))
    assert all(goal["met"] for goal in speed["goals"].values())
    for name in ("cached_last_4", "cached_last_1", "ours_all_layers"):
        found = speed["ratios"][f"opacus_all_layers_over_{name}"]
        assert f"{found['median']:.1f} [{found['low']:.1f}, {found['high']:.1f}]" in page


def test_the_pages_quote_what_liars_and_hostile_inputs_did():
    measured = json.loads((ROOT / "docs" / "measurements" / "poisoning.json").read_text(encoding="utf-8"))["poison"]
    page = (ROOT / "docs" / "robustness.md").read_text(encoding="utf-8")
    for cells in measured["rules"].values():
        for liars in ("honest", "attacked"):
            score = cells[liars]["federated"]
            assert f"{score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}]" in page
    for rule in ("mean", "trimmed-mean"):
        before, after = (measured["rules"][rule][liars]["federated"]["value"] for liars in ("honest", "attacked"))
        assert f"from {before:.3f} to {after:.3f}" in " ".join(README.split())
    every = json.loads((ROOT / "docs" / "measurements" / "robustness.json").read_text(encoding="utf-8"))
    for cell in every["cells"]:
        assert f"{statistics.mean(cell['federated']):.3f}" in page, cell
        opened = [round(100 * share) for share in cell.get("success federated", [])]
        if cell["kind"] == "backdoor":
            assert f"{100 * statistics.mean(cell['success federated']):.0f} [{min(opened)}, {max(opened)}]" in page
    fuzzed = json.loads((ROOT / "docs" / "measurements" / "fuzz.json").read_text(encoding="utf-8"))
    assert fuzzed["problems"] == 0
    assert f"{fuzzed['inputs']:,} hostile inputs to {len(fuzzed['parsers'])} parsers" in README


def test_the_pages_of_speed_peers_and_studies_quote_what_was_measured():
    speed, peers, studies = (
        json.loads((ROOT / "docs" / "measurements" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("bench-speed", "peers", "studies")
    )
    page = " ".join((ROOT / "docs" / "performance.md").read_text(encoding="utf-8").split())
    for name, found in speed["ratios"].items():
        digits = 2 if name.startswith("dp_") else 1
        said = f"{found['median']:.{digits}f} [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
        assert said in page, name
    assert f"**{speed['one_round_of_everybody_s']:.1f} s**" in page
    for kind in ("opacus", "fp32", "mixed"):
        assert f"{speed['smollm2_step_peak_mib'][kind]:,.0f}" in page
    page = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    for name, each in peers["cpu_ms_per_step"].items():
        said = f"{each['median']:.0f} [{each['low']:.0f}, {each['high']:.0f}]"
        assert said in page, name
        assert f"| {peers['peak_mib'][name]:.0f} |" in page, name
    rounds = json.loads((ROOT / "docs" / "measurements" / "bench-round.json").read_text(encoding="utf-8"))
    for name, digits in (("cpu_ms_per_user", 2), ("over_pfl", 2)):
        for each in rounds[name].values() if name == "cpu_ms_per_user" else [rounds[name]]:
            assert f"{each['median']:.{digits}f} [{each['low']:.{digits}f}, {each['high']:.{digits}f}]" in page
    assert f"{rounds['bytes_per_user']:,.0f} bytes" in page
    assert rounds["answers_differ"] < 1e-4
    page = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    for point in studies["frontier"]["points"]:
        assert f"{point['rows']['personal']:.3f}" in page, point["point"]
    swept = json.loads((ROOT / "docs" / "measurements" / "bench-sweep.json").read_text(encoding="utf-8"))
    gain = {name: -100 * each for name, each in swept["overhead"].items()}
    assert f"{gain['median']:.0f} % [{gain['high']:.0f}, {gain['low']:.0f}] less" in page
    searched = studies["learning-rate"]
    assert f"it chose {searched['tuning']['chosen']['federation.server_learning_rate']:.2f}" in page
    assert f"RMSE {searched['points'][0]['rows']['personal']:.3f} on test" in page
    for study in studies.values():
        assert study["failures"] == []
        for claim in study["headline"]:
            said, _, rest = claim.partition(": ")
            found = rest.partition(" (paper")[0].partition(", ")[2]
            assert f"| {said} |" in page
            assert f"| {found} |" in page


def test_the_page_of_faults_quotes_the_count():
    measured = json.loads((ROOT / "docs" / "measurements" / "faults.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert measured["without_a_test"] == []
    assert f"**{measured['all']['survived']} of {measured['all']['tried']}**" in page
    for name, each in measured["faults"].items():
        assert f"| {each['survived']} / {each['tried']} | {name} |" in page


def test_the_page_of_faults_quotes_the_endurance():
    measured = json.loads((ROOT / "docs" / "measurements" / "endurance.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
    assert f"{measured['rounds']} rounds of {measured['seconds']['median']:.1f} s" in page
    for program in ("supervisor", "superlink", "supernode 0", "supernode 1"):
        grown = measured["rss_mib"][program]
        assert f"{grown['per_100_rounds']:+.2f} [{grown['low']:+.2f}, {grown['high']:+.2f}]" in page
