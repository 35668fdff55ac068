"""Who may see the owner's page: the one browser that opened the link, and no other page, program or name.

A request must ask for the very host and port that were printed (so a name that was rebound to this machine is refused),
below a path nobody can guess, with the cookie of the browser that opened the link. What changes anything is a form of
this page: sent by POST, from this origin, with a token. Every answer forbids the browser to load, run or frame a thing.
"""

import hmac
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.log import describe_error, note
from client.serve.chat_api import ApiError
from client.serve.guard import read_body

COOKIE = "sottovoce"
_OTHER_BROWSER = (
    "The link opens once, in one browser, and that browser is known by a cookie, which this one did not show. If it was"
    " not you who opened it, end the program that printed it; started again it prints a new link."
)
_PAGE_HEADERS = (
    (b"cache-control", "no-store"),
    (b"x-content-type-options", "nosniff"),
    (b"x-frame-options", "DENY"),
    (b"referrer-policy", "same-origin"),  # "no-referrer" would make browsers send forms with the origin "null"
    (b"cross-origin-opener-policy", "same-origin"),
    (b"cross-origin-resource-policy", "same-origin"),
)


@dataclass
class Session:
    """One browser's way to the owner's page: a link that opens once, then a cookie.

    Cookies belong to a host and not to a port, so that whoever serves another port of this machine could be sent them.
    Hence the cookie is bound to a path nobody can guess, and path and cookie must both be right.

    Attributes:
        host: Name and port that every request must ask for.
        place: First step of every path.
        key: Opens the page once.
        cookie: What the browser shows from then on.
        form: What every form of ours carries.
        opened: Whether the key was used.
    """

    host: str
    place: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    form: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    opened: bool = False

    @property
    def link(self) -> str:
        """The address to open, once."""
        return f"http://{self.host}{self.path('enter/' + self.key)}"

    def path(self, to: str = "") -> str:
        """The path of a part of the page."""
        return f"/{self.place}/{to}"


class PageGuard:
    """What a browser must show before anything else looks at its request, and what every answer forbids it to do.

    Args:
        app: Gets what may pass: paths below ``session.place``.
        session: Whose browser.
        refuse: (status, words) -> a page that says so.
        welcome: The page after the link was opened; it goes on to ``session.path()`` by itself.
        policy: Content security policy of every answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        session: Session,
        *,
        refuse: Callable[[int, str], Response],
        welcome: Callable[[], Response],
        policy: str,
    ) -> None:
        self._app, self._session, self._refuse_page, self._welcome = app, session, refuse, welcome
        self._headers = [(name, value.encode()) for name, value in _PAGE_HEADERS]
        self._headers.append((b"content-security-policy", policy.encode()))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what may pass."""
        if scope["type"] != "http":
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._headers]
            await send(message)

        try:
            await (self._answer(scope) or self._app)(scope, receive, guarded)
        except ClientDisconnect:
            return
        except Exception as error:  # its text may quote the owner's
            note("refused", level=logging.ERROR, code="PAGE", **describe_error(error))

    def _answer(self, scope: Scope) -> Response | None:
        """A refusal, or the answer to the link; None for what the page itself answers."""
        session, path, shown = self._session, str(scope["path"]), _headers_of(scope)
        cookies = _cookies(shown("cookie"))
        if shown("host") != [session.host]:
            return self._refuse_page(403, f"This page is {session.host} and answers under no other name.")
        if not path.startswith(session.path()):
            return self._refuse_page(404, "There is nothing here. The link that the program printed opens the page.")
        if path.startswith(session.path("enter/")):
            return self._enter(scope["method"], path.removeprefix(session.path("enter/")), cookies)
        if shown("sec-fetch-site") not in ([], ["same-origin"], ["none"]):
            return self._refuse_page(403, "Another page asked for this one. It was not answered; nothing was changed.")
        if not any(_same(value, session.cookie) for value in cookies):
            return self._refuse_page(403, _OTHER_BROWSER)
        if scope["method"] not in ("GET", "HEAD") and shown("origin") != [f"http://{session.host}"]:
            return self._refuse_page(403, "Only this page's own forms are answered; nothing was changed.")
        return None

    def _enter(self, method: str, key: str, cookies: list[str]) -> Response:
        session = self._session
        known = any(_same(value, session.cookie) for value in cookies)
        if method != "GET" or (session.opened and not known) or not _same(key, session.key):
            return self._refuse_page(403, _OTHER_BROWSER)
        session.opened = True
        response = self._welcome()
        response.set_cookie(COOKIE, session.cookie, path=session.path(), httponly=True, samesite="strict")
        return response


def _headers_of(scope: Scope) -> Callable[[str], list[str]]:
    return lambda wanted: [value.decode("latin-1") for name, value in scope["headers"] if name == wanted.encode()]


def _cookies(headers: list[str]) -> list[str]:
    """The values that are shown under our name."""
    pairs = [pair.strip().partition("=") for header in headers for pair in header.split(";")]
    return [value for name, _, value in pairs if name == COOKIE]


def _same(shown: str, wanted: str) -> bool:
    return hmac.compare_digest(shown.encode(), wanted.encode())


async def read_form(request: Request, session: Session) -> dict[str, str]:
    """The fields of one of our forms.

    Raises:
        ApiError: It is not one of ours, too large or too slow.
    """
    body = await read_body(request)
    wrong = ApiError("a form must come from this page and be whole, this one is not; nothing was changed.", status=403)
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/x-www-form-urlencoded":
        raise wrong
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=16
        )
    except ValueError:
        raise wrong from None
    fields = dict(pairs)
    if len(fields) != len(pairs) or not _same(fields.pop("form", ""), session.form):
        raise wrong
    return fields
