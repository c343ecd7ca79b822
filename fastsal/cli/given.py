"""Model and data as several commands are given them: the options, and what they make."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from fastsal.cli import inputs, models
from fastsal.cli.options import positive
from fastsal.files import Blame, CommandError
from fastsal.model.calling import logits_alone


def add_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """--model, --data and what goes with them."""
    parser.add_argument(
        "--model",
        required=required,
        metavar="NAME",
        help="timm:NAME, torchvision:NAME, or package.module:name of a torch.nn.Module or of what returns one when called "
        "without arguments, looked up from the current folder too",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help=".safetensors, or a torch file that holds a state_dict and no more; default: timm's or torchvision's own, which "
        "they download once ('random': untrained), or what your code loads",
    )
    parser.add_argument(
        "--data",
        required=required,
        help="folder:PATH of images, .npy, or .npz with the array x (or a single array) and perhaps the true classes y",
    )
    parser.add_argument("--image-size", type=positive, help="pixels of a side, for images and a model of your own")
    parser.add_argument("--channels", type=int, choices=(1, 3), help="1: grey levels, likewise; default: 3")
    parser.add_argument("--mean", type=float, nargs="+", help="of the channels, for a model of your own; default: none")
    parser.add_argument("--std", type=float, nargs="+", help="of the channels, likewise")


def model(arguments: argparse.Namespace) -> models.Loaded:
    """The model."""
    return models.load(arguments.model, arguments.weights, arguments.mean, arguments.std)


def data(arguments: argparse.Namespace, loaded: models.Loaded) -> tuple[inputs.Arrays | inputs.Images, str]:
    """The data, and what is to be said about them."""
    dtype = next((p.dtype for p in loaded.model.parameters() if p.is_floating_point()), None)
    if not arguments.data.startswith(inputs.FOLDER):
        found = inputs.arrays(Path(arguments.data))
        changed = dtype is not None and str(dtype) != f"torch.{found.x.dtype}"
        return found, f"x is {found.x.dtype} in the file and was analysed in the model's {dtype}" if changed else ""
    transform = loaded.transform
    if transform is None:
        if arguments.image_size is None:
            raise CommandError("--image-size: is missing; a model of your own does not say how large its images are")
        transform = inputs.Square(arguments.image_size, arguments.channels or 3)
    elif given := [name for name in ("image_size", "channels") if getattr(arguments, name) is not None]:
        raise CommandError(f"--{given[0].replace('_', '-')}: {arguments.model} brings its own")

    def classes(x: Tensor) -> int:
        with Blame(f"--model {arguments.model} on x of shape {tuple(x.shape)}"):
            try:
                return logits_alone(loaded.model, x.to(dtype)).shape[1]
            except Exception as error:
                hint = ""
                with contextlib.suppress(Exception):
                    logits_alone(loaded.model, x[:, :1].to(dtype))
                    hint = f"--model {arguments.model}: takes images of one channel: --channels 1"
                raise CommandError(hint) if hint else error from error

    return inputs.images(Path(arguments.data.removeprefix(inputs.FOLDER)), transform, classes)


@contextlib.contextmanager
def from_here() -> Iterator[None]:
    """Lets imports see the current folder, as `python -m` does and an installed command does not."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
