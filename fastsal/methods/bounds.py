"""What random probes prove: quantiles of the chi-square distribution, schedules of rounds, and upper bounds of norms."""

import functools
import math

import torch
from torch import Tensor

# (count relative to the first round, share of the failure probability), fixed before any probe is drawn.
ROUNDS = ((1.0, 0.27), (1.25, 0.22), (1.6, 0.18), (2.0, 0.14), (2.5, 0.11), (3.2, 0.08))
# torch.special.gammainc errs by up to 2e-9 of its value; a quantile this much lower stays below the true one.
BELOW = 1 - 2.0**-26


@functools.lru_cache(maxsize=4096)
def chi_square_quantile(count: int, probability: float) -> float:
    """An x with P(χ²_count ≤ x) ≤ probability, by a relative 2e-8 at most below the largest: bisection on log x in float64.

    The cumulative distribution is gammainc(count/2, x/2), whose float64 error is relative down to the smallest numbers.
    """
    half = torch.tensor(count / 2, dtype=torch.float64)
    low, high = -1400.0 / count - 50.0, math.log(count) + 8.0
    for _ in range(64):
        middle = (low + high) / 2
        reached = torch.special.gammainc(half, torch.tensor(math.exp(middle) / 2, dtype=torch.float64)).item()
        low, high = (middle, high) if reached <= probability else (low, middle)
    return math.exp(low) * BELOW


def schedule(first: int, failure_probability: float) -> list[tuple[int, float]]:
    """(cumulative count of probes, lower χ² quantile at the round's share of the failure probability), for all rounds."""
    counts = [max(1, round(first * factor)) for factor, _ in ROUNDS]
    return [
        (count, chi_square_quantile(count, share * failure_probability))
        for count, (_, share) in zip(counts, ROUNDS, strict=True)
    ]


def chi_square_exceeds(count: int, x: Tensor) -> Tensor:
    """Roughly P(χ²_count > x), elementwise, by Wilson and Hilferty's cube root. For planning: nothing is proven by it."""
    spread = 2 / (9 * count)
    normal = ((x.clamp(min=0) / count) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    return torch.where(x > 0, torch.special.erfc(normal / math.sqrt(2)) / 2, 1.0)


def upper_norms(known: Tensor, sums: Tensor, slack: Tensor, predicted: Tensor, count: int, quantile: Tensor) -> Tensor:
    """Upper bounds of ‖Δ_j‖ [e, n]; the one of a class that is fixed beforehand fails with the quantile's probability.

    Without rounding ‖Δ_j‖² is the known part plus S_j / quantile at most. The vector of the products of class j with the basis
    may be off by slack_j in norm, the one with the probes by √count · slack_j, and a difference of two classes by the sum of
    both: the triangle inequality adds them to the norms of the two vectors.

    Args:
        known: The squared norm of the known part of Δ_j, [e, n].
        sums: S_j, the sum of the squares of the products of Δ_j with the probes, [e, n].
        slack: The rounding error of the products of g_j, [e, n].
        predicted: The predicted classes, int64 [e].
        count: How many probes have been drawn.
        quantile: The lower quantile of χ²_count, [e, 1].
    """
    both = slack + slack.gather(1, predicted.unsqueeze(1))
    return ((known.sqrt() + both).square() + (sums.sqrt() + math.sqrt(count) * both).square() / quantile).sqrt()
