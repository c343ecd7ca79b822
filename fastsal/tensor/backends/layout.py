"""What the backends agree on: the functions each of them offers, the codes of dtypes and norms, and the tensors they return."""

import importlib
import math
from typing import Any, Protocol

import torch
from torch import Tensor

from fastsal.tensor.reference import SCALARS
from fastsal.validation import output_dtype

# Both are the codes of the C++ side too (csrc).
DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
DUAL_CODES = {2.0: 2, math.inf: 1, 1.0: 0}  # p of the perturbation -> q of the gradient's norm, 0 for infinity


class Backend(Protocol):
    """What every module reference.py, cpu.py, cuda.py and triton.py of this package offers.

    logits [B, n], jacobian [B, n, D] and x [B, D] are checked already. `norm` is the p of the perturbation; gradients are
    measured in the dual q-norm. The functions below that start with `empty_` make the results' tensors.
    """

    def unavailable(self) -> str:
        """Why this backend cannot run at all; empty if it can."""

    def why_not(self, jacobian: Tensor) -> str:
        """Why this backend cannot take this Jacobian; empty if it can."""

    def info(self) -> dict[str, object]:
        """Particulars for `fastsal.info()`; empty where the backend cannot run."""

    def row_distances(self, anchor: Tensor, rows: Tensor, norm: float) -> Tensor:
        """‖anchor − row‖_q: float64 [B, c] from anchor [B, D] and rows [B, c, D]."""

    def margin_geometry(
        self, logits: Tensor, jacobian: Tensor, x: Tensor, norm: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The scalars [len(SCALARS), B] in that order, prediction and runner_up [2, B], and the distances [B, n]."""

    def pairwise_margins(
        self, logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """distance, margin [B, n, n], nearest_margin, nearest [B, n] and the projection [B, n, n] (empty without x)."""

    def pairwise_backward(
        self, w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the Jacobian [B, n, D] and of x [B, D] (empty without x), in their dtypes.

        They come from the pairs' weights, as fastsal.tensor.reference.pairwise_backward defines them. v and x come together.
        """


def imported(name: str, what: str) -> tuple[Any, str]:
    """A module and "", or None and why there is none: a machine may lack it."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{what} cannot be imported: {error}"


def scores(logits: Tensor, jacobian: Tensor) -> Tensor:
    """The logits as kernels read them: contiguous, float64 beside a float64 Jacobian and float32 beside any other."""
    return logits.to(output_dtype(jacobian.dtype)).contiguous()


def native_arguments(
    norm: float, rows: Tensor, before: tuple[int, ...], after: tuple[int, ...] = ()
) -> tuple[int, ...]:
    """What a native call begins with: codes, and the rows [B, n, D] with what stands before and after them, then B, n, D."""
    codes = DUAL_CODES[norm], DTYPE_CODES[rows.dtype]
    return *codes, *before, rows.data_ptr(), rows.stride(0), rows.stride(1), *after, *rows.shape


def x_arguments(x: Tensor | None) -> tuple[int, int, int]:
    """x [B, D] for a native call: its address, dtype code and the stride of B; zeros for no x."""
    return (0, 0, 0) if x is None else (x.data_ptr(), DTYPE_CODES[x.dtype], x.stride(0))


def empty_distances(rows: Tensor) -> Tensor:
    """What row_distances returns, not yet filled."""
    B, c, _ = rows.shape
    return rows.new_empty(B, c, dtype=torch.float64)


def empty_geometry(jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What margin_geometry returns, not yet filled."""
    B, n, _ = jacobian.shape
    out = output_dtype(jacobian.dtype)
    return (
        jacobian.new_empty(len(SCALARS), B, dtype=out),
        jacobian.new_empty(2, B, dtype=torch.int64),
        jacobian.new_empty(B, n, dtype=out),
    )


def empty_pairwise(jacobian: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What pairwise_margins returns, not yet filled."""
    B, n, _ = jacobian.shape
    out = output_dtype(jacobian.dtype)
    return (
        jacobian.new_empty(B, n, n, dtype=out),
        jacobian.new_empty(B, n, n, dtype=out),
        jacobian.new_empty(B, n, dtype=out),
        jacobian.new_empty(B, n, dtype=torch.int64),
        jacobian.new_empty((0,) if x is None else (B, n, n), dtype=out),
    )


def empty_gradients(jacobian: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
    """What pairwise_backward returns, not yet filled."""
    return jacobian.new_empty(jacobian.shape), jacobian.new_empty(0) if x is None else x.new_empty(x.shape)
