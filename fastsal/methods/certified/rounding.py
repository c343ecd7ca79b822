"""How far products may be off, and whether they are: what is fixed before a probe is drawn, and what is compared afterwards."""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import put, take, to_host
from fastsal.methods.certified.basis import PILOT_PROBES, Basis
from fastsal.methods.certified.probes import Probes
from fastsal.methods.certified.state import State
from fastsal.methods.mixtures import mixture

SPARE = 8.0  # η in units of the largest disagreement that was seen
UNSTABLE = 0.3  # η from which on bounds say nothing
STRICT = 4.0  # the least error that the check is to see, in units of what it sees if all classes count the same


class Rounding:
    """The rounding of a group's products, for each example; docs/certified.md, "Rounding", says what it proves.

    Attributes:
        eta: η, how far a product may be off relative to the size of a gradient, [E].
        typical: About the root mean square of all ‖g_j‖, [E].
        own: ‖g_{i*}‖, [E].
        disagreement: By how much rows and products disagree where that is too much, [E]; else 0.
    """

    def __init__(self, state: State, basis: Basis, probes: Probes, seed: int) -> None:
        self._state, self._basis, self._probes = state, basis, probes
        self.typical = torch.zeros_like(state.unit)
        self.eta = torch.full_like(self.typical, SPARE * torch.finfo(state.passes.logits.dtype).eps)
        self.own = torch.zeros_like(state.unit)
        self.disagreement = torch.zeros_like(state.unit)
        self._weights = mixture(state.n, seed, state.device)

    def sizes(self, e: np.ndarray) -> Tensor:
        """About ‖g_j‖ of every class [e, n], from the basis and the pilot probes."""
        basis = self._basis
        return (take(basis.squares, e) + take(basis.residual, e).square().mean(1)).sqrt()

    def measure(self, e: np.ndarray) -> None:
        """Sets the sizes of gradients of examples e: the typical one, and that of the predicted class."""
        state = self._state
        put(self.typical, e, self.sizes(e).square().mean(1).sqrt())
        row = state.in_units(e, take(state.early_rows, e)[:, :1])
        put(self.own, e, torch.linalg.vector_norm(row, dim=2).squeeze(1))

    def trust(self, e: np.ndarray) -> np.ndarray:
        """Sets η of examples e by the early rows, and tells for which of them JVPs can be used at all, [e]."""
        if not len(e):
            return np.zeros(0, bool)
        state = self._state
        seen = self.row_gap(e, take(state.early, e), take(state.early_rows, e))
        put(self.eta, e, torch.maximum(take(self.eta, e), SPARE * seen))
        trusted = take(self.eta, e) <= UNSTABLE
        self._note(e, ~trusted, seen)
        usable: np.ndarray = to_host(trusted)[0] > 0
        return usable

    def errors(self, e: np.ndarray) -> tuple[Tensor, Tensor]:
        """How far rounding lets the products of each class be off at most, [e, n], and those of the predicted class, [e, 1]."""
        eta, own, typical = (take(value, e).unsqueeze(1) for value in (self.eta, self.own, self.typical))
        return eta * torch.maximum(self.sizes(e), typical), eta * torch.maximum(own, typical)

    def _mixed(self, e: np.ndarray, honest: Tensor) -> Tensor:
        """The errors [e, n] of honest classes, with what the sum over n classes in a mixture adds; 16 bits are summed in 32."""
        unit = torch.finfo(torch.promote_types(self._state.passes.logits.dtype, torch.float32)).eps
        return honest * (1 + unit * math.sqrt(self._state.n) / take(self.eta, e).unsqueeze(1))

    def check(self, e: np.ndarray, seen: Tensor) -> None:
        """Takes their bounds from the examples whose rows and products disagree by `seen` [e], if that is more than η or NaN.

        Every class of such an example is to be seen.
        """
        state = self._state
        bad = ~(seen <= take(self.eta, e)) & state.on_device(self._probes.drawn[e] > 0)
        put(state.lower, e, take(state.lower, e).masked_fill(bad.unsqueeze(1), 0.0))
        self._note(e, bad, seen)

    def _note(self, e: np.ndarray, bad: Tensor, seen: Tensor) -> None:
        worst = torch.maximum(take(self.disagreement, e), seen.nan_to_num(math.inf))
        put(self.disagreement, e, torch.where(bad, worst, take(self.disagreement, e)))

    def tolerances(self, e: np.ndarray, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How far the products of each class may be off if its ratio is to be no less than `target` [e], and what shows more.

        Returns:
            The tolerances, [e, n], +inf for the classes that are settled; their shares of a mixture, [e, n]: the weight times
            what an honest class is off by, over the tolerance, squared; and the mixture that each belongs to, int64 [e, n].
            A share above 1/2 (or NaN) means that rounding hides whether a class keeps its tolerance. The other shares in a
            mixture add up to 1 at most. It may be off by their root, or 1/2 if that is less: so an error of any one class that
            is above the tolerance shows, though that of the others be as large as is let pass.
        """
        state, probes = self._state, self._probes
        unseen, (honest, own) = ~take(state.seen, e), self.errors(e)
        honest = self._mixed(e, honest)
        weights = torch.where(unseen, self._weights, 0.0)
        # No class needs to tolerate more: if all did, their shares would add up to 1 / STRICT².
        most = STRICT * honest * torch.linalg.vector_norm(weights, dim=1, keepdim=True)
        gain = ((state.on_device(probes.drawn[e]) + PILOT_PROBES).unsqueeze(1) / take(state.quantile, e)).sqrt()
        limit = take(state.margin, e) / (target * take(state.unit, e)).unsqueeze(1)
        limit = torch.where(
            target.unsqueeze(1) <= 0, math.inf, limit
        )  # none of these classes is at a negative distance
        tolerance = (
            state.norm.tolerance(e, take(self._basis.known, e), take(state.rest, e), gain, limit, most + own) - own
        )
        share = torch.where(tolerance > 0, (weights * honest / tolerance).square(), torch.where(unseen, math.inf, 0.0))
        half = share.clamp(max=0.5)
        mixture = torch.where(unseen, 2 * (half.cumsum(1) - half), 0.0).long()
        return torch.where(unseen, tolerance, math.inf), share, mixture

    def verify(self, e: np.ndarray, tolerance: Tensor, mixture: Tensor, number: np.ndarray) -> None:
        """Compares mixtures of the rows that were not evaluated with the same mixtures of the products, over all directions.

        Each class weighs a random number over its tolerance; one that is off by more shows. There are `number` mixtures, [e].
        """
        dtype = self._state.passes.logits.dtype
        for which in range(number.max(initial=0)):
            some = np.flatnonzero(number > which)
            tolerances, here = take(tolerance, some), take(mixture, some) == which
            here &= tolerances < math.inf
            weights = torch.where(here, self._weights / tolerances, 0.0)
            # No cotangent is below 1, so that what overflows for a class alone does here, but none overflows of itself.
            largest = torch.where(here, tolerances, 0.0).amax(1, keepdim=True)
            unit = largest.clamp(max=4 * math.sqrt(torch.finfo(dtype).max) / weights.abs().amax(1, keepdim=True))
            self._compare_mixture(e[some], (weights * unit).unsqueeze(1).to(dtype), unit / 2)

    def _compare_mixture(self, e: np.ndarray, cotangents: Tensor, most: Tensor) -> None:
        """Lets a mixture be off by what rounding does to its classes, or by `most` [e, 1] if that is less."""
        rounding = (cotangents.squeeze(1) * self._mixed(e, self.errors(e)[0])).square().sum(1, keepdim=True).sqrt()
        rows = self._state.in_units(e, self._state.mixtures(e, cotangents))
        size = torch.minimum(rounding, most) / take(self.eta, e).unsqueeze(1)
        self.check(e, self._gap(e, rows, lambda values: cotangents.double() @ values.mT, size))

    def look(self, e: np.ndarray) -> None:
        """Lets the rows of examples e be taken where a mixture of those that were not evaluated is NaN."""
        state = self._state
        rows = state.mixtures(e, torch.where(take(state.seen, e), 0.0, self._weights).unsqueeze(1))
        put(state.lower, e, take(state.lower, e).masked_fill(rows.isnan().any(2), math.nan))

    def row_gap(self, e: np.ndarray, classes: Tensor, rows: Tensor) -> Tensor:
        """How far rows [e, c, D] are from the JVPs of their classes, in the units of η: [e], the largest over the classes."""
        pick, rows = classes.unsqueeze(1), self._state.in_units(e, rows)
        size = torch.maximum(torch.linalg.vector_norm(rows, dim=2), take(self.typical, e).unsqueeze(1))
        return self._gap(e, rows, lambda values: values.gather(2, pick.expand(-1, values.shape[1], -1)).mT, size)

    def _gap(self, e: np.ndarray, rows: Tensor, expected: Callable[[Tensor], Tensor], size: Tensor) -> Tensor:
        """How far rows [e, c, D] in units are from what products [e, k, n] make of them, [e, c, k], over `size` [e, c].

        The larger of two figures: the norm over the basis, and the root mean square over the pilot probes and the probes; of
        these, the largest over the rows, [e].
        """
        state, basis, probes = self._state, self._basis, self._probes
        inside = rows @ take(basis.directions, e).mT

        def square(got: Tensor, values: Tensor) -> Tensor:
            return (got - expected(take(values, e))).square()

        outside = square(rows @ basis.pilot_probes.T, basis.pilot_products).sum(2)
        drawn = state.on_device(probes.drawn[e]).unsqueeze(1)
        if s := int(probes.drawn.max()):
            along = square(probes.along(e, rows, inside), probes.products[:, :s])
            within = torch.arange(s, device=state.device) < drawn.unsqueeze(2)
            outside += torch.where(within, along, 0.0).sum(2)
        error = torch.maximum(square(inside, basis.components).sum(2), outside / (PILOT_PROBES + drawn))
        return torch.where(error == 0, 0.0, error.sqrt() / size).amax(1)
