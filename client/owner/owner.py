"""What an owner may do with a home: begin, add records, consent, look, pause, roll back. Functions that return data.

Words and parsers are in client/commands/owner.py, deletion is in client/owner/forget.py. Nothing here returns or logs
a record's text. Needs no more than the base install; consent, which certifies a campaign, is in consent.py.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.home.home import Clock, Home, create_home, now
from client.home.sealed_heads import HeadShelf
from client.home.sources import Source, describe_source, remove_source, set_source
from client.home.store import RecordStore
from client.ledger.events import DamagedError, femto_delta, nano_epsilon
from client.ledger.ledger import Event, Ledger, Standing, Totals
from client.ledger.log import file_errors
from client.ledger.schema import is_unused
from client.vault.keystore import ANCHOR, CHOICE, LEDGER_KEY, file_keystore, open_keystore
from client.vault.private_files import disk_errors, temporary_of
from client.vault.vault import KEY_FILE, Vault, create_vault
from shared.datasets.records import Record
from shared.errors import CampaignError, LedgerError, RefusedError, SottovoceError, StoreError
from shared.protocol.signing import policy_sha256

RECOVER = (
    "Nothing is trained or sent until the owner has run: sottovoce client recover (it forgets nothing that was spent)"
)
RECEIPTS, BEGUN = "receipts", "begun.json"  # of client/owner/forget.py: a folder; the note of a deletion not yet ended
_MIN_PREFIX = 4


@contextlib.contextmanager
def alone(home: Home) -> Iterator[None]:
    """Hold the home's lock.

    Raises:
        StoreError: A round, or another command, holds it.
    """
    try:
        with home.lock():
            yield
    except RefusedError as refusal:
        if refusal.code != "BUSY":
            raise
        raise StoreError(
            f"{home.folder} must be at rest, a round or another command is at work in it; try again in a moment. "
            "Nothing was changed."
        ) from None


def begin(folder: Path, *, keystore: str, cap_epsilon: float, cap_delta: float, clock: Clock = now) -> Home:
    """Make a home; see ``create_home``. One that was cut while it was made is finished.

    Raises:
        StoreError: The folder holds a home or anything else, or the keystore does not work.
        LedgerError: A cap is impossible, or the keystore remembers a ledger of this home.
    """
    check_cap_values(cap_epsilon, cap_delta)
    folder = folder.absolute()
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"--home must name a folder, {folder} is none; name another.")
    if folder.is_dir() and not _unfinished(folder):
        if not (folder / CHOICE).exists():
            raise StoreError(f"--home must name a new or an empty folder, {folder} holds other files; name another.")
        raise StoreError(f"{folder} must not hold a home yet, but does; use it, or name another folder with --home.")
    (folder / CHOICE).unlink(missing_ok=True)
    try:
        with disk_errors(folder):
            return create_home(folder, keystore=keystore, cap_epsilon=cap_epsilon, cap_delta=cap_delta, clock=clock)
    except SottovoceError:
        if not _remembers(folder):
            (folder / CHOICE).unlink(missing_ok=True)
        raise


def check_cap_values(cap_epsilon: float, cap_delta: float) -> None:
    """Raise ``LedgerError`` unless campaigns of some use fit under the caps."""
    if not (cap_epsilon > 0 and nano_epsilon(cap_epsilon, up=False) > 0):
        raise LedgerError(f"--cap-epsilon must be above 0, got {cap_epsilon}; 16 is the default.")
    if not (0 < cap_delta < 1 and femto_delta(cap_delta, up=False) > 0):
        raise LedgerError(f"--cap-delta must be above 0 and below 1, got {cap_delta}; 1e-4 is the default.")


_OF_A_CUT_INIT = re.compile(r"(\.?keystore\.json|keys|\.?ledger\.db)(\..+|-(wal|shm|journal))?")


def _unfinished(folder: Path) -> bool:
    """Whether the folder is empty, or a crash or a full disk cut the making of a home before it could keep anything."""
    ledger = folder / "ledger.db"
    if not all(_OF_A_CUT_INIT.fullmatch(path.name) for path in folder.iterdir()):
        return False
    with file_errors(ledger):
        if ledger.exists() and not is_unused(ledger):
            return False
    keystore = open_keystore(folder) if (folder / CHOICE).exists() else file_keystore(folder)
    return keystore.read(ANCHOR) is None


def _remembers(folder: Path) -> bool:
    """Whether the keystore knows a ledger of this home, which ``recover`` then needs."""
    try:
        return open_keystore(folder).read(ANCHOR) is not None
    except StoreError:
        return False


@dataclass(frozen=True)
class Added:
    """What ``add`` did: records stored, records left out because the home holds them, records held now."""

    added: int
    known: int
    total: int


def add(home: Home, records: Sequence[Record]) -> Added:
    """Put records into the encrypted store, all of them or none; after ``forget`` a new vault is made for them.

    A record is the unit that is hidden, so an equal one is stored once however often it is added.

    Raises:
        DataError, StoreError: A record or the store cannot be used; nothing is changed.
    """
    vault = _vault(home)
    store = RecordStore(vault)
    with vault.lock():
        kept = store.read()
        known = set(kept)
        fresh = list(dict.fromkeys(record for record in records if record not in known))
        store.add(fresh)
    return Added(len(fresh), len(records) - len(fresh), len(kept) + len(fresh))


def choose_source(home: Home, source: Source) -> None:
    """Make a folder the home's data source, in place of an earlier one; after ``forget`` a new vault is made.

    Raises:
        DataError, StoreError: Folder or home cannot be used so, or a round is at work; nothing is changed.
    """
    source.read()  # a folder that cannot be read makes no vault
    _vault(home)
    with alone(home):
        set_source(home, source)


def drop_source(home: Home) -> bool:
    """Use the home's folder no more; whether it had one.

    Raises:
        StoreError: A round is at work.
    """
    with alone(home):
        return remove_source(home)


def _vault(home: Home) -> Vault:
    folder = home.folder / "vault"
    if not (folder / KEY_FILE).exists():
        with alone(home):
            if not (folder / KEY_FILE).exists():
                return create_vault(folder, home.keystore)
    return home.vault()


def withdraw(home: Home, prefix: str) -> Standing:
    """Withdraw the consent to the one campaign whose policy begins with a prefix.

    Raises:
        LedgerError: None does, or several do, or the ledger cannot be used.
    """
    with checked_ledger(home) as ledger:
        standing = find_consent(ledger.consents(), prefix)
        ledger.withdraw(standing.consent.policy)
        return find_consent(ledger.consents(), standing.consent.policy)


def find_consent(standings: Sequence[Standing], prefix: str) -> Standing:
    """The one consent whose policy begins with the prefix; ``LedgerError`` where there is not exactly one."""
    found = [standing for standing in standings if standing.consent.policy.startswith(prefix.lower())]
    if len(prefix) < _MIN_PREFIX or len(found) != 1:
        known = ", ".join(standing.consent.policy[:12] for standing in standings) or "none"
        raise LedgerError(
            f"a policy must be named by the first {_MIN_PREFIX} or more digits of one you consented to ({known}), "
            f"got {prefix!r}."
        )
    return found[0]


def set_paused(home: Home, paused: bool) -> None:
    """Pause, or end a pause."""
    with checked_ledger(home) as ledger:
        if paused:
            ledger.pause()
        else:
            ledger.resume()


def status(home: Home) -> dict[str, Any]:
    """Everything an owner may want to know of a home; JSON, without any text of a record.

    Raises:
        LedgerError: The ledger cannot be used; the message says what the owner can do.
    """
    with checked_ledger(home) as ledger:
        totals, standings = ledger.totals(), ledger.consents()
    store = home.keystore
    return {
        "home": str(home.folder),
        "keys": {"where": store.name, "weak": store.weak, "rollback_detectable": store.detects_rollback},
        "paused": totals.paused,
        "epsilon": {"reserved": totals.epsilon, "cap": totals.cap_epsilon, "left": totals.left_epsilon},
        "delta": {"reserved": totals.delta, "cap": totals.cap_delta, "left": totals.left_delta},
        "campaigns": [_describe_standing(standing) | _promise(home, standing) for standing in standings],
        "data": _describe_data(home),
        "source": describe_source(home),
        "forget_was_cut": (home.folder / RECEIPTS / BEGUN).exists(),
    }


def _describe_standing(standing: Standing) -> dict[str, Any]:
    consent = standing.consent
    return {
        "campaign": consent.campaign,
        "policy": consent.policy,
        "operator": consent.operator,
        "state": standing.state,
        "consented": consent.at,
        "until": consent.until.isoformat(),
        "epsilon": consent.epsilon,
        "delta": consent.delta,
        "rounds_allowed": consent.max_participations,
        "rounds_used": standing.spent,
        "rounds_sent": standing.released,
        "rounds_burnt": standing.burnt,
        "rounds_pending": standing.pending,
        "rounds_lost": standing.lost,
    }


def _promise(home: Home, standing: Standing) -> dict[str, str | None]:
    """Unit and trust of a campaign, from the home's copy; None each where that is gone or not what was agreed to."""
    policy, folder = standing.consent.policy, home.campaign_folder(standing.consent.policy)
    try:
        found = json.loads((folder / "policy.json").read_bytes()) if policy_sha256(folder) == policy else {}
    except (CampaignError, OSError, ValueError):
        found = {}
    return {"unit": found.get("unit"), "trust": found.get("trust")}


def _describe_data(home: Home) -> dict[str, Any]:
    """How many records and heads there are; ``problem`` where they cannot be read."""
    vault = home.folder / "vault"
    empty: dict[str, Any] = {"records": 0, "heads": [], "current_head": None, "problem": None}
    if not any(path.is_file() and path != temporary_of(vault / KEY_FILE) for path in vault.rglob("*")):
        return empty
    try:
        shelf = home.heads()
        heads = [version.model_dump() for version in shelf.versions()]
        return empty | {"records": len(home.records().read()), "heads": heads, "current_head": shelf.current()}
    except StoreError as error:
        return empty | {"records": None, "problem": str(error)}


def history(home: Home) -> list[dict[str, Any]]:
    """Every event of the ledger, oldest first: what was consented to, spent and sent, paused, forgotten.

    Raises:
        LedgerError: As ``status``.
    """
    with checked_ledger(home) as ledger:
        names = {standing.consent.policy: standing.consent.campaign for standing in ledger.consents()}
        return [_describe_event(event, names.get(event.policy or "")) for event in ledger.history()]


def _describe_event(event: Event, campaign: str | None) -> dict[str, Any]:
    said = {"at": event.at, "event": event.kind}
    about = {"campaign": campaign, "policy": event.policy, "round": event.round_number}
    return said | {name: value for name, value in about.items() if value is not None} | dict(event.detail)


def private_heads(home: Home) -> HeadShelf:
    """The shelf of a home that has a private head.

    Raises:
        StoreError: It has none, or the vault cannot be read.
    """
    shelf = home.heads() if (home.folder / "vault").exists() else None
    if shelf is None or shelf.current() is None:
        raise StoreError(f"{home.folder} must hold a private head, it has none; run: sottovoce client personalize.")
    return shelf


def roll_back(home: Home, to: int | None) -> tuple[int | None, int]:
    """Go back to an earlier private head; the numbers of the versions current before and after.

    Raises:
        StoreError, HeadError: There is no such version, or it is not one that this home signed.
    """
    from client.owner.verify import reactivate  # loads onnxruntime, which no other of these needs

    before = private_heads(home).current()
    return before, reactivate(home, to)


@dataclass(frozen=True)
class Recovered:
    """A ledger that can be used again, and what is wrong with the data, if anything."""

    totals: Totals
    ended: tuple[Standing, ...]
    data_problem: str | None


def recover(home: Home, *, cap_epsilon: float, cap_delta: float) -> Recovered:
    """Go on after a roll-back or the loss of the ledger; see ``Home.recover``.

    Raises:
        LedgerError: Nothing is wrong, or nobody knows what was spent.
        StoreError: A round is at work.
    """
    check_cap_values(cap_epsilon, cap_delta)
    with alone(home), home.recover(cap_epsilon=cap_epsilon, cap_delta=cap_delta) as ledger:
        ended = tuple(standing for standing in ledger.consents() if standing.state == "ended")
        return Recovered(ledger.totals(), ended, _describe_data(home)["problem"])


def checked_ledger(home: Home) -> Ledger:
    """The home's ledger; where only ``recover`` helps, the error says so.

    Raises:
        LedgerError: It cannot be used.
    """
    try:
        return home.ledger()
    except LedgerError as error:
        if not _recovery_helps(home, error):
            raise
        raise LedgerError(f"{error} {RECOVER}.", code=error.code) from error


def _recovery_helps(home: Home, error: LedgerError) -> bool:
    """Whether the ledger is gone, damaged or rolled back, as opposed to busy, and the keystore knows what was spent."""
    try:
        known, key = (home.keystore.read(entry) is not None for entry in (ANCHOR, LEDGER_KEY))
    except StoreError:
        return False
    gone = not (home.folder / "ledger.db").exists() or not key
    return known and (gone or error.code == "ROLLBACK" or isinstance(error, DamagedError))
