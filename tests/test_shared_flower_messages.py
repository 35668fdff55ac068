"""Hostile messages of Flower's: what they promise, unfold to and claim, on a Runtime API made of a dictionary."""

import hashlib
import json
import threading
import time

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto.message_pb2 import ObjectTree, PullObjectResponse
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.run import Run

from server.gate import RejectedReply, check_reply
from shared.flower import messages as flower_messages
from shared.flower.grid import InlineGrid, MeteredGrid
from shared.flower.messages import Coming, WaryGrid
from shared.flower.tasks import Task, TaskError

GOOD = RecordDict({"arrays": ArrayRecord({"a": Array(np.arange(1000.0))}), "config": ConfigRecord({"round": 3})})


def part(kind, body, children=()):
    """A part as Flower spells it: (hash, bytes, children)."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    content = f"{kind} {','.join(child[0] for child in children)} {len(body)}".encode() + b"\x00" + body
    return hashlib.sha256(content).hexdigest(), content, children


def tree_of(made):
    return ObjectTree(object_id=made[0], children=[tree_of(child) for child in made[2]])


def contents_of(made):
    return {made[0]: made[1]} | {name: content for child in made[2] for name, content in contents_of(child).items()}


class Runtime:
    """The calls a grid makes; ``parts`` are there, ``promised`` are not yet, all others never."""

    def __init__(self):
        self.replies, self.parts, self.promised, self.confirmed, self.named = [], {}, set(), [], set()

    def PullMessages(self, request):  # noqa: N802 - Flower's name
        assert not self.named & set(request.message_ids), "Flower would answer that these are lost"
        come, self.replies = self.replies, []
        self.named |= {proto.metadata.reply_to_message_id for proto, _ in come}
        return PullAppMessagesResponse(messages_list=[r[0] for r in come], message_object_trees=[r[1] for r in come])

    def PullObject(self, request):  # noqa: N802 - Flower's name
        name = request.object_id
        content = self.parts.get(name, b"")
        found = bool(content) or name in self.promised
        return PullObjectResponse(object_found=found, object_available=bool(content), object_content=content)

    def ConfirmMessageReceived(self, request):  # noqa: N802 - Flower's name
        self.confirmed.append(request.message_object_id)


@pytest.fixture
def asked():
    """What a server asked of devices 1000 and 1001."""
    InlineGrid(lambda message, context: message, devices=1, run_config={})  # speak as the server
    return [Message(GOOD, dst_node_id=node, message_type="train", ttl=60.0) for node in (1000, 1001)]


@pytest.fixture
def runtime():
    return Runtime()


@pytest.fixture
def grid(runtime, asked):
    found = WaryGrid(runtime, Run.create_empty(1), token="t")
    found._most_bytes = 2**20
    for number, message in enumerate(asked):
        message.metadata.__dict__["_message_id"] = f"{number}" * 64
    return found


def send(runtime, request, content=None, *, made=None, said=None):
    """A reply: honest parts of its own, or ``made`` in their place; ``said`` is what it says inside."""
    reply = Message(content or GOOD, reply_to=request)
    reply.metadata.__dict__["_message_id"] = reply.object_id
    inner = said or reply
    tree = tree_of(made) if made else get_object_tree(inner)
    parts = contents_of(made) if made else {n: p.deflate() for n, p in get_all_nested_objects(inner).items()}
    runtime.replies.append((message_to_proto(remove_content_from_message(reply)), tree))
    runtime.parts |= parts
    return tree, parts


def records_of(**named):
    return part(
        "RecordDict",
        {name: made[0] for name, made in named.items()},
        list({made[0]: made for made in named.values()}.values()),
    )


def array_of(chunks, indices, **changed):
    body = {"dtype": "float64", "shape": [1], "stype": "numpy.ndarray", "arraychunk_ids": indices} | changed
    return part("Array", body, chunks)


@pytest.mark.fault("R2")
def test_after_a_fall_of_the_superlink_nobody_waits_for_what_it_lost(grid, runtime, asked):
    """A reply whose parts were on their way when it fell: they are not sent again, by nobody."""
    tree, _ = send(runtime, asked[0])
    del runtime.parts[tree.object_id]
    runtime.promised.add(tree.object_id)
    assert list(grid.pull_messages([asked[0].metadata.message_id])) == []
    task = Task(None, None, token="t")
    grid._check = task._check
    assert list(grid.pull_messages([asked[0].metadata.message_id])) == []
    task.fallen = lambda: True
    with pytest.raises(TaskError, match="started again") as caught:
        grid.pull_messages([asked[0].metadata.message_id])
    assert caught.value.gone


def test_a_good_reply_is_read_whole(grid, runtime, asked):
    tree, _ = send(runtime, asked[0])
    [reply] = grid.pull_messages(["0" * 64, "1" * 64])
    assert reply.content["arrays"]["a"].numpy().tolist() == list(range(1000))
    assert reply.content["config"]["round"] == 3
    assert reply.metadata.src_node_id == 1000
    assert runtime.confirmed == [tree.object_id]


@pytest.mark.fault("R6", "R9")
def test_a_reply_whose_parts_never_come_keeps_nobody_waiting(grid, runtime, asked):
    tree, _ = send(runtime, asked[0])
    late = tree.children[0].object_id
    runtime.promised.add(late)
    content = runtime.parts.pop(late)
    other, _ = send(runtime, asked[1], RecordDict({"config": ConfigRecord({"round": 4})}))
    started = time.monotonic()
    ids = ["0" * 64, "1" * 64]
    assert [reply.metadata.src_node_id for reply in grid.pull_messages(ids)] == [1001]
    assert list(grid.pull_messages(["0" * 64])) == []
    assert time.monotonic() - started < 1.0
    runtime.parts[late] = content  # it was only slow
    [reply] = grid.pull_messages(["0" * 64])
    assert reply.metadata.src_node_id == 1000
    assert runtime.confirmed == [other.object_id, tree.object_id]


@pytest.mark.fault("R6")
def test_what_is_left_of_a_round_that_is_over_is_let_go(grid, runtime, asked):
    tree, _ = send(runtime, asked[0])
    runtime.promised |= set(runtime.parts)
    runtime.parts.clear()
    assert list(grid.pull_messages(["0" * 64])) == []
    assert list(grid.pull_messages(["2" * 64])) == []
    assert runtime.confirmed == [tree.object_id]


def arrays_of(array, names=("a",)):
    return part("ArrayRecord", dict.fromkeys(names, array[0]), [array])


MANY = [f"a{n}" for n in range(100)]
LONG, FEW = part("ArrayChunk", bytes(100_000)), part("ArrayChunk", bytes(8))
ARRAY, CONFIG = array_of([FEW], [0]), part("ConfigRecord", b"")
RECORDS = {
    "an array in place of records": ARRAY,
    "an unknown kind": part("Bomb", b""),
    "a chunk in place of a record": records_of(arrays=FEW),
    "a chunk a hundred times": records_of(arrays=arrays_of(array_of([LONG], [0] * 100))),
    "an array a hundred times": records_of(arrays=arrays_of(array_of([LONG], [0]), MANY)),
    "a record a hundred times": records_of(**dict.fromkeys(MANY, arrays_of(array_of([LONG], [0])))),
    "too long": records_of(arrays=arrays_of(array_of([part("ArrayChunk", bytes(2**21))], [0]))),
    "too many words": records_of(config=part("ConfigRecord", bytes(2**20))),
    "a dtype that is a number": records_of(arrays=arrays_of(array_of([FEW], [0], dtype=5))),
    "a shape of words": records_of(arrays=arrays_of(array_of([FEW], [0], shape=["x"]))),
    "no such chunk": records_of(arrays=arrays_of(array_of([FEW], [7]))),
    "a record that was not promised": (*records_of(config=CONFIG)[:2], ()),
}


@pytest.mark.fault("R9")
@pytest.mark.parametrize("kind", ["no message", "no records", "damaged", *RECORDS])
def test_a_reply_that_cannot_be_read_is_an_error_of_that_device_alone(grid, runtime, asked, kind):
    reply = message_to_proto(Message(RecordDict(), reply_to=asked[0])).SerializeToString()
    whole = {"no message": CONFIG, "no records": part("Message", reply), "damaged": part("Message", b"\xff" * 3)}
    send(runtime, asked[0], made=whole.get(kind) or part("Message", reply, [RECORDS[kind]]))
    send(runtime, asked[1])
    replies = {r.metadata.src_node_id: r for r in MeteredGrid(grid).pull_messages(["0" * 64, "1" * 64])}
    assert not replies[1001].has_error()
    assert replies[1000].has_error()
    assert not replies[1000].error.reason
    assert len(runtime.confirmed) == 2


@pytest.mark.fault("R9")
def test_too_many_parts_are_not_fetched(grid, runtime, asked, monkeypatch):
    monkeypatch.setattr(flower_messages, "_MOST_PARTS", 50)
    made = records_of(**{f"c{n}": part("ConfigRecord", str(n).encode()) for n in range(60)})
    send(runtime, asked[0], made=made)
    monkeypatch.setattr(runtime, "PullObject", None)
    [reply] = grid.pull_messages(["0" * 64])
    assert reply.has_error()


@pytest.mark.fault("R8")
def test_a_reply_speaks_in_nobody_elses_name(grid, runtime, asked):
    other = Message(GOOD, reply_to=asked[1])
    other.metadata.__dict__["_message_id"] = other.object_id
    send(runtime, asked[0], said=other)
    [reply] = grid.pull_messages(["0" * 64, "1" * 64])
    assert reply.metadata.src_node_id == 1000
    assert reply.metadata.reply_to_message_id == "0" * 64


@pytest.mark.fault("R9")
def test_what_a_device_says_of_an_error_ends_no_campaign(grid, runtime, asked):
    reason = "<class 'ray.exceptions.ActorDiedError'>:<'The actor died.'>"
    error = Message(Error(code=5, reason=reason), reply_to=asked[0])
    error.metadata.__dict__["_message_id"] = error.object_id
    send(runtime, asked[0], said=error)
    [reply] = MeteredGrid(grid).pull_messages(["0" * 64])
    assert reply.has_error()
    assert not reply.error.reason
    with pytest.raises(RejectedReply, match="ERROR"):
        check_reply(reply, policy=None, policy_sha256="", round_number=3)


@pytest.mark.fault("R14")
def test_a_device_waits_for_a_server_s_message_as_long_as_it_is_told(runtime, asked):
    tree, parts = send(runtime, asked[0])
    runtime.parts.clear()
    runtime.promised |= set(parts)
    coming = Coming(runtime, asked[0], tree, node=1000, most_bytes=2**20)
    started = time.monotonic()
    assert not coming.fetch(within_s=0.1, given_up=threading.Event())
    assert time.monotonic() - started < 3.0
    lost = threading.Event()
    lost.set()
    assert not coming.fetch(within_s=60.0, given_up=lost)
    runtime.parts |= parts
    assert coming.fetch(within_s=60.0, given_up=threading.Event())
    assert coming.message().content["config"]["round"] == 3
