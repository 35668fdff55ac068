"""The owner's page as an application on loopback: what it shows, what its forms do. The base install is enough.

``PageGuard`` lets one browser in. What a form does is what the command of that name does; what came of it is shown
once, on the page the browser is sent back to.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from client.dashboard.beside import Beside, Numbers, Words
from client.dashboard.guard import PageGuard, Session, read_form
from client.dashboard.page import View, history_page, overview, reply_page
from client.dashboard.parts import POLICY, Said, refusal_page, welcome_page
from client.dashboard.trial import LENGTHS, MAX_CHARACTERS, numbers_page, trial_form, words_page
from client.home.home import Home
from client.owner.forget import describe_loss, forget
from client.owner.owner import RECEIPTS, checked_ledger, history, roll_back, set_paused, status, withdraw
from client.owner.words import forgotten_lines
from client.serve.chat_api import ApiError
from client.serve.server import Turns
from client.service.words import service_line
from shared.errors import HeadError, SottovoceError, StoreError

_RECEIPT = re.compile(r"[0-9]{8}T[0-9]{6}(-[0-9]{1,5})?\.json")
_SHOWN = 4  # of the numbers that left

Fields = Mapping[str, str]


def build_page(home: Home, session: Session, *, beside: Beside | None = None) -> ASGIApp:
    """The owner's page as an ASGI application.

    Args:
        home: Whose.
        session: How its browser is known.
        beside: What answers in the part that tries the personal model; None where no base is at hand.

    Guarantee:
        Nothing but ``PageGuard`` sees a request that is not of the session's browser; no answer lets the browser load
        anything from anywhere.
    """
    page = _Page(home, session, beside)
    routes = [
        Route("/", page.show),
        Route("/history", page.show_history),
        Route("/sent/{policy}/{number:int}", page.show_reply),
        Route("/sent/{policy}/{number:int}/bytes", page.download_reply),
        Route("/receipts/{name}", page.download_receipt),
        Route("/try", page.ask, methods=["POST"]),
        Route("/{action}", page.act, methods=["POST"]),
    ]
    app = Starlette(
        routes=[Mount(f"/{session.place}", app=Router(routes, redirect_slashes=False))],
        exception_handlers={ApiError: _on_refusal, HTTPException: _on_http, Exception: _on_bug},
    )
    return PageGuard(app, session, refuse=_refuse, welcome=lambda: HTMLResponse(welcome_page(session)), policy=POLICY)


class _Page:
    """What the page remembers between two requests: what the last form came to."""

    def __init__(self, home: Home, session: Session, beside: Beside | None) -> None:
        self._home, self._session, self._beside = home, session, beside
        self._said: Said | None = None
        self._turns = Turns(max_waiting=1)

    async def show(self, request: Request) -> Response:
        view = await run_in_threadpool(self._look)
        said, self._said = self._said, self._said if request.method == "HEAD" else None
        return HTMLResponse(overview(self._session, view, said))

    async def show_history(self, _: Request) -> Response:
        view = await run_in_threadpool(self._look)
        return HTMLResponse(history_page(self._session, view))

    async def show_reply(self, request: Request) -> Response:
        event, content = await run_in_threadpool(self._reply, **request.path_params)
        try:
            arrays = load(content)
        except SafetensorError:
            raise ApiError(
                "the bytes must be safetensors, they are not; look at them by yourself.", status=404
            ) from None
        return HTMLResponse(reply_page(self._session, event, [_describe(*item) for item in sorted(arrays.items())]))

    async def download_reply(self, request: Request) -> Response:
        event, content = await run_in_threadpool(self._reply, **request.path_params)
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", str(event.get("campaign", "campaign")))[:60]
        return _file(content, f"{name}-round-{event['round']}.safetensors")

    async def download_receipt(self, request: Request) -> Response:
        name = request.path_params["name"]
        if not _RECEIPT.fullmatch(name):
            raise HTTPException(404)
        try:
            content = await run_in_threadpool((self._home.folder / RECEIPTS / name).read_bytes)
        except OSError:
            raise HTTPException(404) from None
        return _file(content, name)

    async def act(self, request: Request) -> Response:
        action = ACTIONS.get(request.path_params["action"])
        if action is None:
            raise HTTPException(404)
        fields = await read_form(request, self._session)
        try:
            self._said = Said(tuple(await run_in_threadpool(action, self._home, fields)))
        except SottovoceError as error:
            self._said = Said((str(error),), wrong=True)
        if isinstance(self._beside, Words):
            await run_in_threadpool(self._beside.drop)
        return RedirectResponse(self._session.path(), status_code=303)

    async def ask(self, request: Request) -> Response:
        fields = await read_form(request, self._session)
        asked = fields.get("asked", "").replace("\r\n", "\n").strip()
        if self._beside is None:
            raise HTTPException(404)
        if not 0 < len(asked) <= MAX_CHARACTERS:
            raise ApiError(f"a text must have between 1 and {MAX_CHARACTERS} characters, got {len(asked)}.")
        try:
            if isinstance(self._beside, Words):
                return await self._ask_words(self._beside, asked, fields)
            return await self._ask_numbers(self._beside, asked)
        except (HeadError, StoreError) as error:
            raise ApiError(str(error)) from None

    async def _ask_numbers(self, beside: Numbers, asked: str) -> Response:
        texts = [line.strip() for line in asked.split("\n") if line.strip()]
        async with self._turns.take():
            compared = await run_in_threadpool(beside.compare, texts)
        return HTMLResponse(numbers_page(self._session, beside, compared, asked=asked))

    async def _ask_words(self, beside: Words, asked: str, fields: Fields) -> Response:
        length = fields.get("length", "")
        if length not in map(str, LENGTHS):
            raise ApiError(f"the length must be one of {', '.join(map(str, LENGTHS))}, got another.")
        answers = await run_in_threadpool(beside.ask, asked, limit=int(length))
        pieces = words_page(self._session, beside, answers, asked=asked, length=int(length))
        return _InTurn(pieces, self._turns)

    def _look(self) -> View:
        home, found, problem = self._home, None, None
        events: list[dict[str, Any]] = []
        kept: frozenset[tuple[str, int]] = frozenset()
        loss: Mapping[str, int] = {}
        try:
            found, events = status(home), history(home)
            with checked_ledger(home) as ledger:
                kept = ledger.kept_replies()
        except SottovoceError as error:
            problem = str(error)
        try:
            loss = describe_loss(home)
        except StoreError as error:
            problem = problem or str(error)
        receipts = home.folder / RECEIPTS
        names = sorted(path.name for path in receipts.glob("*.json") if _RECEIPT.fullmatch(path.name))
        return View(
            home=str(home.folder),
            found=found,
            problem=problem,
            events=events,
            kept=kept,
            service=service_line(home.folder),
            loss=loss,
            receipts=names,
            trial=trial_form(self._session, self._beside),
        )

    def _reply(self, *, policy: str, number: int) -> tuple[Mapping[str, Any], bytes]:
        """The event of a release and the bytes that left; ``ApiError`` where they are not kept."""
        try:
            wanted = ("release", policy, number)
            found = [e for e in history(self._home) if (e["event"], e.get("policy"), e.get("round")) == wanted]
            with checked_ledger(self._home) as ledger:
                content = ledger.kept_reply(policy=policy, round_number=number)
        except SottovoceError as error:
            raise ApiError(str(error), status=500) from None
        if not found or content is None:
            raise ApiError(
                "the bytes must still be kept, those of this round are not; a newer reply has their place.", status=404
            )
        return found[0], content


class _InTurn(Response):
    """A page that is made while it is sent, one at a time."""

    def __init__(self, pieces: Iterator[str], turns: Turns) -> None:
        self._pieces, self._turns = pieces, turns

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for the turn, then send; who goes away is not answered further."""
        async with self._turns.take():
            await StreamingResponse(self._pieces, media_type="text/html")(scope, receive, send)


def _pause(home: Home, _: Fields) -> list[str]:
    set_paused(home, True)
    return ["paused: nothing leaves this device until you resume"]


def _resume(home: Home, _: Fields) -> list[str]:
    set_paused(home, False)
    return ["resumed: the device answers the campaigns you agreed to"]


def _withdraw(home: Home, fields: Fields) -> list[str]:
    if fields.get("sure") != "yes":
        raise StoreError("to withdraw, the box that says so must be ticked; nothing was changed.")
    consent = withdraw(home, fields.get("policy", "")).consent
    return [
        f"withdrawn: {consent.campaign} gets nothing more from this device, for ever",
        f"epsilon {consent.epsilon:g} and delta {consent.delta:g} stay reserved: what was sent cannot be called back",
    ]


def _roll_back(home: Home, fields: Fields) -> list[str]:
    version = fields.get("version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise StoreError("a version of the private head must be named by its number; nothing was changed.")
    before, after = roll_back(home, int(version))
    return [f"version {after} of your private head is in use, it was {before}; none was deleted"]


def _forget(home: Home, fields: Fields) -> list[str]:
    if fields.get("confirm", "").strip().lower() != "forget":
        raise StoreError("to delete everything, the word 'forget' must be typed; nothing was changed.")
    receipt = forget(home)
    return [*forgotten_lines(receipt), f"receipt: {receipt['written']['file']}, below"]


ACTIONS: Mapping[str, Callable[[Home, Fields], list[str]]] = {
    "pause": _pause,
    "resume": _resume,
    "withdraw": _withdraw,
    "rollback": _roll_back,
    "forget": _forget,
}


def _describe(name: str, array: Any) -> dict[str, Any]:
    """An array that left: its form, its range and how it begins."""
    flat = array.reshape(-1)
    ends = (flat.min().item(), flat.max().item()) if flat.size else (0, 0)
    about = {"name": name, "shape": array.shape, "dtype": str(array.dtype), "low": ends[0], "high": ends[1]}
    return about | {"first": flat[:_SHOWN].tolist()}


def _file(content: bytes, name: str) -> Response:
    disposition = {"Content-Disposition": f'attachment; filename="{name}"'}
    return Response(content, media_type="application/octet-stream", headers=disposition)


def _refuse(status_code: int, words: str) -> Response:
    return HTMLResponse(refusal_page(words), status_code=status_code)


async def _on_refusal(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    words = str(error)
    return _refuse(error.status, words[:1].upper() + words[1:])


async def _on_http(_: Request, error: Exception) -> Response:
    return _refuse(error.status_code if isinstance(error, HTTPException) else 500, "There is nothing here.")


async def _on_bug(_: Request, error: Exception) -> Response:
    del error  # PageGuard notes it
    return _refuse(500, "The request could not be answered; see the log.")
