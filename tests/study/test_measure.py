"""What is measured of a network: bias sums, degrees of homogeneity, accuracy."""

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal.study.data import InMemory
from fastsal.study.measure import ORIGIN, accuracy, bias_sums, mean_image, measure
from fastsal.study.models import cnn


def test_bias_sums(digits):
    """β and β† computed in another way, both in float64."""
    torch.manual_seed(0)
    model = cnn((1, 8, 8), 10, (4, 8), 16).double().eval()
    x = digits.test.x[:20].double()
    geometry = fastsal.analyze(model, x)
    sums = bias_sums(model, x)
    own, other = (sums.gather(1, row.unsqueeze(1)).squeeze(1) for row in (geometry.prediction, geometry.runner_up))
    torch.testing.assert_close(geometry.offset, own, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(geometry.binarized_offset, own - other, rtol=1e-12, atol=1e-13)


def test_no_bias_sums_where_euler_says_nothing():
    for layer in (nn.BatchNorm2d(1), nn.GELU()):
        assert bias_sums(nn.Sequential(layer, nn.Flatten(), nn.Linear(9, 2)).eval(), torch.rand(2, 1, 3, 3)) is None


def test_degrees_of_homogeneity(digits):
    """Ψ = ⟨x,g⟩ without biases: 1. Ψ = ‖x‖²: 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False), nn.ReLU(), nn.Linear(10, 4, bias=False)).eval()
    x, y = digits.test.batch(torch.arange(8))
    columns, maps = measure(model, x, y, torch.tensor([2, 5]), torch.zeros(1, 1, 8, 8), seed=0)
    np.testing.assert_allclose(columns["degree"], 1, rtol=1e-5)
    np.testing.assert_allclose(columns["homogeneity"], 1, rtol=1e-5)
    assert maps.shape == (2, 1, 8, 8)

    mix = torch.randn(64, 10)

    class Square(nn.Module):
        def forward(self, x):
            return (x.flatten(1) @ mix).square()

    columns, _ = measure(Square().eval(), x, y, torch.tensor([0]), torch.zeros(1, 1, 8, 8), seed=0)
    np.testing.assert_allclose(columns["degree"], 2, rtol=1e-5)
    np.testing.assert_allclose(columns["binarized_degree"], 2, rtol=1e-4)
    assert "bias_sum_error" not in columns


def test_with_the_mean_image_at_0(digits):
    """α and the offset of x − c, from the gradients at x; what moves is listed, and the bound holds there too."""
    torch.manual_seed(0)
    model = cnn((1, 8, 8), 10, (4, 8), 16).eval()
    x, y = digits.test.batch(torch.arange(12))
    centre = mean_image(digits.train)
    torch.testing.assert_close(centre, digits.train.x.mean(0, keepdim=True))
    columns, _ = measure(model, x, y, torch.tensor([0]), centre, seed=0)
    geometry = fastsal.analyze(model, x, keep_saliency=True)
    score = model(x).amax(1).detach()
    g, z = geometry.saliency.flatten(1).double(), (x - centre).flatten(1).double()
    product = (g * z).sum(1)
    alignment = product.abs() / g.norm(dim=1)
    homogeneity = product.abs() / (product.abs() + (score - product).abs())
    torch.testing.assert_close(torch.from_numpy(columns["centred alignment"]).double(), alignment, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.from_numpy(columns["centred homogeneity"]).double(), homogeneity, rtol=1e-4, atol=1e-5
    )
    assert all(not np.allclose(columns[f"centred {name}"], columns[name]) for name in ORIGIN)
    assert (columns["linearized_robustness"] <= columns["centred bound"] * (1 + 1e-6)).all()


def test_accuracy_is_of_the_whole_split():
    split = InMemory(torch.arange(600.0).view(-1, 1, 1, 1), torch.zeros(600, dtype=torch.int64))

    def model(x):
        return torch.stack((450 - x.flatten(), x.flatten() * 0), 1)

    # At 450 the logits are equal: the lowest class.
    assert accuracy(model, split, "cpu") == pytest.approx(451 / 600)
