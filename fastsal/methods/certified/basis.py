"""The basis of a certificate: directions in which every Δ_j is known, and what pilot probes see outside it."""

import math

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import put, take
from fastsal.methods.certified.state import TOP, State, write

PILOT_PROBES = 2
# Range finder directions a step, PILOT_PROBES of them from the pilot probes: a pass fewer than with 4, and fewer steps.
BLOCK = 6
CAPACITY = TOP + 1 + 2 * BLOCK  # for directions, to begin with
# Pilot probes that have chosen directions see too little outside the basis: 0.5 to 1 times what there is.
UNDERESTIMATE = 1.3
PRIOR = 4.0  # the average over classes counts as this many pilot probes in the estimate for one class
DEPENDENT = 1e-4  # what is left of a row that the basis spans is rounding: no direction worth a JVP
NEWTON = 4  # steps
# Of the diagonal of a Gram matrix, which is positive definite then: of six dependent rows of four million entries rounding made
# the least eigenvalue -5.5e-14.
LIFT = 1e-12


class Basis:
    """Orthonormal directions for every example of a group, and J times them.

    Attributes:
        rank: How many directions there are; an example that has fewer has zeros.
        pilot_probes: The pilot probes, float64 [PILOT_PROBES, D].
        pilot_products: J times the pilot probes, [E, PILOT_PROBES, n].
        residual: J times their parts outside the basis, [E, PILOT_PROBES, n].
        known: The squared norms of the parts of every Δ_j in the basis, [E, n].
        squares: Those of the parts of the g_j themselves, [E, n].
    """

    def __init__(self, state: State, pilot_probes: Tensor) -> None:
        self._state, self.pilot_probes = state, pilot_probes
        E, margin = len(state.examples), state.margin
        self.rank, self._widened = 0, False
        self._directions = margin.new_empty(E, CAPACITY, state.passes.dimension)
        self._components = margin.new_empty(E, CAPACITY, state.n)
        self.pilot_products = margin.new_zeros(E, PILOT_PROBES, state.n)
        self.residual = margin.new_zeros(E, PILOT_PROBES, state.n)
        self.known, self.squares = margin.new_zeros(2, E, state.n)

    @property
    def directions(self) -> Tensor:
        """The orthonormal directions of every example, [E, r, D]."""
        return self._directions[:, : self.rank]

    @property
    def components(self) -> Tensor:
        """J times the directions, [E, r, n]."""
        return self._components[:, : self.rank]

    def start(self, e: np.ndarray, rows: Tensor) -> None:
        """Takes the pilot probes' products, and begins the basis of examples e with rows [e, c, D]."""
        directions = self._new_directions(e, rows)
        products = self._state.products(e, torch.cat((self.pilot_probes.expand(len(e), -1, -1), directions), 1))
        put(self.pilot_products, e, products[:, :PILOT_PROBES])
        self.residual.copy_(self.pilot_products)
        self._add(e, directions, products[:, PILOT_PROBES:])

    def span(self, e: np.ndarray, rows: Tensor) -> None:
        """Adds rows [e, c, D] to the basis of examples e, orthonormalised, and takes the JVPs."""
        directions = self._new_directions(e, rows)
        self._add(e, directions, self._state.products(e, directions))

    def _new_directions(self, e: np.ndarray, rows: Tensor) -> Tensor:
        """Orthonormal directions [e, c, D] of what rows [e, c, D] add to the basis; 0 where one adds nothing, or is not finite.

        By Cholesky's factor of the rows' Gram matrix, which leaves what is not dependent at right angles up to about LIFT /
        DEPENDENT² = 1e-4, and Newton steps towards the nearest orthonormal directions, each of which squares that.
        """
        basis = take(self.directions, e)
        rows = self._state.in_units(e, rows)
        length = torch.linalg.vector_norm(rows, dim=2, keepdim=True)
        rows /= torch.where(length > 0, length, math.inf)
        rows.nan_to_num_(0.0, 0.0, 0.0)
        rows.baddbmm_(rows @ basis.mT, basis, alpha=-1)
        one = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        factor, failed = torch.linalg.cholesky_ex(torch.baddbmm(one, rows, rows.mT, beta=LIFT))
        factor = torch.where(failed.view(-1, 1, 1) == 0, factor, DEPENDENT * one)
        kept = (factor.diagonal(dim1=1, dim2=2) > DEPENDENT).unsqueeze(1)
        rows = torch.linalg.solve_triangular(factor, rows, upper=False)
        gram = rows @ rows.mT
        change = torch.where(kept & kept.mT, one, 0.0)
        for _ in range(NEWTON):
            change = torch.baddbmm(one, change @ gram, change.mT, beta=1.5, alpha=-0.5) @ change
        rows = change @ rows
        # Off the basis again, for what rounding had left has grown with the rows.
        return rows.baddbmm_(rows @ basis.mT, basis, alpha=-1)

    def _add(self, e: np.ndarray, directions: Tensor, products: Tensor) -> None:
        self._directions = write(self._directions, e, self.rank, directions)
        self._components = write(self._components, e, self.rank, products)
        put(self.residual, e, take(self.residual, e) - (self.pilot_probes @ directions.mT) @ products)
        put(self.known, e, take(self.known, e) + self._state.differences(e, products).square().sum(1))
        put(self.squares, e, take(self.squares, e) + products.square().sum(1))
        self.rank += directions.shape[1]

    def parts(self, e: np.ndarray) -> tuple[Tensor, Tensor]:
        """The squared norms of the parts of every Δ_j in the basis and outside it, [e, n]; the second one is an estimate."""
        state = self._state
        energy = state.differences(e, take(self.residual, e)).square().sum(1)
        mean = (energy + PRIOR * state.average(e, energy / PILOT_PROBES).unsqueeze(1)) / (PRIOR + PILOT_PROBES)
        return take(self.known, e), UNDERESTIMATE * mean if self._widened else mean

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
