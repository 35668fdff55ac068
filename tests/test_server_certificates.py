"""A server's certificates in real TLS handshakes: the right name under the right authority, and nothing else."""

import contextlib
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from server.certificates import Issued, expiry, new_authority, new_certificate, renew_certificate
from server.folder import create_server
from shared.errors import ServerError

NOW = datetime.now(UTC)


@pytest.fixture
def server(tmp_path):
    return create_server(tmp_path / "server", address="fl.example.org")


@pytest.fixture
def shake(tmp_path):
    """(certificate, key, authority, name) -> the protocol of a handshake over loopback, as a device makes it."""

    def handshake(certificate, key, authority, name):
        ours = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ours.load_cert_chain(certificate, key)
        theirs = ssl.create_default_context(cafile=authority)
        theirs.verify_flags |= ssl.VERIFY_X509_STRICT
        with socket.create_server(("127.0.0.1", 0)) as listening:
            answering = threading.Thread(target=answer, args=(listening, ours))
            answering.start()
            try:
                with (
                    socket.create_connection(listening.getsockname(), timeout=10) as raw,
                    theirs.wrap_socket(raw, server_hostname=name) as secured,
                ):
                    return secured.version()
            finally:
                answering.join()

    def answer(listening, context):
        raw, _ = listening.accept()
        raw.settimeout(10)
        with raw, contextlib.suppress(OSError):  # the other side tells
            context.wrap_socket(raw, server_side=True).close()

    return handshake


def files(server):
    return server.certificate, server.certificate_key, server.ca_certificate


@pytest.mark.parametrize("name", ["fl.example.org", "localhost", "127.0.0.1"])
def test_a_device_accepts_the_server_by_its_names(server, shake, name):
    assert shake(*files(server), name) in {"TLSv1.2", "TLSv1.3"}


@pytest.mark.parametrize("name", ["example.org", "x.fl.example.org", "fl.example.com", "127.0.0.2"])
def test_a_device_refuses_another_name(server, shake, name):
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake(*files(server), name)


@pytest.mark.parametrize("address", ["192.0.2.7", "2001:db8::1"])
def test_a_server_may_be_called_by_its_ip_address(tmp_path, shake, address):
    server = create_server(tmp_path / "server", address=address)
    assert shake(*files(server), address)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake(*files(server), "192.0.2.8")


def test_a_device_refuses_another_authority(server, shake, tmp_path):
    other = create_server(tmp_path / "other", address="fl.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="verify failed"):
        shake(server.certificate, server.certificate_key, other.ca_certificate, "fl.example.org")


def test_a_renewed_certificate_needs_nothing_new_on_a_device(server, shake):
    authority, before = server.ca_certificate.read_bytes(), server.certificate.read_bytes()
    key = server.certificate_key.read_bytes()
    renew_certificate(server, now=NOW + timedelta(hours=1))
    assert server.ca_certificate.read_bytes() == authority
    assert server.certificate.read_bytes() != before
    assert server.certificate_key.read_bytes() != key
    assert server.certificate_key.stat().st_mode & 0o777 == 0o600
    assert shake(*files(server), "fl.example.org")
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake(*files(server), "example.org")


def test_a_certificate_whose_time_is_over_is_refused(server, shake):
    renew_certificate(server, now=NOW - timedelta(days=731))
    assert expiry(server) < NOW
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake(*files(server), "fl.example.org")
    renew_certificate(server)
    assert shake(*files(server), "fl.example.org")


def test_a_server_cannot_make_itself_an_authority(server, shake, tmp_path):
    """A stolen server key signs a certificate for another name; no device follows."""
    [certificate] = x509.load_pem_x509_certificates(server.certificate.read_bytes())
    key = load_pem_private_key(server.certificate_key.read_bytes(), password=None)
    forged = new_certificate(Issued(key, certificate), "bank.example.org")
    chain = tmp_path / "chain.crt"
    chain.write_bytes(forged.certificate_pem + server.certificate.read_bytes())
    (tmp_path / "forged.key").write_bytes(forged.key_pem)
    with pytest.raises(ssl.SSLCertVerificationError, match="invalid CA"):
        shake(chain, tmp_path / "forged.key", server.ca_certificate, "bank.example.org")


def test_certificates_say_what_they_are_for(server):
    authority = x509.load_pem_x509_certificate(server.ca_certificate.read_bytes())
    basic = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)
    assert authority.not_valid_after_utc - NOW > timedelta(days=3600)

    certificate = x509.load_pem_x509_certificate(server.certificate.read_bytes())
    certificate.verify_directly_issued_by(authority)
    assert certificate.not_valid_after_utc - certificate.not_valid_before_utc <= timedelta(days=731)
    assert certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value._usages == [
        ExtendedKeyUsageOID.SERVER_AUTH
    ]
    held = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert held == authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def test_no_certificate_outlives_its_authority(server):
    authority = new_authority(now=NOW)
    late = new_certificate(authority, "a.org", now=NOW + timedelta(days=3600))
    assert late.certificate.not_valid_after_utc == authority.certificate.not_valid_after_utc
    with pytest.raises(ServerError, match="the server's authority must be valid, it ended"):
        new_certificate(authority, "a.org", now=NOW + timedelta(days=3653))
    before = server.certificate.read_bytes()
    with pytest.raises(ServerError, match="invite all devices"):
        renew_certificate(server, now=NOW + timedelta(days=3660))
    assert server.certificate.read_bytes() == before


@pytest.mark.parametrize("damage", ["missing", "damaged", "another"])
def test_an_authority_whose_key_is_not_its_own_signs_nothing(server, tmp_path, damage):
    if damage == "missing":
        server.ca_key.unlink()
    else:
        server.ca_key.write_bytes(b"no key" if damage == "damaged" else new_authority().key_pem)
    before = server.certificate.read_bytes(), server.certificate_key.read_bytes()
    with pytest.raises(ServerError, match="restore a backup"):
        renew_certificate(server)
    assert (server.certificate.read_bytes(), server.certificate_key.read_bytes()) == before


def test_a_damaged_certificate_is_named(server):
    server.certificate.write_text("no certificate")
    with pytest.raises(ServerError, match="it is damaged; run: sottovoce server init --renew"):
        expiry(server)
