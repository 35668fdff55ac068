"""The key by which a server knows a device: ECDSA P-384, in OpenSSH's formats, as Flower's SuperNode wants it.

    device.key   secret, readable by the owner alone
    device.pub   one line, for the operator, who enrols it

It says which device speaks and protects no data: it is neither in the keystore nor touched by ``forget``.
"""

from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from client.private_files import disk_errors, write_private
from shared.errors import StoreError

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


def _read(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP384R1):
        raise StoreError(
            f"{path} must be an ECDSA P-384 key without a passphrase, it is not; put it back from a backup, or remove "
            "it, run sottovoce client join, and have the new device.pub enrolled."
        )
    path.chmod(0o600)
    return key
