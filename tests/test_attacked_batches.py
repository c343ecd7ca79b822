"""A model of single examples is what was promised to work: batches that are mixed, known by place, or not the same twice."""

import math

import pyarrow.parquet
import pytest
import torch
import torch.nn.functional as F
from attacked import assert_kept, dense, ratios, reported
from torch import nn

import fastsal
from fastsal import Candidates, Certified, Exact, analyze
from fastsal.methods import certified
from fastsal.model.calling import logits_alone

pytestmark = pytest.mark.usefixtures("one_thread")

METHODS = {"exact": Exact(), "rows": Exact(memory_limit=0), "candidates": Candidates(3), "certified": Certified()}
each_method = pytest.mark.parametrize("method", METHODS)

MIXING = {
    "the largest entry": lambda x: x / x.abs().amax(),
    "detached statistics": lambda x: (x - x.mean(0).detach()) / (x.var(0, unbiased=False).detach() + 0.1).sqrt(),
    "a mean without gradient": lambda x: x - x.detach().mean(0),
    "ranks": lambda x: x * (1 + 0.1 * x.detach().sum(1).argsort().argsort().unsqueeze(1)),
    "neighbours": lambda x: x + 0.1 * x.detach().roll(1, 0),
    "pairs": lambda x: x + 0.1 * x.detach()[(torch.arange(len(x)) ^ 1).clamp(max=len(x) - 1)],
}


class Faint(nn.Module):
    """Logits that hardly depend on the input."""

    def __init__(self, mix):
        super().__init__()
        self.net, self.mix = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 80)), mix

    def forward(self, x):
        return 5 + 1e-9 * self.net(self.mix(x))


@pytest.mark.parametrize("kind", MIXING)
class TestBatchesAreMixed:
    """What ∂logits[0]/∂x[1:] does not show."""

    def network(self, kind, classes, batch, largest, low=None):
        torch.manual_seed(classes + batch)
        net, mix = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, classes)), MIXING[kind]
        x = torch.randn(batch, 20)
        x[largest, 0] = 5.0
        masked = (torch.arange(classes) % 3 == 1) & (low is not None)
        return (lambda value: net(mix(value)).masked_fill(masked, low or 0.0)), x

    @each_method
    @pytest.mark.parametrize(("classes", "batch", "largest"), [(5, 6, 5), (100, 7, 0), (70, 4, 3), (12, 2, 0)])
    def test_is_an_error_of_every_method(self, kind, classes, batch, largest, method):
        model, x = self.network(kind, classes, batch, largest)
        with pytest.raises(ValueError, match="mixes the examples"):
            analyze(model, x, method=METHODS[method])

    @pytest.mark.parametrize("low", [-1e3, -1e9])
    @pytest.mark.parametrize("method", ["rows", "certified"])
    def test_masked_logits_hide_nothing(self, kind, method, low):
        """A large negative number in place of some logits is a large range, and no measure of rounding."""
        model, x = self.network(kind, 90, 6, 5, low)
        with pytest.raises(ValueError, match="mixes the examples"):
            analyze(model, x, method=METHODS[method])

    @each_method
    def test_small_logits_beside_a_constant_are_not_rounding(self, kind, method):
        """In float64 logits that differ by 1e-10 of themselves are another function."""
        torch.manual_seed(0)
        model, x = Faint(MIXING[kind]).double(), torch.randn(6, 20, dtype=torch.float64)
        with pytest.raises(ValueError, match="mixes the examples"):
            analyze(model, x, method=METHODS[method])

    @pytest.mark.parametrize("method", ["candidates", "exact", "certified"])
    def test_is_an_error_of_deepfool(self, kind, method):
        model, x = self.network(kind, 80, 5, 4)
        with pytest.raises(ValueError, match="mixes the examples"):
            fastsal.deepfool(model, x, method=method)


class Tokens(nn.Module):
    """Tokens [B, 4, 6], of which a mask [B, 4] says which count."""

    def __init__(self, classes=90, seed=0, low=None):
        super().__init__()
        torch.manual_seed(seed)
        self.into, self.out, self.low = nn.Linear(6, 24), nn.Linear(24, classes), low
        self.double().requires_grad_(False)

    def pooled(self, x, mask):
        return (torch.tanh(2 * self.into(x)) * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True)

    def head(self, pooled):
        logits = self.out(pooled)
        return logits if self.low is None else torch.cat((logits[..., :60], 0 * logits[..., 60:] + self.low), -1)

    def forward(self, x, mask):
        return self.head(self.pooled(x, mask))


class Wrapped(nn.Module):
    """A callable as a module."""

    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, x):
        return self.run(x)


def only(value, sizes, error=ValueError):
    if len(value) not in sizes:
        raise error(f"wants one of {sizes} examples")
    return value


def by_place(kind, low=None):
    """A model that knows each of 8 examples by its place, or wants all of them; the examples; and a model for each of them."""
    net = Tokens(low=low)
    x = torch.randn(8, 4, 6, dtype=torch.float64)
    mask = (torch.rand(8, 4) < 0.6).double()
    mask[:, 0] = 1.0
    if kind in ("squeeze", "view", "assertion"):
        mask = torch.ones_like(mask)
    model = {
        "closure": lambda e: net(e, mask),
        "the first masks": lambda e: net(e, mask[: len(e)]),
        "some sizes": lambda e: net(only(e, (1, 3, 8)), mask[: len(e)]),
        "squeeze": lambda e: net.head(net.pooled(e, mask[:1]).unsqueeze(2).squeeze()),
        "view": lambda e: net.head(net.pooled(e, mask[:1]).view(8, 24)),
        "assertion": lambda e: net(only(e, (8,), AssertionError), mask[:1]),
    }[kind]
    return model, x, [lambda e, own=one: net(e, own) for one in mask.split(1)]


@pytest.mark.parametrize("kind", ["closure", "the first masks", "some sizes", "squeeze", "view", "assertion"])
class TestExamplesAreKnownByPlace:
    """Only the whole batch in the caller's order is the model that was passed."""

    @pytest.fixture(autouse=True)
    def _groups_of_three(self, monkeypatch):
        monkeypatch.setattr(certified, "GROUP_BYTES", 3 * 8 * 20 * 24)

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @each_method
    @pytest.mark.parametrize("module", [False, True])
    def test_analyze(self, kind, method, norm, module):
        model, x, each = by_place(kind)
        model = Wrapped(model) if module else model
        found, told = reported(analyze, model, x, norm=norm, method=METHODS[method])
        if method == "candidates":
            pairs = zip(each, x.split(1), strict=True)
            alone = [analyze(one, example, norm=norm, method=METHODS[method]) for one, example in pairs]
            want = torch.cat([one.linearized_robustness for one in alone])
            torch.testing.assert_close(found.linearized_robustness, want, rtol=1e-9, atol=0.0)
        else:
            assert found.certified.all()
            assert_kept(found, ratios(*dense(model, x), norm), rtol=1e-9)
        assert len(told) == 1 or (len(told) == 0 and method != "certified")

    @pytest.mark.parametrize("low", [-1e9, -1e30])
    def test_masked_logits_hide_nothing(self, kind, low):
        model, x, _ = by_place(kind, low)
        found, _ = reported(analyze, model, x, method=Certified())
        assert found.certified.all()
        assert_kept(found, ratios(*dense(model, x)), rtol=1e-9)

    @pytest.mark.parametrize("norm", [2.0, math.inf])
    @pytest.mark.parametrize("method", ["candidates", "exact", "certified"])
    def test_deepfool(self, kind, method, norm):
        model, x, each = by_place(kind)
        found, told = reported(fastsal.deepfool, model, x, norm=norm, method=method)
        pairs = zip(each, x.split(1), strict=True)
        few = "candidates" if method == "candidates" else "exact"
        alone = [fastsal.deepfool(one, example, norm=norm, method=few) for one, example in pairs]
        assert found.success.all()
        torch.testing.assert_close(found.distance, torch.cat([one.distance for one in alone]), rtol=1e-8, atol=0.0)
        assert len(told) <= 1

    def test_foolbox(self, kind):
        foolbox = pytest.importorskip("foolbox")
        drop_in = pytest.importorskip("fastsal.integrations.foolbox")
        model, x, _ = by_place(kind)
        wrapped, labels = foolbox.PyTorchModel(Wrapped(model).eval(), bounds=(-9, 9)), model(x).argmax(1)
        theirs, ours = (
            attack(candidates=None)(wrapped, x, labels, epsilons=None)[0]
            for attack in (foolbox.attacks.L2DeepFoolAttack, drop_in.L2DeepFoolAttack)
        )
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@each_method
@pytest.mark.parametrize("classes", [6, 90])
def test_dropout_as_a_function(classes, method):
    """Two runs of the whole batch differ, and the error says so."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, classes)).eval()

    def model(x):
        return net(F.dropout(x, 0.5, training=True))  # with less, two runs of one example may drop the same

    for count in (1, 5):
        with pytest.raises(ValueError, match="two runs"):
            analyze(model, torch.randn(count, 20), method=METHODS[method])
    with pytest.raises(ValueError, match="two runs"):
        fastsal.deepfool(model, torch.randn(5, 20), method=METHODS[method])


class Padded(nn.Module):
    """torch's encoder, which without gradients takes a fast path that gives other values where tokens are masked."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2), nn.Linear(8, 80)

    def forward(self, x):
        masked = (x[:, :1, 0].detach() > -0.5) & (torch.arange(x.shape[1]) > 2)
        return self.out(self.encoder(x, src_key_padding_mask=masked).mean(1))


class Quicker(Padded):
    """Less precise where no gradient is wanted."""

    def forward(self, x):
        return self.out(torch.tanh(x if torch.is_grad_enabled() else x.bfloat16().float()).mean(1))


@each_method
@pytest.mark.parametrize("kind", [Padded, Quicker])
def test_another_way_without_gradients(kind, method):
    """The model that has gradients is meant, and it is neither random nor mixed."""
    model, x = kind().eval(), torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
    logits, rows = dense(model, x)
    with torch.no_grad():
        assert (model(x) - logits).abs().max() > 1e-4
    found, _ = reported(analyze, model, x, method=METHODS[method])
    if method != "candidates":
        assert found.certified.all()
        assert_kept(found, ratios(logits, rows))


class Relaxed(Padded):
    """One step down the gradient of an energy, which needs a graph whatever mode the caller is in."""

    def forward(self, x):
        (step,) = torch.autograd.grad(self.out(x).square().sum(), x, create_graph=True)
        return self.out(torch.tanh(x - 0.1 * step).mean(1))


@each_method
@pytest.mark.parametrize("batch", [1, 4])
def test_a_model_that_takes_gradients_of_its_own(batch, method):
    model, x = Relaxed().eval(), torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(0))
    found, told = reported(analyze, model, x, method=METHODS[method])
    assert not told
    if method != "candidates":
        assert found.certified.all()
        assert_kept(found, ratios(*dense(model, x)))


def test_what_runs_a_model_alone_lets_it_take_gradients_of_its_own(tmp_path):
    model, x = Relaxed().eval(), torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))

    def predicted(points):
        return model(points.clone().requires_grad_()).argmax(1)

    found = fastsal.deepfool(model, x)
    assert found.success.all()
    assert torch.equal(found.prediction, predicted(x))
    assert torch.equal(found.adversarial_class, predicted(found.adversarial))
    assert (found.adversarial_class != found.prediction).all()
    fastsal.evaluate(model, torch.utils.data.TensorDataset(x), tmp_path, batch_size=4, progress=False)
    table = pyarrow.parquet.read_table(tmp_path)
    assert table["error"].null_count == 4
    want = analyze(model, x).linearized_robustness
    assert torch.equal(torch.tensor(table["linearized_robustness"].to_pylist()), want)


def test_the_first_error_of_a_model_is_the_one_that_is_told():
    def model(x):
        raise ValueError("with a graph neither" if x.requires_grad else "no graph, no logits")

    with pytest.raises(ValueError, match="no graph, no logits"):
        logits_alone(model, torch.ones(1, 2))
