"""analyze against dense Jacobians, the bias sum, toys in closed form, and everything it promises to leave alone."""

import collections
import copy
import itertools
import math
import random
import re

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastsal import Candidates, Exact, analyze, reference
from fastsal.linearization import Linearization, linearize


class Attention(nn.Module):
    """A small transformer over tokens [B, 5, 12]; "fused" calls scaled_dot_product_attention itself."""

    def __init__(self, kind, classes=7):
        super().__init__()
        self.kind = kind
        self.mix = (
            nn.Linear(12, 36)
            if kind == "fused"
            else nn.TransformerEncoderLayer(12, 2, 24, dropout=0.1, activation="gelu", batch_first=True)
        )
        self.head = nn.Linear(12, classes)

    def forward(self, x):
        if self.kind == "fused":
            q, k, v = self.mix(x).view(*x.shape[:2], 3, 2, 6).permute(2, 0, 3, 1, 4)
            y = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            y = self.mix(x)
        return self.head(y.mean(1))


def relu_mlp(bias=True):
    return nn.Sequential(
        nn.Linear(20, 32, bias=bias), nn.ReLU(), nn.Linear(32, 32, bias=bias), nn.ReLU(), nn.Linear(32, 23, bias=bias)
    )


def relu_cnn():
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.1, inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5),
    )
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return net


MODELS = {
    "mlp": (relu_mlp, (20,)),
    "mlp without bias": (lambda: relu_mlp(bias=False), (20,)),
    "cnn with batchnorm": (relu_cnn, (2, 8, 8)),
    "gelu": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 20)), (3, 4)),
    "transformer": (lambda: Attention("encoder"), (5, 12)),
    "fused attention": (lambda: Attention("fused"), (5, 12)),
}


def make(name, dtype=torch.float32, batch=6, seed=0):
    torch.manual_seed(seed)
    build, shape = MODELS[name]
    return build().to(dtype).eval(), torch.randn(batch, *shape, dtype=dtype)


def dense(model, x):
    """Logits [B, n] and the whole Jacobian [B, n, D], by one plain backward pass a class."""
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = model(x.clone())
    rows = [torch.autograd.grad(logits[:, j].sum(), x, retain_graph=True)[0].flatten(1) for j in range(logits.shape[1])]
    return logits.detach(), torch.stack(rows, 1)


def compare(result, logits, jacobian, x, norm, tolerance):
    truth = cases.geometry_truth(logits, jacobian, x.flatten(1), norm)
    for name in ("prediction", "runner_up"):
        assert getattr(result, name).tolist() == truth.values[name].tolist()
    for name in (*reference.SCALARS, "distances"):
        got = getattr(result, name)
        assert got.dtype == cases.out_dtype(x.dtype)
        cases.assert_close(name, got, truth.values[name], truth.scales[name], tolerance)


class TestValues:
    @pytest.mark.parametrize("norm", [2.0, 1.0, math.inf])
    @pytest.mark.parametrize("name", MODELS)
    def test_float64_against_jacrev(self, name, norm):
        """Only the order of float64 sums differs: some 100 roundings of 1e-16, margins down to 1e-3 of the scores."""
        model, x = make(name, torch.float64)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            jacobian = torch.func.jacrev(lambda x: model(x.clone()))(x)
        jacobian = jacobian.detach()[torch.arange(len(x)), :, torch.arange(len(x))].flatten(2)
        compare(analyze(model, x, norm=norm), model(x.clone()).detach(), jacobian, x, norm, 1e-11)

    @pytest.mark.parametrize("norm", [2, 1, "inf"])
    @pytest.mark.parametrize("name", MODELS)
    def test_float32_on_the_same_rows(self, name, norm):
        """One class at a time is the same arithmetic as `dense`, so that what is left is fastsal's own 1e-6."""
        model, x = make(name)
        logits, jacobian = dense(model, x)
        compare(analyze(model, x, norm=norm, chunk_size=1), logits, jacobian, x, float(norm), 1e-6)

    def test_bfloat16(self):
        model, x = make("mlp", torch.bfloat16)
        logits, jacobian = dense(model, x)
        compare(analyze(model, x, chunk_size=1), logits, jacobian, x, 2.0, 1e-6)

    @pytest.mark.parametrize("name", ["mlp", "cnn with batchnorm", "mlp without bias"])
    def test_offsets_are_the_bias_sum(self, name):
        """Euler: β = Σ ⟨b, ∂_bΨ⟩ over all biases, and ⟨μ, ∂_μΨ⟩ = −Σ μ_c w_c/σ_c ∂_{b_c}Ψ for running means."""
        model, x = make(name, torch.float64)
        result = analyze(model, x)

        def bias_sum(score):
            total = torch.zeros((), dtype=torch.float64)
            for module in model.modules():
                if getattr(module, "bias", None) is not None:
                    (grad,) = torch.autograd.grad(score, module.bias, retain_graph=True)
                    total += grad @ module.bias.detach()
                    if hasattr(module, "running_mean"):
                        slope = module.weight.detach() / (module.running_var + module.eps).sqrt()
                        total -= grad @ (slope * module.running_mean)
            return total

        logits = model(x.clone())
        for b, (i, j) in enumerate(zip(result.prediction.tolist(), result.runner_up.tolist(), strict=True)):
            # Scale: a few hundred terms of order 1.
            assert abs(result.offset[b] - bias_sum(logits[b, i])) < 1e-11
            assert abs(result.binarized_offset[b] - bias_sum(logits[b, i] - logits[b, j])) < 1e-11
        if name == "mlp without bias":
            torch.testing.assert_close(result.linearized_robustness, result.binarized_alignment, rtol=1e-11, atol=0.0)
        else:
            assert result.offset.abs().min() > 1e-3

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("columns", [(), (1,)])
    def test_one_score(self, columns, bias):
        """The talk's toy: F = sgn Ψ, ρ̃ = |Ψ|/‖w‖ and α = |⟨x, w⟩|/‖w‖, equal without a bias."""
        torch.manual_seed(1)
        x, w = torch.randn(9, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        b = 0.7 if bias else 0.0
        result = analyze(lambda x: (x @ w + b).reshape(-1, *columns), x, keep_saliency=True)
        psi = x @ w + b
        assert torch.equal(result.prediction, (psi > 0).long())
        assert torch.equal(result.runner_up, (psi <= 0).long())
        close = {"rtol": 1e-13, "atol": 1e-14}
        torch.testing.assert_close(result.linearized_robustness, psi.abs() / w.norm(), **close)
        torch.testing.assert_close(result.alignment, (x @ w).abs() / w.norm(), **close)
        torch.testing.assert_close(result.binarized_logit, psi.abs(), **close)
        torch.testing.assert_close(result.binarized_saliency, psi.sign().unsqueeze(1) * w, **close)
        assert result.distances.shape == (9, 2)
        if not bias:
            angle = F.cosine_similarity(x, w.expand(9, 4))
            torch.testing.assert_close(result.linearized_robustness, x.norm(dim=1) * angle.abs(), **close)

    def test_log_softmax_leaves_robustness_unchanged(self):
        model, x = make("gelu", torch.float64)
        plain, normalised = analyze(model, x), analyze(lambda x: model(x).log_softmax(1), x)
        assert torch.equal(plain.runner_up, normalised.runner_up)
        torch.testing.assert_close(plain.linearized_robustness, normalised.linearized_robustness, rtol=1e-11, atol=0.0)

    def test_keep_saliency(self):
        model, x = make("cnn with batchnorm")
        _, jacobian = dense(model, x)
        result = analyze(model, x, keep_saliency=True, chunk_size=1)
        index = torch.arange(len(x))
        g = jacobian[index, result.prediction].view_as(x)
        assert torch.equal(result.saliency, g)
        assert torch.equal(result.binarized_saliency, g - jacobian[index, result.runner_up].view_as(x))
        assert analyze(model, x).saliency is None

    def test_channels_last(self):
        model, x = make("cnn with batchnorm", torch.float64)
        plain = analyze(model, x, keep_saliency=True)
        other = analyze(model, x.to(memory_format=torch.channels_last), keep_saliency=True)
        torch.testing.assert_close(plain.alignment, other.alignment, rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(plain.saliency, other.saliency, rtol=1e-11, atol=1e-13)

    def test_constant_gradients_have_unit_stride(self):
        """x.sum(1) has an expanded gradient of stride 0."""

        def model(x):
            return torch.stack((x.sum(1), -x.sum(1), 0 * x[:, 0]), 1)

        result = analyze(model, torch.ones(2, 5))
        torch.testing.assert_close(result.linearized_robustness, torch.full((2,), math.sqrt(5)))
        with linearize(lambda x: x.sum(1), torch.ones(2, 5)) as graph:
            for classes in torch.zeros(1, 2, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64):
                assert graph.rows(classes).stride(2) == 1

    def test_a_model_may_overwrite_its_input(self):
        torch.manual_seed(0)
        layers, x = (nn.Linear(20, 9), nn.Linear(9, 4)), torch.randn(3, 20)
        held = x.clone()
        result = analyze(nn.Sequential(nn.ReLU(inplace=True), *layers), x)
        assert torch.equal(x, held)
        assert torch.equal(result.distances, analyze(nn.Sequential(nn.ReLU(), *layers), x).distances)

    @pytest.mark.parametrize("shape", [(0, 20), (0, 2, 8, 8)])
    def test_empty_batch(self, shape):
        model, x = make("mlp" if len(shape) == 2 else "cnn with batchnorm", batch=0)
        result = analyze(model, x, keep_saliency=True)
        assert result.prediction.shape == result.alignment.shape == result.vjps.shape == (0,)
        assert result.prediction.dtype == torch.int64
        assert result.distances.shape == (0, 23 if len(shape) == 2 else 5)
        assert result.saliency.shape == shape


def linear(weight, bias=0.0):
    return lambda x: x @ weight.t() + bias


class NaNGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.where(grad == 0, grad, math.nan)


class TestStreaming:
    @pytest.mark.parametrize("norm", [2, 1, math.inf])
    def test_chunk_sizes_agree_bit_for_bit(self, norm):
        """Integer weights and inputs: the model's own arithmetic is exact, whatever the chunk."""
        torch.manual_seed(0)
        weight, x = torch.randint(-9, 9, (37, 11)).float(), torch.randint(-9, 9, (5, 11)).float()
        first, *others = [analyze(linear(weight), x, norm=norm, chunk_size=c) for c in (1, 2, 3, 7, 36, 100, None)]
        for other in others:
            for name in (*reference.SCALARS, "runner_up", "prediction", "distances", "lower_bound"):
                assert torch.equal(getattr(first, name), getattr(other, name)), name

    @pytest.mark.parametrize("chunk", [1, 2, 3, 8])
    def test_ties_take_the_lowest_class(self, chunk):
        weight = torch.tensor([[0.0], [1.0], [0.0], [2.0], [1.0], [1.0]])
        result = analyze(
            linear(weight, torch.tensor([-9.0, 0.0, -9.0, 0.0, 0.0, 0.0])), torch.ones(1, 1), chunk_size=chunk
        )
        assert (result.prediction.item(), result.runner_up.item()) == (3, 1)
        tied = analyze(linear(torch.eye(4)), torch.ones(2, 4), chunk_size=chunk)
        assert tied.prediction.tolist() == [0, 0]
        assert tied.runner_up.tolist() == [1, 1]
        assert tied.linearized_robustness.tolist() == [0.0, 0.0]

    @pytest.mark.parametrize("chunk", [1, 2, 8])
    def test_equal_gradients_fall_to_the_smallest_margin(self, chunk):
        bias = torch.tensor([0.0, 2.0, 1.0, 5.0, 2.0, -math.inf])
        result = analyze(linear(torch.ones(6, 3), bias), torch.ones(2, 3), chunk_size=chunk)
        assert result.linearized_robustness.tolist() == [math.inf] * 2
        assert result.runner_up.tolist() == [1, 1]

    def test_minus_infinity_is_not_the_runner_up(self):
        weight = torch.eye(4)
        bias = torch.tensor([0.0, -math.inf, -3.0, -math.inf])
        result = analyze(linear(weight, bias), torch.full((1, 4), 2.0), chunk_size=1)
        assert (result.prediction.item(), result.runner_up.item()) == (0, 2)

    def test_nan_stays_in_its_example(self):
        model, x = make("gelu")
        clean = analyze(model, x, chunk_size=4)
        x[2, 1, 3] = math.nan
        result = analyze(model, x, chunk_size=4)
        keep = torch.arange(len(x)) != 2
        for name in reference.SCALARS:
            assert getattr(result, name)[2].isnan(), name
            torch.testing.assert_close(getattr(result, name)[keep], getattr(clean, name)[keep])

    @pytest.mark.parametrize("chunk", [1, 2, 8])
    def test_a_nan_gradient_is_not_skipped(self, chunk):
        def model(x):
            return torch.stack((x[:, 1], x[:, 0] / 2, 3 * x[:, 0], NaNGradient.apply(x[:, 2]), 0 * x[:, 0]), 1)

        result = analyze(model, torch.ones(1, 3), chunk_size=chunk)
        assert (result.prediction.tolist(), result.runner_up.tolist()) == ([2], [3])
        assert result.linearized_robustness.isnan().all()
        assert result.alignment.tolist() == [1.0]

    def test_candidates(self):
        model, x = make("mlp", torch.float64)
        exact = analyze(model, x)
        for k in (1, 3, 22, 50):
            result = analyze(model, x, method=Candidates(k), chunk_size=2)
            order = model(x).argsort(1, descending=True)[:, 1 : k + 1]
            best, where = exact.distances.gather(1, order).min(1)
            torch.testing.assert_close(result.linearized_robustness, best, rtol=1e-11, atol=0.0)
            assert torch.equal(result.runner_up, order.gather(1, where.unsqueeze(1)).squeeze(1))
            assert result.method == "candidates"
            assert result.vjps.tolist() == [min(k, 22) + 1] * len(x)
            assert not result.certified.any()
            assert result.lower_bound.tolist() == [0.0] * len(x)
            assert result.distances is None
        assert torch.equal(result.runner_up, exact.runner_up)
        assert analyze(model, x, method="candidates").vjps.tolist() == [11] * len(x)

    def test_provenance_of_exact(self):
        model, x = make("mlp")
        result = analyze(model, x, method="exact")
        assert result.method == "exact"
        assert result.vjps.tolist() == [23] * len(x)
        assert result.jvps.tolist() == [0] * len(x)
        assert result.certified.all()
        assert torch.equal(result.lower_bound, result.linearized_robustness)
        assert result.failure_probability == 0.0
        assert (result.distances.min(1).values == result.linearized_robustness).all()

    def test_passes_are_counted(self, monkeypatch):
        model, x = make("mlp")
        passes = spy(monkeypatch)
        analyze(model, x, chunk_size=5)
        assert passes[0] == 1  # the check that examples do not mix
        assert passes[1:] == [5, 5, 5, 5, 3]

    def test_a_chunk_takes_each_convolution_once(self):
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(12, 20)).eval()
        with linearize(model, torch.randn(2, 1, 6, 6)) as graph, CountedOperations() as counted:
            graph.rows(torch.arange(20).unsqueeze(1).expand(20, 2))
        assert counted["aten.convolution_backward.default"] == 2


class TestChunkSize:
    @pytest.mark.parametrize(
        ("layer", "batch", "want"),
        [
            (nn.Conv2d(1, 8, 3, padding=1), 4, 16),  # 512 KiB of gradients a row, in 8 MiB
            (nn.Conv2d(1, 8, 3, padding=1), 64, 1),  # 8 MiB
            (nn.Conv2d(1, 8, 3, padding=1), 128, 1),
            (nn.Conv2d(1, 1, 3, padding=1), 1, 40),  # the most
            (
                nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.Flatten(), nn.Linear(2**15, 128)),
                8,
                16,
            ),  # 16 MiB of weights
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


class CountedOperations(TorchDispatchMode, collections.Counter):
    """How often each operation runs inside, by name."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self[str(func)] += 1
        return func(*args, **(kwargs or {}))


def spy(monkeypatch, fail=lambda count: None):
    """The number of rows of every backward pass from here on; `fail(count)` may raise."""
    calls, grad = [], Linearization._grad

    def wrapper(self, cotangents, batched, create_graph):
        count = cotangents.shape[0] if batched else 1
        fail(count)
        calls.append(count)
        return grad(self, cotangents, batched, create_graph)

    monkeypatch.setattr(Linearization, "_grad", wrapper)
    return calls


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

    @pytest.mark.parametrize("differentiable", [False, True])
    def test_no_tensor_as_large_as_the_jacobian(self, differentiable):
        """Largest: a chunk in float64, as the reference backend takes it; the whole Jacobian would be 15 times that."""
        classes, chunk, batch, entries = 60, 2, 2, 768
        model = nn.Sequential(nn.Linear(entries, 8), nn.ReLU(), nn.Linear(8, classes))

        class Largest(TorchDispatchMode):
            size = 0

            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                out = func(*args, **(kwargs or {}))
                for tensor in out if isinstance(out, tuple | list) else (out,):
                    if isinstance(tensor, torch.Tensor):
                        self.size = max(self.size, tensor.numel() * tensor.element_size())
                return out

        with Largest() as largest:
            x, rows = torch.randn(batch, entries), Exact(memory_limit=0)
            analyze(model, x, chunk_size=chunk, differentiable=differentiable, method=rows)
        assert 0 < largest.size <= chunk * batch * entries * 8

    def test_peak_memory(self, run_python):
        """A Jacobian of 39 MB is streamed in less than 12 MB."""
        script = """
import resource, torch
from torch import nn
from fastsal import Candidates, analyze
model = nn.Sequential(nn.Flatten(), nn.Linear(12288, 16), nn.ReLU(), nn.Linear(16, 200))
x = torch.ones(4, 3, 64, 64)
analyze(model, x, chunk_size=4, method=Candidates(8))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
analyze(model, x, chunk_size=4)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
        run = run_python("-c", script)
        assert run.returncode == 0, run.stderr
        assert int(run.stdout) < 12_000  # KiB


class NoVmap(torch.autograd.Function):
    """Doubles; its backward reads a value, which vmap cannot."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad if math.isfinite(grad.sum().item()) else grad


class TestAmbient:
    """Modes, state and models that torch.func cannot take."""

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

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("name", ["mlp", "transformer", "cnn with batchnorm"])
    def test_without_gradients(self, name, mode):
        model, x = make(name)
        truth = analyze(model, x, keep_saliency=True)
        with mode():
            result = analyze(model, x.clone(), keep_saliency=True)
            assert not torch.is_grad_enabled()
        assert torch.equal(result.distances, truth.distances)
        assert torch.equal(result.saliency, truth.saliency)
        assert not result.linearized_robustness.requires_grad

    @pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
    def test_autocast(self, mode):
        """The rows of the model as autocast runs it, and the same after a forward pass that filled the weight cache."""
        model, x = make("mlp")
        with torch.autocast("cpu", torch.bfloat16):
            logits, jacobian = dense(model, x)
        assert logits.dtype == torch.bfloat16
        with mode(), torch.autocast("cpu", torch.bfloat16):
            model(x)
            result = analyze(model, x, chunk_size=1)
            assert torch.is_autocast_enabled("cpu")
            assert torch.is_autocast_cache_enabled()
        compare(result, logits, jacobian, x, 2.0, 1e-6)

    def test_float64_logits_of_a_float32_input(self):
        model, x = make("mlp")
        result = analyze(lambda x: model(x).double(), x)
        assert result.linearized_robustness.dtype == torch.float32
        torch.testing.assert_close(result.distances, analyze(model, x).distances)

    @pytest.mark.parametrize("differentiable", [False, True])
    @pytest.mark.parametrize("name", ["cnn with batchnorm", "transformer"])
    def test_state_is_left_alone(self, name, differentiable):
        model, x = make(name)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.Dropout | nn.MultiheadAttention):
                module.eval()
        first, *rest = model.parameters()
        first.requires_grad_(False)
        rest[0].grad = torch.ones_like(rest[0])
        called = []
        hook = model.register_forward_hook(lambda *_: called.append(1))
        flags = [module.training for module in model.modules()]
        state = copy.deepcopy(model.state_dict())
        x.requires_grad_(differentiable)
        held, version = x.detach().clone(), x._version
        torch.manual_seed(5)
        rng, python = torch.get_rng_state(), random.getstate()
        fast = torch.backends.mha.get_fastpath_enabled()

        analyze(model, x, differentiable=differentiable)

        assert torch.equal(torch.get_rng_state(), rng)
        assert random.getstate() == python
        assert torch.backends.mha.get_fastpath_enabled() == fast
        assert [module.training for module in model.modules()] == flags
        for key, value in model.state_dict().items():
            assert torch.equal(value, state[key]), key
        assert not first.requires_grad
        assert all(p.requires_grad for p in rest)
        assert first.grad is None
        assert torch.equal(rest[0].grad, torch.ones_like(rest[0]))
        assert all(p.grad is None for p in rest[1:])
        assert called
        assert list(model._forward_hooks) == [hook.id]
        assert torch.equal(x, held)
        assert x._version == version
        assert x.requires_grad == differentiable
        assert x.grad is None

    def test_random_numbers_are_put_back(self):
        rng = torch.get_rng_state()
        analyze(lambda x: x @ torch.eye(3) + 0 * torch.rand(3), torch.randn(2, 3, generator=torch.Generator()))
        assert torch.equal(torch.get_rng_state(), rng)

    def test_probabilities_are_warned_about(self):
        model, x = make("mlp")
        with pytest.warns(UserWarning, match="probabilities"):
            analyze(lambda x: model(x).softmax(1), x)


def tanh_network(*parameters):
    first, offset, second = parameters
    return lambda x: torch.tanh(x @ first + offset) @ second


class TestDifferentiable:
    @pytest.fixture
    def inputs(self):
        torch.manual_seed(3)
        shapes = (3, 4), (4,), (4, 3), (2, 3)
        return tuple(torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)

    @pytest.mark.parametrize("norm", [2, 1, math.inf])
    def test_gradcheck(self, inputs, norm):
        def scalars(*inputs):
            *parameters, x = inputs
            result = analyze(tanh_network(*parameters), x, norm=norm, differentiable=True, keep_saliency=True)
            return (*(getattr(result, name) for name in reference.SCALARS), result.binarized_saliency)

        assert torch.autograd.gradcheck(scalars, inputs)

    def test_gradgradcheck(self, inputs):
        def scalars(*inputs):
            *parameters, x = inputs
            result = analyze(tanh_network(*parameters), x, differentiable=True)
            return result.linearized_robustness, result.alignment, result.bound

        assert torch.autograd.gradgradcheck(scalars, inputs)

    @pytest.mark.parametrize("name", MODELS)
    def test_values_are_those_without_a_graph(self, name):
        model, x = make(name, torch.float64)
        plain, graph = analyze(model, x), analyze(model, x, differentiable=True, keep_saliency=True)
        assert torch.equal(plain.runner_up, graph.runner_up)
        for field in reference.SCALARS:
            assert getattr(graph, field).requires_grad
            # Attention is computed by other kernels; offsets cancel.
            torch.testing.assert_close(getattr(plain, field), getattr(graph, field).detach(), rtol=1e-9, atol=1e-11)
        assert graph.saliency.requires_grad
        for tensor in (graph.distances, graph.lower_bound, graph.runner_up):
            assert not tensor.requires_grad

    @pytest.mark.parametrize("name", ["transformer", "fused attention", "cnn with batchnorm", "gelu"])
    def test_reaches_every_weight(self, name):
        model, x = make(name)
        analyze(model, x, differentiable=True).linearized_robustness.sum().backward()
        moved = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert set(moved) >= {n for n, _ in model.named_parameters() if n.endswith("weight")}

    def test_gradient_reaches_the_caller(self):
        """Through x, also where x is itself computed, and under no_grad, since it was asked for."""
        model, _ = make("gelu", torch.float64)
        z = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
        with torch.no_grad():
            leaf = analyze(model, z, differentiable=True).alignment
        (direct,) = torch.autograd.grad(leaf.sum(), z)
        (through,) = torch.autograd.grad(analyze(model, 2 * (z / 2), differentiable=True).alignment.sum(), z)
        torch.testing.assert_close(direct, through)
        assert direct.abs().sum() > 0

    def test_training_on_the_distance(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
        x = torch.randn(16, 6)
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        history = []
        for _ in range(15):
            optimiser.zero_grad()
            result = analyze(model, x, differentiable=True, method=Candidates(4))
            loss = -result.linearized_robustness.mean()
            loss.backward()
            optimiser.step()
            history.append(-loss.item())
        assert history[-1] > 1.5 * history[0]

    def test_candidates_saliency_of_autocast(self):
        model, x = make("gelu")
        with torch.autocast("cpu", torch.bfloat16):
            result = analyze(model, x, differentiable=True, method="candidates", keep_saliency=True)
        result.linearized_robustness.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def batch_statistics():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Linear(6, 3)).eval()


class TestErrors:
    x = torch.ones(3, 4)

    @pytest.mark.parametrize(
        ("model", "kind", "message"),
        [
            (lambda x: {"logits": x}, TypeError, "model: returned dict, wants a tensor of logits [B, n]"),
            (lambda x: x.argmax(1), TypeError, "model: returned dtype torch.int64, wants floating-point logits"),
            (
                lambda x: x[None],
                ValueError,
                "model: returned shape (1, 3, 4), wants logits [B, n] with B = 3 and n >= 2",
            ),
            (lambda x: x[:2], ValueError, "model: returned shape (2, 4), wants logits [B, n] with B = 3 and n >= 2"),
            (lambda x: x.sum(), ValueError, "model: returned shape (), wants logits [B, n] with B = 3 and n >= 2"),
            (lambda x: x[:, :0], ValueError, "model: returned shape (3, 0), wants logits [B, n]"),
            (lambda x: x.detach(), ValueError, "model: its logits do not depend on x"),
            (lambda x: torch.ones(3, 4, requires_grad=True), ValueError, "model: its logits do not depend on x"),
            (lambda x: x - x.mean(0), ValueError, "model: mixes the examples of a batch"),
            (lambda x: x + x.mean(0) - x.mean(0).flip(0), ValueError, "model: mixes the examples of a batch"),
            (lambda x: x.flip(0), ValueError, "model: mixes the examples of a batch"),
            (batch_statistics(), ValueError, "model: mixes the examples of a batch"),
        ],
    )
    def test_model(self, model, kind, message):
        with pytest.raises(kind, match="^" + re.escape(message)):
            analyze(model, self.x)

    @pytest.mark.parametrize(
        "layer",
        [
            nn.BatchNorm1d(4),
            nn.BatchNorm1d(4, track_running_stats=False),
            nn.InstanceNorm1d(4, track_running_stats=True),
            nn.Dropout(0.1),
            nn.Dropout1d(0.1),
            nn.AlphaDropout(0.1),
            nn.FeatureAlphaDropout(0.1),
            nn.RReLU(),
            nn.MultiheadAttention(4, 2, dropout=0.1),
            nn.LSTM(4, 4, num_layers=2, dropout=0.1),
            nn.TransformerEncoderLayer(4, 2, 8),
        ],
        ids=lambda layer: type(layer).__name__,
    )
    def test_training_mode(self, layer):
        model = nn.Sequential(nn.Linear(4, 4), layer)
        with pytest.raises(ValueError, match=r"model: got \w+ '1.*' in training mode.*call model.eval\(\)"):
            analyze(model, self.x)

    def test_harmless_training_mode(self):
        layers = nn.InstanceNorm1d(4), nn.Dropout(0.0), nn.GroupNorm(2, 4), nn.LayerNorm(4)
        model = nn.Sequential(nn.Linear(4, 4), *layers[1:])
        assert analyze(model, torch.randn(3, 4)).vjps.tolist() == [4, 4, 4]
        assert analyze(nn.Sequential(layers[0], nn.Flatten()), torch.randn(3, 4, 2)).vjps.tolist() == [8, 8, 8]

    @pytest.mark.parametrize(
        ("x", "kind", "message"),
        [
            ([1.0], TypeError, "x: got list, wants a torch.Tensor"),
            (torch.ones(3, 4, dtype=torch.int64), TypeError, "x: got dtype torch.int64, wants float32"),
            (torch.ones(3, 4, dtype=torch.complex64), TypeError, "x: got dtype torch.complex64, wants float32"),
            (torch.tensor(1.0), ValueError, "x: got shape (), wants [B, *S]"),
            (
                torch.ones(3, 0),
                ValueError,
                "x: got shape (3, 0), wants [B, *S] with at least one entry an example (D >= 1)",
            ),
        ],
    )
    def test_x(self, x, kind, message):
        with pytest.raises(kind, match="^" + re.escape(message)):
            analyze(nn.Linear(4, 3), x)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"method": "nearest"},
                "method: got 'nearest', wants one of ['exact', 'candidates', 'certified'], fastsal.Exact(), .Candidates(k) or",
            ),
            ({"method": 3}, "method: got 3, wants one of ['exact', 'candidates'"),
            ({"norm": 3}, "norm: got 3, wants 2, 1, math.inf or 'inf'"),
            ({"chunk_size": 0}, "chunk_size: got 0, wants None or an integer >= 1"),
            ({"chunk_size": 1.5}, "chunk_size: got 1.5, wants None or an integer >= 1"),
            ({"backend": "tpu"}, "backend: got 'tpu', wants one of"),
        ],
    )
    def test_options(self, options, message):
        with pytest.raises(ValueError, match="^" + re.escape(message)):
            analyze(nn.Linear(4, 3), self.x, **options)

    @pytest.mark.parametrize("k", [0, -1, 2.0, "3"])
    def test_candidates(self, k):
        with pytest.raises(ValueError, match=re.escape(f"Candidates: got k={k!r}, wants an integer >= 1")):
            Candidates(k)

    def test_a_single_example_is_not_checked_for_mixing(self):
        assert analyze(lambda x: x - 0.5 * x.mean(0), torch.tensor([[3.0, 1.0]])).prediction.tolist() == [0]


def test_rows_per_example():
    """The seam other methods stand on: each example its own classes, mixtures, no copy of the transposed rows."""
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
