"""Encrypted files of a home: AES-256-GCM under one key, itself wrapped by a key that two keystore entries make.

A file is ``magic and version | 96-bit random nonce | ciphertext and tag``; the name is authenticated with it, so that
files cannot be swapped. What stays visible to a thief: the names, the sizes and the times of the files.

    data-key  ─┐
    ledger-key ─┴ HKDF-SHA256 ▸ key-encryption key ▸ vault/key (wrapped) ▸ data-encryption key ▸ every file
                              ▸ Ed25519 key that signs the owner's private heads

Losing the ledger's key loses the data: nobody can wipe the record of what was spent and train on the old data again.
"""

import contextlib
import os
import re
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from client.vault.keystore import DATA_KEY, LEDGER_KEY, Keystore
from client.vault.plain_files import read_plain
from client.vault.private_files import (
    disk_errors,
    locked_folder,
    private_folder,
    remove_private,
    temporary_of,
    write_private,
)
from shared.errors import HeadError, StoreError
from shared.files import flush_folder

MAGIC = b"sottovoce vault\x01"  # the last byte is the version
KEY_FILE = "key"

_KEY_BYTES = 32
_NONCE_BYTES = 12  # random: good for 2**32 files under one key
_TAG_BYTES = 16
_MAX_BYTES = 2**31 - 1  # of one message, in the cryptography package
_NAME = re.compile("[a-z0-9][a-z0-9._-]*(/[a-z0-9][a-z0-9._-]*)*")


class Vault:
    """The sealed files of a home; one object may be used by several threads.

    Guarantee:
        No plaintext is written to disk, temporary files included; what ``open`` gives is what was sealed under that
        very name with this home's keys.
    """

    def __init__(self, folder: Path, *, wrapped: bytes, key: bytes) -> None:
        self._folder = folder
        self._wrapped = wrapped
        self._cipher = AESGCM(key)
        self._thread_lock = threading.RLock()
        self._depth = 0

    def seal(self, name: str, content: bytes) -> None:
        """Encrypt and keep content under a name; the old content stays until the new is on disk.

        Raises:
            StoreError: The disk is full or not writable (the old content is as it was), or the vault was shredded.
        """
        path = self._path(name)
        if not len(content) <= _MAX_BYTES:
            raise StoreError(f"{name} must have at most {_MAX_BYTES} bytes, got {len(content)}; split it.")
        sealed = _seal(self._cipher, name, content)
        with self.lock(), disk_errors(path):
            self._check_present()
            private_folder(path.parent)
            write_private(path, sealed)

    def open(self, name: str) -> bytes:
        """The content that was sealed under the name.

        Raises:
            StoreError: It is missing, damaged, sealed with another key or under another name, or no file of its own.
        """
        path = self._path(name)
        try:
            sealed = read_plain(path.parent, path.name, limit=_MAX_BYTES)
        except HeadError as error:
            raise StoreError(str(error)) from None
        if sealed is None:
            raise StoreError(f"{path} must exist, it was deleted or never written; restore it.")
        return _open(self._cipher, name, sealed, path)

    def names(self, prefix: str) -> list[str]:
        """Names that begin with the prefix, sorted."""
        top = self._folder / prefix.rpartition("/")[0]
        with disk_errors(top):
            found = [path.relative_to(self._folder).as_posix() for path in top.rglob("*") if path.is_file()]
        return sorted(name for name in found if name.startswith(prefix) and _is_name(name))

    def delete(self, name: str) -> None:
        """Remove a file; nothing happens where there is none."""
        path = self._path(name)
        with self.lock(), disk_errors(path):
            if path.parent.is_dir():
                temporary_of(path).unlink(missing_ok=True)
                path.unlink(missing_ok=True)
                flush_folder(path.parent)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other writers of this vault out, in this process and others, while several calls belong together."""
        with self._thread_lock, contextlib.ExitStack() as stack:
            if not self._depth:
                with disk_errors(self._folder):
                    if not self._folder.is_dir():
                        raise self._shredded()
                    stack.enter_context(locked_folder(self._folder))
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1

    def _path(self, name: str) -> Path:
        if not _is_name(name):
            raise ValueError(f"a name in the vault must be lower-case path segments, got {name!r}.")
        return self._folder / name

    def _check_present(self) -> None:
        path = self._folder / KEY_FILE
        if not path.exists() or path.read_bytes() != self._wrapped:
            raise self._shredded()

    def _shredded(self) -> StoreError:
        return StoreError(
            f"{self._folder} must still be the vault that was opened, it was shredded meanwhile; try again."
        )


def create_vault(folder: Path, keystore: Keystore) -> Vault:
    """Make an empty vault with new keys.

    Args:
        folder: Of the vault; missing or empty.
        keystore: Must hold the ledger's key; gets a new data key.

    Raises:
        StoreError: There is a vault or what is left of one, the ledger's key is missing, or a key cannot be kept.
    """
    ledger_key = _read_key(keystore, LEDGER_KEY)
    with disk_errors(folder):
        private_folder(folder)
        folder.chmod(0o700)
        with locked_folder(folder):
            if any(path != temporary_of(folder / KEY_FILE) for path in folder.iterdir()):
                raise StoreError(
                    f"{folder} must be empty for a new vault, got files of an earlier one; run sottovoce client forget "
                    "to delete those first."
                )
            data_key, key = secrets.token_bytes(_KEY_BYTES), secrets.token_bytes(_KEY_BYTES)
            keystore.write(DATA_KEY, data_key)
            wrapped = _seal(_key_cipher(data_key, ledger_key), KEY_FILE, key)
            write_private(folder / KEY_FILE, wrapped)
    return Vault(folder, wrapped=wrapped, key=key)


def open_vault(folder: Path, keystore: Keystore) -> Vault:
    """Open the vault of a home.

    Raises:
        StoreError: There is none, it was shredded, or the keys in the keystore are not the ones it was made with.
    """
    path = folder / KEY_FILE
    with disk_errors(path):
        try:
            wrapped = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(
                f"{folder} must hold a vault, it was shredded or never made; adding records makes a new one."
            ) from None
        folder.chmod(0o700)
    cipher = _key_cipher(_read_key(keystore, DATA_KEY), _read_key(keystore, LEDGER_KEY))
    key = _open(cipher, KEY_FILE, wrapped, path)
    return Vault(folder, wrapped=wrapped, key=key)


def signing_key(keystore: Keystore) -> Ed25519PrivateKey:
    """The home's own key, which signs its private heads; made of the vault's two keys, it ends with them.

    Raises:
        StoreError: A key is lost or was shredded.
    """
    derived = _derive(_read_key(keystore, DATA_KEY), _read_key(keystore, LEDGER_KEY), b"sottovoce head signature 1")
    return Ed25519PrivateKey.from_private_bytes(derived)


def shred_vault(folder: Path, keystore: Keystore) -> list[str]:
    """Make every file of a vault unreadable for good, then delete them.

    Returns:
        What was deleted now: ``data-key`` (the keystore's entry), ``key`` (the wrapped one), then the files.

    Raises:
        StoreError: The keystore or the disk refused; call it again, it goes on where it stopped.

    Guarantee:
        From the first deletion on nothing in the vault can be opened, whenever a crash comes; a second call after it
        deletes the rest.
    """
    deleted = []
    if keystore.read(DATA_KEY) is not None:
        deleted.append(DATA_KEY)
    keystore.delete(DATA_KEY)
    with disk_errors(folder):
        if not folder.is_dir():
            return deleted
        with locked_folder(folder):
            if remove_private(folder / KEY_FILE):
                deleted.append(KEY_FILE)
            deleted += _remove_tree(folder)
    return deleted


def _remove_tree(folder: Path) -> list[str]:
    removed = []
    for top, folders, files in os.walk(folder, topdown=False):
        links = [name for name in folders if (Path(top) / name).is_symlink()]
        for name in sorted((*files, *links)):
            path = Path(top) / name
            path.unlink()
            removed.append(path.relative_to(folder).as_posix())
        Path(top).rmdir()
    flush_folder(folder.parent)
    return sorted(removed)


def _is_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and name != KEY_FILE


def _read_key(keystore: Keystore, entry: str) -> bytes:
    key = keystore.read(entry)
    if key is None or len(key) != _KEY_BYTES:
        raise StoreError(
            f"the keystore ({keystore.name}) must hold the home's {entry} of {_KEY_BYTES} bytes, got "
            f"{'none' if key is None else len(key)}; without it the home's data cannot be read: restore the keystore, "
            "or forget the data and begin anew."
        )
    return key


def _key_cipher(data_key: bytes, ledger_key: bytes) -> AESGCM:
    return AESGCM(_derive(data_key, ledger_key, b"sottovoce vault 1"))


def _derive(data_key: bytes, ledger_key: bytes, info: bytes) -> bytes:
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=ledger_key, info=info).derive(data_key)


def _seal(cipher: AESGCM, name: str, content: bytes) -> bytes:
    nonce = os.urandom(_NONCE_BYTES)
    return MAGIC + nonce + cipher.encrypt(nonce, content, MAGIC + name.encode())


def _open(cipher: AESGCM, name: str, sealed: bytes, path: Path) -> bytes:
    start = len(MAGIC) + _NONCE_BYTES
    if sealed[: len(MAGIC) - 1] == MAGIC[:-1] and sealed[len(MAGIC) - 1 : len(MAGIC)] > MAGIC[-1:]:
        raise StoreError(
            f"{path} must be of version {MAGIC[-1]}, it is of {sealed[len(MAGIC) - 1]}: a newer Sottovoce wrote it, or "
            "it is damaged. Install that version, or restore the file."
        )
    try:
        if not sealed.startswith(MAGIC) or len(sealed) < start + _TAG_BYTES:
            raise InvalidTag
        return cipher.decrypt(sealed[len(MAGIC) : start], sealed[start:], MAGIC + name.encode())
    except InvalidTag:
        raise StoreError(
            f"{path} must be the file that this home sealed under that name, got a damaged or moved one, or another "
            "home's keys; restore the file or the keystore, or forget the data and begin anew."
        ) from None
