"""An owner's device from request to reply: consent, ledger, encrypted records, secure noise, fixed codes."""

import hashlib
import json
import shutil

import keyring
import numpy as np
import pytest
import scipy.stats
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from keyring.backend import KeyringBackend
from safetensors.numpy import save

from client.app import answer
from client.home.store import RecordStore
from client.owner.consent import agree
from client.training.device import OwnedDevice
from server.app import run_rounds
from server.gate import RejectedReply, check_reply
from shared.errors import CampaignError, LedgerError, PrivacyError
from shared.privacy.noise import SecureRandomness, SeededRandomness
from shared.protocol import wire
from shared.protocol.campaign import read_campaign
from shared.protocol.signing import load_private, sign_policy


@pytest.fixture
def home(homes, published, tmp_path):
    """A home of a user with records whose owner agreed to the published campaign."""
    return homes.make_home(tmp_path / "home", published)


def reserved(home):
    with home.ledger() as ledger:
        return ledger.totals().epsilon, [standing.spent for standing in ledger.consents()]


def test_an_owner_s_device_answers_and_its_ledger_says_what_left(homes, home, published):
    campaign = published.campaign
    code, reply = homes.ask(home, campaign)
    assert code is None
    update = check_reply(reply, policy=campaign.policy, policy_sha256=campaign.policy.sha256, round_number=1)
    with home.ledger() as ledger:
        [standing] = ledger.consents()
        [released] = [event for event in ledger.history() if event.kind == "release"]
    assert (standing.spent, standing.released, standing.burnt) == (1, 1, 0)
    assert released.detail["sha256"] == hashlib.sha256(save(update)).hexdigest()
    assert standing.consent.epsilon == campaign.policy.epsilon == 8.0


@pytest.mark.fault("R8", "R14")
def test_the_same_request_gets_the_same_bytes_and_reads_nothing(homes, home, published, monkeypatch):
    campaign = published.campaign
    _, first = homes.ask(home, campaign)
    monkeypatch.setattr(RecordStore, "read", lambda _: pytest.fail("a record was read"))
    before = reserved(home)
    code, again = homes.ask(home, campaign)
    assert code is None
    assert reserved(home) == before
    for name, array in homes.update_in(first, campaign).items():
        np.testing.assert_array_equal(array, homes.update_in(again, campaign)[name])
    moved = {name: array + 1 for name, array in campaign.start.items() if name in dict(campaign.policy.slots)}
    moved = {slot.name: moved[slot.name] for slot in campaign.policy.array_slots()}
    assert homes.ask(home, campaign, arrays=moved)[0] == "CONFLICT"


@pytest.mark.fault("R17")
def test_rounds_go_forward_until_they_are_spent(homes, home, published):
    campaign = published.campaign  # max_participations = 2, three rounds
    assert homes.ask(home, campaign, round_number=2)[0] is None
    assert homes.ask(home, campaign, round_number=1)[0] == "ROUND"
    assert homes.ask(home, campaign, round_number=3)[0] is None
    assert homes.ask(home, campaign, round_number=3)[0] is None  # the same again
    assert homes.ask(home, campaign, round_number=4)[0] == "ROUND"
    assert reserved(home) == (8.0, [2])


def test_a_server_that_has_seen_more_answers_is_believed(homes, home, published):
    """A ledger that came back from a backup together with its keys cannot know; the server's count does."""
    assert homes.ask(home, published.campaign, round_number=3, answered=2)[0] == "BUDGET"
    assert homes.ask(home, published.campaign, round_number=3, answered=0)[0] == "BUDGET"  # never lowered again


@pytest.fixture
def hostile(homes, published, tmp_path):
    """What a hostile server may send: name -> (expected code, request)."""
    campaign = published.campaign
    policy = campaign.policy
    arrays = {slot.name: campaign.start[slot.name] for slot in policy.array_slots()}
    packed = wire.pack_arrays(arrays)
    good = {"round": 1, "policy": policy.sha256, "answered": 0}
    looser = policy.model_copy(update={"noise_multiplier": 0.0})

    def request(**fields):
        return RecordDict({"arrays": packed, "config": ConfigRecord(good | fields)})

    def with_arrays(changed):
        return RecordDict({"arrays": wire.pack_arrays(changed), "config": ConfigRecord(good)})

    first, *rest = arrays
    return {
        "a looser policy": ("POLICY", request(policy=looser.sha256)),
        "a constant beside the policy": ("SCHEMA", request(noise_multiplier=0.0)),
        "more steps": ("SCHEMA", request(steps=1000)),
        "an unknown record": ("SCHEMA", RecordDict(dict(request()) | {"more": ConfigRecord({"a": 1})})),
        "no config": ("SCHEMA", RecordDict({"arrays": packed})),
        "a round as text": ("SCHEMA", request(round="1")),
        "a count as bool": ("SCHEMA", request(answered=True)),
        "a negative count": ("SCHEMA", request(answered=-1)),
        "round zero": ("ROUND", request(round=0)),
        "a round too many": ("ROUND", request(round=policy.rounds + 1)),
        "a tensor less": ("ARRAYS", with_arrays({name: arrays[name] for name in rest})),
        "another shape": ("ARRAYS", with_arrays(arrays | {first: np.zeros((2, 2), np.float32)})),
        "NaN": ("ARRAYS", with_arrays(arrays | {first: np.full_like(arrays[first], np.nan)})),
        "values that round": ("ARRAYS", with_arrays(arrays | {first: np.full_like(arrays[first], 1e6)})),
    }


@pytest.mark.fault("R15")
def test_what_the_policy_does_not_say_is_refused_before_a_record_is_read(homes, home, published, hostile, monkeypatch):
    monkeypatch.setattr(RecordStore, "read", lambda _: pytest.fail("a record was read"))
    before = reserved(home)
    found = {name: homes.ask(home, published.campaign, content=content)[0] for name, (_, content) in hostile.items()}
    assert found == {name: code for name, (code, _) in hostile.items()}
    assert reserved(home) == before


@pytest.mark.fault("R15")
def test_nothing_a_server_sends_makes_a_device_a_simulated_one(homes, home, published):
    config = {"simulation": True, "campaigns": str(published.campaign.folder.parent), "home": str(home.folder)}
    grid = homes.grid_of([home.folder], run_config=config)
    grid._contexts[1000].node_config.clear()
    [reply] = grid.send_and_receive([Message(RecordDict(), dst_node_id=1000, message_type="train")])
    assert wire.refusal_code(reply) == "NO_HOME"


def test_without_consent_nothing_is_answered(homes, published, tmp_path):
    home = homes.make_home(tmp_path / "home")
    assert homes.ask(home, published.campaign)[0] == "POLICY"
    homes.consent(home, published)
    with home.ledger() as ledger:
        ledger.pause()
    assert homes.ask(home, published.campaign)[0] == "PAUSED"
    with home.ledger() as ledger:
        ledger.resume()
        ledger.withdraw(published.campaign.policy.sha256)
    assert homes.ask(home, published.campaign)[0] == "CONSENT"
    assert reserved(home)[1] == [0]


def test_a_device_without_records_answers_with_noise_of_the_policy_s_scale(homes, published, tmp_path):
    policy = published.campaign.policy
    scale = policy.learning_rate * policy.noise_multiplier * policy.clip_norm / policy.denominator
    draws = []
    for i in range(6):
        home = homes.make_home(tmp_path / f"home-{i}", published, user=None)
        np.random.seed(0)
        torch.manual_seed(0)
        code, reply = homes.ask(home, published.campaign)
        assert code is None
        draws.append(np.concatenate([a.ravel() for a in homes.update_in(reply, published.campaign).values()]) / scale)
    together = np.concatenate(draws).astype(np.float64)
    low, high = scipy.stats.chi2.ppf([1e-8, 1 - 1e-8], df=together.size)  # the noise has no seed: no chance alarms
    assert low < (together**2).sum() < high
    assert not low < (together**2).sum() * 1.5**2 < high
    assert not low < (together**2).sum() / 1.5**2 < high
    assert abs(np.corrcoef(draws)[np.triu_indices(6, 1)]).max() < 0.7  # no seed of the process decides them


@pytest.mark.fault("R18")
def test_a_cloned_device_draws_other_noise_and_both_spend(homes, home, published, tmp_path):
    shutil.copytree(home.folder, tmp_path / "clone")
    _, first = homes.ask(home, published.campaign)
    _, second = homes.ask(tmp_path / "clone", published.campaign)
    a, b = (homes.update_in(reply, published.campaign) for reply in (first, second))
    assert all(not np.array_equal(a[name], b[name]) for name in a)


class KeyringOfTheSystem(KeyringBackend):
    """A keyring that a backup of the home does not hold, as the one of macOS."""

    viable, priority = False, -10

    def __init__(self):
        super().__init__()
        self.entries = {}

    def get_password(self, service, username):
        return self.entries.get((service, username))

    def set_password(self, service, username, password):
        self.entries[service, username] = password

    def delete_password(self, service, username):
        self.entries.pop((service, username), None)


KeyringOfTheSystem.__module__, KeyringOfTheSystem.__qualname__ = "keyring.backends.macOS", "Keyring"


@pytest.fixture
def system_keyring():
    before = keyring.get_keyring()
    keyring.set_keyring(KeyringOfTheSystem())
    yield
    keyring.set_keyring(before)


def restore(home, backup):
    shutil.rmtree(home.folder)
    shutil.copytree(backup, home.folder)


@pytest.mark.fault("R12")
def test_a_restored_backup_is_noticed_by_a_keyring_that_was_not_restored(homes, published, tmp_path, system_keyring):
    home = homes.make_home(tmp_path / "home", published, keystore="os")
    assert home.keystore.detects_rollback
    shutil.copytree(home.folder, tmp_path / "backup")
    assert homes.ask(home, published.campaign)[0] is None
    restore(home, tmp_path / "backup")
    assert homes.ask(home, published.campaign, round_number=2)[0] == "ROLLBACK"


@pytest.mark.fault("R12")
def test_a_backup_restored_with_its_keys_is_noticed_by_the_server_s_count(homes, published, tmp_path):
    home = homes.make_home(tmp_path / "home", published)
    assert not home.keystore.detects_rollback
    shutil.copytree(home.folder, tmp_path / "backup")
    for round_number in (1, 2):  # max_participations = 2
        assert homes.ask(home, published.campaign, round_number=round_number)[0] is None
    restore(home, tmp_path / "backup")
    assert homes.ask(home, published.campaign, round_number=3, answered=2)[0] == "BUDGET"
    assert reserved(home)[1] == [2]


def test_a_copied_home_has_no_keys_in_the_system_s_keyring(homes, published, tmp_path, system_keyring):
    home = homes.make_home(tmp_path / "home", published, keystore="os")
    shutil.copytree(home.folder, tmp_path / "clone")
    assert homes.ask(tmp_path / "clone", published.campaign)[0] in {"LEDGER", "STORE"}
    assert homes.ask(home, published.campaign)[0] is None


@pytest.mark.fault("R15")
def test_another_base_is_refused_before_anything_is_spent(homes, published, make_tiny_base, tmp_path):
    """The policy names the base by its hash: a device whose base is another one trains nothing."""
    home = homes.make_home(tmp_path / "home", published)
    path = home.campaign_folder(published.campaign.policy.sha256) / "scenario.json"
    settings = json.loads(path.read_text())
    settings["model"]["base"] = str(make_tiny_base(tmp_path / "base", seed=1).folder)
    path.write_text(json.dumps(settings), encoding="utf-8")
    assert homes.ask(home, published.campaign)[0] == "POLICY"
    assert reserved(home)[1] == [0]


@pytest.mark.fault("R12")
@pytest.mark.parametrize("broken", ["deleted", "truncated", "keys"])
def test_a_ledger_that_cannot_be_used_stops_the_device(homes, home, published, broken, monkeypatch):
    monkeypatch.setattr(RecordStore, "read", lambda _: pytest.fail("a record was read"))
    path = home.folder / "ledger.db"
    if broken == "deleted":
        path.unlink()
    elif broken == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    else:
        shutil.rmtree(home.folder / "keys")
    assert homes.ask(home, published.campaign)[0] in {"LEDGER", "ROLLBACK", "STORE"}


def test_a_store_that_cannot_be_read_burns_the_round_and_sends_a_code(homes, home, published):
    for path in (home.folder / "vault").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            content = path.read_bytes()
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert homes.ask(home, published.campaign)[0] == "STORE"
    with home.ledger() as ledger:
        [standing] = ledger.consents()
    assert (standing.spent, standing.burnt, standing.pending) == (1, 1, 0)  # at once, not when it is next opened
    assert homes.ask(home, published.campaign)[0] == "BURNT"
    assert reserved(home)[1] == [1]


def test_a_home_that_forgot_its_records_answers_with_noise(homes, home, published):
    shutil.rmtree(home.folder / "vault")
    assert homes.ask(home, published.campaign)[0] is None


def test_memory_that_runs_out_is_not_kept_as_a_record_that_cannot_be_taken(homes, home, published, monkeypatch):
    def full(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("client.training.inputs.compute_hidden", full)
        assert homes.ask(home, published.campaign)[0] == "INTERNAL"
    assert home.vault().names("features/") == []
    assert homes.ask(home, published.campaign, round_number=2)[0] is None


@pytest.mark.fault("R10")
def test_a_full_disk_after_the_spend_costs_no_round(homes, home, published, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("client.training.device.write_atomically", full)
    assert homes.ask(home, published.campaign)[0] is None
    assert reserved(home)[1] == [1]


@pytest.mark.fault("R18")
def test_another_process_of_the_device_is_waited_for_by_nobody(homes, home, published):
    with home.lock():
        assert homes.ask(home, published.campaign)[0] == "BUSY"


def test_a_record_is_read_only_after_the_round_is_spent(homes, home, published, monkeypatch):
    order = []
    spend, read = OwnedDevice.spend, RecordStore.read
    monkeypatch.setattr(OwnedDevice, "spend", lambda *a: (spend(*a), order.append(("spent", reserved(home)[1])))[0])
    monkeypatch.setattr(RecordStore, "read", lambda s: order.append(("read", reserved(home)[1])) or read(s))
    homes.ask(home, published.campaign)
    assert order == [("spent", [1]), ("read", [1])]


def test_a_federation_of_owners_runs_as_a_simulation_does(homes, published, tmp_path):
    folders = [homes.make_home(tmp_path / f"home-{i}", published, user=i).folder for i in range(3)]
    shutil.copytree(published.campaign.folder, tmp_path / "served")
    grid = homes.grid_of(folders)
    last = run_rounds(grid, read_campaign(tmp_path / "served"), roster={1000 + i: i for i in range(3)})
    assert last.round_number == 3
    assert sorted(last.answered.values()) == sorted(last.participations.values()) == [2, 2, 2]
    assert last.total.replies == 6


def test_features_are_kept_only_encrypted_and_used_again(homes, home, published, monkeypatch):
    homes.ask(home, published.campaign)
    assert home.vault().names("features/")
    monkeypatch.setattr("client.training.inputs.compute_hidden", lambda *_, **__: pytest.fail("computed again"))
    assert homes.ask(home, published.campaign, round_number=2)[0] is None


class TestConsent:
    """What an owner may agree to."""

    def test_a_campaign_is_examined_before_anything_is_reserved(self, homes, published, tmp_path):
        home = homes.make_home(tmp_path / "home")
        folder = tmp_path / "campaign"
        shutil.copytree(published.campaign.folder, folder)
        policy = published.campaign.policy.model_copy(update={"noise_multiplier": 0.5})
        (folder / "policy.json").write_text(policy.model_dump_json(), encoding="utf-8")

        def agreed():
            return agree(home, folder, operator=published.key, until=homes.UNTIL)

        with pytest.raises(PrivacyError, match="sign"):
            agreed()
        sign_policy(folder, load_private(published.private))  # by the operator's own key
        with pytest.raises(PrivacyError, match=r"grid must be|must give the epsilon"):
            agreed()
        assert reserved(home) == (0.0, [])

    def test_a_campaign_without_privacy_is_none_for_a_device(self, homes, tiny_world, tmp_path):
        body = 'privacy.trust = "none"'
        open_one = homes.publish(tiny_world(tmp_path, body=body), tmp_path)
        home = homes.make_home(tmp_path / "home")
        with pytest.raises(PrivacyError, match="must promise something"):
            homes.consent(home, open_one)

    def test_campaigns_add_up_under_the_owner_s_cap(self, homes, published, tiny_world, tmp_path):
        home = homes.make_home(tmp_path / "home", published, cap_epsilon=12.0)
        second = homes.publish(tiny_world(tmp_path), tmp_path, overrides=("seed=9", "privacy.epsilon=4"))
        homes.consent(home, second)
        assert reserved(home) == (12.0, [0, 0])
        third = homes.publish(tiny_world(tmp_path), tmp_path / "third", overrides=("seed=10", "privacy.epsilon=0.5"))
        with pytest.raises(LedgerError, match="cap"):
            homes.consent(home, third)
        assert homes.ask(home, third.campaign)[0] == "POLICY"

    def test_an_altered_start_is_no_campaign(self, homes, published, tmp_path):
        home = homes.make_home(tmp_path / "home")
        folder = tmp_path / "campaign"
        shutil.copytree(published.campaign.folder, folder)
        path = folder / "start.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
        with pytest.raises(CampaignError, match="start the policy names"):
            agree(home, folder, operator=published.key, until=homes.UNTIL)
        scenario = folder / "scenario.json"
        shutil.copyfile(published.campaign.folder / "start.safetensors", path)
        settings = json.loads(scenario.read_text())
        settings["training"]["learning_rate"] = 9.0
        scenario.write_text(json.dumps(settings))
        with pytest.raises(CampaignError, match="settings the policy names"):
            agree(home, folder, operator=published.key, until=homes.UNTIL)


def seeded_answer(home):
    """The ClientApp of a device whose noise a test draws from seeds."""

    def device(context):
        del context
        return OwnedDevice(
            home,
            randomness=lambda campaign, round_number: SeededRandomness(
                seed=1, campaign=campaign.policy.campaign, device=0, round_number=round_number
            ),
        )

    return lambda message, context: answer(message, context, find=device)


def test_a_reply_whose_noise_could_be_foreseen_says_so_and_no_server_takes_it(homes, home, published):
    campaign = published.campaign
    gate = {"policy": campaign.policy, "policy_sha256": campaign.policy.sha256, "round_number": 1}
    _, reply = homes.ask(home, campaign, client=seeded_answer(home))
    with pytest.raises(RejectedReply) as refused:
        check_reply(reply, **gate)
    assert refused.value.code == "SEEDED"
    _, again = homes.ask(home, campaign, client=seeded_answer(home))
    assert check_reply(again, **gate, accept_seeded=True)
    _, honest = homes.ask(home, campaign, round_number=2)
    with pytest.raises(RejectedReply, match="SEEDED"):  # a test's server takes no others
        check_reply(honest, **gate | {"round_number": 2}, accept_seeded=True)


def test_no_setting_environment_or_message_makes_the_noise_foreseeable(homes, home, published, monkeypatch):
    """Only a caller in the device's own process can; two answers to one request never share their noise."""
    for name in ("RANDOMNESS", "SEED", "SOTTOVOCE_SEED", "PYTHONHASHSEED", "SOTTOVOCE_RANDOMNESS"):
        monkeypatch.setenv(name, "1")
    made = []
    monkeypatch.setattr("client.training.device.SecureRandomness", lambda: made.append(1) or SecureRandomness())
    campaign = published.campaign
    grid = homes.grid_of([home.folder], run_config={"seed": 1, "randomness": "seeded", "noise": "seeded"})
    for context in grid._contexts.values():
        context.node_config |= {"seed": 1, "randomness": "seeded", "noise": "seeded"}
    arrays = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    content = wire.pack_request(wire.pack_arrays(arrays), round_number=1, policy_sha256=campaign.policy.sha256)
    [reply] = grid.send_and_receive([Message(content, dst_node_id=1000, message_type="train")])
    assert made == [1]
    assert not wire.take_stamp(reply.content)
    content[wire.CONFIG]["noise"] = "seeded"
    [refused] = grid.send_and_receive([Message(content, dst_node_id=1000, message_type="train")])
    assert wire.refusal_code(refused) == "SCHEMA"
