"""Parsers behind doors: the front's HTTP, the chat endpoint, a form of the owner's page, the control socket.

A request is described in JSON, so that an edit changes method, path, headers or body.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
from google.protobuf.json_format import ParseDict
from google.protobuf.message import DecodeError
from google.protobuf.struct_pb2 import Struct
from starlette.requests import Request
from starlette.responses import Response

from client.dashboard.guard import Session, read_form
from client.serve.chat_api import ApiError, parse_request
from client.service.control import _handlers
from server.front import Gateway
from shared.flower.control import fleet_paths
from simulations.fuzz.parsers import Parser, Target, TurnedAwayError, of_json


def _front(folder: Path) -> Parser:
    """A request at the front; what goes on must be a fleet call."""
    del folder
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, stream=_Answer())

    upstream = httpx.AsyncClient(base_url="https://127.0.0.1:1", transport=httpx.MockTransport(answer))
    gateway, paths = Gateway(upstream), fleet_paths()
    path = sorted(path for path in paths if path.endswith("pull-messages"))[0]
    headers = [["content-length", "4"], ["x-flwr", "1"], ["host", "a"], ["connection", "keep-alive, x-flwr"]]
    valid = {"method": "POST", "path": path, "query": "", "headers": headers, "body": "body"}

    def read(said: Any) -> Any:
        seen.clear()
        status = asyncio.run(_ask(gateway, said, valid))
        for request in seen:
            if request.method != "POST" or request.url.path not in paths or request.url.query:
                raise AssertionError(f"{request.method} {request.url} went on")
        if gateway._waiting:
            raise AssertionError("a body that is gone counts as waiting")
        if status != 200:
            raise TurnedAwayError(status)

    return Parser([json.dumps(valid).encode()], of_json(read))


class _Answer(httpx.AsyncByteStream):
    """What comes back, once."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"answer"


def _form(folder: Path) -> Parser:
    """A form of the owner's page."""
    del folder
    session = Session("127.0.0.1:1", form="f" * 43)
    fields = {"headers": [["content-type", "application/x-www-form-urlencoded"]]}
    valid = fields | {"body": f"form={session.form}&policy=abc&typed=forget"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await read_form(Request(scope, receive), session)
        await Response(b"")(scope, receive, send)

    return Parser([json.dumps(valid).encode()], of_json(lambda said: asyncio.run(_ask(app, said, valid))))


async def _ask(app: Any, said: Any, valid: Mapping[str, Any]) -> int:
    """Speak ASGI with what an edit made of a request; h11 has seen to it that bytes are bytes."""
    said = said if isinstance(said, dict) else {}
    pairs = [pair for pair in _list(said.get("headers")) if isinstance(pair, list) and len(pair) == 2]
    body = _latin(said.get("body"))
    scope = {
        "type": "http",
        "method": str(said.get("method", valid.get("method", "POST"))),
        "path": str(said.get("path", "/")),
        "raw_path": _latin(said.get("path", "/")),
        "query_string": _latin(said.get("query")),
        "headers": [(_latin(name).lower(), _latin(value)) for name, value in pairs],
    }
    pieces = [{"type": "http.request", "body": body[:2], "more_body": True}, {"type": "http.request", "body": body[2:]}]
    sent: list[Any] = []

    async def receive() -> Any:
        return pieces.pop(0) if pieces else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return next((each["status"] for each in sent if "status" in each), 0)


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else []


def _latin(value: Any) -> bytes:
    return ("" if value is None else str(value)).encode("latin-1", "replace")[:300_000]


def _chat(folder: Path) -> Parser:
    del folder
    message = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    first = {"model": "base", "messages": [message], "max_tokens": 5, "stop": ["\n"], "stream": True, "n": 1}
    second = {
        "model": "personal",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 3,
        "stream_options": {"include_usage": True},
    }
    return Parser([json.dumps(each).encode() for each in (first, second)], parse_request)


def _control(folder: Path) -> Parser:
    """A call of the owner's socket."""
    del folder
    predict = _handlers(_Owner())["Predict"]
    valid = ParseDict({"texts": ["one", "two"]}, Struct()).SerializeToString()

    def read(content: bytes) -> Any:
        return predict.unary_unary(predict.request_deserializer(content), _Call())

    return Parser([valid], read)


class _Owner:
    """A service that predicts."""

    def predict(self, texts: Sequence[str]) -> Mapping[str, Any]:
        return {"predictions": [float(len(text)) for text in texts], "problem": None}

    def status(self) -> Mapping[str, Any]:
        return {}

    def pause(self) -> None:
        """Nothing."""

    resume = stop = pause


class _Call:
    """A call whose end is its status."""

    def abort(self, code: Any, details: str) -> None:
        if code.name != "FAILED_PRECONDITION":
            raise AssertionError(f"{code.name}: {details}")
        raise TurnedAwayError(code.name)


DOORS: dict[str, Target] = {
    "HTTP at the front": Target("device", "tree", _front, (TurnedAwayError,)),
    "a form of the owner's page": Target("anybody", "tree", _form, (ApiError, TurnedAwayError)),
    "chat request": Target("anybody", "json", _chat),
    "control socket": Target("owner", "bytes", _control, (DecodeError, TurnedAwayError)),
}
