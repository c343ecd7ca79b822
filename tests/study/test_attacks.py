"""Attacks beside closed forms of the robustness."""

import math

import pytest
import torch
from study.small import network
from torch import nn

import fastsal
from fastsal.study.attacks import ATTACKS, robustness, robustness_in_box


@pytest.mark.parametrize("bias", [False, True])
def test_closed_form(bias):
    """Linear and affine binary classifiers: ρ = |Ψ†| / ‖g†‖, ρ̃ the same, and every attack close above it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=bias)).eval()
    x = torch.rand(20, 1, 4, 4)
    score = (model(x)[:, 1] - model(x)[:, 0]).detach().double()
    rho = score.abs() / (model[1].weight[1] - model[1].weight[0]).detach().double().norm()
    found = robustness(model, x)
    assert (found >= rho.unsqueeze(1) * (1 - 1e-5)).all()
    torch.testing.assert_close(found.amin(1), rho, rtol=1e-4, atol=0)  # bisection: 2⁻¹⁶ of the way; float32
    near = found / rho.unsqueeze(1)
    for slot, name in enumerate(ATTACKS):
        assert near[:, slot].isfinite().all(), name
        assert near[:, slot].median() < 1.02, name
    geometry = fastsal.analyze(model, x)
    torch.testing.assert_close(geometry.linearized_robustness.double(), rho, rtol=1e-5, atol=0)


def test_an_upper_bound_whatever_the_class(few):
    """Deterministic for a seed; of the prediction, right or wrong; the generator as it was."""
    torch.manual_seed(1)
    model = network().eval()
    x, _ = few.test.batch(torch.arange(12))
    state = torch.get_rng_state()
    one, two = robustness(model, x, seed=5), robustness(model, x, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one, two)
    assert (one > 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_in_the_box():
    """Ψ† = w − x for one pixel x: from x = 0.75 to w = 0.25 within [0, 1], to w = −1 only without."""

    class Threshold(nn.Module):
        def __init__(self, where):
            super().__init__()
            self.where = where

        def forward(self, x):
            score = x.flatten(1)[:, 0] - self.where
            return torch.stack((score, -score), 1)

    x = torch.full((2, 1, 2, 2), 0.75)
    torch.testing.assert_close(robustness_in_box(Threshold(0.25), x), torch.full((2,), 0.5).double(), rtol=1e-3, atol=0)
    assert (robustness_in_box(Threshold(-1.0), x) == math.inf).all()
    torch.testing.assert_close(
        robustness(Threshold(-1.0), x).amin(1), torch.full((2,), 1.75).double(), rtol=1e-3, atol=0
    )


def test_nothing_found():
    """Logits without a gradient: +inf, from every attack."""

    class Flat(nn.Module):
        def forward(self, x):
            return torch.stack((x.flatten(1).sum(1) * 0 + 3, x.flatten(1).sum(1) * 0), 1)

    found = robustness(Flat().eval(), torch.rand(2, 1, 3, 3))
    assert (found == math.inf).all()
