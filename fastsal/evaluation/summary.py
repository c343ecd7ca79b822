"""What a table of results says as a whole: quartiles, for all and by class, accuracy, passes, the least robust examples."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastsal.evaluation.tables import NO_CLASS, Columns
from fastsal.methods import FEW
from fastsal.tensor.reference import SCALARS

PRINTED = (
    "linearized_robustness",
    "alignment",
    "cosine",
    "binarized_alignment",
    "bound",
    "homogeneity",
    "binarized_homogeneity",
)
LISTED = 10  # least robust examples, failures, and classes where there are many


@dataclass(frozen=True)
class Spread:
    """Lower quartile, median and upper quartile of the values that are not NaN, and how many are: always values themselves."""

    lower: float
    median: float
    upper: float
    nan: int


@dataclass(frozen=True)
class Group:
    """Examples that were analysed: how many, the share predicted right (None where no class is given), every quantity."""

    examples: int
    accuracy: float | None
    quantities: dict[str, Spread]


@dataclass(frozen=True)
class Example:
    """An example of a table: its index, its name (or "") and its ρ̃."""

    index: int
    name: str
    linearized_robustness: float


@dataclass(frozen=True)
class Failure:
    """An example that was not analysed: its index, its name (or ""), and what went wrong."""

    index: int
    name: str
    error: str


@dataclass(frozen=True)
class Summary:
    """A table of results as a whole.

    examples: of the data; failed: how many of them could not be read or analysed, the first ten of which are `failures`.
    shape, classes, norm, method: of an example, the number n of logits, p, and how ρ̃ was found.
    certified: the share, of the examples analysed, whose `linearized_robustness` is ρ̃ itself; failure_probability: of each.
    vjps, jvps: passes for an example, on average, backward and forward-mode.
    all, by_class: quartiles of every quantity and the accuracy, for all examples and for each true class that occurs.
    least_robust: the ten examples of smallest ρ̃, the lowest index first among equals.
    """

    examples: int
    failed: int
    shape: tuple[int, ...]
    classes: int
    norm: str
    method: str
    certified: float
    failure_probability: float
    vjps: float
    jvps: float
    all: Group
    by_class: dict[int, Group]
    least_robust: tuple[Example, ...]
    failures: tuple[Failure, ...]

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _spread(values: np.ndarray[Any, Any]) -> Spread:
    known = values[~np.isnan(values)]
    low, middle, high = (
        np.quantile(known, [0.25, 0.5, 0.75], method="inverted_cdf").tolist() if known.size else [float("nan")] * 3
    )
    return Spread(low, middle, high, len(values) - len(known))


def _group(columns: Columns, rows: np.ndarray[Any, Any]) -> Group:
    accuracy = None
    if "y" in columns:
        labelled = rows[columns["y"][rows] != NO_CLASS]
        right = columns["prediction"][labelled] == columns["y"][labelled]
        accuracy = float(right.mean()) if len(labelled) else None
    return Group(len(rows), accuracy, {name: _spread(columns[name][rows]) for name in (*SCALARS, "lower_bound")})


def _by_class(columns: Columns, rows: np.ndarray[Any, Any]) -> dict[int, Group]:
    if "y" not in columns:
        return {}
    ordered = rows[np.argsort(columns["y"][rows], kind="stable")]
    found, starts = np.unique(columns["y"][ordered], return_index=True)
    parts = np.split(ordered, starts[1:])
    return {int(y): _group(columns, part) for y, part in zip(found, parts, strict=True) if y != NO_CLASS}


def summarize(columns: Columns, shape: tuple[int, ...], classes: int, norm: str) -> Summary:
    """The summary of a table whose rows are in the order of their index."""
    index = columns["index"].tolist()
    N = len(index)
    failed = columns["error"] != ""
    rows = np.flatnonzero(~failed)
    rho = columns["linearized_robustness"]
    nearest = rows[np.argsort(rho[rows], kind="stable")]  # NaN comes last
    names = columns.get("name", np.full(N, "", dtype=object))

    def mean(name: str) -> float:
        return float(columns[name][rows].mean()) if len(rows) else float("nan")

    return Summary(
        examples=N,
        failed=int(failed.sum()),
        shape=shape,
        classes=classes,
        norm=norm,
        method=str(columns["method"][rows[0]]) if len(rows) else "",
        certified=mean("certified"),
        failure_probability=mean("failure_probability"),
        vjps=mean("vjps"),
        jvps=mean("jvps"),
        all=_group(columns, rows),
        by_class=_by_class(columns, rows),
        least_robust=tuple(Example(index[i], names[i], float(rho[i])) for i in nearest[:LISTED]),
        failures=tuple(Failure(index[i], names[i], columns["error"][i]) for i in np.flatnonzero(failed)[:LISTED]),
    )


def _called(example: Example | Failure) -> str:
    return f"{example.index} ({example.name})" if example.name else str(example.index)


def _lines(summary: Summary) -> Iterator[str]:
    analysed = summary.all.examples
    yield (
        f"{summary.examples} examples of shape {summary.shape}, {summary.classes} classes, norm {summary.norm}, "
        f"method {summary.method}"
    )
    yield f"{'':24}{'quartile':>14}{'median':>14}{'quartile':>14}"
    for name in PRINTED:
        spread = summary.all.quantities[name]
        numbers = "".join(f"{value:14.6g}" for value in (spread.lower, spread.median, spread.upper))
        yield f"{name:24}{numbers}" + (f"   ({spread.nan} NaN left out)" if spread.nan else "")
    if summary.all.accuracy is not None:
        yield f"accuracy {summary.all.accuracy:.4f}"
    yield (
        f"passes per example: {summary.vjps:.4g} backward and {summary.jvps:.4g} forward-mode, "
        f"for n = {summary.classes} classes"
    )
    if summary.method == "candidates":
        yield "candidates: linearized_robustness is an upper bound, from the highest logits only"
    if summary.method == "certified":
        yield f"certified: {round(summary.certified * analysed)} of {analysed} examples"
    if summary.method == "exact" and summary.norm != "1" and summary.vjps > FEW:
        yield (
            "hint: --method certified finds the same minimum, except with a probability of 1e-6 an example, in fewer passes "
            "where classes are many (docs/benchmarks.md has figures)"
        )
    yield from _class_lines(summary)
    if summary.least_robust:
        yield "least robust: " + ", ".join(
            f"{_called(one)} at {one.linearized_robustness:.4g}" for one in summary.least_robust
        )
    if summary.failed:
        more = f" and {summary.failed - LISTED} more" if summary.failed > LISTED else ""
        yield (
            f"not analysed, their rows are null: {summary.failed} of {summary.examples} examples, "
            f"{', '.join(map(_called, summary.failures))}{more}; the column error says why"
        )


def _class_lines(summary: Summary) -> Iterator[str]:
    """A line for each true class, or for the ten whose median ρ̃ is smallest where there are many."""
    groups = sorted(summary.by_class.items())
    if len(groups) < 2:
        return
    note = ""
    if len(groups) > 2 * LISTED:
        note = f", the {LISTED} least robust of {len(groups)} (--json has all)"
        groups = sorted(groups, key=lambda item: item[1].quantities["linearized_robustness"].median)[:LISTED]
    yield f"by true class{note}:"
    yield f"{'class':>8}{'examples':>10}{'accuracy':>10}{'median ρ̃':>15}{'median α':>14}"
    for y, group in groups:
        rho, alpha = (group.quantities[name].median for name in ("linearized_robustness", "alignment"))
        accuracy = f"{group.accuracy:.4f}" if group.accuracy is not None else ""
        yield f"{y:8}{group.examples:10}{accuracy:>10}{rho:14.6g}{alpha:14.6g}"
