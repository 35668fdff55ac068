"""The resident executor: over a fake source of tasks, and over the Runtime API of Flower's own SuperNode."""

import hashlib
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import numpy as np
import pytest
import uvicorn
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supernode.main import create_app
from flwr.supernode.nodestate import NodeStateFactory

from client.home.home import create_home
from client.service.executor import answer_for, limit_process, serve_tasks
from shared.errors import StoreError
from shared.flower.grid import InlineGrid
from shared.flower.processes import free_port
from shared.flower.tasks import StalledError, TaskError, Tasks, _Invoker
from shared.protocol import wire

SECRET = b"of this test"
CONTENT = b"PK\x03\x04 neither a zip nor anything else"
HOSTILE = Fab(hashlib.sha256(CONTENT).hexdigest(), CONTENT, {})


class Fake:
    """A source of tasks that ends the loop when it has given all."""

    def __init__(self, *given, stop):
        self.given, self.stop, self.log = list(given), stop, []

    def take(self):
        if not self.given:
            self.stop.set()
            return None
        given = self.given.pop(0)
        if isinstance(given, Exception):
            raise given
        return given and FakeTask(given, self.log)


class FakeTask:
    context = None

    def __init__(self, message, log):
        self.message, self.log = message, log

    def answer(self, reply):
        self.log.append(("answer", reply))
        if reply == "unwanted":
            raise TaskError("the task is gone", gone=True)

    def fail(self):
        self.log.append(("fail",))

    def close(self):
        self.log.append(("close",))


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr("client.service.executor._POLL_S", 0.01)


def serve(*given, answer):
    stop, states = threading.Event(), []
    fake = Fake(*given, stop=stop)
    serve_tasks(fake, None, answer=answer, stop=stop, on_state=states.append)
    return fake.log, states


def test_every_task_is_answered_in_turn():
    log, states = serve("a", None, "b", answer=lambda message, context: message.upper())
    assert log == [("answer", "A"), ("close",), ("answer", "B"), ("close",)]
    assert states == [True, False, True, False]


@pytest.mark.fault("R16")
def test_the_loop_outlives_errors_and_quotes_none(caplog):
    def answer(message, context):
        if message == "bad":
            raise RuntimeError("a line of the owner's diary")
        return message

    with caplog.at_level(logging.INFO, logger="sottovoce.client"):
        log, _ = serve(TaskError("nobody answers"), "bad", "unwanted", "good", answer=answer)
    assert [entry for entry in log if entry != ("close",)] == [("fail",), ("answer", "unwanted"), ("answer", "good")]
    assert log.count(("close",)) == 3
    assert "diary" not in caplog.text
    assert "RuntimeError" in caplog.text
    assert "undelivered" in caplog.text


def test_a_stop_ends_the_loop_after_the_task_at_hand():
    stop = threading.Event()
    fake = Fake("a", "b", stop=stop)

    def answer(message, context):
        stop.set()
        return message

    serve_tasks(fake, None, answer=answer, stop=stop)
    assert fake.log == [("answer", "a"), ("close",)]
    assert fake.given == ["b"]


def test_a_message_that_is_not_for_training_is_refused(tmp_path):
    home = create_home(tmp_path / "home", keystore="file", cap_epsilon=8.0, cap_delta=1e-4)
    respond = answer_for(home)
    grid = InlineGrid(respond, devices=1, run_config={})
    for message_type, code in (("query.seat", "SCHEMA"), ("evaluate", "SCHEMA"), ("train", "SCHEMA")):
        [reply] = grid.send_and_receive([Message(RecordDict(), dst_node_id=1000, message_type=message_type)])
        assert wire.refusal_code(reply) == code
    assert not reply.has_error()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"threads": 0}, "--threads"),
        ({"nice": -1}, "--nice"),
        ({"nice": 20}, "--nice"),
        ({"memory_mb": 100}, "--memory-mb"),
    ],
)
def test_impossible_limits_are_refused(changed, words):
    with pytest.raises(StoreError, match=words):
        limit_process(**({"threads": 1, "nice": 0, "memory_mb": None} | changed))


@pytest.fixture(scope="module")
def runtime():
    """The Runtime API of a SuperNode that holds one run, whose bundle is hostile."""
    factory = NodeStateFactory(objectstore_factory=ObjectStoreFactory())
    port = free_port()
    app = create_app(state_factory=factory, superexec_auth_secret=SECRET)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
        assert thread.is_alive()
    state = factory.state()
    state.set_node_id(1000)
    run = Run.create_empty(1)
    run.fab_hash, run.series_id = HOSTILE.hash_str, 5
    state.store_run(run)
    state.store_fab(HOSTILE)
    context = Context(run_id=1, node_id=1000, node_config={}, state=RecordDict(), run_config={}, series_id=5)
    state.set_run_series_context(5, context)
    yield SimpleNamespace(address=f"127.0.0.1:{port}", state=state, store=state.object_store)
    server.should_exit = True
    thread.join(5.0)


@pytest.fixture
def tasks(runtime, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # loopback needs none
    found = Tasks(runtime.address, secret=SECRET, kind="client", patience_s=1.0)
    yield found
    found.close()


def deliver(runtime, content, *, sent=None, kind="flwr-clientapp", arrives=True):
    """What a SuperNode does with a message of a server, whose parts may be those of something else."""
    InlineGrid(lambda message, context: message, devices=1, run_config={})  # speak as the server
    message = Message(content, dst_node_id=1000, message_type="train", ttl=60.0)
    with no_object_id_recompute():
        sent = sent or message
        message.metadata.__dict__["_message_id"] = sent.object_id
        assert runtime.state.create_task(task_type=kind, run_id=1, fab_hash=HOSTILE.hash_str)
        runtime.store.preregister(1, get_object_tree(sent))
        runtime.state.store_message(message)
        for name, part in get_all_nested_objects(sent).items() if arrives else ():
            runtime.store.put(name, part.deflate())
    return message.metadata.message_id


def replies(runtime):
    return runtime.state.get_messages_legacy(is_reply=True)


@pytest.mark.fault("R15")
def test_a_task_is_taken_answered_and_its_bundle_never_read(runtime, tasks, monkeypatch):
    monkeypatch.setattr("zipfile.ZipFile", None)
    assert tasks.take() is None
    arrays = ArrayRecord({"a": Array(np.arange(6.0))})
    sent = deliver(runtime, RecordDict({"arrays": arrays, "config": ConfigRecord({"round": 3})}))
    task = tasks.take()
    assert task.message.content["config"]["round"] == 3
    assert task.message.content["arrays"]["a"].numpy().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert task.context.node_id == 1000
    assert not hasattr(task, "fab")
    task.answer(Message(RecordDict({"config": ConfigRecord({"said": "yes"})}), reply_to=task.message))
    [reply] = replies(runtime)
    assert reply.metadata.reply_to_message_id == sent
    assert not task.lost.is_set()
    assert tasks.take() is None


@pytest.mark.fault("R16")
def test_a_task_that_failed_gets_a_reply_without_text(runtime, tasks):
    deliver(runtime, RecordDict({"config": ConfigRecord({"round": 3})}))
    tasks.take().fail()
    [reply] = replies(runtime)
    assert reply.has_error()
    assert not reply.error.reason


def test_a_message_that_cannot_be_read_is_answered_and_passed_over(runtime, tasks):
    sent = deliver(runtime, RecordDict(), sent=ConfigRecord({"text": "no message"}))
    assert tasks.take() is None
    [reply] = replies(runtime)
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == sent


def test_a_message_that_does_not_arrive_is_answered_and_named(runtime, tasks, monkeypatch):
    monkeypatch.setattr("shared.flower.tasks._ARRIVE_S", 0.1)
    sent = deliver(runtime, RecordDict({"config": ConfigRecord({"round": 5})}), arrives=False)
    with pytest.raises(StalledError):
        tasks.take()
    [reply] = replies(runtime)
    assert reply.has_error()
    assert reply.metadata.reply_to_message_id == sent
    assert tasks.take() is None


def test_a_message_for_an_agent_is_answered_too(runtime, tasks):
    sent = deliver(runtime, RecordDict({"config": ConfigRecord({"round": 6})}), kind="flwr-agentapp")
    task = tasks.take()
    task.answer(Message(RecordDict({"config": ConfigRecord({"said": "no"})}), reply_to=task.message))
    [reply] = replies(runtime)
    assert reply.metadata.reply_to_message_id == sent


def test_whoever_lacks_the_secret_takes_nothing(runtime):
    deliver(runtime, RecordDict({"config": ConfigRecord({"round": 3})}))
    stranger = Tasks(runtime.address, secret=b"another", kind="client")
    with pytest.raises(TaskError, match="401") as refused:
        stranger.take()
    assert refused.value.gone
    stranger.close()
    owner = Tasks(runtime.address, secret=SECRET, kind="client")
    owner.take().fail()
    owner.close()


def test_nobody_at_the_address_is_an_error_to_wait_out():
    nobody = Tasks(f"127.0.0.1:{free_port()}", secret=SECRET, kind="client")
    with pytest.raises(TaskError, match="ConnectError") as failed:
        nobody.take()
    assert not failed.value.gone
    nobody.close()


@pytest.mark.parametrize(("status", "passes"), [(500, True), (503, True), (401, False), (404, False)])
def test_what_may_pass_is_tried_again(monkeypatch, status, passes):
    monkeypatch.setattr("shared.flower.tasks.exponential", lambda max_delay: iter(lambda: 0.0, None))
    request = httpx.Request("POST", "http://127.0.0.1/v1/runtime/pull-messages")
    answers = [httpx.Response(status, request=request), httpx.Response(200, request=request)]

    def call():
        return answers.pop(0).raise_for_status().status_code

    if passes:
        assert _Invoker(5.0).invoke(call) == 200
    else:
        with pytest.raises(TaskError, match=str(status)):
            _Invoker(5.0).invoke(call)


@pytest.mark.fault("R14")
def test_a_reply_travels_in_parts_that_a_slow_line_carries_in_time():
    """Flower's own are 5 MB, which take 50 s at 100 kB/s; a SuperNode starts a part again after 30."""
    code = (
        "import client.service.executor, numpy as np; from flwr.app import Array; "
        "print(*(len(part.data) for part in Array(np.arange(2**19, dtype=np.float32)).children.values()))"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    sizes = [int(size) for size in done.stdout.split()]
    assert max(sizes) == 2**19
    assert sum(sizes) > 2**21
