"""A device's service: which server it joins, one service a home, and two homes over Flower's own programs."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from client.home.home import create_home
from client.owner.device_key import make_device_key
from client.service.control import control_client
from client.service.join import Service, _only_service, keep_invitation, read_invitation
from client.service.supernode import ONLINE
from server.certificates import new_authority
from server.folder import create_server
from server.superlink import SuperLink
from shared.errors import StoreError
from shared.flower.control import Control, key_bytes
from shared.flower.tasks import Tasks
from tests.joined import ask_devices, children_of, service_of, start_device, start_run, wait_until


@pytest.fixture(scope="module")
def certificate():
    return new_authority().certificate_pem


@pytest.fixture
def invited(tmp_path, certificate):
    folder = tmp_path / "invitation"
    folder.mkdir()
    (folder / "server.json").write_text(json.dumps({"address": "fl.example.org", "port": 9092}))
    (folder / "ca.crt").write_bytes(certificate)
    return folder


@pytest.fixture
def home(tmp_path):
    return create_home(tmp_path / "home", keystore="file", cap_epsilon=8.0, cap_delta=1e-4)


def test_an_invitation_is_a_folder_or_an_address_with_an_authority(invited, tmp_path):
    from_folder = read_invitation(str(invited), ca=None, home=tmp_path)
    named = read_invitation("fl.example.org:9092", ca=invited / "ca.crt", home=tmp_path)
    assert from_folder == named
    assert named.server == "fl.example.org:9092"
    assert read_invitation("[::1]:9092", ca=invited / "ca.crt", home=tmp_path).server == "[::1]:9092"


def test_a_home_keeps_its_invitation(invited, home):
    with pytest.raises(StoreError, match="joined none yet"):
        read_invitation(None, ca=None, home=home.folder)
    invitation = read_invitation(str(invited), ca=None, home=home.folder)
    keep_invitation(home.folder, invitation)
    assert read_invitation(None, ca=None, home=home.folder) == invitation


@pytest.mark.parametrize(
    ("server", "ca", "words"),
    [
        ("fl.example.org:9092", None, "needs --ca"),
        ("fl.example.org", "ca.crt", "HOST:PORT"),
        (":9092", "ca.crt", "HOST:PORT"),
        ("fl.example.org:0", "ca.crt", "address and the port"),
        ("fl.example.org:65536", "ca.crt", "address and the port"),
        ("fl example:9092", "ca.crt", "address and the port"),
        ("--insecure:9092", "ca.crt", "address and the port"),
        ("fl.example.org:9092", "server.json", "must be PEM"),
        ("fl.example.org:9092", "absent.crt", "readable file"),
    ],
)
def test_an_impossible_invitation_is_refused(invited, tmp_path, server, ca, words):
    with pytest.raises(StoreError, match=words):
        read_invitation(server, ca=ca and invited / ca, home=tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"address": "a", "port": "x"}', '{"address": "a", "port": 1, "x": 2}']
)
def test_a_damaged_invitation_is_refused(invited, tmp_path, text):
    (invited / "server.json").write_text(text)
    with pytest.raises(StoreError, match="address and the port"):
        read_invitation(str(invited), ca=None, home=tmp_path)


def test_the_device_key_is_made_once_and_is_the_owners_alone(home):
    line = make_device_key(home.folder)
    assert make_device_key(home.folder) == line
    assert line.startswith("ecdsa-sha2-nistp384 ")
    assert (home.folder / "device.pub").read_text().strip() == line
    assert (home.folder / "device.key").stat().st_mode & 0o777 == 0o600
    assert len(key_bytes(line)) > 0
    (home.folder / "device.key").write_text("damaged")
    with pytest.raises(StoreError, match="P-384"):
        make_device_key(home.folder)


@pytest.mark.fault("R18")
def test_one_service_runs_for_a_home(home, tmp_path):
    other = create_home(tmp_path / "other", keystore="file", cap_epsilon=8.0, cap_delta=1e-4)
    with (
        _only_service(home.folder),
        _only_service(other.folder),
        pytest.raises(StoreError, match="one service"),
        _only_service(home.folder),
    ):
        pytest.fail("two services of one home")
    with _only_service(home.folder):
        pass


def test_a_service_says_what_it_is_doing(home):
    states = []
    service = Service(home, on_state=states.append)
    assert service.status()["service"]["last_contact"] is None
    service.on_link(ONLINE)
    service.on_training(True)
    service.on_link("offline")
    assert service.state == "training"
    service.on_training(False)
    service.on_link("not-enrolled")
    assert states == ["waiting", "training", "offline", "not-enrolled"]
    found = service.status()
    assert found["service"]["tasks_answered"] == 1
    assert found["service"]["pid"] == os.getpid()
    assert found["home"]["paused"] is False


def test_a_service_tells_of_a_ledger_it_cannot_read(home):
    (home.folder / "ledger.db").unlink()
    found = Service(home).status()
    assert found["home"] is None
    assert "ledger" in found["problem"]


@pytest.mark.fault("R15")
@pytest.mark.fault("R4", "R23")
@pytest.mark.slow
def test_two_homes_take_part_and_no_bundle_is_opened(tmp_path):
    """Flower's SuperLink and SuperNodes, two services, one hostile bundle."""
    trap = tmp_path / "trap"
    homes = [create_home(tmp_path / f"home-{i}", keystore="file", cap_epsilon=8.0, cap_delta=1e-4) for i in (0, 1)]
    server = create_server(tmp_path / "server", address="127.0.0.1")
    ca = server.ca_certificate
    link = SuperLink(server)
    link.keep_up()
    devices = []
    try:
        control = Control(link.address, root_certificates=ca.read_bytes())
        nodes = [control.register(key_bytes(make_device_key(homes[0].folder)), name="one")]
        devices = [start_device(home.folder, link.address, ca) for home in homes]
        assert service_of(homes[1].folder, until="not-enrolled")["pid"] == devices[1].pid
        nodes.append(control.register(key_bytes(make_device_key(homes[1].folder)), name="two"))
        for home, device in zip(homes, devices, strict=True):
            assert service_of(home.folder, until="waiting")["pid"] == device.pid

        bundle = _hostile_bundle(trap)
        start_run(control, bundle)
        tasks = Tasks(
            link.address, secret=server.executor_secret.read_bytes(), kind="server", root_certificates=ca.read_bytes()
        )
        run = wait_until(tasks.take)
        grid = run.grid()
        for number in (1, 2, 3):
            told = ask_devices(grid, nodes, number)
            assert [one["pid"] for one in told] == [device.pid for device in devices]
            assert [one["calls"] for one in told] == [number, number]
            assert not any(one["hostile"] for one in told)
        assert not list(tmp_path.glob("trap*"))
        for home in homes:
            assert not (home.folder / "flower" / "apps").exists()
            assert not list(home.folder.rglob("*hostile*"))
        children = [children_of(device.pid) for device in devices]
        assert [len(found) for found in children] == [1, 1]

        with control_client(homes[0].folder) as owner:
            owner.stop()
        assert devices[0].wait(5.0) == 0
        ask_devices(grid, nodes[1:], 4, sleep=True, timeout=20.0, until=homes[1].folder / "asleep")
        assert service_of(homes[1].folder, until="training")["tasks_answered"] == 3
        started = time.monotonic()
        devices[1].terminate()
        assert devices[1].wait(5.0) == 7
        assert time.monotonic() - started < 5.0
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in (*children[0], *children[1])))

        killed = start_device(homes[0].folder, link.address, ca)
        devices.append(killed)
        service_of(homes[0].folder, until="waiting")
        [child] = children_of(killed.pid)
        killed.kill()
        killed.wait(5.0)
        wait_until(lambda: not Path(f"/proc/{child}").exists())
        with control_client(homes[0].folder) as owner:
            assert owner is None
        run.close()
        tasks.close()
        control.close()
        _import_from(bundle, tmp_path / "unpacked")
        assert trap.exists()  # had anybody done that, we would have seen it
    finally:
        for device in devices:
            device.kill()
            device.wait()
        link.stop()


@pytest.mark.fault("R4")
@pytest.mark.slow
def test_a_service_outlives_its_supernode_and_hears_of_its_end(tmp_path):
    home, other = (
        create_home(tmp_path / name, keystore="file", cap_epsilon=8.0, cap_delta=1e-4) for name in ("home", "other")
    )
    server = create_server(tmp_path / "server", address="127.0.0.1")
    link = SuperLink(server)
    link.keep_up()
    control = Control(link.address, root_certificates=server.ca_certificate.read_bytes())
    fallen = None
    node = control.register(key_bytes(make_device_key(home.folder)), name="one")
    device = start_device(home.folder, link.address, server.ca_certificate)
    try:
        service_of(home.folder, until="waiting")
        control.unregister(node)
        service_of(home.folder, until="not-enrolled")
        control.register(key_bytes(make_device_key(other.folder)), name="other")
        fallen = start_device(other.folder, link.address, server.ca_certificate)
        service_of(other.folder, until="waiting")
        [child] = children_of(fallen.pid)
        os.kill(child, signal.SIGKILL)
        service_of(other.folder, until="offline")
        wait_until(lambda: children_of(fallen.pid) not in ([], [child]))
        log = other.folder / "flower" / "supernode.log"
        wait_until(lambda: "[code: 2004]" in log.read_text())  # the server thinks it is still there
        assert service_of(other.folder, until="offline")["pid"] == fallen.pid
        assert device.poll() is None
        assert fallen.poll() is None
    finally:
        control.close()
        for service in filter(None, (device, fallen)):
            service.terminate()
            service.wait(5.0)
        link.stop()


@pytest.mark.slow
def test_a_stranger_at_the_servers_address_is_named(tmp_path):
    home = create_home(tmp_path / "home", keystore="file", cap_epsilon=8.0, cap_delta=1e-4)
    server = create_server(tmp_path / "server", address="127.0.0.1")
    other = tmp_path / "other.crt"
    other.write_bytes(new_authority().certificate_pem)
    link = SuperLink(server)
    link.keep_up()
    device = start_device(home.folder, link.address, other)
    try:
        assert service_of(home.folder, until="distrusted")["last_contact"] is None
    finally:
        device.terminate()
        device.wait(5.0)
        link.stop()


def _hostile_bundle(trap):
    """A bundle that leaves a file wherever its code is unpacked or run."""
    code = f"from pathlib import Path\n\nPath({str(trap)!r}).touch()\napp = print\n"
    settings = """\
[project]
name = "sottovoce"
version = "0.1.0"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "sottovoce"

[tool.flwr.app.components]
serverapp = "hostile_bundle:app"
clientapp = "hostile_bundle:app"

[tool.flwr.app.config]
"""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as bundle:
        bundle.writestr("pyproject.toml", settings)
        for name in ("hostile_bundle.py", "client/app.py", "client/__init__.py", "sitecustomize.py"):
            bundle.writestr(name, code)
        for name in ("../trap-above", "../../trap-above", f"{trap}-absolute"):
            bundle.writestr(name, code)
    return content.getvalue()


def _import_from(bundle, folder):
    """What Flower's own executor does with a bundle."""
    folder.mkdir()
    with zipfile.ZipFile(io.BytesIO(bundle)) as content:
        content.extract("hostile_bundle.py", folder)
    subprocess.run([sys.executable, "-c", "import hostile_bundle"], cwd=folder, check=True, timeout=30)
