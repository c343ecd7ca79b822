"""foolbox's DeepFool and fastsal's: the same perturbations where foolbox is right, right ones where it is not."""

import copy
import math

import pytest
import torch
from torch import nn

import fastsal
from fastsal.methods import rows

foolbox = pytest.importorskip("foolbox")

from fastsal.integrations import foolbox as drop_in  # noqa: E402

NAMES = ["L2DeepFoolAttack", "LinfDeepFoolAttack"]
NORMS = {"L2DeepFoolAttack": 2, "LinfDeepFoolAttack": math.inf}

# The second example of foolbox's README, with DeepFool for the attack.
SCRIPT = """
import foolbox as fb
from foolbox.attacks import LinfDeepFoolAttack

fmodel = fb.PyTorchModel(model, bounds=(0, 1))
attack = LinfDeepFoolAttack()
epsilons = [0.0, 0.001, 0.01, 0.03, 0.1, 0.3, 0.5, 1.0]
_, advs, success = attack(fmodel, images, labels, epsilons=epsilons)
robust_accuracy = 1 - success.float().mean(axis=-1)
"""


def attacks(name, **arguments):
    return [getattr(module, name)(**arguments) for module in (foolbox.attacks, drop_in)]


def sizes(perturbed, x, norm):
    return torch.linalg.vector_norm((perturbed - x).flatten(1), norm, dim=1)


def double(digits):
    """In float64 both walk alike: rounding cannot change which class is the nearest."""
    return copy.deepcopy(digits.model).double(), digits.images.double(), digits.labels


def test_script(digits, run_script):
    before, after = run_script(
        SCRIPT,
        "from foolbox.attacks import LinfDeepFoolAttack",
        "from fastsal.integrations.foolbox import LinfDeepFoolAttack",
    )
    assert after["attack"].__class__ is drop_in.LinfDeepFoolAttack
    assert torch.equal(after["success"], before["success"])
    assert torch.equal(after["robust_accuracy"], before["robust_accuracy"])
    assert 0 == after["robust_accuracy"][-1] < after["robust_accuracy"][0]
    for theirs, ours in zip(before["advs"], after["advs"], strict=True):
        # Float32: of 50 steps, each rounded to 1e-7 of the image.
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


class TestSamePerturbations:
    # foolbox adds 1e-8 to norms, here of 0.5 and more, twice a step: 4e-8 of each step, hence of the whole.
    TOLERANCE = 1e-7

    def compare(self, name, model, x, labels, unit=1.0, **arguments):
        """`unit`: how many times larger than [0, 1] the box is, and smaller the gradients are."""
        norm = NORMS[name]
        (theirs, _, success), (ours, _, ours_success) = (
            attack(model, x, labels, epsilons=None) for attack in attacks(name, **arguments)
        )
        assert torch.equal(ours_success, success)
        assert success.float().mean() > 0.9
        difference = sizes(ours, theirs, norm)
        assert (difference <= unit * self.TOLERANCE * sizes(theirs, x, norm)).all()

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("candidates", [2, 4, 10, None])
    def test_candidates(self, digits, name, candidates):
        model, x, labels = double(digits)
        self.compare(name, foolbox.PyTorchModel(model, bounds=(0, 1)), x, labels, candidates=candidates)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("arguments", [{"loss": "crossentropy"}, {"overshoot": 0.2}, {"steps": 3}])
    def test_arguments(self, digits, name, arguments):
        model, x, labels = double(digits)
        fmodel = foolbox.PyTorchModel(model, bounds=(0, 1))
        if "steps" not in arguments:
            self.compare(name, fmodel, x, labels, **arguments)
            return
        theirs, ours = (attack.run(fmodel, x, labels) for attack in attacks(name, **arguments))
        assert (sizes(ours, theirs, 2) <= self.TOLERANCE * sizes(theirs, x, 2)).all()

    @pytest.mark.parametrize("name", NAMES)
    def test_preprocessing_and_bounds(self, digits, name):
        model, x, labels = double(digits)
        mean, std = torch.tensor([0.2]).double(), torch.tensor([0.7]).double()
        model = nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Flatten(1, 2), model)
        fmodel = foolbox.PyTorchModel(
            model, bounds=(-1, 3), preprocessing={"mean": mean, "std": std, "axis": -3, "flip_axis": -1}
        )
        labels = fmodel(x).argmax(1)
        self.compare(name, fmodel, x, labels)
        self.compare(name, fmodel.transform_bounds((0, 255)), (x + 1) * 255 / 4, labels, unit=255 / 4)
        self.compare(name, fmodel.transform_bounds((0, 255), wrapper=True), (x + 1) * 255 / 4, labels, unit=255 / 4)

    def test_narrow_bounds(self, digits):
        """Where the box cuts steps short both stay inside of it."""
        model, x, labels = double(digits)
        fmodel, x = foolbox.PyTorchModel(model, bounds=(0, 1)), (x > 0.5).double()
        theirs, ours = (attack.run(fmodel, x, labels) for attack in attacks("L2DeepFoolAttack", steps=4))
        assert ((ours == 0) | (ours == 1)).any()
        assert ours.min() >= 0
        assert ours.max() <= 1
        assert (sizes(ours, theirs, 2) <= self.TOLERANCE * sizes(theirs, x, 2)).all()

    @pytest.mark.parametrize("name", NAMES)
    def test_any_criterion(self, digits, name):
        """One that asks for more than another class: the walk goes on beyond the boundary, away from the class it left."""
        model, x, labels = double(digits)

        class Confident(foolbox.criteria.Criterion):
            def __repr__(self):
                return "Confident()"

            def __call__(self, perturbed, outputs):
                outputs_, restore = foolbox.criteria.ep.astensor_(outputs)
                return restore(outputs_.softmax(axis=-1).max(axis=-1) > 0.6)

        criterion = foolbox.criteria.Misclassification(labels) & Confident()
        self.compare(name, foolbox.PyTorchModel(model, bounds=(0, 1)), x, criterion)

    @pytest.mark.parametrize("name", NAMES)
    def test_float32(self, digits, name):
        """The walks may part where two boundaries are as near but for rounding: one image in twenty is let go."""
        fmodel = foolbox.PyTorchModel(digits.model, bounds=(0, 1))
        (theirs, _, success), (ours, _, ours_success) = (
            attack(fmodel, digits.images, digits.labels, epsilons=None) for attack in attacks(name)
        )
        assert success.all()
        assert ours_success.all()
        relative = sizes(ours, theirs, 2) / sizes(theirs, digits.images, 2)
        right = sizes(theirs, digits.images, 2) > 0
        assert (relative[right] < 1e-4).float().mean() >= 0.95

    def test_examples_that_err_already(self, digits):
        labels = (digits.labels + torch.arange(64) % 2) % 10
        fmodel = foolbox.PyTorchModel(digits.model, bounds=(0, 1))
        ours, _, success = drop_in.L2DeepFoolAttack()(fmodel, digits.images, labels, epsilons=None)
        assert success.all()
        assert torch.equal(ours[1::2], digits.images[1::2])


class Overtaken(nn.Module):
    """At 0 class 1 follows class 0 closely and class 2 does not; on the way to class 1, class 2 overtakes it."""

    def forward(self, x):
        way = x[:, 0]
        return torch.stack((0 * way + 1, 0.9 + 0.05 * way.tanh(), 0.5 + 0.23 * way), 1)


@pytest.mark.parametrize("name", NAMES)
def test_candidates_are_those_of_the_input(name):
    """Kills: `among` dropped, with which a step would consider the highest logits of where it stands."""
    model, x = foolbox.PyTorchModel(Overtaken().eval(), bounds=(-99, 99)), torch.zeros(2, 3, dtype=torch.float64)
    theirs, ours = (attack.run(model, x, torch.tensor([0, 0])) for attack in attacks(name, candidates=2))
    # foolbox adds 1e-8 to norms, here of 0.0035.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0.0)
    assert (ours[:, 0] > 10).all()
    _, all_of_them = (attack.run(model, x, torch.tensor([0, 0])) for attack in attacks(name, candidates=3))
    assert (all_of_them[:, 0] < 3).all()


class TestWhereFoolboxErrs:
    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("scale", [1e-12, 1e-30, 1e30])
    def test_gradients_of_any_size(self, digits, name, scale):
        """Logits times a number have the same boundaries."""

        class Scaled(nn.Module):
            def forward(self, x):
                return digits.model(x) * scale

        scaled, plain = (foolbox.PyTorchModel(model.eval(), bounds=(0, 1)) for model in (Scaled(), digits.model))
        norm = NORMS[name]
        theirs, ours = attacks(name, steps=20)
        want = sizes(ours.run(plain, digits.images, digits.labels), digits.images, norm)
        perturbed, _, success = ours(scaled, digits.images, digits.labels, epsilons=None)
        got = sizes(perturbed, digits.images, norm)
        assert success.all()
        assert ((got - want).abs() <= 1e-4 * want).float().mean() >= 0.95
        if scale > 1:
            return
        _, _, success = theirs(scaled, digits.images, digits.labels, epsilons=None)
        assert success.float().mean() < 0.5

    def test_ties(self):
        """The predicted class is the lowest among equals; foolbox walks away from the highest, into the label's class."""
        linear = nn.Linear(3, 3, bias=False)
        linear.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.1]])
        fmodel, x, label = foolbox.PyTorchModel(linear.eval(), (0, 1)), torch.full((1, 3), 0.5), torch.tensor([0])
        theirs, ours = (attack(fmodel, x, label, epsilons=None) for attack in attacks("L2DeepFoolAttack"))
        assert not theirs[2].item()
        assert ours[2].item()
        assert sizes(ours[0], x, 2) < 2e-4

    def test_identical_classes_that_tie(self):
        """No step parts two classes that are the same: the nearest other boundary is taken."""
        linear = nn.Linear(3, 3, bias=False)
        linear.weight.data = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        fmodel, x = foolbox.PyTorchModel(linear.eval(), (0, 1)), torch.tensor([[0.6, 0.5, 0.5]])
        perturbed, _, success = drop_in.L2DeepFoolAttack()(fmodel, x, torch.tensor([0]), epsilons=None)
        assert success.item()
        assert perturbed.argmax().item() == 1

    def test_dead_examples_stay(self, digits):
        """Zero gradients and NaN have no way out, and do not disturb the others."""

        class Broken(nn.Module):
            def forward(self, x):
                mark, logits = x[:, 0, 0, :1], digits.model(x)
                logits = logits + torch.where(mark == 0.375, math.nan, 0.0)
                return torch.where(mark == 0.125, logits.detach(), logits)

        x = digits.images
        x[1, 0, 0, 0], x[2, 0, 0, 0] = 0.125, 0.375
        labels = digits.model(x).argmax(1)
        broken, plain = (
            drop_in.L2DeepFoolAttack().run(foolbox.PyTorchModel(model.eval(), (0, 1)), x, labels)
            for model in (Broken(), digits.model)
        )
        assert torch.equal(broken[1:3], x[1:3])
        assert (plain[1:3] != x[1:3]).any()
        torch.testing.assert_close(broken[3:], plain[3:], rtol=0, atol=1e-5)


class TestMethods:
    def test_all_classes(self, digits):
        model, x, labels = double(digits)
        fmodel = foolbox.PyTorchModel(model, bounds=(0, 1))
        theirs = foolbox.attacks.L2DeepFoolAttack(candidates=None).run(fmodel, x, labels)
        for method in ("exact", "certified", fastsal.Exact(), fastsal.Candidates(9)):
            ours = drop_in.L2DeepFoolAttack(method=method).run(fmodel, x, labels)
            assert (sizes(ours, theirs, 2) <= 1e-7 * sizes(theirs, x, 2)).all(), method
        theirs = foolbox.attacks.LinfDeepFoolAttack(candidates=None).run(fmodel, x, labels)
        for method in ("exact", "certified"):
            ours = drop_in.LinfDeepFoolAttack(method=method).run(fmodel, x, labels)
            assert (sizes(ours, theirs, math.inf) <= 1e-7 * sizes(theirs, x, math.inf)).all(), method

    def test_refused_when_made(self):
        with pytest.raises(ValueError, match="method: got 'best'"):
            drop_in.L2DeepFoolAttack(method="best")

    @pytest.mark.parametrize("wrapper", [False, True])
    def test_features_are_found_inside_of_foolbox(self, monkeypatch, wrapper):
        """A head of fewer inputs than classes is a shorter way to the same result."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 60)).double().eval()
        fmodel = foolbox.PyTorchModel(model, (-9, 9)).transform_bounds((-1, 1), wrapper=wrapper)
        x = torch.rand(5, 20).double() / 9
        found = []

        def spy(*arguments):
            found.append(through(*arguments))
            return found[-1]

        through = rows.through_features
        monkeypatch.setattr(rows, "through_features", spy)
        labels = fmodel(x).argmax(1)
        ours = drop_in.L2DeepFoolAttack(candidates=None).run(fmodel, x, labels)
        assert found
        assert all(selection is not None for selection in found)
        theirs = foolbox.attacks.L2DeepFoolAttack(candidates=None).run(fmodel, x, labels)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


class TestWhereverFoolboxTakesAnAttack:
    def test_kind(self):
        for name in NAMES:
            theirs, ours = attacks(name)
            assert isinstance(ours, type(theirs))
            assert isinstance(ours, foolbox.attacks.base.MinimizationAttack)
            assert ours.distance == theirs.distance
            assert "method=candidates" in repr(ours)

    @pytest.mark.parametrize("name", NAMES)
    def test_epsilons(self, digits, name):
        fmodel = foolbox.PyTorchModel(digits.model, bounds=(0, 1))
        attack = getattr(drop_in, name)()
        raw, clipped, success = attack(fmodel, digits.images, digits.labels, epsilons=[0.01, 0.1, None])
        assert success.shape == (3, 64)
        assert success[-1].all()
        assert (sizes(clipped[1], digits.images, NORMS[name]) <= 0.1 + 1e-6).all()
        assert torch.equal(raw[0], clipped[2])
        _, one, success = attack(fmodel, digits.images, digits.labels, epsilons=0.1)
        assert torch.equal(one, clipped[1])
        assert success.shape == (64,)

    def test_repeated_eot_and_eagerpy(self, digits):
        fmodel = foolbox.PyTorchModel(digits.model, bounds=(0, 1))
        attack = drop_in.L2DeepFoolAttack()
        want = attack.run(fmodel, digits.images, digits.labels)
        again, _, _ = attack.repeat(2)(fmodel, digits.images, digits.labels, epsilons=None)
        assert torch.equal(again, want)
        averaged = foolbox.models.ExpectationOverTransformationWrapper(fmodel, n_steps=3)
        torch.testing.assert_close(attack.run(averaged, digits.images, digits.labels), want, rtol=0, atol=1e-4)
        ep = foolbox.criteria.ep
        tensor = attack.run(fmodel, ep.astensor(digits.images), ep.astensor(digits.labels))
        assert torch.equal(tensor.raw, want)

    def test_leaves_everything_as_it_was(self, digits):
        images = digits.images.clone().requires_grad_()
        state, flags = torch.get_rng_state(), [p.requires_grad for p in digits.model.parameters()]
        perturbed = drop_in.L2DeepFoolAttack().run(foolbox.PyTorchModel(digits.model, (0, 1)), images, digits.labels)
        assert not perturbed.requires_grad
        assert images.grad is None
        assert all(parameter.grad is None for parameter in digits.model.parameters())
        assert [p.requires_grad for p in digits.model.parameters()] == flags
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(images, digits.images)


class TestErrors:
    def test_targeted_criteria(self, digits):
        fmodel = foolbox.PyTorchModel(digits.model, bounds=(0, 1))
        targeted = foolbox.criteria.TargetedMisclassification((digits.labels + 1) % 10)
        for criterion in (targeted, foolbox.criteria.Misclassification(digits.labels) & targeted):
            with pytest.raises(ValueError, match="unsupported criterion"):
                drop_in.L2DeepFoolAttack()(fmodel, digits.images, criterion, epsilons=None)

    def test_arguments(self, digits):
        fmodel = foolbox.PyTorchModel(digits.model, bounds=(0, 1))
        given = fmodel, digits.images, digits.labels
        with pytest.raises(ValueError, match="expected loss to be 'logits' or 'crossentropy', got 'invalid'"):
            drop_in.L2DeepFoolAttack(loss="invalid").run(*given)
        with pytest.raises(ValueError, match="candidates: got 1 and 10 classes, wants 2 at least"):
            drop_in.L2DeepFoolAttack(candidates=1).run(*given)
        with pytest.raises(TypeError, match="unexpected keyword argument 'foo'"):
            drop_in.L2DeepFoolAttack().run(*given, foo=1)
        with pytest.raises(AssertionError):
            drop_in.L2DeepFoolAttack().run(fmodel, digits.images + 1, digits.labels)
        model = foolbox.NumPyModel(lambda x: x, bounds=(0, 1))
        with pytest.raises(TypeError, match="wants PyTorch tensors"):
            drop_in.L2DeepFoolAttack().run(model, digits.images.flatten(1).numpy(), digits.labels.numpy())

    @pytest.mark.filterwarnings("ignore:The PyTorch model is in training mode")
    def test_training_mode(self):
        model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
        with pytest.raises(ValueError, match="in training mode"):
            drop_in.L2DeepFoolAttack().run(
                foolbox.PyTorchModel(model, (0, 1)), torch.rand(4, 1, 8, 8), torch.zeros(4).long()
            )
