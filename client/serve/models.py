"""The models a device serves by name, over one base: its owner's private heads, and the base alone.

Which heads there are is asked at every request, so that a new, rolled back or forgotten one is noticed at once; opened
heads are kept in memory as long as they are listed. A head that cannot be used is never silently left out: the base
answers under its own name, and says why.
"""

import hashlib
import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol

from client.home.home import Home
from client.owner.remember import Remembering
from client.owner.verify import Opened, highest_sequence, open_personal, trusted_operators
from client.runtime.artifact import MANIFEST, read_manifest
from client.runtime.chat import ChatFormat, chat_format
from client.runtime.generation import Generator, open_generator
from client.runtime.language import open_lm_base
from client.vault.vault import KEY_FILE
from shared.errors import HeadError, StoreError

BASE, PERSONAL = "base", "personal"
_PERSONAL = re.compile(rf"{PERSONAL}(@[1-9][0-9]*)?")


class Heads(Protocol):
    """Where heads come from."""

    def listed(self) -> Mapping[str, Hashable]:
        """Name -> what decides its bytes and how it is checked."""

    def open(self, name: str, base: Generator) -> Opened[Generator]:
        """A listed head on the base, checked; or the base and why."""

    def valid(self, head: Generator) -> bool:
        """Whether an opened head may still be used."""


@dataclass(frozen=True)
class Chosen:
    """What answers a request.

    Attributes:
        name: ``base``, or the head, with its version where it has one.
        problem: Why the base answers although a head was asked for.
    """

    name: str
    generator: Generator
    problem: str | None = None

    @property
    def personal(self) -> bool:
        """Whether an adapter is at work."""
        return self.name != BASE


class Models:
    """The base, opened once, and the heads that fit it."""

    def __init__(self, base: Generator, heads: Heads, *, remembering: Remembering | None = None) -> None:
        self.remembering = remembering
        self._base = base
        self._heads = heads
        self._opened: dict[Hashable, Generator] = {}
        self.format: ChatFormat = chat_format(base.base, base.manifest)

    def names(self) -> list[str]:
        """What may be asked for now."""
        try:
            return [*self._heads.listed(), BASE]
        except StoreError:
            return [BASE]

    def choose(self, name: str) -> Chosen | None:
        """What answers under a name; None where there is no such model.

        Guarantee:
            What calls itself a head is that head, checked; what failed its checks is the base and says so.
        """
        if name == BASE:
            return Chosen(BASE, self._base)
        if not _PERSONAL.fullmatch(name):
            return None
        try:
            listed = self._heads.listed()
            self._opened = {version: head for version, head in self._opened.items() if version in listed.values()}
            if name not in listed:
                return None
            opened = self._open(name, listed[name])
        except StoreError as error:
            return Chosen(BASE, self._base, str(error))
        if opened.problem is not None:
            return Chosen(BASE, self._base, opened.problem)
        return Chosen(_full_name(name, listed), opened.model)

    def _open(self, name: str, version: Hashable) -> Opened[Generator]:
        known = self._opened.get(version)
        if known is not None and self._heads.valid(known):
            return Opened(known, None)
        opened = self._heads.open(name, self._base)
        if opened.problem is None:
            self._opened[version] = opened.model
        return opened


def _full_name(name: str, listed: Mapping[str, Hashable]) -> str:
    """The name with the version that is current, where there are versions."""
    version = listed[name]
    return f"{PERSONAL}@{version.number}" if isinstance(version, _Version) else name


@dataclass(frozen=True)
class _Version:
    """What decides what is opened: a version, whether it is asked for as the current one, and the newest ever used."""

    number: int
    created: str
    current: bool
    highest: int


class HomeHeads:
    """The private heads of a home: ``personal``, the current one, and every kept version as ``personal@N``."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def listed(self) -> dict[str, _Version]:
        """The current one first, then the newest first."""
        if not (self._home.folder / "vault" / KEY_FILE).exists():
            return {}
        shelf, highest = self._home.heads(), highest_sequence(self._home.keystore)
        created = {version.number: version.created for version in shelf.versions()}
        current = shelf.current()
        found = {} if current is None else {PERSONAL: _Version(current, created[current], True, highest)}
        for number in sorted(created, reverse=True):
            found[f"{PERSONAL}@{number}"] = _Version(number, created[number], False, highest)
        return found

    def open(self, name: str, base: Generator) -> Opened[Generator]:
        """As ``open_personal`` does."""
        number = name.partition("@")[2]
        return open_personal(self._home, base.base, version=int(number) if number else None)

    def valid(self, head: Generator) -> bool:
        """Whether it has not expired."""
        return self._home.clock() < datetime.fromisoformat(head.manifest["expires"])


class FolderHead:
    """One head in plain, as a simulation writes it: ``personal``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def listed(self) -> dict[str, str]:
        """The head, known by its manifest."""
        try:
            return {PERSONAL: hashlib.sha256((self._folder / MANIFEST).read_bytes()).hexdigest()}
        except FileNotFoundError:
            return {}

    def open(self, name: str, base: Generator) -> Opened[Generator]:
        """As ``open_generator`` does, which checks no signature: a simulation's heads have none."""
        del name
        try:
            return Opened(open_generator(self._folder, base=base.base), None)
        except HeadError as error:
            return Opened(base, str(error))

    def valid(self, head: Generator) -> bool:
        """It never expires."""
        return head.user is not None


def open_models(
    source: Home | Path, base_folder: Path, *, threads: int = 1, remembering: Remembering | None = None
) -> Models:
    """Open a base and the heads to serve over it.

    Args:
        source: An owner's home, or the folder of one head.
        base_folder: The fleet's language model; for a home it must be signed by an operator the owner consented to.
        threads: Of the matrix products.
        remembering: What stands before the last message of a user, whichever model answers.

    Raises:
        HeadError: The base cannot be used; a head that cannot is said when it is asked for.
        LedgerError: The home's ledger, which knows whom to trust, cannot be used.
    """
    signers = trusted_operators(source) if isinstance(source, Home) else None
    base = open_lm_base(base_folder, threads=threads, signers=signers)
    manifest = read_manifest(base_folder, "lm-base", signers=signers)
    if manifest.get("id") != base.id:
        raise HeadError(f"{base_folder} must not change while it is opened, but did; try again.")
    heads = HomeHeads(source) if isinstance(source, Home) else FolderHead(source)
    return Models(Generator(None, base, {}, manifest), heads, remembering=remembering)
