"""`certified` is right, or says that it is not: models whose forward mode, trace, head or batch is another model's."""

import math

import pytest
import torch
import torch.nn.functional as F
from attacked import (
    TWISTS,
    Scaled,
    Twisted,
    assert_kept,
    assert_right,
    calibrated,
    dense,
    hooked,
    inputs,
    ratios,
    reported,
)
from torch import nn

from fastsal import Certified, Exact, analyze
from fastsal.model import traced

pytestmark = pytest.mark.usefixtures("one_thread")


class Cosine(nn.Module):
    """A linear head for some classes, and a few-shot head for others, whose norms carry no gradient."""

    def __init__(self, scale, known=100, few=8, entries=40, width=30, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(entries, width), nn.Linear(width, known)
        self.prototypes, self.scale = torch.randn(few, width), scale

    def learn(self, x):
        """Prototypes from variants of one example [1, entries] of the new classes."""
        with torch.no_grad():
            self.prototypes = torch.tanh(self.body(x)) + 0.005 * torch.randn_like(self.prototypes)

    def forward(self, x):
        features = torch.tanh(self.body(x))
        with torch.no_grad():
            lengths = features.norm(dim=1, keepdim=True) * self.prototypes.norm(dim=1)
        few = self.scale * (features @ self.prototypes.T / lengths - 1) - 3
        return torch.cat((3 * self.head(features), few), 1)


class LowRank(nn.Module):
    """A linear classifier at x = 1; a hook makes some classes the nearest by a few percent, which before were not by 0.5 %."""

    def __init__(self, times, norm, classes=150, entries=60, rank=8, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        weight = torch.randn(classes, rank, dtype=torch.float64) @ torch.randn(rank, entries, dtype=torch.float64)
        weight[-9:] *= 3.0
        logits = torch.cat((torch.zeros(1), -2 - 3 * torch.rand(classes - 1))).double().unsqueeze(0)
        ratio = ratios(logits, weight.unsqueeze(0), norm)[0]
        logits[0, -9:] *= 1.005 * ratio[:-9].min() / ratio[-9:]
        self.weight, self.bias, self.times = nn.Parameter(weight), logits[0] - weight.sum(1), times

    def forward(self, x):
        logits = F.linear(x, self.weight, self.bias)
        return torch.cat((logits[:, :-9], hooked(logits[:, -9:], self.times)), 1)


class Sizes(nn.Module):
    """A linear classifier at x = 1. Most rows are `big` times as large as those that matter, and their logits far below."""

    def __init__(self, big, classes=600, few=70, entries=200, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        weight = torch.randn(classes, entries)
        weight[few:-1] *= big
        weight[-1] *= 0.01
        logits = torch.cat((torch.zeros(1), -1 - 3 * torch.rand(classes - 2), torch.tensor([-1.6])))
        logits[few:-1] *= 20 * big
        self.weight, self.bias, self.part, self.times = nn.Parameter(weight), logits - weight.sum(1), 1, 1.0

    def forward(self, x):
        logits = F.linear(x, self.weight, self.bias)
        return torch.cat((logits[:, :-1], Scaled.apply(logits[:, -1:], self.times)), 1)


def told_of(twist, norm, case):
    """The warnings about a network whose nearest class only backward passes show; its answers are right and certified."""
    gap, seed, dtype, classes, entries = case
    model = Twisted(twist, classes, entries, seed=seed, dtype=dtype)
    x = inputs(model, 3, entries, seed)
    calibrated(model, x, gap, norm)
    found, told = reported(assert_right, model, x, norm)
    assert found.runner_up[0] >= classes - model.part
    return told


@pytest.mark.usefixtures("forward_mode")
class TestForwardModeIsAnother:
    """Backward passes of classes that nobody evaluates give other gradients than forward mode."""

    CASES = (
        # gap, seed, dtype, classes, entries
        (0.01, 0, torch.float32, 130, 60),
        (0.3, 1, torch.float64, 90, 150),
        (0.85, 2, torch.float32, 200, 25),
    )

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize("kind", TWISTS)
    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}")
    def test_is_finished_with_rows(self, kind, norm, case):
        told = told_of(TWISTS[kind], norm, case)
        assert len([text for text in told if "exact rows" in text]) == 1

    @pytest.mark.parametrize("max_passes", [25, 45, 80])
    @pytest.mark.parametrize("kind", ["no_grad", "data"])
    def test_lower_bounds_hold_with_a_limit(self, kind, max_passes):
        model = Twisted(TWISTS[kind], seed=3)
        x = inputs(model, 4, 60, 3)
        calibrated(model, x, 0.5)
        found, _ = reported(analyze, model, x, method=Certified(max_passes=max_passes))
        assert_kept(found, ratios(*dense(model, x)))

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize(("seed", "times"), [(1, 1.02), (3, 1.03), (1, 1.01)])
    def test_gradients_that_differ_by_a_few_percent(self, seed, times, norm):
        """All of the Jacobian is in the basis, so that bounds are as sharp as rounding lets them be."""
        model, x = LowRank(times, norm, seed=seed), torch.ones(1, 60, dtype=torch.float64)
        found, _ = reported(assert_right, model, x, norm)
        assert found.runner_up[0] >= 141

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize(("big", "gap", "seed"), [(1e5, 0.05, 0), (2e5, 0.3, 1), (1e5, 0.05, 3), (1e4, 0.01, 2)])
    def test_a_small_gradient_among_large_ones(self, big, gap, seed, norm):
        """What rounding may do to the others' products is no measure of what is wrong with those of one class."""
        model, x = Sizes(big, seed=seed), torch.ones(1, 200)
        calibrated(model, x, gap, norm)
        found, _ = reported(assert_right, model, x, norm)
        assert found.runner_up[0] == 599

    @pytest.mark.parametrize(("seed", "scale"), [(0, 100.0), (1, 200.0), (2, 100.0)])
    def test_a_few_shot_head_with_cosines(self, seed, scale):
        model = Cosine(scale, seed=seed)
        x = inputs(model, 3, 40, seed)
        model.learn(x[:1])
        found, told = reported(assert_right, model, x)
        assert found.runner_up[0] >= 100
        assert len([text for text in told if "exact rows" in text]) == 1


def kept_from_derivatives(value, times):
    value = value * 1
    if value.requires_grad:
        value.register_hook(lambda grad: grad.detach() * times)
    return value


def clamped(value, times):
    """Not linear in the gradient: rows of one class each come at `times`, small ones at far less."""
    value = value * 1
    if value.requires_grad:
        value.register_hook(lambda grad: torch.where(grad.abs() < 0.9, 0.1, times) * grad)
    return value


class TestDerivativesOfBackwardPasses:
    """Products are the derivatives of backward passes, where these are not the derivatives of what they compute."""

    CASES = TestForwardModeIsAnother.CASES

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize("kind", TWISTS)
    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}")
    def test_gradients_that_forward_mode_does_not_see_are_certified(self, kind, norm, case):
        told = told_of(TWISTS[kind], norm, case)
        if kind == "data":  # a backward pass that hides itself
            assert len([text for text in told if "exact rows" in text]) == 1
        else:
            assert told == []

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize("twist", [kept_from_derivatives, clamped])
    @pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}")
    def test_gradients_that_hide_from_their_derivative(self, twist, norm, case):
        told = told_of(twist, norm, case)
        assert len([text for text in told if "exact rows" in text]) == 1


class Steered(Twisted):
    """The last part's gradients are steered by a list, and its logits at black images are not."""

    def __init__(self, entries=60, **options):
        self.steer = [1.0]
        super().__init__(None, entries=entries, **options)
        self.extra = nn.Linear(entries, self.part, bias=False, dtype=self.last.weight.dtype)
        with torch.no_grad():
            self.last.weight[-self.part :] = 0.0
            self.extra.weight.mul_(0.1)

    times = property(lambda self: self.steer[0], lambda self, value: self.steer.__setitem__(slice(None), [value]))

    def forward(self, x):
        logits = self.last(torch.tanh(self.first(x)))
        return logits + F.pad(self.extra(x) * self.steer[0], (logits.shape[1] - self.part, 0))


@pytest.mark.parametrize("norm", [2.0, math.inf])
@pytest.mark.parametrize(("gap", "count", "seed"), [(0.01, 1, 0), (0.3, 2, 1), (0.85, 3, 2)])
def test_a_stale_trace(monkeypatch, norm, gap, count, seed):
    """Bit-equal logits at black images say nothing of the gradients there."""
    monkeypatch.setattr(traced, "PAYS", 0)
    model, x = Steered(seed=seed), torch.zeros(count, 60)
    assert_right(model, x, norm)
    calibrated(model, x, gap, norm)
    found, _ = reported(assert_right, model, x, norm)
    assert (found.runner_up >= 121).all()


class Underflowing(Twisted):
    """Weights of which forward mode multiplies the small ones first, and gets zero; backward passes the large one."""

    def __init__(self, entries=60, **options):
        super().__init__(None, entries=entries, **options)
        sizes = ((64, entries, 1e-21), (64, 64, 1e-27), (self.part, 64, 2e37))
        self.chain = nn.ParameterList(size * torch.randn(rows, columns) for rows, columns, size in sizes)
        with torch.no_grad():
            self.last.weight[-self.part :] = 0.0

    def forward(self, x):
        logits = 2e-9 * self.last(torch.tanh(self.first(x)))
        first, second, third = self.chain
        part = F.linear(F.linear(F.linear(x, first), second), third * self.times)
        return logits + F.pad(part, (logits.shape[1] - self.part, 0))


@pytest.mark.parametrize("norm", [2.0, math.inf])
@pytest.mark.parametrize(("gap", "seed"), [(0.01, 0), (0.2, 1), (0.6, 3)])
@pytest.mark.usefixtures("forward_mode")
def test_underflow_in_forward_mode(norm, gap, seed):
    model = Underflowing(seed=seed)
    x = inputs(model, 4, 60, seed)
    calibrated(model, x, gap, norm)
    assert model.times < 3  # no weight overflows
    found, _ = reported(assert_right, model, x, norm)
    assert found.runner_up[0] >= 121


class LogOfSoftmax(Twisted):
    """log(softmax(z)), whose gradient is NaN where the softmax is subnormal; one class of many is, with a steep gradient."""

    def __init__(self, below, steep, **options):
        super().__init__(None, part=1, small=steep, **options)
        self.below = below

    def forward(self, x):
        z = self.last(torch.tanh(self.first(x)))
        low = z[:, :-1].amax(1, keepdim=True).detach() - self.below + (z[:, -1:] - z[:, -1:].detach())
        return torch.log(torch.softmax(torch.cat((z[:, :-1], low), 1), 1))


@pytest.mark.parametrize("norm", [2.0, math.inf])
@pytest.mark.parametrize(
    ("below", "steep", "dtype", "seed"),
    [
        (88.9, 0.01, torch.float32, 0),
        (90.0, 0.01, torch.float32, 1),
        (710.0, 0.01, torch.float64, 2),
        (87.25, 4.0, torch.float32, 0),
        (88.0, 20.0, torch.float32, 1),
        (708.25, 4.0, torch.float64, 0),
    ],
)
def test_a_row_of_nan_that_nobody_evaluates(norm, below, steep, dtype, seed):
    """A mixture of cotangents may give a finite row where one alone gives a NaN, since 1 / softmax overflows."""
    model = LogOfSoftmax(below, steep, seed=seed, dtype=dtype)
    x = inputs(model, 5, 60, seed)
    logits, rows = dense(model, x)
    assert logits.isfinite().all()
    assert rows[:, -1].isnan().any(1).all()
    assert not rows[:, :-1].isnan().any()
    assert analyze(model, x, norm=norm, method=Exact(memory_limit=0)).linearized_robustness.isnan().all()
    found, _ = reported(analyze, model, x, norm=norm, method=Certified())
    assert (found.linearized_robustness.isnan() | ~found.certified).all()
    assert not found.certified.any()
    assert not (found.lower_bound > 0).any()


class Headed(nn.Module):
    """The logits have the bits of a linear head's output, and another gradient: a term of value 0, or a hook."""

    def __init__(self, kind, strength, classes=60, entries=30, features=10, seed=0, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(seed)
        self.body, self.head = nn.Linear(entries, features), nn.Linear(features, classes)
        self.skip = nn.Linear(entries, classes, bias=False)
        self.kind, self.strength = kind, strength
        self.factors = torch.linspace(1.0, 1.0 + strength, classes)
        self.to(dtype).eval()

    def forward(self, x):
        logits = self.head(torch.tanh(self.body(x)))
        term = self.strength * self.skip(x)
        if self.kind == "skip":
            return logits + term
        if self.kind == "straight-through":
            return logits + (term - term.detach())
        logits = logits * 1
        if logits.requires_grad:
            logits.register_hook(lambda grad: grad * self.factors.to(grad))
        return logits


@pytest.mark.parametrize("norm", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strength", [0.02, 2.0])
@pytest.mark.parametrize("kind", ["skip", "straight-through", "hook"])
def test_another_gradient_behind_the_head(kind, strength, dtype, norm):
    for seed in range(3):
        model = Headed(kind, strength, seed=seed, dtype=dtype)
        x = torch.zeros(2, 30, dtype=dtype) if kind == "skip" else torch.randn(5, 30, dtype=dtype)
        found, _ = reported(analyze, model, x, norm=norm, method=Exact())
        logits, rows = dense(model, x)
        own = logits.argmax(1, keepdim=True)
        offset = (rows.gather(1, own.unsqueeze(2).expand(-1, 1, 30)) - rows).double()
        length = torch.linalg.vector_norm(offset, {1.0: math.inf, 2.0: 2, math.inf: 1}[norm], dim=2)
        want = ((logits.gather(1, own) - logits).double() / length).scatter(1, own, math.inf)
        torch.testing.assert_close(found.distances.double(), want, rtol=1e-4, atol=0.0)
        torch.testing.assert_close(found.linearized_robustness.double(), want.amin(1), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [60, 300, 1000])
@pytest.mark.parametrize("strength", [0.003, 0.1, 1.0])
def test_another_gradient_of_one_class_behind_the_head(strength, classes, dtype):
    """A hook on one class of many: what rounding may do to all together is no measure of it."""
    model = Headed("hook", strength, classes, dtype=dtype)
    model.factors = torch.ones(classes).index_fill(0, torch.tensor(classes // 2), 1 + strength)
    x = torch.randn(3, 30, generator=torch.Generator().manual_seed(classes)).to(dtype)
    found, _ = reported(analyze, model, x, method=Exact())
    want = ratios(*dense(model, x))
    # Two ways to one row differ by some units of rounding; the distance of the class is off by about half of `strength`.
    units = {torch.float32: 1e-5, torch.bfloat16: 0.03, torch.float16: 0.004}[dtype]
    torch.testing.assert_close(found.distances.double(), want, rtol=units, atol=0.0)
