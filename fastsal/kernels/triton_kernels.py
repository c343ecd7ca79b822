"""Device code of the `triton` backend; triton.py launches it.

A reduction over D has one tree, which depends on D, the dtype and the norm alone: `SEGMENT`-wide pieces, in each of them
`BLOCK` lanes that take every BLOCK-th entry, then `_tree_sum`. Who computes a piece (a program for a few class rows, or one for
a whole example) changes no bit. Norm codes Q are the q of the norm, 0 for infinity. Program ids become int64 before they
multiply a stride.

A piece's norm travels as float64: its sum of squares where that is safe, else minus the norm itself (`_piece_norm` decodes it).
"""

import triton
import triton.language as tl

SEGMENT = tl.constexpr(4096)
INT64_MAX = tl.constexpr(2**63 - 1)
INT64_MIN = tl.constexpr(-(2**63))
NOTHING = tl.constexpr(-100000)  # the exponent of a vector of zeros: below that of any other


@triton.jit
def _bits(v):
    """|v| as an integer that sorts as |v| does, NaN above infinity: a maximum that loses no NaN and needs no fmax."""
    if v.dtype == tl.float64:
        return v.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _exponent(v):
    """e with 2^e <= v < 2^(e+1) for float64 v >= 0; 0 for zero, NaN and infinity."""
    subnormal = v < 2.2250738585072014e-308
    bits = _bits(tl.where(subnormal, v * 18014398509481984.0, v))  # 2^54
    e = (bits >> 52) - 1023 - tl.where(subnormal, 54, 0)
    return tl.where((v > 0) & (v < float("inf")), e, 0)


@triton.jit
def _shift(v, e):
    """v · 2^e in three exact steps, since 2^e itself may lie outside the range of float64."""
    e = tl.minimum(tl.maximum(e, -3000), 3000)
    third = (e * 21846) >> 16
    step = ((third + 1023) << 52).to(tl.float64, bitcast=True)
    last = ((e - 2 * third + 1023) << 52).to(tl.float64, bitcast=True)
    return v * step * step * last


@triton.jit
def _tree_sum(v):
    """Float64 sum of [R, N] along N, neighbours first: tl.sum's order would follow the layout, that is the alignment."""
    for _ in tl.static_range(12):
        if v.shape[1] > 1:
            if v.shape[1] <= 128:
                v = v.to(tl.float64)
            v = tl.sum(tl.reshape(v, [v.shape[0], v.shape[1] // 2, 2]), 2)
    return tl.reshape(v, [v.shape[0]]).to(tl.float64)


@triton.jit
def _lanes(zeros, Q: tl.constexpr):
    """What `_accumulate` starts from."""
    return _bits(zeros) if Q == 0 else zeros


@triton.jit
def _accumulate(acc, d, Q: tl.constexpr):
    if Q == 2:
        return tl.fma(d, d, acc)
    elif Q == 1:
        return acc + tl.abs(d)
    else:
        return tl.maximum(acc, _bits(d))


@triton.jit
def _reduce(acc, Q: tl.constexpr):
    """Lanes [R, N] to float64 [R]: the sum of squares, the sum or the maximum."""
    if Q == 0:
        top = tl.max(acc, 1)
        if top.dtype == tl.int64:
            return top.to(tl.float64, bitcast=True)
        else:
            return top.to(tl.float32, bitcast=True).to(tl.float64)
    else:
        return _tree_sum(acc)


@triton.jit
def _root(v, Q: tl.constexpr):
    return tl.sqrt(v) if Q == 2 else v


@triton.jit
def _piece_norm(v, Q: tl.constexpr):
    return tl.where(v < 0, -v, tl.sqrt(tl.abs(v))) if Q == 2 else tl.abs(v)


# ---- the distance of rows to an anchor -------------------------------------------------------------------------------------


@triton.jit
def _difference(anchor, rows, start, D, BLOCK: tl.constexpr, T: tl.constexpr):
    """anchor − rows [R, BLOCK] from column `start` on; 0 behind column D."""
    cols = start + tl.arange(0, BLOCK)
    live = cols < D
    a = tl.load(anchor + cols, mask=live, other=0.0).to(T)
    r = tl.load(rows[:, None] + cols[None, :], mask=live[None, :], other=0.0).to(T)
    return a[None, :] - r


@triton.jit
def _piece(anchor, rows, care, start, D, R: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr):
    """‖anchor − row‖ of the piece that starts at `start`, encoded, for R rows; right only where `care` is true."""
    DTYPE: tl.constexpr = anchor.dtype.element_ty
    T: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    end = tl.minimum(start + SEGMENT, D)
    acc = _lanes(tl.zeros([R, BLOCK], T), Q)
    for k in range(start, end, BLOCK):
        acc = _accumulate(acc, _difference(anchor, rows, k, D, BLOCK, T), Q)
    out = _reduce(acc, Q)
    # Differences of float16 never leave the range of float32, and float64 needs a scale for its squares only.
    if (DTYPE != tl.float16) and (DTYPE != tl.float64 or Q == 2):
        bad = (out < float("inf")) == 0
        if Q == 2:
            # Squares that underflow lose 2^-150 each (2^-1075 in float64).
            bad |= out < (end - start).to(tl.float64) * (7.9e-31 if T == tl.float32 else 9.4e-302)
        if tl.max((bad & care).to(tl.int32), 0) != 0:
            out = tl.where(bad, _scaled_piece(anchor, rows, start, end, D, R, Q, BLOCK if BLOCK < 256 else 256), out)
    return out


@triton.jit
def _scaled_piece(anchor, rows, start, end, D, R: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr):
    """`_piece` in float64, its squares scaled by a power of two."""
    if Q == 2:
        top = tl.zeros([R, BLOCK], tl.int64)
        for k in range(start, end, BLOCK):
            top = _accumulate(top, _difference(anchor, rows, k, D, BLOCK, tl.float64), 0)
        e = _exponent(_reduce(top, 0))
        acc = tl.zeros([R, BLOCK], tl.float64)
        for k in range(start, end, BLOCK):
            d = _shift(_difference(anchor, rows, k, D, BLOCK, tl.float64), -e[:, None])
            acc = _accumulate(acc, d, 2)
        return -_shift(tl.sqrt(_reduce(acc, 2)), e)
    else:
        acc = _lanes(tl.zeros([R, BLOCK], tl.float64), Q)
        for k in range(start, end, BLOCK):
            acc = _accumulate(acc, _difference(anchor, rows, k, D, BLOCK, tl.float64), Q)
        return _reduce(acc, Q)


@triton.jit
def _combine(pieces, count, live, N: tl.constexpr, Q: tl.constexpr, PIECES: tl.constexpr):
    """Norms [N] from the pieces that start at the pointers `pieces` [N], `count` each."""
    lanes = tl.arange(0, PIECES)
    top = tl.zeros([N, PIECES], tl.int64)
    acc = tl.zeros([N, PIECES], tl.float64)
    for s in range(0, count, PIECES):
        mask = live[:, None] & (s + lanes < count)[None, :]
        v = _piece_norm(tl.load(pieces[:, None] + (s + lanes)[None, :], mask=mask, other=0.0), Q)
        if Q == 1:
            acc += v
        else:
            top = tl.maximum(top, _bits(v))
    if Q == 1:
        return _reduce(acc, 1)
    largest = _reduce(top, 0)
    if Q == 0:
        return largest
    e = _exponent(largest)
    for s in range(0, count, PIECES):
        mask = live[:, None] & (s + lanes < count)[None, :]
        v = _piece_norm(tl.load(pieces[:, None] + (s + lanes)[None, :], mask=mask, other=0.0), Q)
        acc = _accumulate(acc, _shift(v, -e[:, None]), 2)
    return _shift(tl.sqrt(_reduce(acc, 2)), e)


@triton.jit
def distance_kernel(
    anchor_ptr,
    stride_anchor_b,
    stride_anchor_n,
    index_ptr,  # the anchor of example b is row index[b]; None: the anchors are [B, D]
    rows_ptr,
    stride_b,
    stride_n,
    pieces_ptr,  # float64 [B, n, S]
    n,
    D,
    S,
    groups,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Encoded norms of anchor − row, one program for one piece of ROWS rows."""
    pid = tl.program_id(0)
    s = (pid % S).to(tl.int64)
    b = (pid // S // groups).to(tl.int64)
    row = (pid // S % groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    anchor = anchor_ptr + b * stride_anchor_b
    care = row < n
    if index_ptr is not None:
        i = tl.load(index_ptr + b)
        anchor += i * stride_anchor_n
        care &= row != i  # the distance of the anchor to itself is not used, and its zeros would cost a scaled piece
    rows = rows_ptr + b * stride_b + tl.minimum(row, n - 1) * stride_n
    out = _piece(anchor, rows, care, s * SEGMENT, D, ROWS, Q, BLOCK)
    tl.store(pieces_ptr + (b * n + row) * S + s, out, mask=row < n)


@triton.jit
def combine_kernel(pieces_ptr, norms_ptr, total, S, Q: tl.constexpr, BLOCK_N: tl.constexpr, PIECES: tl.constexpr):
    """Norms [total] from pieces [total, S]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = row < total
    tl.store(norms_ptr + row, _combine(pieces_ptr + row * S, S, live, BLOCK_N, Q, PIECES), mask=live)


# ---- the choice of the runner-up -------------------------------------------------------------------------------------------


@triton.jit
def _ratio(margin, norm):
    return tl.where((margin == 0) & (norm == 0), 0.0, margin / norm)


@triton.jit
def _key(v):
    """An integer that sorts as the float64 v does, NaN first."""
    bits = tl.where(v == 0, 0.0, v).to(tl.int64, bitcast=True)  # −0 equals 0
    return tl.where(v != v, INT64_MIN, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))


@triton.jit
def _value(key):
    return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).to(tl.float64, bitcast=True)


@triton.jit
def _nearest(best, side, where, ratio, margin, index, live):
    """The best of (ratio, margin among ratios of +inf, index) so far, after the candidates `ratio` [N] at `index` [N]."""
    keys = tl.where(live, _key(ratio), INT64_MAX)
    key = tl.min(keys, 0)
    sides = tl.where(keys == key, tl.where(ratio == float("inf"), _key(margin), 0), INT64_MAX)
    least = tl.min(sides, 0)
    first = tl.min(tl.where((keys == key) & (sides == least), index, INT64_MAX), 0)
    better = (key < best) | ((key == best) & (least < side))
    return tl.where(better, key, best), tl.where(better, least, side), tl.where(better, first, where)


@triton.jit
def _select(logits, norms, i, n, distances, stored, Q: tl.constexpr, ENCODED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The runner-up of one example from its logits [n] and norms [n]; stores the first `stored` distances."""
    top = tl.load(logits + i).to(tl.float64)
    best = tl.full([], INT64_MAX, tl.int64)
    side = tl.full([], INT64_MAX, tl.int64)
    runner_up = tl.full([], 0, tl.int64)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        live = (j < n) & (j != i)
        margin = top - tl.load(logits + j, mask=live, other=0.0).to(tl.float64)
        norm = tl.load(norms + j, mask=live, other=0.0)
        ratio = _ratio(margin, _piece_norm(norm, Q) if ENCODED else norm)
        out = tl.where(j == i, float("inf"), ratio)
        tl.store(distances + j, out.to(distances.dtype.element_ty), mask=j < stored)
        best, side, runner_up = _nearest(best, side, runner_up, ratio, margin, j, live)
    return runner_up


# ---- the scalars of the two winning rows -----------------------------------------------------------------------------------


@triton.jit
def _entries(ptr, start, D, BLOCK: tl.constexpr):
    """[1, BLOCK] in float64 from column `start` on; 0 behind column D."""
    cols = start + tl.arange(0, BLOCK)
    return tl.load(ptr + cols, mask=cols < D, other=0.0).to(tl.float64)[None, :]


@triton.jit
def _scale(top):
    """The exponent of a piece from the bits of its entries: `NOTHING` for zeros."""
    largest = _reduce(top, 0)
    return tl.where(largest == 0, NOTHING, _exponent(largest))


@triton.jit
def _sums(out_ptr, g_ptr, r_ptr, x_ptr, start, end, D, Q: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):
    """One piece of the two rows: exponents of x, g, g†, then the norms ‖x‖_p, ‖g‖, ‖g†‖ and ⟨x,g⟩, ⟨x,g†⟩, all scaled."""
    one = tl.arange(0, 1)
    SCALED: tl.constexpr = g_ptr.dtype.element_ty == tl.float64  # the others cannot leave the range of float64
    ex = tl.zeros([1], tl.int64)
    eg = tl.zeros([1], tl.int64)
    ed = tl.zeros([1], tl.int64)
    if SCALED:
        top_x = tl.zeros([1, BLOCK], tl.int64)
        top_g = tl.zeros([1, BLOCK], tl.int64)
        top_d = tl.zeros([1, BLOCK], tl.int64)
        for k in range(start, end, BLOCK):
            g = _entries(g_ptr, k, D, BLOCK)
            top_x = _accumulate(top_x, _entries(x_ptr, k, D, BLOCK), 0)
            top_g = _accumulate(top_g, g, 0)
            top_d = _accumulate(top_d, g - _entries(r_ptr, k, D, BLOCK), 0)
        ex = _scale(top_x)
        eg = _scale(top_g)
        ed = _scale(top_d)
    zeros = tl.zeros([1, BLOCK], tl.float64)
    norm_x = _lanes(zeros, P)
    norm_g = _lanes(zeros, Q)
    norm_d = _lanes(zeros, Q)
    dot_g = zeros
    dot_d = zeros
    for k in range(start, end, BLOCK):
        g = _entries(g_ptr, k, D, BLOCK)
        d = g - _entries(r_ptr, k, D, BLOCK)
        x = _entries(x_ptr, k, D, BLOCK)
        if SCALED:
            g = _shift(g, -eg[:, None])
            d = _shift(d, -ed[:, None])
            x = _shift(x, -ex[:, None])
        norm_x = _accumulate(norm_x, x, P)
        norm_g = _accumulate(norm_g, g, Q)
        norm_d = _accumulate(norm_d, d, Q)
        dot_g = tl.fma(x, g, dot_g)
        dot_d = tl.fma(x, d, dot_d)
    tl.store(out_ptr + one, ex.to(tl.float64))
    tl.store(out_ptr + 1 + one, eg.to(tl.float64))
    tl.store(out_ptr + 2 + one, ed.to(tl.float64))
    tl.store(out_ptr + 3 + one, _root(_reduce(norm_x, P), P))
    tl.store(out_ptr + 4 + one, _root(_reduce(norm_g, Q), Q))
    tl.store(out_ptr + 5 + one, _root(_reduce(norm_d, Q), Q))
    tl.store(out_ptr + 6 + one, _tree_sum(dot_g))
    tl.store(out_ptr + 7 + one, _tree_sum(dot_d))


@triton.jit
def _joined_exponent(sums, live, which: tl.constexpr):
    """Exponents of the pieces [B, S] and of the whole [B], which is 0 for zeros."""
    e = tl.load(sums + which, mask=live, other=NOTHING).to(tl.int64)
    whole = tl.max(e, 1)
    return e, tl.where(whole == NOTHING, 0, whole)


@triton.jit
def _joined_norm(sums, live, which: tl.constexpr, e, whole, Q: tl.constexpr):
    v = _shift(tl.load(sums + which, mask=live, other=0.0), e - whole[:, None])
    if Q == 2:
        v *= v
    return _root(_reduce(_bits(v) if Q == 0 else v, Q), Q)


@triton.jit
def _joined_dot(sums, live, which: tl.constexpr, shift):
    return _tree_sum(_shift(tl.load(sums + which, mask=live, other=0.0), shift))


@triton.jit
def _gap(out_ptr, g_ptr, r_ptr, start, end, D, eg, norm_g, ed, norm_d, Q: tl.constexpr, BLOCK: tl.constexpr):
    """One piece of ‖g†/‖g†‖ − g/‖g‖‖, from the exponents and scaled norms [1] of the two rows."""
    acc = _lanes(tl.zeros([1, BLOCK], tl.float64), Q)
    for k in range(start, end, BLOCK):
        g = _entries(g_ptr, k, D, BLOCK)
        d = g - _entries(r_ptr, k, D, BLOCK)
        if g_ptr.dtype.element_ty == tl.float64:
            g = _shift(g, -eg[:, None])
            d = _shift(d, -ed[:, None])
        acc = _accumulate(acc, d * (1.0 / norm_d)[:, None] - g * (1.0 / norm_g)[:, None], Q)
    tl.store(out_ptr + tl.arange(0, 1), _root(_reduce(acc, Q), Q))


@triton.jit
def example_kernel(
    logits_ptr,
    jacobian_ptr,
    stride_b,
    stride_n,
    x_ptr,
    stride_x,
    norms_ptr,
    sums_ptr,
    gaps_ptr,
    indices_ptr,
    distances_ptr,
    n,
    D,
    B,
    Q: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """One example of a single piece from first to last, while its rows are in the caches."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.load(indices_ptr + b)
    jacobian = jacobian_ptr + b * stride_b
    for start in range(0, n, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        rows = jacobian + tl.minimum(row, n - 1) * stride_n
        out = _piece(jacobian + i * stride_n, rows, (row < n) & (row != i), 0, D, ROWS, Q, BLOCK)
        tl.store(norms_ptr + b * n + row, out, mask=row < n)
    tl.debug_barrier()  # the norms are read back by other threads of this program
    j = _select(logits_ptr + b * n, norms_ptr + b * n, i, n, distances_ptr + b * n, n, Q, True, BLOCK_N)
    tl.store(indices_ptr + B + b, j)
    g_ptr = jacobian + i * stride_n
    r_ptr = jacobian + j * stride_n
    x_row = x_ptr + b * stride_x
    sums = sums_ptr + b * 8
    _sums(sums, g_ptr, r_ptr, x_row, 0, D, D, Q, P, BLOCK_2)
    tl.debug_barrier()
    eg, norm_g, ed, norm_d = _two_norms(sums, 1, Q, 1)
    _gap(gaps_ptr + b, g_ptr, r_ptr, 0, D, D, eg, norm_g, ed, norm_d, Q, BLOCK_2)


@triton.jit
def _two_norms(sums, S, Q: tl.constexpr, PIECES: tl.constexpr):
    """Exponent and scaled norm of g, then of g†, [1] each."""
    piece = tl.arange(0, PIECES)
    pieces = sums + piece[None, :] * 8
    live = (piece < S)[None, :]
    e, eg = _joined_exponent(pieces, live, 1)
    norm_g = _joined_norm(pieces, live, 4, e, eg, Q)
    e, ed = _joined_exponent(pieces, live, 2)
    norm_d = _joined_norm(pieces, live, 5, e, ed, Q)
    return eg, norm_g, ed, norm_d


@triton.jit
def sums_kernel(
    logits_ptr,
    jacobian_ptr,
    stride_b,
    stride_n,
    x_ptr,
    stride_x,
    norms_ptr,
    sums_ptr,
    indices_ptr,
    distances_ptr,
    n,
    D,
    B,
    S,
    segment,
    Q: tl.constexpr,
    P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """Selects the runner-up and sums one piece of the two rows; the program of the first piece stores the selection."""
    pid = tl.program_id(0)
    s = (pid % S).to(tl.int64)
    b = (pid // S).to(tl.int64)
    i = tl.load(indices_ptr + b)
    stored = tl.where(s == 0, n, 0)
    j = _select(logits_ptr + b * n, norms_ptr + b * n, i, n, distances_ptr + b * n, stored, Q, False, BLOCK_N)
    tl.store(indices_ptr + B + b, j, mask=s == 0)
    g_ptr = jacobian_ptr + b * stride_b + i * stride_n
    r_ptr = jacobian_ptr + b * stride_b + j * stride_n
    start = s * segment
    end = tl.minimum(start + segment, D)
    _sums(sums_ptr + (b * S + s) * 8, g_ptr, r_ptr, x_ptr + b * stride_x, start, end, D, Q, P, BLOCK_2)


@triton.jit
def gap_kernel(
    jacobian_ptr,
    stride_b,
    stride_n,
    sums_ptr,
    gaps_ptr,
    indices_ptr,
    D,
    B,
    S,
    segment,
    Q: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_2: tl.constexpr,
):
    """One piece of the direction gap."""
    pid = tl.program_id(0)
    s = (pid % S).to(tl.int64)
    b = (pid // S).to(tl.int64)
    g_ptr = jacobian_ptr + b * stride_b + tl.load(indices_ptr + b) * stride_n
    r_ptr = jacobian_ptr + b * stride_b + tl.load(indices_ptr + B + b) * stride_n
    eg, norm_g, ed, norm_d = _two_norms(sums_ptr + b * S * 8, S, Q, PIECES)
    start = s * segment
    end = tl.minimum(start + segment, D)
    _gap(gaps_ptr + b * S + s, g_ptr, r_ptr, start, end, D, eg, norm_g, ed, norm_d, Q, BLOCK_2)


@triton.jit
def _parts(score, dot, norm, ex, ev):
    """|⟨x,v⟩|/‖v‖, β = score − ⟨x,v⟩, |β|/‖v‖ and the homogeneity for a row v, from its scaled dot product and norm."""
    e = tl.maximum(_exponent(tl.abs(score)), ex + ev)
    dot_e = _shift(dot, ex + ev - e)
    beta = _shift(score, -e) - dot_e
    homogeneity = tl.abs(dot_e) / (tl.abs(dot_e) + tl.abs(beta))
    return _shift(tl.abs(dot) / norm, ex), _shift(beta, e), _shift(tl.abs(beta) / norm, e - ev), homogeneity


@triton.jit
def finish_kernel(
    logits_ptr,
    sums_ptr,
    gaps_ptr,
    indices_ptr,
    scalars_ptr,
    n,
    B,
    S,
    Q: tl.constexpr,
    P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    PIECES: tl.constexpr,
):
    """The ten scalars of BLOCK_B examples from the pieces' sums."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    mine = b < B
    piece = tl.arange(0, PIECES)
    live = mine[:, None] & (piece < S)[None, :]
    pieces = sums_ptr + (b[:, None] * S + piece[None, :]) * 8
    px, ex = _joined_exponent(pieces, live, 0)
    pg, eg = _joined_exponent(pieces, live, 1)
    pd, ed = _joined_exponent(pieces, live, 2)
    norm_x = _joined_norm(pieces, live, 3, px, ex, P)
    norm_g = _joined_norm(pieces, live, 4, pg, eg, Q)
    norm_d = _joined_norm(pieces, live, 5, pd, ed, Q)
    dot_g = _joined_dot(pieces, live, 6, px + pg - (ex + eg)[:, None])
    dot_d = _joined_dot(pieces, live, 7, px + pd - (ex + ed)[:, None])
    gap = tl.load(gaps_ptr + b[:, None] * S + piece[None, :], mask=live, other=0.0)
    if Q == 2:
        gap *= gap
    gap = _root(_reduce(_bits(gap) if Q == 0 else gap, Q), Q)

    score = tl.load(logits_ptr + b * n + tl.load(indices_ptr + b, mask=mine, other=0), mask=mine, other=0.0)
    other = tl.load(logits_ptr + b * n + tl.load(indices_ptr + B + b, mask=mine, other=0), mask=mine, other=0.0)
    score = score.to(tl.float64)
    margin = score - other.to(tl.float64)
    alignment, offset, _, homogeneity = _parts(score, dot_g, norm_g, ex, eg)
    alignment_dag, offset_dag, residual, homogeneity_dag = _parts(margin, dot_d, norm_d, ex, ed)
    robustness = _ratio(margin, _shift(norm_d, ed))
    bound = alignment + _shift(norm_x * gap, ex) + residual
    out_ptr = scalars_ptr + b
    out_ptr = _put(out_ptr, robustness, mine, B)
    out_ptr = _put(out_ptr, alignment, mine, B)
    out_ptr = _put(out_ptr, margin, mine, B)
    out_ptr = _put(out_ptr, alignment_dag, mine, B)
    out_ptr = _put(out_ptr, offset, mine, B)
    out_ptr = _put(out_ptr, offset_dag, mine, B)
    out_ptr = _put(out_ptr, gap, mine, B)
    out_ptr = _put(out_ptr, bound, mine, B)
    out_ptr = _put(out_ptr, homogeneity, mine, B)
    _put(out_ptr, homogeneity_dag, mine, B)


@triton.jit
def _put(ptr, value, mask, step):
    tl.store(ptr, value.to(ptr.dtype.element_ty), mask=mask)
    return ptr + step


# ---- all pairs of rows -----------------------------------------------------------------------------------------------------


@triton.jit
def _tile(rows, start, D, BLOCK: tl.constexpr, T: tl.constexpr):
    """[R, BLOCK] of the rows from column `start` on; 0 behind column D."""
    cols = start + tl.arange(0, BLOCK)
    return tl.load(rows[:, None] + cols[None, :], mask=(cols < D)[None, :], other=0.0).to(T)


@triton.jit
def _pair_differences(rows_i, rows_j, start, D, BLOCK: tl.constexpr, T: tl.constexpr):
    return _tile(rows_i, start, D, BLOCK, T)[:, None, :] - _tile(rows_j, start, D, BLOCK, T)[None, :, :]


@triton.jit
def _flat(v):
    """[I, J, K] as [I·J, K]."""
    return tl.reshape(v, [v.shape[0] * v.shape[1], v.shape[2]])


@triton.jit
def _square(v, TILE: tl.constexpr):
    return tl.reshape(v, [TILE, TILE])


@triton.jit
def _scaled_pairs(rows_i, rows_j, x, start, end, D, Q: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Norm and projection [TILE, TILE] of a piece in float64, differences and x each scaled by a power of two."""
    top = tl.zeros([TILE, TILE, BLOCK], tl.int64)
    top_x = tl.zeros([1, BLOCK], tl.int64)
    for k in range(start, end, BLOCK):
        top = _accumulate(top, _pair_differences(rows_i, rows_j, k, D, BLOCK, tl.float64), 0)
        if x is not None:
            top_x = _accumulate(top_x, _entries(x, k, D, BLOCK), 0)
    largest = _square(_reduce(_flat(top), 0), TILE)
    e = _exponent(largest)
    ex = _exponent(_reduce(top_x, 0))
    acc = tl.zeros([TILE, TILE, BLOCK], tl.float64)
    lanes = tl.zeros([TILE, TILE, BLOCK], tl.float64)
    for k in range(start, end, BLOCK):
        d = _shift(_pair_differences(rows_i, rows_j, k, D, BLOCK, tl.float64), -e[:, :, None])
        if Q != 0:
            acc = _accumulate(acc, d, Q)
        if x is not None:
            lanes = tl.fma(d, _shift(_entries(x, k, D, BLOCK), -ex[:, None])[:, None, :] + tl.zeros_like(d), lanes)
    norm = _shift(largest, -e) if Q == 0 else _root(_square(_tree_sum(_flat(acc)), TILE), Q)
    dot = _square(_tree_sum(_flat(lanes)), TILE)
    return _shift(norm, e), _shift(tl.where(norm == 0, dot, dot / norm), ex[:, None])


@triton.jit
def pairs_kernel(
    jacobian_ptr,
    stride_b,
    stride_n,
    x_ptr,  # None: no projections
    stride_x,
    norms_ptr,  # encoded, float64 [B, n(n-1)/2, S]; the pair (i, j), i < j, is at j(j-1)/2 + i
    projections_ptr,  # likewise: ⟨x, g_i − g_j⟩ / ‖g_i − g_j‖, both of the piece only
    n,
    D,
    S,
    tiles,
    segment,
    Q: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALED_BLOCK: tl.constexpr,
):
    """One piece of the differences of TILE x TILE pairs of rows. BLOCK lanes a pair, flushed after 32 additions."""
    pid = tl.program_id(0)
    s = (pid % S).to(tl.int64)
    tile_i = pid // S % tiles
    tile_j = pid // S // tiles % tiles
    b = (pid // S // tiles // tiles).to(tl.int64)
    if tile_i > tile_j:
        return
    DTYPE: tl.constexpr = jacobian_ptr.dtype.element_ty
    T: tl.constexpr = tl.float64 if DTYPE == tl.float64 else tl.float32
    i = tile_i.to(tl.int64) * TILE + tl.arange(0, TILE)
    j = tile_j.to(tl.int64) * TILE + tl.arange(0, TILE)
    rows_i = jacobian_ptr + b * stride_b + tl.minimum(i, n - 1) * stride_n
    rows_j = jacobian_ptr + b * stride_b + tl.minimum(j, n - 1) * stride_n
    wanted = (i[:, None] < j[None, :]) & (j < n)[None, :]
    start = s * segment
    end = tl.minimum(start + segment, D)
    norm = tl.zeros([TILE, TILE], tl.float64)
    dot = tl.zeros([TILE, TILE], tl.float64)
    for flush in range(start, end, 32 * BLOCK):
        acc = _lanes(tl.zeros([TILE, TILE, BLOCK], T), Q)
        lanes = tl.zeros([TILE, TILE, BLOCK], T)
        for k in range(flush, tl.minimum(flush + 32 * BLOCK, end), BLOCK):
            d = _pair_differences(rows_i, rows_j, k, D, BLOCK, T)
            acc = _accumulate(acc, d, Q)
            if x_ptr is not None:
                cols = k + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + b * stride_x + cols, mask=cols < D, other=0.0).to(T)
                lanes = tl.fma(d, tl.broadcast_to(x[None, None, :], [TILE, TILE, BLOCK]), lanes)
        piece = _square(_reduce(_flat(acc), Q), TILE)
        norm = tl.maximum(_bits(norm), _bits(piece)).to(tl.float64, bitcast=True) if Q == 0 else norm + piece
        if x_ptr is not None:
            dot += _square(_tree_sum(_flat(lanes)), TILE)
    tiny = (end - start).to(tl.float64) * (7.9e-31 if T == tl.float32 else 9.4e-302)
    bad = (norm < float("inf")) == 0
    if Q == 2:
        bad |= norm < tiny
    if x_ptr is not None:
        bad |= ((tl.abs(dot) < float("inf")) == 0) | (tl.abs(dot) < tiny)
    norm = _root(norm, Q)
    dot = tl.where(norm == 0, dot, dot / norm)
    if tl.max(tl.max((bad & wanted).to(tl.int32), 1), 0) != 0:
        x = x_ptr + b * stride_x if x_ptr is not None else None
        scaled, projection = _scaled_pairs(rows_i, rows_j, x, start, end, D, Q, TILE, SCALED_BLOCK)
        norm = tl.where(bad, scaled, norm)
        dot = tl.where(bad, projection, dot)
    pair = b * n * (n - 1) // 2 + j[None, :] * (j[None, :] - 1) // 2 + i[:, None]
    tl.store(norms_ptr + pair * S + s, -norm if Q == 2 else norm, mask=wanted)
    if x_ptr is not None:
        tl.store(projections_ptr + pair * S + s, dot, mask=wanted)


@triton.jit
def pairs_finish_kernel(
    logits_ptr,
    norms_ptr,
    projections_ptr,
    distance_ptr,
    margin_ptr,
    nearest_margin_ptr,
    nearest_ptr,
    projection_ptr,  # None: no projections
    n,
    S,
    Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PIECES: tl.constexpr,
):
    """Row i of the [n, n] outputs of one example, from the pieces of its pairs, and its nearest class."""
    pid = tl.program_id(0)
    b = (pid // n).to(tl.int64)
    i = (pid % n).to(tl.int64)
    OUT: tl.constexpr = distance_ptr.dtype.element_ty
    score = tl.load(logits_ptr + b * n + i).to(tl.float64)
    best = tl.full([], INT64_MAX, tl.int64)
    side = tl.full([], INT64_MAX, tl.int64)
    where = tl.full([], 0, tl.int64)
    lanes = tl.arange(0, PIECES)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N).to(tl.int64)
        live = (j < n) & (j != i)
        high = tl.maximum(i, j)
        pair = b * n * (n - 1) // 2 + high * (high - 1) // 2 + tl.minimum(i, j)
        norm = _combine(norms_ptr + pair * S, S, live, BLOCK_N, Q, PIECES)
        margin = score - tl.load(logits_ptr + b * n + j, mask=live, other=0.0).to(tl.float64)
        ratio = tl.where(j == i, float("inf"), _ratio(margin, norm))
        out = (b * n + i) * n + j
        tl.store(distance_ptr + out, norm.to(OUT), mask=j < n)
        tl.store(margin_ptr + out, ratio.to(OUT), mask=j < n)
        best, side, where = _nearest(best, side, where, ratio, margin, j, live)
        if projection_ptr is not None:
            acc = tl.zeros([BLOCK_N, PIECES], tl.float64)
            for s in range(0, S, PIECES):
                piece = pair[:, None] * S + (s + lanes)[None, :]
                mask = live[:, None] & (s + lanes < S)[None, :]
                weight = _piece_norm(tl.load(norms_ptr + piece, mask=mask, other=0.0), Q) / norm[:, None]
                acc += tl.where(mask, tl.load(projections_ptr + piece, mask=mask, other=0.0) * weight, 0.0)
            projection = _tree_sum(acc)
            projection = tl.where(j == i, float("nan"), tl.where(j < i, -projection, projection))
            tl.store(projection_ptr + out, projection.to(OUT), mask=j < n)
    tl.store(nearest_margin_ptr + b * n + i, _value(best).to(OUT))
    tl.store(nearest_ptr + b * n + i, where)


@triton.jit
def top_kernel(jacobian_ptr, stride_b, stride_n, w_ptr, top_ptr, share_ptr, n, D, BLOCK: tl.constexpr):
    """max|g_i − g_j| of a pair, and w_ij over the number of entries that attain it: both float64 [B, n, n]."""
    pid = tl.program_id(0).to(tl.int64)
    i = pid // n % n
    j = pid % n
    row_i = jacobian_ptr + pid // n // n * stride_b + i * stride_n
    row_j = jacobian_ptr + pid // n // n * stride_b + j * stride_n
    top = tl.zeros([1, BLOCK], tl.int64)
    for k in range(0, D, BLOCK):
        top = _accumulate(top, _entries(row_i, k, D, BLOCK) - _entries(row_j, k, D, BLOCK), 0)
    largest = _reduce(top, 0)
    count = tl.zeros([1, BLOCK], tl.int64)
    for k in range(0, D, BLOCK):
        d = _entries(row_i, k, D, BLOCK) - _entries(row_j, k, D, BLOCK)
        live = (k + tl.arange(0, BLOCK) < D)[None, :]
        count += ((tl.abs(d) == largest[:, None]) & live).to(tl.int64)
    one = tl.arange(0, 1)
    tl.store(top_ptr + pid + one, largest)
    tl.store(share_ptr + pid + one, tl.load(w_ptr + pid + one) / tl.sum(count, 1).to(tl.float64))


@triton.jit
def _narrow(v, T: tl.constexpr):
    """float64 to T, by way of float32 as torch does it: not every target converts in one step."""
    return v if T == tl.float64 else v.to(tl.float32).to(T)


@triton.jit
def pairs_backward_kernel(
    w_ptr,  # float64 [B, n, n]; for Q = 0 the shares of top_kernel
    v_ptr,  # float64 [B, n, n] or None
    top_ptr,  # float64 [B, n, n] for Q = 0, else None
    jacobian_ptr,
    stride_b,
    stride_n,
    x_ptr,
    stride_x,
    grad_ptr,  # [B, n, D]
    n,
    D,
    blocks,
    tiles,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Σ_j w_ij φ(g_i − g_j) + Σ_j v_ij x for ROWS rows and BLOCK columns, in float64 as the weights are."""
    pid = tl.program_id(0)
    k = (pid % blocks).to(tl.int64) * BLOCK
    i = (pid // blocks % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    b = (pid // blocks // tiles).to(tl.int64)
    row = tl.minimum(i, n - 1)
    jacobian = jacobian_ptr + b * stride_b
    g = _tile(jacobian + row * stride_n, k, D, BLOCK, tl.float64)
    acc = tl.zeros([ROWS, BLOCK], tl.float64)
    total = tl.zeros([ROWS], tl.float64)
    for j in range(0, n):
        d = g - _entries(jacobian + tl.cast(j, tl.int64) * stride_n, k, D, BLOCK)
        at = (b * n + row) * n + j
        w = tl.load(w_ptr + at)[:, None]
        if Q == 2:
            acc = tl.fma(w + tl.zeros_like(d), d, acc)
        else:
            sign = tl.where(d > 0, w, tl.where(d < 0, -w, w * 0))
            if Q == 0:
                top = tl.load(top_ptr + at)[:, None]
                sign = tl.where(tl.abs(d) == top, sign, tl.where(top == top, w * 0, top))
            acc += sign
        if v_ptr is not None:
            total += tl.load(v_ptr + at)
    if v_ptr is not None:
        acc += total[:, None] * _entries(x_ptr + b * stride_x, k, D, BLOCK)
    cols = k + tl.arange(0, BLOCK)
    out = grad_ptr + ((b * n + i) * D)[:, None] + cols[None, :]
    tl.store(out, _narrow(acc, grad_ptr.dtype.element_ty), mask=(i < n)[:, None] & (cols < D)[None, :])


@triton.jit
def pairs_backward_x_kernel(
    v_ptr, jacobian_ptr, stride_b, stride_n, grad_ptr, n, D, blocks, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Σ_{i<j} v_ij (g_i − g_j) for BLOCK columns, in float64."""
    pid = tl.program_id(0)
    k = (pid % blocks).to(tl.int64) * BLOCK
    b = (pid // blocks).to(tl.int64)
    jacobian = jacobian_ptr + b * stride_b
    acc = tl.zeros([ROWS, BLOCK], tl.float64)
    for i in range(0, n):
        g = _entries(jacobian + tl.cast(i, tl.int64) * stride_n, k, D, BLOCK)
        for start in range(0, n, ROWS):
            j = start + tl.arange(0, ROWS).to(tl.int64)
            v = tl.load(v_ptr + (b * n + i) * n + j, mask=(j < n) & (j > i), other=0.0)[:, None]
            d = g - _tile(jacobian + tl.minimum(j, n - 1) * stride_n, k, D, BLOCK, tl.float64)
            acc = tl.fma(v + tl.zeros_like(d), d, acc)
    cols = k + tl.arange(0, BLOCK)
    total = _tree_sum(tl.trans(acc))
    tl.store(grad_ptr + b * D + cols, _narrow(total, grad_ptr.dtype.element_ty), mask=cols < D)
