"""Exact ρ̃ through a linear head: the same as class rows, for every head it recognises, and class rows for the others."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastsal import Exact, analyze
from fastsal.tensor import reference

N = 60


class Squeezed(nn.Module):
    """A 1×1 convolution as the head, then a flatten."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Unflatten(1, (1, 6, 6)), nn.Conv2d(1, 12, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.head = nn.Conv2d(12, N, 1)

    def forward(self, x):
        return self.head(self.body(x)).flatten(1)


class After(nn.Module):
    """A head that something follows."""

    def __init__(self, what):
        super().__init__()
        self.body, self.head, self.what = nn.Sequential(nn.Linear(36, 12), nn.Tanh()), nn.Linear(12, N), what

    def forward(self, x):
        return self.what(self.head(self.body(x)), x)


def make(kind):
    torch.manual_seed(0)
    model = {
        "mlp": lambda: nn.Sequential(nn.Linear(36, 12), nn.GELU(), nn.Linear(12, N)),
        "conv": Squeezed,
        "wide": lambda: nn.Sequential(nn.Linear(36, N + 5), nn.GELU(), nn.Linear(N + 5, N)),
        "softmax": lambda: After(lambda logits, x: logits.log_softmax(1)),
        "skip": lambda: After(lambda logits, x: logits + x[:, :1]),
    }[kind]()
    return model.eval(), torch.randn(7, 36)


def rows(monkeypatch, model, x, **options):
    """analyze by class rows, whatever the head."""
    with monkeypatch.context() as patch:
        patch.setattr("fastsal.methods.rows.through_features", lambda *arguments: None)
        return analyze(model, x, **options)


@pytest.mark.parametrize("norm", [2, 1, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_equals_class_rows(monkeypatch, kind, dtype, norm):
    model, x = make(kind)
    model, x = model.to(dtype), x.to(dtype)
    want = rows(monkeypatch, model, x, norm=norm)
    found = analyze(model, x, norm=norm)
    assert want.vjps.tolist() == [N] * 7
    assert found.vjps.tolist() == [15] * 7
    assert found.method == "exact"
    assert found.certified.all()
    assert torch.equal(found.runner_up, want.runner_up)
    tolerance = 2e-6 if dtype == torch.float32 else 4e-13
    for name in (*reference.SCALARS, "lower_bound"):
        # Two VJPs of the same rows; vmapped ones may round otherwise.
        torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=100 * tolerance, atol=tolerance)
    torch.testing.assert_close(found.distances, want.distances, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("kind", ["wide", "softmax", "skip"])
def test_other_models_get_class_rows(kind):
    model, x = make(kind)
    assert analyze(model, x).vjps.tolist() == [N] * 7


def test_a_callable_gets_class_rows():
    model, x = make("mlp")
    assert analyze(lambda value: model(value), x).vjps.tolist() == [N] * 7


def test_low_precision_gets_class_rows():
    model, x = make("mlp")
    with torch.autocast("cpu", torch.bfloat16):
        assert analyze(model, x).vjps.tolist() == [N] * 7
    assert analyze(model.bfloat16().float(), x).vjps.tolist() == [15] * 7


@pytest.mark.parametrize("fit", [1, 3, 7])
def test_memory_limit_takes_the_batch_in_parts(fit):
    model, x = make("mlp")
    whole = analyze(model, x)
    found = analyze(model, x, method=Exact(memory_limit=fit * 12 * 36 * 4))
    assert found.vjps.tolist() == [15] * 7
    torch.testing.assert_close(found.distances, whole.distances)
    assert analyze(model, x, method=Exact(memory_limit=12 * 36 * 4 - 1)).vjps.tolist() == [N] * 7


def test_tiles_of_classes(monkeypatch):
    model, x = make("mlp")
    whole = analyze(model, x)
    monkeypatch.setattr("fastsal.methods.features.TILE_BYTES", 7 * 36 * 4 * 11)
    torch.testing.assert_close(analyze(model, x).distances, whole.distances)


def test_near_identical_rows_keep_their_digits():
    """Two classes whose weights differ by 1e-6 of their size, the two highest: rounded rows would differ by noise."""
    model, x = make("mlp")
    with torch.no_grad():
        model[2].weight[1] = model[2].weight[0] * (1 + 1e-6)
        model[2].bias[:2] = torch.tensor([5.0, 4.0])
        logits = model(x)
    found = analyze(model, x)
    assert found.prediction.tolist() == [0] * 7
    norm = (logits[:, 0] - logits[:, 1]) / found.distances[:, 1]
    leaf = x.double().requires_grad_()
    features = model.double()[:2](leaf)
    score = (features @ (model[2].weight[0] - model[2].weight[1])).sum()
    (want,) = torch.autograd.grad(score, leaf)
    torch.testing.assert_close(norm.double(), want.norm(dim=1), rtol=2e-6, atol=0.0)


class TestGivenHead:
    def test_it_is_used(self):
        model, x = make("wide")
        found = analyze(model, x, method=Exact(head=model[2]))
        assert found.vjps.tolist() == [N + 8] * 7
        torch.testing.assert_close(found.distances, analyze(model, x).distances, rtol=2e-6, atol=0.0)

    @pytest.mark.parametrize(
        ("kind", "head", "message"),
        [
            ("softmax", lambda model: model.head, "not the logits"),
            ("mlp", lambda model: model[0], "not the logits"),
            ("mlp", lambda model: model[1], "neither a linear layer"),
            ("mlp", lambda model: nn.Linear(12, N), "no module of the model"),
        ],
    )
    def test_one_that_cannot_serve_is_an_error(self, kind, head, message):
        model, x = make(kind)
        with pytest.raises(ValueError, match=message):
            analyze(model, x, method=Exact(head=head(model)))

    def test_wrong_options(self):
        with pytest.raises(TypeError, match="head"):
            Exact(head="fc")
        with pytest.raises(ValueError, match="memory_limit"):
            Exact(memory_limit=-1)


def test_nan_saliency_and_gradients():
    model, x = make("mlp")
    x[2, 3] = math.nan
    found = analyze(model, x, keep_saliency=True)
    assert found.linearized_robustness.isnan().tolist() == [False, False, True, False, False, False, False]
    assert found.saliency.shape == x.shape
    leaf = make("mlp")[1].requires_grad_()
    result = analyze(model, leaf, differentiable=True)
    (gradient,) = torch.autograd.grad(result.linearized_robustness.sum(), leaf)
    assert gradient.isfinite().all()


def test_hooks_are_gone_afterwards():
    model, x = make("mlp")
    analyze(model, x)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("big", [1.0, 1e7])
def test_a_term_without_a_value_shows_among_larger_gradients(big):
    """What one class gets beside the head, 0 with a gradient, is no smaller a mistake where other gradients are larger."""

    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Sequential(nn.Linear(30, 8), nn.Tanh()), nn.Linear(8, 100)

        def forward(self, x):
            logits, slope = self.head(self.body(x)), 5 * x.sum(1, keepdim=True)
            return logits + functional.pad(slope - slope.detach(), (99, 0))

    torch.manual_seed(0)
    model, x = Beside().eval(), torch.randn(3, 30)
    model.head.weight.data[10:99] *= big
    with torch.no_grad():
        model.head.bias += -model(x).amax(0) + torch.cat((torch.rand(10), -10 * big * torch.rand(89), torch.zeros(1)))
    want = analyze(model, x, method=Exact(memory_limit=0))
    assert (want.runner_up == 99).any()
    with pytest.warns(UserWarning, match="taking class rows"):
        found = analyze(model, x)
    assert torch.equal(found.runner_up, want.runner_up)
    torch.testing.assert_close(found.distances, want.distances)
