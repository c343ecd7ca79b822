"""Training: checkpoints, seeds, and the objectives of robustified training beside plain arithmetic."""

import pytest
import torch
from study.small import network
from torch import nn

from fastsal.files import CommandError
from fastsal.study import train as training
from fastsal.study.data import Data, InMemory
from fastsal.study.models import cnn
from fastsal.study.train import Recipe, objective, train, worst_nearby

RECIPES = (Recipe(), Recipe(penalty=0.3), Recipe(radius=0.4))


class StopError(Exception):
    pass


def run(few, recipe, checkpoint=None, stop=0, **options):
    """The weights, of a network with dropout; with `stop`, interrupted after so many epochs."""
    done = []

    def after_epoch():
        done.append(1)
        if len(done) == stop:
            raise StopError

    options = {"seed": 3, "epochs": 3, "batch_size": 64, "after_epoch": after_epoch, **options}
    make = lambda: cnn((1, 8, 8), 10, (4, 8), 16)  # noqa: E731
    model = train(make, few, recipe, checkpoint=checkpoint, **options)
    assert not model.training
    return model.state_dict(), len(done)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_resumes_where_it_stopped(few, tmp_path, recipe):
    """Stopped after any epoch, or within one: the same weights, bit for bit. Finished: not trained again."""
    want, epochs = run(few, recipe)
    assert epochs == 3
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(StopError):
        run(few, recipe, path, stop=1)
    taken = []

    class Breaking(InMemory):
        def batch(self, indices):
            taken.append(1)
            if len(taken) == 6:  # of four a epoch
                raise StopError
            return super().batch(indices)

    broken = Data("few", Breaking(few.train.x, few.train.y), few.test, 10, (1, 8, 8))
    with pytest.raises(StopError):
        run(broken, recipe, path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    torch.manual_seed(77)  # of the caller: of no account
    got, epochs = run(few, recipe, path)
    assert epochs == 1
    again, epochs = run(few, recipe, path)
    assert epochs == 0
    for name, value in want.items():
        assert torch.equal(got[name], value)
        assert torch.equal(again[name], value)


def test_a_partial_checkpoint_never_counts(few, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(StopError):
        run(few, Recipe(), path, stop=1)
    before = path.read_bytes()

    def breaks(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(few, Recipe(), path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_damaged_checkpoint(few, tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(CommandError, match=r"^checkpoint .*checkpoint\.pt: "):
        run(few, Recipe(), tmp_path / "checkpoint.pt")


def test_seeds(few):
    state = torch.get_rng_state()
    one, same, other = (run(few, Recipe(), seed=seed, epochs=1)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_worst_nearby(few):
    """Within the radius, of higher loss than at random, the model left in the mode it had."""
    torch.manual_seed(0)
    model = cnn((1, 8, 8), 10, (4, 8), 16).train()
    x, y = few.train.batch(torch.arange(50))
    worst = worst_nearby(model, x, y, 0.7)
    assert model.training
    assert not worst.requires_grad
    e = worst - x
    assert (e.flatten(1).norm(dim=1) <= 0.7 * (1 + 1e-6)).all()
    assert e.flatten(1).norm(dim=1).median() > 0.69
    model.eval()
    random = torch.randn_like(x)
    random *= 0.7 / random.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    losses = [nn.functional.cross_entropy(model(x + step), y, reduction="none") for step in (e, random, 0 * e)]
    assert (losses[0] > losses[1]).all()
    assert (losses[0] > losses[2]).all()


def test_adversarial_objective(few, monkeypatch):
    model = network()
    x, y = few.train.batch(torch.arange(10))
    monkeypatch.setattr(training, "worst_nearby", lambda model, x, y, radius: x + radius)
    want = nn.functional.cross_entropy(model(x + 0.25), y)
    torch.testing.assert_close(objective(model, x, y, Recipe(radius=0.25)), want)


def test_the_radius_grows_over_the_first_half(few, tmp_path, monkeypatch):
    """From epoch to epoch, after a stop too."""
    radii = []

    def recorded(model, x, y, radius):
        radii.append(radius)
        return x

    monkeypatch.setattr(training, "worst_nearby", recorded)
    path, options = tmp_path / "checkpoint.pt", {"epochs": 8, "batch_size": len(few.train)}
    with pytest.raises(StopError):
        run(few, Recipe(radius=2.0), path, stop=3, **options)
    run(few, Recipe(radius=2.0), path, **options)
    assert radii == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_names():
    assert [recipe.name for recipe in RECIPES] == ["plain", "penalty-0.3", "radius-0.4"]
    assert [recipe.training for recipe in RECIPES] == ["plain", "double backpropagation", "adversarial"]
    assert [recipe.label for recipe in RECIPES] == ["plain", "λ = 0.3", "ε = 0.4"]


def test_steps_are_those_of_sgd_on_the_mean_of_each_own_loss(digits, monkeypatch):
    """Three epochs of one step, the rate a tenth from the second on, against the same written out, example by example."""
    few = Data("few", InMemory(digits.train.x[:6], digits.train.y[:6]), digits.test, 10, (1, 8, 8))
    monkeypatch.setattr(training, "DROPS", (0.34, 0.9))
    trained = train(network, few, Recipe(penalty=0.7), seed=3, epochs=3, batch_size=64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = network()
    velocity = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for rate in (0.05, 0.005, 0.0005):
        objective = 1e-6 * sum(value.square().sum() for value in model.parameters())
        for x, y in zip(few.train.x, few.train.y, strict=True):
            x = x.clone().requires_grad_()
            loss = nn.functional.cross_entropy(model(x.unsqueeze(0)), y.unsqueeze(0))
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            objective = objective + (loss + 0.7 * gradient.square().sum()) / 6
        model.zero_grad()
        objective.backward()
        with torch.no_grad():
            for name, value in model.named_parameters():
                velocity[name] = 0.9 * velocity[name] + value.grad
                value -= rate * velocity[name]
    for name, value in model.named_parameters():
        # float32 sums in another order: a few ulp of the gradient's largest entry
        torch.testing.assert_close(trained.get_parameter(name), value, rtol=1e-5, atol=1e-6)
