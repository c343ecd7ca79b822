"""one page from a folder of results: distributions, the least and the most robust examples, what failed

  fastsal report results/
  fastsal report results/ --data folder:photographs --model timm:resnet50 --classes imagenet --out photographs.html

The page is a single file of HTML, which a browser shows without a server and which asks for nothing else. With --data, as they
were given to fastsal analyze, the examples are shown; with --model too their saliency maps, which take two backward passes
each. Maps that were kept (--keep saliency binarized_saliency) need no model.
"""

import argparse
from pathlib import Path
from typing import Any

from fastsal.cli import given, inputs
from fastsal.cli.photographs import names
from fastsal.evaluation import shards
from fastsal.files import Blame, CommandError, check_output, check_outside
from fastsal.pages.report import report

IMAGENET = "imagenet"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("results", type=Path, metavar="RESULTS", help="what fastsal analyze --out wrote, a folder")
    given.add_arguments(parser, required=False)
    parser.add_argument("--classes", metavar="FILE", help=f"what classes are called, a line for each, or {IMAGENET}")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page; default: %(default)s")


def _data(arguments: argparse.Namespace) -> dict[str, Any]:
    """The data, and the model where there is one."""
    if arguments.data is None:
        if arguments.model is not None:
            raise CommandError("--model: is given without --data, wants both for saliency maps")
        return {}
    if arguments.model is not None:
        loaded = given.model(arguments)
        return {"model": loaded.model, "data": given.data(arguments, loaded)[0]}
    if not arguments.data.startswith(inputs.FOLDER):
        return {"data": inputs.arrays(Path(arguments.data))}
    if arguments.image_size is None:
        raise CommandError("--data: images want --model, or the --image-size that fastsal analyze was given")
    transform = inputs.Square(arguments.image_size, arguments.channels or 3)
    n = shards.record(shards.shards(arguments.results)[0])["classes"]
    return {"data": inputs.images(Path(arguments.data.removeprefix(inputs.FOLDER)), transform, lambda x: n)[0]}


def _classes(name: str | None) -> list[str] | None:
    if name is None or name == IMAGENET:
        return None if name is None else names()
    with Blame(f"--classes {name}"):
        return Path(name).read_text(encoding="utf-8").splitlines()


def run(arguments: argparse.Namespace) -> int:
    """Reads, looks at both ends, writes the page."""
    check_output(arguments.out, (".html",))
    if arguments.data is not None:
        check_outside(arguments.out, arguments.data)
    with Blame(f"RESULTS {arguments.results}"):
        if not (arguments.results.is_dir() and shards.shards(arguments.results)):
            raise CommandError(f"RESULTS {arguments.results}: is no folder of results of fastsal analyze")
    with given.from_here():
        try:
            page = report(arguments.results, classes=_classes(arguments.classes), out=arguments.out, **_data(arguments))
        except (ImportError, OSError, ValueError) as error:
            raise CommandError(" ".join(str(error).split())) from error
    print(f"wrote {page}")
    return 0
