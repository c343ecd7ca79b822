"""What `ModelPasses` holds: one recorded pass at most, and none, if it is large, while Jacobian-vector products are taken."""

import weakref

import numpy as np
import pytest
import torch
from torch import nn

from fastsal.model import products
from fastsal.model.linearization import linearize


class Watched(nn.Module):
    """Knows which of the recorded passes that it returned logits of are still held by somebody."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        self.returned: list[weakref.ref] = []

    def forward(self, x):
        logits = self.layers(x)
        self.returned.append(weakref.ref(logits))
        return logits

    def held(self) -> list[int]:
        """The numbers of examples of the recorded passes that are held."""
        held = [logits for reference in self.returned if (logits := reference()) is not None]
        return [len(logits) for logits in held if logits.requires_grad]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Watched().double().eval()


@pytest.mark.parametrize("examples", [np.arange(3), np.array([0, 2])], ids=["a whole batch", "a group"])
@pytest.mark.parametrize("way", ["_traced", "_forward_mode", "_double_backward"])
@pytest.mark.parametrize("large", [True, False])
def test_a_large_recorded_pass_gives_its_memory_to_products(monkeypatch, model, examples, way, large):
    monkeypatch.setattr(products, "KEPT", 0 if large else 1 << 40)
    monkeypatch.setattr("fastsal.model.traced.PAYS", 0)
    x, e = torch.randn(3, 5, dtype=torch.float64), len(examples)
    held = []

    def taken(self, *given):
        held.append(model.held())
        return run(self, *given)

    with linearize(model, x) as graph:
        product = products.ModelPasses(graph, examples, None)
        run = getattr(products.ModelPasses, way)
        product._ways = [taken]
        examples, cotangents = np.arange(e), torch.randn(e, 2, 3, dtype=torch.float64)
        rows = product.vjp(examples, cotangents)
        assert model.held() == [e]
        directions = torch.randn(e, 4, 5, dtype=torch.float64)
        jvps = product.jvp(examples, directions)
        assert held == [[] if large else [e]]
        torch.testing.assert_close(rows @ directions.mT, cotangents @ jvps.mT)
        torch.testing.assert_close(product.vjp(examples[:1], cotangents[:1]), rows[:1])
        assert model.held() == [1 if large else e]


@pytest.mark.parametrize("batch", [3, 20], ids=["recorded by the search for mixtures", "too large for that"])
def test_only_the_examples_that_are_wanted_stay_recorded(model, batch):
    with linearize(model, torch.randn(batch, 5, dtype=torch.float64)) as graph:
        product = products.ModelPasses(graph, np.arange(batch - 1), None)
        assert model.held() == [batch - 1]
        product.vjp(np.arange(1), torch.ones(1, 30, 3, dtype=torch.float64))
        assert model.held() == [1]


def test_a_whole_batch_gives_way_to_the_examples_that_are_left(model):
    with linearize(model, torch.randn(20, 5, dtype=torch.float64)) as graph:
        product = products.ModelPasses(graph, np.arange(20), None)
        assert model.held() == [20]
        product.vjp(np.arange(1), torch.ones(1, 30, 3, dtype=torch.float64))
        assert model.held() == [1]


def test_directions_are_laid_out_without_the_gaps_of_a_sliced_batch(monkeypatch, model):
    taken = []
    jvp = torch.func.jvp
    monkeypatch.setattr(
        torch.func, "jvp", lambda f, primals, tangents: taken.append(primals[0]) or jvp(f, primals, tangents)
    )
    x = torch.randn(30, 5, dtype=torch.float64)[::10]
    with linearize(model, x) as graph:
        product = products.ModelPasses(graph, np.arange(3), None)
        product._ways = [products.ModelPasses._forward_mode]
        product.jvp(np.arange(3), torch.randn(3, 4, 5, dtype=torch.float64))
    assert [primal.stride() for primal in taken] == [(5, 1)]


def test_second_derivatives_serve_where_convolutions_are_few():
    few, many = nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten())
    taken = []
    for model, shape in ((few, (5,)), (many, (1, 5))):
        with linearize(model, torch.randn(2, *shape)) as graph:
            taken.append([way.__name__ for way in products.ModelPasses(graph, np.arange(2), None)._ways])
    assert taken == [
        ["_traced", "_double_backward", "_forward_mode"],
        ["_traced", "_forward_mode", "_double_backward"],
    ]


def test_a_recorded_backward_pass_serves_some_of_its_examples_and_is_made_anew_for_others(monkeypatch, model):
    """The second call, fewer examples, so few that what was recorded would be taken in vain, and then others."""
    made, right = [], products.DoubleBackward
    monkeypatch.setattr(products, "DoubleBackward", lambda *given: made.append(given[1].tolist()) or right(*given))
    x = torch.randn(9, 5, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: model.layers(one)))(x)
    with linearize(model, x) as graph:
        product = products.ModelPasses(graph, np.arange(1, 9), None)
        for examples, count in (([*range(8)], 3), ([0, 2, 3, 4, 5, 6, 7], 2), ([6], 30), ([0, 7], 1)):
            directions = torch.randn(len(examples), count, 5, dtype=torch.float64)
            found = product.jvp(np.array(examples), directions)
            torch.testing.assert_close(found, directions @ jacobian[1:][examples].mT)
    assert made == [[*range(1, 9)], [7], [1, 8]]
