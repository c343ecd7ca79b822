"""Upper bounds of the norms of gradients, from what a basis and probes show of them; docs/certified.md has the proofs."""

import math
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import take, to_device, to_host
from fastsal.tensor import ops


def widened(known: Tensor, rest: Tensor, gain: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Upper bounds of the squared norms of the known part of Δ_j and of the rest, if products are off by `error`: [e, n] each.

    That is in norm in the basis, and in the root mean square along all pilot probes and probes; docs/certified.md, "Rounding".

    Args:
        known: The squared norm of the components of Δ_j, [e, n].
        rest: S_j / x, by its products with the probes and the quantile x, [e, n].
        gain: √(number of pilot probes and probes / x), what an error along probes is multiplied with, [e, n].
        error: Euclidean, [e, n].
    """
    return (known.sqrt() + error).square(), (rest.sqrt() + gain * error).square()


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

    def tolerance(
        self, e: np.ndarray, known: Tensor, rest: Tensor, gain: Tensor, limit: Tensor, most: Tensor
    ) -> Tensor:
        """The largest `error`, up to `most`, for which `upper` of what `widened` gives is no more than a limit, [e, n].

        Below 0 or NaN where there is none. Here a root of a quadratic equation, written so that nothing cancels.
        """
        length, out = known.sqrt(), rest.sqrt()
        room, half = limit.square() - known - rest, length + gain * out
        root = (half.square() + (1 + gain.square()) * room).clamp(min=0.0).sqrt()
        return torch.where(limit == math.inf, most, torch.minimum(room / (half + root), most))

    def expected(self, e: np.ndarray, known: Tensor, rest: Tensor) -> Tensor:
        """What `upper` will say."""
        return (known + rest).sqrt()

    def likely(self, e: np.ndarray, known: Tensor, rest: Tensor) -> Tensor:
        """About ‖Δ_j‖_q itself."""
        return (known + rest).sqrt()

    def allowance(self, e: np.ndarray, known: Tensor, limit: Tensor) -> Tensor:
        """The largest `rest` for which `expected` is no more than a limit; below 0 where there is none."""
        return limit.square() - known


class Summed(Euclidean):
    """The 1-norm, q = 1, through weights w > 0 with Σ w² = D.

    With Δ/w = k + r, ⟨k, r⟩ = 0, θ the angle between Δ/w and k, and cos φ = ‖wk‖_1 / (√D ‖k‖_2),

        ‖Δ‖_1 ≤ √D ‖Δ/w‖_2 cos(max(0, φ − θ)),

    which falls with none of ‖wk‖_1, ‖k‖_2 and ‖r‖_2, so that upper bounds may stand for them (docs/certified.md, "The 1-norm").
    It holds whatever w is, if w is fixed before a probe is drawn, and is least where w² is proportional to the absolute entries
    of r. These are like those of the Δ_j which are known first, and their mean, with a floor, is what `fit` takes.
    """

    MEASURES = True
    AT_ONCE = 4  # `likely` is a guess
    FLOOR = 0.2  # of w², in units of its mean: a coordinate that matters to no early class may matter to another
    TILE = 1 << 22  # entries of known parts at a time
    HALVINGS = 20  # in the search for a tolerance

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
        return rows.double() / take(self._weights, e).unsqueeze(1)

    def directions(self, e: np.ndarray, directions: Tensor) -> Tensor:
        return directions / take(self._weights, e).unsqueeze(1)

    def measure(self, e: np.ndarray, classes: Tensor, components: Tensor, basis: Tensor) -> bool:
        new = to_host(classes & (take(self._sums, e) == math.inf))[0]
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
        sums = take(self._sums, e)
        cosine = torch.where(sums < math.inf, sums / (self._root * known.sqrt()), take(self._typical, e))
        return cosine.nan_to_num(1.0).clamp(max=1 - 1e-9)

    def upper(self, e: np.ndarray, known: Tensor, rest: Tensor, slack: Tensor) -> Tensor:
        return self._bound(
            known, rest, (take(self._sums, e) + self._root * slack) / (self._root * known.sqrt()) + 2.0**-40
        )

    def tolerance(
        self, e: np.ndarray, known: Tensor, rest: Tensor, gain: Tensor, limit: Tensor, most: Tensor
    ) -> Tensor:
        def fits(error: Tensor) -> Tensor:
            return self.upper(e, *widened(known, rest, gain, error), error) <= limit

        # `upper` is at least √D times the error.
        low, high = torch.zeros_like(most), torch.minimum(limit / self._root, most)
        low, none = torch.where(fits(high), high, low), ~fits(low)
        if to_host(((low < high) & ~none).any())[0]:
            for _ in range(self.HALVINGS):
                middle = (low + high) / 2
                fit = fits(middle)
                low, high = torch.where(fit, middle, low), torch.where(fit, high, middle)
        return torch.where(none, -1.0, low)

    def expected(self, e: np.ndarray, known: Tensor, rest: Tensor) -> Tensor:
        return self._bound(known, rest, self._cosine(e, known))

    def likely(self, e: np.ndarray, known: Tensor, rest: Tensor) -> Tensor:
        return self._root * take(self._typical, e) * (known + rest).sqrt()

    def allowance(self, e: np.ndarray, known: Tensor, limit: Tensor) -> Tensor:
        cosine, length, limit = self._cosine(e, known), known.sqrt(), limit / self._root
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        straight = (limit - cosine * length) / sine
        return torch.where(straight * cosine < length * sine, straight * straight.abs(), limit.square() - known)


NORM_BOUNDS = {2.0: Euclidean, math.inf: Summed}  # by the p of the perturbation
