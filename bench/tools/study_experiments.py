"""What changes the study's verdicts: networks of the study anew, with one thing changed at a time.

    python -m bench study_experiments [--study FOLDER] [CHANGE ...]

Needs a folder of `fastsal study`, some of whose networks of seed 0 it measures in other ways, and trains others beside them.
Writes bench/results/study/experiments.csv, a row for each network, experiments_claims.csv, the study's claims judged by its
criteria on the networks of each change, and changes.png, both at a glance. Networks that are in the folder are not trained
again, nor is the training of one that was stopped begun anew.
"""

import argparse
import csv
import json
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastsal
from bench import RESULTS
from fastsal.study.attacks import BOX, EVERYWHERE
from fastsal.study.claims import CLAIMS, verdicts
from fastsal.study.data import Data, Split, load
from fastsal.study.measure import accuracy, mean_image, measure
from fastsal.study.models import factory
from fastsal.study.results import Columns, Result, Study, write_table
from fastsal.study.train import Recipe, single_thread, train

IMAGES = 200
CONTRASTS = (0.5, 0.75, 1.0)
ROBUSTIFIED = (Recipe(), Recipe(penalty=0.03), Recipe(penalty=0.2), Recipe(penalty=1.5))
RADII = {"digits": (0.25, 0.5, 1.0), "mnist5k": (0.5, 1.0, 2.0)}
MEDIANS = {
    "rho": "rho",
    "linearized robustness": "linearized_robustness",
    "alignment": "alignment",
    "cosine": "cosine",
    "homogeneity": "homogeneity",
    "degree": "degree",
    **{f"cosine at {t} x": f"cosine at {t} x" for t in CONTRASTS},
}


class Centred(nn.Module):
    """A network of images from which the mean image is subtracted."""

    mean: Tensor

    def __init__(self, network: nn.Module, mean: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", mean, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, n]."""
        logits: Tensor = self.network(x - self.mean)
        return logits


def _cnn(data: Data[Split]) -> nn.Module:
    return factory("cnn", data)()


def _without_biases(data: Data[Split]) -> nn.Module:
    network = _cnn(data)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bias = None
    return network


def _smooth(data: Data[Split]) -> nn.Module:
    others = {nn.ReLU: nn.Softplus(beta=10), nn.MaxPool2d: nn.AvgPool2d(2)}
    return nn.Sequential(*(others.get(type(module), module) for module in _cnn(data).children()))


def _centred(data: Data[Split]) -> nn.Module:
    return Centred(_cnn(data), mean_image(data.train))


@dataclass(frozen=True)
class Change:
    """What is done in another way than in the study, for which networks; `own`: they are trained for it, not the study's."""

    text: str
    make: Callable[[Data[Split]], nn.Module] = _cnn
    own: bool = True
    bounds: tuple[float, float] = BOX
    adversarial: bool = False  # whether that is the way of training
    centred: bool = False  # whether it is judged with the mean image at 0


CHANGES = {
    "study": Change("as in the study", own=False),
    "box": Change("pixels may leave [0, 1]", own=False, bounds=EVERYWHERE),
    "origin": Change("mean image at 0", own=False, centred=True),
    "centred": Change("mean image subtracted in training too", _centred, centred=True),
    "adversarial": Change("adversarial training", adversarial=True),
    "biases": Change("no biases", _without_biases),
    "smooth": Change("softplus (β = 10), average pooling", _smooth),
}


def measured(model: nn.Module, x: Tensor, y: Tensor, centre: Tensor, bounds: tuple[float, float]) -> Columns:
    """What the study measures, and the cosine of image and saliency map at other contrasts, for every image."""
    columns, _ = measure(model, x, y, torch.arange(1), centre, bounds=bounds, few=0)
    for t in CONTRASTS:
        columns[f"cosine at {t} x"] = fastsal.analyze(model, t * x).cosine.numpy()
    return columns


def experiment(name: str, change: Change, data: Data[Split], images: int, epochs: int, models: Path) -> Study:
    """The networks of one change, trained and measured."""
    x, y = data.test.batch(torch.arange(images))
    recipes = (Recipe(), *(Recipe(radius=radius) for radius in RADII[data.name])) if change.adversarial else ROBUSTIFIED
    results = []
    for recipe in recipes:
        model = train(
            lambda: change.make(data),
            data,
            recipe,
            seed=0,
            epochs=epochs,
            batch_size=100,
            checkpoint=models / f"{name}-{recipe.name}.pt" if change.own else models / f"{recipe.name}-seed-0.pt",
        )
        columns = measured(model, x, y, mean_image(data.train), change.bounds)
        results.append(Result(recipe, accuracy(model, data.test, "cpu"), columns, torch.empty(0)))
        print(change.text, row(results[-1]), flush=True)
    study = Study(data.name, len(data.train), len(data.test), x[:0], results)
    return study.centred() if change.centred else study


def row(result: Result) -> dict[str, Any]:
    """A network's, of the table."""
    medians = {title: result.median(name) for title, name in MEDIANS.items()}
    return {"network": result.recipe.label, "accuracy": result.accuracy, **medians}


def judged(study: Study) -> list[dict[str, Any]]:
    """A row for each claim."""
    return [
        {
            "claim": number,
            "text": verdict.claim.text,
            "confirmed": verdict.confirmed,
            "number": next(iter(verdict.found[0].numbers.values())),
            "found": verdict.evidence,
        }
        for number, verdict in enumerate(verdicts([study]), 1)
    ]


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a table; none where there is no file."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(path: Path, data: str, change: str, rows: list[dict[str, Any]]) -> None:
    """Writes rows into a table, in place of those of the same change and of other data that it holds."""
    table = [one for one in read(path) if one["data"] == data and one["change"] != change]
    table += [{"data": data, "change": change, **one} for one in rows]
    order = [one.text for one in CHANGES.values()]
    write_table(path, sorted(table, key=lambda one: order.index(one["change"])))


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Changes against claims: blue where a claim is confirmed, with the number that decides."""
    from matplotlib.figure import Figure

    changes = list(dict.fromkeys(one["change"] for one in rows))
    cells = {(one["change"], int(one["claim"])): one for one in rows}
    figure = Figure(figsize=(6.4, 1.7 + 0.42 * len(changes)), layout="constrained")
    ax = figure.subplots()
    yes = np.array([[cells[c, k]["confirmed"] == "yes" for k in range(1, 1 + len(CLAIMS))] for c in changes])
    ax.imshow(np.where(yes[..., None], (0.7, 0.85, 0.95), (0.97, 0.85, 0.78)), aspect="auto")
    for (change, number), one in cells.items():
        text = f"{one['confirmed']}, {float(one['number'] or 'nan'):.2f}"
        ax.text(number - 1, changes.index(change), text, ha="center", va="center", fontsize=8)
    names = [textwrap.fill(f"{k}. {claim.text}", 14) for k, claim in enumerate(CLAIMS, 1)]
    ax.set_xticks(range(len(CLAIMS)), names, fontsize=6.5)
    ax.set_yticks(range(len(changes)), [textwrap.fill(change, 24) for change in changes], fontsize=8)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    figure.savefig(path, dpi=200)


def main() -> int:
    """The command line of `python -m bench study_experiments`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="CHANGE", help=f"of {', '.join(CHANGES)}; default: all")
    parser.add_argument("--study", type=Path, default=Path("mnist-study"), help="folder; default: %(default)s")
    arguments = parser.parse_args()
    unknown = set(arguments.changes) - set(CHANGES)
    if unknown:
        parser.error(f"CHANGE: got {', '.join(sorted(unknown))}, wants of {', '.join(CHANGES)}")
    models, out = arguments.study / "models", RESULTS / "study"
    options = json.loads((arguments.study / "options.json").read_text(encoding="utf-8"))
    data = load(options["data"], 0)
    with single_thread():
        for name in arguments.changes or CHANGES:
            change = CHANGES[name]
            study = experiment(name, change, data, IMAGES, options["epochs"], models)
            write_rows(out / "experiments.csv", data.name, change.text, [row(result) for result in study.results])
            write_rows(out / "experiments_claims.csv", data.name, change.text, judged(study))
            draw(read(out / "experiments_claims.csv"), out / "changes.png")
    return 0
