"""Jacobians that are no network's: passes over given matrices, and the kinds that a certificate is calibrated on."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import take
from fastsal.methods.certified.norms import Summed
from fastsal.tensor.reference import dual

MANY = 90  # classes: enough for probes to be worth while
D = 60


@dataclass
class Matrices:
    """The passes (fastsal.model.products) of given Jacobians [E, n, D] and logits [E, n]."""

    logits: Tensor
    jacobian: Tensor
    pairs: int = 256

    def __post_init__(self) -> None:
        self.dimension = self.jacobian.shape[2]

    def vjp(self, examples: np.ndarray, cotangents: Tensor) -> Tensor:
        return cotangents @ take(self.jacobian, examples)

    def jvp(self, examples: np.ndarray, directions: Tensor) -> Tensor:
        return directions.to(self.jacobian.dtype) @ take(self.jacobian, examples).mT

    def distrust(self) -> None:
        pass


def distances(logits: Tensor, jacobian: Tensor, norm: float = 2.0) -> Tensor:
    """m_j / ‖Δ_j‖_q of every class [E, n] in float64, +inf at the prediction, for perturbations in the norm p."""
    prediction = logits.argmax(1, keepdim=True)
    rows, scores = jacobian.double(), logits.double()
    own = rows.gather(1, prediction.unsqueeze(2).expand(-1, 1, rows.shape[2]))
    ratio = (scores.gather(1, prediction) - scores) / (own - rows).norm(dim=2, p=dual(norm))
    return ratio.scatter(1, prediction, math.inf)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def ordinary(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """A common part, singular values that fall slowly, bunched margins."""
    spectrum = torch.arange(1, D + 1, dtype=torch.float64) ** -0.5
    rows = (_normal(generator, examples, MANY, D) + 3 * _normal(generator, examples, 1, D)) * spectrum
    logits = _normal(generator, examples, MANY)
    logits[:, 0] += 8.0
    return logits, rows


def near_ties(generator: torch.Generator, examples: int, q: float = 2.0) -> tuple[Tensor, Tensor]:
    """Every ratio within a thousandth of the smallest: whichever bound fails is seen."""
    logits, rows = ordinary(generator, examples)
    offset = rows - rows[:, :1]
    target = (logits[:, :1] - logits) / (1 + 1e-3 * torch.rand(logits.shape, generator=generator, dtype=torch.float64))
    length = offset.norm(dim=2, keepdim=True, p=q)
    scaled = offset * torch.where(length > 0, target.unsqueeze(2) / length, 0.0)
    return logits, rows[:, :1] + scaled


def outside_the_basis(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """One class decides, by one part in a million, and its gradient is orthogonal to all others: its bound alone is tested."""
    rows = 0.02 * _normal(generator, examples, MANY, D)
    logits = -10 + 0.1 * _normal(generator, examples, MANY)
    logits[:, 0], logits[:, 1], logits[:, -1] = 0.0, -1.0, -12.0
    direction = _normal(generator, examples, 2, D)
    direction = direction / direction.norm(dim=2, keepdim=True)
    rows[:, 1] = rows[:, 0] + direction[:, 0]  # ratio 1, among those that are evaluated first
    others = torch.cat((rows[:, :-1], direction[:, :1]), 1)
    basis = torch.linalg.qr(others.mT[:, :, : D // 3]).Q  # orthogonal to as many as leave dimensions
    orthogonal = direction[:, 1] - (basis @ (basis.mT @ direction[:, 1].unsqueeze(2))).squeeze(2)
    orthogonal = orthogonal / orthogonal.norm(dim=1, keepdim=True)
    rows[:, -1] = rows[:, 0] + orthogonal * 12.0 * (1 + 1e-6)  # ratio 1 - 1e-6
    return logits, rows


def heavy_tails(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """Entries of a Student distribution with two degrees of freedom: a few of them hold most of a row."""
    logits, rows = ordinary(generator, examples)
    return logits, rows / (
        _normal(generator, examples, MANY, D).square() + _normal(generator, examples, MANY, D).square()
    ).sqrt()


def falling_spectrum(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """Singular values that fall as 1/k: a few directions hold nearly all."""
    logits, rows = ordinary(generator, examples)
    return logits, rows * torch.arange(1, D + 1, dtype=torch.float64) ** -0.5


def nothing_known(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """The predicted class has no gradient and the others are nearly orthogonal: the basis knows nothing of them."""
    logits, rows = ordinary(generator, examples)
    rows = _normal(generator, examples, MANY, D)
    rows[:, 0] = 0.0
    return logits, rows


def near_ties_summed(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """`near_ties` of the 1-norm."""
    return near_ties(generator, examples, q=1.0)


def fitting_weights(generator: torch.Generator, examples: int, held: int = 8) -> tuple[Tensor, Tensor]:
    """One class decides, by one part in a million, and nothing but chance makes its bound of the 1-norm too large.

    Its gradient is at right angles to all others, and its absolute entries are proportional to the squares of the weights,
    which are 0.2 and 6.6 times their mean: `held` of 64 coordinates, a power of two from 4 on, hold all other gradients.
    """
    signs = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        signs = torch.cat((torch.cat((signs, signs), 1), torch.cat((signs, -signs), 1)))
    profile = torch.where(torch.arange(64) < held, 1 / held, 0.0).double()
    logits = -10 + 0.1 * _normal(generator, examples, MANY)
    logits[:, 0], logits[:, 1], logits[:, -1] = 0.0, -1.0, -12.0
    rows = 0.02 * profile * signs[torch.arange(MANY) % 3].expand(examples, -1, -1)
    rows[:, 0], rows[:, 1] = 0.0, profile * signs[1]  # ratio 1, among those that are evaluated first
    rows[:, -1] = (Summed.FLOOR / 64 + (1 - Summed.FLOOR) * profile) * signs[-1] * 12.0 * (1 + 1e-6)  # ratio 1 - 1e-6
    return logits, rows * _normal(generator, examples, 1, 64).sign()


def misleading_weights(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """The early classes' gradients live on coordinates where the one that decides has hardly any: the weights are wrong."""
    logits, rows = outside_the_basis(generator, examples)
    rows = torch.cat((rows, rows), 2)
    rows[:, :-1, D:] *= 1e-3
    rows[:, -1, :D] *= 1e-3
    length = (rows - rows[:, :1]).abs().sum(2, keepdim=True)
    target = torch.where(torch.arange(MANY) == 1, 1.0, 0.02) * (logits[:, :1] - logits)
    target[:, -1] = 12.0 * (1 + 1e-6)
    return logits, rows[:, :1] + (rows - rows[:, :1]) * torch.where(length > 0, target.unsqueeze(2) / length, 0.0)


def sparse_rows(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """Three entries in each row: sums of absolute entries are far below what their squares allow."""
    logits, rows = ordinary(generator, examples)
    order = torch.rand(rows.shape, generator=generator, dtype=torch.float64).argsort(2)
    return logits, torch.where(order < 3, rows, 0.0)


Kind = Callable[[torch.Generator, int], tuple[Tensor, Tensor]]
_SHARED: tuple[Kind, ...] = (ordinary, heavy_tails, falling_spectrum, nothing_known, sparse_rows)
# By the p of the perturbation.
KINDS: dict[float, dict[str, Kind]] = {
    norm: {kind.__name__: kind for kind in (*_SHARED, *own)}
    for norm, own in (
        (2.0, (near_ties, outside_the_basis)),
        (math.inf, (near_ties_summed, fitting_weights, misleading_weights)),
    )
}
