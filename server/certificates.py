"""The certificates of one server: its own authority, which devices trust and nobody else's, and what that signs."""

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256, SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from shared.errors import ServerError
from shared.files import write_atomically, write_private

if TYPE_CHECKING:
    from server.folder import ServerFolder

_AUTHORITY_LIFE = timedelta(days=3652)
_CERTIFICATE_LIFE = timedelta(days=730)
_SKEW = timedelta(days=1)  # of a device's clock
_MAX_COMMON_NAME = 64
# What a certificate says that is damaged, at once or when it is looked into.
_NOT_X509 = (ValueError, x509.InvalidVersion, x509.ExtensionNotFound, x509.DuplicateExtension)


@dataclass(frozen=True)
class Issued:
    """A certificate and its private key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def key_pem(self) -> bytes:
        """PKCS#8 without a passphrase."""
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def certificate_pem(self) -> bytes:
        """X.509."""
        return self.certificate.public_bytes(Encoding.PEM)


def new_authority(*, now: datetime | None = None) -> Issued:
    """An authority for one server: P-384, ten years, may sign no further authority.

    Source:
        RFC 5280 §4.2.1: basic constraints, key usage and key identifiers of an authority.
    """
    now = now or datetime.now(UTC)
    key = ec.generate_private_key(ec.SECP384R1())
    serial = x509.random_serial_number()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Sottovoce authority {serial % 2**32:08x}")])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), serial, now - _SKEW, now + _AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, SHA384())
    )
    return Issued(key, certificate)


def new_certificate(authority: Issued, address: str, *, now: datetime | None = None) -> Issued:
    """A server's certificate for its address, and for this machine itself, where the front calls the SuperLink.

    Args:
        authority: Who signs.
        address: DNS name or IP address, checked.
        now: The time; two years from here it ends, or with the authority.

    Raises:
        ServerError: The authority's own time is over.
    """
    now = now or datetime.now(UTC)
    end = min(now + _CERTIFICATE_LIFE, authority.certificate.not_valid_after_utc)
    if not end > now:
        raise ServerError(
            f"the server's authority must be valid, it ended {end:%Y-%m-%d}; make a new server and invite all devices."
        )
    key = ec.generate_private_key(ec.SECP384R1())
    common = address if len(address) <= _MAX_COMMON_NAME else "Sottovoce server"
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
    issuer, serial = authority.certificate.subject, x509.random_serial_number()
    trusted = authority.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    certificate = (
        x509.CertificateBuilder(issuer, subject, key.public_key(), serial, now - _SKEW, end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_names(address)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(trusted), critical=False)
        .sign(authority.key, SHA384())
    )
    return Issued(key, certificate)


def renew_certificate(server: "ServerFolder", *, now: datetime | None = None) -> None:
    """Replace a server's certificate and key by new ones of the same authority; devices need nothing new.

    Raises:
        ServerError: The authority's files are damaged or not each other's, or its time is over; nothing is written.
    """
    renewed = new_certificate(_read_authority(server), server.settings.address, now=now)
    write_private(server.certificate_key, renewed.key_pem)
    write_atomically(server.certificate, renewed.certificate_pem)


def expiry(server: "ServerFolder") -> datetime:
    """When a server's certificate ends.

    Raises:
        ServerError: It cannot be read.
    """
    try:
        return x509.load_pem_x509_certificate(server.certificate.read_bytes()).not_valid_after_utc
    except (OSError, *_NOT_X509):
        raise ServerError(
            f"{server.certificate} must be a certificate, it is damaged; run: sottovoce server init --renew."
        ) from None


def fingerprint(certificate_pem: bytes) -> str:
    """SHA-256 of a certificate in hex digits, as ``openssl x509 -fingerprint -sha256`` without its colons."""
    return x509.load_pem_x509_certificate(certificate_pem).fingerprint(SHA256()).hex()


def _read_authority(server: "ServerFolder") -> Issued:
    try:
        key = load_pem_private_key(server.ca_key.read_bytes(), password=None)
        certificate = x509.load_pem_x509_certificate(server.ca_certificate.read_bytes())
        public, _ = certificate.public_key(), (certificate.subject, certificate.not_valid_after_utc)
        certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except (OSError, TypeError, UnsupportedAlgorithm, InternalError, *_NOT_X509):
        raise ServerError(f"{server.ca_key} and {server.ca_certificate} must be readable; restore a backup.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != public:
        raise ServerError(f"{server.ca_key} must be the key of {server.ca_certificate}, it is not; restore a backup.")
    return Issued(key, certificate)


def _names(address: str) -> list[x509.GeneralName]:
    names: list[x509.GeneralName] = []
    for name in dict.fromkeys((address, "localhost", "127.0.0.1")):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            names.append(x509.DNSName(name))
    return names


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
