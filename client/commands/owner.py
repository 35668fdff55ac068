"""The owner's commands in plain words: what they ask, what they say. What they do is in client/owner/owner.py."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

from client.commands import sources as source_cli
from client.home.attributes import read_profile, write_profile
from client.home.place import default_home, open_owner_home
from client.owner.words import (
    CAPS,
    LOST_WITH_DATA,
    forgotten_lines,
    history_lines,
    key_lines,
    loss_words,
    offer_lines,
    plain,
    status_lines,
)
from client.service.words import service_line
from shared.card.options import add_output
from shared.errors import DataError, LedgerError, StoreError

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

CAP_EPSILON, CAP_DELTA = 16.0, 1e-4
_MEASURES = {"max_abs": "the largest difference", "rel_rms": "root mean square, as a share of the values"}
_PLACES = """\
example:
  sottovoce client init --keystore os --cap-epsilon 16
  sottovoce client init --keystore os --source ~/reviews --format csv --columns text=review,target=stars
  sottovoce client init --keystore os --campaign campaigns/NAME --operator operator.pub --until 2027-06-30

os keeps the keys in the operating system's keyring, file in the home's own folder: whoever reads that folder then
reads your records too. Records, features and private heads are always encrypted.
"""
_ADD = """\
examples:
  sottovoce client add --format movielens-100k --source asset:ml-100k --user 1
  sottovoce client add --jsonl mine.jsonl

Of a published data set only the user's training rows are taken; rows for testing are left out. A line of a JSONL file
is {"text": "...", "target": 4, "response": "...", "item": "...", "timestamp": 0}; the last three may be missing. If
one line is wrong nothing is stored. An equal record is stored once: a record is the unit that noise hides.
"""
_CONSENT = """\
example:
  sottovoce client consent campaign --operator operator.pub --until 2027-06-30

The campaign's whole price is reserved at once and never given back. Get operator.pub by a way nobody else controls and
compare its fingerprint. A campaign of trust "central" shows the server your change without noise; to agree to that all
the same, add --trust-server.
"""
_PROFILE = """\
examples:
  sottovoce client profile --set gender=F --set age=25
  sottovoce client profile --clear

A campaign may have an output for each of some groups of users; which group is yours decides the campaign's settings,
from what is stated here. It is kept encrypted and never sent as such. Campaigns that hide users hide it; one that hides
single records does not: its server may see by your replies which group you are of.
"""


def add_parsers(commands: "Subparsers") -> None:
    """Register the owner's commands; each sets ``handler``, a function of the parsed arguments."""
    begin = _add(commands, "init", _init, "make a home: keys, ledger, encrypted store", _PLACES)
    begin.add_argument("--keystore", required=True, metavar="os|file", help="where the keys are kept")
    _add_caps(begin, defaults=True)
    source_cli.add_reading(begin)
    begin.add_argument(
        "--campaign", type=Path, metavar="DIR", help="agree to this campaign as well (see: client consent)"
    )
    begin.add_argument("--operator", type=Path, metavar="KEY.pub", help="with --campaign: the operator's public key")
    begin.add_argument("--until", metavar="YYYY-MM-DD", help="with --campaign: last day you agree to (UTC)")
    _add_trust(begin)
    _add_yes(begin)
    source = _add(commands, "source", source_cli.run, source_cli.SUMMARY, source_cli.EXAMPLES)
    source_cli.add_arguments(source)
    _add_json(source)
    add = _add(commands, "add", _add_records, "put your records into the encrypted store", _ADD)
    add.add_argument("--format", metavar="NAME", help="of a published data set (see: sottovoce list)")
    add.add_argument("--source", metavar="FOLDER|asset:NAME", help="where that data set lies")
    add.add_argument("--user", metavar="ID", help="whose records")
    add.add_argument("--jsonl", type=Path, metavar="FILE", help="instead: a file of one JSON object a line")
    consent = _add(commands, "consent", _consent, "agree to a campaign; shows what is asked first", _CONSENT)
    consent.add_argument("campaign", type=Path, metavar="DIR", help="folder of the campaign")
    consent.add_argument("--operator", type=Path, required=True, metavar="KEY.pub", help="the operator's public key")
    consent.add_argument("--until", required=True, metavar="YYYY-MM-DD", help="last day you agree to (UTC)")
    _add_trust(consent)
    _add_yes(consent)
    withdraw = _add(commands, "withdraw", _withdraw, "take back a consent, for ever; what was reserved stays reserved")
    withdraw.add_argument("policy", metavar="POLICY", help="first digits of the policy, as status shows them")
    status = _add(commands, "status", _status, "what was spent, what is left, where the keys are")
    _add_json(status)
    history = _add(commands, "history", _history, "what left the device: date, campaign, round, bytes, hash")
    _add_json(history)
    card = _add(commands, "card", _card, "the privacy card of a campaign: what is promised, spent, sent, not covered")
    card.add_argument("--campaign", metavar="POLICY", help="first digits of its policy (default: the only one)")
    add_output(card)
    stated = _add(commands, "profile", _profile, "what you state of yourself, for campaigns with personas", _PROFILE)
    stated.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="state this, and only this")
    stated.add_argument("--clear", action="store_true", help="state nothing any more")
    _add_json(stated)
    _add(commands, "pause", _pause, "take part in nothing until resume")
    _add(commands, "resume", _resume, "end a pause")
    forget = _add(commands, "forget", _forget, "delete keys, records, features, private heads; what was spent stays")
    forget.add_argument("--receipt", type=Path, metavar="FILE", help="a copy of the receipt, in a new file")
    _add_yes(forget)
    rollback = _add(commands, "rollback", _rollback, "go back to an earlier version of the private head")
    rollback.add_argument("--to", type=int, metavar="N", help="version (default: the one before the current)")
    recover = _add(commands, "recover", _recover, "go on after a ledger was lost, damaged or rolled back")
    _add_caps(recover, defaults=False)
    _add_yes(recover)
    personalize = _add(commands, "personalize", _personalize, "fit your private head on this device")
    personalize.add_argument("--base", type=Path, required=True, metavar="DIR", help="folder of the fleet's ONNX base")
    personalize.add_argument("--campaign", metavar="POLICY", help="first digits of its policy (default: the only one)")
    personalize.add_argument(
        "--valid-days", type=int, default=365, metavar="N", help="the head expires after so many days (default: 365)"
    )


def _add(
    commands: "Subparsers", name: str, handler: Callable[[argparse.Namespace], int], summary: str, epilog: str = ""
) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog or f"example: sottovoce client {name}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--home", type=Path, metavar="DIR", help=f"your home (default: {default_home()})")
    parser.set_defaults(handler=handler)
    return parser


def _add_caps(parser: argparse.ArgumentParser, *, defaults: bool) -> None:
    for name, default in (("--cap-epsilon", CAP_EPSILON), ("--cap-delta", CAP_DELTA)):
        known = {"default": default} if defaults else {"required": True}
        words = f"for all campaigns together, for ever (default: {default:g})" if defaults else "as it was at init"
        parser.add_argument(name, type=float, metavar="X", help=words, **known)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    words = "let the server see your change without noise, where a campaign asks for that (trust central)"
    parser.add_argument("--trust-server", action="store_true", help=words)


def _add_yes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="do not ask")


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print as JSON")


def _say(*lines: str) -> None:
    print("\n".join(lines))


def _confirm(question: str, *, yes: bool) -> None:
    """Go on only where the owner says so.

    Raises:
        StoreError: The owner does not, or there is no terminal to ask on.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise StoreError("without a terminal --yes must be given, it was not; nothing was changed.")
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise StoreError("it was not confirmed; nothing was changed.")


def _init(options: argparse.Namespace) -> int:
    from client.owner.device_key import PUBLIC, make_device_key
    from client.owner.owner import begin

    folder = options.home or default_home()
    given = [value is not None for value in (options.campaign, options.operator, options.until)]
    if any(given) and not all(given):
        raise LedgerError("to agree at once, --campaign, --operator and --until belong together; nothing was made.")
    source = source_cli.named(options.source, options)
    if source is not None:
        source.read()  # before a home is made
    home = begin(folder, keystore=options.keystore, cap_epsilon=options.cap_epsilon, cap_delta=options.cap_delta)
    _say(
        f"home: {plain(home.folder)}",
        *key_lines(home.keystore.name, weak=home.keystore.weak, detects=home.keystore.detects_rollback),
        f"caps: epsilon {options.cap_epsilon:g}, delta {options.cap_delta:g}. {CAPS}",
    )
    make_device_key(home.folder)
    _say(
        f"device key: {plain(home.folder / PUBLIC)}; to take part, give that file to an operator, who runs: "
        "sottovoce server enrol device.pub --name NAME",
    )
    if source is not None:
        _say(*source_cli.choose(home, source))
    return _consent(options) if options.campaign else 0


def _add_records(options: argparse.Namespace) -> int:
    from client.owner.owner import add
    from client.owner.reading import read_jsonl, read_published

    published = (options.format, options.source, options.user)
    if options.jsonl and not any(published):
        home, found = open_owner_home(options.home), read_jsonl(options.jsonl)
    elif all(published) and not options.jsonl:
        home, found = open_owner_home(options.home), read_published(*published)
    else:
        raise DataError("add needs --format, --source and --user, or else --jsonl; see --help. Nothing was stored.")
    done = add(home, found.records)
    _say(f"added {done.added} records; the home holds {done.total}, encrypted")
    if done.known:
        _say(f"left out {done.known} that are there already: an equal record counts once")
    if not options.jsonl:
        _say(f"only training rows are taken; {found.held_out} test rows of user {plain(options.user)} were left out")
    return 0


def _consent(options: argparse.Namespace) -> int:
    from client.owner.consent import agree, check_trust, examine_offer, put_back  # loads torch
    from shared.protocol.signing import load_public

    home, operator, until = open_owner_home(options.home), load_public(options.operator), _day(options.until)
    if put_back(home, options.campaign, operator=operator):
        _say("the home's copy of this campaign was gone and is put back; you had agreed, nothing more is reserved")
        return 0
    offer = examine_offer(home, options.campaign, operator=operator, until=until)
    _say(*offer_lines(offer))
    check_trust(offer, trust_server=options.trust_server)
    _confirm("Do you agree?", yes=options.yes)
    agree(
        home,
        options.campaign,
        operator=operator,
        until=until,
        shown=offer.policy,
        trust_server=options.trust_server,
    )
    _say(
        f"agreed. The price is reserved for good; take part no more with: sottovoce client withdraw {offer.policy[:12]}"
    )
    return 0


def _day(text: str) -> date:
    if re.fullmatch(r"\d{4}-\d{2}-\d{2}", text, re.ASCII):
        try:
            return date.fromisoformat(text)
        except ValueError:
            pass
    raise LedgerError(f"--until must be a day as YYYY-MM-DD, got {plain(text)!r}.")


def _withdraw(options: argparse.Namespace) -> int:
    from client.owner.owner import withdraw

    consent = withdraw(open_owner_home(options.home), options.policy).consent
    _say(
        f"withdrawn: {plain(consent.campaign)} ({consent.policy[:12]}) gets nothing more from this device, for ever",
        f"epsilon {consent.epsilon:g} and delta {consent.delta:g} stay reserved: what was sent cannot be called back",
    )
    return 0


def _status(options: argparse.Namespace) -> int:
    from client.owner.owner import status

    home = open_owner_home(options.home)
    found, service = status(home), service_line(home.folder)
    lines = [*status_lines(found), *([service] if service else [])]
    _say(json.dumps(found | {"service": service}, indent=2) if options.json else "\n".join(lines))
    if found["data"]["problem"]:
        print(f"sottovoce: {found['data']['problem']}", file=sys.stderr)
        return 2
    return source_cli.complain(found["source"])


def _history(options: argparse.Namespace) -> int:
    from client.owner.owner import history

    events = history(open_owner_home(options.home))
    _say(json.dumps(events, indent=2) if options.json else "\n".join(history_lines(events)))
    return 0


def _card(options: argparse.Namespace) -> int:
    from client.owner.card import run  # loads torch

    return run(options)


def _profile(args: argparse.Namespace) -> int:
    home = open_owner_home(args.home)
    if args.set or args.clear:
        pairs = [text.partition("=") for text in args.set]
        with home.lock():
            write_profile(home, {} if args.clear else {name.strip(): value.strip() for name, _, value in pairs})
    stated = read_profile(home)
    if args.json:
        print(json.dumps(stated, indent=2))
    else:
        print("\n".join(f"{plain(name)}: {plain(value)}" for name, value in stated.items()) or "nothing is stated")
    return 0


def _pause(options: argparse.Namespace) -> int:
    from client.owner.owner import set_paused

    set_paused(open_owner_home(options.home), True)
    _say("paused: nothing leaves the device until: sottovoce client resume")
    return 0


def _resume(options: argparse.Namespace) -> int:
    from client.owner.owner import set_paused

    set_paused(open_owner_home(options.home), False)
    _say("resumed: the device answers the campaigns you agreed to")
    return 0


def _forget(options: argparse.Namespace) -> int:
    from client.owner.forget import check_copy, describe_loss, forget

    home = open_owner_home(options.home)
    check_copy(options.receipt, home=home.folder)
    _say(f"files to be deleted for good: {loss_words(describe_loss(home))}", LOST_WITH_DATA)
    _confirm("Delete?", yes=options.yes)
    receipt = forget(home, copy_to=options.receipt)
    _say(*forgotten_lines(receipt), f"receipt: {home.folder / 'receipts' / receipt['written']['file']}")
    return 0


def _rollback(options: argparse.Namespace) -> int:
    from client.owner.owner import roll_back

    before, after = roll_back(open_owner_home(options.home), options.to)
    _say(f"private head: version {after} is current, it was {before}; none was deleted")
    return 0


def _recover(options: argparse.Namespace) -> int:
    from client.owner.owner import check_cap_values, recover

    home = open_owner_home(options.home)
    check_cap_values(options.cap_epsilon, options.cap_delta)
    if not options.yes:
        _say(
            "What is reserved becomes the larger of what ledger and keystore say; every campaign known is ended, and a",
            "campaign that was lost with the ledger asks for a new consent. Nothing that was spent is given back.",
        )
    _confirm("Recover?", yes=options.yes)
    found = recover(home, cap_epsilon=options.cap_epsilon, cap_delta=options.cap_delta)
    totals = found.totals
    _say(
        f"recovered: epsilon {totals.epsilon:g} of {totals.cap_epsilon:g} and delta {totals.delta:g} of "
        f"{totals.cap_delta:g} are reserved",
        *(f"ended: {plain(standing.consent.campaign)} ({standing.consent.policy[:12]})" for standing in found.ended),
    )
    if found.data_problem:
        _say(
            "your records cannot be read any more: a key of theirs was lost with the ledger's",
            "run: sottovoce client forget, then add them again",
        )
    return 0


def _personalize(options: argparse.Namespace) -> int:
    from client.export.private_head import personalize  # loads torch

    done = personalize(
        open_owner_home(options.home),
        base_folder=options.base,
        prefix=options.campaign,
        valid_days=options.valid_days,
    )
    _say(
        f"private head: version {done.version} is current, fitted to {done.records} records and "
        f"{done.shared}; it is encrypted and never leaves the device",
        f"ONNX Runtime and torch agree within {done.parity:.2g} ({_MEASURES[done.measure]})",
    )
    return 0
