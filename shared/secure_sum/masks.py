"""Keys, parcels and masks of a secure sum: X25519, HKDF-SHA256, ChaCha20-Poly1305 and the ChaCha20 stream."""

from typing import TypeAlias

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from shared.errors import SecureSumError
from shared.secure_sum.messages import Advert
from shared.secure_sum.strict_bytes import pack_number

Words: TypeAlias = NDArray[np.uint32]

NONCE_BYTES = 12
_TAG_BYTES = 16


def stream(key: bytes, count: int) -> Words:
    """The first words of the ChaCha20 key stream.

    Args:
        key: 32 bytes, used for nothing else.
        count: Number of words.

    Returns:
        (count,) uint32: the stream's bytes, little-endian.

    Source:
        RFC 8439, section 2.4, nonce and counter zero.
    """
    encryptor = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * count)), dtype="<u4").astype(np.uint32, copy=False)


def load_key(private: bytes) -> X25519PrivateKey:
    """A private key of 32 bytes, loaded once for many neighbours: loading costs as much as an agreement."""
    return X25519PrivateKey.from_private_bytes(private)


def public_bytes(private: X25519PrivateKey) -> bytes:
    """Its public key, 32 bytes."""
    return private.public_key().public_bytes_raw()


def derive(secret: bytes, *, purpose: bytes, context: bytes) -> bytes:
    """A key of 32 bytes for one purpose in one sum.

    Args:
        secret: 32 bytes that only the parties know.
        purpose: What the key is for, and whose it is; no purpose may be the beginning of another.
        context: ``Setting.context``.

    Source:
        RFC 5869 with SHA-256, no salt, info = label, context, purpose.
    """
    return HKDF(SHA256(), 32, salt=None, info=b"sottovoce secure sum 1 key" + context + purpose).derive(secret)


def own_mask(seed: bytes, *, seat: int, context: bytes, count: int) -> Words:
    """The mask a device shares with nobody: (count,) uint32."""
    return stream(derive(seed, purpose=b"own mask" + pack_number(seat), context=context), count)


def pair_mask(private: X25519PrivateKey, own: Advert, other: Advert, *, context: bytes, count: int) -> Words:
    """The mask two devices share: added by the one with the lower seat, subtracted by the other.

    Args:
        private: The private key of ``own.mask_key``.
        own: Either of the two.
        other: The other.
        context: ``Setting.context``.
        count: Number of coordinates.

    Returns:
        (count,) uint32, the same for both.

    Raises:
        SecureSumError: The other's key gives no shared secret (``ROSTER``).
    """
    low, high = sorted((own, other), key=lambda advert: advert.seat)
    whose = pack_number(low.seat) + pack_number(high.seat) + low.mask_key + high.mask_key
    key = derive(_agree(private, other.mask_key), purpose=b"pair mask" + whose, context=context)
    return stream(key, count)


def seal(
    content: bytes, private: X25519PrivateKey, *, sender: Advert, receiver: Advert, context: bytes, nonce: bytes
) -> bytes:
    """Encrypt shares for one receiver.

    Args:
        content: The shares.
        private: The private key of ``sender.cipher_key``.
        sender: Whose shares they are.
        receiver: Who alone can read them.
        context: ``Setting.context``.
        nonce: 12 bytes from an entropy source.

    Returns:
        Nonce, ciphertext and tag; 28 bytes more than the content.

    Raises:
        SecureSumError: The receiver's key gives no shared secret (``ROSTER``).
    """
    key = _parcel_key(_agree(private, receiver.cipher_key), sender, receiver, context)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, _associated(sender, receiver, context))


def unseal(parcel: bytes, private: X25519PrivateKey, *, sender: Advert, receiver: Advert, context: bytes) -> bytes:
    """Decrypt what ``seal`` made.

    Args:
        parcel: Nonce, ciphertext and tag.
        private: The private key of ``receiver.cipher_key``.
        sender: Who made it.
        receiver: For whom.
        context: ``Setting.context``.

    Returns:
        The shares.

    Raises:
        SecureSumError: It is not from this sender for this receiver in this sum (``PARCELS``).
    """
    key = _parcel_key(_agree(private, sender.cipher_key), sender, receiver, context)
    nonce, ciphertext = parcel[:NONCE_BYTES], parcel[NONCE_BYTES:]
    if len(ciphertext) >= _TAG_BYTES:
        try:
            return ChaCha20Poly1305(key).decrypt(nonce, ciphertext, _associated(sender, receiver, context))
        except InvalidTag:
            pass
    raise SecureSumError(
        f"a parcel of seat {sender.seat} must be for this device and this sum, it is not; it takes no part.",
        code="PARCELS",
    )


def _agree(private: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise SecureSumError("a key must be a point of large order, one is not; leave it out.", code="ROSTER") from None


def _parcel_key(secret: bytes, sender: Advert, receiver: Advert, context: bytes) -> bytes:
    whose = pack_number(sender.seat) + pack_number(receiver.seat) + sender.cipher_key + receiver.cipher_key
    return derive(secret, purpose=b"parcel" + whose, context=context)


def _associated(sender: Advert, receiver: Advert, context: bytes) -> bytes:
    return context + pack_number(sender.seat) + pack_number(receiver.seat)
