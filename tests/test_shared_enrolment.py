"""Who vouches for whom: a certificate holds for one seat, one key and one operator, a signature for one message."""

import base64

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from shared.errors import SecureSumError
from shared.protocol.enrolment import (
    certify_device,
    check_certificate,
    check_device_signature,
    check_public_key,
    sign_as_device,
)
from shared.protocol.signing import sign

CURVES = (ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1())
OPERATOR = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DEVICE, OTHER = (ec.derive_private_key(number, ec.SECP384R1()) for number in (4711, 4712))


def line(key):
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def respelled(text):
    """Other spellings of one key that OpenSSH, or a lenient base64, takes for it; each is another string."""
    kind, encoded = text.split()
    loose = base64.b64encode(base64.b64decode(encoded) + b"\0").decode()
    yield f"{text} alice@laptop"
    yield f"{kind}  {encoded}"
    yield f" {text}"
    yield f"{text}\n"
    yield f"{kind}\t{encoded}"
    yield f"{kind} {loose}"
    yield f"{kind} {encoded.rstrip('=')}"
    yield text.upper()


def refused(call, *arguments, **named):
    with pytest.raises(SecureSumError) as caught:
        call(*arguments, **named)
    assert caught.value.code == "ROSTER"
    assert line(DEVICE) not in str(caught.value)


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.name)
def test_certificate_and_signature_hold_for_what_they_were_made_for(curve):
    device = ec.generate_private_key(curve)
    certificate = certify_device(OPERATOR, seat=7, public_key=line(device))
    assert len(certificate) == 64
    assert certificate == certify_device(OPERATOR, seat=7, public_key=line(device))
    check_certificate(OPERATOR.public_key(), seat=7, public_key=line(device), certificate=certificate)
    check_device_signature(line(device), b"advert", sign_as_device(device, b"advert"))
    refused(check_device_signature, line(device), b"advers", sign_as_device(device, b"advert"))


def test_a_certificate_is_of_one_operator_seat_and_key():
    good = {
        "seat": 7,
        "public_key": line(DEVICE),
        "certificate": certify_device(OPERATOR, seat=7, public_key=line(DEVICE)),
    }
    stranger = ed25519.Ed25519PrivateKey.generate()
    check_certificate(OPERATOR.public_key(), **good)
    refused(check_certificate, stranger.public_key(), **good)
    forged = certify_device(stranger, seat=7, public_key=line(DEVICE))
    flipped = bytes([good["certificate"][0] ^ 1]) + good["certificate"][1:]
    other_purpose = sign(OPERATOR, purpose="policy", content=f"7\n{line(DEVICE)}".encode())
    for change in (
        {"seat": 8},
        {"seat": 70},
        {"seat": -7},
        {"seat": 2**31},
        {"seat": 7.0},
        {"seat": True},
        {"public_key": line(OTHER)},
        {"certificate": forged},
        {"certificate": flipped},
        {"certificate": other_purpose},
        {"certificate": b""},
        {"certificate": good["certificate"] + b"\0"},
    ):
        refused(check_certificate, OPERATOR.public_key(), **good | change)


def test_seat_and_key_cannot_run_into_each_other():
    """The statement for seat 1 is no prefix of another one's, and an operator signs no key that is none."""
    for seat, key in ((1, f"1\n{line(DEVICE)}"), (-1, line(DEVICE)), (2**31, line(DEVICE)), (True, line(DEVICE))):
        with pytest.raises(ValueError, match=r"must be|it is no line"):
            certify_device(OPERATOR, seat=seat, public_key=key)


@pytest.mark.parametrize("spelling", list(respelled(line(DEVICE))))
def test_a_key_has_one_spelling(spelling):
    """Otherwise one device could stand in a roster twice, under strings that differ."""
    signature = sign_as_device(DEVICE, b"advert")
    certificate = sign(OPERATOR, purpose="enrolment", content=f"7\n{spelling}".encode())
    refused(check_certificate, OPERATOR.public_key(), seat=7, public_key=spelling, certificate=certificate)
    refused(check_device_signature, spelling, b"advert", signature)
    with pytest.raises(ValueError, match=r"must be|it is|its key"):
        certify_device(OPERATOR, seat=7, public_key=spelling)


def test_the_operators_spelling_is_found_again():
    assert check_public_key(f"  {line(DEVICE)} alice@laptop\n") == line(DEVICE)


@pytest.mark.parametrize(
    "key",
    [
        line(ed25519.Ed25519PrivateKey.generate()),
        line(ec.generate_private_key(ec.SECP256R1())).replace("nistp256", "nistp384"),
        f"{line(DEVICE)}\n{line(DEVICE)}",
        line(DEVICE)[:-8],
        "ecdsa-sha2-nistp384 AAAA",
        "",
        "\ud800",
    ],
    ids=["ed25519", "another curve", "two lines", "cut", "short", "empty", "no unicode"],
)
def test_what_is_no_key_signs_nothing(key):
    refused(check_device_signature, key, b"advert", sign_as_device(DEVICE, b"advert"))
    refused(check_certificate, OPERATOR.public_key(), seat=7, public_key=key, certificate=bytes(64))


def test_a_signature_is_of_one_key_and_of_nothing_else_the_key_signs():
    good = sign_as_device(DEVICE, b"advert")
    check_device_signature(line(DEVICE), b"advert", good)
    refused(check_device_signature, line(OTHER), b"advert", good)
    for wrong in (b"", good[:-1], good + b"\0", bytes(len(good))):
        refused(check_device_signature, line(DEVICE), b"advert", wrong)
    for algorithm in (hashes.SHA256(), hashes.SHA384()):  # Flower has the same key sign a time, with SHA-256
        refused(check_device_signature, line(DEVICE), b"advert", DEVICE.sign(b"advert", ec.ECDSA(algorithm)))
