"""Fixtures that several test modules share."""

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import platformdirs
import pytest

from shared.models.model import Base


@pytest.fixture(scope="session")
def make_tiny_base() -> Callable[..., Base]:
    """The builder of ``tests/tiny.py``: (folder, *, layers=2, seed=0) -> Base."""
    return _load("tiny").tiny_base


@pytest.fixture(scope="session")
def tiny_base(make_tiny_base, tmp_path_factory) -> Base:
    """A random two-layer BERT with its tokenizer."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Different texts of different lengths, one of them empty."""
    return list(_load("tiny").TEXTS)


@pytest.fixture(scope="session")
def tiny_graph(tiny_base):
    """The traced graph of ``tiny_base`` for up to 48 tokens; made once because tracing takes seconds."""
    import client.export.graph

    return client.export.graph._trace(client.export.graph.PooledBase(tiny_base), max_tokens=48)


@pytest.fixture(scope="session")
def tiny_fleet(tiny_base, tiny_graph, tiny_texts, tmp_path_factory) -> Path:
    """The exported ``tiny_base``, slots in both blocks; its siblings are free for heads. Read only."""
    import client.export.encoder
    import client.export.graph
    from shared.config import TaskConfig

    folder = tmp_path_factory.mktemp("fleet") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.export.graph, "_trace", lambda model, *, max_tokens: copy.deepcopy(tiny_graph))
        client.export.encoder.export_base(
            tiny_base,
            folder,
            blocks=[0, 1],
            targets=("attention.output.dense", "output.dense"),
            max_tokens=48,
            task=TaskConfig(),
            probe_texts=tiny_texts,
        )
    return folder


@pytest.fixture(scope="session")
def tiny():
    """The builders of ``tests/tiny.py``."""
    return _load("tiny")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """The folder of a random two-layer causal language model. Read only."""
    return _load("tiny").tiny_llama(tmp_path_factory.mktemp("tiny-llama") / "model")


@pytest.fixture(scope="session")
def tiny_lm_fleet(tiny_llama, tiny_texts, tmp_path_factory) -> Path:
    """The exported ``tiny_llama``, slots in both blocks; its siblings are free for heads. Read only."""
    from client.export.language_model import export_lm_base

    folder = tmp_path_factory.mktemp("lm-fleet") / "base"
    export_lm_base(
        tiny_llama,
        folder,
        base_sha256="ab" * 32,
        blocks=[0, 1],
        targets=("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"),
        max_tokens=128,
        probe_texts=tiny_texts,
    )
    return folder


@pytest.fixture(scope="session")
def tiny_world(tiny_base, tmp_path_factory) -> Callable[..., Path]:
    """(folder, *, body="", users=12) -> path of a scenario over the tiny base and an invented data set."""
    tiny = _load("tiny")
    data = tiny.tiny_movielens(tmp_path_factory.mktemp("tiny-movielens"))

    def write(folder: Path, *, body: str = "") -> Path:
        return tiny.tiny_scenario(folder, base=tiny_base.folder, data=data, body=body)

    return write


@pytest.fixture
def install_package(tmp_path, monkeypatch) -> Callable[..., Path]:
    """(package, code, {kind: {name: attribute}}, version="1.2") puts a package with its metadata on the path."""

    def write(package: str, code: str, entries: dict[str, dict[str, str]], *, version: str = "1.2") -> Path:
        folder = tmp_path / "packages" / package
        info = folder / f"{package}-{version}.dist-info"
        info.mkdir(parents=True)
        (folder / f"{package}.py").write_text(code, encoding="utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = []
        for kind, registered in entries.items():
            lines += [f"[sottovoce.{kind}]", *(f"{name} = {package}:{what}" for name, what in registered.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, package, raising=False)
        return folder

    return write


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests keep features and graphs to themselves; fetched assets, which only slow tests use, are the user's."""
    assets = platformdirs.user_cache_path("sottovoce") / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    home = tmp_path_factory.mktemp("cache")
    (home / "sottovoce").mkdir()
    (home / "sottovoce" / "assets").symlink_to(assets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=Path, metavar="FILE", help="write what came of each fault: see make faults")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--faults", default=None)
    if path is not None:
        config.pluginmanager.register(_load("fault_matrix").FaultMatrix(path))


def _load(name: str) -> ModuleType:
    """A module beside this one, which no import name reaches."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def wheels():
    """The module ``tests/wheels.py``: what pip would install on another machine."""
    return _load("wheels")


@pytest.fixture(scope="session")
def ledgers():
    """The module ``tests/ledgers.py``: ledgers, keystores, clocks and children to kill."""
    return _load("ledgers")


@pytest.fixture(scope="session")
def sums():
    """The module ``tests/secure_sums.py``: whole secure sums in one process."""
    return _load("secure_sums")


@pytest.fixture(scope="session")
def invented():
    """The module ``tests/invented.py``: run folders made up by formula."""
    return _load("invented")


@pytest.fixture
def crash_at_each_step(tmp_path) -> Callable[[Path, str], list[Path]]:
    """(home, code) -> copies of the home; in the n-th, ``code`` over ``home`` was killed before its n-th step on disk.

    Steps are opened descriptors, flushes, renames and deletions. In the last copy ``code`` ran to its end.
    """

    def crash(home: Path, code: str) -> list[Path]:
        copies = tmp_path / "crashed"
        script = f"""
import os, shutil, signal, sys
from pathlib import Path
import client.home.sealed_heads, client.home.store, client.vault.vault

def step(call):
    def counted(*args, **kwargs):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return counted

for n in range(1, 200):
    home = Path(sys.argv[2]) / f"{{n:03d}}"
    shutil.copytree(sys.argv[1], home)
    child = os.fork()
    if not child:
        left = n
        for name in ("open", "fsync", "replace", "rename", "unlink", "rmdir"):
            setattr(os, name, step(getattr(os, name)))
        status = 1
        try:
            {code.strip().replace(chr(10), chr(10) + " " * 12)}
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != -signal.SIGKILL:
        sys.exit(code)
"""
        command = [sys.executable, "-c", script, str(home), str(copies)]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return sorted(copies.iterdir())

    return crash


@pytest.fixture(scope="session")
def homes():
    """The module ``tests/homes.py``: signed campaigns, owners' homes, and requests to them."""
    return _load("homes")


@pytest.fixture(scope="session")
def browsing():
    """The module ``tests/test_report_browser.py``: what is looked for in a page, as JavaScript."""
    return _load("test_report_browser")


@pytest.fixture(scope="session")
def dashboards():
    """The module ``tests/dashboards.py``: homes with a history, and the owner's page over them."""
    return _load("dashboards")


@pytest.fixture(scope="session")
def studies():
    """The module ``tests/studies.py``: study folders made up by formula."""
    return _load("studies")


@pytest.fixture(scope="session")
def bad_lines():
    """The module ``tests/tcp_proxy.py``: a TCP proxy that delays, cuts and goes silent."""
    return _load("tcp_proxy")


@pytest.fixture(scope="session")
def wire_devices():
    """The module ``tests/wire_device.py``: an enrolled key that speaks Flower's fleet calls by hand."""
    return _load("wire_device")


@pytest.fixture(scope="session")
def fault_matrix():
    """The module ``tests/fault_matrix.py``: how faults are counted."""
    return _load("fault_matrix")


@pytest.fixture(scope="session")
def crowds():
    """The module ``tests/crowds.py``: many owners' devices in one process, some of which fail."""
    return _load("crowds")


@pytest.fixture(scope="session")
def fleets():
    """The module ``tests/fleets.py``: a server and devices as processes, to be held and killed."""
    return _load("fleets")


@pytest.fixture(scope="session")
def wire_worlds():
    """The module ``tests/wire_worlds.py``: federations for faults on the wire."""
    return _load("wire_worlds")


@pytest.fixture(scope="session")
def cards():
    """The module ``tests/cards.py``: audits made up, and runs, for privacy cards."""
    return _load("cards")


@pytest.fixture(scope="session")
def published(homes, tiny_world, tmp_path_factory):
    """A signed campaign over the tiny base for all who only read it."""
    folder = tmp_path_factory.mktemp("published")
    changes = ("privacy.max_participations=2", "federation.cohort_size=2")
    return homes.publish(tiny_world(folder), folder, overrides=changes)


@pytest.fixture(scope="session")
def hiding_users(homes, tiny_world, tmp_path_factory):
    """Trust -> a signed campaign over the tiny base that hides users; for all who only read it."""

    def made(trust):
        folder = tmp_path_factory.mktemp(trust)
        return homes.publish(tiny_world(folder), folder, overrides=("privacy.unit=user", f"privacy.trust={trust}"))

    return {trust: made(trust) for trust in ("central", "distributed")}


@pytest.fixture(scope="session")
def steps():
    """The module ``tests/steps.py``: real heads, and randomness that is silent, replayed or counted."""
    return _load("steps")


@pytest.fixture(scope="session")
def tiny_causal(tiny_llama) -> Base:
    """The base of ``tiny_llama``."""
    from shared.models.model import load_base

    return load_base(tiny_llama)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; a test that asks for it is skipped, and says so, where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = os.environ.get("CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("no browser: install chromium or name one in CHROMIUM")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield launched
        launched.close()
