"""The rule by which a row is the nearest, however many rows come at a time."""

import math

import pytest
import torch

from fastsal import analyze
from fastsal.methods.base import Nearest, Question
from fastsal.tensor import reference


def linear(weight, bias=0.0):
    return lambda x: x @ weight.t() + bias


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.where(grad == 0, grad, math.nan)


@pytest.mark.parametrize("norm", [2, 1, math.inf])
def test_chunk_sizes_agree_bit_for_bit(norm):
    """Integer weights and inputs: the model's own arithmetic is exact, whatever the chunk."""
    torch.manual_seed(0)
    weight, x = torch.randint(-9, 9, (37, 11)).float(), torch.randint(-9, 9, (5, 11)).float()
    first, *others = [analyze(linear(weight), x, norm=norm, chunk_size=c) for c in (1, 2, 3, 7, 36, 100, None)]
    for other in others:
        for name in (*reference.SCALARS, "runner_up", "prediction", "distances", "lower_bound"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name


@pytest.mark.parametrize("chunk", [1, 2, 3, 8])
def test_ties_take_the_lowest_class(chunk):
    weight = torch.tensor([[0.0], [1.0], [0.0], [2.0], [1.0], [1.0]])
    result = analyze(linear(weight, torch.tensor([-9.0, 0.0, -9.0, 0.0, 0.0, 0.0])), torch.ones(1, 1), chunk_size=chunk)
    assert (result.prediction.item(), result.runner_up.item()) == (3, 1)
    tied = analyze(linear(torch.eye(4)), torch.ones(2, 4), chunk_size=chunk)
    assert tied.prediction.tolist() == [0, 0]
    assert tied.runner_up.tolist() == [1, 1]
    assert tied.linearized_robustness.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_equal_gradients_fall_to_the_smallest_margin(chunk):
    bias = torch.tensor([0.0, 2.0, 1.0, 5.0, 2.0, -math.inf])
    result = analyze(linear(torch.ones(6, 3), bias), torch.ones(2, 3), chunk_size=chunk)
    assert result.linearized_robustness.tolist() == [math.inf] * 2
    assert result.runner_up.tolist() == [1, 1]


def test_minus_infinity_is_not_the_runner_up():
    weight = torch.eye(4)
    bias = torch.tensor([0.0, -math.inf, -3.0, -math.inf])
    result = analyze(linear(weight, bias), torch.full((1, 4), 2.0), chunk_size=1)
    assert (result.prediction.item(), result.runner_up.item()) == (0, 2)


@pytest.mark.parametrize("chunk", [1, 2, 8])
def test_a_nan_gradient_is_not_skipped(chunk):
    def model(x):
        return torch.stack((x[:, 1], x[:, 0] / 2, 3 * x[:, 0], NaNGradient.apply(x[:, 2]), 0 * x[:, 0]), 1)

    result = analyze(model, torch.ones(1, 3), chunk_size=chunk)
    assert (result.prediction.tolist(), result.runner_up.tolist()) == ([2], [3])
    assert result.linearized_robustness.isnan().all()
    assert result.alignment.tolist() == [1.0]


@pytest.mark.parametrize("n", [7, 3000])
@pytest.mark.parametrize("limited", [False, True])
def test_the_smallest_margins_come_first(n, limited):
    """A NaN before all, then by margin and class; those of margin +inf are candidates, those that are not allowed are none."""
    torch.manual_seed(0)
    logits = torch.randint(-2, 3, (5, n)).float()
    logits[0, 3], logits[1, 2], logits[1, 4] = math.nan, -math.inf, -math.inf
    allowed = torch.rand(5, n) < 0.5 if limited else None
    if limited:
        allowed[:, :3], allowed[2] = True, False
        allowed[2, :2] = True
    nearest = Nearest(logits, Question(2.0, classes=allowed))
    for count in (1, 3, n):
        found = nearest.by_margin(count)
        for b, own in enumerate(nearest.prediction.tolist()):
            classes = [j for j in range(n) if j != own and (not limited or allowed[b, j])]
            margin = (logits[b, own] - logits[b]).nan_to_num(-math.inf, math.inf).tolist()
            want = sorted(classes, key=lambda j, margin=margin: (margin[j], j))[:count]
            assert found[b].tolist() == want + want[:1] * (found.shape[1] - len(want))
