"""The owner's training records: the only reader of user text on a device.

Each call of ``RecordStore.add`` makes one sealed file ``records/<number>`` of the vault, one canonical JSON line a
record. No error's message holds any of the text.
"""

import json
import math
from collections.abc import Sequence

from client.vault.vault import Vault
from shared.datasets.records import Record, is_text
from shared.errors import DataError, StoreError

PREFIX = "records/"

_TYPES: dict[str, type] = {
    "text": str,
    "target": float,
    "item": str,
    "timestamp": int,
    "response": str,
    "rejected": str,
}
_LATER = "rejected"  # is written where there is one: records of earlier versions have none


class RecordStore:
    """Training records in a vault, in the order they were added."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def add(self, records: Sequence[Record]) -> int:
        """Keep records, all of them or none.

        Returns:
            How many.

        Raises:
            DataError: A field is of the wrong type, not finite or not valid text.
            StoreError: The vault cannot be written; what was kept is as it was.
        """
        for number, record in enumerate(records, start=1):
            problem = _problem(record)
            if problem:
                raise DataError(f"record {number} of {len(records)}: {problem}.")
        if records:
            with self._vault.lock():  # two writers must not take the same number
                self._vault.seal(_name(len(self._files()) + 1), b"".join(map(_line, records)))
        return len(records)

    def read(self) -> tuple[Record, ...]:
        """All records, in the order they were added.

        Raises:
            StoreError: A file is missing or damaged, or a line is not as ``add`` writes it.
        """
        return tuple(record for name in self._files() for record in _parse(name, self._vault.open(name)))

    def _files(self) -> list[str]:
        found = set(self._vault.names(PREFIX))
        names = [_name(number) for number in range(1, len(found) + 1)]
        if found != set(names):
            raise StoreError(
                f"the vault's {PREFIX} must be numbered from 1 without a gap, got {len(found)} files and another "
                "numbering; restore the missing one, or forget the data and begin anew."
            )
        return names


def _name(number: int) -> str:
    return f"{PREFIX}{number:06d}"


def _problem(record: object) -> str | None:
    """What keeps it from being stored; never with a text in it."""
    if not isinstance(record, Record):
        return f"it must be a Record, got {type(record).__name__}"
    for field, wanted in _TYPES.items():
        value = getattr(record, field)
        if type(value) is not wanted:  # neither a bool for an int nor a subclass that says otherwise later
            return f"{field} must be of type {wanted.__name__}, got {type(value).__name__}"
        if isinstance(value, float) and not math.isfinite(value):
            return f"{field} must be finite, got {value}"
        if isinstance(value, str) and not is_text(value):
            return f"{field} must be valid text, got half of a surrogate pair"
    return None


def _line(record: Record) -> bytes:
    # asdict copies deeply: a third of the time of reading
    fields = {field: getattr(record, field) for field in _TYPES if field != _LATER or record.rejected}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def _parse(name: str, content: bytes) -> list[Record]:
    records = []
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            value = json.loads(line)
            record = Record(**value) if isinstance(value, dict) else None
        except (ValueError, TypeError, RecursionError):
            record = None
        if record is None or _problem(record) or _line(record) != line:
            raise StoreError(
                f"{name}, line {number}, must be a record as this version writes it, got something else; "
                "upgrade sottovoce or restore the file."
            )
        records.append(record)
    return records
