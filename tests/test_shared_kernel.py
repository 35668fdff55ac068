"""Kernel features: the formula, what of it is trained, and the fold onto pooled features."""

import numpy as np
import pytest
import torch
from opacus import GradSampleModule

from shared.config import AdapterConfig, FederationConfig, ModelConfig, Scenario, TaskConfig
from shared.errors import CampaignError, ScenarioError
from shared.heads.adapter import load_start, make_start, shared_parameters, trained_slots
from shared.heads.output import pooled_features
from shared.heads.registry import make_head
from shared.models.features import compute_features

WIDTHS, WEIGHTS = (0.3, 0.05), (0.6, 0.4)


def settings(*, blocks=1, kernel=6, whitened=8, method="fedavg", task="rating"):
    adapter = AdapterConfig(
        rank=2,
        targets=("output.dense",),
        whitened_features=whitened,
        kernel_features=kernel,
        kernel_widths=WIDTHS,
        kernel_weights=WEIGHTS,
    )
    return Scenario(
        name="tiny",
        task=TaskConfig(name=task),
        model=ModelConfig(head_blocks=blocks),
        adapter=adapter,
        federation=FederationConfig(method=method),
    )


def started(base, texts, *, blocks=1, **changes):
    """A head at its public start, the texts for anchors; its start; the texts' backbone outputs."""
    features = compute_features(base, texts, head_blocks=blocks, max_tokens=32)
    head = make_head(base, settings(blocks=blocks, **changes), public_texts=len(texts))
    return head, make_start(head, features, ridge=0.05, seed=1), features


def shift(head, *, by=0.3):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in shared_parameters(head).values():
            parameter += by * torch.randn(parameter.shape, generator=generator)


def reference(one, other, mean):
    """The kernel of two pooled features, as one would write it down."""
    a, b = one.astype(np.float64) - mean, other.astype(np.float64) - mean
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return sum(weight * np.exp((cosine - 1) / width) for width, weight in zip(WIDTHS, WEIGHTS, strict=True))


def test_all_features_are_the_kernel_in_orthonormal_coordinates(tiny_base, tiny_texts):
    head, start, features = started(tiny_base, tiny_texts, kernel="all", whitened=0)
    pooled = pooled_features(head, features)
    gram = np.array([[reference(a, b, start["mean"]) for a in pooled] for b in pooled])
    assert np.ptp(gram - np.diag(np.diag(gram))) > 0.3  # near and far texts
    found = head.kernel(torch.from_numpy(pooled) - head.mean).numpy()
    assert found.shape == (len(tiny_texts), len(tiny_texts) - 1)
    np.testing.assert_allclose(found.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(found @ found.T, gram - gram.mean(0) - gram.mean(1)[:, None] + gram.mean(), atol=1e-3)
    others = compute_features(tiny_base, [f"{text} and more" for text in tiny_texts[:4]], head_blocks=1, max_tokens=32)
    unseen = pooled_features(head, others)
    wanted = np.array([[reference(a, b, start["mean"]) for b in pooled] for a in unseen])
    np.testing.assert_allclose(head.kernel.values(torch.from_numpy(unseen) - head.mean).numpy(), wanted, atol=1e-4)


def test_few_features_are_the_leading_directions(tiny_base, tiny_texts):
    head, _, features = started(tiny_base, tiny_texts, kernel=6)
    centred = torch.from_numpy(pooled_features(head, features)) - head.mean
    gram = head.kernel.values(centred).double().numpy()
    found = head.kernel(centred).double().numpy()
    middle = np.eye(len(gram)) - 1 / len(gram)
    spectrum = np.linalg.eigvalsh(middle @ gram @ middle)[::-1]
    np.testing.assert_allclose(found.T @ found, np.diag(spectrum[:6]), atol=1e-3)


def test_two_public_texts_with_the_same_features_make_no_feature_large(tiny_base, tiny_texts):
    texts = [*tiny_texts, tiny_texts[0], tiny_texts[0], tiny_texts[1]]
    head, _, _ = started(tiny_base, texts, kernel="all")
    others = compute_features(tiny_base, [f"{text} and more" for text in tiny_texts], head_blocks=1, max_tokens=32)
    found = head.kernel(torch.from_numpy(pooled_features(head, others)) - head.mean)
    assert found.norm(dim=1).max() < 1.5


@pytest.mark.parametrize(("kernel", "whitened", "size"), [(6, 8, 15), ("all", 0, 22), (0, 8, 9)])
def test_only_the_output_grows(tiny_base, tiny_texts, kernel, whitened, size):
    head, start, _ = started(tiny_base, tiny_texts, kernel=kernel, whitened=whitened)
    slots = {slot.name: slot.shape for slot in trained_slots(head)}
    assert slots.pop("output.weight") == (1, size)
    assert all("lora_" in name for name in slots)
    assert {name for name in start if name.startswith("kernel.")} == (
        {"kernel.anchors", "kernel.offset", "kernel.projection"} if kernel else set()
    )
    assert not start["output.weight"].any()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("blocks", [0, 1])
def test_per_sample_gradients_by_hooks_are_those_of_autograd(tiny_base, tiny_texts, blocks):
    head, _, features = started(tiny_base, tiny_texts[:9], blocks=blocks)
    shift(head)
    prepared = head.prepare(features)
    hidden, mask = prepared.batch(range(9))
    targets = torch.tensor([1.0 + i % 5 for i in range(9)])
    parameters = shared_parameters(head)
    single = [
        torch.autograd.grad(head(*prepared.batch([i]), targets[i : i + 1]).sum(), list(parameters.values()))
        for i in range(9)
    ]
    module = GradSampleModule(head.train(), loss_reduction="sum")
    module(hidden, mask, targets).sum().backward()
    for i, parameter in enumerate(parameters.values()):
        wanted = torch.stack([gradients[i] for gradients in single])
        torch.testing.assert_close(parameter.grad_sample, wanted, rtol=1e-3, atol=1e-5)
        assert wanted.abs().max() > 1e-3
    frozen = [p for name, p in head.named_parameters() if name.startswith("kernel.")]
    assert len(frozen) == 3
    assert not any(p.requires_grad for p in frozen)


@pytest.mark.parametrize("blocks", [0, 1])
def test_the_fold_and_the_prepared_features_predict_what_the_head_predicts(tiny_base, tiny_texts, blocks):
    head, _, features = started(tiny_base, tiny_texts, blocks=blocks, kernel="all")
    shift(head)
    with torch.no_grad():
        wanted = head.predict(*head.prepare(features).batch(range(len(features)))).numpy()
    pooled, output = pooled_features(head, features), head.output_layer()
    np.testing.assert_allclose(head.apply_output(pooled, output), wanted, atol=1e-4)
    without = output._replace(kernel=np.zeros_like(output.kernel))
    assert np.abs(head.apply_output(pooled, without) - wanted).max() > 0.03


def test_a_text_at_the_centre_has_a_finite_gradient(tiny_base, tiny_texts):
    head, _, _ = started(tiny_base, tiny_texts)
    shift(head)
    pooled = head.mean.detach().clone()[None].requires_grad_()
    prediction = head.output(head.project(pooled)).sum()
    (gradient,) = torch.autograd.grad(prediction, pooled)
    assert torch.isfinite(prediction)
    assert torch.isfinite(gradient).all()


def test_a_start_goes_into_another_head_of_as_many_texts_only(tiny_base, tiny_texts):
    head, start, _ = started(tiny_base, tiny_texts)
    shift(head)
    other = make_head(tiny_base, settings(), public_texts=len(tiny_texts))
    load_start(other, start)
    assert torch.equal(other.kernel.anchors, head.kernel.anchors)
    assert torch.equal(other.kernel.projection, head.kernel.projection)
    with pytest.raises(CampaignError, match=r"kernel\.anchors must be float32 of shape \(21, 32\)"):
        load_start(make_head(tiny_base, settings(), public_texts=21), start)
    broken = start | {"kernel.projection": np.full_like(start["kernel.projection"], np.nan)}
    with pytest.raises(CampaignError, match=r"kernel\.projection must be finite"):
        load_start(other, broken)


def test_impossible_settings_are_refused(tiny_base, tiny_causal):
    with pytest.raises(ScenarioError, match="below the number of public texts 6, got 6"):
        make_head(tiny_base, settings(), public_texts=6)
    with pytest.raises(ScenarioError, match="below the number of public texts 0, got all"):
        make_head(tiny_base, settings(kernel="all"))
    with pytest.raises(ScenarioError, match=r"kernel_features must be 0 with task\.name = 'generation'"):
        make_head(tiny_causal, settings(task="generation"), public_texts=9)
    for wrong, says in (
        ({"whitened_features": 0}, "at least 1 where adapter.kernel_features is 0"),
        ({"kernel_widths": (0.3,)}, "one number for each of adapter.kernel_widths"),
        ({"kernel_widths": (), "kernel_weights": ()}, "at least one"),
        ({"kernel_widths": (float("nan"), 0.1)}, "kernel_widths.0"),
        ({"kernel_widths": (1e-4, 0.1)}, "greater than or equal to 0.001"),
        ({"kernel_weights": (0.0, 1.0)}, "greater than 0"),
        ({"kernel_features": -1}, "greater than or equal to 0"),
    ):
        with pytest.raises(ValueError, match=says):
            AdapterConfig(**wrong)
