"""What is measured of a network: the columns, degrees of homogeneity, another origin, accuracy."""

import numpy as np
import pytest
import torch
from torch import nn

import fastsal
from fastsal.study.data import InMemory
from fastsal.study.measure import ORIGIN, SCALARS, accuracy, mean_image, measure
from fastsal.study.models import cnn

ZERO = torch.zeros(1, 1, 8, 8)


def measured(model, x, centre=ZERO, **options):
    return measure(model, x, torch.zeros(len(x), dtype=torch.int64), torch.tensor([2, 5]), centre, **options)


def test_degrees_of_homogeneity(digits):
    """Ψ = ⟨x,g⟩ without biases: 1. Ψ = ‖x‖²: 2."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False), nn.ReLU(), nn.Linear(10, 4, bias=False)).eval()
    x, _ = digits.test.batch(torch.arange(8))
    columns, maps = measured(model, x, few=0)
    np.testing.assert_allclose(columns["degree"], 1, rtol=1e-12)
    np.testing.assert_allclose(columns["homogeneity"], 1, rtol=1e-12)
    assert np.isnan(columns["rho DDN"]).all()
    assert maps.shape == (2, 1, 8, 8)

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Parameter(torch.randn(64, 10))

        def forward(self, x):
            return (x.flatten(1) @ self.mix).square()

    columns, _ = measured(Square().eval(), x, few=0)
    np.testing.assert_allclose(columns["degree"], 2, rtol=1e-10)
    np.testing.assert_allclose(columns["binarized_degree"], 2, rtol=1e-10)
    assert "bias_error" not in columns


def test_columns_are_those_of_analyze_in_float64_and_the_origin_moves_some(digits):
    """Batches are joined; with the mean image at 0 the gradients are those at x, and the bound holds there too."""
    torch.manual_seed(0)
    model = cnn((1, 8, 8), 10, (4, 8), 16).eval()
    for layer in (model[0], model[3]):
        nn.init.normal_(layer.bias)
    x, _ = digits.test.batch(torch.arange(110))
    centre = mean_image(digits.train)
    torch.testing.assert_close(centre, digits.train.x.mean(0, keepdim=True))
    columns, _ = measured(model, x, centre, few=100)
    assert [int(np.isnan(columns[f"rho {name}"]).sum()) for name in ("DDN", "DeepFool")] == [10, 0]
    exact = model.double()
    geometry = fastsal.analyze(exact, x.double(), keep_saliency=True)
    for name in SCALARS:
        if hasattr(geometry, name):
            np.testing.assert_allclose(columns[name], getattr(geometry, name), rtol=1e-10, atol=1e-13, err_msg=name)
    assert max(columns["bias_error"].max(), columns["binarized_bias_error"].max()) < 1e-13
    terms = columns["alignment"] + columns["gap_term"] + columns["offset_term"]
    np.testing.assert_allclose(terms, columns["bound"], rtol=1e-12)
    score = exact(x.double()).amax(1).detach()
    g, z = geometry.saliency.flatten(1), (x.double() - centre).flatten(1)
    product = (g * z).sum(1)
    want = {
        "alignment": product.abs() / g.norm(dim=1),
        "cosine": product.abs() / g.norm(dim=1) / z.norm(dim=1),
        "homogeneity": product.abs() / (product.abs() + (score - product).abs()),
    }
    for name, value in want.items():
        np.testing.assert_allclose(columns[f"centred {name}"], value, rtol=1e-10, err_msg=name)
    assert all(not np.allclose(columns[f"centred {name}"], columns[name]) for name in ORIGIN)
    assert (columns["linearized_robustness"] <= columns["centred bound"] * (1 + 1e-9)).all()


def test_accuracy_is_of_the_whole_split():
    split = InMemory(torch.arange(600.0).view(-1, 1, 1, 1), torch.zeros(600, dtype=torch.int64))

    def model(x):
        return torch.stack((450 - x.flatten(), x.flatten() * 0), 1)

    # At 450 the logits are equal: the lowest class.
    assert accuracy(model, split, "cpu") == pytest.approx(451 / 600)
