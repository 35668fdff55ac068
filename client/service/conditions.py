"""When a device takes part: time, power, idleness and network, each a function of its setting and of what is seen.

A condition that cannot be told does not hold: a laptop whose battery cannot be read is not on mains. A package adds one
by the entry point group ``sottovoce.conditions`` (docs/extending.md).
"""

import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, time
from pathlib import Path

from shared.errors import SottovoceError
from shared.registry import lookup

_BUSY_SHARE = 0.25  # of the processors, taken by others: above it the machine is at work for somebody
_MOST_MINUTES = 24 * 60
_ASK_S = 3.0
_BUS = ("busctl", "--timeout=2", "get-property")
_NETWORK_MANAGER = ("org.freedesktop.NetworkManager", "/org/freedesktop/NetworkManager")
_LOGIN = ("org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager")
_SPAN = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-([01]\d|2[0-3]):([0-5]\d)")
_INTERFACE = re.compile(r"[A-Za-z0-9_.@-]{1,15}")
_ROUTE_UP = 0x1


def ask_program(command: Sequence[str]) -> str | None:
    """What a program prints; None where there is none, it fails, or it takes longer than a few seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class Surroundings:
    """What a condition may look at.

    Attributes:
        now: Local time, with its zone.
        others_busy: Share of all processors, from 0 to 1, that processes of niceness 0 or less took over about the last
            minute; None where it cannot be told. The service is nicer, so its own work is not in it.
        root: Where ``sys``, ``proc`` and ``dev`` lie.
        ask: Runs a program; returns what it prints, or None.
    """

    now: datetime
    others_busy: float | None = None
    root: Path = Path("/")
    ask: Callable[[Sequence[str]], str | None] = ask_program


Condition = Callable[[str, Surroundings], "str | None"]


def in_window(setting: str, seen: Surroundings) -> str | None:
    """Hours of the day in local time, such as 22:00-06:00 or 12:00-13:00,22:00-06:00.

    Raises:
        ValueError: It is not a list of such spans.
    """
    spans = [_span(part.strip()) for part in setting.split(",")]
    clock = seen.now.time()
    if any(start <= clock < end if start < end else clock >= start or clock < end for start, end in spans):
        return None
    opens = min((start for start, _ in spans), key=lambda start: (start <= clock, start))
    return f"it is {clock:%H:%M}, the next span begins at {opens:%H:%M}"


def _span(text: str) -> tuple[time, time]:
    found = _SPAN.fullmatch(text)
    if found is None:
        raise ValueError(f"a span must read HH:MM-HH:MM, such as 22:00-06:00, got {text!r}")
    hours = [int(part) for part in found.groups()]
    start, end = time(hours[0], hours[1]), time(hours[2], hours[3])
    if start == end:
        raise ValueError(f"a span must end at another time than it begins, got {text!r}")
    return start, end


def on_power(setting: str, seen: Surroundings) -> str | None:
    """``mains``: not running from a battery.

    Raises:
        ValueError: It is another word.
    """
    if setting != "mains":
        raise ValueError(f"power must be mains, got {setting!r}")
    folder = seen.root / "sys/class/power_supply"
    try:
        supplies = [_supply(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    except (OSError, ValueError):
        return "whether the device is on mains cannot be read"
    own = [supply for supply in supplies if supply.get("scope") != "Device"]  # a mouse's battery is not the machine's
    feeding = [supply for supply in own if supply["type"] != "Battery"]
    batteries = [supply for supply in own if supply["type"] == "Battery"]
    if any(supply.get("online", "0") != "0" for supply in feeding) or not batteries:
        return None
    if not feeding and all(supply.get("status") in ("Charging", "Full", "Not charging") for supply in batteries):
        return None
    return "it runs from its battery"


def _supply(folder: Path) -> dict[str, str]:
    found = {"type": (folder / "type").read_text(encoding="ascii").strip()}
    for name in ("scope", "online", "status"):
        try:
            found[name] = (folder / name).read_text(encoding="ascii").strip()
        except OSError:  # not every kind has each; without it, it feeds nothing
            continue
    return found


def is_idle(setting: str, seen: Surroundings) -> str | None:
    """So many minutes without input at any session or terminal, and others take under a quarter of the processors.

    Raises:
        ValueError: It is not a whole number of minutes of at most a day.
    """
    if not (setting.isascii() and setting.isdecimal() and 1 <= int(setting) <= _MOST_MINUTES):
        raise ValueError(f"idle must be 1 to {_MOST_MINUTES} minutes, got {setting!r}")
    waited_s = _without_input_s(seen)
    if waited_s is None or seen.others_busy is None:
        return "whether somebody uses the device cannot be told here"
    if not waited_s >= 60 * int(setting):
        return f"somebody used it less than {int(setting)} minutes ago"
    if not seen.others_busy < _BUSY_SHARE:
        return f"other programs take {seen.others_busy:.0%} of its processors"
    return None


def _without_input_s(seen: Surroundings) -> float | None:
    """Seconds since the last input that logind or a terminal knows of."""
    now_s = seen.now.timestamp()
    last_s = []
    hint = (seen.ask([*_BUS, *_LOGIN, "IdleHint", "IdleSinceHint"]) or "").split()
    if len(hint) == 4 and hint[3].isdecimal():
        last_s.append(int(hint[3]) / 1e6 if hint[1] == "true" else now_s)
    terminals = [*(seen.root / "dev").glob("pts/[0-9]*"), *(seen.root / "dev").glob("tty[0-9]*")]
    for terminal in terminals:
        try:
            last_s.append(terminal.stat().st_atime)
        except OSError:  # closed meanwhile
            continue
    if not last_s and not (seen.root / "dev/pts").is_dir():
        return None
    return max(0.0, now_s - max(last_s, default=0.0))


def on_network(setting: str, seen: Surroundings) -> str | None:
    """``unmetered``, as NetworkManager says, or names of interfaces, such as eth0,wlan0, one of which leads out.

    Raises:
        ValueError: It is neither.
    """
    if setting != "unmetered":
        names = [name.strip() for name in setting.split(",")]
        if not all(_INTERFACE.fullmatch(name) for name in names):
            raise ValueError(f"network must be unmetered, or names of interfaces such as eth0,wlan0, got {setting!r}")
        try:
            leading = _leading_out(seen.root)
        except (OSError, ValueError):
            return "which network leads out cannot be told"
        if not leading:
            return "no network leads out"
        others = sorted(leading - set(names))
        return f"{', '.join(others)} leads out" if others else None
    found = (seen.ask([*_BUS, *_NETWORK_MANAGER, _NETWORK_MANAGER[0], "Metered"]) or "").split()
    metered = found[1] if len(found) == 2 else None
    if metered in ("2", "4"):  # no, and no as far as can be guessed
        return None
    if metered in ("1", "3"):
        return "the network is metered"
    return "NetworkManager does not say whether the network is metered; name interfaces instead"


def _leading_out(root: Path) -> set[str]:
    """The interface of the best default route of IPv4, and that of IPv6."""
    four, six = [], []
    for line in _lines(root / "proc/net/route")[1:]:
        name, destination, _, flags, _, _, metric, mask, *_ = line.split()
        if destination == mask == "00000000" and int(flags, 16) & _ROUTE_UP:
            four.append((int(metric), name))
    for line in _lines(root / "proc/net/ipv6_route"):
        destination, length, _, _, _, metric, _, _, flags, name = line.split()
        if set(destination) == {"0"} and length == "00" and int(flags, 16) & _ROUTE_UP and name != "lo":
            six.append((int(metric, 16), name))
    return {min(routes)[1] for routes in (four, six) if routes}


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:  # a kernel without IPv6
        return []


CONDITIONS: Mapping[str, Condition] = {
    "window": in_window,
    "power": on_power,
    "idle": is_idle,
    "network": on_network,
}


def unmet(conditions: Mapping[str, str], seen: Surroundings) -> dict[str, str]:
    """The conditions that do not hold, each with its reason in plain words.

    Args:
        conditions: Name -> setting.
        seen: What they look at.

    Guarantee:
        One that is unknown, impossible or broken does not hold; nothing that it raises gets out.
    """
    reasons = {name: _reason(name, setting, seen) for name, setting in conditions.items()}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _reason(name: str, setting: str, seen: Surroundings) -> str | None:
    try:
        found: object = lookup("conditions", name, CONDITIONS, Callable)(setting, seen)
    except (SottovoceError, ValueError) as error:
        return str(error)
    except Exception as error:  # a package's own, or a file of the system's that is not as expected
        return f"it cannot be told ({type(error).__name__})"
    if found is not None and not isinstance(found, str):
        return f"it must say None or why not, it said {type(found).__name__}"
    return found


def check_setting(name: str, setting: str, seen: Surroundings) -> None:
    """Try a condition once.

    Raises:
        ScenarioError: There is none of that name.
        ValueError: The setting is impossible.
    """
    condition: Condition = lookup("conditions", name, CONDITIONS, Callable)
    condition(setting, seen)
