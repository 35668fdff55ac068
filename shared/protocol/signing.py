"""Ed25519 signatures: the keys of those who run campaigns, and the files that hold a signature.

A campaign's signature is the file ``policy.sig`` beside ``policy.json``, one JSON object:

schema      "sottovoce policy signature 1"; of a manifest, the word for its purpose instead of "policy"
key         the operator's public key, base64
signature   over the policy's canonical JSON (sorted keys, no spaces), whose SHA-256 is ``Policy.sha256``

The signature of a manifest covers its very bytes. The key in the file only tells which one was used; what counts is the
key that the caller trusts.
"""

import base64
import binascii
import hashlib
import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from cryptography.exceptions import InternalError, InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from shared.errors import CampaignError, PrivacyError
from shared.files import flush_folder, write_atomically

SIGNATURE_FILE = "policy.sig"
_PURPOSE = "policy"
_KEY_LABEL = "sottovoce-operator-ed25519"


def new_key(path: Path) -> Ed25519PublicKey:
    """Make an operator's key pair: the private key at ``path``, the public one beside it as ``<path>.pub``.

    Args:
        path: Of the private key, PKCS#8 PEM without a passphrase, readable by its owner only (mode 0600).

    Raises:
        PrivacyError: One of the two files exists; neither is touched.
        OSError: The folder cannot be written.
    """
    public_path = public_key_path(path)
    for taken in (path, public_path):
        if os.path.lexists(taken):
            raise PrivacyError(f"a new key must be a new file, {taken} exists; a key is never overwritten.")
    key = Ed25519PrivateKey.generate()
    _create(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), mode=0o600)
    try:
        _create(public_path, f"{_KEY_LABEL} {_encode(key.public_key().public_bytes_raw())}\n".encode(), mode=0o644)
    except BaseException:
        path.unlink()
        raise
    flush_folder(path.parent)
    return key.public_key()


def public_key_path(path: Path) -> Path:
    """Where the public half of the private key at ``path`` lies."""
    return path.with_name(f"{path.name}.pub")


def load_private(path: Path) -> Ed25519PrivateKey:
    """Read an operator's private key.

    Raises:
        PrivacyError: Unreadable, not an Ed25519 key, behind a passphrase, or readable by others than its owner.
    """
    try:
        mode, content = path.stat().st_mode & 0o777, path.read_bytes()
    except OSError as error:
        raise PrivacyError(f"the private key must be readable: {error.strerror} ({path}).") from None
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm, InternalError):  # the last: what OpenSSL has no word for
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise PrivacyError(f"{path} must be a private Ed25519 key; make one with: sottovoce policy key FILE.")
    if mode & 0o077:
        raise PrivacyError(f"{path} must be readable by its owner only, got mode {mode:o}; run: chmod 600 {path}.")
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """Read an operator's public key, one line ``sottovoce-operator-ed25519 BASE64``.

    Raises:
        PrivacyError: Unreadable, or not such a line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PrivacyError(f"the public key must be readable: {error.strerror} ({path}).") from None
    except UnicodeDecodeError:
        text = ""
    label, _, encoded = text.removesuffix("\n").partition(" ")
    try:
        if label == _KEY_LABEL:
            return Ed25519PublicKey.from_public_bytes(_decode(encoded))
    except ValueError:
        pass
    raise PrivacyError(f"{path} must be one line '{_KEY_LABEL} BASE64'; name the operator's file that ends in .pub.")


def fingerprint(public: Ed25519PublicKey) -> str:
    """Thirty-two hex digits that two people can compare by eye, such as ``3ccd 1f02 …``.

    Example:
        >>> fingerprint(Ed25519PublicKey.from_public_bytes(bytes(32)))
        '6668 7aad f862 bd77 6c8f c18b 8e9f 8e20'
    """
    digits = hashlib.sha256(public.public_bytes_raw()).hexdigest()[:32]
    return " ".join(digits[i : i + 4] for i in range(0, 32, 4))


def sign(key: Ed25519PrivateKey, *, purpose: str, content: bytes) -> bytes:
    """Sign content for one purpose; see ``verify``."""
    return key.sign(_message(purpose, content))


def verify(public: Ed25519PublicKey, signature: bytes, *, purpose: str, content: bytes) -> None:
    """Check a signature of ``sign``.

    Args:
        public: The key that must have made it.
        signature: 64 bytes.
        purpose: Lower-case word; a signature for one purpose is none for another.
        content: What must have been signed.

    Raises:
        PrivacyError: Not that key's signature of this content for this purpose.

    Source:
        RFC 8032 (Ed25519). The message is "sottovoce", purpose and "1" between blanks, a zero byte, then the content;
        a purpose holds no zero byte, so no content of one purpose is a message of another.
    """
    try:
        public.verify(signature, _message(purpose, content))
    except InvalidSignature:
        raise PrivacyError(
            f"a signature must be made by key {fingerprint(public)} over exactly this {purpose}; it is not. "
            "The signature, the key or what was signed has been altered."
        ) from None


def signature_file(key: Ed25519PrivateKey, *, purpose: str, content: bytes) -> bytes:
    """What a file holds that keeps the signature of some content; see ``check_signature_file``."""
    return _signature_file(key.public_key(), sign(key, purpose=purpose, content=content), purpose)


def _signature_file(public: Ed25519PublicKey, signature: bytes, purpose: str) -> bytes:
    file = {
        "schema": _schema(purpose),
        "key": _encode(public.public_bytes_raw()),
        "signature": _encode(signature),
    }
    return (json.dumps(file, indent=2) + "\n").encode()


def check_signature_file(file: bytes, *, purpose: str, content: bytes, trusted: Collection[str]) -> Ed25519PublicKey:
    """Check that one of the trusted keys signed content for one purpose.

    Args:
        file: As ``signature_file`` wrote it.
        purpose: What the content is signed as.
        content: The very bytes that were signed.
        trusted: Fingerprints of the keys that may have signed, known from elsewhere.

    Returns:
        The key that did.

    Raises:
        PrivacyError: The file is not such a signature, another key made it, or it is another content's.
    """
    try:
        key, signature = _parse_signature(file.decode("utf-8"), purpose)
        if file != _signature_file(key, signature, purpose):
            raise ValueError("it is spelled otherwise")
    except ValueError as error:
        raise PrivacyError(f"a signature must be a file as sottovoce writes it, got another: {error}.") from None
    if fingerprint(key) not in trusted:
        known = " or ".join(sorted(trusted)) or "none"
        raise PrivacyError(f"{purpose} must be signed by the trusted key {known}, got one by {fingerprint(key)}.")
    verify(key, signature, purpose=purpose, content=content)
    return key


def policy_sha256(folder: Path) -> str:
    """SHA-256 of what a signature of a folder's policy covers: ``Policy.sha256``, where the file is as we write it.

    Raises:
        CampaignError: The folder holds no policy, or one that two readers may understand differently.
    """
    return hashlib.sha256(_canonical_policy(folder)).hexdigest()


def sign_policy(folder: Path, key: Ed25519PrivateKey) -> None:
    """Sign the policy of a campaign's folder; an earlier signature is replaced.

    Raises:
        CampaignError: The folder holds no policy.
    """
    content = signature_file(key, purpose=_PURPOSE, content=_canonical_policy(folder))
    write_atomically(folder / SIGNATURE_FILE, content)


def check_signature(folder: Path, *, trusted: Ed25519PublicKey) -> str:
    """Check that a trusted key signed the policy in a campaign's folder.

    Args:
        folder: Holds ``policy.json`` and ``policy.sig``.
        trusted: The operator's key, known from elsewhere than the folder.

    Returns:
        SHA-256 of the signed policy, to be compared with the ``Policy.sha256`` the caller holds.

    Raises:
        PrivacyError: There is no signature, it is not as this module writes it, another key made it, or it is another
            policy's.
        CampaignError: The folder holds no policy.
    """
    policy = _canonical_policy(folder)
    key, signature = _read_signature(folder)
    if key.public_bytes_raw() != trusted.public_bytes_raw():
        raise PrivacyError(
            f"{folder / SIGNATURE_FILE} must be made by the trusted key {fingerprint(trusted)}, got one by "
            f"{fingerprint(key)}; do not take part unless its operator confirms a new key."
        )
    verify(trusted, signature, purpose=_PURPOSE, content=policy)
    return hashlib.sha256(policy).hexdigest()


def signed_by(folder: Path) -> Ed25519PublicKey | None:
    """The key that validly signed a folder's policy, trusted or not; None where there is no signature.

    Raises:
        PrivacyError: There is a signature, but not of this policy.
        CampaignError: The folder holds no policy.
    """
    if not os.path.lexists(folder / SIGNATURE_FILE):
        return None
    key, _ = _read_signature(folder)
    check_signature(folder, trusted=key)
    return key


def _message(purpose: str, content: bytes) -> bytes:
    if not re.fullmatch(r"[a-z]+", purpose):
        raise ValueError(f"purpose must be a lower-case word, got {purpose!r}.")
    return b"sottovoce " + purpose.encode() + b" 1\0" + content


def _read_signature(folder: Path) -> tuple[Ed25519PublicKey, bytes]:
    path = folder / SIGNATURE_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PrivacyError(f"{folder} must hold the operator's signature {SIGNATURE_FILE}, got none.") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise PrivacyError(f"{path} must be a readable signature: {reason}.") from None
    try:
        return _parse_signature(text, _PURPOSE)
    except ValueError as error:
        raise PrivacyError(f"{path} must be a signature as 'sottovoce policy sign' writes it: {error}.") from None


def _parse_signature(text: str, purpose: str) -> tuple[Ed25519PublicKey, bytes]:
    content = _load_object(text)
    if set(content) != {"schema", "key", "signature"} or content["schema"] != _schema(purpose):
        raise ValueError("it must hold exactly schema, key and signature of this version")
    return Ed25519PublicKey.from_public_bytes(_decode(content["key"])), _decode(content["signature"])


def _schema(purpose: str) -> str:
    return f"sottovoce {purpose} signature 1"


def _canonical_policy(folder: Path) -> bytes:
    path = folder / "policy.json"
    try:
        policy = _load_object(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CampaignError(f"{folder} must hold a campaign: {error.strerror} ({path}).") from None
    except ValueError as error:
        raise CampaignError(f"{path} must be a readable policy: {error}.") from None
    return json.dumps(policy, sort_keys=True, separators=(",", ":")).encode()


def _load_object(text: str) -> dict[str, Any]:
    """A JSON object that two readers cannot understand differently: no key twice, no NaN."""
    try:
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("it holds a key twice")
    return content


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


def _encode(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _decode(text: object) -> bytes:
    """The bytes of base64 in its one canonical spelling."""
    try:
        content = base64.b64decode(text if isinstance(text, str) else "?", validate=True)
    except binascii.Error:
        raise ValueError("it holds no base64") from None
    if _encode(content) != text:
        raise ValueError("it holds base64 that is not canonical")
    return content


def _create(path: Path, content: bytes, *, mode: int) -> None:
    """Write a file that must not exist yet; it never has wider permissions than ``mode``."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink()
        raise
