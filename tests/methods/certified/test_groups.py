"""A batch larger than a group, by every caller of the certified method: the answers are those of exact rows."""

import math

import pytest
import torch
from torch import nn

import fastsal
from fastsal import Certified, Exact, adversarial, losses, methods
from fastsal.methods import certified
from fastsal.methods.base import Question
from fastsal.model.linearization import linearize

ROWS = Exact(memory_limit=0)  # class by class


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    """Groups of two examples, the least there is; which examples each of them held is listed."""
    monkeypatch.setattr(certified, "GROUP_BYTES", 0)
    held, certify = [], certified.certify

    def counted(passes, *arguments, **options):
        held.append(len(passes.logits))
        return certify(passes, *arguments, **options)

    monkeypatch.setattr(certified, "certify", counted)
    return held


def network(classes=120, entries=40, seed=0):
    """A network in float64 whose nearest class is seldom that of the second-highest logit, and 7 examples."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(entries, 60), nn.Tanh(), nn.Linear(60, classes)).double()
    return model, torch.randn(7, entries, dtype=torch.float64)


def other_classes(model, x):
    """A class for each example, of which every second one is not the predicted one."""
    prediction = model(x).argmax(1)
    return torch.where(torch.arange(len(x)) % 2 == 0, prediction, (prediction + 3) % 11)


def assert_same(got, want, **tolerance):
    for mine, right in zip(got, want, strict=True):
        torch.testing.assert_close(mine, right, **({"rtol": 1e-9, "atol": 1e-12} | tolerance))


@pytest.mark.parametrize("norm", [2.0, math.inf])
class TestNearestBoundary:
    def boundary(self, method, model, x, own, norm, among=None):
        with linearize(model, x) as graph:
            return adversarial.nearest_boundary(graph, method, Question(norm, target=own, classes=among))[-2:]

    def test_of_given_classes(self, groups, norm):
        model, x = network()
        own = other_classes(model, x)
        assert_same(self.boundary(Certified(), model, x, own, norm), self.boundary(ROWS, model, x, own, norm))
        assert groups == [2, 2, 2, 1]

    def test_a_group_by_its_bytes(self, monkeypatch, norm):
        """60,000 entries: two examples a group without any help."""
        monkeypatch.setattr(certified, "GROUP_BYTES", 1 << 24)
        torch.manual_seed(0)
        model, x, own = (
            nn.Linear(60000, 5).double(),
            torch.randn(3, 60000, dtype=torch.float64),
            torch.tensor([1, 2, 4]),
        )
        own = torch.where(model(x).argmax(1) == own, (own + 1) % 5, own)
        assert_same(self.boundary(Certified(), model, x, own, norm), self.boundary(ROWS, model, x, own, norm))

    def test_among_some_classes(self, groups, norm):
        """The classes that are left differ from example to example."""
        model, x = network()
        own, among = other_classes(model, x), torch.rand(7, 120) < 0.7
        unrestricted = self.boundary(ROWS, model, x, own, norm)
        want = self.boundary(ROWS, model, x, own, norm, among)
        assert (want[0] > unrestricted[0] * 1.001).any()
        assert_same(self.boundary(Certified(), model, x, own, norm, among), want)

    def test_excluded_classes_take_no_passes(self, groups, norm):
        model, x = network()
        own, among = other_classes(model, x), torch.zeros(7, 120, dtype=torch.bool)
        among[:, :9] = True
        with linearize(model, x) as graph:
            selection, *_ = adversarial.nearest_boundary(graph, Certified(), Question(norm, target=own, classes=among))
        assert (selection.provenance["vjps"] <= 10).all()
        assert selection.provenance["certified"].all()


@pytest.mark.parametrize("norm", [2.0, math.inf])
class TestCallers:
    def test_analyze(self, groups, norm):
        model, x = network()
        got, want = (fastsal.analyze(model, x, norm=norm, method=method) for method in (Certified(), ROWS))
        for name in ("prediction", "runner_up", "linearized_robustness", "binarized_alignment", "bound"):
            assert_same([getattr(got, name)], [getattr(want, name)])
        assert groups == [2, 2, 2, 1]

    def test_deepfool(self, groups, norm):
        model, x = network()
        found = [
            fastsal.deepfool(model, x, labels=other_classes(model, x), norm=norm, method=method)
            for method in (Certified(), ROWS)
        ]
        assert torch.equal(found[0].steps, found[1].steps)
        assert_same([found[0].distance], [found[1].distance], rtol=1e-6)
        assert max(groups) == 2

    def test_margin_loss(self, groups, norm):
        model, x = network()
        y = other_classes(model, x)
        mine, right = (losses.margin_loss(model, x, y, norm=norm, method=method) for method in (Certified(), ROWS))
        assert_same([mine], [right])
        assert len(groups) == 4

    def test_evaluate(self, groups, norm, tmp_path):
        model, x = network()
        data = torch.utils.data.TensorDataset(x, model(x).argmax(1))
        mine, right = (
            fastsal.evaluate(model, data, tmp_path / method.name, batch_size=7, norm=norm, method=method)
            for method in (Certified(), ROWS)
        )
        medians = [summary.all.quantities["linearized_robustness"].median for summary in (mine, right)]
        assert medians[0] == pytest.approx(medians[1], rel=1e-9)
        assert len(groups) == 4

    def test_captum(self, groups, norm):
        captum = pytest.importorskip("fastsal.integrations.captum")
        model, x = network()
        for target in (None, other_classes(model, x)):
            mine, right = (
                captum.MarginSaliency(model, binarized=True, norm=norm, method=method).attribute(x, target, abs=False)
                for method in (Certified(), ROWS)
            )
            assert_same([mine], [right])

    def test_fab(self, groups, norm):
        model, x = network()
        mine, right = (
            fastsal.fab(model, x, norm=norm, method=method, steps=2, bounds=(-9, 9)) for method in (Certified(), ROWS)
        )
        assert_same([mine.adversarial], [right.adversarial], rtol=1e-6, atol=1e-9)
        assert max(groups) == 2

    def test_foolbox(self, groups, norm):
        foolbox = pytest.importorskip("foolbox")
        drop_in = pytest.importorskip("fastsal.integrations.foolbox")
        model, x = network()
        attack = {2.0: drop_in.L2DeepFoolAttack, math.inf: drop_in.LinfDeepFoolAttack}[norm]
        wrapped = foolbox.PyTorchModel(model.eval(), bounds=(-9, 9))
        mine, right = (
            attack(method=method)(wrapped, x, model(x).argmax(1), epsilons=None)[0] for method in (Certified(), ROWS)
        )
        assert_same([mine], [right], rtol=1e-6, atol=1e-9)
        assert max(groups) == 2


@pytest.mark.parametrize("method", [Exact(), ROWS, methods.Candidates(119), Certified()])
def test_a_selection_has_the_logits_of_the_model(method):
    """Whatever class was asked for; `analyze` computes from them what it returns."""
    model, x = network()
    with linearize(model, x) as graph:
        selection, *_ = adversarial.nearest_boundary(graph, method, Question(2.0, target=other_classes(model, x)))
    torch.testing.assert_close(selection.logits, model(x).detach(), rtol=1e-12, atol=1e-12)
