"""margin_geometry: the distances of all rows to the winner's, the runner-up, and the scalars of these two rows.

Four steps: the norms of row_distances, the sums of the two winning rows, the gap between their directions, and the scalars. All
but the last are spread over the segments of every example.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsal.tensor.backends.triton_ops import launching, row_distances
from fastsal.tensor.backends.triton_ops.shared import (
    accumulate,
    entries,
    exponent,
    magnitude_bits,
    margin_ratio,
    nearest,
    no_candidate,
    reduce,
    root,
    shift,
    start_lanes,
    tree_sum,
)
from fastsal.tensor.reference import SCALARS

MAX_SEGMENTS = 256  # of the two winning rows
NO_EXPONENT = tl.constexpr(-100000)  # the exponent of a vector of zeros: below that of any other
N_SCALARS = tl.constexpr(len(SCALARS))
N_SUMS = tl.constexpr(8)  # of a segment of the two winning rows, in the order of margin_geometry_sums_kernel


def launch(logits: Tensor, jacobian: Tensor, x: Tensor, outputs: tuple[Tensor, Tensor, Tensor], q: int) -> None:
    """Fills the outputs: scalars [len(SCALARS), B], indices (prediction, runner_up) [2, B] and distances [B, n]."""
    scalars, indices, distances = outputs
    n_examples, n_rows, n_cols = jacobian.shape
    p = {2: 2, 1: 0, 0: 1}[q]
    rows_arguments = jacobian, *jacobian.stride()[:2]
    segment_size = max(row_distances.SEGMENT_SIZE.value, triton.cdiv(triton.cdiv(n_cols, MAX_SEGMENTS), 512) * 512)
    segments = triton.cdiv(n_cols, segment_size)
    sizes_of_scratch = n_examples * n_rows, n_examples * segments * N_SUMS.value, n_examples * segments
    norms, sums, gaps = launching.scratch(jacobian, *sizes_of_scratch)
    block_d = launching.block_size(n_cols, 128, 512)
    block_s = launching.block_size(segments, 1, MAX_SEGMENTS)
    torch.argmax(logits, 1, out=indices[0])
    row_distances.launch(jacobian, jacobian, norms, q, indices)
    launching.launch(
        margin_geometry_sums_kernel,
        n_examples * segments,
        *(logits, *rows_arguments, x, x.stride(0), norms, sums, indices, distances),
        *(n_rows, n_cols, n_examples, segments, segment_size),
        Q=q,
        P=p,
        BLOCK_N=launching.block_size(n_rows, 16, 1024),
        BLOCK_D=block_d,
    )
    launching.launch(
        margin_geometry_gap_kernel,
        n_examples * segments,
        *(*rows_arguments, sums, gaps, indices),
        *(n_cols, n_examples, segments, segment_size),
        Q=q,
        BLOCK_S=block_s,
        BLOCK_D=block_d,
    )
    block_b = 256 // block_s
    launching.launch(
        margin_geometry_finish_kernel,
        triton.cdiv(n_examples, block_b),
        *(logits, sums, gaps, indices, scalars),
        *(n_rows, n_examples, segments),
        Q=q,
        P=p,
        BLOCK_B=block_b,
        BLOCK_S=block_s,
    )


# ---- the choice of the runner-up -------------------------------------------------------------------------------------------


@triton.jit
def _select(logits, norms, i, n_rows, distances, n_stored, BLOCK_N: tl.constexpr):
    """The runner-up of one example from its logits [n] and norms [n]; stores the first `n_stored` distances."""
    score = tl.load(logits + i).to(tl.float64)
    best, tiebreak, runner_up = no_candidate()
    for start in range(0, n_rows, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (j < n_rows) & (j != i)
        margin = score - tl.load(logits + j, mask=mask, other=0.0).to(tl.float64)
        ratio = margin_ratio(margin, tl.load(norms + j, mask=mask, other=0.0))
        out = tl.where(j == i, float("inf"), ratio)
        tl.store(distances + j, out.to(distances.dtype.element_ty), mask=j < n_stored)
        best, tiebreak, runner_up = nearest(best, tiebreak, runner_up, ratio, margin, j, mask)
    return runner_up


# ---- the sums of the two winning rows --------------------------------------------------------------------------------------


@triton.jit
def _segment_exponent(top):
    """The exponent of a segment from the bits of its entries: `NO_EXPONENT` for zeros."""
    largest = reduce(top, 0)
    return tl.where(largest == 0, NO_EXPONENT, exponent(largest))


@triton.jit
def _segment(n_segments, segment_size, n_cols):
    """This program's example and segment, and where the segment starts and ends."""
    pid = tl.program_id(0)
    s = (pid % n_segments).to(tl.int64)
    start = s * segment_size
    return (pid // n_segments).to(tl.int64), s, start, tl.minimum(start + segment_size, n_cols)


@triton.jit
def _norm(v, Q: tl.constexpr):
    """Norms [B] from those of their segments, float64 [B, S]."""
    if Q == 2:
        v *= v
    return root(reduce(magnitude_bits(v) if Q == 0 else v, Q), Q)


@triton.jit
def _joined(sums, mask, which: tl.constexpr, Q: tl.constexpr):
    """Exponents of the segments [B, S] of x, g or g† (0, 1 or 2); of the whole vector [B], 0 for zeros; its scaled norm [B]."""
    e = tl.load(sums + which, mask=mask, other=NO_EXPONENT).to(tl.int64)
    largest = tl.max(e, 1)
    largest = tl.where(largest == NO_EXPONENT, 0, largest)
    norm = tl.load(sums + 3 + which, mask=mask, other=0.0)
    return e, largest, _norm(shift(norm, e - largest[:, None]), Q)


@launching.kernel
def margin_geometry_sums_kernel(
    logits_ptr,
    jacobian_ptr,
    stride_jacobian_b,
    stride_jacobian_n,
    x_ptr,
    stride_x_b,
    norms_ptr,
    sums_ptr,
    indices_ptr,
    distances_ptr,
    n_rows,
    n_cols,
    n_examples,
    n_segments,
    segment_size,
    Q: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Selects the runner-up and sums one segment of the two rows; the first segment's program stores the selection.

    The sums are the exponents of x, g, g†, then the norms ‖x‖_p, ‖g‖, ‖g†‖ and ⟨x,g⟩, ⟨x,g†⟩, all scaled.
    """
    b, s, start, end = _segment(n_segments, segment_size, n_cols)
    i = tl.load(indices_ptr + b)
    n_stored = tl.where(s == 0, n_rows, 0)
    at = b * n_rows
    j = _select(logits_ptr + at, norms_ptr + at, i, n_rows, distances_ptr + at, n_stored, BLOCK_N)
    tl.store(indices_ptr + n_examples + b, j, mask=s == 0)
    winner = jacobian_ptr + b * stride_jacobian_b + i * stride_jacobian_n
    other = jacobian_ptr + b * stride_jacobian_b + j * stride_jacobian_n
    x_row = x_ptr + b * stride_x_b
    sums = sums_ptr + (b * n_segments + s) * N_SUMS
    one = tl.arange(0, 1)
    SCALED: tl.constexpr = jacobian_ptr.dtype.element_ty == tl.float64  # the others cannot leave the range of float64
    e_x = tl.zeros([1], tl.int64)
    e_g = tl.zeros([1], tl.int64)
    e_d = tl.zeros([1], tl.int64)
    if SCALED:
        top_x = tl.zeros([1, BLOCK_D], tl.int64)
        top_g = tl.zeros([1, BLOCK_D], tl.int64)
        top_d = tl.zeros([1, BLOCK_D], tl.int64)
        for k in range(start, end, BLOCK_D):
            g = entries(winner, k, n_cols, BLOCK_D)
            top_x = accumulate(top_x, entries(x_row, k, n_cols, BLOCK_D), 0)
            top_g = accumulate(top_g, g, 0)
            top_d = accumulate(top_d, g - entries(other, k, n_cols, BLOCK_D), 0)
        e_x = _segment_exponent(top_x)
        e_g = _segment_exponent(top_g)
        e_d = _segment_exponent(top_d)
    zeros = tl.zeros([1, BLOCK_D], tl.float64)
    norm_x = start_lanes(zeros, P)
    norm_g = start_lanes(zeros, Q)
    norm_d = start_lanes(zeros, Q)
    dot_g = zeros
    dot_d = zeros
    for k in range(start, end, BLOCK_D):
        g = entries(winner, k, n_cols, BLOCK_D)
        d = g - entries(other, k, n_cols, BLOCK_D)
        x = entries(x_row, k, n_cols, BLOCK_D)
        if SCALED:
            g = shift(g, -e_g[:, None])
            d = shift(d, -e_d[:, None])
            x = shift(x, -e_x[:, None])
        norm_x = accumulate(norm_x, x, P)
        norm_g = accumulate(norm_g, g, Q)
        norm_d = accumulate(norm_d, d, Q)
        dot_g = tl.fma(x, g, dot_g)
        dot_d = tl.fma(x, d, dot_d)
    tl.store(sums + one, e_x.to(tl.float64))
    tl.store(sums + 1 + one, e_g.to(tl.float64))
    tl.store(sums + 2 + one, e_d.to(tl.float64))
    tl.store(sums + 3 + one, root(reduce(norm_x, P), P))
    tl.store(sums + 4 + one, root(reduce(norm_g, Q), Q))
    tl.store(sums + 5 + one, root(reduce(norm_d, Q), Q))
    tl.store(sums + 6 + one, tree_sum(dot_g))
    tl.store(sums + 7 + one, tree_sum(dot_d))


@launching.kernel
def margin_geometry_gap_kernel(
    jacobian_ptr,
    stride_jacobian_b,
    stride_jacobian_n,
    sums_ptr,
    gaps_ptr,
    indices_ptr,
    n_cols,
    n_examples,
    n_segments,
    segment_size,
    Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One segment of the direction gap ‖g†/‖g†‖ − g/‖g‖‖."""
    b, s, start, end = _segment(n_segments, segment_size, n_cols)
    jacobian = jacobian_ptr + b * stride_jacobian_b
    winner = jacobian + tl.load(indices_ptr + b) * stride_jacobian_n
    other = jacobian + tl.load(indices_ptr + n_examples + b) * stride_jacobian_n
    segment = tl.arange(0, BLOCK_S)[None, :]
    sums = sums_ptr + (b * n_segments + segment) * N_SUMS
    _, e_g, norm_g = _joined(sums, segment < n_segments, 1, Q)
    _, e_d, norm_d = _joined(sums, segment < n_segments, 2, Q)
    acc = start_lanes(tl.zeros([1, BLOCK_D], tl.float64), Q)
    for k in range(start, end, BLOCK_D):
        g = entries(winner, k, n_cols, BLOCK_D)
        d = g - entries(other, k, n_cols, BLOCK_D)
        if jacobian_ptr.dtype.element_ty == tl.float64:
            g = shift(g, -e_g[:, None])
            d = shift(d, -e_d[:, None])
        acc = accumulate(acc, d * (1.0 / norm_d)[:, None] - g * (1.0 / norm_g)[:, None], Q)
    tl.store(gaps_ptr + b * n_segments + s + tl.arange(0, 1), root(reduce(acc, Q), Q))


# ---- the scalars -----------------------------------------------------------------------------------------------------------


@triton.jit
def _row_scalars(score, dot, norm, e_x, e_v):
    """|⟨x,v⟩|/‖v‖, β = score − ⟨x,v⟩, |β|/‖v‖ and the homogeneity for a row v, from its scaled dot product and norm."""
    e = tl.maximum(exponent(tl.abs(score)), e_x + e_v)
    dot_e = shift(dot, e_x + e_v - e)
    beta = shift(score, -e) - dot_e
    homogeneity = tl.abs(dot_e) / (tl.abs(dot_e) + tl.abs(beta))
    return shift(tl.abs(dot) / norm, e_x), shift(beta, e), shift(tl.abs(beta) / norm, e - e_v), homogeneity


@launching.kernel
def margin_geometry_finish_kernel(
    logits_ptr,
    sums_ptr,
    gaps_ptr,
    indices_ptr,
    scalars_ptr,
    n_rows,
    n_examples,
    n_segments,
    Q: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """The scalars of BLOCK_B examples from the segments' sums, in the order of SCALARS."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    example_mask = b < n_examples
    segment = b[:, None] * n_segments + tl.arange(0, BLOCK_S)[None, :]
    mask = example_mask[:, None] & (tl.arange(0, BLOCK_S) < n_segments)[None, :]
    sums = sums_ptr + segment * N_SUMS
    segments_x, e_x, norm_x = _joined(sums, mask, 0, P)
    segments_g, e_g, norm_g = _joined(sums, mask, 1, Q)
    segments_d, e_d, norm_d = _joined(sums, mask, 2, Q)
    e_dot = segments_x + segments_g - (e_x + e_g)[:, None]
    dot_g = tree_sum(shift(tl.load(sums + 6, mask=mask, other=0.0), e_dot))
    e_dot = segments_x + segments_d - (e_x + e_d)[:, None]
    dot_d = tree_sum(shift(tl.load(sums + 7, mask=mask, other=0.0), e_dot))
    gap = _norm(tl.load(gaps_ptr + segment, mask=mask, other=0.0), Q)

    logits = logits_ptr + b * n_rows
    winner = tl.load(indices_ptr + b, mask=example_mask, other=0)
    score = tl.load(logits + winner, mask=example_mask, other=0.0)
    runner_up = tl.load(indices_ptr + n_examples + b, mask=example_mask, other=0)
    other = tl.load(logits + runner_up, mask=example_mask, other=0.0)
    score = score.to(tl.float64)
    margin = score - other.to(tl.float64)
    alignment, offset, _, homogeneity = _row_scalars(score, dot_g, norm_g, e_x, e_g)
    alignment_dag, offset_dag, residual, homogeneity_dag = _row_scalars(margin, dot_d, norm_d, e_x, e_d)
    robustness = margin_ratio(margin, shift(norm_d, e_d))
    bound = alignment + shift(norm_x * gap, e_x) + residual
    values = (
        robustness,
        alignment,
        margin,
        alignment_dag,
        offset,
        offset_dag,
        gap,
        bound,
        homogeneity,
        homogeneity_dag,
        tl.abs(dot_g) / norm_g / norm_x,
    )
    out = scalars_ptr + b
    for k in tl.static_range(N_SCALARS):
        tl.store(out, values[k].to(scalars_ptr.dtype.element_ty), mask=example_mask)
        out += n_examples
