"""measure how far every example of a data set is from a model's decision boundary, and how its saliency map aligns

  fastsal analyze --model timm:resnet50 --data folder:photographs --out results/
  fastsal analyze --model mypackage.models:make_net --weights net.safetensors --data test.npz --out results.csv
  torchrun --nproc-per-node 4 -m fastsal analyze --model timm:resnet50 --data folder:photographs --out results/

The results have one row per example: every scalar of fastsal.Geometry, and how it was obtained. An --out without an ending is a
folder, into which results go as they are found: a run that was stopped, in whatever way, resumes when the same command is given
again, and torchrun shares the work between processes. A file is written at the end. An example that cannot be read or analysed
is named and left empty, and the exit status is 1; it is 0 where all went well, and 2 where nothing could be done.

A network of timm's or torchvision's brings its own size and normalisation, and the latter becomes a part of the model, so that
distances are in pixels in [0, 1]. For a model of your own, distances are in units of the data as the model takes them; --mean
and --std put a normalisation in front of it. Alignment, offset and homogeneity depend on where the origin of the data is
(mean-centred or not). Nothing is ever unpickled.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from fastsal import plot
from fastsal.cli import given
from fastsal.cli.options import check_device, from_zero, natural, positive
from fastsal.evaluation import shards, tables
from fastsal.evaluation.evaluate import evaluate, in_memory, load
from fastsal.evaluation.summary import Summary
from fastsal.evaluation.tables import KEPT
from fastsal.files import Blame, CommandError, check_output, check_outside, extra, save_figure
from fastsal.methods import FEW, METHODS

FILES = (".csv", ".npz", ".parquet")
PICTURES = (".pdf", ".png", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, in the order a newcomer needs them."""
    given.add_arguments(parser, required=True)
    parser.add_argument(
        "--out", required=True, help="where the results go: a folder, or a file ending with .csv, .npz or .parquet"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="auto",
        help=f"default: %(default)s, exact where that takes at most {FEW} passes an example, or the norm is 1; else certified",
    )
    parser.add_argument(
        "--norm", choices=("2", "1", "inf"), default="2", help="of the perturbation (gradients: its dual); default: 2"
    )
    parser.add_argument(
        "--device", default="cpu", help="of model and data, such as cuda or cuda:1; default: cpu. torchrun: a GPU each"
    )
    parser.add_argument("--batch-size", type=positive, help="examples at once; default: 64, or fewer that are large")
    parser.add_argument("--chunk-size", type=positive, help="classes at once; default: chosen by device")
    parser.add_argument("--backend", default="auto", help="see fastsal info; default: auto")
    parser.add_argument("--workers", type=natural, default=0, help="processes that read ahead; default: 0")
    parser.add_argument(
        "--save-every",
        type=from_zero,
        default=30.0,
        metavar="SECONDS",
        help="how much work a kill may cost, into a folder; default: %(default)g",
    )
    parser.add_argument("--keep", nargs="+", default=[], choices=KEPT, help="arrays to keep besides, in a folder")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture of ρ̃ and α: .pdf, .png or .svg")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON, with every quantity and class")


def _device(name: str) -> torch.device:
    """The device, which under torchrun is the GPU of this process's own where GPUs are wanted."""
    device = check_device(name)
    with Blame(f"--device {name}"):
        local = os.environ.get("LOCAL_RANK")
        if name == "cuda" and local is not None:
            if int(local) >= torch.cuda.device_count():
                raise CommandError(
                    f"--device {name}: process {local} of this machine finds {torch.cuda.device_count()} GPUs, wants one each"
                )
            device = torch.device("cuda", int(local))
            torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _processes(device: torch.device) -> Iterator[bool]:
    """Joins the other processes that torchrun started, where it did. Yields whether this is the first."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        yield True
        return
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:  # all on this machine: nothing leaves it
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with Blame("torchrun"):
        # A process waits for the others for as long as a batch of theirs takes, and one that dies is noticed without a limit.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    try:
        yield dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def _plain(value: Any) -> Any:
    """A value as JSON can say it: NaN as null, infinities as text."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _say(summary: Summary, notes: list[str], arguments: argparse.Namespace) -> None:
    if arguments.json:
        about = {"model": arguments.model, "data": arguments.data, "out": arguments.out, "notes": notes}
        print(json.dumps(_plain(about | dataclasses.asdict(summary)), indent=1, ensure_ascii=False))
        return
    print(summary)
    print("\n".join([*notes, f"wrote {arguments.out}"]))


def _check(arguments: argparse.Namespace) -> bool:
    """Says now, not after the work, what cannot be written. Returns whether the results go into a folder."""
    out = Path(arguments.out)
    if arguments.plot is not None:
        check_output(arguments.plot, PICTURES, "--plot")
        check_outside(arguments.plot, arguments.data, "--plot")
        if arguments.plot.resolve() == out.resolve():
            raise CommandError(f"--plot {arguments.plot}: is --out too, wants another name")
        extra("matplotlib.figure")
    check_outside(out, arguments.data)
    in_file = out.suffix and not arguments.out.endswith(os.sep) and not (out.is_dir() and out.suffix not in FILES)
    if in_file:
        if arguments.keep:
            raise CommandError(f"--keep: --out {out} is a file, wants a folder to lay arrays into")
        check_output(out, FILES, columns=("index", *tables.MISSING))
        if out.suffix == ".parquet":
            extra("pyarrow.parquet", "'fastsal[dataset]'")
        return False
    if out.is_file():
        raise CommandError(f"--out {out}: is a file; a name without an ending is taken for a folder")
    shards.check_own(out, "--out")
    return True


def run(arguments: argparse.Namespace) -> int:
    """Analyses every example, writes the results, prints a summary."""
    folder = _check(arguments)
    with given.from_here(), _short_warnings():
        device = _device(arguments.device)
        loaded = given.model(arguments)
        data, note = given.data(arguments, loaded)
        with Blame(f"--device {arguments.device}"):
            loaded.model.to(device)
        options: dict[str, Any] = {
            name: getattr(arguments, name) for name in ("norm", "method", "batch_size", "chunk_size", "backend")
        }
        options |= {"workers": arguments.workers, "names": getattr(data, "names", None)}
        with _processes(device) as first:
            try:
                if folder:
                    further: dict[str, Any] = {"save_every": arguments.save_every, "keep": arguments.keep}
                    summary = evaluate(loaded.model, data, arguments.out, **further, **options)
                else:
                    columns, summary = in_memory(loaded.model, data, **options)
            except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
                raise CommandError(" ".join(str(error).split())) from error
        if first:
            if not folder:
                tables.write(Path(arguments.out), columns)
            if arguments.plot is not None:
                figure = extra("matplotlib.figure").Figure(layout="constrained")
                geometry = load(arguments.out) if folder else tables.as_geometry(columns)
                plot.scatter(geometry, ax=figure.subplots())
                save_figure(figure, arguments.plot, "--plot")
            _say(summary, [text for text in (note, loaded.note) if text], arguments)
    return 1 if first and summary.failed else 0  # torchrun ends all where one has another status than 0


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line each, without a line of source, and each text once."""
    said = set()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in said:
            print(f"fastsal analyze: warning: {message}", file=sys.stderr)
        said.add(str(message))

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
