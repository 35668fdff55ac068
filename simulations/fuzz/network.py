"""Parsers of what crosses a network: Flower's messages and their parts, the stages of a secure sum.

A message of Flower's is described in JSON, so that an edit changes what it says and not only its bytes.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from client.training.secure_sum import Participant
from server.gate import RejectedReply, check_reply, check_stage
from shared.errors import SecureSumError
from shared.flower import messages as flower_messages
from shared.flower.grid import InlineGrid
from shared.flower.messages import Coming, parts_of
from shared.protocol import wire
from shared.protocol.enrolment import (
    certify_device,
    check_certificate,
    check_device_signature,
    check_public_key,
    sign_as_device,
)
from shared.secure_sum import shamir
from shared.secure_sum.messages import Advert, Credential, Parcels, Roster, Setting, Shares, Survivors, Terms
from simulations.fuzz.campaigns import device_key, device_line, example
from simulations.fuzz.parsers import Parser, Target, TurnedAwayError, of_json

POLICY = "0" * 64
_SETTING = Setting(POLICY, 1, 8)
_TERMS = Terms(threshold=2, neighbours=3, min_survivors=2)


# Requests, replies and stages


def _described(content: RecordDict) -> dict[str, Any]:
    """Records as JSON."""
    found: dict[str, Any] = {}
    for name, record in content.items():
        if isinstance(record, ArrayRecord):
            found[name] = {
                key: [array.dtype, list(array.shape), array.stype, base64.b64encode(array.data).decode()]
                for key, array in record.items()
            }
        else:
            found[name] = {key: _plain(value) for key, value in record.items()}
    return found


def _plain(value: Any) -> Any:
    return {"bytes": base64.b64encode(value).decode()} if isinstance(value, bytes) else value


def _records(content: bytes) -> RecordDict:
    """Records of what an edit made of a description; what Flower itself would not carry is left out."""
    records = RecordDict()
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        return records
    for name, fields in said.items() if isinstance(said, dict) else ():
        if isinstance(fields, dict):
            arrays = any(isinstance(value, list) and len(value) == 4 for value in fields.values())
            kind = ArrayRecord if arrays else MetricRecord if name == "metrics" else ConfigRecord
            records[name] = kind()
            for key, value in fields.items():
                _put(records[name], key, value)
    return records


def _put(record: Any, key: str, value: Any) -> None:
    try:
        if isinstance(record, ArrayRecord):
            dtype, shape, stype, data = value
            record[key] = Array(dtype, tuple(shape), stype, base64.b64decode(data, validate=True))
        elif isinstance(value, dict):
            record[key] = base64.b64decode(value["bytes"], validate=True)
        else:
            record[key] = value
    except (TypeError, ValueError, KeyError):
        return


def _message(content: RecordDict) -> Message:
    _speak()
    return Message(content, dst_node_id=1, message_type="train", ttl=60.0)


@cache
def _speak() -> None:
    """A process must be somebody's in Flower before it makes a message."""
    InlineGrid(lambda message, context: message, devices=1, run_config={})


def _reply(folder: Path) -> Parser:
    policy = example(folder).policy
    arrays = {slot.name: np.full(slot.shape, 1e-6, slot.dtype) for slot in policy.reply_slots(1)}
    good = wire.pack_reply(arrays, round_number=1, policy_sha256=policy.sha256)

    def read(content: bytes) -> Any:
        message = _message(_records(content))
        return check_reply(message, policy=policy, policy_sha256=policy.sha256, round_number=1)

    return Parser([json.dumps(_described(good)).encode()], read)


def _request(folder: Path) -> Parser:
    campaign = example(folder)
    slots = campaign.policy.array_slots()
    arrays = wire.pack_arrays({slot.name: campaign.start[slot.name] for slot in slots})
    good = wire.pack_request(arrays, round_number=1, policy_sha256=campaign.policy.sha256, body=b"abc")

    def read(content: bytes) -> Any:
        records = _records(content)
        wire.named_policy(records)
        return wire.unpack_request(records, slots)

    return Parser([json.dumps(_described(good)).encode()], read)


def _stage(folder: Path) -> Parser:
    del folder
    good = wire.pack_stage(b"body", round_number=2, policy_sha256=POLICY)
    return Parser(
        [json.dumps(_described(good)).encode()],
        lambda content: check_stage(_message(_records(content)), policy_sha256=POLICY, round_number=2),
    )


# The parts of a message, each known by its hash


def _parts(folder: Path) -> Parser:
    del folder
    values = ArrayRecord({"a": Array(np.arange(40.0))})
    message = _message(RecordDict({"arrays": values, "config": ConfigRecord({"round": 3, "policy": POLICY})}))
    parts = parts_of(message)
    good = json.dumps(_part(message.object_id, parts)).encode()

    def read(said: Any) -> Any:
        made: dict[str, bytes] = {}
        root = _fold(said, made)
        coming = object.__new__(Coming)  # all of it is here
        vars(coming).update(metadata=message.metadata, _root=root, _parts=made, _missing=[], _most_bytes=2**20)
        vars(coming).update(_client=_NOBODY, _node=None)
        found = flower_messages._read(coming)
        return found if found is None or found.has_error() else wire.refusal_code(found)

    return Parser([good], of_json(read))


class _Nobody:
    """A Runtime API that takes leave of parts."""

    def ConfirmMessageReceived(self, request: Any) -> None:  # noqa: N802 - Flower's name
        del request


_NOBODY: Any = _Nobody()


def _part(name: str, parts: Mapping[str, bytes]) -> dict[str, Any]:
    head, _, body = parts[name].partition(b"\0")
    kind, listed, *_ = head.decode().split(" ")
    children, text = [child for child in listed.split(",") if child], body.decode("latin-1")
    for number, child in enumerate(children):
        text = text.replace(child, f"<{number}>")
    return {"kind": kind, "body": text, "children": [_part(child, parts) for child in children]}


def _fold(said: Any, made: dict[str, bytes]) -> str:
    """Bytes of a part and of all below it, each under its hash; what it says of its children goes by their numbers."""
    said = said if isinstance(said, dict) else {}
    children = said.get("children") if isinstance(said.get("children"), list) else []
    names = [_fold(child, made) for child in children[:50]]
    body = str(said.get("body", ""))
    for number, child in enumerate(names):
        body = body.replace(f"<{number}>", child)
    packed = body.encode("latin-1", "replace")
    content = f"{said.get('kind')} {','.join(names)} {len(packed)}".encode("utf-8", "replace") + b"\0" + packed
    name = hashlib.sha256(content).hexdigest()
    made[name] = content
    return name


# Secure sums


def _participants() -> tuple[list[Participant], Roster]:
    """Four devices that have advertised, without signatures that anybody checks, and their roster."""
    made = [
        Participant.begin(_SETTING, seat=seat, terms=_TERMS, sign=lambda _: b"signed", entropy=_entropy(seat))
        for seat in range(4)
    ]
    return made, Roster(tuple(range(4)), tuple((each.advert, Credential()) for each in made))


def _entropy(seat: int) -> Callable[[int], bytes]:
    draw = np.random.default_rng(seat)
    return lambda size: draw.bytes(size)


def _sum_message(kind: Any, valid: Callable[[], Any]) -> Callable[[Path], Parser]:
    def opened(folder: Path) -> Parser:
        del folder
        return Parser([valid().to_bytes()], kind.from_bytes, lambda message: bytes(message.to_bytes()))

    return opened


def _credential() -> Credential:
    return Credential(device_line(), b"c" * 64)


def _shared_roster(folder: Path) -> Parser:
    """A roster as a device takes it: read, checked, and the secrets shared among whoever is in it."""
    del folder
    valid = _participants()[1].to_bytes()

    def read(content: bytes) -> Any:
        return _participants()[0][0].share(Roster.from_bytes(content), verify=lambda *_: None)

    return Parser([valid], read)


def _masked_parcels(folder: Path) -> Parser:
    """Parcels as a device takes them: opened, and its vector masked."""
    del folder
    people, roster = _participants()
    sent = [person.share(roster, verify=lambda *_: None) for person in people]
    valid = Parcels(tuple((seat, dict(sent[seat].items)[0]) for seat in (1, 2, 3))).to_bytes()
    vector = np.arange(8, dtype=np.int64)

    def read(content: bytes) -> Any:
        person = _participants()[0][0]
        person.share(roster, verify=lambda *_: None)
        return person.mask(vector, Parcels.from_bytes(content))

    return Parser([valid], read)


def _unmasking(folder: Path) -> Parser:
    """A list of survivors as a device takes it: once, and only one that opens no more than the sum."""
    del folder
    people, roster = _participants()
    sent = [person.share(roster, verify=lambda *_: None) for person in people]
    mine = Parcels(tuple((seat, dict(sent[seat].items)[0]) for seat in (1, 2, 3)))

    def read(content: bytes) -> Any:
        person = _participants()[0][0]
        person.share(roster, verify=lambda *_: None)
        person.mask(np.zeros(8, np.int64), mine)
        return person.unmask(Survivors.from_bytes(content))

    return Parser([Survivors((0, 1, 2), (3,)).to_bytes()], read)


def _combined(folder: Path) -> Parser:
    """Shares of a secret as a server puts them together."""
    del folder
    split = shamir.split(b"s" * 32, seats=[0, 1, 2], threshold=2, entropy=_entropy(9))
    valid = Shares(tuple(sorted(split.items()))).to_bytes()

    def read(content: bytes) -> Any:
        shares = {seat: share for seat, share in Shares.from_bytes(content).items if shamir.is_share(share)}
        return shamir.join(shares, threshold=2)

    return Parser([valid], read)


def _public_key(folder: Path) -> Parser:
    del folder
    return Parser([device_line().encode()], lambda content: check_public_key(content.decode("utf-8", "replace")))


def _certificate(folder: Path) -> Parser:
    """A neighbour's credential and advert, in JSON, as a device checks them."""
    del folder
    operator, line = Ed25519PrivateKey.from_private_bytes(b"o" * 32), device_line()
    signed = sign_as_device(device_key(), b"said")
    certificate = certify_device(operator, seat=3, public_key=line)
    fields = {"seat": 3, "key": line, "certificate": certificate.hex(), "signature": signed.hex()}

    def read(said: Any) -> Any:
        found = {name: said.get(name) for name in fields} if isinstance(said, dict) else {}
        key, seat = str(found.get("key")), found.get("seat")
        seat = seat if type(seat) is int and 0 <= seat < 2**32 else 0
        check_certificate(operator.public_key(), seat=seat, public_key=key, certificate=_hex(found.get("certificate")))
        check_device_signature(key, b"said", _hex(found.get("signature")))

    return Parser([json.dumps(fields).encode()], of_json(read))


def _hex(text: Any) -> bytes:
    try:
        return bytes.fromhex(text)
    except (TypeError, ValueError):
        return str(text).encode("utf-8", "replace")


_MALFORMED = (wire.MalformedError, RejectedReply)
NETWORK: dict[str, Target] = {
    "reply at the gate": Target("device", "tree", _reply, _MALFORMED),
    "stage of a secure sum at the gate": Target("device", "tree", _stage, _MALFORMED),
    "request on a device": Target("server", "tree", _request, _MALFORMED),
    "parts of a message": Target("device", "tree", _parts, (TurnedAwayError,)),
    "secure sum: advert": Target("device", "bytes", _sum_message(Advert, lambda: _participants()[0][0].advert)),
    "secure sum: credential": Target("server", "bytes", _sum_message(Credential, _credential)),
    "secure sum: roster": Target("server", "bytes", _sum_message(Roster, lambda: _participants()[1])),
    "secure sum: parcels": Target("device", "bytes", _sum_message(Parcels, lambda: Parcels(((0, b"a"), (7, b"bc"))))),
    "secure sum: shares": Target("device", "bytes", _sum_message(Shares, lambda: Shares(((0, b"a"), (7, b"bc"))))),
    "secure sum: survivors": Target("server", "bytes", _sum_message(Survivors, lambda: Survivors((0, 2), (1, 9)))),
    "secure sum: a roster taken": Target("server", "bytes", _shared_roster),
    "secure sum: parcels opened": Target("server", "bytes", _masked_parcels),
    "secure sum: survivors answered": Target("server", "bytes", _unmasking),
    "secure sum: shares put together": Target("device", "bytes", _combined),
    "a device's public key": Target("device", "bytes", _public_key, (ValueError,)),
    "certificate and signature of a device": Target("server", "tree", _certificate, (SecureSumError, TurnedAwayError)),
}
