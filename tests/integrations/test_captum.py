"""MarginSaliency beside Captum's Saliency, and g† beside its definition."""

import math

import pytest
import torch
from torch import nn

import fastsal

captum = pytest.importorskip("captum")

from captum import attr, metrics  # noqa: E402
from captum.attr import visualization  # noqa: E402

from fastsal.integrations.captum import MarginSaliency  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor . did not already require gradients")

# Captum's documentation of Saliency, and of sensitivity_max.
SCRIPT = """
from captum.attr import Saliency
from captum.metrics import sensitivity_max

saliency = Saliency(net)
attribution = saliency.attribute(input, target=3)
sens = sensitivity_max(saliency.attribute, input, target=3)
"""


def network(seed=0, classes=6, score=False):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(45, 12), nn.Tanh(), nn.Linear(12, classes)]
    model = nn.Sequential(*layers, *([nn.Flatten(0)] if score else [])).double().eval()
    return model, torch.randn(7, 2, 5, 5).double()


def nearest_row(model, x, own, norm):
    """g_c − g_j of the nearest boundary by its definition, from the whole Jacobian."""
    dual = {2: 2, 1: math.inf, math.inf: 1}[norm]
    rows = []
    for one, c in zip(x, own.tolist(), strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda z: model(z.unsqueeze(0))[0], one).flatten(1)
        logits = model(one.unsqueeze(0))[0].detach()
        distance = (logits[c] - logits).abs() / torch.linalg.vector_norm(jacobian[c] - jacobian, dual, dim=1)
        distance[c] = math.inf
        rows.append((jacobian[c] - jacobian[distance.argmin()]).view_as(one))
    return torch.stack(rows)


def test_script(digits, run_script):
    before, after = run_script(
        SCRIPT,
        "from captum.attr import Saliency",
        "from fastsal.integrations.captum import MarginSaliency as Saliency",
        net=digits.model,
        input=digits.images.requires_grad_(),
    )
    assert after["saliency"].__class__ is MarginSaliency
    assert torch.equal(after["attribution"], before["attribution"])
    assert before["sens"].shape == after["sens"].shape == (64,)


class TestSaliency:
    @pytest.mark.parametrize("absolute", [True, False])
    def test_of_the_predicted_class(self, absolute):
        model, x = network()
        prediction = model(x).argmax(1)
        ours = MarginSaliency(model).attribute(x, abs=absolute)
        assert torch.equal(ours, attr.Saliency(model).attribute(x, prediction, absolute))
        if not absolute:
            saliency = fastsal.analyze(model, x, keep_saliency=True).saliency
            torch.testing.assert_close(ours, saliency, rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("target", [2, (3,), [0, 1, 2, 3, 4, 5, 0], torch.tensor(4), torch.arange(7) % 6])
    def test_of_a_target(self, target):
        model, x = network()
        assert torch.equal(MarginSaliency(model).attribute(x, target), attr.Saliency(model).attribute(x, target))

    @pytest.mark.parametrize("score", [False, True])
    def test_of_one_score(self, score):
        """[B, 1] or [B]: its gradient, as for Captum, whatever its sign."""
        model, x = network(classes=1, score=score)
        assert torch.equal(MarginSaliency(model).attribute(x), attr.Saliency(model).attribute(x))


class TestBinarized:
    @pytest.mark.parametrize("norm", [2, 1, math.inf, "inf"])
    def test_of_the_predicted_class(self, norm):
        model, x = network()
        want = fastsal.analyze(model, x, norm=norm, keep_saliency=True).binarized_saliency
        ours = MarginSaliency(model, binarized=True, norm=norm).attribute(x, abs=False)
        assert ours.dtype == x.dtype
        torch.testing.assert_close(ours, want, rtol=1e-12, atol=1e-14)
        assert torch.equal(MarginSaliency(model, binarized=True, norm=norm).attribute(x), ours.abs())
        torch.testing.assert_close(
            ours,
            nearest_row(model, x, model(x).argmax(1), float(norm) if norm == "inf" else norm),
            rtol=1e-12,
            atol=1e-14,
        )

    @pytest.mark.parametrize("norm", [2, 1, math.inf])
    @pytest.mark.parametrize("target", [2, [0, 1, 2, 3, 4, 5, 0], torch.tensor([1]), torch.arange(7) % 6])
    def test_of_a_target(self, norm, target):
        """The boundary of that class that is nearest, on whichever side of it x is."""
        model, x = network(1)
        ours = MarginSaliency(model, binarized=True, norm=norm).attribute(x, target, abs=False)
        own = torch.as_tensor(target).reshape(-1).expand(7)
        torch.testing.assert_close(ours, nearest_row(model, x, own, norm), rtol=1e-12, atol=1e-14)

    @pytest.mark.parametrize("score", [False, True])
    def test_of_one_score(self, score):
        """(−Ψ/2, Ψ/2): the winner minus the runner-up is ±Ψ."""
        model, x = network(classes=1, score=score)
        ours = MarginSaliency(model, binarized=True).attribute(x, abs=False)
        gradient = attr.Saliency(model).attribute(x, abs=False)
        sign = model(x).reshape(-1, 1, 1, 1).sign()
        torch.testing.assert_close(ours, sign * gradient, rtol=1e-12, atol=1e-14)

    def test_methods(self):
        model, x = network(classes=40)
        want = MarginSaliency(model, binarized=True).attribute(x)
        for method in ("certified", fastsal.Candidates(39), fastsal.Exact()):
            ours = MarginSaliency(model, binarized=True, method=method).attribute(x)
            torch.testing.assert_close(ours, want, rtol=1e-10, atol=1e-12)


class Several(nn.Module):
    """Two inputs of different shapes, an argument for each example, one for all and one that is no tensor."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = (nn.Linear(*shape).double() for shape in ((6, 8), (4, 8), (8, 5)))

    def forward(self, a, b, which, shift=0.0, power=1):
        hidden = torch.tanh(self.first(a.flatten(1)) + self.second(b))
        return self.head(hidden**power * which.unsqueeze(1)) + shift


class TestInputs:
    def given(self):
        torch.manual_seed(1)
        a, b = torch.randn(9, 2, 3).double(), torch.randn(9, 4).double()
        return Several().eval(), (a, b), (torch.arange(9).double() + 1, torch.randn(5).double(), 2)

    def test_several(self):
        """As one input, side by side: the nearest boundary is that of both."""
        model, (a, b), further = self.given()
        x = torch.cat((a.flatten(1), b), 1)

        def joined(z, which):
            return model(z[:, :6].unflatten(1, (2, 3)), z[:, 6:], which, *further[1:])

        ours = MarginSaliency(model, binarized=True).attribute((a, b), None, False, further)
        assert [one.shape for one in ours] == [(9, 2, 3), (9, 4)]
        for i in range(9):
            one = x[i : i + 1]
            want = fastsal.analyze(
                lambda z, i=i: joined(z, further[0][i : i + 1].expand(len(z))), one, keep_saliency=True
            ).binarized_saliency
            got = torch.cat((ours[0][i].flatten(), ours[1][i])).unsqueeze(0)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
        saliency = MarginSaliency(model).attribute((a, b), None, False, further)
        want = attr.Saliency(model).attribute((a, b), model(a, b, *further).argmax(1), False, further)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(saliency, want, strict=True))

    def test_certified_runs_on_some_of_the_examples(self):
        model, inputs, further = self.given()
        want = MarginSaliency(model, binarized=True).attribute(inputs, additional_forward_args=further)
        ours = MarginSaliency(model, binarized=True, method="certified").attribute(
            inputs, additional_forward_args=further
        )
        for mine, theirs in zip(ours, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)

    def test_a_tuple_of_one(self):
        model, x = network()
        (ours,) = MarginSaliency(model, binarized=True).attribute((x,))
        assert torch.equal(ours, MarginSaliency(model, binarized=True).attribute(x))

    def test_left_as_they_were(self):
        model, x = network()
        x.requires_grad_()
        x.grad = torch.ones_like(x)
        for binarized in (False, True):
            ours = MarginSaliency(model, binarized=binarized).attribute(x)
            assert not ours.requires_grad
            assert x.requires_grad
            assert (x.grad == 1).all()
            y = x.detach()
            MarginSaliency(model, binarized=binarized).attribute(y)
            assert not y.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())


class TestWhereverCaptumTakesAMethod:
    def test_kind(self):
        saliency = MarginSaliency(network()[0])
        assert isinstance(saliency, attr.Attribution | attr.Saliency)
        assert saliency.get_name() == "Margin Saliency"
        assert not saliency.multiplies_by_inputs
        assert not saliency.has_convergence_delta()
        with pytest.raises(NotImplementedError):
            saliency.attribute_future()

    @pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
    @pytest.mark.parametrize("binarized", [False, True])
    def test_noise_tunnel(self, kind, binarized):
        model, x = network()
        maps = []
        for method in (MarginSaliency(model, binarized=binarized), attr.Saliency(model)):
            torch.manual_seed(0)
            tunnel = attr.NoiseTunnel(method)
            maps.append(tunnel.attribute(x, nt_type=kind, nt_samples=4, nt_samples_batch_size=2, stdevs=0.1, target=1))
        assert maps[0].shape == x.shape
        assert torch.equal(*maps) != binarized

    @pytest.mark.parametrize("binarized", [False, True])
    def test_metrics(self, digits, binarized):
        """A number for each example, and for g Captum's own."""

        def noise(inputs):
            change = torch.randn_like(inputs) * 0.01
            return change, inputs - change

        found = []
        for method in (MarginSaliency(digits.model, binarized=binarized), attr.Saliency(digits.model)):
            torch.manual_seed(0)
            sensitivity = metrics.sensitivity_max(method.attribute, digits.images, target=digits.labels)
            attribution = method.attribute(digits.images, target=digits.labels, abs=False)
            infidelity = metrics.infidelity(digits.model, noise, digits.images, attribution, target=digits.labels)
            found.append((sensitivity, infidelity))
        for ours, theirs in zip(*found, strict=True):
            assert ours.shape == theirs.shape == (64,)
            assert ours.isfinite().all()
            assert torch.equal(ours, theirs) != binarized

    def test_metrics_without_a_target(self, digits):
        sensitivity = metrics.sensitivity_max(MarginSaliency(digits.model, binarized=True).attribute, digits.images)
        assert sensitivity.shape == (64,)
        assert sensitivity.isfinite().all()

    @pytest.mark.parametrize(
        "method", ["heat_map", "blended_heat_map", "original_image", "masked_image", "alpha_scaling"]
    )
    def test_visualization(self, digits, method):
        pytest.importorskip("matplotlib")
        attribution = MarginSaliency(digits.model, binarized=True).attribute(digits.images[:1])
        image, saliency = (one[0].permute(1, 2, 0).numpy() for one in (digits.images.repeat(1, 3, 1, 1), attribution))
        figure, _ = visualization.visualize_image_attr(
            saliency, image, method=method, sign="absolute_value", use_pyplot=False
        )
        figure.canvas.draw()


class TestErrors:
    def test_when_made(self):
        model, _ = network()
        with pytest.raises(ValueError, match="norm: got 3"):
            MarginSaliency(model, norm=3)
        with pytest.raises(ValueError, match="method: got 'fast'"):
            MarginSaliency(model, method="fast")
        with pytest.raises(ValueError, match="wants 2"):
            MarginSaliency(model, norm=1, method="certified")

    def test_inputs(self):
        model, x = network()
        binarized = MarginSaliency(model, binarized=True)
        with pytest.raises(ValueError, match="target: got 3 classes for 7 examples, wants one, or one for each"):
            binarized.attribute(x, [0, 1, 2])
        with pytest.raises(TypeError, match=r"inputs: got dtype torch\.int64"):
            binarized.attribute(x.long())
        with pytest.raises(ValueError, match="in training mode"):
            MarginSaliency(nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 2)), binarized=True).attribute(torch.randn(2, 3))

    def test_many_examples_of_low_precision(self):
        """What belongs to the examples is cut with them, however many there are."""
        many, scale = torch.randn(300, 3, dtype=torch.bfloat16), torch.ones(300, 1, dtype=torch.bfloat16)
        scale[7] = -2.0
        binarized = MarginSaliency(lambda z, s: z * s, binarized=True)
        found = binarized.attribute(many, abs=False, additional_forward_args=scale)
        alone = binarized.attribute(many[7:8], abs=False, additional_forward_args=scale[7:8])
        assert torch.equal(found[7:8], alone)
        assert alone.abs().sum() == 4.0
