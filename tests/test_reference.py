"""The reference itself: gradients at the places where its powers of two meet a zero."""

import cases
import pytest
import torch

from fastsal import reference


def leaf(*rows):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("score", [0.0, 3.0, 1e-300])
@pytest.mark.parametrize(
    ("x", "g"),
    [
        ([0.0, 0.0], [2.0, 3.0]),
        ([2.0, 3.0], [0.0, 0.0]),
        ([2.0, 0.0], [0.0, 3.0]),
        ([2.0, 1.0], [1.0, -2.0]),
    ],
    ids=["x", "gradient", "disjoint", "orthogonal"],
)
def test_the_offset_has_a_gradient_where_the_inner_product_is_zero(x, g, score, scale):
    """β = Ψ − ⟨x, g⟩ is linear in each of its arguments: its gradients are 1, −g and −x at a black image too."""
    x, g = leaf(x), scale * torch.tensor(g, dtype=torch.float64)
    rows = torch.stack((g, torch.ones(2, dtype=torch.float64))).unsqueeze(0).requires_grad_()
    logits = leaf([score, -1.0])
    offset = reference.two_row_scalars(logits, rows, x, 2.0)["offset"]
    cases.assert_same(offset, torch.tensor([score], dtype=torch.float64))
    by_logits, by_rows, by_x = torch.autograd.grad(offset.sum(), (logits, rows, x))
    assert by_logits.tolist() == [[1.0, 0.0]]
    assert by_x.tolist() == [(-g).tolist()]
    assert by_rows.tolist() == [[(-x[0]).tolist(), [0.0, 0.0]]]
