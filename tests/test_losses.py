"""The losses against autograd of their plain formulas in float64: values, gradients, and gradients of gradients."""

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastsal
from fastsal import losses
from fastsal.model.linearization import Linearization

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = [2, 1, math.inf]
DUAL = {2: 2, 1: math.inf, math.inf: 1}


def network(seed, classes=5, dtype=torch.float64):
    """A smooth network, examples and labels, of which the model gets about half."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, classes)).to(dtype)
    x = torch.randn(12, 4, dtype=dtype)
    y = torch.where(torch.arange(12) % 2 == 0, model(x).argmax(1), torch.randint(classes, (12,)))
    return model, x, y


def jacobian(model, x):
    """[B, n, D], with a graph."""
    logits = model(x)
    rows = [torch.autograd.grad(logits[:, j].sum(), x, create_graph=True)[0] for j in range(logits.shape[1])]
    return logits, torch.stack(rows, 1)


def plain_margins(model, x, y, norm):
    """As the docstring says it, from the whole Jacobian."""
    logits, rows = jacobian(model, x)
    e = torch.arange(len(x))
    prediction = logits.argmax(1)

    def ratio(own, other):
        return (logits[e, own] - logits[e, other]) / torch.linalg.vector_norm(
            rows[e, own] - rows[e, other], DUAL[norm], dim=1
        )

    n = logits.shape[1]
    others = torch.stack([ratio(y, (y + shift) % n) for shift in range(1, n)], 1).amin(1)
    wrong = prediction != y
    return torch.where(wrong, ratio(y, torch.where(wrong, prediction, (y + 1) % n)), others)


def plain_cross_lipschitz(model, x, norm):
    logits, rows = jacobian(model, x)
    n, total = logits.shape[1], 0.0
    for i in range(n):
        for j in range(n):
            if i != j:
                total = total + torch.linalg.vector_norm(rows[:, i] - rows[:, j], DUAL[norm], dim=1).square()
    return (total / n**2).mean()


def gradients(loss, model, x):
    return torch.autograd.grad(loss, [*model.parameters(), x], allow_unused=True)


def assert_same(ours, plain, model, x):
    """The value, and the gradients in every parameter and in x. An unused one (a last bias) is None or zero."""
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=0)
    for mine, right in zip(gradients(ours, model, x), gradients(plain, model, x), strict=True):
        mine, right = (torch.zeros(()).double() if one is None else one for one in (mine, right))
        torch.testing.assert_close(*torch.broadcast_tensors(mine, right), rtol=1e-9, atol=1e-11)


class TestMarginLoss:
    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("target", [None, 0.3])
    @pytest.mark.parametrize("seed", [0, 1])
    def test_plain_formula(self, norm, target, seed):
        model, x, y = network(seed)
        x.requires_grad_()
        margins = plain_margins(model, x, y, norm)
        assert (margins < 0).any()
        assert (margins > 0).any()
        plain = (-margins if target is None else (target - margins).clamp(min=0)).mean()
        assert_same(losses.margin_loss(model, x, y, norm=norm, target=target), plain, model, x)

    def test_is_the_linearized_robustness_where_the_label_is_predicted(self):
        model, x, _ = network(2)
        y = model(x).argmax(1)
        rho = fastsal.analyze(model, x).linearized_robustness
        torch.testing.assert_close(losses.margin_loss(model, x, y), -rho.mean(), rtol=1e-12, atol=0)
        assert losses.margin_loss(model, x, y, target=rho.min().item()) == 0
        most = losses.margin_loss(model, x, y, target=rho.max().item())
        torch.testing.assert_close(most, (rho.max() - rho).mean(), rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize("method", ["certified", fastsal.Candidates(79), fastsal.Exact(memory_limit=0)])
    @pytest.mark.parametrize("norm", [2, "inf"])
    def test_methods(self, method, norm):
        model, x, y = network(3, classes=80)
        x.requires_grad_()
        want = losses.margin_loss(model, x, y, norm=norm)
        assert_same(losses.margin_loss(model, x, y, norm=norm, method=method), want, model, x)

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("target", [None, 1.0])
    def test_gradcheck(self, norm, target):
        model, x, y = (one if isinstance(one, nn.Module) else one[:4] for one in network(4, classes=3))
        names = [name for name, _ in model.named_parameters()]
        weights = [value.detach().clone().requires_grad_() for value in model.parameters()]

        def loss(x, *weights):
            state = dict(zip(names, weights, strict=True))
            return losses.margin_loss(lambda z: functional_call(model, state, (z,)), x, y, norm=norm, target=target)

        assert torch.autograd.gradcheck(loss, (x.clone().requires_grad_(), *weights))
        assert torch.autograd.gradgradcheck(loss, (x.clone().requires_grad_(), *weights), fast_mode=True)

    @pytest.mark.parametrize("columns", [1, 2])
    def test_binary(self, columns):
        """One score: the distance to its zero, signed by the label."""
        torch.manual_seed(5)
        model, x, y = nn.Linear(6, columns).double(), torch.randn(20, 6).double(), torch.arange(20) % 2
        weight, bias = (
            (model.weight[-1] - (columns - 1) * model.weight[0]),
            (model.bias[-1] - (columns - 1) * model.bias[0]),
        )
        signed = (x @ weight + bias) / weight.norm() * (2 * y - 1)
        torch.testing.assert_close(losses.margin_loss(model, x, y), -signed.mean(), rtol=1e-12, atol=0)

    def test_zero_gradients(self):
        """Nothing to move: the hinge at a target is satisfied, and no gradient is NaN."""
        model, x, _ = network(6)
        for parameter in model[0].parameters():
            parameter.data.zero_()
        y = model(x).argmax(1)
        loss = losses.margin_loss(model, x, y, target=1.0)
        loss.backward()
        assert loss.item() == 0
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert losses.margin_loss(model, x, y) == -math.inf

    def test_one_double_backward(self, monkeypatch):
        model, x, y = network(7, classes=9)
        rows = count_rows(monkeypatch)
        losses.margin_loss(model, x, y)
        assert rows == {False: 9, True: 1}

    @pytest.mark.parametrize(
        ("y", "message"),
        [
            (torch.zeros(12), r"y: got torch.float32 of shape \(12,\), wants integers \[B\] = \[12\]"),
            (torch.zeros(3).long(), r"y: got torch.int64 of shape \(3,\)"),
            ([0] * 12, "y: got list"),
            (torch.full((12,), 5), "y: got classes 5 to 5, wants 0 to 4"),
            (torch.full((12,), -1), "y: got classes -1 to -1, wants 0 to 4"),
        ],
    )
    def test_labels(self, y, message):
        model, x, _ = network(8)
        with pytest.raises(ValueError, match=message):
            losses.margin_loss(model, x, y)

    def test_arguments(self):
        model, x, y = network(9)
        for options, message in (
            ({"norm": 3}, "norm: got 3"),
            ({"method": "fast"}, "method: got 'fast'"),
            ({"method": "certified", "norm": 1}, "wants 2"),
            ({"chunk_size": 0}, "chunk_size: got 0"),
        ):
            with pytest.raises(ValueError, match=message):
                losses.margin_loss(model, x, y, **options)


class TestCrossLipschitzLoss:
    @pytest.mark.parametrize("norm", NORMS)
    def test_plain_formula(self, norm):
        model, x, y = network(10)
        x.requires_grad_()
        assert_same(
            losses.cross_lipschitz_loss(model, x, y, norm=norm), plain_cross_lipschitz(model, x, norm), model, x
        )

    @pytest.mark.parametrize("norm", NORMS)
    def test_gradcheck(self, norm):
        model, x, _ = (one if isinstance(one, nn.Module) else one[:3] for one in network(11, classes=3))
        names = [name for name, _ in model.named_parameters()]
        weights = [value.detach().clone().requires_grad_() for value in model.parameters()]

        def loss(x, *weights):
            state = dict(zip(names, weights, strict=True))
            return losses.cross_lipschitz_loss(lambda z: functional_call(model, state, (z,)), x, norm=norm)

        assert torch.autograd.gradcheck(loss, (x.clone().requires_grad_(), *weights))
        assert torch.autograd.gradgradcheck(loss, (x.clone().requires_grad_(), *weights), fast_mode=True)

    def test_equal_gradients(self):
        """Two classes that are the same add nothing, and their gradient is not NaN."""
        model, x, _ = network(12)
        model[2].weight.data[1] = model[2].weight.data[0]
        x.requires_grad_()
        ours = losses.cross_lipschitz_loss(model, x)
        weight = torch.autograd.grad(ours, model[2].weight)[0]
        assert weight.isfinite().all()
        torch.testing.assert_close(weight[0], weight[1], rtol=1e-12, atol=0)

    def test_all_rows(self, monkeypatch):
        model, x, _ = network(13, classes=9)
        rows = count_rows(monkeypatch)
        losses.cross_lipschitz_loss(model, x)
        assert rows == {False: 0, True: 9}


def count_rows(monkeypatch):
    """How many rows of the Jacobian are taken with a graph and without, but for the check that examples are independent."""
    rows, vjp = {False: 0, True: 0}, Linearization.vjp

    def counting(self, cotangents, create_graph=False):
        if len(self.logits) == 12:
            rows[create_graph] += len(cotangents)
        return vjp(self, cotangents, create_graph)

    monkeypatch.setattr(Linearization, "vjp", counting)
    return rows


@pytest.mark.parametrize("loss", [losses.margin_loss, losses.cross_lipschitz_loss])
class TestBoth:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_dtypes(self, loss, dtype):
        """float32 out, and as near to float64 on the same rounded values as the model's own arithmetic is."""
        model, x, y = network(14, dtype=dtype)
        ours = loss(model, x, y)
        assert ours.dtype == torch.float32
        ours.backward()
        assert all(p.grad is None or (p.grad.dtype == dtype and p.grad.isfinite().all()) for p in model.parameters())
        want = loss(model.double(), x.double(), y)
        assert abs(ours.item() - want.item()) <= 32 * torch.finfo(dtype).eps * max(1.0, abs(want.item()))

    def test_beside_a_training_loss(self, loss):
        """Added to cross-entropy, its gradient is the sum of the two; the modes and flags stay as they are."""
        model, x, y = network(15)
        model.train()
        entropy = nn.functional.cross_entropy(model(x), y)
        alone = [
            gradients(one, model, x.requires_grad_())
            for one in (loss(model, x, y), nn.functional.cross_entropy(model(x), y))
        ]
        (entropy + 0.5 * loss(model, x, y)).backward()
        for parameter, ours, theirs in zip(model.parameters(), *alone, strict=False):
            want = theirs + (0.0 if ours is None else 0.5 * ours)
            torch.testing.assert_close(parameter.grad, want, rtol=1e-10, atol=1e-14)
        assert model.training

    def test_ambient_modes_and_what_is_left_alone(self, loss):
        model, x, y = network(16)
        want, state = loss(model, x, y), torch.get_rng_state()
        with torch.no_grad():
            inside = loss(model, x, y)
        assert torch.equal(inside.detach(), want.detach())
        assert torch.equal(torch.get_rng_state(), state)
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not x.requires_grad

    def test_batch_statistics(self, loss):
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
        x, y = torch.randn(6, 4), torch.zeros(6).long()
        with pytest.raises(ValueError, match="in training mode"):
            loss(model, x, y)
        assert loss(model.eval(), x, y).isfinite()

    def test_attention(self, loss):
        """Fused attention has no second derivative: plain operations are taken."""
        torch.manual_seed(17)
        attention = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
        model = nn.Sequential(nn.Unflatten(1, (3, 8)), attention, nn.Flatten(), nn.Linear(24, 4)).double()
        ours = loss(model, torch.randn(3, 24).double(), torch.tensor([0, 1, 2]))
        ours.backward()
        assert attention.linear1.weight.grad.isfinite().all()
