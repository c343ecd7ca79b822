"""Networks to train: the paper's CNN for MNIST, a smaller one for digits of 8 x 8, torchvision's and timm's by name."""

import math
from collections.abc import Callable
from itertools import pairwise

from torch import nn

from fastsal.files import Blame, CommandError, extra
from fastsal.study.data import Data, Split


def cnn(
    shape: tuple[int, int, int], classes: int, widths: tuple[int, ...] = (32, 64, 128), dense: int = 128
) -> nn.Sequential:
    """The MNIST network of Etmann et al.: a 3 x 3 convolution, ReLU and max-pooling for each width, a dense layer, dropout."""
    channels, height, width = shape
    layers: list[nn.Module] = []
    for before, after in pairwise((channels, *widths)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    left = math.prod(side >> len(widths) for side in (height, width))
    if not left:
        raise CommandError(f"--model: {len(widths)} poolings leave nothing of images of {height} x {width} pixels")
    layers += [nn.Flatten(), nn.Linear(widths[-1] * left, dense), nn.ReLU(), nn.Dropout(0.5), nn.Linear(dense, classes)]
    return nn.Sequential(*layers)


def factory(name: str, data: Data[Split]) -> Callable[[], nn.Module]:
    """What builds an untrained network: `cnn`, `torchvision:NAME` or `timm:NAME`."""
    library, _, model = name.partition(":")
    if name == "cnn":
        widths = (32, 64) if max(data.shape[1:]) < 16 else (32, 64, 128)
        return lambda: cnn(data.shape, data.classes, widths)
    if library not in ("torchvision", "timm") or not model:
        raise CommandError(f"--model {name}: wants cnn, torchvision:NAME or timm:NAME")
    with Blame(f"--model {name}"):
        module = extra("torchvision.models" if library == "torchvision" else "timm", library)

    def build() -> nn.Module:
        with Blame(f"--model {name}"):
            if library == "timm":
                made: nn.Module = module.create_model(model, num_classes=data.classes, in_chans=data.shape[0])
            else:
                made = module.get_model(model, weights=None, num_classes=data.classes)
        return made

    return build
