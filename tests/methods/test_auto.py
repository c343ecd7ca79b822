"""The default method: which of the two it takes depends on n, F and the norm, everywhere alike, and what it finds is theirs."""

import inspect
import math

import pytest
import torch
from torch import nn

import fastsal
from fastsal import losses, methods

pytestmark = pytest.mark.usefixtures("one_thread")


def network(n, features=None):
    """Of n classes; where features are given, the last layer has so many inputs."""
    torch.manual_seed(n)
    if features is None:
        return nn.Sequential(nn.Linear(12, n), nn.Tanh())
    return nn.Sequential(nn.Linear(12, features), nn.Tanh(), nn.Linear(features, n))


def inputs(B=4):
    return torch.randn(B, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("n", "features", "norm", "method", "passes"),
    [
        (2, None, 2, "exact", 2),
        (100, None, 2, "exact", 100),
        (101, None, 2, "certified", None),
        (101, None, math.inf, "certified", None),
        (101, None, 1, "exact", 101),
        (300, 97, 2, "exact", 100),
        (300, 98, 2, "certified", None),
        (300, 97, "inf", "exact", 100),
        (300, 98, 1, "exact", 101),
        (300, 1, 2, "certified", None),  # no head: the features are one number, and all rows are parallel
        (101, 98, 2, "certified", None),
        (101, 97, 2, "exact", 100),
    ],
)
def test_rule(n, features, norm, method, passes):
    model, x = network(n, features), inputs()
    found = fastsal.analyze(model, x, norm=norm)
    assert found.method == method
    if passes:
        assert found.vjps.tolist() == [passes] * 4
    assert found == fastsal.analyze(model, x, norm=norm, method=method)
    for B in (1, 3):  # whatever the batch
        assert fastsal.analyze(model, inputs(B), norm=norm).method == method


def test_one_score_and_no_examples():
    assert fastsal.analyze(nn.Linear(12, 1), inputs()).method == "exact"
    assert fastsal.analyze(network(101), inputs()[:0]).method == "certified"
    assert fastsal.analyze(network(100), inputs()[:0]).distances.shape == (0, 100)


def test_a_model_that_has_to_see_the_whole_batch_has_no_head():
    """Which examples a closure sees it knows by their place; features of some of them would be others."""
    offsets, inner = torch.randn(4, 12), network(300, 20)

    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x + offsets)

    found = fastsal.analyze(Placed(), inputs())
    assert found.method == "certified"
    torch.testing.assert_close(
        found.linearized_robustness, fastsal.analyze(inner, inputs() + offsets).linearized_robustness, rtol=1e-4, atol=0
    )


def test_features_that_do_not_fit_into_memory_are_no_way(monkeypatch):
    monkeypatch.setattr(methods, "Exact", lambda: fastsal.Exact(memory_limit=4 * 20 * 12 - 1))
    assert fastsal.analyze(network(300, 20), inputs()).method == "certified"
    monkeypatch.setattr(methods, "Exact", lambda: fastsal.Exact(memory_limit=4 * 20 * 12))
    assert fastsal.analyze(network(300, 20), inputs()).method == "exact"


def test_equals_exact_where_certified_was_taken():
    for n in (150, 400):
        model, x = network(n), inputs(20)
        found, exact = fastsal.analyze(model, x), fastsal.analyze(model, x, method="exact")
        assert found.certified.all()
        assert torch.equal(found.runner_up, exact.runner_up)
        assert (found.vjps + found.jvps < n).all()


@pytest.mark.parametrize("n", [10, 150])
def test_is_the_default_everywhere(n, tmp_path):
    model, x = network(n), inputs()
    method = "exact" if n == 10 else "certified"
    assert fastsal.deepfool(model, x) == fastsal.deepfool(model, x, method=method)
    y = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(losses.margin_loss(model, x, y), losses.margin_loss(model, x, y, method=method))
    assert fastsal.evaluate(model, x, tmp_path).method == method
    assert fastsal.load(tmp_path).method == method


def test_is_the_default_of_the_drop_ins():
    pytest.importorskip("captum")
    from fastsal.integrations import captum

    for function in (captum.MarginSaliency, fastsal.evaluate, fastsal.analyze, fastsal.deepfool, fastsal.fab):
        assert inspect.signature(function).parameters["method"].default == "auto"
    for n, method in ((10, "exact"), (150, "certified")):
        model, x = network(n), inputs()
        maps = [captum.MarginSaliency(model, binarized=True, **kind).attribute(x) for kind in ({}, {"method": method})]
        assert torch.equal(*maps)


def test_foolbox_keeps_its_candidates_and_takes_all_by_the_rule():
    pytest.importorskip("foolbox")
    import foolbox

    from fastsal.integrations.foolbox import L2DeepFoolAttack

    for n, method in ((10, "exact"), (150, "certified")):
        model, x = foolbox.PyTorchModel(network(n).eval(), bounds=(-9, 9)), inputs()
        y = model(x).argmax(1)
        runs = [{"candidates": None}, {"method": "auto"}, {"method": method}]
        found = [L2DeepFoolAttack(**one)(model, x, y, epsilons=None)[0] for one in runs]
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
