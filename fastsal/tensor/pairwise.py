"""The tensor level, all pairs: the linearised margin of every class against every other."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsal import validation
from fastsal.tensor import ops, reference
from fastsal.tensor.results import Results


@dataclass(frozen=True, eq=False, repr=False)
class PairwiseMargins(Results):
    """All pairs of logits of B examples, an object to work with as `Geometry` is.

    With the logits Ψ, their gradients g_j with respect to x, and q dual to the norm of the perturbation. Tensors are float64
    for float64 inputs and float32 for all others.

    Attributes:
        distance: ‖g_i − g_j‖_q, [B, n, n], 0 on the diagonal.
        margin: (Ψⁱ − Ψʲ) / ‖g_i − g_j‖_q, [B, n, n], the linearised distance of class i from class j, negative where class j
            has the higher logit; +inf on the diagonal.
        nearest_margin: The smallest margin of every class i over j ≠ i, [B, n].
        nearest: The class j of that margin, int64 [B, n]; the lowest class among equals.
        alignment: |⟨x, g_i − g_j⟩| / ‖g_i − g_j‖_q, [B, n, n], NaN on the diagonal; None without x.
    """

    distance: Tensor
    margin: Tensor
    nearest_margin: Tensor
    nearest: Tensor
    alignment: Tensor | None

    _axes: ClassVar = ("example", "class", "other")
    _shown: ClassVar = ("margin", "distance", "nearest_margin")


class _PairwiseMargins(torch.autograd.Function):
    """Forward by the kernel; backward by the kernel too, or through the reference where a higher order is wanted."""

    @staticmethod
    def forward(
        logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float, backend: str
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return ops.pairwise_margins(logits, jacobian, x, norm, backend)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        logits, jacobian, x, ctx.norm, ctx.backend = inputs
        distance, margin, _, nearest, projection = output
        ctx.mark_non_differentiable(nearest)
        ctx.has_x = x is not None
        ctx.save_for_backward(logits, jacobian, x, distance, margin, nearest, projection)

    @staticmethod
    def backward(
        ctx: Any, grad_distance: Tensor, grad_margin: Tensor, grad_nearest: Tensor, _: Any, grad_projection: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, jacobian, x, distance, margin, nearest, projection = ctx.saved_tensors
        if torch.is_grad_enabled():
            outputs = reference.pairwise_margins(logits, jacobian, x, ctx.norm)
            pairs = [(outputs[0], grad_distance), (outputs[1], grad_margin), (outputs[2], grad_nearest)]
            if ctx.has_x:
                pairs.append((outputs[4], grad_projection))  # type: ignore[arg-type]
            wanted = [t for t, need in zip((logits, jacobian, x), ctx.needs_input_grad, strict=False) if need]
            found = iter(
                torch.autograd.grad(
                    [value for value, _ in pairs],
                    wanted,
                    [grad.double() for _, grad in pairs],
                    create_graph=True,
                    allow_unused=True,
                )
            )
            return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None

        # The chain rule on the outputs [B, n, n] leaves a weight w for the gradient of each distance and a weight v for each
        # inner product with x. Summing those over the rows is the kernel's work.
        grad_margin = grad_margin.double().scatter_add(2, nearest.unsqueeze(2), grad_nearest.double().unsqueeze(2))
        zero = distance == 0  # the diagonal among them: the subgradient of a distance that is 0 is 0
        inverse = torch.where(zero, 0.0, 1.0 / distance.double())
        slope = torch.where(zero, 0.0, grad_distance.double() - grad_margin * margin.double() * inverse)
        v = None
        if ctx.has_x:
            slope = torch.where(zero, 0.0, slope - grad_projection.double() * projection.double() * inverse)
            v = torch.where(zero, 0.0, grad_projection.double() * inverse)
            v = v - v.transpose(1, 2)
        w = slope + slope.transpose(1, 2)
        if ctx.norm == 2.0:
            w = w * inverse
        grad_jacobian, grad_x = ops.pairwise_backward(w, v, jacobian, x, ctx.norm, ctx.backend)
        flow = torch.where(zero, 0.0, grad_margin * inverse)
        grad_logits = (flow.sum(2) - flow.sum(1)).to(logits.dtype)
        return grad_logits, grad_jacobian, grad_x if ctx.has_x else None, None, None


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None = None, *, norm: float | str = 2, backend: str = "auto"
) -> PairwiseMargins:
    """Linearised margins between all pairs of logits, from direct differences of their gradients.

    The margin of a pair is the linearised robustness of Etmann, Lunz, Maass and Schönlieb, ICML 2019 (arXiv 1905.04172),
    section 3, for class i against class j; `PairwiseMargins` lists the equations.

    Tensors may be float32, float64, float16 or bfloat16; float64 goes with float64 only. Results are float64 for float64 inputs
    and float32 for all others, within 1e-13 and 1e-6 of exact arithmetic on the values passed, for nearly identical gradients
    too (no Gram matrix is formed). They are the same bits whatever the batch, the strides and the number of threads. Memory is
    needed for the results only. Equal logits have margin 0; a negative margin over a distance of 0 is −inf.

    The results are differentiable in logits, jacobian and x, to any order; every row has a gradient. The gradient of a distance
    that is 0 is 0. Orders above the first are computed by the reference.

    Args:
        logits: [B, n] with n >= 2: logits or log-softmax, not probabilities.
        jacobian: [B, n, *S], the gradient of every logit with respect to x. The first two axes may have any strides; S must be
            contiguous.
        x: [B, *S], the input, in the Jacobian's dtype or in float32; None for no alignment.
        norm: The p of the perturbation: 2, 1, `math.inf` or "inf". Gradients are measured in the dual q-norm.
        backend: "auto", "reference", "cpu", "cuda" or "triton"; `fastsal.info()` tells which can run.

    Returns:
        A `PairwiseMargins`.

    Raises:
        TypeError, ValueError, RuntimeError: As `margin_geometry`, which takes the same arguments.

    Examples:
        >>> import torch, fastsal
        >>> jacobian = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]])
        >>> pairs = fastsal.pairwise_margins(torch.tensor([[3.0, -3.0, 8.0]]), jacobian)
        >>> pairs.distance[0, 0, 1].item(), pairs.margin[0, 0, 1].item(), pairs.nearest[0].tolist()
        (2.0, 3.0, [2, 2, 0])
    """
    p = validation.norm(norm)
    logits, flat, flat_x = validation.tensors(logits, jacobian, x)
    distance, margin, nearest_margin, nearest, projection = _PairwiseMargins.apply(logits, flat, flat_x, p, backend)
    return PairwiseMargins(
        distance=distance,
        margin=margin,
        nearest_margin=nearest_margin,
        nearest=nearest,
        alignment=None if x is None else projection.abs(),
    )
