"""A recorded forward pass: its rows, its chunks, and derivatives of its rows."""

import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import CountedOperations, dense, make, spy
from torch import nn

from fastsal import analyze, losses
from fastsal.model.linearization import linearize


class TestRows:
    def test_constant_gradients_have_unit_stride(self):
        """x.sum(1) has an expanded gradient of stride 0."""

        def model(x):
            return torch.stack((x.sum(1), -x.sum(1), 0 * x[:, 0]), 1)

        result = analyze(model, torch.ones(2, 5))
        torch.testing.assert_close(result.linearized_robustness, torch.full((2,), math.sqrt(5)))
        with linearize(lambda x: x.sum(1), torch.ones(2, 5)) as graph:
            for classes in torch.zeros(1, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64):
                assert graph.rows(classes).stride(2) == 1

    def test_a_chunk_takes_each_convolution_once(self):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(12, 20)).eval()
        with linearize(model, torch.randn(2, 1, 6, 6)) as graph, CountedOperations() as counted:
            graph.rows(torch.arange(20).unsqueeze(1).expand(20, 2))
        assert counted["aten.convolution_backward.default"] == 2


def test_rows_per_example():
    """What methods call: each example its own classes, mixtures, no copy of the transposed rows."""
    model, x = make("mlp", torch.float64, batch=3)
    _, jacobian = dense(model, x)
    classes = torch.tensor([[0, 4, 7], [3, 3, 3]])
    with linearize(model, x) as graph:
        rows = graph.rows(classes)
        mixed = graph.vjp(torch.ones(2, 3, 23, dtype=torch.float64))
    assert rows.shape == (3, 2, 20)
    assert rows.stride(2) == 1
    assert rows.stride(0) < rows.stride(1)
    for c, b in itertools.product(range(2), range(3)):
        torch.testing.assert_close(rows[b, c], jacobian[b, classes[c, b]])
    torch.testing.assert_close(mixed[:, 1], jacobian.sum(1))


class TestChunkSize:
    @pytest.mark.parametrize(
        ("layer", "batch", "want"),
        [
            (nn.Conv2d(1, 8, 3, padding=1), 4, 16),  # 512 KiB of gradients a row, in 8 MiB
            (nn.Conv2d(1, 8, 3, padding=1), 64, 1),  # 8 MiB
            (nn.Conv2d(1, 8, 3, padding=1), 128, 1),
            (nn.Conv2d(1, 1, 3, padding=1), 1, 40),  # the most
            # 64 MiB of weights, and 80 KiB of gradients a row
            (nn.Sequential(nn.Flatten(), nn.Linear(2**12, 2**12)), 64, 12),
        ],
    )
    @pytest.mark.parametrize("frozen", [False, True])
    def test_gradients_that_fit_a_cache_or_weights_that_do_not(self, layer, batch, want, frozen):
        model = nn.Sequential(layer, nn.Flatten()).requires_grad_(not frozen)
        with linearize(model, torch.randn(batch, 1, 64, 64)) as graph:
            assert graph.default_chunk_size() == want

    def test_in_another_graph(self):
        x = torch.randn(4, 1, 64, 64, requires_grad=True) * 2
        with linearize(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten()), x, differentiable=True) as graph:
            assert graph.default_chunk_size() == 16


class TestMemory:
    @pytest.mark.parametrize(
        "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: not enough memory")]
    )
    def test_out_of_memory_halves_the_chunk(self, monkeypatch, error):
        model, x = make("mlp")
        truth = analyze(model, x, chunk_size=1)

        def fail(count):
            if count > 3:
                raise error

        passes = spy(monkeypatch, fail)
        result = analyze(model, x, chunk_size=16)
        assert max(passes) == 2
        assert torch.equal(result.runner_up, truth.runner_up)
        torch.testing.assert_close(result.distances, truth.distances, rtol=1e-4, atol=0.0)

    def test_out_of_memory_at_one_row_is_raised(self, monkeypatch):
        model, x = make("mlp", batch=1)

        def fail(count):
            if passes:  # the first rows have gone through
                raise torch.OutOfMemoryError("CUDA out of memory")

        passes = spy(monkeypatch, fail)
        with pytest.raises(torch.OutOfMemoryError):
            analyze(model, x, chunk_size=5)


class NoVmap(torch.autograd.Function):
    """Doubles; its backward reads a value, which vmap cannot."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad if math.isfinite(grad.sum().item()) else grad


class TestVmap:
    """Models whose backward pass torch.func cannot take at several rows at once."""

    def test_vmap_fallback(self):
        model, x = make("mlp")
        truth = analyze(model, x, chunk_size=1)
        with pytest.warns(UserWarning, match="cannot vmap its backward pass") as caught:
            result = analyze(lambda x: NoVmap.apply(model(x)) / 2, x, chunk_size=5)
        assert len(caught) == 1
        assert torch.equal(result.distances, truth.distances)

    def test_an_error_in_the_backward_pass_is_not_swallowed(self):
        class Broken(NoVmap):
            @staticmethod
            def backward(ctx, grad):
                raise RuntimeError("no luck")

        model, x = make("mlp", batch=1)
        with pytest.raises(RuntimeError, match="no luck"):
            analyze(lambda x: Broken.apply(model(x)), x)


class TestSecondDerivatives:
    model = nn.Sequential(nn.Linear(20, 16), nn.Hardsigmoid(), nn.Linear(16, 6))
    message = "model: derivative for aten::hardsigmoid_backward is not implemented; wants .* differentiable=True"

    def test_an_operation_without_one_is_named_at_once(self):
        with pytest.raises(NotImplementedError, match=self.message):
            analyze(self.model, torch.randn(3, 20), differentiable=True)

    @pytest.mark.parametrize("loss", [losses.margin_loss, losses.cross_lipschitz_loss])
    def test_losses(self, loss):
        with pytest.raises(NotImplementedError, match=self.message):
            loss(self.model, torch.randn(3, 20), torch.zeros(3, dtype=torch.int64))

    @pytest.mark.parametrize("method", ["exact", "certified", "candidates"])
    def test_none_is_needed_without_a_graph(self, method):
        x = torch.randn(3, 20)
        same = nn.Sequential(self.model[0], nn.ReLU6(), self.model[2])
        found = analyze(lambda x: self.model[2](self.model[1](self.model[0](x))), x, method=method)
        want = analyze(lambda x: same[2](same[1](same[0](x) + 3) / 6), x, method=method)
        torch.testing.assert_close(found.linearized_robustness, want.linearized_robustness)

    @pytest.mark.parametrize("function", [F.hardswish, F.relu6, F.mish, F.elu, F.hardshrink], ids=lambda f: f.__name__)
    def test_operations_that_have_one(self, function):
        layer, x = self.model[0], torch.randn(3, 20, requires_grad=True)
        analyze(lambda x: function(layer(x)), x, differentiable=True).linearized_robustness.sum().backward()
        assert x.grad.isfinite().all()


class TestWarnings:
    @pytest.mark.parametrize("method", ["exact", "candidates"])
    def test_torch_does_not_complain_of_a_missing_batching_rule(self, method):
        """It takes such an operation row by row, which changes nothing but the time."""
        torch.manual_seed(0)
        first, last = nn.Linear(20, 16), nn.Linear(16, 9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            analyze(lambda x: last(first(x).cummax(1).values), torch.randn(3, 20), method=method)
