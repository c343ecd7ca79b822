"""How far products may be off, and whether they are: what is fixed before a probe is drawn, and what is compared afterwards."""

import math
import warnings

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import take, to_host
from fastsal.methods.certified.basis import PILOT_PROBES, Basis
from fastsal.methods.certified.probes import Probes, stream
from fastsal.methods.certified.state import State

SPARE = 8.0  # η in units of the largest disagreement that was seen
UNSTABLE = 0.3  # η from which on bounds say nothing


class Rounding:
    """The rounding of a group's products, for each example; docs/certified.md, "Rounding", says what it proves.

    Attributes:
        eta: η, how far a product may be off relative to the size of a gradient, [E].
        typical: About the root mean square of all ‖g_j‖, [E].
        inconsistent: The classes whose products disagree among themselves, bool [E, n]; they get no bound.
    """

    def __init__(self, state: State, basis: Basis, probes: Probes) -> None:
        self._state, self._basis, self._probes = state, basis, probes
        self.typical = torch.zeros_like(state.unit)
        self.eta = torch.full_like(self.typical, SPARE * torch.finfo(state.passes.logits.dtype).eps)
        self.inconsistent = torch.zeros_like(state.seen)

    def sizes(self, e: np.ndarray) -> Tensor:
        """About ‖g_j‖ of every class [e, n], from the basis and the pilot probes."""
        basis = self._basis
        return (take(basis.components, e).square().sum(1) + take(basis.residual, e).square().mean(1)).sqrt()

    def measure(self, e: np.ndarray) -> None:
        """Sets the typical size of a gradient of examples e."""
        self.typical[self._state.on_device(e)] = self.sizes(e).square().mean(1).sqrt()

    def slack(self, e: np.ndarray, size: Tensor) -> Tensor:
        """How far the products of every class may be off [e, n], from about ‖g_j‖ [e, n]."""
        return take(self.eta, e).unsqueeze(1) * torch.maximum(size, take(self.typical, e).unsqueeze(1))

    def trust(self, e: np.ndarray) -> np.ndarray:
        """Sets η of examples e by the early rows, and tells for which of them JVPs can be used at all, [e]."""
        if not len(e):
            return np.zeros(0, bool)
        state = self._state
        seen = self.disagreement(e, take(state.early, e), take(state.early_rows, e))
        self.eta[state.on_device(e)] = torch.maximum(take(self.eta, e), SPARE * seen)
        seen, eta = to_host(seen, take(self.eta, e))
        unstable = eta > UNSTABLE
        if unstable.any():
            warnings.warn(
                f"model: {unstable.sum()} of {len(e)} examples have gradients that differ by up to "
                f"{seen[unstable].max():.1e} of themselves between a backward and a forward-mode pass; they are finished with "
                "exact rows",
                stacklevel=2,
            )
        trusted: np.ndarray = ~unstable & ~np.isnan(seen)
        return trusted

    def compare(self, e: np.ndarray, seed: int) -> None:
        """Compares one JVP along a random combination of all directions so far with the combination of their products."""
        if not len(e):
            return
        state, basis = self._state, self._basis
        normal = stream(seed, "combination").standard_normal((1, basis.rank + PILOT_PROBES))
        mixture = state.on_device(normal / np.linalg.norm(normal))
        inside, outside = mixture[:, : basis.rank], mixture[:, basis.rank :] / math.sqrt(state.passes.dimension)
        products = state.products(e, inside @ take(basis.directions, e) + outside @ basis.pilot_probes)
        expected = inside @ take(basis.components, e) + outside @ take(basis.pilot_products, e)
        apart = (products - expected).squeeze(1).abs()
        self.inconsistent[state.on_device(e)] = apart > self.slack(e, self.sizes(e))

    def check(self, e: np.ndarray, classes: Tensor, rows: Tensor) -> None:
        """Takes their bounds from the examples whose rows [e, c, D] disagree with their JVPs by more than η, or hold a NaN.

        Every class of such an example is to be seen.
        """
        state, drawn = self._state, self._probes.drawn
        if drawn.any():
            good = self.disagreement(e, classes, rows) <= take(self.eta, e)
            good |= state.on_device(drawn[e] == 0)
            state.lower[state.on_device(e)] = torch.where(good.unsqueeze(1), take(state.lower, e), 0.0)

    def disagreement(self, e: np.ndarray, classes: Tensor, rows: Tensor) -> Tensor:
        """How far rows [e, c, D] are from the JVPs of their classes, in the units of η: [e], the largest over the classes.

        The larger of two figures: the norm over the basis, and the root mean square over the pilot probes and the probes;
        relative to the norm of the row, or to the typical one where that is larger.
        """
        state, basis, probes = self._state, self._basis, self._probes
        rows = state.per_unit(e, state.norm.rows(e, rows))
        inside = rows @ take(basis.directions, e).mT
        pick = classes.unsqueeze(1)

        def gap(got: Tensor, values: Tensor) -> Tensor:
            return (got - take(values, e).gather(2, pick.expand(-1, values.shape[1], -1)).mT).square()

        outside = gap(rows @ basis.pilot_probes.T, basis.pilot_products).sum(2)
        drawn = state.on_device(probes.drawn[e]).unsqueeze(1)
        if s := int(probes.drawn.max()):
            along = gap(probes.along(e, rows, inside), probes.products[:, :s])
            within = torch.arange(s, device=state.device) < drawn.unsqueeze(2)
            outside += torch.where(within, along, 0.0).sum(2)
        square = torch.maximum(gap(inside, basis.components).sum(2), outside / (PILOT_PROBES + drawn))
        size = torch.maximum(torch.linalg.vector_norm(rows, dim=2), take(self.typical, e).unsqueeze(1))
        return torch.where(square == 0, 0.0, square.sqrt() / size).amax(1)
