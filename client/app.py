"""The device's Flower ClientApp: check the request, spend, train, reply; and the stages of a secure sum around it."""

import logging
import time
from collections.abc import Callable

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.log import describe_error, note
from client.training.contribution import contribute
from client.training.device import Device, find_device, forget_workbenches
from client.training.round_state import keep_place, take_place
from client.training.secure_round import advertise, expect, mask, share, unmask
from client.training.train import train_shared
from shared.errors import CampaignError, LedgerError, PrivacyError, RefusedError, SecureSumError, StoreError
from shared.flower.grid import answer_seat
from shared.heads.adapter import Arrays, within_bound
from shared.privacy.noise import Randomness
from shared.privacy.policy import SUM, Policy
from shared.protocol import wire
from shared.protocol.campaign import Campaign

app = ClientApp()


@app.train()
@app.query("secure_keys")
@app.query("secure_shares")
@app.query("secure_unmask")
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
        handler = _HANDLERS.get(message.metadata.message_type)
        if handler is None:
            raise RefusedError("SCHEMA")
        content = handler(message, find(context))
    except RefusedError as refusal:
        content = _refuse(refusal.code, refusal)
    except SecureSumError as error:
        content = _refuse(_SECURE_SUM.get(error.code, error.code), error)
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
        if device.masks(campaign):
            expect(request, campaign, device)  # or nothing could hide what the round would cost
        update = device.spend(campaign, request)
        if update is None:
            started = time.perf_counter()
            bench, features, targets = device.records(campaign)
            randomness = device.randomness(campaign, request.round_number)
            try:
                state = take_place(bench, request, features, targets, device=device, randomness=randomness)
                update = train_shared(
                    bench.module,
                    request.arrays,
                    features,
                    targets,
                    policy=policy,
                    micro_batch=device.micro_batch(campaign),
                    randomness=randomness,
                    round_number=request.round_number,
                )
                keep_place(bench, request, state, device=device)
            except BaseException as error:
                forget_workbenches()  # the head may hold half a batch's gradients: the next device gets a new one
                if policy.unit != "user" or not device.hides_failures or not isinstance(error, Exception):
                    raise
                note("zeroed", level=logging.ERROR, round=request.round_number, **describe_error(error))
                changed = policy.turn_slots(request.round_number)
                update = {slot.name: np.zeros_like(request.arrays[slot.name]) for slot in changed}
            if policy.unit == "user" and policy.trust != "none":
                update = {SUM: _for_sum(update, request, campaign, device, randomness)}
            bench.busy_s += time.perf_counter() - started
            device.release(campaign, request, update)
    reply = wire.pack_reply(update, round_number=request.round_number, policy_sha256=policy.sha256)
    return _checked(reply, policy, device, without=_BODY)


def _for_sum(
    change: Arrays, request: wire.Request, campaign: Campaign, device: Device, randomness: Randomness
) -> np.ndarray:
    """A change as the server may see it: clipped, in integers, and under ``distributed`` noised and masked."""
    whole = contribute(change, policy=campaign.policy, randomness=randomness)
    if device.masks(campaign):
        return mask(whole, request, campaign, device)
    [slot] = campaign.policy.reply_slots(request.round_number)
    return whole.astype(slot.dtype)  # modulo 2^32 where a ring is wanted


def _checked(reply: RecordDict, policy: Policy, device: Device, *, without: tuple[str, ...]) -> RecordDict:
    """A reply that holds exactly what the policy names, but for the fields of a secure sum's other messages."""
    if wire.reply_fields(reply) != tuple(field for field in policy.reply_fields if field not in without):
        raise RefusedError("POLICY")
    return wire.stamp_seeded(reply) if device.foreseeable else reply


def _stage(step: Callable[[bytes, int, Campaign, Device], bytes]) -> Callable[[Message, Device], RecordDict]:
    """Answer a message of a secure sum's stage; no record is read for it."""

    def respond(message: Message, device: Device) -> RecordDict:
        try:
            body, round_number, policy_sha256 = wire.unpack_stage(message.content)
        except wire.MalformedError:
            raise RefusedError("SCHEMA") from None
        with device.alone():
            campaign = device.accepted(policy_sha256)
            if not device.masks(campaign):
                raise RefusedError("POLICY")
            answered = step(body, round_number, campaign, device)
        reply = wire.pack_stage(answered, round_number=round_number, policy_sha256=policy_sha256)
        return _checked(reply, campaign.policy, device, without=(wire.ARRAYS,))

    return respond


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


_HANDLERS = {
    "train": _train,
    wire.SECURE_KEYS: _stage(advertise),
    wire.SECURE_SHARES: _stage(share),
    wire.SECURE_UNMASK: _stage(unmask),
}
_BODY = (f"{wire.CONFIG}.{wire.BODY}",)
_SECURE_SUM = {"TOO_FEW": "ROSTER", "MALFORMED": "SCHEMA"}  # codes of its own that a server is told as others


@app.query("seat")
def seat(message: Message, context: Context) -> Message:
    """Tell a simulation's server which of its devices this is; a real device does not."""
    return answer_seat(message, context)
