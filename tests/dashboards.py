"""The owner's page for tests: homes with a history and private heads, and the page served over them."""

import asyncio
import importlib.util
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx

from client.dashboard.beside import Beside
from client.dashboard.guard import Session
from client.dashboard.server import build_page
from client.export.private_head import personalize
from client.home.home import Home, create_home
from client.runtime.artifact import sign_folder
from client.serve.server import bind, server
from shared.protocol.signing import fingerprint


def lived_in(folder: Path, homes: Any, published: SimpleNamespace, *, base: Path, heads: int = 2) -> Home:
    """A home that answered two rounds of a campaign, refused nothing, and has versions of a private head."""
    home: Home = homes.make_home(folder, published)
    for number in (1, 2):
        code, _ = homes.ask(home, published.campaign, round_number=number, answered=number - 1)
        assert code is None
    for _ in range(heads):
        personalize(home, base_folder=base)
    return home


def agree_on_paper(home: Home, *, policy: str, campaign: str, operator: str = "f" * 64) -> None:
    """A consent without a campaign's folder."""
    with home.ledger() as ledger:
        ledger.consent(
            policy=policy,
            campaign=campaign,
            epsilon=1.0,
            delta=1e-6,
            max_participations=3,
            until=date(2099, 1, 1),
            operator=operator,
        )


def in_words(folder: Path, *, llama: Path, fleet: Path, texts: Any) -> SimpleNamespace:
    """``home``, whose two private heads answer in words, and the signed ``base`` of both."""
    serving, exporting = _load("test_client_serve"), _load("test_client_export_lm")
    shutil.copytree(fleet, folder / "base")
    serving.retrain(folder / "base", serving.USER_TURN)
    home = create_home(folder / "home", keystore="file", cap_epsilon=4.0, cap_delta=1e-3)
    agree_on_paper(home, policy="ab" * 32, campaign="films", operator=fingerprint(serving.OPERATOR.public_key()))
    for seed, user in enumerate(("ann", "bob")):
        exporting.write_head(
            folder / user, folder / "base", exporting.Adapted(llama, seed=seed, rank=2), texts, user=user
        )
        serving.keep(home, folder / user)
    sign_folder(folder / "base", serving.OPERATOR)
    return SimpleNamespace(home=home, base=folder / "base")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def served(home: Home, *, beside: Beside | None = None) -> Iterator[Session]:
    """The page on a real socket, as the command serves it."""
    with bind(0) as listening:
        session = Session(f"127.0.0.1:{listening.getsockname()[1]}")
        uvicorn = server(build_page(home, session, beside=beside))
        thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            end = time.monotonic() + 20
            while not uvicorn.started:
                assert time.monotonic() < end
                time.sleep(0.01)
            yield session
        finally:
            uvicorn.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


class InProcess(httpx.BaseTransport):
    """One request after the other, each in an event loop of its own."""

    def __init__(self, app: Any) -> None:
        self._transport = httpx.ASGITransport(app)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it."""

        async def handle() -> httpx.Response:
            sent = httpx.Request(request.method, request.url, headers=request.headers, content=request.read())
            response = await self._transport.handle_async_request(sent)
            body = await response.aread()
            return httpx.Response(response.status_code, headers=response.headers, content=body)

        return asyncio.run(handle())


@contextmanager
def entered(home: Home, *, beside: Beside | None = None) -> Iterator[SimpleNamespace]:
    """A browser that opened the link: ``http``, ``session``, and ``post(action, **fields)`` as our forms send it."""
    session = Session("127.0.0.1:8123")
    app = build_page(home, session, beside=beside)
    origin = f"http://{session.host}"
    with httpx.Client(transport=InProcess(app), base_url=origin) as http:
        assert http.get(session.link).status_code == 200

        def post(action: str, **fields: str) -> httpx.Response:
            data = {"form": session.form} | fields
            return http.post(session.path(action), data=data, headers={"origin": origin}, follow_redirects=True)

        yield SimpleNamespace(http=http, session=session, post=post, app=app, origin=origin)
