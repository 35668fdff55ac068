"""The owner's schedule: the conditions under which a device takes part, and when they let it.

``schedule.json`` in the home holds names and settings of conditions. A device whose conditions do not hold is absent:
it answers nothing and no connection is open, so a server sees the same as of one that is switched off. A round that
has begun is ended first, because the others of a secure sum count on it.
"""

import random
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from client.service.conditions import Surroundings, check_setting, unmet
from client.vault.private_files import disk_errors, write_private
from shared.errors import StoreError

_FILE = "schedule.json"
_MOST_BYTES = 16_384
_LOOK_S = 15.0  # between two looks at the surroundings
_OVER_S = 60.0  # what others take of the processors is a mean over this
_SETTLE_S = (30.0, 90.0)  # conditions that failed must hold so long again: neither to and fro, nor all at one second


class _Schedule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    conditions: dict[str, str] = Field(max_length=32)


def read_schedule(home: Path) -> dict[str, str]:
    """Condition -> setting; nothing where the owner set none.

    Raises:
        StoreError: The file is damaged: nobody knows when the owner wants to take part, so nobody does.
    """
    try:
        with (home / _FILE).open("rb") as file:
            text = file.read(_MOST_BYTES)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"{home / _FILE} must be readable, got: {error.strerror}; mend its permissions.") from None
    try:
        return _Schedule.model_validate_json(text).conditions
    except ValidationError:
        raise StoreError(
            f"{home / _FILE} must hold a schedule, it does not; set it again: sottovoce client schedule --clear."
        ) from None


def change_schedule(home: Path, *, put: Mapping[str, str], drop: frozenset[str] = frozenset()) -> dict[str, str]:
    """Set some conditions and take others away; a running service follows within a second.

    Args:
        home: Folder of the home.
        put: Condition -> setting.
        drop: Conditions to take away.

    Returns:
        What holds now.

    Raises:
        StoreError: A setting is impossible, or there is none to take away; nothing was changed.
        ScenarioError: There is no such condition; nothing was changed.
    """
    conditions = read_schedule(home)
    if strange := sorted(drop - conditions.keys()):
        raise StoreError(f"a condition that is taken away must be set, {strange[0]!r} is not; nothing was changed.")
    seen = CpuWatch().surroundings()
    for name, setting in put.items():
        try:
            check_setting(name, setting, seen)
        except ValueError as error:
            raise StoreError(f"{error}; nothing was changed.") from None
    conditions = {name: setting for name, setting in (conditions | dict(put)).items() if name not in drop}
    _write(home, conditions)
    return conditions


def clear_schedule(home: Path) -> None:
    """Take part at any time, whatever was set and even where it cannot be read."""
    _write(home, {})


def _write(home: Path, conditions: Mapping[str, str]) -> None:
    text = _Schedule(conditions=dict(conditions)).model_dump_json(indent=2)
    if len(text) >= _MOST_BYTES:
        raise StoreError(f"a schedule must have less than {_MOST_BYTES} bytes, got {len(text)}; nothing was changed.")
    with disk_errors(home):
        write_private(home / _FILE, f"{text}\n".encode())


class CpuWatch:
    """Surroundings, with what others took of the processors, over the last minute or since the last but one look.

    Args:
        root: Where ``proc`` lies.
        clock: Seconds that only grow.
        now: Local time with its zone.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now().astimezone(),
    ) -> None:
        self._root, self._clock, self._now = root, clock, now
        self._counts: deque[tuple[float, int, int]] = deque()
        self._count()

    def surroundings(self) -> Surroundings:
        """As they are now."""
        return Surroundings(now=self._now(), others_busy=self._count(), root=self._root)

    def _count(self) -> float | None:
        found = self._jiffies()
        if found is None:
            self._counts.clear()
            return None
        self._counts.append((self._clock(), *found))
        while len(self._counts) > 2 and self._counts[1][0] <= self._counts[-1][0] - _OVER_S:
            self._counts.popleft()
        (_, busy, total), (_, busy_now, total_now) = self._counts[0], self._counts[-1]
        return (busy_now - busy) / (total_now - total) if total_now > total else None

    def _jiffies(self) -> tuple[int, int] | None:
        """What processes that are not polite took, with the kernel for them, and all there was, since the start."""
        try:
            name, *counts = (self._root / "proc/stat").read_text(encoding="ascii").partition("\n")[0].split()
            user, _, system, _, _, interrupts, soft, stolen = (int(count) for count in counts[:8])
        except (OSError, ValueError):
            return None
        if name != "cpu":
            return None
        return user + system + interrupts + soft + stolen, sum(int(count) for count in counts[:8])


class Gate:
    """Whether a device takes part now, asked again and again by its service.

    Args:
        home: Folder of the home; its schedule may change at any time.
        look: The surroundings.
        clock: Seconds that only grow.
        settle: Draws the seconds for which conditions that had failed must hold again.
    """

    def __init__(
        self,
        home: Path,
        *,
        look: Callable[[], Surroundings] | None = None,
        clock: Callable[[], float] = time.monotonic,
        settle: Callable[[], float] = lambda: random.uniform(*_SETTLE_S),
    ) -> None:
        self._home, self._clock, self._settle = home, clock, settle
        self._look = look or CpuWatch().surroundings
        self._conditions: Mapping[str, str] | None = None
        self._reasons: Mapping[str, str] = {}
        self._looked_at: float | None = None
        self._opens_at: float | None = None

    @property
    def conditions(self) -> Mapping[str, str]:
        """As last read."""
        return self._conditions or {}

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why it is closed: condition -> plain words; empty where it is open."""
        return self._reasons

    def is_open(self) -> bool:
        """Look, if it is time to, and say whether to take part.

        Guarantee:
            A condition that fails closes at the next look; one that holds again opens only after having held for a
            while, or at once where the owner changed the schedule. A schedule that cannot be read closes.
        """
        try:
            conditions = read_schedule(self._home)
        except StoreError as error:
            self._conditions, self._looked_at, self._reasons = None, None, {"schedule": str(error)}
            return False
        changed = conditions != self._conditions
        now = self._clock()
        if changed or self._looked_at is None or now - self._looked_at >= _LOOK_S:
            was_closed = bool(self._reasons) and not changed
            self._conditions, self._looked_at = conditions, now
            found = unmet(conditions, self._look()) if conditions else {}
            self._settled(found, now=now, was_closed=was_closed)
        return not self._reasons

    def _settled(self, found: Mapping[str, str], *, now: float, was_closed: bool) -> None:
        if found or not was_closed:
            self._opens_at, self._reasons = None, found
            return
        if self._opens_at is None:
            self._opens_at = now + self._settle()
        if now >= self._opens_at:
            self._opens_at, self._reasons = None, {}
        else:
            self._reasons = {"settling": "every condition holds again; taking part in about a minute"}
