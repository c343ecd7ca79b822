"""An example's results depend on its own logits, Jacobian and x alone: the same bits whatever surrounds them.

docs/design.md, "Determinism", asks it of one backend at one SIMD level, so that levels are compared with the truth, not with
each other.
"""

import ctypes
import itertools
import math
import mmap

import cases
import pytest
import torch
from cases import each_dtype, each_norm, each_target
from truth import long_double

import fastsal
from fastsal.tensor import ops
from fastsal.tensor.backends import cpu

OPS = pytest.mark.parametrize("call", [fastsal.margin_geometry, fastsal.pairwise_margins], ids=lambda f: f.__name__)
# 20,011 is more than one segment of a kernel's row; the reference takes its time there.
each_target_and_width = pytest.mark.parametrize(
    ("target", "D"),
    [
        pytest.param(*target.values, D, marks=target.marks, id=f"{target.id}-{D}")
        for target, D in itertools.product(cases.TARGETS, (5, 67, 1030, 20_011))
        if D < 20_000 or target in cases.KERNELS
    ],
)


def threads(count):
    return cases.switched(torch.get_num_threads, torch.set_num_threads, count)


def on(target, B, n, D, dtype, seed=0):
    return cases.inputs(B, n, D, dtype, seed, device=target.device)


def shifted(tensor, offset):
    """A copy of a tensor [..., D] whose data starts `offset` elements into its storage."""
    storage = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    view = storage[offset:].view(tensor.shape)
    return view.copy_(tensor)


@OPS
@each_target_and_width
@each_norm
@each_dtype
def test_batch_size_and_position(call, target, norm, dtype, D):
    inputs = on(target, 5, 6, D, dtype)
    together = call(*inputs, norm=norm, backend=target.backend)
    for b in (0, 3, 4):
        alone = call(*(v[b : b + 1] for v in inputs), norm=norm, backend=target.backend)
        cases.assert_same_results(together, alone, slice(b, b + 1), f"example {b} alone:")
    order = torch.tensor([4, 2, 0, 1, 3], device=target.device)
    permuted = call(*(v[order] for v in inputs), norm=norm, backend=target.backend)
    cases.assert_same_results(together, permuted, order, "permuted batch:")


@pytest.mark.parametrize("target", [target for target in cases.TARGETS if target not in cases.KERNELS])
def test_a_lone_long_row_of_the_reference(target):
    """torch shares a sum of more than 32,768 numbers out among threads if it is the only one."""
    inputs = on(target, 2, 2, 40_003, torch.float64)
    together = cases.margin_geometry(target, *inputs)
    alone = cases.margin_geometry(target, *(v[:1] for v in inputs))
    cases.assert_same_results(together, alone, slice(0, 1))


@each_target_and_width
@each_norm
@each_dtype
def test_class_order(target, norm, dtype, D):
    """A row's distance is its own: not that of its place among the classes, nor of how many there are."""
    logits, jacobian, x = on(target, 2, 9, D, dtype)
    whole = cases.margin_geometry(target, logits, jacobian, x, norm)
    order = torch.tensor([8, 3, 1, 7, 0, 2, 6, 4, 5], device=target.device)
    permuted = cases.margin_geometry(target, logits[:, order], jacobian[:, order], x, norm)
    cases.assert_same(permuted.distances, whole.distances[:, order])
    assert order[permuted.runner_up].tolist() == whole.runner_up.tolist()
    for name in ("linearized_robustness", "alignment", "offset", "binarized_offset", "bound"):
        cases.assert_same(getattr(permuted, name), getattr(whole, name), name)
    pairs = cases.pairwise_margins(target, logits, jacobian, x, norm)
    permuted = cases.pairwise_margins(target, logits[:, order], jacobian[:, order], x, norm)
    for name in ("distance", "margin", "alignment"):
        cases.assert_same(getattr(permuted, name), getattr(pairs, name)[:, order][:, :, order], name)


@each_target_and_width
@each_norm
@each_dtype
def test_identical_rows_have_identical_distances(target, norm, dtype, D):
    """Whichever position in a block of rows they take."""
    _, jacobian, _ = on(target, 2, 2, D, dtype)
    rows = jacobian[:, 1:].expand(2, 11, D)
    distances = ops.row_distances(jacobian[:, 0], rows, norm, target.backend)
    cases.assert_same(distances, distances[:, :1].expand(2, 11))


@each_target_and_width
@each_norm
@each_dtype
def test_class_chunks(target, norm, dtype, D):
    """The streaming path's chunks give the bits of the whole Jacobian, and of margin_geometry's distances."""
    logits, jacobian, x = on(target, 2, 9, D, dtype)
    anchor = jacobian[:, 4]
    with cases.poisoned():
        whole = ops.row_distances(anchor, jacobian, norm, target.backend)
        for size in (1, 2, 5):
            parts = [ops.row_distances(anchor, rows, norm, target.backend) for rows in jacobian.split(size, 1)]
            cases.assert_same(torch.cat(parts, 1), whole, f"chunks of {size}")
    assert (whole.shape, whole.dtype) == ((2, 9), torch.float64)
    logits[:, 4] = 10
    fused = cases.margin_geometry(target, logits, jacobian, x, norm).distances
    ratio = (logits[:, 4:5].double() - logits.double()) / whole
    others = [j for j in range(9) if j != 4]
    cases.assert_same(fused[:, others], ratio.to(fused.dtype)[:, others])


@each_target_and_width
@each_norm
@each_dtype
def test_pair_after_streaming_gives_the_same_scalars(target, norm, dtype, D):
    """margin_geometry of the two selected rows alone, which is how the streaming path ends."""
    logits, jacobian, x = on(target, 3, 7, D, dtype)
    whole = cases.margin_geometry(target, logits, jacobian, x, norm)
    winners = torch.stack((whole.prediction, whole.runner_up), 1)
    rows = jacobian.gather(1, winners.unsqueeze(2).expand(3, 2, D))
    pair = cases.margin_geometry(target, logits.gather(1, winners), rows, x, norm)
    for name in ("linearized_robustness", "alignment", "binarized_logit", "binarized_alignment", "offset", "bound"):
        cases.assert_same(getattr(pair, name), getattr(whole, name), name)
    for name in ("binarized_offset", "direction_gap", "homogeneity", "binarized_homogeneity"):
        cases.assert_same(getattr(pair, name), getattr(whole, name), name)


@OPS
@each_target_and_width
@each_norm
@each_dtype
def test_strides(call, target, norm, dtype, D):
    """[n, B, D] storage, padded rows, a reversed slice's gaps and stride 0: the bits of a contiguous copy."""
    logits, jacobian, x = on(target, 4, 6, D, dtype)
    expected = call(logits, jacobian, x, norm=norm, backend=target.backend)
    classes_first = jacobian.transpose(0, 1).contiguous().transpose(0, 1)
    padded = torch.full((4, 6, D + 3), torch.nan, dtype=dtype, device=target.device)
    padded[..., 1 : D + 1] = jacobian
    gaps = torch.full((8, 18, D), torch.nan, dtype=dtype, device=target.device)
    gaps[::2, ::3] = jacobian
    wide_x = torch.full((4, 2 * D), torch.nan, dtype=dtype, device=target.device)
    wide_x[:, D:] = x
    logits_t = logits.t().contiguous().t()
    for layout in (classes_first, padded[..., 1 : D + 1], gaps[::2, ::3]):
        cases.assert_same_results(
            call(logits_t, layout, wide_x[:, D:], norm=norm, backend=target.backend),
            expected,
            what=str(layout.stride()),
        )
    one = [v[:1] for v in (logits, jacobian, x)]
    repeated = call(*(v.expand(3, *v.shape[1:]) for v in one), norm=norm, backend=target.backend)
    single = call(*one, norm=norm, backend=target.backend)
    for b in range(3):
        cases.assert_same_results(repeated, single, slice(b, b + 1), "stride 0:")


@OPS
@each_target
@each_norm
@each_dtype
def test_alignment(call, target, norm, dtype):
    """Data that starts 1 to 15 elements past an aligned address, J and x each on its own."""
    logits, jacobian, x = on(target, 2, 5, 143, dtype)
    expected = call(logits, jacobian, x, norm=norm, backend=target.backend)
    for offset in range(1, 16):
        moved = call(logits, shifted(jacobian, offset), shifted(x, 15 - offset), norm=norm, backend=target.backend)
        cases.assert_same_results(moved, expected, what=f"offset {offset}:")


@OPS
@each_target
@each_norm
@each_dtype
@pytest.mark.parametrize(
    ("B", "n", "D"), [(1, 14, 20_011), (70, 4, 1030), (33, 5, 67)]
)  # two of them worth a second thread
def test_threads_and_runs(call, target, norm, dtype, B, n, D):
    """Work is shared out differently, results are not; the outputs' memory does not matter either."""
    inputs = on(target, B, n, D, dtype)
    with threads(1):
        expected = call(*inputs, norm=norm, backend=target.backend)
    for count in (1, 2, 3):
        with threads(count), cases.poisoned():
            again = call(*inputs, norm=norm, backend=target.backend)
        cases.assert_same_results(again, expected, what=f"{count} threads:")


@each_target
@each_norm
@each_dtype
def test_pairwise_backward(target, norm, dtype):
    """Thread counts, strides and batch size leave the gradient's bits alone."""
    _, jacobian, x = on(target, 3, 6, 1030, dtype)
    generator = torch.Generator().manual_seed(0)
    w, v = torch.randn((2, 3, 6, 6), generator=generator, dtype=torch.float64).to(target.device)
    w, v = w + w.transpose(1, 2), v - v.transpose(1, 2)
    with threads(1):
        expected = ops.pairwise_backward(w, v, jacobian, x, norm, target.backend)
    with threads(2):
        again = ops.pairwise_backward(w, v, jacobian, x, norm, target.backend)
    classes_first = jacobian.transpose(0, 1).contiguous().transpose(0, 1)
    strided = ops.pairwise_backward(w, v, classes_first, x, norm, target.backend)
    alone = ops.pairwise_backward(w[1:2], v[1:2], jacobian[1:2], x[1:2], norm, target.backend)
    for k, want in enumerate(expected):
        cases.assert_same(again[k], want)
        cases.assert_same(strided[k], want)
        cases.assert_same(alone[k], want[1:2])


# --- SIMD levels of the cpu backend ---------------------------------------------------------------------------------

LEVELS = ("baseline", "avx2", "avx512", "neon")


@pytest.fixture
def simd():
    """set_simd_level, with the machine's own level back afterwards."""
    native = pytest.importorskip("fastsal._cpu")
    best = native.simd_level()
    yield native.set_simd_level
    native.set_simd_level(best)


def test_simd_level_is_reported():
    assert not cpu.unavailable(), "the cpu backend is part of every installation"
    assert fastsal.info()["cpu"]["simd"] in LEVELS


def reachable(set_level, level):
    """Whether this machine has the level (asking for one that it has not is an error)."""
    try:
        set_level(level)
    except (ValueError, RuntimeError):
        return False
    return True


@long_double
@each_norm
@each_dtype
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("D", [7, 130, 1031])
def test_simd_levels(simd, level, norm, dtype, D):
    """Every level has the accuracy and the full range of the best one, and its own determinism."""
    if not reachable(simd, level):
        pytest.skip(f"no {level} on this machine")
    assert fastsal.info()["cpu"]["simd"] == level
    target = cases.Target("cpu", "cpu")
    for scale in (1.0, {torch.float64: 1e-200, torch.float16: 1e-6}.get(dtype, 1e-30)):
        inputs = cases.inputs(2, 5, D, dtype, scale=scale)
        result = cases.check_geometry(target, *inputs, norm)
        alone = cases.margin_geometry(target, *(v[1:] for v in inputs), norm)
        cases.assert_same_results(result, alone, slice(1, 2))
        cases.check_pairwise(target, *inputs, norm)


def at_the_end_of_memory(tensor):
    """A copy of a tensor with a page behind its last byte that no process may read."""
    bytes_ = tensor.numel() * tensor.element_size()
    readable = math.ceil(bytes_ / mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, readable + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + readable), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=readable - bytes_)
    return copy.view(tensor.shape).copy_(tensor)


@OPS
@each_norm
@each_dtype
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_behind_a_tensor_is_read(simd, level, call, norm, dtype):
    """Rows shorter and longer than vectors of every level: reading one byte too many ends the process."""
    if not reachable(simd, level):
        pytest.skip(f"no {level} on this machine")
    for D in (1, 3, 7, 9, 15, 17, 31, 33, 1031):
        logits, jacobian, x = cases.inputs(2, 5, D, dtype)
        found = call(logits, at_the_end_of_memory(jacobian), at_the_end_of_memory(x), norm=norm, backend="cpu")
        assert found == call(logits, jacobian, x, norm=norm, backend="cpu")


@each_norm
@each_dtype
@pytest.mark.parametrize(("n", "D"), [(101, 1031), (23, 3001), (12, 17001)])
def test_rows_in_few_streams(norm, dtype, n, D):
    """How many rows are read side by side does not show in a bit."""
    native = pytest.importorskip("fastsal._cpu")
    target = cases.Target("cpu", "cpu")
    inputs = cases.inputs(2, n, D, dtype)
    results = []
    for few in (False, True):
        with cases.switched(native.reads_few_streams, native.set_reads_few_streams, few):
            results.append(cases.check_geometry(target, *inputs, norm))
    cases.assert_same_results(*results)
