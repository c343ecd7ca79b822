"""Traced Jacobian-vector products: the right values, at the price promised, and never those of another model."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from networks import MODELS, CountedOperations, dense, make
from torch import nn

from fastsal import Certified, Exact, analyze
from fastsal.model import products, traced
from fastsal.model.function import Function
from fastsal.model.linearization import linearize
from fastsal.model.products import ModelPasses


class Score(nn.Module):
    """Returns one score an example, after some operations in place."""

    def forward(self, x):
        held = torch.cat((x.sin(), x), 1)
        held.mul_(3.0).add_(0.1)
        return (held**2).sum(1)


class Written(Score):
    """Writes into a slice, and into a slice of that."""

    def forward(self, x):
        held = torch.zeros(len(x), 8, dtype=x.dtype)
        held[:, 1:6] = x.sin()
        held[:, 5:7].mul_(x[:, :2])
        return (held**2).sum(1)


class Stored(Score):
    """Copies what is stored in another order into a tensor of its own, and views that."""

    def forward(self, x):
        held = torch.zeros(len(x), 5, 2, dtype=x.dtype)
        held.copy_(torch.stack((x.sin(), x), 1).transpose(1, 2))
        return (held.view(len(x), 10)[:, 1:] ** 2).sum(1)


class Steered(nn.Module):
    """A wide classifier with everything that a trace cannot see: flags, attributes, a child, a straight-through gradient."""

    def __init__(self, classes=150):
        super().__init__()
        self.first, self.last = nn.Linear(30, 40), nn.Linear(40, classes)
        self.activation = nn.Tanh()
        self.scale, self.straight = 1.0, False
        self.register_buffer("shift", torch.zeros(40))

    def forward(self, x):
        hidden = self.first(x) + self.shift
        value = self.activation(hidden) * self.scale
        if self.straight:
            value = value.detach() + (hidden - hidden.detach())
        if self.training:
            value = value * 2
        return self.last(value)


class Branching(nn.Module):
    """Takes one of two ways, by the values of x."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList(Steered() for _ in range(2))

    def forward(self, x):
        return torch.cat([self.ways[int(one.sum() > 0)](one.unsqueeze(0)) for one in x])


class Square(torch.autograd.Function):
    """A custom function that has no forward mode."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Custom(Steered):
    def forward(self, x):
        return super().forward(Square.apply(x))


@pytest.fixture
def eager(monkeypatch):
    """Traces are made at once, and counted."""
    made = []
    right = traced.Trace.__init__

    def counted(self, function, *given):
        right(self, function, *given)
        made.append(type(function.model))

    monkeypatch.setattr(traced, "PAYS", 0)
    monkeypatch.setattr(traced.Trace, "__init__", counted)
    return made


def equals_exact(model, x):
    """Whether certified agrees with exact at x; every class is far from a tie there."""
    exact = analyze(model, x, method=Exact(memory_limit=0))
    found = analyze(model, x, method=Certified())
    assert found.certified.all()
    assert (found.jvps > 0).all()
    # Rows that are taken in other company may differ in their last bits.
    torch.testing.assert_close(found.linearized_robustness, exact.linearized_robustness, rtol=1e-5, atol=0.0)
    return torch.equal(found.runner_up, exact.runner_up)


def trace(model, x):
    """The logits and the products of a trace at x."""
    function = Function(model, x)
    return traced.Trace(function, x[:1]).at(function, x)


class TestValues:
    @pytest.mark.parametrize("name", [*MODELS, "score", "stored"])
    def test_products_equal_the_jacobian_s(self, name):
        if name in ("score", "stored"):
            model, x = {"score": Score, "stored": Stored}[name](), torch.randn(6, 5, dtype=torch.float64)
        else:
            model, x = make(name, torch.float64)
        with linearize(model, x) as graph:
            logits, rows = graph.logits, graph.rows(torch.arange(graph.logits.shape[1]).unsqueeze(1).expand(-1, 6))
        own, products = trace(model, x)
        torch.testing.assert_close(own, logits, rtol=1e-12, atol=1e-13)
        for examples, count in (([0, 1, 2, 3, 4, 5], 3), ([1, 4], 2), ([5], 4), ([2], 1), ([0, 3], 1)):
            chosen = np.array(examples)
            directions = torch.randn(count, len(examples), *x.shape[1:], dtype=torch.float64)
            want = torch.einsum("end,ked->ken", rows[chosen], directions.flatten(2))
            got = products.jvp(chosen, directions)
            assert got.dtype == torch.float64
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)

    def test_logits_have_the_bits_and_products_the_values_of_torch(self):
        model, x = make("cnn with batchnorm")
        logits, products = trace(model, x)
        direction = torch.randn_like(x[:1])
        for example in range(len(x)):
            one = x[example : example + 1]
            with torch.no_grad():
                want = torch.func.jvp(lambda v: model(v.clone()), (one,), (direction,))
            assert torch.equal(logits[example : example + 1], want[0])
            got = products.jvp(np.array([example]), direction.unsqueeze(0))[0]
            torch.testing.assert_close(got, want[1], rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "inner", ["zero", "reflected", "uneven", "bias", "one-dimensional", "grouped", "transposed", "constant"]
    )
    def test_convolutions_take_padding_and_factors(self, inner):
        """Explicit padding and BatchNorms cost nothing where they can be folded, and are right where they cannot."""
        torch.manual_seed(0)
        dims = 1 if inner == "one-dimensional" else 2
        conv, norm = (nn.Conv1d, nn.BatchNorm1d) if dims == 1 else (nn.Conv2d, nn.BatchNorm2d)
        layers = {
            "zero": [nn.ZeroPad2d((1, 1, 2, 2)), conv(4, 4, 3, bias=False)],
            "reflected": [nn.ReflectionPad2d(1), conv(4, 4, 3, bias=False)],
            "uneven": [nn.ZeroPad2d((0, 1, 0, 1)), conv(4, 4, 3, stride=2, bias=False)],
            "bias": [conv(4, 4, 3, padding=1)],
            "one-dimensional": [nn.ConstantPad1d(2, 0.0), conv(4, 4, 3, dilation=2, bias=False)],
            "grouped": [nn.ZeroPad2d((2, 2, 1, 1)), conv(4, 4, 3, groups=2, bias=False)],
            "transposed": [nn.ConvTranspose2d(4, 4, 3, bias=False)],
            "constant": [nn.ConstantPad2d(1, 0.5), conv(4, 4, 3, bias=False)],
        }[inner]
        model = nn.Sequential(*layers, norm(4), nn.Tanh(), *layers, norm(4), nn.Flatten()).eval().double()
        for module in model.modules():
            if isinstance(module, norm):
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.uniform_(module.weight, -2.0, 2.0)
        x = torch.randn(3, 4, *[9] * dims, dtype=torch.float64)
        _, products = trace(model, x)
        directions = torch.randn(2, *x.shape, dtype=torch.float64)
        got = products.jvp(np.arange(3), directions)
        want = [torch.func.jvp(model, (x,), (direction,))[1] for direction in directions]
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-12, atol=1e-13)
        with CountedOperations() as counted:
            products.jvp(np.array([0]), directions[:1, :1])
        assert counted["aten.mul.Tensor"] == (4 if inner == "transposed" else 0)
        assert counted["aten.constant_pad_nd.default"] == (2 if inner == "uneven" else 0)
        assert counted["aten.add.Tensor"] == 0

    def test_a_product_takes_a_forward_pass(self):
        """A convolution for each layer that is one, and nothing that depends on x alone."""
        model, x = make("cnn with batchnorm")
        with CountedOperations() as eager:
            torch.func.jvp(lambda v: model(v.clone()), (x[:1],), (x[:1],))
        _, products = trace(model, x)
        with CountedOperations() as operations:
            products.jvp(np.array([0]), x[:1].unsqueeze(0))
        assert operations["aten.convolution.default"] == 2
        assert eager["aten.convolution.default"] >= 4
        assert operations["aten.native_batch_norm.default"] == 0
        assert operations["aten.max_pool2d_with_indices.default"] == 0
        assert sum(operations.values()) < sum(eager.values()) / 3

    @pytest.mark.parametrize("name", list(MODELS))
    def test_models_of_every_kind_are_traced(self, eager, name):
        model, x = make(name, torch.float64)
        with linearize(model, x) as graph:
            passes = ModelPasses(graph, np.arange(len(x)), None)
            directions = torch.randn(len(x), 3, x[0].numel(), dtype=torch.float64)
            got = passes.jvp(np.arange(len(x)), directions)
        assert len(eager) == 1
        torch.testing.assert_close(got, directions @ dense(model, x)[1].mT, rtol=1e-10, atol=1e-12)

    def test_an_operation_without_a_batching_rule_stays_quiet(self, capfd, recwarn):
        class Taken(nn.Module):
            def forward(self, x):
                return (x**2).flatten().take(torch.arange(2 * len(x)).view(-1, 2))

        model = Taken()
        x = torch.rand(3, 2, dtype=torch.float64)
        _, products = trace(model, x)
        directions = torch.randn(2, 3, 2, dtype=torch.float64)
        want = torch.einsum("end,ked->ken", dense(model, x)[1], directions.flatten(2))
        torch.testing.assert_close(products.jvp(np.arange(3), directions), want)
        assert capfd.readouterr().err == ""
        assert not recwarn.list


class TestTheModelChanges:
    """A trace is kept from call to call, while the model may change in any way."""

    @pytest.fixture
    def model(self, eager):
        torch.manual_seed(0)
        model = Steered().eval()
        assert equals_exact(model, self.x())
        assert len(eager) == 1
        return model

    @staticmethod
    def x():
        return torch.randn(3, 30, generator=torch.Generator().manual_seed(1))

    @pytest.mark.parametrize("how", ["in place", "data", "replaced", "loaded", "buffer", "buffer replaced"])
    def test_weights_need_no_new_trace(self, eager, model, how):
        torch.manual_seed(1)
        fresh = torch.randn(40, 30) / 5
        if how == "in place":
            model.first.weight.data.copy_(fresh)
        elif how == "data":
            model.first.weight.data = fresh
        elif how == "replaced":
            model.first.weight = nn.Parameter(fresh)
        elif how == "loaded":
            model.load_state_dict(Steered().state_dict(), assign=True)
        elif how == "buffer":
            model.shift += 0.5
        else:
            model.shift = torch.full((40,), 0.3)
        assert equals_exact(model, self.x())
        assert len(eager) == 1

    @pytest.mark.parametrize("how", ["attribute", "flag", "child", "hook", "renamed"])
    def test_what_a_trace_cannot_see_makes_a_new_one(self, eager, model, how):
        if how == "attribute":
            model.scale = 1.5
        elif how == "flag":
            model.train()
        elif how == "child":
            model.activation = nn.Sigmoid()
        elif how == "hook":
            model.first.register_forward_hook(lambda module, inputs, output: output * 1.5)
        else:
            model.extra = nn.Linear(1, 1)
        assert equals_exact(model, self.x())
        assert len(eager) == 2
        assert equals_exact(model, self.x())
        assert len(eager) == 2

    def test_another_gradient_behind_the_same_logits(self, eager, model):
        """The logits cannot tell; the gradients that were taken by backward passes do."""
        before = analyze(model, self.x()).linearized_robustness
        model.straight = True
        assert equals_exact(model, self.x())
        found = analyze(model, self.x(), method="certified")
        assert (found.vjps < 120).all()  # it was not left to exact rows
        assert not torch.allclose(before, analyze(model, self.x()).linearized_robustness, rtol=0.05)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_has_changed_for_one_example_of_a_group_makes_a_new_one(self, eager, dtype):
        """A limit that a later example alone meets: in bfloat16 that changes its logits no more than rounding does."""

        class Limited(Steered):
            limit = 1e9

            def forward(self, x):
                hidden = nn.functional.hardtanh(self.first(x), -self.limit, self.limit)
                return self.last(hidden)

        torch.manual_seed(0)
        model, x = Limited().eval().to(dtype), torch.randn(4, 30).to(dtype)
        x[:3] *= 0.3
        assert analyze(model, x, method="certified").certified.all()
        assert len(eager) == 1
        largest = model.first(x).abs().amax(1)
        model.limit = 0.99 * largest[3].item()
        assert (largest[:3] < model.limit).all()
        assert analyze(model, x, method="certified").certified.all()
        assert len(eager) == 2

    def test_a_copy_has_a_trace_of_its_own(self, eager, model):
        twin = copy.deepcopy(model)
        twin.scale = 0.5
        assert equals_exact(twin, self.x())
        assert equals_exact(model, self.x())
        assert len(eager) == 2

    def test_other_shapes_and_dtypes(self, eager, model):
        assert equals_exact(model.double(), self.x().double())
        assert equals_exact(model.float(), self.x())
        assert len(eager) == 2

    def test_it_dies_with_the_model(self, eager):
        model = Steered().eval()
        analyze(model, self.x(), method="certified")
        assert len(eager) == 1
        alive = weakref.ref(model)
        del model
        gc.collect()
        assert alive() is None


class TestWhatCannotBeTraced:
    def test_writing_into_slices(self, eager):
        """vmap gets the traced form of this wrong; the products come from forward mode, and are right."""
        x = torch.randn(6, 5, dtype=torch.float64)
        with pytest.raises(traced.UntraceableError, match="as_strided"):
            trace(Written(), x)
        with linearize(Written(), x) as graph:
            directions = torch.randn(6, 3, 5, dtype=torch.float64)
            got = ModelPasses(graph, np.arange(6), None).jvp(np.arange(6), directions)
        jacobian = dense(lambda x: Written()(x).unsqueeze(1), x)[1]
        torch.testing.assert_close(got[:, :, 1:], directions @ jacobian.mT / 2)
        assert eager == []

    @pytest.mark.parametrize("kind", [Branching, Custom])
    def test_takes_another_way(self, eager, kind):
        torch.manual_seed(0)
        model = kind().eval()
        x = torch.randn(4, 30)
        x[:2] = x[:2].abs()
        x[2:] = -x[2:].abs()
        exact, found = analyze(model, x, method=Exact(memory_limit=0)), analyze(model, x, method="certified")
        assert found.certified.all()
        torch.testing.assert_close(found.linearized_robustness, exact.linearized_robustness, rtol=1e-5, atol=0.0)
        assert eager == []

    def test_a_model_that_differs_at_every_call(self, eager):
        """Noise in the forward pass is an error, before anything is traced."""
        torch.manual_seed(0)

        class Noisy(Steered):
            def forward(self, x):
                return super().forward(x + 1e-3 * torch.randn_like(x))

        for count in (1, 3):
            with pytest.raises(ValueError, match="two runs of the same batch have different logits"):
                analyze(Noisy().eval(), torch.randn(count, 30), method="certified")
        assert eager == []

    def test_a_callable_that_is_no_module(self, eager):
        torch.manual_seed(0)
        model = Steered().eval()
        assert equals_exact(lambda x: model(2 * x), torch.randn(3, 30))
        assert eager == []

    def test_a_model_that_keeps_what_it_computed(self, eager):
        """Tracing leaves nothing behind in the model: neither its attributes nor what other modules hold of it change."""

        class Keeping(Steered):
            kept = None

            def forward(self, x):
                if self.kept is None:
                    self.kept = [self.first.weight.sum() * 1e-3]
                return super().forward(x + self.kept[0])

        torch.manual_seed(0)
        model, x = Keeping().eval().requires_grad_(False), torch.randn(3, 30)
        assert equals_exact(model, x)
        model.kept = None
        trace(model, x)
        assert model.kept is None
        assert len(eager) == 2
        assert not torch._is_functional_tensor(model(x))

    def test_small_batches_of_small_models_wait(self, monkeypatch):
        made = []
        right = traced.Trace.__init__
        monkeypatch.setattr(traced.Trace, "__init__", lambda self, *args: (made.append(1), right(self, *args))[1])
        torch.manual_seed(0)
        model, x = Steered().eval(), torch.randn(4, 30)
        analyze(model, x, method="certified")
        assert made == []
        monkeypatch.setattr(products, "LESS", 1.0)
        monkeypatch.setattr(traced, "PAYS", 7 * 150)  # bytes: above those of 7 examples, below those of 8
        analyze(model, x, method="certified")
        assert made == [1]
        analyze(model, x, method="certified")
        assert made == [1]
