"""pairwise_margins: the linearised margin of every ordered pair of logits."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsal import ops, reference, validation


@dataclass(frozen=True)
class PairwiseMargins:
    """All logit pairs of B examples. float64 for float64 inputs, else float32.

    distance: ‖g_i − g_j‖_q [B, n, n], 0 on the diagonal.
    margin: (Ψⁱ − Ψʲ) / ‖g_i − g_j‖_q [B, n, n], which is ρ̃ of class i against class j; +inf on the diagonal.
    nearest_margin, nearest: the minimum of `margin` over j ≠ i and where it is (int64), [B, n].
    alignment: |⟨x, g_i − g_j⟩| / ‖g_i − g_j‖_q [B, n, n], NaN on the diagonal; None without x.
    """

    distance: Tensor
    margin: Tensor
    nearest_margin: Tensor
    nearest: Tensor
    alignment: Tensor | None


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

        # Chain rule on the [B, n, n] outputs; what is left, Σ_j w_ij ∂‖g_i − g_j‖ and Σ_j v_ij x, is the kernel's.
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

    logits: [B, n], n >= 2. jacobian: [B, n, *S], any strides on the first two axes, contiguous in S. x: [B, *S] in the
    Jacobian's dtype or float32, or None (no alignment).
    norm: the p of the perturbation, 2 (default), 1, `math.inf` or "inf"; gradients are measured in the dual q-norm.
    backend: "auto" (default), "reference", "cpu", "cuda" or "triton"; see `fastsal.info()`.

    Dtypes float32, float64, float16 and bfloat16; results are float64 for float64 inputs and float32 for all others, within
    1e-13 and 1e-6 of exact arithmetic, near-identical gradients included (no Gram matrix is formed), and the same bits
    whatever the batch, strides or thread count. Memory: the [B, n, n] results. Equal logits give margin 0; a negative margin
    over distance 0 is −inf.

    Differentiable in logits, jacobian and x (dense in all rows; higher orders go through the reference). The gradient of a
    distance that is 0 is 0.

    Raises TypeError or ValueError, which name the argument, and RuntimeError where a named backend cannot run.

    margin is the linearised robustness of Etmann et al. (ICML 2019, arXiv 1905.04172), section 3, for every ordered pair.

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
