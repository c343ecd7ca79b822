"""The figures of a study: each is a function from the studies of several seeds to a matplotlib figure and its caption."""

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
GLANCE = 5  # images above saliency maps, so that each is as large there as on a screen
STYLES: dict[str, dict[str, Any]] = {
    "double backpropagation": {"color": plot.COLORS[1], "marker": "o"},
    "adversarial": {"color": plot.COLORS[2], "marker": "s"},
}
MAPS = "Each map is divided by its norm; one signed colour scale serves all: red pixels raise the logit, blue ones lower it."


def _quantity(results: dict[str, Result], name: str) -> dict[str, Any]:
    return {label: result.columns[name] for label, result in results.items()}


def _geometries(results: dict[str, Result]) -> dict[str, Geometry]:
    return {label: result.geometry() for label, result in results.items()}


def _about(studies: list[Study]) -> str:
    """What every point of a figure of medians is."""
    lines = (
        f"a line for each of {len(studies)} seeds and way of training"
        if len(studies) > 1
        else "a line a way of training"
    )
    return (
        f"Medians over {studies[0].images} test images with bars from quartile to quartile, a point a network, {lines}, joined "
        f"in order of strength, {HOLLOW}."
    )


def _median_lines(studies: list[Study], ax: Any, quantity: str) -> None:
    """Every seed and way of training; bars along ρ would lie on one another, and are in models.csv."""
    for study in studies:
        first = study is studies[0]
        for training, results in study.families().items():
            style, rho = STYLES[training], _quantity(results, "rho")
            values, label = _quantity(results, quantity), training if first else ""
            plot.medians(_geometries(results), rho, values, label=label, x_bars=False, ax=ax, **style)
            for result in results.values():
                if result not in study.working():
                    hollow = {"markersize": 5, "markerfacecolor": "white", "zorder": 4}
                    ax.plot(result.median("rho"), result.median(quantity), **style, **hollow)
        plain, star = study.results[0], {"color": "black", "markersize": 11, "zorder": 5}
        ax.plot(plain.median("rho"), plain.median(quantity), "*", label="plain" if first else None, **star)
    ax.set_xlabel("median robustness ρ (units of x)")
    ax.locator_params(axis="x", nbins=6)


def saliency(studies: list[Study]) -> tuple[Any, str]:
    """What the study is about, at a glance."""
    study = studies[0]
    columns = min(GLANCE, len(study.shown))
    figure, _ = drawing.new(0.6 + 0.62 * (1 + len(study.results)), 0)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    named = {f"{r.recipe.label}\nρ {r.median('rho'):.2f}": r.geometry() for r in study.results}
    plot.saliency_grid(study.shown, named, columns=columns, figure=figure)
    return figure, (
        f"{columns} test images (top row) and, below, the saliency maps of the predicted logit for each network of seed "
        f"{study.seed}: plain, then with growing strength of training. ρ is the median robustness of {study.images} test "
        f"images. {MAPS}"
    )


def linearised_robustness(studies: list[Study]) -> tuple[Any, str]:
    study = studies[0]
    families = study.families()
    figure, axes = drawing.new(3.9 + 4.4 * len(families), 1 + len(families))
    _median_lines(studies, axes[0], "linearized_robustness")
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
        ax.set(xlabel="robustness ρ (units of x)", title=f"{training}, every image")
        ax.set_xlim(left=0.9 * left)
        ax.set_ylim(bottom=0.9 * bottom)
        ax.legend(fontsize=8, markerscale=2, ncols=2, loc="lower right")
    return figure, (
        f"Linearised robustness ρ̃ against robustness ρ, the smallest perturbation that an attack found. Top: {_about(studies)} "
        f"Below: every image of seed {study.seed}, but for the {hidden} (an image and a network) within the nearest hundredth "
        "of ρ or ρ̃. The grey line is ρ̃ = ρ."
    )


def alignment(studies: list[Study]) -> tuple[Any, str]:
    centred = [study.centred() for study in studies]
    panels = (
        ("alignment", studies, "median α (units of x)", "black at 0"),
        ("cosine", studies, "median cosine", "black at 0"),
        ("alignment", centred, "median α (units of x)", "mean image at 0"),
        ("cosine", centred, "median cosine", "mean image at 0"),
    )
    figure, axes = drawing.new(0.4 + 2.8 * len(panels), len(panels))
    for ax, (quantity, there, label, title) in zip(axes, panels, strict=True):
        _median_lines(there, ax, quantity)
        ax.set(ylabel=label, title=title)
    drawing.legend(figure, axes[0], 3)
    return figure, (
        "Alignment α of image and saliency map, and their cosine α/‖x‖, against robustness ρ; below with the mean of the "
        f"training images subtracted from x, which changes both but not ρ. {_about(studies)}"
    )


def homogeneity(studies: list[Study]) -> tuple[Any, str]:
    panels = {
        "homogeneity": "predicted logit: |⟨x,g⟩| / (|⟨x,g⟩| + |β|)",
        "binarized_homogeneity": "binarised logit: |⟨x,g†⟩| / (|⟨x,g†⟩| + |β†|)",
        "degree": "predicted logit, signed: ⟨x,g⟩ / Ψ",
    }
    figure, axes = drawing.new(0.5 + 2.8 * len(panels), len(panels))
    for ax, (quantity, title) in zip(axes, panels.items(), strict=True):
        _median_lines(studies, ax, quantity)
        ax.axhline(1, color="0.4", linewidth=1, zorder=0)
        ax.set(ylabel="homogeneity" if "homogeneity" in quantity else "degree", title=title)
    drawing.legend(figure, axes[0], 3)
    return figure, (
        "Homogeneity against robustness ρ, of the predicted logit Ψ and the binarised logit Ψ†, and the signed degree. 1 (grey "
        f"line) is a homogeneous, linear-like logit. {_about(studies)}"
    )


def bound(studies: list[Study]) -> tuple[Any, str]:
    study = studies[0]
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
    for slot, name in enumerate(("rho", "linearized_robustness", "binarized_alignment")):
        medians = [result.median(name) for result in study.results]
        ax.plot(medians, rows, plot.MARKERS[slot], color=plot.COLORS[slot], markersize=5, label=TABLE[name])
    ax.set_yticks(rows, [result.recipe.label for result in study.results])
    ax.invert_yaxis()
    ax.set_xlabel("median (units of x)")
    drawing.legend(figure, ax, 3)
    return figure, (
        "The three terms that bound ρ̃, stacked, and beside them ρ, ρ̃ and the binarised alignment α†: medians over "
        f"{study.images} test images, each quantity on its own, of the networks of seed {study.seed}."
    )


def accuracy(studies: list[Study]) -> tuple[Any, str]:
    families = studies[0].families()
    figure, axes = drawing.new(3.3 * len(families), len(families))
    names = {"double backpropagation": "penalty λ", "adversarial": "radius ε (units of x)"}
    for ax, training in zip(axes, families, strict=True):
        for study in studies:
            results = list(study.family(training).values())
            # Every network has a place of its own, not to scale, so that no strengths are crowded and no space is empty.
            labels = ["plain", *(f"{result.recipe.strength:g}" for result in results[1:])]
            ax.plot(labels, [r.accuracy for r in results], **STYLES[training])
        ax.tick_params(axis="x", rotation=0 if len(labels) <= 8 else 90)
        ax.set(xlabel=names[training], ylabel="test accuracy", ylim=(0, 1.05), title=training)
    return figure, (
        f"Accuracy on the {studies[0].test_images} test images against strength of training (evenly spaced, not to scale), a "
        "line a seed."
    )


FIGURES: dict[str, tuple[str, Callable[[list[Study]], tuple[Any, str]]]] = {
    "saliency": ("Saliency maps", saliency),
    "robustness": ("Linearised robustness and robustness", linearised_robustness),
    "alignment": ("Alignment and robustness", alignment),
    "homogeneity": ("Homogeneity", homogeneity),
    "bound": ("The bound", bound),
    "accuracy": ("Accuracy", accuracy),
}


def write(studies: list[Study], out: Path) -> dict[str, Drawn]:
    """Every figure as SVG and PNG into the folder `out`, and by its name what a page says of it."""
    written = {}
    with drawing.style():
        for name, (title, draw) in FIGURES.items():
            figure, caption = draw(studies)
            for ending in ("svg", "png"):
                save_figure(figure, out / f"{name}.{ending}", dpi=200)
            written[name] = Drawn(name, title, (out / f"{name}.svg").read_bytes(), caption)
    return written
