"""row_distances: ‖anchor − row‖_q of every row. It is the first stage of margin_geometry too."""

import triton
import triton.language as tl
from torch import Tensor

from fastsal.tensor.backends.triton_ops import launching
from fastsal.tensor.backends.triton_ops.shared import (
    accumulate,
    combine_norms,
    entries,
    exponent,
    reduce,
    row_entries,
    shift,
    start_lanes,
    underflow_limit,
)

SEGMENT_SIZE = tl.constexpr(4096)
BLOCK_ROWS = 4  # rows that share one load of the anchor


def launch(anchor: Tensor, rows: Tensor, norms: Tensor, q: int, index: Tensor | None = None) -> None:
    """Fills norms [B, n] from rows [B, n, D] and anchor [B, D], or [B, n, D] of which `index` [B] chooses a row an example."""
    n_examples, n_rows, n_cols = rows.shape
    segments = triton.cdiv(n_cols, SEGMENT_SIZE.value)
    (partials,) = launching.scratch(rows, norms.numel() * segments)
    row_blocks = triton.cdiv(n_rows, BLOCK_ROWS)
    block_d = launching.block_size(n_cols, 128, 512 if rows.element_size() == 8 else 1024)  # part of the reduction tree
    launching.launch(
        row_distances_partials_kernel,
        n_examples * row_blocks * segments,
        *(anchor, *anchor.stride()[:2], index, rows, *rows.stride()[:2], partials),
        *(n_rows, n_cols, segments, row_blocks),
        Q=q,
        BLOCK_ROWS=BLOCK_ROWS,
        BLOCK_D=block_d,
    )
    block_s = launching.block_size(segments, 1, 64)
    block_n = 256 // block_s
    launching.launch(
        row_distances_combine_kernel,
        triton.cdiv(norms.numel(), block_n),
        *(partials, norms, norms.numel(), segments),
        Q=q,
        BLOCK_N=block_n,
        BLOCK_S=block_s,
    )


@triton.jit
def _differences(anchor, rows, start, n_cols, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """anchor − rows [R, BLOCK_D] in the type T, from column `start` on; 0 behind the last column."""
    return entries(anchor, start, n_cols, BLOCK_D, T) - row_entries(rows, start, n_cols, BLOCK_D, T)


@triton.jit
def _segment_norms(
    anchor, rows, needed, start, n_cols, BLOCK_ROWS: tl.constexpr, Q: tl.constexpr, BLOCK_D: tl.constexpr
):
    """‖anchor − row‖ over the segment that starts at `start`, encoded, for BLOCK_ROWS rows; right only where `needed`."""
    DTYPE: tl.constexpr = anchor.dtype.element_ty
    T: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    end = tl.minimum(start + SEGMENT_SIZE, n_cols)
    acc = start_lanes(tl.zeros([BLOCK_ROWS, BLOCK_D], T), Q)
    for k in range(start, end, BLOCK_D):
        acc = accumulate(acc, _differences(anchor, rows, k, n_cols, BLOCK_D, T), Q)
    out = reduce(acc, Q)
    # Differences of float16 never leave the range of float32, and float64 needs a scale for its squares only.
    if (DTYPE != tl.float16) and (DTYPE != tl.float64 or Q == 2):
        NARROW: tl.constexpr = BLOCK_D if BLOCK_D < 256 else 256
        bad = ((out < float("inf")) == 0) & needed
        if Q == 2:
            bad |= (out < underflow_limit(end - start, T)) & needed
            # A sum of 0, as padded tokens and masked regions make, is exact unless a square underflowed.
            if tl.max((bad & (out == 0)).to(tl.int32), 0) != 0:
                top = start_lanes(tl.zeros([BLOCK_ROWS, NARROW], T), 0)
                for k in range(start, end, NARROW):
                    top = accumulate(top, _differences(anchor, rows, k, n_cols, NARROW, T), 0)
                bad &= reduce(top, 0) != 0
        if tl.max(bad.to(tl.int32), 0) != 0:
            out = tl.where(bad, _scaled_segment_norms(anchor, rows, start, end, n_cols, BLOCK_ROWS, Q, NARROW), out)
    return out


@triton.jit
def _scaled_segment_norms(
    anchor, rows, start, end, n_cols, BLOCK_ROWS: tl.constexpr, Q: tl.constexpr, BLOCK_D: tl.constexpr
):
    """`_segment_norms` in float64, its squares scaled by a power of two."""
    if Q == 2:
        top = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.int64)
        for k in range(start, end, BLOCK_D):
            top = accumulate(top, _differences(anchor, rows, k, n_cols, BLOCK_D, tl.float64), 0)
        e = exponent(reduce(top, 0))
        acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float64)
        for k in range(start, end, BLOCK_D):
            d = shift(_differences(anchor, rows, k, n_cols, BLOCK_D, tl.float64), -e[:, None])
            acc = accumulate(acc, d, 2)
        return -shift(tl.sqrt(reduce(acc, 2)), e)
    else:
        acc = start_lanes(tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float64), Q)
        for k in range(start, end, BLOCK_D):
            acc = accumulate(acc, _differences(anchor, rows, k, n_cols, BLOCK_D, tl.float64), Q)
        return reduce(acc, Q)


@launching.kernel
def row_distances_partials_kernel(
    anchor_ptr,
    stride_anchor_b,
    stride_anchor_n,
    index_ptr,  # the anchor of example b is row index[b]; None: the anchors are [B, D]
    rows_ptr,
    stride_rows_b,
    stride_rows_n,
    partials_ptr,  # float64 [B, n, S]
    n_rows,
    n_cols,
    n_segments,
    n_row_blocks,
    Q: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Encoded norms of anchor − row, one program for one segment of BLOCK_ROWS rows."""
    pid = tl.program_id(0)
    s = (pid % n_segments).to(tl.int64)
    b = (pid // n_segments // n_row_blocks).to(tl.int64)
    row = (pid // n_segments % n_row_blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    anchor = anchor_ptr + b * stride_anchor_b
    needed = row < n_rows
    if index_ptr is not None:
        i = tl.load(index_ptr + b)
        anchor += i * stride_anchor_n
        needed &= row != i  # the anchor's distance to itself is not used
    rows = rows_ptr + b * stride_rows_b + tl.minimum(row, n_rows - 1) * stride_rows_n
    out = _segment_norms(anchor, rows, needed, s * SEGMENT_SIZE, n_cols, BLOCK_ROWS, Q, BLOCK_D)
    tl.store(partials_ptr + (b * n_rows + row) * n_segments + s, out, mask=row < n_rows)


@launching.kernel
def row_distances_combine_kernel(
    partials_ptr, norms_ptr, n_norms, n_segments, Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Norms [n_norms] from partials [n_norms, S]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row < n_norms
    out = norms_ptr + row
    tl.store(out, combine_norms(partials_ptr + row * n_segments, n_segments, mask, BLOCK_N, Q, BLOCK_S), mask=mask)
