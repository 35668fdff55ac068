"""The cut, the cache and the head's arrays: the same numbers wherever the model is cut and wherever they come from."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared.config import AdapterConfig, FederationConfig, ModelConfig, Scenario
from shared.errors import AssetError, CampaignError, ScenarioError
from shared.heads.adapter import check_arrays, load_shared, make_start, read_shared, shared_parameters, trained_slots
from shared.heads.output import pooled_features
from shared.heads.rating import RatingHead
from shared.models.features import cached_features, compute_features, compute_hidden
from shared.models.model import load_base

ADAPTER = AdapterConfig(rank=2, whitened_features=8, targets=("output.dense", "attention.self.query"))


def make_head(base, *, blocks=1, method="ffa-lora"):
    """A fresh head for ratings."""
    model, federation = ModelConfig(head_blocks=blocks), FederationConfig(method=method)
    return RatingHead(base, Scenario(name="tiny", model=model, adapter=ADAPTER, federation=federation))


def reference(base, text):
    """Pooled features by the library's own whole-model forward."""
    [ids] = base.tokenize([text], max_tokens=32)
    with torch.no_grad():
        hidden = base.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    pooled = hidden.mean(0)
    return (pooled / pooled.norm()).numpy()


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_every_cut_gives_the_features_of_the_whole_model(tiny_base, tiny_texts, blocks):
    features = compute_features(tiny_base, tiny_texts, head_blocks=blocks, max_tokens=32)
    head = make_head(tiny_base, blocks=blocks, method="fedavg")
    found = pooled_features(head, features, batch=5)
    wanted = np.stack([reference(tiny_base, text) for text in tiny_texts])
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_the_cache_gives_what_was_computed_and_computes_only_what_is_new(tiny_base, tiny_texts, tmp_path, monkeypatch):
    settings = {"head_blocks": 1, "cache": tmp_path, "quiet": True}
    ids = tiny_base.tokenize(tiny_texts, max_tokens=32)
    first = cached_features(tiny_base, ids[:8], **settings)
    direct = compute_features(tiny_base, tiny_texts[:8], head_blocks=1, max_tokens=32)
    for a, b in zip(first.batch(range(8)), direct.batch(range(8)), strict=True):
        assert torch.equal(a, b)

    computed = []

    def counting(base, token_ids, **arguments):
        computed.extend(token_ids)
        return compute_hidden(base, token_ids, **arguments)

    monkeypatch.setattr("shared.models.features.compute_hidden", counting)
    again = cached_features(tiny_base, [*ids[:10], ids[3]], **settings)
    assert computed == ids[8:10]
    assert torch.equal(again.batch([3])[0], again.batch([10])[0])


def test_another_cut_or_base_has_a_cache_of_its_own(tiny_base, make_tiny_base, tiny_texts, tmp_path):
    other = make_tiny_base(tmp_path / "other", seed=5)
    for base, blocks in [(tiny_base, 1), (tiny_base, 0), (other, 1)]:
        ids = base.tokenize(tiny_texts[:2], max_tokens=32)
        cached_features(base, ids, head_blocks=blocks, cache=tmp_path / "c", quiet=True)
    assert len(list((tmp_path / "c").iterdir())) == 3


def test_a_text_cut_shorter_is_another_entry(tiny_base, tiny_texts, tmp_path):
    long = max(tiny_texts, key=len)
    for tokens in (32, 8):
        ids = tiny_base.tokenize([long], max_tokens=tokens)
        found = cached_features(tiny_base, ids, head_blocks=1, cache=tmp_path, quiet=True)
        assert found.lengths.tolist() == [tokens]


@pytest.mark.parametrize("damage", ["bit", "truncated", "index", "unfinished"])
def test_a_damaged_shard_is_computed_anew(tiny_base, tiny_texts, tmp_path, damage):
    settings = {"head_blocks": 1, "cache": tmp_path, "quiet": True}
    ids = tiny_base.tokenize(tiny_texts[:4], max_tokens=32)
    wanted, _ = cached_features(tiny_base, ids, **settings).batch(range(4))
    wanted = wanted.clone()
    [matrix], [index] = tmp_path.glob("*/*.npy"), tmp_path.glob("*/*.json")
    content = bytearray(matrix.read_bytes())
    if damage == "bit":
        content[-3] ^= 1
        matrix.write_bytes(content)
    elif damage == "truncated":
        matrix.write_bytes(content[:-8])
    elif damage == "index":
        index.write_text("{")
    else:
        index.unlink()
    found, _ = cached_features(tiny_base, ids, **settings).batch(range(4))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("method", "parts"), [("ffa-lora", {"lora_B", "weight"}), ("fedavg", {"lora_A", "lora_B", "weight"})]
)
def test_a_method_trains_its_parts_and_nothing_of_the_base(tiny_base, method, parts):
    head = make_head(tiny_base, blocks=1, method=method)
    slots = trained_slots(head)
    assert {slot.name.split(".")[-1] for slot in slots} == parts
    assert all(slot.scope == "global" for slot in slots)
    assert all("block.1." in slot.name or slot.name == "output.weight" for slot in slots)
    assert [slot.name for slot in slots] == sorted(slot.name for slot in slots)
    assert not any("base_layer" in slot.name or "LayerNorm" in slot.name for slot in slots)


def test_the_start_whitens_the_public_texts_and_changes_no_prediction(tiny_base, tiny_texts):
    features = compute_features(tiny_base, tiny_texts, head_blocks=1, max_tokens=32)
    head = make_head(tiny_base, blocks=1, method="ffa-lora")
    start = make_start(head, features, ridge=0.0, seed=0)
    pooled = pooled_features(head, features).astype(np.float64)
    whitened = (pooled - start["mean"]) @ start["whitening"]
    covariance = np.cov(whitened.T)
    np.testing.assert_allclose(covariance, covariance[0, 0] * np.eye(8), atol=1e-4)
    assert np.mean(np.sum(whitened**2, axis=1)) == pytest.approx(1.0, rel=1e-4)
    assert torch.equal(head.predict(*features.batch([0, 1])), torch.tensor([3.0, 3.0]))
    other = make_start(head, features, ridge=0.0, seed=1)
    changed = {name for name in start if not np.array_equal(start[name], other[name])}
    assert changed == {name for name in start if name.endswith("lora_A")}


def test_the_folded_output_predicts_what_the_head_predicts(tiny_base, tiny_texts):
    features = compute_features(tiny_base, tiny_texts, head_blocks=1, max_tokens=32)
    head = make_head(tiny_base, blocks=1, method="fedavg")
    make_start(head, features, ridge=0.05, seed=0)
    with torch.no_grad():
        for parameter in shared_parameters(head).values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    output = head.output_layer()
    rows = list(range(len(features)))
    with torch.no_grad():
        wanted = head.predict(*features.batch(rows)).numpy()
    pooled = pooled_features(head, features)
    np.testing.assert_allclose(pooled @ output.weight + output.bias, wanted, atol=1e-4)
    np.testing.assert_allclose(head.apply_output(pooled, output), wanted, atol=1e-4)
    assert output.kernel.shape == (0,)


def test_arrays_go_in_and_out_and_wrong_ones_stay_out(tiny_base):
    head = make_head(tiny_base, blocks=1, method="ffa-lora")
    arrays = {name: array + 1 for name, array in read_shared(head).items()}
    load_shared(head, arrays)
    for name, array in read_shared(head).items():
        np.testing.assert_array_equal(array, arrays[name])
    first = next(iter(arrays))
    wrong = {
        "in this order": dict(reversed(arrays.items())),
        "of shape": arrays | {first: arrays[first].T},
        "float32": arrays | {first: arrays[first].astype(np.float64)},
        "finite": arrays | {first: np.full_like(arrays[first], np.inf)},
    }
    for says, changed in wrong.items():
        with pytest.raises(CampaignError, match=says):
            check_arrays(changed, trained_slots(head))


def test_heads_share_no_state_with_each_other_or_the_base(tiny_base):
    before = {name: p.clone() for name, p in tiny_base.model.named_parameters()}
    one, two = (make_head(tiny_base, blocks=1, method="fedavg") for _ in range(2))
    load_shared(one, {name: array + 1 for name, array in read_shared(one).items()})
    assert not np.array_equal(read_shared(one)["output.weight"], read_shared(two)["output.weight"])
    assert all(torch.equal(p, before[name]) for name, p in tiny_base.model.named_parameters())


def test_what_cannot_be_a_base_is_refused(tiny_base, tmp_path):
    with pytest.raises(AssetError, match=r"missing: config\.json"):
        load_base(tmp_path)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        (tmp_path / file).write_bytes((tiny_base.folder / file).read_bytes())
    assert load_base(tmp_path).normalize is False
    assert load_base(tmp_path).sha256 != tiny_base.sha256  # pooling decides the outputs, so it is part of the hash
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt9"}))
    with pytest.raises(AssetError, match="known family"):
        load_base(tmp_path)


@pytest.mark.parametrize("damage", ["missing weight", "nan", "config", "config types", "tokenizer", "truncated"])
def test_a_damaged_base_is_refused_and_never_filled_up(make_tiny_base, tmp_path, damage):
    base = make_tiny_base(tmp_path / "base")
    weights = load_file(base.folder / "model.safetensors")
    if damage == "missing weight":
        save_file({n: w for n, w in weights.items() if "layer.1" not in n}, base.folder / "model.safetensors")
    elif damage == "nan":
        save_file(
            weights | {"embeddings.LayerNorm.bias": torch.full((32,), torch.nan)}, base.folder / "model.safetensors"
        )
    elif damage == "truncated":
        path = base.folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])
    else:
        name = "tokenizer.json" if damage == "tokenizer" else "config.json"
        (base.folder / name).write_text("[]" if damage == "config types" else "{" if damage == "config" else "{}")
    with pytest.raises(AssetError) as caught:
        load_base(base.folder)
    assert "\n" not in str(caught.value)


def test_more_blocks_than_there_are_is_refused(tiny_base):
    assert tiny_base.head_blocks("all") == 2
    with pytest.raises(ScenarioError, match="between 0 and 2"):
        tiny_base.head_blocks(3)
