"""Forget an owner's data for good: keys first, then everything sealed with them. What was spent stays counted.

``receipts/begun.json`` notes what is to be deleted before anything is, so that the receipt of a deletion that was cut
and run again names it all.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.home.home import Home
from client.home.sources import SOURCE, remove_source
from client.ledger.ledger import Event, Ledger, Standing
from client.owner.owner import BEGUN, RECEIPTS, alone
from client.vault.keystore import DATA_KEY
from client.vault.private_files import disk_errors, private_folder, remove_private, write_private
from client.vault.vault import KEY_FILE, shred_vault
from shared.errors import LedgerError, StoreError
from shared.files import flush_folder

_SCHEMA = "sottovoce receipt 1"

_REMAINS = (
    ("the ledger's counters", "what was spent of epsilon and delta stays spent: forgetting gives no budget back"),
    ("the ledger's key and anchor, in the keystore", "so that nobody can lower those counters unseen"),
    ("the number of the newest private head, in the keystore", "so that an old one cannot be put back unseen"),
    ("this receipt", "so that the owner can show what was deleted; it holds no text"),
)
_SENT = (
    "Of what a campaign hides, one record or all that you contributed, whoever holds the replies learns no more than "
    "its (epsilon, delta) allows, as far as its terms of trust hold. They are part of the operator's model and cannot "
    "be called back."
)
_BEYOND = (
    "Copies and backups of the home made earlier are not reached; without the data key, which is gone here, those of "
    "the vault alone cannot be read."
)
_BEYOND_FOLDER = "The files of your data folder are yours and stay as they are; only where they lie was forgotten."
_BEYOND_FILE = (
    "The keys were files: a backup of the home holds them too, and a disk that never writes in place may keep the old "
    "blocks although they were overwritten."
)


def forget(home: Home, *, copy_to: Path | None = None) -> dict[str, Any]:
    """Shred the keys, then records, features, private heads and the kept copies of campaigns; write a receipt.

    Args:
        home: Its lock is held throughout.
        copy_to: A new file, beside the receipt in the home.

    Returns:
        The receipt, and under ``written`` where it lies.

    Raises:
        StoreError: A round is at work, ``copy_to`` cannot be written, the keystore or the disk refused. Run it again.
        LedgerError: Everything is deleted and the receipt written, but the ledger cannot note it.

    Guarantee:
        The data key is gone before anything else is; a call after a crash at any point completes the deletion.
    """
    check_copy(copy_to, home=home.folder)
    with alone(home):
        begun = _note_begun(home)
        shred_vault(home.folder / "vault", home.keystore)
        _remove_campaigns(home.folder / "campaigns")
        remove_source(home)
        _note(home, begun)  # there may be room now
        try:
            with home.ledger(round_running=False) as ledger:
                receipt = _receipt(home, begun, left=_left_the_device(ledger))
                written = _write(home, receipt, copy_to)
                ledger.forgotten({"deleted": receipt["deleted"]["files"], "receipt": written})
        except LedgerError as error:
            receipt = _receipt(home, begun, left={"unknown": str(error)})
            written = _write(home, receipt, copy_to)
            _finish(home)
            raise LedgerError(
                f"everything was deleted, see {home.folder / RECEIPTS / written['file']}, but the ledger could not "
                f"note it: {error}",
                code=error.code,
            ) from error
        _finish(home)
    return receipt | {"written": written}


def describe_loss(home: Home) -> dict[str, int]:
    """How many files of each kind ``forget`` would delete."""
    return _counts(_names(home))


def check_copy(path: Path | None, *, home: Path) -> None:
    """Raise ``StoreError`` unless a receipt can be written to a path outside the home, or none is asked for."""
    if path is None:
        return
    if path.absolute().resolve().is_relative_to(home.resolve()):
        raise StoreError(f"--receipt must lie outside the home, got {path}; the home keeps one anyway.")
    if os.path.lexists(path) or not path.absolute().parent.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise StoreError(f"--receipt must name a new file in a folder you may write, got {path}. Nothing was changed.")


@dataclass(frozen=True)
class _Begun:
    """What is to be deleted.

    Attributes:
        records: How many; None where the keys were gone already.
    """

    names: tuple[str, ...]
    records: int | None


def _note_begun(home: Home) -> _Begun:
    """Note everything to be deleted, with what an earlier call that was cut has deleted."""
    path = home.folder / RECEIPTS / BEGUN
    with disk_errors(path):
        held = None if (home.folder / "vault").exists() else 0
        earlier = _read_begun(path.read_bytes()) if path.exists() else _Begun((), held)
        records = _count_records(home)
        begun = _Begun(tuple(sorted({*earlier.names, *_names(home)})), earlier.records if records is None else records)
    _note(home, begun)
    return begun


def _note(home: Home, begun: _Begun) -> None:
    """Write the note where there is room: a full disk keeps nobody from deleting."""
    with contextlib.suppress(OSError):
        private_folder(home.folder / RECEIPTS)
        content = json.dumps({"names": begun.names, "records": begun.records}).encode()
        write_private(home.folder / RECEIPTS / BEGUN, content)


def _read_begun(content: bytes) -> _Begun:
    try:
        value = json.loads(content)
        names, records = tuple(map(str, value["names"])), value["records"]
        return _Begun(names, records if type(records) is int else None)
    except (ValueError, TypeError, KeyError, RecursionError):
        return _Begun((), None)  # a damaged note must not keep the owner from deleting


def _count_records(home: Home) -> int | None:
    if not (home.folder / "vault").exists():
        return None
    try:
        return len(home.records().read())
    except StoreError:
        return None


def _names(home: Home) -> list[str]:
    """What there is to delete, without what could be a fingerprint of a text."""
    vault, campaigns = home.folder / "vault", home.folder / "campaigns"
    files = [path for path in vault.rglob("*") if path.is_file() and not path.name.startswith(".")]
    names = [path.relative_to(vault).as_posix() for path in files if path != vault / KEY_FILE]
    names = [name.rpartition("-")[0] if name.startswith("features/") else name for name in names]
    keys = [f"keys/{DATA_KEY}"] if home.keystore.read(DATA_KEY) is not None else []
    keys += [f"keys/{KEY_FILE} (wrapped)"] if (vault / KEY_FILE).exists() else []
    source = [SOURCE] if (home.folder / SOURCE).exists() else []
    return sorted({*keys, *names, *source, *(f"campaigns/{path.name}" for path in campaigns.glob("*"))})


def _counts(names: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(name.partition("/")[0] for name in names).items()))


def _remove_campaigns(folder: Path) -> None:
    with disk_errors(folder):
        if folder.is_dir():
            shutil.rmtree(folder)
            flush_folder(folder.parent)


def _left_the_device(ledger: Ledger) -> dict[str, Any]:
    """What was released and cannot be called back."""
    events = [event for event in ledger.history() if event.kind == "release"]
    totals = ledger.totals()
    return {
        "campaigns": [_sent(standing, events) for standing in ledger.consents()],
        "bound": {"epsilon": totals.epsilon, "delta": totals.delta},
        "meaning": _SENT,
    }


def _sent(standing: Standing, releases: list[Event]) -> dict[str, Any]:
    consent = standing.consent
    return {
        "campaign": consent.campaign,
        "policy": consent.policy,
        "operator": consent.operator,
        "epsilon": consent.epsilon,
        "delta": consent.delta,
        "replies_lost_with_an_older_ledger": standing.lost,
        "replies": [
            {"round": event.round_number, "at": event.at, **event.detail}
            for event in releases
            if event.policy == consent.policy
        ],
    }


def _receipt(home: Home, begun: _Begun, *, left: dict[str, Any]) -> dict[str, Any]:
    return {
        "schema": _SCHEMA,
        "forgotten": home.clock().isoformat(timespec="seconds"),
        "deleted": {"records": begun.records, "files": _counts(begun.names), "names": begun.names},
        "remains": [{"what": what, "why": why} for what, why in _REMAINS],
        "left_the_device": left,
        "out_of_reach": [
            _BEYOND,
            *([_BEYOND_FILE] if home.keystore.weak else []),
            *([_BEYOND_FOLDER] if SOURCE in begun.names else []),
        ],
    }


def _write(home: Home, receipt: dict[str, Any], copy_to: Path | None) -> dict[str, str]:
    """Write the receipt into the home, and where the owner wants it; its name and hash."""
    content = (json.dumps(receipt, indent=2, ensure_ascii=False) + "\n").encode()
    stem = home.clock().strftime("%Y%m%dT%H%M%S")
    folder = home.folder / RECEIPTS
    for path in (folder / f"{stem}.json", *(folder / f"{stem}-{number}.json" for number in range(2, 10_000))):
        if not path.exists():
            break
    with disk_errors(path):
        private_folder(folder)
        write_private(path, content)
    if copy_to is not None:
        with disk_errors(copy_to):
            write_private(copy_to, content)
    return {"file": path.name, "sha256": hashlib.sha256(content).hexdigest()}


def _finish(home: Home) -> None:
    with disk_errors(home.folder):
        remove_private(home.folder / RECEIPTS / BEGUN)
