"""A small signed campaign, made without a base model: what parsers of campaigns and requests begin with."""

from functools import cache
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from shared.config import Scenario, load_scenario
from shared.heads.adapter import Arrays, Slot
from shared.privacy.calibration import make_policy
from shared.privacy.policy import Policy
from shared.protocol.campaign import Campaign, read_campaign, write_campaign
from shared.protocol.signing import sign_policy

SCENARIO = Path(__file__).parent.parent / "scenarios" / "movielens.toml"
_CHANGES = (
    "federation.method=fedavg",
    "federation.cohort_size=20",
    "federation.rounds=2",
    "linear.enabled=false",
    "model.head_blocks=0",
    "privacy.delta=1e-4",
)


@cache
def operator() -> Ed25519PrivateKey:
    """Of the campaign; the same one always, for an input must mean the same again."""
    return Ed25519PrivateKey.from_private_bytes(b"a fuzzer's key, for no one else.")


@cache
def _made() -> tuple[Scenario, Policy, Arrays]:
    scenario = load_scenario(SCENARIO, _CHANGES)
    slots = (Slot("output.bias", (1,), "float32", "global"), Slot("output.weight", (1, 6), "float32", "global"))
    start = {slot.name: np.zeros(slot.shape, np.float32) for slot in slots}
    policy = make_policy(
        scenario,
        clients=100,
        head_blocks=0,
        slots=slots,
        base_sha256="ab" * 32,
        base_extension=None,
        start=start,
        public_texts=("a text", "another"),
    )
    return scenario, policy, start


def example(folder: Path) -> Campaign:
    """The campaign in ``folder/campaign``, signed by ``operator``."""
    place = folder / "campaign"
    if not place.exists():
        write_campaign(place, *_made())
        sign_policy(place, operator())
    return read_campaign(place)


@cache
def device_key() -> ec.EllipticCurvePrivateKey:
    """Of a device."""
    return ec.derive_private_key(12345, ec.SECP384R1())


def device_line() -> str:
    """Its public half, as an operator enrols it."""
    return device_key().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
