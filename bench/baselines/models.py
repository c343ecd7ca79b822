"""The four models of the model level, untrained, in evaluation mode, from a fixed seed; and images for them."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(classes: int = 10) -> nn.Module:
    """Three layers on 784 inputs."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, classes))


def cnn(classes: int, size: int) -> nn.Module:
    """Four convolutions of stride 2 and a linear head, on 3 x size x size images."""
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128), (128, 256)):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256 * (size // 16) ** 2, classes))


class Block(nn.Module):
    """Two convolutions with BatchNorm and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        same = stride == 1 and before == after
        shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet18(classes: int) -> nn.Module:
    """The layers and widths of ResNet-18 (He, Zhang, Ren and Sun, CVPR 2016)."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
    for place, (before, after) in enumerate(pairwise(widths)):
        layers.append(Block(before, after, 2 if place in (2, 4, 6) else 1))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


# name -> model, shape of an image, examples of a batch
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP, n = 10, D = 784": (mlp, (784,), 64),
    "CNN, n = 100, 3×32×32": (lambda: cnn(100, 32), (3, 32, 32), 8),
    "CNN, n = 1000, 3×64×64": (lambda: cnn(1000, 64), (3, 64, 64), 2),
    "ResNet-18, n = 1000, 3×64×64": (lambda: resnet18(1000), (3, 64, 64), 1),
}


def load(name: str) -> tuple[nn.Module, Tensor]:
    """The model and a batch, away from the edges of [0, 1], where peers clip."""
    make, shape, count = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        return model, 0.2 + 0.6 * torch.rand(count, *shape)


def tiny() -> tuple[nn.Module, Tensor]:
    """A model that takes no time, for tests and for warming up."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 12)).eval()
        return model, 0.4 + 0.2 * torch.rand(3, 20)
