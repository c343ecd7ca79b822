"""The basis of a certificate: directions in which every Δ_j is known, and what pilot probes see outside it."""

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import take
from fastsal.methods.certified.state import TOP, State, write

PILOT_PROBES = 2
# Range finder directions a step, PILOT_PROBES of them from the pilot probes: a pass fewer than with 4, and fewer steps.
BLOCK = 6
CAPACITY = TOP + 1 + 2 * BLOCK  # for directions, to begin with
# Pilot probes that have chosen directions see too little outside the basis: 0.5 to 1 times what there is.
UNDERESTIMATE = 1.3
PRIOR = 4.0  # the average over classes counts as this many pilot probes in the estimate for one class
DEPENDENT = 1e-4  # what is left of a row that the basis spans is rounding: no direction worth a JVP


class Basis:
    """Orthonormal directions for every example of a group, and J times them.

    Attributes:
        rank: How many directions there are; an example that has fewer has zeros.
        pilot_probes: The pilot probes, float64 [PILOT_PROBES, D].
        pilot_products: J times the pilot probes, [E, PILOT_PROBES, n].
        residual: J times their parts outside the basis, [E, PILOT_PROBES, n].
    """

    def __init__(self, state: State, pilot_probes: Tensor) -> None:
        self._state, self.pilot_probes = state, pilot_probes
        E, margin = len(state.examples), state.margin
        self.rank, self._widened = 0, False
        self._directions = margin.new_empty(E, CAPACITY, state.passes.dimension)
        self._components = margin.new_empty(E, CAPACITY, state.n)
        self.pilot_products = margin.new_zeros(E, PILOT_PROBES, state.n)
        self.residual = margin.new_zeros(E, PILOT_PROBES, state.n)

    @property
    def directions(self) -> Tensor:
        """The orthonormal directions of every example, [E, r, D]."""
        return self._directions[:, : self.rank]

    @property
    def components(self) -> Tensor:
        """J times the directions, [E, r, n]."""
        return self._components[:, : self.rank]

    def see(self, e: np.ndarray) -> None:
        """Takes the pilot probes' products."""
        self.pilot_products[self._state.on_device(e)] = self._state.products(
            e, self.pilot_probes.expand(len(e), -1, -1)
        )
        self.residual.copy_(self.pilot_products)

    def span(self, e: np.ndarray, rows: Tensor) -> None:
        """Adds rows [e, c, D] to the basis of examples e, orthonormalised, and takes the JVPs."""
        state, basis = self._state, take(self.directions, e)
        rows = state.in_units(e, rows)
        length = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
        rows /= torch.where(length > 0, length, 1.0)
        rows.baddbmm_(rows @ basis.mT, basis, alpha=-1)
        directions = torch.zeros_like(rows)
        for slot in range(rows.shape[1]):
            row, known = rows[:, slot : slot + 1], directions[:, :slot]
            kept = torch.ones_like(row[:, :, :1], dtype=torch.bool)
            for _ in range(2):  # twice is enough
                row = torch.baddbmm(row, row @ known.mT, known, alpha=-1)
                length = torch.linalg.vector_norm(row, dim=2, keepdim=True)
                kept &= length > DEPENDENT
                row = torch.where(kept, row / length, 0.0)
            directions[:, slot : slot + 1] = row
        # Again, for what rounding had left has grown with them.
        directions.baddbmm_(directions @ basis.mT, basis, alpha=-1)
        del rows, row, known  # the products want the room
        products = state.products(e, directions)
        self._directions = write(self._directions, e, self.rank, directions)
        self._components = write(self._components, e, self.rank, products)
        self.residual[state.on_device(e)] = take(self.residual, e) - (self.pilot_probes @ directions.mT) @ products
        self.rank += directions.shape[1]

    def parts(self, e: np.ndarray) -> tuple[Tensor, Tensor]:
        """The squared norms of the parts of every Δ_j in the basis and outside it, [e, n]; the second one is an estimate."""
        state = self._state
        energy = state.differences(e, take(self.residual, e)).square().sum(1)
        mean = (energy + PRIOR * state.average(e, energy / PILOT_PROBES).unsqueeze(1)) / (PRIOR + PILOT_PROBES)
        inside = state.differences(e, take(self.components, e)).square().sum(1)
        return inside, UNDERESTIMATE * mean if self._widened else mean

    def widen(self, e: np.ndarray) -> None:
        """Adds a step of a block Krylov range finder: rows of class mixtures, weighted towards small margins.

        The mixtures are the newest known components of the Δ_j, and what the pilot probes see outside the basis.
        """
        state = self._state
        newest = torch.cat((take(self.components, e)[:, PILOT_PROBES - BLOCK :], take(self.residual, e)), 1)
        mixture = state.weights(e).square().unsqueeze(1) * state.differences(e, newest)
        cotangents = -mixture
        own = take(state.prediction, e).view(-1, 1, 1).expand_as(mixture[:, :, :1])
        cotangents.scatter_(2, own, mixture.sum(2, keepdim=True))
        largest = cotangents.abs().amax(2, keepdim=True)
        self._widened = True
        self.span(e, state.mixtures(e, cotangents / torch.where(largest > 0, largest, 1.0)))
