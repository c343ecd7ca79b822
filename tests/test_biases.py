"""bias_contributions: beside automatic differentiation by every bias, and the offset of piecewise linear networks."""

import pytest
import torch
from torch import nn

import fastsal


@pytest.fixture
def model():
    """Convolutions, grouped, transposed and without bias, and BatchNorm that has seen data, one of it without parameters."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, bias=False),
        nn.BatchNorm2d(4, affine=False),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(48, 6),
        nn.ReLU(),
        nn.Linear(6, 5),
    ).double()
    for _ in range(3):
        network(torch.randn(16, 2, 6, 6, dtype=torch.float64) + 1)
    nn.init.normal_(network[1].weight)
    nn.init.normal_(network[1].bias)
    return network.eval()


def test_beside_autograd(model):
    """⟨b, ∂Ψʲ/∂b⟩, and of BatchNorm the same of its shift less scale · mean / √(variance + ε)."""
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    found = fastsal.bias_contributions(model, x)
    assert list(found) == ["0", "1", "4", "6", "9", "11"]
    assert all(value.shape == (3, 5) and value.dtype == torch.float64 for value in found.values())
    for name, value in found.items():
        layer, want = model[int(name)], torch.zeros(3, 5, dtype=torch.float64)
        bias = layer.bias
        if isinstance(layer, nn.BatchNorm2d):
            scale = 1 if layer.weight is None else layer.weight
            bias = (0 if layer.bias is None else layer.bias) - scale * layer.running_mean / (
                layer.running_var + layer.eps
            ).sqrt()
        bias = bias.detach()
        tail = model[int(name) + 1 :]
        for b in range(3):
            # The layer's output without its bias, to which a bias of its own is added.
            before = model[: int(name) + 1](x[b : b + 1]).detach() - bias.view(
                -1, *(1,) * (layer(model[: int(name)](x)).dim() - 2)
            )
            own = bias.clone().requires_grad_()
            logits = tail(before + own.view(-1, *(1,) * (before.dim() - 2)))[0]
            for j in range(5):
                (gradient,) = torch.autograd.grad(logits[j], own, retain_graph=True)
                want[b, j] = (bias * gradient).sum()
        torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-12)


def test_sum_is_the_offset(model):
    """β and β†, which analyze finds from the input's gradient."""
    x = torch.randn(20, 2, 6, 6, dtype=torch.float64)
    result, sums = fastsal.analyze(model, x), sum(fastsal.bias_contributions(model, x).values())
    own, other = (sums.gather(1, which.unsqueeze(1)).squeeze(1) for which in (result.prediction, result.runner_up))
    torch.testing.assert_close(result.offset, own, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(result.binarized_offset, own - other, rtol=1e-11, atol=1e-12)


def test_a_layer_that_runs_twice_counts_twice_and_one_that_leads_nowhere_not():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.unused, self.aside = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            self.aside(x)
            return self.layer(self.layer(x).relu())

    torch.manual_seed(1)
    model, x = Twice().double(), torch.randn(5, 4, dtype=torch.float64)
    found = fastsal.bias_contributions(model, x)
    assert list(found) == ["layer"]
    result = fastsal.analyze(model, x)
    torch.testing.assert_close(found["layer"].gather(1, result.prediction.unsqueeze(1)).squeeze(1), result.offset)


def test_leaves_the_model_and_refuses_training_mode(model):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64, requires_grad=True)
    found = fastsal.bias_contributions(model, x)
    assert not any(value.requires_grad for value in found.values())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model[1].train()
    with pytest.raises(ValueError, match=r"^model: 1 is in training mode, wants evaluation mode: model.eval\(\)$"):
        fastsal.bias_contributions(model, x)


def test_no_biases():
    assert fastsal.bias_contributions(nn.Linear(4, 3, bias=False), torch.rand(2, 4)) == {}
