"""What --data means: arrays of NumPy's, or a folder of images, as data sets of x or of x and the true class."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastsal.files import Blame, CommandError, extra

IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FOLDER = "folder:"


class Arrays(Dataset[Any]):
    """Examples x [N, *S] (of a .npy, they stay on disk until they are read) and perhaps their classes y [N]."""

    def __init__(self, x: np.ndarray[Any, Any], y: np.ndarray[Any, Any] | None) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        x = np.array(self.x[index], dtype=self.x.dtype.newbyteorder("="))
        return (x,) if self.y is None else (x, self.y[index])


def arrays(path: Path) -> Arrays:
    """A .npy, or a .npz with the array x (or a single array) and perhaps y. Nothing is unpickled."""
    if path.is_dir():
        raise CommandError(f"--data {path}: is a folder; the images in it are --data {FOLDER}{path}")
    with Blame(f"--data {path}"):
        found = np.load(path, mmap_mode="r", allow_pickle=False)
        y = None
        if isinstance(found, np.lib.npyio.NpzFile):
            names = [name for name in found.files if name != "y"]
            if "x" not in names and len(names) != 1:
                raise CommandError(f"--data {path}: holds {found.files}, wants x, or a single array (besides y)")
            x = found["x" if "x" in names else names[0]]
            y = found["y"] if "y" in found.files else None
        else:
            x = found
    if x.dtype.kind != "f" or x.dtype.itemsize > 8:
        raise CommandError(
            f"--data {path}: x is {x.dtype}, wants float16, float32 or float64, scaled as the model was trained"
        )
    if x.ndim < 1 or 0 in x.shape:
        raise CommandError(f"--data {path}: x has shape {x.shape}, wants [N, ...] with at least one example")
    if y is not None and (y.dtype.kind not in "iu" or y.shape != x.shape[:1]):
        raise CommandError(
            f"--data {path}: y has shape {y.shape} and is {y.dtype}, wants a whole number for each of {len(x)} examples"
        )
    return Arrays(x, y)


class Square:
    """Scales an image until its shorter side has `side` pixels and cuts out the centre: [channels, side, side] in [0, 1].

    Its three channels are red, green and blue; a single one is the grey level.
    """

    def __init__(self, side: int, channels: int = 3) -> None:
        self.side, self.mode = side, {1: "L", 3: "RGB"}[channels]

    def __call__(self, image: Any) -> Tensor:
        scale = self.side / min(image.size)
        width, height = (max(self.side, round(scale * length)) for length in image.size)
        left, top = (width - self.side) // 2, (height - self.side) // 2
        image = image.convert(self.mode).resize((width, height), extra("PIL.Image", "pillow").Resampling.BICUBIC)
        pixels = np.asarray(image.crop((left, top, left + self.side, top + self.side)), dtype=np.float32)
        return torch.from_numpy(pixels / 255).reshape(self.side, self.side, -1).permute(2, 0, 1).contiguous()


class Images(Dataset[Any]):
    """Image files below a folder, in the order of their names, and perhaps their classes."""

    def __init__(self, root: Path, names: Sequence[str], y: Sequence[int] | None, transform: Callable[[Any], Tensor]):
        self.root, self.names, self.y, self.transform = root, names, y, transform

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        with extra("PIL.Image", "pillow").open(self.root / self.names[index]) as image:
            x = self.transform(image.convert("RGB"))
        return (x,) if self.y is None else (x, self.y[index])


def _classes(names: Sequence[str], classes: int) -> tuple[list[int] | None, str]:
    """The true class of every file by the folder that it lies in, and how that is known or why not."""
    if not all("/" in name for name in names):
        return None, "true classes: unknown, since not all images lie in folders of their class"
    folders = [name.partition("/")[0] for name in names]
    found = sorted(set(folders))
    if all(folder.isdecimal() and int(folder) < classes for folder in found):
        return [int(folder) for folder in folders], f"true classes: the numbers that name the {len(found)} folders"
    if len(found) == classes:
        return [
            found.index(folder) for folder in folders
        ], f"true classes: the {len(found)} folders in alphabetical order"
    return None, (
        f"true classes: unknown, since {len(found)} folders whose names are no class numbers do not tell which of "
        f"{classes} classes they are"
    )


def images(root: Path, transform: Callable[[Any], Tensor], classes: Callable[[Tensor], int]) -> tuple[Images, str]:
    """The images below a folder, and a note on their classes. `classes` says how many a model has that takes x [1, C, H, W].

    Files in folders that are named by class numbers have these classes; in as many folders as there are classes, that of the
    folder's place in the alphabet, as torchvision's ImageFolder has it.
    """
    with Blame(f"--data {FOLDER}{root}"):
        if not root.is_dir():
            raise CommandError(f"--data {FOLDER}{root}: is no folder")
        files = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
        names = [path.as_posix() for path in sorted(files) if not any(part.startswith(".") for part in path.parts)]
    if not names:
        raise CommandError(f"--data {FOLDER}{root}: holds no image, wants files ending with {', '.join(IMAGES)}")
    blank = extra("PIL.Image", "pillow").new("RGB", (256, 256))
    y, note = _classes(names, classes(transform(blank).unsqueeze(0)))
    return Images(root, names, y, transform), note
