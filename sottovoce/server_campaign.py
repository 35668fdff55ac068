"""Put a campaign on a server: calibrated from a scenario, signed by the operator, added to the invitation."""

import os
import shutil
from typing import TYPE_CHECKING

from server.folder import add_invitation
from shared.errors import ServerError
from shared.files import flush_folder
from shared.protocol.signing import fingerprint, load_private
from simulations.publish import describe, lines, publish, sign_campaign

if TYPE_CHECKING:
    from server.folder import ServerFolder
    from shared.config import Scenario


def add_campaign(server: "ServerFolder", scenario: "Scenario", *, clients: int | None, quiet: bool) -> list[str]:
    """Publish a scenario in a server's folder and sign it; returns what a reader should know of it.

    Args:
        server: Where, and with whose key.
        scenario: Its name is the campaign's.
        clients: Size of the roster; by default the number of users of the scenario's data set.
        quiet: No progress.

    Raises:
        SottovoceError: The server has a campaign of this name, or the scenario makes none; nothing is left behind.

    Guarantee:
        A campaign among the server's is whole and signed.
    """
    place = server.campaigns / scenario.name
    if os.path.lexists(place):
        if not (server.invitation / "campaigns" / scenario.name).exists():  # cut off between the two
            return [f"invitation: campaign {scenario.name} added, {add_invitation(server, place)}"]
        raise ServerError(
            f"the server has a campaign {scenario.name!r} already, which is never replaced; "
            "give this one another name: --set name=NAME."
        )
    key = load_private(server.operator_key)
    staging = server.folder / f".{scenario.name}.new"  # beside the campaigns: no reader takes it for one
    shutil.rmtree(staging, ignore_errors=True)
    try:
        publish(scenario, out=staging, clients=clients, quiet=quiet)
        found = describe(sign_campaign(staging, key))
        staging.rename(place)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    flush_folder(place.parent)
    add_invitation(server, place)
    return [*lines(found), f"signed by key {fingerprint(key.public_key())}", f"campaign: {place.resolve()}"]
