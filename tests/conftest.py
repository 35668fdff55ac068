"""Fixtures that several test modules share."""

import copy
import importlib.util
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
def tiny_world(tiny_base, tmp_path_factory) -> Callable[..., Path]:
    """(folder, *, body="", users=12) -> path of a scenario over the tiny base and an invented data set."""
    tiny = _load_tiny()
    data = tiny.tiny_movielens(tmp_path_factory.mktemp("tiny-movielens"))

    def write(folder: Path, *, body: str = "") -> Path:
        return tiny.tiny_scenario(folder, base=tiny_base.folder, data=data, body=body)

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
