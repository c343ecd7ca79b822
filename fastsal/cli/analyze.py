"""measure how far every example of a data file is from a model's decision boundary, and how its saliency map aligns

  fastsal analyze --model mypackage.models:make_net --weights net.safetensors --data test.npz --out results.csv

The results have one row per example: every scalar of fastsal.Geometry, and how it was obtained. Distances are in units of
the data as stored; to measure them in pixels, put the normalisation into the model. Alignment, offset and homogeneity
depend on where the origin of the data is (mean-centred or not). Nothing is ever unpickled.
"""

import argparse
import contextlib
import csv
import dataclasses
import importlib
import importlib.util
import io
import os
import pickle
import sys
import warnings
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.analysis import analyze
from fastsal.cli.options import positive
from fastsal.files import Blame, CommandError, check_output, extra, replacing
from fastsal.geometry import Geometry
from fastsal.linearization import call
from fastsal.methods import METHODS

QUANTITIES = (
    "linearized_robustness",
    "alignment",
    "binarized_alignment",
    "bound",
    "homogeneity",
    "binarized_homogeneity",
)
MANY_CLASSES = 50  # passes, from where on the certified method can pay
Columns = dict[str, np.ndarray[Any, Any]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, in the order a newcomer needs them."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="PACKAGE.MODULE:NAME",
        help="a torch.nn.Module, or what returns one when called without arguments; looked up from the current folder too",
    )
    parser.add_argument(
        "--weights", type=Path, help=".safetensors, or a torch file that holds a state_dict and no more"
    )
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        help=".npy, or .npz with the array x (or a single array) and perhaps the true classes y",
    )
    parser.add_argument("--out", required=True, type=Path, help="where the results go: .csv or .npz")
    parser.add_argument("--method", choices=METHODS, default="exact", help="default: %(default)s, every class")
    parser.add_argument(
        "--norm", choices=("2", "1", "inf"), default="2", help="of the perturbation (gradients: its dual); default: 2"
    )
    parser.add_argument("--device", default="cpu", help="of model and data, such as cuda or cuda:1; default: cpu")
    parser.add_argument("--batch-size", type=positive, default=64, help="examples at once; default: %(default)s")
    parser.add_argument("--chunk-size", type=positive, help="classes at once; default: chosen by device")
    parser.add_argument("--backend", default="auto", help="see fastsal info; default: auto")


def _model(name: str) -> nn.Module:
    """The module `package.module:name`, or what it returns, in evaluation mode."""
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise CommandError(f"--model {name}: wants package.module:name")
    with Blame(f"--model {name}"):
        found = attrgetter(attribute)(importlib.import_module(module_name))
        model = found if isinstance(found, nn.Module) or not callable(found) else found()
    if not isinstance(model, nn.Module):
        raise CommandError(f"--model {name}: gives {type(model).__name__}, wants a torch.nn.Module")
    return model.eval()


def _load_weights(model: nn.Module, path: Path) -> None:
    with Blame(f"--weights {path}"):
        if path.suffix == ".safetensors":
            state = extra("safetensors.torch").load_file(path)
        else:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                raise CommandError(
                    f"--weights {path}: is no torch file of tensors alone; save model.state_dict(), or a .safetensors file"
                ) from None
        if not isinstance(state, dict):
            raise CommandError(f"--weights {path}: holds {type(state).__name__}, wants a state_dict")
        model.load_state_dict(state)


def _data(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """x [N, *S] (a .npy stays on disk until read) and the true classes y [N] or None."""
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
    return x, y


def _progress(steps: range) -> Any:
    """The steps, with a bar where a person is watching."""
    if not sys.stderr.isatty() or importlib.util.find_spec("tqdm") is None:
        return contextlib.nullcontext(steps)
    return importlib.import_module("tqdm").tqdm(steps, unit="batch")


def _columns(result: Geometry) -> Columns:
    """Everything that is one value an example, provenance included."""
    B = result.prediction.shape[0]
    columns = {}
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, Tensor) and value.dim() == 1:
            columns[field.name] = value.cpu().numpy()
        elif isinstance(value, str | float):
            columns[field.name] = np.full(B, value)
    return columns


def _write(path: Path, columns: Columns) -> None:
    with replacing(path) as file:
        if path.suffix == ".npz":
            np.savez(file, **columns)  # type: ignore[arg-type]
            return
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.writer(text)
        writer.writerow(columns)
        writer.writerows(zip(*(column.tolist() for column in columns.values()), strict=True))
        text.detach()


def quartiles(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Lower quartile, median and upper quartile of values that are not NaN; always three of the values themselves."""
    known = values[~np.isnan(values)]
    return np.quantile(known, [0.25, 0.5, 0.75], method="inverted_cdf") if known.size else np.full(3, np.nan)


def _summary(columns: Columns, y: np.ndarray[Any, Any] | None, n: int, norm: str) -> Iterator[str]:
    yield f"{'':24}{'quartile':>14}{'median':>14}{'quartile':>14}"
    for name in QUANTITIES:
        lost = int(np.isnan(columns[name]).sum())
        numbers = "".join(f"{value:14.6g}" for value in quartiles(columns[name]))
        yield f"{name:24}{numbers}" + (f"   ({lost} NaN left out)" if lost else "")
    if y is not None:
        yield f"accuracy {np.mean(columns['prediction'] == y):.4f}"
    passes = [f"{columns[name].mean():.4g} {kind}" for name, kind in (("vjps", "backward"), ("jvps", "forward-mode"))]
    yield f"passes per example: {' and '.join(passes)}, for n = {n} classes"
    method = columns["method"][0]
    if method == "candidates":
        yield "candidates: linearized_robustness is an upper bound, from the highest logits only"
    if method == "certified":
        yield f"certified: {int(columns['certified'].sum())} of {len(columns['certified'])} examples"
    if method == "exact" and norm == "2" and columns["vjps"].mean() >= MANY_CLASSES:
        yield (
            "hint: --method certified finds the same minimum, except with a probability of 1e-6 an example, in fewer passes "
            "where classes are many (the README has figures)"
        )


def run(arguments: argparse.Namespace) -> int:
    """Analyses the whole file, writes the results, prints a summary."""
    check_output(arguments.out, (".csv", ".npz"))
    with _from_here(), _short_warnings():
        x, y = _data(arguments.data)
        model = _model(arguments.model)
        if arguments.weights is not None:
            _load_weights(model, arguments.weights)
        with Blame(f"--device {arguments.device}"):
            device = torch.device(arguments.device)
            model.to(device)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)

        def batch(start: int, stop: int) -> Tensor:
            part = x[start:stop]
            return torch.from_numpy(part.astype(part.dtype.newbyteorder("="))).to(device, dtype)

        with Blame(f"--model {arguments.model} on x of shape {(1, *x.shape[1:])}"), torch.no_grad():
            n = call(model, batch(0, 1)).shape[1]
        parts = []
        with _progress(range(0, len(x), arguments.batch_size)) as steps:
            for start in steps:
                stop = min(start + arguments.batch_size, len(x))
                with Blame(f"--model {arguments.model}, examples {start} to {stop - 1} of {arguments.data}"):
                    result = analyze(
                        model,
                        batch(start, stop),
                        norm=arguments.norm,
                        method=arguments.method,
                        chunk_size=arguments.chunk_size,
                        backend=arguments.backend,
                    )
                parts.append(_columns(result))
    columns = {"index": np.arange(len(x))}
    columns |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _write(arguments.out, columns)
    print(f"{len(x)} examples of shape {x.shape[1:]}, {n} classes, norm {arguments.norm}, method {arguments.method}")
    if dtype is not None and str(dtype) != f"torch.{x.dtype}":
        print(f"x is {x.dtype} in the file and was analysed in the model's {dtype}")
    print("\n".join(_summary(columns, y, n, arguments.norm)))
    print(f"wrote {arguments.out}")
    return 0


@contextlib.contextmanager
def _from_here() -> Iterator[None]:
    """Lets imports see the current folder, as `python -m` does and an installed command does not."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


@contextlib.contextmanager
def _short_warnings() -> Iterator[None]:
    """Warnings as one line each, without a line of source."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"fastsal analyze: warning: {message}", file=sys.stderr)
        yield
