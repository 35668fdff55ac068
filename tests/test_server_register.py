"""The register of devices: seats, names and keys are given once, by however many writers at once."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from server.register import REGISTER_FILE, empty_register, enrol, key_fingerprint, read_register, revoke
from shared.errors import ServerError

NOW = datetime(2030, 5, 1, 12, 30, 15, 999, tzinfo=UTC)


def line(key=None):
    key = key or ec.generate_private_key(ec.SECP384R1())
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / REGISTER_FILE).write_bytes(empty_register())
    return tmp_path


def test_seats_are_given_in_order_and_kept(folder):
    keys = [line() for _ in range(3)]
    for name, key in zip("abc", keys, strict=True):
        enrol(folder, key, name, now=NOW)
    revoke(folder, "b", now=NOW)
    late = enrol(folder, line(ec.generate_private_key(ec.SECP256R1())), "d", now=NOW)
    found = read_register(folder)
    assert [(device.name, device.seat, device.revoked is None) for device in found] == [
        ("a", 0, True),
        ("b", 1, False),
        ("c", 2, True),
        ("d", 3, True),
    ]
    assert [device.public_key for device in found[:3]] == keys
    assert found[3] == late
    assert late.enrolled == NOW.replace(microsecond=0)
    held = json.loads((folder / REGISTER_FILE).read_text())["devices"][1]
    assert (held["enrolled"], held["revoked"]) == ("2030-05-01T12:30:15Z", "2030-05-01T12:30:15Z")
    assert (folder / REGISTER_FILE).stat().st_mode & 0o777 == 0o600


def test_a_comment_is_not_kept(folder):
    key = line()
    (folder / "device.pub").write_text(f"{key} alice@laptop\n")
    assert enrol(folder, folder / "device.pub", "a", now=NOW).public_key == key
    assert "alice" not in (folder / REGISTER_FILE).read_text()


def test_a_key_or_name_is_given_once_even_after_a_revocation(folder):
    key = line()
    enrol(folder, key, "a", now=NOW)
    for other, name, says in (
        (f"{key} another comment", "b", "this key is enrolled already, as device 'a'"),
        (line(), "a", "a name is never given twice"),
    ):
        with pytest.raises(ServerError, match=says):
            enrol(folder, other, name, now=NOW)
    revoke(folder, "a", now=NOW)
    for other, name, says in ((key, "b", "this key is revoked for ever"), (line(), "a", "a name is never given")):
        with pytest.raises(ServerError, match=says):
            enrol(folder, other, name, now=NOW)
    with pytest.raises(ServerError, match="must not be revoked twice, it was on 2030-05-01"):
        revoke(folder, "a", now=NOW)
    with pytest.raises(ServerError, match="no device is called 'A'"):
        revoke(folder, "A", now=NOW)
    assert len(read_register(folder)) == 1


@pytest.mark.parametrize("name", ["", "a b", "a/b", "../a", "ä", "a\n", "\na", "a" * 65, "a\0"])
def test_a_name_that_is_none_is_refused(folder, name):
    with pytest.raises(ServerError, match="--name must be 1 to 64 of"):
        enrol(folder, line(), name, now=NOW)
    assert read_register(folder) == ()


@pytest.mark.parametrize(
    "make",
    [
        lambda: line(ed25519.Ed25519PrivateKey.generate()),
        lambda: line(rsa.generate_private_key(65537, 2048)),
        lambda: line() + "\n" + line(),
        lambda: line()[:-9],
        lambda: line().replace("nistp384", "nistp256", 1),
        lambda: line().replace("ecdsa-sha2-nistp384", "ecdsa-sha2-nistp384-cert-v01@openssh.com", 1),
        lambda: "command=id " + line(),
        lambda: "ecdsa-sha2-nistp384",
        lambda: "",
        lambda: "\n",
        lambda: "\xff\xfe",
    ],
)
def test_a_key_that_flower_would_not_take_is_refused(folder, make):
    (folder / "device.pub").write_text(make(), encoding="latin-1")
    with pytest.raises(ServerError, match="public key"):
        enrol(folder, folder / "device.pub", "a", now=NOW)
    assert read_register(folder) == ()


def test_a_file_that_is_not_there_is_named(folder):
    with pytest.raises(ServerError, match=r"must be readable: No such file or directory \(.*none\.pub\)"):
        enrol(folder, str(folder / "none.pub"), "a", now=NOW)


def changed(**changes):
    return lambda content: content["devices"][0].update(changes)


@pytest.mark.parametrize(
    "damage",
    [
        changed(seat=1),
        changed(seat=-1),
        changed(seat=True),
        changed(seat="0"),
        changed(seat=0.0),
        changed(name="b"),
        changed(name="x y"),
        changed(note="x"),
        changed(enrolled=None),
        changed(enrolled="2030-05-01T12:30:15"),
        changed(enrolled="yesterday"),
        changed(revoked=False),
        changed(public_key="ecdsa-sha2-nistp384 AAAA"),
        lambda content: content["devices"][0].pop("public_key"),
        lambda content: content["devices"].reverse(),
        lambda content: content["devices"].pop(0),
        lambda content: content["devices"][0].update(public_key=content["devices"][1]["public_key"]),
        lambda content: content.update(format="sottovoce devices 2"),
        lambda content: content.update(more=1),
        lambda content: content.update(devices=None),
    ],
)
def test_a_damaged_register_is_refused_and_not_written_over(folder, damage):
    enrol(folder, line(), "a", now=NOW)
    enrol(folder, line(), "b", now=NOW)
    path = folder / REGISTER_FILE
    content = json.loads(path.read_text())
    damage(content)
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    for call in (
        lambda: read_register(folder),
        lambda: enrol(folder, line(), "c", now=NOW),
        lambda: revoke(folder, "a", now=NOW),
    ):
        with pytest.raises(ServerError, match="it is damaged"):
            call()
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "[", "[]", "null", '{"devices": [], "devices": []}', "[" * 100_000, "\xff"])
def test_a_register_that_cannot_be_read_is_refused(folder, text):
    (folder / REGISTER_FILE).write_text(text, encoding="latin-1")
    with pytest.raises(ServerError, match="must be a"):
        read_register(folder)


def test_a_lost_register_is_not_an_empty_one(folder):
    (folder / REGISTER_FILE).unlink()
    with pytest.raises(ServerError, match="it is missing"):
        enrol(folder, line(), "a", now=NOW)
    assert list(folder.iterdir()) == []


def _enrol_some(folder, lines, who):
    for k, key in enumerate(lines):
        enrol(folder, key, f"{who}-{k}", now=NOW)


def test_writers_at_once_lose_nobody(folder):
    """The kernel's lock is of an open file: it parts threads as it parts processes."""
    keys = {who: [line() for _ in range(8)] for who in range(3)}
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda who: _enrol_some(folder, keys[who], who), keys))
    found = read_register(folder)
    assert [device.seat for device in found] == list(range(24))
    assert {device.name for device in found} == {f"{who}-{k}" for who in keys for k in range(8)}


def test_what_a_power_cut_leaves_is_the_old_register(folder, monkeypatch):
    enrol(folder, line(), "a", now=NOW)
    before = (folder / REGISTER_FILE).read_bytes()

    def cut(descriptor):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("shared.files.os.fsync", cut)
        with pytest.raises(OSError, match="Input/output error"):
            enrol(folder, line(), "b", now=NOW)
    assert (folder / REGISTER_FILE).read_bytes() == before
    assert enrol(folder, line(), "b", now=NOW).seat == 1


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_fingerprint_is_the_one_ssh_keygen_shows(tmp_path):
    key = line()
    (tmp_path / "device.pub").write_text(key + "\n")
    command = ["ssh-keygen", "-l", "-f", str(tmp_path / "device.pub")]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.split()[1] == key_fingerprint(key)
