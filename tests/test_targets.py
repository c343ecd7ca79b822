"""`target` and `classes`: the signed margin of a given class, and the nearest of some, against the definition in float64."""

import math

import pytest
import torch
from model.test_function import alone, nearest, problem, reference
from torch import nn
from truth import geometry_truth

import fastsal
from fastsal import Candidates, Certified, Exact, analyze

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = Exact(memory_limit=0)
NORMS = (1.0, 2.0, math.inf)
METHODS = {"head": Exact(), "rows": ROWS, "certified": Certified(), "candidates": Candidates(199)}
B, N = 7, 200


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    """Groups of two examples."""
    monkeypatch.setattr("fastsal.methods.certified.GROUP_BYTES", 0)


def network(seed=0, classes=N):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(30, 24), nn.Tanh(), nn.Linear(24, classes)).double().requires_grad_(False)
    return model, torch.randn(B, 30, dtype=torch.float64)


def dense(model, x):
    return reference(lambda example, value: model(value), x)


def ranked(logits, ranks):
    """The class of each example's rank among the logits, int64 [B]."""
    return logits.argsort(1, descending=True)[torch.arange(len(logits)), torch.tensor(ranks)]


def asked(kind, logits):
    """A target, or none, and classes, or none."""
    target = classes = None
    generator = torch.Generator().manual_seed(1)
    if "target" in kind:
        target = ranked(logits, [0, 1, 2, 5, 40, 150, N - 1])
    if "mask" in kind:
        classes = torch.rand(B, N, generator=generator) < torch.tensor([0.9, 0.6, 0.05, 0.5, 0.7, 0.02, 0.9]).unsqueeze(
            1
        )
    if "list" in kind:
        classes = torch.rand(N, generator=generator) < 0.6
    return target, classes


def able(norm):
    return [name for name, method in METHODS.items() if norm in method.norms]


CASES = [(norm, name) for norm in NORMS for name in able(norm)]


@pytest.mark.parametrize("kind", ["target", "mask", "list", "target and mask", "target and list"])
@pytest.mark.parametrize(("norm", "name"), CASES)
def test_every_method(norm, name, kind):
    model, x = network()
    logits, rows = dense(model, x)
    target, classes = asked(kind, logits)
    want = nearest(logits, rows, norm, target, None if classes is None else classes.expand(B, N))
    found = analyze(model, x, target=target, classes=classes, norm=norm, method=METHODS[name])
    torch.testing.assert_close(found.linearized_robustness, want[0], rtol=1e-9, atol=0.0)
    assert torch.equal(found.runner_up, want[1])
    assert torch.equal(found.prediction, logits.argmax(1))
    if target is not None and classes is None:
        assert ((found.linearized_robustness < 0) == (target != logits.argmax(1))).all()
    assert (found.lower_bound <= found.linearized_robustness + 1e-12).all()
    if name != "candidates":
        assert found.certified.all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["head", "rows"])
def test_distances_of_all_classes(norm, name):
    model, x = network()
    logits, rows = dense(model, x)
    target, classes = asked("target and mask", logits)
    each, q = torch.arange(B), {1.0: math.inf, 2.0: 2.0, math.inf: 1.0}[norm]
    gap = torch.linalg.vector_norm(rows[each, target].unsqueeze(1) - rows, q, dim=2)
    want = (logits[each, target].unsqueeze(1) - logits) / gap
    want[each, target] = math.inf
    want = want.masked_fill(~classes, math.inf)
    found = analyze(model, x, target=target, classes=classes, norm=norm, method=METHODS[name])
    torch.testing.assert_close(found.distances, want, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("norm", NORMS)
def test_every_quantity_is_the_target_s(norm):
    """By the truth in long double, of the target and the nearest class alone: the latter's logit may be the higher one."""
    model, x = network()
    logits, rows = dense(model, x)
    target = ranked(logits, [0, 1, 2, 5, 40, 150, N - 1])
    found = analyze(model, x, target=target, norm=norm, keep_saliency=True)
    each = torch.arange(B)
    pair = torch.stack((target, found.runner_up), 1)
    truth = geometry_truth(
        logits.gather(1, pair), torch.stack([rows[each, which] for which in pair.t()], 1), x, norm, own=0
    )
    for name in fastsal.tensor.reference.SCALARS:
        error = abs(truth.values[name] - getattr(found, name).numpy()) / truth.scales[name]
        assert float(error.max()) < 1e-12, name
    torch.testing.assert_close(found.saliency, rows[each, target])
    torch.testing.assert_close(found.binarized_saliency, rows[each, target] - rows[each, found.runner_up])


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_classes_above_the_target_are_taken_and_settle_it(norm):
    model, x = network()
    logits, _ = dense(model, x)
    ranks = [0, 1, 2, 5, 40, 150, 90]
    found = analyze(model, x, target=ranked(logits, ranks), norm=norm, method=Certified())
    for rank, vjps, jvps in zip(ranks[1:], found.vjps[1:].tolist(), found.jvps[1:].tolist(), strict=True):
        assert jvps == 0
        assert vjps >= rank + 1
    assert found.vjps[1] <= 5  # the target, the highest others, and a mixture of the rest, where a NaN would show
    assert found.jvps[0] > 0


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_a_limit_of_passes(norm):
    """What is below a target far down is not known before all above it have been looked at."""
    model, x = network()
    logits, rows = dense(model, x)
    target = ranked(logits, [0, 1, 2, 5, 40, 150, N - 1])
    want = nearest(logits, rows, norm, target)[0]
    found = analyze(model, x, target=target, norm=norm, method=Certified(max_passes=12))
    assert ((found.vjps + found.jvps) <= 12).all()
    assert (found.linearized_robustness >= want - 1e-9).all()
    assert (found.lower_bound <= want + 1e-9).all()
    assert not found.certified[4:].any()
    assert found.lower_bound[4:].tolist() == [-math.inf] * 3
    few = analyze(model, x, target=target, norm=norm, method=Candidates(3))
    assert few.lower_bound.tolist() == [0.0] + [-math.inf] * 6


@pytest.mark.parametrize("method", [ROWS, Exact(), Certified(), Candidates(199)], ids=str)
def test_ties(method):
    """Equal logits are on the boundary; of equal ratios the lowest class is the nearest, on either side."""
    rows = torch.zeros(N, 30, dtype=torch.float64)
    rows[:, 0] = 1.0
    rows[torch.arange(N), torch.arange(N) % 29 + 1] = 1.0  # every class as far from class 0 as any, but each 29th
    bias = torch.full((N,), -4.0, dtype=torch.float64)
    bias[[0, 7, 8, 12, 13]] = torch.tensor([0.0, 0.0, 2.0, 2.0, 1.0], dtype=torch.float64)

    def model(x):
        return x @ rows.T + bias

    x = torch.zeros(3, 30, dtype=torch.float64)
    found = analyze(model, x, target=torch.tensor([0, 8, 13]), method=method)
    # Class 0 lies below 8 and 12, which tie; 8 ties with 12, at distance 0; 13 lies below both.
    assert found.runner_up.tolist() == [8, 12, 8]
    torch.testing.assert_close(
        found.linearized_robustness, torch.tensor([-math.sqrt(2), 0.0, -1 / math.sqrt(2)], dtype=torch.float64)
    )
    classes = torch.ones(N, dtype=torch.bool)
    classes[[8, 12]] = False
    found = analyze(model, x, target=torch.tensor([0, 8, 13]), classes=classes, method=method)
    assert found.runner_up.tolist() == [13, 13, 0]
    classes[[13]] = False
    found = analyze(model, x[:1], target=torch.tensor([0]), classes=classes, method=method)
    assert (found.runner_up.item(), found.linearized_robustness.item()) == (7, 0.0)


@pytest.mark.parametrize("method", [ROWS, Exact(), Certified(), Candidates(99)], ids=str)
def test_equal_gradients_beyond_the_boundary(method):
    """A higher logit with the target's own gradient stays higher wherever one goes: −inf, the lowest class among such."""
    torch.manual_seed(0)
    rows = torch.randn(100, 8, dtype=torch.float64)
    rows[[30, 40]] = rows[20].clone()
    bias = torch.zeros(100, dtype=torch.float64)
    bias[[30, 40]] = 1.0
    x = 0.001 * torch.randn(2, 8, dtype=torch.float64)
    found = analyze(lambda x: x @ rows.T + bias, x, target=torch.tensor([20, 20]), method=method)
    assert found.linearized_robustness.tolist() == [-math.inf] * 2
    assert found.runner_up.tolist() == [30, 30]


@pytest.mark.parametrize("method", [ROWS, Exact(), Certified(), Candidates(99)], ids=str)
def test_a_nan_is_never_certified(method):
    torch.manual_seed(0)
    bias = torch.zeros(100, dtype=torch.float64)
    bias[50] = math.nan
    rows = torch.randn(100, 8, dtype=torch.float64)
    target = torch.tensor([3, 4])
    found = analyze(lambda x: x @ rows.T + bias, torch.randn(2, 8, dtype=torch.float64), target=target, method=method)
    assert found.linearized_robustness.isnan().all()
    assert not found.certified.any()
    assert found.runner_up.tolist() == [50, 50]
    classes = torch.arange(100) != 50
    x = torch.randn(2, 8, dtype=torch.float64)
    found = analyze(lambda x: x @ rows.T + bias, x, target=target, classes=classes, method=method)
    want = nearest(x @ rows.T, rows.expand(2, -1, -1), 2.0, target, classes)
    torch.testing.assert_close(found.linearized_robustness, want[0], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("method", [ROWS, Exact(), Certified(), Candidates(99)], ids=str)
def test_only_classes_that_cannot_be_reached(method):
    """Of logits of −inf, too, only those that are allowed come into question."""
    rows = torch.randn(100, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bias = torch.zeros(100, dtype=torch.float64)
    bias[[10, 40, 60]] = -math.inf
    classes = torch.zeros(100, dtype=torch.bool)
    classes[[40, 60]] = True
    x = torch.ones(2, 8, dtype=torch.float64)
    found = analyze(lambda x: x @ rows.T + bias, x, classes=classes, method=method)
    assert found.linearized_robustness.tolist() == [math.inf] * 2
    assert found.runner_up.tolist() == [40, 40]


def test_one_score():
    """A classifier with one score: class 0 is Ψ < 0."""
    model, x = nn.Linear(4, 1).double(), torch.randn(5, 4, dtype=torch.float64)
    plain = analyze(model, x)
    found = analyze(model, x, target=torch.zeros(5, dtype=torch.int64))
    sign = torch.where(model(x).squeeze(1) > 0, -1.0, 1.0)
    torch.testing.assert_close(found.linearized_robustness, sign * plain.linearized_robustness, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model, x = network()
    model, x = model.to(dtype), x.to(dtype)
    target = model(x).argsort(1)[:, 100]
    found = analyze(model, x, target=target, keep_saliency=True)
    assert (found.linearized_robustness.dtype, found.saliency.dtype) == (torch.float32, dtype)
    pair = torch.stack((target, found.runner_up), 1)
    scores = model(x).double().gather(1, pair)
    want = (scores[:, 0] - scores[:, 1]) / found.binarized_saliency.double().norm(dim=1)
    torch.testing.assert_close(
        found.linearized_robustness.double(), want, rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=0.0
    )


def test_differentiable():
    model, x = network(classes=12)
    target = torch.arange(B) % 12
    x.requires_grad_()

    def margins(x):
        return analyze(model, x, target=target, differentiable=True).linearized_robustness

    (found,) = torch.autograd.grad(margins(x).sum(), x)
    step = 1e-5 * torch.randn_like(x)
    with torch.no_grad():
        want = (margins(x + step) - margins(x - step)) / 2
    torch.testing.assert_close((found * step).sum(1), want, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("norm", [2.0, math.inf])
@pytest.mark.parametrize("name", ["head", "rows", "certified", "candidates"])
def test_all_four_together(name, norm):
    """Further inputs, a layer, some classes and targets, in groups of two."""
    model, x, args, kwargs = problem()
    points = model.embed(x)
    model.embed, embed = nn.Identity(), model.embed
    logits, rows = reference(alone(model, args, kwargs), points)
    model.embed = embed
    classes = torch.rand(5, 100, generator=torch.Generator().manual_seed(3)) < 0.8
    target = ranked(logits, [0, 2, 50, 1, 0])
    want = nearest(logits, rows, norm, target, classes)
    found = analyze(
        model,
        x,
        args=args,
        kwargs=kwargs,
        layer="embed",
        classes=classes,
        target=target,
        norm=norm,
        method=METHODS[name],
    )
    torch.testing.assert_close(found.linearized_robustness, want[0], rtol=1e-9, atol=0.0)
    assert torch.equal(found.runner_up, want[1])


def test_classes_of_a_walk():
    model, x = network()
    classes = torch.zeros(N, dtype=torch.bool)
    classes[[5, 60]] = True
    found = fastsal.deepfool(model, x, classes=classes)
    everywhere = fastsal.deepfool(model, x)
    assert (found.distance >= everywhere.distance * 0.999).all()
    with torch.no_grad():
        one = analyze(model, x, classes=classes)
    assert set(one.runner_up.tolist()) <= {5, 60}
    assert (one.vjps == 3).all()


class TestErrors:
    def test_target(self):
        model, x = network()
        for target, message in (
            (3, r"target: got int, wants integers \[B\] = \[7\]"),
            (torch.zeros(7), r"target: got torch.float32 of shape \(7,\)"),
            (torch.zeros(6, dtype=torch.int64), r"target: got torch.int64 of shape \(6,\)"),
            (torch.full((7,), N), r"target: got classes 200 to 200, wants 0 to 199"),
        ):
            for method in (Exact(), Certified()):
                with pytest.raises(ValueError, match=message):
                    analyze(model, x, target=target, method=method)

    def test_classes(self):
        model, x = network()
        for classes, message in (
            ([3], r"classes: got list, wants bool \[n\] = \[200\] or \[B, n\] = \[7, 200\]"),
            (torch.ones(N), r"classes: got torch.float32 of shape \(200,\)"),
            (torch.ones(6, N, dtype=torch.bool), r"classes: got torch.bool of shape \(6, 200\)"),
            (
                torch.zeros(N, dtype=torch.bool),
                "classes: allows an example no class but the one whose boundary is asked for",
            ),
        ):
            for method in (Exact(), Certified()):
                with pytest.raises(ValueError, match=message):
                    analyze(model, x, classes=classes, method=method)
        only = torch.zeros(B, N, dtype=torch.bool).scatter_(1, model(x).argmax(1, keepdim=True), True)
        with pytest.raises(ValueError, match="classes: allows an example no class"):
            analyze(model, x, classes=only)
