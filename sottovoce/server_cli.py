"""The commands ``sottovoce server``: make a server, enrol and revoke devices, run, watch and roll back campaigns."""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from shared.errors import ServerError
from sottovoce.policy_cli import add_targets, read_targets
from sottovoce.server_place import add_server_folder, opened_server, server_folder

if TYPE_CHECKING:
    from server.folder import ServerFolder
    from server.register import Device

_EXAMPLES = """\
from nothing to a device that takes part:
  sottovoce server init campaign.toml --address fl.example.org --clients 500 --epsilon 4
  sottovoce server enrol device.pub --name kitchen       what the owner of a device hands over: HOME/device.pub
  sottovoce server run --holdout DIR --holdout-format csv   serves the campaign until it is done; or --no-holdout
  sottovoce server status

A server is one folder (--server DIR). Keep its keys/ secret; hand its invitation/ to the owners of devices.
"""

_INIT_EXAMPLE = """\
examples:
  sottovoce server init campaign.toml --address fl.example.org --clients 500 --epsilon 4 --delta 1e-6
  sottovoce server init another.toml                     on an existing server: adds that campaign
  sottovoce server init --renew                          a new server certificate from the same authority

The private keys are readable by you alone and have no passphrase. Renewing asks nothing of the devices.
"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``server`` and its actions; each sets ``handler``, a function of the parsed arguments."""
    parser = commands.add_parser(
        "server",
        help="run a federation: certificates, devices, campaigns",
        description="Run a federation of real devices: its certificates and keys, who may take part, its campaigns.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    _add_init(actions)
    _add_enrol(actions)
    _add_revoke(actions)
    _add_devices(actions)
    _add_run(actions)
    from sottovoce.base_cli import add_base
    from sottovoce.card_cli import add_server_card
    from sottovoce.fleet_cli import add_cost
    from sottovoce.operator_cli import add_rollback, add_status  # it takes the options of this module

    add_base(actions)
    add_status(actions)
    add_rollback(actions)
    add_server_card(actions)
    add_cost(actions)


def _add_init(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "init",
        help="make a server's folder, add a campaign to it, renew its certificate",
        description="Make a server: certificates for its address, the operator's signing key, an empty register of "
        "devices and, from a scenario, a signed campaign. On an existing server only add the campaign.",
        epilog=_INIT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenario", type=Path, nargs="?", metavar="CAMPAIGN.toml", help="a scenario file")
    parser.add_argument("--address", metavar="HOST", help="DNS name or IP address that devices call")
    parser.add_argument("--port", type=int, metavar="N", help="port that devices call (default 9092)")
    parser.add_argument("--renew", action="store_true", help="make a new server certificate from the same authority")
    add_server_folder(parser)
    add_targets(parser)
    parser.set_defaults(handler=_init)


def _init(options: argparse.Namespace) -> int:
    from server.folder import open_server

    folder = server_folder(options)
    exists = (folder / "server.json").exists()
    if not exists and (options.renew or options.address is None):
        needed = "there is none to renew" if options.renew else "--address must name the host that devices call"
        raise ServerError(f"{folder} holds no server yet: {needed}; example: sottovoce server init --address HOST.")
    scenario = read_targets(options) if options.scenario else None  # a mistake in it leaves nothing behind
    said = [] if exists else _create(folder, options)
    server = open_server(folder)
    _check_same(server, options)
    if options.renew:
        said += _renew(server)
    if scenario is not None:
        from sottovoce.server_campaign import add_campaign

        said += add_campaign(server, scenario, clients=options.clients, quiet=options.quiet)
    if not said:
        raise ServerError(f"{folder} holds a server already; name a scenario to add to it, or --renew its certificate.")
    print("\n".join([*said, *_next_steps(server)]))
    return 0


def _create(folder: Path, options: argparse.Namespace) -> list[str]:
    from server.folder import DEFAULT_PORT, create_server
    from shared.protocol.signing import fingerprint, load_public

    port = DEFAULT_PORT if options.port is None else options.port
    server = create_server(folder, address=options.address, port=port)
    return [
        f"server: {server.folder.resolve()}",
        f"address: {server.settings.address} port {server.settings.port}",
        f"operator's key: {fingerprint(load_public(server.operator_public))}",
    ]


def _check_same(server: "ServerFolder", options: argparse.Namespace) -> None:
    from server.folder import ServerSettings

    held = server.settings
    asked = held.model_dump() | {
        name: value for name in ("address", "port") if (value := getattr(options, name)) is not None
    }
    if ServerSettings(**asked) != held:
        raise ServerError(
            f"{server.folder} is the server {held.address}:{held.port}, which devices know; another address or port "
            "needs a server of its own (--server DIR)."
        )


def _renew(server: "ServerFolder") -> list[str]:
    from server.certificates import expiry, renew_certificate

    renew_certificate(server)
    return [f"certificate renewed, valid until {expiry(server):%Y-%m-%d}; restart sottovoce server run to use it"]


def _next_steps(server: "ServerFolder") -> list[str]:
    steps = ["next:", f"  hand {server.invitation.resolve()} to the owners of devices, by a way nobody else controls"]
    steps.append("  enrol each device: sottovoce server enrol DEVICE.pub --name NAME")
    if any(server.campaigns.iterdir()):
        return [*steps, "  start: sottovoce server run --holdout DIR --holdout-format NAME (or --no-holdout)"]
    return [*steps, "  add a campaign: sottovoce server init CAMPAIGN.toml"]


def _add_enrol(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "enrol",
        help="let a device take part",
        description="Enter a device in the register and certify its key for its seat, so that other devices believe "
        "it; a running server lets it in within seconds.",
        epilog="example: sottovoce server enrol device.pub --name kitchen",
    )
    parser.add_argument("public_key", metavar="DEVICE.pub", help="the device's public key: its file, or its line")
    parser.add_argument("--name", required=True, help="what you call it; never given twice")
    add_server_folder(parser)
    parser.set_defaults(handler=_enrol)


def _enrol(options: argparse.Namespace) -> int:
    from server.credentials import certify_devices
    from server.register import enrol, key_fingerprint

    server = opened_server(options)
    device = enrol(server.folder, options.public_key, options.name, now=datetime.now(UTC))
    certify_devices(server)
    print(f"enrolled {device.name}: seat {device.seat}, key {key_fingerprint(device.public_key)}")
    return 0


def _add_revoke(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "revoke",
        help="shut a device out, for ever",
        description="Shut a device out; a running server does so within seconds. Its key can never be enrolled again; "
        "what it sent in earlier rounds stays in the shared adapter.",
        epilog="example: sottovoce server revoke kitchen",
    )
    parser.add_argument("name", metavar="NAME", help="as it was enrolled")
    add_server_folder(parser)
    parser.set_defaults(handler=_revoke)


def _revoke(options: argparse.Namespace) -> int:
    from server.register import revoke

    device = revoke(opened_server(options).folder, options.name, now=datetime.now(UTC))
    print(f"revoked {device.name}: seat {device.seat} stays empty, its key is refused for ever")
    return 0


def _add_devices(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "devices",
        help="who may take part",
        description="List the register: seat, name, whether enrolled, certified or revoked, key.",
        epilog="example: sottovoce server devices",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    add_server_folder(parser)
    parser.set_defaults(handler=_devices)


def _devices(options: argparse.Namespace) -> int:
    from server.register import key_fingerprint, read_register

    devices = read_register(opened_server(options).folder)
    if options.json:
        print(json.dumps([device.model_dump(mode="json") for device in devices], indent=2))
        return 0
    for device in devices:
        print(f"{device.seat}  {device.name}  {_state(device)}  {key_fingerprint(device.public_key)}")
    if not devices:
        print("no device is enrolled; sottovoce server enrol DEVICE.pub --name NAME")
    return 0


def _state(device: "Device") -> str:
    if device.revoked:
        return f"revoked {device.revoked:%Y-%m-%d}"
    return "enrolled, certified" if device.certificate else "enrolled, not certified yet (server run does it)"


def _add_run(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = actions.add_parser(
        "run",
        help="serve a campaign to its end",
        description="Serve a campaign to enrolled devices, from where it was left, until its rounds are done. Outside "
        "this machine nothing is reached but what devices need. Stop it with Ctrl-C or SIGTERM; the same command goes "
        "on after the last finished round.",
        epilog="example: sottovoce server run campaign.toml --holdout asset:ml-100k --holdout-format movielens-100k",
    )
    parser.add_argument(
        "campaign", nargs="?", metavar="CAMPAIGN.toml|NAME", help="as it was published (default: the only one)"
    )
    parser.add_argument("--host", default="0.0.0.0", metavar="IP", help="where to listen (default: everywhere)")
    parser.add_argument("--holdout", metavar="FOLDER|asset:NAME", help="records of yours to score every round on")
    parser.add_argument("--no-holdout", action="store_true", help="serve blind: nobody sees whether a round did harm")
    parser.add_argument("--holdout-format", metavar="NAME", help="jsonl, csv, parquet, text, or a published format")
    parser.add_argument("--holdout-columns", default="", metavar="FIELD=COLUMN,...", help="as of client init --columns")
    parser.add_argument("--holdout-records", type=int, default=2000, metavar="N", help="at most (default: 2000)")
    parser.add_argument(
        "--tolerance", type=float, default=0.02, metavar="X",
        help="share of the best score that a score may be worse, two rounds running (default: 0.02)",
    )  # fmt: skip
    parser.add_argument("--no-stop", action="store_true", help="go on after a no-go")
    add_server_folder(parser)
    parser.set_defaults(handler=_run)


def _run(options: argparse.Namespace) -> int:
    from sottovoce.server_run import run

    return run(options)
