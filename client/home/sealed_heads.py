"""Versions of the owner's private head in the vault: no personal tensor lies in plain on disk.

Each version is one sealed file ``heads/<number>`` holding the files of an exported head; the sealed ``heads/index``
says which there are and which is current. A version counts from the moment the index names it, so a crash leaves the
shelf as it was before or after.
"""

import json
from collections.abc import Callable, Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from client.vault.vault import Vault
from shared.errors import StoreError

PREFIX = "heads/"
INDEX = PREFIX + "index"

_ABOUT = {"created", "campaign", "round"}
_SIZES = TypeAdapter(dict[str, Annotated[int, Field(ge=0)]])


class HeadVersion(BaseModel):
    """One version of the private head.

    Attributes:
        number: 1, 2, …; never given twice.
        created: When it was made, as the device's clock said.
        campaign: Whose shared part it was fitted to.
        round: Of that campaign.
        after: The version it took the place of; None for the first, or where none of those before it is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    number: int
    created: str
    campaign: str
    round: str
    after: int | None


class _Index(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    current: int | None
    last: int
    versions: tuple[HeadVersion, ...]

    @model_validator(mode="after")
    def _check(self) -> "_Index":
        if self.versions and self.current not in self.numbers:
            raise ValueError("current must be kept")
        return self

    @property
    def numbers(self) -> list[int]:
        return [version.number for version in self.versions]


class HeadShelf:
    """The versions of one owner's private head, one of them current."""

    def __init__(self, vault: Vault) -> None:
        self._vault = vault

    def add(self, files: Mapping[str, bytes], about: Mapping[str, str]) -> int:
        """Keep the files of a head and make them the current version.

        Args:
            files: Name -> content, such as ``manifest.json`` and ``adapter.safetensors``.
            about: ``created``, ``campaign`` and ``round``, for ``versions``.

        Returns:
            The number of the new version.

        Raises:
            ValueError: There is no file, or ``about`` has other keys.
            StoreError: The vault cannot be read or written; the shelf is as it was.
        """
        if not files or about.keys() != _ABOUT:
            raise ValueError(f"a head needs files, created, campaign and round, got {sorted(files)}, {sorted(about)}.")
        with self._vault.lock():
            index = self._read_index()
            number = index.last + 1
            version = HeadVersion(number=number, after=index.current, **about)
            self._vault.seal(_name(number), _pack(files))
            self._write_index(_Index(current=number, last=number, versions=(*index.versions, version)))
        return number

    def current(self) -> int | None:
        """The number of the version in use; None where there is none yet."""
        return self._read_index().current

    def versions(self) -> tuple[HeadVersion, ...]:
        """What is kept, oldest first."""
        return self._read_index().versions

    def read(self, version: int | None = None) -> dict[str, bytes]:
        """The files of a version, by default the current one.

        Raises:
            StoreError: There is no such version, or its file is missing or damaged.
        """
        index = self._read_index()
        number = _kept(index, index.current if version is None else version)
        return _unpack(_name(number), self._vault.open(_name(number)))

    def roll_back(
        self, to: int | None = None, *, renew: Callable[[Mapping[str, bytes]], Mapping[str, bytes]] | None = None
    ) -> int:
        """Make another kept version current; those after it are kept until ``prune``.

        Args:
            to: Its number; by default the one that the current version took the place of.
            renew: What its files become before it is current; by default they stay.

        Returns:
            The number of the version that is now current.

        Raises:
            StoreError: There is no such version.
        """
        with self._vault.lock():
            index = self._read_index()
            if to is None:
                to = next((version.after for version in index.versions if version.number == index.current), None)
            number = _kept(index, to)
            if renew is not None:
                self._vault.seal(_name(number), _pack(renew(_unpack(_name(number), self._vault.open(_name(number))))))
            self._write_index(index.model_copy(update={"current": number}))
        return number

    def prune(self, keep: int) -> list[int]:
        """Delete all but the newest versions and the current one.

        Args:
            keep: How many of the newest stay, at least 1.

        Returns:
            The numbers of the deleted ones.
        """
        if not keep >= 1:
            raise ValueError(f"keep must be at least 1, got {keep}.")
        with self._vault.lock():
            index = self._read_index()
            stay = {index.current, *index.numbers[-keep:]}
            gone = {version.number: version.after for version in index.versions if version.number not in stay}
            kept = tuple(_relink(version, gone) for version in index.versions if version.number in stay)
            index = index.model_copy(update={"versions": kept})
            self._write_index(index)
            wanted = {INDEX, *map(_name, index.numbers)}
            for name in self._vault.names(PREFIX):  # also what a crash left of an earlier add or prune
                if name not in wanted:
                    self._vault.delete(name)
        return sorted(gone)

    def _read_index(self) -> _Index:
        if INDEX not in self._vault.names(INDEX):
            return _Index(current=None, last=0, versions=())
        try:
            return _Index.model_validate_json(self._vault.open(INDEX))
        except ValidationError:
            raise _unreadable(INDEX) from None

    def _write_index(self, index: _Index) -> None:
        self._vault.seal(INDEX, index.model_dump_json().encode())


def _name(number: int) -> str:
    return f"{PREFIX}{number:06d}"


def _kept(index: _Index, number: int | None) -> int:
    if number is None or number not in index.numbers:
        kept = ", ".join(map(str, index.numbers)) or "none"
        raise StoreError(
            f"a version of the private head must be one that is kept ({kept}), got {number or 'none before this one'}; "
            "name another, or fit a head first."
        )
    return number


def _relink(version: HeadVersion, gone: Mapping[int, int | None]) -> HeadVersion:
    after = version.after
    while after is not None and after in gone:
        after = gone[after]
    return version.model_copy(update={"after": after})


def _pack(files: Mapping[str, bytes]) -> bytes:
    """Length of a JSON table, the table (name -> size), the contents in its order."""
    table = json.dumps({name: len(content) for name, content in files.items()}).encode()
    return len(table).to_bytes(4, "big") + table + b"".join(files.values())


def _unpack(name: str, packed: bytes) -> dict[str, bytes]:
    start = 4 + int.from_bytes(packed[:4], "big")
    try:
        sizes = _SIZES.validate_json(packed[4:start], strict=True)
    except ValidationError:
        raise _unreadable(name) from None
    files = {}
    for file, size in sizes.items():
        files[file] = packed[start : start + size]
        start += size
    if start != len(packed):
        raise _unreadable(name)
    return files


def _unreadable(name: str) -> StoreError:
    return StoreError(f"{name} must be as this version of sottovoce writes it, got something else; upgrade sottovoce.")
