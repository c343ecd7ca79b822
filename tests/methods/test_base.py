"""The rule by which a row is the nearest, however many rows come at a time."""

import math

import pytest
import torch

from fastsal import analyze
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
