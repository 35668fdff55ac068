"""The commands ``client join``, the service of a device in the foreground, as systemd wants it, and ``schedule``."""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from client.owner.words import plain

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """\
examples:
  sottovoce client join invitation                     the folder the operator gave you; kept for the next time
  sottovoce client join fl.example.org:9092 --ca ca.crt
  sottovoce client join                                the server joined before

Runs until Ctrl-C or SIGTERM. The operator must have enrolled HOME/device.pub. Nothing is sent for a campaign that you
did not agree to (sottovoce client consent). Needs the [train] install. What the service does is on stderr and in
HOME/log/service.log, one JSON object a line: codes, hashes and rounds, never a text of yours. When it takes part:
sottovoce client schedule. Exit code 0 when stopped, 2 when it cannot run.
"""

_SCHEDULE_EXAMPLES = """\
examples:
  sottovoce client schedule --window 22:00-06:00 --on mains
  sottovoce client schedule --idle 10 --network unmetered
  sottovoce client schedule                            what is set, and what does not hold now
  sottovoce client schedule --remove idle
  sottovoce client schedule --clear

The service takes part while every condition holds; otherwise it is not connected. A round that has begun is ended
first. A running service follows at once. A server sees when a device is there, and so a schedule of idleness or of
networks tells it when you use the device or are at home; a time window tells it the hours you chose and nothing else.
"""


def add_join(commands: "Subparsers") -> None:
    """Register ``join``."""
    parser = commands.add_parser(
        "join",
        help="take part: answer a server's rounds until stopped",
        description="Take part in the campaigns you agreed to: answer a server's rounds until stopped.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("server", nargs="?", metavar="SERVER", help="invitation folder, or HOST:PORT with --ca")
    parser.add_argument("--ca", type=Path, metavar="FILE", help="certificate of the server's authority")
    parser.add_argument("--home", type=Path, metavar="DIR", help="your home (default: the user's own)")
    parser.add_argument("--base", type=Path, metavar="DIR", help="folder of the fleet's ONNX base, for predictions")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="at most so many compute (default: 1)")
    parser.add_argument("--nice", type=int, default=10, metavar="N", help="politeness, 0 to 19 (default: 10)")
    parser.add_argument("--memory-mb", type=int, metavar="N", help="refuse rounds that need more (default: no limit)")
    parser.add_argument("--log", type=Path, metavar="FILE", help="what it did (default: HOME/log/service.log)")
    parser.set_defaults(handler=join_server)


def add_schedule(commands: "Subparsers") -> None:
    """Register ``schedule``."""
    parser = commands.add_parser(
        "schedule",
        help="when to take part: hours, power, idleness, network",
        description="When the service takes part; with nothing set, always.",
        epilog=_SCHEDULE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, metavar="DIR", help="your home (default: the user's own)")
    parser.add_argument("--window", metavar="HH:MM-HH:MM,…", help="only in these hours of local time")
    parser.add_argument("--on", choices=["mains"], dest="power", help="only while not running from a battery")
    parser.add_argument("--idle", metavar="MINUTES", help="only when nobody has used the device for so long")
    parser.add_argument("--network", metavar="WHICH", help="only over a network that is unmetered, or over eth0,wlan0")
    parser.add_argument(
        "--when", action="append", default=[], metavar="NAME=VALUE", help="a condition of an installed package"
    )
    parser.add_argument("--remove", action="append", default=[], metavar="NAME", help="take a condition away")
    parser.add_argument("--clear", action="store_true", help="take part at any time")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(handler=schedule)


def schedule(options: argparse.Namespace) -> int:
    """Set conditions, take them away, or show them with what does not hold now.

    Raises:
        SottovoceError: A condition is unknown or impossible, or the schedule cannot be read; nothing was changed.
    """
    from client.home.place import open_owner_home
    from client.service.conditions import CONDITIONS, unmet
    from client.service.schedule import CpuWatch, change_schedule, clear_schedule, read_schedule
    from shared.errors import StoreError

    home = open_owner_home(options.home).folder
    named = {name: getattr(options, name) for name in CONDITIONS if getattr(options, name) is not None}
    for pair in options.when:
        name, found, value = pair.partition("=")
        if not (found and name and name not in named):
            raise StoreError(f"--when must read NAME=VALUE, each name once, got {pair!r}; nothing was changed.")
        named[name] = value
    if options.clear and (named or options.remove):
        raise StoreError("--clear takes everything away and goes with nothing else; nothing was changed.")
    watch = CpuWatch()
    if options.clear:
        clear_schedule(home)
    elif named or options.remove:
        change_schedule(home, put=named, drop=frozenset(options.remove))
    conditions = read_schedule(home)
    if "idle" in conditions:
        time.sleep(1.0)  # to see what the processors do
    reasons = unmet(conditions, watch.surroundings())
    if options.json:
        print(json.dumps({"conditions": conditions, "unmet": reasons}, indent=2))
        return 0
    for name, setting in conditions.items():
        state = f"does not hold now: {plain(reasons[name])}" if name in reasons else "holds now"
        print(f"{plain(name)} {plain(setting)}: {state}")
    print("takes part while all of it holds" if conditions else "takes part at any time")
    return 0


def join_server(options: argparse.Namespace) -> int:
    """Run the service.

    Raises:
        SottovoceError: It cannot run.
    """
    from client.home.place import open_owner_home

    home = open_owner_home(options.home)
    _need_train()
    from client.service.executor import limit_process
    from client.service.join import join, read_invitation

    limit_process(threads=options.threads, nice=options.nice, memory_mb=options.memory_mb)
    invitation = read_invitation(options.server, ca=options.ca, home=home.folder)
    _log_to_stderr()
    _log_to_file(options.log or home.folder / "log" / "service.log", own=options.log is None)
    if join(home, invitation, base=options.base, on_state=_say):
        return 0
    sys.stderr.flush()
    os._exit(0)  # a round is at work in a thread that cannot be interrupted; it is burnt


def _need_train() -> None:
    from importlib.util import find_spec

    from shared.errors import StoreError

    missing = [name for name in ("flwr", "grpc", "torch") if find_spec(name) is None]
    if missing:
        raise StoreError(f"join needs the packages of sottovoce[train], {', '.join(missing)} is not installed.")


def _log_to_stderr() -> None:
    log = logging.getLogger("sottovoce.client")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


def _log_to_file(path: Path, *, own: bool) -> None:
    from client.service.log_file import LogFile
    from client.vault.private_files import disk_errors, private_folder

    with disk_errors(path):
        if own:
            private_folder(path.parent)
        handler = LogFile(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logging.getLogger("sottovoce.client").addHandler(handler)


def _say(state: str) -> None:
    from client.service.supernode import WORDS

    if state in WORDS:
        print(f"sottovoce: {WORDS[state]}", file=sys.stderr, flush=True)
