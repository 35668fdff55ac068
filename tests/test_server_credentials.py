"""The devices of a register, certified by the operator: all of them, nobody else, and under one seat each."""

import json
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.credentials import certify_devices, credentials
from server.folder import create_server
from server.register import enrol, read_register, revoke
from shared.errors import ServerError
from shared.protocol.enrolment import check_certificate
from shared.protocol.signing import load_public
from sottovoce.cli import main

NOW = datetime(2030, 5, 1, tzinfo=UTC)


def new_key():
    return (
        ec.generate_private_key(ec.SECP384R1())
        .public_key()
        .public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        .decode()
    )


@pytest.fixture
def server(tmp_path):
    """A server with three devices as an older version enrolled them: without certificates."""
    made = create_server(tmp_path / "server", address="localhost")
    for name in "abc":
        enrol(made.folder, new_key(), name, now=NOW)
    return made


def edit(server, change):
    content = json.loads(server.register.read_text())
    change(content["devices"])
    server.register.write_text(json.dumps(content))


def test_who_may_take_part_is_certified_once(server):
    revoke(server.folder, "b", now=NOW)
    found = credentials(server)
    assert set(found) == {0, 2}
    operator = load_public(server.operator_public)
    devices = read_register(server.folder)
    for seat, one in found.items():
        assert one.public_key == devices[seat].public_key
        check_certificate(operator, seat=seat, public_key=one.public_key, certificate=one.certificate)
    assert [device.certificate is None for device in devices] == [False, True, False]
    before = server.register.read_bytes()
    server.operator_key.unlink()  # what is certified needs the operator's key no more
    assert credentials(server) == found
    assert server.register.read_bytes() == before


@pytest.mark.fault("R19")
def test_a_register_as_it_was_before_certificates_is_read_and_filled(server):
    edit(server, lambda devices: [device.pop("certificate") for device in devices])
    assert [device.certificate for device in read_register(server.folder)] == [None] * 3
    assert len(credentials(server)) == 3
    assert b'"certificate": null' not in server.register.read_bytes()


def test_a_device_that_is_revoked_is_left_out_at_once(server):
    assert set(credentials(server)) == {0, 1, 2}
    revoke(server.folder, "c", now=NOW)
    assert set(credentials(server)) == {0, 1}


def swap(devices):
    devices[0]["certificate"], devices[1]["certificate"] = devices[1]["certificate"], devices[0]["certificate"]


def swap_keys(devices):
    devices[0]["public_key"], devices[1]["public_key"] = devices[1]["public_key"], devices[0]["public_key"]


@pytest.mark.parametrize("change", [swap, swap_keys, lambda devices: devices[0].update(public_key=new_key())])
def test_a_certificate_of_another_seat_or_key_is_handed_to_nobody(server, change):
    credentials(server)
    edit(server, change)
    with pytest.raises(ServerError, match=r"that of device 'a' is none; restore a backup, or remove its"):
        credentials(server)


def test_a_certificate_by_another_operator_is_handed_to_nobody(server, tmp_path):
    credentials(server)
    other = create_server(tmp_path / "other", address="localhost")
    other.register.write_bytes(server.register.read_bytes())
    with pytest.raises(ServerError, match="must hold certificates of this server's operator"):
        credentials(other)
    edit(other, lambda devices: [device.pop("certificate") for device in devices])
    assert set(credentials(other)) == {0, 1, 2}


def test_a_key_that_devices_do_not_know_certifies_nobody(server, tmp_path):
    other = create_server(tmp_path / "other", address="localhost")
    server.operator_key.write_bytes(other.operator_key.read_bytes())
    before = server.register.read_bytes()
    for call in (certify_devices, credentials):
        with pytest.raises(ServerError, match="must be the public half of"):
            call(server)
    assert server.register.read_bytes() == before


@pytest.mark.parametrize("text", ["", "AAAA", "A" * 88, "A" * 86 + "= ", "A" * 85 + "B==", 7, "Ä" * 88])
def test_what_is_no_certificate_is_a_damaged_register(server, text):
    """Among them 64 bytes in a base64 with loose bits, another string for the same certificate."""
    edit(server, lambda devices: devices[1].update(certificate=text))
    with pytest.raises(ServerError, match=r"it is damaged: devices\.1\.certificate"):
        credentials(server)


def test_a_key_stands_in_one_seat(server):
    """Whoever enrols one key twice must edit the register; the server that reads it stops."""
    edit(server, lambda devices: devices[2].update(public_key=devices[0]["public_key"]))
    with pytest.raises(ServerError, match="a public_key stands in it twice"):
        credentials(server)


def test_enrol_certifies_and_devices_says_who_is(server, capsys):
    place = ("--server", str(server.folder))
    assert main(["server", "devices", *place]) == 0
    assert capsys.readouterr().out.count("not certified yet") == 3
    assert main(["server", "enrol", new_key(), "--name", "d", *place]) == 0
    assert main(["server", "revoke", "a", *place]) == 0
    capsys.readouterr()
    assert main(["server", "devices", *place]) == 0
    states = [line.split("  ")[2] for line in capsys.readouterr().out.splitlines()]
    assert states[0].startswith("revoked 20")
    assert states[1:] == ["enrolled, certified"] * 3
