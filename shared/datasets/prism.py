"""PRISM as Kirk et al. publish it: which of several models' answers a person chose, and what they said of themself."""

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from shared.errors import DataError

from .lines import at, json_rows
from .records import Dataset, Record, UserData, is_text, is_user_id, split_by_time

CONVERSATIONS, SURVEY = "conversations.jsonl", "survey.jsonl"
EMPTY = "EMPTY STRING"  # so is an empty text published
PROFILE = {  # attribute -> where the survey has it
    "age": ("age",),
    "gender": ("gender",),
    "employment": ("employment_status",),
    "education": ("education",),
    "religion": ("religion", "simplified"),
    "ethnicity": ("ethnicity", "simplified"),
    "region": ("location", "reside_region"),
}
_MAX_LINE_BYTES = 1 << 20  # a conversation of twenty turns with long answers has 200 kB


def read_prism(folder: Path) -> Dataset:
    """Read the first turn of every conversation as one comparison; a conversation is in memory at a time.

    Later turns are left away: they hold the conversation so far, and a text would be in several records (rule P7).

    Args:
        folder: Holds ``conversations.jsonl``; for profiles also ``survey.jsonl``.

    Returns:
        Users by their id, each split by time. A record's text is the opening prompt, its response the answer the user
        chose, ``rejected`` the one of lowest score among the others, its target the distance of the two scores, its
        item the conversation. ``left_out`` says how many conversations have no such two answers: the choice or a score
        is missing, an answer is empty, all are equal, or none was scored below the chosen one. There are no public
        texts.

    Raises:
        DataError: A file is missing or broken, or a line is not as published, which is named but not quoted.

    Source:
        Kirk et al. 2024, The PRISM Alignment Dataset, arXiv:2404.16019.
    """
    path = folder / CONVERSATIONS
    if not path.is_file():
        raise DataError(f"PRISM needs {CONVERSATIONS} in a folder, {folder} has none; put the published files there.")
    rows: dict[str, list[Record]] = {}
    conversations: set[str] = set()
    alike = 0
    for line, row in json_rows(path, max_bytes=_MAX_LINE_BYTES):
        try:
            user, record = _comparison(row)
            if row["conversation_id"] in conversations:
                raise ValueError("conversation_id must occur once, got one again")
        except ValueError as error:
            raise at(path, line, str(error)) from None
        conversations.add(row["conversation_id"])
        if record is None:
            alike += 1
        else:
            rows.setdefault(user, []).append(record)
    if not rows:
        raise DataError(f"{path} must hold at least one comparison, got none; compare it with the published file.")
    profiles = dict(_profiles(folder / SURVEY))
    users = tuple(UserData(user, *split_by_time(rows[user]), profiles.get(user, {})) for user in sorted(rows))
    return Dataset("prism", users, (), {"conversations without two answers to compare": alike} if alike else {})


def _comparison(row: Mapping[str, Any]) -> tuple[str, Record | None]:
    """User and first comparison of a conversation; ValueError where it is not as published."""
    user, conversation = _user(row), row.get("conversation_id")
    if not isinstance(conversation, str) or not conversation:
        raise ValueError("conversation_id must be a text, got another")
    history = row.get("conversation_history")
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError("conversation_history must be a list of objects, got something else")
    first = [entry for entry in history if entry.get("turn") == 0]
    asked = [text for entry in first if entry.get("role") == "user" if (text := _text(entry))]
    answers = [entry for entry in first if entry.get("role") == "model" and _text(entry) and _score(entry) is not None]
    chosen = [entry for entry in answers if entry.get("if_chosen") is True]
    if len(asked) != 1 or len(chosen) != 1:
        return user, None
    best, best_score = _text(chosen[0]), _score(chosen[0]) or 0.0
    others = [(score, _text(e)) for e in answers if e is not chosen[0] if (score := _score(e)) is not None]
    worst = min(others, default=(best_score, ""), key=lambda each: each[0])
    if not worst[0] < best_score or worst[1] == best:
        return user, None
    when = _seconds(row.get("generated_datetime"))
    return user, Record(asked[0], best_score - worst[0], conversation, when, best, worst[1])


def _user(row: Mapping[str, Any]) -> str:
    user = row.get("user_id")
    if not isinstance(user, str) or not is_user_id(user):
        raise ValueError("user_id must be a plain name, got another")
    return user


def _text(entry: Mapping[str, Any]) -> str:
    """Content of an entry, empty where there is none."""
    content = entry.get("content")
    if not isinstance(content, str) or not is_text(content):
        raise ValueError("content must be a text, got another")
    content = content.strip()
    return "" if content == EMPTY else content


def _score(entry: Mapping[str, Any]) -> float | None:
    score = entry.get("score")
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 100:
        raise ValueError("score must be a number from 0 to 100, got another")
    return float(score)


def _seconds(value: object) -> int:
    try:
        when = datetime.fromisoformat(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError("generated_datetime must be a date, got another") from None
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp())


def _profiles(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """What users stated in the survey; nobody's where there is no file."""
    for line, row in json_rows(path, max_bytes=_MAX_LINE_BYTES) if path.is_file() else ():
        try:
            yield _user(row), dict(_stated(row))
        except ValueError as error:
            raise at(path, line, str(error)) from None


def _stated(row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for attribute, steps in PROFILE.items():
        value: Any = row
        for step in steps:
            value = value.get(step) if isinstance(value, dict) else None
        if isinstance(value, str) and value.strip() not in ("", EMPTY):
            yield attribute, value.strip()
