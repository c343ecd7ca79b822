"""margin_geometry alone, on every backend: its definition, values, edge cases, storage and gradients."""

import math

import cases
import numpy as np
import pytest
import torch
from cases import check_geometry as check
from cases import each_dtype, each_kernel, each_norm, each_target

import fastsal
from fastsal.tensor import reference

NAN, INF = math.nan, math.inf


# --- values ---------------------------------------------------------------------------------------------------------


@cases.long_double
def test_truth_is_exact():
    """The reference itself, against exactly rounded sums and the definitions on a hand-made example."""
    v = np.random.default_rng(0).standard_normal(5000)
    for q, exact in ((2, math.sqrt(math.fsum(a * a for a in v))), (1, math.fsum(map(abs, v))), (INF, max(map(abs, v)))):
        assert float(cases.vector_norm(v.astype(cases.LONG), q)) == pytest.approx(exact, rel=1e-15)
    logits, jacobian = torch.tensor([[5.0, 1.0, 4.0]]), torch.tensor([[[3.0, 4.0], [3.0, 3.0], [0.0, 0.0]]])
    truth = cases.geometry_truth(logits, jacobian, torch.tensor([[1.0, -1.0]]), 2.0).values
    expected = {  # by hand: the ratios are 4/1 and 1/5, so class 2 is the runner-up and g† = g
        "prediction": 0,
        "runner_up": 2,
        "linearized_robustness": 0.2,
        "alignment": 0.2,
        "binarized_logit": 1,
        "binarized_alignment": 0.2,
        "offset": 6,
        "binarized_offset": 2,
        "direction_gap": 0,
        "bound": 0.2 + 2 / 5,
        "homogeneity": 1 / 7,
        "binarized_homogeneity": 1 / 3,
    }
    assert {name: float(truth[name][0]) for name in expected} == pytest.approx(expected, rel=1e-15)
    assert truth["distances"][0].tolist() == pytest.approx([INF, 4, 0.2])


@cases.long_double
@each_kernel
@pytest.mark.parametrize(("dtype", "norm"), [(torch.float32, 2.0), (torch.float64, INF)])
def test_long_rows(target, norm, dtype):
    """D = 2²², constant: the worst case for a running sum."""
    levels = [torch.full((1, 2**22), value, dtype=dtype) for value in (1.1, -0.7, 1.3)]
    check(target, torch.tensor([[0.3, -1.7]], dtype=dtype), torch.stack(levels[:2], 1), levels[2], norm)


@cases.long_double
@each_target
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_scales(target, norm, dtype):
    """Examples and rows of very different size in one call, and a huge x on tiny gradients and the reverse."""
    logits, jacobian, x = cases.inputs(6, 6, 300, torch.float64)
    far = 30 if dtype == torch.float32 else 250
    exponent = torch.tensor([-far, -20, 0, 15, far, far])
    jacobian *= 10.0 ** exponent.double().view(6, 1, 1)
    jacobian[-1, 1::2] *= 10.0 ** -(2.0 * far)
    x *= 10.0 ** -exponent.double().view(6, 1)
    check(target, logits.to(dtype), jacobian.to(dtype), x.to(dtype), norm)


@cases.long_double
@each_target
@each_norm
def test_products_leave_the_range_of_the_factors(target, norm):
    """float64: entries of x·g whose product is ordinary although max|x| · max|g| is not, and the reverse."""
    logits = torch.tensor([[1.5, 0.25]] * 4, dtype=torch.float64)
    x = torch.tensor(
        [[1e300, 1.0, 0.0], [1e-200, 1e-200, 0.0], [1e200, 1e-200, 3.0], [0.0, 1e-170, 1e250]], dtype=torch.float64
    )
    g = torch.tensor(
        [[0.0, 1.0, 1e300], [1e-200, 2e-200, 0.0], [2e-200, 1e200, 0.5], [1e290, 1e-170, 0.0]], dtype=torch.float64
    )
    jacobian = torch.stack((g, torch.zeros_like(g)), 1)
    check(target, logits, jacobian, x, norm)
    check(target, 0 * logits, jacobian, x, norm)


@each_target
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_x_and_logits_with_half_jacobians(target, dtype):
    logits, jacobian, x = cases.inputs(3, 5, 333, torch.float32)
    check(target, logits, jacobian.to(dtype), x, 2.0)


@each_target
@each_norm
@each_dtype
def test_identity_and_bounds(target, norm, dtype):
    """ρ̃ = (⟨x,g†⟩ + β†)/‖g†‖, ρ̃ <= bound and α† − |β†|/‖g†‖ <= ρ̃ <= α† + |β†|/‖g†‖, up to rounding."""
    logits, jacobian, x = cases.inputs(20, 6, 99, dtype)
    x[::2] *= 1e-3
    result = cases.margin_geometry(target, logits, jacobian, x, norm)
    g_dag = torch.stack(
        [
            rows[i] - rows[j]
            for rows, i, j in zip(jacobian.double(), result.prediction.tolist(), result.runner_up.tolist(), strict=True)
        ]
    )
    norm_dag = torch.linalg.vector_norm(g_dag, cases.DUAL[norm], 1)
    dot = (x.double() * g_dag).sum(1)
    size = (x.double() * g_dag).abs().sum(1)
    rho, alpha_dag, beta_dag, bound = (
        getattr(result, name).cpu().double()
        for name in ("linearized_robustness", "binarized_alignment", "binarized_offset", "bound")
    )
    slack = 4 * cases.tolerance(dtype) * (rho.abs() + (size + beta_dag.abs()) / norm_dag)
    assert ((rho - (dot + beta_dag) / norm_dag).abs() <= slack).all()
    assert (alpha_dag - beta_dag.abs() / norm_dag <= rho + slack).all()
    assert (rho <= alpha_dag + beta_dag.abs() / norm_dag + slack).all()
    assert (rho <= bound * (1 + 4 * cases.tolerance(dtype))).all()


@each_target
@each_norm
def test_linear_binary_classifier(target, norm):
    """Without a bias ρ̃ = α = α† and β = 0; a bias moves ρ̃ and leaves α alone."""
    generator = torch.Generator().manual_seed(3)
    w, x = torch.randn(50, generator=generator).double(), torch.randn(4, 50, generator=generator).double()
    jacobian = torch.stack((-w / 2, w / 2)).expand(4, 2, 50)
    score = x @ w
    plain = cases.margin_geometry(target, torch.stack((-score / 2, score / 2), 1), jacobian, x, norm)
    distance = score.abs() / torch.linalg.vector_norm(w, cases.DUAL[norm])
    for name in ("linearized_robustness", "alignment", "binarized_alignment"):
        torch.testing.assert_close(getattr(plain, name).cpu(), distance, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(plain.offset.cpu(), torch.zeros_like(score), rtol=0, atol=1e-13)
    moved = score + 3
    affine = cases.margin_geometry(target, torch.stack((-moved / 2, moved / 2), 1), jacobian, x, norm)
    expected = moved.abs() / torch.linalg.vector_norm(w, cases.DUAL[norm])
    torch.testing.assert_close(affine.linearized_robustness.cpu(), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(affine.alignment, plain.alignment, rtol=1e-12, atol=1e-12)


# --- edge cases -----------------------------------------------------------------------------------------------------


@each_target
@each_dtype
def test_ties_take_the_lowest_index(target, dtype):
    logits, jacobian, x = cases.inputs(1, 6, 40, dtype)
    logits[0] = torch.tensor([0.0, 1.0, 3.0, 0.0, 1.0, 1.0])
    jacobian[0, 4] = jacobian[0, 5] = jacobian[0, 1] = 3 * jacobian[0, 2]
    jacobian[0, 0] = jacobian[0, 3] = jacobian[0, 2] / 64
    result = check(target, logits, jacobian, x, 2.0)
    assert (result.prediction.item(), result.runner_up.item()) == (2, 1)
    assert result.distances[0, 1] == result.distances[0, 4] == result.distances[0, 5]
    assert result.distances[0, 0] == result.distances[0, 3]


@each_target
@each_norm
def test_equal_logits(target, norm):
    """m = 0 is a tie: ratio 0, whatever the gradients; among equal largest logits the lowest index is predicted."""
    logits, jacobian, x = cases.inputs(3, 5, 20, torch.float32)
    logits[:, 1] = logits[:, 3] = logits.max() + 1
    jacobian[1] = jacobian[1, :1]
    jacobian[2, 3] = INF
    result = check(target, logits, jacobian, x, norm)
    assert result.prediction.tolist() == [1, 1, 1]
    assert result.runner_up.tolist() == [3, 3, 3]
    assert result.linearized_robustness.tolist() == [0, 0, 0]


@each_target
@each_norm
@each_dtype
def test_equal_gradients(target, norm, dtype):
    """All ratios +inf: ρ̃ = +inf, the runner-up has the smallest margin, g† = 0 makes α† NaN and nothing else."""
    logits, jacobian, x = cases.inputs(2, 5, 20, dtype)
    logits[:] = torch.tensor([[0.0, 2.0, 1.0, 3.0, 2.0], [-INF, -INF, 7.0, -INF, -INF]])
    jacobian[:] = jacobian[:, :1].clone()
    result = check(target, logits, jacobian, x, norm)
    assert result.linearized_robustness.tolist() == [INF, INF]
    assert result.runner_up.tolist() == [1, 0]
    assert result.binarized_alignment.isnan().all()
    assert result.alignment.isfinite().all()
    assert result.binarized_offset.tolist() == [1, INF]


@each_target
@each_norm
def test_zero_gradients(target, norm):
    """0/0 is NaN, never 0 and never an epsilon."""
    logits, jacobian, x = cases.inputs(2, 4, 20, torch.float32)
    jacobian[0, logits[0].argmax()] = 0
    jacobian[1] = 0
    result = check(target, logits, jacobian, x, norm)
    assert result.alignment.isnan().all()
    assert result.bound.isnan().all()
    assert result.binarized_alignment.isnan().tolist() == [False, True]
    assert result.linearized_robustness[1] == INF
    assert result.homogeneity.tolist() == [0, 0]


@each_target
@each_norm
def test_negative_infinite_logits(target, norm):
    """A masked class is never the runner-up while a finite ratio exists, even one infinitely far in gradient."""
    logits, jacobian, x = cases.inputs(3, 5, 20, torch.float32)
    logits[:, 2] = -INF
    logits[1] = torch.tensor([-INF, 4.0, -INF, -INF, 3.0])
    jacobian[2, 2] *= 1e30
    result = check(target, logits, jacobian, x, norm)
    assert 2 not in result.runner_up.tolist()
    assert result.runner_up[1] == 4
    assert result.distances[:, 2].tolist() == [INF] * 3


@each_target
@each_norm
@each_dtype
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("where", ["logits", "winner", "loser", "x"])
def test_nan_stays_in_its_example(target, norm, dtype, where, value):
    inputs = dict(zip(("logits", "jacobian", "x"), cases.inputs(4, 5, 77, dtype), strict=True))
    clean = cases.margin_geometry(target, *inputs.values(), norm)
    winner = clean.prediction[2].item()
    loser = (clean.runner_up[2].item() + 1) % 5
    loser = loser if loser != winner else (loser + 1) % 5
    if where == "logits":
        inputs["logits"][2, 3] = value
    elif where == "x":
        inputs["x"][2, 76] = value
    else:
        inputs["jacobian"][2, winner if where == "winner" else loser, 76] = value
    result = check(target, *inputs.values(), norm)
    others = [0, 1, 3]
    for name, tensor in cases.fields(result).items():
        cases.assert_same(tensor[others], cases.fields(clean)[name][others], name)
    if math.isnan(value) and where != "x":
        assert result.linearized_robustness[2].isnan()
    if math.isnan(value) and where == "loser":
        assert result.runner_up[2] == loser


@each_target
def test_empty_batch(target):
    for n, D in ((2, 1), (5, 40)):
        result = check(target, torch.empty(0, n), torch.empty(0, n, D), torch.empty(0, D), 2.0)
        assert result.distances.shape == (0, n)


# --- storage --------------------------------------------------------------------------------------------------------


@each_target
def test_input_shapes_are_kept_out_of_the_way(target):
    """[B, n, *S] with x [B, *S] gives what the flat call gives."""
    logits, jacobian, x = cases.inputs(2, 4, 60, torch.float32)
    flat = cases.margin_geometry(target, logits, jacobian, x)
    shaped = cases.margin_geometry(target, logits, jacobian.view(2, 4, 3, 4, 5), x.view(2, 3, 4, 5))
    cases.assert_same_results(shaped, flat)


# --- gradients ------------------------------------------------------------------------------------------------------


def smooth_inputs(target, seed, B=2, n=3, D=4):
    """Generic float64 inputs with gradients on: no ties, no kinks within the finite differences' reach."""
    return [v.requires_grad_() for v in cases.inputs(B, n, D, torch.float64, seed, device=target.device)]


def outputs(target, norm):
    def call(logits, jacobian, x):
        result = fastsal.margin_geometry(logits, jacobian, x, norm=norm, backend=target.backend)
        return tuple(getattr(result, name) for name in reference.SCALARS)

    return call


@each_target
@each_norm
def test_gradcheck(target, norm):
    assert torch.autograd.gradcheck(outputs(target, norm), smooth_inputs(target, 1))


@each_target
@each_norm
def test_gradgradcheck(target, norm):
    assert torch.autograd.gradgradcheck(outputs(target, norm), smooth_inputs(target, 2, B=1))


@each_target
@each_norm
@each_dtype
def test_gradients_have_the_inputs_dtype(target, norm, dtype):
    """And the value of float64's, to the precision in which they are stored."""
    leaves = [v.requires_grad_() for v in cases.inputs(3, 4, 50, dtype, device=target.device)]
    exact = [v.detach().double().requires_grad_() for v in leaves]
    for name in reference.SCALARS:
        total = getattr(fastsal.margin_geometry(*leaves, norm=norm, backend=target.backend), name).sum()
        wanted = getattr(fastsal.margin_geometry(*exact, norm=norm, backend="reference"), name).sum()
        for got, want in zip(
            torch.autograd.grad(total, leaves, materialize_grads=True),
            torch.autograd.grad(wanted, exact, materialize_grads=True),
            strict=True,
        ):
            assert got.dtype == dtype
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(got.double(), want, rtol=4 * eps, atol=4 * eps * want.abs().max().item())


@each_target
@each_norm
def test_gradients_flow_to_the_two_rows_only(target, norm):
    leaves = smooth_inputs(target, 5, B=3, n=5, D=8)
    result = fastsal.margin_geometry(*leaves, norm=norm, backend=target.backend)
    grad = torch.autograd.grad(result.bound.sum(), leaves[1])[0]
    touched = grad.abs().sum(2) > 0
    for b in range(3):
        assert set(touched[b].nonzero().flatten().tolist()) == {
            result.prediction[b].item(),
            result.runner_up[b].item(),
        }


@each_target
@each_norm
def test_undefined_outputs_leave_other_gradients_alone(target, norm):
    """g = 0 makes α NaN, yet a loss on ρ̃ alone has its ordinary gradient; so does ρ̃ where x holds a NaN."""
    logits, jacobian, x = cases.inputs(3, 4, 9, torch.float64, device=target.device)
    jacobian[0, logits[0].argmax()] = 0
    x[1, 0] = NAN
    leaves = [v.requires_grad_() for v in (logits, jacobian, x)]
    result = fastsal.margin_geometry(*leaves, norm=norm, backend=target.backend)
    assert result.alignment[:2].isnan().all()
    grads = torch.autograd.grad(result.linearized_robustness.sum(), leaves, materialize_grads=True)
    assert all(grad.isfinite().all() for grad in grads)
    exact = (result.binarized_logit / result.linearized_robustness).detach()
    torch.testing.assert_close(grads[0].max(1).values, 1 / exact)


@each_target
@each_norm
def test_gradients_at_zero_distance_are_zero(target, norm):
    """Two equal rows: ρ̃ = +inf (or 0 in a tie) and its gradient is 0, not NaN."""
    logits, jacobian, x = cases.inputs(2, 3, 6, torch.float64, device=target.device)
    logits[1] = 1.0
    jacobian[:] = jacobian[:, :1].clone()
    leaves = [v.requires_grad_() for v in (logits, jacobian, x)]
    result = fastsal.margin_geometry(*leaves, norm=norm, backend=target.backend)
    assert result.linearized_robustness.tolist() == [INF, 0]
    for grad in torch.autograd.grad(result.linearized_robustness.sum(), leaves, materialize_grads=True):
        assert (grad == 0).all()


@each_target
def test_no_graph_unless_wanted(target):
    leaves = smooth_inputs(target, 7)
    result = fastsal.margin_geometry(*leaves, backend=target.backend)
    assert result.linearized_robustness.requires_grad
    assert not result.lower_bound.requires_grad
    assert not result.distances.requires_grad
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not fastsal.margin_geometry(*leaves, backend=target.backend).bound.requires_grad
