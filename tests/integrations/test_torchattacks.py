"""FAB of torchattacks and fastsal's: the same images for the same seed, without the Jacobian."""

import math

import pytest
import torch
from networks import LargestTensor
from torch import nn

from fastsal import Exact
from fastsal.adversarial import nearest_boundary
from fastsal.methods.base import Question
from fastsal.model.linearization import linearize

torchattacks = pytest.importorskip(
    "torchattacks", reason="pip install --no-deps torchattacks: it asks for a requests of 2020"
)

from fastsal.integrations import torchattacks as drop_in  # noqa: E402

NORMS = {"L2": (2, 1.5), "Linf": (math.inf, 0.3), "L1": (1, 8.0)}  # name -> p, eps

# The example of torchattacks' documentation for FAB.
SCRIPT = """
import torchattacks

attack = torchattacks.FAB(model, norm='Linf', steps=10, eps=64/255, n_restarts=1, alpha_max=0.1, eta=1.05, beta=0.9,
                          verbose=False, seed=0, multi_targeted=False, n_classes=10)
adv_images = attack(images, labels)
"""


def sizes(perturbed, x, p):
    return torch.linalg.vector_norm((perturbed - x).flatten(1), p, dim=1)


def assert_same(ours, theirs, x, p):
    """Equal up to rounding. Boundaries as near as one another part the walks: one image in twenty may differ."""
    close = (ours - theirs).flatten(1).abs().amax(1) <= 1e-5
    assert close.float().mean() >= 0.95
    assert (sizes(theirs, x, p) > 0).float().mean() > 0.8


@pytest.fixture
def both(digits):
    def run(norm, call=lambda attack, x, y: attack(x, y), **arguments):
        results = []
        for module in (torchattacks, drop_in):
            attack = module.FAB(digits.model, norm=norm, eps=NORMS[norm][1], **arguments)
            results.append(call(attack, digits.images, digits.labels))
        return results

    return run


def test_script(digits, run_script):
    before, after = run_script(SCRIPT, "import torchattacks", "from fastsal.integrations import torchattacks")
    assert after["attack"].__class__ is drop_in.FAB
    assert_same(after["adv_images"], before["adv_images"], digits.images, math.inf)
    errs = digits.model(after["adv_images"]).argmax(1) != digits.labels
    assert errs.float().mean() > 0.8


class TestSameImages:
    @pytest.mark.parametrize("norm", ["L2", "Linf"])
    @pytest.mark.parametrize("restarts", [1, 3])
    def test_seeds_and_restarts(self, digits, both, norm, restarts):
        theirs, ours = both(norm, n_restarts=restarts, seed=7, steps=8)
        assert_same(ours, theirs, digits.images, NORMS[norm][0])

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("random_start", [False, True])
    def test_single_run(self, digits, both, norm, random_start):
        def call(attack, x, y):
            torch.manual_seed(3)
            return attack.attack_single_run(x, y, use_rand_start=random_start)

        theirs, ours = both(norm, call, steps=8)
        assert_same(ours, theirs, digits.images, NORMS[norm][0])

    @pytest.mark.parametrize("arguments", [{"alpha_max": 0.5}, {"eta": 1.3}, {"beta": 0.5}, {"steps": 1}])
    def test_arguments(self, digits, both, arguments):
        theirs, ours = both("L2", **arguments)
        assert ((ours - theirs).flatten(1).abs().amax(1) <= 1e-5).float().mean() >= 0.95

    def test_positional(self, digits):
        given = digits.model, "L2", 1.5, 4, 1, 0.2, 1.1, 0.8, False, 5, False, 10
        theirs, ours = (module.FAB(*given)(digits.images, digits.labels) for module in (torchattacks, drop_in))
        assert_same(ours, theirs, digits.images, 2)

    def test_targeted(self, digits, both):
        def call(attack, x, y):
            right = (
                digits.model(x).argmax(1) == y
            )  # torchattacks mixes up targets where there are wrong ones among them
            attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10, quiet=True)
            return attack(x[right], y[right])

        theirs, ours = both("Linf", call)
        assert torch.equal(ours, theirs)

    def test_multi_targeted(self, both):
        theirs, ours = both("L2", multi_targeted=True, steps=4, n_classes=3)
        assert torch.equal(ours, theirs)

    def test_normalization(self, digits, both):
        def call(attack, x, y):
            attack.set_normalization_used(mean=[0.1], std=[0.9])
            return attack(attack.normalize(x), y)

        theirs, ours = both("L2", call, steps=5)
        assert ((ours - theirs).flatten(1).abs().amax(1) <= 1e-5).float().mean() >= 0.95

    def test_among_other_attacks(self, digits):
        results = []
        for module in (torchattacks, drop_in):
            fab = module.FAB(digits.model, norm="Linf", eps=0.2)
            attack = torchattacks.MultiAttack([torchattacks.FGSM(digits.model, eps=0.02), fab])
            results.append(attack(digits.images, digits.labels))
        assert_same(results[1], results[0], digits.images, math.inf)


class TestWhereTorchattacksErrs:
    def test_l1(self, digits):
        """What `perturb` forgets; a single run of its own code is what the images have to be."""
        arguments = {"norm": "L1", "eps": 2.0, "steps": 8}
        with pytest.raises(UnboundLocalError):
            torchattacks.FAB(digits.model, **arguments)(digits.images, digits.labels)
        ours = drop_in.FAB(digits.model, **arguments)(digits.images, digits.labels)
        single = torchattacks.FAB(digits.model, **arguments).attack_single_run(digits.images, digits.labels)
        within = sizes(single, digits.images, 1) <= 2.0
        want = torch.where(within.view(-1, 1, 1, 1), single, digits.images)
        assert 0.2 < within.float().mean() < 1
        assert ((ours - want).flatten(1).abs().amax(1) <= 1e-5).float().mean() >= 0.95

    def test_l1_restarts(self, digits):
        """Each further start is for the images that stand, and only ever fools more of them."""
        fooled = []
        for restarts in (1, 3):
            attack = drop_in.FAB(digits.model, norm="L1", eps=4.0, steps=5, n_restarts=restarts)
            ours = attack(digits.images, digits.labels)
            assert (sizes(ours, digits.images, 1) <= 4.0 + 1e-4).all()
            fooled.append((digits.model(ours).argmax(1) != digits.labels).sum())
        assert fooled[1] >= fooled[0] > 0

    def test_l1_depends_on_its_seed_alone(self, digits):
        """Kills: the seed ignored. What was drawn before has no say, and another seed has other starts."""

        def attacked(seed):
            torch.rand(3)
            return drop_in.FAB(digits.model, norm="L1", eps=2.0, steps=3, n_restarts=3, seed=seed)(
                digits.images, digits.labels
            )

        assert torch.equal(attacked(7), attacked(7))
        assert not torch.equal(attacked(7), attacked(8))

    def test_l1_starts_again_at_random(self, monkeypatch, digits):
        """Kills: a second start that is not random."""
        starts, run = [], drop_in.FAB.attack_single_run

        def listed(self, x, y, use_rand_start=False):
            starts.append(use_rand_start)
            return run(self, x, y, use_rand_start=use_rand_start)

        monkeypatch.setattr(drop_in.FAB, "attack_single_run", listed)
        drop_in.FAB(digits.model, norm="L1", eps=0.5, steps=2, n_restarts=3)(digits.images, digits.labels)
        assert starts == [False, True, True]

    @pytest.mark.parametrize("mode", ["targeted", "multi-targeted"])
    def test_l1_targeted(self, digits, mode):
        attack = drop_in.FAB(digits.model, norm="L1", eps=12.0, steps=10, multi_targeted=mode == "multi-targeted")
        if mode == "targeted":
            attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10, quiet=True)
        ours = attack(digits.images, digits.labels)
        moved = (ours != digits.images).flatten(1).any(1)
        assert moved.float().mean() > 0.3
        assert (sizes(ours, digits.images, 1) <= 12.0 + 1e-4).all()
        # As for torchattacks, any other class will do on the way to the target.
        assert (digits.model(ours).argmax(1) != digits.labels)[moved].all()

    @pytest.mark.parametrize("norm", NORMS)
    @pytest.mark.parametrize("scale", [1e-12, 1e-25, 1e25])
    def test_gradients_of_any_size(self, digits, norm, scale):
        """Logits times a number have the same boundaries."""

        class Scaled(nn.Module):
            def __init__(self):
                super().__init__()
                self.model = digits.model

            def forward(self, x):
                return self.model(x) * scale

        arguments = {"norm": norm, "eps": NORMS[norm][1], "steps": 5}
        ours, want = (
            drop_in.FAB(model, **arguments)(digits.images, digits.labels) for model in (Scaled(), digits.model)
        )
        assert_same(ours, want, digits.images, NORMS[norm][0])
        if scale == 1e-25 and norm == "L2":
            theirs = torchattacks.FAB(Scaled(), **arguments)(digits.images, digits.labels)
            assert (digits.model(theirs).argmax(1) != digits.labels).float().mean() < 0.2


class TestStreaming:
    @pytest.mark.parametrize("norm", NORMS)
    def test_the_nearest_of_their_differences(self, norm):
        """Of labels that are not the predicted class, too, and of ties: the column that torchattacks would choose."""
        p = NORMS[norm][0]
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 30)), torch.rand(20, 12)
        labels = torch.where(torch.arange(20) % 2 == 0, model(x).argmax(1), torch.randint(30, (20,)))
        logits, gradients = torchattacks.FAB(model).get_diff_logits_grads_batch(x, labels)
        dual = {2: 2, 1: math.inf, math.inf: 1}[p]
        distance = logits.abs() / torch.linalg.vector_norm(gradients, dual, dim=2)
        nearest = distance.argmin(1)
        rows = torch.arange(20)
        with linearize(model, x) as graph:
            selection, ours, row = nearest_boundary(graph, Exact(), Question(float(p), target=labels))
        assert (selection.winners[:, 0] == labels).all()
        # 30 logits in float32, each off by 1e-7 of about 1, and as near as 1e-3.
        torch.testing.assert_close(ours.float(), distance[rows, nearest], rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(-row.float(), gradients[rows, nearest], rtol=1e-4, atol=1e-5)

    def test_no_tensor_as_large_as_the_jacobian(self):
        n, B, D = 300, 4, 400

        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(D, 30), nn.Tanh(), nn.Linear(30, n), nn.Softsign()), torch.rand(B, D)
        largest = []
        for module in (torchattacks, drop_in):
            with LargestTensor() as seen:
                module.FAB(model, norm="L2", steps=2)(x, model(x).argmax(1))
            largest.append(seen.entries)
        assert largest[0] >= n * B * D
        assert largest[1] < n * B * D / 2

    @pytest.mark.parametrize(("norm", "eps", "p"), [("L2", 1.5, 2), ("Linf", 0.3, math.inf)])
    def test_certified(self, digits, norm, eps, p):
        theirs = torchattacks.FAB(digits.model, norm=norm, eps=eps, steps=4)(digits.images, digits.labels)
        ours = drop_in.FAB(digits.model, norm=norm, eps=eps, steps=4, method="certified")(digits.images, digits.labels)
        assert_same(ours, theirs, digits.images, p)


class TestErrors:
    def test_when_made(self, digits):
        with pytest.raises(ValueError, match=r"norm: got 'L3', wants one of \['Linf', 'L2', 'L1'\]"):
            drop_in.FAB(digits.model, norm="L3")
        with pytest.raises(ValueError, match="method: got 'fast'"):
            drop_in.FAB(digits.model, method="fast")
        with pytest.raises(ValueError, match="wants 2"):
            drop_in.FAB(digits.model, norm="L1", method="certified")

    def test_leaves_everything_as_it_was(self, digits):
        images = digits.images.clone()
        digits.model.train()
        drop_in.FAB(digits.model, norm="L2", steps=2)(images, digits.labels)
        assert digits.model.training
        assert torch.equal(images, digits.images)
        assert all(parameter.grad is None for parameter in digits.model.parameters())
