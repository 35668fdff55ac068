"""The files behind a privacy card: read as bytes, hashed, and read again wherever a number of the card points.

A pointer is ``NAME#/a/b``: the value at a JSON pointer (RFC 6901) in the source file NAME; ``NAME#`` is all of it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NoReturn

from shared.errors import CampaignError, DataError, PrivacyError
from shared.files import flush_folder, write_durably
from shared.privacy.policy import read_policy
from shared.protocol.audits import hash_code, read_audit
from shared.protocol.campaign import Campaign, check_promise, read_campaign
from shared.protocol.signing import SIGNATURE_FILE, signed_by

Place = Literal["device", "server", "campaign", "experiment"]
POLICY, SCENARIO, MADE, LEDGER, SERVER, SUMMARY = (
    "policy.json",
    "scenario.json",
    "made.json",
    "ledger.json",
    "rounds.json",
    "summary.json",
)
CARD, PAGE, FOLDER = "privacy-card.json", "privacy-card.html", "sources"


@dataclass(frozen=True)
class Sources:
    """Source files by name, as they were read."""

    files: Mapping[str, bytes]

    @cached_property
    def _documents(self) -> dict[str, Any]:
        return {name: _parse(content, name) for name, content in self.files.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.files

    @property
    def audits(self) -> list[str]:
        """Names of the audits among them, in order."""
        return sorted(name for name in self.files if name.startswith("audit"))

    def sha256(self, name: str) -> str:
        """Hash of a file's bytes."""
        return hashlib.sha256(self.files[name]).hexdigest()

    def at(self, pointer: str) -> Any:
        """The value that a pointer names.

        Raises:
            DataError: There is none.

        Example:
            >>> Sources({"policy.json": b'{"slots": [["a", [2, 3]]]}'}).at("policy.json#/slots/0/1")
            [2, 3]
        """
        name, _, path = pointer.partition("#")
        try:
            value = self._documents[name]
            for step in path.split("/")[1:]:
                key = step.replace("~1", "/").replace("~0", "~")
                value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError):
            raise DataError(f"{pointer} must be in the sources of the card, it is not; make the card again.") from None
        return value


def campaign_files(folder: Path, *, experiment: bool = False) -> tuple[Campaign, dict[str, bytes]]:
    """A campaign whose promise holds, and the files of it that a card quotes.

    Args:
        folder: As it was published.
        experiment: Whether one that promises nothing is taken too.

    Raises:
        CampaignError, PrivacyError: It is damaged, or what it states does not hold, or its signature is not of it.
    """
    promises = not experiment or read_campaign(folder).policy.trust != "none"
    campaign = check_promise(folder) if promises else read_campaign(folder)
    signed_by(folder)
    names = [POLICY, SCENARIO] + ([SIGNATURE_FILE] if os.path.lexists(folder / SIGNATURE_FILE) else [])
    files = {name: (folder / name).read_bytes() for name in names}
    if read_policy(files[POLICY].decode()).sha256 != campaign.policy.sha256:
        raise CampaignError(f"{folder} must not change while it is read; its policy did. Make the card again.")
    return campaign, files


def gather(
    files: Mapping[str, bytes], *, place: Place, audits: Sequence[Path] = (), created: datetime | None = None
) -> Sources:
    """All sources of one card.

    Args:
        files: Of the campaign, and what is known of it at this place.
        place: Where the card is made.
        audits: Files that ``sottovoce audit`` wrote.
        created: The time; by default now.

    Raises:
        DataError: An audit is damaged; no card is made.
    """
    made = {
        "created": (created or datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds"),
        "place": place,
        "sottovoce": version("sottovoce"),
        "code_sha256": hash_code(),
    }
    found = dict(files) | {MADE: as_json(made)}
    for number, path in enumerate(dict.fromkeys(path.resolve() for path in audits), start=1):
        read_audit(path)
        found[f"audit-{number}.json"] = path.read_bytes()
    return Sources(found)


def as_json(content: object) -> bytes:
    """JSON in one form, as a file."""
    return (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()


def write_folder(out: Path, card: Mapping[str, Any], page: str, sources: Sources) -> None:
    """Write a card, its page and its sources as one folder, whole or not at all; an earlier card there is replaced.

    Raises:
        DataError: ``out`` holds anything but a card.
        OSError: The disk is full, or the place cannot be written.
    """
    out = out.absolute()
    if os.path.lexists(out) and not _is_card(out):
        raise DataError(f"--out must name a new folder or one that holds a privacy card, {out} is neither.")
    out.parent.mkdir(parents=True, exist_ok=True)
    new, old = (out.with_name(f".{out.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        (new / FOLDER).mkdir(parents=True)
        new.chmod(0o700)  # an owner's ledger is nobody else's to read until the owner says so
        for name, content in sources.files.items():
            write_durably(new / FOLDER / name, content)
        write_durably(new / CARD, as_json(card))
        write_durably(new / PAGE, page.encode())
        if out.exists():
            out.rename(old)
        new.rename(out)
        flush_folder(out.parent)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


def read_folder(folder: Path) -> tuple[Any, str, Sources]:
    """What ``write_folder`` wrote: card, page and sources.

    Raises:
        DataError: It is no such folder.
    """
    try:
        card = _parse((folder / CARD).read_bytes(), CARD)
        page = (folder / PAGE).read_text(encoding="utf-8")
        files = {path.name: path.read_bytes() for path in sorted((folder / FOLDER).iterdir())}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder} must hold a privacy card and its sources: {error}.") from None
    if SIGNATURE_FILE in files:
        _check_signature(folder / FOLDER)
    for path in sorted((folder / FOLDER).glob("audit*")):
        read_audit(path)
    return card, page, Sources(files)


def _check_signature(folder: Path) -> None:
    try:
        signed_by(folder)
    except (CampaignError, PrivacyError) as error:
        raise DataError(f"{folder} must hold the operator's signature of the policy beside it: {error}") from None


def _is_card(folder: Path) -> bool:
    """Whether a folder holds a card and nothing else, and so may be replaced."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or (CARD in names and names <= {CARD, PAGE, FOLDER})


def _parse(content: bytes, name: str) -> Any:
    try:
        return json.loads(content, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{name} must be JSON: {error}; make the card again.") from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
