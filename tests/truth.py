"""The truth that every backend is compared with: docs/design.md, "Quantities", in long double.

It is written from that section alone, one example and one class at a time, in numpy.longdouble: its exponents hold the square
of any float64, so that no scaling is needed, and its 64-bit mantissa leaves float64 results their 1e-13.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor

from fastsal.tensor import reference

DUAL = {2.0: 2.0, math.inf: 1.0, 1.0: math.inf}
LONG = np.longdouble
long_double = pytest.mark.skipif(np.finfo(LONG).nmant < 63, reason="no long double wider than float64 here")


class Truth(NamedTuple):
    """Values and their scales (docs/design.md, "Accuracy"), each a long double array [B] or [B, ...]."""

    values: dict[str, Any]
    scales: dict[str, Any]
    ratios: Any  # [B, n], rounded to float64


def to_long(tensor: Tensor) -> Any:
    return tensor.detach().cpu().double().numpy().astype(LONG)


def difference(a: Any, b: Any) -> Any:
    """a − b; infinite where float64 would be."""
    d = a - b
    return np.where(np.abs(d) > np.finfo(np.float64).max, np.copysign(LONG(np.inf), d), d)


def vector_norm(v: Any, q: float) -> Any:
    if q == 2:
        return np.sqrt(np.sum(v * v))
    return np.sum(np.abs(v)) if q == 1 else np.max(np.abs(v))


def ratio(margin: Any, distance: Any) -> Any:
    """The ordered rules of docs/design.md, "Edge cases"."""
    if np.isnan(margin) or np.isnan(distance):
        return np.nan
    if margin == 0:
        return 0.0
    if distance == 0:
        return np.copysign(np.inf, margin)
    if np.isinf(distance):
        return np.nan if np.isinf(margin) else 0.0
    return np.float64(margin / distance)


def nearest(ratios: list[Any], margins: list[Any], classes: list[int]) -> int:
    """The class of the smallest ratio: the first NaN, else the lowest index; all +inf: the smallest margin."""
    for value, j in zip(ratios, classes, strict=True):
        if np.isnan(value):
            return j
    keys = margins if all(value == np.inf for value in ratios) else ratios
    return classes[keys.index(min(keys))]


def _system(psi: Any, margin: Any, g: Any, g_dag: Any, x: Any, p: float) -> dict[str, tuple[Any, Any]]:
    """(value, scale) of every scalar that follows from two rows."""
    q = DUAL[p]
    norm_g, norm_dag, norm_x = vector_norm(g, q), vector_norm(g_dag, q), vector_norm(x, p)
    dot, dot_dag = np.sum(x * g), np.sum(x * g_dag)
    size, size_dag = np.sum(np.abs(x * g)), np.sum(np.abs(x * g_dag))
    beta, beta_dag = psi - dot, margin - dot_dag
    beta_scale, beta_dag_scale = np.abs(psi) + size, np.abs(margin) + size_dag
    alignment, alignment_scale = np.abs(dot) / norm_g, size / norm_g
    gap = vector_norm(g_dag / norm_dag - g / norm_g, q)
    return {
        "alignment": (alignment, alignment_scale),
        "cosine": (alignment / norm_x, alignment_scale / norm_x),
        "binarized_logit": (margin, np.abs(margin)),
        "binarized_alignment": (np.abs(dot_dag) / norm_dag, size_dag / norm_dag),
        "offset": (beta, beta_scale),
        "binarized_offset": (beta_dag, beta_dag_scale),
        "direction_gap": (gap, LONG(1)),
        "bound": (
            alignment + norm_x * gap + np.abs(beta_dag) / norm_dag,
            alignment_scale + norm_x + beta_dag_scale / norm_dag,
        ),
        "homogeneity": (np.abs(dot) / (np.abs(dot) + np.abs(beta)), beta_scale / (np.abs(dot) + np.abs(beta))),
        "binarized_homogeneity": (
            np.abs(dot_dag) / (np.abs(dot_dag) + np.abs(beta_dag)),
            beta_dag_scale / (np.abs(dot_dag) + np.abs(beta_dag)),
        ),
    }


def geometry_truth(
    logits: Tensor, jacobian: Tensor, x: Tensor, p: float, runner_up: Tensor | None = None, own: int | None = None
) -> Truth:
    """Everything in `Geometry` for logits [B, n], jacobian [B, n, D], x [B, D].

    `runner_up` overrides the selection, and `own` is a class that takes the place of the predicted one.
    """
    B, n = logits.shape
    names = (*reference.SCALARS, "prediction", "runner_up")
    values: dict[str, list[Any]] = {name: [] for name in names}
    scales: dict[str, list[Any]] = {name: [] for name in names}
    all_ratios = []
    with np.errstate(all="ignore"):
        for b in range(B):
            scores, rows, point = to_long(logits[b]), to_long(jacobian[b]), to_long(x[b])
            nans = np.flatnonzero(np.isnan(scores))
            prediction = int(nans[0]) if len(nans) else int(np.argmax(scores))
            prediction = prediction if own is None else own
            classes = [j for j in range(n) if j != prediction]
            margins = [difference(scores[prediction], scores[j]) for j in classes]
            deltas = {j: difference(rows[prediction], rows[j]) for j in classes}
            ratios = [ratio(m, vector_norm(deltas[j], DUAL[p])) for m, j in zip(margins, classes, strict=True)]
            chosen = nearest(ratios, margins, classes) if runner_up is None else int(runner_up[b])
            slot = classes.index(chosen)
            system = _system(scores[prediction], margins[slot], rows[prediction], deltas[chosen], point, p)
            system["prediction"] = (prediction, 0)
            system["runner_up"] = (chosen, 0)
            system["linearized_robustness"] = (ratios[slot], np.abs(ratios[slot]))
            ratios.insert(prediction, np.inf)
            all_ratios.append(ratios)
            for name, (value, scale) in system.items():
                values[name].append(value)
                scales[name].append(scale)
    table = np.array(all_ratios, dtype=LONG).reshape(B, n)
    return Truth(
        {name: np.array(column, dtype=LONG) for name, column in values.items()} | {"distances": table},
        {name: np.array(column, dtype=LONG) for name, column in scales.items()} | {"distances": np.abs(table)},
        table,
    )


def pairwise_truth(logits: Tensor, jacobian: Tensor, x: Tensor | None, p: float) -> Truth:
    """Everything in `PairwiseMargins`."""
    B, n = logits.shape
    names = ("distance", "margin", "alignment")
    values = {name: np.zeros((B, n, n), dtype=LONG) for name in names}
    scales = {name: np.zeros((B, n, n), dtype=LONG) for name in names}
    values |= {name: np.zeros((B, n), dtype=LONG) for name in ("nearest", "nearest_margin")}
    with np.errstate(all="ignore"):
        for b in range(B):
            scores, rows = to_long(logits[b]), to_long(jacobian[b])
            differences = np.full((n, n), LONG(np.nan))
            for i, j in itertools.product(range(n), repeat=2):
                if i == j:
                    values["margin"][b, i, i], values["alignment"][b, i, i] = np.inf, np.nan
                    continue
                delta = difference(rows[i], rows[j])
                distance = vector_norm(delta, DUAL[p])
                differences[i, j] = difference(scores[i], scores[j])
                values["distance"][b, i, j] = distance
                values["margin"][b, i, j] = ratio(differences[i, j], distance)
                if x is not None:
                    terms = to_long(x[b]) * delta
                    values["alignment"][b, i, j] = np.abs(np.sum(terms)) / distance
                    scales["alignment"][b, i, j] = np.sum(np.abs(terms)) / distance
            for i in range(n):
                others = [j for j in range(n) if j != i]
                row = values["margin"][b, i]
                j = nearest([row[j] for j in others], [differences[i, j] for j in others], others)
                values["nearest"][b, i], values["nearest_margin"][b, i] = j, row[j]
    for name in ("distance", "margin", "nearest_margin"):
        scales[name] = np.abs(values[name])
    return Truth(values, scales, values["margin"])
