"""The device's Flower ClientApp: check the request, spend, train, reply."""

import logging
import time
from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.device import Device, find_device, forget_workbenches
from client.log import describe_error, note
from client.train import train_shared
from shared import wire
from shared.adapter import within_bound
from shared.errors import CampaignError, LedgerError, PrivacyError, RefusedError, StoreError
from shared.flower import answer_seat
from shared.policy import Policy

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one request."""
    return answer(message, context)


def answer(message: Message, context: Context, *, find: Callable[[Context], Device] = find_device) -> Message:
    """Answer one request; whatever goes wrong leaves the device as a fixed code (rule P2).

    Args:
        message: Anything a server sends.
        context: Of the node.
        find: Whose device this is; a resident executor knows it without asking the context.
    """
    try:
        content = _train(message, find(context))
    except RefusedError as refusal:
        content = _refuse(refusal.code, refusal)
    except LedgerError as error:
        content = _refuse(error.code, error)
    except StoreError as error:
        content = _refuse("STORE", error)
    except (PrivacyError, CampaignError) as error:  # the policy does not give what it states, or not with what is here
        content = _refuse("POLICY", error)
    except Exception as error:  # rule P2: whatever it is, only a code may leave
        content = _refuse("INTERNAL", error)
    return Message(content, reply_to=message)


def _refuse(code: str, error: Exception) -> RecordDict:
    """Send a code; the log gets the error's type and place as well."""
    note("refused", level=logging.ERROR, code=code, **describe_error(error))
    return wire.pack_refusal(code)


def _train(message: Message, device: Device) -> RecordDict:
    """One round on one device; nothing of the owner's data is read before the round is spent (rule P4)."""
    with device.alone():
        campaign = device.accepted(_named_policy(message.content))
        policy = campaign.policy
        request = _check(message.content, policy)
        update = device.spend(campaign, request)
        if update is None:
            started = time.perf_counter()
            bench, features, targets = device.records(campaign)
            try:
                update = train_shared(
                    bench.module,
                    request.arrays,
                    features,
                    targets,
                    policy=policy,
                    micro_batch=device.micro_batch(campaign),
                    randomness=device.randomness(campaign, request.round_number),
                )
            except BaseException:
                forget_workbenches()  # the head may hold half a batch's gradients: the next device gets a new one
                raise
            bench.busy_s += time.perf_counter() - started
            device.release(campaign, request, update)
    reply = wire.pack_reply(update, round_number=request.round_number, policy_sha256=policy.sha256)
    if wire.reply_fields(reply) != policy.reply_fields:
        raise RefusedError("POLICY")
    return wire.stamp_seeded(reply) if device.foreseeable else reply


def _named_policy(content: RecordDict) -> str:
    try:
        return wire.named_policy(content)
    except wire.MalformedError:
        raise RefusedError("SCHEMA") from None


def _check(content: RecordDict, policy: Policy) -> wire.Request:
    """A request that agrees with the policy this device knows."""
    try:
        request = wire.unpack_request(content, policy.array_slots())
    except wire.MalformedError as malformed:
        raise RefusedError("SCHEMA" if malformed.code == "SCHEMA" else "ARRAYS") from None
    if not 1 <= request.round_number <= policy.rounds:
        raise RefusedError("ROUND")
    if not within_bound(request.arrays):
        raise RefusedError("ARRAYS")
    return request


@app.query("seat")
def seat(message: Message, context: Context) -> Message:
    """Tell a simulation's server which of its devices this is; a real device does not."""
    return answer_seat(message, context)
