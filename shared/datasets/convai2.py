"""ConvAI2 (PersonaChat) as ParlAI publishes it: what a persona answers in a chat; each persona is a user."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from shared.errors import DataError

from .records import Dataset, Record, UserData, split_by_time

PATTERN = "*_self_original*.txt"
OWN, PARTNERS = "your persona:", "partner's persona:"
PERSONA = "persona"  # the attribute of a profile that holds the lines
MAX_COLUMNS = 4  # utterance, reply, an empty one, candidates
_MEND = "Compare the file with the published one, or get it again."


@dataclass(frozen=True)
class Exchange:
    """What the partner said, the persona's reply, and the candidates it stands among, parted by a bar."""

    line: int
    said: str
    reply: str
    candidates: str


@dataclass(frozen=True)
class Dialogue:
    """One conversation of one persona."""

    persona: frozenset[str]
    exchanges: list[Exchange]


def read_convai2(folder: Path) -> Dataset:
    """Read dialogues as records: what the partner said is the text, the persona's reply is the response.

    A record is one line of the file. Earlier utterances are left away: shown again as context, an utterance would be in
    several records, and what one record hides would no longer be one exchange.

    Args:
        folder: Holds one file ``*_self_original*.txt``, such as ``valid_self_original_no_cands.txt``.

    Returns:
        Personas by id, the start of the hash of their sorted lines, however many dialogues each has; each is split in
        the order of the file. A record's time is its line, its item the numbers of dialogue and turn. A persona's
        lines, sorted, are the attribute ``persona`` of its profile. Test records have the file's candidates, where it
        has any. There are no public texts and no targets; the partner's persona is not read.

    Raises:
        DataError: There is no such file or more than one, or it is empty or holds a line that is not as published,
            which is named but not quoted.

    Guarantee:
        An utterance is in one record.

    Source:
        Dinan et al. 2019, The Second Conversational Intelligence Challenge, arXiv:1902.00098, and the dialogue
        format of ParlAI.
    """
    path = _find_file(folder)
    rows: dict[str, list[Record]] = {}
    personas: dict[str, str] = {}
    candidates: dict[int, str] = {}  # line -> those of its exchange
    for number, dialogue in enumerate(_dialogues(path), start=1):
        user = _user_id(dialogue.persona)
        rows.setdefault(user, []).extend(_records(number, dialogue.exchanges))
        personas[user] = " ".join(sorted(dialogue.persona))
        candidates |= {each.line: each.candidates for each in dialogue.exchanges if each.candidates}
    if not any(rows.values()):
        raise DataError(f"{path} must hold at least one exchange, got none. {_MEND}")
    return Dataset("convai2", tuple(_user(user, rows[user], personas[user], candidates) for user in sorted(rows)), ())


def _user(user: str, rows: list[Record], persona: str, candidates: dict[int, str]) -> UserData:
    fit, validation, test = split_by_time(rows)
    told = tuple(replace(row, candidates=_candidates(row, candidates.get(row.timestamp, ""))) for row in test)
    return UserData(user, fit, validation, told, {PERSONA: persona})


def _candidates(row: Record, column: str) -> tuple[str, ...]:
    """Distinct, the reply first; none where the file has none."""
    found = dict.fromkeys([row.response, *(text.strip() for text in column.split("|"))])
    return tuple(text for text in found if text) if column else ()


def _find_file(folder: Path) -> Path:
    found = sorted(path.name for path in folder.glob(PATTERN))
    if len(found) != 1:
        shown = ", ".join(found[:6]) + (", …" if len(found) > 6 else "")
        raise DataError(f"ConvAI2 needs one file {PATTERN} in a folder; {folder} holds {shown or 'none'}. Give it one.")
    return folder / found[0]


def _dialogues(path: Path) -> Iterator[Dialogue]:
    """Give each dialogue of a file; one ends where the numbers begin again at 1."""
    persona: set[str] = set()
    exchanges: list[Exchange] = []
    turn = 0
    for line, row in enumerate(_lines(path), start=1):
        number, _, rest = row.partition(" ")
        if number == "1" and turn:
            yield Dialogue(frozenset(persona), exchanges)
            persona, exchanges, turn = set(), [], 0
        turn += 1
        try:
            if number != str(turn):
                raise ValueError(f"must begin with {turn} or 1 and a blank, as dialogues are numbered")
            if rest.startswith((OWN, PARTNERS)) and "\t" not in rest:
                _add_persona_line(persona, exchanges, rest)
            else:
                exchanges.append(_exchange(line, rest, persona))
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}. {_MEND}") from None
    yield Dialogue(frozenset(persona), exchanges)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: must be utf-8, got other bytes. {_MEND}") from None
    except OSError as error:
        raise DataError(f"{path} must be readable, got: {error.strerror}; check its permissions.") from error
    if not text.strip():
        raise DataError(f"{path} must hold at least one exchange, got an empty file. {_MEND}")
    # Not splitlines(): it would also split at characters that utterances may hold.
    return [row.removesuffix("\r") for row in text.rstrip("\r\n").split("\n")]


def _add_persona_line(persona: set[str], exchanges: list[Exchange], rest: str) -> None:
    if exchanges:
        raise ValueError("a persona line must stand before the dialogue's first exchange, got one after it")
    if rest.startswith(OWN):
        persona.add(_not_empty("a persona line", rest.removeprefix(OWN)))


def _exchange(line: int, rest: str, persona: set[str]) -> Exchange:
    said, *others = rest.split("\t")
    if not 1 <= len(others) < MAX_COLUMNS:
        raise ValueError(f"an exchange must have 2 to {MAX_COLUMNS} columns parted by TAB, got {len(others) + 1}")
    if not persona:
        raise ValueError(f"a dialogue must begin with lines {OWN!r}, got an exchange")
    candidates = others[-1].strip() if len(others) == MAX_COLUMNS - 1 else ""
    return Exchange(line, _not_empty("the partner's utterance", said), _not_empty("the reply", others[0]), candidates)


def _not_empty(name: str, text: str) -> str:
    if not (text := text.strip()) or "\0" in text:
        raise ValueError(f"{name} must be a text, got {'a NUL byte' if text else 'an empty one'}")
    return text


def _records(dialogue: int, exchanges: list[Exchange]) -> Iterator[Record]:
    for turn, exchange in enumerate(exchanges, start=1):
        yield Record(exchange.said, 0.0, f"{dialogue}-{turn}", exchange.line, exchange.reply)


def _user_id(persona: frozenset[str]) -> str:
    return hashlib.sha256("\n".join(sorted(persona)).encode()).hexdigest()[:12]
