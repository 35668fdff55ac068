"""The commands ``sottovoce policy``: make, show, sign and verify what a campaign's server and devices share."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shared.config import Scenario

_EXAMPLES = """\
from a scenario to a signed campaign:
  sottovoce policy new simulations/scenarios/movielens.toml --out campaign --epsilon 4 --clients 5000
  sottovoce policy show campaign                         every constant, its price, what a device sends
  sottovoce policy key operator                          once: makes operator (keep it secret) and operator.pub
  sottovoce policy sign campaign --key operator
  sottovoce policy verify campaign --key operator.pub    what a device does before it takes part

A campaign is one folder: scenario.json, policy.json, start.safetensors, policy.sig. Nothing in it is secret or computed
from a user's data. Devices and server get the same folder; a device trusts it only under a key it knows from elsewhere.
"""

_NEW_EXAMPLE = """\
examples:
  sottovoce policy new simulations/scenarios/movielens.toml --out campaign --epsilon 4 --delta 1e-6 --clients 5000
  sottovoce policy new campaign.toml --out campaign --set privacy.unit=user --set privacy.trust=distributed

The first hides one record from everybody; the second all that a user contributes, from a server that keeps to the
protocol too. With privacy.trust=central the server sees every change without noise, and adds the noise itself.

The noise is calibrated so that all that may be seen of a device in the whole campaign keeps within epsilon and delta.
Of the scenario's data set only the public catalogue is read and, without --clients, how many users there are.
"""

_KEY_EXAMPLE = """\
example:
  sottovoce policy key operator

Whoever holds FILE can sign campaigns in your name: it is readable by you alone and has no passphrase. Give FILE.pub to
the owners of devices by a way nobody else controls, and let them compare the fingerprint.
"""

_VERIFY_EXAMPLE = """\
example:
  sottovoce policy verify campaign --key operator.pub

Checks the signature, that settings and start are the ones the policy names, that its constants give the epsilon it
states, and that its methods may be combined (rule P1). The base model is compared where it is loaded. Whatever fails is
named in one line, with exit code 2.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``policy`` and its actions; each sets ``handler``, a function of the parsed arguments."""
    parser = commands.add_parser(
        "policy",
        help="make, show, sign and verify what a campaign's server and devices share",
        description="Make, show, sign and verify the policy of a campaign: every constant its guarantee rests on.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_new(actions)
    show = actions.add_parser(
        "show",
        help="every constant in words and numbers, its price, its signature",
        description="Show a campaign: what it costs and sends, every constant, and epsilon after each round a device "
        "joins. The price is certified anew, whatever the policy states.",
        epilog="example: sottovoce policy show campaign",
    )
    _add_folder(show)
    show.add_argument("--json", action="store_true", help="print as JSON")
    show.set_defaults(handler=_show)
    key = actions.add_parser(
        "key",
        help="make an operator's key pair",
        description="Make the key pair of one who runs campaigns (Ed25519).",
        epilog=_KEY_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    key.add_argument("file", type=Path, metavar="FILE", help="of the private key; the public one is FILE.pub")
    key.set_defaults(handler=_key)
    sign = actions.add_parser(
        "sign",
        help="sign a campaign with an operator's key",
        description="Sign a campaign whose promise holds. An earlier signature is replaced.",
        epilog="example: sottovoce policy sign campaign --key operator",
    )
    _add_folder(sign)
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="the operator's private key")
    sign.set_defaults(handler=_sign)
    verify = actions.add_parser(
        "verify",
        help="check signature, files, price and methods of a campaign",
        description="Check a campaign as a device does before it takes part.",
        epilog=_VERIFY_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_folder(verify)
    verify.add_argument("--key", type=Path, required=True, metavar="PUB", help="the operator's public key (FILE.pub)")
    verify.set_defaults(handler=_verify)


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder of the campaign")


def _add_new(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "new",
        help="make the folder of a campaign from a scenario",
        description="Make the folder that the server and the devices of a campaign share, its noise calibrated from "
        "epsilon and delta, and say what it costs and what a device will send.",
        epilog=_NEW_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", type=Path, help="a scenario file (TOML)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    add_targets(parser)
    parser.set_defaults(handler=_new)


def add_targets(parser: argparse.ArgumentParser) -> None:
    """The options of whoever publishes a scenario: roster, privacy target, changes of settings."""
    parser.add_argument("--clients", type=int, metavar="N", help="size of the roster (default: users of the data set)")
    parser.add_argument("--epsilon", metavar="X", help="the same as --set privacy.epsilon=X")
    parser.add_argument("--delta", metavar="Y", help="the same as --set privacy.delta=Y")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="change one setting"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress")


def read_targets(options: argparse.Namespace) -> "Scenario":
    """The scenario with what the options of ``add_targets`` change in it."""
    from shared.config import load_scenario

    targets = {"privacy.epsilon": options.epsilon, "privacy.delta": options.delta}
    overrides = [*options.overrides, *(f"{key}={value}" for key, value in targets.items() if value is not None)]
    return load_scenario(options.scenario, tuple(overrides))


def _new(options: argparse.Namespace) -> int:
    scenario = read_targets(options)
    from simulations.publish import describe, lines, publish  # loads torch

    campaign = publish(scenario, out=options.out, clients=options.clients, quiet=options.quiet)
    print("\n".join([*lines(describe(campaign)), f"folder: {options.out.resolve()}"]))
    return 0


def _show(options: argparse.Namespace) -> int:
    from shared.protocol.campaign import read_campaign
    from simulations.publish import constant_lines, describe, lines

    found = describe(read_campaign(options.folder))
    print(json.dumps(found, indent=2) if options.json else "\n".join([*lines(found), *constant_lines(found)]))
    return 0


def _key(options: argparse.Namespace) -> int:
    from shared.protocol.signing import fingerprint, new_key, public_key_path

    public = new_key(options.file)
    print(f"private key: {options.file} (keep it secret)\npublic key: {public_key_path(options.file)}")
    print(f"fingerprint: {fingerprint(public)}")
    return 0


def _sign(options: argparse.Namespace) -> int:
    from shared.protocol.signing import fingerprint, load_private

    key = load_private(options.key)
    from simulations.publish import sign_campaign

    campaign = sign_campaign(options.folder, key)
    print(f"signed: policy {campaign.policy.sha256}\nby key {fingerprint(key.public_key())}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from shared.protocol.signing import fingerprint, load_public

    trusted = load_public(options.key)
    from shared.protocol.campaign import verify_campaign
    from simulations.publish import checked_lines

    campaign = verify_campaign(options.folder, trusted=trusted)
    print("\n".join([f"signed by key {fingerprint(trusted)}", *checked_lines(campaign)]))
    return 0
