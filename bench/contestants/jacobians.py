"""Jacobians that nobody trained: passes over given matrices, and the kinds that a certificate is calibrated on."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MANY = 90  # classes: enough for probes to be worth while
D = 60


@dataclass
class Matrices:
    """The passes (fastsal.passes) of given Jacobians [E, n, D] and logits [E, n]."""

    logits: Tensor
    jacobian: Tensor
    pairs: int = 256

    def __post_init__(self) -> None:
        self.dimension = self.jacobian.shape[2]

    def vjp(self, examples: Tensor, cotangents: Tensor) -> Tensor:
        return cotangents @ self.jacobian[examples]

    def jvp(self, examples: Tensor, directions: Tensor) -> Tensor:
        return directions.to(self.jacobian.dtype) @ self.jacobian[examples].mT


def distances(logits: Tensor, jacobian: Tensor) -> Tensor:
    """m_j / ‖Δ_j‖ of every class [E, n] in float64, +inf at the prediction."""
    prediction = logits.argmax(1, keepdim=True)
    rows, scores = jacobian.double(), logits.double()
    own = rows.gather(1, prediction.unsqueeze(2).expand(-1, 1, rows.shape[2]))
    ratio = (scores.gather(1, prediction) - scores) / (own - rows).norm(dim=2)
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


def near_ties(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """Every ratio within a thousandth of the smallest: whichever bound fails is seen."""
    logits, rows = ordinary(generator, examples)
    offset = rows - rows[:, :1]
    target = (logits[:, :1] - logits) / (1 + 1e-3 * torch.rand(logits.shape, generator=generator, dtype=torch.float64))
    length = offset.norm(dim=2, keepdim=True)
    scaled = offset * torch.where(length > 0, target.unsqueeze(2) / length, 0.0)
    return logits, rows[:, :1] + scaled


def outside_the_basis(generator: torch.Generator, examples: int) -> tuple[Tensor, Tensor]:
    """One class decides, by a hair, and its gradient is at right angles to all others: its bound alone is on trial."""
    rows = 0.02 * _normal(generator, examples, MANY, D)
    logits = -10 + 0.1 * _normal(generator, examples, MANY)
    logits[:, 0], logits[:, 1], logits[:, -1] = 0.0, -1.0, -12.0
    direction = _normal(generator, examples, 2, D)
    direction = direction / direction.norm(dim=2, keepdim=True)
    rows[:, 1] = rows[:, 0] + direction[:, 0]  # ratio 1, among those that are evaluated first
    others = torch.cat((rows[:, :-1], direction[:, :1]), 1)
    basis = torch.linalg.qr(others.mT[:, :, : D // 3]).Q  # at right angles to as many as leave room
    lonely = direction[:, 1] - (basis @ (basis.mT @ direction[:, 1].unsqueeze(2))).squeeze(2)
    lonely = lonely / lonely.norm(dim=1, keepdim=True)
    rows[:, -1] = rows[:, 0] + lonely * 12.0 * (1 + 1e-6)  # ratio 1 - 1e-6
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


KINDS: dict[str, Callable[[torch.Generator, int], tuple[Tensor, Tensor]]] = {
    kind.__name__: kind
    for kind in (ordinary, near_ties, outside_the_basis, heavy_tails, falling_spectrum, nothing_known)
}
