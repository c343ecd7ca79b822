"""Why alignment falls under strong adversarial training: networks of the study anew, with one thing changed at a time.

    python -m bench study_experiments [CHANGE ...]

Trains a plain network and some of each radius ε or strength λ, and measures them on the digits that `fastsal study --data
mnist5k` measures. Writes bench/results/study/experiments.csv, a row for each network, and experiments_claims.csv beside it: the
study's claims, judged by its criteria on the networks of each change. ρ is that of perturbations which keep pixels in [0, 1],
as DDN finds it. Networks that --models holds are not trained again, nor is the training of one that was stopped begun anew.
"""

import argparse
import csv
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastsal
from bench import RESULTS
from fastsal.study.attacks import robustness_in_box
from fastsal.study.claims import verdicts
from fastsal.study.data import Data, Split, load
from fastsal.study.measure import accuracy, centred_quantities, mean_image, quantities
from fastsal.study.models import cnn
from fastsal.study.results import Columns, Result, Study, write_table
from fastsal.study.train import Recipe, single_thread, train

CONTRASTS = (0.5, 0.75, 1.25)  # besides 1
ENDS = (Recipe(), Recipe(radius=2))
STRENGTHS = (Recipe(), *(Recipe(penalty=strength) for strength in (0.1, 1, 10, 30, 100)))
ADVERSARIAL = (Recipe(), Recipe(radius=1), Recipe(radius=2), Recipe(radius=3))
MEDIANS = {
    "rho in [0, 1]": "rho",
    "linearized robustness": "linearized_robustness",
    "alignment": "alignment",
    "alignment, mean image at 0": "centred alignment",
    "homogeneity": "homogeneity",
    "degree": "degree",
    **{name: name for t in CONTRASTS for name in (f"alignment at {t} x", f"degree at {t} x")},
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


def _cnn(data: Data[Split]) -> nn.Sequential:
    return cnn(data.shape, data.classes)


def _without_biases(data: Data[Split]) -> nn.Module:
    network = _cnn(data)
    for module in network:
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.bias = None
    return network


def _smooth(data: Data[Split]) -> nn.Module:
    others = {nn.ReLU: nn.Softplus(beta=10), nn.MaxPool2d: nn.AvgPool2d(2)}
    return nn.Sequential(*(others.get(type(module), module) for module in _cnn(data)))


def _centred(data: Data[Split]) -> nn.Module:
    return Centred(_cnn(data), mean_image(data.train))


@dataclass(frozen=True)
class Change:
    """What is done in another way than in the study, for which networks."""

    text: str
    make: Callable[[Data[Split]], nn.Module] = _cnn
    epochs: int = 6
    box: bool = False
    recipes: tuple[Recipe, ...] = ENDS


CHANGES = {
    "study": Change("as in the study", recipes=ADVERSARIAL),
    "epochs": Change("20 epochs instead of 6", epochs=20),
    "smooth": Change("softplus (β = 10) and average pooling", _smooth),
    "centred": Change("mean image subtracted in training", _centred),
    "box": Change("adversaries in training kept in [0, 1]", box=True),
    "biases": Change("no biases", _without_biases, recipes=ADVERSARIAL),
    "strengths": Change("as in the study, a wider range of λ", recipes=STRENGTHS),
}


def measured(model: nn.Module, x: Tensor, centre: Tensor) -> Columns:
    """What the claims need, and alignment and degree of homogeneity at other contrasts, for every image."""
    columns = quantities(model, x, fastsal.analyze(model, x, keep_saliency=True))
    columns |= centred_quantities(model, x, centre)
    columns["rho"] = robustness_in_box(model, x)
    for t in CONTRASTS:
        other = quantities(model, t * x, fastsal.analyze(model, t * x, keep_saliency=True))
        columns[f"alignment at {t} x"] = other["alignment"] / t  # ‖x‖ times the cosine of x and the gradient, as α is
        columns[f"degree at {t} x"] = other["degree"]
    return {name: column.detach().numpy() for name, column in columns.items()}


def experiment(name: str, change: Change, data: Data[Split], images: int, models: Path) -> Study:
    """The networks of one change, trained and measured."""
    x, _ = data.test.batch(torch.arange(images))
    results = []
    for recipe in change.recipes:
        model = train(
            lambda: change.make(data),
            data,
            replace(recipe, box=change.box),
            seed=0,
            epochs=change.epochs,
            batch_size=64,
            checkpoint=models / f"{name}-{recipe.name}.pt",
        )
        columns = measured(model, x, mean_image(data.train))
        results.append(Result(recipe, accuracy(model, data.test, "cpu"), columns, torch.empty(0)))
        print(change.text, row(results[-1]), flush=True)
    return Study(data.name, len(data.train), len(data.test), x[:0], results)


def row(result: Result) -> dict[str, Any]:
    """A network's, of the table."""
    medians = {title: round(result.median(name), 4) for title, name in MEDIANS.items()}
    return {"model": result.recipe.label, "accuracy": result.accuracy, **medians}


def judged(study: Study) -> list[dict[str, Any]]:
    """A row for each claim, with black and with the mean image at 0."""
    return [
        {"at 0": origin, "claim": claim.text, "confirmed": "yes" if found.confirmed else "no", "found": found.evidence}
        for origin, one in {"black": study, "mean image": study.centred()}.items()
        for claim, found in verdicts(one)
    ]


def write_rows(path: Path, change: str, rows: list[dict[str, Any]]) -> None:
    """Writes rows into a table, in place of those of the same change that it holds."""
    table = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            table = [one for one in csv.DictReader(file) if one["change"] != change]
    table += [{"change": change, **one} for one in rows]
    order = [one.text for one in CHANGES.values()]
    write_table(path, sorted(table, key=lambda one: order.index(one["change"])))


def main() -> int:
    """The command line of `python -m bench study_experiments`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="CHANGE", help=f"of {', '.join(CHANGES)}; default: all")
    parser.add_argument("--models", type=Path, default=Path("study-experiments"), help="folder; default: %(default)s")
    arguments = parser.parse_args()
    unknown = set(arguments.changes) - set(CHANGES)
    if unknown:
        parser.error(f"CHANGE: got {', '.join(sorted(unknown))}, wants of {', '.join(CHANGES)}")
    arguments.models.mkdir(parents=True, exist_ok=True)
    data = load("mnist5k", 0)
    with single_thread():
        for name in arguments.changes or CHANGES:
            change = CHANGES[name]
            study = experiment(name, change, data, 100, arguments.models)
            write_rows(RESULTS / "study" / "experiments.csv", change.text, [row(result) for result in study.results])
            write_rows(RESULTS / "study" / "experiments_claims.csv", change.text, judged(study))
    return 0
