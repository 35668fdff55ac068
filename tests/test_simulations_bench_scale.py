"""Many users: nothing is held for a device that has answered, sums do not depend on the order, forecasts are right."""

import itertools
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

import client.training.device
from client.training.device import SimulatedDevice
from server.aggregate import mean_update, ring_sum, sum_updates
from server.app import run_rounds
from server.strategy import _by_seat
from shared.config import Scenario
from shared.errors import CampaignError, PrivacyError
from shared.flower.grid import InlineGrid
from shared.protocol import wire
from shared.protocol.campaign import Resumed, write_resumed
from simulations.bench import scale as bench_scale
from simulations.cost_model import UNITS, fit_sum_cost, forecast, lines

MEASURED = Path(__file__).parents[1] / "docs" / "measurements"


def test_an_inline_grid_asks_a_device_when_its_reply_is_wanted():
    heard = []

    def echo(message, context):
        heard.append(context.node_config["partition-id"])
        return Message(message.content, reply_to=message)

    grid = InlineGrid(echo, devices=3, run_config={})
    asked = (Message(RecordDict(), dst_node_id=node, message_type="train") for node in grid.seats)
    replies = iter(grid.send_and_receive(asked))
    for number in range(3):
        assert heard == list(range(number))
        next(replies)
    assert next(replies, None) is None
    assert not grid._replies
    assert (grid.messages, grid.wall_s > 0) == (3, True)


def test_what_a_device_keeps_outlives_its_context_and_nothing_else_does():
    seen = []

    def count(message, context):
        seen.append((context.node_id, "kept" in context.state and context.state["kept"]["n"]))
        if message.content["config"]["keep"]:
            context.state["kept"] = ConfigRecord({"n": len(seen)})
        return Message(RecordDict(), reply_to=message)

    grid = InlineGrid(count, devices=2, run_config={})

    def ask(node, keep):
        content = RecordDict({"config": ConfigRecord({"keep": keep})})
        list(grid.send_and_receive([Message(content, dst_node_id=node, message_type="train")]))

    for node, keep in ((1000, True), (1001, False), (1000, False), (1000, True), (1000, False)):
        ask(node, keep)
    assert seen == [(1000, False), (1001, False), (1000, 1), (1000, 1), (1000, 4)]
    assert (list(grid._contexts._states), grid._contexts._held) == ([1000], {})
    assert grid._contexts[1000].state["kept"]["n"] == 4  # one that is looked at stays, and is the device's
    grid._contexts[1000].state["kept"] = ConfigRecord({"n": 9})
    ask(1000, False)
    assert seen[-1] == (1000, 9)
    with pytest.raises(KeyError):
        ask(1002, False)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_replies_are_added_up_by_seat_in_whatever_order_they_come(order):
    updates = {seat: {"w": np.array([10.0**seat, 1.0], np.float32) / 3} for seat in range(4)}
    wanted = mean_update([updates[seat] for seat in range(4)], denominator=4)["w"]
    taken, given = [], []

    def good():
        for seat in order:
            given.append(seat)
            yield seat, updates[seat]

    for seat, _ in _by_seat(good(), [3, 1, 0, 2]):
        taken.append(seat)
        assert set(range(seat + 1)) <= set(given)
        if order == (0, 1, 2, 3):
            assert given == taken  # nothing waits that need not
    assert taken == [0, 1, 2, 3]
    assert (mean_update((u for _, u in _by_seat(good(), range(4))), denominator=4)["w"] == wanted).all()
    assert [seat for seat, _ in _by_seat(iter([(2, {}), (3, {}), (1, {})]), range(4))] == [1, 2, 3]  # 0 is silent


def test_a_running_sum_is_the_sum_and_wraps_as_a_ring_does():
    draw = np.random.default_rng(0)
    rows = draw.integers(0, 2**32, (50, 7), dtype=np.uint32)
    assert (ring_sum(iter(rows)) == rows.sum(axis=0, dtype=np.uint32).view(np.int32)).all()
    floats = [{"w": row} for row in draw.standard_normal((50, 7)).astype(np.float32)]
    total = np.zeros(7)
    for each in floats:
        total = total + each["w"].astype(np.float64)
    assert (sum_updates(iter(floats), dtype=np.float64)["w"] == total).all()
    assert sum_updates([], dtype=np.float64) == {}


@pytest.fixture(scope="module")
def stand(tiny_base, tmp_path_factory):
    """(users) -> a campaign of so many, and what answers for them."""

    def make(users):
        return bench_scale._stand(tmp_path_factory.mktemp("scale"), users, str(tiny_base.folder))

    return make


def _peak_kib(stand):
    """Peak of what Python holds during rounds of devices that answer at once."""
    policy = stand.campaign.policy
    update = {slot.name: np.zeros(slot.shape, slot.dtype) for slot in policy.reply_slots(1)}

    def answer(message, context):
        context.state["participation"] = ConfigRecord({"count": 1, "last_round": 1})
        number = int(message.content["config"]["round"])
        return Message(wire.pack_reply(update, round_number=number, policy_sha256=policy.sha256), reply_to=message)

    grid = InlineGrid(answer, devices=policy.cohort_size, run_config={})
    tracemalloc.start()
    try:
        run_rounds(grid, stand.campaign, roster=grid.seats)
        return tracemalloc.get_traced_memory()[1] / 1024
    finally:
        tracemalloc.stop()


def test_memory_hardly_grows_with_the_users(stand, monkeypatch):
    """Messages and replies of a round together would be 5 KiB a user."""
    few, many = (_peak_kib(stand(users)) for users in (20, 100))
    assert (many - few) / 80 < 1.6

    def at_once(self, messages, *, timeout=None):
        return list(stream(self, messages, timeout=timeout))

    stream = InlineGrid.send_and_receive
    monkeypatch.setattr(InlineGrid, "send_and_receive", at_once)
    assert (_peak_kib(stand(100)) - few) / 80 > 2.4


def test_a_size_is_measured_by_real_answers(tiny_base):
    found = bench_scale.one(100, base=str(tiny_base.folder))
    assert found["seconds"] > 0
    assert 0 < found["device_s"] < found["cpu_s"]
    assert [answered for answered, _, _ in found["marks"]] == list(range(5, 101, 5))
    assert found["values"] == 33
    times = [seconds for _, seconds, _ in found["marks"]]
    assert times == sorted(times)


def test_growth_is_a_line_through_the_sizes():
    def run(seconds, peak):
        return {"seconds": 0.0, "cpu_s": seconds, "rss_mib": peak}

    runs = {n: [run(0.002 * n, 600 + n / 1024), run(0.002 * n, 600 + n / 1024)] for n in (100, 1000, 10000)}
    growth = bench_scale._growth(runs)
    assert growth["exponent"]["value"] == pytest.approx(1.0)
    assert growth["kib_per_user"]["value"] == pytest.approx(1.0)
    squared = {n: [run(1e-6 * n * n, 600.0)] for n in (100, 1000, 10000)}
    assert bench_scale._growth(squared)["exponent"]["low"] > bench_scale._LINEAR


@pytest.mark.parametrize(("users", "rounds"), [((1000,), 5), ((100, 200), 1), ((50, 1000), 2)])
def test_sizes_that_give_no_slope_are_refused(users, rounds):
    with pytest.raises(CampaignError, match="at least two sizes"):
        bench_scale.measure(rounds=rounds, users=users, quiet=True)


def test_devices_of_a_resumed_simulation_read_its_file_once(stand, monkeypatch):
    campaign = stand(100).campaign
    write_resumed(campaign.folder, Resumed(1, dict.fromkeys(range(100), 1)))
    reads = []
    read = client.training.device.read_resumed
    monkeypatch.setattr(client.training.device, "read_resumed", lambda folder: reads.append(folder) or read(folder))
    grid = InlineGrid(lambda message, context: message, devices=100, run_config={"campaigns": "."})

    def spent(seat):
        return SimulatedDevice(grid._contexts[1000 + seat])._spent_before(campaign)

    assert [dict(spent(seat)) for seat in (0, 99)] == [{"count": 1, "last_round": 1}] * 2
    assert len(reads) == 1
    write_resumed(campaign.folder, Resumed(2, {7: 2}))
    assert dict(spent(7)) == {"count": 2, "last_round": 2}
    write_resumed(campaign.folder, None)
    assert dict(spent(7)) == {"count": 0, "last_round": 0}


def fleet(**privacy):
    return Scenario.model_validate(
        {"name": "fleet", "federation": {"cohort_size": 943, "rounds": 10}, "privacy": {"epsilon": 4.0, **privacy}}
    )


USER = {"unit": "user", "trust": "distributed"}


def test_the_constants_are_those_of_the_files():
    measured = json.loads((MEASURED / "bench-secure-sum.json").read_text(encoding="utf-8"))
    for part, most in (("device", 0.2), ("survivor", 0.74), ("dropout", 0.32)):
        found, worst = fit_sum_cost(measured["sums"], measured["terms"], part)
        told = getattr(UNITS, f"sum_{part}")
        assert worst < most
        for name in ("fixed", "neighbour", "value", "mask"):
            assert getattr(told, name) == pytest.approx(getattr(found, name), rel=0.01, abs=1e-9)
    scaled = json.loads((MEASURED / "bench-scale.json").read_text(encoding="utf-8"))
    few, many = (scaled["sums"][size] for size in ("1000", "10000"))
    neighbours = 152 - 124
    member = (many["server_ms"] - few["server_ms"] - UNITS.sum_survivor.neighbour * neighbours) / 9000
    assert member == pytest.approx(UNITS.sum_survivor.member, rel=0.02)
    server_ms = scaled["sizes"]["100000"]["server_ms_per_user"]["median"]
    assert pytest.approx(server_ms, rel=0.02) == UNITS.reply_ms
    more = json.loads((MEASURED / "bench-waiting.json").read_text(encoding="utf-8"))["per_device"]
    assert pytest.approx(sum(more["cpu_s_per_minute"].values()), rel=0.01) == UNITS.waiting_cpu_s
    assert pytest.approx(more["requests_per_minute"], rel=0.01) == UNITS.waiting_requests


def test_the_forecast_of_a_sum_is_near_one_that_was_measured():
    """The largest group, from constants of the smaller ones alone: what it would have foretold."""
    measured = json.loads((MEASURED / "bench-secure-sum.json").read_text(encoding="utf-8"))
    known = {group: cells for group, cells in measured["sums"].items() if group != "943"}
    parts = {part: fit_sum_cost(known, measured["terms"], part)[0] for part in ("device", "survivor", "dropout")}
    units = replace(UNITS, reply_ms=0.0, **{f"sum_{part}": cost for part, cost in parts.items()})
    for values, cell in measured["sums"]["943"].items():
        found = forecast(fleet(**USER), clients=943, values=int(values), dropout=5 / 943, units=units)
        assert found["device"]["sum"]["neighbours"] == measured["terms"]["943"]["neighbours"]
        assert found["device"]["sum"]["threshold"] == measured["terms"]["943"]["threshold"]
        assert found["round"]["lost"] == cell["lost"]
        assert 0.6 < found["device"]["sum"]["device_cpu_ms"] / cell["device_ms"]["all"]["median"] < 1.6
        assert 0.35 < 1000 * found["server"]["cpu_s"] / cell["server_ms"]["all"] < 1.6
        assert found["device"]["bytes_up"] == pytest.approx(cell["bytes"]["up"], rel=0.02)


@pytest.mark.parametrize("size", ["100", "1000", "10000"])
def test_the_forecast_of_the_server_is_near_real_sums(size):
    """Simulated devices have no certificates: what a device receives and computes is foretold with them."""
    found = json.loads((MEASURED / "bench-scale.json").read_text(encoding="utf-8"))["sums"][size]
    told = forecast(
        fleet(**USER).model_copy(update={"federation": fleet().federation.model_copy(update={"cohort_size": "all"})}),
        clients=int(size), values=found["values"], dropout=0.0,
    )  # fmt: skip
    assert 0.8 < 1000 * told["server"]["cpu_s"] / int(size) / found["server_ms"] < 1.5
    assert told["device"]["bytes_up"] == pytest.approx(found["bytes_up"], rel=0.001)
    certificates = 289 * told["device"]["sum"]["neighbours"]
    assert told["device"]["bytes_down"] - found["bytes_down"] == pytest.approx(certificates, rel=0.01)


@pytest.mark.parametrize("trust", ["local", "none"])
def test_the_forecast_has_the_policys_noise_and_the_bytes_of_a_real_run(tiny_base, stand, trust):
    found = bench_scale.one(100, base=str(tiny_base.folder))
    scenario = stand(100).campaign.scenario
    privacy = scenario.privacy.model_copy(update={"trust": trust})
    told = forecast(scenario.model_copy(update={"privacy": privacy}), clients=100, values=found["values"], dropout=0)
    assert told["device"]["bytes_up"] == pytest.approx(found["bytes_up"], rel=0.02)
    assert told["device"]["bytes_down"] == pytest.approx(found["bytes_down"], rel=0.02)
    noise = stand(100).campaign.policy.noise_multiplier if trust == "local" else 0.0
    assert told["privacy"]["noise_multiplier"] == pytest.approx(noise, rel=0.003)
    assert told["campaign"]["days"] is None  # everybody answers: how long they take is not known


def test_more_devices_mean_less_noise_and_more_work():
    small, large = (forecast(fleet(**USER), clients=n, values=2000) for n in (10_000, 1_000_000))
    assert small["privacy"]["participations"] == large["privacy"]["participations"] == 1
    wide = fleet(**USER).model_copy(update={"federation": fleet().federation.model_copy(update={"cohort_size": 9430})})
    wider = forecast(wide, clients=1_000_000, values=2000)
    assert wider["privacy"]["noise_of_the_mean"] < large["privacy"]["noise_of_the_mean"] / 9
    assert wider["privacy"]["outweighed_by"] == pytest.approx(large["privacy"]["outweighed_by"], rel=0.05)
    assert wider["server"]["cpu_s"] > 10 * large["server"]["cpu_s"]
    # Seats of the whole cohort are named to every device.
    assert wider["device"]["bytes_down"] - large["device"]["bytes_down"] > 8 * (9430 - 943)
    assert large["privacy"]["delta"] == 1e-7
    assert large["round"]["everybody_answers"] < 1e-20
    assert large["campaign"]["days"] == pytest.approx(600 * 10 / 86400)
    assert "secure sum" in "\n".join(lines(large))


@pytest.mark.parametrize("wrong", [{"dropout": 1.0}, {"dropout": float("nan")}, {"values": 0}, {"dropout": 0.3}])
def test_an_impossible_fleet_is_refused(wrong):
    with pytest.raises(PrivacyError, match=r"must be|would be void"):
        forecast(fleet(**USER), **({"clients": 10_000, "values": 2000} | wrong))
