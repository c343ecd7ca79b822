"""Rounding belongs to the certificate: products that are off are noticed, and finished with rows."""

import pytest
import torch
from certificates import problem, search
from torch import nn

from bench.baselines.jacobians import KINDS, Matrices, distances
from fastsal import Certified, Exact, analyze
from fastsal.methods.base import Question
from fastsal.methods.certified import certify, rounding

pytestmark = pytest.mark.usefixtures("one_thread")


class Wrong(Matrices):
    """JVPs that are off by a relative `error` for some classes, in the basis, in the probes, or in both."""

    error, where = 0.0, ("basis", "probes")

    def jvp(self, examples, directions):
        products = super().jvp(examples, directions)
        unit = ((directions.norm(dim=2, keepdim=True) - 1).abs() < 0.5).double()  # no probe is that short
        wrong = unit * ("basis" in self.where) + (1 - unit) * ("probes" in self.where)
        wrong = wrong * (torch.arange(products.shape[2]) % 2 == 0) * self.error
        return products * (1 + wrong)


class TestRounding:
    @pytest.mark.parametrize("where", ["basis", "probes"])
    def test_disagreement_that_comes_late_is_finished_with_rows(self, monkeypatch, where):
        """Nothing that was seen beforehand is off, a row that is evaluated later is: every row is taken, the answer right."""
        logits, rows = problem(4, 300, 100)
        clean = certify(Matrices(logits, rows), Certified(), Question(2.0))
        passes = Wrong(logits, rows)
        passes.error, passes.where = 1e-12, (where,)
        blind = torch.zeros(4, dtype=torch.float64)
        row_gap = rounding.Rounding.row_gap

        def early_rows_agree(self, e, classes, rows):
            early = bool((classes[:, :1] == self._state.early[e, :1]).all())
            return blind[e] if early else row_gap(self, e, classes, rows)

        monkeypatch.setattr(rounding.Rounding, "row_gap", early_rows_agree)
        found = certify(passes, Certified(), Question(2.0))
        assert torch.equal(found.winners, clean.winners)
        assert found.certified.all()
        assert (clean.vjps < 100).all()
        assert (found.vjps >= 300).all()
        torch.testing.assert_close(found.lower_bound, distances(logits, rows).amin(1), rtol=1e-12, atol=0.0)

    @pytest.mark.parametrize("error", [1e-9, 1e-5, 1e-2])
    @pytest.mark.parametrize("norm", KINDS)
    def test_disagreement_that_is_seen_early_widens_the_bounds(self, error, norm):
        logits, rows = problem(4, 300, 100)
        passes = Wrong(logits, rows)
        passes.error = error
        found = certify(passes, Certified(), Question(norm))
        assert found.certified.all()
        assert torch.equal(found.winners[:, 1], distances(logits, rows, norm).argmin(1))
        assert (found.vjps < 300).any() or error > 1e-3

    def test_the_slack_follows_the_disagreement(self):
        """η: SPARE times what the rows show, neither a constant nor much more."""
        logits, rows = problem(4, 300, 100)
        for error in (0.0, 1e-9, 1e-6):
            passes = Wrong(logits, rows)
            passes.error = error
            made = search(passes)
            made.prepare()
            assert (made.rounding.eta >= rounding.SPARE * 0.5 * error).all()
            assert (made.rounding.eta <= rounding.SPARE * (3 * error + 1e-14)).all()

    def test_the_slack_is_fixed_before_the_probes(self):
        """Neither probes nor the rows that they ask for have a say, though all of them disagree."""

        class Late(Matrices):
            error = 0.0

            def jvp(self, examples, directions):
                return super().jvp(examples, directions) + self.error

        passes = Late(*problem(4, 300, 100))
        made = search(passes)
        first = made.prepare()
        before = made.rounding.eta.clone()
        assert (first > 0).all()
        passes.error = 1e-6
        made.probe(first)
        made.finish()
        assert torch.equal(made.rounding.eta, before)

    def test_gradients_that_make_no_sense_are_named_and_finished_with_rows(self):
        logits, rows = problem(4, 300, 100)
        passes = Wrong(logits, rows)
        passes.error = 1.5
        found = certify(passes, Certified(), Question(2.0))
        assert ((found.disagreement > 0.3) & (found.disagreement < 10)).all()
        assert found.certified.all()
        assert (found.vjps == 300).all()
        assert torch.equal(found.winners[:, 1], distances(logits, rows).argmin(1))

    def test_small_gradients_among_large_ones_do_not_count_as_disagreement(self):
        """Half of the classes have gradients 1e-6 as large: float32 products err by what the large ones let them."""
        logits, rows = problem(4, 300, 100, dtype=torch.float32)
        rows[:, ::2] *= 1e-6
        common = 1e-7 * torch.randn(rows.shape[0], 1, rows.shape[2], generator=torch.Generator().manual_seed(5))

        class Common(Matrices):
            def jvp(self, examples, directions):
                products = super().jvp(examples, directions)
                error = directions.to(common.dtype) @ common[examples].mT
                return products + error * (torch.arange(products.shape[2]) % 3 - 1)

        found = certify(Common(logits, rows), Certified(), Question(2.0))
        assert found.certified.all()
        assert torch.equal(found.winners[:, 1], distances(logits, rows).argmin(1))
        assert (found.vjps < 150).all()

    def test_a_class_whose_own_gradient_cancels_is_evaluated(self):
        """Two layers in float32; one class has large weights that cancel to 1e-4, so that its products lose four digits."""
        evaluated = 0
        for seed in range(60):
            model, x = cancelling(seed)
            exact = analyze(model, x, method=Exact(memory_limit=0))
            with pytest.warns(UserWarning, match="finished with exact rows"):
                found = analyze(model, x, method=Certified(seed=seed))
            # The class, not the value: the values of rows that noisy differ from call to call.
            assert torch.equal(found.runner_up, exact.runner_up)
            evaluated += int((found.vjps >= 120).sum())
        assert evaluated >= 0.97 * 60 * 3


def cancelling(seed):
    """A model and three inputs; the weights of the last class nearly cancel over pairs of nearly equal hidden units."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(40, 50, generator=generator)
    model = nn.Sequential(nn.Linear(50, 80), nn.Tanh(), nn.Linear(80, 120)).requires_grad_(False)
    model[0].weight.data = torch.cat((hidden, hidden + 1e-4 * torch.randn(40, 50, generator=generator))) / 7
    model[0].bias.zero_()
    weight = torch.randn(120, 80, generator=generator) / 9
    weight[-1, :40] *= 1e4
    weight[-1, 40:] = -weight[-1, :40]
    model[2].weight.data = weight
    model[2].bias.data = torch.randn(120, generator=generator)
    model[2].bias.data[0] += 4
    return model, torch.randn(3, 50, generator=generator)
