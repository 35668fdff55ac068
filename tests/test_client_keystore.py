"""Keys stay where the owner put them: nothing falls back to a place that keeps nothing or keeps it in plain."""

import base64
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import keyring
import keyring.backends.chainer
import keyring.backends.fail
import keyring.backends.null
import pytest
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked, PasswordDeleteError

from client.vault.keystore import choose_keystore, file_keystore, open_keystore, os_keystore
from shared.errors import StoreError

SECRET = bytes(range(256))


class FakeKeyring(KeyringBackend):
    """A keyring in memory."""

    viable = False  # never chosen by itself
    priority = -10

    def __init__(self):
        super().__init__()
        self.entries = {}

    def get_password(self, service, username):
        return self.entries.get((service, username))

    def set_password(self, service, username, password):
        self.entries[service, username] = password

    def delete_password(self, service, username):
        if (service, username) not in self.entries:
            raise PasswordDeleteError("not found")
        del self.entries[service, username]


class LockedKeyring(FakeKeyring):
    def get_password(self, service, username):
        raise KeyringLocked("the owner dismissed the prompt")

    set_password = delete_password = get_password


class BrokenKeyring(FakeKeyring):
    """Raises what is no error of keyring, as backends do."""

    def get_password(self, service, username):
        raise OSError("D-Bus went away")

    set_password = delete_password = get_password


class ForgetfulKeyring(FakeKeyring):
    def set_password(self, service, username, password):
        pass


class StickyKeyring(FakeKeyring):
    def delete_password(self, service, username):
        pass


class MacKeyring(FakeKeyring):
    pass


class WindowsKeyring(FakeKeyring):
    pass


class PlaintextKeyring(FakeKeyring):
    pass


class EncryptedKeyring(FakeKeyring):
    pass


MacKeyring.__module__, MacKeyring.__qualname__ = "keyring.backends.macOS", "Keyring"
WindowsKeyring.__module__, WindowsKeyring.__qualname__ = "keyring.backends.Windows", "WinVaultKeyring"
PlaintextKeyring.__module__ = "keyrings.alt.file"
EncryptedKeyring.__module__ = "keyrings.alt"


class MacLookalike(MacKeyring):
    pass


class NullInDisguise(keyring.backends.null.Keyring):
    viable = False


@pytest.fixture
def use_keyring():
    """(backend) puts it in force for the test."""
    before = keyring.get_keyring()
    yield lambda backend: keyring.set_keyring(backend) or backend
    keyring.set_keyring(before)


@pytest.fixture(params=["file", "os"])
def keystore(request, tmp_path, use_keyring):
    use_keyring(FakeKeyring())
    return choose_keystore(tmp_path / "home", request.param)


def test_entries_are_kept_apart_replaced_and_deleted(keystore):
    assert keystore.read("data-key") is None
    keystore.write("data-key", SECRET)
    keystore.write("ledger-key", b"other")
    assert (keystore.read("data-key"), keystore.read("ledger-key")) == (SECRET, b"other")
    keystore.write("data-key", b"new")
    assert keystore.read("data-key") == b"new"
    for _ in range(2):
        keystore.delete("data-key")
        assert (keystore.read("data-key"), keystore.read("ledger-key")) == (None, b"other")


@pytest.mark.parametrize("entry", ["", "../ledger-key", "Data-Key", "data-key.tmp", "/etc/passwd", "data-key\n"])
def test_an_entry_is_a_plain_word(keystore, entry):
    for call in (keystore.read, keystore.delete, lambda entry: keystore.write(entry, b"x")):
        with pytest.raises(ValueError, match="lower-case words"):
            call(entry)


def test_two_homes_share_nothing(tmp_path, use_keyring):
    use_keyring(FakeKeyring())
    for make in (file_keystore, os_keystore):
        one, two = make(tmp_path / "one"), make(tmp_path / "two")
        one.write("data-key", SECRET)
        assert two.read("data-key") is None


def test_the_choice_is_kept(tmp_path, use_keyring):
    backend = use_keyring(FakeKeyring())
    for kind in ("file", "os"):
        choose_keystore(tmp_path / kind, kind).write("anchor", kind.encode())
        assert open_keystore(tmp_path / kind).read("anchor") == kind.encode()
        with pytest.raises(StoreError, match="new home"):
            choose_keystore(tmp_path / kind, kind)
    assert (tmp_path / "file" / "keys" / "anchor").read_bytes() == b"file"
    assert not (tmp_path / "os" / "keys").exists()
    user = f"{tmp_path.resolve()}/os/anchor"
    assert backend.entries == {("sottovoce", user): base64.b64encode(b"os").decode()}


ALTERED = ("", "{}", "[]", '"file"', '{"kind": "none"}', '{"kind": null}', '{"kind": ["file"]}', '{"kind": "FILE"}')


@pytest.mark.parametrize("content", [*ALTERED, '{"kind": "file", "x": 1}', "\xff", "[" * 100_000])
def test_an_altered_choice_is_refused(tmp_path, content):
    choose_keystore(tmp_path, "file")
    (tmp_path / "keystore.json").write_text(content, encoding="latin-1")
    with pytest.raises(StoreError, match=r"keystore\.json must be"):
        open_keystore(tmp_path)


def test_a_missing_choice_is_refused(tmp_path):
    with pytest.raises(StoreError, match=r"has no keystore\.json"):
        open_keystore(tmp_path)
    with pytest.raises(StoreError, match="must be one of file, os"):
        choose_keystore(tmp_path, "chain")


def test_what_status_says(tmp_path, use_keyring):
    file = file_keystore(tmp_path)
    assert (file.name, file.weak, file.detects_rollback) == ("file", True, False)
    for backend, name, detects in (
        (MacKeyring(), "os keyring (macOS Keychain)", True),
        (WindowsKeyring(), "os keyring (Windows Credential Manager)", True),
        (FakeKeyring(), None, False),
        (MacLookalike(), None, False),  # only the very classes are known
    ):
        use_keyring(backend)
        found = os_keystore(tmp_path)
        assert (found.name, found.weak, found.detects_rollback) == (name or found.name, False, detects)
        assert found.name.startswith("os keyring (")


def test_the_classes_known_by_name_are_keyring_s():
    import keyring.backends.macOS
    import keyring.backends.Windows

    assert isinstance(keyring.backends.macOS.Keyring, type)
    assert isinstance(keyring.backends.Windows.WinVaultKeyring, type)


@pytest.mark.fault("R20")
@pytest.mark.parametrize(
    "backend",
    [
        keyring.backends.fail.Keyring,
        keyring.backends.null.Keyring,
        keyring.backends.chainer.ChainerBackend,
        NullInDisguise,
        PlaintextKeyring,
        EncryptedKeyring,
    ],
)
def test_a_keyring_that_keeps_nothing_or_keeps_it_in_plain_is_refused(tmp_path, use_keyring, backend):
    use_keyring(FakeKeyring())
    choose_keystore(tmp_path / "old", "os")
    use_keyring(backend())
    for call in (lambda: choose_keystore(tmp_path / "new", "os"), lambda: open_keystore(tmp_path / "old")):
        with pytest.raises(StoreError, match="--keystore file, which is weak"):
            call()
    assert not (tmp_path / "new").exists()
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["keystore.json"]


@pytest.mark.fault("R20")
@pytest.mark.parametrize("backend", [LockedKeyring, BrokenKeyring])
def test_a_keyring_that_fails_is_an_error_and_nothing_falls_back(tmp_path, use_keyring, backend):
    use_keyring(backend())
    keystore = choose_keystore(tmp_path, "os")
    for call in (keystore.read, keystore.delete, lambda entry: keystore.write(entry, SECRET)):
        with pytest.raises(StoreError, match="--keystore file") as caught:
            call("data-key")
        assert base64.b64encode(SECRET).decode()[:8] not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["keystore.json"]


def test_a_keyring_that_does_not_do_what_it_says_is_an_error(tmp_path, use_keyring):
    use_keyring(ForgetfulKeyring())
    with pytest.raises(StoreError, match="must keep"):
        os_keystore(tmp_path).write("data-key", SECRET)
    use_keyring(StickyKeyring())
    os_keystore(tmp_path).write("data-key", SECRET)
    with pytest.raises(StoreError, match="must forget"):
        os_keystore(tmp_path).delete("data-key")


@pytest.mark.parametrize("value", ["not base64!", "QU JD", "QUJD!", "QQ", "é"])
def test_another_program_s_entry_is_refused(tmp_path, use_keyring, value):
    backend = use_keyring(FakeKeyring())
    backend.entries["sottovoce", f"{tmp_path.resolve()}/data-key"] = value
    with pytest.raises(StoreError, match="must be base64"):
        os_keystore(tmp_path).read("data-key")


@pytest.mark.fault("R20")
def test_a_backend_that_cannot_be_loaded_is_an_error(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom client.vault.keystore import choose_keystore\n"
        "from shared.errors import StoreError\n"
        "try:\n    choose_keystore(Path(sys.argv[1]), 'os')\nexcept StoreError as error:\n    print(error)\n"
        "print(sorted({'torch', 'flwr'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHON_KEYRING_BACKEND": "no.such.Keyring"}
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", code, str(tmp_path / "home")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    message, heavy = done.stdout.splitlines()
    assert "--keystore file" in message
    assert heavy == "[]"
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_only_the_owner_reads_the_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        choose_keystore(tmp_path / "new" / "home", "file").write("data-key", SECRET)
    finally:
        os.umask(before)
    paths = [tmp_path / "new", *(tmp_path / "new").rglob("*")]
    assert {path.name for path in paths} == {"new", "home", "keystore.json", "keys", "data-key"}
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_copied_home_is_closed_again(tmp_path):
    keystore = file_keystore(tmp_path)
    keystore.write("data-key", SECRET)
    (tmp_path / "keys").chmod(0o755)
    (tmp_path / "keys" / "data-key").chmod(0o644)
    keystore.write("data-key", SECRET)
    assert stat.S_IMODE((tmp_path / "keys").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "keys" / "data-key").stat().st_mode) == 0o600


def test_deleting_a_key_file_overwrites_it(tmp_path):
    keystore = file_keystore(tmp_path)
    keystore.write("data-key", SECRET)
    (tmp_path / "keys" / ".data-key.tmp").write_bytes(SECRET)  # as a crash leaves it
    for number, path in enumerate(sorted((tmp_path / "keys").iterdir())):
        os.link(path, tmp_path / f"kept-{number}")
    keystore.delete("data-key")
    assert list((tmp_path / "keys").iterdir()) == []
    assert [path.read_bytes() for path in sorted(tmp_path.glob("kept-*"))] == [bytes(256)] * 2


def test_a_crash_leaves_the_old_key_or_the_new(tmp_path, crash_at_each_step):
    file_keystore(tmp_path / "home").write("anchor", b"old")
    code = "client.vault.keystore.file_keystore(home).write('anchor', b'new')"
    found = []
    for home in crash_at_each_step(tmp_path / "home", code):
        keystore = file_keystore(home)
        found.append(keystore.read("anchor"))
        keystore.write("anchor", b"newest")
        assert keystore.read("anchor") == b"newest"
        assert [path.name for path in (home / "keys").iterdir()] == ["anchor"]
    assert found == sorted(found, reverse=True)
    assert set(found) == {b"old", b"new"}


def test_a_key_is_on_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, call=call: (calls.append(name), call(*args))[1])
    keystore = file_keystore(tmp_path)
    keystore.write("anchor", b"old")
    calls.clear()
    keystore.write("anchor", b"new")
    assert calls == ["fsync", "replace", "fsync"]  # the file, its place, the folder's entry


def test_the_choice_file_is_what_it_says(tmp_path):
    choose_keystore(tmp_path, "file")
    assert json.loads((tmp_path / "keystore.json").read_text()) == {"kind": "file"}
