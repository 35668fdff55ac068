"""Messages of Flower's that may be hostile: fetched part by part, within bounds of size and time, or not at all.

A message is a tree of parts, each known by its hash. Whoever sends one can promise parts that never come, make a few
parts stand for terabytes, or claim to be somebody else; Flower's own reader waits for hours, unfolds it all and
believes it.

Written against flwr 1.41, whose parts are private there.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.message.arraychunk import ArrayChunk
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PullAppMessagesRequest
from flwr.supercore.constant import HEAD_BODY_DIVIDER
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_head_values_from_object_content,
    iterate_object_tree,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectUnavailableError, inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from shared.errors import CampaignError

_TURN_S = 2.0  # spent on the parts of one reply before the next has its turn
_AGAIN_S = 1.0
_MOST_PARTS = 4096
_MOST_WORDS_BYTES = 2**20  # of all but the values of arrays
_CHUNK = f"{ArrayChunk.__qualname__} ".encode()  # how a part begins that is values and nothing else

_log = logging.getLogger(__name__)


class Coming:
    """A message on its way, whose parts are fetched one by one; who it is from and for is said by the envelope.

    Args:
        client: Where the parts are.
        envelope: Of a message without its content, which the Runtime API has checked.
        tree: The parts it promises.
        node: Who fetches.
        most_bytes: Of the parts, and of the message they make.
    """

    def __init__(
        self, client: RuntimeHttpClient, envelope: Message, tree: ObjectTree, *, node: int, most_bytes: int
    ) -> None:
        self.metadata = envelope.metadata
        self.metadata.__dict__["_message_id"] = tree.object_id
        self._client, self._root, self._node, self._most_bytes = client, tree.object_id, Node(node_id=node), most_bytes
        self._pull = make_pull_object_fn_protobuf(client.PullObject, self._node, envelope.metadata.run_id)
        self._missing = list(dict.fromkeys(part.object_id for part in iterate_object_tree(tree)))
        self._parts: dict[str, bytes] = {}
        self._bytes = 0

    def fetch(self, *, within_s: float, given_up: threading.Event | None = None) -> bool:
        """Fetch what is there; says whether that is all.

        Args:
            within_s: How long to go on; without ``given_up`` a part that is not there yet ends it at once.
            given_up: Ends the waiting for such parts.

        Raises:
            ValueError: It is too much.
            TaskError: Nobody answers.
            ObjectPullError: It will never be there.
        """
        if len(self._missing) + len(self._parts) > _MOST_PARTS:
            raise ValueError("a message has too many parts")
        until = time.monotonic() + within_s
        while self._missing and time.monotonic() < until:
            try:
                part = self._pull(self._missing[-1])
            except ObjectUnavailableError:
                if given_up is None or given_up.wait(_AGAIN_S):
                    break
                continue
            self._bytes += len(part)
            if self._bytes > self._most_bytes:
                raise ValueError("the parts of a message are too long")
            self._parts[self._missing.pop()] = part
        return not self._missing

    def message(self) -> Message:
        """What the parts make.

        Raises:
            Exception: Of any kind: they make no message with records.
        """
        if sum(len(part) for part in self._parts.values() if not part.startswith(_CHUNK)) > _MOST_WORDS_BYTES:
            raise ValueError("a message holds too much beside the values of its arrays")
        if self._unfolded(self._root, {}) > self._most_bytes:
            raise ValueError("a message unfolds to more than its parts")
        said = inflate_object_from_contents(self._root, self._parts)
        if not isinstance(said, Message):
            raise TypeError("the parts make no message")
        if said.has_error():
            return make_message(metadata=self.metadata, error=said.error)
        if not isinstance(said.content, RecordDict):
            raise TypeError("a message must hold records")
        return make_message(metadata=self.metadata, content=said.content)

    def confirm(self) -> None:
        """Let go of the parts on the other side."""
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self._node, run_id=self.metadata.run_id, message_object_id=self._root)
        )

    def _unfolded(self, name: str, known: dict[str, int]) -> int:
        """Bytes of a part with all it refers to, as often as it does: a few may stand for terabytes."""
        if name not in known:
            content = self._parts[name]
            kind, children, _ = get_object_head_values_from_object_content(content)
            if kind == Array.__qualname__:
                children = [children[index] for index in json.loads(_body(content))["arraychunk_ids"]]
            elif kind in (ArrayRecord.__qualname__, RecordDict.__qualname__):
                children = list(json.loads(_body(content)).values())
            known[name] = len(content) + sum(self._unfolded(child, known) for child in children)
        return known[name]


def parts_of(message: Message) -> dict[str, bytes]:
    """The parts of a message as they travel, by their hashes."""
    return {name: part.deflate() for name, part in get_all_nested_objects(message).items()}


class WaryGrid(HttpGrid):
    """Flower's grid, for devices that may be hostile.

    Args:
        client: Of the Runtime API.
        run: The task's.
        token: The task's.
        check: Called before replies are looked for; what it raises ends the waiting.
        asking: Called before messages are sent, with how many bytes a reply may have.

    Guarantee:
        Whatever a device sends, it comes out as records in the name of the device that was asked, as an error without
        text, or not at all; no other device's reply waits for it.
    """

    def __init__(
        self,
        client: RuntimeHttpClient,
        run: Run,
        *,
        token: str,
        check: Callable[[], object] = lambda: None,
        asking: Callable[[int], object] = lambda _: None,
    ) -> None:
        super().__init__(token=token)
        self._check, self._asking = check, asking
        self._runtime = self._client = client  # ours: it passes by proxies and does not end the process
        self.set_run(run)
        self._coming: dict[str, Coming] = {}  # by what it replies to
        self._most_bytes = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; a reply may be as long as the longest of them."""
        messages = list(messages)
        longest = max((message_to_proto(message).ByteSize() for message in messages), default=0)
        self._most_bytes = longest + _MOST_WORDS_BYTES
        self._asking(self._most_bytes)
        return super().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are all there; what is on its way is looked for again the next time."""
        self._check()
        wanted = set(message_ids)
        if unheard := wanted - self._coming.keys():  # Flower names a reply once, and calls it lost when asked again
            self._hear(unheard)
        for late in self._coming.keys() - wanted:  # of a round that is over
            self._coming.pop(late).confirm()
        found = {asked: message for asked, coming in self._coming.items() if (message := _read(coming)) is not None}
        for asked in found:
            del self._coming[asked]
        return list(found.values())

    def _hear(self, message_ids: set[str]) -> None:
        reply = self._runtime.PullMessages(PullAppMessagesRequest(message_ids=message_ids))
        for proto, tree in zip(reply.messages_list, reply.message_object_trees, strict=True):
            envelope = message_from_proto(proto)
            self._coming[envelope.metadata.reply_to_message_id] = Coming(
                self._runtime, envelope, tree, node=self.node.node_id, most_bytes=self._most_bytes
            )


def _read(coming: "Coming") -> Message | None:
    """A device's message, an error without text in its place, or None where it is still on its way."""
    try:
        if not coming.fetch(within_s=_TURN_S):
            return None
        message = coming.message()
        message_to_proto(message)  # whoever counts its bytes can do so
        if not message.has_error():
            coming.confirm()
            return message
    except CampaignError:  # nobody answers: the message is not to blame
        raise
    except Exception as error:  # whatever a device can put into a message
        _log.warning("a reply could not be read: %s", type(error).__name__)
    coming.confirm()
    return make_message(metadata=coming.metadata, error=Error(code=ErrorCode.UNKNOWN, reason=""))


def _body(content: bytes) -> bytes:
    return content[content.index(HEAD_BODY_DIVIDER) + len(HEAD_BODY_DIVIDER) :]
