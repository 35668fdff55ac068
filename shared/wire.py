"""What crosses the network: two messages, their fields, and the fixed codes of a refusal. Nothing else.

A request carries the shared arrays, the round and the policy's hash. A reply carries the (noised) change of the same
arrays and echoes round and policy. No counts, no losses, no free text (rule P2).
"""

from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from shared.adapter import Arrays

ARRAYS = "arrays"
CONFIG = "config"
REFUSAL = "refusal"

# Why a device did not train. The text behind a code stays on the device.
REFUSALS = (
    "NOT_A_SIMULATION",  # ledger and secure noise are not part of this version, so no real device trains
    "SCHEMA",  # a field is missing, unknown or of the wrong type
    "POLICY",  # the request names another policy
    "ROUND",  # the round is outside the campaign, or not after the last one taken part in
    "ARRAYS",  # names, shapes, dtypes or values of the arrays
    "BUDGET",  # max_participations is spent
    "NOT_FINITE",  # the noised state holds NaN or infinity
    "INTERNAL",  # anything else
)


def pack_request(arrays: Arrays, *, round_number: int, policy_sha256: str) -> RecordDict:
    """The server's request for one round of training."""
    return RecordDict({ARRAYS: _pack(arrays), CONFIG: _config(round_number, policy_sha256)})


def pack_reply(update: Arrays, *, round_number: int, policy_sha256: str) -> RecordDict:
    """A device's answer: the change of the shared arrays."""
    return pack_request(update, round_number=round_number, policy_sha256=policy_sha256)


def pack_refusal(code: str) -> RecordDict:
    """A device's answer when it did not train: one fixed code."""
    if code not in REFUSALS:
        code = "INTERNAL"
    return RecordDict({REFUSAL: ConfigRecord({"code": code})})


def unpack(content: RecordDict) -> tuple[dict[str, np.ndarray], int, str]:
    """Arrays, round and policy hash of a request or a reply.

    Raises:
        ValueError: A record or field is missing, unknown or of the wrong type, or an array is not a plain one.
    """
    if set(content) != {ARRAYS, CONFIG}:
        raise ValueError(f"a message must hold {ARRAYS} and {CONFIG}, got {sorted(content)}.")
    record, config = content[ARRAYS], content[CONFIG]
    if not isinstance(record, ArrayRecord) or not isinstance(config, ConfigRecord):
        raise ValueError("the records of a message must be one of arrays and one of settings.")
    if set(config) != {"round", "policy"}:
        raise ValueError(f"a message must name round and policy, got {sorted(config)}.")
    round_number, policy = config["round"], config["policy"]
    if type(round_number) is not int or type(policy) is not str:
        raise ValueError("round must be a whole number and policy a string.")
    return {name: array.numpy() for name, array in record.items()}, round_number, policy


def array_bytes(content: RecordDict) -> int:
    """Bytes of all arrays of a message as they travelled, before anything is decoded."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())


def refusal_code(message: Message) -> str | None:
    """The code of a refusal, ``ERROR`` for an error Flower made, None for a reply with content to check."""
    if message.has_error():
        return "ERROR"
    if set(message.content) != {REFUSAL}:
        return None
    record = message.content[REFUSAL]
    code = record.get("code") if isinstance(record, ConfigRecord) else None
    return code if isinstance(code, str) and code in REFUSALS else "INTERNAL"


def _pack(arrays: Mapping[str, np.ndarray]) -> ArrayRecord:
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})


def _config(round_number: int, policy_sha256: str) -> ConfigRecord:
    return ConfigRecord({"round": round_number, "policy": policy_sha256})
