"""A device of its own making: an enrolled key that speaks Flower's fleet calls by hand, and may lie in all of them."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest, PushMessagesRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

_BEAT_S = 600  # what it promises between heartbeats
_POLL_S = 1.0


@dataclass
class WireDevice:
    """Speaks for one enrolled key; ``behave`` is called with every message and does whatever it likes about it.

    Attributes:
        key: File of the device's private key.
        address: host:port of the front.
        certificate: Of the server's authority, PEM.
        behave: Given this device and a message with its content.
        said: What went wrong in ``behave``, by type; nothing should.
        heard: Every message, as it came.
        node_id: As the server knows it, once it is online.
    """

    key: Path
    address: str
    certificate: bytes
    behave: Callable[["WireDevice", Message], object]
    said: list[str] = field(default_factory=list)
    heard: list[Message] = field(default_factory=list)
    node_id: int = 0

    def start(self) -> None:
        """Come online, and answer in a thread of its own until ``stop``."""
        private = load_ssh_private_key(self.key.read_bytes(), None)
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        self._public = public_key_to_bytes(private.public_key())
        self.client = FleetHttpClient.from_server_address(
            self.address,
            False,
            self.certificate,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(private, private.public_key()),
            ],
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"wire {self.key.parent.name}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Fall silent."""
        self._stop.set()
        self._thread.join(20.0)
        self.client.close()

    def reply(self, message: Message, content: RecordDict | Error, *, metadata: Any = None) -> bool:
        """Answer a message as an honest device's SuperNode would; says whether the server wanted the parts."""
        answer = Message(content, reply_to=message)
        if metadata is not None:
            answer = make_message(metadata=metadata, content=content)
        answer.metadata.__dict__["_message_id"] = answer.object_id
        parts = {name: part.deflate() for name, part in get_all_nested_objects(answer).items()}
        return self.push(answer, get_object_tree(answer), parts)

    def push(self, answer: Message, tree: ObjectTree, parts: dict[str, bytes]) -> bool:
        """Announce a message with this tree of parts, and hand over the parts it is asked for."""
        session, wanted = self.announce(answer, tree)
        for name in wanted:
            if name in parts:
                self.push_part(answer.metadata.run_id, session, name, parts[name])
        return bool(wanted)

    def announce(self, answer: Message, tree: ObjectTree) -> tuple[str, list[str]]:
        """Announce a message; the session to hand its parts over in, and those the server asks for."""
        pushed = self.client.PushMessages(
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(remove_content_from_message(answer))],
                message_object_trees=[tree],
                clientapp_runtime_list=[0.0],
            )
        )
        return pushed.session_id, list(pushed.objects_to_push)

    def push_part(self, run_id: int, session: str, name: str, content: bytes) -> bool:
        """Hand over one part; says whether it was kept."""
        request = PushObjectRequest(
            node=self._node, run_id=run_id, object_id=name, object_content=content, session_id=session
        )
        return bool(self.client.PushObject(request).stored)

    @property
    def _node(self) -> Node:
        return Node(node_id=self.node_id)

    def _run(self) -> None:
        beat = 0.0
        while not self._stop.wait(_POLL_S):
            try:
                if not self.node_id:
                    asked = ActivateNodeRequest(public_key=self._public, heartbeat_interval=_BEAT_S)
                    self.node_id = self.client.ActivateNode(asked).node_id
                if time.monotonic() > beat:
                    self.client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=_BEAT_S))
                    beat = time.monotonic() + _BEAT_S / 4
                message = self._pull()
            except httpx.HTTPError:  # the server starts, or has ended
                continue
            if message is not None:
                self.heard.append(message)
                try:
                    self.behave(self, message)
                except Exception as error:
                    self.said.append(f"{type(error).__name__}: {error}")

    def _pull(self) -> Message | None:
        found = self.client.PullMessages(PullMessagesRequest(node=self._node))
        if not found.messages_list:
            return None
        envelope, tree = message_from_proto(found.messages_list[0]), found.message_object_trees[0]
        names = {part.object_id for part in iterate_object_tree(tree)}
        run_id, parts = envelope.metadata.run_id, {}
        while missing := names - parts.keys():
            for name in missing:
                part = self.client.PullObject(PullObjectRequest(node=self._node, run_id=run_id, object_id=name))
                if part.object_available:
                    parts[name] = part.object_content
        self.client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._node, run_id=run_id, message_object_id=tree.object_id)
        )
        told = inflate_object_from_contents(tree.object_id, parts)
        envelope.metadata.__dict__["_message_id"] = tree.object_id
        return make_message(metadata=envelope.metadata, content=told.content)
