"""Pairs: distances and margins of all logit pairs, and the gradient of the distances in the Jacobian.

Beside the time stands the error on rows that differ by one part in ten thousand. There, products of rows lose the digits
that differences keep.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import fastsal
from bench.baselines import backends, formulas
from bench.cases.tensor import LOOSE, draw, threads_on
from bench.harness.case import QUICK, Case, Implementation, Work
from bench.harness.clock import clock_of
from fastsal.tensor import reference
from fastsal.tensor.tolerance import tolerance, worst

SHAPES = ((8192, 10, 784), (128, 100, 3072), (1, 1000, 12288))
QUICK_SHAPES = ((8, 100, 3072),)
ROWS = 8  # rows whose pairs are compared with float64
NEAR = 1e-4  # relative distance of near-identical rows
LARGEST = 2**33  # bytes: eager differences are left out where their backward pass would keep more than this

Distances = Callable[[Tensor], Tensor]


class Pairs(NamedTuple):
    """What `fastsal.PairwiseMargins` holds without x."""

    distance: Tensor
    margin: Tensor
    nearest_margin: Tensor
    nearest: Tensor


def differences(jacobian: Tensor) -> Tensor:
    """‖g_i − g_j‖ [B, n, n] by subtraction, one row against all others at a time."""
    rows = [(jacobian[:, i : i + 1] - jacobian).norm(dim=2) for i in range(jacobian.shape[1])]
    return torch.stack(rows, 1)


DISTANCES: dict[str, Distances] = {
    **{
        f"torch.cdist, {name}": lambda jacobian, mode=mode: torch.cdist(jacobian, jacobian, compute_mode=mode)
        for name, mode in formulas.CDIST_MODES.items()
    },
    "eager differences": differences,
}


def margins(distances: Distances, logits: Tensor, jacobian: Tensor) -> Pairs:
    """All outputs from a function for the distances."""
    distance = distances(jacobian)
    margin = (logits.unsqueeze(2) - logits.unsqueeze(1)) / distance
    margin.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return Pairs(distance, margin, *margin.min(2))


def ours(backend: str, logits: Tensor, jacobian: Tensor) -> Pairs:
    """All outputs by fastsal."""
    result = fastsal.pairwise_margins(logits, jacobian, backend=backend)
    return Pairs(result.distance, result.margin, result.nearest_margin, result.nearest)


def _some(count: int, most: int) -> list[int]:
    return torch.linspace(0, count - 1, min(count, most)).long().unique().tolist()


class Checks:
    """Compares some rows' pairs, in some examples, with float64."""

    def __init__(self, logits: Tensor, jacobian: Tensor) -> None:
        self._at = torch.tensor(_some(len(logits), 8)), torch.tensor(_some(logits.shape[1], ROWS))
        examples, rows = self._at
        scores, gradients = logits[examples].double(), jacobian[examples].double()
        self.distance = torch.stack([reference.row_distances(gradients[:, i], gradients, 2.0) for i in rows], 1)
        self.margin = (scores[:, rows].unsqueeze(2) - scores.unsqueeze(1)) / self.distance
        self.margin[:, torch.arange(len(rows)), rows] = torch.inf
        self.gradients = gradients

    def __call__(self, result: Pairs) -> float:
        examples, rows = self._at
        distance, margin, nearest = (v[examples][:, rows] for v in result[:3])
        diagonal = torch.arange(len(rows)), rows
        # On the diagonal torch leaves the rounding errors of its products; only fastsal gives 0.
        distance[:, diagonal[0], diagonal[1]] = 0.0
        return max(
            worst(distance, self.distance, self.distance),
            worst(margin, self.margin, self.margin.abs()),
            worst(nearest, self.margin.amin(2), self.margin.amin(2).abs()),
        )

    def gradient(self, weight: Tensor, found: Tensor) -> float:
        """The error of a gradient of Σ w_ij ‖g_i − g_j‖, in units of Σ_j |w_ij + w_ji|.

        The gradient in g_i is Σ_j (w_ij + w_ji) (g_i − g_j) / ‖g_i − g_j‖.
        """
        examples, rows = self._at
        both = (weight + weight.transpose(1, 2))[examples][:, rows].double()
        factor = torch.where(self.distance > 0, both / self.distance, 0.0)
        wanted = factor.sum(2, keepdim=True) * self.gradients[:, rows] - factor @ self.gradients
        return float(((found[examples][:, rows] - wanted).norm(dim=2) / both.abs().sum(2)).nan_to_num(torch.inf).max())


def _near(n: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    base, noise = torch.randn(1, 1, 784, generator=generator), torch.randn(1, n, 784, generator=generator)
    return torch.randn(1, n, generator=generator).to(device), (base * (1 + NEAR * noise)).to(device)


def forward(shape: tuple[int, int, int], tiny: bool, device: str = "cpu") -> Work:
    """All outputs but the alignment."""
    inputs = [case[:2] for case in draw(shape, torch.float32, tiny, device)]
    checks, near, implementations = Checks(*inputs[0]), _near(inputs[0][0].shape[1], device), []
    near_checks = Checks(*near)

    def add(name: str, run: Callable[[Tensor, Tensor], Pairs], limit: float) -> None:
        def facts(_: Pairs) -> dict[str, float]:
            return {"error on near-identical rows": near_checks(run(*near))}

        implementations.append(Implementation(name, lambda given: run(*given), checks, limit, facts=facts))

    names, skipped = backends.compiled(inputs[0][1])
    for name in names:
        add(f"fastsal {name}", functools.partial(ours, name), tolerance(torch.float32))
    for name, distances in DISTANCES.items():
        add(name, functools.partial(margins, distances), LOOSE)
    return Work(inputs, implementations, skipped, clock=clock_of(device))


def backward(shape: tuple[int, int, int], tiny: bool, device: str = "cpu") -> Work:
    """Σ w_ij ‖g_i − g_j‖ and its gradient in the Jacobian, forward included."""
    inputs = [case[:2] for case in draw(shape, torch.float32, tiny, device)]
    checks, implementations = Checks(*inputs[0]), []
    B, n, D = inputs[0][1].shape
    weight = torch.randn(B, n, n, generator=torch.Generator().manual_seed(2)).to(device)
    weight.diagonal(dim1=1, dim2=2).zero_()

    def add(name: str, distances: Callable[[Tensor, Tensor], Tensor], limit: float) -> None:
        def run(given: tuple[Tensor, Tensor]) -> Tensor:
            logits, jacobian = given
            leaf = jacobian.detach().requires_grad_()
            return torch.autograd.grad((distances(logits, leaf) * weight).sum(), leaf)[0]

        implementations.append(Implementation(name, run, functools.partial(checks.gradient, weight), limit))

    names, skipped = backends.compiled(inputs[0][1])
    for name in names:
        add(f"fastsal {name}", lambda *given, name=name: ours(name, *given).distance, tolerance(torch.float32))
    for name, distances in DISTANCES.items():
        if name == "eager differences" and (size := 4 * B * n * n * D) > LARGEST:
            skipped[name] = f"keeps {size / 1e9:.0f} GB of differences for its backward"
        else:
            add(name, lambda _, jacobian, distances=distances: distances(jacobian), LOOSE)
    return Work(inputs, implementations, skipped, clock=clock_of(device))


def cases(quick: bool = False, device: str = "cpu") -> Iterator[Case]:
    """Forward, and forward and backward, on every shape."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        for name, make in (("forward", forward), ("forward and backward", backward)):
            yield Case(
                "pairs",
                f"({', '.join(map(str, shape))}) float32, {name}",
                functools.partial(make, shape, device=device),
                threads=threads_on(device),
                budget=QUICK if quick else 12.0,
            )
