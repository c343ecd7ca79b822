"""What probes prove: quantiles against forty digits, the rounds' shares, and what is left over."""

import math

import mpmath
import pytest
import torch

from fastsal.methods.certified.chi_square import (
    COUNTS,
    FIRST,
    SHARES,
    LeftOver,
    chi_square_exceeds,
    chi_square_quantile,
    schedule,
)


def probability_below(count, x):
    """P(χ²_count ≤ x) to forty digits."""
    with mpmath.workdps(40):
        return mpmath.gammainc(mpmath.mpf(count) / 2, 0, mpmath.mpf(x) / 2, regularized=True)


class TestQuantile:
    @pytest.mark.parametrize("probability", [0.9, 0.5, 0.2, 1e-2, 1e-3, 1e-6, 2.7e-7, 8e-8, 1e-9, 1e-12, 1e-18])
    def test_never_above_the_true_one_and_hardly_below(self, probability):
        counts = {1, 2, 3, 5, 7, *COUNTS}
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
                assert chi_square_exceeds(count, torch.tensor([x])).item() == pytest.approx(want, abs=0.01)
        assert chi_square_exceeds(4, torch.tensor([0.0, math.inf])).tolist() == pytest.approx([1.0, 0.0], abs=1e-4)

    def test_classes_left_over(self):
        """As many as the chances of each class add up to; no room is none, and NaN too; ample room leaves nobody over."""
        room = 2 ** torch.empty(3, 500, dtype=torch.float64).uniform_(
            -10, 12, generator=torch.Generator().manual_seed(0)
        )
        found = LeftOver((4, 20, 64), 1e-6, torch.device("cpu")).expected(room)
        for column, count in enumerate((4, 20, 64)):
            quantile = schedule(count, 1e-6)[0][1]
            want = [sum(1 - float(probability_below(count, r * quantile)) for r in row.tolist()) for row in room]
            assert found[:, column].tolist() == pytest.approx(want, rel=0.02)
        edges = LeftOver((8,), 1e-6, torch.device("cpu")).expected(
            torch.tensor([[-1.0, 0.0, math.nan, math.inf, 1e30]]).double()
        )
        assert edges.item() == pytest.approx(3, abs=1e-3)


class TestSchedule:
    def test_the_shares_add_up_to_the_failure_probability(self):
        assert sum(SHARES) <= 1 + 1e-15
        for failure_probability in (0.2, 1e-6):
            total = sum(probability_below(count, quantile) for count, quantile in schedule(20, failure_probability))
            assert 0.999 * failure_probability < total <= failure_probability

    @pytest.mark.parametrize("first", FIRST)
    def test_counts_grow(self, first):
        counts = [count for count, _ in schedule(first, 1e-6)]
        assert counts[0] == first
        assert counts == sorted(set(counts))
