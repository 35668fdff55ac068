"""The key by which others know a device, ECDSA P-384 in OpenSSH's formats, and the operator who says whose a key is.

    device.key   secret, readable by the owner alone
    device.pub   one line, for the operator, who enrols it

It says which device speaks, to the server and, in a secure sum, to the other devices. It is neither in the keystore nor
touched by ``forget``: no text is sealed with it, and the keys of a secure sum are made anew in every round.
"""

from pathlib import Path

from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from client.home.home import Home
from client.owner.owner import checked_ledger
from client.vault.private_files import disk_errors, write_private
from shared.errors import LedgerError, PrivacyError, StoreError
from shared.protocol.enrolment import sign_as_device
from shared.protocol.signing import fingerprint, signed_by
from shared.protocol.signing import policy_sha256 as policy_sha256_of

KEY, PUBLIC = "device.key", "device.pub"


def make_device_key(home: Path) -> str:
    """Make the device's key, or read the one that is there.

    Args:
        home: Folder of an owner's home.

    Returns:
        The public key as one OpenSSH line; also written to ``device.pub``.

    Raises:
        StoreError: The key that is there cannot be used, or the disk is full.
    """
    path = home / KEY
    with disk_errors(path):
        if path.exists():
            key = _read(path)
        else:
            key = ec.generate_private_key(ec.SECP384R1())
            write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
        line = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        public = home / PUBLIC
        if not public.exists() or public.read_text(encoding="utf-8").strip() != line:
            write_private(public, f"{line}\n".encode())
    return line


def sign(home: Path, message: bytes) -> bytes:
    """Sign a message as this device; ``shared.protocol.enrolment.check_device_signature`` checks it.

    Args:
        home: Folder of an owner's home.
        message: Says of itself what it is for.

    Raises:
        StoreError: There is no key, or it cannot be used.
    """
    path = home / KEY
    with disk_errors(path):
        return sign_as_device(_read(path), message)


def trusted_operator(home: Home, policy_sha256: str) -> Ed25519PublicKey:
    """The key of the operator whose campaign an owner agreed to: it certifies the devices that this one believes.

    Args:
        home: Its ledger keeps the fingerprint that the owner trusted, its copy of the campaign the key.
        policy_sha256: Of the campaign.

    Raises:
        LedgerError: The owner never agreed to it, or the ledger cannot be used.
        PrivacyError, CampaignError: The home's copy is gone or altered.
    """
    with checked_ledger(home) as ledger:
        trusted = {item.consent.operator for item in ledger.consents() if item.consent.policy == policy_sha256}
    folder = home.campaign_folder(policy_sha256)
    if not trusted:
        raise LedgerError(f"an owner must have agreed to policy {policy_sha256[:12]}, nobody did; see: client consent.")
    key = signed_by(folder)
    if key is None or fingerprint(key) not in trusted or policy_sha256_of(folder) != policy_sha256:
        raise PrivacyError(
            f"{folder} must hold the campaign as its operator signed it, it was altered; put it back with: sottovoce "
            "client consent."
        )
    return key


def _read(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm, NotImplementedError, InternalError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise StoreError(
            f"{path} must be an ECDSA P-384 key without a passphrase, it is not; put it back from a backup, or remove "
            "it, run sottovoce client join, and have the new device.pub enrolled."
        )
    path.chmod(0o600)
    return key
