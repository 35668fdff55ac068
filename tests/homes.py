"""Owners' homes for tests: a signed campaign over the tiny base, homes that agreed to it, and requests to them."""

import shutil
from collections.abc import Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from types import SimpleNamespace

from flwr.app import Message

from client.app import app as client_app
from client.home.home import Home, create_home
from client.owner.consent import agree
from client.runtime.artifact import sign_folder
from client.training.site import resident_base, resident_dataset
from shared.config import load_scenario
from shared.flower.grid import InlineGrid
from shared.protocol import wire
from shared.protocol.campaign import Campaign, write_campaign
from shared.protocol.signing import load_private, load_public, new_key, sign_policy
from simulations.campaigns import plan_campaigns

UNTIL = date(2099, 1, 1)


def publish(scenario_path: Path, folder: Path, *, overrides: Sequence[str] = ()) -> SimpleNamespace:
    """Sign and publish the campaign of a scenario; returns ``campaign``, ``key`` (public) and ``private`` key path."""
    scenario = load_scenario(scenario_path, ("linear.enabled=false", *overrides))
    dataset = resident_dataset(scenario.data)
    planned = plan_campaigns(scenario, resident_base(scenario.model.base), dataset, quiet=True)[0]
    folder.mkdir(parents=True, exist_ok=True)
    campaign = write_campaign(folder / "campaign", planned.scenario, planned.policy, planned.start)
    private = folder / "operator.key"
    if not private.exists():
        new_key(private)
    sign_policy(campaign.folder, load_private(private))
    public = load_public(private.with_name(f"{private.name}.pub"))
    return SimpleNamespace(campaign=campaign, dataset=dataset, key=public, private=private)


def make_home(
    folder: Path,
    published: SimpleNamespace | None = None,
    *,
    user: int | None = 0,
    cap_epsilon: float = 20.0,
    keystore: str = "file",
) -> Home:
    """A home with the records of one user of the data set, and its owner's consent."""
    home = create_home(folder, keystore=keystore, cap_epsilon=cap_epsilon, cap_delta=1e-3, clock=clock)
    if published is not None:
        if user is not None:
            home.records().add(published.dataset.users[user].train)
        consent(home, published)
    return home


def sign_base(base: Path, published: SimpleNamespace, folder: Path) -> Path:
    """A copy of a fleet's base, signed by the operator of a campaign."""
    shutil.copytree(base, folder)
    sign_folder(folder, load_private(published.private))
    return folder


def clock() -> datetime:
    """A day in the life of these homes."""
    return datetime(2030, 5, 1, 12, tzinfo=UTC)


def consent(home: Home, published: SimpleNamespace) -> Campaign:
    """The owner agrees."""
    return agree(
        home,
        published.campaign.folder,
        operator=published.key,
        until=UNTIL,
        trust_server=published.campaign.policy.trust == "central",
    )


def grid_of(homes: Sequence[Path], *, client=client_app, run_config=None) -> InlineGrid:
    """A grid whose devices have these homes."""
    grid = InlineGrid(client, devices=len(homes), run_config=run_config or {})
    for context, home in zip(grid._contexts.values(), homes, strict=True):
        context.node_config.clear()
        context.node_config["home"] = str(home)
    return grid


def ask(home: Home | Path, campaign: Campaign, *, content=None, client=client_app, **changes):
    """What a device answers to a request that may be changed: its refusal code and the message."""
    arrays = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    request = {"round_number": 1, "policy_sha256": campaign.policy.sha256, "answered": 0}
    request |= changes
    arrays = request.pop("arrays", arrays)
    grid = grid_of([home.folder if isinstance(home, Home) else home], client=client)
    if content is None:
        content = wire.pack_request(wire.pack_arrays(arrays), **request)
    [reply] = grid.send_and_receive([Message(content, dst_node_id=1000, message_type="train")])
    return wire.refusal_code(reply), reply


def update_in(reply: Message, campaign: Campaign):
    """The arrays of a reply."""
    return wire.unpack_reply(reply.content, campaign.policy.array_slots())[0]
