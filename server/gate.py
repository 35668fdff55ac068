"""Checks on one reply before anything is done with it: a bad one loses that device only, never the round."""

from collections.abc import Callable
from typing import TypeVar

import numpy as np
from flwr.app import Message, RecordDict

from shared.heads.adapter import Arrays
from shared.privacy.policy import Policy
from shared.protocol import wire

_T = TypeVar("_T")
_ROUNDING = 1.001  # a device computes its norm in float32


class RejectedReply(Exception):  # noqa: N818 - an outcome, not an error
    """A reply that is not used; ``code`` is counted in the report."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def check_reply(
    message: Message, *, policy: Policy, policy_sha256: str, round_number: int, accept_seeded: bool = False
) -> Arrays:
    """The update of a reply that is exactly what the policy allows.

    Args:
        message: A reply of any content whatsoever.
        policy: The campaign's policy.
        policy_sha256: Its hash, computed once.
        round_number: The round being collected.
        accept_seeded: For tests: take replies that are marked as seeded, and no others.

    Raises:
        RejectedReply: With the device's own refusal code, or ``SEEDED`` (noise that can be foreseen), ``SCHEMA``,
            ``KEYS``, ``ARRAY``, ``NOT_FINITE``, ``ROUND``, ``POLICY``, ``NORM``.
    """
    update = _echoed(
        message,
        lambda content: wire.unpack_reply(content, policy.reply_slots(round_number)),
        policy_sha256=policy_sha256,
        round_number=round_number,
        accept_seeded=accept_seeded,
    )
    if policy.trust == "distributed":  # masked or noised: the devices check its length, nobody else can
        return update
    norm = float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in update.values())))
    if policy.trust == "central":
        norm *= policy.grid or np.nan
    if not norm <= policy.max_update_norm * _ROUNDING:
        raise RejectedReply("NORM")
    return update


def check_stage(message: Message, *, policy_sha256: str, round_number: int, accept_seeded: bool = False) -> bytes:
    """The body of an answer in a stage of a secure sum that is not training; as ``check_reply``.

    Raises:
        RejectedReply: As of ``check_reply``.
    """
    return _echoed(
        message,
        wire.unpack_stage,
        policy_sha256=policy_sha256,
        round_number=round_number,
        accept_seeded=accept_seeded,
    )


def _echoed(
    message: Message,
    unpack: Callable[[RecordDict], tuple[_T, int, str]],
    *,
    policy_sha256: str,
    round_number: int,
    accept_seeded: bool,
) -> _T:
    """What an answer brings that is well formed and of this round and policy."""
    refusal = wire.refusal_code(message)
    if refusal is not None:
        raise RejectedReply(refusal)
    if wire.take_stamp(message.content) != accept_seeded:
        raise RejectedReply("SEEDED")
    try:
        brought, replied_round, replied_policy = unpack(message.content)
    except wire.MalformedError as malformed:
        raise RejectedReply(malformed.code) from None
    if replied_round != round_number:
        raise RejectedReply("ROUND")
    if replied_policy != policy_sha256:
        raise RejectedReply("POLICY")
    return brought
