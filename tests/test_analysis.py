"""analyze against dense Jacobians, the bias sum and toys in closed form: values, gradients, memory, options."""

import math
import re

import cases
import pytest
import torch
import torch.nn.functional as F
from networks import MODELS, LargestTensor, dense, make
from torch import nn
from truth import geometry_truth

from fastsal import Candidates, Exact, analyze
from fastsal.tensor import reference


def compare(result, logits, jacobian, x, norm, tolerance):
    truth = geometry_truth(logits, jacobian, x.flatten(1), norm)
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

    def test_probabilities_are_warned_about(self):
        model, x = make("mlp")
        with pytest.warns(UserWarning, match="probabilities"):
            analyze(lambda x: model(x).softmax(1), x)

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

    def test_nan_stays_in_its_example(self):
        model, x = make("gelu")
        clean = analyze(model, x, chunk_size=4)
        x[2, 1, 3] = math.nan
        result = analyze(model, x, chunk_size=4)
        keep = torch.arange(len(x)) != 2
        for name in reference.SCALARS:
            assert getattr(result, name)[2].isnan(), name
            torch.testing.assert_close(getattr(result, name)[keep], getattr(clean, name)[keep])

    @pytest.mark.parametrize("shape", [(0, 20), (0, 2, 8, 8)])
    def test_empty_batch(self, shape):
        model, x = make("mlp" if len(shape) == 2 else "cnn with batchnorm", batch=0)
        result = analyze(model, x, keep_saliency=True)
        assert result.prediction.shape == result.alignment.shape == result.vjps.shape == (0,)
        assert result.prediction.dtype == torch.int64
        assert result.distances.shape == (0, 23 if len(shape) == 2 else 5)
        assert result.saliency.shape == shape


class TestMemory:
    @pytest.mark.parametrize("differentiable", [False, True])
    def test_no_tensor_as_large_as_the_jacobian(self, differentiable):
        """Largest: a chunk in float64, as the reference backend takes it; the whole Jacobian would be 15 times that."""
        classes, chunk, batch, entries = 60, 2, 2, 768
        model = nn.Sequential(nn.Linear(entries, 8), nn.ReLU(), nn.Linear(8, classes))

        with LargestTensor() as largest:
            x, rows = torch.randn(batch, entries), Exact(memory_limit=0)
            analyze(model, x, chunk_size=chunk, differentiable=differentiable, method=rows)
        assert 0 < largest.bytes <= chunk * batch * entries * 8

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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"method": "nearest"},
            "method: got 'nearest', wants one of ['auto', 'exact', 'certified', 'candidates'], fastsal.Exact(), .",
        ),
        ({"method": 3}, "method: got 3, wants one of ['auto', 'exact'"),
        ({"norm": 3}, "norm: got 3, wants 2, 1, math.inf or 'inf'"),
        ({"chunk_size": 0}, "chunk_size: got 0, wants None or an integer >= 1"),
        ({"chunk_size": 1.5}, "chunk_size: got 1.5, wants None or an integer >= 1"),
        ({"backend": "tpu"}, "backend: got 'tpu', wants one of"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        analyze(nn.Linear(4, 3), torch.ones(3, 4), **options)
