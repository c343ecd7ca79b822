"""deepfool against closed forms, against itself a little nearer, against foolbox's, and what it leaves alone."""

import math

import pytest
import torch
from torch import nn

import fastsal
from fastsal import methods
from fastsal.adversarial import HALVINGS, deepfool, nearest_boundary
from fastsal.methods.base import Question
from fastsal.model.linearization import linearize

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = [2, 1, math.inf]
DUAL = {2: 2, 1: math.inf, math.inf: 1}


def network(seed, dtype=torch.float64, classes=7):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 20), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Linear(20, classes)).to(dtype).eval()
    return model, torch.randn(40, 2, 6, 6, dtype=dtype)


def predict(model, x):
    with torch.no_grad():
        return model(x).argmax(1)


class TestClosedForms:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("columns", [1, 2])
    def test_binary(self, norm, bias, columns):
        """Linear and affine binary classifiers: ρ = |Ψ| / ‖∇Ψ‖_q, reached in one step. Bisection stops 2⁻¹⁶ of it beyond."""
        torch.manual_seed(0)
        model, x = nn.Linear(9, columns, bias=bias).double(), torch.randn(30, 9).double()
        score, weight = model(x).detach(), model.weight.detach()
        score, weight = (score[:, 0], weight[0]) if columns == 1 else (score[:, 1] - score[:, 0], weight[1] - weight[0])
        rho = score.abs() / torch.linalg.vector_norm(weight, DUAL[norm])
        found = deepfool(model, x, norm=norm)
        assert found.success.all()
        assert (found.steps == 1).all()
        assert (found.prediction == (score > 0)).all()
        assert (found.adversarial_class == 1 - found.prediction).all()
        assert (found.distance >= rho * (1 - 1e-12)).all()
        assert (found.distance <= rho * (1 + 1.03 * 2.0**-HALVINGS)).all()

    @pytest.mark.parametrize("norm", NORMS)
    def test_many_classes(self, norm):
        """An affine classifier of many classes is its own linearisation: ρ = ρ̃."""
        torch.manual_seed(1)
        model, x = nn.Linear(9, 12).double(), torch.randn(30, 9).double()
        rho = fastsal.analyze(model, x, norm=norm).linearized_robustness
        found = deepfool(model, x, norm=norm, method="exact")
        torch.testing.assert_close(found.distance, rho, rtol=1.1 * 2.0**-HALVINGS, atol=0)

    def test_on_the_boundary(self):
        """Equal logits: any step leaves the class, and ρ = 0."""
        model = nn.Linear(3, 2, bias=False)
        model.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        found = deepfool(model, torch.tensor([[2.0, 2.0, 5.0]]))
        assert found.success.all()
        assert found.distance.item() < 1e-5


class TestNetworks:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_errs_and_a_little_nearer_does_not(self, norm, dtype):
        model, x = network(2, dtype)
        found = deepfool(model, x, norm=norm)
        assert found.success.all()
        assert found.adversarial.dtype == x.dtype
        assert found.distance.dtype == dtype
        assert torch.equal(predict(model, x), found.prediction)
        assert torch.equal(predict(model, found.adversarial), found.adversarial_class)
        assert (found.adversarial_class != found.prediction).all()
        nearer = x + (1 - 1e-3) * (found.adversarial - x)
        assert torch.equal(predict(model, nearer), found.prediction)
        length = torch.linalg.vector_norm((found.adversarial - x).flatten(1).double(), norm, dim=1)
        torch.testing.assert_close(found.distance.double(), length, rtol=1e-6, atol=0)

    def test_overshoot_costs_nothing(self):
        """The bisection takes it back: whatever the overshoot, within the curvature's share the distance is the same."""
        model, x = network(3)
        few, many = (deepfool(model, x, overshoot=value).distance for value in (0.02, 0.2))
        assert abs((many / few).median() - 1) < 0.02

    def test_methods_agree(self):
        model, x = network(4)
        exact = deepfool(model, x, method="exact")
        for method in (fastsal.Candidates(6), "certified"):
            other = deepfool(model, x, method=method)
            torch.testing.assert_close(other.distance, exact.distance, rtol=1e-9, atol=0)
            assert torch.equal(other.adversarial_class, exact.adversarial_class)

    @pytest.mark.parametrize("norm", [2, math.inf])
    def test_certified_among_many_classes(self, norm):
        model, x = network(4, classes=120)
        exact, other = (deepfool(model, x[:8], norm=norm, method=method) for method in ("exact", "certified"))
        torch.testing.assert_close(other.distance, exact.distance, rtol=1e-9, atol=0)
        assert torch.equal(other.adversarial_class, exact.adversarial_class)

    def test_more_candidates_find_nearer(self):
        model, x = network(5)
        one, all_ = (deepfool(model, x, method=method).distance for method in (fastsal.Candidates(1), "exact"))
        assert all_.mean() < one.mean()

    def test_example_by_example(self):
        model, x = network(6)
        together = deepfool(model, x)
        for i in (0, 17):
            alone = deepfool(model, x[i : i + 1])
            torch.testing.assert_close(alone.adversarial[0], together.adversarial[i], rtol=1e-9, atol=1e-9)

    def test_not_farther_than_foolbox(self):
        foolbox = pytest.importorskip("foolbox")
        model, x = network(7, torch.float32)
        peer = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10)
        _, (theirs,), (success,) = peer(
            foolbox.PyTorchModel(model, bounds=(-99, 99)), x, predict(model, x), epsilons=[None]
        )
        length = (theirs - x).flatten(1).norm(dim=1)[success]
        assert success.float().mean() > 0.9
        assert (deepfool(model, x).distance[success] / length).median() <= 1


class TestEdges:
    def test_labels(self):
        """Where the model errs already, and labels say so, nothing is changed; otherwise ρ's own question is asked."""
        model, x = network(8)
        labels = predict(model, x)
        labels[::2] = (labels[::2] + 1) % 7
        asked, own = deepfool(model, x, labels=labels), deepfool(model, x)
        assert torch.equal(asked.adversarial[::2], x[::2])
        assert (asked.distance[::2] == 0).all()
        assert (asked.steps[::2] == 0).all()
        assert asked.success.all()
        assert (own.distance > 0).all()
        torch.testing.assert_close(asked.distance[1::2], own.distance[1::2], rtol=1e-9, atol=0)

    def test_no_way_out(self):
        """Zero gradients, NaN, and too few steps end without success, and leave the others alone."""
        model, x = network(9)
        x[3] = math.nan
        x[5] = math.inf
        found = deepfool(model, x)
        lost = torch.zeros(len(x), dtype=torch.bool)
        lost[[3, 5]] = True
        assert torch.equal(found.success, ~lost)
        assert (found.distance[lost] == math.inf).all()
        torch.testing.assert_close(
            found.adversarial, torch.where(lost.view(-1, 1, 1, 1), x, found.adversarial), equal_nan=True
        )
        flat = deepfool(lambda z: torch.stack((z.sum(1) * 0 + 3, z.sum(1) * 0), 1), torch.randn(2, 3))
        assert not flat.success.any()
        assert (flat.distance == math.inf).all()
        curved = deepfool(
            lambda z: torch.stack((z.square().sum(1) + 1e-3, z.sum(1) * 0), 1), torch.randn(4, 3), max_steps=2
        )
        assert not curved.success.any()
        assert (curved.steps == 2).all()

    def test_no_examples(self):
        model, x = network(10)
        found = deepfool(model, x[:0])
        assert found.adversarial.shape == (0, 2, 6, 6)
        assert found.distance.shape == found.success.shape == (0,)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision(self, dtype):
        torch.manual_seed(11)
        model, x = nn.Linear(8, 3).to(dtype), torch.randn(10, 8).to(dtype)
        found = deepfool(model, x)
        assert found.success.all()
        assert found.adversarial.dtype == dtype
        assert (predict(model, found.adversarial) != found.prediction).all()

    def test_ambient_modes_and_what_is_left_alone(self):
        model, x = network(12)
        want = deepfool(model, x)
        x.requires_grad_()
        state = torch.get_rng_state()
        with torch.no_grad():
            inside = deepfool(model, x)
        with torch.inference_mode():
            inference = deepfool(model, x)
        for got in (inside, inference, deepfool(model, x)):
            assert torch.equal(got.adversarial, want.adversarial)
            assert not got.adversarial.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())
        assert x.grad is None
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_steps": 0}, "max_steps: got 0, wants an integer >= 1"),
            ({"overshoot": -1.0}, "overshoot: got -1.0, wants a number >= 0"),
            ({"overshoot": math.nan}, "overshoot: got nan"),
            ({"labels": torch.zeros(3)}, r"labels: got torch.float32 of shape \(3,\), wants integers \[B\] = \[40\]"),
            ({"norm": 3}, "norm: got 3"),
            ({"chunk_size": 0}, "chunk_size: got 0, wants None or an integer >= 1"),
            ({"method": "fast"}, "method: got 'fast'"),
            ({"method": "certified", "norm": 1}, "wants 2"),
        ],
    )
    def test_errors(self, options, message):
        model, x = network(13)
        with pytest.raises(ValueError, match=message):
            deepfool(model, x, **options)

    def test_training_mode(self):
        with pytest.raises(ValueError, match="in training mode"):
            deepfool(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)), torch.randn(2, 3))


class TestNearestBoundary:
    """Of any class, against its definition on the whole Jacobian."""

    def jacobian(self, model, x):
        rows = [torch.autograd.functional.jacobian(lambda z: model(z.unsqueeze(0))[0], one).flatten(1) for one in x]
        return model(x).detach(), torch.stack(rows)

    def want(self, logits, jacobian, own, norm, among=None):
        e = torch.arange(len(own))
        difference = jacobian[e, own].unsqueeze(1) - jacobian
        distance = (logits[e, own].unsqueeze(1) - logits).abs() / torch.linalg.vector_norm(
            difference, DUAL[norm], dim=2
        )
        distance[e, own] = math.inf
        if among is not None:
            distance[~among] = math.inf
        other = distance.argmin(1)
        return other, distance[e, other], difference[e, other]

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("classes", [2, 7, 60])
    def test_of_any_class(self, norm, classes):
        model, x = network(20, classes=classes)
        logits, jacobian = self.jacobian(model, x)
        own = torch.where(torch.arange(40) % 2 == 0, logits.argmax(1), torch.arange(40) % classes)
        chosen = [methods.Exact(), methods.Exact(memory_limit=0), methods.Candidates(classes - 1)]
        if norm == 2:
            chosen.append(methods.Certified())
        for method in chosen:
            with linearize(model, x) as graph:
                selection, *got = nearest_boundary(graph, method, Question(norm, target=own))
                assert torch.equal(graph.logits, logits)
            got = (selection.winners[:, 1], *got)
            for mine, right in zip(got, self.want(logits, jacobian, own, norm), strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("norm", NORMS)
    def test_among_some_classes(self, norm):
        model, x = network(21, classes=12)
        logits, jacobian = self.jacobian(model, x)
        own = torch.arange(40) % 12
        among = torch.rand(40, 12) < 0.4
        among[:, :2] = True
        for method in (methods.Exact(), methods.Candidates(11)):
            with linearize(model, x) as graph:
                selection, *got = nearest_boundary(graph, method, Question(norm, target=own, classes=among))
            got = (selection.winners[:, 1], *got)
            for mine, right in zip(got, self.want(logits, jacobian, own, norm, among), strict=True):
                torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)

    @pytest.mark.parametrize("own", [0, 1, 2])
    def test_ties(self, own):
        """Three equal logits: whichever class it is, the distance to another is 0."""
        weight = torch.eye(4, dtype=torch.float64)
        with linearize(lambda z: z @ weight, torch.tensor([[1.0, 1.0, 1.0, 0.5]]).double()) as graph:
            selection, distance, row = nearest_boundary(
                graph, methods.Exact(), Question(2.0, target=torch.tensor([own]))
            )
        other = selection.winners[:, 1]
        assert other.item() == (1 if own == 0 else 0)
        assert distance.item() == 0
        assert torch.equal(row[0], weight[own] - weight[other.item()])


@pytest.mark.parametrize("norm", [2, 1, math.inf])
def test_boundary_normal(norm):
    """At DeepFool's point: the gradient of the difference of the two classes that tie there, towards the class of x."""
    torch.manual_seed(2)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    moved = fastsal.deepfool(model, x, norm=norm)
    assert moved.success.all()
    normal = fastsal.boundary_normal(model, moved.adversarial, moved.prediction, norm=norm)
    assert (normal.shape, normal.dtype) == (x.shape, x.dtype)
    for b in range(9):
        z = moved.adversarial[b].clone().requires_grad_()
        logits = model(z)
        difference = logits[moved.prediction[b]] - logits[moved.adversarial_class[b]]
        assert difference.abs() < 1e-3
        torch.testing.assert_close(normal[b], torch.autograd.grad(difference, z)[0])
    with pytest.raises(ValueError, match=r"^own: got torch.float64 of shape \(9, 6\), wants integers \[B\] = \[9\]$"):
        fastsal.boundary_normal(model, moved.adversarial, moved.adversarial)
