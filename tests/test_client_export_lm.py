"""An exported language model and its adapters against torch; and that a wrong export is not written."""

import json
import re
import shutil
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaForCausalLM

import client.export.graph_lm
import client.export.language_model
from client.export.graph_lm import read_cache_shape, read_stop_ids
from client.export.language_model import TOLERANCE, export_lm_base, export_lm_head, slot_tensors, torch_logits
from client.runtime.generation import open_generator
from client.runtime.language import open_lm_base
from shared.errors import HeadError

BASE_SHA256 = "ab" * 32
SCENARIO = Path(__file__).parent.parent / "simulations" / "scenarios" / "sotu.toml"
TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
CREATED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
PRIVACY = {"trust": "local", "unit": "record", "epsilon": 8.0}
SCALING = 2.0


class Adapted:
    """A model with a random LoRA by peft: its arrays by wire name, and its logits."""

    def __init__(self, folder, *, blocks=(1,), targets=TARGETS, rank=4, seed=0, std=0.3, scaling=SCALING):
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        names = [f"layers.{block}.{target}" for block in blocks for target in targets]
        config = LoraConfig(r=rank, lora_alpha=1, lora_dropout=0.0, target_modules=names)
        inject_adapter_in_model(config, self.model.model)
        generator = torch.Generator().manual_seed(seed)
        self.arrays = {}
        for name, module in self.model.model.named_modules():
            if isinstance(module, LoraLayer):
                module.scaling["default"] = scaling
                for factor in ("lora_A", "lora_B"):
                    weight = getattr(module, factor)["default"].weight
                    torch.nn.init.normal_(weight, std=std, generator=generator)
                    self.arrays[f"block.{name.removeprefix('layers.')}.{factor}"] = weight.detach().numpy()

    @torch.inference_mode()
    def logits(self, token_ids):
        return self.model(input_ids=torch.from_numpy(token_ids)).logits.numpy()

    @torch.inference_mode()
    def greedy(self, token_ids, count):
        ids = torch.tensor([token_ids])
        answer = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
            suppress_tokens=None, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return answer[0, len(token_ids) :].tolist()


def write_head(folder, base_folder, adapted, texts, **changes):
    settings = {
        "base_sha256": BASE_SHA256,
        "lora": adapted.arrays,
        "scaling": SCALING,
        "logits": adapted.logits,
        "user": "ann",
        "privacy": PRIVACY,
        "probe_texts": texts,
        "created": CREATED,
    }
    return export_lm_head(folder, base_folder=base_folder, **settings | changes)


def test_the_base_alone_is_torch(tiny_llama, tiny_lm_fleet):
    base = open_generator(tiny_lm_fleet)
    reference = Adapted(tiny_llama, std=0.0)
    for prompt in ("Heat", "The Wrong Trousers (1993). Animation, Comedy"):
        ids = base.base.tokenizer.encode(prompt).ids
        np.testing.assert_allclose(base.logits(ids), reference.logits(np.array([ids]))[0], atol=1e-4)
        found = base.generate(prompt, max_new_tokens=32, stop_at_eos=False)
        assert list(found.token_ids) == reference.greedy(ids, 32)
        assert len(set(found.token_ids)) > 3  # a model that repeats one token would prove little


@pytest.mark.parametrize(("blocks", "rank"), [((1,), 4), ((0, 1), 1), ((0,), 7)])
def test_a_head_generates_what_torch_does(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path, blocks, rank):
    adapted = Adapted(tiny_llama, blocks=blocks, rank=rank)
    manifest = write_head(tmp_path / "ann", tiny_lm_fleet, adapted, tiny_texts)
    head = open_generator(tmp_path / "ann", base=tiny_lm_fleet)
    bare = open_generator(tiny_lm_fleet)
    answers = set()
    for prompt in ("Heat", "no probe: Blade Runner (1982). Sci-Fi, Thriller"):
        ids = head.base.tokenizer.encode(prompt).ids
        np.testing.assert_allclose(head.logits(ids), adapted.logits(np.array([ids]))[0], atol=1e-4)
        found = head.generate(prompt, max_new_tokens=32, stop_at_eos=False)
        assert list(found.token_ids) == adapted.greedy(ids, 32)
        assert np.abs(head.logits(ids) - bare.logits(ids)).max() > 0.05
        answers |= {found.token_ids, bare.generate(prompt, max_new_tokens=32, stop_at_eos=False).token_ids}
    assert len(answers) == 4
    assert manifest["rank"] == rank
    assert 0 <= manifest["parity"]["max_abs"] <= 1e-4
    assert (manifest["parity"]["n_probes"], manifest["parity"]["greedy_tokens"]) == (3, 4)


def test_manifests_say_what_they_must(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path):
    written = write_head(tmp_path / "ann", tiny_lm_fleet, Adapted(tiny_llama), tiny_texts)
    manifest = json.loads((tmp_path / "ann" / "manifest.json").read_text())
    assert manifest == written
    base = json.loads((tiny_lm_fleet / "manifest.json").read_text())
    assert (manifest["kind"], base["kind"]) == ("lm-adapter", "lm-base")
    assert manifest["user"] == "ann"
    assert manifest["privacy"] == PRIVACY
    assert manifest["created"] == "2026-01-02T03:04:05+00:00"
    assert "personal data" in manifest["personal_data"]
    assert manifest["base"]["id"] == base["id"]
    assert manifest["base"]["model_sha256"] == base["files"]["model.onnx"]["sha256"]
    assert manifest["base"]["base_sha256"] == base["base_sha256"] == BASE_SHA256
    assert base["cache"] == {"layers": 2, "heads": 2, "width": 16}
    assert base["tokenizer"] == {"max_tokens": 128, "stop_ids": [2], "template": "{text}"}
    assert len(base["slots"]) == 2 * 2 * len(TARGETS)
    assert sorted(path.name for path in (tmp_path / "ann").iterdir()) == ["adapter.safetensors", "manifest.json"]
    assert sorted(path.name for path in tiny_lm_fleet.iterdir()) == ["manifest.json", "model.onnx", "tokenizer.json"]
    text = (tmp_path / "ann" / "manifest.json").read_text()
    assert not any(probe in text for probe in tiny_texts if probe)  # probes may be the user's


def test_the_graph_is_one_file_without_a_trace_of_the_machine(tiny_lm_fleet):
    content = (tiny_lm_fleet / "model.onnx").read_bytes()
    assert not re.search(rb"stack_trace|\.py\b|/site-packages|/home/|/tmp/", content)
    assert str(Path(__file__).parent.parent).encode() not in content  # wherever the code lies
    model = onnx.load_model_from_string(content)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)


def test_a_second_export_uses_the_cached_graph(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path, monkeypatch):
    model = (tiny_lm_fleet / "model.onnx").read_bytes()
    built = []

    def build(*args, **kwargs):
        built.append(1)
        return model

    monkeypatch.setattr(client.export.language_model, "build_lm_graph", build)

    def export(**changes):
        settings = {
            "base_sha256": BASE_SHA256,
            "blocks": [0, 1],
            "targets": TARGETS,
            "max_tokens": 100,
            "probe_texts": tiny_texts,
            "cache": tmp_path / "cache",
        }
        return export_lm_base(tiny_llama, tmp_path / "base", **settings | changes)

    first = export()
    assert export() == first
    assert len(built) == 1
    export(base_sha256="cd" * 32)
    assert len(built) == 2
    (cached, _) = (tmp_path / "cache").glob("*.onnx")
    for cached in (tmp_path / "cache").glob("*.onnx"):
        cached.write_bytes(cached.read_bytes()[:-1] + b"\0")  # damaged: made anew
    assert export()["id"] == first["id"]
    assert len(built) == 3
    with pytest.raises(HeadError, match="not the optional inputs"):  # another set of slots is another key
        export(blocks=[1])
    assert len(built) == 4
    assert export(max_tokens=50)["id"] != first["id"]


@pytest.mark.parametrize("fault", ["untransposed", "unscaled", "swapped", "missing", "NaN"])
def test_the_gate_refuses_the_usual_mistakes(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path, monkeypatch, fault):
    tensors = client.export.language_model.slot_tensors

    def wrong(lora, *, scaling):
        found = tensors(lora, scaling=scaling)
        b = [name for name in found if name.endswith("_proj.B") and "mlp" not in name]
        if fault == "untransposed":
            found[b[0]] = np.ascontiguousarray(found[b[0]].T).reshape(found[b[0]].shape)
        elif fault == "unscaled":
            found[b[0]] = found[b[0]] / 2
        elif fault == "swapped":
            rows = found[b[0]]
            found[b[0]] = rows[::-1].copy()
        elif fault == "missing":
            del found[b[0]], found[b[0][:-1] + "A"]
        else:
            found[b[0]][0, 0] = np.nan
        return found

    monkeypatch.setattr(client.export.language_model, "slot_tensors", wrong)
    with pytest.raises(HeadError, match=r"must agree|finite"):
        write_head(tmp_path / "ann", tiny_lm_fleet, Adapted(tiny_llama), tiny_texts)
    assert list(tmp_path.iterdir()) == []


def off(logits, by, row, when=lambda length: True):
    """A reference that is wrong in one logit of one position."""

    def wrong(token_ids):
        found = logits(token_ids).copy()
        if when(token_ids.shape[1]):
            found[:, row, 7] += by
        return found

    return wrong


def test_the_gate_of_a_head_compares_probes_and_the_answer_through_the_cache(
    tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path
):
    adapted = Adapted(tiny_llama)
    seen = []

    def counting(token_ids):
        seen.append(token_ids.shape[1])
        return adapted.logits(token_ids)

    write_head(tmp_path / "ann", tiny_lm_fleet, adapted, tiny_texts, logits=counting)
    shutil.rmtree(tmp_path / "ann")
    prompt = len(open_lm_base(tiny_lm_fleet).tokens(client.export.language_model._KNOWN_TEXT)) + 24
    assert seen == [prompt + 3]  # one pass of torch over texts and answer
    for row in (0, prompt - 24, prompt - 1, prompt, -1):
        with pytest.raises(HeadError, match=r"must agree within 0\.001"):
            write_head(tmp_path / "ann", tiny_lm_fleet, adapted, tiny_texts, logits=off(adapted.logits, 3e-3, row))
    assert list(tmp_path.iterdir()) == []
    write_head(tmp_path / "ann", tiny_lm_fleet, adapted, tiny_texts, logits=off(adapted.logits, TOLERANCE / 3, 20))


def test_the_gate_of_a_base_compares_every_probe_and_the_greedy_answer(
    tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path, monkeypatch
):
    model = (tiny_lm_fleet / "model.onnx").read_bytes()
    monkeypatch.setattr(client.export.language_model, "build_lm_graph", lambda *args, **kwargs: model)
    lengths = [len(ids) for ids in map(open_lm_base(tiny_lm_fleet).tokens, tiny_texts) if ids]
    alone = next(length for length in lengths if lengths.count(length) == 1)
    bare = torch_logits(tiny_llama)

    def export(logits):
        return export_lm_base(
            tiny_llama, tmp_path / "base", base_sha256=BASE_SHA256, blocks=[0, 1], targets=TARGETS, max_tokens=128,
            probe_texts=tiny_texts, logits=logits,
        )  # fmt: skip

    for when in (lambda length: length == alone, lambda length: length > max(lengths)):  # one probe; only the answer
        with pytest.raises(HeadError, match=r"must agree within 0\.001"):
            export(off(bare, 3 * TOLERANCE, -1, when))
    assert list(tmp_path.iterdir()) == []
    parity = export(off(bare, TOLERANCE / 3, -1))["parity"]
    assert (parity["n_probes"], parity["greedy_tokens"]) == (len(lengths), 32)


def test_a_head_may_choose_no_other_token_than_torch(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(client.export.language_model, "TOLERANCE", 100.0)  # only the choice of tokens can be refused
    adapted = Adapted(tiny_llama)
    with pytest.raises(HeadError, match="the same 4 greedy tokens"):
        write_head(tmp_path / "ann", tiny_lm_fleet, adapted, tiny_texts, logits=off(adapted.logits, 50.0, -1))
    write_head(tmp_path / "ann", tiny_lm_fleet, adapted, tiny_texts, logits=off(adapted.logits, 50.0, 5))


def test_no_special_token_is_put_around_a_text_as_in_training(tiny_llama, tiny_lm_fleet, tmp_path):
    from tokenizers.processors import TemplateProcessing

    from shared.config import load_scenario
    from shared.heads.tasks import encode_dialogues
    from shared.models.model import load_base

    model = shutil.copytree(tiny_llama, tmp_path / "model")
    base = load_base(model)
    start = base.tokenizer.id_to_token(base.eos_id)
    base.tokenizer.post_processor = TemplateProcessing(single=f"{start} $A", special_tokens=[(start, base.eos_id)])
    assert base.tokenizer.encode("Heat").ids[0] == base.eos_id
    scenario = load_scenario(SCENARIO)
    trained = encode_dialogues(base, [("Heat", "A film.")], scenario).token_ids[0]
    opened = replace(open_lm_base(tiny_lm_fleet), tokenizer=base.tokenizer, template=scenario.task.template)
    asked = opened.encode("Heat")
    assert asked[0] != base.eos_id
    assert trained[: len(asked)] == asked


def test_an_adapter_without_effect_is_refused_and_one_of_zeros_is_the_base(
    tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path
):
    with pytest.raises(HeadError, match=r"must change a logit of the known text by at least 0\.001"):
        write_head(tmp_path / "ann", tiny_lm_fleet, Adapted(tiny_llama, std=1e-4), tiny_texts)
    assert list(tmp_path.iterdir()) == []
    write_head(tmp_path / "ann", tiny_lm_fleet, Adapted(tiny_llama, std=0.0), tiny_texts)
    head, bare = open_generator(tmp_path / "ann", base=tiny_lm_fleet), open_generator(tiny_lm_fleet)
    np.testing.assert_allclose(head.logits([5, 6, 7]), bare.logits([5, 6, 7]), atol=1e-5)


def test_a_base_other_than_the_adapter_s_is_refused(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path):
    with pytest.raises(HeadError, match="must be used with the base it was exported for"):
        write_head(tmp_path / "ann", tiny_lm_fleet, Adapted(tiny_llama), tiny_texts, base_sha256="cd" * 32)
    assert list(tmp_path.iterdir()) == []


def test_the_gate_refuses_slots_that_change_the_base(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path, monkeypatch):
    plain = onnx.load(tiny_lm_fleet / "model.onnx")
    monkeypatch.setattr(
        client.export.graph_lm, "_run_builder", lambda folder, scratch, precision: tiny_lm_fleet / "model.onnx"
    )

    def damaging(model, folder, layers):
        for tensor in model.graph.initializer:
            if tensor.name == "model.layers.1.mlp.up_proj.MatMul.weight":
                value = onnx.numpy_helper.to_array(tensor) * np.float32(1 + 1e-5)
                tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))

    monkeypatch.setattr(client.export.graph_lm, "_insert_slots", damaging)
    assert any(t.name == "model.layers.1.mlp.up_proj.MatMul.weight" for t in plain.graph.initializer)
    with pytest.raises(HeadError, match="empty slots must not change"):
        export_lm_base(
            tiny_llama, tmp_path / "base", base_sha256=BASE_SHA256, blocks=[1], targets=TARGETS, max_tokens=64,
            probe_texts=tiny_texts,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_impossible_requests_are_refused(tiny_llama, tiny_lm_fleet, tiny_texts, tmp_path, monkeypatch):
    def export(model=tiny_llama, **changes):
        settings = {
            "base_sha256": BASE_SHA256,
            "blocks": [1],
            "targets": TARGETS,
            "max_tokens": 64,
            "probe_texts": tiny_texts,
        }
        export_lm_base(model, tmp_path / "base", **settings | changes)

    with pytest.raises(HeadError, match="blocks must lie between 0 and 1"):
        export(blocks=[2])
    with pytest.raises(HeadError, match=r"targets must name linear layers of a block \(mlp.down_proj, .*self_attn.v"):
        export(targets=["input_layernorm"])
    with pytest.raises(HeadError, match="max_tokens must be between 1 and the model's 128 positions, got 129"):
        export(max_tokens=129)
    for template in ("", "{text}{text}"):
        with pytest.raises(HeadError, match=r"must hold \{text\} exactly once"):
            export(template=template)
    with pytest.raises(HeadError, match="at least 16 different texts, got 1"):
        export(probe_texts=["the same"] * 20)
    with pytest.raises(HeadError, match="must hold block"):
        slot_tensors({"output.weight": np.zeros((1, 1), np.float32)}, scaling=1.0)
    narrow = shutil.copytree(tiny_llama, tmp_path / "narrow")
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | {"head_dim": 8}))
    with pytest.raises(HeadError, match="multiple of 16 for onnxruntime, got 8"):
        export(model=narrow)
    monkeypatch.setattr(client.export.graph_lm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HeadError, match="needs the package onnxruntime-genai"):
        export()
    assert not (tmp_path / "base").exists()


def test_what_the_model_s_own_files_say(tiny_llama, tmp_path):
    assert read_cache_shape(tiny_llama)[1] == 128
    assert read_stop_ids(tiny_llama) == [2]
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    assert read_stop_ids(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 8]}')
    assert read_stop_ids(tmp_path) == [8, 9]
    assert torch_logits(tiny_llama)(np.array([[3, 4]])).shape == (1, 2, 263)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_real_language_model(tiny_texts, tmp_path):
    from shared.assets import fetch

    model = fetch("SmolLM2-135M-Instruct", quiet=True)
    export_lm_base(
        model, tmp_path / "base", base_sha256=BASE_SHA256, blocks=[28, 29], targets=("self_attn.q_proj", "mlp.up_proj"),
        max_tokens=1024, probe_texts=tiny_texts,
    )  # fmt: skip
    adapted = Adapted(model, blocks=(28, 29), targets=("self_attn.q_proj", "mlp.up_proj"), rank=8, std=0.2)
    bare = open_generator(tmp_path / "base")
    manifest = write_head(tmp_path / "ann", bare.base, adapted, tiny_texts)
    head = open_generator(tmp_path / "ann", base=bare.base)
    answers = []
    for generator, reference in ((bare, Adapted(model, std=0.0)), (head, adapted)):
        prompt = "<|im_start|>user\nName three films.<|im_end|>\n<|im_start|>assistant\n"
        found = generator.generate(prompt, max_new_tokens=32, stop_at_eos=False)
        assert list(found.token_ids) == reference.greedy(bare.base.tokenizer.encode(prompt).ids, 32)
        answers.append(found.token_ids)
    assert answers[0] != answers[1]
    assert bare.base.stop_ids == {2}
    assert manifest["parity"]["max_abs"] <= TOLERANCE
    size = (tmp_path / "ann" / "adapter.safetensors").stat().st_size
    assert size < (tmp_path / "base" / "model.onnx").stat().st_size / 100
