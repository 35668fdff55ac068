"""A device's service over Flower's own programs: absent when its schedule says so, back when it may, gone in time."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from client.home.home import create_home
from client.owner.device_key import make_device_key
from client.service.schedule import change_schedule, clear_schedule
from server.certificates import new_authority
from server.folder import create_server
from server.superlink import SuperLink
from shared.flower.control import Control, key_bytes
from shared.flower.tasks import Tasks
from shared.protocol.wire import refusal_code
from tests.joined import ROOT, ask_devices, children_of, service_of, start_device, start_run, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    """A SuperLink with a run: what registers devices, and what asks them."""
    server = create_server(tmp_path_factory.mktemp("link") / "server", address="127.0.0.1")
    link = SuperLink(server)
    link.keep_up()
    try:
        certificate = server.ca_certificate.read_bytes()
        control = Control(link.address, root_certificates=certificate)
        start_run(control)
        secret = server.executor_secret.read_bytes()
        tasks = Tasks(link.address, secret=secret, kind="server", root_certificates=certificate)
        run = wait_until(tasks.take)
        yield link, server, control, run.grid()
        run.close()
        tasks.close()
        control.close()
    finally:
        link.stop()


@pytest.fixture
def device(tmp_path, campaign):
    """A device that is enrolled: its home, its node, and what starts its service."""
    link, server, control, _ = campaign
    home = create_home(tmp_path / "home", keystore="file", cap_epsilon=8.0, cap_delta=1e-4).folder
    node = control.register(key_bytes(make_device_key(home)), name=tmp_path.name)
    started = []

    def start():
        started.append(start_device(home, link.address, server.ca_certificate))
        return started[-1]

    yield home, node, start
    for process in started:
        process.kill()
        process.wait()


def test_a_device_is_absent_while_its_schedule_says_so(device):
    home, _, start = device
    change_schedule(home, put={"window": closed()})
    running = start()
    found = service_of(home, until="away")
    assert found["schedule"] == {"window": closed()}
    assert "next span begins" in found["unmet"]["window"]
    assert children_of(running.pid) == []
    clear_schedule(home)
    assert service_of(home, until="waiting")["unmet"] == {}
    [child] = children_of(running.pid)
    change_schedule(home, put={"window": closed()})
    service_of(home, until="away")
    assert children_of(running.pid) == []
    assert not Path(f"/proc/{child}").exists()
    (home / "schedule.json").write_text("damaged")
    wait_until(lambda: "schedule" in service_of(home, until="away")["unmet"])
    assert children_of(running.pid) == []
    running.terminate()
    assert running.wait(5.0) == 0


def test_a_round_that_has_begun_is_ended_first(device, campaign):
    home, node, start = device
    *_, grid = campaign
    running = start()
    service_of(home, until="waiting")
    ask_devices(grid, [node], 1, sleep=True, until=home / "asleep")
    change_schedule(home, put={"window": closed()})
    time.sleep(4.0)
    assert service_of(home, until="training")["unmet"]
    [child] = children_of(running.pid)
    (home / "awake").touch()
    service_of(home, until="waiting")
    replies = ask_devices(grid, [node], 2, answers=False)
    assert [refusal_code(reply) for reply in replies] == ["PAUSED"]
    service_of(home, until="away")
    assert children_of(running.pid) == []
    log = (home / "flower" / "supernode.log").read_text()
    assert log.count("Sent successfully") == log.count("Receiving: train message") == 2
    assert not Path(f"/proc/{child}").exists()


def test_a_secure_sum_is_ended_and_no_other_begun(device, campaign):
    home, node, start = device
    *_, grid = campaign
    running = start()
    service_of(home, until="waiting")
    ask_devices(grid, [node], 1, kind="query.secure_keys")
    change_schedule(home, put={"window": closed()})
    time.sleep(3.0)
    for kind in ("query.secure_shares", "train", "query.secure_unmask"):
        assert service_of(home, until="waiting")["unmet"]
        ask_devices(grid, [node], 1, kind=kind)
    service_of(home, until="away")
    assert children_of(running.pid) == []


@pytest.mark.fault("R23")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_service_that_computes(device, campaign, number, record_property):
    home, node, start = device
    *_, grid = campaign
    running = start()
    service_of(home, until="waiting")
    ask_devices(grid, [node], 1, sleep=True, until=home / "asleep")
    service_of(home, until="training")
    [child] = children_of(running.pid)
    record_property("ended_s", ends_within(5.0, running, number, code=7))
    wait_until(lambda: not Path(f"/proc/{child}").exists())


@pytest.mark.fault("R23")
def test_a_signal_ends_a_service_that_waits_to_try_again(device, campaign, record_property):
    home, node, start = device
    *_, control, _ = campaign
    control.unregister(node)
    running = start()

    def waits():
        found = service_of(home, until="not-enrolled")["retry"]
        return found if found and found["failures"] >= 2 else None

    found = wait_until(waits)
    assert 0.0 <= found["in_s"] <= 2.0 ** (found["failures"] - 1)
    record_property("ended_s", ends_within(5.0, running, signal.SIGTERM, code=0))


def test_the_command_keeps_a_log_and_says_why_it_is_away(tmp_path):
    home = create_home(tmp_path / "home", keystore="file", cap_epsilon=8.0, cap_delta=1e-4).folder
    (tmp_path / "ca.crt").write_bytes(new_authority().certificate_pem)
    change_schedule(home, put={"window": closed()})
    command = [sys.executable, "-m", "sottovoce.cli", "client"]
    place = ["--home", str(home)]
    join = [*command, "join", "127.0.0.1:1", "--ca", str(tmp_path / "ca.crt"), "--nice", "0", *place]
    running = subprocess.Popen(join, cwd=ROOT)
    try:
        service_of(home, until="away")
        said = subprocess.run([*command, "status", *place], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert "service: away" in said
        assert "window: it is " in said
        ends_within(30.0, running, signal.SIGTERM, code=0)  # how soon, the tests above say
    finally:
        running.kill()
        running.wait()
    log = home / "log" / "service.log"
    assert [stamped.split(" ", 2)[2] for stamped in log.read_text().splitlines()] == [
        '{"event": "service", "state": "started"}',
        '{"condition": "window", "event": "away"}',
        '{"event": "service", "state": "away"}',
        '{"event": "service", "state": "stopped"}',
    ]
    assert (log.stat().st_mode & 0o777, log.parent.stat().st_mode & 0o777) == (0o600, 0o700)


def ends_within(seconds, running, number, *, code):
    started = time.monotonic()
    running.send_signal(number)
    assert running.wait(seconds) == code
    return round(time.monotonic() - started, 2)


def closed():
    """A window that does not begin within hours."""
    hour = time.localtime().tm_hour
    return f"{(hour + 6) % 24:02}:00-{(hour + 7) % 24:02}:00"
