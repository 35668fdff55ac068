"""The owner's control socket: a real gRPC server on a unix socket."""

import os
import socket
import stat
import tempfile
from pathlib import Path

import grpc
import pytest
from google.protobuf.empty_pb2 import Empty
from google.protobuf.struct_pb2 import Struct

from client.commands.owner import add_parsers
from client.home.home import create_home
from client.service.control import SERVICE, control_client, serve_control, socket_path
from client.service.join import Service
from shared.errors import HeadError, StoreError


class Owner:
    def __init__(self):
        self.said = []

    def status(self):
        return {"service": {"state": "waiting", "pid": 7, "since": "now"}, "home": None}

    def pause(self):
        self.said.append("pause")

    def resume(self):
        self.said.append("resume")

    def predict(self, texts):
        if texts == ["break"]:
            raise ValueError("a line of the owner's diary")
        if texts == ["refuse"]:
            raise HeadError("there must be a head, there is none.")
        return {"predictions": [float(len(text)) for text in texts], "problem": None}

    def stop(self):
        self.said.append("stop")


@pytest.fixture
def owner():
    return Owner()


@pytest.fixture
def folder(monkeypatch):
    """A home whose path is short, as that of a socket must be."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with tempfile.TemporaryDirectory(prefix="sv-", dir="/tmp") as short:
        yield Path(short)


def test_each_call_reaches_the_owner(folder, owner):
    with serve_control(folder, owner), control_client(folder) as client:
        assert client.status()["service"]["state"] == "waiting"
        client.pause()
        client.resume()
        client.stop()
        assert client.predict(["a", "bcd"]) == {"predictions": [1.0, 3.0], "problem": None}
    assert owner.said == ["pause", "resume", "stop"]


def test_errors_of_ours_keep_their_words_and_others_lose_them(folder, owner):
    with serve_control(folder, owner), control_client(folder) as client:
        with pytest.raises(StoreError, match="there must be a head"):
            client.predict(["refuse"])
        with pytest.raises(StoreError) as broken:
            client.predict(["break"])
        assert "diary" not in str(broken.value)
        with pytest.raises(StoreError, match="list of at least one text"):
            client.predict([])


def test_any_grpc_client_can_speak_to_it(folder, owner):
    """As docs/device.md describes the interface."""
    with serve_control(folder, owner) as path, grpc.insecure_channel(f"unix:{path}") as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/Predict",
            request_serializer=Struct.SerializeToString,
            response_deserializer=Struct.FromString,
        )
        request = Struct()
        request.update({"texts": ["four"]})
        assert list(call(request, timeout=5.0)["predictions"]) == [4.0]
        for wrong in ({"texts": "four"}, {"texts": [4]}, {"other": []}):
            request = Struct()
            request.update(wrong)
            with pytest.raises(grpc.RpcError) as refused:
                call(request, timeout=5.0)
            assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        nothing = channel.unary_unary(
            f"/{SERVICE}/Delete", request_serializer=Empty.SerializeToString, response_deserializer=Empty.FromString
        )
        with pytest.raises(grpc.RpcError) as unknown:
            nothing(Empty(), timeout=5.0)
        assert unknown.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_only_its_owner_can_reach_the_socket(folder, owner):
    before = os.umask(0)
    try:
        with serve_control(folder, owner) as path:
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert path.parent.stat().st_uid == os.getuid()
    finally:
        os.umask(before)
    assert not path.exists()


def test_a_socket_that_a_kill_left_is_no_service_and_is_replaced(folder, owner):
    with control_client(folder) as client:
        assert client is None
    path = socket_path(folder)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with control_client(folder) as client:
        assert client is None
    with serve_control(folder, owner), control_client(folder) as client:
        assert client.status()["service"]["pid"] == 7


def test_a_deep_home_has_its_socket_in_the_runtime_folder_or_is_refused(folder, owner, monkeypatch):
    deep = folder / ("d" * 60) / ("e" * 60)
    deep.mkdir(parents=True)
    with pytest.raises(StoreError, match="at most 107 bytes"):
        socket_path(deep)
    runtime = folder / "r"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    other = deep.with_name("f" * 60)
    assert socket_path(deep).is_relative_to(runtime)
    assert socket_path(deep) != socket_path(other)
    exact = folder / "x"
    exact = exact.with_name("x" * (1 + 107 - len(os.fsencode(exact / "run" / "control.sock"))))
    assert socket_path(exact) == exact / "run" / "control.sock"
    assert socket_path(exact.with_name(exact.name + "x")).is_relative_to(runtime)


def test_pause_and_resume_are_the_ledgers(folder, capsys):
    home = create_home(folder / "home", keystore="file", cap_epsilon=8.0, cap_delta=1e-4)
    service = Service(home)
    with serve_control(home.folder, service), control_client(home.folder) as client:
        client.pause()
        assert client.status()["home"]["paused"] is True
        status = run("status", home)
        assert status == 0
        assert "PAUSED" in capsys.readouterr().out
        run("resume", home)
        found = client.status()
        assert found["home"]["paused"] is False
        assert found["service"]["pid"] == os.getpid()
        assert found["service"]["rss_bytes"] > 1e7
        with pytest.raises(StoreError, match="--base"):
            client.predict(["a text"])
        capsys.readouterr()
        run("status", home)
        assert f"service: starting, since {found['service']['since']} (pid {os.getpid()})" in capsys.readouterr().out
        assert not service.stopping.is_set()
        client.stop()
        assert service.stopping.is_set()
    run("status", home)
    assert "service:" not in capsys.readouterr().out


def run(command, home):
    import argparse

    parser = argparse.ArgumentParser()
    add_parsers(parser.add_subparsers())
    options = parser.parse_args([command, "--home", str(home.folder)])
    return options.handler(options)
