"""The commands a person types on a device."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from client.commands.dashboard import add_dashboard
from client.commands.owner import add_parsers
from client.commands.remember import add_remember, remembering_of
from client.commands.serve import add_serve
from client.commands.service import add_join, add_schedule
from client.home.place import open_owner_home
from shared.errors import HeadError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_PREDICT_EXAMPLE = """\
example:
  sottovoce client predict --head runs/latest/heads/user-1 --text "Fargo (1996). Crime, Drama, Thriller"

A head folder holds one user's adapter; the base it was exported for lies beside it in a folder named base, or
where --base says. Everything is checked before the first prediction: a damaged file, or one that belongs to
another base, is refused with one line and exit code 2.

With --home the base must be signed by an operator you consented to. Where your private head is refused, the bare base
answers and one line on standard error says why.
"""

_GENERATE_EXAMPLE = """\
example:
  sottovoce client generate --head runs/latest/heads/user-1 --prompt "The film was" --temperature 0.7

With --base and no --head the base answers alone. Prompt and answer together must fit the base's context.
Everything is checked before the first word: a damaged file, a head of another base, or one whose known answer does
not come out on this device, is refused with one line and exit code 2. With --home the base must be signed by an
operator you consented to; where your private head is refused, the bare base answers and one line says why.
With --remember N the N of your own records that are most like the prompt stand before it; they stay on the device.
"""


def add_parser(subparsers: "Subparsers") -> None:
    """Register ``client`` and its sub-commands; each sets ``handler``, a function of the parsed arguments."""
    client = subparsers.add_parser("client", help="what runs on a device", description="What runs on a device.")
    commands = client.add_subparsers(title="commands", metavar="COMMAND", required=True)
    add_parsers(commands)
    add_serve(commands)
    add_dashboard(commands)
    add_join(commands)
    add_schedule(commands)
    parser = commands.add_parser(
        "predict",
        help="predict with a personal head; needs neither torch nor a network",
        description="Predict with a personal head. Needs neither torch nor a network.",
        epilog=_PREDICT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_head(parser, required=True)
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="a text; may be repeated")
    parser.add_argument("--file", type=Path, metavar="TXT", help="more texts, one a line, in UTF-8")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of one line per text")
    parser.set_defaults(handler=predict)
    parser = commands.add_parser(
        "generate",
        help="answer a prompt with a personal language head; needs neither torch nor a network",
        description="Answer a prompt with a personal language head. Needs neither torch nor a network.",
        epilog=_GENERATE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_head(parser, required=False)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt, taken as it is")
    prompt.add_argument("--file", type=Path, metavar="TXT", help="a file with the prompt, in UTF-8")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, metavar="N", help="length of the answer (default: 64)"
    )
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0, the default, is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from this share (default: 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the draws (default: fresh randomness)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the answer as it comes")
    add_remember(parser)
    parser.set_defaults(handler=generate)


def _add_head(parser: argparse.ArgumentParser, *, required: bool) -> None:
    head = parser.add_mutually_exclusive_group(required=required)
    head.add_argument("--head", type=Path, metavar="DIR", help="folder of the user's head")
    head.add_argument("--home", type=Path, metavar="DIR", help="the owner's home: use its current private head")
    parser.add_argument("--base", type=Path, metavar="DIR", help="folder of the fleet's base (default: HEAD/../base)")


def _open_home(args: argparse.Namespace, kind: Literal["base", "lm-base"]) -> tuple[Any, str | None]:
    """What answers in a home, and why it is the bare base, if it is."""
    if args.base is None:
        raise HeadError("--home needs --base, the folder of the fleet's base; it was not given.")
    from client.owner.verify import check_had_head, open_home_base, open_personal

    home = open_owner_home(args.home)
    check_had_head(home)
    opened = open_personal(home, open_home_base(home, args.base, kind=kind))
    if opened.problem:
        print(f"sottovoce: the bare base answers, your private head was refused: {opened.problem}", file=sys.stderr)
    return opened.model, opened.problem


def _said_of_home(args: argparse.Namespace, problem: str | None) -> dict[str, Any]:
    """What JSON says of a home beside the answer."""
    return {} if args.home is None else {"personal": problem is None, "problem": problem}


def predict(args: argparse.Namespace) -> int:
    """Print the prediction of every text.

    Raises:
        HeadError: No text was given, the file of texts is unreadable, or the head cannot be used.
    """
    lines = [] if args.file is None else _read_file(args.file).split("\n")
    texts = [text.strip() for text in (*args.text, *lines) if text.strip()]
    if not texts:
        raise HeadError("at least one text must be given, got none; add --text TEXT or --file TXT.")
    _check_encoding(texts)
    from client.runtime.runtime import open_head  # loads onnxruntime, which no other command needs

    head, problem = (open_head(args.head, base=args.base), None) if args.head else _open_home(args, "base")
    predictions = head.predict(texts).tolist()
    labels = head.base.labels
    if args.json:
        rows = [{"text": t, **_said(p, labels)} for t, p in zip(texts, predictions, strict=True)]
        said = {"head": str(args.head or args.home), "user": head.user, **_said_of_home(args, problem)}
        print(json.dumps(said | {"predictions": rows}, ensure_ascii=False))
    else:
        for text, prediction in zip(texts, predictions, strict=True):
            print(f"{_in_words(prediction, labels)}  {text}")
    return 0


def _said(prediction: Any, labels: Sequence[str]) -> dict[str, Any]:
    """A prediction as JSON says it: a number, or the likeliest label and how likely each is."""
    if not labels:
        return {"prediction": round(prediction, 4)}
    shares = {label: round(share, 4) for label, share in zip(labels, prediction, strict=True)}
    return {"prediction": max(shares, key=shares.__getitem__), "probabilities": shares}


def _in_words(prediction: Any, labels: Sequence[str]) -> str:
    if not labels:
        return f"{prediction:.1f}"
    shares = sorted(zip(labels, prediction, strict=True), key=lambda one: -one[1])
    (first, share), others = shares[0], ", ".join(f"{label} {share:.2f}" for label, share in shares[1:3])
    return f"{first} {share:.2f} ({others})"


def generate(args: argparse.Namespace) -> int:
    """Print the answer to a prompt, as it comes.

    Raises:
        HeadError: Neither head nor base is named, the prompt is unreadable or too long, a setting is impossible, or
            the head cannot be used.
    """
    prompt = _read_file(args.file) if args.prompt is None else args.prompt
    _check_encoding([prompt])
    remembering = remembering_of(args, args.home and open_owner_home(args.home))
    generator, problem = _open_generator(args)
    whole = prompt
    if remembering is not None:
        base = generator.base
        room = generator.room - args.max_new_tokens
        whole = remembering.before(prompt, base.tokenizer, fits=lambda text: len(base.encode(text)) <= room)
    settings = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "seed": args.seed,
    }
    if args.json:
        found = generator.generate(whole, **settings)
        answer = {"prompt": prompt, "text": found.text, "token_ids": found.token_ids, "stopped": found.stopped}
        where = {"head": str(args.head or args.home or args.base), "user": generator.user}
        print(json.dumps(where | _said_of_home(args, problem) | answer, ensure_ascii=False))
    else:
        for piece in generator.stream(whole, **settings):
            print(piece, end="", flush=True)
        print()
    return 0


def _open_generator(args: argparse.Namespace) -> tuple[Any, str | None]:
    """What answers: the home's, a head in a folder, or the base alone."""
    if args.home is not None:
        return _open_home(args, "lm-base")
    folder = args.head or args.base
    if folder is None:
        raise HeadError("a head or a base must be named, got neither; add --head DIR, --home DIR or --base DIR.")
    from client.runtime.generation import open_generator  # loads onnxruntime, which no other command needs

    return open_generator(folder, base=args.base if args.head else None), None


def _check_encoding(texts: Sequence[str]) -> None:
    if any(0xD800 <= ord(character) <= 0xDFFF for text in texts for character in text):
        raise HeadError("a text must be UTF-8, got bytes that are not; check the terminal's encoding.")


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise HeadError(f"--file must name a readable text file, got {path}: {reason}.") from None
