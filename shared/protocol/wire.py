"""What crosses the network: few messages, their fields, and the fixed codes of a refusal. Nothing else.

A request carries the shared arrays, the round, the policy's hash, and how many replies of this device the server has
used so far, which a device whose ledger was rolled back holds against its own count. A reply carries the (noised)
change of the same arrays and echoes round and policy. No counts, no losses, no free text (rule P2).

At unit user the reply's one array is a contribution to a sum, in integers. Where the sum is secure, three further
messages carry what hides it: their ``body`` is one of ``shared/secure_sum/messages.py``.
"""

import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from shared.heads.adapter import Arrays, Slot
from shared.protocol.refusal import REFUSAL as REFUSAL
from shared.protocol.refusal import REFUSALS as REFUSALS
from shared.protocol.refusal import pack_refusal as pack_refusal

ARRAYS = "arrays"
CONFIG = "config"
BODY = "body"
# The stages of a secure sum that are not training, as types of Flower's messages.
SECURE_KEYS, SECURE_SHARES, SECURE_UNMASK = "query.secure_keys", "query.secure_shares", "query.secure_unmask"
_NOISE, _SEEDED = "noise", "seeded"


@dataclass(frozen=True)
class Request:
    """What a server asks of one device in one round.

    Attributes:
        answered: Replies of this device the server has used in this campaign.
        body: With a secure sum: what the others sealed for this device.
    """

    arrays: Arrays
    round_number: int
    policy_sha256: str
    answered: int
    body: bytes = b""

    @property
    def sha256(self) -> str:
        """Hash of what decides the answer: arrays, round, policy and body."""
        digest = hashlib.sha256(f"{self.round_number}|{self.policy_sha256}|".encode())
        if self.body:
            digest.update(hashlib.sha256(self.body).digest())
        for name, array in self.arrays.items():
            digest.update(f"{name}|{array.shape}|".encode() + array.tobytes())
        return digest.hexdigest()


def pack_arrays(arrays: Arrays) -> ArrayRecord:
    """Arrays as Flower carries them."""
    return ArrayRecord({name: Array(np.ascontiguousarray(array)) for name, array in arrays.items()})


def pack_request(
    arrays: ArrayRecord, *, round_number: int, policy_sha256: str, answered: int = 0, body: bytes = b""
) -> RecordDict:
    """The server's request for one round of training; see ``Request``."""
    fields = ConfigRecord({"round": round_number, "policy": policy_sha256, "answered": answered})
    if body:
        fields[BODY] = body
    return RecordDict({ARRAYS: arrays, CONFIG: fields})


def pack_stage(body: bytes, *, round_number: int, policy_sha256: str) -> RecordDict:
    """A message, either way, of a secure sum's stage that is not training."""
    return RecordDict({CONFIG: ConfigRecord({"round": round_number, "policy": policy_sha256, BODY: body})})


def unpack_stage(content: RecordDict) -> tuple[bytes, int, str]:
    """Body, round and policy hash of such a message.

    Raises:
        MalformedError: ``SCHEMA``.
    """
    config = content.get(CONFIG)
    if set(content) != {CONFIG} or not isinstance(config, ConfigRecord):
        raise MalformedError("SCHEMA")
    if {name: type(value) for name, value in config.items()} != {"round": int, "policy": str, BODY: bytes}:
        raise MalformedError("SCHEMA")
    fields: dict[str, Any] = dict(config)
    return fields[BODY], fields["round"], fields["policy"]


def pack_reply(update: Arrays, *, round_number: int, policy_sha256: str) -> RecordDict:
    """A device's answer: the change of the shared arrays."""
    fields = ConfigRecord({"round": round_number, "policy": policy_sha256})
    return RecordDict({ARRAYS: pack_arrays(update), CONFIG: fields})


def stamp_seeded(reply: RecordDict) -> RecordDict:
    """Mark the reply of a device whose noise somebody could foresee; no policy allows the mark."""
    config = reply[CONFIG]
    if isinstance(config, ConfigRecord):
        config[_NOISE] = _SEEDED
    return reply


def take_stamp(content: RecordDict) -> bool:
    """Whether a reply is marked as ``stamp_seeded`` does; the mark is taken off."""
    config = content.get(CONFIG)
    if not isinstance(config, ConfigRecord) or config.get(_NOISE) != _SEEDED:
        return False
    del config[_NOISE]
    return True


def reply_fields(reply: RecordDict) -> tuple[str, ...]:
    """What a reply holds, as a policy names it: records, and the fields of each record but the arrays."""
    found = [
        [name] if isinstance(record, ArrayRecord) else [f"{name}.{field}" for field in record]
        for name, record in reply.items()
    ]
    return tuple(sorted(field for fields in found for field in fields))


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


def unpack_request(content: RecordDict, slots: Sequence[Slot]) -> Request:
    """A server's request.

    Nothing a sender wrote is interpreted: an array must be, byte for byte, the header its slot implies and the right
    number of values after it, so that no claimed shape allocates memory and no other format is opened.

    Args:
        content: Anything.
        slots: The arrays the message must hold, in this order.

    Raises:
        MalformedError: ``SCHEMA`` (records or fields), ``KEYS`` (names or order), ``ARRAY`` (type, shape or bytes),
            ``NOT_FINITE``.
    """
    record, config = _records(content, {"round": int, "policy": str, "answered": int}, optional={BODY: bytes})
    if config["answered"] < 0:
        raise MalformedError("SCHEMA")
    arrays = _arrays(record, slots)
    return Request(arrays, config["round"], config["policy"], config["answered"], config.get(BODY, b""))


def unpack_reply(content: RecordDict, slots: Sequence[Slot]) -> tuple[Arrays, int, str]:
    """Arrays, round and policy hash of a device's reply; as ``unpack_request``."""
    record, config = _records(content, {"round": int, "policy": str})
    return _arrays(record, slots), config["round"], config["policy"]


def _records(
    content: RecordDict, fields: Mapping[str, type], *, optional: Mapping[str, type] | None = None
) -> tuple[ArrayRecord, dict[str, Any]]:
    """The two records of a message that holds these fields, perhaps the optional ones, and nothing else."""
    if set(content) != {ARRAYS, CONFIG}:
        raise MalformedError("SCHEMA")
    record, config = content[ARRAYS], content[CONFIG]
    if not isinstance(record, ArrayRecord) or not isinstance(config, ConfigRecord):
        raise MalformedError("SCHEMA")
    types = {name: type(value) for name, value in config.items()}
    if types != dict(fields) | {name: kind for name, kind in (optional or {}).items() if name in types}:
        raise MalformedError("SCHEMA")
    return record, dict(config)


def _arrays(record: ArrayRecord, slots: Sequence[Slot]) -> Arrays:
    if list(record) != [slot.name for slot in slots]:
        raise MalformedError("KEYS")
    arrays = {slot.name: _read(record[slot.name], slot) for slot in slots}
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise MalformedError("NOT_FINITE")
    return arrays


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
