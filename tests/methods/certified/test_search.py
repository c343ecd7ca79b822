"""Which exact rows are taken, limits of passes, and edge cases."""

import math

import numpy as np
import pytest
import torch
from certificates import problem, search

from bench.baselines.jacobians import KINDS, Matrices, distances
from fastsal import Certified
from fastsal.methods.base import Question
from fastsal.methods.certified import certify, plan
from fastsal.model.products import NoJVPError

pytestmark = pytest.mark.usefixtures("one_thread")


class TestRowsToTake:
    """How many exact rows `finish` takes at once."""

    @pytest.mark.parametrize(
        ("counts", "common"),
        [([3], 3), ([1, 1, 1], 1), ([4, 4, 1], 4), ([1, 1, 1, 1000], 1), ([5, 6, 7, 8], 8), ([1, 1, 2, 4], 2)],
    )
    def test_at_most_a_third_in_vain(self, counts, common):
        assert plan.common(np.array(counts)) == common

    @pytest.mark.parametrize(("norm", "most"), [(2.0, 64), (math.inf, 4)])
    def test_those_that_are_needed_and_then_one_by_one(self, monkeypatch, norm, most):
        """No row is taken whose bound is above the expected ρ̃ while one below it, or the decision, is still to come.

        For p = ∞, where ρ̃ is expected with less confidence, the next few only.
        """
        taken = []
        for seed in range(20):
            logits, rows = KINDS[norm]["heavy_tails"](torch.Generator().manual_seed(seed), 1)
            made = search(Matrices(logits, rows), Certified(seed=seed), norm)
            evaluate = made.state.evaluate

            def seen(e, classes, counts, made=made, evaluate=evaluate):
                bounds = made.state.lower[made.state.undecided(made.state.examples)]
                if (bounds > 0).all():
                    taken.append((counts[0], int((bounds < made.target).sum())))
                return evaluate(e, classes, counts)

            monkeypatch.setattr(made.state, "evaluate", seen)
            made.probe(made.prepare())
            made.finish()
            assert not made.state.undecided(made.state.examples).any()
            assert made.state.nearest.runner_up[0] == distances(logits, rows, norm).argmin()
        assert len(taken) > 5
        assert all(count == min(most, max(1, needed)) for count, needed in taken)

    def test_the_next_rows_are_those_of_the_smallest_bounds(self):
        """Classes without a bound first, by margin; where one is NaN, by class. What is decided comes last."""
        logits, rows = problem(3, 40, 20)
        state = search(Matrices(logits, rows)).state
        e = state.examples
        state.lower = torch.rand(3, 40, dtype=torch.float64).round(decimals=1)
        state.lower[0, 3:9], state.lower[1] = 0.0, math.nan
        state.nearest.distances[:] = math.inf
        for example in range(3):
            waiting = [j for j in range(40) if state.undecided(e)[example, j]]
            bound, margin = state.lower[example].nan_to_num(0.0).tolist(), state.margin[example].tolist()
            if example == 1:
                margin = [0.0] * 40
            want = sorted(waiting, key=lambda j: (bound[j], margin[j] if bound[j] == 0 else 0, j))
            assert state.first(e, 40)[example, : len(want)].tolist() == want
            assert state.first(e[example : example + 1], 5)[0].tolist() == want[:5]

    def test_a_further_round_is_worth_its_probes(self):
        """Where some later round leaves so many fewer classes below the target that its probes are made up for."""
        torch.manual_seed(0)
        E, n, done = 60, 200, 8
        norm = search(Matrices(*problem(E, n, 10))).state.norm
        margin, known, sums = (torch.rand(E, n, dtype=torch.float64) for _ in range(3))
        sums *= 16 * torch.rand(E, 1, dtype=torch.float64)
        at = plan.Outlook(norm, np.arange(E), margin, torch.rand(E, n) < 0.8, margin[:, 0])
        target = 0.5 * torch.rand(E, dtype=torch.float64)
        counts = torch.tensor([[8, 10, 13, 16, 20, 25]]).expand(E, -1)
        quantiles = torch.tensor([[1.0, 1.6, 2.7, 4.0, 6.0, 8.7]], dtype=torch.float64).expand(E, -1)
        stage, lower = torch.arange(E) % 6, at.bound(known, sums / 1.0)
        found = plan.worth_more(at, lower, target, known, sums, done, counts, quantiles, stage)
        for e in range(E):
            waiting = at.waiting[e]
            now, worth = int((waiting & (lower[e] < target[e])).sum()), False
            for round_ in range(int(stage[e]) + 1, 6):
                bound = margin[e] / (known[e] + sums[e] * counts[e, round_] / done / quantiles[e, round_]).sqrt()
                left = int((waiting & (bound < target[e])).sum())
                worth |= int(counts[e, round_]) - done + left < now
            assert found[e] == worth
        assert 0.2 < found.double().mean() < 0.8

    def test_rows_that_stand_in_are_not_counted(self):
        """Each example's passes are those that it would have used alone, but for two rows at most, taken at once or not."""
        logits, rows = KINDS[2.0]["falling_spectrum"](torch.Generator().manual_seed(3), 20)
        together = certify(Matrices(logits, rows), Certified(), Question(2.0))
        alone = [certify(Matrices(logits[k : k + 1], rows[k : k + 1]), Certified(), Question(2.0)) for k in range(20)]
        assert torch.equal(together.winners, torch.cat([found.winners for found in alone]))
        assert torch.equal(together.jvps, torch.cat([found.jvps for found in alone]))
        assert (together.vjps - torch.cat([found.vjps for found in alone])).abs().max() <= 2


class TestAnswer:
    @pytest.mark.parametrize(("n", "D"), [(2, 5), (3, 1), (10, 20), (60, 30), (300, 200), (1000, 100)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("norm", KINDS)
    def test_equals_exact(self, n, D, dtype, norm):
        logits, rows = problem(12, n, D, dtype=dtype)
        found = certify(Matrices(logits, rows), Certified(), Question(norm))
        ratio = distances(logits, rows, norm)
        assert found.certified.all()
        assert torch.equal(found.winners, torch.stack((logits.argmax(1), ratio.argmin(1)), 1))
        assert torch.equal(found.pair, rows[torch.arange(12).unsqueeze(1), found.winners])
        torch.testing.assert_close(found.lower_bound, ratio.amin(1), rtol=1e-6, atol=0.0)
        in_vain = {2.0: 60, math.inf: 100}[norm]  # at most, of the basis and the probes: n rows would have done
        assert (found.vjps + found.jvps <= n + in_vain).all()

    def test_saves_passes(self):
        logits, rows = problem(8, 1000, 400, decay=1.0)
        found = certify(Matrices(logits, rows), Certified(), Question(2.0))
        assert found.certified.all()
        assert (found.vjps + found.jvps).double().median() < 60

    @pytest.mark.parametrize("seed", range(3))
    def test_an_example_depends_on_itself_only(self, seed):
        logits, rows = problem(6, 400, 60, seed=seed)
        whole = certify(Matrices(logits, rows), Certified(seed=seed), Question(2.0))
        for example in range(6):
            alone = certify(Matrices(logits[[example]], rows[[example]]), Certified(seed=seed), Question(2.0))
            assert torch.equal(alone.winners[0], whole.winners[example])
            assert alone.jvps.item() == whole.jvps[example].item()
            torch.testing.assert_close(alone.lower_bound[0], whole.lower_bound[example])

    @pytest.mark.parametrize("norm", KINDS)
    def test_scales(self, norm):
        """Gradients and margins far from 1, in float64 beyond what squares can hold."""
        for scale in (1e-200, 1e-30, 1e30, 1e200):
            logits, rows = problem(4, 200, 100)
            found = certify(Matrices(logits, rows * scale), Certified(), Question(norm))
            assert found.certified.all()
            assert torch.equal(found.winners[:, 1], distances(logits, rows, norm).argmin(1))
            assert (found.jvps > 0).any()


class TestBudget:
    @pytest.mark.parametrize("norm", KINDS)
    def test_it_is_kept_and_the_bounds_hold(self, norm):
        logits, rows = problem(10, 300, 100)
        ratio = distances(logits, rows, norm)
        needed = certify(Matrices(logits, rows), Certified(), Question(norm))
        spent = (needed.vjps + needed.jvps).max().item()
        for limit in (2, 3, 10, 30, 50, 80, spent, 1000):
            found = certify(Matrices(logits, rows), Certified(max_passes=limit), Question(norm))
            assert (found.vjps + found.jvps <= limit).all()
            index = torch.arange(10)
            value = ratio[index, found.winners[:, 1]]
            best = ratio.amin(1)
            assert (found.lower_bound <= best * (1 + 1e-12)).all()
            assert torch.equal(value[found.certified], best[found.certified])
            torch.testing.assert_close(found.lower_bound[found.certified], best[found.certified])
        assert found.certified.all()
        assert not certify(Matrices(logits, rows), Certified(max_passes=2), Question(2.0)).certified.any()

    @pytest.mark.parametrize(("n", "D", "decay"), [(300, 100, 0.0), (1000, 400, 1.0)])
    def test_few_passes_bound_every_example_and_more_bound_closer(self, n, D, decay):
        """From 16 passes on; what lies between the lower bound and the value found is a smaller share of it at every limit."""
        logits, rows = problem(10, n, D, decay=decay)
        ratio = distances(logits, rows)
        shares = []
        for limit in (16, 20, 30, 45, 65):
            found = certify(Matrices(logits, rows), Certified(max_passes=limit), Question(2.0))
            value = ratio.gather(1, found.winners[:, 1:]).squeeze(1)
            assert (found.lower_bound > 0).all()
            assert (found.lower_bound <= ratio.amin(1) * (1 + 1e-12)).all()
            shares.append((1 - found.lower_bound / value).median().item())
        assert shares == sorted(shares, reverse=True)
        assert shares[0] < 1
        assert shares[-1] < 0.5 * shares[0]

    @pytest.mark.parametrize(
        "options",
        [
            {"failure_probability": 0.0},
            {"failure_probability": 1},
            {"max_passes": 1},
            {"max_passes": 3.0},
            {"seed": 0.5},
        ],
    )
    def test_wrong_options(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            Certified(**options)


class TestEdges:
    def test_ties_take_the_lowest_class(self):
        logits, rows = problem(1, 200, 40)
        logits[0] = -5.0
        logits[0, [30, 50, 70, 90, 110, 130]] = 3.0
        found = certify(Matrices(logits, rows), Certified(), Question(2.0))
        assert found.winners.tolist() == [[30, 50]]
        assert found.certified.all()
        assert found.lower_bound.item() == 0
        assert found.jvps.item() == 0

    @pytest.mark.parametrize("norm", KINDS)
    def test_no_gradient_at_all(self, norm):
        logits, rows = problem(1, 100, 20)
        found = certify(Matrices(logits, rows * 0), Certified(), Question(norm))
        others = logits[0].argsort(descending=True)
        assert found.winners[0].tolist() == others[:2].tolist()
        assert found.lower_bound.item() == math.inf
        assert found.certified.all()

    @pytest.mark.parametrize("where", ["logits", "prediction", "another row"])
    @pytest.mark.parametrize("norm", KINDS)
    def test_nan_is_not_certified_and_spares_the_others(self, where, norm):
        logits, rows = problem(3, 200, 40)
        clean = distances(logits, rows, norm).argmin(1)
        if where == "logits":
            logits[1, 17] = math.nan
        elif where == "prediction":
            rows[1, logits[1].argmax(), 3] = math.nan
        else:
            j = int(logits[1].argsort()[20])
            rows[1, j, 3] = math.nan

        class Rows(Matrices):
            def vjp(self, examples, cotangents):  # 0 · NaN is no part of a row
                one_hot = (cotangents != 0).sum(2, keepdim=True) == 1
                rows = self.jacobian[examples].gather(
                    1, cotangents.argmax(2, keepdim=True).expand(-1, -1, self.dimension)
                )
                return torch.where(one_hot, rows, super().vjp(examples, cotangents))

        found = certify(Rows(logits, rows), Certified(), Question(norm))
        assert found.certified.tolist() == [True, False, True]
        assert torch.equal(found.winners[[0, 2], 1], clean[[0, 2]])
        assert found.lower_bound[1].isnan()
        want = {"logits": 0, "prediction": int(logits[1].argmax() == 0)}.get(where)
        assert found.winners[1, 1].item() == (j if want is None else want)

    def test_a_model_without_jvps_gets_rows(self):
        logits, rows = problem(4, 100, 50)

        class WithoutJVPs(Matrices):
            def jvp(self, examples, directions):
                raise NoJVPError("Matrices: has neither")

        with pytest.warns(UserWarning, match="Matrices: has neither; taking exact rows"):
            found = certify(WithoutJVPs(logits, rows), Certified(), Question(2.0))
        assert found.certified.all()
        assert found.jvps.tolist() == [0] * 4
        assert found.vjps.tolist() == [100] * 4
        assert torch.equal(found.winners[:, 1], distances(logits, rows).argmin(1))
