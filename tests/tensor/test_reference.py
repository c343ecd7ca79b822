"""The reference itself: arithmetic over the full range, and gradients where its powers of two meet a zero."""

import math

import cases
import pytest
import torch

from fastsal.tensor import reference


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


class TestScaled:
    """What lies outside the range of float64 on the way, though not at the end."""

    @pytest.mark.parametrize("q", [2.0, 1.0, math.inf])
    @pytest.mark.parametrize("size", [1e-320, 1e-300, 1e-30, 1e30, 1e300])
    def test_norm(self, size, q):
        v = size * torch.tensor([[3.0, -4.0]], dtype=torch.float64)
        want = {2.0: 5.0, 1.0: 7.0, math.inf: 4.0}[q] * size
        assert reference.vector_norm(v, q).item() == pytest.approx(want, rel=1e-15 if size > 1e-307 else 1e-3)

    @pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
    def test_products_of_opposite_sizes(self, size):
        """The largest entry of x times the largest of g overflows, or their products underflow, and the sum is 11."""
        x = torch.tensor([[size, 2.0, 1 / size]], dtype=torch.float64)
        g = torch.tensor([[3 / size, 1.0, 6 * size]], dtype=torch.float64)
        assert reference.inner(x, g).number().item() == pytest.approx(11, rel=1e-15)

    def test_a_quotient_of_numbers_without_a_float64(self):
        """⟨x, g⟩ = 2e-600 and ‖g‖ = 1e-300."""
        x, g = (torch.tensor([[value, 0.0]], dtype=torch.float64) for value in (2e-300, 1e-300))
        dot = reference.inner(x, g)
        assert dot.number().item() == 0.0
        assert (dot / reference.scale(g).norm(2.0)).number().item() == pytest.approx(2e-300, rel=1e-15)

    def test_a_zero_has_no_say_in_the_common_exponent(self):
        """Zeros beside 1e300: the other factor of a product that is 0, and an inner product that is 0."""
        x, g = torch.tensor([[0.0, 1e-200]], dtype=torch.float64), torch.tensor([[1e300, 1e-100]], dtype=torch.float64)
        assert (reference.inner(x, g) / reference.scale(x).norm(2.0)).number().item() == pytest.approx(
            1e-100, rel=1e-15
        )
        orthogonal = torch.tensor([[1e300, 0.0]], dtype=torch.float64)
        beta = reference.offset(torch.tensor([[1e-300]], dtype=torch.float64), reference.inner(x, orthogonal))
        assert beta.number().item() == 1e-300

    def test_tensors_beside_each_other_keep_their_scales(self):
        scaled = reference.scale(torch.tensor([[1e-300, 3e-300], [1e300, 3e300 / 2]], dtype=torch.float64))
        assert ((scaled.digits.abs().amax(1) >= 1) & (scaled.digits.abs().amax(1) < 2)).all()
        assert torch.equal(scaled.number()[0], torch.tensor([1e-300, 3e-300], dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e30, 1e300])
def test_alignment_does_not_depend_on_the_size_of_the_gradients(size):
    """α, α†, the gap of the directions and where the minimum is; ρ̃ falls as the gradients grow."""
    logits, jacobian, x = cases.inputs(3, 5, 11, torch.float64)
    plain, *_, distances = reference.margin_geometry(logits, jacobian, x)
    scaled, _, runner_up, other = reference.margin_geometry(logits, jacobian * size, x)
    for name in ("alignment", "binarized_alignment", "direction_gap"):
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(other, distances / size, rtol=1e-13, atol=0.0)
    assert torch.equal(runner_up, distances.argmin(1))


def test_a_gradient_of_zero_does_not_meet_infinity():
    """Equal rows: g† = 0, and x of 1e300 beside a margin of 1e-30 must not make 0 · inf of the homogeneity's gradient."""
    x = leaf([1e300, -1e300])
    rows = torch.ones(1, 2, 2, dtype=torch.float64, requires_grad=True)
    found = reference.two_row_scalars(leaf([1e-30, 0.0]), rows, x, 2.0)
    (gradient,) = torch.autograd.grad(found["binarized_homogeneity"].sum(), x)
    assert gradient.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("shape", [(1, 5), (3, 40), (1, 3000), (4, 3000)])
def test_the_smallest_are_those_of_a_stable_sort(shape):
    """On both sides of where all are sorted; many are equal, at the last place too, and infinite."""
    torch.manual_seed(0)
    for values in (
        torch.randn(shape, dtype=torch.float64),
        torch.randint(-3, 4, shape).double(),
        torch.randint(-1, 2, shape).double() * math.inf,
    ):
        values = values.nan_to_num(0.0, math.inf, -math.inf)
        order = values.sort(stable=True, dim=1).indices
        for count in {1, 2, 5, shape[1] // 2, shape[1]} - {0}:
            assert torch.equal(reference.smallest(values, count), order[:, :count]), count
