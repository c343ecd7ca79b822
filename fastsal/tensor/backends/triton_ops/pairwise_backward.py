"""pairwise_backward: the gradients of the Jacobian and of x, from the weights w and v of each pair of rows."""

import triton
import triton.language as tl
from torch import Tensor

from fastsal.tensor.backends.triton_ops import launching
from fastsal.tensor.backends.triton_ops.shared import accumulate, entries, reduce, row_entries, tree_sum

BLOCK_ROWS = 4


def launch(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, outputs: tuple[Tensor, Tensor], q: int
) -> None:
    """Fills the outputs: the gradients of jacobian [B, n, D] and, with v and x, of x [B, D]; w and v are contiguous."""
    grad_jacobian, grad_x = outputs
    n_examples, n_rows, n_cols = jacobian.shape
    rows_arguments = (jacobian, *jacobian.stride()[:2])
    block_d = launching.block_size(n_cols, 128, 256)
    col_blocks, row_blocks = triton.cdiv(n_cols, block_d), triton.cdiv(n_rows, BLOCK_ROWS)
    top = None
    if q == 0:
        top, share = launching.scratch(jacobian, w.numel(), w.numel())
        launching.launch(
            pairwise_backward_top_kernel,
            w.numel(),
            *(*rows_arguments, w, top, share, n_rows, n_cols),
            BLOCK_D=block_d,
        )
        w = share
    launching.launch(
        pairwise_backward_jacobian_kernel,
        n_examples * row_blocks * col_blocks,
        *(w, v, top, *rows_arguments, x, 0 if x is None else x.stride(0), grad_jacobian),
        *(n_rows, n_cols, col_blocks, row_blocks),
        Q=q,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_D=block_d,
    )
    if x is not None:
        launching.launch(
            pairwise_backward_x_kernel,
            n_examples * col_blocks,
            *(v, *rows_arguments, grad_x, n_rows, n_cols, col_blocks),
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_D=block_d,
        )


@launching.kernel
def pairwise_backward_top_kernel(
    jacobian_ptr, stride_jacobian_b, stride_jacobian_n, w_ptr, top_ptr, share_ptr, n_rows, n_cols, BLOCK_D: tl.constexpr
):
    """max|g_i − g_j| of a pair, and w_ij over the number of entries that attain it: both float64 [B, n, n]."""
    pid = tl.program_id(0).to(tl.int64)
    i = pid // n_rows % n_rows
    j = pid % n_rows
    row_i = jacobian_ptr + pid // n_rows // n_rows * stride_jacobian_b + i * stride_jacobian_n
    row_j = jacobian_ptr + pid // n_rows // n_rows * stride_jacobian_b + j * stride_jacobian_n
    end = tl.cast(n_cols, tl.int64)  # the columns of the last block may lie beyond 32 bits
    top = tl.zeros([1, BLOCK_D], tl.int64)
    for k in range(0, end, BLOCK_D):
        top = accumulate(top, entries(row_i, k, n_cols, BLOCK_D) - entries(row_j, k, n_cols, BLOCK_D), 0)
    largest = reduce(top, 0)
    count = tl.zeros([1, BLOCK_D], tl.int64)
    for k in range(0, end, BLOCK_D):
        d = entries(row_i, k, n_cols, BLOCK_D) - entries(row_j, k, n_cols, BLOCK_D)
        mask = (k + tl.arange(0, BLOCK_D) < n_cols)[None, :]
        count += ((tl.abs(d) == largest[:, None]) & mask).to(tl.int64)
    one = tl.arange(0, 1)
    tl.store(top_ptr + pid + one, largest)
    tl.store(share_ptr + pid + one, tl.load(w_ptr + pid + one) / tl.sum(count, 1).to(tl.float64))


@triton.jit
def _narrow(v, T: tl.constexpr):
    """float64 to T, by way of float32 as torch does it: not every target converts in one step."""
    return v if T == tl.float64 else v.to(tl.float32).to(T)


@launching.kernel
def pairwise_backward_jacobian_kernel(
    w_ptr,  # float64 [B, n, n]; for Q = 0 the shares of pairwise_backward_top_kernel
    v_ptr,  # float64 [B, n, n] or None
    top_ptr,  # float64 [B, n, n] for Q = 0, else None
    jacobian_ptr,
    stride_jacobian_b,
    stride_jacobian_n,
    x_ptr,
    stride_x_b,
    grad_ptr,  # [B, n, D]
    n_rows,
    n_cols,
    n_col_blocks,
    n_row_blocks,
    Q: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ_j w_ij φ(g_i − g_j) + Σ_j v_ij x for BLOCK_ROWS rows and BLOCK_D columns, in float64 as the weights are."""
    pid = tl.program_id(0)
    k = (pid % n_col_blocks).to(tl.int64) * BLOCK_D
    i = (pid // n_col_blocks % n_row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    b = (pid // n_col_blocks // n_row_blocks).to(tl.int64)
    row = tl.minimum(i, n_rows - 1)
    jacobian = jacobian_ptr + b * stride_jacobian_b
    g = row_entries(jacobian + row * stride_jacobian_n, k, n_cols, BLOCK_D, tl.float64)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float64)
    total = tl.zeros([BLOCK_ROWS], tl.float64)
    for j in range(0, n_rows):
        d = g - entries(jacobian + tl.cast(j, tl.int64) * stride_jacobian_n, k, n_cols, BLOCK_D)
        pair = (b * n_rows + row) * n_rows + j
        w = tl.load(w_ptr + pair)[:, None]
        if Q == 2:
            acc = tl.fma(w, d, acc)
        else:
            sign = tl.where(d > 0, w, tl.where(d < 0, -w, w * 0))
            if Q == 0:
                top = tl.load(top_ptr + pair)[:, None]
                sign = tl.where(tl.abs(d) == top, sign, tl.where(top == top, w * 0, top))
            acc += sign
        if v_ptr is not None:
            total += tl.load(v_ptr + pair)
    if v_ptr is not None:
        acc += total[:, None] * entries(x_ptr + b * stride_x_b, k, n_cols, BLOCK_D)
    cols = k + tl.arange(0, BLOCK_D)
    out = grad_ptr + ((b * n_rows + i) * n_cols)[:, None] + cols[None, :]
    tl.store(out, _narrow(acc, grad_ptr.dtype.element_ty), mask=(i < n_rows)[:, None] & (cols < n_cols)[None, :])


@launching.kernel
def pairwise_backward_x_kernel(
    v_ptr,
    jacobian_ptr,
    stride_jacobian_b,
    stride_jacobian_n,
    grad_ptr,
    n_rows,
    n_cols,
    n_col_blocks,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ_{i<j} v_ij (g_i − g_j) for BLOCK_D columns, in float64."""
    pid = tl.program_id(0)
    k = (pid % n_col_blocks).to(tl.int64) * BLOCK_D
    b = (pid // n_col_blocks).to(tl.int64)
    jacobian = jacobian_ptr + b * stride_jacobian_b
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float64)
    for i in range(0, n_rows):
        g = entries(jacobian + tl.cast(i, tl.int64) * stride_jacobian_n, k, n_cols, BLOCK_D)
        for start in range(0, n_rows, BLOCK_ROWS):
            j = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
            v = tl.load(v_ptr + (b * n_rows + i) * n_rows + j, mask=(j < n_rows) & (j > i), other=0.0)[:, None]
            row_j = jacobian + tl.minimum(j, n_rows - 1) * stride_jacobian_n
            d = g - row_entries(row_j, k, n_cols, BLOCK_D, tl.float64)
            acc = tl.fma(v, d, acc)
    cols = k + tl.arange(0, BLOCK_D)
    total = tree_sum(tl.trans(acc))
    tl.store(grad_ptr + b * n_cols + cols, _narrow(total, grad_ptr.dtype.element_ty), mask=cols < n_cols)
