"""What a device writes to its log: events of a fixed list with fields of a fixed list, one JSON object a line.

A log is read by others than the owner, so no free text has a way into it: a field that is not listed, or a value that
could hold a sentence, is an error of ours and stops the line, not the device.
"""

import json
import logging
import re
from collections.abc import Mapping

EVENTS: Mapping[str, frozenset[str]] = {
    "spent": frozenset({"policy", "round"}),
    "released": frozenset({"policy", "round"}),
    "repeated": frozenset({"policy", "round"}),
    "refused": frozenset({"code", "error", "place"}),
    "zeroed": frozenset({"round", "error", "place"}),  # training failed, and zero was contributed
    "service": frozenset({"state"}),
    "away": frozenset({"condition"}),
    "failed": frozenset({"error", "place"}),  # Flower's part could not be started
    "undelivered": frozenset({"error", "place"}),
}
_WORD = re.compile(r"[A-Za-z0-9_.:/-]{0,120}")  # a code, a hash, a type, a file and its line: nothing with a space

_log = logging.getLogger("sottovoce.client")


def note(event: str, *, level: int = logging.INFO, **fields: int | str) -> None:
    """Write one event.

    Args:
        event: A key of ``EVENTS``.
        level: Of ``logging``.
        fields: Exactly those of the event; whole numbers, or words without spaces.

    Example:
        >>> note("refused", code="BUDGET", error="none", place="none")
        >>> note("refused", code="what the user wrote")
        Traceback (most recent call last):
        ...
        ValueError: the event 'refused' has the fields code, error, place, each a number or a word.
    """
    known = EVENTS.get(event, frozenset())
    if set(fields) != known or not all(type(v) is int or _WORD.fullmatch(str(v)) for v in fields.values()):
        raise ValueError(f"the event {event!r} has the fields {', '.join(sorted(known))}, each a number or a word.")
    _log.log(level, "%s", json.dumps({"event": event, **fields}, sort_keys=True))


def describe_error(error: BaseException) -> dict[str, str]:
    """Type and place of an error, and never its text, which may quote a record."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    place = "unknown"
    if frame is not None:
        path = "/".join(frame.tb_frame.f_code.co_filename.split("/")[-2:])
        place = f"{path}:{frame.tb_lineno}"
    return {"error": _word(type(error).__name__), "place": _word(place)}


def _word(text: str) -> str:
    """The end of a text as ``note`` takes it: Python's own frames are named ``<frozen codecs>``, folders anything."""
    return re.sub(r"[^A-Za-z0-9_.:/-]", "_", text)[-120:]
