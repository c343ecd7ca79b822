"""pairwise_margins alone, on every backend: its tables, edge cases and gradients."""

import math

import cases
import numpy as np
import pytest
import torch
from cases import check_pairwise as check
from cases import each_dtype, each_norm, each_target
from truth import long_double

import fastsal
from fastsal.tensor import ops, reference

NAN, INF = math.nan, math.inf


# --- values ---------------------------------------------------------------------------------------------------------


@each_target
@each_norm
@each_dtype
@pytest.mark.parametrize(("B", "n", "D"), [(3, 2, 1), (3, 10, 7), (2, 7, 784), (1, 5, 4097), (1, 3, 16385)])
def test_without_x(target, norm, dtype, B, n, D):
    """No alignment; the rest has the bits that it has with x."""
    logits, jacobian, x = cases.inputs(B, n, D, dtype)
    result = cases.pairwise_margins(target, logits, jacobian, x, norm)
    without_x = cases.pairwise_margins(target, logits, jacobian, None, norm)
    assert without_x.alignment is None
    cases.assert_same_results(without_x, result)


@long_double
@each_target
@each_norm
def test_many_classes(target, norm):
    """More rows than any tile holds, and a last tile that is not full."""
    check(target, *cases.inputs(1, 41, 67, torch.float32), norm)


@each_target
@each_norm
@each_dtype
def test_agrees_with_margin_geometry(target, norm, dtype):
    """ρ̃ and the runner-up are the predicted class's row of the table."""
    logits, jacobian, x = cases.inputs(6, 5, 123, dtype)
    pairs = cases.pairwise_margins(target, logits, jacobian, x, norm)
    single = cases.margin_geometry(target, logits, jacobian, x, norm)
    b, i = torch.arange(6), single.prediction.cpu()
    assert pairs.nearest.cpu()[b, i].tolist() == single.runner_up.tolist()
    for table, row in ((pairs.margin, single.distances), (pairs.nearest_margin, single.linearized_robustness)):
        torch.testing.assert_close(table[b, i], row, rtol=2 * cases.tolerance(dtype), atol=0)


@each_target
@each_norm
@each_dtype
def test_symmetry(target, norm, dtype):
    result = cases.pairwise_margins(target, *cases.inputs(2, 9, 50, dtype), norm)
    cases.assert_same(result.distance, result.distance.transpose(1, 2))
    cases.assert_same(result.alignment, result.alignment.transpose(1, 2))
    off = ~torch.eye(9, dtype=torch.bool, device=target.device)
    assert (result.margin + result.margin.transpose(1, 2))[:, off].eq(0).all()


# --- edge cases -----------------------------------------------------------------------------------------------------


@each_target
@each_norm
@each_dtype
def test_equal_rows_and_logits(target, norm, dtype):
    logits, jacobian, x = cases.inputs(1, 5, 30, dtype)
    logits[0] = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0])
    jacobian[0, 1] = jacobian[0, 2] = jacobian[0, 0]
    result = check(target, logits, jacobian, x, norm)
    assert result.distance[0, :3, :3].eq(0).all()
    assert result.margin[0, 0].tolist()[1:3] == [INF, INF]
    assert result.margin[0, 1, 0] == -INF
    assert result.margin[0, 1, 2] == result.margin[0, 1, 4] == 0
    assert result.nearest[0, 1] == 0
    assert result.alignment[0, 0, 1].isnan()
    assert torch.diagonal(result.margin, dim1=1, dim2=2).eq(INF).all()
    assert torch.diagonal(result.distance, dim1=1, dim2=2).eq(0).all()
    assert torch.diagonal(result.alignment, dim1=1, dim2=2).isnan().all()


@each_target
@each_norm
def test_nearest_breaks_ties(target, norm):
    """Equal ratios: the lowest index; all +inf: the smallest difference of logits."""
    logits, jacobian, x = cases.inputs(2, 4, 30, torch.float32)
    logits[:] = torch.tensor([[3.0, 1.0, 1.0, 1.0], [3.0, 0.0, 2.0, 1.0]])
    jacobian[0, 2] = jacobian[0, 1]
    jacobian[0, 3] = jacobian[0, 1]
    jacobian[1] = jacobian[1, :1].clone()
    result = check(target, logits, jacobian, x, norm)
    assert result.nearest[:, 0].tolist() == [1, 2]


@each_target
@each_norm
@pytest.mark.parametrize("where", ["logits", "jacobian", "x"])
def test_nan_stays_in_its_pairs(target, norm, where):
    inputs = dict(zip(("logits", "jacobian", "x"), cases.inputs(3, 5, 77, torch.float32), strict=True))
    clean = cases.pairwise_margins(target, *inputs.values(), norm)
    inputs[where][(1, 2) if where != "x" else (1,)] = NAN
    result = check(target, *inputs.values(), norm)
    for name, value in cases.fields(result).items():
        cases.assert_same(value[[0, 2]], cases.fields(clean)[name][[0, 2]], name)
    kept = [0, 1, 3, 4]
    if where != "x":
        cases.assert_same(result.margin[1][kept][:, kept], clean.margin[1][kept][:, kept])
        assert result.nearest[1].tolist() == [2, 2, 0, 2, 2]


@each_target
def test_empty_batch(target):
    result = check(target, torch.empty(0, 3), torch.empty(0, 3, 7), torch.empty(0, 7), 2.0)
    assert result.nearest_margin.shape == (0, 3)


# --- gradients ------------------------------------------------------------------------------------------------------


def outputs(target, norm):
    def call(logits, jacobian, x):
        result = fastsal.pairwise_margins(logits, jacobian, x, norm=norm, backend=target.backend)
        off = ~torch.eye(logits.shape[1], dtype=torch.bool, device=logits.device)
        return (result.distance, result.margin[:, off], result.nearest_margin, result.alignment[:, off])

    return call


def leaves(target, B, n, D, dtype, seed):
    return [v.requires_grad_() for v in cases.inputs(B, n, D, dtype, seed, device=target.device)]


@each_target
@each_norm
def test_gradcheck(target, norm):
    assert torch.autograd.gradcheck(outputs(target, norm), leaves(target, 2, 3, 4, torch.float64, 1))


@each_target
@each_norm
def test_gradgradcheck(target, norm):
    assert torch.autograd.gradgradcheck(outputs(target, norm), leaves(target, 1, 3, 4, torch.float64, 2))


@each_target
def test_gradcheck_without_x(target):
    logits, jacobian, _ = leaves(target, 2, 3, 4, torch.float64, 3)

    def call(logits, jacobian):
        result = fastsal.pairwise_margins(logits, jacobian, backend=target.backend)
        return result.distance, result.nearest_margin

    assert torch.autograd.gradcheck(call, (logits, jacobian))
    assert torch.autograd.gradgradcheck(call, (logits, jacobian))


@each_target
@each_norm
@each_dtype
@pytest.mark.parametrize(("n", "D"), [(4, 1), (9, 50), (5, 1030)])
def test_backward_agrees_with_the_reference(target, norm, dtype, n, D):
    """The kernel's first-order backward against autograd through the reference in float64.

    Every gradient is a sum over pairs and classes of float32 values (the saved distance and margin, 2⁻²⁴ each), so that
    its error is some eps of the sum of absolute terms; 8 eps of the largest gradient covers it and the final rounding.
    """
    given = leaves(target, 2, n, D, dtype, 4)
    exact = [v.detach().double().requires_grad_() for v in given]
    got = fastsal.pairwise_margins(*given, norm=norm, backend=target.backend)
    want = reference.pairwise_margins(*exact, norm)
    generator = torch.Generator().manual_seed(n)
    off = ~torch.eye(n, dtype=torch.bool, device=target.device)
    weights = torch.randn((3, 2, n, n), generator=generator, dtype=torch.float64).to(target.device) * off
    nearest_weight = torch.randn((2, n), generator=generator, dtype=torch.float64).to(target.device)

    def loss(distance, margin, nearest_margin, alignment):
        tables = zip((distance, margin, alignment), weights, strict=True)
        total = sum((table.masked_fill(~off, 0).double() * weight).sum() for table, weight in tables)
        return total + (nearest_margin.double() * nearest_weight).sum()

    grads = torch.autograd.grad(loss(got.distance, got.margin, got.nearest_margin, got.alignment), given)
    expected = torch.autograd.grad(loss(*want[:3], want[4].abs()), exact)
    for name, grad, truth in zip(("logits", "jacobian", "x"), grads, expected, strict=True):
        assert grad.dtype == dtype, name
        step = 8 * torch.finfo(dtype).eps * n
        torch.testing.assert_close(grad.double(), truth, rtol=step, atol=step * truth.abs().max().item())


@each_target
@each_norm
@each_dtype
@pytest.mark.parametrize("with_x", [True, False])
def test_backward_operator(target, norm, dtype, with_x):
    """Σ_j w_ij φ(g_i − g_j) + Σ_j v_ij x and Σ_{i<j} v_ij (g_i − g_j), pair by pair in numpy."""
    B, n, D = 2, 6, 67
    _, jacobian, x = cases.inputs(B, n, D, dtype)
    jacobian[0, 3] = jacobian[0, 1]
    jacobian[:, :, 5] = jacobian[:, :, 9] = 4 * torch.arange(n).to(dtype)  # shared largest entries for q = inf
    generator = torch.Generator().manual_seed(8)
    w, v = torch.randn((2, B, n, n), generator=generator, dtype=torch.float64)
    w, v = w + w.transpose(1, 2), v - v.transpose(1, 2)
    jacobian, x, w, v = (tensor.to(target.device) for tensor in (jacobian, x, w, v))
    with cases.poisoned():
        grad_jacobian, grad_x = ops.pairwise_backward(
            w, v if with_x else None, jacobian, x if with_x else None, norm, target.backend
        )
    assert (grad_jacobian.shape, grad_jacobian.dtype) == (jacobian.shape, dtype)
    assert (grad_x.shape, grad_x.dtype) == ((x.shape if with_x else (0,)), dtype)
    rows, point, weight, turn = (tensor.cpu().double().numpy() for tensor in (jacobian, x, w, v))
    want, size = np.zeros((2, B, n, D)), np.zeros((2, B, D))
    for b, i, j in np.ndindex(B, n, n):
        d = rows[b, i] - rows[b, j]
        phi = d if norm == 2 else np.sign(d)
        if norm == 1:
            top = np.abs(d) == np.abs(d).max()
            phi = np.where(top, phi, 0) / top.sum()
        want[0, b, i] += weight[b, i, j] * phi + with_x * turn[b, i, j] * point[b]
        want[1, b, i] += np.abs(weight[b, i, j] * phi) + with_x * np.abs(turn[b, i, j] * point[b])
        if i < j:
            size[0, b] += turn[b, i, j] * d
            size[1, b] += np.abs(turn[b, i, j] * d)
    # One rounding to the output, and a float32 or float64 accumulation of 2n terms before it.
    eps = torch.finfo(dtype).eps / 2 + 4 * n * torch.finfo(cases.out_dtype(dtype)).eps / 2
    assert (np.abs(grad_jacobian.cpu().double().numpy() - want[0]) <= eps * want[1]).all()
    if with_x:
        assert (np.abs(grad_x.cpu().double().numpy() - size[0]) <= eps * size[1]).all()


@each_target
@each_norm
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_at_zero_distance_are_zero(target, norm, order):
    """Equal rows: no NaN in any gradient, 0 from their own distance, the ordinary value from the other pairs."""
    inputs = cases.inputs(1, 3, 6, torch.float64, device=target.device)
    inputs[1][0, 1] = inputs[1][0, 0]
    given = [v.requires_grad_() for v in inputs]
    result = fastsal.pairwise_margins(*given, norm=norm, backend=target.backend)
    alone = torch.autograd.grad(
        result.distance[0, 0, 1] + result.margin[0, 0, 1] + result.alignment[0, 0, 1],
        given,
        create_graph=order == 2,
        materialize_grads=True,
    )
    assert all((grad == 0).all() for grad in alone)
    result = fastsal.pairwise_margins(*given, norm=norm, backend=target.backend)
    every = torch.autograd.grad(result.distance.sum(), given, create_graph=order == 2, materialize_grads=True)
    assert all(grad.isfinite().all() for grad in every)
    assert every[1][0, 2].abs().sum() > 0


@each_target
@each_norm
def test_an_undefined_pair_does_not_spread(target, norm):
    """A loss that leaves the NaN pairs out has finite gradients, although their rows took part in the backward."""
    logits, jacobian, x = cases.inputs(2, 4, 9, torch.float64, device=target.device)
    jacobian[0, 1] = jacobian[0, 2]
    given = [v.requires_grad_() for v in (logits, jacobian, x)]
    result = fastsal.pairwise_margins(*given, norm=norm, backend=target.backend)
    usable = result.alignment.isfinite() & result.margin.isfinite()
    loss = torch.where(usable, result.alignment + result.margin, 0).sum()
    for grad in torch.autograd.grad(loss, given):
        assert grad.isfinite().all()
