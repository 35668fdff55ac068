"""The exported graph and adapters against torch; and that a wrong export is not written."""

import copy
import json
import re
from datetime import UTC, datetime

import numpy as np
import onnx
import pytest
import torch

import client.export.encoder
import client.export.graph
from client.export.encoder import TOLERANCE, export_base, export_head
from client.runtime.runtime import open_base, open_head
from shared.config import AdapterConfig, FederationConfig, ModelConfig, Scenario, TaskConfig
from shared.errors import HeadError
from shared.heads.output import OutputLayer, pooled_features
from shared.heads.rating import RatingHead
from shared.models.features import compute_features

TARGETS = ("attention.output.dense", "output.dense")
TASK = TaskConfig()
MAX_TOKENS = 48
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PRIVACY = {"trust": "local", "unit": "record", "epsilon": 8.0}


def make_head(base, *, blocks=1, method="ffa-lora", seed=0, scaling=2.0, rank=4):
    """A head whose LoRA has a visible effect."""
    adapter = AdapterConfig(rank=rank, scaling=scaling, targets=TARGETS, whitened_features=8)
    model, federation = ModelConfig(head_blocks=blocks), FederationConfig(method=method)
    head = RatingHead(base, Scenario(name="tiny", task=TASK, model=model, adapter=adapter, federation=federation))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in head.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return head


def output_layer(base, *, seed=0):
    return np.random.default_rng(seed).normal(size=base.hidden_size), 3.2


def write_head(folder, base_folder, head, texts, *, seed=0, user="u1"):
    weight, bias = output_layer(head.base[0], seed=seed)
    return export_head(
        folder,
        base_folder=base_folder,
        head=head,
        output=OutputLayer(weight, bias),
        user=user,
        privacy=PRIVACY,
        probe_texts=texts,
        created=CREATED,
    )


def torch_predictions(head, texts, *, seed=0):
    weight, bias = output_layer(head.base[0], seed=seed)
    features = compute_features(head.base[0], texts, head_blocks=len(head.blocks), max_tokens=MAX_TOKENS)
    return pooled_features(head, features) @ weight + bias


@pytest.fixture
def fleet(tiny_fleet, tiny_graph, monkeypatch):
    """The exported base with slots in both blocks; a further export of it takes the same trace."""
    monkeypatch.setattr(client.export.graph, "_trace", lambda model, *, max_tokens: copy.deepcopy(tiny_graph))
    return tiny_fleet


def test_base_alone_is_torch_and_predicts_the_centre(fleet, tiny_base, tiny_texts):
    base = open_base(fleet)
    texts = [*tiny_texts, tiny_texts[8] * 3]  # the last one is cut
    pooled, predictions = base.run(texts)
    features = compute_features(tiny_base, texts, head_blocks=0, max_tokens=MAX_TOKENS)
    for row in range(len(texts)):
        wanted = features.batch([row])[0][0, 0].numpy()
        np.testing.assert_allclose(pooled[row], wanted, atol=1e-5)
    assert (predictions == TASK.centre).all()
    np.testing.assert_allclose(np.linalg.norm(pooled, axis=1), 1, atol=1e-5)  # the model's own normalisation
    assert np.ptp(pooled, axis=0).max() > 0.1  # texts differ


@pytest.mark.parametrize("method", ["fedavg", "ffa-lora"])
@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_head_predicts_what_torch_predicts(fleet, tiny_base, tiny_texts, tmp_path, blocks, method):
    head = make_head(tiny_base, blocks=blocks, method=method)
    manifest = write_head(tmp_path / "u1", fleet, head, tiny_texts)
    others = [f"{text} and more" for text in tiny_texts]  # not the probes
    found = open_head(tmp_path / "u1", base=fleet).raw(others)
    wanted = torch_predictions(head, others)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert 0 <= manifest["parity"]["max_abs"] <= 1e-5
    assert manifest["parity"]["n_probes"] == len(tiny_texts)
    assert manifest["rank"] == (4 if blocks else 0)
    assert sum(slot["name"].startswith("lora.") for slot in manifest["slots"]) == 4 * blocks
    if blocks:  # and the LoRA is part of it
        bare = make_head(tiny_base, blocks=blocks, scaling=1e-20)
        assert np.abs(torch_predictions(bare, others) - wanted).max() > 0.05


def test_a_rank_of_its_own_per_user(fleet, tiny_base, tiny_texts, tmp_path):
    for rank in (1, 7):
        head = make_head(tiny_base, rank=rank)
        write_head(tmp_path / "u1", fleet, head, tiny_texts)  # the second replaces the first
        found = open_head(tmp_path / "u1", base=fleet).raw(tiny_texts)
        np.testing.assert_allclose(found, torch_predictions(head, tiny_texts), atol=1e-5)


def test_manifests_say_what_they_must(fleet, tiny_base, tiny_texts, tmp_path):
    written = write_head(tmp_path / "u1", fleet, make_head(tiny_base), tiny_texts)
    manifest = json.loads((tmp_path / "u1" / "manifest.json").read_text())
    assert manifest == written
    base = json.loads((fleet / "manifest.json").read_text())
    assert manifest["user"] == "u1"
    assert manifest["privacy"] == PRIVACY
    assert manifest["created"] == "2026-01-02T03:04:05+00:00"
    assert "personal data" in manifest["personal_data"]
    assert manifest["base"]["id"] == base["id"]
    assert manifest["base"]["model_sha256"] == base["files"]["model.onnx"]["sha256"]
    assert manifest["base"]["base_sha256"] == base["base_sha256"] == tiny_base.sha256
    assert base["task"] == {"name": "rating", "low": 1.0, "high": 5.0, "centre": 3.0}
    assert sorted(path.name for path in (tmp_path / "u1").iterdir()) == [
        "adapter.safetensors",
        "manifest.json",
    ]
    assert sorted(path.name for path in fleet.iterdir()) == ["manifest.json", "model.onnx", "tokenizer.json"]


def test_graph_keeps_no_trace_of_the_machine(fleet):
    content = (fleet / "model.onnx").read_bytes()
    assert not re.search(rb"stack_trace|\.py\b|/site-packages|/home/|/tmp/", content)
    model = onnx.load_model_from_string(content)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert all(
        tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer
    )  # one single file


def test_a_second_export_uses_the_cached_graph(fleet, tiny_base, tiny_texts, tmp_path, monkeypatch):
    built = []
    build = client.export.encoder.build_graph
    monkeypatch.setattr(client.export.encoder, "build_graph", lambda *a, **k: built.append(1) or build(*a, **k))

    def export(targets=TARGETS):
        return export_base(
            tiny_base,
            tmp_path / "base",
            blocks=[1],
            targets=targets,
            max_tokens=MAX_TOKENS,
            task=TASK,
            probe_texts=tiny_texts,
            cache=tmp_path / "cache",
        )

    first, second = export(), export()
    assert len(built) == 1
    assert first == second
    (cached,) = (tmp_path / "cache").glob("*.onnx")
    cached.write_bytes(cached.read_bytes()[:-1] + b"\0")  # damaged: made anew
    assert export()["id"] == first["id"]
    assert len(built) == 2
    assert export(targets=TARGETS[:1])["id"] != first["id"]  # another graph has another key
    assert len(built) == 3


def test_gate_refuses_a_head_that_differs_from_torch(fleet, tiny_base, tiny_texts, tmp_path, monkeypatch):
    tensors = client.export.encoder._adapter_tensors

    def perturbed(*args):
        found = tensors(*args)
        found["output.bias"] = found["output.bias"] + np.float32(3 * TOLERANCE)
        return found

    monkeypatch.setattr(client.export.encoder, "_adapter_tensors", perturbed)
    with pytest.raises(HeadError, match=r"must agree within 1e-05"):
        write_head(tmp_path / "u1", fleet, make_head(tiny_base), tiny_texts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fault", ["untransposed", "unscaled", "swapped"])
def test_gate_refuses_the_usual_mistakes(fleet, tiny_base, tiny_texts, tmp_path, monkeypatch, fault):
    tensors = client.export.encoder._adapter_tensors

    def wrong(*args):
        found = tensors(*args)
        b = [name for name in found if name.endswith(".B")]
        if fault == "untransposed":
            for name in b:
                found[name] = np.ascontiguousarray(found[name].T).reshape(found[name].shape)
        elif fault == "unscaled":
            for name in b:
                found[name] = found[name] / 2
        else:
            found[b[0]], found[b[1]] = found[b[1]], found[b[0]]
        return found

    monkeypatch.setattr(client.export.encoder, "_adapter_tensors", wrong)
    with pytest.raises(HeadError, match="must agree"):
        write_head(tmp_path / "u1", fleet, make_head(tiny_base), tiny_texts)


def test_gate_refuses_nan(fleet, tiny_base, tiny_texts, tmp_path):
    head = make_head(tiny_base)
    with torch.no_grad():
        head.blocks[0].output.dense.lora_B["default"].weight[0, 0] = float("nan")
    with pytest.raises(HeadError, match="finite"):
        write_head(tmp_path / "u1", fleet, head, tiny_texts)
    assert list(tmp_path.iterdir()) == []


def test_gate_refuses_an_adapter_without_effect(fleet, tiny_base, tiny_texts, tmp_path):
    head = make_head(tiny_base, scaling=1e-20)  # parity alone would pass
    with pytest.raises(HeadError, match="LoRA's tensors must change"):
        write_head(tmp_path / "u1", fleet, head, tiny_texts)
    assert list(tmp_path.iterdir()) == []


def test_an_all_zero_adapter_is_the_base(fleet, tiny_base, tiny_texts, tmp_path):
    head = make_head(tiny_base)
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    export_head(
        tmp_path / "u1",
        base_folder=fleet,
        head=head,
        output=OutputLayer(np.zeros(tiny_base.hidden_size), TASK.centre),
        user="u1",
        privacy={},
        probe_texts=tiny_texts,
        created=CREATED,
    )
    assert (open_head(tmp_path / "u1", base=fleet).raw(tiny_texts) == TASK.centre).all()


def test_gate_refuses_slots_that_change_the_base(fleet, tiny_base, tiny_texts, tmp_path, monkeypatch):
    insert = client.export.graph._insert_slots

    def damaging(graph_model, *args, **kwargs):
        insert(graph_model, *args, **kwargs)
        for tensor in graph_model.graph.initializer:
            if tensor.name.endswith("word_embeddings.weight"):
                value = onnx.numpy_helper.to_array(tensor) * np.float32(1 + 1e-5)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))

    monkeypatch.setattr(client.export.graph, "_insert_slots", damaging)
    with pytest.raises(HeadError, match="empty slots must not change"):
        export_base(
            tiny_base,
            tmp_path / "base",
            blocks=[1],
            targets=TARGETS,
            max_tokens=MAX_TOKENS,
            task=TASK,
            probe_texts=tiny_texts,
        )
    assert list(tmp_path.iterdir()) == []


def test_head_of_another_base_is_refused(fleet, make_tiny_base, tiny_texts, tmp_path):
    other = make_tiny_base(tmp_path / "model", seed=1)
    with pytest.raises(HeadError, match="must be used with the base it was exported for"):
        write_head(tmp_path / "u1", fleet, make_head(other), tiny_texts)
    assert not (tmp_path / "u1").exists()


def test_impossible_requests_are_refused(fleet, tiny_base, tiny_texts, tmp_path):
    def export(**changes):
        settings = {
            "blocks": [1],
            "targets": TARGETS,
            "max_tokens": MAX_TOKENS,
            "task": TASK,
            "probe_texts": tiny_texts,
        }
        export_base(tiny_base, tmp_path / "base", **settings | changes)

    with pytest.raises(HeadError, match="blocks must lie between 0 and 1"):
        export(blocks=[2])
    with pytest.raises(HeadError, match="targets must name linear layers"):
        export(targets=["output.LayerNorm"])
    with pytest.raises(HeadError, match="at least 16 different texts, got 1"):
        export(probe_texts=["the same"] * 20)
    with pytest.raises(HeadError, match=r"output\.weight must be folded from shape \(32,\)"):
        export_head(
            tmp_path / "u1",
            base_folder=fleet,
            head=make_head(tiny_base),
            output=OutputLayer(np.zeros(31), 3.0),
            user="u1",
            privacy={},
            probe_texts=tiny_texts,
            created=CREATED,
        )
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep me")
    with pytest.raises(HeadError, match="choose another folder"):
        write_head(tmp_path / "mine", fleet, make_head(tiny_base), tiny_texts)
    assert (tmp_path / "mine" / "letter.txt").read_text() == "keep me"


def test_a_refused_export_leaves_the_earlier_one(fleet, tiny_base, tiny_texts, tmp_path):
    write_head(tmp_path / "u1", fleet, make_head(tiny_base), tiny_texts)
    before = (tmp_path / "u1" / "adapter.safetensors").read_bytes()
    with pytest.raises(HeadError):
        write_head(tmp_path / "u1", fleet, make_head(tiny_base, scaling=1e-20), tiny_texts)
    assert (tmp_path / "u1" / "adapter.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["u1"]


@pytest.mark.slow
def test_real_base(tmp_path, tiny_texts):
    from shared.assets import fetch
    from shared.models.model import load_base

    base = load_base(fetch("all-MiniLM-L6-v2", quiet=True))
    export_base(
        base,
        tmp_path / "base",
        blocks=[base.num_blocks - 1],
        targets=TARGETS,
        max_tokens=MAX_TOKENS,
        task=TASK,
        probe_texts=tiny_texts,
    )
    head = make_head(base)
    manifest = write_head(tmp_path / "u1", tmp_path / "base", head, tiny_texts)
    assert manifest["parity"]["max_abs"] <= 1e-5
    personal = open_head(tmp_path / "u1")
    np.testing.assert_allclose(personal.raw(tiny_texts), torch_predictions(head, tiny_texts), atol=1e-5)
    size = (tmp_path / "u1" / "adapter.safetensors").stat().st_size
    assert size < (tmp_path / "base" / "model.onnx").stat().st_size / 100
