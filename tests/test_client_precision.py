"""Bases of 8 bits: a quarter of the bytes, still torch's answers within a stated tolerance, or no export."""

import copy
import json
from datetime import UTC, datetime

import numpy as np
import onnx
import pytest

import client.export.encoder
import client.export.graph
from client.export.encoder import export_base, export_head
from client.export.fleet import export_campaign_base
from client.export.language_model import export_lm_base
from client.export.private_head import PROBES, personalize
from client.owner.verify import open_home_base, open_personal
from client.runtime.artifact import MODEL
from client.runtime.parity import Parity
from client.runtime.runtime import open_base, open_head
from shared.config import AdapterConfig, ModelConfig, Scenario, TaskConfig
from shared.errors import HeadError, SottovoceError
from shared.heads.output import OutputLayer
from shared.heads.rating import RatingHead
from shared.protocol.signing import load_private
from sottovoce.cli import main

TARGETS = ("attention.output.dense", "output.dense")


def gate(precision):
    return Parity("the texts", precision=precision, max_abs=1e-5, rel_rms=0.05)


def test_fp32_is_judged_by_the_largest_difference_and_int8_by_the_root_mean_square():
    wanted = np.array([3.0, 4.0])
    exact, rounded = gate("fp32"), gate("int8")
    exact.add(wanted + np.array([0, 9e-6]), wanted)
    rounded.add(wanted + np.array([0.2, 0.0]), wanted)
    assert exact.described()["max_abs"] == pytest.approx(9e-6)
    assert exact.described()["measure"] == "max_abs"
    assert rounded.described()["rel_rms"] == pytest.approx(0.2 / 5)
    assert rounded.described()["measure"] == "rel_rms"
    with pytest.raises(HeadError, match="within 1e-05"):
        exact.add(wanted + np.array([0, 1.1e-5]), wanted)
    rounded.add(wanted + np.array([0.0, 0.5]), wanted)
    with pytest.raises(HeadError, match=r"within 0\.05 \(relative root mean square\)"):
        rounded.described()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_or_was_never_compared_is_refused(precision, value):
    judge = gate(precision)
    with pytest.raises(HeadError, match="must agree"):  # noqa: PT012 - fp32 refuses at once, int8 at the end
        judge.add(np.array([value, 1.0]), np.ones(2))
        judge.add(np.ones(2), np.ones(2))
        judge.described()
    with pytest.raises(HeadError, match="shape"):
        gate(precision).add(np.ones(2), np.ones(3))
    with pytest.raises(HeadError, match="must agree"):
        gate("int8").described()


@pytest.fixture
def traced(tiny_graph, monkeypatch):
    monkeypatch.setattr(client.export.graph, "_trace", lambda model, *, max_tokens: copy.deepcopy(tiny_graph))


def export(base, folder, texts, precision="int8"):
    return export_base(
        base,
        folder,
        blocks=[1],
        targets=TARGETS,
        max_tokens=48,
        task=TaskConfig(),
        probe_texts=texts,
        precision=precision,
    )


def test_a_base_in_8_bits_has_slots_and_stays_near_torch(traced, tiny_base, tiny_fleet, tiny_texts, tmp_path):
    manifest = export(tiny_base, tmp_path / "base", tiny_texts)
    assert manifest["quant"] == {"scheme": "int8", "block": 32, "accuracy_level": 4}
    parity = manifest["parity"]
    assert (parity["measure"], parity["tolerance"]) == ("rel_rms", 0.05)
    assert 1e-4 < parity["rel_rms"] <= 0.05  # it is rounded
    graph = onnx.load(tmp_path / "base" / MODEL).graph
    kinds = [node.op_type for node in graph.node]
    slotted = {node.name for node in graph.node if node.op_type == "MatMulNBits"}
    assert {f"lora.block.1.{target}_Q8" for target in TARGETS} <= slotted
    tables = [t for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2]
    assert all(t.dims[0] < 200 for t in tables if 0 not in t.dims), "an embedding stayed in float32"
    assert "DequantizeLinear" in kinds
    assert (tmp_path / "base" / MODEL).stat().st_size < (tiny_fleet / MODEL).stat().st_size / 2
    base = open_base(tmp_path / "base")
    assert base.precision == "int8"
    assert (base.run(tiny_texts)[1] == TaskConfig().centre).all()


def test_a_head_on_8_bits_is_compared_with_torch_and_known_by_its_own_answer(
    traced, tiny_base, tiny_texts, tmp_path, monkeypatch
):
    export(tiny_base, tmp_path / "base", tiny_texts)
    head = RatingHead(
        tiny_base,
        Scenario(name="tiny", model=ModelConfig(head_blocks=1), adapter=AdapterConfig(rank=4, whitened_features=8)),
    )
    settings = {
        "base_folder": tmp_path / "base",
        "head": head,
        "output": OutputLayer(np.random.default_rng(0).normal(size=32), 3.2),
        "user": "ann",
        "privacy": {},
        "probe_texts": tiny_texts,
        "created": datetime(2026, 1, 1, tzinfo=UTC),
    }
    manifest = export_head(tmp_path / "ann", **settings)
    assert manifest["parity"]["measure"] == "rel_rms"
    assert 1e-5 < manifest["parity"]["rel_rms"] < 0.2
    known = manifest["known_answer"]
    assert 1e-3 < known["tolerance"] <= 0.1
    found = open_head(tmp_path / "ann").base.run_tokens(known["token_ids"], adapter=open_head(tmp_path / "ann").adapter)
    np.testing.assert_array_equal(found[1], np.float32(known["predictions"]))
    monkeypatch.setattr(client.export.encoder, "REL_RMS", 1e-6)
    with pytest.raises(HeadError, match="features of the probe texts"):
        export_head(tmp_path / "bob", **settings)
    monkeypatch.setattr(client.export.encoder, "REL_RMS", 0.05)
    monkeypatch.setattr(client.export.encoder, "HEAD_REL_RMS", 1e-6)
    with pytest.raises(HeadError, match="relative root mean square"):
        export_head(tmp_path / "bob", **settings)
    assert not (tmp_path / "bob").exists()


def test_a_base_that_is_too_coarse_is_not_written(traced, tiny_base, tiny_texts, tmp_path, monkeypatch):
    monkeypatch.setattr(client.export.encoder, "REL_RMS", 1e-6)
    with pytest.raises(HeadError, match=r"relative root mean square.*nothing was written"):
        export(tiny_base, tmp_path / "base", tiny_texts)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(HeadError, match="precision must be one of fp32, int8, got 'int4'"):
        export(tiny_base, tmp_path / "base", tiny_texts, precision="int4")


def test_the_operator_s_command_makes_the_base_that_homes_take(traced, homes, published, tmp_path, capsys, monkeypatch):
    folder, base = str(published.campaign.folder), tmp_path / "base"
    arguments = ["server", "base", folder, "--key", str(published.private), "--out", str(base), "--precision", "int8"]
    assert main(arguments) == 0
    out, _ = capsys.readouterr()
    assert "signed by" in out
    home = homes.make_home(tmp_path / "home", published)
    personalize(home, base_folder=base)
    opened = open_personal(home, open_home_base(home, base, kind="base"))
    assert opened.problem is None
    assert opened.model.base.precision == "int8"
    (tmp_path / "few.txt").write_text("one\ntwo\n", encoding="utf-8")
    for wrong in (["--texts", str(tmp_path / "few.txt")], ["--texts", str(tmp_path / "none.txt")]):
        assert main([*arguments, *wrong]) == 2
    with pytest.raises(SottovoceError):
        export_campaign_base(published.campaign, home.folder, key=load_private(published.private))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_real_bases_in_8_bits(tmp_path):
    from shared.assets import fetch
    from shared.models.model import load_base

    base = load_base(fetch("all-MiniLM-L6-v2", quiet=True))
    manifest = export_base(
        base, tmp_path / "mini", blocks=[5], targets=TARGETS, max_tokens=128, task=TaskConfig(), probe_texts=PROBES,
        precision="int8",
    )  # fmt: skip
    assert manifest["parity"]["rel_rms"] <= 0.05
    assert manifest["files"][MODEL]["size"] < 30e6
    manifest = export_lm_base(
        fetch("SmolLM2-135M-Instruct", quiet=True), tmp_path / "lm", base_sha256="ab" * 32, blocks=[29],
        targets=("self_attn.q_proj", "mlp.up_proj"), max_tokens=1024, probe_texts=PROBES, precision="int8",
    )  # fmt: skip
    assert manifest["parity"]["rel_rms"] <= 0.1
    assert json.loads((tmp_path / "lm" / "manifest.json").read_text())["quant"]["scheme"] == "int8"
