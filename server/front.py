"""The only door to the outside: it hands what devices ask of Flower's fleet interface to the SuperLink, nothing else.

Flower serves three interfaces on one port, and whoever reaches the other two may start a run or take a task without a
login. So the SuperLink listens on this machine alone, and a request goes on to it only where method and path are,
byte for byte, those of a fleet call; what goes on carries our own spelling of the path. A device proves who it is to
the SuperLink, by a signature in the headers that go on with the request.
"""

import asyncio
import contextlib
import socket
import ssl
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import httpx
import uvicorn
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.folder import ServerFolder
from shared.errors import ServerError
from shared.flower.control import fleet_paths, pushed_by, speaks_for_itself
from shared.impatience import Impatient

MAX_BODY_BYTES = 16 * 2**20  # Flower cuts what is large into pieces of 5 MB; a bundle has at most 10 MB
_MAX_CALL_BYTES = 256 * 2**10  # of all other calls; over a long list of parts Flower's database stands still
_PARTS = "/v1/fleet/push-object"
_MAX_WAITING_BYTES = 256 * 2**20  # of all requests together
_FIRST_BYTES = 32 * 2**20  # of parts from one device, before the server has said how long a reply may be
_REPLIES = 4  # a device may hand over between two questions: to this one and the last, each twice over a bad line
_MAX_CONNECTIONS = 2000
_MOST_DIGITS = 12  # of a length, whatever reads the head before us
_BODY_S = 60.0  # to send a request's body
_ANSWER_S = 120.0
_START_S = 20.0
_STOP_S = 10
# RFC 9110 §7.6.1; the rest tells of the way here, and devices may not invent that.
_NOT_FORWARDED = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade expect host content-length forwarded via x-forwarded-for x-forwarded-host x-forwarded-port "
    b"x-forwarded-proto x-real-ip".split()
)
_Headers = list[tuple[bytes, bytes]]


@dataclass
class Gateway:
    """An ASGI application that forwards fleet calls and refuses everything else.

    Args:
        upstream: Speaks to the SuperLink; its base URL is the SuperLink's.

    Attributes:
        requests: Calls that went on to the SuperLink.
        refused: Requests that did not: no fleet call, too large, too slow, too many, in another device's name, or parts
            of messages beyond what a device may hand over.
        bytes_in: Bytes of bodies that came from devices and went on.
        bytes_out: Bytes of bodies that went back to devices.
    """

    upstream: httpx.AsyncClient
    requests: int = 0
    refused: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    _paths: dict[bytes, str] = field(default_factory=lambda: {path.encode(): path for path in fleet_paths()})
    _waiting: int = 0  # bytes of bodies in memory
    _allowed: int = _FIRST_BYTES
    _taken: Counter[int] = field(default_factory=Counter)  # node id -> bytes of parts since devices were last asked

    def allow(self, reply_bytes: int) -> None:
        """Let every device hand over parts of a reply anew.

        Args:
            reply_bytes: How long a reply may be.
        """
        self._allowed, self._taken = _REPLIES * reply_bytes, Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        with contextlib.suppress(ClientDisconnect, TimeoutError):
            response = await self._answer(Request(scope, receive))
            async with asyncio.timeout(_ANSWER_S):
                await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = self._paths.get(request.scope["raw_path"])
        if path is None or request.method != "POST" or request.scope["query_string"]:
            return self._refuse(404)
        body = bytearray()
        try:
            async with asyncio.timeout(_BODY_S):
                problem = await self._read(request, body, MAX_BODY_BYTES if path == _PARTS else _MAX_CALL_BYTES)
            if not problem and not speaks_for_itself(path, body):
                problem = 403
            node = pushed_by(body) if path == _PARTS and not problem else None
            if node is not None and self._taken[node] + len(body) > self._allowed:
                problem = 413
            if problem:
                return self._refuse(problem)
            response = await self._forward(path, request.scope["headers"], body)
            if node is not None and response.status_code == 200:  # the SuperLink has checked whose call it is
                self._taken[node] += len(body)
            return response
        except TimeoutError:
            return self._refuse(408)
        finally:
            self._waiting -= len(body)

    async def _read(self, request: Request, body: bytearray, limit: int) -> int | None:
        """Read a body; gives the status of its refusal where it is too large, alone or with the others'."""
        declared = request.headers.get("content-length", "0")
        if not declared.isdecimal() or len(declared) > _MOST_DIGITS or int(declared) > limit:
            return 413
        async for chunk in request.stream():
            if len(body) + len(chunk) > limit:
                return 413
            if self._waiting + len(chunk) > _MAX_WAITING_BYTES:
                return 503
            body += chunk
            self._waiting += len(chunk)
        return None

    async def _forward(self, path: str, headers: _Headers, body: bytearray) -> Response:
        self.requests += 1
        self.bytes_in += len(body)
        try:
            request = self.upstream.build_request("POST", path, headers=_end_to_end(headers), content=bytes(body))
            answer = await self.upstream.send(request, stream=True)
            try:
                content = b"".join([chunk async for chunk in answer.aiter_raw()])
            finally:
                await answer.aclose()
        except httpx.TransportError:
            return Response(status_code=502)
        self.bytes_out += len(content)
        # Flower says 500 where its database is locked for a while; a SuperNode gives its reply up at that, not at 503.
        response = Response(content, status_code=503 if answer.status_code == 500 else answer.status_code)
        response.raw_headers += _end_to_end(answer.headers.raw)
        return response

    def _refuse(self, status: int) -> Response:
        self.refused += 1
        return Response(status_code=status, headers={"connection": "close"})  # a body not read cannot be passed over


class Front:
    """A door that stands open, in a thread of its own, until it is stopped.

    Attributes:
        port: Where it listens.
    """

    def __init__(self, gateway: Gateway, config: uvicorn.Config, listening: socket.socket) -> None:
        self.port: int = listening.getsockname()[1]
        self._gateway = gateway
        self._server = uvicorn.Server(config)
        self._listening = listening
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="front", daemon=True)

    def counts(self) -> dict[str, int]:
        """Calls that went on, requests refused, bytes of bodies in and out, since it was opened."""
        names = ("requests", "refused", "bytes_in", "bytes_out")
        return {name: getattr(self._gateway, name) for name in names}

    def allow(self, reply_bytes: int) -> None:
        """Devices are asked: every one may hand over a reply of so many bytes, as parts of messages."""
        self._gateway.allow(reply_bytes)

    def alive(self) -> bool:
        """Whether it stands open."""
        return self._server.started and self._thread.is_alive()

    def start(self) -> None:
        """Open it.

        Raises:
            ServerError: It does not open.
        """
        self._thread.start()
        for _ in range(int(_START_S / 0.05)):
            if self._server.started or not self._thread.is_alive():
                break
            self._thread.join(0.05)
        if not self.alive():
            self.stop()
            raise ServerError(f"the front must listen on port {self.port} within {_START_S:.0f} s, it does not.")

    def stop(self) -> None:
        """Close it; calls under way have a moment to end."""
        self._server.should_exit = True
        self._thread.join(2 * _STOP_S)
        self._listening.close()

    async def _serve(self) -> None:
        async with self._gateway.upstream:
            await self._server.serve(sockets=[self._listening])


def start_front(server: ServerFolder, *, superlink_port: int, host: str = "0.0.0.0", port: int | None = None) -> Front:
    """Open the door of a server.

    Args:
        server: Whose certificate is shown.
        superlink_port: Of the SuperLink on this machine, which shows the same certificate.
        host: Address of this machine to listen on; the default is all of IPv4.
        port: To listen on, 0 for any; by default the one devices call.

    Raises:
        ServerError: The port is in use, or certificate and key are not each other's.

    Guarantee:
        No request whose method or path differs in any byte from those of a device's fleet calls, or that has a query,
        reaches the SuperLink, and no body above ``MAX_BODY_BYTES``. Who pushes a message is who the message says.
        Between two calls of ``allow`` a device hands over parts of four replies at most, and what is under way then.
    """
    trust = ssl.create_default_context(cafile=str(server.ca_certificate))
    # Let go of a connection before the SuperLink does (5 s): a call on one it has just closed would be lost.
    limits = httpx.Limits(max_connections=100, max_keepalive_connections=50, keepalive_expiry=2.0)
    upstream = httpx.AsyncClient(
        base_url=f"https://127.0.0.1:{superlink_port}",
        verify=trust,
        timeout=httpx.Timeout(_ANSWER_S, connect=5.0),
        limits=limits,
        trust_env=False,
    )
    upstream.headers.clear()  # a device's own go on, and no other
    gateway = Gateway(upstream)
    config = uvicorn.Config(
        gateway,
        http=Impatient,  # h11 hands the target on as it came; httptools would tidy it first
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=_MAX_CONNECTIONS,
        timeout_keep_alive=int(Impatient.idle_s),  # a device calls every three seconds
        timeout_graceful_shutdown=_STOP_S,
        ssl_context_factory=lambda *_: _tls(server),
    )
    config.load()
    front = Front(gateway, config, _listen(host, server.settings.port if port is None else port))
    front.start()
    return front


def _end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> _Headers:
    """What is meant for the other end, not for the connection."""
    headers = [(name.lower(), value) for name, value in headers]
    named = {word.strip().lower() for name, value in headers if name == b"connection" for word in value.split(b",")}
    return [(name, value) for name, value in headers if name not in _NOT_FORWARDED | named]


def _tls(server: ServerFolder) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(server.certificate, server.certificate_key)
    except (ssl.SSLError, OSError) as error:
        raise ServerError(
            f"{server.certificate} and {server.certificate_key} must belong together ({error.strerror or error}); "
            "run: sottovoce server init --renew."
        ) from None
    return context


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise ServerError(
            f"the front must be able to listen on {host} port {port}: {error.strerror}; "
            "end what listens there, or make a server with another --port."
        ) from None
