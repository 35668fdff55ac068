"""Who may speak to the server of an owner's models: a program on this machine that shows the token."""

import asyncio
import hmac
import logging
import re
import secrets
from pathlib import Path

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.log import describe_error, note
from client.serve.chat_api import ApiError
from client.vault.private_files import disk_errors, locked_folder, write_private
from shared.errors import StoreError

_LOCAL_NAME = re.compile(rb"(127\.0\.0\.1|localhost)(:[0-9]{1,5})?", re.IGNORECASE)
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,128}")
_MAX_BODY_BYTES = 2**20
_BODY_SECONDS = 10.0


class Guard:
    """What every request must show before anything else looks at it; and no error of ours tells what was in it."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._wanted = f"Bearer {token}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        if scope["type"] != "http":
            return

        async def unstored(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"cache-control", b"no-store")]
            await send(message)

        try:
            refusal = self._refuse(scope)
            await (self._app if refusal is None else refuse(refusal))(scope, receive, unstored)
        except ClientDisconnect:
            return
        except Exception as error:  # whatever it is, its text may quote the owner's: the server must not print it
            note("refused", level=logging.ERROR, code="SERVE", **describe_error(error))

    def _refuse(self, scope: Scope) -> ApiError | None:
        headers = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        shown = [value for name, value in headers if name == b"authorization"]
        if len(hosts) != 1 or not _LOCAL_NAME.fullmatch(hosts[0]):
            return ApiError("the host must be 127.0.0.1 or localhost, got another name.", status=403, code="host")
        if any(name == b"origin" for name, _ in headers):
            return ApiError("a web page must not ask this server; use a program.", status=403, code="origin")
        if len(shown) != 1 or not hmac.compare_digest(shown[0], self._wanted):
            return ApiError(
                "the token must be sent as 'Authorization: Bearer TOKEN', it was not; the server says where it is.",
                status=401,
                code="invalid_api_key",
            )
        return None


def refuse(error: ApiError) -> Response:
    """The error object as a response."""
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "5"}}.get(error.status)
    return JSONResponse(error.body(), status_code=error.status, headers=headers)


async def read_body(request: Request) -> bytes:
    """The body of a request.

    Raises:
        ApiError: It is too large or too slow.
    """
    body = b""
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _MAX_BODY_BYTES:
                    raise ApiError(f"the body must have at most {_MAX_BODY_BYTES} bytes, got more.", status=413)
    except TimeoutError:
        raise ApiError(f"the body must arrive within {_BODY_SECONDS:g} seconds, it did not.", status=408) from None
    return body


def read_token(path: Path, *, new: bool = False) -> str:
    """The token in a file that only its owner reads; made where there is none, or a new one is wanted.

    Raises:
        StoreError: The file is not one that this function wrote, or others may read it.
    """
    with disk_errors(path), locked_folder(path.parent):
        if new or (not path.is_symlink() and not path.exists()):
            write_private(path, secrets.token_urlsafe(32).encode())
        found = path.lstat()
        text = "" if path.is_symlink() or found.st_size > 128 else path.read_text(encoding="ascii", errors="replace")
    if found.st_mode & 0o077 or not _TOKEN.fullmatch(text):
        raise StoreError(f"{path} must hold a token that only you may read, it does not; make one with --new-token.")
    return text
