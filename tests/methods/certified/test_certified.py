"""The certified method on models of every kind, against exact rows."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench.baselines.jacobians import KINDS
from fastsal import Candidates, Certified, Exact, analyze

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(6, 24), nn.Linear(24, 150)

    def forward(self, x):
        q, k, v = self.into(x.view(-1, 5, 6)).view(-1, 5, 3, 8).chunk(3, 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return self.out(torch.cat((y.reshape(-1, 40)[:, :12], x[:, :12]), 1))


class Pooled(nn.Module):
    """A sequence module between an embedding and a head."""

    def __init__(self, body):
        super().__init__()
        self.into, self.body, self.out = nn.Linear(6, 16), body, nn.Linear(16, 150)

    def forward(self, x):
        x = self.into(x.view(-1, 5, 6))
        x = self.body(x, x, x) if isinstance(self.body, nn.MultiheadAttention) else self.body(x)
        return self.out((x[0] if isinstance(x, tuple) else x).mean(1))


class Opaque(torch.autograd.Function):
    """No forward-mode rule, no second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


def make(kind):
    torch.manual_seed(0)
    body = {
        "mlp": lambda: nn.Sequential(nn.Linear(30, 40), nn.GELU(), nn.Linear(40, 150)),
        "cnn": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 5, 6)),
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 150),
        ),
        "attention": Attention,
        "multihead": lambda: Pooled(nn.MultiheadAttention(16, 2, batch_first=True)),
        "encoder": lambda: Pooled(nn.TransformerEncoderLayer(16, 2, 20, batch_first=True)),
        "lstm": lambda: Pooled(nn.LSTM(16, 16, batch_first=True)),
    }[kind]()
    return body.eval().requires_grad_(False), torch.randn(5, 30)


class TestModels:
    @pytest.mark.parametrize("norm", KINDS)
    @pytest.mark.parametrize("kind", ["mlp", "cnn", "attention", "multihead", "encoder", "lstm"])
    def test_equals_exact_rows(self, kind, norm):
        model, x = make(kind)
        exact = analyze(model, x, norm=norm, method="exact")
        before = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = analyze(model, x, norm=norm, method="certified")
        assert found.method == "certified"
        assert found.certified.all()
        assert found.failure_probability == 1e-6
        assert torch.equal(found.runner_up, exact.runner_up)
        torch.testing.assert_close(found.linearized_robustness, exact.linearized_robustness)
        torch.testing.assert_close(found.lower_bound, exact.linearized_robustness)
        assert (found.jvps > 0).all()
        assert (found.vjps + found.jvps < 150).any()
        assert found.distances is None
        assert torch.backends.mha.get_fastpath_enabled() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])

    def test_neither_way_falls_back_to_rows_with_one_warning(self):
        model, x = make("mlp")
        with pytest.warns(UserWarning, match="neither forward-mode nor second derivatives") as record:
            found = analyze(lambda value: model(Opaque.apply(value)), x, method="certified")
        assert len([w for w in record if "neither" in str(w.message)]) == 1
        assert found.certified.all()
        assert found.vjps.tolist() == [150] * 5
        assert found.jvps.tolist() == [0] * 5

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_ambient_modes(self, context):
        model, x = make("cnn")
        want = analyze(model, x, method="certified")
        with context():
            found = analyze(model, x, method="certified")
        assert torch.equal(found.linearized_robustness, want.linearized_robustness)

    def test_newer_precision_settings(self, run_python):
        """torch raises when asked for the precision in its older words; η needs no words, it sees what the products do."""
        code = """
import torch, fastsal
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.GELU(), torch.nn.Linear(40, 150)).requires_grad_(False)
x = torch.randn(5, 30)
for precision in ("ieee", "tf32", "bf16"):
    for backend in (torch.backends.mkldnn, torch.backends.cuda):
        if hasattr(getattr(backend, "matmul", None), "fp32_precision"):  # from torch 2.9 on; CUDA has no bf16
            backend.matmul.fp32_precision = "tf32" if backend is torch.backends.cuda else precision
    exact, found = fastsal.analyze(model, x, method="exact"), fastsal.analyze(model, x, method="certified")
    print(bool(found.certified.all()), torch.equal(found.runner_up, exact.runner_up))
"""
        result = run_python("-c", code)
        assert result.stdout == "True True\n" * 3
        assert "differ" not in result.stderr  # where a processor has bf16, torch itself has something to say

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_16_bits_take_few_passes_too(self, dtype, norm):
        """What rounding may hide of a class is held against what its bound has room for: no class is taken without need."""
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(200, 100), nn.GELU(), nn.Linear(100, 1000)).requires_grad_(False)
        model[-1].weight.mul_(4)
        model, x = model.to(dtype), torch.randn(4, 200).to(dtype)
        found = analyze(model, x, norm=norm, method="certified")
        want = analyze(model, x, norm=norm, method=Exact(memory_limit=0))
        single = analyze(model.float(), x.float(), norm=norm, method="certified")
        assert found.certified.all()
        assert torch.equal(found.runner_up, want.runner_up)
        passes, fewest = (one.vjps + one.jvps for one in (found, single))
        assert (passes < 200).all()
        assert passes.double().mean() < 2 * fewest.double().mean()

    def test_autocast(self):
        """bfloat16 passes: η follows the precision that the model runs in."""
        model, x = make("mlp")
        with torch.autocast("cpu", torch.bfloat16):
            exact, found = analyze(model, x), analyze(model, x, method="certified")
        sure = found.certified
        torch.testing.assert_close(
            found.linearized_robustness[sure], exact.linearized_robustness[sure], rtol=1e-2, atol=0.0
        )
        assert sure.all()

    @pytest.mark.parametrize("chunk_size", [None, 1, 7])
    def test_shapes_options_and_one_score(self, chunk_size):
        model, x = make("cnn")
        result = analyze(model, x.view(5, 5, 6).flatten(1), method=Certified(1e-3, None, 3), chunk_size=chunk_size)
        assert result.certified.all()
        result = analyze(model, x, method="certified", keep_saliency=True, chunk_size=chunk_size)
        assert result.saliency.shape == x.shape
        score = analyze(lambda value: model(value)[:, 0], x, method="certified")
        assert score.certified.all()
        assert score.vjps.tolist() == [2] * 5
        assert analyze(model, x[:0], method="certified").vjps.shape == (0,)

    def test_differentiable(self):
        model, x = make("mlp")
        gradients = []
        for method in ("exact", "certified"):
            leaf = x.clone().requires_grad_()
            result = analyze(model, leaf, method=method, differentiable=True)
            gradients.append(torch.autograd.grad(result.linearized_robustness.sum(), leaf)[0])
        torch.testing.assert_close(*gradients)

    def test_perturbations_in_the_1_norm_are_an_error(self):
        model, x = make("mlp")
        with pytest.raises(ValueError, match=r"norm: got 1 .*certified.*wants 2 or inf"):
            analyze(model, x, norm=1, method="certified")

    def test_candidates_can_be_wrong_where_certified_is_not(self):
        model, x = make("mlp")
        exact = analyze(model, x, method="exact")
        candidates = analyze(model, x, method=Candidates(1))
        assert (candidates.linearized_robustness >= exact.linearized_robustness).all()

    def test_a_call_does_not_depend_on_earlier_ones(self):
        model, x = make("cnn")
        first = analyze(model, x, method="certified")
        analyze(model, x.flip(0), method=Certified(seed=5))
        again = analyze(model, x, method="certified")
        assert torch.equal(first.linearized_robustness, again.linearized_robustness)
        assert torch.equal(first.runner_up, again.runner_up)
