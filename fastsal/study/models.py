"""Networks to train: the paper's CNN for MNIST, a smaller one for digits of 8 x 8, torchvision's and timm's by name."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import nn

from fastsal.files import Blame, CommandError, extra
from fastsal.study.data import Data, Split

LIBRARIES = {"timm": "timm", "torchvision": "torchvision.models"}


def cnn(
    shape: tuple[int, int, int], classes: int, widths: tuple[int, ...] = (32, 64, 128), dense: int = 128
) -> nn.Sequential:
    """The MNIST network of Etmann et al.: a 3 x 3 convolution, ReLU and max-pooling for each width, a dense layer, dropout.

    Weights begin as Keras's do, by Glorot and Bengio (2010), and biases at 0.
    """
    channels, height, width = shape
    layers: list[nn.Module] = []
    for before, after in pairwise((channels, *widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    left = math.prod(side >> len(widths) for side in (height, width))
    if not left:
        raise CommandError(f"--model: {len(widths)} poolings leave nothing of images of {height} x {width} pixels")
    layers += [nn.Flatten(), nn.Linear(widths[-1] * left, dense), nn.ReLU(), nn.Dropout(0.5), nn.Linear(dense, classes)]
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def build(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """A network by name, `torchvision:NAME` or `timm:NAME`, with options of the library's own."""
    library, _, network = name.partition(":")
    module = extra(LIBRARIES[library], library)
    with Blame(f"--model {name}"):
        if library == "timm":
            made: nn.Module = module.create_model(network, pretrained=pretrained, **options)
        else:
            made = module.get_model(network, weights="DEFAULT" if pretrained else None, **options)
    return made


def factory(name: str, data: Data[Split]) -> Callable[[], nn.Module]:
    """What builds an untrained network: `cnn`, `torchvision:NAME` or `timm:NAME`."""
    library, _, network = name.partition(":")
    if name == "cnn":
        widths = (32, 64) if max(data.shape[1:]) < 16 else (32, 64, 128)
        return lambda: cnn(data.shape, data.classes, widths)
    if library not in LIBRARIES or not network:
        raise CommandError(f"--model {name}: wants cnn, torchvision:NAME or timm:NAME")
    extra(LIBRARIES[library], library)
    options: dict[str, Any] = {"num_classes": data.classes}
    if library == "timm":
        options["in_chans"] = data.shape[0]
    return lambda: build(name, **options)
