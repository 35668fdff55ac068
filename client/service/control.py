"""The owner's control socket: what a running service is doing, pause, resume, predict, stop. gRPC on a unix socket.

Only the owner can reach it: the socket (0600) lies in a folder (0700) of the owner's home. The messages are protobuf's
well-known types, so no generated code is needed on either side; docs/device.md shows the interface as a ``.proto``.
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # read once, when grpc is loaded
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
from google.protobuf.empty_pb2 import Empty
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Struct

from client.vault.private_files import disk_errors, private_folder
from shared.errors import SottovoceError, StoreError

SERVICE = "sottovoce.Owner"

_PATH_BYTES = 107  # what a socket's address holds
_TIMEOUT_S = 10.0
_PREDICT_S = 300.0


class Owner(Protocol):
    """What the socket can ask of a service; each may raise ``SottovoceError``."""

    def status(self) -> Mapping[str, Any]:
        """What it is doing; JSON."""

    def pause(self) -> None:
        """Take part in nothing."""

    def resume(self) -> None:
        """End a pause."""

    def predict(self, texts: Sequence[str]) -> Mapping[str, Any]:
        """``predictions`` of the current private head, and in ``problem`` why the bare base answers, or None."""

    def stop(self) -> None:
        """End the service, after this call has been answered."""


def socket_path(home: Path) -> Path:
    """Where the socket of a home's service lies: in the home, or in the user's runtime folder if that is too deep.

    Raises:
        StoreError: Neither path is short enough for a socket.
    """
    home = home.resolve()
    name = f"sottovoce-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}"
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    places = [home / "run" / "control.sock", *([Path(runtime) / name / "control.sock"] if runtime else [])]
    for path in places:
        if len(os.fsencode(path)) <= _PATH_BYTES:
            return path
    raise StoreError(
        f"the path of the control socket must have at most {_PATH_BYTES} bytes, {places[0]} has "
        f"{len(os.fsencode(places[0]))}; move the home to a shorter path, or set XDG_RUNTIME_DIR to a short folder."
    )


@contextmanager
def serve_control(home: Path, owner: Owner) -> Iterator[Path]:
    """Serve the socket for the length of a block; whoever calls is the only service of the home.

    Raises:
        StoreError: The socket cannot be made.
    """
    path = socket_path(home)
    with disk_errors(path):
        private_folder(path.parent)
        path.parent.chmod(0o700)
        path.unlink(missing_ok=True)  # of a service that was killed
    server = grpc.server(ThreadPoolExecutor(2, thread_name_prefix="control"), options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, _handlers(owner)),))
    try:
        server.add_insecure_port(f"unix:{path}")
        path.chmod(0o600)
    except (RuntimeError, OSError) as error:
        raise StoreError(f"a control socket must be possible at {path}, it is not: {type(error).__name__}.") from None
    server.start()
    try:
        yield path
    finally:
        server.stop(0.5).wait(1.0)
        path.unlink(missing_ok=True)


def _handlers(owner: Owner) -> dict[str, grpc.RpcMethodHandler]:
    def method(call: Callable[[Any], Message], request: type[Message] = Empty) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            _refusing(call),
            request_deserializer=request.FromString,
            response_serializer=lambda reply: reply.SerializeToString(),
        )

    return {
        "Status": method(lambda _: ParseDict(owner.status(), Struct())),
        "Pause": method(_quietly(owner.pause)),
        "Resume": method(_quietly(owner.resume)),
        "Predict": method(lambda request: _predict(owner, request), Struct),
        "Stop": method(_quietly(owner.stop)),
    }


def _refusing(call: Callable[[Any], Message]) -> Callable[[Any, grpc.ServicerContext], Message]:
    """Our errors with their words, all others without."""

    def answer(request: Any, context: grpc.ServicerContext) -> Message:
        try:
            return call(request)
        except SottovoceError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except Exception as error:  # its text may quote the owner's
            context.abort(grpc.StatusCode.INTERNAL, type(error).__name__)

    return answer


def _quietly(action: Callable[[], None]) -> Callable[[Any], Message]:
    def call(_: Any) -> Message:
        action()
        return Empty()

    return call


def _predict(owner: Owner, request: Struct) -> Message:
    texts = MessageToDict(request).get("texts")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise StoreError("texts must be a list of at least one text, it is not.")
    return ParseDict(owner.predict(texts), Struct())


class ControlClient:
    """A connection to a running service; every method raises ``StoreError`` with what the service says against it."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel

    def status(self) -> dict[str, Any]:
        """What the service is doing, and what it knows of the home."""
        return dict(MessageToDict(self._call("Status", Empty(), Struct)))

    def pause(self) -> None:
        """Take part in nothing."""
        self._call("Pause", Empty(), Empty)

    def resume(self) -> None:
        """End a pause."""
        self._call("Resume", Empty(), Empty)

    def predict(self, texts: Sequence[str]) -> dict[str, Any]:
        """``predictions``, one a text, and ``problem``: why the bare base made them, or None.

        In task ``tagging`` a prediction is a list of probabilities, of the ``labels`` in their order.
        """
        request = ParseDict({"texts": list(texts)}, Struct())
        return dict(MessageToDict(self._call("Predict", request, Struct, timeout_s=_PREDICT_S)))

    def stop(self) -> None:
        """End the service."""
        self._call("Stop", Empty(), Empty)

    def _call(self, name: str, request: Message, reply: type[Message], *, timeout_s: float = _TIMEOUT_S) -> Message:
        method = self._channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        try:
            found: Message = method(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise StoreError(_words(error)) from None
        return found


def _words(error: grpc.RpcError) -> str:
    code = error.code()
    if code is grpc.StatusCode.FAILED_PRECONDITION:
        return str(error.details())
    return f"the service of this home must answer on its socket, got {code.name}; is sottovoce client join running?"


@contextmanager
def control_client(home: Path) -> Iterator[ControlClient | None]:
    """A connection to the service of a home; None where none listens.

    Example:
        >>> with control_client(Path("/nowhere")) as client:
        ...     client is None
        True
    """
    path = socket_path(home)
    if not path.is_socket():
        yield None
        return
    options = [("grpc.enable_http_proxy", 0), ("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{path}", options=options) as channel:
        yield ControlClient(channel) if _listens(channel) else None


def _listens(channel: grpc.Channel) -> bool:
    try:
        grpc.channel_ready_future(channel).result(timeout=1.0)
    except grpc.FutureTimeoutError:  # the socket of a service that was killed
        return False
    return True
