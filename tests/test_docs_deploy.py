"""The guides of a deployment: their commands and units are understood by the program, their links lead somewhere."""

import configparser
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from sottovoce import cli

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "docs" / name for name in ("deploy.md", "device.md", "server.md")]
UNITS = sorted((ROOT / "docs" / "systemd").glob("*.service"))
PROGRAM = "/opt/sottovoce/bin/sottovoce"


def commands(path: Path) -> list[str]:
    """Every line of a fenced block that calls the program."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("sottovoce ")]


def unit(path: Path) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None, comment_prefixes="#")
    parser.optionxform = str
    parser.read_string(path.read_text(encoding="utf-8").replace("\\\n", " "))
    return parser


def understood(words: list[str]):
    options = cli._parser().parse_args(words)
    assert callable(options.handler)
    if words[:2] == ["server", "run"]:
        assert (options.holdout is None) == options.no_holdout
    return options


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_every_command_of_a_guide_is_understood(path):
    found = commands(path)
    assert len(found) > 5
    for line in found:
        understood(shlex.split(line, comments=True)[1:])


@pytest.mark.parametrize("path", GUIDES, ids=lambda path: path.stem)
def test_every_command_that_a_guide_mentions_is_one(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    mentioned = re.findall(r"`(?:sottovoce )?((?:bench|client|data|policy|server) [a-z-]+)\b[^`|]*`", prose)
    assert mentioned
    for words in map(str.split, mentioned):
        with pytest.raises(SystemExit) as ended:
            cli._parser().parse_args([*words, "--help"])
        assert ended.value.code == 0, words


def test_the_guides_show_the_whole_way():
    said = {" ".join(line.split()[1:3]) for path in GUIDES for line in commands(path)}
    owner = (
        "init source add consent join status history pause withdraw personalize predict serve rollback recover forget"
    )
    operator = "init enrol devices run status revoke rollback base"
    wanted = {f"client {name}" for name in owner.split()} | {f"server {name}" for name in operator.split()}
    assert wanted - {"server rollback"} | {"policy new", "policy sign"} <= said


def test_a_command_that_is_none_would_be_seen():
    for wrong in ("server run", "client join --caa x", "server enroll device.pub --name a"):
        with pytest.raises((SystemExit, AssertionError)):
            understood(wrong.split())


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda path: path.stem
)
def test_what_is_linked_exists(path):
    text = path.read_text(encoding="utf-8")
    anchors = {}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        linked = (path.parent / name).resolve() if name else path
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, target


def test_there_is_a_unit_for_each_service_and_the_guide_names_it():
    guide = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    started = set()
    for path in UNITS:
        assert f"`{path.name}`" in guide
        started.add(" ".join(shlex.split(unit(path)["Service"]["ExecStart"])[1:3]))
    assert started == {"server run", "client join", "client serve"}


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_a_command_that_is_understood(path):
    found = unit(path)
    program, *words = shlex.split(found["Service"]["ExecStart"])
    assert program == PROGRAM
    understood(words)
    assert found["Service"]["RestartPreventExitStatus"] == "2"  # what the user must mend is not tried again
    assert found["Install"]["WantedBy"] == "multi-user.target"
    assert ("%i" in found["Service"]["User"]) == path.stem.endswith("@")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_systemd_takes_a_unit(path, tmp_path):
    content = path.read_text(encoding="utf-8").replace(PROGRAM, "/bin/true").replace("User=sottovoce", "User=root")
    copy = tmp_path / path.name
    copy.write_text(content, encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert path.stem not in done.stderr
