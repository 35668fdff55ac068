"""The commands ``card`` and ``server card``; an owner's is in ``client/owner/card.py``."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from shared.card.options import add_output, write
from sottovoce.server_place import add_server_folder, opened_server

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_EXAMPLES = """\
examples:
  sottovoce card campaign --audit audit.json             a published campaign, before anything was spent
  sottovoce card runs/first --experiment                 a simulation; its card is marked EXPERIMENT
  sottovoce card --check privacy-card                    find and compute every number of a card again

A card is one folder: privacy-card.html, privacy-card.json, and sources/ with the files its numbers are from.
An owner's: sottovoce client card. An operator's: sottovoce server card. How to read one: docs/privacy-card.md.
"""


def add_parser(commands: "Subparsers") -> None:
    """Register ``card``."""
    parser = commands.add_parser(
        "card",
        help="a campaign's privacy card: what is promised, spent, attacked and not covered",
        description="Make the privacy card of a published campaign, or, marked EXPERIMENT, of a simulation.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="a campaign, a run, or with --check a card")
    parser.add_argument("--experiment", action="store_true", help="mark the card EXPERIMENT; a simulation needs it")
    parser.add_argument("--campaign", metavar="NAME", help="of a run with several: the folder of one")
    parser.add_argument("--check", action="store_true", help="check a card against its sources instead")
    add_output(parser)
    parser.set_defaults(handler=_card)


def add_server_card(actions: "Subparsers") -> None:
    """Register ``server card``."""
    parser = actions.add_parser(
        "card",
        help="a campaign's privacy card, as the operator knows it",
        description="Make the privacy card of a campaign: policy, signature, rounds, devices in counts, bytes, audits.",
        epilog="example: sottovoce server card --audit audit.json --out card",
    )
    parser.add_argument("campaign", nargs="?", metavar="CAMPAIGN", help="its name (default: the only one)")
    add_output(parser)
    add_server_folder(parser)
    parser.set_defaults(handler=_server_card)


def _card(options: argparse.Namespace) -> int:
    if options.check:
        from shared.card.card import check_card
        from shared.card.cells import cells

        card = check_card(options.folder)
        count = sum(1 for _ in cells({key: value for key, value in card.items() if key != "schema"}))
        print(f"the card is that of its sources: {count} values found or computed again, words and page the same")
        return 0
    from simulations.card import folder_sources

    return write(
        folder_sources(options.folder, experiment=options.experiment, campaign=options.campaign, audits=options.audit),
        options,
    )


def _server_card(options: argparse.Namespace) -> int:
    from server.card import server_sources
    from sottovoce.server_run import find_campaign

    server = opened_server(options)
    return write(server_sources(server, find_campaign(server, options.campaign), audits=options.audit), options)
