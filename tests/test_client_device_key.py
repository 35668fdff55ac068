"""What a device signs with, and whom it believes: the operator of the campaign its owner agreed to, and nobody else."""

import shutil
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from client.owner.device_key import make_device_key, sign, trusted_operator
from client.training.device import OwnedDevice
from client.training.secure_sum import Participant
from shared.errors import LedgerError, PrivacyError, SecureSumError, StoreError
from shared.protocol.enrolment import certify_device, check_device_signature, sign_as_device
from shared.protocol.signing import load_private, new_key, sign_policy
from shared.secure_sum.messages import Credential, Roster, Setting, Terms


@pytest.fixture(scope="module")
def agreed(homes, published, tmp_path_factory):
    """A home whose owner agreed to the campaign. Read only."""
    return homes.make_home(tmp_path_factory.mktemp("agreed") / "home", published, user=None)


@pytest.fixture
def kept(agreed, published, tmp_path):
    """The home's copy of the campaign, put back afterwards."""
    folder = agreed.campaign_folder(published.campaign.policy.sha256)
    shutil.copytree(folder, tmp_path / "copy")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)


def test_a_device_signs_with_its_own_key(homes, tmp_path):
    one, two = (homes.make_home(tmp_path / name).folder for name in "ab")
    line = make_device_key(one)
    check_device_signature(line, b"advert", sign(one, b"advert"))
    make_device_key(two)
    with pytest.raises(SecureSumError):
        check_device_signature(line, b"advert", sign(two, b"advert"))


def test_a_lost_or_damaged_key_signs_nothing(homes, tmp_path):
    home = homes.make_home(tmp_path / "a").folder
    with pytest.raises(StoreError, match="No such file"):
        sign(home, b"advert")
    (home / "device.key").write_text("none")
    with pytest.raises(StoreError, match="must be an ECDSA P-384 key"):
        sign(home, b"advert")


def test_the_operator_is_the_one_whom_the_owner_trusted(agreed, published):
    policy = published.campaign.policy.sha256
    assert trusted_operator(agreed, policy) == published.key
    with agreed.lock(), agreed.ledger(round_running=False):  # as in the middle of a round
        assert trusted_operator(agreed, policy) == published.key


def test_without_a_consent_nobody_is_trusted(agreed, homes, published, tmp_path):
    policy = published.campaign.policy.sha256
    with pytest.raises(LedgerError, match="must have agreed to policy"):
        trusted_operator(agreed, "0" * 64)
    stranger = homes.make_home(tmp_path / "stranger")
    shutil.copytree(published.campaign.folder, stranger.campaign_folder(policy))
    with pytest.raises(LedgerError, match="must have agreed to policy"):
        trusted_operator(stranger, policy)


def signed_by_another(folder):
    new_key(folder / "other")
    sign_policy(folder, load_private(folder / "other"))


def another_policy(folder):
    path = folder / "policy.json"
    path.write_text(path.read_text().replace('"campaign": "', '"campaign": "x'))


@pytest.mark.parametrize("damage", [signed_by_another, another_policy, lambda folder: (folder / "policy.sig").unlink()])
def test_a_copy_that_was_altered_names_no_operator(agreed, published, kept, damage):
    damage(kept)
    with pytest.raises(PrivacyError):
        trusted_operator(agreed, published.campaign.policy.sha256)


def test_another_policy_of_the_same_operator_is_not_the_one_agreed_to(agreed, published, kept):
    another_policy(kept)
    sign_policy(kept, load_private(published.private))
    with pytest.raises(PrivacyError, match="as its operator signed it, it was altered"):
        trusted_operator(agreed, published.campaign.policy.sha256)


@pytest.fixture(scope="module")
def round_of_three(agreed, published):
    """What the device of the home, seat 0, is shown in a round of three: (participant, roster, keys, operator)."""
    operator = load_private(published.private)
    setting, terms = Setting(published.campaign.policy.sha256, 1, 3), Terms(2, 2, 2)
    keys = {seat: ec.generate_private_key(ec.SECP384R1()) for seat in (1, 2)}
    lines = {0: make_device_key(agreed.folder)} | {seat: line(key) for seat, key in keys.items()}
    signers = {0: lambda message: sign(agreed.folder, message)}
    signers |= {seat: lambda message, key=key: sign_as_device(key, message) for seat, key in keys.items()}
    devices = {seat: Participant.begin(setting, seat=seat, terms=terms, sign=signers[seat]) for seat in range(3)}
    members = tuple(
        (device.advert, Credential(lines[seat], certify_device(operator, seat=seat, public_key=lines[seat])))
        for seat, device in devices.items()
    )
    return devices[0], Roster((0, 1, 2), members), keys, operator


def line(key):
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def test_a_device_shares_with_whom_its_operator_certified(agreed, published, round_of_three):
    device, roster, _, _ = round_of_three
    again = Participant.from_bytes(device.to_bytes())
    parcels = again.share(roster, verify=OwnedDevice(agreed).verifier(published.campaign))
    assert [seat for seat, _ in parcels.items] == [1, 2]


def of_another_seat(keys, operator):
    return Credential(line(keys[1]), certify_device(operator, seat=2, public_key=line(keys[1])))


def of_another_key(keys, operator):
    return Credential(line(keys[2]), certify_device(operator, seat=1, public_key=line(keys[2])))


def of_another_operator(keys, operator):
    stranger = Ed25519PrivateKey.generate()
    return Credential(line(keys[1]), certify_device(stranger, seat=1, public_key=line(keys[1])))


def of_another_spelling(keys, operator):
    return Credential(f"{line(keys[1])} x", certify_device(operator, seat=1, public_key=line(keys[1])))


def of_nobody(keys, operator):
    return Credential()


@pytest.mark.parametrize(
    "forge", [of_another_seat, of_another_key, of_another_operator, of_another_spelling, of_nobody]
)
def test_a_device_shares_nothing_where_a_seat_is_not_certified(agreed, published, round_of_three, forge):
    device, roster, keys, operator = round_of_three
    own, (advert, _), last = roster.members
    shown = replace(roster, members=(own, (advert, forge(keys, operator)), last))
    refuses(device, shown, agreed, published)


def test_keys_that_the_certified_device_did_not_sign_are_refused(agreed, published, round_of_three):
    """As of a server that puts its own keys in the place of a device's, to read what is sealed for it."""
    device, roster, _, _ = round_of_three
    own, (advert, credential), last = roster.members
    for other in (replace(advert, cipher_key=bytes(32)), replace(advert, signature=last[0].signature)):
        refuses(device, replace(roster, members=(own, (other, credential), last)), agreed, published)


def test_a_device_that_was_told_another_seat_than_its_own_shares_nothing(agreed, published, round_of_three):
    _, roster, _, _ = round_of_three
    setting = Setting(published.campaign.policy.sha256, 1, 3)
    told = Participant.begin(setting, seat=7, terms=Terms(2, 2, 2), sign=lambda message: sign(agreed.folder, message))
    (_, credential), *others = roster.members
    refuses(told, Roster((1, 2, 7), (*others, (told.advert, credential))), agreed, published)


def refuses(device, roster, home, published):
    with pytest.raises(SecureSumError) as caught:
        Participant.from_bytes(device.to_bytes()).share(roster, verify=OwnedDevice(home).verifier(published.campaign))
    assert caught.value.code == "ROSTER"
    assert "certified" in str(caught.value) or "signed by its key" in str(caught.value)
