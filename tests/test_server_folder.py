"""A server's folder: whole or absent, secrets for its owner alone; and the commands that make and fill it."""

import json
import os
import shutil
import stat
from argparse import Namespace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from flwr.supercore.auth import load_superexec_auth_secret

from server.folder import CAMPAIGN_FILES, ServerSettings, add_invitation, create_server, open_server
from server.register import read_register
from shared.errors import ServerError
from shared.protocol.campaign import verify_campaign
from shared.protocol.signing import load_private, load_public
from sottovoce.cli import main
from sottovoce.server_place import server_folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A server without campaigns. Read only."""
    before = os.umask(0)  # what is secret must be so whatever the umask
    try:
        return create_server(tmp_path_factory.mktemp("made") / "deep" / "server", address="fl.example.org", port=7000)
    finally:
        os.umask(before)


@pytest.fixture
def server(made, tmp_path):
    """A copy that may be broken."""
    shutil.copytree(made.folder, tmp_path / "server")
    return open_server(tmp_path / "server")


def test_everything_secret_is_for_its_owner_only(made):
    secret = {"ca.key", "server.key", "operator", "executor.secret"}
    assert {path.name for path in (made.folder / "keys").iterdir()} == secret
    for path in (made.folder, *made.folder.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        if path.is_dir():
            assert mode == 0o700, path
        elif path.name in secret or path.name == "devices.json":
            assert mode == 0o600, path
    assert not any(b"PRIVATE" in path.read_bytes() for path in made.invitation.rglob("*") if path.is_file())


def test_a_server_begins_with_keys_that_fit_and_without_devices(made):
    assert made.settings == ServerSettings(address="fl.example.org", port=7000)
    assert load_private(made.operator_key).public_key() == load_public(made.operator_public)
    assert read_register(made.folder) == ()
    assert len(load_superexec_auth_secret(str(made.executor_secret))) >= 32
    assert {path.name for path in made.invitation.iterdir()} == {"server.json", "ca.crt", "operator.pub", "campaigns"}
    assert json.loads((made.invitation / "server.json").read_text()) == {"address": "fl.example.org", "port": 7000}
    for name in ("ca.crt", "operator.pub", "server.json"):
        assert (made.invitation / name).read_bytes() == (made.folder / name).read_bytes()
    assert not any(path.name.startswith(".") for path in (*made.folder.iterdir(), *made.folder.parent.iterdir()))


def test_two_servers_share_no_secret(made, tmp_path):
    other = create_server(tmp_path / "other", address="fl.example.org")
    for path in (made.folder / "keys").iterdir():
        assert path.read_bytes() != (other.folder / "keys" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("address", "port"),
    [
        ("", 1),
        ("a b", 1),
        ("-a.org", 1),
        ("*.example.org", 1),
        ("a_b.org", 1),
        ("999.1.1.1", 1),
        ("fl.example.org.", 1),
        ("a\n", 1),
        ("https://a.org", 1),
        ("a.org:9092", 1),
        ("ä.org", 1),
        (f"{'a.' * 127}org", 1),
        (f"{'a' * 64}.org", 1),
        ("a.org", 0),
        ("a.org", 65536),
        ("a.org", True),
        ("a.org", float("nan")),
    ],
)
def test_an_address_or_port_that_is_none_is_refused(tmp_path, address, port):
    with pytest.raises(ServerError, match="a server needs a DNS name or an IP address and a port"):
        create_server(tmp_path / "server", address=address, port=port)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "held"), [("2001:DB8::0:1", "2001:db8::1"), ("LocalHost", "localhost"), ("10.0.0.1", "10.0.0.1")]
)
def test_an_address_has_one_spelling(tmp_path, address, held):
    assert create_server(tmp_path / "server", address=address).settings.address == held


def test_a_folder_that_exists_is_left_as_it_is(tmp_path):
    with pytest.raises(ServerError, match="must be a new folder"):
        create_server(tmp_path, address="localhost")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ServerError, match="link exists"):
        create_server(tmp_path / "link", address="localhost")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_what_cannot_be_finished_leaves_nothing(tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.folder.new_key", full)
    with pytest.raises(OSError, match="No space"):
        create_server(tmp_path / "server", address="localhost")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "server.json").unlink(), "must hold a server"),
        (lambda f: (f / "server.json").write_text("{}"), "it was altered"),
        (lambda f: (f / "server.json").write_bytes(b"\xff"), "must be readable"),
        (lambda f: (f / "server.json").write_text('{"address": "a.org", "port": 1, "x": 2}'), "it was altered"),
        (lambda f: (f / "server.json").write_text('{"address": "a.org", "port": "1"}'), "it was altered"),
        (lambda f: (f / "keys" / "operator").unlink(), "must hold operator"),
        (lambda f: (f / "devices.json").unlink(), "must hold devices.json"),
        (lambda f: (f / "keys" / "server.key").chmod(0o640), "readable by its owner only, got mode 640"),
        (lambda f: (f / "keys" / "ca.key").chmod(0o604), "readable by its owner only, got mode 604"),
        (lambda f: (f / "keys").chmod(0o750), "readable by its owner only, got mode 750"),
    ],
)
def test_a_damaged_folder_is_not_opened(server, damage, says):
    damage(server.folder)
    with pytest.raises(ServerError, match=says):
        open_server(server.folder)


def test_the_authoritys_key_may_lie_elsewhere(server):
    server.ca_key.unlink()
    assert open_server(server.folder) == server


def test_only_the_public_files_of_a_campaign_are_handed_out(server, published):
    place = server.campaigns / "autumn"
    shutil.copytree(published.campaign.folder, place)
    (place / "rounds.jsonl").write_text("{}\n")
    (place / "checkpoints").mkdir()
    handed = add_invitation(server, place)
    assert handed == server.invitation / "campaigns" / "autumn"
    assert {path.name for path in handed.iterdir()} == set(CAMPAIGN_FILES)
    verify_campaign(handed, trusted=published.key)
    assert add_invitation(server, place) == handed
    (place / "policy.sig").unlink()
    with pytest.raises(ServerError, match=r"policy\.sig is missing"):
        add_invitation(server, place)
    verify_campaign(handed, trusted=published.key)  # what was handed out stays whole
    assert not any(path.name.startswith(".") for path in server.folder.iterdir())


@pytest.fixture
def run(capsys, tmp_path):
    """(words) -> (exit code, what was said) of a command on the server in ``tmp_path``."""

    def call(*words):
        capsys.readouterr()
        code = main(["server", *map(str, words), "--server", str(tmp_path / "srv")])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


@pytest.fixture(scope="module")
def scenario(tiny_world, tmp_path_factory):
    return tiny_world(tmp_path_factory.mktemp("scenario"))


def new_key(place: Path) -> Path:
    line = ec.generate_private_key(ec.SECP384R1()).public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    place.write_bytes(line + b" somebody@somewhere\n")
    return place


def test_init_makes_a_server_with_a_signed_campaign_and_later_adds_others(run, scenario, tmp_path):
    settings = ("--clients", "30", "--epsilon", "2", "--delta", "1e-5", "--quiet")
    code, said = run("init", scenario, "--address", "Localhost", "--port", "7001", *settings)
    assert code == 0, said
    server = open_server(tmp_path / "srv")
    assert server.settings == ServerSettings(address="localhost", port=7001)
    [place] = server.campaigns.iterdir()
    campaign = verify_campaign(place, trusted=load_public(server.operator_public))
    assert (campaign.policy.epsilon, place.name) == (2.0, campaign.scenario.name)
    handed = server.invitation / "campaigns" / place.name
    assert {path.name: path.read_bytes() for path in handed.iterdir()} == {
        name: (place / name).read_bytes() for name in CAMPAIGN_FILES
    }
    assert "start: sottovoce server run" in said
    assert "epsilon = " in said

    keys = {path.name: path.read_bytes() for path in (server.folder / "keys").iterdir()}
    code, said = run("init", scenario, *settings)
    assert (code, "already, which is never replaced" in said) == (2, True)
    code, said = run("init", scenario, *settings, "--set", "name=second")
    assert code == 0, said
    assert {path.name for path in server.campaigns.iterdir()} == {place.name, "second"}
    assert keys == {path.name: path.read_bytes() for path in (server.folder / "keys").iterdir()}
    shutil.rmtree(server.invitation / "campaigns" / "second")  # as a crash between the two leaves it
    code, said = run("init", scenario, *settings, "--set", "name=second")
    assert code == 0
    assert (server.invitation / "campaigns" / "second" / "policy.sig").is_file()
    assert not any(path.name.startswith(".") for path in server.folder.iterdir())


def test_a_campaign_that_cannot_be_made_leaves_none(run, scenario, tmp_path):
    assert run("init", "--address", "localhost")[0] == 0
    code, said = run("init", scenario, "--clients", "3", "--quiet")
    assert (code, "at most the 3 clients" in said) == (2, True)
    assert list((tmp_path / "srv" / "campaigns").iterdir()) == []
    assert list((tmp_path / "srv" / "invitation" / "campaigns").iterdir()) == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--address must name the host"),
        (("--renew",), "there is none to renew"),
        (("--address", "no host"), "a server needs a DNS name"),
        (("none.toml", "--address", "localhost"), "must be a readable scenario file"),
    ],
)
def test_a_server_is_not_made_by_half(run, tmp_path, words, says):
    code, said = run("init", *words)
    assert (code, says in said) == (2, True)
    assert list(tmp_path.iterdir()) == []


def test_a_server_keeps_its_address_and_renews_its_certificate(run, tmp_path):
    assert run("init", "--address", "localhost")[0] == 0
    code, said = run("init")
    assert (code, "holds a server already" in said) == (2, True)
    code, said = run("init", "--address", "other.example.org", "--renew")
    assert (code, "which devices know" in said) == (2, True)
    before = (tmp_path / "srv" / "server.crt").read_bytes(), (tmp_path / "srv" / "ca.crt").read_bytes()
    code, said = run("init", "--renew", "--address", "LOCALHOST")
    assert (code, "certificate renewed, valid until 20" in said) == (0, True)
    after = (tmp_path / "srv" / "server.crt").read_bytes(), (tmp_path / "srv" / "ca.crt").read_bytes()
    assert (after[0] == before[0], after[1] == before[1]) == (False, True)


def test_devices_are_enrolled_listed_and_revoked(run, tmp_path):
    assert run("init", "--address", "localhost")[0] == 0
    assert "no device is enrolled" in run("devices")[1]
    first, second = new_key(tmp_path / "a.pub"), new_key(tmp_path / "b.pub")
    code, said = run("enrol", first, "--name", "kitchen")
    assert (code, "enrolled kitchen: seat 0, key SHA256:" in said) == (0, True)
    assert run("enrol", second.read_text(), "--name", "attic")[0] == 0
    assert run("revoke", "kitchen")[0] == 0
    code, said = run("enrol", first, "--name", "kitchen2")
    assert (code, "revoked for ever" in said) == (2, True)
    assert [line.split("  ")[:2] for line in run("devices")[1].splitlines()] == [["0", "kitchen"], ["1", "attic"]]
    found = json.loads(run("devices", "--json")[1])
    assert [(device["name"], device["seat"], device["revoked"] is None) for device in found] == [
        ("kitchen", 0, False),
        ("attic", 1, True),
    ]
    assert "somebody" not in json.dumps(found)
    code, said = run("revoke", "cellar")
    assert (code, len(said.strip().splitlines())) == (2, 1)


def test_an_operators_or_private_key_is_no_devices(run, tmp_path):
    assert run("init", "--address", "localhost")[0] == 0
    secret = ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "secret").write_bytes(secret)
    for name in ("secret", "srv/operator.pub"):
        code, said = run("enrol", tmp_path / name, "--name", "x")
        assert (code, "a device is enrolled by its public key" in said) == (2, True)
        assert "BEGIN" not in said


def test_a_folder_is_named_from_the_root_whatever_is_typed(tmp_path, monkeypatch):
    """Flower's SuperLink runs in a folder of its own: with a relative name it found no certificate."""
    monkeypatch.chdir(tmp_path)
    assert server_folder(Namespace(server=Path("here"))) == tmp_path / "here"
    assert server_folder(Namespace(server=None)).is_absolute()
