"""pairwise_margins: the differences of all pairs of rows, a segment at a time, then what follows from their norms."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsal.tensor.backends.triton_ops import launching
from fastsal.tensor.backends.triton_ops.shared import (
    accumulate,
    combine_norms,
    entries,
    exponent,
    from_sort_key,
    magnitude_bits,
    margin_ratio,
    nearest,
    no_candidate,
    partial_norm,
    reduce,
    root,
    row_entries,
    shift,
    start_lanes,
    tree_sum,
    underflow_limit,
)

SEGMENT_SIZE = 8192


def launch(logits: Tensor, jacobian: Tensor, x: Tensor | None, outputs: tuple[Tensor, ...], q: int) -> None:
    """Fills the outputs: distance, margin [B, n, n], nearest_margin, nearest [B, n] and, with x, projection [B, n, n]."""
    *tables, projection = outputs
    n_examples, n_rows, n_cols = jacobian.shape
    segments = triton.cdiv(n_cols, SEGMENT_SIZE)
    n_partials = n_examples * n_rows * (n_rows - 1) // 2 * segments
    norms, projections = launching.scratch(jacobian, n_partials, 0 if x is None else n_partials)
    wide = jacobian.dtype == torch.float64
    block_rows = 8 if wide else 16
    row_blocks = triton.cdiv(n_rows, block_rows)
    block_s = launching.block_size(segments, 1, 64)
    launching.launch(
        pairwise_margins_partials_kernel,
        n_examples * row_blocks * row_blocks * segments,
        *(jacobian, *jacobian.stride()[:2], x, 0 if x is None else x.stride(0)),
        *(norms, None if x is None else projections),
        *(n_rows, n_cols, segments, row_blocks, SEGMENT_SIZE),
        warps=4 if wide else 8,
        Q=q,
        BLOCK_ROWS=block_rows,
        BLOCK_D=32 if x is not None or wide else 64,
        SCALED_BLOCK_D=4,
    )
    launching.launch(
        pairwise_margins_finish_kernel,
        n_examples * n_rows,
        *(logits, norms, None if x is None else projections, *tables, None if x is None else projection),
        *(n_rows, segments),
        Q=q,
        BLOCK_N=launching.block_size(n_rows, 16, max(16, 256 // block_s)),
        BLOCK_S=block_s,
    )


@triton.jit
def _pair_differences(rows_i, rows_j, start, n_cols, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """g_i − g_j [I, J, BLOCK_D] in the type T, from column `start` on."""
    return (
        row_entries(rows_i, start, n_cols, BLOCK_D, T)[:, None, :]
        - row_entries(rows_j, start, n_cols, BLOCK_D, T)[None, :, :]
    )


@triton.jit
def _reduce_pairs(lanes, Q: tl.constexpr):
    """Lanes [I, J, K] to float64 [I, J], as `reduce` does for [R, K]."""
    flat = tl.reshape(lanes, [lanes.shape[0] * lanes.shape[1], lanes.shape[2]])
    return tl.reshape(reduce(flat, Q), [lanes.shape[0], lanes.shape[1]])


@triton.jit
def _any(mask):
    """Whether one of [I, J] is true."""
    return tl.max(tl.max(mask.to(tl.int32), 1), 0) != 0


@triton.jit
def _nonzero_pairs(
    rows_i, rows_j, x, start, end, n_cols, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, T: tl.constexpr
):
    """Which pairs differ in a segment, and which do where x is not 0 [BLOCK_ROWS, BLOCK_ROWS]."""
    differ = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.int32)
    differ_at_x = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.int32)
    for k in range(start, end, BLOCK_D):
        d = _pair_differences(rows_i, rows_j, k, n_cols, BLOCK_D, T) != 0
        differ |= tl.max(d.to(tl.int32), 2)
        if x is not None:
            d &= (entries(x, k, n_cols, BLOCK_D) != 0)[:, None, :]
            differ_at_x |= tl.max(d.to(tl.int32), 2)
    return differ != 0, differ_at_x != 0


@triton.jit
def _scaled_pairs(
    rows_i, rows_j, x, start, end, n_cols, Q: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Norm and projection [BLOCK_ROWS, BLOCK_ROWS] of a segment in float64; differences and x each scaled into range."""
    top = tl.zeros([BLOCK_ROWS, BLOCK_ROWS, BLOCK_D], tl.int64)
    top_x = tl.zeros([1, BLOCK_D], tl.int64)
    for k in range(start, end, BLOCK_D):
        top = accumulate(top, _pair_differences(rows_i, rows_j, k, n_cols, BLOCK_D, tl.float64), 0)
        if x is not None:
            top_x = accumulate(top_x, entries(x, k, n_cols, BLOCK_D), 0)
    largest = _reduce_pairs(top, 0)
    e_d = exponent(largest)
    e_x = exponent(reduce(top_x, 0))
    norms = tl.zeros([BLOCK_ROWS, BLOCK_ROWS, BLOCK_D], tl.float64)
    dots = tl.zeros([BLOCK_ROWS, BLOCK_ROWS, BLOCK_D], tl.float64)
    for k in range(start, end, BLOCK_D):
        d = shift(_pair_differences(rows_i, rows_j, k, n_cols, BLOCK_D, tl.float64), -e_d[:, :, None])
        if Q != 0:
            norms = accumulate(norms, d, Q)
        if x is not None:
            x_row = shift(entries(x, k, n_cols, BLOCK_D), -e_x[:, None])
            dots = tl.fma(d, x_row[:, None, :], dots)
    norm = shift(largest, -e_d) if Q == 0 else root(_reduce_pairs(norms, Q), Q)
    dot = _reduce_pairs(dots, 1)
    return shift(norm, e_d), shift(tl.where(norm == 0, dot, dot / norm), e_x[:, None])


@launching.kernel
def pairwise_margins_partials_kernel(
    jacobian_ptr,
    stride_jacobian_b,
    stride_jacobian_n,
    x_ptr,  # None: no projections
    stride_x_b,
    norms_ptr,  # encoded, float64 [B, n(n-1)/2, S]; the pair (i, j), i < j, is at j(j-1)/2 + i
    projections_ptr,  # likewise: ⟨x, g_i − g_j⟩ / ‖g_i − g_j‖, both of the segment only
    n_rows,
    n_cols,
    n_segments,
    n_row_blocks,
    segment_size,
    Q: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALED_BLOCK_D: tl.constexpr,
):
    """One segment of the differences of BLOCK_ROWS x BLOCK_ROWS pairs. BLOCK_D lanes a pair, flushed after 32 additions."""
    pid = tl.program_id(0)
    s = (pid % n_segments).to(tl.int64)
    block_i = pid // n_segments % n_row_blocks
    block_j = pid // n_segments // n_row_blocks % n_row_blocks
    b = (pid // n_segments // n_row_blocks // n_row_blocks).to(tl.int64)
    if block_i > block_j:
        return
    DTYPE: tl.constexpr = jacobian_ptr.dtype.element_ty
    T: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    i = block_i.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    j = block_j.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    rows_i = jacobian_ptr + b * stride_jacobian_b + tl.minimum(i, n_rows - 1) * stride_jacobian_n
    rows_j = jacobian_ptr + b * stride_jacobian_b + tl.minimum(j, n_rows - 1) * stride_jacobian_n
    needed = (i[:, None] < j[None, :]) & (j < n_rows)[None, :]
    x = x_ptr + b * stride_x_b if x_ptr is not None else None
    start = s * segment_size
    end = tl.minimum(start + segment_size, n_cols)
    norm = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float64)
    dot = tl.zeros([BLOCK_ROWS, BLOCK_ROWS], tl.float64)
    for flush in range(start, end, 32 * BLOCK_D):
        norms = start_lanes(tl.zeros([BLOCK_ROWS, BLOCK_ROWS, BLOCK_D], T), Q)
        dots = tl.zeros([BLOCK_ROWS, BLOCK_ROWS, BLOCK_D], T)
        for k in range(flush, tl.minimum(flush + 32 * BLOCK_D, end), BLOCK_D):
            d = _pair_differences(rows_i, rows_j, k, n_cols, BLOCK_D, T)
            norms = accumulate(norms, d, Q)
            if x_ptr is not None:
                dots = tl.fma(d, entries(x, k, n_cols, BLOCK_D, T)[:, None, :], dots)
        flushed = _reduce_pairs(norms, Q)
        if Q == 0:
            norm = tl.maximum(magnitude_bits(norm), magnitude_bits(flushed)).to(tl.float64, bitcast=True)
        else:
            norm += flushed
        if x_ptr is not None:
            dot += _reduce_pairs(dots, 1)
    tiny = underflow_limit(end - start, T)
    bad_norm = ((norm < float("inf")) == 0) & needed
    bad_dot = ((tl.abs(dot) < float("inf")) == 0) & needed
    if Q == 2:
        bad_norm |= (norm < tiny) & needed
    if x_ptr is not None:
        bad_dot |= (tl.abs(dot) < tiny) & needed
    # Sums of 0, as padded tokens and masked regions make, are exact unless a term underflowed.
    if (Q == 2 or x_ptr is not None) and _any((bad_norm & (norm == 0)) | (bad_dot & (dot == 0))):
        differ, differ_at_x = _nonzero_pairs(rows_i, rows_j, x, start, end, n_cols, BLOCK_ROWS, BLOCK_D, T)
        bad_norm &= differ
        bad_dot &= differ_at_x
    bad = bad_norm | bad_dot
    norm = root(norm, Q)
    dot = tl.where(norm == 0, dot, dot / norm)
    if _any(bad):
        scaled, projection = _scaled_pairs(rows_i, rows_j, x, start, end, n_cols, Q, BLOCK_ROWS, SCALED_BLOCK_D)
        norm = tl.where(bad, scaled, norm)
        dot = tl.where(bad, projection, dot)
    pair = b * n_rows * (n_rows - 1) // 2 + j[None, :] * (j[None, :] - 1) // 2 + i[:, None]
    tl.store(norms_ptr + pair * n_segments + s, -norm if Q == 2 else norm, mask=needed)
    if x_ptr is not None:
        tl.store(projections_ptr + pair * n_segments + s, dot, mask=needed)


@launching.kernel
def pairwise_margins_finish_kernel(
    logits_ptr,
    norms_ptr,
    projections_ptr,
    distance_ptr,
    margin_ptr,
    nearest_margin_ptr,
    nearest_ptr,
    projection_ptr,  # None: no projections
    n_rows,
    n_segments,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Row i of the [n, n] outputs of one example, from the segments of its pairs, and its nearest class."""
    pid = tl.program_id(0)
    b = (pid // n_rows).to(tl.int64)
    i = (pid % n_rows).to(tl.int64)
    OUT: tl.constexpr = distance_ptr.dtype.element_ty
    score = tl.load(logits_ptr + b * n_rows + i).to(tl.float64)
    best, tiebreak, where = no_candidate()
    block = tl.arange(0, BLOCK_S)
    for start in range(0, n_rows, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        row_mask = (j < n_rows) & (j != i)
        high = tl.maximum(i, j)
        pair = b * n_rows * (n_rows - 1) // 2 + high * (high - 1) // 2 + tl.minimum(i, j)
        norm = combine_norms(norms_ptr + pair * n_segments, n_segments, row_mask, BLOCK_N, Q, BLOCK_S)
        margin = score - tl.load(logits_ptr + b * n_rows + j, mask=row_mask, other=0.0).to(tl.float64)
        ratio = tl.where(j == i, float("inf"), margin_ratio(margin, norm))
        out = (b * n_rows + i) * n_rows + j
        tl.store(distance_ptr + out, norm.to(OUT), mask=j < n_rows)
        tl.store(margin_ptr + out, ratio.to(OUT), mask=j < n_rows)
        best, tiebreak, where = nearest(best, tiebreak, where, ratio, margin, j, row_mask)
        if projection_ptr is not None:
            acc = tl.zeros([BLOCK_N, BLOCK_S], tl.float64)
            for s in range(0, n_segments, BLOCK_S):
                partial = pair[:, None] * n_segments + (s + block)[None, :]
                mask = row_mask[:, None] & (s + block < n_segments)[None, :]
                weight = partial_norm(tl.load(norms_ptr + partial, mask=mask, other=0.0), Q) / norm[:, None]
                acc += tl.where(mask, tl.load(projections_ptr + partial, mask=mask, other=0.0) * weight, 0.0)
            projection = tree_sum(acc)
            projection = tl.where(j == i, float("nan"), tl.where(j < i, -projection, projection))
            tl.store(projection_ptr + out, projection.to(OUT), mask=j < n_rows)
    tl.store(nearest_margin_ptr + b * n_rows + i, from_sort_key(best).to(OUT))
    tl.store(nearest_ptr + b * n_rows + i, where)
