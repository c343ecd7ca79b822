"""The study: training and its checkpoints, attacks beside closed forms, data formats, and the whole of `fastsal study`."""

import pytest
import torch
from torch import nn

from fastsal.cli import main
from fastsal.study.data import Data, Held, load_digits
from fastsal.study.train import Recipe, train

pytest.importorskip("sklearn")
pytest.importorskip("foolbox")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network():
    """Small and without dropout."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


@pytest.fixture(scope="module")
def digits():
    return load_digits(0)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The study with little of everything."""
    out = tmp_path_factory.mktemp("study")
    options = ["--epochs", "2", "--images", "24", "--strengths", "0.1", "--radii", "0.5"]
    assert main(["study", *options, "--out", str(out)]) == 0
    return out


class TestStudy:
    def test_writes_everything(self, study):
        names = {path.name for path in study.iterdir()}
        assert {"report.html", "models.csv", "images.csv", "saliency.svg", "accuracy.png"} <= names


class TestData:
    def test_uses_every_digit(self, digits):
        assert len(digits.train) + len(digits.test) == 1797
        assert (digits.train.x.min(), digits.train.x.max()) == (0, 1)
        both = torch.cat((digits.train.x, digits.test.x)).flatten(1)
        assert len(both.unique(dim=0)) == 1797


class TestTraining:
    def test_penalty_is_the_mean_over_examples_of_each_own_loss(self, digits, monkeypatch):
        """One step of plain gradient descent against a penalty computed example by example."""
        few = Data("few", Held(digits.train.x[:6], digits.train.y[:6]), digits.test, 10, (1, 8, 8))
        monkeypatch.setattr(torch.optim, "Adam", lambda parameters: torch.optim.SGD(parameters, lr=1.0))
        monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", lambda *_, **__: torch.optim.SGD([torch.zeros(1)]))
        trained = train(network, few, Recipe(penalty=0.7), seed=3, epochs=1, batch_size=64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = network()
        objective = torch.zeros(())
        for x, y in zip(few.train.x, few.train.y, strict=True):
            x = x.clone().requires_grad_()
            loss = nn.functional.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0))
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            objective = objective + (loss + 0.7 * gradient.square().sum()) / 6
        objective.backward()
        for name, parameter in model.named_parameters():
            # float32 sums in another order: a few ulp of the gradient's largest entry
            want = parameter.detach() - parameter.grad
            torch.testing.assert_close(trained.get_parameter(name).detach(), want, rtol=1e-5, atol=1e-5)
