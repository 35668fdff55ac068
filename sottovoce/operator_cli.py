"""The operator's eyes and hand: ``server status`` and ``server rollback``."""

import argparse
import json

from sottovoce.server_place import add_server_folder, opened_server

_ROLLBACK_EXAMPLE = """\
example:
  sottovoce server status                    which round was the best?
  sottovoce server rollback 12               the next round goes on from the arrays of round 12
  sottovoce server run --holdout DIR --holdout-format csv

Devices never take a round number twice, so the next round has a new one; rounds are used up and nothing a device has
spent is given back. Nothing is deleted: going back to a later round undoes it. 0 is the public start.
"""


def add_status(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``status``."""
    parser = actions.add_parser(
        "status",
        help="rounds, replies, refusals, bytes, scores, cost, and which devices are there now",
        description="Show what is known of a server and its campaigns. No metric of a user is: devices send none.",
        epilog="example: sottovoce server status --json",
    )
    parser.add_argument("--json", action="store_true", help="print as JSON, every round included")
    add_server_folder(parser)
    parser.set_defaults(handler=_status)


def _status(options: argparse.Namespace) -> int:
    server = opened_server(options)
    from server.status import lines, status

    found = status(server)
    print(json.dumps(found, indent=2) if options.json else "\n".join(lines(found)))
    return 0


def add_rollback(actions: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``rollback``."""
    parser = actions.add_parser(
        "rollback",
        help="go back to the shared arrays of an earlier round",
        description="Make a campaign go on from the shared arrays of an earlier round. The server must not run.",
        epilog=_ROLLBACK_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("round", type=int, metavar="ROUND", help="the round; 0 is the public start")
    parser.add_argument("--campaign", metavar="NAME", help="where the server has several")
    add_server_folder(parser)
    parser.set_defaults(handler=_rollback)


def _rollback(options: argparse.Namespace) -> int:
    server = opened_server(options)
    from server.cost import campaign_cost, cost_lines
    from server.lock import alone
    from server.rollback import roll_back
    from sottovoce.server_run import find_campaign

    campaign = find_campaign(server, options.campaign)
    with alone(server):
        back = roll_back(campaign, options.round)
    left = campaign.policy.rounds - back.round_number
    print(
        f"{campaign.folder.name}: round {back.round_number + 1} will go on from "
        f"{f'round {options.round}' if options.round else 'the public start'}; rounds left: {left}"
        if left
        else f"{campaign.folder.name}: its arrays are those of round {options.round}; no round is left"
    )
    print("\n".join(cost_lines(campaign_cost(campaign, back))))
    return 0
