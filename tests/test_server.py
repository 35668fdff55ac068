"""The coordinator: gate, mean, optimisers and checkpoints, each against a case worked out by hand."""

import io
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from server.aggregate import OptimizerState, adam_step, mean_update, momentum_step
from server.checkpoint import Checkpoint, Counts, last_checkpoint, load_checkpoint, save_checkpoint
from server.gate import RejectedReply, check_reply
from shared.config import FederationConfig
from shared.errors import CampaignError
from shared.flower.grid import InlineGrid, round_trip_bytes
from shared.privacy.policy import Policy
from shared.protocol import wire

POLICY = Policy(
    protocol=1, campaign="c", trust="local", unit="record", relation="add-or-remove-one", epsilon=8.0, delta=1e-5,
    clip_norm=1.0, noise_multiplier=1.0, grid=2**-24, sampling_rate=1.0, steps=1, denominator=4.0, max_participations=5,
    max_update_norm=10.0, learning_rate=1.0, rounds=5, cohort_size=2, federation_method="ffa-lora",
    personal_method="none", technique="lora", head_blocks=0, settings_sha256="h", base_sha256="b", start_sha256="s",
    public_texts_sha256="p", reply_fields=("arrays",), slots=(("a", (2,)), ("b", (1, 2))),
)  # fmt: skip
GOOD = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([[3.0, 4.0]], np.float32)}


@pytest.fixture(autouse=True)
def speaking_server():
    """Messages can be made only where somebody speaks; the inline grid sets that up."""
    InlineGrid(lambda message, _: message, devices=1, run_config={})


def reply_with(content: RecordDict) -> Message:
    return Message(content, dst_node_id=7, message_type="train")


def reply(arrays=GOOD, *, round_number=3, policy=None) -> Message:
    return reply_with(wire.pack_reply(arrays, round_number=round_number, policy_sha256=policy or POLICY.sha256))


def check(message):
    return check_reply(message, policy=POLICY, policy_sha256=POLICY.sha256, round_number=3)


def test_a_good_reply_passes_unchanged():
    found = check(reply())
    assert {name: array.tolist() for name, array in found.items()} == {"a": [1, 2], "b": [[3, 4]]}


def config(**fields):
    return ConfigRecord({"round": 3, "policy": POLICY.sha256} | fields)


def arrays_record(**changes):
    return ArrayRecord({name: Array(array) for name, array in (GOOD | changes).items()})


def with_bytes(data, *, stype="numpy.ndarray"):
    return ArrayRecord({"a": Array("float32", (2,), stype, data), "b": Array(GOOD["b"])})


def header(shape):
    """A .npy header that claims a shape, with eight bytes of values after it."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(8)


def npz():
    buffer = io.BytesIO()
    np.savez(buffer, a=GOOD["a"])
    return buffer.getvalue()


HOSTILE = {
    "no array at all": b"garbage",
    "nothing": b"",
    "the start of a zip file": b"PK\x03\x04",
    "a .npz archive": npz(),
    "a shape of terabytes": header((10**13,)),
    "a shape beyond any integer": header((0, 10**30)),
    "a broken header": b"\x93NUMPY\x01\x00\x06\x00{'desc",
    "another byte order": header((2,)).replace(b"<f4", b">f4"),
    "one byte more": header((2,)) + b"x",
    "one byte less": header((2,))[:-1],
}


@pytest.mark.fault("R9")
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_bytes_of_a_reply_are_compared_and_never_interpreted(data):
    with pytest.raises(RejectedReply, match="ARRAY"):
        check(reply_with(RecordDict({"arrays": with_bytes(data), "config": config()})))


BAD = {
    "SCHEMA: nothing": (RecordDict(), "SCHEMA"),
    "SCHEMA: one record more": (
        RecordDict({"arrays": arrays_record(), "config": config(), "metrics": MetricRecord({"loss": 1.0})}),
        "SCHEMA",
    ),
    "SCHEMA: one field more": (RecordDict({"arrays": arrays_record(), "config": config(count=3)}), "SCHEMA"),
    "SCHEMA: a round as text": (RecordDict({"arrays": arrays_record(), "config": config(round="3")}), "SCHEMA"),
    "SCHEMA: records swapped": (RecordDict({"arrays": config(), "config": arrays_record()}), "SCHEMA"),
    "KEYS: one, and no array": (
        RecordDict(
            {"arrays": ArrayRecord({"a": Array("float32", (2,), "numpy.ndarray", b"garbage")}), "config": config()}
        ),
        "KEYS",
    ),
    "ARRAY: another serialisation": (
        RecordDict({"arrays": with_bytes(b"x", stype="pickle"), "config": config()}),
        "ARRAY",
    ),
    "ROUND": (RecordDict({"arrays": arrays_record(), "config": config(round=2)}), "ROUND"),
    "POLICY": (RecordDict({"arrays": arrays_record(), "config": config(policy="0" * 64)}), "POLICY"),
    "KEYS: missing": (RecordDict({"arrays": ArrayRecord({"a": Array(GOOD["a"])}), "config": config()}), "KEYS"),
    "KEYS: one more": (RecordDict({"arrays": arrays_record(c=GOOD["a"]), "config": config()}), "KEYS"),
    "KEYS: other order": (
        RecordDict({"arrays": ArrayRecord({n: Array(GOOD[n]) for n in ("b", "a")}), "config": config()}),
        "KEYS",
    ),
    "ARRAY: dtype": (RecordDict({"arrays": arrays_record(a=np.array([1.0, 2.0])), "config": config()}), "ARRAY"),
    "ARRAY: broadcasts": (
        RecordDict({"arrays": arrays_record(b=np.zeros((2,), np.float32)), "config": config()}),
        "ARRAY",
    ),
    "NOT_FINITE: NaN": (
        RecordDict({"arrays": arrays_record(a=np.array([1, np.nan], np.float32)), "config": config()}),
        "NOT_FINITE",
    ),
    "NOT_FINITE: infinity": (
        RecordDict({"arrays": arrays_record(a=np.array([1, np.inf], np.float32)), "config": config()}),
        "NOT_FINITE",
    ),
    "NORM": (RecordDict({"arrays": arrays_record(a=np.array([8, 8], np.float32)), "config": config()}), "NORM"),
    "ARRAY: too long": (
        RecordDict({"arrays": arrays_record(a=np.zeros(100_000, np.float32)), "config": config()}),
        "ARRAY",
    ),
    "its own refusal": (wire.pack_refusal("BUDGET"), "BUDGET"),
    "a refusal with text of its own": (
        RecordDict({"refusal": ConfigRecord({"code": "my diary says"})}),
        "INTERNAL",
    ),
}


@pytest.mark.fault("R8", "R9")
@pytest.mark.parametrize("case", BAD)
def test_a_bad_reply_is_rejected_for_its_reason(case):
    content, code = BAD[case]
    with pytest.raises(RejectedReply) as caught:
        check(reply_with(content))
    assert caught.value.code == code


@pytest.mark.fault("R9")
def test_an_error_made_by_flower_is_rejected():
    with pytest.raises(RejectedReply, match="ERROR"):
        check(Message(Error(code=2, reason="node lost"), reply_to=reply()))


def test_an_unknown_refusal_never_travels():
    assert wire.pack_refusal("the text of an exception")["refusal"]["code"] == "INTERNAL"


def test_the_mean_divides_by_the_constant_however_many_replied():
    one = mean_update([GOOD], denominator=4)
    two = mean_update([GOOD, GOOD], denominator=4)
    assert one["a"].tolist() == [0.25, 0.5]
    assert two["a"].tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="at least one"):
        mean_update([], denominator=4)


def test_two_steps_of_momentum_by_hand():
    federation = FederationConfig(server_learning_rate=0.5, server_momentum=0.5, lora_learning_rate_factor=0.1)
    arrays = {"block.0.lora_B": np.zeros(1, np.float32), "output.weight": np.zeros(1, np.float32)}
    update = {name: np.ones(1) for name in arrays}
    after, state = momentum_step(arrays, OptimizerState(), update, federation)
    after, state = momentum_step(after, state, update, federation)
    assert after["output.weight"].tolist() == [0.5 * (1 + 1.5)]
    assert after["block.0.lora_B"].tolist() == pytest.approx([0.05 * (1 + 1.5)])
    assert state.steps == dict.fromkeys(arrays, 2)
    after, state = momentum_step(after, state, {"output.weight": np.ones(1)}, federation)
    assert after["block.0.lora_B"].tolist() == pytest.approx([0.05 * (1 + 1.5)])  # not its turn
    assert after["output.weight"].tolist() == [0.5 * (1 + 1.5 + 1.75)]
    assert (state.steps["block.0.lora_B"], state.first["block.0.lora_B"]) == (2, 1.5)


def test_adam_agrees_with_torch():
    import torch

    federation = FederationConfig(
        server_learning_rate=0.1, server_momentum=0.8, adam_beta2=0.9, adam_epsilon=1e-3, lora_learning_rate_factor=1.0
    )
    draw = np.random.default_rng(0)
    arrays, state = {"output.weight": np.zeros(5, np.float32)}, OptimizerState()
    parameter = torch.nn.Parameter(torch.zeros(5))
    reference = torch.optim.Adam([parameter], lr=0.1, betas=(0.8, 0.9), eps=1e-3)
    for _ in range(6):
        update = draw.normal(size=5)
        arrays, state = adam_step(arrays, state, {"output.weight": update}, federation)
        parameter.grad = -torch.from_numpy(update).float()
        reference.step()
    np.testing.assert_allclose(arrays["output.weight"], parameter.detach().numpy(), rtol=1e-4)


CHECKPOINT = Checkpoint(
    7, "p" * 64, GOOD, OptimizerState({"a": 7}, {"a": np.ones(2), "b": np.ones((1, 2))}, {}), {1000: 2, 1003: 1}
)


def test_a_checkpoint_is_read_back_as_it_was(tmp_path):
    path = save_checkpoint(tmp_path, CHECKPOINT)
    found = load_checkpoint(path)
    assert path.name == "round-0007"
    assert (found.round_number, found.policy_sha256) == (7, "p" * 64)
    assert found.participations == CHECKPOINT.participations
    assert found.optimizer.steps == {"a": 7}
    np.testing.assert_array_equal(found.arrays["b"], GOOD["b"])
    np.testing.assert_array_equal(found.optimizer.first["a"], np.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["round-0007"]


@pytest.mark.fault("R11")
@pytest.mark.parametrize("damage", ["bit", "truncated", "missing", "state"])
def test_a_damaged_checkpoint_is_noticed(tmp_path, damage):
    path = save_checkpoint(tmp_path, CHECKPOINT)
    tensors = path / "tensors.safetensors"
    content = bytearray(tensors.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
        tensors.write_bytes(content)
    elif damage == "truncated":
        tensors.write_bytes(content[:-4])
    elif damage == "missing":
        tensors.unlink()
    else:
        (path / "state.json").write_text("{}")
    with pytest.raises(CampaignError, match="round-0007 must"):
        load_checkpoint(path)


@pytest.mark.fault("R11")
def test_the_last_good_checkpoint_is_found_and_later_damage_put_aside(tmp_path):
    for number in (6, 7, 8, 9):
        save_checkpoint(tmp_path, replace(CHECKPOINT, round_number=number))
    truncate = tmp_path / "round-0009" / "tensors.safetensors"
    truncate.write_bytes(truncate.read_bytes()[:-1])
    state = tmp_path / "round-0008" / "state.json"
    state.write_text(state.read_text().replace('"1000": 2', '"1000": 1'))  # a round that would cost nothing
    (tmp_path / ".round-0010.123").mkdir()
    found = last_checkpoint(tmp_path, policy_sha256="p" * 64)
    assert found is not None
    assert found.round_number == 7
    names = {"round-0006", "round-0007", "damaged-round-0008", "damaged-round-0009"}
    assert {path.name for path in tmp_path.iterdir()} == names
    save_checkpoint(tmp_path, replace(CHECKPOINT, round_number=8))  # its place is free again


def test_a_checkpoint_of_another_scenario_is_refused(tmp_path):
    save_checkpoint(tmp_path, CHECKPOINT)
    with pytest.raises(CampaignError, match="a checkpoint of another scenario"):
        last_checkpoint(tmp_path, policy_sha256="q" * 64)
    assert last_checkpoint(tmp_path / "none", policy_sha256="q" * 64) is None


def test_counts_add_up():
    a, b = Counts(3, {"NORM": 1}, 10, 20), Counts(1, {"NORM": 2, "ARRAY": 1}, 1, 2)
    assert a + b == Counts(4, {"NORM": 3, "ARRAY": 1}, 11, 22)


@pytest.mark.fault("R11")
@pytest.mark.fault("R1")
def test_an_interrupted_save_leaves_no_checkpoint(tmp_path, monkeypatch):
    def power_cut(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shared.files.os.fsync", power_cut)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, CHECKPOINT)
    assert list(tmp_path.glob("round-*")) == []
    monkeypatch.undo()
    assert load_checkpoint(save_checkpoint(tmp_path, CHECKPOINT)).round_number == 7


def test_policies_with_another_constant_have_another_hash():
    assert POLICY.sha256 == POLICY.model_copy().sha256
    for field, value in {"noise_multiplier": 0.5, "clip_norm": 2.0, "steps": 2, "rounds": 6}.items():
        assert POLICY.model_copy(update={field: value}).sha256 != POLICY.sha256


def test_the_wire_counts_real_bytes():
    contents = [RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(n))})}) for n in (10, 1010)]
    small, large = (round_trip_bytes(content, content) for content in contents)
    for a, b in zip(small, large, strict=True):
        assert b - a == pytest.approx(8000, abs=16)
