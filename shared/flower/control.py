"""What an operator asks of a SuperLink: which devices it knows, and to start a run. Flower's Control API, on loopback.

And what a device may ask of it: the paths of the fleet calls. Written against flwr 1.41, where both are private.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from google.protobuf.message import DecodeError

from shared.errors import CampaignError, ServerError

_Answer = TypeVar("_Answer")

# A device registers and unregisters itself only where nobody is enrolled.
_NOT_FOR_DEVICES = frozenset({"/v1/fleet/register-node", "/v1/fleet/unregister-node"})
_PUSH_MESSAGES = "/v1/fleet/push-messages"

# Nothing of a bundle is ever run here, so it holds no code; Flower wants to be told names of apps.
_BUNDLE = b"""\
[project]
name = "sottovoce"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "sottovoce"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
"""


@functools.cache
def fleet_paths() -> frozenset[str]:
    """The targets of a device's calls, as the installed Flower serves them.

    Raises:
        ServerError: This Flower serves its fleet elsewhere.
    """
    from fastapi.routing import APIRoute
    from flwr.superlink.routers.fleet.router import router

    found = {route.path for route in router.routes if isinstance(route, APIRoute) and route.methods == {"POST"}}
    if not found or not all(path.startswith("/v1/fleet/") and "{" not in path for path in found):
        raise ServerError("the installed flwr must serve devices under /v1/fleet/, it does not; install flwr 1.41.")
    return frozenset(found) - _NOT_FOR_DEVICES


def speaks_for_itself(path: str, body: bytes | bytearray) -> bool:
    """Whether a fleet call hands over messages in no other device's name.

    Flower checks that the node a call names has the key that signed it. A message in the call names its sender once
    more, and that name decides whose reply it is.

    Args:
        path: One of ``fleet_paths``.
        body: Anything.
    """
    if path != _PUSH_MESSAGES:
        return True
    try:
        request = PushMessagesRequest.FromString(bytes(body))
    except DecodeError:
        return False
    return all(message.metadata.src_node_id == request.node.node_id for message in request.messages_list)


def pushed_by(body: bytes | bytearray) -> int | None:
    """The node a part of a message is handed over by, as the call says; None where it is no such call.

    Args:
        body: Anything.
    """
    try:
        return int(PushObjectRequest.FromString(bytes(body)).node.node_id)
    except DecodeError:
        return None


@dataclass(frozen=True)
class Node:
    """A device as the SuperLink knows it.

    Attributes:
        node_id: Flower's number for it.
        public_key: As ``key_bytes`` gives it.
        online: Whether it has called in lately.
        online_until: Until when Flower will believe that without another call; s since 1970, moved by every call.
    """

    node_id: int
    public_key: bytes
    online: bool
    online_until: float = 0.0


def key_bytes(line: str) -> bytes:
    """A device's public key as the SuperLink spells it, from its OpenSSH line."""
    key = load_ssh_public_key(line.encode())
    found: bytes = public_key_to_bytes(key)  # type: ignore[arg-type]
    return found


class Control:
    """A connection to the Control API of a SuperLink on this machine.

    Args:
        address: ``host:port``.
        root_certificates: PEM of the authority that signed its certificate.
    """

    def __init__(self, address: str, *, root_certificates: bytes) -> None:
        self._client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=root_certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def nodes(self) -> list[Node]:
        """The devices that are registered."""
        answer = _asked(self._client.ListNodes, ListNodesRequest())
        known = [node for node in answer.nodes_info if not node.unregistered_at]
        return [Node(node.node_id, node.public_key, node.status == "online", node.online_until) for node in known]

    def register(self, public_key: bytes, *, name: str) -> int:
        """Let a device in; returns its node id."""
        return int(_asked(self._client.RegisterNode, RegisterNodeRequest(public_key=public_key, name=name)).node_id)

    def unregister(self, node_id: int) -> None:
        """Let a device in no more."""
        _asked(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node_id))

    def start_run(self) -> int:
        """Start a run, whose bundle holds no code; returns its id."""
        content, _ = build_fab_from_files({"pyproject.toml": _BUNDLE})
        answer = _asked(self._client.StartRun, StartRunRequest(fab=fab_to_proto(Fab("", content, {}))))
        if not answer.HasField("run_id"):
            raise CampaignError("Flower's SuperLink must start a run when asked, it did not; see its log.")
        return int(answer.run_id)

    def stop_runs(self) -> None:
        """End every run that has not ended: those of a server that was killed."""
        for run_id, run in _asked(self._client.ListRuns, ListRunsRequest()).run_dict.items():
            if run.status.status != "finished":
                _asked(self._client.StopRun, StopRunRequest(run_id=run_id))

    def close(self) -> None:
        """End the connection."""
        self._client.close()


def _asked(call: Callable[[Any], _Answer], request: object) -> _Answer:
    try:
        return call(request)
    except httpx.HTTPError as error:
        raise CampaignError(f"Flower's SuperLink must answer on loopback, got {type(error).__name__}.") from None
