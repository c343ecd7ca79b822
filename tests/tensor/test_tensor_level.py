"""margin_geometry and pairwise_margins alike, on every backend: values, small and huge and special ones, and large storage."""

import cases
import pytest
import torch
from cases import each_dtype, each_norm, each_target
from hypothesis import given, settings
from truth import long_double

import fastsal

each_check = pytest.mark.parametrize("check", [cases.check_geometry, cases.check_pairwise], ids=lambda f: f.__name__)


@long_double
@each_check
@each_target
@each_norm
@each_dtype
@pytest.mark.parametrize(("B", "n", "D"), [(5, 2, 1), (4, 10, 7), (3, 11, 784), (2, 5, 4097), (2, 3, 16385)])
def test_values(check, target, norm, dtype, B, n, D):
    check(target, *cases.inputs(B, n, D, dtype), norm)


@long_double
@each_check
@each_target
@each_norm
@each_dtype
@pytest.mark.parametrize("D", [4097, 2**15 + 3])
def test_constant_rows(check, target, norm, dtype, D):
    """Every partial sum rounds the same way: 128 float32 additions in one lane would already fail."""
    generator = torch.Generator().manual_seed(D)
    levels = 1 + torch.rand((1, 4, 1), generator=generator, dtype=torch.float64)
    logits, jacobian, x = torch.tensor([[0.3, -1.7, 2.0]]), levels[:, :3].expand(1, 3, D), levels[:, 3].expand(1, D)
    check(target, *(v.to(dtype).contiguous() for v in (logits, jacobian, x)), norm)


@long_double
@each_check
@each_target
@each_norm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nearly_identical_rows(check, target, norm, dtype):
    """Rows that differ by one part in 10⁶ keep full accuracy: no ⟨x,g⟩ − ⟨x,g_j⟩, no Gram matrix."""
    logits, jacobian, x = cases.inputs(3, 6, 785, torch.float64)
    jacobian = jacobian[:, :1] * (1 + 1e-6 * jacobian)
    check(target, logits.to(dtype), jacobian.to(dtype), x.to(dtype), norm)


@long_double
@each_check
@each_target
@each_norm
@pytest.mark.parametrize(("dtype", "scale"), cases.SCALES)
@pytest.mark.parametrize("D", [9, 300])
def test_scaled_gradients(check, target, norm, dtype, scale, D):
    """Saturated and exploding models: the right class and the right values far below and above 1."""
    check(target, *cases.inputs(3, 7, D, dtype, scale=scale), norm)


@long_double
@each_check
@each_target
@each_norm
@settings(derandomize=True, max_examples=150, deadline=None)
@given(inputs=cases.special_inputs())
def test_special_values(check, target, norm, inputs):
    """Zeros, extremes, infinities, NaN and equal rows anywhere, against the rules of docs/design.md, "Edge cases"."""
    check(target, *inputs, norm)


@each_target
@pytest.mark.parametrize("operation", [fastsal.margin_geometry, fastsal.pairwise_margins], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("axis", ["batch", "class"])
def test_offsets_beyond_32_bits(target, tmp_path, operation, dtype, axis):
    logits, near, x = cases.inputs(2, 3, 33, dtype)
    with cases.poisoned():
        expected = operation(logits, near, x, backend=target.backend)
        result = operation(logits, cases.far_jacobian(tmp_path, near, axis), x, backend=target.backend)
    cases.assert_same_results(result, expected)
