"""margin_geometry: the distances of all rows to the winner's, the runner-up, and the scalars of these two rows.

Either one program takes a whole example, while its rows are in the caches, or three launches spread every example: the norms of
row_distances, then the sums of the two rows, then the gap between their directions. A last kernel makes the scalars.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastsal.tensor.backends.triton_ops import launching, row_distances
from fastsal.tensor.backends.triton_ops.row_distances import segment_norms
from fastsal.tensor.backends.triton_ops.shared import (
    accumulate,
    entries,
    exponent,
    magnitude_bits,
    margin_ratio,
    nearest,
    no_candidate,
    partial_norm,
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
N_SUMS = tl.constexpr(8)  # of a segment of the two winning rows, in the order of `_store_sums`


def _whole_examples(jacobian: Tensor) -> bool:
    """Whether one program takes a whole example, which saves a second trip to memory for the winning rows."""
    n_examples, n_rows, n_cols = jacobian.shape
    _, processors = launching.device(jacobian.device)
    enough = n_rows * n_cols <= 1 << 15 or n_examples >= 8 * processors
    return n_cols <= row_distances.SEGMENT_SIZE.value and enough


def launch(logits: Tensor, jacobian: Tensor, x: Tensor, outputs: tuple[Tensor, Tensor, Tensor], q: int) -> None:
    """Fills the outputs: scalars [len(SCALARS), B], indices (prediction, runner_up) [2, B] and distances [B, n]."""
    scalars, indices, distances = outputs
    n_examples, n_rows, n_cols = jacobian.shape
    norm_codes = {"Q": q, "P": {2: 2, 1: 0, 0: 1}[q]}
    sizes = n_rows, n_cols, n_examples
    rows_arguments = jacobian, *jacobian.stride()[:2]
    inputs = logits, *rows_arguments, x, x.stride(0)
    segment_size = max(row_distances.SEGMENT_SIZE.value, triton.cdiv(triton.cdiv(n_cols, MAX_SEGMENTS), 512) * 512)
    segments = triton.cdiv(n_cols, segment_size)
    sizes_of_scratch = n_examples * n_rows, n_examples * segments * N_SUMS.value, n_examples * segments
    norms, sums, gaps = launching.scratch(jacobian, *sizes_of_scratch)
    block_n = launching.block_size(n_rows, 16, 1024)
    block_d = launching.block_size(n_cols, 128, 512)
    block_s = launching.block_size(segments, 1, MAX_SEGMENTS)
    torch.argmax(logits, 1, out=indices[0])
    if _whole_examples(jacobian):
        block = row_distances.WHOLE_EXAMPLE
        launching.launch(
            margin_geometry_example_kernel,
            n_examples,
            *inputs,
            norms,
            sums,
            gaps,
            indices,
            distances,
            *sizes,
            warps=block.warps,
            **norm_codes,
            BLOCK_ROWS=block.rows,
            BLOCK_D=row_distances.lanes(jacobian),
            BLOCK_N=block_n,
            TWO_ROWS_BLOCK_D=block_d,
        )
    else:
        row_distances.launch(jacobian, jacobian, norms, q, indices)
        launching.launch(
            margin_geometry_sums_kernel,
            n_examples * segments,
            *inputs,
            norms,
            sums,
            indices,
            distances,
            *sizes,
            segments,
            segment_size,
            **norm_codes,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
        launching.launch(
            margin_geometry_gap_kernel,
            n_examples * segments,
            *rows_arguments,
            sums,
            gaps,
            indices,
            n_cols,
            n_examples,
            segments,
            segment_size,
            Q=q,
            BLOCK_S=block_s,
            BLOCK_D=block_d,
        )
    block_b = 256 // block_s
    launching.launch(
        margin_geometry_finish_kernel,
        triton.cdiv(n_examples, block_b),
        logits,
        sums,
        gaps,
        indices,
        scalars,
        n_rows,
        n_examples,
        segments,
        **norm_codes,
        BLOCK_B=block_b,
        BLOCK_S=block_s,
    )


# ---- the choice of the runner-up -------------------------------------------------------------------------------------------


@triton.jit
def _select(
    logits, norms, i, n_rows, distances, n_stored, Q: tl.constexpr, ENCODED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The runner-up of one example from its logits [n] and norms [n]; stores the first `n_stored` distances."""
    top = tl.load(logits + i).to(tl.float64)
    best, side, runner_up = no_candidate()
    for start in range(0, n_rows, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = (j < n_rows) & (j != i)
        margin = top - tl.load(logits + j, mask=mask, other=0.0).to(tl.float64)
        norm = tl.load(norms + j, mask=mask, other=0.0)
        ratio = margin_ratio(margin, partial_norm(norm, Q) if ENCODED else norm)
        out = tl.where(j == i, float("inf"), ratio)
        tl.store(distances + j, out.to(distances.dtype.element_ty), mask=j < n_stored)
        best, side, runner_up = nearest(best, side, runner_up, ratio, margin, j, mask)
    return runner_up


# ---- the sums of the two winning rows --------------------------------------------------------------------------------------


@triton.jit
def _segment_exponent(top):
    """The exponent of a segment from the bits of its entries: `NO_EXPONENT` for zeros."""
    largest = reduce(top, 0)
    return tl.where(largest == 0, NO_EXPONENT, exponent(largest))


@triton.jit
def _store_sums(
    sums_ptr, winner_ptr, other_ptr, x_ptr, start, end, n_cols, Q: tl.constexpr, P: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One segment of the two rows: exponents of x, g, g†, then the norms ‖x‖_p, ‖g‖, ‖g†‖ and ⟨x,g⟩, ⟨x,g†⟩, all scaled."""
    one = tl.arange(0, 1)
    SCALED: tl.constexpr = winner_ptr.dtype.element_ty == tl.float64  # the others cannot leave the range of float64
    e_x = tl.zeros([1], tl.int64)
    e_g = tl.zeros([1], tl.int64)
    e_d = tl.zeros([1], tl.int64)
    if SCALED:
        top_x = tl.zeros([1, BLOCK_D], tl.int64)
        top_g = tl.zeros([1, BLOCK_D], tl.int64)
        top_d = tl.zeros([1, BLOCK_D], tl.int64)
        for k in range(start, end, BLOCK_D):
            g = entries(winner_ptr, k, n_cols, BLOCK_D)
            top_x = accumulate(top_x, entries(x_ptr, k, n_cols, BLOCK_D), 0)
            top_g = accumulate(top_g, g, 0)
            top_d = accumulate(top_d, g - entries(other_ptr, k, n_cols, BLOCK_D), 0)
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
        g = entries(winner_ptr, k, n_cols, BLOCK_D)
        d = g - entries(other_ptr, k, n_cols, BLOCK_D)
        x = entries(x_ptr, k, n_cols, BLOCK_D)
        if SCALED:
            g = shift(g, -e_g[:, None])
            d = shift(d, -e_d[:, None])
            x = shift(x, -e_x[:, None])
        norm_x = accumulate(norm_x, x, P)
        norm_g = accumulate(norm_g, g, Q)
        norm_d = accumulate(norm_d, d, Q)
        dot_g = tl.fma(x, g, dot_g)
        dot_d = tl.fma(x, d, dot_d)
    tl.store(sums_ptr + one, e_x.to(tl.float64))
    tl.store(sums_ptr + 1 + one, e_g.to(tl.float64))
    tl.store(sums_ptr + 2 + one, e_d.to(tl.float64))
    tl.store(sums_ptr + 3 + one, root(reduce(norm_x, P), P))
    tl.store(sums_ptr + 4 + one, root(reduce(norm_g, Q), Q))
    tl.store(sums_ptr + 5 + one, root(reduce(norm_d, Q), Q))
    tl.store(sums_ptr + 6 + one, tree_sum(dot_g))
    tl.store(sums_ptr + 7 + one, tree_sum(dot_d))


@triton.jit
def _joined_exponent(sums, mask, which: tl.constexpr):
    """Exponents of the segments [B, S] and of the whole row [B], which is 0 for zeros."""
    e = tl.load(sums + which, mask=mask, other=NO_EXPONENT).to(tl.int64)
    whole = tl.max(e, 1)
    return e, tl.where(whole == NO_EXPONENT, 0, whole)


@triton.jit
def _joined_norm(sums, mask, which: tl.constexpr, e, whole, Q: tl.constexpr):
    """Norms of the whole rows [B], scaled by their exponents `whole` [B], from their segments' norms and exponents e."""
    v = shift(tl.load(sums + which, mask=mask, other=0.0), e - whole[:, None])
    if Q == 2:
        v *= v
    return root(reduce(magnitude_bits(v) if Q == 0 else v, Q), Q)


@triton.jit
def _two_norms(sums_ptr, n_segments, Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """Exponent and scaled norm of g, then of g†, [1] each."""
    segment = tl.arange(0, BLOCK_S)
    sums = sums_ptr + segment[None, :] * N_SUMS
    mask = (segment < n_segments)[None, :]
    e, e_g = _joined_exponent(sums, mask, 1)
    norm_g = _joined_norm(sums, mask, 4, e, e_g, Q)
    e, e_d = _joined_exponent(sums, mask, 2)
    norm_d = _joined_norm(sums, mask, 5, e, e_d, Q)
    return e_g, norm_g, e_d, norm_d


@triton.jit
def _store_gap(
    gap_ptr, winner_ptr, other_ptr, start, end, n_cols, e_g, norm_g, e_d, norm_d, Q: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One segment of ‖g†/‖g†‖ − g/‖g‖‖, from the exponents and scaled norms [1] of the two rows."""
    acc = start_lanes(tl.zeros([1, BLOCK_D], tl.float64), Q)
    for k in range(start, end, BLOCK_D):
        g = entries(winner_ptr, k, n_cols, BLOCK_D)
        d = g - entries(other_ptr, k, n_cols, BLOCK_D)
        if winner_ptr.dtype.element_ty == tl.float64:
            g = shift(g, -e_g[:, None])
            d = shift(d, -e_d[:, None])
        acc = accumulate(acc, d * (1.0 / norm_d)[:, None] - g * (1.0 / norm_g)[:, None], Q)
    tl.store(gap_ptr + tl.arange(0, 1), root(reduce(acc, Q), Q))


@launching.kernel
def margin_geometry_example_kernel(
    logits_ptr,
    jacobian_ptr,
    stride_jacobian_b,
    stride_jacobian_n,
    x_ptr,
    stride_x_b,
    norms_ptr,
    sums_ptr,
    gaps_ptr,
    indices_ptr,
    distances_ptr,
    n_rows,
    n_cols,
    n_examples,
    Q: tl.constexpr,
    P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TWO_ROWS_BLOCK_D: tl.constexpr,
):
    """One example of a single segment from first to last, while its rows are in the caches."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.load(indices_ptr + b)
    jacobian = jacobian_ptr + b * stride_jacobian_b
    for start in range(0, n_rows, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        rows = jacobian + tl.minimum(row, n_rows - 1) * stride_jacobian_n
        winner = jacobian + i * stride_jacobian_n
        out = segment_norms(winner, rows, (row < n_rows) & (row != i), 0, n_cols, BLOCK_ROWS, Q, BLOCK_D)
        tl.store(norms_ptr + b * n_rows + row, out, mask=row < n_rows)
    tl.debug_barrier()  # the norms are read back by other threads of this program
    at = b * n_rows
    j = _select(logits_ptr + at, norms_ptr + at, i, n_rows, distances_ptr + at, n_rows, Q, True, BLOCK_N)
    tl.store(indices_ptr + n_examples + b, j)
    winner = jacobian + i * stride_jacobian_n
    other = jacobian + j * stride_jacobian_n
    x = x_ptr + b * stride_x_b
    sums = sums_ptr + b * N_SUMS
    _store_sums(sums, winner, other, x, 0, n_cols, n_cols, Q, P, TWO_ROWS_BLOCK_D)
    tl.debug_barrier()
    e_g, norm_g, e_d, norm_d = _two_norms(sums, 1, Q, 1)
    _store_gap(gaps_ptr + b, winner, other, 0, n_cols, n_cols, e_g, norm_g, e_d, norm_d, Q, TWO_ROWS_BLOCK_D)


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
    """Selects the runner-up and sums one segment of the two rows; the first segment's program stores the selection."""
    pid = tl.program_id(0)
    s = (pid % n_segments).to(tl.int64)
    b = (pid // n_segments).to(tl.int64)
    i = tl.load(indices_ptr + b)
    n_stored = tl.where(s == 0, n_rows, 0)
    at = b * n_rows
    j = _select(logits_ptr + at, norms_ptr + at, i, n_rows, distances_ptr + at, n_stored, Q, False, BLOCK_N)
    tl.store(indices_ptr + n_examples + b, j, mask=s == 0)
    winner = jacobian_ptr + b * stride_jacobian_b + i * stride_jacobian_n
    other = jacobian_ptr + b * stride_jacobian_b + j * stride_jacobian_n
    start = s * segment_size
    end = tl.minimum(start + segment_size, n_cols)
    sums = sums_ptr + (b * n_segments + s) * N_SUMS
    _store_sums(sums, winner, other, x_ptr + b * stride_x_b, start, end, n_cols, Q, P, BLOCK_D)


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
    """One segment of the direction gap."""
    pid = tl.program_id(0)
    s = (pid % n_segments).to(tl.int64)
    b = (pid // n_segments).to(tl.int64)
    jacobian = jacobian_ptr + b * stride_jacobian_b
    winner = jacobian + tl.load(indices_ptr + b) * stride_jacobian_n
    other = jacobian + tl.load(indices_ptr + n_examples + b) * stride_jacobian_n
    e_g, norm_g, e_d, norm_d = _two_norms(sums_ptr + b * n_segments * N_SUMS, n_segments, Q, BLOCK_S)
    start = s * segment_size
    end = tl.minimum(start + segment_size, n_cols)
    _store_gap(gaps_ptr + b * n_segments + s, winner, other, start, end, n_cols, e_g, norm_g, e_d, norm_d, Q, BLOCK_D)


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
    segment = tl.arange(0, BLOCK_S)
    mask = example_mask[:, None] & (segment < n_segments)[None, :]
    sums = sums_ptr + (b[:, None] * n_segments + segment[None, :]) * N_SUMS
    segments_x, e_x = _joined_exponent(sums, mask, 0)
    segments_g, e_g = _joined_exponent(sums, mask, 1)
    segments_d, e_d = _joined_exponent(sums, mask, 2)
    norm_x = _joined_norm(sums, mask, 3, segments_x, e_x, P)
    norm_g = _joined_norm(sums, mask, 4, segments_g, e_g, Q)
    norm_d = _joined_norm(sums, mask, 5, segments_d, e_d, Q)
    e_dot = segments_x + segments_g - (e_x + e_g)[:, None]
    dot_g = tree_sum(shift(tl.load(sums + 6, mask=mask, other=0.0), e_dot))
    e_dot = segments_x + segments_d - (e_x + e_d)[:, None]
    dot_d = tree_sum(shift(tl.load(sums + 7, mask=mask, other=0.0), e_dot))
    gap = tl.load(gaps_ptr + b[:, None] * n_segments + segment[None, :], mask=mask, other=0.0)
    if Q == 2:
        gap *= gap
    gap = root(reduce(magnitude_bits(gap) if Q == 0 else gap, Q), Q)

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
    )
    out = scalars_ptr + b
    for k in tl.static_range(N_SCALARS):
        tl.store(out, values[k].to(scalars_ptr.dtype.element_ty), mask=example_mask)
        out += n_examples
