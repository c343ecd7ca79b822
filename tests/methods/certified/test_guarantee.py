"""How often a certificate errs on random Jacobians: mistakes in its probabilities are noticed."""

import functools
import math

import numpy as np
import pytest
import torch
from certificates import search
from chance import REJECT, chance_at_least

from bench.baselines.jacobians import KINDS, Matrices, distances, fitting_weights
from fastsal import Certified
from fastsal.methods.base import Question
from fastsal.methods.certified import certify, plan
from fastsal.methods.certified import search as searching
from fastsal.methods.certified.chi_square import FIRST, SHARES, chi_square_quantile
from fastsal.methods.certified.norms import Summed
from fastsal.methods.certified.probes import Normals

pytestmark = pytest.mark.usefixtures("one_thread")


class TestGuarantee:
    """How often the user is told something false, at a large failure probability.

    False is an example that is certified with a ratio above ρ̃, or whose lower bound is above ρ̃. Each batch has its own seed and
    its own Jacobians; within a batch the probes are shared, and independent Jacobians see independent parts of them.
    """

    DELTA, BATCHES, E = 0.2, 12, 50
    # The kind of each norm in which the bound of one class decides, and errs as often as chance allows.
    ONE_CLASS = ((2.0, "outside_the_basis"), (math.inf, "fitting_weights"))

    def misses(self, norm, kind, max_passes=None, delta=DELTA):
        total = 0
        for batch in range(self.BATCHES):
            logits, rows = KINDS[norm][kind](torch.Generator().manual_seed(1000 + batch), self.E)
            ratio = distances(logits, rows, norm)
            found = certify(Matrices(logits, rows), Certified(delta, max_passes, batch), Question(norm))
            least = ratio.amin(1) * (1 + 1e-12)
            above = ratio.gather(1, found.winners[:, 1:]).squeeze(1) > least
            total += int(((found.certified & above) | (found.lower_bound > least)).sum())
        return total

    def too_many(self, misses, delta=DELTA):
        return chance_at_least(misses, self.BATCHES * self.E, delta) < REJECT

    @pytest.fixture
    def all_rounds(self, monkeypatch):
        """Probes are used even where rows would be cheaper, and every round of them as long as a class is undecided."""
        monkeypatch.setattr(plan, "worth_more", lambda at, *rest: torch.ones_like(at.best, dtype=torch.bool))
        forecast = plan.forecast

        def never_rows_alone(*arguments):
            promise, cost, count = forecast(*arguments)
            return promise, cost, torch.where(count == 0, 20, count)

        monkeypatch.setattr(plan, "forecast", never_rows_alone)

    @pytest.mark.parametrize("max_passes", [None, 40])
    @pytest.mark.parametrize(("norm", "kind"), [(norm, kind) for norm, kinds in KINDS.items() for kind in kinds])
    def test_misses_stay_below_delta(self, norm, kind, max_passes):
        assert self.misses(norm, kind, max_passes) <= self.DELTA * self.BATCHES * self.E

    @pytest.mark.parametrize(("norm", "kind"), ONE_CLASS)
    def test_one_class_on_trial(self, all_rounds, norm, kind):
        """The bound of the class that decides: all rounds together err with probability δ at most, and not much less."""
        misses = self.misses(norm, kind)
        assert not self.too_many(misses)
        assert misses > 0.25 * self.DELTA * self.BATCHES * self.E

    @pytest.mark.parametrize(
        "mutation", ["wrong tail", "wrong degrees", "undivided", "times the classes", "short probes"]
    )
    @pytest.mark.parametrize(("norm", "kind"), ONE_CLASS)
    def test_mutations_are_caught(self, monkeypatch, all_rounds, mutation, norm, kind):
        right, probes = searching.schedule, Normals.probes
        probability = {"wrong tail": 1 - self.DELTA, "undivided": self.DELTA, "times the classes": 0.999}.get(mutation)

        def wrong(first, delta):
            return [(count, chi_square_quantile(count, probability)) for count, _ in right(first, delta)]

        def wrong_degrees(first, delta):
            plan = zip(right(first, delta), SHARES, strict=True)
            return [(count, chi_square_quantile(2 * count, share * delta)) for (count, _), share in plan]

        def short(self, count):
            return 0.5 * probes(self, count)

        if mutation == "short probes":
            monkeypatch.setattr(Normals, "probes", short)
        else:
            monkeypatch.setattr(searching, "schedule", wrong if probability else wrong_degrees)
        assert self.too_many(self.misses(norm, kind))

    def test_weights_fitted_to_the_probes_are_caught(self, monkeypatch, all_rounds):
        """w that makes the probes' sums of the class that decides small."""
        kind = functools.partial(fitting_weights, held=64)  # 1 is the best weight of every coordinate
        monkeypatch.setitem(KINDS[math.inf], "flat", kind)
        fit = Summed.fit

        def fitted(search):
            rows = kind(torch.Generator().manual_seed(1000 + search.normals.seed), self.E)[1]
            norm = search.state.norm
            inverse = 1 / norm._weights
            products = search.normals.probes(13) * (rows[:, 0] - rows[:, -1]).unsqueeze(
                1
            )  # [E, 13, D], to be multiplied with 1/w
            part = torch.linalg.lstsq(products, products @ inverse.unsqueeze(2), driver="gelsd").solution.squeeze(2)
            weights = 1 / torch.maximum(inverse - 0.8 * part, 0.2 * inverse)
            norm._weights = weights / weights.square().mean(1, keepdim=True).sqrt()

        prepare = searching.Search.prepare

        def peeking(search):
            monkeypatch.setattr(Summed, "fit", lambda norm, rows: (fit(norm, rows), fitted(search))[0])
            return prepare(search)

        monkeypatch.setattr(searching.Search, "prepare", peeking)
        assert self.too_many(self.misses(math.inf, "flat"))

    @pytest.mark.parametrize("mutation", ["the mean of the weights", "no known part", "the known part's 2-norm"])
    def test_mutations_of_the_1_norm_are_caught(self, monkeypatch, all_rounds, mutation):
        upper, measure = Summed.upper, Summed.measure
        # Nearly all of a row is known: without that, bounds are wrong, and not by chance.
        kind, delta = "falling_spectrum", 0.01

        def mean_of_weights(self, e, known, rest, slack):
            return upper(self, e, known, rest, slack) * self._weights[e].mean(1, keepdim=True)

        def no_known_part(self, e, known, rest, slack):
            return upper(self, e, torch.zeros_like(known), rest, slack)

        def euclidean(self, e, classes, components, basis):
            done = measure(self, e, classes, components, basis)
            length = (components.mT @ (basis * self._weights[e].unsqueeze(1))).norm(dim=2)
            self._sums[e] = torch.where(self._sums[e] < math.inf, length, math.inf)
            return done

        if mutation == "the mean of the weights":
            kind, delta = "fitting_weights", self.DELTA
            monkeypatch.setattr(Summed, "upper", mean_of_weights)
        elif mutation == "no known part":
            monkeypatch.setattr(Summed, "upper", no_known_part)
        else:
            monkeypatch.setattr(Summed, "measure", euclidean)
        assert self.too_many(self.misses(math.inf, kind, delta=delta), delta)

    def test_weights_forgotten_in_a_jvp_cost_passes_only(self, monkeypatch):
        """The rows that are known disagree with such products by more than a slack can cover."""
        logits, rows = KINDS[math.inf]["ordinary"](torch.Generator().manual_seed(0), 4)
        monkeypatch.setattr(Summed, "directions", lambda self, e, directions: directions)
        found = certify(Matrices(logits, rows), Certified(), Question(math.inf))
        assert (found.disagreement > 0).all()
        assert (found.vjps == rows.shape[1]).all()
        assert torch.equal(found.winners[:, 1], distances(logits, rows, math.inf).argmin(1))

    @pytest.mark.parametrize("norm", KINDS)
    def test_the_sums_are_chi_square(self, monkeypatch, norm):
        """S_j / ‖the part of Δ_j / w outside the basis‖² after the first round, one class an example (Kolmogorov, Smirnov)."""
        monkeypatch.setattr(plan, "worth_more", lambda at, *rest: torch.zeros_like(at.best, dtype=torch.bool))
        pivots = []
        for batch in range(self.BATCHES):
            logits, rows = KINDS[norm]["ordinary"](torch.Generator().manual_seed(batch), self.E)
            made = search(Matrices(logits, rows), Certified(self.DELTA, None, batch), norm)
            made.probe(np.full_like(made.prepare(), FIRST[2]))
            state, directions, examples = made.state, made.basis.directions, np.arange(self.E)
            measured = state.differences(examples, made.probes.products)[:, : FIRST[2], -1].square().sum(1)
            offset = (rows[:, 0] - rows[:, -1]).unsqueeze(1)
            rest = state.norm.rows(examples, offset).squeeze(1) / state.unit.unsqueeze(1)
            rest = rest - ((rest.unsqueeze(1) @ directions.mT) @ directions).squeeze(1)
            pivots.append((measured / rest.square().sum(1))[made.probes.drawn == FIRST[2]])
        values = torch.cat(pivots).sort().values
        trials = len(values)
        assert trials == self.BATCHES * self.E
        expected = torch.special.gammainc(torch.tensor(FIRST[2] / 2, dtype=torch.float64), values / 2)
        empirical = torch.arange(1, trials + 1, dtype=torch.float64) / trials
        distance = torch.maximum(empirical - expected, expected - empirical + 1 / trials).max().item()
        assert distance * math.sqrt(trials) < math.sqrt(-math.log(REJECT / 2) / 2)
