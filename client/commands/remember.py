"""The options by which an owner lets a language model see their own records before a prompt."""

import argparse
from typing import TYPE_CHECKING

from client.home.home import Home
from shared.errors import HeadError

if TYPE_CHECKING:
    from client.owner.remember import Remembering

_MOST = 64


def add_remember(parser: argparse.ArgumentParser) -> None:
    """Register ``--remember`` and what belongs to it."""
    group = parser.add_argument_group("memory", "Your own records before the prompt; they stay on this device.")
    group.add_argument("--remember", type=int, default=0, metavar="N", help="so many of them (default: 0)")
    group.add_argument(
        "--retriever", choices=("bm25", "recency"), default="bm25", help="the most similar, or the newest"
    )
    group.add_argument("--entry", metavar="TEXT", help='how one is put (default: "{text} {response}")')
    group.add_argument("--state", action="append", default=[], metavar="NAME", help="an attribute of your profile, too")


def remembering_of(args: argparse.Namespace, home: Home | None) -> "Remembering | None":
    """What the options ask for; None where they ask for nothing.

    Raises:
        HeadError: There is no home to remember from, or a number or an entry is impossible.
    """
    if not (args.remember or args.state):
        return None
    if home is None:
        raise HeadError("--remember and --state need --home, whose records and profile are read; it was not given.")
    if not 0 <= args.remember <= _MOST:
        raise HeadError(f"--remember must be from 0 to {_MOST}, got {args.remember}.")
    if args.entry is not None and not ("{text}" in args.entry or "{response}" in args.entry):
        raise HeadError("--entry must hold {text} or {response}, got neither.")
    from client.owner.remember import Remembering
    from shared.config import PromptConfig

    written = {} if args.entry is None else {"entry": args.entry}
    settings = {"records": args.remember, "retriever": args.retriever, "declared": tuple(args.state), **written}
    return Remembering(home, PromptConfig.model_validate(settings))
