"""A home's model, verified before it answers: the operator's base, and on it the owner's private head.

In this order: the operator's key as the ledger remembers it, signature of the base's manifest, its files; then, for the
head, the home's own signature, that it was made for this base, that no newer one was in use before, its expiry, its
file, slots and values, and the known answer on this very device. A bad base answers nothing. A bad head leaves the bare
base, bit for bit, and says why.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar, overload

from client.home.home import Clock, Home
from client.home.sealed_heads import HeadShelf
from client.owner.owner import checked_ledger
from client.runtime.artifact import (
    MANIFEST,
    SIGNATURE,
    Files,
    check_binding,
    damaged,
    manifest_bytes,
    place_of,
    read_manifest,
    sign_manifest,
)
from client.runtime.generation import Generator, open_generator
from client.runtime.language import LanguageBase, open_lm_base
from client.runtime.runtime import FleetBase, PersonalHead, identity, open_base, open_head
from client.vault.keystore import Keystore
from client.vault.vault import signing_key
from shared.errors import HeadError, LedgerError, SottovoceError, StoreError
from shared.protocol.signing import fingerprint

SEQUENCE = "head-sequence"  # the keystore's entry with the highest sequence of a head that was ever in use

Model = TypeVar("Model", PersonalHead, Generator)

_OPENERS: dict[str, Callable[..., Any]] = {"base": open_base, "lm-base": open_lm_base}
_HEADS = {"base": "adapter", "lm-base": "lm-adapter"}


@dataclass(frozen=True)
class Opened(Generic[Model]):
    """What answers in a home.

    Attributes:
        model: The personal one, or the bare base where that was refused.
        problem: Why the personal one was refused; None where it was not.
    """

    model: Model
    problem: str | None


@overload
def open_home_base(
    home: Home, folder: Path, *, kind: Literal["base"], threads: int = 1, operators: Collection[str] | None = None
) -> FleetBase: ...
@overload
def open_home_base(
    home: Home, folder: Path, *, kind: Literal["lm-base"], threads: int = 1, operators: Collection[str] | None = None
) -> LanguageBase: ...
def open_home_base(
    home: Home, folder: Path, *, kind: str, threads: int = 1, operators: Collection[str] | None = None
) -> Any:
    """Open a fleet's base that an operator signed whom the owner trusted at a consent.

    Where the ledger, which remembers those, cannot be used or was lost, nothing is trained, and what was learnt answers
    all the same: on the very base that the home's own signature of its head names.

    Args:
        home: Its ledger keeps the operators' fingerprints.
        folder: Of the base.
        kind: ``base``, or ``lm-base`` for a language model.
        threads: For the matrix products.
        operators: Fingerprints that are trusted instead of those in the ledger.

    Raises:
        HeadError: The base is not signed by such an operator, damaged, or cannot run here.
        LedgerError: The ledger, which knows whom to trust, cannot be used.
    """
    problem: LedgerError | None = None
    if operators is None:
        try:
            operators = trusted_operators(home)
        except LedgerError as error:
            problem = error
    if operators:
        return _OPENERS[kind](folder, threads=threads, signers=operators)
    try:
        head = _files(home, None)
        manifest = read_manifest(head, _HEADS[kind], signers=_own(home))
    except (HeadError, StoreError):
        if problem is not None:
            raise problem from None
        return _OPENERS[kind](folder, threads=threads, signers=frozenset())
    base = _OPENERS[kind](folder, threads=threads)
    check_binding(place_of(head), manifest, identity(base))
    return base


def trusted_operators(home: Home) -> frozenset[str]:
    """Fingerprints of the operators of all campaigns the owner ever agreed to."""
    with checked_ledger(home) as ledger:
        return frozenset(standing.consent.operator for standing in ledger.consents())


@overload
def open_personal(
    home: Home, base: FleetBase, *, version: int | None = None, clock: Clock | None = None
) -> Opened[PersonalHead]: ...
@overload
def open_personal(
    home: Home, base: LanguageBase, *, version: int | None = None, clock: Clock | None = None
) -> Opened[Generator]: ...
def open_personal(
    home: Home, base: FleetBase | LanguageBase, *, version: int | None = None, clock: Clock | None = None
) -> Any:
    """The home's private head on an opened base, or that base alone with the reason.

    Args:
        home: Whose head.
        base: As ``open_home_base`` opened it; many heads, and many calls of this, can share it.
        version: An older one that the owner asks for by its number; by default the current one, which must be the
            newest that was ever in use.
        clock: For the expiry; by default the home's.

    Guarantee:
        Where ``problem`` is not None, the model's answers are bit for bit those of the bare base.
    """
    now = (clock or home.clock)()
    try:
        return Opened(_open_head(home, base, version, now), None)
    except SottovoceError as error:
        bare: PersonalHead | Generator
        bare = PersonalHead(None, base, {}, {}) if isinstance(base, FleetBase) else Generator(None, base, {}, {})
        return Opened(bare, str(error))


def check_had_head(home: Home) -> None:
    """Raise StoreError where a home never had a private head."""
    if highest_sequence(home.keystore) == 0:
        raise StoreError(f"{home.folder} must hold a private head, it has none; run: sottovoce client personalize.")


def keep_head(home: Home, files: Mapping[str, bytes], about: Mapping[str, str]) -> int:
    """Sign a head and make it the home's current version.

    Args:
        home: Whose head.
        files: As ``build_head`` or ``build_lm_head`` makes them, with the sequence that ``next_sequence`` gave.
        about: For ``HeadShelf.add``.

    Returns:
        The number of the version.

    Raises:
        StoreError: Another head was made meanwhile, or the home cannot be written.
    """
    vault = home.vault()
    with vault.lock():
        sequence = _sequence_of(read_manifest(files, "adapter", "lm-adapter"))
        if not sequence > highest_sequence(home.keystore):
            raise StoreError("a private head must be newer than all before it, another was made meanwhile; try again.")
        version = HeadShelf(vault).add(_signed(home, files), about)
        home.keystore.write(SEQUENCE, str(sequence).encode())
    return version


def next_sequence(home: Home) -> int:
    """The sequence of the next head that is made, or made current again, in a home."""
    return highest_sequence(home.keystore) + 1


def reactivate(home: Home, to: int | None) -> int:
    """Go back to an earlier version, as the owner wants: it is signed anew, under a new sequence.

    Returns:
        The number of the version that is now current.

    Raises:
        StoreError, HeadError: There is no such version, or it is not one that this home signed.
    """
    sequence = next_sequence(home)

    def renew(files: Mapping[str, bytes]) -> dict[str, bytes]:
        manifest = read_manifest(files, "adapter", "lm-adapter", signers=_own(home))
        return _signed(home, {**files, MANIFEST: manifest_bytes(manifest | {"sequence": sequence})})

    version = home.heads().roll_back(to, renew=renew)
    home.keystore.write(SEQUENCE, str(sequence).encode())
    return version


def highest_sequence(keystore: Keystore) -> int:
    """The highest sequence of a head that was ever in use in a home; 0 before the first.

    Raises:
        StoreError: The keystore's entry is not as this module writes it.
    """
    found = keystore.read(SEQUENCE)
    if found is None:
        return 0
    if not found.isdigit() or not 0 < int(found) < 2**63:
        raise StoreError(f"the keystore's entry {SEQUENCE} must be a number; restore it, or fit a new head.")
    return int(found)


def _open_head(
    home: Home, base: FleetBase | LanguageBase, version: int | None, now: datetime
) -> PersonalHead | Generator:
    own, files = _own(home), _files(home, version)
    kind = "adapter" if isinstance(base, FleetBase) else "lm-adapter"
    manifest = read_manifest(files, kind, signers=own)
    place = place_of(files)
    check_binding(place, manifest, identity(base))
    highest, sequence = highest_sequence(home.keystore), _sequence_of(manifest)
    if version is None and not sequence >= highest:
        raise HeadError(
            f"a private head must not be older than the newest that was in use ({highest}), got {sequence}: an old one "
            "was put back. To go back to it yourself run: sottovoce client rollback."
        )
    _check_expiry(place, manifest, now)
    opened: PersonalHead | Generator
    if isinstance(base, FleetBase):
        opened = open_head(files, base=base, signers=own)
    else:
        opened = open_generator(files, base=base, signers=own)
    if version is None and sequence > highest:  # a crash came between keeping the head and noting its sequence
        home.keystore.write(SEQUENCE, str(sequence).encode())
    return opened


def _files(home: Home, version: int | None) -> Files:
    shelf = home.heads()
    if version is None and shelf.current() is None:
        raise StoreError("this home has no private head; run: sottovoce client personalize.")
    return shelf.read(version)


def _check_expiry(place: Path, manifest: Mapping[str, Any], now: datetime) -> None:
    try:
        expires = datetime.fromisoformat(manifest["expires"])
        current = now < expires
    except (KeyError, TypeError, ValueError):
        raise damaged(place / MANIFEST, "it must say when it expires, with its time zone") from None
    if not current:
        raise HeadError(f"a private head must not have expired, this one did on {expires.date()}; personalize again.")


def _sequence_of(manifest: Mapping[str, Any]) -> int:
    sequence = manifest.get("sequence")
    if type(sequence) is not int or not 0 < sequence < 2**63:
        raise HeadError(f"a home's private head must have a sequence above 0, got {sequence!r}; personalize again.")
    return sequence


def _signed(home: Home, files: Mapping[str, bytes]) -> dict[str, bytes]:
    return {**files, SIGNATURE: sign_manifest(files[MANIFEST], signing_key(home.keystore))}


def _own(home: Home) -> frozenset[str]:
    return frozenset([fingerprint(signing_key(home.keystore).public_key())])
