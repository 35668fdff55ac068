"""Parsers of what an operator publishes, and of a server's own files when somebody altered them.

A hostile operator signs what they like: so the parts of a campaign are also made up together, hashed and signed anew.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from safetensors.numpy import save

from client.service.join import read_invitation
from server.aggregate import OptimizerState
from server.certificates import expiry, new_authority, new_certificate, renew_certificate
from server.checkpoint import Checkpoint, Counts, _hash_state, load_checkpoint, save_checkpoint
from server.folder import create_server, open_server
from server.register import REGISTER_FILE, enrol, read_register
from server.rounds import last_begun, read_rounds
from server.status import lines, status
from shared.card.card import check_card
from shared.config import load_scenario
from shared.files import read_json_lines
from shared.privacy.policy import hash_arrays, hash_settings, read_policy
from shared.privacy.promise import check_price
from shared.protocol.audits import read_audit
from shared.protocol.campaign import read_resumed, verify_campaign
from shared.protocol.signing import (
    check_signature_file,
    fingerprint,
    load_private,
    load_public,
    sign_policy,
    signature_file,
)
from simulations.fuzz.campaigns import SCENARIO, device_line, example, operator
from simulations.fuzz.parsers import Parser, Target, authentic, file_parser

_NOW = datetime(2030, 1, 1, tzinfo=UTC)

# What devices read of a campaign


def _scenario(folder: Path) -> Parser:
    example(folder)
    valid = (folder / "campaign" / "scenario.json").read_bytes()
    return file_parser(folder, "a.json", [valid], load_scenario)


def _scenario_toml(folder: Path) -> Parser:
    return file_parser(folder, "a.toml", [SCENARIO.read_bytes()], load_scenario)


def _override(folder: Path) -> Parser:
    del folder
    seeds = (b"privacy.epsilon=3", b'name="x"', b'adapter.targets=["a.b"]', b"privacy.trust=none")
    return Parser(seeds, lambda content: load_scenario(SCENARIO, (content.decode("utf-8", "surrogateescape"),)))


def _policy(folder: Path) -> Parser:
    """A policy, and whether its constants give the epsilon it states: whatever they are, within bounded time."""
    valid = (example(folder).folder / "policy.json").read_bytes()
    return Parser([valid], lambda content: check_price(read_policy(content.decode("utf-8", "replace"))))


def _campaign_file(name: str) -> Callable[[Path], Parser]:
    """One file of a campaign's folder, altered by somebody who has not the operator's key."""

    def opened(folder: Path) -> Parser:
        place = example(folder).folder
        trusted = operator().public_key()
        parser = file_parser(
            place, name, [(place / name).read_bytes()], lambda path: verify_campaign(path.parent, trusted=trusted)
        )
        return authentic(parser, value=lambda campaign: (campaign.policy, hash_arrays(campaign.start)))

    return opened


def _signed(folder: Path) -> Parser:
    """Policy, settings and start, made up together by an operator who then hashes and signs them."""
    campaign = example(folder)
    place = campaign.folder
    start = save({name: np.ascontiguousarray(array) for name, array in campaign.start.items()})
    start_sha256 = hash_arrays(campaign.start)
    valid = {name: json.loads((place / f"{name}.json").read_bytes()) for name in ("policy", "scenario")}

    def read(content: bytes) -> Any:
        said = _object(content)
        policy, scenario = said.get("policy"), said.get("scenario")
        (place / "scenario.json").write_text(json.dumps(scenario), encoding="utf-8")
        (place / "start.safetensors").write_bytes(start)
        if isinstance(policy, dict):
            policy |= {"start_sha256": start_sha256} | _settings_hash(place / "scenario.json")
        text = read_policy(json.dumps(policy)).model_dump_json(indent=2)
        (place / "policy.json").write_text(text + "\n", encoding="utf-8")
        sign_policy(place, operator())
        return verify_campaign(place, trusted=operator().public_key())

    return Parser([json.dumps(valid).encode()], read)


def _settings_hash(path: Path) -> dict[str, str]:
    return {"settings_sha256": hash_settings(load_scenario(path))}


def _object(content: bytes) -> dict[str, Any]:
    """What an edit made of a description; nothing where it is none."""
    try:
        said = json.loads(content)
        json.dumps(said)
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _resumed(folder: Path) -> Parser:
    valid = b'{"round": 3, "participations": {"0": 1, "7": 2}}'
    return file_parser(folder, "resumed.json", [valid], lambda path: read_resumed(path.parent))


def _signature(folder: Path) -> Parser:
    del folder
    content, trusted = b"a manifest", {fingerprint(operator().public_key())}
    valid = signature_file(operator(), purpose="adapter", content=content)

    def read(file: bytes) -> Any:
        return check_signature_file(file, purpose="adapter", content=content, trusted=trusted).public_bytes_raw()

    return authentic(Parser([valid], read))


def _operator_public(folder: Path) -> Parser:
    from shared.protocol.signing import _KEY_LABEL, _encode

    valid = f"{_KEY_LABEL} {_encode(operator().public_key().public_bytes_raw())}\n".encode()
    return file_parser(folder, "operator.pub", [valid], load_public)


def _operator_private(folder: Path) -> Parser:
    valid = operator().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def read(path: Path) -> Any:
        path.chmod(0o600)
        return load_private(path)

    return file_parser(folder, "operator", [valid], read)


# An invitation, and a server's own folder


@cache
def _server_files() -> Mapping[str, bytes]:
    """Certificates of a server; made once, they take a moment."""
    authority = new_authority()
    certificate = new_certificate(authority, "fl.example.org")
    return {"ca.crt": authority.certificate_pem, "ca.key": authority.key_pem, "server.crt": certificate.certificate_pem}


def _invitation(name: str) -> Callable[[Path], Parser]:
    def opened(folder: Path) -> Parser:
        files = {"server.json": b'{"address": "fl.example.org", "port": 9092}', "ca.crt": _server_files()["ca.crt"]}
        valid = files.pop(name)
        return file_parser(
            folder / "invitation",
            name,
            [valid],
            lambda path: read_invitation(str(path.parent), ca=None, home=path.parent),
            others=files,
        )

    return opened


def _server(name: str, read: Callable[[Path], Any]) -> Callable[[Path], Parser]:
    """One file of a server's folder."""

    def opened(folder: Path) -> Parser:
        server = create_server(folder / "server", address="fl.example.org")
        enrol(server.folder, device_line(), "kitchen", now=_NOW)
        path = server.folder / name
        mode = path.stat().st_mode & 0o777

        def call(changed: Path) -> Any:
            changed.chmod(mode)
            return read(server.folder)

        return file_parser(server.folder, name, [path.read_bytes()], call)

    return opened


def _live(folder: Path) -> Parser:
    server = create_server(folder / "server", address="fl.example.org")
    valid = {"pid": 1, "state": "waiting", "since": "2030-01-01T00:00:00+00:00", "requests": 3, "devices": {"0": True}}
    return file_parser(server.folder, "live.json", [json.dumps(valid).encode()], lambda _: lines(status(server)))


def _checkpoint(name: str, *, again: bool = False) -> Callable[[Path], Parser]:
    """A file of a checkpoint; ``again``: whoever altered it hashed it again."""

    def opened(folder: Path) -> Parser:
        arrays = {"output.bias": np.zeros(1, np.float32), "output.weight": np.ones((1, 6), np.float32)}
        first = {slot: array.astype(np.float64) for slot, array in arrays.items()}
        counts = Counts(2, {"NORM": 1}, 100, 200)
        optimizer = OptimizerState(dict.fromkeys(arrays, 1), first, first)
        saved = Checkpoint(
            round_number=3,
            policy_sha256="ab" * 32,
            arrays=arrays,
            optimizer=optimizer,
            participations={0: 1, 5: 2},
            answered={0: 1},
            latest=counts,
            total=counts,
            rolled_back_to=None,
        )
        place = save_checkpoint(folder, saved)
        files = {each: (place / each).read_bytes() for each in ("state.json", "tensors.safetensors")}

        def read(content: bytes) -> Any:
            written = files | {name: content}
            for each, what in written.items():
                (place / each).write_bytes(what)
            if again and (state := _object(written["state.json"])):
                state.pop("state_sha256", None)
                state["tensors_sha256"] = hashlib.sha256(written["tensors.safetensors"]).hexdigest()
                (place / "state.json").write_text(json.dumps(state | {"state_sha256": _hash_state(state)}))
            return load_checkpoint(place)

        return Parser([files[name]], read)

    return opened


def _rounds(folder: Path) -> Parser:
    line = {"round": 1, "after": 0, "time": "2030-01-01T00:00:00+00:00", "seconds": 2.5, "asked": 3, "accepted": 2}
    line |= {"rejected": {"NORM": 1}, "bytes_up": 10, "bytes_down": 20}
    line |= {"score": {"metric": "rmse", "value": 1.0, "records": 4, "holdout": "ab"}, "go": True, "why": None}
    valid = "".join(json.dumps(line | {"round": number}) + "\n" for number in (1, 2, 3)).encode()
    return file_parser(folder, "rounds.jsonl", [valid], lambda path: read_rounds(path.parent))


def _begun(folder: Path) -> Parser:
    from types import SimpleNamespace

    newest: Any = SimpleNamespace(round_number=2)
    return file_parser(folder, "begun.json", [b'{"round": 3}\n'], lambda path: last_begun(path.parent, newest))


def _journal(folder: Path) -> Parser:
    return file_parser(folder, "metrics.jsonl", [b'{"a": 1}\n{"b": [2]}\n'], read_json_lines)


# Audits and privacy cards


def _audit_of(policy: Any) -> dict[str, Any]:
    level = {
        "title": "two plays side by side",
        "passed": True,
        "epsilon_lower": None,
        "epsilon_audited": 2.0,
        "control_detected": True,
        "mutants_caught": ["no-noise"],
        "mutants_missed": [],
        "seconds": 1.5,
        "facts": {"plays": 3},
        "words": ["What was tried found nothing."],
    }
    row = {"epsilon": 2.0, "noise_multiplier": 2.0, "found": {"no noise": 0.9}, "power": True}
    table = {"bound": "one-run", "canaries": 1000, "guesses": 200, "delta": 1e-5, "confidence": 0.95, "trials": 100}
    table |= {"enough": 0.8, "releases": 1, "sampling_rate": 1.0, "rows": [row]}
    return {
        "schema": 1,
        "scenario": "movielens",
        "policy_sha256": policy.sha256,
        "settings_sha256": policy.settings_sha256,
        "unit": policy.unit,
        "trust": policy.trust,
        "epsilon_claimed": policy.epsilon,
        "delta": policy.delta,
        "level": "quick",
        "passed": True,
        "seed": 0,
        "after_round": 0,
        "created": "2030-05-01T13:00:00+00:00",
        "seconds": 4.5,
        "versions": {"sottovoce": "0"},
        "commit": None,
        "code_sha256": "0" * 64,
        "levels": {"L0": level},
        "power": {"one-run": table},
    }


def _audit(folder: Path) -> Parser:
    valid = json.dumps(_audit_of(example(folder).policy)).encode()
    return file_parser(folder, "audit.json", [valid], read_audit)


def _card(name: str) -> Callable[[Path], Parser]:
    """A file of a privacy card that somebody hands on."""

    def opened(folder: Path) -> Parser:
        from shared.card.card import make_card
        from simulations.card import folder_sources

        campaign = example(folder)
        audit = folder / "found.json"
        audit.write_text(json.dumps(_audit_of(campaign.policy)), encoding="utf-8")
        out = folder / "card"
        make_card(folder_sources(campaign.folder, experiment=False, audits=[audit]), out)
        return file_parser(out, name, [(out / name).read_bytes()], lambda _: check_card(out))

    return opened


OPERATORS: dict[str, Target] = {
    "scenario: JSON": Target("operator", "json", _scenario),
    "scenario: TOML": Target("anybody", "lines", _scenario_toml),
    "scenario: --set": Target("owner", "lines", _override),
    "policy and its price": Target("operator", "json", _policy),
    "campaign: policy.json": Target("operator", "json", _campaign_file("policy.json")),
    "campaign: scenario.json": Target("operator", "json", _campaign_file("scenario.json")),
    "campaign: start.safetensors": Target("operator", "framed", _campaign_file("start.safetensors")),
    "campaign: policy.sig": Target("operator", "json", _campaign_file("policy.sig")),
    "campaign: signed by a hostile operator": Target("operator", "tree", _signed),
    "campaign: resumed.json": Target("disk", "json", _resumed),
    "signature of a manifest": Target("operator", "json", _signature),
    "operator's public key": Target("operator", "pem", _operator_public),
    "operator's private key": Target("disk", "pem", _operator_private),
    "invitation: server.json": Target("operator", "json", _invitation("server.json")),
    "invitation: ca.crt": Target("operator", "pem", _invitation("ca.crt")),
    "server: server.json": Target("disk", "json", _server("server.json", open_server)),
    "server: devices.json": Target("disk", "json", _server(REGISTER_FILE, read_register)),
    "server: server.crt": Target("disk", "pem", _server("server.crt", lambda folder: expiry(open_server(folder)))),
    "server: ca.crt": Target("disk", "pem", _server("ca.crt", lambda folder: renew_certificate(open_server(folder)))),
    "server: keys/ca.key": Target(
        "disk", "pem", _server("keys/ca.key", lambda folder: renew_certificate(open_server(folder)))
    ),
    "server: live.json": Target("disk", "json", _live),
    "checkpoint: state.json": Target("disk", "json", _checkpoint("state.json")),
    "checkpoint: state.json, hashed again": Target("disk", "tree", _checkpoint("state.json", again=True)),
    "checkpoint: tensors.safetensors, hashed again": Target(
        "disk", "framed", _checkpoint("tensors.safetensors", again=True)
    ),
    "server: rounds.jsonl": Target("disk", "lines", _rounds),
    "server: begun.json": Target("disk", "json", _begun),
    "journal of a run": Target("disk", "lines", _journal),
    "audit.json": Target("anybody", "json", _audit),
    "card: privacy-card.json": Target("anybody", "json", _card("privacy-card.json")),
    "card: sources/policy.json": Target("anybody", "json", _card("sources/policy.json")),
    "card: sources/audit-1.json": Target("anybody", "json", _card("sources/audit-1.json")),
    "card: sources/made.json": Target("anybody", "json", _card("sources/made.json")),
}
