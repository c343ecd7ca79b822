"""What the study found: figures, tables of numbers, and one page that holds them all."""

import base64
import csv
import html
import io
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsal import plot
from fastsal.files import extra, replacing
from fastsal.geometry import Geometry
from fastsal.study.attacks import ATTACKS
from fastsal.study.train import Recipe

WORKING = 0.9  # of the plain model's accuracy: what a model must keep to count in the claims
WIDTH = 4.2  # inches, of every figure: at the width of a phone its labels are as large as the text
CORRELATED = 0.5  # what a rank correlation must be, up or down, to speak for a claim
HOLLOW = f"hollow where the accuracy is below {WORKING:.0%} of the plain one's"
FAMILIES = ("double backpropagation", "adversarial")
COLORS = {"double backpropagation": plot.COLORS[1], "adversarial": plot.COLORS[2]}
MARKERS = {"double backpropagation": "o", "adversarial": "s"}
TABLE = {
    "rho": "ρ",
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
Columns = dict[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Result:
    """One trained model: its accuracy on the whole test split, a row an analysed image in every column, some saliency maps."""

    recipe: Recipe
    accuracy: float
    columns: Columns
    saliency: Tensor

    def median(self, name: str) -> float:
        return float(np.nanmedian(self.columns[name]))

    def geometry(self) -> Geometry:
        """The columns again as what fastsal.plot takes."""
        there = {f.name: torch.from_numpy(self.columns[f.name]) for f in fields(Geometry) if f.name in self.columns}
        missing = dict.fromkeys(f.name for f in fields(Geometry))
        return Geometry(**{**missing, **there, "saliency": self.saliency})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Study:
    """All results, plain first, and the images whose saliency maps are shown."""

    data: str
    training_images: int
    test_images: int
    shown: Tensor
    results: list[Result]

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
        return [r for r in self.results if r.accuracy >= WORKING * self.results[0].accuracy]


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
    row: dict[str, Any] = {
        "model": result.recipe.label,
        "training": result.recipe.training,
        "strength": result.recipe.strength,
        "accuracy": result.accuracy,
    }
    row |= {f"median {name}": result.median(name) for name in TABLE}
    row["rank correlation of linearized_robustness and rho"] = rank_correlation(
        columns["linearized_robustness"], columns["rho"]
    )
    row["rank correlation of alignment and rho"] = rank_correlation(columns["alignment"], columns["rho"])
    # Negative where the bound holds, as it must up to rounding.
    excess = (columns["linearized_robustness"] - columns["bound"]) / columns["bound"]
    row["largest relative excess over the bound"] = float(np.nanmax(excess))
    for name in ("bias_sum_error", "binarized_bias_sum_error"):
        if name in columns:
            row[f"largest {name}"] = float(np.nanmax(columns[name]))
    row |= {f"smallest by {name}": int((columns["attack"] == name).sum()) for name in ATTACKS}
    return row


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        writer = csv.DictWriter(text, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        text.detach()


def _quantity(results: dict[str, Result], name: str) -> dict[str, Any]:
    return {label: result.columns[name] for label, result in results.items()}


def _geometries(results: dict[str, Result]) -> dict[str, Geometry]:
    return {label: result.geometry() for label, result in results.items()}


def _figure(height: float, rows: int = 1) -> tuple[Any, Any]:
    figure = extra("matplotlib.figure").Figure(figsize=(WIDTH, height), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.08)  # inches: a panel's title stands clear of the labels above it
    return figure, figure.subplots(rows, squeeze=False)[:, 0] if rows else None


def _median_lines(study: Study, ax: Any, quantity: str) -> None:
    for training, results in study.families().items():
        plot.medians(
            _geometries(results),
            _quantity(results, "rho"),
            quantity,
            label=training,
            color=COLORS[training],
            marker=MARKERS[training],
            ax=ax,
        )
        for result in results.values():
            if result not in study.working():
                style = {
                    "marker": MARKERS[training],
                    "markersize": 5,
                    "markerfacecolor": "white",
                    "color": COLORS[training],
                }
                ax.plot(result.median("rho"), result.median(quantity), zorder=4, **style)
    plain = study.results[0]
    ax.plot(plain.median("rho"), plain.median(quantity), "*", color="black", markersize=11, label="plain", zorder=5)
    ax.set_xlabel("median robustness ρ (units of x)")
    ax.locator_params(axis="x", nbins=6)


def _legend(figure: Any, ax: Any, columns: int) -> None:
    """Above the figure, where it covers nothing."""
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=columns, fontsize=8)


def saliency_maps(study: Study) -> tuple[Any, str]:
    figure, _ = _figure(1.1 + 0.47 * (1 + len(study.results)), 0)
    results = {result.recipe.label: result.geometry() for result in study.results}
    plot.saliency_grid(study.shown, results, columns=len(study.shown), figure=figure)
    return figure, (
        f"{len(study.shown)} test images (top row) and, below, the saliency maps of the predicted logit for each model: "
        "plain, then with growing λ of double backpropagation and ε of adversarial training. Each map is divided by its norm, "
        "and one signed colour scale serves all: red pixels raise the logit, blue ones lower it."
    )


def linearised_robustness(study: Study) -> tuple[Any, str]:
    families = study.families()
    figure, axes = _figure(4.4 + 4.6 * len(families), 1 + len(families))
    _median_lines(study, axes[0], "linearized_robustness")
    axes[0].set_ylabel("median ρ̃ (units of x)")
    axes[0].axline((0, 0), slope=1, color="0.4", linewidth=1, zorder=0)
    _legend(figure, axes[0], 3)
    colormap = extra("matplotlib").colormaps["viridis"]
    everything = {
        name: np.concatenate([r.columns[name] for r in study.results]) for name in ("rho", "linearized_robustness")
    }
    # Logarithmic axes would be given to the few images that lie almost on the boundary.
    left, bottom = (float(np.nanquantile(values, 0.01)) for values in everything.values())
    hidden = int(((everything["rho"] < left) | (everything["linearized_robustness"] < bottom)).sum())
    for ax, (training, results) in zip(axes[1:], families.items(), strict=True):
        colors = [colormap(slot) for slot in np.linspace(0, 0.92, len(results))]
        plot.scatter(
            _geometries(results),
            _quantity(results, "rho"),
            diagonal=True,
            y="linearized_robustness",
            colors=colors,
            ax=ax,
        )
        ax.set(xlabel="robustness ρ (units of x)", title=training)
        ax.set_xlim(left=0.9 * left)
        ax.set_ylim(bottom=0.9 * bottom)
        ax.legend(fontsize=8, markerscale=2, ncols=2, loc="lower right")
    return figure, (
        f"Linearised robustness ρ̃ against robustness ρ, the smallest perturbation that any attack found, of {study.images} "
        f"test images and {len(study.results)} models. Top: medians over the images, a point a model, joined in order of "
        f"strength, with bars from quartile to quartile, {HOLLOW}. Below: every image, but for the {hidden} (an image and a "
        "model) within the nearest hundredth of ρ or ρ̃. The grey line is ρ̃ = ρ."
    )


def alignment(study: Study) -> tuple[Any, str]:
    figure, axes = _figure(4)
    _median_lines(study, axes[0], "alignment")
    axes[0].set_ylabel("median alignment α (units of x)")
    _legend(figure, axes[0], 3)
    return figure, (
        f"Alignment α of image and saliency map against robustness ρ: medians over {study.images} test images, a point a "
        f"model, joined in order of strength, with bars from quartile to quartile, {HOLLOW}."
    )


def homogeneity(study: Study) -> tuple[Any, str]:
    families = study.families()
    figure, axes = _figure(0.5 + 4.2 * len(families), len(families))
    for ax, (training, results) in zip(axes, families.items(), strict=True):
        rho, geometries = _quantity(results, "rho"), _geometries(results)
        plot.homogeneity(geometries, rho, ax=ax)
        for name, label, color, marker in (
            ("degree", "signed, predicted logit", plot.COLORS[3], "^"),
            ("binarized_degree", "signed, binarised logit", plot.COLORS[4], "D"),
        ):
            plot.medians(
                geometries, rho, _quantity(results, name), label=label, color=color, marker=marker, x_bars=False, ax=ax
            )
        ax.autoscale(axis="y")
        ax.locator_params(axis="x", nbins=6)
        ax.axhline(1, color="0.4", linewidth=1, zorder=0)
        ax.set(xlabel="median robustness ρ (units of x)", ylabel="degree of homogeneity", title=training)
        ax.get_legend().remove()
    _legend(figure, axes[0], 2)
    return figure, (
        "Degree of homogeneity against robustness ρ, for the predicted logit Ψ and the binarised logit Ψ†, in both "
        "definitions: |⟨x,g⟩| / (|⟨x,g⟩| + |β|), and signed, ⟨x,g⟩ / Ψ. 1 (grey line) is a homogeneous, linear-like logit. "
        f"Medians over {study.images} test images with bars from quartile to quartile, a point a model."
    )


def bound(study: Study) -> tuple[Any, str]:
    figure, axes = _figure(1.8 + 0.38 * len(study.results))
    ax, rows = axes[0], np.arange(len(study.results))
    left = np.zeros(len(rows))
    terms = (
        ("alignment", "term α", "#B3CDE3"),
        ("gap_term", "term ‖x‖ · ‖ḡ†−ḡ‖", "#FDDBA3"),
        ("offset_term", "term |β†| / ‖g†‖", "#D9D9D9"),
    )
    for name, label, color in terms:
        widths = np.array([result.median(name) for result in study.results])
        ax.barh(rows, widths, left=left, color=color, edgecolor="white", label=label)
        left = left + widths
    for slot, (name, label) in enumerate(
        (("linearized_robustness", "ρ̃"), ("alignment", "α"), ("binarized_alignment", "α†"))
    ):
        medians = [result.median(name) for result in study.results]
        ax.plot(medians, rows, plot.MARKERS[slot], color=plot.COLORS[slot], markersize=5, label=label)
    ax.set_yticks(rows, [result.recipe.label for result in study.results])
    ax.invert_yaxis()
    ax.set_xlabel("median (units of x)")
    _legend(figure, ax, 3)
    return figure, (
        "The three terms that bound ρ̃, stacked, and beside them ρ̃, the alignment α and the binarised alignment α†: medians "
        f"over {study.images} test images, each quantity on its own."
    )


def accuracy(study: Study) -> tuple[Any, str]:
    families = study.families()
    figure, axes = _figure(3.3 * len(families), len(families))
    names = {"double backpropagation": "penalty λ", "adversarial": "radius ε (units of x)"}
    for ax, (training, results) in zip(axes, families.items(), strict=True):
        # One place a model, not to scale: neither crowded nor empty whatever the strengths.
        labels = ["plain", *(f"{result.recipe.strength:g}" for result in list(results.values())[1:])]
        ax.plot(labels, [r.accuracy for r in results.values()], marker=MARKERS[training], color=COLORS[training])
        ax.tick_params(axis="x", rotation=0 if len(labels) <= 8 else 90)
        ax.set(xlabel=names[training], ylabel="test accuracy", ylim=(0, 1.05), title=training)
    return figure, (
        f"Accuracy on the {study.test_images} test images against strength of training (evenly spaced, not to scale)."
    )


FIGURES = {
    "saliency": ("Saliency maps", saliency_maps),
    "robustness": ("Linearised robustness and robustness", linearised_robustness),
    "alignment": ("Alignment and robustness", alignment),
    "homogeneity": ("Homogeneity", homogeneity),
    "bound": ("The bound", bound),
    "accuracy": ("Accuracy", accuracy),
}

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fastsal study: {data}</title>
<style>
body {{ font: 1rem/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem; color: #111; background: #fff }}
h1 {{ font-size: 1.5rem; line-height: 1.2 }}
h2 {{ font-size: 1.2rem; margin-top: 2rem }}
figure {{ margin: 0 }}
figure img {{ display: block; width: 100%; max-width: 36rem; height: auto; margin: 0 auto }}
figcaption {{ color: #333; font-size: .95rem }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; font-size: .85rem }}
th, td {{ padding: .2rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: #fff }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


def _table(rows: list[dict[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def tables(study: Study) -> list[list[dict[str, str]]]:
    """The models, for reading: robustness and the bound, then homogeneity."""
    first, second = [], []
    for result in study.results:
        cells = {symbol: f"{result.median(name):.3f}" for name, symbol in TABLE.items()}
        correlation = summary(result)["rank correlation of linearized_robustness and rho"]
        head = {"model": result.recipe.label, "accuracy": f"{result.accuracy:.3f}"}
        lengths = {symbol: cells[symbol] for symbol in ("ρ", "ρ̃", "α", "α†", "bound", "gap term", "offset term")}
        first.append(head | lengths | {"corr(ρ̃, ρ)": f"{correlation:.2f}"})
        second.append(head | {symbol: cell for symbol, cell in cells.items() if symbol not in lengths})
    return [first, second]


def _over_models(study: Study, name: str) -> tuple[float, str]:
    """Rank correlation of a median with that of ρ over the models that work, and the same in words, with each family's own."""
    working = study.working()

    def correlation(results: list[Result]) -> float:
        return rank_correlation([r.median(name) for r in results], [r.median("rho") for r in results])

    families = study.families().items()
    own = [
        f"{correlation([r for r in family.values() if r in working]):.2f} ({training})" for training, family in families
    ]
    return correlation(working), f"{correlation(working):.2f}, within each way of training {' and '.join(own)}"


def claims(study: Study) -> list[tuple[str, bool, str]]:
    """What the paper says, whether it came out, and the numbers, over the models that keep their accuracy."""
    models = study.working()
    plain = study.results[0]
    ratios = np.concatenate([r.columns["linearized_robustness"] / r.columns["rho"] for r in models])
    low, middle, high = np.nanquantile(ratios, [0.25, 0.5, 0.75])
    within = [rank_correlation(r.columns["linearized_robustness"], r.columns["rho"]) for r in models]
    growth, growth_text = _over_models(study, "alignment")
    falling, falling_text = _over_models(study, "homogeneity")
    robustified = [r for r in models if r is not plain] or study.results[1:]
    most = max(robustified, key=lambda r: r.median("rho"))
    rises = [most.median(name) / plain.median(name) for name in ("alignment", "rho")]
    tight = rank_correlation(
        np.concatenate([r.columns["binarized_homogeneity"] for r in models]),
        np.concatenate([np.abs(np.log(r.columns["binarized_alignment"] / r.columns["rho"])) for r in models]),
    )
    return [
        (
            "ρ̃ approximates ρ",
            bool(np.median(within) >= 0.8 and 2 / 3 < middle < 1.5),
            f"ρ̃/ρ has median {middle:.2f} and quartiles {low:.2f} and {high:.2f}; their rank correlation over the images of a "
            f"model is from {min(within):.2f} to {max(within):.2f}",
        ),
        (
            "Robustified models are more robust, and their saliency maps align more",
            rises[0] > 1 and rises[1] > 1,
            f"from plain to {most.recipe.label}, the most robust, median ρ grows {rises[1]:.2f} times and median α "
            f"{rises[0]:.2f} times",
        ),
        (
            "Alignment grows with robustness",
            growth >= CORRELATED,
            f"the rank correlation of median α and median ρ over the models is {growth_text}",
        ),
        (
            "Homogeneity falls as robustness grows (on grey-level digits)",
            falling <= -CORRELATED,
            f"the rank correlation of median homogeneity and median ρ over the models is {falling_text}",
        ),
        (
            "Alignment grows more slowly than robustness (on grey-level digits)",
            1 < rises[0] < rises[1],
            f"{rises[0]:.2f} times beside {rises[1]:.2f} times, from plain to {most.recipe.label}",
        ),
        (
            "The more homogeneous the binarised logit, the nearer α† to ρ",
            tight <= -CORRELATED,
            f"the rank correlation of homogeneity† and |log(α†/ρ)| over all images is {tight:.2f}",
        ),
    ]


def checks(study: Study) -> list[str]:
    """What must hold, with the numbers that show whether it does."""
    rows = [summary(result) for result in study.results]
    excess = max(row["largest relative excess over the bound"] for row in rows)
    lines = [
        f"ρ̃ ≤ bound for all {study.images} images of all {len(rows)} models: largest (ρ̃ − bound)/bound {excess:.1e}"
        + ("" if excess <= 1e-6 else ", which is not rounding")
    ]
    names = ("largest bias_sum_error", "largest binarized_bias_sum_error")
    errors = [row[name] for row in rows for name in names if name in row]
    if errors:
        lines.append(
            "β and β† beside Σ⟨b, ∂Ψ/∂b⟩, summed over the biases in float64 by another road: largest deviation "
            f"{max(errors):.1e} of |Ψ| + Σ|xₖgₖ| (float32 rounds at 6e-8)"
        )
    return lines


def write(study: Study, out: Path) -> Path:
    """Figures, tables and report.html into the folder `out`; returns the page."""
    models = [summary(result) for result in study.results]
    _write_csv(out / "models.csv", models)
    rows = []
    for result in study.results:
        names = ("model", "training", "strength")
        same = dict(zip(names, (result.recipe.label, result.recipe.training, result.recipe.strength), strict=True))
        columns = {name: column.tolist() for name, column in result.columns.items()}
        rows += [same | dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    _write_csv(out / "images.csv", rows)

    verdicts = "".join(
        f"<li><b>{html.escape(claim)}: {'yes' if held else 'no'}</b>; {html.escape(evidence)}.</li>"
        for claim, held, evidence in claims(study)
    )
    count = len(study.working())
    parts = [
        "<h1>Adversarial robustness and saliency maps</h1>",
        f"<p>The study of Etmann, Lunz, Maass and Schönlieb (ICML 2019), reproduced by fastsal on {html.escape(study.data)}: "
        f"{len(study.results)} models trained on {study.training_images} images, and {study.images} of {study.test_images} "
        "test images analysed and attacked. Distances are Euclidean, in units of x: pixels from 0 to 1. ρ is the "
        f"smallest perturbation of {len(ATTACKS)} attacks ({', '.join(ATTACKS)}) that changes the prediction, an upper "
        "bound of the true robustness; pixels may leave [0, 1], as in its definition. α, β and homogeneity are for x with "
        "black at 0, not mean-centred.</p>",
        "<h2>What came out</h2>",
        f"<p>Over the {count} of {len(study.results)} models that keep {WORKING:.0%} of the plain one's accuracy; a rank "
        f"correlation counts from {CORRELATED} on, and ρ̃ approximates ρ where theirs is 0.8 or more and the median of ρ̃/ρ "
        "between 2/3 and 3/2:</p>",
        f"<ul>{verdicts}</ul>",
        "<h2>The models</h2>",
        f"<p>Medians over {study.images} test images; λ: double backpropagation, ε: adversarial training.</p>",
        *map(_table, tables(study)),
        "<p>corr: rank correlation over the images. Bound: α + gap term ‖x‖·‖ḡ†−ḡ‖ + offset term |β†|/‖g†‖. Homogeneity: "
        "|⟨x,g⟩| / (|⟨x,g⟩| + |β|); degree: ⟨x,g⟩ / Ψ; † of the binarised logit.</p>",
    ]
    rc = {
        "svg.hashsalt": "fastsal",
        "font.size": 9,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with extra("matplotlib").rc_context(rc):
        for name, (title, draw) in FIGURES.items():
            figure, caption = draw(study)
            svg = io.BytesIO()
            figure.savefig(svg, format="svg", dpi=200, metadata={"Date": None})
            for ending in ("svg", "png"):
                with replacing(out / f"{name}.{ending}") as file:
                    if ending == "svg":
                        file.write(svg.getvalue())
                    else:
                        figure.savefig(file, format="png", dpi=200)
            source = base64.b64encode(svg.getvalue()).decode()
            parts.append(
                f"<h2>{html.escape(title)}</h2><figure>"
                f'<img src="data:image/svg+xml;base64,{source}" alt="{html.escape(title)}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
    parts.append("<h2>Checks</h2><ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in checks(study)) + "</ul>")
    parts.append("<p>The numbers: models.csv has a row a model, images.csv a row a model and image.</p>")
    page = out / "report.html"
    with replacing(page) as file:
        file.write(PAGE.format(data=html.escape(study.data), body="\n".join(parts)).encode())
    return page
