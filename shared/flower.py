"""Everything that touches flwr's internals: the inline grid, and the switches that keep Flower from the network.

Written against flwr 1.41; ``TaskIdentity``, ``message_to_proto`` and the message ids are private there, which is why
they appear in this module and in no other.
"""

import os
import time
from collections.abc import Callable, Iterable
from uuid import uuid4

# Before flwr is imported: it reads these once.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from flwr.app import Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

_RUN_ID = 1
_SERVER_NODE = 1
_FIRST_NODE = 1000


class InlineGrid(Grid):
    """Flower's grid in one process: the same ServerApp and ClientApp, no sockets, no Ray.

    Every message is serialised and parsed as on a network, so that what arrives is what the wire would carry and its
    bytes are counted.

    Args:
        client_app: The devices' app.
        devices: How many there are; device i has ``partition-id`` i.
        run_config: Flower's run config for server and devices.

    Attributes:
        on_reply: Called after every reply, for a progress bar.
        bytes_down: Bytes of all requests so far.
        bytes_up: Bytes of all replies so far.
        messages: Requests so far.
        wall_s: Time spent in this grid so far, the devices' own work included.
    """

    def __init__(
        self,
        client_app: ClientApp,
        *,
        devices: int,
        run_config: UserConfig,
    ) -> None:
        _become_server()
        self._client_app = client_app
        self.on_reply: Callable[[], object] | None = None
        self._run = Run.create_empty(_RUN_ID)
        self._replies: dict[str, Message] = {}
        self._contexts = {
            _FIRST_NODE + i: Context(
                run_id=_RUN_ID,
                node_id=_FIRST_NODE + i,
                node_config={"partition-id": i, "num-partitions": devices, "simulation": True},
                state=RecordDict(),
                run_config=run_config,
            )
            for i in range(devices)
        }
        self.bytes_down = self.bytes_up = self.messages = 0
        self.wall_s = 0.0

    def set_run(self, run: Run) -> None:
        """Set the run this grid works for."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid works for."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message in Flower's older way."""
        return Message(content, dst_node_id=dst_node_id, message_type=message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All devices; they are always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Deliver each message to its device at once and keep the reply."""
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the replies to these messages, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Deliver messages and return their replies; devices answer at once, so ``timeout`` is never reached."""
        del timeout
        started = time.perf_counter()
        replies = self.pull_messages(self.push_messages(messages))
        self.wall_s += time.perf_counter() - started
        return replies

    def _deliver(self, message: Message) -> str:
        message_id = str(uuid4())
        message.metadata.__dict__["_message_id"] = message_id
        request, size = _over_the_wire(message)
        self.bytes_down += size
        context = self._contexts[request.metadata.dst_node_id]
        TaskIdentity.node_id = context.node_id
        try:
            reply = self._client_app(request, context)
        finally:
            _become_server()
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        self._replies[message_id], size = _over_the_wire(reply)
        self.bytes_up += size
        self.messages += 1
        if self.on_reply:
            self.on_reply()
        return message_id


def _become_server() -> None:
    """Tell flwr's messages who is speaking; outside a Flower process nobody else does."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, _RUN_ID, _SERVER_NODE


def _over_the_wire(message: Message) -> tuple[Message, int]:
    """Serialise and parse a message; returns what arrives and its size in bytes."""
    proto = message_to_proto(message)
    payload = proto.SerializeToString()
    return message_from_proto(type(proto).FromString(payload)), len(payload)


def run_inline(server_app: ServerApp, grid: InlineGrid, *, run_config: UserConfig) -> None:
    """Run a ServerApp over an inline grid; what it raises comes through."""
    context = Context(run_id=_RUN_ID, node_id=_SERVER_NODE, node_config={}, state=RecordDict(), run_config=run_config)
    server_app(grid, context)


def round_trip_bytes(request: RecordDict, reply: RecordDict) -> tuple[int, int]:
    """Bytes of a request and of its reply on the wire, envelopes included."""
    _become_server()
    message = Message(request, dst_node_id=_FIRST_NODE, message_type="train", ttl=1.0, group_id="1")
    message.metadata.__dict__["_message_id"] = str(uuid4())
    answer = Message(reply, reply_to=message)
    answer.metadata.__dict__["_message_id"] = str(uuid4())
    return _over_the_wire(message)[1], _over_the_wire(answer)[1]
