"""What a study found, in numbers: a row for every model and image, a row for every model, and the files that hold them."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastsal.evaluation.tables import Columns, as_geometry
from fastsal.files import Blame, check_own, extra, whole_file, write_csv
from fastsal.study.attacks import ATTACKS
from fastsal.study.measure import ORIGIN
from fastsal.study.train import Recipe
from fastsal.tensor.geometry import Geometry

WORKING = 0.9
FAMILIES = ("double backpropagation", "adversarial")
TABLE = {
    "rho": "ρ",
    "rho in the box": "ρ in [0, 1]",
    "linearized_robustness": "ρ̃",
    "alignment": "α",
    "binarized_alignment": "α†",
    "homogeneity": "homogeneity",
    "binarized_homogeneity": "homogeneity†",
    "degree": "degree",
    "binarized_degree": "degree†",
    "bound": "bound",
    "gap_term": "gap term",
    "offset_term": "offset term",
}


@dataclass(frozen=True)
class Result:
    """One trained network: accuracy on the whole test split, columns with a row for every analysed image, saliency maps."""

    recipe: Recipe
    accuracy: float
    columns: Columns
    saliency: Tensor

    @property
    def name(self) -> dict[str, Any]:
        """Which model this is, for a row of a table."""
        return {"model": self.recipe.label, "training": self.recipe.training, "strength": self.recipe.strength}

    def median(self, name: str) -> float:
        return float(np.nanmedian(self.columns[name]))

    def geometry(self) -> Geometry:
        """The columns as a `Geometry`, which fastsal.plot takes."""
        return as_geometry(self.columns, saliency=self.saliency)


@dataclass(frozen=True)
class Study:
    """All results, plain first, and the images whose saliency maps are shown.

    floor: the share of the plain network's accuracy that a network must keep to count in the claims.
    """

    data: str
    training_images: int
    test_images: int
    shown: Tensor
    results: list[Result]
    floor: float = WORKING

    @property
    def images(self) -> int:
        """How many test images were analysed and attacked."""
        return len(self.results[0].columns["rho"])

    def family(self, training: str) -> dict[str, Result]:
        """The plain model and those of one way of training, in order of strength."""
        return {r.recipe.label: r for r in self.results if r.recipe.training in ("plain", training)}

    def families(self) -> dict[str, dict[str, Result]]:
        """Those ways of training of which there is a model."""
        return {name: family for name in FAMILIES if len(family := self.family(name)) > 1}

    def working(self) -> list[Result]:
        """The models that keep most of the plain one's accuracy."""
        return [r for r in self.results if r.accuracy >= self.floor * self.results[0].accuracy]

    def with_columns(self, others: dict[str, str]) -> "Study":
        """The same with other columns in the place of some."""
        results = [replace(r, columns=r.columns | {k: r.columns[v] for k, v in others.items()}) for r in self.results]
        return replace(self, results=results)

    def centred(self) -> "Study":
        """The same with the mean image of the training split at 0, which moves α, β, homogeneity and the bound."""
        return self.with_columns({name: f"centred {name}" for name in ORIGIN})

    def in_box(self) -> "Study":
        """The same with ρ of perturbations that keep every pixel in [0, 1]."""
        return self.with_columns({"rho": "rho in the box"})


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, over what is finite in both; NaN for fewer than three pairs or a constant."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    kept = np.isfinite(a) & np.isfinite(b)
    if kept.sum() < 3 or np.ptp(a[kept]) == 0 or np.ptp(b[kept]) == 0:
        return math.nan
    return float(extra("scipy.stats").spearmanr(a[kept], b[kept]).statistic)


def summary(result: Result) -> dict[str, Any]:
    """One row of the table of models."""
    columns = result.columns
    row = result.name | {"accuracy": result.accuracy}
    row |= {f"median {name}": result.median(name) for name in TABLE}
    for name in ("linearized_robustness", "alignment"):
        row[f"rank correlation of {name} and rho"] = rank_correlation(columns[name], columns["rho"])
    # Negative where the bound holds, as it must up to rounding.
    excess = (columns["linearized_robustness"] - columns["bound"]) / columns["bound"]
    row["largest relative excess over the bound"] = float(np.nanmax(excess))
    for name in columns:
        if name.endswith("bias_sum_error"):
            row[f"largest {name}"] = float(np.nanmax(columns[name]))
    row |= {f"smallest by {name}": int((columns["attack"] == name).sum()) for name in ATTACKS}
    return row


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file with a line for each row, headed by the first row's keys, in the place of whatever stood there."""
    with Blame(f"--out {path}"), whole_file(path) as file:
        write_csv(file, rows[0], ([row.get(name, "") for name in rows[0]] for row in rows))


def write(study: Study, out: Path) -> None:
    """models.csv, a row for every model, and images.csv, a row for every model and image, into the folder `out`."""
    rows: list[dict[str, Any]] = []
    for result in study.results:
        columns = [column.tolist() for column in result.columns.values()]
        rows += [result.name | dict(zip(result.columns, row, strict=True)) for row in zip(*columns, strict=True)]
    for name, table in {"models.csv": [summary(result) for result in study.results], "images.csv": rows}.items():
        check_own(out / name, columns=tuple(table[0]))
        write_table(out / name, table)
