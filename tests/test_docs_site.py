"""The documentation site: nothing from elsewhere, every page in its place, commands and lessons that work."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

from shared.config import Scenario, load_scenario
from shared.flower.processes import free_port
from simulations.study.config import load_study
from sottovoce import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))
NEW = [*TUTORIALS, *(DOCS / name for name in ("index.md", "theory.md", "evidence.md", "scale.md"))]
EVIDENCE = (DOCS / "evidence.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^(?:<!-- ([^\n]*?) -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generated = load("generated")


def name_of(path):
    return str(path.relative_to(DOCS))


def settings():
    """mkdocs.yml without what only MkDocs can make of it."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)
    return yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)


def named_pages(entry):
    if isinstance(entry, str):
        return [entry]
    return [page for each in (entry.values() if isinstance(entry, dict) else entry) for page in named_pages(each)]


def test_every_page_stands_in_the_navigation_once():
    named = named_pages(settings()["nav"])
    assert sorted(named) == sorted(map(name_of, PAGES))


@pytest.mark.parametrize(
    ("text", "suffix", "loads"),
    [
        (
            '<a href="https://arxiv.org">read</a><script src="assets/a.js"></script><img src="data:image/png;x">',
            "html",
            0,
        ),
        ('<link rel="stylesheet" href="https://fonts.example/css?a">', "html", 1),
        ('<script src="//cdn.example/x.js"></script><img srcset="a.png 1x, http://e.org/b.png 2x">', "html", 2),
        ("<style>@import 'https://e.org/a.css'; p { background: url(//e.org/b.png) }</style>", "html", 2),
        ('<p style="background: url(http://e.org/b)">https://e.org/not-loaded</p>', "html", 1),
        ('<pre class="mermaid">graph</pre>', "html", 1),
        ("a { background: url(b.png) } /* https://e.org */", "css", 0),
        ('@font-face { src: url("https://fonts.example/a.woff2") }', "css", 1),
        ('fetch("https://e.org")', "js", 0),
    ],
)
def test_what_a_page_loads_from_elsewhere_is_seen(text, suffix, loads, tmp_path):
    path = tmp_path / f"page.{suffix}"
    path.write_text(text, encoding="utf-8")
    assert len(generated.loaded(path)) == loads


def test_a_site_that_loads_from_elsewhere_is_refused(tmp_path):
    (tmp_path / "index.html").write_text("<p>nothing", encoding="utf-8")
    generated.on_post_build({"site_dir": str(tmp_path)})
    (tmp_path / "index.html").write_text('<script src="https://cdn.example/x.js">', encoding="utf-8")
    with pytest.raises(generated.PluginError, match=r"nothing from elsewhere.*index\.html.*cdn\.example"):
        generated.on_post_build({"site_dir": str(tmp_path)})


def test_the_list_of_settings_is_complete():
    page = generated.settings()
    wanted = {name for name, field in Scenario.model_fields.items() if not is_table(field.annotation)}
    for name, field in Scenario.model_fields.items():
        if is_table(field.annotation):
            wanted |= {f"{name}.{key}" for key in field.annotation.model_fields}
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.*?) \|", page, re.MULTILINE)
    assert {name for name, _, _ in rows} == wanted
    assert all(values for _, values, _ in rows)
    assert ("privacy.delta", "number > 0, < 1", "`1e-05`") in rows
    assert ("privacy.unit", '`"record"`, `"user"`', '`"record"`') in rows
    assert "everything that changes the guarantee" in page.lower()
    assert "| of one record's gradient; at unit user, of a user's whole change |" in page


def is_table(kind):
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def test_the_list_of_commands_is_the_programs():
    page = generated.commands()
    headings = re.findall(r"^## `sottovoce (.*)`$", page, re.MULTILINE)
    assert headings == [" ".join(words) for words, _ in generated.leaves(cli._parser())]
    assert len(headings) > 50
    assert "usage: sottovoce client consent [-h]" in page
    assert str(Path.home()) not in page
    assert generated.on_page_markdown("a\n<!-- commands -->\nb") == f"a\n{page}\nb"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_a_list_begins_after_an_empty_line(path):
    """GitHub forgives it; MkDocs would show the list as one paragraph."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    begun = re.findall(r"^(?![-*|>#]|\d+\. |[ \t]|$)(.+)\n(?:[-*]|\d+\.) (?=\S)(.*)", text, re.MULTILINE)
    assert not begun


def commands_of(path):
    """Every call of the program in a block, loops and substitutions of the shell put aside."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    for _, language, block in BLOCK.findall(text):
        if language == "bash":
            for line in block.splitlines():
                if found := re.match(r"\s*(sottovoce .*?)(?: 2> \S+)?(?: &)?$", line):
                    yield re.sub(r"\$\{?\w+(?:##\* )?\}?", "value", found[1])


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_every_command_of_a_lesson_is_understood(path):
    found = list(commands_of(path))
    assert len(found) >= 4
    for line in found:
        options = cli._parser().parse_args(shlex.split(line, comments=True)[1:])
        assert callable(options.handler)


@pytest.mark.parametrize("path", NEW, ids=name_of)
def test_every_command_that_a_page_mentions_is_one(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    mentioned = re.findall(r"`sottovoce ([^`\n]*)`", prose)
    for line in mentioned:
        words = [word for word in shlex.split(line) if word not in ("…", "SCENARIO", "RUN")]
        with pytest.raises(SystemExit) as ended:
            cli._parser().parse_args([*words, "--help"])
        assert ended.value.code == 0, line


@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_every_scenario_of_a_lesson_loads(path, tmp_path):
    for mark, language, block in BLOCK.findall(path.read_text(encoding="utf-8")):
        if language == "toml":
            assert mark.startswith("file: "), "a TOML block says which file it is"
            written = tmp_path / mark.removeprefix("file: ")
            written.write_text(block, encoding="utf-8")
            if "scenario" in tomllib.loads(block):
                assert (tmp_path / load_study(written).scenario).is_file()
            else:
                load_scenario(written)


def test_every_measurement_has_its_command():
    rows = re.findall(r"^\|[^|]*\| (.*?) \| \[([\w-]+\.json)\]\(measurements/\2\) \| (.*?) \|$", EVIDENCE, re.MULTILINE)
    named = [name for _, name, _ in rows]
    assert sorted(named) == sorted(path.name for path in (DOCS / "measurements").glob("*.json"))
    for command, _, quoted in rows:
        [words] = re.findall(r"`([^`]*)`", command)[:1]
        program, *arguments = shlex.split(words)
        assert quoted
        if program == "sottovoce":
            options = cli._parser().parse_args(arguments)
            for scenario in re.findall(r"\S+\.toml", words):
                path = ROOT / scenario
                study = path.parent.name == "studies"
                assert load_study(path) if study else load_scenario(path, tuple(getattr(options, "overrides", ())))
        elif program == "make":
            assert f"\n{arguments[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8")
        else:
            assert words == "command" or (ROOT / arguments[0]).is_file()


def test_each_run_of_a_file_of_several_says_its_command():
    for name in ("survey", "language"):
        runs = json.loads((DOCS / "measurements" / f"{name}.json").read_text(encoding="utf-8"))
        for each in (run for group in runs.values() for run in group.values()):
            assert each["command"].startswith("sottovoce simulate ")


def script_of(path, folder):
    """The blocks of a lesson that are marked to be run, in order, as one shell script; its files are written."""
    blocks = BLOCK.findall(path.read_text(encoding="utf-8"))
    for mark, _, block in blocks:
        if mark.startswith("file: "):
            (folder / mark.removeprefix("file: ")).write_text(block, encoding="utf-8")
    parts = [block for mark, language, block in blocks if mark.startswith("run") and language == "bash"]
    assert parts
    return "set -euo pipefail\ntrap 'kill $(jobs -p) 2> /dev/null || true' EXIT\n" + "\n".join(parts)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_a_lesson_can_be_followed(path, tmp_path):
    (tmp_path / "simulations").symlink_to(ROOT / "simulations")
    script = script_of(path, tmp_path)
    for port in ("9192", "8180"):
        script = script.replace(port, str(free_port()))
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    command = ["bash", "-c", script]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=1700
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    said = {" ".join(line.split()) for line in done.stdout.splitlines()}
    for _, language, block in BLOCK.findall(path.read_text(encoding="utf-8")):
        if language == "text":  # what the page says one will see
            shown = {" ".join(line.split()) for line in block.splitlines()} - {"…", ""}
            assert shown <= said, shown - said


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_the_site_builds_and_a_browser_asks_nobody_else(tmp_path):
    from playwright.sync_api import sync_playwright

    program = Path(sys.executable).with_name("mkdocs")
    command = [str(program), "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    built = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.html")]
    assert len(built) == len(PAGES) + 1  # and a page for what is not found
    asked, problems = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 740})
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        for name in sorted(built):
            page.goto((tmp_path / name).as_uri())
            page.wait_for_load_state("load")
            if name == "reference/settings.html":
                assert "privacy.clip_norm" in page.inner_text("article")
            assert page.evaluate("document.documentElement.scrollWidth") <= 361, name
        browser.close()
    assert len(asked) > len(built)
    assert all(url.startswith(("file://", "data:", "blob:")) for url in asked), {u for u in asked if "file" not in u}
    assert not problems
