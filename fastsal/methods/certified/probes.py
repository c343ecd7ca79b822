"""The random directions of a certificate: the pilot probes, and the probes that have been drawn."""

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import take
from fastsal.methods.certified.basis import PILOT_PROBES, Basis
from fastsal.methods.certified.state import State, write
from fastsal.methods.mixtures import stream


class Normals:
    """The standard normal vectors [D] that a seed decides: the pilot probes, and as many probes as are asked for, in order."""

    def __init__(self, seed: int, dimension: int, device: torch.device) -> None:
        self.seed, self._dimension, self._device = seed, dimension, device
        self.pilot_probes = self._next(stream(seed, "pilots"), PILOT_PROBES)
        self._generator, self._drawn = stream(seed, "probes"), 0
        self._probes = self.pilot_probes[:0]  # with room for more behind those that are drawn

    def _next(self, generator: np.random.Generator, count: int) -> Tensor:
        return torch.from_numpy(generator.standard_normal((count, self._dimension))).to(self._device)

    def probes(self, count: int) -> Tensor:
        """The first `count` probes, float64 [count, D]: the same whatever was asked for before."""
        if count > self._drawn:
            more = self._next(self._generator, count - self._drawn)
            self._probes = write(self._probes.unsqueeze(0), np.arange(1), self._drawn, more.unsqueeze(0))[0]
            self._drawn = count
        return self._probes[:count]


class Probes:
    """The probes that a group has drawn, each projected off the basis of its example.

    Attributes:
        drawn: How many probes each example has drawn, int64 [E], on the host.
        products: J times the projected probes, [E, s, n].
        coefficients: The probes' components in the basis, [E, s, r].
    """

    def __init__(self, state: State, normals: Normals) -> None:
        self._state, self._normals = state, normals
        self.drawn = np.zeros(len(state.examples), np.int64)
        self.products = state.margin.new_zeros(len(state.examples), 0, state.n)
        self.coefficients = self.products

    def start(self, basis: Basis) -> None:
        """From here on the basis stays as it is."""
        self.coefficients = self.products.new_zeros(len(self.drawn), 0, basis.rank)

    def draw(self, e: np.ndarray, basis: Basis, done: int, count: int) -> Tensor:
        """The products [e, count − done, n] of examples e, which have drawn `done` probes, with those up to `count`."""
        part, directions = self._normals.probes(count)[done:], take(basis.directions, e)
        coefficients = part @ directions.mT
        projected = torch.baddbmm(part.expand(len(e), -1, -1), coefficients, directions, alpha=-1)
        values = self._state.products(e, projected)
        self.products = write(self.products, e, done, values)
        self.coefficients = write(self.coefficients, e, done, coefficients)
        self.drawn[e] = count
        return values

    def along(self, e: np.ndarray, rows: Tensor, inside: Tensor) -> Tensor:
        """What the products of rows [e, c, D] with all probes drawn should be, [e, c, s]; `inside` are their components."""
        s = int(self.drawn.max())
        return rows @ self._normals.probes(s).T - inside @ take(self.coefficients[:, :s], e).mT
