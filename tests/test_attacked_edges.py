"""What else `certified` promises: a hidden seed, a slack that no probe decides, rows where a model refuses, −inf, NaN."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacked import assert_kept, assert_right, dense, ratios, reported
from chance import REJECT, chance_at_least
from torch import nn

import fastsal
from fastsal import Candidates, Certified, Exact, analyze, margin_geometry
from fastsal.methods.base import Question
from fastsal.methods.certified import certify, plan
from fastsal.methods.certified.probes import Normals
from fastsal.model import traced

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {"exact": Exact(), "rows": Exact(memory_limit=0), "candidates": Candidates(3), "certified": Certified()}
each_method = pytest.mark.parametrize("method", METHODS)


def network(classes=100, entries=40, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(entries, 60), nn.Tanh(), nn.Linear(60, classes))
    return model.to(dtype).eval().requires_grad_(False), torch.randn(4, entries, dtype=dtype)


class Public(nn.Module):
    """A linear classifier at x = 1, whose last row no probe of seed 0 sees, and which is the nearest by 30 %."""

    def __init__(self, seed, entries=500, classes=100, rank=20):
        super().__init__()
        torch.manual_seed(seed)
        normals = Normals(0, entries, torch.device("cpu"))
        low = torch.randn(rank, entries, dtype=torch.float64)
        weight = torch.randn(classes, rank, dtype=torch.float64) @ low / 5
        basis = torch.linalg.qr(torch.cat((normals.probes(300), normals.pilot_probes, low)).T).Q
        hidden = torch.randn(entries, dtype=torch.float64)
        for _ in range(2):
            hidden -= basis @ (basis.T @ hidden)
        logits = torch.cat((torch.zeros(1), -1 - 2 * torch.rand(classes - 2), torch.tensor([-8.0]))).double()
        rest = ratios(logits[None, :-1], weight[None, :-1])[0].min()
        # Orthogonal to the predicted row: the squares of both lengths add up to that of the difference.
        length = ((8 / (0.7 * rest)).square() - weight[0].square().sum()).sqrt()
        weight[-1] = hidden * (length / hidden.norm())
        self.weight, self.bias = nn.Parameter(weight), logits - weight.sum(1)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("model_seed", range(3))
def test_a_public_seed_and_one_of_the_system(model_seed):
    """Whoever knows the probes beforehand can hide a class from them; nobody knows those of seed=None."""
    model, x = Public(model_seed), torch.ones(1, 500, dtype=torch.float64)
    fooled = analyze(model, x, method=Certified(seed=0))
    assert fooled.certified.all()
    assert fooled.linearized_robustness > 1.4 * ratios(*dense(model, x)).amin()
    for seed in (None, 1):
        assert_right(model, x, method=Certified(seed=seed))


class Shrunk:
    """The passes (fastsal.model.products) of given Jacobians [E, n, D] whose forward mode is that of others, [E, n, D]."""

    pairs = 256

    def __init__(self, logits, rows, other):
        self.logits, self.rows, self.other, self.dimension = logits, rows, other, rows.shape[2]

    def vjp(self, examples, cotangents):
        return cotangents @ self.rows[examples]

    def jvp(self, examples, directions):
        return directions @ self.other[examples].mT

    def distrust(self):
        pass


class TestSlack:
    """One class decides, by a hair. Its products are too small by η in the basis, and by η along the probes."""

    DELTA, BATCHES, E, D, MANY = 0.3, 8, 60, 60, 90
    KNOWN, EARLY, ERROR = 0.9, 0.036, 0.285  # the share that the basis knows; the others' errors, of which η is 8 times

    def problem(self, seed):
        generator = torch.Generator().manual_seed(seed)
        E, D, MANY, LENGTH = self.E, self.D, self.MANY, 12.0
        rows = 0.02 * torch.randn(E, MANY, D, generator=generator, dtype=torch.float64)
        logits = -10 + 0.1 * torch.randn(E, MANY, generator=generator, dtype=torch.float64)
        logits[:, 0], logits[:, 1], logits[:, -1] = 0.0, -1.0, -LENGTH
        one, two = torch.randn(2, E, D, generator=generator, dtype=torch.float64)
        one = one / one.norm(dim=1, keepdim=True)
        rows[:, 1] = rows[:, 0] + one  # ratio 1, among those that are evaluated first
        span = torch.linalg.qr(torch.cat((one.unsqueeze(1), rows[:, :19]), 1).mT).Q
        two = two - (span @ (span.mT @ two.unsqueeze(2))).squeeze(2)
        two = two / two.norm(dim=1, keepdim=True)
        known, rest = self.KNOWN, math.sqrt(1 - self.KNOWN**2)
        rows[:, -1] = rows[:, 0] + 1.001 * LENGTH * (known * one + rest * two)
        other = rows * (1 + self.EARLY * (1 - 2 * (torch.arange(MANY) % 2))).view(1, -1, 1)
        other[:, -1] = other[:, 0] + 1.001 * LENGTH * ((known - self.ERROR) * one + max(0, rest - self.ERROR) * two)
        return Shrunk(logits, rows, other), ratios(logits, rows)

    def test_misses_stay_below_delta(self, monkeypatch):
        forecast = plan.forecast

        def never_rows_alone(*arguments):
            promise, cost, count = forecast(*arguments)
            return promise, cost, torch.where(count == 0, 20, count)

        monkeypatch.setattr(plan, "worth_more", lambda at, *rest: torch.ones_like(at.best, dtype=torch.bool))
        monkeypatch.setattr(plan, "forecast", never_rows_alone)
        misses = 0
        for batch in range(self.BATCHES):
            passes, ratio = self.problem(batch)
            found, _ = reported(certify, passes, Certified(self.DELTA, None, batch), Question(2.0))
            least = ratio.amin(1) * (1 + 1e-12)
            above = ratio.gather(1, found.winners[:, 1:]).squeeze(1) > least
            misses += int(((found.certified & above) | (found.lower_bound > least)).sum())
        assert chance_at_least(misses, self.BATCHES * self.E, self.DELTA) > REJECT


@pytest.mark.parametrize("norm", [2.0, math.inf])
@pytest.mark.parametrize(("classes", "precision"), [(6000, 2e-3), (2000, 6e-3), (1000, 1e-4)])
def test_one_wrong_class_among_many_of_low_precision(classes, precision, norm):
    """Products as 16 bits give them: what rounding may do to all classes together is as large as what is wrong with one."""
    E, D = 4, 50
    generator = torch.Generator().manual_seed(classes)
    rows = torch.randn(E, classes, D, generator=generator, dtype=torch.float64)
    logits = -1 - 3 * torch.rand(E, classes, generator=generator, dtype=torch.float64)
    logits[:, 0], logits[:, -1] = 0.0, -1.1
    other = rows * (1 + precision * torch.randn(rows.shape, generator=generator, dtype=torch.float64))
    other[:, -1] *= 0.02
    ratio = ratios(logits, rows, norm)
    # The last class is the nearest by 20 %.
    for _ in range(60):
        far = ratio[:, -1] > 0.8 * ratio[:, :-1].amin(1)
        rows[far, -1] *= 1.1
        ratio = ratios(logits, rows, norm)
    found, _ = reported(certify, Shrunk(logits, rows, other), Certified(), Question(norm))
    least = ratio.amin(1)
    reached = ratio.gather(1, found.winners[:, 1:]).squeeze(1)
    assert (reached[found.certified] <= least[found.certified] * (1 + 1e-9)).all()
    assert (found.lower_bound <= least * (1 + 1e-9)).all()


def wrapped(value):
    return torch._C._functorch.is_functorch_wrapped_tensor(value)


class Picky(torch.autograd.Function):
    """A backward pass that refuses what vmap hands to it."""

    @staticmethod
    def forward(ctx, x, error):
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if wrapped(grad):
            raise ctx.error("one gradient at a time, please")
        return grad.clone(), None


ERRORS = [
    TypeError,
    ValueError,
    NotImplementedError,
    KeyError,
    AttributeError,
    RuntimeError,
    AssertionError,
    IndexError,
]


class TestRefusals:
    """An exception of the model in a pass that exact rows do not take is no exception of `analyze`."""

    @pytest.mark.parametrize("module", [False, True])
    @pytest.mark.parametrize("error", ERRORS)
    def test_under_functorch(self, monkeypatch, error, module):
        """Forward mode and traces; the derivative of a backward pass may still serve, without a warning."""
        monkeypatch.setattr(traced, "PAYS", 0)
        net, x = network()

        class Refusing(nn.Module):
            def forward(self, x):
                if wrapped(x):
                    raise error("no wrappers, please")
                return net(x)

        assert_right(Refusing() if module else Refusing().forward, x)

    @each_method
    @pytest.mark.parametrize("error", ERRORS)
    def test_in_every_pass_but_a_plain_one(self, error, method):
        net, x = network()

        def model(x):
            if wrapped(x):
                raise error("no wrappers, please")
            return net(Picky.apply(x, error))

        found, told = reported(analyze, model, x, method=METHODS[method])
        assert told
        if method != "candidates":
            assert found.certified.all()
            assert_kept(found, ratios(*dense(model, x)))

    @pytest.mark.parametrize("error", ERRORS)
    def test_in_second_derivatives_too(self, error):
        """Neither way is left: exact rows, and one warning."""
        net, x = network()

        class Once(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.sin()

            @staticmethod
            def backward(ctx, grad):
                if torch.is_grad_enabled():
                    raise error("no second derivatives, please")
                return grad * ctx.saved_tensors[0].cos()

        def model(x):
            if wrapped(x):
                raise error("no wrappers, please")
            return net(Once.apply(x))

        x_leaf = x.clone().requires_grad_()
        rows = [torch.autograd.grad(one.sum(), x_leaf, retain_graph=True)[0] for one in model(x_leaf).unbind(1)]
        found, told = reported(analyze, model, x, method=Certified())
        assert found.certified.all()
        assert found.vjps.tolist() == [100] * 4
        assert_kept(found, ratios(model(x).detach(), torch.stack(rows, 1)))
        assert len([text for text in told if "row" in text]) == 1


class TestNumbers:
    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_masked_logits_cost_no_passes(self, dtype, norm):
        """A logit of −inf is no candidate, whatever its gradient."""
        net, x = network(300, dtype=dtype)
        masked = torch.rand(4, 300) < 0.7
        masked.scatter_(1, net(x).topk(5).indices, False)

        class Masked(nn.Module):
            def forward(self, z):
                return net(z[:, :-300]).masked_fill(z[:, -300:].detach() > 0.5, -math.inf)

        z = torch.cat((x, masked.to(dtype)), 1)
        found, _ = reported(analyze, Masked(), z, norm=norm, method=Certified())
        plain = analyze(net, x, norm=norm, method=Certified())
        assert found.certified.all()
        assert (found.vjps + found.jvps <= plain.vjps + plain.jvps + 10).all()
        logits, rows = dense(Masked(), z)
        ratio = torch.where(masked, math.inf, ratios(logits.clamp(min=-1e30), rows, norm))
        assert_kept(found, ratio)

    def test_masked_by_addition(self):
        net, x = network(300)
        mask = torch.where(torch.rand(300) < 0.5, -math.inf, 0.0)
        mask[net(x).topk(3).indices.flatten()] = 0.0
        found, _ = reported(analyze, lambda z: net(z) + mask, x, method=Certified())
        assert found.certified.all()
        assert (found.vjps + found.jvps < 150).all()
        assert_kept(found, torch.where(mask.isfinite(), ratios(*dense(net, x)), math.inf))

    @pytest.mark.parametrize("method", [Certified(), Certified(max_passes=30)], ids=str)
    def test_bounds_are_rounded_down(self, method):
        """Of a linear classifier, whose rows are its weights, to the last bit. (Of exact rows it is the result itself.)"""
        torch.manual_seed(0)
        model, x = nn.Linear(50, 200), torch.randn(200, 50)
        found = analyze(model, x, method=method, backend="reference")
        rho = ratios(model(x).detach(), model.weight.detach().expand(200, -1, -1)).amin(1)
        assert found.lower_bound.dtype == torch.float32
        # Two float64 sums of 50 squares may differ in their last bits.
        assert (found.lower_bound.double() <= rho * (1 + 1e-14)).all()

    @each_method
    @pytest.mark.parametrize("where", ["x", "logits", "gradient", "gradient and a tie"])
    def test_a_nan_is_not_certified(self, where, method):
        net, x = network()

        def model(x):
            logits = net(x)
            if where == "logits":
                logits = torch.where((x[:, :1] > 9) & (torch.arange(100) == 77), math.nan, logits)
            if "gradient" in where:  # of a class of a margin above zero: 0 · inf
                hole = torch.where(x[:, :1] > 9, 0.0, 1.0)
                logits = logits - F.pad((hole * (x[:, :1] - 9)).abs().sqrt() * 0 - 2 * (1 - hole), (77, 22))
            if "tie" in where:
                logits = torch.where((x[:, :1] > 9) & (torch.arange(100) < 2), 50.0, logits)
            return logits

        x[1, 0] = math.nan if where == "x" else 9.5
        found, _ = reported(analyze, model, x, method=METHODS[method])
        assert (~found.linearized_robustness.isnan() | ~found.certified).all()
        if method != "candidates":
            assert found.linearized_robustness.isnan().tolist() == [False, True, False, False]
            assert found.certified.tolist() == [True, False, True, True]

    @pytest.mark.parametrize("place", ["logits", "jacobian", "x"])
    def test_a_nan_at_tensor_level(self, place):
        given = {"logits": torch.randn(3, 5), "jacobian": torch.randn(3, 5, 4), "x": torch.randn(3, 4)}
        given[place][1].view(-1)[0] = math.nan
        found = margin_geometry(**given)
        assert (~found.linearized_robustness.isnan() | ~found.certified).all()
        if place != "x":
            assert found.certified.tolist() == [True, False, True]

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    def test_prelu_at_zero(self, norm):
        """torch's forward-mode and backward derivatives differ there; a warning names the layer."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 60, bias=False), nn.PReLU(60, 0.2), nn.Linear(60, 120)).requires_grad_(
            False
        )
        found, told = reported(assert_right, model, torch.zeros(2, 40), norm)
        assert (found.vjps == 120).all()
        assert len(told) == 1
        assert "PReLU" in told[0]
        assert "exact rows" in told[0]


class Counting(nn.Module):
    """Counts its calls in buffers, in place, by assignment, and in one that it makes when it is first called."""

    def __init__(self, classes):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, classes))
        self.register_buffer("inside", torch.zeros(3))
        self.register_buffer("assigned", torch.zeros(()))

    def forward(self, x):
        self.inside += 1
        self.assigned = self.assigned + 1
        return self.net(x)


@pytest.mark.parametrize("classes", [5, 120])
@pytest.mark.parametrize("pays", [0, traced.PAYS])
@each_method
def test_buffers_are_as_before(monkeypatch, method, pays, classes):
    monkeypatch.setattr(traced, "PAYS", pays)
    model, x = Counting(classes), torch.randn(4, 30)
    model(x)
    held = model.inside
    for call in (analyze, fastsal.deepfool):
        for _ in range(2):
            reported(call, model, x, method=METHODS[method])
            assert model.inside is held
            assert model.inside.tolist() == [1.0] * 3
            assert model.assigned.tolist() == 1.0
            assert not model.assigned.requires_grad
    assert sorted(dict(model.named_buffers())) == ["assigned", "inside"]


def test_the_cache_of_traces_is_bounded(monkeypatch):
    """Thirty input shapes leave a few traces, not thirty."""
    monkeypatch.setattr(traced, "PAYS", 0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Tanh(), nn.AdaptiveAvgPool1d(5), nn.Flatten(), nn.Linear(20, 90))
    for size in range(20, 50):
        assert analyze(model, torch.randn(1, 1, size), method=Certified()).certified.all()
    assert 0 < len(traced._known[model]) <= 8
    assert np.isfinite(analyze(model, torch.randn(1, 1, 20), method=Certified()).lower_bound.item())
