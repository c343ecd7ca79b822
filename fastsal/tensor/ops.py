"""torch.library operators with fake kernels, and the choice of a backend.

The operators work on checked, flattened tensors (logits [B, n], jacobian [B, n, D], x [B, D]) and know nothing of gradients;
geometry.py and pairwise.py put those on top. `row_distances` is what model level calls for every chunk of classes.
"""

import functools
import os
import warnings
from typing import Any

import torch
from torch import Tensor

from fastsal.tensor.backends import cpu, cuda, eager, layout, triton

# Every backend by name; KERNELS are those that are not the reference.
KERNELS: dict[str, layout.Backend] = {"cpu": cpu, "cuda": cuda, "triton": triton}
BACKENDS: dict[str, layout.Backend] = {"reference": eager} | KERNELS
# Device type -> order of preference, set by measurement; the reference comes last everywhere.
AUTO = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@functools.cache
def _warn_once(reasons: str) -> None:
    warnings.warn(f"the reference runs on this GPU, since no kernel can ({reasons})", RuntimeWarning, stacklevel=3)


def choose(backend: str, jacobian: Tensor) -> str:
    """The backend that will run: the named one or an error with the reason; for "auto" the first that can."""
    if backend == "auto":
        backend = os.environ.get("FASTSAL_BACKEND", "auto")
    if backend == "auto":
        reasons = {}
        for name in AUTO.get(jacobian.device.type, ()):
            reasons[name] = BACKENDS[name].why_not(jacobian)
            if not reasons[name]:
                return name
        if jacobian.device.type == "cuda":
            _warn_once("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
        return "reference"
    if backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, wants one of {['auto', *BACKENDS]}")
    if reason := BACKENDS[backend].why_not(jacobian):
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    return backend


def info() -> dict[str, Any]:
    """Which backends are there and why the others are not, with the native modules' particulars.

    Examples:
        >>> import fastsal
        >>> fastsal.info()["backends"]["reference"]
        'available'
    """
    backends = {name: module.unavailable() or "available" for name, module in BACKENDS.items()}
    return {"backends": backends} | {name: module.info() for name, module in BACKENDS.items()}


def _row_distances(anchor: Tensor, rows: Tensor, norm: float, backend: str) -> Tensor:
    return BACKENDS[choose(backend, rows)].row_distances(anchor, rows, norm)


def _margin_geometry(
    logits: Tensor, jacobian: Tensor, x: Tensor, norm: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKENDS[choose(backend, jacobian)].margin_geometry(logits, jacobian, x, norm)


def _pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return BACKENDS[choose(backend, jacobian)].pairwise_margins(logits, jacobian, x, norm)


def _check_together(v: Tensor | None, x: Tensor | None) -> None:
    """The term Σ_j v_ij x wants both of its factors, and the gradient of x wants the weights v."""
    if (v is None) != (x is None):
        raise ValueError(f"{'v' if v is None else 'x'}: got None, wants v and x, or neither")


def _pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float, backend: str
) -> tuple[Tensor, Tensor]:
    _check_together(v, x)
    return BACKENDS[choose(backend, jacobian)].pairwise_backward(w, v, jacobian, x, norm)


def _pairwise_backward_fake(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float, backend: str
) -> tuple[Tensor, Tensor]:
    _check_together(v, x)
    return layout.empty_gradients(jacobian, x)


_LIBRARY = torch.library.Library("fastsal", "DEF")
# Each operator's schema, what it does, and what it returns in shapes alone.
for _schema, _run, _fake in (
    (
        "row_distances(Tensor anchor, Tensor rows, float norm, str backend) -> Tensor",
        _row_distances,
        lambda anchor, rows, norm, backend: layout.empty_distances(rows),
    ),
    (
        "margin_geometry(Tensor logits, Tensor jacobian, Tensor x, float norm, str backend) -> (Tensor, Tensor, Tensor)",
        _margin_geometry,
        lambda logits, jacobian, x, norm, backend: layout.empty_geometry(jacobian),
    ),
    (
        "pairwise_margins(Tensor logits, Tensor jacobian, Tensor? x, float norm, str backend)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
        _pairwise_margins,
        lambda logits, jacobian, x, norm, backend: layout.empty_pairwise(jacobian, x),
    ),
    (
        "pairwise_backward(Tensor w, Tensor? v, Tensor jacobian, Tensor? x, float norm, str backend)"
        " -> (Tensor, Tensor)",
        _pairwise_backward,
        _pairwise_backward_fake,
    ),
):
    _name = _LIBRARY.define(_schema)
    _LIBRARY.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastsal::{_name}", _fake, lib=_LIBRARY)

row_distances = torch.ops.fastsal.row_distances.default
margin_geometry = torch.ops.fastsal.margin_geometry.default
pairwise_margins = torch.ops.fastsal.pairwise_margins.default
pairwise_backward = torch.ops.fastsal.pairwise_backward.default
