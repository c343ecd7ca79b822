"""The figures of a report: how quantities are distributed, by class too, accuracy against ρ̃, and passes."""

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastsal import plot
from fastsal.evaluation.summary import Summary
from fastsal.evaluation.tables import NO_CLASS, Columns
from fastsal.pages import drawing
from fastsal.pages.page import Drawn

QUANTITIES = {
    "linearized_robustness": "ρ̃",
    "alignment": "α",
    "bound": "bound",
    "homogeneity": "homogeneity",
}
BINS = 60  # at most, and fewer of few examples
CLASSES = 12  # that are drawn, where there are more
SHARES = 10  # equal parts of the examples in which accuracy is counted, or fewer of at least
LEAST = 20  # examples each
Z = 1.96  # standard deviations of a 95 % confidence interval

Values = np.ndarray[Any, Any]
Names = Callable[[int], str]


def histograms(columns: Columns) -> tuple[Any, str]:
    """Every quantity on a panel."""
    figure, axes = drawing.new(0.3 + 1.7 * len(QUANTITIES), len(QUANTITIES))
    for ax, name in zip(axes, QUANTITIES, strict=True):
        values = columns[name][np.isfinite(columns[name])]
        _histogram(ax, values, name != "homogeneity")
        ax.set(xlabel=plot.LABELS[name], ylabel="examples")
        if len(values):
            ax.axvline(np.median(values), color=plot.COLORS[2], linewidth=1.5, linestyle="--")
    return figure, (
        f"How {len(columns['index'])} examples are distributed; the dashed line is the median. Values that are not finite "
        "are left out. The axes of lengths are logarithmic where all are positive and far apart."
    )


def _histogram(ax: Any, values: Values, log: bool) -> None:
    """Equal bins, of logarithms if they are wanted and all values are positive and spread over more than a factor of ten."""
    if not len(values):
        return
    bins = min(BINS, round(8 + 1.7 * math.sqrt(len(values))))
    low, high = float(values.min()), float(values.max())
    if log and low > 0 and high > 10 * low:
        ax.set_xscale("log")
        edges = np.geomspace(low, high, bins + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    ax.stairs(*np.histogram(values, edges), fill=True, color=plot.COLORS[1])


def by_class(summary: Summary, called: Names) -> tuple[Any, str]:
    """Quartiles of every quantity, class by class, the least robust on top."""
    groups = sorted(
        summary.by_class.items(), key=lambda item: item[1].quantities["linearized_robustness"].median, reverse=True
    )[-CLASSES:]
    figure, axes = drawing.new(0.3 + len(QUANTITIES) * (0.7 + 0.18 * len(groups)), len(QUANTITIES))
    rows = np.arange(len(groups))
    for ax, name in zip(axes, QUANTITIES, strict=True):
        spreads = [group.quantities[name] for _, group in groups]
        ax.hlines(
            rows, [one.lower for one in spreads], [one.upper for one in spreads], color=plot.COLORS[1], linewidth=5
        )
        ax.plot([one.median for one in spreads], rows, "|", color="black", markersize=9, markeredgewidth=2)
        ax.set_yticks(rows, [_short(called(y)) for y, _ in groups])
        ax.set(xlabel=plot.LABELS[name], ylim=(-0.7, len(groups) - 0.3))
    which = (
        f"the {CLASSES} least robust of {len(summary.by_class)} classes"
        if len(summary.by_class) > CLASSES
        else "by class"
    )
    return figure, f"From the lower to the upper quartile, with the median, {which}; the least robust on top."


def _short(name: str) -> str:
    return name if len(name) <= 18 else f"{name[:17]}…"


def accuracy(columns: Columns) -> tuple[Any, str]:
    """The share of right predictions in equal parts of the examples, in order of ρ̃."""
    rho = columns["linearized_robustness"]
    rows = np.flatnonzero((columns["y"] != NO_CLASS) & np.isfinite(rho))
    parts = np.array_split(rows[np.argsort(rho[rows], kind="stable")], max(1, min(SHARES, len(rows) // LEAST)))
    middles, shares, ranges = [], [], []
    for part in parts:
        right = float((columns["prediction"][part] == columns["y"][part]).mean())
        low, high = _interval(right, len(part))
        middles.append(float(np.median(rho[part])))
        shares.append(right)
        ranges.append((max(0.0, right - low), max(0.0, high - right)))  # which rounding may leave below 0
    figure, (ax,) = drawing.new(2.8)
    ax.errorbar(middles, shares, yerr=np.array(ranges).T, marker="o", color=plot.COLORS[1], capsize=2.5, linewidth=1.2)
    ax.set(xlabel=plot.LABELS["linearized_robustness"], ylabel="accuracy", ylim=(-0.03, 1.03))
    return figure, (
        f"The share of right predictions among {len(parts)} equal parts of {len(rows)} examples in order of ρ̃, at the median "
        "ρ̃ of each, with 95 % confidence intervals (Wilson)."
    )


def _interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of n."""
    middle, half = share + Z * Z / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    return (middle - half) / (1 + Z * Z / n), (middle + half) / (1 + Z * Z / n)


def passes(columns: Columns, classes: int) -> tuple[Any, str]:
    """How many passes an example took."""
    taken = columns["vjps"] + columns["jvps"]
    figure, (ax,) = drawing.new(2.4)
    _histogram(ax, taken, False)
    ax.axvline(np.median(taken), color=plot.COLORS[2], linewidth=1.5, linestyle="--")
    ax.set(xlabel="passes an example, backward and forward-mode", ylabel="examples")
    return figure, f"The dashed line is the median. A backward pass for each class would be {classes}."


def draw(columns: Columns, summary: Summary, called: Names) -> Mapping[str, Drawn]:
    """Every figure that there is something for, by name; the columns are of the examples that were analysed."""
    figures: dict[str, tuple[str, Callable[[], tuple[Any, str]]]] = {
        "distributions": ("Distributions", lambda: histograms(columns)),
    }
    if len(summary.by_class) > 1:
        figures["classes"] = ("Quartiles by class", lambda: by_class(summary, called))
    if summary.all.accuracy is not None:
        figures["accuracy"] = ("Accuracy against ρ̃", lambda: accuracy(columns))
    if len(np.unique(columns["vjps"] + columns["jvps"])) > 1:
        figures["passes"] = ("Passes", lambda: passes(columns, summary.classes))
    drawn = {}
    with drawing.style():
        for name, (title, make) in figures.items():
            figure, caption = make()
            file = io.BytesIO()
            figure.savefig(file, format="svg", metadata={"Date": None})
            drawn[name] = Drawn(name, title, file.getvalue(), caption)
    return drawn
