"""Certified ρ̃: how often it errs on random Jacobians, its private probes, its rounding, the answer against exact rows."""

import functools
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from chance import REJECT, chance_at_least
from torch import nn

import fastsal.methods.certified as certify
from bench.baselines.jacobians import KINDS, Matrices, distances, fitting_weights
from fastsal import Candidates, Certified, Exact, analyze
from fastsal.methods.certified.bounds import FIRST, SHARES, Summed, chi_square_quantile
from fastsal.model.linearization import linearize
from fastsal.model.products import ModelPasses, NoJVPError

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(E, n, D, seed=0, decay=0.5, common=3.0, dtype=torch.float64):
    """Jacobians with a common part and singular values that decay; margins that are bunched."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, D + 1, dtype=torch.float64) ** -decay
    rows = torch.randn(E, n, D, generator=generator, dtype=torch.float64) * spectrum
    rows += common * torch.randn(E, 1, D, generator=generator, dtype=torch.float64) * spectrum
    logits = torch.randn(E, n, generator=generator, dtype=torch.float64)
    logits[torch.arange(E), torch.randint(n, (E,), generator=generator)] += 8.0
    return logits.to(dtype), rows.to(dtype)


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
            found = certify.certify(Matrices(logits, rows), Certified(delta, max_passes, batch), norm=norm)
            least = ratio.amin(1) * (1 + 1e-12)
            above = ratio.gather(1, found.winners[:, 1:]).squeeze(1) > least
            total += int(((found.certified & above) | (found.lower_bound > least)).sum())
        return total

    def too_many(self, misses, delta=DELTA):
        return chance_at_least(misses, self.BATCHES * self.E, delta) < REJECT

    @pytest.fixture
    def all_rounds(self, monkeypatch):
        """Probes are used even where rows would be cheaper, and every round of them as long as a class is undecided."""
        monkeypatch.setattr(certify._Search, "worth_more", lambda self, e, *rest: self.undecided(e).any(1))
        forecast = certify._Search.forecast

        def never_rows_alone(*arguments):
            promise, cost, count = forecast(*arguments)
            return promise, cost, torch.where(count == 0, 20, count)

        monkeypatch.setattr(certify._Search, "forecast", never_rows_alone)

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
        "mutant", ["wrong tail", "wrong degrees", "undivided", "times the classes", "short probes"]
    )
    @pytest.mark.parametrize(("norm", "kind"), ONE_CLASS)
    def test_mutants_are_caught(self, monkeypatch, all_rounds, mutant, norm, kind):
        right, probes = certify.schedule, certify.Normals.probes
        probability = {"wrong tail": 1 - self.DELTA, "undivided": self.DELTA, "times the classes": 0.999}.get(mutant)

        def wrong(first, delta):
            return [(count, chi_square_quantile(count, probability)) for count, _ in right(first, delta)]

        def wrong_degrees(first, delta):
            plan = zip(right(first, delta), SHARES, strict=True)
            return [(count, chi_square_quantile(2 * count, share * delta)) for (count, _), share in plan]

        def short(self, count):
            return 0.5 * probes(self, count)

        if mutant == "short probes":
            monkeypatch.setattr(certify.Normals, "probes", short)
        else:
            monkeypatch.setattr(certify, "schedule", wrong if probability else wrong_degrees)
        assert self.too_many(self.misses(norm, kind))

    def test_weights_fitted_to_the_probes_are_caught(self, monkeypatch, all_rounds):
        """w that makes the probes' sums of the class that decides small."""
        kind = functools.partial(fitting_weights, held=64)  # 1 is the best weight of every coordinate
        monkeypatch.setitem(KINDS[math.inf], "flat", kind)
        fit = Summed.fit

        def fitted(search):
            rows = kind(torch.Generator().manual_seed(1000 + search.method.seed), self.E)[1]
            inverse = 1 / search.norm._weights
            products = search.normals.probes(13) * (rows[:, 0] - rows[:, -1]).unsqueeze(
                1
            )  # [E, 13, D], to be multiplied with 1/w
            part = torch.linalg.lstsq(products, products @ inverse.unsqueeze(2), driver="gelsd").solution.squeeze(2)
            weights = 1 / torch.maximum(inverse - 0.8 * part, 0.2 * inverse)
            search.norm._weights = weights / weights.square().mean(1, keepdim=True).sqrt()

        prepare = certify._Search.prepare

        def peeking(search):
            monkeypatch.setattr(Summed, "fit", lambda norm, rows: (fit(norm, rows), fitted(search))[0])
            return prepare(search)

        monkeypatch.setattr(certify._Search, "prepare", peeking)
        assert self.too_many(self.misses(math.inf, "flat"))

    @pytest.mark.parametrize("mutant", ["the mean of the weights", "no known part", "the known part's 2-norm"])
    def test_mutants_of_the_1_norm_are_caught(self, monkeypatch, all_rounds, mutant):
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

        if mutant == "the mean of the weights":
            kind, delta = "fitting_weights", self.DELTA
            monkeypatch.setattr(Summed, "upper", mean_of_weights)
        elif mutant == "no known part":
            monkeypatch.setattr(Summed, "upper", no_known_part)
        else:
            monkeypatch.setattr(Summed, "measure", euclidean)
        assert self.too_many(self.misses(math.inf, kind, delta=delta), delta)

    def test_weights_forgotten_in_a_jvp_cost_passes_only(self, monkeypatch):
        """The rows that are known disagree with such products by more than a slack can cover."""
        logits, rows = KINDS[math.inf]["ordinary"](torch.Generator().manual_seed(0), 4)
        monkeypatch.setattr(Summed, "directions", lambda self, e, directions: directions)
        with pytest.warns(UserWarning, match="4 of 4 examples have gradients that differ"):
            found = certify.certify(Matrices(logits, rows), Certified(), norm=math.inf)
        assert (found.vjps == rows.shape[1]).all()
        assert torch.equal(found.winners[:, 1], distances(logits, rows, math.inf).argmin(1))

    @pytest.mark.parametrize("norm", KINDS)
    def test_the_sums_are_chi_square(self, monkeypatch, norm):
        """S_j / ‖the part of Δ_j / w outside the basis‖² after the first round, one class an example (Kolmogorov, Smirnov)."""
        monkeypatch.setattr(certify._Search, "worth_more", lambda self, e, *rest: torch.zeros(len(e), dtype=torch.bool))
        pivots = []
        for batch in range(self.BATCHES):
            logits, rows = KINDS[norm]["ordinary"](torch.Generator().manual_seed(batch), self.E)
            search = certify._Search(Matrices(logits, rows), Certified(self.DELTA, None, batch), "reference", norm)
            plan = np.full_like(search.prepare(), FIRST[2])
            search.probe(plan)
            everyone = torch.arange(self.E)
            measured = search.differences(everyone, search.probed)[:, : FIRST[2], -1].square().sum(1)
            offset = (rows[:, 0] - rows[:, -1]).unsqueeze(1)
            rest = search.norm.rows(everyone, offset).squeeze(1) / search.unit.unsqueeze(1)
            rest = rest - ((rest.unsqueeze(1) @ search.basis.mT) @ search.basis).squeeze(1)
            pivots.append((measured / rest.square().sum(1))[search.drawn == FIRST[2]])
        values = torch.cat(pivots).sort().values
        trials = len(values)
        assert trials == self.BATCHES * self.E
        expected = torch.special.gammainc(torch.tensor(FIRST[2] / 2, dtype=torch.float64), values / 2)
        empirical = torch.arange(1, trials + 1, dtype=torch.float64) / trials
        distance = torch.maximum(empirical - expected, expected - empirical + 1 / trials).max().item()
        assert distance * math.sqrt(trials) < math.sqrt(-math.log(REJECT / 2) / 2)


def drawn_like_the_probes(seed):
    """A model with weights from torch's stream of that seed; if they were the probes, these would not see the nearest class."""
    torch.manual_seed(seed % 2**64)
    weight = nn.init.orthogonal_(torch.empty(400, 1024, dtype=torch.float64))
    weight[300:] *= 2
    model = nn.Linear(1024, 400)
    bias = 0.1 * torch.randn(400, generator=torch.Generator().manual_seed(2))
    bias[0], bias[300:] = 9.0, bias[300:] - 0.5
    model.weight.data, model.bias.data = weight.float(), bias
    return model, torch.zeros(1, 1024)


class TestProbes:
    @pytest.mark.parametrize("seed", [0, 1, 2**70])
    def test_weights_drawn_with_the_same_seed_are_not_the_probes(self, seed):
        model, x = drawn_like_the_probes(seed)
        exact = analyze(model, x, method=Exact(memory_limit=0))
        found = analyze(model, x, method=Certified(seed=seed))
        assert found.certified.item()
        assert torch.equal(found.runner_up, exact.runner_up)
        assert found.lower_bound.item() <= exact.linearized_robustness.item() * (1 + 1e-6)

    def test_streams_differ_by_seed_and_purpose(self):
        """Every bit of the seed counts, negative seeds too; no two streams share a number, nor one with the public ones."""
        seeds = (0, 1, -1, 2**32, 2**64, 2**70, 2**70 + 1)
        streams = [certify.stream(seed, purpose) for seed in seeds for purpose in ("probes", "pilots", "combination")]
        drawn = [set(generator.standard_normal(64).tolist()) for generator in streams]
        drawn += [set(np.random.default_rng(seed).standard_normal(64).tolist()) for seed in (0, 1)]
        drawn += [
            set(torch.randn(64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).tolist())
            for seed in (0, 1)
        ]
        assert all(not one & other for one, other in itertools.combinations(drawn, 2))
        assert drawn[0] == set(certify.stream(0, "probes").standard_normal(64).tolist())

    def test_the_seed_decides_the_probes(self):
        logits, rows = problem(1, 400, 200)
        taken = []
        for seed in (0, 0, 1):
            passes = Recorded(logits, rows)
            certify.certify(passes, Certified(seed=seed))
            taken.append(passes.directions())
        assert torch.equal(taken[0], taken[1])
        assert not torch.equal(taken[0][-1], taken[2][-1])  # a probe
        assert not torch.equal(taken[0][0], taken[2][0])  # a pilot

    def test_the_basis_is_complete_before_the_first_probe(self):
        """Pilots, known rows, the range finder's rows, one combination of them all; then probes, and never a basis again."""
        logits, rows = problem(1, 400, 200)
        passes = Recorded(logits, rows)
        found = certify.certify(passes, Certified())
        calls = [directions[0] for directions in passes.calls]
        directions = passes.directions()
        assert len(directions) == found.jvps.item()
        last = next(k for k, call in enumerate(calls) if k > 1 and len(call) == 1)
        basis = torch.cat(calls[1:last])
        combination, probes = calls[last], torch.cat(calls[last + 1 :])
        assert len(calls[0]) == certify.PILOTS
        assert len(calls[1]) == certify.TOP + 1
        assert all(len(call) == certify.BLOCK for call in calls[2:last])
        assert len(probes) >= FIRST[0]
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=1e-12, rtol=0.0)
        spanned = torch.linalg.qr(torch.cat((basis, calls[0])).T).Q
        torch.testing.assert_close(combination @ spanned @ spanned.T, combination, atol=1e-12, rtol=0.0)
        assert torch.equal(
            calls[0], torch.from_numpy(certify.stream(0, "pilots").standard_normal((certify.PILOTS, 200)))
        )
        fresh = torch.from_numpy(certify.stream(0, "probes").standard_normal((len(probes), 200)))
        torch.testing.assert_close(probes, fresh - fresh @ basis.T @ basis, atol=1e-12, rtol=0.0)


def test_the_basis_is_orthonormal_though_the_rows_are_nearly_dependent():
    """What is left of a row beside those of its own step is a thousandth of it; rounding grows no more for that."""
    logits, rows = problem(3, 100, 400)
    rows = rows[:, torch.arange(100) // 6 * 6] + 1e-3 * rows
    search = certify._Search(Matrices(logits, rows), Certified(), "reference")
    search.unit = torch.ones(3, dtype=torch.float64)
    for start in (0, 6, 12):
        search.span(np.arange(3), rows[:, start : start + 6])
    gram = search.basis @ search.basis.mT
    torch.testing.assert_close(gram, torch.eye(18, dtype=torch.float64).expand(3, -1, -1), atol=1e-14, rtol=0.0)


def test_a_step_leaves_the_pilots_rest_and_room_for_others():
    """J times what the pilots have outside the basis, after every step and for those who took it; the others keep theirs."""
    logits, rows = problem(3, 100, 400)
    search = certify._Search(Matrices(logits, rows), Certified(), "reference")
    search.unit = torch.ones(3, dtype=torch.float64)
    search.piloted[:] = search.products(search.everyone, search.pilots.expand(3, -1, -1))
    search.residual.copy_(search.piloted)
    for e in (np.arange(3), np.array([0, 2]), np.array([2])):
        search.span(e, rows[e, len(e) * 20 : len(e) * 20 + 18])
    assert search.basis.shape == (3, 54, 400)
    assert (search.basis.square().sum(2) > 0.5).sum(1).tolist() == [36, 18, 54]
    torch.testing.assert_close(search.components, (search.basis @ rows.mT))
    beyond = search.pilots - search.pilots @ search.basis.mT @ search.basis
    torch.testing.assert_close(search.residual, beyond @ rows.mT, atol=1e-10, rtol=0.0)


class TestRowsToTake:
    """How many exact rows `finish` takes at once."""

    @pytest.mark.parametrize(
        ("counts", "common"),
        [([3], 3), ([1, 1, 1], 1), ([4, 4, 1], 4), ([1, 1, 1, 1000], 1), ([5, 6, 7, 8], 8), ([1, 1, 2, 4], 2)],
    )
    def test_at_most_a_third_in_vain(self, counts, common):
        assert certify._common(np.array(counts)) == common

    @pytest.mark.parametrize(("norm", "most"), [(2.0, 64), (math.inf, 4)])
    def test_those_that_are_needed_and_then_one_by_one(self, monkeypatch, norm, most):
        """No row is taken whose bound is above the expected ρ̃ while one below it, or the decision, is still to come.

        For p = ∞, where ρ̃ is expected with less confidence, the next few only.
        """
        taken = []
        evaluate = certify._Search.evaluate

        def seen(search, e, classes, counts=None):
            if counts is not None:
                bounds = search.lower[search.undecided(search.everyone)]
                if (bounds > 0).all():
                    taken.append((counts[0], int((bounds < search.target).sum())))
            return evaluate(search, e, classes, counts)

        monkeypatch.setattr(certify._Search, "evaluate", seen)
        for seed in range(20):
            logits, rows = KINDS[norm]["heavy_tails"](torch.Generator().manual_seed(seed), 1)
            found = certify.certify(Matrices(logits, rows), Certified(seed=seed), norm=norm)
            assert found.certified.item()
            assert found.winners[0, 1] == distances(logits, rows, norm).argmin()
        assert len(taken) > 5
        assert all(count == min(most, max(1, needed)) for count, needed in taken)

    def test_rows_that_stand_in_are_not_counted(self):
        """Each example's passes are those that it would have used alone, but for two rows at most, taken at once or not."""
        logits, rows = KINDS[2.0]["falling_spectrum"](torch.Generator().manual_seed(3), 20)
        together = certify.certify(Matrices(logits, rows), Certified())
        alone = [certify.certify(Matrices(logits[k : k + 1], rows[k : k + 1]), Certified()) for k in range(20)]
        assert torch.equal(together.winners, torch.cat([found.winners for found in alone]))
        assert torch.equal(together.jvps, torch.cat([found.jvps for found in alone]))
        assert (together.vjps - torch.cat([found.vjps for found in alone])).abs().max() <= 2


class Recorded(Matrices):
    """Keeps the directions of every JVP."""

    def __post_init__(self):
        super().__post_init__()
        self.calls = []

    def jvp(self, examples, directions):
        self.calls.append(directions)
        return super().jvp(examples, directions)

    def directions(self):
        return torch.cat([directions[0] for directions in self.calls])


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
        clean = certify.certify(Matrices(logits, rows), Certified())
        passes = Wrong(logits, rows)
        passes.error, passes.where = 1e-12, (where,)
        blind = torch.zeros(4, dtype=torch.float64)
        disagreement = certify._Search.disagreement

        def early_rows_agree(self, e, classes, rows):
            return (
                blind[e] if bool((classes[:, :1] == self.early[e, :1]).all()) else disagreement(self, e, classes, rows)
            )

        monkeypatch.setattr(certify._Search, "disagreement", early_rows_agree)
        monkeypatch.setattr(certify._Search, "compare", lambda self, e: None)
        found = certify.certify(passes, Certified())
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
        found = certify.certify(passes, Certified(), norm=norm)
        assert found.certified.all()
        assert torch.equal(found.winners[:, 1], distances(logits, rows, norm).argmin(1))
        assert (found.vjps < 300).any() or error > 1e-3

    def test_the_slack_follows_the_disagreement(self):
        """η: SPARE times what the rows show, neither a constant nor much more."""
        logits, rows = problem(4, 300, 100)
        for error in (0.0, 1e-9, 1e-6):
            passes = Wrong(logits, rows)
            passes.error = error
            search = certify._Search(passes, Certified(), "reference")
            search.prepare()
            assert (search.eta >= certify.SPARE * 0.5 * error).all()
            assert (search.eta <= certify.SPARE * (3 * error + 1e-14)).all()

    def test_the_slack_is_fixed_before_the_probes(self):
        """Neither probes nor the rows that they ask for have a say, though all of them disagree."""

        class Late(Matrices):
            error = 0.0

            def jvp(self, examples, directions):
                return super().jvp(examples, directions) + self.error

        passes = Late(*problem(4, 300, 100))
        search = certify._Search(passes, Certified(), "reference")
        plan = search.prepare()
        before = search.eta.clone()
        assert (plan > 0).all()
        passes.error = 1e-6
        search.probe(plan)
        search.finish()
        assert torch.equal(search.eta, before)

    def test_gradients_that_make_no_sense_are_named_and_finished_with_rows(self):
        logits, rows = problem(4, 300, 100)
        passes = Wrong(logits, rows)
        passes.error = 1.5
        with pytest.warns(
            UserWarning, match=r"4 of 4 examples have gradients that differ by up to \d\.\de[+]00 of themselves"
        ):
            found = certify.certify(passes, Certified())
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

        found = certify.certify(Common(logits, rows), Certified())
        assert found.certified.all()
        assert torch.equal(found.winners[:, 1], distances(logits, rows).argmin(1))
        assert (found.vjps < 150).all()

    def test_a_class_whose_products_disagree_gets_no_bound(self):
        logits, rows = problem(4, 300, 100)
        search = certify._Search(Matrices(logits, rows), Certified(), "reference")
        plan = search.prepare()
        search.odd[:, ::3] = True
        search.probe(plan)
        assert (search.lower[:, ::3] == 0).all()
        assert (search.lower[search.margin > 0] > 0).float().mean() > 0.5

    def test_a_class_whose_own_gradient_cancels_is_evaluated(self):
        """Two layers in float32; one class has large weights that cancel to 1e-4, so that its products lose four digits."""
        odd = wrong = 0
        for seed in range(60):
            model, x, cancelled = cancelling(seed)
            exact = analyze(model, x, method=Exact(memory_limit=0))
            found = analyze(model, x, method=Certified(seed=seed))
            # The class, not the value: the values of rows that noisy differ from call to call.
            wrong += int((found.runner_up != exact.runner_up).sum())
            with linearize(model, x) as graph:
                search = certify._Search(ModelPasses(graph, np.arange(3), None), Certified(seed=seed), "auto")
                rows_alone = torch.from_numpy(search.prepare() == 0)
            odd += int((search.odd[:, cancelled] | search.seen[:, cancelled] | rows_alone).sum())
            assert search.odd.sum() <= 5
        assert wrong == 0
        assert odd >= 0.97 * 60 * 3


def cancelling(seed):
    """A model, three inputs, and the class whose output weights nearly cancel over pairs of nearly equal hidden units."""
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
    return model, torch.randn(3, 50, generator=generator), 119


class TestAnswer:
    @pytest.mark.parametrize(("n", "D"), [(2, 5), (3, 1), (10, 20), (60, 30), (300, 200), (1000, 100)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("norm", KINDS)
    def test_equals_exact(self, n, D, dtype, norm):
        logits, rows = problem(12, n, D, dtype=dtype)
        found = certify.certify(Matrices(logits, rows), Certified(), norm=norm)
        ratio = distances(logits, rows, norm)
        assert found.certified.all()
        assert torch.equal(found.winners, torch.stack((logits.argmax(1), ratio.argmin(1)), 1))
        assert torch.equal(found.pair, rows[torch.arange(12).unsqueeze(1), found.winners])
        torch.testing.assert_close(found.lower_bound, ratio.amin(1), rtol=1e-6, atol=0.0)
        in_vain = {2.0: 60, math.inf: 100}[norm]  # at most, of the basis and the probes: n rows would have done
        assert (found.vjps + found.jvps <= n + in_vain).all()

    def test_saves_passes(self):
        logits, rows = problem(8, 1000, 400, decay=1.0)
        found = certify.certify(Matrices(logits, rows), Certified())
        assert found.certified.all()
        assert (found.vjps + found.jvps).double().median() < 60

    @pytest.mark.parametrize("seed", range(3))
    def test_an_example_depends_on_itself_only(self, seed):
        logits, rows = problem(6, 400, 60, seed=seed)
        whole = certify.certify(Matrices(logits, rows), Certified(seed=seed))
        for example in range(6):
            alone = certify.certify(Matrices(logits[[example]], rows[[example]]), Certified(seed=seed))
            assert torch.equal(alone.winners[0], whole.winners[example])
            assert alone.jvps.item() == whole.jvps[example].item()
            torch.testing.assert_close(alone.lower_bound[0], whole.lower_bound[example])

    @pytest.mark.parametrize("norm", KINDS)
    def test_scales(self, norm):
        """Gradients and margins far from 1, in float64 beyond what squares can hold."""
        for scale in (1e-200, 1e-30, 1e30, 1e200):
            logits, rows = problem(4, 200, 100)
            found = certify.certify(Matrices(logits, rows * scale), Certified(), norm=norm)
            assert found.certified.all()
            assert torch.equal(found.winners[:, 1], distances(logits, rows, norm).argmin(1))
            assert (found.jvps > 0).any()


class TestBudget:
    @pytest.mark.parametrize("norm", KINDS)
    def test_it_is_kept_and_the_bounds_hold(self, norm):
        logits, rows = problem(10, 300, 100)
        ratio = distances(logits, rows, norm)
        needed = certify.certify(Matrices(logits, rows), Certified(), norm=norm)
        spent = (needed.vjps + needed.jvps).max().item()
        for limit in (2, 3, 10, 30, 50, 80, spent, 1000):
            found = certify.certify(Matrices(logits, rows), Certified(max_passes=limit), norm=norm)
            assert (found.vjps + found.jvps <= limit).all()
            index = torch.arange(10)
            value = ratio[index, found.winners[:, 1]]
            best = ratio.amin(1)
            assert (found.lower_bound <= best * (1 + 1e-12)).all()
            assert torch.equal(value[found.certified], best[found.certified])
            torch.testing.assert_close(found.lower_bound[found.certified], best[found.certified])
        assert found.certified.all()
        assert not certify.certify(Matrices(logits, rows), Certified(max_passes=2)).certified.any()

    @pytest.mark.parametrize(("n", "D", "decay"), [(300, 100, 0.0), (1000, 400, 1.0)])
    def test_few_passes_bound_every_example_and_more_bound_closer(self, n, D, decay):
        """From 15 passes on; what lies between the lower bound and the value found is a smaller share of it at every limit."""
        logits, rows = problem(10, n, D, decay=decay)
        ratio = distances(logits, rows)
        shares = []
        for limit in (15, 20, 30, 45, 65):
            found = certify.certify(Matrices(logits, rows), Certified(max_passes=limit))
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
        found = certify.certify(Matrices(logits, rows), Certified())
        assert found.winners.tolist() == [[30, 50]]
        assert found.certified.all()
        assert found.lower_bound.item() == 0
        assert found.jvps.item() == 0

    @pytest.mark.parametrize("norm", KINDS)
    def test_no_gradient_at_all(self, norm):
        logits, rows = problem(1, 100, 20)
        found = certify.certify(Matrices(logits, rows * 0), Certified(), norm=norm)
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

        found = certify.certify(Rows(logits, rows), Certified(), norm=norm)
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

        with pytest.warns(UserWarning, match="Matrices: has neither; taking every row"):
            found = certify.certify(WithoutJVPs(logits, rows), Certified())
        assert found.certified.all()
        assert found.jvps.tolist() == [0] * 4
        assert found.vjps.tolist() == [100] * 4
        assert torch.equal(found.winners[:, 1], distances(logits, rows).argmin(1))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(6, 24), nn.Linear(24, 150)

    def forward(self, x):
        q, k, v = self.into(x.view(-1, 5, 6)).view(-1, 5, 3, 8).chunk(3, 2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return self.out(torch.cat((y.reshape(-1, 40)[:, :12], x[:, :12]), 1))


class Pooled(nn.Module):
    """A sequence module between an embedding and a head."""

    def __init__(self, body):
        super().__init__()
        self.into, self.body, self.out = nn.Linear(6, 16), body, nn.Linear(16, 150)

    def forward(self, x):
        x = self.into(x.view(-1, 5, 6))
        x = self.body(x, x, x) if isinstance(self.body, nn.MultiheadAttention) else self.body(x)
        return self.out((x[0] if isinstance(x, tuple) else x).mean(1))


class Opaque(torch.autograd.Function):
    """No forward-mode rule, no second derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh() ** 2)


def make(kind):
    torch.manual_seed(0)
    body = {
        "mlp": lambda: nn.Sequential(nn.Linear(30, 40), nn.GELU(), nn.Linear(40, 150)),
        "cnn": lambda: nn.Sequential(
            nn.Unflatten(1, (1, 5, 6)),
            nn.Conv2d(1, 8, 3),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(96, 150),
        ),
        "attention": Attention,
        "multihead": lambda: Pooled(nn.MultiheadAttention(16, 2, batch_first=True)),
        "encoder": lambda: Pooled(nn.TransformerEncoderLayer(16, 2, 20, batch_first=True)),
        "lstm": lambda: Pooled(nn.LSTM(16, 16, batch_first=True)),
    }[kind]()
    return body.eval().requires_grad_(False), torch.randn(5, 30)


class TestModels:
    @pytest.mark.parametrize("norm", KINDS)
    @pytest.mark.parametrize("kind", ["mlp", "cnn", "attention", "multihead", "encoder", "lstm"])
    def test_equals_exact_rows(self, kind, norm):
        model, x = make(kind)
        exact = analyze(model, x, norm=norm)
        before = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = analyze(model, x, norm=norm, method="certified")
        assert found.method == "certified"
        assert found.certified.all()
        assert found.failure_probability == 1e-6
        assert torch.equal(found.runner_up, exact.runner_up)
        torch.testing.assert_close(found.linearized_robustness, exact.linearized_robustness)
        torch.testing.assert_close(found.lower_bound, exact.linearized_robustness)
        assert (found.jvps > 0).all()
        assert (found.vjps + found.jvps < 150).any()
        assert found.distances is None
        assert torch.backends.mha.get_fastpath_enabled() == before[0]
        assert torch.equal(torch.get_rng_state(), before[1])

    def test_neither_way_falls_back_to_rows_with_one_warning(self):
        model, x = make("mlp")
        with pytest.warns(UserWarning, match="neither forward-mode nor second derivatives") as record:
            found = analyze(lambda value: model(Opaque.apply(value)), x, method="certified")
        assert len([w for w in record if "neither" in str(w.message)]) == 1
        assert found.certified.all()
        assert found.vjps.tolist() == [150] * 5
        assert found.jvps.tolist() == [0] * 5

    @pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
    def test_ambient_modes(self, context):
        model, x = make("cnn")
        want = analyze(model, x, method="certified")
        with context():
            found = analyze(model, x, method="certified")
        assert torch.equal(found.linearized_robustness, want.linearized_robustness)

    def test_newer_precision_settings(self, run_python):
        """torch raises when asked for the precision in its older words; η needs no words, it sees what the products do."""
        code = """
import torch, fastsal
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.GELU(), torch.nn.Linear(40, 150)).requires_grad_(False)
x = torch.randn(5, 30)
for precision in ("ieee", "tf32", "bf16"):
    for backend in (torch.backends.mkldnn, torch.backends.cuda):
        if hasattr(getattr(backend, "matmul", None), "fp32_precision"):  # from torch 2.9 on; CUDA has no bf16
            backend.matmul.fp32_precision = "tf32" if backend is torch.backends.cuda else precision
    exact, found = fastsal.analyze(model, x), fastsal.analyze(model, x, method="certified")
    print(bool(found.certified.all()), torch.equal(found.runner_up, exact.runner_up))
"""
        result = run_python("-c", code)
        assert (result.stdout, result.stderr) == ("True True\n" * 3, "")

    def test_autocast(self):
        """bfloat16 passes: η follows the precision that the model runs in."""
        model, x = make("mlp")
        with torch.autocast("cpu", torch.bfloat16):
            exact, found = analyze(model, x), analyze(model, x, method="certified")
        sure = found.certified
        torch.testing.assert_close(
            found.linearized_robustness[sure], exact.linearized_robustness[sure], rtol=1e-2, atol=0.0
        )
        assert sure.all()

    @pytest.mark.parametrize("chunk_size", [None, 1, 7])
    def test_shapes_options_and_one_score(self, chunk_size):
        model, x = make("cnn")
        result = analyze(model, x.view(5, 5, 6).flatten(1), method=Certified(1e-3, None, 3), chunk_size=chunk_size)
        assert result.certified.all()
        result = analyze(model, x, method="certified", keep_saliency=True, chunk_size=chunk_size)
        assert result.saliency.shape == x.shape
        score = analyze(lambda value: model(value)[:, 0], x, method="certified")
        assert score.certified.all()
        assert score.vjps.tolist() == [2] * 5
        assert analyze(model, x[:0], method="certified").vjps.shape == (0,)

    def test_differentiable(self):
        model, x = make("mlp")
        gradients = []
        for method in ("exact", "certified"):
            leaf = x.clone().requires_grad_()
            result = analyze(model, leaf, method=method, differentiable=True)
            gradients.append(torch.autograd.grad(result.linearized_robustness.sum(), leaf)[0])
        torch.testing.assert_close(*gradients)

    def test_perturbations_in_the_1_norm_are_an_error(self):
        model, x = make("mlp")
        with pytest.raises(ValueError, match=r"norm: got 1 .*certified.*wants 2 or inf"):
            analyze(model, x, norm=1, method="certified")

    def test_candidates_can_be_wrong_where_certified_is_not(self):
        model, x = make("mlp")
        exact = analyze(model, x)
        habit = analyze(model, x, method=Candidates(1))
        assert (habit.linearized_robustness >= exact.linearized_robustness).all()

    def test_a_call_does_not_depend_on_earlier_ones(self):
        model, x = make("cnn")
        first = analyze(model, x, method="certified")
        analyze(model, x.flip(0), method=Certified(seed=5))
        again = analyze(model, x, method="certified")
        assert torch.equal(first.linearized_robustness, again.linearized_robustness)
        assert torch.equal(first.runner_up, again.runner_up)
