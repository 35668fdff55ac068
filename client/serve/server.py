"""The owner's models behind an OpenAI-compatible endpoint on this machine alone. Needs no more than the base install.

Every request passes ``Guard`` first: it must come to this machine by name, not from a web page, and show the token. One
answer is made at a time; a few requests wait for their turn. Nothing of a conversation is logged or kept.
"""

import asyncio
import json
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from client.serve.answer import Answer, prepare
from client.serve.chat_api import ApiError, ChatRequest, Reply, parse_request
from client.serve.guard import Guard, read_body, refuse
from client.serve.models import Models
from shared.errors import HeadError, StoreError
from shared.impatience import Impatient

HOST = "127.0.0.1"
_MAX_CONNECTIONS = 64
_MAX_WAITING = 4  # requests whose turn has not come
_PATIENCE_SECONDS = 60.0


@dataclass
class Turns:
    """One answer at a time; who comes when too many wait, or waits too long, is sent away."""

    max_waiting: int = _MAX_WAITING
    patience_s: float = _PATIENCE_SECONDS
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    _waiting: int = 0

    @asynccontextmanager
    async def take(self) -> AsyncIterator[None]:
        """Hold the one place.

        Raises:
            ApiError: There is none in time.
        """
        if self._lock.locked() and self._waiting >= self.max_waiting:
            raise _busy()
        self._waiting += 1
        try:
            async with asyncio.timeout(self.patience_s):
                await self._lock.acquire()
        except TimeoutError:
            raise _busy() from None
        finally:
            self._waiting -= 1
        try:
            yield
        finally:
            self._lock.release()


def _busy() -> ApiError:
    return ApiError("one answer is made at a time, and others wait already; try again in a moment.", status=429)


class Completion(Response):
    """The answer to one request, made while it is sent."""

    def __init__(self, models: Models, turns: Turns, request: ChatRequest, *, clock: Callable[[], float]) -> None:
        self._models, self._turns, self._request, self._clock = models, turns, request, clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Wait for the turn, then answer; who hangs up is not answered further."""
        async with self._turns.take():
            response = await self._respond(Request(scope, receive))
            await response(scope, receive, send)

    async def _respond(self, http: Request) -> Response:
        if await http.is_disconnected():
            raise ClientDisconnect
        answer = await run_in_threadpool(prepare, self._models, self._request)
        reply = Reply(
            number=secrets.token_hex(12),
            created=int(self._clock()),
            model=answer.chosen.name,
            fingerprint=answer.chosen.generator.base.id,
            include_usage=self._request.stream_options.include_usage,
            warning=answer.chosen.problem,
        )
        if self._request.stream:
            return StreamingResponse(_events(answer, reply), media_type="text/event-stream")
        pieces = []
        try:
            async for piece in iterate_in_threadpool(iter(answer)):
                if await http.is_disconnected():
                    raise ClientDisconnect
                pieces.append(piece)
        except HeadError as error:
            raise _failed(error) from None
        return JSONResponse(reply.whole("".join(pieces), finish=answer.finish, usage=answer.usage()))


async def _events(answer: Answer, reply: Reply) -> AsyncIterator[str]:
    """Server-sent events, as OpenAI sends them."""
    yield _event(reply.begin())
    try:
        async for piece in iterate_in_threadpool(iter(answer)):
            if piece:
                yield _event(reply.piece(piece))
    except HeadError as error:
        yield _event(_failed(error).body())
        return
    yield _event(reply.end(answer.finish))
    for chunk in reply.usage(answer.usage()):
        yield _event(chunk)
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _failed(error: HeadError) -> ApiError:
    return ApiError(str(error), status=500, code="generation_failed")


def build_app(
    models: Models, *, token: str, turns: Turns | None = None, clock: Callable[[], float] = time.time
) -> ASGIApp:
    """The endpoint as an ASGI application.

    Args:
        models: What answers.
        token: What every request must show.
        turns: How many may wait, and how long.
        clock: For the time in answers.

    Guarantee:
        Nothing but ``Guard`` sees a request without the token.
    """
    queue = turns or Turns()

    async def complete(request: Request) -> Response:
        body = await read_body(request)
        return Completion(models, queue, await run_in_threadpool(parse_request, body), clock=clock)

    async def list_models(_: Request) -> Response:
        names = await run_in_threadpool(models.names)
        return JSONResponse({"object": "list", "data": [_describe(name) for name in names]})

    async def show_model(request: Request) -> Response:
        name = request.path_params["name"]
        if name not in await run_in_threadpool(models.names):
            raise ApiError("there is no such model; see /v1/models.", status=404, code="model_not_found", param="model")
        return JSONResponse(_describe(name))

    app = Starlette(
        routes=[
            Route("/v1/chat/completions", complete, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name}", show_model),
        ],
        exception_handlers={ApiError: _on_refusal, HTTPException: _on_http, Exception: _on_bug},
    )
    return Guard(app, token=token)


def _describe(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "sottovoce"}


async def _on_refusal(_: Request, error: Exception) -> Response:
    if not isinstance(error, ApiError):
        raise error
    return refuse(error)


async def _on_bug(_: Request, error: Exception) -> Response:
    del error  # Guard notes it
    return refuse(ApiError("the request could not be answered; see the server's log.", status=500))


async def _on_http(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    return refuse(ApiError("there is POST /v1/chat/completions and GET /v1/models, nothing else.", status=status))


def bind(port: int) -> socket.socket:
    """A socket on this machine's own address; port 0 takes a free one.

    Raises:
        StoreError: The port is taken or impossible.
    """
    if not 0 <= port <= 65535:
        raise StoreError(f"--port must be between 0 and 65535, got {port}; 0 takes a free one.")
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise StoreError(f"--port must be free, {port} is not: {error.strerror}; name another.") from None
    return listening


def run(app: ASGIApp, listening: socket.socket) -> None:
    """Serve until a signal says stop; answers under way are cut after two seconds."""
    server(app).run(sockets=[listening])


class _Impatient(Impatient):
    idle_s = 5.0  # connections are few, and a program on this machine is quick to ask


def server(app: ASGIApp) -> uvicorn.Server:
    """Uvicorn without access log, banner, proxies or websockets."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_Impatient,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=_MAX_CONNECTIONS,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=16_384,
        )
    )
