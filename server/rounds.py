"""``rounds.jsonl`` of a campaign: one line a finished round, and which of them led to the arrays of today.

After a roll-back to round 2 the next round, say 6, goes on from the arrays of 2: its line says so in ``after``, and
rounds 3 to 5 are part of the history and no longer of the line of descent.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from server.checkpoint import Checkpoint
from shared.errors import CampaignError
from shared.files import append_json_line, read_json_lines, write_atomically

_FILE, _BEGUN = "rounds.jsonl", "begun.json"


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Score(_Line):
    """What the shared arrays alone make of a hold-out.

    Attributes:
        metric: Less of it is better.
        value: None where it is not finite.
        records: How many it was taken over.
        holdout: Hash of the hold-out: only scores on the same one compare.
        others: Further metrics.
    """

    metric: str
    value: float | None
    records: int
    holdout: str
    others: Mapping[str, float | None] = {}


class Round(_Line):
    """A finished round; number 0 is the public start, before anybody was asked.

    Attributes:
        round: Its number.
        after: The round whose arrays it went on from; None for the start.
        time: When it ended, UTC.
        seconds: Since the round before, waiting included; None where a kill came between.
        asked: Devices.
        accepted: Replies used.
        rejected: Replies not used, by code.
        score: On the hold-out; None where there is none.
        go: Whether the arrays are fit to go on from; None where there is no hold-out.
        why: In words, where they are not.
    """

    round: int
    after: int | None
    time: str
    seconds: float | None
    asked: int
    accepted: int
    rejected: Mapping[str, int]
    bytes_up: int
    bytes_down: int
    score: Score | None = None
    go: bool | None = None
    why: str | None = None


def append_round(campaign_folder: Path, line: Round) -> None:
    """Add a finished round, durably.

    Raises:
        OSError: The disk is full or the file cannot be written.
    """
    append_json_line(campaign_folder / _FILE, line.model_dump(mode="json"))


def read_rounds(campaign_folder: Path) -> dict[int, Round]:
    """The finished rounds by number, in order; what a kill cut short is left out, the last line of a round counts."""
    found = {}
    for line in read_json_lines(campaign_folder / _FILE):
        with suppress(ValidationError):
            done = Round.model_validate(line)
            found[done.round] = done
    return dict(sorted(found.items()))


def descent(rounds: Mapping[int, Round], arrays_of: int) -> list[Round]:
    """The rounds that led to the arrays of a round, the oldest first; rounds without a line are stepped over."""
    line, at = [], arrays_of
    for done in sorted(rounds, reverse=True):
        if done <= at:
            line.append(rounds[done])
            after = rounds[done].after
            at = -1 if after is None else min(after, done - 1)
    return line[::-1]


def note_begun(campaign_folder: Path, round_number: int) -> None:
    """Note, durably, that devices may be asked in a round from now on; what was noted of a later one stands."""
    with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        round_number = max(round_number, int(json.loads((campaign_folder / _BEGUN).read_bytes())["round"]))
    write_atomically(campaign_folder / _BEGUN, (json.dumps({"round": round_number}) + "\n").encode())


def last_begun(campaign_folder: Path, newest: Checkpoint) -> int:
    """The last round that devices may have been asked in; where nobody noted it, the one after the newest.

    Raises:
        CampaignError: The note is damaged.
    """
    path = campaign_folder / _BEGUN
    if not path.exists():
        return newest.round_number + 1
    try:
        return max(newest.round_number, int(json.loads(path.read_bytes())["round"]))
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise CampaignError(
            f"{path} must name the last round that was begun, it is damaged; remove it: the next one counts as begun."
        ) from None
