"""The command that opens the owner's page on this machine."""

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from client.home.place import default_home, open_owner_home

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLE = """\
examples:
  sottovoce client dashboard
  sottovoce client dashboard --base base               try the personal model beside the base, too

The link that is printed opens once, in one browser on this machine. From another machine of yours, take the page
through a tunnel to the same port: ssh -L 8090:127.0.0.1:8090 DEVICE, with --port 8090.
"""


def add_dashboard(commands: "Subparsers") -> None:
    """Register ``client dashboard``."""
    parser = commands.add_parser(
        "dashboard",
        help="the owner's page: spent and left, what left, pause, forget, the personal model beside the base",
        description="The owner's page, for one browser on this machine. Needs neither torch nor a network.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, metavar="DIR", help=f"your home (default: {default_home()})")
    parser.add_argument("--base", type=Path, metavar="DIR", help="folder of the fleet's base, to try the models")
    parser.add_argument("--port", type=int, default=0, metavar="N", help="default: 0, which takes a free one")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the models (default: 1)")
    parser.set_defaults(handler=dashboard)


def dashboard(args: argparse.Namespace) -> int:
    """Serve the page until it is interrupted.

    Raises:
        HeadError: The base cannot be used.
        LedgerError: A base is named, and the ledger, which knows whose to trust, cannot be used.
        StoreError: The home cannot be opened, or the port is taken.
    """
    from client.dashboard.guard import Session
    from client.dashboard.server import build_page
    from client.serve.server import HOST, bind, run

    home = open_owner_home(args.home)
    beside = None
    if args.base is not None:
        from client.dashboard.beside import open_beside

        beside = open_beside(home, args.base, threads=args.threads)
    with bind(args.port) as listening:
        session = Session(f"{HOST}:{listening.getsockname()[1]}")
        print(
            f"your page: {session.link}\nit opens once, in one browser on this machine; end with Ctrl-C",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            run(build_page(home, session, beside=beside), listening)
    return 0
