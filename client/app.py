"""The device's Flower ClientApp: check the request, spend, train, reply."""

import logging
import time
from functools import partial
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.site import accepted_campaign, open_site
from client.train import train_shared
from shared import wire
from shared.adapter import Arrays, within_bound
from shared.campaign import Campaign, read_resumed
from shared.errors import CampaignError, PrivacyError, RefusedError
from shared.flower import answer_seat, in_simulation
from shared.noise import seeded_generator
from shared.policy import Policy

app = ClientApp()
_log = logging.getLogger("sottovoce.client")
_STATE = "participation"


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one request; whatever goes wrong leaves the device as a fixed code (rule P2)."""
    try:
        content = _train(message, context)
    except RefusedError as refusal:
        content = wire.pack_refusal(refusal.code)
    except (PrivacyError, CampaignError):  # the policy does not give the epsilon it states, or not with what is here
        content = wire.pack_refusal("POLICY")
    except Exception as error:
        # An exception's text may quote a record: only its type and place are logged, only a code is sent.
        frame = error.__traceback__
        while frame and frame.tb_next:
            frame = frame.tb_next
        place = f"{frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}" if frame else "unknown place"
        open_site.cache_clear()  # the head may hold half a batch's gradients: the next device gets a new one
        _log.error("internal error %s at %s", type(error).__name__, place)
        content = wire.pack_refusal("INTERNAL")
    return Message(content, reply_to=message)


def _train(message: Message, context: Context) -> RecordDict:
    """One round on one device; nothing of the device's data is read before the round is spent (rule P4)."""
    if not in_simulation(context):
        # The ledger (P4) and cryptographic noise (P6) are not built yet: a real device refuses to train.
        raise RefusedError("NOT_A_SIMULATION")
    where = str(campaigns_folder(context)), _named_policy(message.content)
    campaign = accepted_campaign(*where)
    policy = campaign.policy
    arrays, round_number = _check(message.content, policy)
    _spend(context, round_number, campaign)
    site = open_site(*where)
    started = time.perf_counter()
    device = int(context.node_config["partition-id"])
    features, targets = site.shared_records(device)
    stream = partial(seeded_generator, seed=site.campaign.scenario.seed, device=device, round_number=round_number)
    name = site.campaign.scenario.name  # so that two campaigns of one seed share no noise
    update = train_shared(
        site.module,
        arrays,
        features,
        targets,
        policy=policy,
        micro_batch=site.campaign.scenario.performance.micro_batch,
        sampling=stream(purpose=f"sampling of {name}"),
        noise=stream(purpose=f"noise of {name}"),
    )
    site.busy_s += time.perf_counter() - started
    return wire.pack_reply(update, round_number=round_number, policy_sha256=policy.sha256)


def campaigns_folder(context: Context) -> Path:
    """Where this device finds the campaigns it may take part in."""
    config = context.run_config
    return Path(str(config["campaigns"])) if "campaigns" in config else Path(str(config["out"])) / "campaigns"


def _named_policy(content: RecordDict) -> str:
    try:
        return wire.named_policy(content)
    except wire.MalformedError:
        raise RefusedError("SCHEMA") from None


def _check(content: RecordDict, policy: Policy) -> tuple[Arrays, int]:
    """The arrays and round of a request that agrees with the policy this device knows."""
    try:
        arrays, round_number, _ = wire.unpack(content, policy.array_slots())
    except wire.MalformedError as malformed:
        raise RefusedError("SCHEMA" if malformed.code == "SCHEMA" else "ARRAYS") from None
    if not 1 <= round_number <= policy.rounds:
        raise RefusedError("ROUND")
    if not within_bound(arrays):
        raise RefusedError("ARRAYS")
    return arrays, round_number


def _spend(context: Context, round_number: int, campaign: Campaign) -> None:
    """Count this round against ``max_participations``; rounds only go forward, so none is answered twice."""
    key = f"{_STATE} {campaign.policy.sha256}"
    state = context.state.config_records.get(key) or _spent_before(context, campaign)
    count, last_round = (int(str(state[field])) for field in ("count", "last_round"))
    if round_number <= last_round:
        raise RefusedError("ROUND")
    if count >= campaign.policy.max_participations:
        raise RefusedError("BUDGET")
    context.state[key] = ConfigRecord({"count": count + 1, "last_round": round_number})


def _spent_before(context: Context, campaign: Campaign) -> ConfigRecord:
    """What a device had spent when its simulation was interrupted; nothing in a new one."""
    resumed = read_resumed(campaign.folder)
    if resumed is None:
        return ConfigRecord({"count": 0, "last_round": 0})
    count = resumed.participations.get(int(context.node_config["partition-id"]), 0)
    return ConfigRecord({"count": count, "last_round": resumed.round_number})


@app.query("seat")
def seat(message: Message, context: Context) -> Message:
    """Tell a simulation's server which of its devices this is; a real device does not."""
    return answer_seat(message, context)
