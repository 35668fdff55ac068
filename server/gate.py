"""Checks on one reply before anything is done with it: a bad one loses that device only, never the round."""

import numpy as np
from flwr.app import Message

from shared import wire
from shared.adapter import Arrays
from shared.policy import Policy

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
    refusal = wire.refusal_code(message)
    if refusal is not None:
        raise RejectedReply(refusal)
    if wire.take_stamp(message.content) != accept_seeded:
        raise RejectedReply("SEEDED")
    try:
        update, replied_round, replied_policy = wire.unpack_reply(message.content, policy.array_slots())
    except wire.MalformedError as malformed:
        raise RejectedReply(malformed.code) from None
    if replied_round != round_number:
        raise RejectedReply("ROUND")
    if replied_policy != policy_sha256:
        raise RejectedReply("POLICY")
    norm = float(np.sqrt(sum(np.sum(np.square(array, dtype=np.float64)) for array in update.values())))
    if not norm <= policy.max_update_norm * _ROUNDING:
        raise RejectedReply("NORM")
    return update
