"""The networks that the study trains."""

import sys

import pytest
import torch
from torch import nn

from fastsal.files import CommandError
from fastsal.study.data import Data
from fastsal.study.models import cnn, factory


def test_cnn_of_the_paper():
    model = cnn((1, 28, 28), 10)
    assert [type(module).__name__ for module in model] == [*["Conv2d", "ReLU", "MaxPool2d"] * 3, "Flatten", "Linear",
        "ReLU", "Dropout", "Linear"]  # fmt: skip
    assert [module.out_channels for module in model if isinstance(module, nn.Conv2d)] == [32, 64, 128]
    assert model[12].p == 0.5
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    with pytest.raises(CommandError, match="3 poolings leave nothing of images of 4 x 28 pixels"):
        cnn((1, 4, 28), 10)


def test_smooth(digits):
    """The same layers but for softplus and average pooling, and the gradient has no jumps: a small step changes it a little."""
    model = factory("cnn:smooth", digits)().double().eval()
    plain = factory("cnn", digits)().double().eval()
    swapped = {nn.ReLU: nn.Softplus, nn.MaxPool2d: nn.AvgPool2d}
    assert [type(module) for module in model] == [swapped.get(type(module), type(module)) for module in plain]

    def jump(network):
        x = digits.test.x[:50].double()
        near = x + 1e-6 * torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        g = [torch.autograd.grad(network(z.requires_grad_())[:, 0].sum(), z)[0].flatten(1) for z in (x, near)]
        return ((g[0] - g[1]).norm(dim=1) / g[0].norm(dim=1)).max()

    assert jump(model) < 1e-4 < jump(plain)


def test_by_name(digits, monkeypatch):
    assert factory("cnn", digits)()(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(CommandError, match="; pip install timm"):
        factory("timm:resnet18", digits)


def test_torchvision(torchvision):
    data = Data("colour", None, None, 5, (3, 32, 32))
    assert factory("torchvision:resnet18", data)().eval()(torch.rand(1, 3, 32, 32)).shape == (1, 5)
    with pytest.raises(CommandError, match="--model torchvision:resnet19: "):
        factory("torchvision:resnet19", data)()
