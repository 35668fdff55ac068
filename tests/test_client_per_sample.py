"""Per-sample gradients of our own sampler: those of autograd one sample at a time, in a table of our own."""

import pytest
import torch
from opacus import GradSampleModule
from torch import nn

from client.training.per_sample import PerSample, linear_grad_sample


@pytest.mark.parametrize("shape", [(5,), (5, 7), (5, 3, 2), (0, 7), (1, 1)], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 4), (4, 12), (3, 3), (6, 1)])
def test_a_linear_layers_gradients_are_those_of_each_sample_alone(shape, inputs, outputs):
    torch.manual_seed(0)
    layer = nn.Linear(inputs, outputs)
    x, g = torch.randn(*shape, inputs), torch.randn(*shape, outputs)
    found = linear_grad_sample(layer, [x], g)
    assert found[layer.weight].shape == (shape[0], outputs, inputs)
    for row in range(shape[0]):
        layer.zero_grad()
        layer(x[row]).backward(g[row])
        torch.testing.assert_close(found[layer.weight][row], layer.weight.grad)
        torch.testing.assert_close(found[layer.bias][row], layer.bias.grad)


def test_what_is_frozen_gets_no_gradient():
    layer = nn.Linear(3, 2)
    layer.weight.requires_grad_(False)
    assert list(linear_grad_sample(layer, [torch.ones(4, 3)], torch.ones(4, 2))) == [layer.bias]


def test_opacus_keeps_its_own_sampler():
    """What is registered with Opacus is everybody's in the process: its own hooks must stay what they were."""
    assert GradSampleModule.GRAD_SAMPLERS[nn.Linear] is not linear_grad_sample
    assert GradSampleModule.GRAD_SAMPLERS.keys() <= PerSample.GRAD_SAMPLERS.keys()
    taken = []

    def seen(layer, activations, backprops):
        taken.append(layer)
        return linear_grad_sample(layer, activations, backprops)

    class Watched(PerSample):
        GRAD_SAMPLERS = PerSample.GRAD_SAMPLERS | {nn.Linear: seen}

    x = torch.randn(6, 5, 8, requires_grad=True)
    models = [nn.Sequential(nn.Linear(8, 2), nn.Tanh(), nn.Linear(2, 8)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for kind, model in zip((Watched, GradSampleModule), models, strict=True):
        kind(model, loss_reduction="sum")(x).square().sum().backward()
    assert len(taken) == 2
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours.grad_sample, theirs.grad_sample)
