"""what six photographs are taken for, and how little has to change for another class, by a network of 1000 classes

For each the nearest decision boundary of 999, found in a small part of the passes that all of them take, and a picture: the
photograph, what its class is seen by (g), what tells it from the nearest other class (g†), and the photograph moved across
that boundary. The network, EfficientNet-Lite0 trained on ImageNet, and scikit-image's photographs come in packages. Takes less
than a minute on two cores.

  fastsal demo
  fastsal demo my-cat.jpg my-dog.jpg
  fastsal demo --digits     # two small networks, trained on handwritten digits in half a minute, one of them to be robust
"""

import argparse
from pathlib import Path

from fastsal.cli import digits, photographs
from fastsal.files import CommandError, check_output, extra


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("photographs", nargs="*", type=Path, metavar="FILE", help="photographs of your own instead")
    parser.add_argument("--out", type=Path, default=Path("fastsal-demo.png"), help="the picture; default: %(default)s")
    parser.add_argument(
        "--digits", action="store_true", help="handwritten digits, and networks that are trained on them"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="with --digits, of split, networks and training; default: 0"
    )


def run(arguments: argparse.Namespace) -> int:
    """Runs the demo that is wanted."""
    check_output(arguments.out, (".png", ".pdf", ".svg"))
    extra("matplotlib.figure")
    if arguments.digits:
        if arguments.photographs:
            raise CommandError(f"--digits: takes no photographs, got {arguments.photographs[0]}")
        digits.show(arguments.out, arguments.seed)
    else:
        photographs.show(arguments.out, arguments.photographs)
    print(f"wrote {arguments.out}")
    return 0
