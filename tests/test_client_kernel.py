"""Heads with kernel features on the exported graph: torch's answers, and no export where the term is lost or wrong."""

import copy
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import load, save

import client.export.graph
from client.export.encoder import KERNEL_TOLERANCE, build_head, export_base, export_head
from client.export.fleet import export_campaign_base
from client.export.graph import graph_key, list_slots
from client.export.graph_kernel import KernelTerm, kernel_term
from client.export.private_head import encoder_parts, personalize
from client.owner.verify import open_home_base, open_personal
from client.personal.personalize import PrivateOutput
from client.runtime.artifact import ADAPTER, MANIFEST, MODEL, describe_contents, manifest_bytes, read_manifest
from client.runtime.runtime import KERNEL_SLOT, bind_head, check_known_answer, open_base, open_head
from shared.config import AdapterConfig, ModelConfig, Scenario, TaskConfig
from shared.errors import HeadError
from shared.heads.adapter import make_start, shared_parameters
from shared.heads.output import OutputLayer, pooled_features
from shared.heads.registry import make_head
from shared.models.features import compute_features
from shared.protocol.signing import load_private

TARGETS = ("output.dense",)
TASK = TaskConfig()
NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.fixture(scope="module", autouse=True)
def traced(tiny_graph):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.export.graph, "_trace", lambda model, *, max_tokens: copy.deepcopy(tiny_graph))
        yield


def trained(base, texts, *, kernel=12, blocks=1, seed=3):
    """A head away from its start whose anchors are the texts."""
    adapter = AdapterConfig(rank=2, targets=TARGETS, whitened_features=4, kernel_features=kernel)
    head = make_head(
        base, Scenario(name="tiny", model=ModelConfig(head_blocks=blocks), adapter=adapter), public_texts=len(texts)
    )
    make_start(head, compute_features(base, texts, head_blocks=blocks, max_tokens=48), ridge=0.05, seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in shared_parameters(head).items():
            size = 1.0 if name == "output.weight" else 0.05
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return head


def fleet_base(base, folder, texts, *, kernel, precision="fp32"):
    return export_base(
        base, folder, blocks=[1], targets=TARGETS, max_tokens=48, task=TASK, probe_texts=texts, kernel=kernel,
        precision=precision,
    )  # fmt: skip


def settings(head, fleet, texts, **changes):
    about = {"user": "u1", "privacy": {}, "probe_texts": texts, "created": NOW}
    return {"base_folder": fleet, "head": head, "output": head.output_layer()} | about | changes


@pytest.fixture(scope="module")
def head(tiny_base, tiny_texts):
    return trained(tiny_base, tiny_texts)


@pytest.fixture(scope="module")
def fleet(head, tiny_base, tiny_texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernel") / "base"
    fleet_base(tiny_base, folder, tiny_texts, kernel=kernel_term(head))
    return folder


@pytest.mark.parametrize("blocks", [0, 1])
def test_the_device_predicts_what_the_head_predicts(fleet, tiny_base, tiny_texts, tmp_path, blocks):
    head = trained(tiny_base, tiny_texts, kernel="all", blocks=blocks)
    private = PrivateOutput(np.random.default_rng(0).normal(size=32), 0.3)
    texts = [*tiny_texts, *(f"{text} and more" for text in tiny_texts), "drama " * 60]
    features = compute_features(tiny_base, texts, head_blocks=blocks, max_tokens=48)
    with torch.no_grad():
        shared = head.predict(*head.prepare(features).batch(range(len(texts)))).numpy()
    wanted = private.predict(pooled_features(head, features), shared)
    manifest = export_head(tmp_path / "u1", **settings(head, fleet, tiny_texts) | encoder_parts(head, private))
    found = open_head(tmp_path / "u1", base=fleet)
    np.testing.assert_allclose(found.raw(texts), wanted, atol=KERNEL_TOLERANCE)
    assert manifest["parity"]["max_abs"] <= KERNEL_TOLERANCE == manifest["parity"]["tolerance"]
    assert found.adapter[KERNEL_SLOT].shape == (len(tiny_texts), 1)
    bare = found.base.run(texts, adapter={**found.adapter, KERNEL_SLOT: np.zeros_like(found.adapter[KERNEL_SLOT])})[1]
    assert np.abs(bare - wanted).max() > 0.1  # the term is at work


def test_the_base_alone_predicts_the_centre(fleet, tiny_base, tiny_fleet, tiny_texts):
    base, plain = open_base(fleet), open_base(tiny_fleet)
    pooled, predictions = base.run(tiny_texts)
    assert (predictions == TASK.centre).all()
    np.testing.assert_array_equal(pooled, plain.run(tiny_texts)[0])
    assert base.slots[KERNEL_SLOT] == (len(tiny_texts), 1)
    assert KERNEL_SLOT not in plain.slots


def test_a_base_without_kernel_is_what_it_was(head, tiny_base):
    term = kernel_term(head)
    plain = graph_key(tiny_base, ["a"], 48, 3.0, "fp32")
    assert graph_key(tiny_base, ["a"], 48, 3.0, "fp32", None) == plain
    others = (
        term,
        replace(term, widths=(0.3, 0.03)),
        replace(term, weights=(0.4, 0.6)),
        replace(term, anchors=term.anchors[::-1]),
        replace(term, mean=term.mean + 1),
    )
    keys = {graph_key(tiny_base, ["a"], 48, 3.0, "fp32", other) for other in others}
    assert len(keys | {plain}) == 6
    assert [slot["name"] for slot in list_slots(32, {})] == ["output.weight", "output.bias"]
    flat = make_head(tiny_base, Scenario(name="tiny"))
    assert kernel_term(flat) is None


FAULTS = {
    "dropped": lambda term: replace(term, weights=(0.0, 0.0)),
    "other widths": lambda term: replace(term, widths=(0.3, 0.04)),
    "other order": lambda term: replace(term, anchors=term.anchors[::-1].copy()),
    "not centred": lambda term: replace(term, mean=np.zeros_like(term.mean)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_refuses_a_base_whose_kernel_is_another(head, tiny_base, tiny_texts, tmp_path, fault):
    fleet_base(tiny_base, tmp_path / "base", tiny_texts, kernel=FAULTS[fault](kernel_term(head)))
    with pytest.raises(HeadError, match=r"must agree within 0\.0001"):
        build_head(**settings(head, tmp_path / "base", tiny_texts))


def test_the_gate_refuses_a_graph_without_the_term(head, tiny_base, tiny_texts, tmp_path, monkeypatch):
    def forgotten(self, graph, *, before, after):
        return [onnx.helper.make_node("Identity", [before], [after])]

    monkeypatch.setattr(KernelTerm, "nodes", forgotten)
    fleet_base(tiny_base, tmp_path / "base", tiny_texts, kernel=kernel_term(head))
    with pytest.raises(HeadError, match=r"must agree within 0\.0001"):
        build_head(**settings(head, tmp_path / "base", tiny_texts))


def test_head_and_base_have_a_kernel_together_or_not_at_all(head, fleet, tiny_base, tiny_fleet, tiny_texts):
    with pytest.raises(HeadError, match=r"the base has no slot output\.kernel"):
        build_head(**settings(head, tiny_fleet, tiny_texts))
    flat = make_head(tiny_base, Scenario(name="tiny", adapter=AdapterConfig(rank=2)))
    with pytest.raises(HeadError, match=r"must hold output\.kernel"):
        build_head(**settings(flat, fleet, tiny_texts))
    short = head.output_layer()._replace(kernel=np.zeros(3, dtype=np.float32))
    with pytest.raises(HeadError, match=r"output\.kernel must be folded from shape \(22,\), got \(3,\)"):
        build_head(**settings(head, fleet, tiny_texts, output=short))
    with pytest.raises(HeadError, match=r"output\.kernel must be folded from shape \(0,\)"):
        build_head(**settings(flat, tiny_fleet, tiny_texts, output=head.output_layer()))


def forged(files, change):
    """The files of a head with other tensors or another manifest, its hashes in order."""
    tensors, manifest = load(files[ADAPTER]), read_manifest(files, "adapter")
    change(tensors, manifest)
    content = save(tensors)
    return {ADAPTER: content, MANIFEST: manifest_bytes(manifest | {"files": describe_contents({ADAPTER: content})})}


def test_the_known_answer_knows_a_head_that_is_kernel_alone(head, fleet, tiny_texts):
    base = open_base(fleet)
    alone = head.output_layer()._replace(weight=np.zeros(32, dtype=np.float32))
    files = build_head(**settings(head, base, tiny_texts, output=alone))
    place = fleet.parent

    def check(change):
        check_known_answer(place, bind_head(forged(files, change), base))

    check(lambda tensors, manifest: None)
    with pytest.raises(HeadError, match="known answer within"):
        check(lambda tensors, manifest: tensors.update({KERNEL_SLOT: 2 * tensors[KERNEL_SLOT]}))

    def blind(tensors, manifest):
        known = manifest["known_answer"]
        known["without_adapter"] = known["predictions"]

    with pytest.raises(HeadError, match="must tell the adapter from its absence"):
        check(blind)


def test_an_owner_s_device_takes_part_and_answers_with_the_kernel(homes, tiny_world, tmp_path):
    overrides = ("privacy.max_participations=2", "federation.cohort_size=2", "adapter.kernel_features=5")
    published = homes.publish(tiny_world(tmp_path), tmp_path / "world", overrides=overrides)
    campaign = published.campaign
    export_campaign_base(campaign, tmp_path / "base", key=load_private(published.private))
    home = homes.make_home(tmp_path / "home", published)
    random = np.random.default_rng(0)
    start = {slot.name: campaign.start[slot.name] for slot in campaign.policy.array_slots()}
    assert start["output.weight"].shape == (1, 8 + 5 + 1)
    moved = {name: array + random.normal(0, 0.3, array.shape).astype("float32") for name, array in start.items()}
    refusal, reply = homes.ask(home, campaign, arrays=moved)
    assert refusal is None
    assert reply is not None
    personalize(home, base_folder=tmp_path / "base")
    opened = open_personal(home, open_home_base(home, tmp_path / "base", kind="base"))
    assert opened.problem is None
    texts = [record.text for record in published.dataset.users[3].train]
    kernel = opened.model.adapter[KERNEL_SLOT]
    assert kernel.shape == (len(published.dataset.public_texts), 1)
    bare = opened.model.base.run(texts, adapter={**opened.model.adapter, KERNEL_SLOT: np.zeros_like(kernel)})[1]
    assert np.abs(opened.model.raw(texts) - bare).max() > 0.01


def test_in_8_bits_the_kernel_stays_exact_and_the_head_near_torch(head, tiny_base, tiny_texts, tmp_path):
    fleet_base(tiny_base, tmp_path / "base", tiny_texts, kernel=kernel_term(head), precision="int8")
    graph = onnx.load(tmp_path / "base" / MODEL).graph
    [anchors] = [onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name == "kernel.anchors"]
    np.testing.assert_array_equal(anchors.T, head.kernel.anchors.detach().numpy())
    manifest = export_head(tmp_path / "u1", **settings(head, tmp_path / "base", tiny_texts))
    assert manifest["parity"]["measure"] == "rel_rms"
    assert 1e-5 < manifest["parity"]["rel_rms"] < 0.2
    nothing = OutputLayer(np.zeros(32), TASK.centre, np.zeros(len(tiny_texts), dtype=np.float32))
    assert head.apply_output(np.ones((2, 32), dtype=np.float32), nothing).tolist() == [3.0, 3.0]
