"""Products with frozen weights: float32 in either library, mixed within its bound, and nothing depends on a clock."""

import numpy as np
import pytest
import torch
from torch import nn

import shared.models.products as products
from client.training.train import make_trainable
from shared.models.features import Features
from shared.models.products import Frozen, FrozenLinear, in_float32, quicken, resolve_precision

FP32, MIXED = 1e-5, 3e-2  # relative error of a gradient against torch's own float32


def with_library(monkeypatch, *, onednn):
    monkeypatch.setattr(products, "uses_onednn", lambda: onednn)


def apart(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("onednn", [False, True])
@pytest.mark.parametrize("shape", [(1, 24), (3, 24), (2, 5, 24), (0, 24)])
def test_products_are_float32_in_either_library(monkeypatch, onednn, shape):
    with_library(monkeypatch, onednn=onednn)
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(*size, generator=generator) for size in ((40, 24), (40,), shape))
    frozen = Frozen(weight, precision="fp32")
    torch.testing.assert_close(frozen.forward(x, bias), x @ weight.T + bias, rtol=1e-5, atol=1e-5)
    back = torch.randn(*shape[:-1], 40, generator=generator)
    torch.testing.assert_close(frozen.backward(back), back @ weight, rtol=1e-5, atol=1e-5)


def test_views_that_are_not_contiguous_are_read_right(monkeypatch):
    with_library(monkeypatch, onednn=True)
    weight, x = torch.randn(40, 24), torch.randn(24, 7, 3).permute(2, 1, 0)
    torch.testing.assert_close(Frozen(weight, precision="fp32").forward(x, None), x @ weight.T, rtol=1e-5, atol=1e-5)


def test_mixed_is_within_its_bound_and_not_float32():
    weight, bias, x = torch.randn(400, 300), 30 * torch.randn(400), torch.randn(50, 300)
    frozen, back = Frozen(weight, precision="mixed"), torch.randn(50, 400)
    for found, wanted in (
        (frozen.forward(x, None), x @ weight.T),
        (frozen.forward(x, bias), x @ weight.T + bias),
        (frozen.backward(back), back @ weight),
    ):
        assert found.dtype == torch.float32
        assert 1e-4 < apart(found, wanted) < 1e-2


@pytest.mark.parametrize(("precision", "bound"), [("fp32", FP32), ("mixed", MIXED)])
@pytest.mark.parametrize("kind", ["rating", "language"])
@pytest.mark.parametrize("method", ["ffa-lora", "fedavg"])
def test_clipped_gradients_agree_with_float32(
    steps, tiny_base, tiny_texts, tiny_causal, monkeypatch, precision, bound, kind, method
):
    """Without noise, so that every digit is compared; a step that rounds twice as much is seen."""

    def update(each, *, onednn):
        with_library(monkeypatch, onednn=onednn)
        setting = (
            steps.rating(tiny_base, tiny_texts[:9], blocks=2, method=method)
            if kind == "rating"
            else steps.language(tiny_causal, blocks=2, method=method)
        )
        policy = setting.policy(clip_norm=0.2, federation_method=method)
        module = make_trainable(setting.fresh_head(), policy, precision=each)
        return steps.flat(setting.train(policy, module=module))

    wanted, found = update("fp32", onednn=False), update(precision, onednn=True)
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    assert error < bound
    if precision == "mixed":
        assert error > FP32  # or it was not mixed


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
def test_clipping_bounds_a_record_at_any_precision(steps, tiny_base, tiny_texts, monkeypatch, precision):
    """Taken alone no record moves another: what one adds is its own clipped gradient, never more than C."""
    with_library(monkeypatch, onednn=True)
    setting = steps.rating(tiny_base, tiny_texts[:6], blocks=2)
    policy = setting.policy(clip_norm=0.2)

    def train(rows):
        module = make_trainable(setting.fresh_head(), policy, precision=precision)
        return setting.train(policy, rows=rows, micro_batch=1, module=module)

    everybody = train(range(6))
    for left_out in range(6):
        moved = setting.moved(policy, everybody, train([row for row in range(6) if row != left_out]))
        assert 0.5 * 0.2 < moved <= 0.2 * (1 + 1e-4)  # float32 of the update's own digits
    one = train(range(6))
    assert all(np.array_equal(one[name], everybody[name]) for name in one)  # byte for byte


@pytest.mark.parametrize("precision", ["fp32", "mixed"])
@pytest.mark.parametrize("kind", ["rating", "language"])
def test_records_of_one_pass_move_each_other_by_last_bits_at_most(
    steps, tiny_base, tiny_texts, tiny_causal, monkeypatch, precision, kind
):
    """A simulation's passes hold several records; what one of them says must not be in another's gradient."""
    with_library(monkeypatch, onednn=True)
    setting = (
        steps.rating(tiny_base, tiny_texts[:9], blocks=2) if kind == "rating" else steps.language(tiny_causal, blocks=2)
    )
    policy, seen = setting.policy(), steps.Sums(monkeypatch)
    order = np.argsort(setting.features.lengths, kind="stable")
    changed = int(order[len(order) // 2])
    arrays = [setting.features.batch([row])[0][0].numpy() for row in range(len(setting))]
    arrays[changed] = -3 * arrays[changed][::-1]
    for features in (setting.features, Features(arrays)):
        module = make_trainable(setting.fresh_head(), policy, precision=precision)
        setting.train(policy, features=features, module=module)
    others = order != changed
    before, after = (torch.cat([each.flatten(1) for each in one], 1) for one in seen.per_sample)
    assert apart(after[~others], before[~others]) > 0.1
    assert apart(after[others], before[others]) < 1e-6


def test_per_sample_gradients_are_float32(steps, tiny_base, tiny_texts, monkeypatch):
    setting = steps.rating(tiny_base, tiny_texts[:6], blocks=2)
    policy, seen = setting.policy(), steps.Sums(monkeypatch)
    setting.train(policy, module=make_trainable(setting.fresh_head(), policy, precision="mixed"))
    assert {each.dtype for batch in seen.per_sample for each in batch} == {torch.float32}


def test_only_frozen_layers_are_quickened_and_their_weights_stay():
    block = nn.ModuleDict({"frozen": nn.Linear(4, 3), "trained": nn.Linear(4, 3)})
    block["frozen"].requires_grad_(False)
    weight = block["frozen"].weight
    quicken(block, precision="mixed")
    assert isinstance(block["frozen"], FrozenLinear)
    assert block["frozen"].weight is weight
    assert type(block["trained"]) is nn.Linear
    assert sorted(block.state_dict()) == ["frozen.bias", "frozen.weight", "trained.bias", "trained.weight"]


def test_in_float32_lasts_as_long_as_it_should():
    block = nn.ModuleDict({"frozen": nn.Linear(40, 30).requires_grad_(False)})
    x = torch.randn(9, 40)
    wanted = block["frozen"](x)
    quicken(block, precision="mixed")
    rounded = block["frozen"](x)
    with in_float32(block):
        assert apart(block["frozen"](x), wanted) < 1e-6 < apart(rounded, wanted)
    assert torch.equal(block["frozen"](x), rounded)


@pytest.mark.parametrize("able", [False, True])
def test_auto_asks_the_processor(monkeypatch, able):
    monkeypatch.setattr(products, "multiplies_bfloat16", lambda: able)
    assert resolve_precision("auto") == ("mixed" if able else "fp32")
    assert [resolve_precision(each) for each in ("fp32", "mixed")] == ["fp32", "mixed"]


@pytest.mark.parametrize(("maker", "able", "wanted"), [
    ("vendor_id : AuthenticAMD", True, True),
    ("vendor_id : GenuineIntel", True, False),
    ("vendor_id : AuthenticAMD", False, False),
])  # fmt: skip
def test_the_library_is_chosen_by_the_processor(monkeypatch, maker, able, wanted):
    monkeypatch.setattr(products, "_maker", lambda: maker)
    monkeypatch.setattr(products.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": able})
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert products.uses_onednn.__wrapped__() is wanted
