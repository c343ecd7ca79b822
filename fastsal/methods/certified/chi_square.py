"""What random probes prove: quantiles of the chi-square distribution, schedules of rounds, and what a round leaves over."""

import functools
import math

import torch
from torch import Tensor

from fastsal.devices import to_device

# The cumulative counts of probes at which a round may end, three an octave: examples that began apart share later rounds.
COUNTS = tuple(round(4 * 2 ** (k / 3)) for k in range(20))
# What share of the failure probability each round has, fixed before any probe is drawn.
SHARES = (0.27, 0.22, 0.18, 0.14, 0.11, 0.08)
FIRST = COUNTS[: 1 - len(SHARES)]  # where a first round may end
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
    """(cumulative count of probes, lower χ² quantile at the round's share of the failure probability), for all rounds.

    `first`, one of FIRST, is the count of the first round; the others end at the next counts.
    """
    rounds = zip(COUNTS[COUNTS.index(first) :], SHARES, strict=False)
    return [(count, chi_square_quantile(count, share * failure_probability)) for count, share in rounds]


def chi_square_exceeds(count: int, x: Tensor) -> Tensor:
    """Roughly P(χ²_count > x) for x >= 0, by Wilson and Hilferty. For planning: nothing is proven by it."""
    spread = 2 / (9 * count)
    return 0.5 - torch.erf(((x / count) ** (1 / 3) + (spread - 1)) / math.sqrt(2 * spread)) / 2


class LeftOver:
    """How many classes a first round of probes leaves without a sufficient bound, for several counts. For planning.

    A class is left over where S_j / quantile is more than there is room for. The chance of that depends on the room alone, in
    units of the squared norm that the probes look at, so that classes are sorted into bins by it.
    """

    LOW, HIGH, BINS = -8.0, 24.0, 512  # of log2 of the room

    def __init__(self, counts: tuple[int, ...], failure_probability: float, device: torch.device) -> None:
        """For first rounds of `counts` probes each."""
        self.failure_probability = failure_probability
        self._chances = to_device(_chances(counts, failure_probability), device)

    def expected(self, room: Tensor) -> Tensor:
        """The expected number [e, len(counts)] of classes left over, for room [e, n]: below 0 or NaN is none, +inf is ample."""
        place = (room.nan_to_num(0.0, posinf=math.inf).log2() - self.LOW) * (self.BINS / (self.HIGH - self.LOW))
        place = place.nan_to_num(0.0, posinf=math.inf).clamp(0, self.BINS - 1).long()
        many = self._chances.new_zeros(len(room), self.BINS).scatter_add_(1, place, torch.ones_like(room))
        return many @ self._chances


@functools.lru_cache(maxsize=64)
def _chances(counts: tuple[int, ...], failure_probability: float) -> Tensor:
    """The chance [BINS, len(counts)] that a class is left over, for the middle of each bin; the last bin has room for all."""
    step = (LeftOver.HIGH - LeftOver.LOW) / LeftOver.BINS
    room = 2 ** (LeftOver.LOW + step * (torch.arange(LeftOver.BINS, dtype=torch.float64) + 0.5))
    room[-1] = math.inf
    quantiles = (schedule(count, failure_probability)[0][1] for count in counts)
    columns = [chi_square_exceeds(count, room * q) for count, q in zip(counts, quantiles, strict=True)]
    return torch.stack(columns, 1)
