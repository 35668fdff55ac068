"""What a hostile server or operator tried on an owner's device, with a policy signed by the operator's own key."""

import json
import shutil

import numpy as np
import pytest
from flwr.app import Message, RecordDict

from client.home.store import RecordStore
from client.log import describe_error, note
from client.owner.consent import agree
from client.training.device import OwnedDevice
from shared.datasets import Record
from shared.errors import CampaignError, PrivacyError
from shared.heads.tasks import IGNORE, encode_dialogues
from shared.privacy.accounting import epsilon
from shared.privacy.noise import GRID_SIGMA, SecureRandomness
from shared.protocol import wire
from shared.protocol.campaign import read_campaign
from shared.protocol.signing import load_private, sign_policy

EXTRA = ("Jaws (1975). Action, Horror, Thriller", "War " * 30)


def published_with(homes, tiny_world, folder, *overrides):
    """A signed campaign of scenario settings that its operator chose."""
    folder.mkdir()
    return homes.publish(tiny_world(folder), folder, overrides=("privacy.denominator=0.01", *overrides))


def clipped_sums(homes, published, folder, stores, arrays=None):
    """What devices with these records send when the noise is silent, in units of the clip norm."""
    policy = published.campaign.policy
    found = []
    for i, records in enumerate(stores):
        home = homes.make_home(folder / f"home-{i}")
        home.records().add(records)
        homes.consent(home, published)
        code, reply = homes.ask(home, published.campaign, **({"arrays": arrays} if arrays else {}))
        assert code is None
        update = np.concatenate([array.ravel() for array in homes.update_in(reply, published.campaign).values()])
        found.append(update.astype(np.float64) * policy.denominator / policy.learning_rate / policy.clip_norm)
    return found


def hostile_arrays(campaign):
    """The largest shared values a device takes."""
    draw = np.random.default_rng(3)
    return {slot.name: draw.uniform(-16, 16, slot.shape).astype(np.float32) for slot in campaign.policy.array_slots()}


@pytest.mark.parametrize("batched", [False, True])
def test_no_setting_lets_one_record_move_the_others(
    homes, tiny_world, tiny_texts, steps, tmp_path, monkeypatch, batched
):
    """With a scaling of 1000, texts in one batch round each other off: one record moved the sum by three times C."""
    monkeypatch.setattr("client.training.device.SecureRandomness", steps.Silent)
    if batched:
        monkeypatch.setattr(OwnedDevice, "micro_batch", lambda *_: 1024)
    targets = 'adapter.targets=["attention.self.query", "attention.self.key"]'
    published = published_with(homes, tiny_world, tmp_path / "p", targets, "adapter.scaling=1000")
    records = [Record(text, 3.0 + 0.5 * (i % 3), str(i), i) for i, text in enumerate(tiny_texts)]
    stores = [records, *([*records, Record(text, 1.0, "", 0)] for text in EXTRA)]
    without, *others = clipped_sums(homes, published, tmp_path, stores, hostile_arrays(published.campaign))
    moved = [float(np.linalg.norm(other - without)) for other in others]
    assert max(moved) > 2 if batched else max(moved) <= 1.0001


def test_a_text_the_base_cannot_take_counts_as_zero_and_tells_nothing(homes, tiny_world, steps, tmp_path, monkeypatch):
    """Beyond the base's 128 positions: a code, or a burnt round, would say that such a record is there."""
    monkeypatch.setattr("client.training.device.SecureRandomness", steps.Silent)
    published = published_with(homes, tiny_world, tmp_path / "p", "model.max_tokens=300")
    records = published.dataset.users[0].train
    too_long = Record("word " * 400, 5.0, "x", 1)
    without, with_it = clipped_sums(homes, published, tmp_path, (records, (records[0], too_long, *records[1:])))
    assert np.linalg.norm(without) > 0
    np.testing.assert_array_equal(with_it, without)


def test_a_dialogue_without_a_prompt_has_a_label_for_every_token(tiny_causal, tiny, tmp_path):
    from shared.config import load_scenario

    data = tiny.tiny_dialogues(tmp_path / "data")
    path = tiny.tiny_generation(tmp_path, base=tiny_causal.folder, data=data)
    scenario = load_scenario(path, ("task.template={text}",))
    encoded = encode_dialogues(tiny_causal, [("", "i like tea ."), ("tea ?", "yes .")], scenario)
    assert encoded.labels is not None
    for ids, labels in zip(encoded.token_ids, encoded.labels, strict=True):
        assert len(ids) == len(labels)
        answered = labels != IGNORE
        assert labels[answered].tolist()[:-1] == ids[answered.argmax() + 1 :]
        assert labels[-1] == tiny_causal.eos_id


CONSTANTS = {
    "a clip norm whose grid is zero": {"clip_norm": 5e-324},  # raised with records, answered without
    "an endless clip norm": {"clip_norm": float("inf")},
    "a step that overflows": {"denominator": 1e-300},
    "no denominator": {"denominator": 0.0},
    "a negative rate": {"learning_rate": -1.0},
    "a bound that is none": {"max_update_norm": float("inf")},
    "a bound that is no number": {"max_update_norm": float("nan")},
    "steps without end": {"steps": 10**9, "noise_multiplier": 1e5},
    "more rounds than a number holds": {"max_participations": 10**400},
    "a name that writes on the terminal": {"campaign": "\x1b[2J"},
    "a delta that needs no noise": {
        "sampling_rate": 1e-5, "delta": 9e-4, "epsilon": 1.0, "noise_multiplier": 0.06,
    },
}  # fmt: skip


def altered(published, folder, **changes):
    """The campaign with other constants, signed again by its operator."""
    shutil.copytree(published.campaign.folder, folder)
    policy = published.campaign.policy.model_copy(update=changes)
    policy = policy.model_copy(update={"grid": policy.noise_multiplier * policy.clip_norm / GRID_SIGMA})
    text = json.dumps(policy.model_dump(mode="json")).replace("Infinity", "1e999")
    (folder / "policy.json").write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize("changes", CONSTANTS.values(), ids=list(CONSTANTS))
def test_constants_that_break_a_step_are_refused_before_the_owner_is_asked(homes, published, tmp_path, changes):
    home = homes.make_home(tmp_path / "home")
    folder = altered(published, tmp_path / "campaign", **changes)

    def agreed():
        sign_policy(folder, load_private(published.private))  # NaN is not even signed
        agree(home, folder, operator=published.key, until=homes.UNTIL)

    with pytest.raises((PrivacyError, CampaignError)):
        agreed()
    with home.ledger() as ledger:
        assert ledger.consents() == ()


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3"])
def test_a_start_of_numbers_that_numpy_has_not_is_a_damaged_campaign(published, tmp_path, kind):
    folder = tmp_path / "campaign"
    shutil.copytree(published.campaign.folder, folder)
    header = json.dumps({"x": {"dtype": kind, "shape": [0], "data_offsets": [0, 0]}}).encode()
    (folder / "start.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CampaignError, match="damaged"):
        read_campaign(folder)


def test_slots_that_are_not_the_head_s_cost_no_round(homes, published, tmp_path, monkeypatch):
    monkeypatch.setattr(RecordStore, "read", lambda _: pytest.fail("a record was read"))
    folder = altered(published, tmp_path / "campaign", slots=published.campaign.policy.slots[:1])
    sign_policy(folder, load_private(published.private))
    home = homes.make_home(tmp_path / "home")
    campaign = agree(home, folder, operator=published.key, until=homes.UNTIL)
    assert homes.ask(home, campaign)[0] == "POLICY"
    with home.ledger() as ledger:
        assert [standing.spent for standing in ledger.consents()] == [0]


@pytest.mark.parametrize("policy", [b"{", b"\xff", b'{"protocol": 1}'])
def test_a_campaign_that_cannot_be_read_does_not_stop_the_others(homes, published, tmp_path, policy):
    """What a crash while copying leaves, or an older version."""
    home = homes.make_home(tmp_path / "home", published)
    broken = home.folder / "campaigns" / ".new.1"
    broken.mkdir()
    (broken / "policy.json").write_bytes(policy)
    assert homes.ask(home, published.campaign)[0] is None


def test_an_error_from_anywhere_leaves_as_a_code(homes, published, tmp_path, monkeypatch, caplog):
    """Python's own frames have names that are no words: the log line failed, and the error with its text got out."""
    home = homes.make_home(tmp_path / "home", published)

    def fail(_):
        exec(compile("raise ValueError('what the owner wrote')", "<frozen codecs>", "exec"))

    monkeypatch.setattr(RecordStore, "read", fail)
    assert homes.ask(home, published.campaign)[0] == "INTERNAL"
    assert "what the owner wrote" not in caplog.text


def test_every_error_can_be_noted():
    found = type("Ünknown Error", (Exception,), {})()
    note("refused", code="INTERNAL", **describe_error(found))


def test_a_message_of_any_kind_gets_a_code(homes, published, tmp_path):
    home = homes.make_home(tmp_path / "home", published)
    assert homes.ask(home, published.campaign, content=RecordDict())[0] == "SCHEMA"
    grid = homes.grid_of([home.folder])
    [reply] = grid.send_and_receive([Message(RecordDict(), dst_node_id=1000, message_type="query.seat")])
    assert wire.refusal_code(reply) == "NOT_A_SIMULATION"


@pytest.mark.slow
def test_a_device_runs_the_mechanism_that_is_priced(homes, tiny_world, tmp_path, monkeypatch):
    """With sampling and several steps, each step draws its own coins and its own noise, and all of it counts."""
    drawn = []

    class Watched(SecureRandomness):
        def bernoulli(self, probability, count):
            drawn.append(("coins", probability, count))
            return super().bernoulli(probability, count)

        def gaussian_integers(self, count):
            noise = super().gaussian_integers(count)
            drawn.append(("noise", noise.copy(), count))
            return noise

    monkeypatch.setattr("client.training.device.SecureRandomness", Watched)
    published = published_with(
        homes,
        tiny_world,
        tmp_path / "p",
        "privacy.sampling_rate=0.3",
        "training.steps=3",
        "privacy.max_participations=2",
    )
    policy, records = published.campaign.policy, published.dataset.users[0].train
    mechanism = policy.mechanism
    assert policy.epsilon * 0.99 < epsilon(mechanism, delta=policy.delta) <= policy.epsilon
    assert mechanism.noise_multiplier * policy.clip_norm == pytest.approx(policy.grid * GRID_SIGMA)
    assert (mechanism.sampling_rate, mechanism.releases) == (0.3, 3 * 2)
    for i, store in enumerate([(), records]):
        drawn.clear()
        home = homes.make_home(tmp_path / f"home-{i}")
        home.records().add(store)
        homes.consent(home, published)
        code, reply = homes.ask(home, published.campaign)
        assert code is None
        assert [(kind, count) for kind, _, count in drawn] == [
            ("coins", len(store)),
            ("noise", mechanism.coordinates),
        ] * 3
        assert {rate for kind, rate, _ in drawn if kind == "coins"} == {0.3}
        noise = sum(values for kind, values, _ in drawn if kind == "noise")
        update = np.concatenate([array.ravel() for array in homes.update_in(reply, published.campaign).values()])
        signal = -update * policy.denominator / policy.learning_rate / policy.grid - noise
        size = np.linalg.norm(signal) * policy.grid / policy.clip_norm
        assert size < 1e-3 if not store else 0.01 < size <= 3 * len(store)
