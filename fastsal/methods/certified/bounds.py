"""What random probes prove: quantiles of the chi-square distribution, schedules of rounds, and upper bounds of norms."""

import functools
import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import of, to_device, to_host
from fastsal.tensor import ops

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


def widened(
    known: Tensor, sums: Tensor, slack: Tensor, predicted: Tensor, count: int, quantile: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Upper bounds of the squared Euclidean norms of the known part of Δ_j and of the rest, and the slack of Δ_j: [e, n] each.

    The second one, of a class that is fixed beforehand, fails with the quantile's probability. Without rounding these are the
    known part itself and S_j / quantile. The vector of the products of class j with the basis may be off by slack_j in norm,
    the one with the probes by √count · slack_j, and a difference of two classes by the sum of both: the triangle inequality
    adds them to the norms of the two vectors.

    Args:
        known: The squared norm of the known part of Δ_j, [e, n].
        sums: S_j, the sum of the squares of the products of Δ_j with the probes, [e, n].
        slack: The rounding error of the products of g_j, [e, n].
        predicted: The predicted classes, int64 [e].
        count: How many probes have been drawn.
        quantile: The lower quantile of χ²_count, [e, 1].
    """
    both = slack + slack.gather(1, predicted.unsqueeze(1))
    return (known.sqrt() + both).square(), (sums.sqrt() + math.sqrt(count) * both).square() / quantile, both


class Euclidean:
    """What a certificate has to know of the norm that the gradients Δ_j are measured in: here the 2-norm, q = 2.

    The certificate works with Δ_j / w, whose part in a basis ("known") and rest are at right angles; w = 1 here. `known` and
    `rest` are squared Euclidean norms of these two parts, [e, n] or what broadcasts to it, `e` int64 [e] the examples that they
    belong to, some of those of the batch. Only `upper` has a say in what is certified; the other figures are for planning.
    """

    MEASURES: ClassVar[bool] = False  # whether `upper` becomes sharper by `measure`
    AT_ONCE: ClassVar[int] = 64  # how many rows to take at once where `likely` says that all are needed

    def __init__(self, logits: Tensor, dimension: int, backend: str) -> None:
        """For a batch with logits [E, n], D = `dimension`, and the backend that measures rows."""

    def fit(self, rows: Tensor) -> None:
        """Chooses the weights w by the rows that are taken first: the predicted class's and a few others', [E, c, D]."""

    def rows(self, e: np.ndarray, rows: Tensor) -> Tensor:
        """Rows [e, c, D] divided by w, float64."""
        return rows.double()

    def directions(self, e: np.ndarray, directions: Tensor) -> Tensor:
        """The directions u [e, k, D] of the JVPs for which ⟨u, Δ_j⟩ is the product of Δ_j / w with the given ones."""
        return directions

    def measure(self, e: np.ndarray, classes: Tensor, components: Tensor, basis: Tensor) -> bool:
        """Measures what `upper` asks for of the known parts, for the classes marked in bool [e, n].

        Args:
            e: The examples.
            classes: Which Δ_j to look at.
            components: Their components in the basis, [e, r, n].
            basis: Its directions, [e, r, D].

        Returns:
            Whether anything was measured that had not been before.
        """
        return False

    def upper(self, e: np.ndarray, known: Tensor, rest: Tensor, slack: Tensor) -> Tensor:
        """An upper bound of ‖Δ_j‖_q [e, n], where `known` and `rest` are upper bounds.

        `slack` bounds the Euclidean norm of the error of the components that `measure` was given.
        """
        return (known + rest).sqrt()

    def expected(self, e: np.ndarray, known: Tensor, rest: Tensor) -> Tensor:
        """What `upper` will say."""
        return (known + rest).sqrt()

    def likely(self, e: np.ndarray, known: Tensor, rest: Tensor) -> Tensor:
        """About ‖Δ_j‖_q itself."""
        return (known + rest).sqrt()

    def room(self, e: np.ndarray, known: Tensor, limit: Tensor) -> Tensor:
        """The largest `rest` for which `expected` is no more than a limit; below 0 where there is none."""
        return limit.square() - known


class Summed(Euclidean):
    """The 1-norm, q = 1, through weights w > 0 with Σ w² = D.

    Theorem. Let Δ/w = k + r with ⟨k, r⟩ = 0, ρ = ‖Δ/w‖_2, θ the angle between Δ/w and k (tan θ = ‖r‖_2 / ‖k‖_2), and K = wk.
    With φ = arccos(‖K‖_1 / (√D ‖k‖_2)),

        ‖Δ‖_1 ≤ √D ρ cos(max(0, φ − θ)).

    Proof. With t the signs of Δ, ‖Δ‖_1 = ⟨t, Δ⟩ = ⟨wt, Δ/w⟩. The length of wt is √D, that of Δ/w is ρ. The cosine of the angle
    between wt and k is ⟨t, K⟩ / (√D ‖k‖_2) ≤ cos φ. So that angle is φ at least, and the one between wt and Δ/w is φ − θ at
    least (the triangle inequality of angles).

    Where φ > θ the bound is ‖K‖_1 + √D ‖r‖_2 sin φ: less by the factor sin φ, about 0.6 for entries that are spread like
    normal ones, than the triangle inequality would add for the rest. Otherwise it is Cauchy and Schwarz's √D ρ.

    As a function of ‖K‖_1, ‖k‖_2 and ‖r‖_2 the bound is the maximum of b + ‖r‖_2 √(D − b²/‖k‖²_2) over b ≤ ‖K‖_1 and
    b ≤ √D ‖k‖_2. It falls with none of the three, so that upper bounds may stand for them. Where the components of k are off by
    `slack` in norm, ‖K‖_1 is off by √D times that at most (Cauchy and Schwarz), which is added to it. The float64 products
    and sums of K err by far less than 2⁻⁴⁰ √D ‖k‖_2, which is added too.

    `upper` holds whatever w is, if w is fixed before a probe is drawn. The bound of the rest is least where w² is proportional
    to the rest's absolute entries. These are like those of the Δ_j which are known first, and their mean, with a floor, is
    what `fit` takes.
    """

    MEASURES = True
    AT_ONCE = 4  # `likely` is a guess
    FLOOR = 0.2  # of w², in units of its mean: a coordinate that matters to no early class may matter to another
    TILE = 1 << 22  # entries of known parts at a time

    def __init__(self, logits: Tensor, dimension: int, backend: str) -> None:
        self._backend, self._root = backend, math.sqrt(dimension)
        self._sums = torch.full_like(logits, math.inf, dtype=torch.float64)  # ‖K_j‖_1, +inf until it is measured
        self._typical = self._sums[:, :1]  # about cos φ
        self._weights = self._sums.new_ones(len(logits), dimension)

    def fit(self, rows: Tensor) -> None:
        size = (rows[:, :1].double() - rows[:, 1:].double()).abs()
        size /= size.mean((1, 2), keepdim=True)
        self._weights = self._fitting(size.mean(1))
        # What the weights that the others would give are worth to each: those that it shares in fit it too well.
        weights = self._fitting((size.sum(1, keepdim=True) - size) / (size.shape[1] - 1))
        cosine = size.sum(2) / (self._root * (size / weights).square().sum(2).sqrt())
        self._typical = cosine.mean(1, keepdim=True).nan_to_num(1.0)

    def _fitting(self, size: Tensor) -> Tensor:
        """The weights for gradients with absolute entries in proportion to `size`, along the last dimension."""
        mean = size.mean(-1, keepdim=True)
        square = self.FLOOR + (1 - self.FLOOR) * torch.where(mean > 0, size / mean, 1.0)
        return (square / square.mean(-1, keepdim=True)).sqrt()

    def rows(self, e: np.ndarray, rows: Tensor) -> Tensor:
        return rows.double() / of(self._weights, e).unsqueeze(1)

    def directions(self, e: np.ndarray, directions: Tensor) -> Tensor:
        return directions / of(self._weights, e).unsqueeze(1)

    def measure(self, e: np.ndarray, classes: Tensor, components: Tensor, basis: Tensor) -> bool:
        new = to_host(classes & (of(self._sums, e) == math.inf))[0]
        tile = max(1, self.TILE // basis.shape[2])
        for slot in np.flatnonzero(new.any(1)):
            example = e[slot]
            for some in to_device(new[slot].nonzero()[0], basis.device).split(tile):
                known = components[slot, :, some].T @ basis[slot]
                known *= self._weights[example]
                zero = torch.zeros_like(known[:1])
                self._sums[example, some] = ops.row_distances(zero, known.unsqueeze(0), math.inf, self._backend)[0]
        return bool(new.any())

    def _bound(self, known: Tensor, rest: Tensor, cosine: Tensor) -> Tensor:
        """√D ρ cos(max(0, φ − θ)), where cosine is cos φ, or above 1 where nothing is known of φ."""
        length, whole = known.sqrt(), (known + rest).sqrt()
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        return self._root * torch.where(cosine * whole < length, cosine * length + sine * rest.sqrt(), whole)

    def _cosine(self, e: np.ndarray, known: Tensor) -> Tensor:
        """cos φ where ‖K_j‖_1 has been measured, and elsewhere the early classes' typical one."""
        sums = of(self._sums, e)
        cosine = torch.where(sums < math.inf, sums / (self._root * known.sqrt()), of(self._typical, e))
        return cosine.nan_to_num(1.0).clamp(max=1 - 1e-9)

    def upper(self, e: np.ndarray, known: Tensor, rest: Tensor, slack: Tensor) -> Tensor:
        return self._bound(
            known, rest, (of(self._sums, e) + self._root * slack) / (self._root * known.sqrt()) + 2.0**-40
        )

    def expected(self, e: np.ndarray, known: Tensor, rest: Tensor) -> Tensor:
        return self._bound(known, rest, self._cosine(e, known))

    def likely(self, e: np.ndarray, known: Tensor, rest: Tensor) -> Tensor:
        return self._root * of(self._typical, e) * (known + rest).sqrt()

    def room(self, e: np.ndarray, known: Tensor, limit: Tensor) -> Tensor:
        cosine, length, limit = self._cosine(e, known), known.sqrt(), limit / self._root
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        straight = (limit - cosine * length) / sine
        return torch.where(straight * cosine < length * sine, straight * straight.abs(), limit.square() - known)


NORMS = {2.0: Euclidean, math.inf: Summed}  # by the p of the perturbation
