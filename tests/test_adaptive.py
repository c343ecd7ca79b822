"""fab against the attack as the paper states it, its projections against linear programs, and what it leaves alone."""

import math

import numpy as np
import pytest
import torch
from networks import LargestTensor
from scipy.optimize import linprog
from torch import nn
from torch.func import jacrev

import fastsal
from fastsal.adaptive import random_start, to_hyperplane

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = [2.0, 1.0, math.inf]
DUAL = {2.0: 2.0, 1.0: math.inf, math.inf: 1.0}


def network(seed=0, classes=7, dtype=torch.float64):
    torch.manual_seed(seed)
    layers = [nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, classes)]
    model = nn.Sequential(*layers).to(dtype).eval().requires_grad_(False)
    for layer in (model[0], model[2], model[4]):
        layer.weight *= 3
    return model, torch.rand(30, 12, dtype=dtype)


def shortest(point, row, gap, norm, low, high):
    """The same step as `to_hyperplane`, for one point: by a linear program, or for p = 2 by bisection of its multiplier."""
    most = sum(
        max(-w * math.copysign(1, gap) * (end - z) for end in (low, high)) for z, w in zip(point, row, strict=True)
    )
    closed = min(abs(gap), most)
    if norm == 2:
        one, other = 0.0, 1e9
        for _ in range(200):
            middle = (one + other) / 2
            step = np.clip(point - math.copysign(middle, gap) * row, low, high) - point
            one, other = (middle, other) if abs(row @ step) < closed else (one, middle)
        return np.linalg.norm(step), closed
    # The sizes of the entries, or the one that bounds all, beside the step.
    D = len(point)
    sizes = np.eye(D) if norm == 1 else np.ones((D, 1))
    cost = np.r_[np.zeros(D), np.ones(sizes.shape[1])]
    both = np.block([[np.eye(D), -sizes], [-np.eye(D), -sizes]])
    limits = [(low - z, high - z) for z in point] + [(0, None)] * sizes.shape[1]
    equal = np.r_[row, np.zeros(sizes.shape[1])][None]
    found = linprog(cost, both, np.zeros(2 * D), equal, [-math.copysign(closed, gap)], limits)
    assert found.success
    return found.fun, closed


class TestToHyperplane:
    @pytest.mark.parametrize("norm", NORMS)
    def test_shortest_step_within_the_box(self, norm):
        """Entries of the row that are 0, tiny, and equal; points at the bounds; gaps that the box cannot close; both signs."""
        rng = np.random.default_rng(3)
        point, row = rng.random((40, 6)), rng.standard_normal((40, 6))
        row[::3, 2], row[1::3, 4], row[2::3, 1] = 0, 1e-6, row[2::3, 0]
        point[::4, 0], point[1::4, 1] = 0, 1
        row /= np.abs(row).max(1, keepdims=True)
        gap = rng.standard_normal(40) * np.r_[np.full(20, 0.3), np.full(20, 3)]
        given = (torch.from_numpy(value) for value in (point, row, gap))
        step = to_hyperplane(*given, norm, (0.0, 1.0)).numpy()
        assert ((point + step >= 0) & (point + step <= 1)).all()
        corners = 0
        for b in range(40):
            length, closed = shortest(point[b], row[b], gap[b], norm, 0.0, 1.0)
            corners += closed < abs(gap[b])
            assert row[b] @ step[b] == pytest.approx(-math.copysign(closed, gap[b]), abs=1e-9)
            if closed == abs(gap[b]):  # where the box ends, more than one step may lead to the corner's hyperplane
                assert np.linalg.norm(step[b], norm) == pytest.approx(length, rel=1e-6, abs=1e-8)
        assert 5 < corners < 35

    @pytest.mark.parametrize("norm", NORMS)
    def test_without_a_box(self, norm):
        """The distance of the hyperplane is abs(gap) / ‖row‖_q. Where the row is 0, or the gap, there is no step."""
        torch.manual_seed(0)
        point, row, gap = torch.randn(9, 5).double(), torch.randn(9, 5).double(), torch.randn(9).double()
        row[3], gap[4], row[5, 1] = 0, 0, 1e-200
        step = to_hyperplane(point, row, gap, norm, (-math.inf, math.inf))
        want = gap.abs() / torch.linalg.vector_norm(row, DUAL[norm], dim=1)
        want[3] = 0
        torch.testing.assert_close(torch.linalg.vector_norm(step, norm, dim=1), want, rtol=1e-12, atol=0)
        closed = (row * step).sum(1)
        closed[3] = -gap[3]
        torch.testing.assert_close(closed, -gap, rtol=1e-12, atol=1e-14)


def by_the_paper(model, x, norm, steps, alpha_max=0.1, eta=1.05, beta=0.9, start=None):
    """FAB with the whole Jacobian, an example at a time: the nearest points that err, and their distances."""
    own, found, best = model(x).argmax(1), x.clone(), torch.full((len(x),), math.inf, dtype=x.dtype)
    for b, c in enumerate(own.tolist()):
        z = (x if start is None else start)[b]
        for _ in range(steps):
            logits, J = model(z[None])[0], jacrev(lambda z: model(z[None])[0])(z)
            margin, rows = logits - logits[c], J - J[c]
            ratio = margin.abs() / torch.linalg.vector_norm(rows, DUAL[norm], dim=1)
            ratio[c] = math.inf
            j = ratio.argmin()
            points = torch.stack((z, x[b]))
            gap = margin[j] + (points - z) @ rows[j]
            d = to_hyperplane(points, rows[j].expand(2, -1), gap, norm, (0.0, 1.0))
            size = torch.linalg.vector_norm(d, norm, dim=1)
            alpha = min(size[0] / size.sum(), alpha_max)
            z = ((1 - alpha) * (z + eta * d[0]) + alpha * (x[b] + eta * d[1])).clamp(0, 1)
            if model(z[None]).argmax() != c:
                distance = torch.linalg.vector_norm(z - x[b], norm)
                if distance < best[b]:
                    found[b], best[b] = z, distance
                z = x[b] + beta * (z - x[b])
    return found, best


class TestTheAttack:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("options", [{}, {"alpha_max": 0.4, "eta": 1.2, "beta": 0.6}])
    def test_as_the_paper_states_it(self, norm, options):
        model, x = network()
        found = fastsal.fab(model, x.clone().requires_grad_(), norm=norm, steps=8, **options)
        assert not found.distance.requires_grad
        assert not found.adversarial.requires_grad
        want, distance = by_the_paper(model, x, norm, 8, **options)
        torch.testing.assert_close(found.distance, distance, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(found.adversarial, want, rtol=1e-7, atol=1e-8)
        assert found.success.float().mean() > 0.5
        assert (found.success == distance.isfinite()).all()
        assert (found.adversarial_class == model(want).argmax(1)).all()
        assert (found.steps == 8).all()

    @pytest.mark.parametrize("norm", NORMS)
    def test_affine(self, norm):
        """One step goes to η times the distance of the boundary, where the box is not in the way."""
        torch.manual_seed(0)
        model, x = nn.Linear(9, 6).double(), torch.rand(20, 9).double()
        rho = fastsal.analyze(model, x, norm=norm).linearized_robustness
        found = fastsal.fab(model, x, norm=norm, steps=1, bounds=(-99, 99))
        torch.testing.assert_close(found.distance, 1.05 * rho, rtol=1e-9, atol=0)

    def test_further_runs_begin_at_random_and_only_ever_come_nearer(self):
        model, x = network()
        one, three = (fastsal.fab(model, x, steps=4, restarts=restarts) for restarts in (1, 3))
        assert (three.distance <= one.distance).all()
        assert (three.distance < one.distance).any()
        assert (three.steps == 12).all()
        assert three == fastsal.fab(model, x, steps=4, restarts=3)
        assert three != fastsal.fab(model, x, steps=4, restarts=3, seed=1)
        start = random_start(x, one.distance.clamp(max=1.0), 2.0, (0.0, 1.0), torch.Generator().manual_seed(0))
        _, distance = by_the_paper(model, x, 2.0, 4, start=start)
        two = fastsal.fab(model, x, steps=4, restarts=2)
        torch.testing.assert_close(two.distance, torch.minimum(distance, one.distance), rtol=1e-8, atol=0)

    @pytest.mark.parametrize("norm", NORMS)
    def test_random_starts_lie_half_as_far(self, norm):
        x, radius = torch.full((50, 2, 8), 0.5, dtype=torch.float64), torch.linspace(0.1, 0.9, 50)
        start = random_start(x, radius, norm, (0.0, 1.0))
        size = torch.linalg.vector_norm((start - x).flatten(1), norm, dim=1)
        torch.testing.assert_close(size, radius.double() / 2, rtol=1e-6, atol=0)
        assert ((start - x).flatten(1).sign().sum(1).abs() < 16).all()
        near = random_start(torch.zeros(9, 3), 5.0, norm, (0.0, 1.0))
        assert near.dtype == torch.float32
        assert ((near >= 0) & (near <= 1)).all()


class TestAnyExample:
    def test_odd_examples_among_good_ones(self):
        """Wrong already, NaN, and no gradient at all: the others are as they are alone."""
        model, x = network()
        good = fastsal.fab(model, x[:9], steps=5)

        def odd(z):
            return torch.where((z[:, :1] == 0.125), model(z).detach() + 0 * z.sum(1, keepdim=True), model(z))

        given = x[:9].clone()
        given[4, 3], given[6, 0] = math.nan, 0.125
        labels = odd(given).argmax(1)
        labels[2] = (labels[2] + 1) % 7
        found = fastsal.fab(odd, given, labels=labels, steps=5)
        others = [b for b in range(9) if b not in (2, 4, 6)]
        torch.testing.assert_close(found.distance[others], good.distance[others], rtol=1e-9, atol=0)
        assert (found.distance[2], found.success[2], found.steps[2]) == (0, True, 0)
        assert not found.success[4]
        assert found.distance[[4, 6]].tolist() == [math.inf] * 2
        assert torch.equal(found.adversarial[[2, 6]], given[[2, 6]])

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scale", [1e-30, 1e25])
    def test_gradients_of_any_size(self, norm, scale):
        """Logits times a number have the same boundaries."""
        model, x = network(dtype=torch.float32)
        want, found = (fastsal.fab(one, x, norm=norm, steps=3) for one in (model, lambda z: model(z) * scale))
        torch.testing.assert_close(found.distance, want.distance, rtol=1e-4, atol=1e-5)

    def test_layer_and_classes(self):
        model, x = network()
        classes = torch.tensor([True, True, True, False, False, False, False])
        rest = nn.Sequential(*list(model)[2:])
        with torch.no_grad():
            hidden = model[:2](x)
        options = {"classes": classes, "bounds": (0, math.inf), "steps": 4}
        assert fastsal.fab(model, x, layer="1", **options) == fastsal.fab(rest, hidden, **options)

    def test_what_the_model_takes_besides_goes_with_its_example(self):
        """The first example is wrong already, so that all others have another place among those that are attacked."""
        model, x = network()
        shift = torch.randn(30, 12, dtype=torch.float64) / 9
        labels = model(x + shift).argmax(1)
        labels[0] = (labels[0] + 1) % 7
        found = fastsal.fab(lambda x, shift: model(x + shift), x, args=(shift,), labels=labels, steps=4)
        for b in (1, 17, 29):
            alone = fastsal.fab(lambda x, b=b: model(x + shift[b]), x[b : b + 1], steps=4)
            torch.testing.assert_close(found.distance[b : b + 1], alone.distance, rtol=1e-9, atol=0)

    def test_nothing_to_do(self):
        model, x = network()
        assert fastsal.fab(model, x[:0]).adversarial.shape == (0, 12)
        wrong = (model(x).argmax(1) + 1) % 7
        assert fastsal.fab(model, x, labels=wrong).distance.tolist() == [0.0] * 30

    def test_no_tensor_as_large_as_the_jacobian(self):
        n, B, D = 300, 4, 400
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 30), nn.Tanh(), nn.Linear(30, n), nn.Softsign())
        with LargestTensor() as seen:
            fastsal.fab(model, torch.rand(B, D), steps=2, method="exact")
        assert seen.entries < n * B * D / 2

    def test_certified(self):
        model, x = network(classes=60)
        exact, certified = (fastsal.fab(model, x, steps=3, method=method) for method in ("exact", "certified"))
        torch.testing.assert_close(certified.distance, exact.distance, rtol=1e-9, atol=0)

    @pytest.mark.parametrize(
        ("option", "message"),
        [
            ({"bounds": (1, 0)}, r"bounds: got \(1, 0\), wants the least and the greatest"),
            ({"bounds": (0.3, 0.6)}, r"x: got entries from 0\.\d+ to 1, wants them within bounds=\(0.3, 0.6\)"),
            ({"eps": 0}, "eps: got 0, wants a number > 0"),
            ({"steps": 0}, "steps: got 0, wants an integer >= 1"),
            ({"restarts": 1.5}, "restarts: got 1.5, wants an integer >= 1"),
            ({"alpha_max": 2}, "alpha_max: got 2, wants a number from 0 to 1"),
            ({"eta": -1}, "eta: got -1, wants a number > 0"),
            ({"beta": 0}, "beta: got 0, wants a number > 0, at most 1"),
            ({"norm": 3}, "norm: got 3"),
        ],
    )
    def test_errors(self, option, message):
        model, x = network()
        with pytest.raises(ValueError, match=message):
            fastsal.fab(model, x, **option)
