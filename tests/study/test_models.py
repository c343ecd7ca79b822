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
    assert not any(layer.bias.any() for layer in model if hasattr(layer, "bias"))
    for layer, fans in ((model[0], 9 * (1 + 32)), (model[9 + 1], 1152 + 128)):  # Glorot: uniform up to √(6 / fans)
        assert layer.weight.abs().max().item() == pytest.approx((6 / fans) ** 0.5, rel=0.05)
    with pytest.raises(CommandError, match="3 poolings leave nothing of images of 4 x 28 pixels"):
        cnn((1, 4, 28), 10)


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
