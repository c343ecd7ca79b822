"""Every Triton kernel × dtype × norm against long double, in Triton's interpreter.

test_triton.py runs this file in a process of its own, whose TRITON_INTERPRET=1 turns the kernels into numpy programs.
"""

import math

import cases
import numpy as np
import pytest
import torch

import fastsal
from fastsal.tensor import reference
from fastsal.tensor.backends import triton
from fastsal.tensor.backends.triton_ops import pairwise_margins, row_distances

TRITON = cases.Target("triton", "cpu")
SEGMENT_SIZE = row_distances.SEGMENT_SIZE.value


@pytest.fixture(autouse=True, scope="module")
def _quiet_numpy():
    with np.errstate(all="ignore"):
        yield


def edges(dtype):
    """One example for each edge of the contract: logits [B, 4], jacobian [B, 4, 19] and x [B, 19]."""
    logits, jacobian, x = cases.inputs(7, 4, 19, dtype)
    jacobian[0, 2, 3] = math.nan
    jacobian[1] = 0  # every ratio +inf: the smallest margin decides
    logits[2, 1] = logits[2].max()  # a tie, and a row equal to the winner's
    jacobian[2, 3] = jacobian[2, logits[2].argmax()]
    jacobian[3, 0, 0], jacobian[3, 1, 1] = math.inf, -math.inf
    scale = {torch.float64: 1e200, torch.float16: 1e4}.get(dtype, 1e30)
    jacobian[4] *= scale
    jacobian[5] /= scale
    x[5, 2] = math.nan
    logits[6, 1] = math.nan
    return logits, jacobian, x


@cases.each_dtype
@cases.each_norm
def test_edges(dtype, norm):
    inputs = edges(dtype)
    cases.check_geometry(TRITON, *inputs, norm)
    cases.check_pairwise(TRITON, *inputs, norm)


@cases.each_dtype
@cases.each_norm
def test_geometry_of_two_segments(dtype, norm):
    logits, jacobian, x = cases.inputs(1, 3, SEGMENT_SIZE + 37, dtype)
    jacobian[:, 1, :4000] = jacobian[:, 0, :4000]
    jacobian[:, :, 4096:] /= {torch.float64: 1e200, torch.float16: 1e4}.get(dtype, 1e30)
    cases.check_geometry(TRITON, logits, jacobian, x, norm)


@pytest.fixture
def scaled(monkeypatch):
    """The names of the scaled passes that ran: a list that grows."""
    ran = []

    def watch(module, name):
        function = getattr(module, name)

        def watched(*args, **kwargs):
            ran.append(name)
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    watch(row_distances, "_scaled_segment_norms")
    watch(pairwise_margins, "_scaled_pairs")
    return ran


def masked(width, dtype):
    """One example of three segments of `width`: equal rows in the first, up to signs of zeros, and x = 0 in the second."""
    logits, jacobian, x = cases.inputs(1, 3, 2 * width + 44, dtype)
    jacobian[:, 1, :width] = jacobian[:, 0, :width]
    jacobian[:, 2, :width] = jacobian[:, 0, :width]
    jacobian[:, :, :9] = 0
    jacobian[:, 1, :9] = -0.0
    jacobian[:, 2, width : 2 * width] = jacobian[:, 1, width : 2 * width]
    x[:, width : 2 * width] = 0
    return logits, jacobian, x


@cases.each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segments_of_zeros_need_no_scaled_pass(dtype, norm, monkeypatch, scaled):
    """Padded tokens and masked regions make sums that are exactly 0."""
    cases.check_geometry(TRITON, *masked(SEGMENT_SIZE, dtype), norm)
    monkeypatch.setattr(pairwise_margins, "SEGMENT_SIZE", 128)
    cases.check_pairwise(TRITON, *masked(128, dtype), norm)
    assert scaled == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squares_and_products_that_underflow_need_a_scaled_pass(dtype, scaled):
    tiny = 1e-30 if dtype == torch.float32 else 1e-200
    logits, jacobian, x = cases.inputs(1, 3, 19, dtype, scale=tiny)
    cases.check_geometry(TRITON, logits, jacobian, x)
    assert set(scaled) == {"_scaled_segment_norms"}
    cases.check_pairwise(TRITON, logits, jacobian, tiny * x)
    cases.check_pairwise(TRITON, logits, jacobian, tiny * x, math.inf)  # norms are right, products are not
    assert scaled.count("_scaled_pairs") == 2


def test_bits_depend_on_the_example_only(monkeypatch):
    logits, jacobian, x = cases.inputs(2, 5, 150, torch.float32)
    both = cases.margin_geometry(TRITON, logits, jacobian, x)
    storage = torch.empty(5, 2, 151)[:, :, 1:]  # unaligned, classes first
    strided = storage.copy_(jacobian.transpose(0, 1)).transpose(0, 1)
    cases.assert_same_results(both, cases.margin_geometry(TRITON, logits, strided, x))
    last = cases.margin_geometry(TRITON, logits[1:], jacobian[1:], x[1:])
    cases.assert_same_results(both, last, slice(1, 2))
    monkeypatch.setattr(row_distances, "BLOCK_ROWS", 1)
    cases.assert_same_results(both, cases.margin_geometry(TRITON, logits, jacobian, x))


@cases.each_dtype
@cases.each_norm
def test_row_distances(dtype, norm):
    _, rows, anchor = cases.inputs(2, 3, SEGMENT_SIZE + 5, dtype)
    with cases.poisoned():
        got = triton.row_distances(anchor, rows, norm)
    torch.testing.assert_close(
        got, reference.row_distances(anchor, rows, norm), rtol=cases.tolerance(dtype), atol=0, check_dtype=True
    )


@cases.each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_rows_do_not_drift(dtype, norm):
    rows = torch.full((1, 2, 3 * SEGMENT_SIZE), 0.1, dtype=dtype)
    got = triton.row_distances(torch.zeros(1, rows.shape[2], dtype=dtype), rows, norm)
    value = torch.tensor(0.1, dtype=dtype).item()
    want = {2.0: value * math.sqrt(rows.shape[2]), math.inf: value * rows.shape[2], 1.0: value}[norm]
    assert ((got - want).abs() <= cases.tolerance(dtype) * want).all()


@cases.each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_x", [True, False])
def test_pairwise_of_many_segments_and_row_blocks(dtype, norm, with_x, monkeypatch):
    monkeypatch.setattr(pairwise_margins, "SEGMENT_SIZE", 64)
    logits, jacobian, x = cases.inputs(1, 18, 150, dtype)  # 18 rows: two blocks of 16, or three of 8
    cases.check_pairwise(TRITON, logits, jacobian, x if with_x else None, norm)


@cases.each_norm
def test_pairwise_flushes(norm):
    cases.check_pairwise(TRITON, *cases.inputs(1, 2, 1100, torch.float32), norm)


@cases.each_dtype
@cases.each_norm
def test_pairwise_backward(dtype, norm):
    _, jacobian, x = cases.inputs(1, 5, 131, dtype)
    jacobian[0, 1] = jacobian[0, 0].roll(1)  # equal entries share the maximum
    generator = torch.Generator().manual_seed(0)
    w, v = torch.randn(2, 1, 5, 5, generator=generator, dtype=torch.float64)
    w, v = w + w.mT, v - v.mT
    with cases.poisoned():
        grad, grad_x = triton.pairwise_backward(w, v, jacobian, x, norm)
    want, want_x = reference.pairwise_backward(w, v, jacobian, x, norm)
    # Both sum float64 terms near 1; the rest is the rounding to the Jacobian's dtype.
    tolerances = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-13 if dtype == torch.float64 else 1e-6}
    torch.testing.assert_close(grad, want.to(dtype), **tolerances)
    torch.testing.assert_close(grad_x, want_x.to(dtype), **tolerances)
    if dtype == torch.float32:
        grad, grad_x = triton.pairwise_backward(w, None, jacobian, None, norm)
        torch.testing.assert_close(
            grad, reference.pairwise_backward(w, None, jacobian, None, norm)[0].to(dtype), **tolerances
        )
        assert grad_x.numel() == 0


def test_every_scalar_is_written(monkeypatch):
    cases.assert_writes_every_scalar("triton", monkeypatch)


def test_backward_takes_v_and_x_together():
    cases.assert_v_and_x_go_together("triton")


def test_gradients_flow():
    logits, jacobian, x = (tensor.requires_grad_() for tensor in cases.inputs(1, 3, 5, torch.float64))
    for backend in ("triton", "reference"):
        pairs = fastsal.pairwise_margins(logits, jacobian, x, backend=backend)
        geometry = fastsal.margin_geometry(logits, jacobian, x, backend=backend)
        loss = pairs.nearest_margin.sum() + pairs.distance.sum() + geometry.bound.sum()
        grads = torch.autograd.grad(loss, (logits, jacobian, x), allow_unused=True)
        if backend == "triton":
            got = grads
    torch.testing.assert_close(got, grads)


def test_low_precision_jacobian_with_float32_x():
    logits, jacobian, _ = cases.inputs(1, 3, 33, torch.bfloat16)
    x = cases.inputs(1, 3, 33, torch.float32)[2]
    cases.check_geometry(TRITON, logits, jacobian, x)
    cases.check_pairwise(TRITON, logits, jacobian, x)


def test_no_examples():
    result = cases.margin_geometry(TRITON, torch.empty(0, 3), torch.empty(0, 3, 5), torch.empty(0, 5))
    assert result.distances.shape == (0, 3)
    assert cases.pairwise_margins(TRITON, torch.empty(0, 3), torch.empty(0, 3, 5), None).distance.shape == (0, 3, 3)
