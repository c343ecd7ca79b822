"""Upper bounds of norms, with and without rounding, and how often the bound of one class misses."""

import math

import pytest
import torch
from chance import REJECT, chance_at_least

from fastsal.methods.certified.chi_square import chi_square_quantile, schedule
from fastsal.methods.certified.norms import NORM_BOUNDS, Summed, widened


class TestWidened:
    """What a norm is bounded by where products are off."""

    @pytest.mark.parametrize("share", [0.0, 1e-9, 1e-3, 0.2])
    @pytest.mark.parametrize("count", [9, 40])
    def test_errors_as_large_as_allowed_are_covered(self, share, count):
        """The probes' sums are at their quantile; all products are too small, inside the basis and outside it."""
        generator = torch.Generator().manual_seed(count)
        known, rest = torch.rand(2, 60, 40, generator=generator, dtype=torch.float64) * 3
        quantile = count * torch.rand(60, 1, generator=generator, dtype=torch.float64)
        error = share * torch.rand(60, 40, generator=generator, dtype=torch.float64)
        # In the root mean square along the probes and 4 pilot probes: all of it may be in the probes.
        gain = ((count + 4) / quantile).sqrt()
        seen = (known - error).clamp(min=0).square()
        sums = ((rest * quantile.sqrt()) - (count + 4) ** 0.5 * error).clamp(min=0).square()
        upper = widened(seen, sums / quantile, gain.expand(60, 40), error)
        assert (upper[0] >= known.square() * (1 - 1e-12)).all()
        assert (upper[1] >= rest.square() * (1 - 1e-12)).all()
        untouched = (error < known) & (gain * error < rest)  # where nothing was cut off at 0, the bounds are the truth
        torch.testing.assert_close(upper[0][untouched], known.square()[untouched], rtol=1e-9, atol=0.0)
        torch.testing.assert_close(upper[1][untouched], rest.square()[untouched], rtol=1e-9, atol=0.0)


def summed(seed, E=6, n=40, D=50, r=5, spread=1.0):
    """A `Summed` whose weights range over orders of magnitude, bases [E, r, D], and vectors Δ_j [E, n, D] of several kinds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    norm = Summed(torch.zeros(E, n), D, "reference")
    norm.fit(torch.cat((torch.zeros(E, 1, D, dtype=torch.float64), (spread * normal(E, 3, D)).exp()), 1))
    basis = torch.linalg.qr(normal(E, D, r)).Q.mT
    examples = torch.arange(E)
    inside = (normal(E, n, r) @ basis) / norm.directions(examples, torch.ones(E, 1, D, dtype=torch.float64))
    vectors = normal(E, n, D)
    vectors[:, : n // 4] /= normal(E, n // 4, D).square()  # heavy tails
    vectors[:, n // 4 : n // 2] *= torch.rand(E, n // 4, D, generator=generator, dtype=torch.float64) < 0.1  # sparse
    vectors = torch.exp(2 * normal(E, n, 1)) * vectors + inside
    vectors[:, -2] = inside[:, -2]  # nothing outside
    return norm, examples, basis, vectors


def parts(norm, examples, basis, vectors):
    """The components of Δ_j / w in the basis [E, r, n], and the squared norms of both parts [E, n]."""
    scaled = norm.rows(examples, vectors)
    components = basis @ scaled.mT
    rest = scaled - components.mT @ basis
    return components, components.square().sum(1), rest.square().sum(2)


class TestSummed:
    @pytest.mark.parametrize("seed", range(20))
    @pytest.mark.parametrize("measured", [True, False])
    def test_never_below_the_1_norm(self, seed, measured):
        norm, examples, basis, vectors = summed(seed, spread=0.3 * (seed % 5))
        components, known, rest = parts(norm, examples, basis, vectors)
        if measured:
            assert norm.measure(examples, torch.ones_like(known, dtype=torch.bool), components, basis)
        nothing = torch.zeros_like(known)
        upper, length = norm.upper(examples, known, rest, nothing), vectors.abs().sum(2)
        assert (upper >= length * (1 - 1e-12)).all()
        root = math.sqrt(vectors.shape[2])
        assert (upper <= root * (known + rest).sqrt() * (1 + 1e-12)).all()  # Cauchy and Schwarz
        if measured:
            weights = 1 / norm.directions(examples, torch.ones(6, 1, 50, dtype=torch.float64))
            triangle = ((components.mT @ basis) * weights).abs().sum(2) + root * rest.sqrt()
            assert (upper <= triangle * (1 + 1e-9)).all()
            assert (upper < triangle * 0.9).any()

    @pytest.mark.parametrize("seed", range(5))
    def test_it_is_attained(self, seed):
        """Δ = K plus a little of what the signs of K hold at right angles to it: no smaller bound would be true."""
        norm, examples, basis, vectors = summed(seed)
        weights = 1 / norm.directions(examples, torch.ones(6, 1, 50, dtype=torch.float64))
        k = (basis @ norm.rows(examples, vectors).mT).mT @ basis
        signs = weights * k.sign()
        away = signs - (signs * k).sum(2, keepdim=True) / k.square().sum(2, keepdim=True) * k
        # So little that no sign changes; and the basis is k itself, for `away` need not be at right angles to the others.
        away *= 0.5 * (k.abs() / away.abs()).amin(2, keepdim=True)
        for j in range(vectors.shape[1]):
            length = k[:, j].norm(dim=1, keepdim=True)
            known, rest = length.square(), away[:, j].square().sum(1, keepdim=True)
            alone = Summed(torch.zeros(6, 1), 50, "reference")
            alone._weights = weights.squeeze(1)
            components, direction = length.unsqueeze(2), (k[:, j] / length).unsqueeze(1)
            alone.measure(examples, torch.ones(6, 1, dtype=torch.bool), components, direction)
            upper = alone.upper(examples, known, rest, torch.zeros_like(known))
            want = (weights.squeeze(1) * (k[:, j] + away[:, j])).abs().sum(1, keepdim=True)
            torch.testing.assert_close(upper, want, rtol=1e-10, atol=0.0)

    @pytest.mark.parametrize("slack", [1e-6, 1e-2])
    def test_errors_as_large_as_the_slack_are_covered(self, slack):
        norm, examples, basis, vectors = summed(3)
        components, known, rest = parts(norm, examples, basis, vectors)
        length = vectors.abs().sum(2)
        generator = torch.Generator().manual_seed(0)
        for _ in range(20):
            error = torch.randn(components.shape, generator=generator, dtype=torch.float64)
            wrong = components + slack * error / error.norm(dim=1, keepdim=True)
            fresh, *_ = summed(3)
            fresh.measure(examples, torch.ones_like(known, dtype=torch.bool), wrong, basis)
            upper = fresh.upper(examples, (wrong.norm(dim=1) + slack).square(), rest, torch.full_like(known, slack))
            assert (upper >= length * (1 - 1e-12)).all()

    def test_rows_and_directions_belong_together(self):
        """⟨directions(u), Δ⟩ = ⟨u, rows(Δ)⟩, the weights' squares have the mean 1, and no weight is far below it."""
        norm, examples, _, vectors = summed(1)
        u = torch.randn(6, 4, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        got = norm.directions(examples, u) @ vectors.mT
        torch.testing.assert_close(got, u @ norm.rows(examples, vectors).mT)
        weights = 1 / norm.directions(examples, torch.ones(6, 1, 50, dtype=torch.float64))
        torch.testing.assert_close(weights.square().mean(2), torch.ones(6, 1, dtype=torch.float64))
        assert (weights.square() >= Summed.FLOOR * (1 - 1e-12)).all()
        assert weights.square().max() > 2

    def test_rows_without_gradients_leave_the_weights_at_one(self):
        norm = Summed(torch.zeros(2, 5), 7, "reference")
        norm.fit(torch.ones(2, 4, 7))
        torch.testing.assert_close(norm.rows(torch.arange(2), torch.ones(2, 3, 7)), torch.ones(2, 3, 7).double())

    @pytest.mark.parametrize("tile", [1, 7 * 50, 1 << 22])
    def test_only_what_is_marked_is_measured_and_once(self, monkeypatch, tile):
        monkeypatch.setattr(Summed, "TILE", tile)
        norm, examples, basis, vectors = summed(2)
        components, _, _ = parts(norm, examples, basis, vectors)
        some = torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) < 0.5
        some[0], some[3] = False, False
        e = examples[1:]
        assert norm.measure(e, some[e], components[e], basis[e])
        weights = 1 / norm.directions(examples, torch.ones(6, 1, 50, dtype=torch.float64))
        want = ((components.mT @ basis) * weights).abs().sum(2)
        torch.testing.assert_close(norm._sums[some], want[some], rtol=1e-13, atol=0.0)
        assert (norm._sums[~some] == math.inf).all()
        assert not norm.measure(e, some[e], components[e], basis[e])


@pytest.mark.parametrize("norm", NORM_BOUNDS)
def test_figures_for_planning(norm):
    """`expected` is `upper` without slack, `room` its inverse, and `likely` lies below."""
    made, examples, basis, vectors = summed(4)
    made = made if norm == math.inf else NORM_BOUNDS[norm](torch.zeros(6, 40), 50, "reference")
    components, known, rest = parts(made, examples, basis, vectors)
    made.measure(examples, torch.ones_like(known, dtype=torch.bool), components, basis)
    expected = made.expected(examples, known, rest)
    torch.testing.assert_close(expected, made.upper(examples, known, rest, torch.zeros_like(known)))
    outside = rest > 1e-6 * known
    torch.testing.assert_close(made.allowance(examples, known, expected)[outside], rest[outside], rtol=1e-6, atol=0.0)
    assert (made.allowance(examples, known, 0.5 * made.expected(examples, known, 0 * rest)) < 0).all()
    assert (made.likely(examples, known, rest) <= expected * (1 + 1e-12)).all()


@pytest.mark.parametrize("norm", NORM_BOUNDS)
def test_tolerances(norm):
    """A class may be off by its tolerance, and not by more: there `upper` is at the limit."""
    made, examples, basis, vectors = summed(5)
    made = made if norm == math.inf else NORM_BOUNDS[norm](torch.zeros(6, 40), 50, "reference")
    components, known, rest = parts(made, examples, basis, vectors)
    made.measure(examples, torch.rand(6, 40, generator=torch.Generator().manual_seed(0)) < 0.7, components, basis)
    gain = 1 + 2 * torch.rand(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    most = torch.full_like(known, math.inf)

    def upper(error):
        return made.upper(examples, *widened(known, rest, gain, error), error)

    least = upper(torch.zeros_like(known))
    for factor in (1.0001, 1.2, 30.0):
        found = made.tolerance(examples, known, rest, gain, factor * least, most)
        assert (found >= 0).all()
        assert (upper(found) <= factor * least * (1 + 1e-9)).all()
        assert (upper(found * 1.001 + 1e-5 * least) > factor * least).all()
        half = 0.5 * found.median()
        capped = made.tolerance(examples, known, rest, gain, factor * least, torch.full_like(known, half.item()))
        assert (capped == half).any()
        assert ((capped - found.clamp(max=half.item())).abs() <= 1e-6 * factor * least).all()
    assert not (made.tolerance(examples, known, rest, gain, 0.999 * least, most) >= 0).any()
    nothing = torch.full_like(known, math.inf)
    assert (made.tolerance(examples, known, rest, gain, nothing, torch.ones_like(known)) == 1).all()
    assert not (made.tolerance(examples, known, nothing, gain, 9 * least, most) >= 0).any()


class TestOneClass:
    """The bounds of one class over many draws of its sums: each round fails with its own share, all together with δ."""

    DELTA, TRIALS = 0.2, 20000

    def share_of_misses(self, plan):
        draws = torch.randn(self.TRIALS, plan[-1][0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        pivots = draws.square().cumsum(1)
        misses = torch.zeros(self.TRIALS, dtype=torch.bool)
        norm, nothing = (
            NORM_BOUNDS[2.0](torch.zeros(1, 1), 1, "reference"),
            torch.zeros(self.TRIALS, 1, dtype=torch.float64),
        )
        for count, quantile in plan:
            sums = pivots[:, count - 1 : count]
            known, rest = widened(nothing, sums / quantile, nothing + (count / quantile) ** 0.5, nothing)
            got = norm.upper(torch.arange(self.TRIALS), known, rest, nothing)
            misses |= got[:, 0] < 1
        return int(misses.sum())

    def test_the_share_of_misses(self):
        misses = self.share_of_misses(schedule(16, self.DELTA))
        assert chance_at_least(misses, self.TRIALS, self.DELTA) > REJECT
        assert misses >= 0.3 * self.DELTA * self.TRIALS  # a bound so loose that nothing ever fails tests nothing

    def test_one_round_is_exact(self):
        misses = self.share_of_misses([(16, chi_square_quantile(16, self.DELTA))])
        assert chance_at_least(misses, self.TRIALS, self.DELTA) > REJECT
        assert chance_at_least(self.TRIALS - misses, self.TRIALS, 1 - self.DELTA) > REJECT

    def test_mutations_are_caught(self):
        def caught(plan):
            return chance_at_least(self.share_of_misses(plan), self.TRIALS, self.DELTA) < REJECT

        assert caught([(16, chi_square_quantile(16, 1 - self.DELTA))])  # the wrong tail
        assert caught([(count, chi_square_quantile(count, self.DELTA)) for count in (16, 22, 32, 48)])  # δ not divided
        assert caught(
            [(count, chi_square_quantile(count, self.DELTA)) for count in range(1, 33)]
        )  # a look at every probe
