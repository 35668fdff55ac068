"""The commands a person types on a device."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import HeadError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_PREDICT_EXAMPLE = """\
example:
  sottovoce client predict --head runs/latest/heads/user-1 --text "Fargo (1996). Crime, Drama, Thriller"

A head folder holds one user's adapter; the base it was exported for lies beside it in a folder named base, or
where --base says. Everything is checked before the first prediction: a damaged file, or one that belongs to
another base, is refused with one line and exit code 2.
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Register ``client`` and its sub-commands; each sets ``handler``, a function of the parsed arguments."""
    client = subparsers.add_parser("client", help="what runs on a device", description="What runs on a device.")
    commands = client.add_subparsers(title="commands", metavar="COMMAND", required=True)
    parser = commands.add_parser(
        "predict",
        help="predict with a personal head; needs neither torch nor a network",
        description="Predict with a personal head. Needs neither torch nor a network.",
        epilog=_PREDICT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--head", type=Path, required=True, metavar="DIR", help="folder of the user's head")
    parser.add_argument("--base", type=Path, metavar="DIR", help="folder of the fleet's base (default: HEAD/../base)")
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="a text; may be repeated")
    parser.add_argument("--file", type=Path, metavar="TXT", help="more texts, one a line, in UTF-8")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of one line per text")
    parser.set_defaults(handler=predict)


def predict(args: argparse.Namespace) -> int:
    """Print the prediction of every text.

    Raises:
        HeadError: No text was given, the file of texts is unreadable, or the head cannot be used.
    """
    texts = [text.strip() for text in (*args.text, *_read_lines(args.file)) if text.strip()]
    if not texts:
        raise HeadError("at least one text must be given, got none; add --text TEXT or --file TXT.")
    if any(0xD800 <= ord(character) <= 0xDFFF for text in texts for character in text):
        raise HeadError("a text must be UTF-8, got bytes that are not; check the terminal's encoding.")
    from client.runtime import open_head  # loads onnxruntime, which no other command needs

    head = open_head(args.head, base=args.base)
    predictions = head.predict(texts).tolist()
    if args.json:
        rows = [{"text": t, "prediction": round(p, 4)} for t, p in zip(texts, predictions, strict=True)]
        print(json.dumps({"head": str(args.head), "user": head.user, "predictions": rows}, ensure_ascii=False))
    else:
        for text, prediction in zip(texts, predictions, strict=True):
            print(f"{prediction:.1f}  {text}")
    return 0


def _read_lines(path: Path | None) -> Sequence[str]:
    """The file's lines."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise HeadError(f"--file must name a readable text file, got {path}: {reason}.") from None
    return lines
