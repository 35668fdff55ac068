"""What the commands that make privacy cards have in common; loads nothing until a card is written."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.card.sources import Sources


def add_output(parser: argparse.ArgumentParser) -> None:
    """The options of every card."""
    parser.add_argument("--audit", type=Path, action="append", default=[], metavar="FILE", help="of sottovoce audit")
    words = "folder of the card, replaced if it holds one (default: privacy-card)"
    parser.add_argument("--out", type=Path, default=Path("privacy-card"), metavar="DIR", help=words)
    parser.add_argument("--json", action="store_true", help="print the card as JSON")


def write(sources: "Sources", options: argparse.Namespace) -> int:
    """Write the card of some sources and say where it is.

    Raises:
        SottovoceError: There can be no such card; nothing is written.
    """
    from shared.card.card import make_card
    from shared.card.sources import CARD, PAGE

    card = make_card(sources, options.out)
    if options.json:
        print(json.dumps(card, indent=2, ensure_ascii=False))
        return 0
    if card["experiment"]:
        print(f"{card['status']}: a promise to nobody")
    print(f"audits: {card['audit_verdict']}\nnot covered: {len(card['not_covered'])} points, on the page")
    print(f"card: {(options.out / CARD).resolve()}\npage: {(options.out / PAGE).resolve()}")
    return 0
