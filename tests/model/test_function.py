"""A model with further inputs, from a layer on, as a function of one tensor: what goes where, and an error for each misuse."""

import math

import pytest
import torch
from torch import nn

from fastsal import Candidates, Certified, Exact, analyze, deepfool, losses
from fastsal.model import traced

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = Exact(memory_limit=0)
METHODS = (Exact(), ROWS, Certified(), Candidates(100))
B = 5


class Masked(nn.Module):
    """Attends over positions that a mask allows, scales by a factor that all share, and adds what belongs to the example."""

    def __init__(self, classes=100):
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.score = nn.Linear(16, 1)
        self.body = nn.Sequential(nn.Linear(16, 12), nn.GELU())
        self.head = nn.Linear(12, classes)

    def forward(self, x, mask, *, shared, extra, double=False):
        hidden = self.embed(x).tanh()
        weight = self.score(hidden).squeeze(2).masked_fill(mask == 0, -math.inf).softmax(1)
        pooled = (weight.unsqueeze(2) * hidden).sum(1) * shared["scale"]
        return self.head(self.body(pooled) + (2 if double else 1) * extra[0])


def problem():
    """A model, x, its args and kwargs, which differ from example to example."""
    torch.manual_seed(0)
    model = Masked().double().requires_grad_(False).eval()
    x = torch.randn(B, 6, 4, dtype=torch.float64)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [2], [5], [3]])).long()
    kwargs = {
        "shared": {"scale": torch.rand(16, dtype=torch.float64) + 0.5},
        "extra": [torch.randn(B, 12, dtype=torch.float64)],
        "double": True,
    }
    return model, x, (mask,), kwargs


def one(example, args, kwargs):
    """The further inputs of one example."""
    return (args[0][example : example + 1],), kwargs | {"extra": [kwargs["extra"][0][example : example + 1]]}


def alone(model, args, kwargs):
    """The model as a function of one example's input."""

    def function(example, value):
        own_args, own_kwargs = one(example, args, kwargs)
        return model(value, *own_args, **own_kwargs)

    return function


def reference(function, points):
    """Logits [B, n] and rows [B, n, D] of functions of one example each, by a loop over all classes."""
    logits, rows = [], []
    for example, point in enumerate(points.split(1)):
        leaf = point.detach().clone().requires_grad_()
        scores = function(example, leaf)[0]
        grads = [torch.autograd.grad(score, leaf, retain_graph=True)[0].flatten() for score in scores]
        logits.append(scores.detach())
        rows.append(torch.stack(grads))
    return torch.stack(logits), torch.stack(rows)


def nearest(logits, rows, norm, target=None, classes=None):
    """ρ̃ and the runner-up, from the definition: float64 [B] and int64 [B]."""
    own = logits.argmax(1) if target is None else target
    each = torch.arange(len(logits))
    margin = logits[each, own].unsqueeze(1) - logits
    q = {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[norm]
    ratio = margin / torch.linalg.vector_norm(rows[each, own].unsqueeze(1) - rows, q, dim=2)
    ratio[each, own] = math.inf
    if classes is not None:
        ratio = ratio.masked_fill(~classes, math.inf)
    return ratio.amin(1), ratio.argmin(1)


def assert_nearest(found, want):
    torch.testing.assert_close(found.linearized_robustness, want[0], rtol=1e-9, atol=0.0)
    assert torch.equal(found.runner_up, want[1])


def layered(model, name, x, args, kwargs):
    """The model from a layer on, as a function of one example's output of it."""
    whole = alone(model, args, kwargs)

    def function(example, value):
        handle = model.get_submodule(name).register_forward_hook(lambda *_: value)
        try:
            return whole(example, x[example : example + 1])
        finally:
            handle.remove()

    return function


@pytest.fixture(params=["traced", "forward mode"])
def traces(request, monkeypatch):
    """With a trace of the model from the first call on, and without one; groups of two examples."""
    monkeypatch.setattr(traced, "PAYS", 0 if request.param == "traced" else math.inf)
    monkeypatch.setattr("fastsal.methods.certified.GROUP_BYTES", 0)
    made, right = [], traced.Trace.__init__
    monkeypatch.setattr(traced.Trace, "__init__", lambda self, *given: (right(self, *given), made.append(1))[0])
    yield
    assert bool(made) == (request.param == "traced")


class TestArguments:
    @pytest.mark.parametrize("norm", [2.0, math.inf])
    def test_certified(self, traces, norm):
        """In groups, with other examples and other shared tensors in a second call."""
        model, x, args, kwargs = problem()
        for _ in range(2):
            want = nearest(*reference(alone(model, args, kwargs), x), norm)
            found = analyze(model, x, args=args, kwargs=kwargs, norm=norm, method=Certified())
            assert found.certified.all()
            assert (found.jvps > 0).all()
            assert_nearest(found, want)
            order = torch.tensor([3, 1, 4, 0, 2])
            x, args = x[order] * 0.7, (args[0][order],)
            kwargs = kwargs | {
                "extra": [kwargs["extra"][0] * 1.5],
                "shared": {"scale": kwargs["shared"]["scale"].flip(0)},
            }

    @pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
    @pytest.mark.parametrize("method", [Exact(), ROWS, Candidates(99)], ids=["head", "rows", "candidates"])
    def test_other_methods(self, method, norm):
        model, x, args, kwargs = problem()
        want = nearest(*reference(alone(model, args, kwargs), x), norm)
        found = analyze(model, x, args=args, kwargs=kwargs, norm=norm, method=method)
        assert_nearest(found, want)
        assert (found.vjps == (15 if method == Exact() else 100)).all()  # 12 features

    def test_no_warning_where_a_closure_has_one(self, recwarn):
        """The whole batch is not run for the sake of a few."""
        model, x, args, kwargs = problem()
        analyze(model, x, args=args, kwargs=kwargs, method=Certified())
        assert not recwarn.list
        with pytest.warns(UserWarning, match="pass these by `args` or `kwargs`"):
            analyze(lambda x: model(x, *args, **kwargs), x, method=Certified())

    def test_gradients_reach_what_is_passed(self):
        model, x, args, kwargs = problem()
        kwargs["extra"][0].requires_grad_()
        analyze(model, x, args=args, kwargs=kwargs, differentiable=True).linearized_robustness.sum().backward()
        assert (kwargs["extra"][0].grad != 0).any(1).all()

    def test_inference_mode(self):
        model, x, args, kwargs = problem()
        want = analyze(model, x, args=args, kwargs=kwargs)
        with torch.inference_mode():
            kwargs = kwargs | {"extra": [kwargs["extra"][0] + 0.0]}
            found = analyze(model, x + 0.0, args=(args[0] + 0,), kwargs=kwargs)
        torch.testing.assert_close(found.linearized_robustness, want.linearized_robustness, rtol=1e-12, atol=0.0)

    def test_no_example(self):
        model, x, args, kwargs = problem()
        kwargs = kwargs | {"extra": [kwargs["extra"][0][:0]]}
        classes, target = torch.ones(0, 100, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
        found = analyze(model, x[:0], args=(args[0][:0],), kwargs=kwargs, classes=classes, target=target)
        assert found.linearized_robustness.shape == (0,)
        assert found.distances.shape == (0, 100)
        assert deepfool(model, x[:0], args=(args[0][:0],), kwargs=kwargs).adversarial.shape == (0, 6, 4)

    def test_deepfool_and_losses(self):
        model, x, args, kwargs = problem()
        kwargs = kwargs | {"extra": [0.1 * kwargs["extra"][0]]}
        found = deepfool(model, x, args=args, kwargs=kwargs)
        assert found.success.all()
        reached = model(found.adversarial, *args, **kwargs).argmax(1)
        assert torch.equal(reached, found.adversarial_class)
        assert (reached != found.prediction).all()
        want = analyze(model, x, args=args, kwargs=kwargs).linearized_robustness
        loss = losses.margin_loss(model, x, found.prediction, args=args, kwargs=kwargs)
        torch.testing.assert_close(loss, -want.mean(), rtol=1e-12, atol=0.0)
        each = [
            losses.cross_lipschitz_loss(
                model, x[i : i + 1], args=one(i, args, kwargs)[0], kwargs=one(i, args, kwargs)[1]
            )
            for i in range(B)
        ]
        found = losses.cross_lipschitz_loss(model, x, args=args, kwargs=kwargs)
        torch.testing.assert_close(found, torch.stack(each).mean(), rtol=1e-10, atol=0.0)


class TestLayer:
    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize("name", ["embed", "body.0"])
    def test_certified(self, traces, name, norm):
        """What goes around the layer, such as the mask, belongs to the example still."""
        model, x, args, kwargs = problem()
        for _ in range(2):
            with torch.no_grad():
                points = self.output(model, name, x, args, kwargs)
            want = nearest(*reference(layered(model, name, x, args, kwargs), points), norm)
            found = analyze(
                model, x, args=args, kwargs=kwargs, layer=name, norm=norm, method=Certified(), keep_saliency=True
            )
            assert found.certified.all()
            assert_nearest(found, want)
            assert found.saliency.shape == points.shape
            x, args = x.flip(0) * 0.8, (args[0].flip(0),)

    @pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
    @pytest.mark.parametrize("method", [Exact(), ROWS, Candidates(99)], ids=["head", "rows", "candidates"])
    def test_other_methods(self, method, norm):
        model, x, args, kwargs = problem()
        points = self.output(model, "embed", x, args, kwargs)
        want = nearest(*reference(layered(model, "embed", x, args, kwargs), points), norm)
        found = analyze(model, x, args=args, kwargs=kwargs, layer=model.embed, norm=norm, method=method)
        assert_nearest(found, want)

    def output(self, model, name, x, args, kwargs):
        found = []
        handle = model.get_submodule(name).register_forward_hook(lambda module, inputs, output: found.append(output))
        model(x, *args, **kwargs)
        handle.remove()
        return found[0]

    def test_the_model_is_left_as_it_was(self):
        model, x, args, kwargs = problem()
        before = model(x, *args, **kwargs)
        analyze(model, x, args=args, kwargs=kwargs, layer="body", method=Certified())
        assert torch.equal(model(x, *args, **kwargs), before)
        assert not any(module._forward_hooks for module in model.modules())

    def test_an_output_that_is_overwritten_later(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 5)).double().requires_grad_(False)
        x = torch.randn(3, 4, dtype=torch.float64)
        found = analyze(model, x, layer="0")
        want = analyze(model[1:], model[0](x))
        for name in ("linearized_robustness", "alignment", "bound"):
            assert torch.equal(getattr(found, name), getattr(want, name))

    def test_input_of_any_dtype(self):
        """Tokens: distances in the space of their embeddings."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(20, 6), nn.Flatten(), nn.Linear(18, 7)).double()
        tokens = torch.randint(20, (4, 3))
        found = analyze(model, tokens, layer="0")
        assert torch.equal(found.linearized_robustness, analyze(model[1:], model[0](tokens)).linearized_robustness)

    def test_differentiable(self):
        """Into the parameters before the layer, and into x."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)).double()
        x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
        weights = (x, model[0].weight, model[2].weight)
        found = torch.autograd.grad(
            analyze(model, x, layer="1", differentiable=True).linearized_robustness.sum(), weights
        )
        want = torch.autograd.grad(
            analyze(model[2:], model[:2](x), differentiable=True).linearized_robustness.sum(), weights
        )
        for mine, right in zip(found, want, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-14)
        assert (found[1] != 0).any()

    def test_deepfool_in_the_space_of_a_layer(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double().requires_grad_(False)
        x = torch.randn(3, 4, dtype=torch.float64)
        found, want = deepfool(model, x, layer="0"), deepfool(model[1:], model[0](x))
        torch.testing.assert_close(found.adversarial, want.adversarial, rtol=1e-12, atol=1e-14)
        loss = losses.margin_loss(model, x, want.prediction, layer="0")
        torch.testing.assert_close(
            loss, losses.margin_loss(model[1:], model[0](x), want.prediction), rtol=1e-12, atol=0
        )

    def test_compiled(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5)).double().requires_grad_(False)
        x = torch.randn(3, 4, dtype=torch.float64)
        want = analyze(model, x, layer="0")
        compiled = torch.compile(model, backend="eager")
        for layer in ("0", model[0]):
            assert torch.equal(analyze(compiled, x, layer=layer).alignment, want.alignment)


class Odd(nn.Module):
    """Layers that cannot serve."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.aside = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.pair, self.flat = nn.LSTM(4, 4, batch_first=True), nn.Flatten(0)
        self.head = nn.Linear(4, 5)

    def forward(self, x):
        x = self.twice(self.twice(x))
        self.flat(x)
        return self.head(self.pair(x.unsqueeze(1))[0].squeeze(1)) + 0 * self.aside(x).detach().sum(1, keepdim=True)


class TestErrors:
    @pytest.mark.parametrize(
        ("layer", "error", "match"),
        [
            ("twice", ValueError, r"layer: the output of layer 'twice' comes 2 times .* runs once"),
            ("never", ValueError, r"layer: the output of layer 'never' comes 0 times"),
            (
                "pair",
                TypeError,
                r"layer: the output of layer 'pair' is a tuple, wants a module that returns one tensor",
            ),
            ("flat", ValueError, r"layer: the output of layer 'flat' has shape \(12,\), wants \[B, \*S\] with B = 3"),
            ("aside", ValueError, r"model: its logits do not depend on the output of layer 'aside'"),
            ("heads", ValueError, r"layer: got 'heads', which is no module's name, .* such as 'head'"),
            (3, TypeError, r"layer: got int, wants a module of the model, or its name"),
            (nn.Linear(4, 4), ValueError, r"layer: got a Linear that is no module of the model"),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("method", [ROWS, Certified()], ids=["rows", "certified"])
    @pytest.mark.parametrize("count", [1, 3])
    def test_layer(self, layer, error, match, method, count):
        if layer == "flat" and count == 1:
            match = match.replace("12,", "4,").replace("B = 3", "B = 1")
        with pytest.raises(error, match=match):
            analyze(Odd(), torch.randn(count, 4), layer=layer, method=method)

    def test_a_name_of_a_function_s_layer(self):
        with pytest.raises(ValueError, match=r"of a model that is no nn.Module, the module itself"):
            analyze(lambda x: x.flatten(1), torch.randn(2, 4), layer="0")

    def test_the_layer_of_a_function(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 5))
        x = torch.randn(3, 4)
        found = analyze(lambda x: model(x), x, layer=model[0])
        assert torch.equal(found.alignment, analyze(model, x, layer="0").alignment)

    def test_args(self):
        model, x, args, _ = problem()
        with pytest.raises(TypeError, match="args: got Tensor, wants a tuple"):
            analyze(model, x, args=args[0])
        with pytest.raises(TypeError, match="kwargs: got list, wants a dict"):
            analyze(model, x, kwargs=[1])
