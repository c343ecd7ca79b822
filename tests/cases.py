"""Inputs that the tests of every backend share, and the comparison of results with truth.py."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from truth import LONG, geometry_truth, pairwise_truth, to_long

import fastsal
from fastsal.tensor import ops, reference
from fastsal.tensor.backends import layout

NORMS = (2.0, math.inf, 1.0)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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


def assert_close(name: str, got: Tensor, value: Any, scale: Any, tol: float) -> None:
    """|got − value| <= tol · scale, up to the smallest numbers of got's dtype; infinities and NaN agree exactly."""
    tiny = 4 * torch.finfo(got.dtype).smallest_normal * torch.finfo(got.dtype).eps
    array = to_long(got)
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
