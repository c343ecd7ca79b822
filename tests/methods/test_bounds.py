"""What probes prove: quantiles against forty digits, the rounds' shares, and the upper bounds with and without rounding."""

import math

import mpmath
import pytest
import torch
from chance import REJECT, chance_at_least

from fastsal.methods import bounds
from fastsal.methods.bounds import chi_square_exceeds, chi_square_quantile, schedule, widened
from fastsal.methods.certified import COUNTS


def probability_below(count, x):
    """P(χ²_count ≤ x) to forty digits."""
    with mpmath.workdps(40):
        return mpmath.gammainc(mpmath.mpf(count) / 2, 0, mpmath.mpf(x) / 2, regularized=True)


class TestQuantile:
    @pytest.mark.parametrize("probability", [0.9, 0.5, 0.2, 1e-2, 1e-3, 1e-6, 2.7e-7, 8e-8, 1e-9, 1e-12, 1e-18])
    def test_never_above_the_true_one_and_hardly_below(self, probability):
        counts = {1, 2, 3, 5, 7, *(round(count * factor) for count in COUNTS for factor, _ in bounds.ROUNDS)}
        for count in counts:
            reached = probability_below(count, chi_square_quantile(count, probability))
            assert reached <= probability
            assert reached > probability * (1 - 1e-5)

    def test_known_values(self):
        """Two degrees: −2 ln(1 − p). One: the square of a normal quantile. Ten at 5 %: any printed table."""
        assert chi_square_quantile(2, 1e-12) == pytest.approx(-2 * math.log1p(-1e-12), rel=1e-7)
        assert chi_square_quantile(1, math.erf(0.3 / math.sqrt(2))) == pytest.approx(0.09, rel=1e-7)
        assert chi_square_quantile(10, 0.05) == pytest.approx(3.940299, rel=1e-6)

    def test_tails_for_planning(self):
        for count in (4, 10, 40):
            for x in (0.3 * count, count, 1.7 * count):
                want = 1 - float(probability_below(count, x))
                assert chi_square_exceeds(count, torch.tensor([x]) ** (1 / 3)).item() == pytest.approx(want, abs=0.01)
        assert chi_square_exceeds(4, torch.tensor([0.0, math.inf])).tolist() == pytest.approx([1.0, 0.0], abs=1e-4)


class TestSchedule:
    def test_the_shares_add_up_to_the_failure_probability(self):
        assert sum(share for _, share in bounds.ROUNDS) <= 1 + 1e-15
        for failure_probability in (0.2, 1e-6):
            total = sum(probability_below(count, quantile) for count, quantile in schedule(20, failure_probability))
            assert 0.999 * failure_probability < total <= failure_probability

    @pytest.mark.parametrize("first", COUNTS)
    def test_counts_grow(self, first):
        counts = [count for count, _ in schedule(first, 1e-6)]
        assert counts[0] == first
        assert counts == sorted(set(counts))


def upper_norms(*figures):
    """The Euclidean bounds from what the probes and the basis gave."""
    known, rest, _ = widened(*figures)
    return (known + rest).sqrt()


def upper(sums, slack, count, quantile, known=0.0):
    """The bound of class 1 where class 0 is predicted, from figures for class 1 and slacks of both."""
    return upper_norms(
        torch.tensor([[0.0, known]], dtype=torch.float64),
        torch.tensor([[0.0, sums]], dtype=torch.float64),
        torch.tensor([slack], dtype=torch.float64),
        torch.tensor([0]),
        count,
        torch.tensor([[quantile]], dtype=torch.float64),
    )[0, 1].item()


class TestUpperNorms:
    def test_without_rounding(self):
        assert upper(6.0, [0.0, 0.0], 10, 2.0, known=1.0) == pytest.approx(2.0, rel=1e-15)

    @pytest.mark.parametrize("of_the_winner", [0.0, 1e-3, 2e-3])
    @pytest.mark.parametrize("count", [1, 9, 40])
    def test_errors_as_large_as_the_slack_are_covered(self, count, of_the_winner):
        """A norm of 1 at the quantile itself, all of it outside the basis or inside, measured too short by the whole slack."""
        slack = [of_the_winner, 2e-3]
        quantile = 0.7 * count
        error = math.sqrt(count) * sum(slack)
        assert upper((math.sqrt(quantile) - error) ** 2, slack, count, quantile) >= 1 - 1e-12
        assert upper(0.0, slack, count, 1e30, known=(1 - sum(slack)) ** 2) >= 1 - 1e-12
        assert upper((math.sqrt(quantile) - error) ** 2, slack, count, quantile) < 1 + 1e-4

    def test_the_winners_own_bound_counts_its_slack_twice(self):
        """Nothing asks for it; it shows that the winner's slack is the one of the predicted class."""
        known = torch.zeros(1, 3, dtype=torch.float64)
        slack = torch.tensor([[1.0, 2.0, 4.0]], dtype=torch.float64)
        quantile = torch.ones(1, 1, dtype=torch.float64)
        got = upper_norms(known, known, slack, torch.tensor([2]), 4, quantile)
        both = slack + 4.0
        torch.testing.assert_close(got, (both.square() + 4 * both.square()).sqrt())


class TestOneClass:
    """The bounds of one class over many draws of its sums: each round fails with its own share, all together with δ."""

    DELTA, TRIALS = 0.2, 20000

    def share_of_misses(self, plan):
        draws = torch.randn(self.TRIALS, plan[-1][0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        pivots = draws.square().cumsum(1)
        misses = torch.zeros(self.TRIALS, dtype=torch.bool)
        nothing = torch.zeros(self.TRIALS, 2, dtype=torch.float64)
        winner = torch.zeros(self.TRIALS, dtype=torch.int64)
        for count, quantile in plan:
            sums = pivots[:, count - 1 : count].expand(-1, 2)
            got = upper_norms(nothing, sums, nothing, winner, count, torch.full((self.TRIALS, 1), quantile))
            misses |= got[:, 1] < 1
        return int(misses.sum())

    def test_the_share_of_misses(self):
        misses = self.share_of_misses(schedule(16, self.DELTA))
        assert chance_at_least(misses, self.TRIALS, self.DELTA) > REJECT
        assert misses >= 0.3 * self.DELTA * self.TRIALS  # a bound so loose that nothing ever fails tests nothing

    def test_one_round_is_exact(self):
        misses = self.share_of_misses([(16, chi_square_quantile(16, self.DELTA))])
        assert chance_at_least(misses, self.TRIALS, self.DELTA) > REJECT
        assert chance_at_least(self.TRIALS - misses, self.TRIALS, 1 - self.DELTA) > REJECT

    def test_mutants_are_caught(self):
        def caught(plan):
            return chance_at_least(self.share_of_misses(plan), self.TRIALS, self.DELTA) < REJECT

        assert caught([(16, chi_square_quantile(16, 1 - self.DELTA))])  # the wrong tail
        assert caught([(count, chi_square_quantile(count, self.DELTA)) for count in (16, 22, 32, 48)])  # δ not divided
        assert caught(
            [(count, chi_square_quantile(count, self.DELTA)) for count in range(1, 33)]
        )  # a look at every probe
