"""Attacks beside closed forms of the robustness."""

import math

import pytest
import torch
from study.small import network
from torch import nn

from fastsal.study.attacks import ATTACKS, BOX, EVERYWHERE, nearest_found


@pytest.mark.parametrize("name", ATTACKS)
def test_closed_form(name):
    """A linear binary classifier and no box: ρ = |Ψ†| / ‖g†‖, and every attack finds it from above; the image is at ρ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2)).eval()
    x = torch.rand(20, 1, 4, 4)
    score = (model(x)[:, 1] - model(x)[:, 0]).detach().double()
    rho = score.abs() / (model[1].weight[1] - model[1].weight[0]).detach().double().norm()
    x, rho = x[rho < 1.2], rho[rho < 1.2]  # 0.6 of ‖x‖ is as far as the attacks go that must be told
    assert len(x) > 12
    point, found = nearest_found(model, x, name, bounds=EVERYWHERE)
    assert (found >= rho * (1 - 1e-5)).all()
    assert (found / rho).median() < 1.02
    assert (model(point).argmax(1) != model(x).argmax(1)).all()
    torch.testing.assert_close((point - x).flatten(1).norm(dim=1).double(), found, rtol=1e-5, atol=0)


def test_deterministic_and_of_the_prediction(few):
    """Right or wrong; the generator and the model as they were."""
    torch.manual_seed(1)
    model = network().eval()
    x, _ = few.test.batch(torch.arange(12))
    state = torch.get_rng_state()
    for name in ATTACKS:
        (_, one), (_, two) = (nearest_found(model, x, name) for _ in range(2))
        assert torch.equal(one, two)
        assert (one > 0).all()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


class Threshold(nn.Module):
    """Ψ† = w − x for the first pixel x."""

    def __init__(self, where):
        super().__init__()
        self.where = where

    def forward(self, x):
        score = x.flatten(1)[:, 0] - self.where
        return torch.stack((score, -score), 1)


@pytest.mark.parametrize("name", ATTACKS)
def test_in_the_box(name):
    """From x = 0.75 to w = 0.25 within [0, 1], to w = −0.1 only without."""
    x = torch.full((2, 1, 2, 2), 0.75)
    for where, bounds, want in ((0.25, BOX, 0.5), (-0.1, BOX, math.inf), (-0.1, EVERYWHERE, 0.85)):
        point, found = nearest_found(Threshold(where).eval(), x, name, bounds=bounds)
        torch.testing.assert_close(found, torch.full((2,), want).double(), rtol=2e-2, atol=0)
        assert point.min() >= bounds[0]
        assert torch.equal(point, x) == (want == math.inf)


def test_nothing_found():
    """Logits without a gradient: +inf, from every attack."""

    class Flat(nn.Module):
        def forward(self, x):
            return torch.stack((x.flatten(1).sum(1) * 0 + 3, x.flatten(1).sum(1) * 0), 1)

    for name in ATTACKS:
        assert (nearest_found(Flat().eval(), torch.rand(2, 1, 3, 3), name)[1] == math.inf).all()
