"""What is sealed opens only as itself, with this home's keys; no crash and no full disk loses or shows anything."""

import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

import client.vault.vault
from client.vault.keystore import file_keystore
from client.vault.private_files import temporary_of
from client.vault.vault import MAGIC, create_vault, open_vault, shred_vault
from shared.errors import StoreError

ROOT = Path(__file__).parent.parent
SENTINEL = b"xyzzy-7f3a-the-owner-s-own-words"
LEDGER_KEY = bytes(range(32))


def make_home(folder, *, ledger_key=LEDGER_KEY):
    keystore = file_keystore(folder)
    keystore.write("ledger-key", ledger_key)
    create_vault(folder / "vault", keystore)
    return folder


def reopen(home):
    return open_vault(home / "vault", file_keystore(home))


@pytest.fixture
def home(tmp_path):
    return make_home(tmp_path / "home")


@pytest.fixture
def vault(home):
    return reopen(home)


def files_of(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_was_sealed_is_opened(home, vault):
    contents = {"records/000001": SENTINEL, "features/ab12": b"", "adapters/0001": bytes(100_000), "a/b.c_d-e/f": b"x"}
    for name, content in contents.items():
        vault.seal(name, content)
    for opened in (vault, reopen(home)):
        assert {name: opened.open(name) for name in contents} == contents
    vault.seal("records/000001", b"new")
    assert reopen(home).open("records/000001") == b"new"


def test_names_and_deletion(home, vault):
    for name in ("records/000002", "records/000001", "records-old/1", "features/ab"):
        vault.seal(name, b"x")
    (home / "vault" / "records" / ".000003.tmp").write_bytes(b"half")
    assert vault.names("records/") == ["records/000001", "records/000002"]
    assert vault.names("records/000002") == ["records/000002"]
    assert vault.names("") == ["features/ab", "records-old/1", "records/000001", "records/000002"]
    assert vault.names("nothing/") == []
    for _ in range(2):
        vault.delete("records/000001")
        vault.delete("nothing/there")
    assert vault.names("records/") == ["records/000002"]
    with pytest.raises(StoreError, match="must exist"):
        vault.open("records/000001")


@pytest.mark.parametrize(
    "name", ["", "key", "/etc/passwd", "../keys/data-key", "a/../b", "a//b", ".hidden", "a/.tmp", "A", "a\n", "ä", "a/"]
)
def test_a_name_cannot_leave_the_vault(vault, name):
    for call in (vault.open, vault.delete, lambda name: vault.seal(name, b"x")):
        with pytest.raises(ValueError, match="lower-case path segments"):
            call(name)


def test_every_flipped_bit_is_refused(home, vault):
    vault.seal("records/1", SENTINEL)
    for path, use in (
        (home / "vault/records/1", lambda: vault.open("records/1")),
        (home / "vault/key", lambda: reopen(home)),
    ):
        sealed = path.read_bytes()
        for place in range(len(sealed)):
            path.write_bytes(sealed[:place] + bytes([sealed[place] ^ (1 << place % 8)]) + sealed[place + 1 :])
            with pytest.raises(StoreError, match="damaged"):
                use()
        path.write_bytes(sealed)
        use()


def test_files_of_another_length_are_refused(home, vault):
    vault.seal("records/1", SENTINEL)
    path = home / "vault" / "records" / "1"
    sealed = path.read_bytes()
    for wrong in (*(sealed[:size] for size in range(len(sealed))), sealed + b"\0", sealed[1:], sealed + sealed):
        path.write_bytes(wrong)
        with pytest.raises(StoreError, match="damaged or moved"):
            vault.open("records/1")


def test_a_file_moved_to_another_name_is_refused(home, vault):
    vault.seal("records/1", SENTINEL)
    vault.seal("records/2", b"other")
    folder = home / "vault"
    (folder / "records" / "1").replace(folder / "records" / "2")
    with pytest.raises(StoreError, match="damaged or moved"):
        vault.open("records/2")
    shutil.copy(folder / "key", folder / "records" / "1")
    with pytest.raises(StoreError, match="damaged or moved"):
        vault.open("records/1")


def test_another_home_s_key_is_refused(home, vault, tmp_path):
    other = make_home(tmp_path / "other")  # the same ledger key: the others must do
    vault.seal("records/1", SENTINEL)
    (other / "vault" / "records").mkdir()
    shutil.copy(home / "vault/records/1", other / "vault/records/1")
    with pytest.raises(StoreError, match="another home's keys"):
        reopen(other).open("records/1")
    with pytest.raises(StoreError, match="another home's keys"):
        open_vault(home / "vault", file_keystore(other))


@pytest.mark.parametrize("entry", ["ledger-key", "data-key"])
def test_losing_either_key_loses_the_data(home, vault, entry):
    """I10: who wipes the ledger's key cannot read the data it counted for."""
    vault.seal("records/1", SENTINEL)
    keystore = file_keystore(home)
    key = keystore.read(entry)
    keystore.write(entry, bytes(32))
    with pytest.raises(StoreError, match="another home's keys"):
        reopen(home)
    for wrong in (b"", key[:31], key + b"x"):
        keystore.write(entry, wrong)
        with pytest.raises(StoreError, match=f"{entry} of 32 bytes"):
            reopen(home)
    keystore.delete(entry)
    with pytest.raises(StoreError, match="got none"):
        reopen(home)
    keystore.write(entry, key)
    assert reopen(home).open("records/1") == SENTINEL


def test_the_format_is_the_documented_one(home, vault):
    vault.seal("records/1", SENTINEL)
    data_key = file_keystore(home).read("data-key")
    key = HKDF(algorithm=SHA256(), length=32, salt=LEDGER_KEY, info=b"sottovoce vault 1").derive(data_key)
    for path, name in ((home / "vault/key", b"key"), (home / "vault/records/1", b"records/1")):
        sealed = path.read_bytes()
        size = len(b"sottovoce vault\x01")
        assert sealed[:size] == b"sottovoce vault\x01" == MAGIC
        key = AESGCM(key).decrypt(sealed[size : size + 12], sealed[size + 12 :], MAGIC + name)
    assert key == SENTINEL


def test_nonces_never_repeat(home, vault, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand flushes take their time
    path = home / "vault" / "records" / "1"
    sealed = set()
    for _ in range(1000):
        vault.seal("records/1", SENTINEL)
        sealed.add(path.read_bytes())
    assert len({file[len(MAGIC) : len(MAGIC) + 12] for file in sealed}) == 1000
    assert len({file[len(MAGIC) + 12 :] for file in sealed}) == 1000
    bits = sum(int.from_bytes(file[len(MAGIC) : len(MAGIC) + 12], "big").bit_count() for file in sealed)
    assert abs(bits - 48_000) < 6 * 155  # a counter would not look like that


def test_keys_are_new_in_every_vault(tmp_path):
    one, two = (make_home(tmp_path / name) for name in ("one", "two"))
    assert file_keystore(one).read("data-key") != file_keystore(two).read("data-key")
    keys = [reopen(home)._cipher for home in (one, two)]
    nonce = bytes(12)
    assert keys[0].encrypt(nonce, SENTINEL, None) != keys[1].encrypt(nonce, SENTINEL, None)


def test_no_plaintext_and_no_half_file_survives_a_crash(home, vault, crash_at_each_step):
    vault.seal("records/1", b"old")
    code = f"""vault = client.vault.vault.open_vault(home / "vault", client.vault.keystore.file_keystore(home))
vault.seal("records/1", {SENTINEL!r} * 100)
vault.seal("new/1", {SENTINEL!r} * 100)"""
    found, left_over = [], 0
    for crashed in crash_at_each_step(home, code):
        everything = [path.read_bytes() for path in crashed.rglob("*") if path.is_file()]
        assert not any(SENTINEL in content for content in everything)
        left_over += any(path.name.endswith(".tmp") for path in crashed.rglob("*"))
        again = reopen(crashed)
        found.append((again.open("records/1")[:5], len(again.names("new/"))))
        for name in ("records/1", "new/1"):
            again.seal(name, b"newest")
            assert again.open(name) == b"newest"
        assert files_of(crashed / "vault") == ["key", "new/1", "records/1"]
    states = [(b"old", 0), (SENTINEL[:5], 0), (SENTINEL[:5], 1)]
    assert sorted(set(found), key=found.index) == states
    assert left_over >= 2  # else the crashes missed the moment


def test_temporary_files_hold_ciphertext(home, vault, monkeypatch):
    seen = []
    monkeypatch.setattr(os, "replace", lambda source, target: seen.append(Path(source).read_bytes()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vault.seal("records/1", SENTINEL)
    assert len(seen[0]) == len(MAGIC) + 12 + len(SENTINEL) + 16
    assert SENTINEL not in seen[0]
    assert files_of(home / "vault") == ["key"]


@pytest.mark.parametrize("umask", [0o000, 0o777])
def test_only_the_owner_reads_the_files(tmp_path, umask):
    before = os.umask(umask)
    try:
        home = make_home(tmp_path / "home")
        reopen(home).seal("deep/er/file", SENTINEL)
    finally:
        os.umask(before)
    paths = [home, *home.rglob("*")]
    assert len(paths) == 9
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.fault("R10")
def test_a_full_disk_leaves_the_old_file(home, vault):
    vault.seal("records/1", b"old")
    code = f"""
import resource, sys
from pathlib import Path
from client.vault.keystore import file_keystore
from client.vault.vault import open_vault
from shared.errors import StoreError
home = Path(sys.argv[1])
vault = open_vault(home / "vault", file_keystore(home))
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for name in ("records/1", "records/2"):
    try:
        vault.seal(name, {SENTINEL!r} * 100)
    except StoreError as error:
        print(error)
vault.seal("records/3", b"small")
print(sorted({{"torch", "flwr"}} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code, str(home)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    *messages, heavy = done.stdout.splitlines()
    assert len(messages) == 2
    assert all("free space" in message for message in messages)
    assert heavy == "[]"
    assert (vault.open("records/1"), vault.open("records/3")) == (b"old", b"small")
    assert files_of(home / "vault") == ["key", "records/1", "records/3"]


def test_too_much_for_one_message_is_refused(vault, monkeypatch):
    monkeypatch.setattr(client.vault.vault, "_MAX_BYTES", 10)
    vault.seal("records/1", bytes(10))
    with pytest.raises(StoreError, match="at most 10 bytes, got 11"):
        vault.seal("records/1", bytes(11))


def test_writers_wait_for_each_other(home, vault):
    other = reopen(home)
    thread = threading.Thread(target=other.seal, args=("records/1", b"later"))
    with vault.lock():
        thread.start()
        vault.seal("records/1", b"earlier")  # the lock's holder goes on
        thread.join(0.3)
        assert thread.is_alive()
        assert vault.open("records/1") == b"earlier"
    thread.join()
    assert vault.open("records/1") == b"later"


def test_making_a_vault_over_another_is_refused(home, vault):
    vault.seal("records/1", SENTINEL)
    keystore = file_keystore(home)
    with pytest.raises(StoreError, match="must be empty"):
        create_vault(home / "vault", keystore)
    (home / "vault" / "key").unlink()
    data_key = keystore.read("data-key")
    with pytest.raises(StoreError, match="must be empty"):
        create_vault(home / "vault", keystore)
    assert keystore.read("data-key") == data_key
    with pytest.raises(StoreError, match="shredded or never made"):
        reopen(home)


def test_a_vault_needs_the_ledger_s_key(tmp_path):
    keystore = file_keystore(tmp_path)
    with pytest.raises(StoreError, match="ledger-key of 32 bytes, got none"):
        create_vault(tmp_path / "vault", keystore)
    assert keystore.read("data-key") is None
    with pytest.raises(StoreError, match="shredded or never made"):
        open_vault(tmp_path / "vault", keystore)


def test_an_interrupted_making_is_made_again(tmp_path, crash_at_each_step):
    file_keystore(tmp_path / "home").write("ledger-key", LEDGER_KEY)
    code = "client.vault.vault.create_vault(home / 'vault', client.vault.keystore.file_keystore(home))"
    made = []
    for home in crash_at_each_step(tmp_path / "home", code):
        made.append((home / "vault" / "key").exists())
        if not made[-1]:
            create_vault(home / "vault", file_keystore(home))
        vault = reopen(home)
        vault.seal("records/1", SENTINEL)
        assert vault.open("records/1") == SENTINEL
    assert (made[0], made[-1]) == (False, True)


def test_shredding_deletes_everything_and_says_so(home, vault):
    for name in ("records/1", "features/ab"):
        vault.seal(name, SENTINEL)
    (home / "vault" / "records" / ".2.tmp").write_bytes(b"half")
    (home / "vault" / "records" / "link").symlink_to(home / "keys")
    keystore = file_keystore(home)
    deleted = shred_vault(home / "vault", keystore)
    assert deleted == ["data-key", "key", "features/ab", "records/.2.tmp", "records/1", "records/link"]
    assert files_of(home) == ["keys/ledger-key"]  # behind the link, too
    assert not (home / "vault").exists()
    assert shred_vault(home / "vault", keystore) == []
    with pytest.raises(StoreError, match="shredded"):
        vault.seal("records/1", SENTINEL)  # opened before
    assert files_of(home) == ["keys/ledger-key"]
    create_vault(home / "vault", keystore)
    with pytest.raises(StoreError, match="shredded"):
        vault.seal("records/1", SENTINEL)  # its key is not the new vault's
    assert files_of(home / "vault") == ["key"]


def test_shredding_overwrites_the_keys(home):
    for number, path in enumerate(("keys/data-key", "vault/key")):
        os.link(home / path, home.parent / f"kept-{number}")
    shred_vault(home / "vault", file_keystore(home))
    assert all(not any((home.parent / f"kept-{number}").read_bytes()) for number in range(2))


def test_a_crash_while_shredding_opens_nothing_and_is_completed(home, vault, crash_at_each_step):
    for name in ("records/1", "records/2", "features/ab"):
        vault.seal(name, SENTINEL)
    code = "client.vault.vault.shred_vault(home / 'vault', client.vault.keystore.file_keystore(home))"
    copies = crash_at_each_step(home, code)
    states = []
    for crashed in copies:
        keystore = file_keystore(crashed)
        states.append(files_of(crashed / "vault"))
        if (crashed / "keys" / "data-key").exists():  # nothing else goes before it
            assert states[-1] == files_of(home / "vault")
        if files_of(crashed) != files_of(home):  # something went
            with pytest.raises(StoreError):
                reopen(crashed)
        shred_vault(crashed / "vault", keystore)
        assert files_of(crashed) == ["keys/ledger-key"]
        assert not (crashed / "vault").exists()
        assert shred_vault(crashed / "vault", keystore) == []
        with pytest.raises(StoreError):
            reopen(crashed)
    assert [len(left) for left in states] == sorted((len(left) for left in states), reverse=True)
    assert {len(left) for left in states} == {4, 3, 2, 1, 0}  # a crash was seen between any two deletions


def test_when_the_keystore_refuses_nothing_is_shredded(home, vault):
    class Refusing:
        name, weak, detects_rollback = "refusing", False, False
        read = staticmethod(lambda entry: b"x")
        write = staticmethod(lambda entry, secret: None)

        @staticmethod
        def delete(entry):
            raise StoreError("locked")

    vault.seal("records/1", SENTINEL)
    with pytest.raises(StoreError, match="locked"):
        shred_vault(home / "vault", Refusing())
    assert reopen(home).open("records/1") == SENTINEL


def test_an_unreadable_place_is_an_error_in_one_line(home, vault):
    (home / "vault" / "records").mkdir()
    (home / "vault" / "records" / "1").mkdir()
    for call, match in (
        (lambda: vault.open("records/1"), "must be a regular file"),
        (lambda: vault.seal("records/1", b"x"), "try again"),
    ):
        with pytest.raises(StoreError, match=match) as caught:
            call()
        assert "\n" not in str(caught.value)
    assert not temporary_of(home / "vault" / "records" / "1").exists()


def test_a_copied_vault_is_closed_again(home):
    (home / "vault").chmod(0o755)
    reopen(home)
    assert stat.S_IMODE((home / "vault").stat().st_mode) == 0o700
    shred_vault(home / "vault", file_keystore(home))
    (home / "vault").mkdir(mode=0o755)
    create_vault(home / "vault", file_keystore(home))
    assert stat.S_IMODE((home / "vault").stat().st_mode) == 0o700


def test_deletion_takes_what_a_crash_left(home, vault):
    vault.seal("records/1", SENTINEL)
    temporary_of(home / "vault" / "records" / "1").write_bytes(b"half")
    vault.delete("records/1")
    assert files_of(home / "vault") == ["key"]
