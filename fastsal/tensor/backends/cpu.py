"""The `cpu` backend: tensors -> calls of the native module fastsal._cpu. `layout.Backend` describes the functions."""

import torch
from torch import Tensor

from fastsal.tensor.backends import layout

_cpu, _reason = layout.imported("fastsal._cpu", "the native module fastsal._cpu")


def unavailable() -> str:
    return _reason


def why_not(jacobian: Tensor) -> str:
    return _reason or ("" if jacobian.device.type == "cpu" else f"tensors are on {jacobian.device}, not on the CPU")


def info() -> dict[str, object]:
    """SIMD level and OpenMP of the native module."""
    if _reason:
        return {}
    return {"simd": _cpu.simd_level(), "openmp": _cpu.openmp(), "threads": torch.get_num_threads()}


def row_distances(anchor: Tensor, rows: Tensor, norm: float) -> Tensor:
    out = layout.empty_distances(rows)
    arguments = layout.native_arguments(norm, rows, (anchor.data_ptr(), anchor.stride(0)))
    _cpu.row_distances(*arguments, out.data_ptr(), torch.get_num_threads())
    return out


def margin_geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    scores = layout.scores(logits, jacobian)
    outputs = layout.empty_geometry(jacobian)
    before = scores.data_ptr(), layout.DTYPE_CODES[scores.dtype]
    arguments = layout.native_arguments(norm, jacobian, before, layout.x_arguments(x))
    _cpu.margin_geometry(*arguments, *map(Tensor.data_ptr, outputs), torch.get_num_threads())
    return outputs


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scores = layout.scores(logits, jacobian)
    outputs = layout.empty_pairwise(jacobian, x)
    before = scores.data_ptr(), layout.DTYPE_CODES[scores.dtype]
    arguments = layout.native_arguments(norm, jacobian, before, layout.x_arguments(x))
    _cpu.pairwise_margins(*arguments, *map(Tensor.data_ptr, outputs), torch.get_num_threads())
    return outputs


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor]:
    grad_jacobian = jacobian.new_empty(jacobian.shape)
    grad_x = torch.empty(0 if x is None else x.shape, dtype=torch.float64)
    w, v = w.contiguous(), None if v is None else v.contiguous()
    before = w.data_ptr(), 0 if v is None else v.data_ptr()
    arguments = layout.native_arguments(norm, jacobian, before, layout.x_arguments(x))
    _cpu.pairwise_backward(*arguments, grad_jacobian.data_ptr(), grad_x.data_ptr(), torch.get_num_threads())
    return grad_jacobian, grad_x.to(jacobian.dtype if x is None else x.dtype)
