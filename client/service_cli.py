"""The command ``client join``: the service of a device, in the foreground, as systemd wants it."""

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """\
examples:
  sottovoce client join invitation                     the folder the operator gave you; kept for the next time
  sottovoce client join fl.example.org:9092 --ca ca.crt
  sottovoce client join                                the server joined before

Runs until Ctrl-C or SIGTERM. The operator must have enrolled HOME/device.pub. Nothing is sent for a campaign that you
did not agree to (sottovoce client consent). Needs the [train] install. What the service does is on stderr, one JSON
object a line: codes, hashes and rounds, never a text of yours. Exit code 0 when stopped, 2 when it cannot run.
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
    parser.set_defaults(handler=join_server)


def join_server(options: argparse.Namespace) -> int:
    """Run the service.

    Raises:
        SottovoceError: It cannot run.
    """
    from client.place import open_owner_home

    home = open_owner_home(options.home)
    _need_train()
    from client.executor import limit_process
    from client.join import join, read_invitation

    limit_process(threads=options.threads, nice=options.nice, memory_mb=options.memory_mb)
    invitation = read_invitation(options.server, ca=options.ca, home=home.folder)
    _log_to_stderr()
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


def _say(state: str) -> None:
    from client.supernode import WORDS

    if state in WORDS:
        print(f"sottovoce: {WORDS[state]}", file=sys.stderr, flush=True)


def service_line(home: Path) -> str | None:
    """What the home's service is doing, for ``status``; None where none runs."""
    from shared.errors import StoreError

    try:
        from client.control import control_client

        with control_client(home) as client:
            if client is None:
                return None
            service = client.status()["service"]
    except ImportError:  # the base install has no grpc, and no service
        return None
    except StoreError as error:
        return f"service: {error}"
    return f"service: {service['state']}, since {service['since']} (pid {service['pid']:.0f})"
