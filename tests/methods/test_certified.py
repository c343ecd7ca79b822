"""Certified ρ̃: the statistics on random Jacobians, the answer against exact rows, models of every kind."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastsal.methods.certified as certify
from fastsal import Candidates, Certified, analyze
from fastsal.methods import bounds
from fastsal.methods.bounds import chi_square_quantile, schedule, upper_norms

REJECT = 1e-6  # of a true hypothesis, by any of the statistics tests; the seeds are fixed


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of small operations: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Matrices:
    """Passes of given Jacobians [E, n, D]."""

    roundoff, pairs = 2.0**-53, 64

    def __init__(self, logits, jacobian):
        self.logits, self.jacobian = logits, jacobian
        self.dimension = jacobian.shape[2]
        self.jvp_calls = []

    def vjp(self, examples, cotangents):
        return cotangents @ self.jacobian[examples]

    def jvp(self, examples, directions):
        self.jvp_calls.append((examples, directions))
        return directions.to(self.jacobian.dtype) @ self.jacobian[examples].mT

    def price(self):
        return 1.0


def problem(E, n, D, seed=0, decay=0.5, common=3.0, dtype=torch.float64):
    """Jacobians with a common part and singular values that decay; margins that are bunched."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, D + 1, dtype=torch.float64) ** -decay
    rows = torch.randn(E, n, D, generator=generator, dtype=torch.float64) * spectrum
    rows += common * torch.randn(E, 1, D, generator=generator, dtype=torch.float64) * spectrum
    logits = torch.randn(E, n, generator=generator, dtype=torch.float64)
    logits[torch.arange(E), torch.randint(n, (E,), generator=generator)] += 8.0
    return logits.to(dtype), rows.to(dtype)


def truth(logits, jacobian):
    """Runner-up and ratio of every class, in float64."""
    index = torch.arange(len(logits))
    prediction = logits.argmax(1)
    scores, rows = logits.double(), jacobian.double()
    ratio = (scores[index, prediction].unsqueeze(1) - scores) / (rows[index, prediction].unsqueeze(1) - rows).norm(
        dim=2
    )
    ratio[index, prediction] = math.inf
    return ratio.argmin(1), ratio


class TestQuantile:
    @pytest.mark.parametrize("count", [1, 2, 3, 10, 24, 96, 288])
    @pytest.mark.parametrize("probability", [0.5, 0.2, 1e-3, 1e-9, 1e-12, 1e-18])
    def test_inverts_the_distribution(self, count, probability):
        x = chi_square_quantile(count, probability)
        got = torch.special.gammainc(
            torch.tensor(count / 2, dtype=torch.float64), torch.tensor(x / 2, dtype=torch.float64)
        ).item()
        assert got == pytest.approx(probability, rel=1e-9)
        assert got <= probability * (1 + 1e-12)

    def test_known_values(self):
        """Two degrees: −2 ln(1 − p). One: the square of a normal quantile. Ten at 5 %: any printed table."""
        assert chi_square_quantile(2, 1e-12) == pytest.approx(-2 * math.log1p(-1e-12), rel=1e-9)
        assert chi_square_quantile(1, math.erf(0.3 / math.sqrt(2))) == pytest.approx(0.09, rel=1e-9)
        assert chi_square_quantile(10, 0.05) == pytest.approx(3.940299, rel=1e-6)

    def test_against_scipy(self):
        stats = pytest.importorskip("scipy.stats")
        for count in (1, 7, 24, 100):
            for probability in (1e-12, 1e-9, 1e-3, 0.3):
                want = stats.chi2.ppf(probability, count)
                assert chi_square_quantile(count, probability) == pytest.approx(want, rel=1e-8)

    def test_shares_add_up_to_the_failure_probability(self):
        assert sum(share for _, share in bounds.ROUNDS) <= 1 + 1e-12
        for count, quantile in schedule(20, 1e-6, 11):
            got = torch.special.gammainc(
                torch.tensor(count / 2, dtype=torch.float64), torch.tensor(quantile / 2, dtype=torch.float64)
            ).item()
            factor = count / 20
            share = dict(bounds.ROUNDS)[factor]
            assert got == pytest.approx(share * 1e-7, rel=1e-8)


def chance_at_least(failures, trials, probability):
    """P(Binomial(trials, probability) >= failures), by Chernoff's bound: an upper bound, so that rejecting is safe."""
    rate = failures / trials
    if rate <= probability:
        return 1.0
    part = rate * math.log(rate / probability)
    rest = (1 - rate) * math.log((1 - rate) / (1 - probability)) if rate < 1 else 0.0
    return math.exp(-trials * (part + rest))


def sums(trials, rounds, seed):
    """S_j / ‖Δ_j‖² after each round, [trials, rounds], for one class and fresh probes a trial."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(trials, rounds[-1], generator=generator, dtype=torch.float64).square().cumsum(1)
    return draws[:, [count - 1 for count in rounds]]


class TestTwoClasses:
    """One Δ only: the union over classes is tight, each round fails with its own share exactly."""

    DELTA, TRIALS = 0.2, 20000

    def share_of_misses(self, plan):
        counts = [count for count, _ in plan]
        pivots = sums(self.TRIALS, counts, 0)
        misses = torch.zeros(self.TRIALS, dtype=torch.bool)
        for slot, (count, quantile) in enumerate(plan):
            one = torch.ones(self.TRIALS, 2, dtype=torch.float64)
            prediction = torch.zeros(self.TRIALS, dtype=torch.int64)
            upper = upper_norms(0 * one, pivots[:, slot : slot + 1] * one, one, prediction, count, quantile, 0.0)
            misses |= upper[:, 1] < 1
        return int(misses.sum())

    def test_the_share_of_misses(self):
        misses = self.share_of_misses(schedule(16, self.DELTA, 2))
        assert misses <= self.DELTA * self.TRIALS
        assert misses >= 0.3 * self.DELTA * self.TRIALS  # a bound so loose that nothing ever fails tests nothing

    def test_one_round_is_exact(self):
        count = 16
        misses = self.share_of_misses([(count, chi_square_quantile(count, self.DELTA))])
        assert chance_at_least(misses, self.TRIALS, self.DELTA) > REJECT
        assert chance_at_least(self.TRIALS - misses, self.TRIALS, 1 - self.DELTA) > REJECT

    def test_mutants_are_caught(self):
        def caught(plan):
            return chance_at_least(self.share_of_misses(plan), self.TRIALS, self.DELTA) < REJECT

        assert caught([(16, chi_square_quantile(16, 1 - self.DELTA))])  # the wrong tail
        assert caught([(count, chi_square_quantile(count, self.DELTA)) for count in (16, 22, 32, 48)])  # δ not divided
        looks = [(count, chi_square_quantile(count, self.DELTA)) for count in range(1, 33)]
        assert caught(looks)  # a look after every probe

    def test_reusing_probes_after_choosing_the_size_is_caught(self):
        """Stopping where the sum happens to be small, with δ whole, against the fixed plan on the same draws."""
        pivots = sums(self.TRIALS, [16, 32], 1)
        quantiles = [chi_square_quantile(count, self.DELTA) for count in (16, 32)]
        small = pivots[:, 0] < quantiles[0]  # chosen by the first round's sums, which are used again
        misses = torch.where(small, pivots[:, 0] < quantiles[0], pivots[:, 1] < quantiles[1])
        assert chance_at_least(int(misses.sum()), self.TRIALS, self.DELTA) < REJECT


class TestGuarantee:
    """The whole algorithm, forced to probe, at a large failure probability: how often any class's bound is wrong."""

    DELTA, TRIALS, CLASSES = 0.2, 600, 8

    @pytest.fixture(autouse=True)
    def _forced(self, monkeypatch):
        monkeypatch.setattr(certify, "WORTHWHILE", 0)
        monkeypatch.setattr(certify, "TOP", 1)
        monkeypatch.setattr(
            certify._Search,
            "forecast",
            lambda self, e, unknown: (torch.zeros(len(e), dtype=torch.float64), torch.full_like(e, certify.COUNTS[0])),
        )

    def run(self):
        """Misses over fresh Jacobians and seeds, and the pivots S_j / ‖Δ_j^⊥‖² of the first round for the last class."""
        misses, pivots = 0, []
        for trial in range(self.TRIALS):
            logits, rows = problem(1, self.CLASSES, 40, seed=trial, common=1.0)
            logits[0, -1] = -3.0  # not among those evaluated first
            search = certify._Search(Matrices(logits, rows), Certified(self.DELTA, seed=trial), "reference")
            plan = search.prepare()
            first = int(plan[0])
            search.probe(torch.tensor([0]), first)
            _, ratio = truth(logits, rows)
            misses += bool((search.lower > ratio * (1 + 1e-12)).any())
            difference = (rows[0, logits[0].argmax()] - rows[0, -1]) / search.unit[0]
            rest = difference - search.basis[0].T @ (search.basis[0] @ difference)
            measured = search.differences(torch.tensor([0]), search.probed)[0, :first, -1].square().sum()
            pivots.append((measured / rest.square().sum()).item())
        return misses, torch.tensor(pivots, dtype=torch.float64)

    def test_misses_stay_below_delta_and_pivots_are_chi_square(self):
        misses, pivots = self.run()
        assert misses <= self.DELTA * self.TRIALS
        assert misses > 0
        count = torch.tensor(certify.COUNTS[0] / 2, dtype=torch.float64)
        expected = torch.special.gammainc(count, pivots.sort().values / 2)
        empirical = torch.arange(1, self.TRIALS + 1, dtype=torch.float64) / self.TRIALS
        distance = torch.maximum(empirical - expected, expected - empirical + 1 / self.TRIALS).max().item()
        assert distance * math.sqrt(self.TRIALS) < math.sqrt(-math.log(REJECT / 2) / 2)  # Kolmogorov–Smirnov

    def test_mutants_are_caught(self, monkeypatch):
        right = certify.schedule

        def wrong_tail(first, delta, n):
            return [(count, chi_square_quantile(count, 1 - delta / (n - 1))) for count, _ in right(first, delta, n)]

        def undivided(first, delta, n):
            return [(count, chi_square_quantile(count, delta)) for count, _ in right(first, delta, n)]

        for mutant in (wrong_tail, undivided):
            monkeypatch.setattr(certify, "schedule", mutant)
            misses, _ = self.run()
            assert chance_at_least(misses, self.TRIALS, self.DELTA) < REJECT

    def test_probes_that_are_too_short_are_caught(self, monkeypatch):
        draw = certify._Search.draw

        def biased(self, count):
            draw(self, count)
            self.probes = self.probes * 0.5

        monkeypatch.setattr(certify._Search, "draw", biased)
        misses, _ = self.run()
        assert chance_at_least(misses, self.TRIALS, self.DELTA) < REJECT


class TestAnswer:
    @pytest.mark.parametrize(("n", "D"), [(2, 5), (3, 1), (10, 20), (60, 30), (300, 200), (1000, 100)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_equals_exact(self, n, D, dtype):
        logits, rows = problem(12, n, D, dtype=dtype)
        passes = Matrices(logits, rows)
        passes.roundoff = torch.finfo(dtype).eps / 2
        found = certify.certify(passes, Certified())
        runner_up, ratio = truth(logits, rows)
        assert found.certified.all()
        assert torch.equal(found.winners, torch.stack((logits.argmax(1), runner_up), 1))
        assert torch.equal(found.pair, rows[torch.arange(12).unsqueeze(1), found.winners])
        torch.testing.assert_close(found.lower_bound, ratio.amin(1), rtol=1e-6, atol=0.0)
        assert (found.vjps + found.jvps <= n + 60).all()

    def test_saves_passes(self):
        logits, rows = problem(8, 1000, 400, decay=1.0)
        found = certify.certify(Matrices(logits, rows), Certified())
        assert found.certified.all()
        assert (found.vjps + found.jvps).double().median() < 150

    @pytest.mark.parametrize("seed", range(3))
    def test_an_example_depends_on_itself_only(self, seed):
        logits, rows = problem(6, 400, 60, seed=seed)
        whole = certify.certify(Matrices(logits, rows), Certified(seed=seed))
        for example in range(6):
            alone = certify.certify(Matrices(logits[[example]], rows[[example]]), Certified(seed=seed))
            assert torch.equal(alone.winners[0], whole.winners[example])
            assert alone.jvps.item() == whole.jvps[example].item()
            torch.testing.assert_close(alone.lower_bound[0], whole.lower_bound[example])

    def test_the_basis_is_complete_before_the_first_probe(self):
        """Directions of one example: the basis, orthonormal; then probes, orthogonal to it; never a basis again."""
        logits, rows = problem(1, 400, 200)
        passes = Matrices(logits, rows)
        found = certify.certify(passes, Certified())
        directions = torch.cat([directions[0] for _, directions in passes.jvp_calls])
        assert len(directions) == found.jvps.item()
        gram = directions @ directions.T
        units = ((gram.diagonal() - 1).abs() < 1e-10).long()
        r = int(units.sum())
        assert 4 <= r < len(directions)
        assert units.tolist() == [1] * r + [0] * (len(directions) - r)
        torch.testing.assert_close(gram[:r, :r], torch.eye(r, dtype=torch.float64), atol=1e-12, rtol=0.0)
        assert gram[r:, :r].abs().max() < 1e-10

    def test_scales(self):
        """Gradients and margins far from 1, in float64 beyond what squares can hold."""
        for scale in (1e-200, 1e-30, 1e30, 1e200):
            logits, rows = problem(4, 200, 100)
            found = certify.certify(Matrices(logits, rows * scale), Certified())
            assert found.certified.all()
            assert torch.equal(found.winners[:, 1], truth(logits, rows)[0])
            assert (found.jvps > 0).any()


class TestBudget:
    def test_it_is_kept_and_the_bounds_hold(self):
        logits, rows = problem(10, 300, 100)
        _, ratio = truth(logits, rows)
        needed = certify.certify(Matrices(logits, rows), Certified())
        spent = (needed.vjps + needed.jvps).max().item()
        for limit in (2, 3, 10, 30, 50, 80, spent, 1000):
            found = certify.certify(Matrices(logits, rows), Certified(max_passes=limit))
            assert (found.vjps + found.jvps <= limit).all()
            index = torch.arange(10)
            value = ratio[index, found.winners[:, 1]]
            best = ratio.amin(1)
            assert (found.lower_bound <= best * (1 + 1e-12)).all()
            assert torch.equal(value[found.certified], best[found.certified])
            torch.testing.assert_close(found.lower_bound[found.certified], best[found.certified])
        assert found.certified.all()
        assert not certify.certify(Matrices(logits, rows), Certified(max_passes=2)).certified.any()

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

    def test_no_gradient_at_all(self):
        logits, rows = problem(1, 100, 20)
        found = certify.certify(Matrices(logits, rows * 0), Certified())
        others = logits[0].argsort(descending=True)
        assert found.winners[0].tolist() == others[:2].tolist()
        assert found.lower_bound.item() == math.inf
        assert found.certified.all()

    @pytest.mark.parametrize("where", ["logits", "prediction", "another row"])
    def test_nan_is_not_certified_and_spares_the_others(self, where):
        logits, rows = problem(3, 200, 40)
        clean, _ = truth(logits, rows)
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

        found = certify.certify(Rows(logits, rows), Certified())
        assert found.certified.tolist() == [True, False, True]
        assert torch.equal(found.winners[[0, 2], 1], clean[[0, 2]])
        assert found.lower_bound[1].isnan()
        want = {"logits": 0, "prediction": int(logits[1].argmax() == 0)}.get(where)
        assert found.winners[1, 1].item() == (j if want is None else want)

    def test_jvps_that_disagree_with_rows_are_not_certified(self):
        """A forward-mode rule that is wrong by more than η."""
        logits, rows = problem(4, 300, 100)

        class Wrong(Matrices):
            def jvp(self, examples, directions):
                return super().jvp(examples, directions) * (1 + 1e-9)

        found = certify.certify(Wrong(logits, rows), Certified())
        assert not found.certified.any()
        assert (found.lower_bound == 0).all()

    def test_a_model_without_jvps_gets_rows(self):
        logits, rows = problem(4, 100, 50)
        passes = Matrices(logits, rows)
        passes.jvp = lambda examples, directions: None
        found = certify.certify(passes, Certified())
        assert found.certified.all()
        assert found.jvps.tolist() == [0] * 4
        assert found.vjps.tolist() == [100] * 4
        assert torch.equal(found.winners[:, 1], truth(logits, rows)[0])


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
    @pytest.mark.parametrize("kind", ["mlp", "cnn", "attention", "multihead", "encoder", "lstm"])
    def test_equals_exact_rows(self, kind):
        model, x = make(kind)
        exact = analyze(model, x)
        before = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            found = analyze(model, x, method="certified")
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

    @pytest.mark.parametrize("norm", [1, math.inf, "inf"])
    def test_other_norms_are_an_error(self, norm):
        model, x = make("mlp")
        with pytest.raises(ValueError, match=r"norm: .*certified.*wants 2"):
            analyze(model, x, norm=norm, method="certified")

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
