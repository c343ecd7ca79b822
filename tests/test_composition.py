"""What only shows where parts meet: a second group, a second call, one inconsistent example among good ones.

Each test names the mutation that it is there to kill.
"""

import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from attacked import Scaled, assert_kept, assert_right, dense, ratios, reported
from certificates import problem, search
from networks import network
from torch import nn

import fastsal
from fastsal import Candidates, Certified, Exact, analyze, margin_geometry
from fastsal.methods import certified
from fastsal.methods.base import Question
from fastsal.methods.certified import certify
from fastsal.model.linearization import Linearization, linearize
from fastsal.model.products import ModelPasses

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = Exact(memory_limit=0)


@pytest.fixture
def pairs(monkeypatch):
    """Groups of two examples."""
    monkeypatch.setattr(certified, "GROUP_BYTES", 0)


class TestGroups:
    @pytest.mark.parametrize("norm", [2.0, math.inf])
    def test_logits_are_joined_in_the_order_of_the_examples(self, pairs, norm):
        """Kills: the groups' logits joined in reverse."""
        model, x = network()
        found = assert_right(model, x, norm, rtol=1e-9)
        want = analyze(model, x, norm=norm, method=ROWS)
        for name in ("binarized_logit", "offset", "homogeneity", "bound"):
            torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=1e-9, atol=1e-12)

    def test_large_examples_take_more_than_one_group(self):
        """Kills: an error wherever a batch needs a second group. No constant is changed."""
        torch.manual_seed(0)
        model, x = nn.Linear(60000, 70).double().requires_grad_(False), torch.randn(5, 60000, dtype=torch.float64)
        held = certified.GROUP_BYTES // (8 * 20 * 60000)
        assert held < 5
        assert_right(model, x, rtol=1e-9)
        assert fastsal.deepfool(model, x, method="certified").success.all()

    def test_an_example_is_what_it_is_alone(self, pairs):
        """Kills: a later group that reuses probes, or has others. Passes and bounds of an example tell which it saw."""
        model, x = network()
        found = analyze(model, x, method=Certified())
        alone = [analyze(model, one, method=Certified()) for one in x.split(1)]
        for name in ("vjps", "jvps", "runner_up"):
            assert getattr(found, name).tolist() == [getattr(one, name).item() for one in alone]
        limited = analyze(model, x, method=Certified(max_passes=24))
        alone = torch.cat([analyze(model, one, method=Certified(max_passes=24)).lower_bound for one in x.split(1)])
        assert (~limited.certified).any()
        torch.testing.assert_close(limited.lower_bound, alone, rtol=1e-9, atol=0.0)

    def test_later_groups_see_the_same_probes(self, monkeypatch, pairs):
        """Kills the same: directions outside of every basis are those of the first group."""
        drawn, draw = [], certified.Search.__init__

        def listed(self, *arguments):
            draw(self, *arguments)
            drawn.append(self.normals)

        monkeypatch.setattr(certified.Search, "__init__", listed)
        model, x = network()
        analyze(model, x, method=Certified())
        assert len(drawn) == 4
        for normals in drawn:
            assert torch.equal(normals.probes(30), drawn[0].probes(30))
            assert torch.equal(normals.pilot_probes, drawn[0].pilot_probes)
            both = torch.cat((normals.pilot_probes, normals.probes(30)))
            assert (both @ both.T / 40 - torch.eye(32)).abs().max() < 1  # no probe comes twice


class TestTolerance:
    """Kills: slack by the basis part alone, or by the probes alone; a tolerance that is not checked, or larger than it may be.

    One class's gradient is another than its products, whichever class it is, along the basis or at right angles to it.
    """

    ERROR = 1e-3  # of the products of all classes, as 16 bits have them

    def search(self, seed, norm):
        """A search that is about to check, and its passes, at 40 copies of one example."""
        logits, rows = problem(1, 300, 60, seed, decay=1.0)
        logits, rows = logits.expand(40, -1).clone(), rows.expand(40, -1, -1).clone()
        noise = torch.randn(rows.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        passes = Given(logits, rows, rows * (1 + self.ERROR * noise))
        made = search(passes, norm=norm)
        made.probe(made.prepare())
        made._rows(made.state.examples)
        return made, passes

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize("inside", [True, False])
    @pytest.mark.parametrize("seed", range(2))
    def test_what_goes_unnoticed_does_no_harm(self, seed, inside, norm):
        made, passes = self.search(seed, norm)
        state, rounding, e = made.state, made.rounding, made.state.examples
        tolerance, share, mixture = rounding.tolerances(e, state.best)
        each = torch.arange(40)
        of = 7 * each + seed  # a class of its own for each
        open_ = torch.isfinite(tolerance[each, of]) & (share[each, of] <= 0.5)
        assert open_.sum() > 20
        direction = torch.randn(40, 60, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        along = ((direction.unsqueeze(1) @ made.basis.directions.mT) @ made.basis.directions).squeeze(1)
        direction = along if inside else direction - along
        direction = direction / direction.norm(dim=1, keepdim=True) * state.unit.unsqueeze(1)
        if norm == math.inf:
            direction = direction * state.norm._weights
        rows = passes.rows.clone()
        for times, noticed in ((0.5, False), (4.0, True)):
            passes.rows = rows.clone()
            error = times * tolerance[each, of].unsqueeze(1) * direction
            passes.rows[each, of] += torch.where(open_.unsqueeze(1), error, 0.0)
            if noticed:
                rounding.verify(e, tolerance, mixture, mixture.amax(1).numpy() + 1)
                assert (rounding.disagreement > 0)[open_].double().mean() > 0.9
            else:  # the class's ratio stays above the best one, if the bounds of its products hold at all
                ratio = ratios(passes.logits, passes.rows, norm)[each, of]
                assert (ratio >= state.best)[open_].all()

    @pytest.mark.parametrize("sign", [1, -1])
    @pytest.mark.parametrize("seed", range(2))
    def test_what_is_just_above_a_tolerance_is_noticed(self, monkeypatch, seed, sign):
        """In a full mixture, of the class that weighs least, and though another one makes up for as much as rounding may."""
        monkeypatch.setattr(self, "ERROR", 3e-3)
        made, passes = self.search(seed, 2.0)
        state, rounding, e = made.state, made.rounding, made.state.examples
        tolerance, share, mixture = rounding.tolerances(e, 0.7 * state.best)
        waiting = torch.isfinite(tolerance) & (share <= 0.5)
        fullness = torch.zeros_like(share).scatter_add_(1, mixture, torch.where(waiting, share, 0.0))
        full = waiting & (fullness.gather(1, mixture) > 0.45)
        weights = torch.where(full, rounding._weights.expand_as(share), math.inf)
        of, each, chosen = weights.abs().argmin(1), torch.arange(40), full.any(1)
        assert chosen.sum() > 20
        beside = full & (mixture == mixture[each, of].unsqueeze(1)) & (torch.arange(300) != of.unsqueeze(1))
        other = beside.int().argmax(1)
        along = made.basis.directions[:, 0] * state.unit.unsqueeze(1)
        moved = sign * torch.stack((1.05 * weights[each, of].abs(), torch.full((40,), -0.45, dtype=torch.float64)))
        for classes, by in zip((of, other), moved, strict=True):
            error = (by * tolerance[each, classes] / rounding._weights[classes]).unsqueeze(1) * along
            passes.rows[each, classes] += torch.where((chosen & beside.any(1)).unsqueeze(1), error, 0.0)
        rounding.verify(e, tolerance, mixture, mixture.amax(1).numpy() + 1)
        assert (rounding.disagreement > 0)[chosen & beside.any(1)].all()


class Inconsistent(nn.Module):
    """Forward mode is wrong in some classes at examples whose first entry is large."""

    def __init__(self, times=3000.0):
        super().__init__()
        self.net, self.times = network()[0], times
        self.net[2].weight[-9:] *= 0.03

    def forward(self, x):
        logits = self.net(x)
        times = torch.where(x.detach()[:, :1] > 8, self.times, 1.0)
        return torch.cat((logits[:, :-9], Scaled.apply(logits[:, -9:], times)), 1)


@pytest.mark.usefixtures("forward_mode")
@pytest.mark.parametrize("place", range(4))
def test_one_inconsistent_example_among_others(place):
    """Kills: `good.any()` for the mask of each example in `check`, and one mixture for the whole group."""
    model, x = Inconsistent(), torch.randn(4, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x[place, 0] = 9.0
    found, told = reported(assert_right, model, x, rtol=1e-9)
    inconsistent = torch.arange(4) == place
    assert (found.runner_up >= 111).tolist() == inconsistent.tolist()
    assert ((found.vjps + found.jvps >= 120) == inconsistent).all()
    assert "1 of 4 examples" in told[0]


class Given:
    """The passes of given Jacobians [E, n, D] whose forward mode is that of others."""

    pairs = 256

    def __init__(self, logits, rows, other):
        self.logits, self.rows, self.other, self.dimension = logits, rows, other, rows.shape[2]
        self.taken = {"vjp": 0, "jvp": 0, "mixed": 0}

    def vjp(self, examples, cotangents):
        self.taken["vjp"] += cotangents.shape[1]
        self.taken["mixed"] += int(((cotangents != 0).sum(2) > 1).sum())
        return cotangents @ self.rows[examples]

    def jvp(self, examples, directions):
        self.taken["jvp"] += directions.shape[1]
        return directions @ self.other[examples].mT

    def distrust(self):
        pass


@pytest.mark.parametrize("max_passes", [None, 45])
@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_every_pass_is_counted(norm, max_passes):
    """Kills: pass counts without the range finder's."""
    mixed = 0
    for seed in range(6):
        logits, rows = problem(1, 400, 100, seed, decay=1.0)
        passes = Given(logits, rows, rows)
        found = certify(passes, Certified(max_passes=max_passes), Question(norm))
        assert (found.vjps.item(), found.jvps.item()) == (passes.taken["vjp"], passes.taken["jvp"])
        assert max_passes is None or found.vjps + found.jvps <= max_passes
        mixed += passes.taken["mixed"]
    assert mixed > (12 if max_passes is None else 0)  # more than the check of each example


class TestMixture:
    """Each example has one class of its own whose products are wrong."""

    N, D = 160, 30

    def found(self, error, norm=2.0):
        """The certificates where products of one class are off by about `error` of their size; the answers are right."""
        torch.manual_seed(0)
        rows = torch.randn(self.N, self.D, dtype=torch.float64).expand(self.N, -1, -1).clone()
        logits = (-6 - 4 * torch.rand(self.N, dtype=torch.float64)).expand(self.N, -1).clone()
        logits[:, 0], logits[:, 1] = 0.0, -1.0
        other, each = rows.clone(), torch.arange(self.N)
        other[each, each] += error * torch.randn(self.N, self.D, dtype=torch.float64)
        passes = Given(logits, rows, other)
        found, _ = reported(certify, passes, Certified(), Question(norm))
        assert torch.equal(found.winners[:, 1], ratios(logits, rows, norm).argmin(1))
        return found

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    def test_no_class_is_left_out(self, norm):
        """Kills: one class left out of the mixture, whichever it is; and the check skipped."""
        found = self.found(1.0, norm=norm)
        assert (found.jvps >= 16).double().mean() > 0.9  # the predicted class and the highest others are seen first
        assert (found.disagreement > 0).all()
        assert (found.vjps >= self.N).all()

    def test_small_errors_are_seen(self):
        """Kills: a threshold of 10⁴ times as much. η is 8 units of rounding at least, 1.8e-15; most errors are about 1e-11."""
        found = self.found(1e-11)
        assert (found.disagreement > 0).double().mean() > 0.95

    def test_rounding_is_not(self):
        """No false alarm: products that are off by a unit of rounding."""
        found = self.found(2e-16)
        assert (found.disagreement == 0).all()
        assert (found.vjps < self.N).all()


@pytest.mark.parametrize("norm", [2.0, math.inf])
def test_a_part_that_is_another_model(pairs, norm):
    """Kills: the comparison of a group with the batch skipped. The first three agree with the whole; groups of two do not."""
    model, x = network(count=8)
    scale = 1 + torch.arange(8, dtype=torch.float64) % 4

    def by_place(x):
        return model(x * scale[: len(x)].unsqueeze(1))

    found, told = reported(analyze, by_place, x, norm=norm, method=Certified())
    assert found.certified.all()
    assert_kept(found, ratios(*dense(by_place, x), norm), rtol=1e-9)
    assert len(told) == 1


def test_pairs_that_a_group_keeps_together():
    """Kills: the first three not compared with the batch. The group agrees with it, and no gradient shows the mixture."""
    net, x = network(count=8)

    def model(x):
        return net(x + 0.1 * x.detach()[(torch.arange(len(x)) ^ 1).clamp(max=len(x) - 1)])

    with pytest.raises(ValueError, match="mixes the examples"), linearize(model, x) as graph:
        graph.at(np.arange(2)).logits  # noqa: B018


@pytest.mark.parametrize(("count", "together"), [(2, 8), (3, 8), (5, 8), (8, 8), (8, 4)])
@pytest.mark.parametrize("method", [Exact(), ROWS, Candidates(3), Certified()], ids=str)
def test_statistics_of_a_batch(method, count, together):
    """Kills: the check for mixed examples weakened. Of two examples normalised together, no gradient shows the other one.

    Of a batch that is normalised four examples at a time, groups of four have the logits of the whole.
    """
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 90)).double()

    def model(x):
        return net(x + torch.cat([F.batch_norm(part, None, None, training=True) for part in x.split(together)]))

    with pytest.raises(ValueError, match="mixes the examples"):
        analyze(model, torch.randn(count, 20, dtype=torch.float64), method=method)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, -1.0, 100.0])
def test_products_of_a_trace_too_large_or_too_small(factor):
    """Kills: `abs` dropped where products are compared with known gradients, which sees those alone that are too small."""
    model, x = network(count=2)
    with linearize(model, x) as graph:
        passes, examples = ModelPasses(graph, np.arange(2), None), np.arange(2)
        cotangents = torch.zeros(2, 1, 120, dtype=torch.float64)
        cotangents[:, 0, 5] = 1.0
        rows = passes.vjp(examples, cotangents)
        tangents = rows.transpose(0, 1)
        products = torch.einsum("end,ked->ken", dense(model, x)[1], tangents)
        assert not passes._disagree(examples, tangents, products)
        assert passes._disagree(examples, tangents, factor * products)


def test_geometry_with_a_gradient_of_x_alone():
    """Kills: `x.requires_grad` dropped in `margin_geometry`."""
    torch.manual_seed(0)
    logits, jacobian, x = (torch.randn(*shape, dtype=torch.float64) for shape in ((3, 5), (3, 5, 4), (3, 4)))
    x.requires_grad_()
    found = margin_geometry(logits, jacobian, x)
    assert found.alignment.requires_grad
    (gradient,) = torch.autograd.grad(found.alignment.sum(), x)
    row = jacobian[torch.arange(3), logits.argmax(1)]
    want = row * (x * row).sum(1, keepdim=True).sign() / row.norm(dim=1, keepdim=True)
    torch.testing.assert_close(gradient, want.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slope", [2e-39, 1e-30])
def test_a_step_that_ends_at_infinity_is_no_success(slope):
    """Kills: `isfinite` dropped from deepfool's success. There the logits are NaN, and their argmax is another class."""
    weight = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.5, -1.0]]) * slope
    bias = torch.tensor([0.0, 5.0, 1.0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fastsal.deepfool(lambda x: F.linear(x, weight, bias), torch.ones(2, 2))
    reached = F.linear(found.adversarial, weight, bias).argmax(1)
    assert found.adversarial.isfinite().all()
    assert found.success.tolist() == [slope == 1e-30] * 2
    assert (found.distance.isfinite() == found.success).all()
    assert torch.equal(reached != 1, found.success)


def test_a_row_is_taken_once():
    """A pass of the model for each row and no more: what a second recording of the batch would double."""
    model, x = network(classes=30)
    taken, right = [], Linearization.vjp

    def counted(self, cotangents, *options):
        taken.append(cotangents.shape[0])
        return right(self, cotangents, *options)

    Linearization.vjp = counted
    try:
        found = analyze(model, x, method=ROWS)
    finally:
        Linearization.vjp = right
    assert found.vjps.tolist() == [30] * 7
    assert 30 <= sum(taken) <= 31  # and one that shows whether examples are mixed
