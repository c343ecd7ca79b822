"""torch.library operators with fake kernels, and the choice of a backend.

The operators work on checked, flattened tensors (logits [B, n], jacobian [B, n, D], x [B, D]) and know nothing of gradients;
geometry.py and pairwise.py put those on top. `row_distances` is the seam of the streaming path.
"""

import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastsal import reference, validation
from fastsal.kernels import cpu, cuda, triton

BACKENDS: dict[str, ModuleType] = {"cpu": cpu, "cuda": cuda, "triton": triton}
# Device type -> order of preference, set by measurement; the reference comes last everywhere.
AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


def choose(backend: str, jacobian: Tensor) -> str:
    """The backend that will run: the named one or an error with the reason; for "auto" the first that can."""
    if backend == "auto":
        backend = os.environ.get("FASTSAL_BACKEND", "auto")
    if backend == "auto":
        for name in AUTO.get(jacobian.device.type, ()):
            if not BACKENDS[name].why_not(jacobian):
                return name
        return "reference"
    if backend == "reference":
        return backend
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wants one of {['auto', 'reference', *BACKENDS]}")
    if reason := BACKENDS[backend].why_not(jacobian):
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    return backend


def info() -> dict[str, Any]:
    """Which backends are there and why the others are not, with the native modules' particulars.

    >>> import fastsal
    >>> fastsal.info()["backends"]["reference"]
    'available'
    """
    backends = {"reference": "available"}
    backends |= {name: module.unavailable() or "available" for name, module in BACKENDS.items()}
    return {"backends": backends} | {name: module.info() for name, module in BACKENDS.items()}


_LIBRARY = torch.library.Library("fastsal", "DEF")
_LIBRARY.define("row_distances(Tensor anchor, Tensor rows, float norm, str backend) -> Tensor")
_LIBRARY.define(
    "margin_geometry(Tensor logits, Tensor jacobian, Tensor x, float norm, str backend) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "pairwise_margins(Tensor logits, Tensor jacobian, Tensor? x, float norm, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "pairwise_backward(Tensor w, Tensor? v, Tensor jacobian, Tensor? x, float norm, str backend) -> (Tensor, Tensor)"
)


def _row_distances(anchor: Tensor, rows: Tensor, norm: float, backend: str) -> Tensor:
    name = choose(backend, rows)
    if name == "reference":
        return reference.row_distances(anchor, rows, norm)
    out: Tensor = BACKENDS[name].row_distances(anchor, rows, norm)
    return out


def _row_distances_fake(anchor: Tensor, rows: Tensor, norm: float, backend: str) -> Tensor:
    return rows.new_empty(rows.shape[:2], dtype=torch.float64)


def _margin_geometry(
    logits: Tensor, jacobian: Tensor, x: Tensor, norm: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    name = choose(backend, jacobian)
    if name == "reference":
        out = validation.output_dtype(jacobian.dtype)
        scalars, prediction, runner_up, distances = reference.margin_geometry(logits, jacobian, x, norm)
        packed = torch.stack([scalars[key] for key in reference.SCALARS])
        return packed.to(out), torch.stack((prediction, runner_up)), distances.to(out)
    result: tuple[Tensor, Tensor, Tensor] = BACKENDS[name].margin_geometry(logits, jacobian, x, norm)
    return result


def _margin_geometry_fake(
    logits: Tensor, jacobian: Tensor, x: Tensor, norm: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    B, n, _ = jacobian.shape
    out = validation.output_dtype(jacobian.dtype)
    return (
        jacobian.new_empty(len(reference.SCALARS), B, dtype=out),
        jacobian.new_empty(2, B, dtype=torch.int64),
        jacobian.new_empty(B, n, dtype=out),
    )


def _pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    name = choose(backend, jacobian)
    if name == "reference":
        out = validation.output_dtype(jacobian.dtype)
        distance, margin, nearest_margin, nearest, projection = reference.pairwise_margins(logits, jacobian, x, norm)
        projection = distance.new_empty(0) if projection is None else projection
        return distance.to(out), margin.to(out), nearest_margin.to(out), nearest, projection.to(out)
    result: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = BACKENDS[name].pairwise_margins(logits, jacobian, x, norm)
    return result


def _pairwise_margins_fake(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, n, _ = jacobian.shape
    out = validation.output_dtype(jacobian.dtype)
    return (
        jacobian.new_empty(B, n, n, dtype=out),
        jacobian.new_empty(B, n, n, dtype=out),
        jacobian.new_empty(B, n, dtype=out),
        jacobian.new_empty(B, n, dtype=torch.int64),
        jacobian.new_empty((0,) if x is None else (B, n, n), dtype=out),
    )


def _check_together(v: Tensor | None, x: Tensor | None) -> None:
    """The term Σ_j v_ij x wants both of its factors, and the gradient of x wants the weights v."""
    if (v is None) != (x is None):
        raise ValueError(f"{'v' if v is None else 'x'}: got None, wants v and x, or neither")


def _pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float, backend: str
) -> tuple[Tensor, Tensor]:
    _check_together(v, x)
    name = choose(backend, jacobian)
    if name == "reference":
        grad_jacobian, grad_x = reference.pairwise_backward(w, v, jacobian, x, norm)
        empty = jacobian.new_empty(0)
        return grad_jacobian.to(jacobian.dtype), empty if grad_x is None or x is None else grad_x.to(x.dtype)
    result: tuple[Tensor, Tensor] = BACKENDS[name].pairwise_backward(w, v, jacobian, x, norm)
    return result


def _pairwise_backward_fake(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float, backend: str
) -> tuple[Tensor, Tensor]:
    _check_together(v, x)
    grad_x = jacobian.new_empty(0) if x is None else jacobian.new_empty(x.shape, dtype=x.dtype)
    return jacobian.new_empty(jacobian.shape), grad_x


for _name, _impl, _fake in (
    ("row_distances", _row_distances, _row_distances_fake),
    ("margin_geometry", _margin_geometry, _margin_geometry_fake),
    ("pairwise_margins", _pairwise_margins, _pairwise_margins_fake),
    ("pairwise_backward", _pairwise_backward, _pairwise_backward_fake),
):
    _LIBRARY.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastsal::{_name}", _fake, lib=_LIBRARY)

row_distances = torch.ops.fastsal.row_distances.default
margin_geometry = torch.ops.fastsal.margin_geometry.default
pairwise_margins = torch.ops.fastsal.pairwise_margins.default
pairwise_backward = torch.ops.fastsal.pairwise_backward.default
