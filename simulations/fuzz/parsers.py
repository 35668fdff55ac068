"""What a parser is to a fuzzer: who wrote what it reads, valid inputs, how it is called, and how it may refuse.

The promise of every parser of this project: whatever bytes come, there is a valid value, or one of its own refusals
with words for a person, within bounded time and memory; never another exception.
"""

import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import SottovoceError
from simulations.fuzz.mutations import TOKENS, Edit, Form, mutate

MAX_SECONDS = 5.0  # of a processor, for one input
_MOST_DEEP = 100  # levels of a description
MAX_WORDS = 4000  # of a message for a person


@dataclass(frozen=True)
class Parser:
    """One parser, ready to be called.

    Attributes:
        seeds: Valid inputs; each must be taken.
        read: Takes an input apart; what it gives back is not looked at, but see ``written``.
        written: The bytes of what was read, where there is one spelling only: they must be the input's.
    """

    seeds: Sequence[bytes]
    read: Callable[[bytes], Any]
    written: Callable[[Any], bytes] | None = None


@dataclass(frozen=True)
class Target:
    """A parser by name.

    Attributes:
        source: Who wrote what it reads: ``device``, ``server``, ``operator``, ``owner``, ``disk`` (own files, altered)
            or ``anybody``.
        form: How its inputs are made up.
        open: Makes it ready, with an empty folder of its own.
        refusals: What it may raise.
    """

    source: str
    form: Form
    open: Callable[[Path], Parser]
    refusals: tuple[type[Exception], ...] = (SottovoceError,)


@dataclass(frozen=True)
class Outcome:
    """What became of one input.

    Attributes:
        refused: Name of the refusal; None where it was taken.
        problem: What must not happen and did; None where all is well.
        seconds: Of a processor.
    """

    refused: str | None
    problem: str | None
    seconds: float


def attempt(target: Target, parser: Parser, content: bytes) -> Outcome:
    """Give a parser one input.

    Args:
        target: What it may do.
        parser: Of the target.
        content: Of any kind.

    Returns:
        Taken, refused, or a problem: another exception, more than ``MAX_SECONDS``, another spelling that was taken, or
        words that would not be one short printable line.
    """
    began = time.process_time()  # not what other programs took of the processor
    refused = problem = None
    try:
        value = parser.read(content)
        if parser.written is not None and parser.written(value) != content:
            problem = "another spelling was taken"
    except target.refusals as error:
        refused = _code(error)
        problem = _bad_words(error)
    except Exception as error:  # what is looked for
        problem = f"{type(error).__module__}.{type(error).__qualname__}: {str(error)[:200]!r} {_where(error)}"
    seconds = time.process_time() - began
    if problem is None and not seconds <= MAX_SECONDS:
        problem = f"it took more than {MAX_SECONDS:g} s"
    return Outcome(refused, problem, seconds)


def make_input(parser: Parser, form: Form, *, seed: int, edits: Sequence[Edit]) -> bytes:
    """A valid input with edits, or no valid one at all: now and then bytes out of the blue.

    Args:
        parser: Whose.
        form: Of its inputs.
        seed: Which of the valid inputs; a seed beyond them is a row of tokens.
        edits: What is changed.
    """
    if seed % 64 == 63:
        return b"".join(TOKENS[(edit.how + edit.what) % len(TOKENS)] for edit in edits)
    return mutate(parser.seeds[seed % len(parser.seeds)], form, edits)


def draw_seed(draw: random.Random) -> int:
    """Which valid input to begin with."""
    return draw.randint(0, 2**16 - 1)


def _code(error: Exception) -> str:
    code = getattr(error, "code", None)
    return f"{type(error).__name__} {code}" if isinstance(code, str) else type(error).__name__


def _bad_words(error: Exception) -> str | None:
    """What a terminal would make of a message that quotes what somebody else wrote."""
    words = str(error)
    if not isinstance(error, SottovoceError):
        return None
    if len(words) > MAX_WORDS:
        return f"a message of {len(words)} characters: {words[:100]!r}"
    if not words.isprintable():
        odd = next(i for i, letter in enumerate(words) if not letter.isprintable())
        return f"a message with {words[odd]!r}: {words[max(0, odd - 60) : odd + 20]!r}"
    return None


def _where(error: BaseException) -> str:
    """File and line of ours that is nearest to where it happened."""
    found, step = "", error.__traceback__
    while step is not None:
        name = Path(step.tb_frame.f_code.co_filename)
        if name.parent.name != "fuzz" and any(part in _ROOMS for part in name.parts[-4:-1]):
            found = f"at {name.parent.name}/{name.name}:{step.tb_lineno}"
        step = step.tb_next
    return found


_ROOMS = ("client", "server", "shared", "simulations", "sottovoce", "datasets")


class TurnedAwayError(Exception):
    """What an answer says instead of an error, such as a status of HTTP; ``code`` is what it says."""

    def __init__(self, status: object) -> None:
        super().__init__(str(status))
        self.code = str(status)


def of_json(read: Callable[[Any], Any]) -> Callable[[bytes], Any]:
    """A parser of what JSON stands for, such as a message; what an edit made of it that is no JSON is turned away."""

    def call(content: bytes) -> Any:
        try:
            said = json.loads(content)
        except (ValueError, RecursionError):
            said = None
        if said is None or _deeper(said, _MOST_DEEP):  # no deeper than it can be written out again
            raise TurnedAwayError("no description")
        return read(said)

    return call


def _deeper(said: Any, depth: int) -> bool:
    """Whether something lies below so many levels."""
    level = [said]
    for _ in range(depth):
        parts = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [each for part in parts for each in part]
    return bool(level)


def authentic(parser: Parser, *, value: Callable[[Any], Any] = lambda found: found) -> Parser:
    """A parser of what is signed, sealed or chained: whatever it takes must mean what the valid input does.

    Args:
        parser: With one valid input.
        value: What must be the same of what it reads.
    """
    [valid] = parser.seeds
    wanted = value(parser.read(valid))

    def read(content: bytes) -> Any:
        found = parser.read(content)
        if value(found) != wanted:
            raise AssertionError("something else than what was written was believed")
        return found

    return Parser(parser.seeds, read)


def file_parser(
    folder: Path,
    name: str,
    seeds: Sequence[bytes],
    read: Callable[[Path], Any],
    *,
    others: Mapping[str, bytes] | None = None,
) -> Parser:
    """A parser of one file in a folder, which is written anew for every input.

    Args:
        folder: Of the parser.
        name: Of the file.
        seeds: Its valid contents.
        read: Given the file.
        others: Files beside it.
    """
    for other, content in (others or {}).items():
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        (folder / other).write_bytes(content)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)

    def call(content: bytes) -> Any:
        path.write_bytes(content)
        return read(path)

    return Parser(seeds, call)
