"""What crosses the network: two messages, their fields, and the fixed codes of a refusal. Nothing else.

A request carries the shared arrays, the round and the policy's hash. A reply carries the (noised) change of the same
arrays and echoes round and policy. No counts, no losses, no free text (rule P2).
"""

import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from shared.adapter import Arrays, Slot

ARRAYS = "arrays"
CONFIG = "config"
REFUSAL = "refusal"

# Why a device did not train. The text behind a code stays on the device.
REFUSALS = (
    "NOT_A_SIMULATION",  # ledger and secure noise are not part of this version, so no real device trains
    "SCHEMA",  # a field is missing, unknown or of the wrong type
    "POLICY",  # the request names another policy
    "ROUND",  # the round is outside the campaign, or not after the last one taken part in
    "ARRAYS",  # names, shapes, bytes or values of the arrays
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


class MalformedError(ValueError):
    """A message that is not exactly what the policy allows; ``code`` says in what."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def named_policy(content: RecordDict) -> str:
    """Hash of the policy a message names; nothing else of it is looked at.

    Raises:
        MalformedError: ``SCHEMA``: it names none.
    """
    config = content.get(CONFIG)
    policy = config.get("policy") if isinstance(config, ConfigRecord) else None
    if type(policy) is not str:
        raise MalformedError("SCHEMA")
    return policy


def unpack(content: RecordDict, slots: Sequence[Slot]) -> tuple[Arrays, int, str]:
    """Arrays, round and policy hash of a request or a reply.

    Nothing a sender wrote is interpreted: an array must be, byte for byte, the header its slot implies and the right
    number of values after it, so that no claimed shape allocates memory and no other format is opened.

    Args:
        content: Anything.
        slots: The arrays the message must hold, in this order.

    Raises:
        MalformedError: ``SCHEMA`` (records or fields), ``KEYS`` (names or order), ``ARRAY`` (type, shape or bytes),
            ``NOT_FINITE``.
    """
    if set(content) != {ARRAYS, CONFIG}:
        raise MalformedError("SCHEMA")
    record, config = content[ARRAYS], content[CONFIG]
    if not isinstance(record, ArrayRecord) or not isinstance(config, ConfigRecord):
        raise MalformedError("SCHEMA")
    round_number, policy = config.get("round"), config.get("policy")
    if set(config) != {"round", "policy"} or type(round_number) is not int or type(policy) is not str:
        raise MalformedError("SCHEMA")
    if list(record) != [slot.name for slot in slots]:
        raise MalformedError("KEYS")
    arrays = {slot.name: _read(record[slot.name], slot) for slot in slots}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise MalformedError("NOT_FINITE")
    return arrays, round_number, policy


def _read(array: Array, slot: Slot) -> np.ndarray:
    """The values of one array whose bytes are those of its slot and nothing else."""
    dtype = np.dtype(slot.dtype).newbyteorder("<")
    buffer = io.BytesIO()
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": slot.shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    start, size = buffer.getvalue(), math.prod(slot.shape) * dtype.itemsize
    data = array.data
    if array.stype != "numpy.ndarray" or len(data) != len(start) + size or not data.startswith(start):
        raise MalformedError("ARRAY")
    return np.frombuffer(data, dtype, offset=len(start)).reshape(slot.shape).astype(slot.dtype)


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
