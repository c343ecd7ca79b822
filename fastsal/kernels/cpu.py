"""The `cpu` backend: tensors -> calls of the native module fastsal._cpu."""

import importlib
from types import ModuleType

import torch
from torch import Tensor

_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_DUAL_CODES = {2.0: 2, float("inf"): 1, 1.0: 0}  # p of the perturbation -> q of the gradient, 0 for infinity


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastsal._cpu"), ""
    except ImportError as error:
        return None, f"the native module fastsal._cpu cannot be imported: {error}"


_cpu, _reason = _load()


def unavailable() -> str:
    """Why this backend cannot run at all; empty if it can."""
    return _reason


def why_not(jacobian: Tensor) -> str:
    """Why this backend cannot take this Jacobian; empty if it can."""
    return _reason or ("" if jacobian.device.type == "cpu" else f"tensors are on {jacobian.device}, not on the CPU")


def _native() -> ModuleType:
    if _cpu is None:
        raise RuntimeError(f"backend 'cpu' cannot run: {_reason}")
    return _cpu


def info() -> dict[str, object]:
    """SIMD level and OpenMP of the native module."""
    if _cpu is None:
        return {}
    return {"simd": _cpu.simd_level(), "openmp": _cpu.openmp(), "threads": torch.get_num_threads()}


def _scores(logits: Tensor, jacobian: Tensor) -> Tensor:
    return logits.to(torch.float64 if jacobian.dtype == torch.float64 else torch.float32).contiguous()


def _x_arguments(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), _CODES[x.dtype], x.stride(0))


def row_distances(anchor: Tensor, rows: Tensor, norm: float) -> Tensor:
    """‖anchor − row‖_q: float64 [B, c] from anchor [B, D] and rows [B, c, D]."""
    B, c, D = rows.shape
    out = torch.empty(B, c, dtype=torch.float64)
    _native().row_distances(
        _DUAL_CODES[norm],
        _CODES[rows.dtype],
        anchor.data_ptr(),
        anchor.stride(0),
        rows.data_ptr(),
        rows.stride(0),
        rows.stride(1),
        B,
        c,
        D,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def margin_geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scalars [10, B], (prediction, runner_up) [2, B] and distances [B, n], in one pass over the Jacobian [B, n, D]."""
    B, n, D = jacobian.shape
    logits = _scores(logits, jacobian)
    scalars = torch.empty(10, B, dtype=logits.dtype)
    indices = torch.empty(2, B, dtype=torch.int64)
    distances = torch.empty(B, n, dtype=logits.dtype)
    _native().margin_geometry(
        _DUAL_CODES[norm],
        _CODES[jacobian.dtype],
        logits.data_ptr(),
        _CODES[logits.dtype],
        jacobian.data_ptr(),
        jacobian.stride(0),
        jacobian.stride(1),
        *_x_arguments(x),
        B,
        n,
        D,
        scalars.data_ptr(),
        indices.data_ptr(),
        distances.data_ptr(),
        torch.get_num_threads(),
    )
    return scalars, indices, distances


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """distance, margin [B, n, n], nearest_margin, nearest [B, n] and the projection [B, n, n] (empty without x)."""
    B, n, D = jacobian.shape
    logits = _scores(logits, jacobian)
    distance = torch.empty(B, n, n, dtype=logits.dtype)
    margin = torch.empty_like(distance)
    nearest_margin = torch.empty(B, n, dtype=logits.dtype)
    nearest = torch.empty(B, n, dtype=torch.int64)
    projection = torch.empty_like(distance) if x is not None else distance.new_empty(0)
    _native().pairwise_margins(
        _DUAL_CODES[norm],
        _CODES[jacobian.dtype],
        logits.data_ptr(),
        _CODES[logits.dtype],
        jacobian.data_ptr(),
        jacobian.stride(0),
        jacobian.stride(1),
        *_x_arguments(x),
        B,
        n,
        D,
        distance.data_ptr(),
        margin.data_ptr(),
        nearest_margin.data_ptr(),
        nearest.data_ptr(),
        projection.data_ptr() if x is not None else 0,
        torch.get_num_threads(),
    )
    return distance, margin, nearest_margin, nearest, projection


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor]:
    """grad_jacobian [B, n, D] in its dtype and grad_x [B, D] in x's (empty without x); see reference.pairwise_backward."""
    B, n, D = jacobian.shape
    grad_jacobian = torch.empty(B, n, D, dtype=jacobian.dtype)
    grad_x = torch.empty(0, dtype=jacobian.dtype) if x is None else torch.empty(B, D, dtype=torch.float64)
    w = w.contiguous()
    v = None if v is None else v.contiguous()
    _native().pairwise_backward(
        _DUAL_CODES[norm],
        _CODES[jacobian.dtype],
        w.data_ptr(),
        0 if v is None else v.data_ptr(),
        jacobian.data_ptr(),
        jacobian.stride(0),
        jacobian.stride(1),
        *_x_arguments(x),
        B,
        n,
        D,
        grad_jacobian.data_ptr(),
        0 if x is None else grad_x.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_jacobian, grad_x if x is None else grad_x.to(x.dtype)
