"""One owner's home on a device: keys, ledger, encrypted store and the campaigns the owner agreed to, in one folder.

    keystore.json  keys/     where the keys are; ``keys`` only without an OS keyring
    ledger.db                what was spent, and what left the device
    source.json              where the owner's data folder lies, if there is one
    vault/                   records, features and private heads, encrypted
    campaigns/<policy>/      what the owner agreed to; public
    lock                     held by the process that trains

Imports neither torch nor flwr: the owner's commands need no more than the base install.
"""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.home.sealed_heads import HeadShelf
from client.home.store import RecordStore
from client.ledger.ledger import Ledger, create_ledger, open_ledger, recover_ledger
from client.vault.keystore import Keystore, choose_keystore, open_keystore
from client.vault.vault import Vault, create_vault, open_vault
from shared.errors import RefusedError, StoreError

Clock = Callable[[], datetime]


def now() -> datetime:
    """The time of the wall clock."""
    return datetime.now(UTC)


@dataclass(frozen=True)
class Home:
    """An owner's home; every part is opened, and checked, when it is asked for."""

    folder: Path
    keystore: Keystore
    clock: Clock = now

    def ledger(self, *, round_running: bool = True) -> Ledger:
        """The record of what was spent; close it after use.

        Args:
            round_running: Whether a round that was spent and not released may still be at work. Only the holder of the
                lock knows that none is.

        Raises:
            LedgerError: It is missing, damaged, locked or rolled back.
        """
        path = self.folder / "ledger.db"
        return open_ledger(path, keystore=self.keystore, clock=self.clock, round_running=round_running)

    def recover(self, *, cap_epsilon: float, cap_delta: float) -> Ledger:
        """A ledger to go on with after a roll-back or a loss; see ``recover_ledger``."""
        return recover_ledger(
            self.folder / "ledger.db",
            keystore=self.keystore,
            cap_epsilon=cap_epsilon,
            cap_delta=cap_delta,
            clock=self.clock,
        )

    def vault(self) -> Vault:
        """The encrypted files.

        Raises:
            StoreError: A key is lost, or there is no vault.
        """
        return open_vault(self.folder / "vault", self.keystore)

    def records(self) -> RecordStore:
        """The owner's training records."""
        return RecordStore(self.vault())

    def heads(self) -> HeadShelf:
        """The versions of the owner's private head."""
        return HeadShelf(self.vault())

    def campaign_folder(self, policy_sha256: str) -> Path:
        """Where a campaign the owner agreed to lies."""
        return self.folder / "campaigns" / policy_sha256[:16]

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the one process that trains; the lock dies with its holder.

        Raises:
            RefusedError: ``BUSY``: another process holds it.
        """
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RefusedError("BUSY") from None
            yield
        finally:
            os.close(descriptor)


def create_home(folder: Path, *, keystore: str, cap_epsilon: float, cap_delta: float, clock: Clock = now) -> Home:
    """Make a home: keys, an empty ledger with the owner's lifetime caps, an empty vault.

    Args:
        folder: Must not hold a home yet.
        keystore: ``os`` or ``file``; see ``client.vault.keystore``.
        cap_epsilon: What all campaigns on this owner's data may cost together, ever (basic composition).
        cap_delta: The same for delta.

    Raises:
        StoreError: There is a home already, or the keystore does not work.
        LedgerError: The keystore remembers a ledger of this home: a lost one is recovered, not begun anew.
    """
    if (folder / "keystore.json").exists():
        raise StoreError(f"{folder} must not hold a home yet, but does; use it, or name another folder with --home.")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    home = Home(folder, choose_keystore(folder, keystore), clock)
    ledger = folder / "ledger.db"
    create_ledger(ledger, keystore=home.keystore, cap_epsilon=cap_epsilon, cap_delta=cap_delta, clock=clock).close()
    create_vault(folder / "vault", home.keystore)
    return home


def open_home(folder: Path, *, clock: Clock = now) -> Home:
    """Open a home.

    Raises:
        StoreError: There is none, or its keystore does not work.
    """
    if not (folder / "keystore.json").is_file():
        raise StoreError(f"{folder} must hold a home, but does not; make one with sottovoce client init.")
    return Home(folder.resolve(), open_keystore(folder), clock)
