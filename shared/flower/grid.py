"""Everything that touches flwr's internals: the grids, who sits where, and the switches that keep Flower silent.

An engine runs ``main(grid)``: ``run_inline`` here, with every device in this process, and ``run_ray`` in
``shared/flower/ray_engine.py``. What ``main`` raises comes out as it is.

Written against flwr 1.41; ``TaskIdentity``, the protos of messages and their ids are private there, which is why
they appear in this module and in no other.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from uuid import uuid4

# Before flwr is imported: it reads these once.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.common.serde import message_from_proto, message_to_proto, recorddict_from_proto, recorddict_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from shared.errors import CampaignError
from shared.protocol import wire

SEAT_QUERY = "query.seat"

Main = Callable[["Metered"], None]
Device = Callable[[Message, Context], Message]  # a ClientApp, or anything that is called like one

_SEAT = "seat"
# Looking for replies costs Flower time for each that is awaited, so the more there are the rarer we look.
_POLL_S, _POLL_S_PER_REPLY, _POLL_MAX_S = 0.03, 0.0002, 0.2
_COLOUR = re.compile("\x1b\\[[0-9;]*m")
_RUN_ID = 1
_SERVER_NODE = 1
_FIRST_NODE = 1000


class Metered(Grid):
    """A grid whose traffic is counted.

    Attributes:
        on_reply: Called after every reply, for a progress bar.
        bytes_down: Bytes of all requests so far.
        bytes_up: Bytes of all replies so far.
        messages: Requests so far.
        wall_s: Time spent in ``send_and_receive`` so far, the devices' own work included.
    """

    def __init__(self) -> None:
        self.on_reply: Callable[[], object] | None = None
        self.bytes_down = self.bytes_up = self.messages = 0
        self.wall_s = 0.0

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

    def _count_reply(self, size: int) -> None:
        self.bytes_up += size
        if self.on_reply:
            self.on_reply()


class InlineGrid(Metered):
    """Flower's grid in one process: the same ServerApp and ClientApp, no sockets, no Ray.

    Every message is serialised and parsed as on a network, so that what arrives is what the wire would carry and its
    bytes are counted.

    Args:
        client_app: The devices' app.
        devices: How many there are; device i has ``partition-id`` i.
        run_config: Flower's run config for server and devices.

    Attributes:
        seats: node id -> ``partition-id``.
        on_wire: Called with the bytes of every request and of its reply, in an audit; see ``read_wire``.
    """

    def __init__(
        self,
        client_app: Device,
        *,
        devices: int,
        run_config: UserConfig,
    ) -> None:
        super().__init__()
        _become_server()
        self._client_app = client_app
        self.on_wire: Callable[[bytes, bytes], object] | None = None
        self.seats = {_FIRST_NODE + i: i for i in range(devices)}
        self._run = Run.create_empty(_RUN_ID)
        self._replies: dict[str, Message] = {}
        self._contexts = _Contexts(devices, run_config)

    def set_run(self, run: Run) -> None:
        """Set the run this grid works for."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid works for."""
        return self._run

    def get_node_ids(self) -> Iterable[int]:
        """All devices; they are always there."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Deliver each message to its device at once and keep the reply."""
        return [self._deliver(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Hand out the replies to these messages, each once."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Deliver messages one by one, each when its reply is asked for, so that no more than one is ever held.

        Devices answer at once, so ``timeout`` is never reached.
        """
        del timeout
        waiting = iter(messages)
        while True:
            started = time.perf_counter()
            sent = self.push_messages(islice(waiting, 1))
            replies = list(self.pull_messages(sent))
            self.wall_s += time.perf_counter() - started
            if not sent:
                return
            yield from replies

    def _deliver(self, message: Message) -> str:
        message_id = str(uuid4())
        message.metadata.__dict__["_message_id"] = message_id
        request, sent = _over_the_wire(message)
        self.bytes_down += len(sent)
        with self._contexts.lent(request.metadata.dst_node_id) as context:
            TaskIdentity.node_id = context.node_id
            try:
                reply = self._client_app(request, context)
            finally:
                _become_server()
        reply.metadata.__dict__["_message_id"] = str(uuid4())
        self._replies[message_id], answered = _over_the_wire(reply)
        self.messages += 1
        self._count_reply(len(answered))
        if self.on_wire:
            self.on_wire(sent, answered)
        return message_id


class _Contexts(Mapping[int, Context]):
    """The contexts of an inline grid's devices, by node id.

    One that was looked up stays as it is. Of the others only what a device keeps is held, in bytes, from one message to
    the next: a simulation may have hundreds of thousands.
    """

    def __init__(self, devices: int, run_config: UserConfig) -> None:
        self._devices, self._run_config = devices, run_config
        self._held: dict[int, Context] = {}
        self._states: dict[int, bytes] = {}

    def __getitem__(self, node: int) -> Context:
        if node not in self._held:
            self._held[node] = self._open(node)
        return self._held[node]

    def __iter__(self) -> Iterator[int]:
        return iter(range(_FIRST_NODE, _FIRST_NODE + self._devices))

    def __len__(self) -> int:
        return self._devices

    @contextmanager
    def lent(self, node: int) -> Iterator[Context]:
        """A device's context for one message."""
        if node in self._held:
            yield self._held[node]
            return
        context = self._open(node)
        try:
            yield context
        finally:
            if context.state:
                self._states[node] = recorddict_to_proto(context.state).SerializeToString()

    def _open(self, node: int) -> Context:
        seat = node - _FIRST_NODE
        if not 0 <= seat < self._devices:
            raise KeyError(node)
        return Context(
            run_id=_RUN_ID,
            node_id=node,
            node_config={"partition-id": seat, "num-partitions": self._devices, "simulation": True},
            state=recorddict_from_proto(ProtoRecordDict.FromString(self._states.pop(node, b""))),
            run_config=self._run_config,
        )


def _become_server() -> None:
    """Tell flwr's messages who is speaking; outside a Flower process nobody else does."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, _RUN_ID, _SERVER_NODE


def _over_the_wire(message: Message) -> tuple[Message, bytes]:
    """Serialise and parse a message; returns what arrives and its bytes."""
    payload = message_to_proto(message).SerializeToString()
    return read_wire(payload), payload


def read_wire(payload: bytes) -> Message:
    """The message in the bytes that an inline grid carried."""
    return message_from_proto(ProtoMessage.FromString(payload))


def round_trip_bytes(request: RecordDict, reply: RecordDict) -> tuple[int, int]:
    """Bytes of a request and of its reply on the wire, envelopes included; whoever speaks goes on speaking."""
    speaker = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    _become_server()
    try:
        message = Message(request, dst_node_id=_FIRST_NODE, message_type="train", ttl=1.0, group_id="1")
        message.metadata.__dict__["_message_id"] = str(uuid4())
        answer = Message(reply, reply_to=message)
        answer.metadata.__dict__["_message_id"] = str(uuid4())
        return len(_over_the_wire(message)[1]), len(_over_the_wire(answer)[1])
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = speaker


def run_inline(main: Main, client_app: Device, *, devices: int, run_config: UserConfig) -> None:
    """Run ``main`` over an inline grid; what it raises comes through.

    Args:
        main: The server's part, a function of the grid.
        client_app: The devices' app.
        devices: How many there are.
        run_config: What the devices' app finds as its run config.
    """
    main(InlineGrid(client_app, devices=devices, run_config=run_config))


class MeteredGrid(Metered):
    """Any other grid, with every reply reported when it comes.

    Args:
        grid: The grid that does the work.
        check: Called while waiting; what it raises ends the waiting.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        check: Callable[[], object] | None = None,
    ) -> None:
        super().__init__()
        self._grid, self._check = grid, check

    def set_run(self, run: Run) -> None:
        """Set the run this grid works for."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The run this grid works for."""
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """The devices that are there now."""
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; one that was not accepted has no id in the answer."""
        messages = list(messages)
        ids = list(self._grid.push_messages(messages))
        self.messages += len(messages)
        self.bytes_down += sum(message_to_proto(message).ByteSize() for message in messages)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch the replies that have come to these messages.

        Raises:
            CampaignError: A worker of the engine died: its pool would go on giving the dead one work.
        """
        replies = list(self._grid.pull_messages(message_ids))
        for reply in replies:
            if reply.has_error() and (reason := _worker_death(reply.error.reason)):
                raise CampaignError(
                    f"every worker of engine ray must live until the campaign ends; one died: {reason} If memory ran "
                    "out, use fewer workers."
                )
            self._count_reply(message_to_proto(reply).ByteSize())
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and collect replies until all have come or ``timeout`` seconds have passed."""
        started = time.perf_counter()
        waiting, replies = set(self.push_messages(messages)), list[Message]()
        while waiting:
            come = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in come}
            replies += come
            if not waiting or (timeout is not None and time.perf_counter() - started > timeout):
                break
            if self._check:
                self._check()
            time.sleep(min(_POLL_MAX_S, _POLL_S + len(waiting) * _POLL_S_PER_REPLY))
        self.wall_s += time.perf_counter() - started
        return replies


def metered(grid: Grid) -> Metered:
    """A grid that counts; one that does already is left as it is."""
    return grid if isinstance(grid, Metered) else MeteredGrid(grid)


def _worker_death(reason: str | None) -> str | None:
    """What Ray says of a worker that died, None for an error the ClientApp raised."""
    told = reason or ""
    if not told.startswith("<class 'ray.exceptions.") or told.startswith("<class 'ray.exceptions.RayTaskError"):
        return None
    return one_line(told.partition(":<'")[2].removesuffix("'>"))


def one_line(text: object, *, length: int = 300) -> str:
    """What somebody else's error says, fit for a message of ours."""
    line = " ".join(_COLOUR.sub("", str(text)).split())
    return line if len(line) <= length else line[:length] + "…"


def answer_seat(message: Message, context: Context) -> Message:
    """A simulated device's answer to ``SEAT_QUERY``: its partition-id; a real one refuses."""
    if not in_simulation(context):
        return Message(wire.pack_refusal("NOT_A_SIMULATION"), reply_to=message)
    seat = ConfigRecord({_SEAT: int(context.node_config["partition-id"])})
    return Message(RecordDict({_SEAT: seat}), reply_to=message)


def seats(grid: Grid, *, devices: int, timeout_s: float = 600.0) -> dict[int, int]:
    """Which node plays which device of a simulation: node id -> partition-id.

    Args:
        grid: Any grid of simulated devices; over others than the inline one every node is asked, once.
        devices: How many there must be.
        timeout_s: How long to wait for them to be there, and again for their answers.

    Raises:
        CampaignError: Fewer devices, or an answer that is not the seat of one of them.
    """
    if isinstance(grid, InlineGrid):
        return dict(grid.seats)
    deadline = time.monotonic() + timeout_s
    while len(nodes := sorted(grid.get_node_ids())) < devices and time.monotonic() < deadline:
        time.sleep(0.05)
    questions = [
        Message(RecordDict(), dst_node_id=node, message_type=SEAT_QUERY, ttl=timeout_s, group_id="") for node in nodes
    ]
    node_of = {}  # an error's sender is the SuperLink: who was asked is known by the question
    replies = list(grid.send_and_receive(questions, timeout=timeout_s))
    for question in questions:
        node_of[question.metadata.message_id] = question.metadata.dst_node_id
    found = {node_of[reply.metadata.reply_to_message_id]: _seat_in(reply) for reply in replies}
    if sorted(found.values(), key=str) != sorted(range(devices), key=str):
        wrong = [str(seat) for seat in found.values() if not isinstance(seat, int)]
        raise CampaignError(
            f"a simulation of {devices} devices needs an answer from each, with seats 0 to {devices - 1}; got "
            f"{len(found) - len(wrong)} seats from {len(nodes)} nodes{'; ' + wrong[0] if wrong else ''}."
        )
    return {node: seat for node, seat in found.items() if isinstance(seat, int)}


def _seat_in(reply: Message) -> int | str:
    """The seat of an answer, or what is in its place."""
    if reply.has_error():
        return one_line(reply.error.reason)
    record = reply.content.get(_SEAT)
    seat = record.get(_SEAT) if isinstance(record, ConfigRecord) else None
    return seat if type(seat) is int else one_line(reply.content)


def in_simulation(context: Context) -> bool:
    """Whether this process plays a device of a simulation: on the inline grid, or as a worker of Flower's engine.

    Guarantee:
        A property of this process and of its owner's node config: no message and no run config can make it true.
    """
    return context.node_config.get("simulation") is True or _is_ray_worker()


def _is_ray_worker() -> bool:
    """Whether this process is a worker of Flower's simulation engine; imports nothing: a device stays without Ray."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return False
    context = ray.get_runtime_context()
    if context.worker.mode != ray.WORKER_MODE or context.get_actor_id() is None:
        return False
    name: str = context.current_actor._ray_actor_creation_function_descriptor.class_name
    return name.rpartition(".")[2] == "ClientAppActor"
