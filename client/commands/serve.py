"""The command that serves the owner's models on this machine."""

import argparse
import contextlib
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from client.commands.remember import add_remember, remembering_of
from client.home.place import default_home, open_owner_home
from shared.errors import HeadError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

TOKEN_FILE = "serve.token"
_EXAMPLE = """\
examples:
  sottovoce client serve --base base
  sottovoce client serve --head runs/latest/heads/user-1

Answers POST /v1/chat/completions as OpenAI does, for programs on this machine that send the token. The model
"personal" is your current private head, "personal@3" version 3, "base" the base alone. Nothing said is kept.
"""


def add_serve(commands: "Subparsers") -> None:
    """Register ``client serve``."""
    parser = commands.add_parser(
        "serve",
        help="a chat endpoint on this machine, for programs that speak OpenAI's format",
        description="A chat endpoint on this machine alone. Needs neither torch nor a network.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--home", type=Path, metavar="DIR", help=f"your home (default: {default_home()})")
    source.add_argument("--head", type=Path, metavar="DIR", help="instead: folder of one head, of a simulation")
    parser.add_argument("--base", type=Path, metavar="DIR", help="folder of the fleet's base (default: HEAD/../base)")
    parser.add_argument("--port", type=int, default=8080, metavar="N", help="default: 8080; 0 takes a free one")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the model (default: 1)")
    parser.add_argument("--new-token", action="store_true", help="make a new token; the old one is no longer taken")
    add_remember(parser)
    parser.set_defaults(handler=serve)


def serve(args: argparse.Namespace) -> int:
    """Serve until it is interrupted.

    Raises:
        HeadError: The base cannot be used.
        StoreError: The home cannot be opened, the token is not private, or the port is taken.
    """
    from client.runtime.artifact import DEFAULT_BASE
    from client.serve.guard import read_token
    from client.serve.models import open_models
    from client.serve.server import bind, build_app, run

    if args.head is None and args.base is None:
        raise HeadError("--base must name the folder of the fleet's base, it was not given.")
    source = args.head or open_owner_home(args.home)
    remembering = remembering_of(args, None if args.head else source)
    models = open_models(source, args.base or args.head / DEFAULT_BASE, threads=args.threads, remembering=remembering)
    if args.head is None:
        place = source.folder / TOKEN_FILE
        token, said = read_token(place, new=args.new_token), f"in {place}"
    else:
        token = said = secrets.token_urlsafe(32)
    with bind(args.port) as listening:
        print(
            f"serving http://127.0.0.1:{listening.getsockname()[1]}/v1 to programs on this machine; end with Ctrl-C\n"
            f"models: {', '.join(models.names())}\ntoken: {said}",
            flush=True,
        )
        problem = chosen.problem if (chosen := models.choose("personal")) else None
        if problem:
            print(f"the base answers instead of the head: {problem}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            run(build_app(models, token=token), listening)
    return 0
