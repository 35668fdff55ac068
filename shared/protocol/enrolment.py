"""Whose messages a device believes: the operator certifies a device's key for one seat, the device signs with that key.

A device trusts the operator whose campaign its owner agreed to, and through the certificates the other devices of a
round. An operator who certifies keys of its own invention is out of reach of this (Sybils): see docs/threat-model.md.
"""

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key

from shared.errors import PrivacyError, SecureSumError
from shared.protocol.signing import fingerprint, sign, verify

_KEY_TYPES = ("ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521")
_PURPOSE = "enrolment"
_SIGNED = b"sottovoce device signature 1\0"
_MOST_SEATS = 2**31


def check_public_key(text: str) -> str:
    """The one spelling, without a comment, of a device's public key: ECDSA on a NIST curve, in OpenSSH's format.

    Raises:
        ValueError: It is none.
    """
    return _spell(_parse(text))


def certify_device(operator: Ed25519PrivateKey, *, seat: int, public_key: str) -> bytes:
    """The operator's statement that a seat is the device's with this key, and no other's.

    Args:
        operator: The key that signs the operator's campaigns.
        seat: Of the device, for ever.
        public_key: One OpenSSH line as ``check_public_key`` spells it.

    Returns:
        64 bytes; the same ones for the same arguments.

    Raises:
        ValueError: Seat or key is none.
    """
    return sign(operator, purpose=_PURPOSE, content=_statement(seat, public_key))


def check_certificate(operator: Ed25519PublicKey, *, seat: int, public_key: str, certificate: bytes) -> None:
    """Check what ``certify_device`` made.

    Raises:
        SecureSumError: ``ROSTER``: not this operator's, not for this seat and this key, or the key is spelled in
            another way than the one.

    Guarantee:
        A certificate holds for one seat and one key; nobody without the operator's private key makes one.
    """
    try:
        verify(operator, certificate, purpose=_PURPOSE, content=_statement(seat, public_key))
    except (PrivacyError, ValueError):
        raise SecureSumError(
            f"a device's key must be certified by operator {fingerprint(operator)} for its seat, that of seat {seat!r} "
            "is not; have the operator run: sottovoce server devices.",
            code="ROSTER",
        ) from None


def sign_as_device(key: ec.EllipticCurvePrivateKey, message: bytes) -> bytes:
    """A device's signature of a message, ECDSA with SHA-384; it is none of what Flower lets the same key sign."""
    return key.sign(_SIGNED + message, ec.ECDSA(SHA384()))


def check_device_signature(public_key: str, message: bytes, signature: bytes) -> None:
    """Check what ``sign_as_device`` made.

    Raises:
        SecureSumError: ``ROSTER``: not this key's signature of this message, or the key is none, or spelled in another
            way than the one.
    """
    try:
        _load(public_key).verify(signature, _SIGNED + message, ec.ECDSA(SHA384()))
    except (InvalidSignature, ValueError):
        raise SecureSumError(
            "a device's message must be signed by its key, in the one spelling of that key; it is not.", code="ROSTER"
        ) from None


def _statement(seat: int, public_key: str) -> bytes:
    if type(seat) is not int or not 0 <= seat < _MOST_SEATS:
        raise ValueError(f"a seat must be a whole number from 0 to {_MOST_SEATS - 1}, got {seat!r}.")
    _load(public_key)
    return f"{seat}\n{public_key}".encode()


def _load(public_key: str) -> ec.EllipticCurvePublicKey:
    key = _parse(public_key)
    if _spell(key) != public_key:
        raise ValueError("a device's key must be spelled without a comment, in the one canonical way.")
    return key


def _parse(text: str) -> ec.EllipticCurvePublicKey:
    words = text.split()
    if len(text.strip().splitlines()) != 1 or words[0] not in _KEY_TYPES:
        raise ValueError("it is no line 'ecdsa-sha2-nistp384 BASE64', as a device's .pub file holds")
    try:
        key = load_ssh_public_key(text.strip().encode())
    except (ValueError, UnsupportedAlgorithm, NotImplementedError):  # the last: a point that is compressed
        raise ValueError("its key is damaged") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ValueError("its key is not ECDSA on a NIST curve")
    return key


def _spell(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
