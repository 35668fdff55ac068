"""Where the keys of one home live: files in its folder, or the keyring of the operating system.

Which one was chosen when the home was made stands in ``keystore.json`` and never changes by itself: a keyring that is
missing or locked is an error, not a reason to write keys to a file.
"""

import base64
import binascii
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from client.vault.private_files import disk_errors, locked_folder, private_folder, remove_private, write_private
from shared.errors import StoreError

if TYPE_CHECKING:
    from keyring.backend import KeyringBackend

LEDGER_KEY, DATA_KEY, ANCHOR = "ledger-key", "data-key", "anchor"
CHOICE = "keystore.json"
SERVICE = "sottovoce"

_FALL_BACK = "make the home with --keystore file, which is weak: whoever reads the home's folder reads the keys too"
# Backends that keep nothing, keep it in plain, or pass it on to one of those.
_REFUSED_MODULES = ("keyring.backends.fail", "keyring.backends.null", "keyring.backends.chainer", "keyrings.alt")
# Their entries are not files in the owner's folder that a backup of it brings back.
_APART_FROM_FILES = {
    ("keyring.backends.macOS", "Keyring"): "macOS Keychain",
    ("keyring.backends.Windows", "WinVaultKeyring"): "Windows Credential Manager",
}

_T = TypeVar("_T")


class Keystore(Protocol):
    """Named secrets of one home.

    Attributes:
        name: For status.
        weak: Whoever reads the home's folder reads the keys too.
        detects_rollback: A restored backup of the home does not bring these entries back with it.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def weak(self) -> bool: ...  # noqa: D102
    @property
    def detects_rollback(self) -> bool: ...  # noqa: D102

    def read(self, entry: str) -> bytes | None:
        """The secret, or None where there is none."""

    def write(self, entry: str, secret: bytes) -> None:
        """Keep a secret; durable when it returns."""

    def delete(self, entry: str) -> None:
        """Forget a secret; nothing happens where there is none."""


def choose_keystore(home: Path, kind: str) -> Keystore:
    """Decide once, for a new home, where its keys live.

    Args:
        home: The home's folder; made where it is missing.
        kind: ``file`` or ``os``.

    Raises:
        StoreError: The kind is unknown or its keyring cannot be used, or the home has chosen already.
    """
    path = home / CHOICE
    if kind not in _KINDS:
        raise StoreError(f"--keystore must be one of {', '.join(_KINDS)}, got {kind!r}.")
    keystore = _KINDS[kind](home)
    with disk_errors(path):
        private_folder(home)
        with locked_folder(home):
            if path.exists():
                raise StoreError(f"{home} must be a new home, but {CHOICE} says where its keys are; leave it so.")
            write_private(path, json.dumps({"kind": kind}).encode())
    return keystore


def open_keystore(home: Path) -> Keystore:
    """The keystore that the home chose when it was made.

    Raises:
        StoreError: ``keystore.json`` is missing or says something unknown, or the keyring cannot be used.
    """
    path = home / CHOICE
    try:
        choice = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StoreError(f"{home} must be a home, but has no {CHOICE}; name the right folder or make a home.") from None
    except OSError as error:
        raise StoreError(f"{path} must be readable, got: {error.strerror}; mend its permissions.") from error
    except (ValueError, RecursionError):
        choice = None
    kind = choice.get("kind") if isinstance(choice, dict) and choice.keys() == {"kind"} else None
    if not isinstance(kind, str) or kind not in _KINDS:
        kinds = " or ".join(json.dumps({"kind": name}) for name in _KINDS)
        raise StoreError(f"{path} must be {kinds}, as it was written with the home, got something else; restore it.")
    return _KINDS[kind](home)


def file_keystore(home: Path) -> Keystore:
    """Keys as files in ``home/keys``: weak, and restored together with a backup of the home."""
    return _FileKeystore(home / "keys")


def os_keystore(home: Path) -> Keystore:
    """Keys in the keyring of the operating system, under the home's path.

    Raises:
        StoreError: There is no keyring, or the one in force keeps nothing or keeps it in plain.
    """
    import keyring  # takes a tenth of a second, which homes with the file keystore need not pay

    backend = _asking("be there", keyring.get_keyring)
    classes = [(cls.__module__, cls.__qualname__) for cls in type(backend).__mro__]
    for module, name in classes:
        if any(module == refused or module.startswith(f"{refused}.") for refused in _REFUSED_MODULES):
            raise StoreError(
                f"the operating system's keyring must keep keys by itself, got {module}.{name}; install or unlock one, "
                f"name one of `keyring --list-backends` in PYTHON_KEYRING_BACKEND, or {_FALL_BACK}."
            )
    return _OsKeystore(backend, home.resolve(), _APART_FROM_FILES.get(classes[0]))


class _FileKeystore:
    name = "file"
    weak = True
    detects_rollback = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, entry: str) -> bytes | None:
        path = self._path(entry)
        with disk_errors(path):
            try:
                return path.read_bytes()
            except FileNotFoundError:
                return None

    def write(self, entry: str, secret: bytes) -> None:
        path = self._path(entry)
        with disk_errors(path):
            private_folder(self._folder)
            self._folder.chmod(0o700)  # a copied home may have been opened to others
            with locked_folder(self._folder):
                write_private(path, secret)

    def delete(self, entry: str) -> None:
        path = self._path(entry)
        with disk_errors(path):
            if self._folder.exists():
                with locked_folder(self._folder):
                    remove_private(path)

    def _path(self, entry: str) -> Path:
        return self._folder / _checked(entry)


class _OsKeystore:
    weak = False

    def __init__(self, backend: "KeyringBackend", home: Path, apart: str | None) -> None:
        self._backend = backend
        self._home = home
        self.name = f"os keyring ({apart or backend.name})"
        self.detects_rollback = apart is not None

    def read(self, entry: str) -> bytes | None:
        user = self._user(entry)
        value = _asking("give an entry", lambda: self._backend.get_password(SERVICE, user))
        if value is None:
            return None
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError, TypeError):
            raise StoreError(
                f"the keyring's entry {user!r} of {SERVICE!r} must be base64, got something else: another program "
                "wrote it; restore it from the keyring's backup."
            ) from None

    def write(self, entry: str, secret: bytes) -> None:
        user, value = self._user(entry), base64.b64encode(secret).decode()
        _asking("keep an entry", lambda: self._backend.set_password(SERVICE, user, value))
        if self.read(entry) != secret:
            raise StoreError(
                f"the operating system's keyring must keep {user!r}, got something else back; {_FALL_BACK}."
            )

    def delete(self, entry: str) -> None:
        user = self._user(entry)
        if _asking("give an entry", lambda: self._backend.get_password(SERVICE, user)) is None:
            return
        _asking("delete an entry", lambda: self._backend.delete_password(SERVICE, user))
        if _asking("give an entry", lambda: self._backend.get_password(SERVICE, user)) is not None:
            raise StoreError(f"the operating system's keyring must forget {user!r}, but still has it; delete it there.")

    def _user(self, entry: str) -> str:
        return f"{self._home}/{_checked(entry)}"


_KINDS: dict[str, Callable[[Path], Keystore]] = {"file": file_keystore, "os": os_keystore}


def _asking(what: str, call: Callable[[], _T]) -> _T:
    try:
        return call()
    except Exception as error:  # backends let errors of D-Bus, ctypes and the like through; all mean: no keyring
        reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
        raise StoreError(
            f"the operating system's keyring must {what}, got: {reason}; unlock it, or for a new home {_FALL_BACK}."
        ) from error


def _checked(entry: str) -> str:
    if not re.fullmatch("[a-z]+(-[a-z]+)*", entry):
        raise ValueError(f"an entry must be lower-case words with hyphens, got {entry!r}.")
    return entry
