"""A running server follows its register, whatever Flower knew before."""

import json
import time
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

import server.service
from server.aggregate import OptimizerState
from server.checkpoint import Checkpoint, save_checkpoint
from server.folder import create_server
from server.register import enrol, revoke
from server.rounds import note_begun
from shared.errors import CampaignError, ServerError
from shared.flower.control import Node, key_bytes
from shared.flower.tasks import TaskError

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def new_key():
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


class SuperLink:
    """What Flower knows; as its Control API says it."""

    def __init__(self):
        self.known, self.away, self.numbers = {}, False, iter(range(7001, 8000))

    def nodes(self):
        if self.away:
            raise CampaignError("Flower's SuperLink must answer on loopback, got ConnectError.")
        return list(self.known.values())

    def register(self, public_key, *, name):
        node = Node(next(self.numbers), public_key, online=True)
        self.known[node.node_id] = node
        return node.node_id

    def unregister(self, node_id):
        del self.known[node_id]

    def close(self):
        pass


@pytest.fixture
def link():
    return SuperLink()


@pytest.fixture
def folder(tmp_path):
    return create_server(tmp_path / "srv", address="127.0.0.1", port=9444)


@pytest.fixture
def watch(folder, link, monkeypatch):
    monkeypatch.setattr(
        server.service, "SuperLink", lambda _, **__: SimpleNamespace(address="", port=1, pid=2, starts=1)
    )
    monkeypatch.setattr(server.service, "Control", lambda *_, **__: link)
    policy = SimpleNamespace(campaign="c", sha256="p", cohort_size=2, trust="local")
    made = server.service._Watch(folder, SimpleNamespace(policy=policy))
    made._front = SimpleNamespace(counts=dict, allow=print)
    return made


def follow(watch):
    watch._follow_register()
    watch._follow_register()  # what was registered is seen online the second time


def test_who_is_enrolled_is_let_in_and_who_is_revoked_or_a_stranger_is_put_out(folder, link, watch):
    stranger = link.register(key_bytes(new_key()), name="somebody on this host")
    keys = [new_key() for _ in range(3)]
    for number, key in enumerate(keys):
        enrol(folder.folder, key, f"d{number}", now=NOW)
    follow(watch)
    assert stranger not in link.known
    assert sorted(watch.roster.values()) == [0, 1, 2]
    assert watch._online == {0, 1, 2}

    revoke(folder.folder, "d1", now=NOW)
    enrol(folder.folder, new_key(), "late", now=NOW)
    follow(watch)
    assert sorted(watch.roster.values()) == [0, 2, 3]  # a seat is never given again
    assert {node.public_key for node in link.known.values()} >= {key_bytes(keys[0]), key_bytes(keys[2])}
    assert key_bytes(keys[1]) not in {node.public_key for node in link.known.values()}


@pytest.mark.fault("R5")
def test_a_seat_outlives_a_superlink_that_forgot_everything(folder, link, watch):
    for number in range(2):
        enrol(folder.folder, new_key(), f"d{number}", now=NOW)
    follow(watch)
    before = dict(watch.roster)
    link.known.clear()
    follow(watch)
    assert sorted(watch.roster.values()) == sorted(before.values()) == [0, 1]
    assert not before.keys() & watch.roster.keys()  # other node ids, the same seats


@pytest.mark.fault("R1", "R2")
def test_after_a_restart_only_who_has_called_since_is_there(folder, link, watch):
    """Flower's database calls devices online that it heard before it fell, and soon gives up their answers."""
    for number in range(2):
        enrol(folder.folder, new_key(), f"d{number}", now=NOW)
    follow(watch)
    assert watch._online == {0, 1}
    watch._link.starts += 1
    follow(watch)
    assert watch._online == set()
    first = next(node for node, seat in watch.roster.items() if seat == 0)
    link.known[first] = replace(link.known[first], online_until=30.0)
    watch._follow_register()
    assert watch._online == {0}
    assert sorted(watch.roster.values()) == [0, 1]  # they are asked as soon as they call


@pytest.mark.fault("R2")
def test_a_run_ends_with_the_superlink_it_was_begun_at(watch, monkeypatch):
    task = SimpleNamespace(finish=lambda ok: None)
    monkeypatch.setattr(watch, "_take_run", lambda: task)
    with watch.run() as found:
        assert found is task
        assert task.asking == watch._front.allow
        assert not task.fallen()
        watch._link.starts += 1
        assert task.fallen()


def test_what_the_server_writes_down_says_who_is_there_and_what_is_wrong(folder, link, watch):
    enrol(folder.folder, new_key(), "d0", now=NOW)
    follow(watch)
    watch._write()
    live = json.loads(folder.live.read_text())
    assert live["devices"] == [{"name": "d0", "seat": 0, "online": True}]
    assert live["problem"] is None
    link.away = True
    with pytest.raises(CampaignError, match="loopback"):
        watch._follow_register()
    assert sorted(watch.roster.values()) == [0]  # the rounds go on with whom it knew


class Interrupted:
    """Stands in for what goes on beside the rounds."""

    def __init__(self, *_):
        self.roster = {}

    @contextmanager
    def running(self, **_):
        yield

    @contextmanager
    def run(self):
        yield SimpleNamespace(grid=lambda: None)


@pytest.mark.fault("R2")
@pytest.mark.parametrize("lost", [1, 4, 5])
def test_a_run_that_flower_loses_is_followed_by_another_from_the_last_checkpoint(folder, tmp_path, monkeypatch, lost):
    watch, starts, said = Interrupted(), [], []
    monkeypatch.setattr(server.service, "_Watch", lambda *_: watch)
    monkeypatch.setattr(server.service, "metered", lambda grid: grid)
    checkpoint = SimpleNamespace(round_number=0)
    monkeypatch.setattr(server.service, "last_checkpoint", lambda *_, **__: checkpoint)

    def rounds(grid, campaign, *, start, **_):
        starts.append(start)
        if len(starts) <= lost:
            raise TaskError("Flower's Runtime API must answer, got ConnectError.", gone=True)
        return "done"

    monkeypatch.setattr(server.service, "run_rounds", rounds)
    campaign = SimpleNamespace(folder=tmp_path, policy=SimpleNamespace(sha256="p"))
    judge = SimpleNamespace(begin=lambda: None)
    if lost == 5:
        with pytest.raises(TaskError):
            server.service.serve(folder, campaign, judge=judge, on_state=said.append)
        return
    assert server.service.serve(folder, campaign, judge=judge, on_state=said.append) == "done"
    assert starts == [checkpoint] * (lost + 1)  # each from what was on disk then
    assert len(said) == lost


@pytest.mark.fault("R2")
def test_runs_are_lost_for_good_only_where_no_round_is_finished_between(folder, tmp_path, monkeypatch):
    rounds, done = iter([TaskError("away")] * 12 + ["done"]), iter(range(100))
    monkeypatch.setattr(server.service, "_Watch", Interrupted)
    monkeypatch.setattr(server.service, "metered", lambda grid: grid)
    monkeypatch.setattr(
        server.service, "last_checkpoint", lambda *_, **__: SimpleNamespace(round_number=next(done) // 2)
    )

    def run_rounds(*_, **__):
        found = next(rounds)
        if isinstance(found, TaskError):
            raise found
        return found

    monkeypatch.setattr(server.service, "run_rounds", run_rounds)
    campaign = SimpleNamespace(folder=tmp_path, policy=SimpleNamespace(sha256="p"))
    assert server.service.serve(folder, campaign, judge=SimpleNamespace(begin=lambda: None)) == "done"


@pytest.mark.fault("R11")
@pytest.mark.parametrize(("begun", "at"), [(4, 2), (7, 7)], ids=["one is asked for again", "several are passed over"])
def test_a_server_whose_newest_checkpoints_are_lost_says_so_and_asks_with_new_numbers(
    folder, tmp_path, monkeypatch, begun, at
):
    save_checkpoint(tmp_path / "checkpoints", Checkpoint(2, "p", {"a": np.ones(1)}, OptimizerState(), {0: 2}))
    note_begun(tmp_path, begun)
    starts, said = [], []
    monkeypatch.setattr(server.service, "_Watch", Interrupted)
    monkeypatch.setattr(server.service, "metered", lambda grid: grid)
    monkeypatch.setattr(server.service, "run_rounds", lambda *_, start, **__: starts.append(start))
    campaign = SimpleNamespace(folder=tmp_path, policy=SimpleNamespace(sha256="p", rounds=9))
    server.service.serve(folder, campaign, judge=SimpleNamespace(begin=lambda: None), on_state=said.append)
    [start] = starts
    assert (start.round_number, start.arrays_of, start.participations) == (at, 2, {0: 2})
    assert [("passed over" in words) for words in said] == ([True] if at == 7 else [])


@pytest.mark.fault("R2")
def test_a_run_waits_for_a_superlink_that_is_being_started_again(watch, link, monkeypatch):
    monkeypatch.setattr(server.service, "_WATCH_S", 0.01)
    tries = iter([CampaignError("away"), CampaignError("away"), 7])

    def start_run():
        found = next(tries)
        if isinstance(found, CampaignError):
            raise found
        return found

    link.stop_runs, link.start_run = lambda: None, start_run
    monkeypatch.setattr(watch, "_take_task", lambda run_id, deadline: run_id)
    assert watch._take_run() == 7


def test_a_watch_that_dies_at_the_start_is_an_error_and_not_a_wait(watch, monkeypatch):
    def die():
        raise RuntimeError("of a kind nobody foresaw")

    watch._link.keep_up, watch._link.stop = die, lambda: None
    monkeypatch.setattr(server.service, "start_front", lambda *_, **__: SimpleNamespace(counts=dict, stop=lambda: None))
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with pytest.raises(ServerError, match="it ended"), watch.running(host="127.0.0.1"):
        time.sleep(0.5)
