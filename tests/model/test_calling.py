"""How a user's model is run: what is refused, what its logits may come in, and what is left as it was."""

import copy
import random
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from networks import make
from torch import nn

from fastsal import analyze, deepfool


class TestState:
    """Modes, the model's state and the generators."""

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

    def test_a_model_may_overwrite_its_input(self):
        torch.manual_seed(0)
        layers, x = (nn.Linear(20, 9), nn.Linear(9, 4)), torch.randn(3, 20)
        held = x.clone()
        result = analyze(nn.Sequential(nn.ReLU(inplace=True), *layers), x)
        assert torch.equal(x, held)
        assert torch.equal(result.distances, analyze(nn.Sequential(nn.ReLU(), *layers), x).distances)


class TestCompiledModels:
    """torch.compile's code calls no hooks, and has neither batched nor second derivatives nor a forward mode."""

    @pytest.fixture(params=["eager", "aot_eager"])
    def backend(self, request):
        torch._dynamo.reset()
        yield request.param
        torch._dynamo.reset()

    @pytest.mark.parametrize("method", ["exact", "certified", "candidates"])
    def test_compiled_and_plain_are_one(self, backend, method):
        torch.manual_seed(0)
        # A head narrower than n, for the features, and classes enough for probes.
        model = nn.Sequential(nn.Linear(36, 12), nn.GELU(), nn.Linear(12, 90)).eval()
        x = torch.randn(5, 36)
        compiled = torch.compile(model, backend=backend)
        compiled(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            result, want = analyze(compiled, x, method=method), analyze(model, x, method=method)
        assert (result.vjps + result.jvps).tolist() == (want.vjps + want.jvps).tolist()
        assert torch.equal(result.linearized_robustness, want.linearized_robustness)
        assert torch.equal(deepfool(compiled, x).adversarial, deepfool(model, x).adversarial)

    def test_in_part_or_in_place(self, backend):
        model, x = make("cnn with batchnorm")
        want = analyze(model, x).distances
        model[3] = torch.compile(model[3], backend=backend)
        assert torch.equal(analyze(model, x).distances, want)
        model.compile(backend=backend)
        assert torch.equal(analyze(model, x).distances, want)

    def test_a_gradient_of_the_result(self, backend):
        model, x = make("gelu")
        gradients = []
        for one in (model, torch.compile(model, backend=backend)):
            leaf = x.clone().requires_grad_()
            analyze(one, leaf, differentiable=True).linearized_robustness.sum().backward()
            gradients.append(leaf.grad)
        assert torch.equal(*gradients)

    def test_compiled_code_stays_compiled_for_the_caller(self, backend):
        model, x = make("mlp")
        ran = []
        compiled = torch.compile(model, backend=lambda graph, inputs: lambda *args: ran.append(1) or graph(*args))
        compiled(x)
        analyze(compiled, x)
        assert ran == [1]
        compiled(x)
        assert ran == [1, 1]

    def test_who_compiles_nothing_does_not_wait_for_the_compiler(self):
        """One row at a time, without vmap, which imports the compiler itself before torch 2.7."""
        code = "import sys, torch, fastsal; fastsal.analyze(torch.nn.Linear(4, 3), torch.ones(2, 4), chunk_size=1); "
        done = subprocess.run(
            [sys.executable, "-c", code + "print('torch._dynamo' in sys.modules)"], capture_output=True
        )
        assert done.stdout.strip() == b"False", done.stderr


class TestOutputs:
    """What Hugging Face's classifiers return: an object with a tensor `.logits`."""

    @pytest.mark.parametrize("method", ["exact", "certified", "candidates"])
    def test_logits_are_taken_as_they_are(self, method):
        model, x = make("gelu")
        want = analyze(model, x, method=method)
        found = analyze(lambda x: SimpleNamespace(loss=None, logits=model(x)), x, method=method)
        assert torch.equal(found.linearized_robustness, want.linearized_robustness)

    def test_a_head_is_found_behind_them(self):
        class Classifier(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.head = nn.Linear(20, 4), nn.Linear(4, 30)

            def forward(self, x):
                return SimpleNamespace(logits=self.head(self.body(x).tanh()))

        assert analyze(Classifier(), torch.randn(3, 20)).vjps.tolist() == [7] * 3

    def test_deepfool(self):
        model, x = make("gelu")
        found = deepfool(lambda x: SimpleNamespace(logits=model(x)), x)
        assert torch.equal(found.adversarial, deepfool(model, x).adversarial)

    def test_logits_that_are_no_tensor(self):
        with pytest.raises(TypeError, match="model: returned SimpleNamespace, wants a tensor of logits"):
            analyze(lambda x: SimpleNamespace(logits=[x]), torch.ones(3, 4))


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

    def test_a_single_example_is_not_checked_for_mixing(self):
        assert analyze(lambda x: x - 0.5 * x.mean(0), torch.tensor([[3.0, 1.0]])).prediction.tolist() == [0]
