"""Fixtures that several test modules share."""

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import platformdirs
import pytest

from shared.model import Base


@pytest.fixture(scope="session")
def make_tiny_base() -> Callable[..., Base]:
    """The builder of ``tests/tiny.py``: (folder, *, layers=2, seed=0) -> Base."""
    return _load_tiny().tiny_base


@pytest.fixture(scope="session")
def tiny_base(make_tiny_base, tmp_path_factory) -> Base:
    """A random two-layer BERT with its tokenizer."""
    return make_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def tiny_texts() -> list[str]:
    """Different texts of different lengths, one of them empty."""
    return list(_load_tiny().TEXTS)


@pytest.fixture(scope="session")
def tiny_graph(tiny_base):
    """The traced graph of ``tiny_base`` for up to 48 tokens; made once because tracing takes seconds."""
    import client.graph

    return client.graph._trace(client.graph.PooledBase(tiny_base), max_tokens=48)


@pytest.fixture(scope="session")
def tiny_fleet(tiny_base, tiny_graph, tiny_texts, tmp_path_factory) -> Path:
    """The exported ``tiny_base``, slots in both blocks; its siblings are free for heads. Read only."""
    import client.export
    import client.graph
    from shared.config import TaskConfig

    folder = tmp_path_factory.mktemp("fleet") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.graph, "_trace", lambda model, *, max_tokens: copy.deepcopy(tiny_graph))
        client.export.export_base(
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
    return _load_tiny()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """The folder of a random two-layer causal language model. Read only."""
    return _load_tiny().tiny_llama(tmp_path_factory.mktemp("tiny-llama") / "model")


@pytest.fixture(scope="session")
def tiny_lm_fleet(tiny_llama, tiny_texts, tmp_path_factory) -> Path:
    """The exported ``tiny_llama``, slots in both blocks; its siblings are free for heads. Read only."""
    from client.export_lm import export_lm_base

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
    tiny = _load_tiny()
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


def _load_tiny():
    """``tests/tiny.py``, which no import name reaches."""
    spec = importlib.util.spec_from_file_location("tiny", Path(__file__).with_name("tiny.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def invented():
    """The module ``tests/invented.py``: run folders made up by formula."""
    spec = importlib.util.spec_from_file_location("invented", Path(__file__).with_name("invented.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
