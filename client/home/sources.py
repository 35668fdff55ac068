"""A home's data source: a folder of the owner's files that is read and never written, beside the records in the store.

``source.json`` names folder, format and columns. ``records_of`` is the one place where store and folder come together;
what of it a campaign's shared part may use is the policy's ``added_records``.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from client.home.home import Home
from client.vault.private_files import disk_errors, write_private
from client.vault.vault import Vault
from shared.datasets.folder import FolderRecords, check_columns, read_folder
from shared.datasets.records import Record
from shared.errors import DataError, StoreError
from shared.files import flush_folder

SOURCE = "source.json"
AddedRecords = Literal["next-round", "next-campaign"]
# What a record must have to be of use; a source whose columns do not give it has nothing for that task.
NEEDED: Mapping[str, str] = {
    "rating": "target",
    "tagging": "target",
    "ranking": "target",
    "generation": "response",
    "preference": "rejected",
}
_FIXED = "fixed-records/"  # in the vault, one file a campaign whose records are fixed
_DIGEST_BYTES = 32


class Source(BaseModel):
    """A folder of data.

    Attributes:
        path: Absolute.
        format: A key of ``shared.datasets.folder.SUFFIXES``.
        columns: Field of ``Record`` -> column.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    path: str
    format: str
    columns: dict[str, str]

    def read(self) -> FolderRecords:
        """What the folder holds now; see ``read_folder``."""
        return read_folder(Path(self.path), format=self.format, columns=self.columns)

    def tasks(self) -> list[str]:
        """Tasks its records are of use to."""
        return [task for task, field in NEEDED.items() if field in self.columns]


def make_source(folder: Path, *, format: str, columns: Mapping[str, str]) -> Source:
    """Describe a data source.

    Raises:
        DataError: Format or column map are impossible.
    """
    return Source(path=str(folder.absolute().resolve()), format=format, columns=check_columns(format, columns))


def set_source(home: Home, source: Source) -> None:
    """Make a folder the home's data source, in place of an earlier one; whoever calls holds the home's lock.

    Raises:
        DataError: Folder and home lie in each other.
        StoreError: The home cannot be written.
    """
    path, own = Path(source.path), home.folder.resolve()
    if path.is_relative_to(own) or own.is_relative_to(path):
        raise DataError(f"a data source must lie outside the home and not around it, got {path} and {own}.")
    with disk_errors(home.folder / SOURCE):
        write_private(home.folder / SOURCE, source.model_dump_json(indent=2).encode() + b"\n")


def read_source(home: Home) -> Source | None:
    """The home's data source; None where it has none.

    Raises:
        StoreError: ``source.json`` is damaged.
    """
    path = home.folder / SOURCE
    try:
        with disk_errors(path):
            source = Source.model_validate_json(path.read_bytes()) if path.exists() else None
        if source is not None:
            check_columns(source.format, source.columns)
    except (ValidationError, DataError):
        raise StoreError(
            f"{path} must name a data source, it is damaged; run: sottovoce client source FOLDER."
        ) from None
    return source


def remove_source(home: Home) -> bool:
    """Use the folder no more; whether there was one. The folder stays as it is."""
    path = home.folder / SOURCE
    with disk_errors(path):
        if not path.exists():
            return False
        path.unlink()
        flush_folder(home.folder)
    return True


def describe_source(home: Home) -> dict[str, Any] | None:
    """The home's folder and what is in it now, in counts; ``problem`` where it cannot be read. None without one."""
    found: dict[str, Any] = {"path": None, "format": None, "columns": {}, "tasks": [], "records": None, "skipped": {}}
    try:
        source = read_source(home)
        if source is None:
            return None
        found |= source.model_dump() | {"tasks": source.tasks()}
        held = source.read()
    except StoreError as error:
        return found | {"problem": str(error)}
    return found | {"records": len(held.records), "skipped": dict(held.skipped), "problem": None}


def records_of(home: Home, *, task: str | None = None) -> tuple[Record, ...]:
    """Every record of a home, those of the store first, then those of its folder; an equal one counts once.

    Args:
        home: Without a vault, as after ``forget``, it has no record, whatever its folder holds.
        task: Leaves out a folder whose columns do not give what the task needs.

    Raises:
        StoreError: Store or folder cannot be read.
    """
    if not (home.folder / "vault").exists():
        return ()
    kept = home.records().read()
    source = read_source(home)
    if source is None or (task is not None and task not in source.tasks()):
        return tuple(dict.fromkeys(kept))
    return tuple(dict.fromkeys((*kept, *source.read().records)))


def training_records(home: Home, *, policy_sha256: str, task: str, added: AddedRecords) -> tuple[Record, ...]:
    """The records that a campaign's shared part may use now.

    Args:
        home: The owner's home.
        policy_sha256: Of the campaign.
        task: Of the campaign.
        added: The policy's rule. ``next-round``: all that are there. ``next-campaign``: those of them that were there
            when this device read its records in this campaign for the first time; that set is kept in the vault.

    Raises:
        StoreError: As ``records_of``, or the set cannot be kept or read.

    Guarantee:
        One record more in the home, whenever it is there and however often, is at most that record more in what is
        returned.
    """
    records = records_of(home, task=task)
    if added == "next-round" or not (home.folder / "vault").exists():
        return records
    fixed = _fixed(home.vault(), f"{_FIXED}{policy_sha256[:16]}", records)
    return tuple(record for record in records if _digest(record) in fixed)


def _fixed(vault: Vault, name: str, records: Sequence[Record]) -> set[bytes]:
    """Digests of a campaign's records as they were at first; those of ``records`` where none are kept yet."""
    if not vault.names(name):
        vault.seal(name, b"".join(sorted(map(_digest, records))))  # sorted: says nothing of their order
    content = vault.open(name)
    return {content[start : start + _DIGEST_BYTES] for start in range(0, len(content), _DIGEST_BYTES)}


def _digest(record: Record) -> bytes:
    fields = [record.text, record.target + 0.0, record.item, record.timestamp, record.response]  # -0.0 equals 0.0
    if record.rejected:  # appended, so that digests of earlier versions stand
        fields.append(record.rejected)
    return hashlib.sha256(json.dumps(fields).encode()).digest()
