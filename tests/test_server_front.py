"""The front hands fleet calls on and nothing else; a SuperLink that is not real writes down what reaches it."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time

import httpx
import pytest
import uvicorn
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node

from server import front as module
from server.folder import create_server
from server.front import MAX_BODY_BYTES, start_front
from server.register import REGISTER_FILE
from shared.errors import ServerError
from shared.flower.control import fleet_paths
from shared.impatience import Impatient

CALL, PART = "/v1/fleet/pull-messages", "/v1/fleet/push-object"
BODY = b"\x7a\x12" + b"\x00\xff" * 9  # any message of Flower's reads it: a field it does not know


class Recorder:
    """Stands for the SuperLink: answers everything, and remembers what it was asked."""

    def __init__(self, server):
        self.seen, self.status = [], 418
        config = uvicorn.Config(
            self,
            ssl_certfile=server.certificate,
            ssl_keyfile=server.certificate_key,
            http="h11",
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
        )
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port = self._listening.getsockname()[1]
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve([self._listening])))

    async def __call__(self, scope, receive, send):
        body = b""
        while True:
            event = await receive()
            body += event.get("body", b"")
            if not event.get("more_body"):
                break
        self.seen.append((scope["method"], scope["raw_path"], scope["query_string"], scope["headers"], body))
        headers = [(b"content-type", b"application/x-protobuf"), (b"x-flower", b"1"), (b"x-flower", b"2")]
        await send({"type": "http.response.start", "status": self.status, "headers": [*headers, (b"keep-alive", b"9")]})
        await send({"type": "http.response.body", "body": b"answer"})

    def __enter__(self):
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(10)
        self._listening.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    return create_server(tmp_path_factory.mktemp("front") / "server", address="localhost")


@pytest.fixture(scope="module")
def superlink(server):
    with Recorder(server) as recorder:
        yield recorder


@pytest.fixture(scope="module")
def opened(server, superlink):
    front = start_front(server, superlink_port=superlink.port, host="127.0.0.1", port=0)
    yield front
    front.stop()


@pytest.fixture
def front(opened, superlink):
    superlink.seen.clear()
    return opened


@pytest.fixture
def trust(server):
    return ssl.create_default_context(cafile=server.ca_certificate)


@pytest.fixture
def post(front, trust):
    with httpx.Client(base_url=f"https://localhost:{front.port}", verify=trust, trust_env=False) as client:
        yield client.post


@pytest.fixture
def say(front, trust):
    """(bytes) -> what comes back until the front closes: a request as no client would spell it."""

    def exchange(content):
        with (
            socket.create_connection(("127.0.0.1", front.port), timeout=10) as raw,
            trust.wrap_socket(raw, server_hostname="localhost") as secured,
        ):
            heard = b""
            with contextlib.suppress(ssl.SSLError, ConnectionError):  # refused before all was said
                secured.sendall(content)
            with contextlib.suppress(ssl.SSLError, ConnectionError):
                while chunk := secured.recv(65536):
                    heard += chunk
            return heard

    return exchange


def ask(target, *, method="POST", headers="", body="x"):
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    return f"{head}{headers}\r\n{body}".encode("latin-1")


def test_the_list_is_what_flower_serves_to_enrolled_devices():
    assert CALL in fleet_paths()
    assert all(path.startswith("/v1/fleet/") for path in fleet_paths())
    assert not {"/v1/fleet/register-node", "/v1/fleet/unregister-node"} & fleet_paths()
    assert len(fleet_paths()) >= 8


def test_a_fleet_call_goes_on_and_its_answer_comes_back(front, superlink, post):
    before = front.counts()
    for path in sorted(fleet_paths()):
        answer = post(path, content=BODY, headers={"flwr-signature": "abc", "x-own": "1"})
        assert (answer.status_code, answer.content) == (418, b"answer")
        assert answer.headers.get_list("x-flower") == ["1", "2"]
        assert answer.headers["content-type"] == "application/x-protobuf"
        assert "keep-alive" not in answer.headers
    assert [(method, path.decode()) for method, path, *_ in superlink.seen] == [
        ("POST", path) for path in sorted(fleet_paths())
    ]
    for _, _, query, headers, body in superlink.seen:
        assert (query, body) == (b"", BODY)
        assert {(b"flwr-signature", b"abc"), (b"x-own", b"1")} <= set(headers)
    gained = {name: value - before[name] for name, value in front.counts().items()}
    calls = len(fleet_paths())
    assert gained == {"requests": calls, "refused": 0, "bytes_in": 20 * calls, "bytes_out": 6 * calls}


@pytest.mark.fault("R9", "R14")
def test_a_device_is_told_to_try_again_where_flower_s_database_is_locked(superlink, post, monkeypatch):
    """At 500 a SuperNode drops the reply it was handing over, and at 503 it tries again."""
    for said, told in ((500, 503), (503, 503), (403, 403), (401, 401), (200, 200)):
        monkeypatch.setattr(superlink, "status", said)
        assert post(PART, content=BODY).status_code == told


def pushed(*senders, node=7):
    """A device's call that hands over messages of these senders."""
    request = PushMessagesRequest(node=Node(node_id=node))
    for sender in senders:
        request.messages_list.add().metadata.src_node_id = sender
    return request.SerializeToString()


@pytest.mark.fault("R8")
def test_a_message_in_another_devices_name_does_not_go_on(front, superlink, post):
    """Flower asks whose key a call was signed with, and believes what the message in it says of its sender."""
    target = "/v1/fleet/push-messages"
    for body in (pushed(8), pushed(7, 8), pushed(7, 0), pushed(7)[:-1], b"\xff"):
        assert post(target, content=body).status_code == 403
    assert superlink.seen == []
    for body in (pushed(7), pushed(7, 7), pushed()):
        assert post(target, content=body).status_code == 418
    assert post(CALL, content=pushed(8)).status_code == 418  # in another call it is only bytes
    assert len(superlink.seen) == 4


@pytest.mark.fault("R8", "R14")
def test_a_recorded_connection_played_again_reaches_nobody(front, superlink, trust, bad_lines):
    with bad_lines.bad_line(front.port) as (port, line):
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trust, trust_env=False) as client:
            assert client.post(CALL, content=b"said once").status_code == 418
        [said] = map(bytes, line.recorded)
    assert len(said) > 500
    for again in (said, said + said):
        raw = socket.create_connection(("127.0.0.1", front.port), timeout=10)
        with raw, contextlib.suppress(ConnectionError):
            raw.sendall(again)
            while raw.recv(65536):
                pass
    assert [body for *_, body in superlink.seen] == [b"said once"]


@pytest.mark.fault("R14")
@pytest.mark.parametrize("fault", ["cut", "silent", "twice"])
def test_half_a_body_is_no_call(front, superlink, trust, bad_lines, fault):
    with bad_lines.bad_line(front.port) as (port, line):
        line.trip, line.times = fault, 1
        client = httpx.Client(base_url=f"https://localhost:{port}", verify=trust, trust_env=False, timeout=1.0)
        with client, pytest.raises(httpx.TransportError):
            client.post(PART, content=bytes(100_000))
        assert len(line.tripped) == 1
        assert superlink.seen == []
        with httpx.Client(base_url=f"https://localhost:{port}", verify=trust, trust_env=False) as again:
            assert again.post(PART, content=bytes(100_000)).status_code == 418
    assert [len(body) for *_, body in superlink.seen] == [100_000]


def test_what_is_meant_for_the_connection_does_not_go_on(superlink, say):
    headers = "Connection: x-own\r\nX-Own: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\nProxy-Authorization: x\r\n"
    said = say(ask(CALL, headers=headers + "X-Forwarded-For: 10.0.0.1\r\nForwarded: for=10.0.0.1\r\nX-Kept: 2\r\n"))
    assert said.startswith(b"HTTP/1.1 418")
    [(_, _, _, passed, _)] = superlink.seen
    names = [name for name, _ in passed]
    assert sorted(names) == [b"content-length", b"host", b"x-kept"]
    assert dict(passed)[b"host"] == f"127.0.0.1:{superlink.port}".encode()


def routes_of_flower():
    """Every path of a real SuperLink, as it is served on one port."""
    from fastapi.routing import iter_route_contexts
    from flwr.superlink.main import create_app  # importing it takes seconds

    return {context.path for context in iter_route_contexts(create_app().routes)}


def test_no_other_interface_of_flower_is_reached(front, superlink, say):
    paths = routes_of_flower() - fleet_paths()
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task", "/health", "/v1/fleet/register-node"} <= paths
    before = front.counts()["refused"]
    for path in sorted(paths):
        assert say(ask(path)).startswith(b"HTTP/1.1 404 "), path
    for path in ("/docs", "/redoc", "/openapi.json", "/health", "/", "/metrics"):
        assert say(ask(path, method="GET")).startswith(b"HTTP/1.1 404 "), path
    assert superlink.seen == []
    assert front.counts()["refused"] == before + len(paths) + 6


@pytest.mark.parametrize(
    "target",
    [
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/fleet/%2E%2E/control/start-run",
        "/v1/fleet/..%2fcontrol%2fstart-run",
        "/v1/fleet/pull-messages/../../control/start-run",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2fstart-run",
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet//pull-messages",
        "/v1/fleet/./pull-messages",
        "/v1/./control/start-run",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages;x",
        "/v1/fleet;/pull-messages",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull-messages%20",
        "/v1/fleet/pull%2dmessages",
        "/v1%2ffleet%2fpull-messages",
        "/%76%31/fleet/pull-messages",
        "/V1/fleet/pull-messages",
        "/v1/Fleet/pull-messages",
        "/v1/fleet/PULL-MESSAGES",
        "/v1/fleet/pull_messages",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages#x",
        "/v1/fleet\\pull-messages",
        "http://localhost/v1/fleet/pull-messages",
        "https://127.0.0.1/v1/control/start-run",
        "http://localhost/v1/fleet/pull-messages/../../control/start-run",
        "v1/fleet/pull-messages",
        "*",
        "localhost:443",
        "/",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/nothing",
        "/v1/fleet/pull-messages\xa0",
    ],
)
def test_no_other_spelling_of_a_target_goes_on(superlink, say, target):
    assert say(ask(target)).startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 "))
    assert superlink.seen == []


@pytest.mark.parametrize(
    "method", ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "CONNECT", "post", "X"]
)
def test_no_other_method_goes_on(superlink, say, method):
    assert say(ask(CALL, method=method)).startswith((b"HTTP/1.1 404 ", b"HTTP/1.1 400 "))
    assert superlink.seen == []


@pytest.mark.parametrize(
    "headers",
    [
        "X-HTTP-Method-Override: GET\r\nX-Original-URL: /v1/control/start-run\r\nX-Rewrite-URL: /health\r\n",
        "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA\r\n",
        "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    ],
)
def test_no_header_turns_a_call_into_another(superlink, say, headers):
    say(ask(CALL, headers=headers))
    assert [seen[:3] for seen in superlink.seen] == [("POST", CALL.encode(), b"")]
    assert not {b"upgrade", b"connection"} & {name for name, _ in superlink.seen[0][3]}


def test_a_request_hidden_in_another_is_seen_as_one_of_its_own(superlink, say):
    hidden = "POST /v1/control/start-run HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    head = f"POST {CALL} HTTP/1.1\r\nHost: a\r\nContent-Length: "
    say(f"{head}5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{hidden}".encode())
    say(f"{head}0\r\n\r\n{hidden}".encode())
    say(f"{head}0\r\nContent-Length: 90\r\n\r\n{hidden}".encode())
    assert {seen[1] for seen in superlink.seen} == {CALL.encode()}
    assert all(seen[4] == b"" for seen in superlink.seen)


@pytest.mark.fault("R9")
@pytest.mark.parametrize(("target", "limit"), [(PART, MAX_BODY_BYTES), (CALL, module._MAX_CALL_BYTES)])
def test_a_body_may_be_as_large_as_the_limit_and_no_larger(front, superlink, post, say, target, limit):
    assert post(target, content=bytes(limit)).status_code == 418
    assert len(superlink.seen.pop()[4]) == limit
    before = front.counts()["refused"]
    head = f"POST {target} HTTP/1.1\r\nHost: a\r\n"
    for length in (str(limit + 1), "9" * 19):
        said = say(f"{head}Content-Length: {length}\r\n\r\n".encode())  # and not a byte of it
        assert said.startswith(b"HTTP/1.1 413 "), length
    endless = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + (b"100000\r\n" + bytes(2**20) + b"\r\n") * 17
    assert say(endless).startswith(b"HTTP/1.1 413 ") or superlink.seen == []
    assert superlink.seen == []
    assert front.counts()["refused"] == before + 3


@pytest.mark.fault("R9")
def test_all_bodies_together_are_bounded_too(front, superlink, post, monkeypatch):
    monkeypatch.setattr(module, "_MAX_WAITING_BYTES", 1000)
    assert post(CALL, content=bytes(1001)).status_code == 503
    assert superlink.seen == []
    for _ in range(3):  # what is done is waiting no more
        assert post(CALL, content=bytes(900)).status_code == 418


@pytest.mark.fault("R14")
def part(node, length):
    return PushObjectRequest(node=Node(node_id=node), object_id="o", object_content=bytes(length)).SerializeToString()


@pytest.mark.fault("R9")
def test_a_device_hands_over_parts_of_a_few_replies_until_it_is_asked_again(front, superlink, post, monkeypatch):
    """Counted are those the SuperLink took, which has checked whose call it is; other devices' go on."""
    pushed = part(7, 1000)
    front.allow(len(pushed) + 100)
    assert [post(PART, content=pushed).status_code for _ in range(6)] == [418] * 6  # refused there: nothing is kept
    monkeypatch.setattr(superlink, "status", 200)
    superlink.seen.clear()
    assert [post(PART, content=pushed).status_code for _ in range(6)] == [200] * 4 + [413] * 2
    assert len(superlink.seen) == 4
    assert post(PART, content=part(7, 1)).status_code == 200  # there was room for so much
    assert post(PART, content=part(8, 1000)).status_code == 200
    assert post(PART, content=b"\xff no call").status_code == 200  # the SuperLink's to refuse
    front.allow(len(pushed) + 100)
    assert post(PART, content=pushed).status_code == 200
    front.allow(MAX_BODY_BYTES)


def test_a_slow_body_is_not_waited_for(superlink, say, monkeypatch):
    monkeypatch.setattr(module, "_BODY_S", 0.1)
    assert say(f"POST {CALL} HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx".encode()).startswith(b"HTTP/1.1 408 ")
    assert superlink.seen == []


@pytest.mark.fault("R14")
@pytest.mark.parametrize("begun", [b"", b"POST /v1/fl"])
def test_a_connection_that_asks_nothing_is_closed(say, monkeypatch, begun):
    monkeypatch.setattr(Impatient, "idle_s", 0.2)
    start = time.monotonic()
    assert say(begun) == b""
    assert 0.1 < time.monotonic() - start < 5


@pytest.mark.fault("R14")
def test_a_connection_may_wait_between_calls_but_not_within_one(front, trust, monkeypatch):
    monkeypatch.setattr(Impatient, "idle_s", 0.2)
    with (
        socket.create_connection(("127.0.0.1", front.port), timeout=5) as raw,
        trust.wrap_socket(raw, server_hostname="localhost") as secured,
    ):
        for _ in range(2):
            secured.sendall(ask(CALL).replace(b"close", b"keep-alive"))
            heard = b""
            while not heard.endswith(b"answer"):
                heard += secured.recv(65536)
            time.sleep(0.5)
        secured.sendall(b"POST /v1/fl")
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert secured.recv(1) == b""


def test_old_tls_and_plain_http_are_refused(front, trust):
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        trust.minimum_version = ssl.TLSVersion.TLSv1_1
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        trust.maximum_version = ssl.TLSVersion.TLSv1_1
    trust.set_ciphers("ALL:@SECLEVEL=0")
    with socket.create_connection(("127.0.0.1", front.port), timeout=10) as raw, pytest.raises((ssl.SSLError, OSError)):
        trust.wrap_socket(raw, server_hostname="localhost")
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://127.0.0.1:{front.port}{CALL}", trust_env=False)


def test_without_a_superlink_a_call_is_answered_502_until_it_is_back(server, trust):
    with Recorder(server) as first:
        port = first.port
    front = start_front(server, superlink_port=port, host="127.0.0.1", port=0)
    try:
        with httpx.Client(base_url=f"https://localhost:{front.port}", verify=trust, trust_env=False) as client:
            assert client.post(CALL, content=b"x").status_code == 502
            assert client.post(CALL, content=b"x").status_code == 502
            assert front.counts() == {"requests": 2, "refused": 0, "bytes_in": 2, "bytes_out": 0}
    finally:
        front.stop()


def test_the_front_trusts_only_its_own_superlink(server, trust, tmp_path):
    """Whoever takes the SuperLink's port on this machine gets no call."""
    stranger = create_server(tmp_path / "stranger", address="localhost")
    with Recorder(stranger) as recorder:
        front = start_front(server, superlink_port=recorder.port, host="127.0.0.1", port=0)
        try:
            answer = httpx.post(f"https://localhost:{front.port}{CALL}", verify=trust, trust_env=False)
        finally:
            front.stop()
        assert (answer.status_code, recorder.seen) == (502, [])


def test_a_closed_front_answers_nobody_and_its_port_is_free(server, trust, caplog):
    caplog.set_level("INFO")
    front = start_front(server, superlink_port=1, host="127.0.0.1", port=0)
    assert front.alive()
    with pytest.raises(ServerError, match=f"must be able to listen on 127.0.0.1 port {front.port}: Address already"):
        start_front(server, superlink_port=1, host="127.0.0.1", port=front.port)
    with httpx.Client(verify=trust, trust_env=False) as client:
        client.post(f"https://localhost:{front.port}/nothing")
        front.stop()
        assert not front.alive()
        with pytest.raises(httpx.ConnectError):
            client.post(f"https://localhost:{front.port}{CALL}")
    start_front(server, superlink_port=1, host="127.0.0.1", port=front.port).stop()
    ours = [record for record in caplog.records if record.name.startswith("uvicorn")]
    assert not any("127.0.0.1" in record.getMessage() or "nothing" in record.getMessage() for record in ours)


def test_a_certificate_and_a_key_that_do_not_belong_together_are_named(server, tmp_path):
    other = create_server(tmp_path / "other", address="localhost")
    other.certificate.write_bytes(server.certificate.read_bytes())
    with pytest.raises(ServerError, match=r"must belong together .*init --renew"):
        start_front(other, superlink_port=1, host="127.0.0.1", port=0)
    assert (other.folder / REGISTER_FILE).exists()
