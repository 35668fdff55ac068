"""Operators' keys and the signature of a policy: one altered bit, one other key, one other purpose, and it fails."""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from shared.errors import CampaignError, PrivacyError
from shared.protocol.signing import (
    check_signature,
    fingerprint,
    load_private,
    load_public,
    new_key,
    policy_sha256,
    public_key_path,
    sign,
    sign_policy,
    signed_by,
    verify,
)

ROOT = Path(__file__).parent.parent
# RFC 8032, section 7.1, TEST 2: secret key, public key, message, signature
SECRET = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
PUBLIC = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
MESSAGE = bytes.fromhex("72")
SIGNATURE = bytes.fromhex(
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
KEY = Ed25519PrivateKey.from_private_bytes(SECRET)
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32))
POLICY = {"protocol": 2, "campaign": "añejo", "noise_multiplier": 1.25, "slots": [["w", [2, 3]]], "epsilon": 8.0}


# Section 5.1 of RFC 8032, slowly: what a signature must be, computed without the library.
P, ORDER = 2**255 - 19, 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
BASE = (15112221349535400772501151409588531511454012693041857206046113283949847762202, 4 * pow(5, -1, P) % P)


def add(a, b):
    product = D * a[0] * b[0] * a[1] * b[1]
    x = (a[0] * b[1] + a[1] * b[0]) * pow(1 + product, -1, P)
    y = (a[1] * b[1] + a[0] * b[0]) * pow(1 - product, -1, P)
    return x % P, y % P


def times(scalar, point):
    total = (0, 1)
    while scalar:
        total = add(total, point) if scalar & 1 else total
        point, scalar = add(point, point), scalar >> 1
    return total


def packed(point):
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def reference_signature(secret, message):
    digest = hashlib.sha512(secret).digest()
    scalar = int.from_bytes(digest[:32], "little") & ((1 << 254) - 8) | (1 << 254)
    public = packed(times(scalar, BASE))
    r = int.from_bytes(hashlib.sha512(digest[32:] + message).digest(), "little") % ORDER
    point = packed(times(r, BASE))
    k = int.from_bytes(hashlib.sha512(point + public + message).digest(), "little")
    return point + ((r + k * scalar) % ORDER).to_bytes(32, "little")


def test_the_library_and_the_reference_give_the_signature_of_the_rfc():
    assert KEY.public_key().public_bytes_raw() == PUBLIC
    assert KEY.sign(MESSAGE) == SIGNATURE == reference_signature(SECRET, MESSAGE)


def test_what_is_signed_is_the_purpose_a_zero_byte_and_the_content():
    made = sign(KEY, purpose="policy", content=b"{}")
    assert made == reference_signature(SECRET, b"sottovoce policy 1\0{}")
    verify(KEY.public_key(), made, purpose="policy", content=b"{}")


@pytest.mark.parametrize(
    ("public", "signature", "purpose", "content"),
    [
        (KEY, sign(KEY, purpose="policy", content=b"{}"), "policy", b"{ }"),
        (KEY, sign(KEY, purpose="policy", content=b"{}"), "receipt", b"{}"),
        (KEY, KEY.sign(b"{}"), "policy", b"{}"),
        (OTHER, sign(KEY, purpose="policy", content=b"{}"), "policy", b"{}"),
        (KEY, sign(KEY, purpose="policy", content=b"{}")[:-1], "policy", b"{}"),
        (KEY, b"", "policy", b"{}"),
        (KEY, bytes(64), "policy", b"{}"),
    ],
    ids=["other content", "other purpose", "no purpose", "other key", "short", "empty", "zeros"],
)
def test_a_signature_of_anything_else_fails(public, signature, purpose, content):
    with pytest.raises(PrivacyError, match="it is not"):
        verify(public.public_key(), signature, purpose=purpose, content=content)


def test_every_bit_of_a_signature_counts():
    made = sign(KEY, purpose="policy", content=b"{}")
    for bit in range(512):
        altered = bytearray(made)
        altered[bit // 8] ^= 1 << bit % 8
        with pytest.raises(PrivacyError):
            verify(KEY.public_key(), bytes(altered), purpose="policy", content=b"{}")


@pytest.mark.parametrize("purpose", ["", "policy\0", "policy 1\0{", "Policy", "policy\n"])
def test_a_purpose_is_a_word(purpose):
    with pytest.raises(ValueError, match="purpose"):
        sign(KEY, purpose=purpose, content=b"")


def test_a_new_key_is_its_owners_alone_and_signs_what_its_public_half_verifies(tmp_path):
    path = tmp_path / "operator"
    before = os.umask(0)  # whatever the account allows others
    try:
        public = new_key(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o600
    [line] = public_key_path(path).read_text().splitlines()
    assert line == f"sottovoce-operator-ed25519 {base64.b64encode(public.public_bytes_raw()).decode()}"
    assert path.read_text().startswith("-----BEGIN PRIVATE KEY-----")
    made = sign(load_private(path), purpose="policy", content=b"x")
    verify(load_public(public_key_path(path)), made, purpose="policy", content=b"x")
    assert new_key(tmp_path / "second").public_bytes_raw() != public.public_bytes_raw()


@pytest.mark.parametrize("taken", ["operator", "operator.pub"])
def test_a_key_is_never_overwritten(tmp_path, taken):
    (tmp_path / taken).symlink_to(tmp_path / "nowhere")  # even one that leads nowhere yet
    with pytest.raises(PrivacyError, match="never overwritten"):
        new_key(tmp_path / "operator")
    assert [path.name for path in tmp_path.iterdir()] == [taken]


def test_a_key_in_a_folder_that_is_not_there_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        new_key(tmp_path / "missing" / "operator")
    assert list(tmp_path.iterdir()) == []


def test_a_private_key_that_others_may_read_is_refused(tmp_path):
    new_key(tmp_path / "operator")
    for mode in (0o640, 0o604, 0o620):
        (tmp_path / "operator").chmod(mode)
        with pytest.raises(PrivacyError, match=f"got mode {mode:o}; run: chmod 600"):
            load_private(tmp_path / "operator")


def private_pem(key, protection):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff",
        private_pem(X25519PrivateKey.generate(), NoEncryption()),
        private_pem(KEY, BestAvailableEncryption(b"secret")),
    ],
    ids=["empty", "binary", "of another kind", "behind a passphrase"],
)
def test_what_is_no_private_key_is_refused(tmp_path, content):
    path = tmp_path / "operator"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(PrivacyError, match="must be a private Ed25519 key"):
        load_private(path)


def test_a_missing_key_is_named(tmp_path):
    for load in (load_private, load_public):
        with pytest.raises(PrivacyError, match="No such file"):
            load(tmp_path / "missing")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ssh-ed25519 " + base64.b64encode(PUBLIC).decode(),
        "sottovoce-operator-ed25519 " + base64.b64encode(PUBLIC[:31]).decode(),
        "sottovoce-operator-ed25519 " + base64.b64encode(PUBLIC).decode() + " me",
        "sottovoce-operator-ed25519 " + base64.b64encode(PUBLIC).decode() + "\nmore\n",
        "sottovoce-operator-ed25519 " + base64.b64encode(PUBLIC).decode().rstrip("="),
        "sottovoce-operator-ed25519 " + "é" * 44,
        "\x00",
    ],
)
def test_what_is_no_public_key_is_refused(tmp_path, text):
    (tmp_path / "operator.pub").write_text(text, encoding="utf-8")
    with pytest.raises(PrivacyError, match="must be one line"):
        load_public(tmp_path / "operator.pub")


def test_a_fingerprint_tells_keys_apart():
    assert fingerprint(KEY.public_key()).replace(" ", "") == hashlib.sha256(PUBLIC).hexdigest()[:32]
    assert fingerprint(KEY.public_key()) != fingerprint(OTHER.public_key())


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "campaign"
    path.mkdir()
    (path / "policy.json").write_text(json.dumps(POLICY, indent=2, ensure_ascii=False), encoding="utf-8")
    return path


def signature_of(folder):
    return json.loads((folder / "policy.sig").read_text())


def test_a_signed_policy_is_accepted_under_the_key_that_signed_it(folder):
    sign_policy(folder, KEY)
    canonical = json.dumps(POLICY, sort_keys=True, separators=(",", ":")).encode()
    found = check_signature(folder, trusted=Ed25519PublicKey.from_public_bytes(PUBLIC))
    assert found == policy_sha256(folder) == hashlib.sha256(canonical).hexdigest()
    assert signature_of(folder) == {
        "schema": "sottovoce policy signature 1",
        "key": base64.b64encode(PUBLIC).decode(),
        "signature": base64.b64encode(reference_signature(SECRET, b"sottovoce policy 1\0" + canonical)).decode(),
    }


def test_layout_and_order_of_the_policy_do_not_matter(folder):
    sign_policy(folder, KEY)
    (folder / "policy.json").write_text(json.dumps(dict(reversed(POLICY.items()))))
    check_signature(folder, trusted=KEY.public_key())


@pytest.mark.parametrize("field", POLICY)
def test_every_field_of_the_policy_counts(folder, field):
    sign_policy(folder, KEY)
    for value in (None, [*POLICY["slots"], ["w", [2, 3]]], 8, "8.0"):
        (folder / "policy.json").write_text(json.dumps(POLICY | {field: value}))
        with pytest.raises(PrivacyError, match="it is not"):
            check_signature(folder, trusted=KEY.public_key())
    (folder / "policy.json").write_text(json.dumps({k: v for k, v in POLICY.items() if k != field}))
    with pytest.raises(PrivacyError, match="it is not"):
        check_signature(folder, trusted=KEY.public_key())


def test_a_signature_of_another_policy_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "policy.json").write_text(json.dumps(POLICY | {"epsilon": 80.0}))
    sign_policy(folder, KEY)
    sign_policy(other, KEY)
    shutil.copy(folder / "policy.sig", other / "policy.sig")
    with pytest.raises(PrivacyError, match="it is not"):
        check_signature(other, trusted=KEY.public_key())


def test_the_key_in_the_file_is_not_trusted(folder):
    sign_policy(folder, OTHER)
    with pytest.raises(PrivacyError, match=f"trusted key {fingerprint(KEY.public_key())}, got one by "):
        check_signature(folder, trusted=KEY.public_key())
    swapped = signature_of(folder) | {"key": base64.b64encode(PUBLIC).decode()}
    (folder / "policy.sig").write_text(json.dumps(swapped))
    with pytest.raises(PrivacyError, match="it is not"):
        check_signature(folder, trusted=KEY.public_key())


def test_a_new_signature_replaces_the_old(folder):
    sign_policy(folder, OTHER)
    sign_policy(folder, KEY)
    check_signature(folder, trusted=KEY.public_key())
    assert sorted(path.name for path in folder.iterdir()) == ["policy.json", "policy.sig"]


def test_a_missing_signature_is_none_at_all(folder):
    with pytest.raises(PrivacyError, match=r"must hold the operator's signature policy\.sig, got none"):
        check_signature(folder, trusted=KEY.public_key())
    assert signed_by(folder) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s | {"note": "x"},
        lambda s: {k: v for k, v in s.items() if k != "schema"},
        lambda s: s | {"schema": "sottovoce policy signature 2"},
        lambda s: s | {"schema": 1},
        lambda s: s | {"key": None},
        lambda s: s | {"key": s["key"][:-4]},
        lambda s: s | {"key": s["key"] + "\n"},
        lambda s: s | {"key": s["key"][:-2] + chr(ord(s["key"][-2]) + 1) + "="},
        lambda s: s | {"signature": ["x"]},
        lambda s: s | {"signature": "é"},
        lambda s: [s],
        lambda s: float("nan"),
    ],
)
def test_a_signature_file_with_anything_unknown_is_refused(folder, damage):
    sign_policy(folder, KEY)
    (folder / "policy.sig").write_text(json.dumps(damage(signature_of(folder))))
    for check in (lambda: check_signature(folder, trusted=KEY.public_key()), lambda: signed_by(folder)):
        with pytest.raises(PrivacyError, match="as 'sottovoce policy sign' writes it"):
            check()


def test_a_signature_file_that_is_no_text_is_refused(folder):
    (folder / "policy.sig").write_bytes(b"\xff\xfe")
    with pytest.raises(PrivacyError, match="not UTF-8"):
        check_signature(folder, trusted=KEY.public_key())
    (folder / "policy.sig").unlink()
    (folder / "policy.sig").mkdir()
    with pytest.raises(PrivacyError, match="readable signature"):
        signed_by(folder)


def test_who_signed_is_told_only_where_the_signature_holds(folder):
    sign_policy(folder, OTHER)
    assert signed_by(folder).public_bytes_raw() == OTHER.public_key().public_bytes_raw()
    (folder / "policy.json").write_text("{}")
    with pytest.raises(PrivacyError, match="it is not"):
        signed_by(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"epsilon": 8.0, "epsilon": 80.0}', "a key twice"),
        ('{"slots": [{"a": 1, "a": 2}]}', "a key twice"),
        ('{"epsilon": NaN}', "holds NaN"),
        ('{"epsilon": Infinity}', "holds Infinity"),
        ("[]", "no JSON object"),
        ("", "readable policy"),
        ("[" * 100_000, "too deeply"),
    ],
)
def test_a_policy_that_two_readers_may_understand_differently_is_not_signed(folder, text, says):
    (folder / "policy.json").write_text(text)
    with pytest.raises(CampaignError, match=says):
        sign_policy(folder, KEY)
    assert not (folder / "policy.sig").exists()


def test_a_folder_without_a_policy_is_no_campaign(tmp_path):
    for check in (lambda: sign_policy(tmp_path, KEY), lambda: check_signature(tmp_path, trusted=KEY.public_key())):
        with pytest.raises(CampaignError, match="must hold a campaign"):
            check()


def test_signatures_need_neither_torch_nor_flower():
    code = (
        "import sys, shared.protocol.signing; "
        "heavy = {'torch', 'flwr', 'numpy', 'pydantic'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
