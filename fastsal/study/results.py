"""What a study found, in numbers: a row for every model and image, a row for every model, and the files that hold them."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastsal.evaluation.tables import Columns, as_geometry
from fastsal.files import Blame, check_own, extra, whole_file, write_csv
from fastsal.study.attacks import ATTACKS, CHEAP, DEAR
from fastsal.study.measure import ORIGIN
from fastsal.study.train import Recipe
from fastsal.tensor.geometry import Geometry

WORKING = 0.9
FAMILIES = ("double backpropagation", "adversarial")
TABLE = {
    "rho": "ρ",
    "linearized_robustness": "ρ̃",
    "alignment": "α",
    "binarized_alignment": "α†",
    "cosine": "cosine",
    "bound": "bound",
    "gap_term": "gap term",
    "offset_term": "offset term",
    "homogeneity": "homogeneity",
    "binarized_homogeneity": "homogeneity†",
    "degree": "degree",
    "binarized_degree": "degree†",
    "boundary cosine": "cosine of normals",
}
SPREAD = ("rho", "linearized_robustness", "alignment", "cosine", "homogeneity")
QUARTILES = (("lower", 0.25), ("upper", 0.75))
DIGITS = 6  # of a number in a file
ROUNDING = 1e-9  # by what share numbers in float64 that should be equal, or at most others, may be off
# Of an image, what images.csv, which is large, leaves to the medians and the largest values in models.csv.
LEFT_OUT = ("attack", "degree", "binarized_degree", "bias_error", "binarized_bias_error", "centred bound")


@dataclass(frozen=True)
class Result:
    """One trained network: accuracy on the whole test split, columns with a row for every analysed image, saliency maps."""

    recipe: Recipe
    accuracy: float
    columns: Columns
    saliency: Tensor
    seed: int = 0

    @property
    def name(self) -> dict[str, Any]:
        """Which model this is, for a row of a table."""
        recipe = self.recipe
        return {"seed": self.seed, "model": recipe.label, "training": recipe.training, "strength": recipe.strength}

    def median(self, name: str) -> float:
        return float(np.nanmedian(self.columns[name]))

    def geometry(self) -> Geometry:
        """The columns as a `Geometry`, which fastsal.plot takes."""
        return as_geometry(self.columns, saliency=self.saliency)


@dataclass(frozen=True)
class Study:
    """All results of one seed, plain first, and the images whose saliency maps are shown.

    floor: the share of the plain network's accuracy that a network must keep to count in the claims.
    """

    data: str
    training_images: int
    test_images: int
    shown: Tensor
    results: list[Result]
    seed: int = 0
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

    def centred(self) -> "Study":
        """The same with the mean image of the training split at 0, which moves α, β, homogeneity and the bound."""
        others = {name: f"centred {name}" for name in ORIGIN}
        results = [replace(r, columns=r.columns | {k: r.columns[v] for k, v in others.items()}) for r in self.results]
        return replace(self, results=results)

    def few(self) -> "Study":
        """The same of the images that the dear attacks were tried on too, with the smallest ρ of all attacks."""
        results = []
        for result in self.results:
            tried = ~np.isnan(result.columns[f"rho {DEAR[0]}"])
            columns = {name: column[tried] for name, column in result.columns.items()}
            columns["rho"] = np.min([columns[f"rho {name}"] for name in ATTACKS], 0)
            results.append(replace(result, columns=columns))
        return replace(self, results=results)


def rank_correlation(a: Any, b: Any) -> float:
    """Spearman's, over what is finite in both; NaN for fewer than three pairs, or what is constant but for rounding."""
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    kept = np.isfinite(a) & np.isfinite(b)
    if kept.sum() < 3 or any(np.ptp(v[kept]) <= ROUNDING * np.abs(v[kept]).max() for v in (a, b)):
        return math.nan
    return float(extra("scipy.stats").spearmanr(a[kept], b[kept]).statistic)


def summary(result: Result) -> dict[str, Any]:
    """One row of the table of models."""
    columns = result.columns
    row = result.name | {"accuracy": result.accuracy}
    row |= {f"median {name}": result.median(name) for name in TABLE}
    row |= {f"{q} quartile {name}": float(np.nanquantile(columns[name], at)) for name in SPREAD for q, at in QUARTILES}
    distance = np.abs(columns["binarized_alignment"] - columns["rho"])
    row["median distance of α† and ρ"] = float(np.nanmedian(distance))
    pairs = {"ρ̃ and ρ": (columns["linearized_robustness"], columns["rho"])}
    pairs["|α† − ρ| and offset term"] = (distance, columns["offset_term"])
    row |= {f"rank correlation of {name}": rank_correlation(*pair) for name, pair in pairs.items()}
    # Negative where the bound holds, as it must up to rounding.
    excess = (columns["linearized_robustness"] - columns["bound"]) / columns["bound"]
    row["largest relative excess over the bound"] = float(np.nanmax(excess))
    row |= {f"largest {name}": float(np.nanmax(columns[name])) for name in columns if name.endswith("bias_error")}
    row |= {f"smallest by {name}": int((columns["attack"] == name).sum()) for name in CHEAP}
    tried = ~np.isnan(columns[f"rho {DEAR[0]}"])
    smallest = np.min([columns[f"rho {name}"][tried] for name in ATTACKS], 0)
    row["ρ over the smallest of all attacks"] = float(np.median(columns["rho"][tried] / smallest))
    return row


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    """A CSV file with a line for each row, headed by the first row's keys, in the place of whatever stood there. NaN: empty."""

    def cell(value: Any) -> Any:
        if not isinstance(value, float):
            return value
        return "" if math.isnan(value) else format(value, f".{DIGITS}g")

    with Blame(f"--out {path}"), whole_file(path) as file:
        write_csv(file, rows[0], ([cell(row.get(name, "")) for name in rows[0]] for row in rows))


def write(studies: list[Study], out: Path) -> None:
    """models.csv, a row for every model, and images.csv, a row for every model and image, into the folder `out`."""
    models = [result for study in studies for result in study.results]
    rows: list[dict[str, Any]] = []
    for result in models:
        columns = {name: column.tolist() for name, column in result.columns.items() if name not in LEFT_OUT}
        name = {"seed": result.seed, "model": result.recipe.label}
        rows += [name | dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    for file, table in {"models.csv": [summary(result) for result in models], "images.csv": rows}.items():
        check_own(out / file, columns=tuple(table[0]))
        write_table(out / file, table)
