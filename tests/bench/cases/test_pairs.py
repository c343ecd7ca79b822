"""How answers for all pairs of logits are checked."""

import torch

from bench.cases import pairs, tensor


def test_a_gradient_that_is_wrong_is_found_out():
    logits, jacobian = torch.randn(2, 4), torch.randn(2, 4, 9)
    weight = torch.randn(2, 4, 4)
    weight.diagonal(dim1=1, dim2=2).zero_()
    leaf = jacobian.clone().requires_grad_()
    (right,) = torch.autograd.grad((pairs.differences(leaf) * weight).sum(), leaf)
    checks = pairs.Checks(logits, jacobian)
    assert checks.gradient(weight, right) < 1e-6
    assert checks.gradient(weight, 1.01 * right) > tensor.LOOSE
