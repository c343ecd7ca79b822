"""What probes prove: quantiles of the chi-square distribution, schedules of rounds, and upper bounds of norms."""

import functools
import math

import torch
from torch import Tensor

ROUNDS = ((1.0, 0.4), (1.4, 0.3), (2.0, 0.2), (3.0, 0.1))  # (count relative to the first round, share of δ)


@functools.lru_cache(maxsize=4096)
def chi_square_quantile(count: int, probability: float) -> float:
    """The x with P(χ²_count ≤ x) = probability, from below: bisection on log x in float64.

    The cumulative distribution is gammainc(count/2, x/2), whose float64 error is relative down to the smallest numbers.
    """
    half = torch.tensor(count / 2, dtype=torch.float64)
    low, high = -1400.0 / count - 50.0, math.log(count) + 8.0
    for _ in range(64):
        middle = (low + high) / 2
        below = (
            torch.special.gammainc(half, torch.tensor(math.exp(middle) / 2, dtype=torch.float64)).item() <= probability
        )
        low, high = (middle, high) if below else (low, middle)
    return math.exp(low)


def schedule(first: int, delta: float, n: int) -> list[tuple[int, float]]:
    """(cumulative probe count, lower χ² quantile at the round's share of δ for each of n − 1 classes), for all rounds."""
    return [
        (count := round(first * factor), chi_square_quantile(count, share * delta / (n - 1)))
        for factor, share in ROUNDS
    ]


def upper_norms(
    known: Tensor, sums: Tensor, size: Tensor, predicted: Tensor, count: int, quantile: float, eta: float
) -> Tensor:
    """Upper bounds of ‖Δ_j‖ [e, n] that hold together, each but for its share of δ.

    known, sums: the squared known part of Δ_j and S_j; size: an estimate of ‖g_j‖, of which η is the rounding error of a
    direction's JVP; predicted int64 [e]. By the triangle inequality over the vector of all JVPs.
    """
    slack = eta * (size + size.gather(1, predicted.unsqueeze(1)))
    return ((known.sqrt() + slack).square() + (sums.sqrt() + math.sqrt(count) * slack).square() / quantile).sqrt()
