"""The figures of a study: each is a function from the results to a matplotlib figure and its caption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastsal import plot
from fastsal.files import extra, save_figure
from fastsal.pages import drawing
from fastsal.pages.page import Drawn
from fastsal.study.results import TABLE, WORKING, Result, Study
from fastsal.tensor.geometry import Geometry

HOLLOW = f"hollow where the accuracy is below {WORKING:.0%} of the plain one's"
GLANCE = 5  # images in the first figure, so that each is as large there as on a screen
SHORT = {"double backpropagation": "double\nbackprop.", "adversarial": "adversarial"}
STYLES: dict[str, dict[str, Any]] = {
    "double backpropagation": {"color": plot.COLORS[1], "marker": "o"},
    "adversarial": {"color": plot.COLORS[2], "marker": "s"},
}


def _quantity(results: dict[str, Result], name: str) -> dict[str, Any]:
    return {label: result.columns[name] for label, result in results.items()}


def _geometries(results: dict[str, Result]) -> dict[str, Geometry]:
    return {label: result.geometry() for label, result in results.items()}


def _median_lines(study: Study, ax: Any, quantity: str) -> None:
    """Both ways of training; bars along ρ would lie on one another, and are in the table of models."""
    for training, results in study.families().items():
        style, rho = STYLES[training], _quantity(results, "rho")
        values = _quantity(results, quantity)
        plot.medians(_geometries(results), rho, values, label=training, x_bars=False, ax=ax, **style)
        for result in results.values():
            if result not in study.working():
                hollow = {"markersize": 5, "markerfacecolor": "white", "zorder": 4}
                ax.plot(result.median("rho"), result.median(quantity), **style, **hollow)
    plain = study.results[0]
    ax.plot(plain.median("rho"), plain.median(quantity), "*", color="black", markersize=11, label="plain", zorder=5)
    ax.set_xlabel("median robustness ρ (units of x)")
    ax.locator_params(axis="x", nbins=6)


def _grid_figure(height: float) -> Any:
    """For saliency maps, which need no space between them."""
    figure, _ = drawing.new(height, 0)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    return figure


MAPS = "Each map is divided by its norm; one signed colour scale serves all: red pixels raise the logit, blue ones lower it."


def saliency(study: Study) -> tuple[Any, str]:
    """Plain and the strongest of each way of training that works: what the study is about, at a glance."""
    working = study.working()
    strongest = {
        training: [r for r in family.values() if r in working and r.recipe.strength][-1:]
        for training, family in study.families().items()
    }
    results = {"plain": study.results[0]}
    results |= {f"{SHORT[kind]}\n{r.recipe.label}": r for kind, found in strongest.items() for r in found}
    columns = min(GLANCE, len(study.shown))
    figure = _grid_figure(0.6 + 0.68 * (1 + len(results)))
    named = {f"{name}\nρ {result.median('rho in the box'):.1f}": result.geometry() for name, result in results.items()}
    plot.saliency_grid(study.shown, named, columns=columns, figure=figure)
    return figure, (
        f"{columns} test images (top row) and, below, the saliency maps of the predicted logit, for the plain model and for "
        f"the strongest of each way of training that keeps {WORKING:.0%} of its accuracy. ρ is the median robustness of "
        f"{study.images} test images against perturbations that keep pixels in [0, 1]. {MAPS}"
    )


def saliency_all(study: Study) -> tuple[Any, str]:
    figure = _grid_figure(0.6 + 0.47 * (1 + len(study.results)))
    results = {result.recipe.label: result.geometry() for result in study.results}
    plot.saliency_grid(study.shown, results, columns=len(study.shown), figure=figure)
    return figure, (
        f"{len(study.shown)} test images (top row) and, below, the saliency maps of the predicted logit for each model: "
        f"plain, then with growing λ of double backpropagation and ε of adversarial training. {MAPS}"
    )


def linearised_robustness(study: Study) -> tuple[Any, str]:
    families = study.families()
    figure, axes = drawing.new(4.4 + 4.6 * len(families), 1 + len(families))
    _median_lines(study, axes[0], "linearized_robustness")
    axes[0].set_ylabel("median ρ̃ (units of x)")
    axes[0].axline((0, 0), slope=1, color="0.4", linewidth=1, zorder=0)
    drawing.legend(figure, axes[0], 3)
    colormap = extra("matplotlib").colormaps["viridis"]
    everything = {
        name: np.concatenate([r.columns[name] for r in study.results]) for name in ("rho", "linearized_robustness")
    }
    # Logarithmic axes would give most of the figure to the few images that lie almost on the decision boundary.
    left, bottom = (float(np.nanquantile(values, 0.01)) for values in everything.values())
    hidden = int(((everything["rho"] < left) | (everything["linearized_robustness"] < bottom)).sum())
    for ax, (training, results) in zip(axes[1:], families.items(), strict=True):
        colors = [colormap(slot) for slot in np.linspace(0, 0.92, len(results))]
        rho, y = _quantity(results, "rho"), "linearized_robustness"
        plot.scatter(_geometries(results), rho, y, diagonal=True, colors=colors, ax=ax)
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
    panels = {
        "any perturbation; black at 0": study,
        "pixels kept in [0, 1]; black at 0": study.in_box(),
        "pixels kept in [0, 1]; mean image at 0": study.in_box().centred(),
    }
    figure, axes = drawing.new(0.4 + 3.2 * len(panels), len(panels))
    for ax, (title, one) in zip(axes, panels.items(), strict=True):
        _median_lines(one, ax, "alignment")
        ax.set(ylabel="median α (units of x)", title=title)
    drawing.legend(figure, axes[0], 3)
    return figure, (
        f"Alignment α of image and saliency map against robustness ρ: medians over {study.images} test images, a point a "
        f"model, joined in order of strength, with bars from quartile to quartile of α, {HOLLOW}. Top: ρ as defined, where a "
        "perturbation may leave [0, 1]. Middle: ρ of perturbations that stay there. Bottom: also with the mean of the training "
        "images subtracted from x, which changes α but not ρ."
    )


def homogeneity(study: Study) -> tuple[Any, str]:
    panels = {
        "homogeneity": "predicted logit: |⟨x,g⟩| / (|⟨x,g⟩| + |β|)",
        "binarized_homogeneity": "binarised logit: |⟨x,g†⟩| / (|⟨x,g†⟩| + |β†|)",
        "degree": "predicted logit, signed: ⟨x,g⟩ / Ψ",
        "binarized_degree": "binarised logit, signed: ⟨x,g†⟩ / Ψ†",
    }
    figure, axes = drawing.new(0.5 + 2.9 * len(panels), len(panels))
    for ax, (quantity, title) in zip(axes, panels.items(), strict=True):
        _median_lines(study, ax, quantity)
        ax.axhline(1, color="0.4", linewidth=1, zorder=0)
        ax.set(ylabel="homogeneity" if "homogeneity" in quantity else "degree", title=title)
    drawing.legend(figure, axes[0], 3)
    return figure, (
        "Degree of homogeneity against robustness ρ, for the predicted logit Ψ and the binarised logit Ψ†, in two "
        "definitions. 1 (grey line) is a homogeneous, linear-like logit. "
        f"Medians over {study.images} test images with bars from quartile to quartile, a point a model, joined in order of "
        f"strength, {HOLLOW}."
    )


def bound(study: Study) -> tuple[Any, str]:
    figure, axes = drawing.new(1.8 + 0.38 * len(study.results))
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
    for slot, name in enumerate(("linearized_robustness", "alignment", "binarized_alignment")):
        medians = [result.median(name) for result in study.results]
        ax.plot(medians, rows, plot.MARKERS[slot], color=plot.COLORS[slot], markersize=5, label=TABLE[name])
    ax.set_yticks(rows, [result.recipe.label for result in study.results])
    ax.invert_yaxis()
    ax.set_xlabel("median (units of x)")
    drawing.legend(figure, ax, 3)
    return figure, (
        "The three terms that bound ρ̃, stacked, and beside them ρ̃, the alignment α and the binarised alignment α†: medians "
        f"over {study.images} test images, each quantity on its own."
    )


def accuracy(study: Study) -> tuple[Any, str]:
    families = study.families()
    figure, axes = drawing.new(3.3 * len(families), len(families))
    names = {"double backpropagation": "penalty λ", "adversarial": "radius ε (units of x)"}
    for ax, (training, results) in zip(axes, families.items(), strict=True):
        # Every model has a place of its own, not to scale, so that no strengths are crowded and no space is empty.
        labels = ["plain", *(f"{result.recipe.strength:g}" for result in list(results.values())[1:])]
        ax.plot(labels, [r.accuracy for r in results.values()], **STYLES[training])
        ax.tick_params(axis="x", rotation=0 if len(labels) <= 8 else 90)
        ax.set(xlabel=names[training], ylabel="test accuracy", ylim=(0, 1.05), title=training)
    return figure, (
        f"Accuracy on the {study.test_images} test images against strength of training (evenly spaced, not to scale)."
    )


FIGURES: dict[str, tuple[str, Callable[[Study], tuple[Any, str]]]] = {
    "saliency": ("Saliency maps", saliency),
    "saliency_all": ("Saliency maps of all models", saliency_all),
    "robustness": ("Linearised robustness and robustness", linearised_robustness),
    "alignment": ("Alignment and robustness", alignment),
    "homogeneity": ("Homogeneity", homogeneity),
    "bound": ("The bound", bound),
    "accuracy": ("Accuracy", accuracy),
}


def write(study: Study, out: Path) -> dict[str, Drawn]:
    """Every figure as SVG and PNG into the folder `out`, and by its name what a page says of it."""
    written = {}
    with drawing.style():
        for name, (title, draw) in FIGURES.items():
            figure, caption = draw(study)
            for ending in ("svg", "png"):
                save_figure(figure, out / f"{name}.{ending}", dpi=200)
            written[name] = Drawn(name, title, (out / f"{name}.svg").read_bytes(), caption)
    return written
