"""The device functions that several operators share: reductions, the norms of a row's segments, the choice of a class.

A segment's norm travels as a float64: for Q = 2 its sum of squares where that is safe, else minus the norm itself
(`partial_norm` decodes it).
"""

import triton
import triton.language as tl

INT64_MAX = tl.constexpr(2**63 - 1)
INT64_MIN = tl.constexpr(-(2**63))


@triton.jit
def entries(ptr, start, n_cols, BLOCK_D: tl.constexpr, T: tl.constexpr = tl.float64):
    """[1, BLOCK_D] in the type T from column `start` on; 0 behind the last column."""
    cols = start + tl.arange(0, BLOCK_D)
    return tl.load(ptr + cols, mask=cols < n_cols, other=0.0).to(T)[None, :]


@triton.jit
def row_entries(rows, start, n_cols, BLOCK_D: tl.constexpr, T: tl.constexpr):
    """[R, BLOCK_D] in the type T of the rows at the pointers `rows` [R], from column `start` on; 0 behind the last column."""
    cols = start + tl.arange(0, BLOCK_D)
    return tl.load(rows[:, None] + cols[None, :], mask=(cols < n_cols)[None, :], other=0.0).to(T)


@triton.jit
def magnitude_bits(v):
    """|v| as an integer that sorts as |v| does, NaN above infinity: a maximum that loses no NaN and needs no fmax."""
    if v.dtype == tl.float64:
        return v.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def exponent(v):
    """e with 2^e <= v < 2^(e+1) for float64 v >= 0; 0 for zero, NaN and infinity."""
    subnormal = v < 2.2250738585072014e-308
    bits = magnitude_bits(tl.where(subnormal, v * 18014398509481984.0, v))  # 2^54
    e = (bits >> 52) - 1023 - tl.where(subnormal, 54, 0)
    return tl.where((v > 0) & (v < float("inf")), e, 0)


@triton.jit
def shift(v, e):
    """v · 2^e in three exact steps, since 2^e itself may lie outside the range of float64."""
    e = tl.minimum(tl.maximum(e, -3000), 3000)
    third = (e * 21846) >> 16
    step = ((third + 1023) << 52).to(tl.float64, bitcast=True)
    last = ((e - 2 * third + 1023) << 52).to(tl.float64, bitcast=True)
    return v * step * step * last


@triton.jit
def tree_sum(v):
    """Float64 sum of [R, N] along N, neighbours first: tl.sum's order would follow the layout, that is the alignment."""
    for _ in tl.static_range(12):
        if v.shape[1] > 1:
            if v.shape[1] <= 128:
                v = v.to(tl.float64)
            v = tl.sum(tl.reshape(v, [v.shape[0], v.shape[1] // 2, 2]), 2)
    return tl.reshape(v, [v.shape[0]]).to(tl.float64)


@triton.jit
def start_lanes(zeros, Q: tl.constexpr):
    """What `accumulate` starts from."""
    return magnitude_bits(zeros) if Q == 0 else zeros


@triton.jit
def accumulate(acc, d, Q: tl.constexpr):
    """The lanes after the entries d: of squares (Q = 2), of absolute values (1), or the largest entry's bits (0)."""
    if Q == 2:
        return tl.fma(d, d, acc)
    elif Q == 1:
        return acc + tl.abs(d)
    else:
        return tl.maximum(acc, magnitude_bits(d))


@triton.jit
def reduce(acc, Q: tl.constexpr):
    """Lanes [R, N] to float64 [R]: the sum of squares, the sum or the maximum."""
    if Q == 0:
        top = tl.max(acc, 1)
        if top.dtype == tl.int64:
            return top.to(tl.float64, bitcast=True)
        else:
            return top.to(tl.float32, bitcast=True).to(tl.float64)
    else:
        return tree_sum(acc)


@triton.jit
def root(v, Q: tl.constexpr):
    """The norm from what `reduce` gives."""
    return tl.sqrt(v) if Q == 2 else v


@triton.jit
def underflow_limit(count, T: tl.constexpr):
    """Below it, a sum of `count` squares or products may be wrong: each that underflows loses 2^-150, in float64 2^-1075."""
    return count.to(tl.float64) * (7.9e-31 if T == tl.float32 else 9.4e-302)


@triton.jit
def partial_norm(v, Q: tl.constexpr):
    """A segment's norm, decoded."""
    return tl.where(v < 0, -v, tl.sqrt(tl.abs(v))) if Q == 2 else tl.abs(v)


@triton.jit
def combine_norms(partials, n_segments, row_mask, BLOCK_N: tl.constexpr, Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """Norms [BLOCK_N] of rows whose partials start at the pointers `partials` [BLOCK_N], `n_segments` each."""
    block = tl.arange(0, BLOCK_S)
    top = tl.zeros([BLOCK_N, BLOCK_S], tl.int64)
    acc = tl.zeros([BLOCK_N, BLOCK_S], tl.float64)
    for s in range(0, n_segments, BLOCK_S):
        mask = row_mask[:, None] & (s + block < n_segments)[None, :]
        v = partial_norm(tl.load(partials[:, None] + (s + block)[None, :], mask=mask, other=0.0), Q)
        if Q == 1:
            acc += v
        else:
            top = tl.maximum(top, magnitude_bits(v))
    if Q == 1:
        return reduce(acc, 1)
    largest = reduce(top, 0)
    if Q == 0:
        return largest
    e = exponent(largest)
    for s in range(0, n_segments, BLOCK_S):
        mask = row_mask[:, None] & (s + block < n_segments)[None, :]
        v = partial_norm(tl.load(partials[:, None] + (s + block)[None, :], mask=mask, other=0.0), Q)
        acc = accumulate(acc, shift(v, -e[:, None]), 2)
    return shift(tl.sqrt(reduce(acc, 2)), e)


@triton.jit
def margin_ratio(margin, norm):
    """margin / norm with 0/0 = 0: a tie is on the boundary already, whatever the gradients."""
    return tl.where((margin == 0) & (norm == 0), 0.0, margin / norm)


@triton.jit
def sort_key(v):
    """An integer that sorts as the float64 v does, NaN first."""
    bits = tl.where(v == 0, 0.0, v).to(tl.int64, bitcast=True)  # −0 equals 0
    return tl.where(v != v, INT64_MIN, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))


@triton.jit
def from_sort_key(key):
    """The float64 that `sort_key` made into an integer."""
    return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def no_candidate():
    """What `nearest` starts from."""
    return tl.full([], INT64_MAX, tl.int64), tl.full([], INT64_MAX, tl.int64), tl.full([], 0, tl.int64)


@triton.jit
def nearest(best, tiebreak, where, ratio, margin, index, mask):
    """The best (ratio, tiebreak, index) after the candidates at `index` [N]: the margin breaks ties of ratios that are +inf."""
    keys = tl.where(mask, sort_key(ratio), INT64_MAX)
    key = tl.min(keys, 0)
    tiebreaks = tl.where(keys == key, tl.where(ratio == float("inf"), sort_key(margin), 0), INT64_MAX)
    least = tl.min(tiebreaks, 0)
    first = tl.min(tl.where((keys == key) & (tiebreaks == least), index, INT64_MAX), 0)
    better = (key < best) | ((key == best) & (least < tiebreak))
    return tl.where(better, key, best), tl.where(better, least, tiebreak), tl.where(better, first, where)
