"""Take Flower's tasks and do them in this process, for a program that stays resident on a device or on a server.

Flower would start a process for every message and run the bundle of code that came with it. Here the bundle arrives in
the answer to ``PullTaskInput``, because Flower puts it there, and is dropped unopened: nothing of it is unpacked,
looked at or imported.

Written against flwr 1.41, whose Runtime API (HTTP on loopback, behind a shared secret) is private. ``TaskIdentity``,
which says who is speaking, is one for the whole process, so a process does one task at a time.
"""

import logging
import os
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal

import httpx

# Before flwr is imported: it reads these once.
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"

from flwr.app import Context, Error, Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import context_from_proto, message_from_proto, message_to_proto, run_from_proto
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    push_objects,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.run import Run
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from shared.errors import CampaignError
from shared.flower.messages import Coming, WaryGrid

Kind = Literal["client", "server"]

# A SuperNode waits for an answer to whatever kind of task a server makes of its message.
_TYPES = {"client": [TaskType.CLIENT_APP, TaskType.AGENT_APP], "server": [TaskType.SERVER_APP]}
_TIMEOUT_S = 30.0
_GONE = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)  # another took the task, it ran out, or its run is over
_PASSING = (  # Flower's database may be locked for a while: 500
    httpx.codes.INTERNAL_SERVER_ERROR,
    httpx.codes.BAD_GATEWAY,
    httpx.codes.SERVICE_UNAVAILABLE,
    httpx.codes.GATEWAY_TIMEOUT,
)

_ARRIVE_S = 300.0  # what a server's message promises must be there by then
_MOST_BYTES = 256 * 2**20  # of a server's message

_log = logging.getLogger(__name__)


class TaskError(CampaignError):
    """Flower's Runtime API did not do what was asked of it.

    Args:
        text: What must hold, what was found.
        gone: Whether the task, its run or the secret is no longer accepted; trying again does not help.
    """

    def __init__(self, text: str, *, gone: bool = False) -> None:
        super().__init__(text)
        self.gone = gone


class StalledError(TaskError):
    """What a message promises did not come; whoever received the message goes on waiting for it, and for hours."""


class Tasks:
    """Where tasks are taken from: the Runtime API of a SuperNode or of a SuperLink.

    Args:
        address: host:port, on loopback.
        secret: The content of the file given as ``--superexec-auth-secret-file``.
        kind: Tasks of which app.
        root_certificates: PEM; None speaks HTTP without TLS, as a SuperNode on loopback does.
        patience_s: How long a call of a task is repeated while nobody answers.
    """

    def __init__(
        self,
        address: str,
        *,
        secret: bytes,
        kind: Kind,
        root_certificates: bytes | None = None,
        patience_s: float = 30.0,
    ) -> None:
        self._kind = kind
        self._patience_s = patience_s
        self._base_url = f"{'https' if root_certificates else 'http'}://{address}"
        self._trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # nobody, but whom it is told; made once, for it is slow
        if root_certificates:
            self._trust.load_verify_locations(cadata=root_certificates.decode("ascii"))
        authority = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        self._client = self._connect(authority, patience_s=0.0)

    def take(self) -> "Task | None":
        """The next task, its input received and its heartbeat started; None where nothing waits.

        A message that cannot be read is answered with an error and counts as nothing.

        Raises:
            TaskError: Nobody answers (``gone`` is false: try again), or the secret is not accepted.
            StalledError: A message does not arrive, and nothing else will until the SuperNode is started again.
        """
        reply = self._client.AcquireTask(AcquireTaskRequest(supported_task_types=_TYPES[self._kind]))
        if not (reply.HasField("task") and reply.token):
            return None
        token = RuntimeTokenHttpInterceptor(reply.token)
        client = self._connect(token, patience_s=self._patience_s)
        pulse = self._connect(token, patience_s=0.0)
        task = Task(client, pulse, token=reply.token)
        try:
            task._receive()
            return task if self._kind == "server" or task._receive_message() else None
        except BaseException:
            task.close()
            raise

    def close(self) -> None:
        """Give up the connection."""
        self._client.close()

    def _connect(self, *interceptors: ProtobufClientInterceptor, patience_s: float) -> RuntimeHttpClient:
        client = RuntimeHttpClient(
            self._base_url,
            interceptors=[RuntimeVersionHttpInterceptor(component_name=f"flwr-{self._kind}app"), *interceptors],
            verify=self._trust,
            retry_invoker=_Invoker(patience_s),
        )
        client._client.close()  # it would ask the environment's proxy for loopback
        client._client = httpx.Client(verify=self._trust, timeout=_TIMEOUT_S, trust_env=False)
        return client


class _Invoker(RetryInvoker):
    """Repeat what may pass, and end with an error of ours; Flower's own ends the process where a token ran out."""

    def __init__(self, patience_s: float) -> None:
        super().__init__(
            lambda: exponential(max_delay=2),
            httpx.HTTPError,
            max_tries=None if patience_s > 0 else 1,
            max_time=patience_s or None,
            should_giveup=lambda error: (
                isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in _PASSING
            ),
        )

    def invoke(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call until it succeeds or patience ends."""
        try:
            return super().invoke(target, *args, **kwargs)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            raise TaskError(
                f"Flower's Runtime API must accept {error.request.url.path}, got HTTP status {status}.",
                gone=status in _GONE,
            ) from None
        except httpx.HTTPError as error:
            raise TaskError(f"Flower's Runtime API must answer, got {type(error).__name__}.") from None


class Task:
    """One task, from its being taken to one of ``answer``, ``fail``, ``finish`` or ``close``.

    Attributes:
        run: The run it belongs to.
        context: Of the node.
        message: What a server sent; of a client's task only.
        token: What the Runtime API knows the task by.
        lost: Set when the Runtime API knows the task no more: its result is not wanted.
        fallen: Says of a server's task whether the SuperLink was started again since; whoever keeps it up knows.
        asking: Told by a server's task, before devices are asked, how many bytes a reply may have.
    """

    run: Run
    context: Context
    message: Message

    def __init__(self, client: RuntimeHttpClient, pulse: RuntimeHttpClient, *, token: str) -> None:
        self._client, self._pulse = client, pulse
        self.token = token
        self.fallen: Callable[[], bool] = lambda: False
        self.asking: Callable[[int], object] = lambda _: None
        self.lost = threading.Event()
        self._heartbeat = HeartbeatSender(self._beat)

    def grid(self) -> Grid:
        """Flower's grid of a server's task; it ends with the task.

        Where nobody answers it raises ``TaskError``, and where the SuperLink was started again: a message that was
        being handed over when it fell, to a device or from one, is lost, and would be waited for in vain.
        """
        return WaryGrid(self._client, self.run, token=self.token, check=self._check, asking=self.asking)

    def _check(self) -> None:
        if self.fallen():
            raise TaskError("Flower's SuperLink must stay up as long as a run, it was started again.", gone=True)

    def answer(self, reply: Message) -> None:
        """Hand over the reply to the message, and close.

        Raises:
            TaskError: It could not be handed over, or nobody wants it any more.
        """
        try:
            self._push(reply)
            self.finish(ok=True)
        finally:
            self.close()

    def fail(self) -> None:
        """Answer the message with an error that says nothing, and close; without a reply the SuperNode would wait on.

        Raises:
            TaskError: As ``answer``.
        """
        try:
            self._push(Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=""), reply_to=self._envelope))
            self.finish(ok=False)
        finally:
            self.close()

    def finish(self, *, ok: bool) -> None:
        """Say how it ended, and close.

        Raises:
            TaskError: It could not be said.
        """
        status = SubStatus.COMPLETED if ok else SubStatus.FAILED
        try:
            self._client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=""))
        finally:
            self.close()

    def close(self) -> None:
        """Stop the heartbeat and give up the connections; whoever gave the task sees it expire."""
        if self._heartbeat.is_running:
            self._heartbeat.stop()
        self._client.close()
        self._pulse.close()

    def _beat(self) -> bool:
        try:
            known = self._pulse.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
        except TaskError as error:
            if not error.gone:
                return False  # Flower's sender tries again
            known = False
        if not known:
            self.lost.set()
        return True

    def _receive(self) -> None:
        """The input, but for the bundle: ``reply.fab`` is not read."""
        self._heartbeat.start()
        reply = self._client.PullTaskInput(PullTaskInputRequest())
        self.context, self.run = context_from_proto(reply.context), run_from_proto(reply.run)
        TaskIdentity.task_id, TaskIdentity.run_id = reply.task_id, reply.run.run_id
        TaskIdentity.node_id = reply.context.node_id

    def _receive_message(self) -> bool:
        """The message; says whether there is one that can be read."""
        reply = self._client.PullMessages(PullAppMessagesRequest())
        if not reply.messages_list:
            self.finish(ok=False)
            return False
        self._envelope = message_from_proto(reply.messages_list[0])
        try:
            self.message = self._inflate(reply.message_object_trees[0])
        except StalledError:
            with suppress(TaskError):
                self.fail()
            raise
        except TaskError:
            raise
        except Exception as error:  # whatever a server can put into a message
            _log.warning("a message could not be read: %s", type(error).__name__)
            self.fail()
            return False
        return True

    def _inflate(self, tree: ObjectTree) -> Message:
        coming = Coming(self._client, self._envelope, tree, node=self.context.node_id, most_bytes=_MOST_BYTES)
        if not coming.fetch(within_s=_ARRIVE_S, given_up=self.lost):
            raise StalledError("what a message promises must come in time, it did not.")
        coming.confirm()
        return coming.message()

    def _push(self, message: Message) -> None:
        message.metadata.__dict__["_message_id"] = message.object_id
        envelope = message_to_proto(remove_content_from_message(message))
        with no_object_id_recompute():
            pushed = self._client.PushMessages(
                PushAppMessagesRequest(messages_list=[envelope], message_object_trees=[get_object_tree(message)])
            )
            send = make_push_object_fn_protobuf(
                self._client.PushObject,
                Node(node_id=self.context.node_id),
                run_id=self.context.run_id,
                session_id=pushed.session_id,
            )
            try:
                push_objects(get_all_nested_objects(message), send, object_ids_to_push=set(pushed.objects_to_push))
            except ObjectPushError:
                raise TaskError("the SuperNode must store the reply, it did not; the round is over.") from None
