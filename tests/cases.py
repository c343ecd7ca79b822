"""Inputs, truth and comparison that the tests of every backend share.

The truth is written from docs/design.md, "Quantities", alone, one example and one class at a time, in numpy.longdouble: its
exponents hold the square of any float64, so that no scaling is needed, and its 64-bit mantissa leaves float64 results
their 1e-13.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import fastsal
from fastsal.tensor import ops, reference
from fastsal.tensor.backends import layout

NORMS = (2.0, math.inf, 1.0)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
DUAL = {2.0: 2.0, math.inf: 1.0, 1.0: math.inf}
LONG = np.longdouble
long_double = pytest.mark.skipif(np.finfo(LONG).nmant < 63, reason="no long double wider than float64 here")


class Target(NamedTuple):
    """Where a test runs."""

    backend: str
    device: str

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}"


def _target(backend: str, device: str) -> Any:
    why = ops.BACKENDS[backend].unavailable()
    marks = [pytest.mark.skip(reason=why)] if why else []
    return pytest.param(Target(backend, device), marks=marks, id=f"{backend}-{device}")


TARGETS = [_target("reference", "cpu"), _target("cpu", "cpu")]
KERNELS = [target for target in TARGETS if target.values[0].backend != "reference"]

each_target = pytest.mark.parametrize("target", TARGETS)
each_kernel = pytest.mark.parametrize("target", KERNELS)
each_norm = pytest.mark.parametrize("norm", NORMS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@contextlib.contextmanager
def switched(read: Callable[[], Any], switch: Callable[[Any], None], value: Any) -> Iterator[None]:
    """Inside, a setting that one function reads and another switches has this value; afterwards, what it had before."""
    before = read()
    switch(value)
    try:
        yield
    finally:
        switch(before)


def poisoned() -> contextlib.AbstractContextManager[None]:
    """Inside, torch.empty and its kin hand out NaN and the largest integers: what a kernel does not write shows."""
    return switched(torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True)


def out_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tolerance(dtype: torch.dtype) -> float:
    """docs/design.md, "Accuracy": in units of each quantity's own scale."""
    return 1e-13 if dtype == torch.float64 else 1e-6


def inputs(
    B: int, n: int, D: int, dtype: torch.dtype, seed: int = 0, *, scale: float = 1.0, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Random logits [B, n], jacobian [B, n, D] with entries near `scale`, and x [B, D]."""
    generator = torch.Generator().manual_seed(seed + 1000 * D + 100 * n + B)
    shapes = ((B, n), (B, n, D), (B, D))
    logits, jacobian, x = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return tuple(v.to(dtype).to(device) for v in (logits, scale * jacobian, x))  # type: ignore[return-value]


class Truth(NamedTuple):
    """Values and their scales (docs/design.md, "Accuracy"), each a long double array [B] or [B, ...]."""

    values: dict[str, Any]
    scales: dict[str, Any]
    ratios: Any  # [B, n], rounded to float64


def _long(tensor: Tensor) -> Any:
    return tensor.detach().cpu().double().numpy().astype(LONG)


def _difference(a: Any, b: Any) -> Any:
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


def geometry_truth(logits: Tensor, jacobian: Tensor, x: Tensor, p: float, runner_up: Tensor | None = None) -> Truth:
    """Everything in `Geometry` for logits [B, n], jacobian [B, n, D], x [B, D]; `runner_up` overrides the selection."""
    B, n = logits.shape
    names = (*reference.SCALARS, "prediction", "runner_up")
    values: dict[str, list[Any]] = {name: [] for name in names}
    scales: dict[str, list[Any]] = {name: [] for name in names}
    all_ratios = []
    with np.errstate(all="ignore"):
        for b in range(B):
            scores, rows, point = _long(logits[b]), _long(jacobian[b]), _long(x[b])
            nans = np.flatnonzero(np.isnan(scores))
            prediction = int(nans[0]) if len(nans) else int(np.argmax(scores))
            classes = [j for j in range(n) if j != prediction]
            margins = [_difference(scores[prediction], scores[j]) for j in classes]
            deltas = {j: _difference(rows[prediction], rows[j]) for j in classes}
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
            scores, rows = _long(logits[b]), _long(jacobian[b])
            differences = np.full((n, n), LONG(np.nan))
            for i, j in itertools.product(range(n), repeat=2):
                if i == j:
                    values["margin"][b, i, i], values["alignment"][b, i, i] = np.inf, np.nan
                    continue
                delta = _difference(rows[i], rows[j])
                distance = vector_norm(delta, DUAL[p])
                differences[i, j] = _difference(scores[i], scores[j])
                values["distance"][b, i, j] = distance
                values["margin"][b, i, j] = ratio(differences[i, j], distance)
                if x is not None:
                    terms = _long(x[b]) * delta
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


def assert_close(name: str, got: Tensor, value: Any, scale: Any, tol: float) -> None:
    """|got − value| <= tol · scale, up to the smallest numbers of got's dtype; infinities and NaN agree exactly."""
    tiny = 4 * torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    array = got.detach().cpu().double().numpy().astype(LONG)
    with np.errstate(all="ignore"):
        want = value.astype(np.float64 if got.dtype == torch.float64 else np.float32).astype(LONG)
        same = (array == want) | (np.isnan(array) & np.isnan(want))
        near = np.isfinite(want) & np.isfinite(scale) & (np.abs(array - value) <= tol * scale + tiny)
        bad = ~(same | near)
        worst = np.max(np.nan_to_num(np.where(bad, np.abs(array - value) / scale, 0)), initial=0)
    assert not bad.any(), (
        f"{name}: got {array[bad][:4]}, wants {value[bad][:4]} at {np.argwhere(bad)[:4].tolist()}; "
        f"off by {float(worst):.3g} of the scale, {tol:g} allowed"
    )


def assert_geometry(result: Any, logits: Tensor, jacobian: Tensor, x: Tensor, p: float) -> None:
    """Every field of a `Geometry` of flat inputs against the truth."""
    B, n, _ = jacobian.shape
    dtype, device = out_dtype(jacobian.dtype), jacobian.device
    for name in (*reference.SCALARS, "lower_bound"):
        field = getattr(result, name)
        assert (field.shape, field.dtype, field.device) == ((B,), dtype, device), name
    for name in ("prediction", "runner_up", "vjps", "jvps"):
        field = getattr(result, name)
        assert (field.shape, field.dtype, field.device) == ((B,), torch.int64, device), name
    assert (result.distances.shape, result.distances.dtype) == ((B, n), dtype)
    assert result.method == "exact"
    assert result.certified.dtype == torch.bool
    assert torch.equal(result.certified, ~result.linearized_robustness.isnan())
    assert result.failure_probability == 0.0

    truth = geometry_truth(logits, jacobian, x, p)
    assert result.prediction.tolist() == truth.values["prediction"].astype(int).tolist()
    for b, (got, want) in enumerate(
        zip(result.runner_up.tolist(), truth.values["runner_up"].astype(int).tolist(), strict=True)
    ):
        if got != want:  # docs/design.md, "Accuracy": between ratios that differ by less than 2e-6 the choice is open
            assert truth.ratios[b, got] <= truth.ratios[b, want] * (1 + 2e-6), f"runner_up {got}, wants {want}"
    truth = geometry_truth(logits, jacobian, x, p, result.runner_up)
    tol = tolerance(jacobian.dtype)
    # Where a rounding error decides between NaN and a number: ‖x‖·gap of an infinite x and a gap of 0, and the homogeneity
    # of a dot product that cancels entirely.
    for name, undecided in {
        "bound": (x.isinf().any(1) & ~result.bound.isfinite()).cpu().numpy(),
        "homogeneity": truth.scales["homogeneity"] * tol > 1,
        "binarized_homogeneity": truth.scales["binarized_homogeneity"] * tol > 1,
    }.items():
        got = getattr(result, name).cpu().double().numpy()
        assert not ((got < 0) | (undecided & (name != "bound") & (got > 1))).any(), name
        truth.values[name][:] = np.where(undecided, got, truth.values[name])
    for name in (*reference.SCALARS, "distances"):
        assert_close(name, getattr(result, name), truth.values[name], truth.scales[name], tol)
    assert_same(result.lower_bound, result.linearized_robustness)


def assert_pairwise(result: Any, logits: Tensor, jacobian: Tensor, x: Tensor | None, p: float) -> None:
    """Every field of a `PairwiseMargins` of flat inputs against the truth."""
    B, n, _ = jacobian.shape
    dtype = out_dtype(jacobian.dtype)
    assert (result.nearest.shape, result.nearest.dtype) == ((B, n), torch.int64)
    assert (result.nearest_margin.shape, result.nearest_margin.dtype) == ((B, n), dtype)
    truth = pairwise_truth(logits, jacobian, x, p)
    tol = tolerance(jacobian.dtype)
    names = ["distance", "margin"] + (["alignment"] if x is not None else [])
    assert (result.alignment is None) == (x is None)
    for name in names:
        field = getattr(result, name)
        assert (field.shape, field.dtype) == ((B, n, n), dtype), name
        assert_close(name, field, truth.values[name], truth.scales[name], tol)
    rows = truth.values["margin"]
    for (b, i), j in np.ndenumerate(result.nearest.cpu().numpy()):
        want = int(truth.values["nearest"][b, i])
        if j != want:
            assert np.abs(rows[b, i, j] - rows[b, i, want]) <= 2e-6 * np.abs(rows[b, i, want]), (b, i, j, want)
    name = "nearest_margin"
    assert_close(name, result.nearest_margin, truth.values[name], truth.scales[name], tol)


def fields(result: Any) -> dict[str, Tensor]:
    """The tensors of a result dataclass."""
    return {name: value for name, value in vars(result).items() if isinstance(value, Tensor)}


def assert_same(a: Tensor, b: Tensor, what: str = "") -> None:
    """The same bits (any NaN equals any NaN)."""
    same = (a == b) | ((a != a) & (b != b))
    assert a.shape == b.shape, what
    assert bool(same.all()), what
    zeros = (a == 0) & (b == 0)
    assert bool((torch.signbit(a) == torch.signbit(b))[zeros].all()), what


def assert_same_results(a: Any, b: Any, select: Any = slice(None), what: str = "") -> None:
    """Every tensor of result a, at the examples `select`, has the bits of result b."""
    other = fields(b)
    for name, value in fields(a).items():
        assert_same(value[select], other[name], f"{what} {name}")


def margin_geometry(target: Target, logits: Tensor, jacobian: Tensor, x: Tensor, norm: float = 2.0) -> Any:
    """fastsal.margin_geometry on the target's backend and device, into poisoned outputs."""
    moved = (tensor.to(target.device) for tensor in (logits, jacobian, x))
    with poisoned():
        return fastsal.margin_geometry(*moved, norm=norm, backend=target.backend)


def pairwise_margins(target: Target, logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float = 2.0) -> Any:
    """fastsal.pairwise_margins on the target's backend and device, into poisoned outputs."""
    moved = (None if tensor is None else tensor.to(target.device) for tensor in (logits, jacobian, x))
    with poisoned():
        return fastsal.pairwise_margins(*moved, norm=norm, backend=target.backend)


def check_geometry(target: Target, logits: Tensor, jacobian: Tensor, x: Tensor, norm: float = 2.0) -> Any:
    """margin_geometry on the target's backend and device, every field compared with the truth; returns the result."""
    result = margin_geometry(target, logits, jacobian, x, norm)
    assert_geometry(result, *(tensor.to(target.device) for tensor in (logits, jacobian, x)), norm)
    return result


def check_pairwise(target: Target, logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float = 2.0) -> Any:
    """pairwise_margins on the target's backend and device, every field compared with the truth; returns the result."""
    result = pairwise_margins(target, logits, jacobian, x, norm)
    assert_pairwise(result, logits, jacobian, x, norm)
    return result


def assert_v_and_x_go_together(backend: str, device: str = "cpu") -> None:
    """pairwise_backward refuses v without x and x without v, and says which is missing."""
    w = torch.zeros(1, 3, 3, dtype=torch.float64, device=device)
    jacobian, x = torch.ones(1, 3, 5, device=device), torch.ones(1, 5, device=device)
    for name, v, given in (("v", None, x), ("x", w, None)):
        with pytest.raises(ValueError, match=f"{name}: got None, wants v and x, or neither"):
            ops.pairwise_backward(w, v, jacobian, given, 2.0, backend)


def assert_writes_every_scalar(backend: str, monkeypatch: pytest.MonkeyPatch, device: str = "cpu") -> None:
    """The kernel writes as many rows of scalars as there are names for them, in a buffer that has room for more."""
    empty, missing = layout.empty_geometry, -7.0

    def roomy(jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scalars, indices, distances = empty(jacobian)
        return scalars.new_full((len(scalars) + 3, len(jacobian)), missing), indices, distances

    monkeypatch.setattr(layout, "empty_geometry", roomy)
    scalars, _, _ = ops.margin_geometry(*inputs(2, 3, 5, torch.float32, device=device), 2.0, backend)
    assert (scalars != missing).all(1).tolist() == [True] * len(reference.SCALARS) + [False] * 3


# The awkward numbers of each dtype. float64's stay where ‖Δ_j‖ is a normal float64.
SPECIAL = {
    torch.float64: (0.0, -0.0, 1.0, -1.0, 1e-300, -1e-200, 1e200, -1e300, math.inf, -math.inf, math.nan),
    torch.float32: (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-30, 1e30, -3e38, math.inf, -math.inf, math.nan),
    torch.float16: (0.0, -0.0, 1.0, -1.0, 6e-8, -1e-5, 6e4, -6e4, math.inf, -math.inf, math.nan),
    torch.bfloat16: (0.0, -0.0, 1.0, -1.0, 1e-40, -1e-30, 1e30, -3e38, math.inf, -math.inf, math.nan),
}


# Dtype and size of the gradients of saturated and exploding models.
SCALES = [
    *((torch.float32, scale) for scale in (1e-43, 1e-30, 1e-25, 1e-20, 1e10, 1e20, 1e30, 1e37)),
    *((torch.float64, scale) for scale in (1e-290, 1e-200, 1e-150, 1e150, 1e200, 1e300)),
    *((torch.bfloat16, scale) for scale in (1e-39, 1e-30, 1e30)),
    *((torch.float16, scale) for scale in (1e-7, 1e4)),
]


@st.composite
def special_inputs(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DTYPES) -> tuple[Tensor, Tensor, Tensor]:
    """Small logits, jacobian and x: noise or zeros, sprinkled with special values, some rows equal."""
    dtype = draw(st.sampled_from(dtypes))
    B, n, D = draw(st.integers(1, 2)), draw(st.integers(2, 4)), draw(st.sampled_from((1, 2, 5, 19, 70)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    finite = draw(st.booleans())
    numbers = st.sampled_from(SPECIAL[dtype][:-3] if finite else SPECIAL[dtype])
    tensors = []
    for shape in ((B, n), (B, n, D), (B, D)):
        base = torch.randn(shape, generator=generator, dtype=torch.float64)
        if draw(st.booleans()):
            base = base.round() * draw(st.sampled_from((0.0, 1.0)))
        flat = base.to(dtype).flatten()
        places = st.integers(0, flat.numel() - 1)
        for place, number in draw(st.dictionaries(places, numbers, max_size=6)).items():
            flat[place] = number
        tensors.append(flat.view(shape))
    logits, jacobian, x = tensors
    for source, destination in draw(st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1)), max_size=2)):
        jacobian[:, destination] = jacobian[:, source]
    return logits, jacobian, x


def far_jacobian(folder: Path, near: Tensor, axis: str) -> Tensor:
    """A copy of `near` [B, n, D] whose examples or rows lie 2³¹ elements apart, on a sparse file of a few pages."""
    _, n, D = near.shape
    far = 2**31 + 11
    strides = (far, n * D, 1) if axis == "batch" else (D, far, 1)
    size = 1 + sum((extent - 1) * stride for extent, stride in zip(near.shape, strides, strict=True))
    storage = torch.from_file(str(folder / "sparse"), shared=True, size=size, dtype=near.dtype)
    return storage.as_strided(near.shape, strides).copy_(near)
