"""margin_geometry: every quantity of docs/design.md, "Quantities", from one Jacobian in one pass."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastsal import ops, reference, validation


@dataclass(frozen=True)
class Geometry:
    """What fastsal knows about each of B examples. Shapes [B] unless given; float64 for float64 inputs, else float32.

    With g = ∇Ψ^{i*}(x) for the prediction i*, g† = g − ∇Ψ^{j*}(x) for the runner-up j*, and q dual to the norm p:

    prediction, runner_up: i* and j*, int64. j* attains ρ̃ and is often not the second-highest logit.
    linearized_robustness: ρ̃ = min over j ≠ i* of (Ψ^{i*} − Ψʲ) / ‖g − g_j‖_q, in units of x as passed.
    alignment: α = |⟨x, g⟩| / ‖g‖_q.
    binarized_logit: Ψ† = Ψ^{i*} − Ψ^{j*}.
    binarized_alignment: α† = |⟨x, g†⟩| / ‖g†‖_q.
    offset, binarized_offset: β = Ψ^{i*} − ⟨x, g⟩ and β† = Ψ† − ⟨x, g†⟩, zero where the logits are homogeneous.
    direction_gap: ‖g†/‖g†‖_q − g/‖g‖_q‖_q.
    bound: α + ‖x‖_p · direction_gap + |β†| / ‖g†‖_q, never below ρ̃.
    homogeneity, binarized_homogeneity: |⟨x, g⟩| / (|⟨x, g⟩| + |β|), in [0, 1]; likewise for g†, β†.
    distances: (Ψ^{i*} − Ψʲ) / ‖g − g_j‖_q of every class [B, n], +inf at i*; None where not every class was evaluated.
    saliency, binarized_saliency: g and g†, shaped like x, or None where they were not asked for.
    method: "exact", "certified" or "candidates"; vjps, jvps: backward and forward-mode passes spent, int64.
    certified: whether `linearized_robustness` is ρ̃ itself (bool); lower_bound: what ρ̃ is at least, except with probability
    failure_probability (a float).

    α, β and the homogeneities depend on where the origin of x is (a mean-centred input or not); ρ̃ does not.
    """

    prediction: Tensor
    runner_up: Tensor
    linearized_robustness: Tensor
    alignment: Tensor
    binarized_logit: Tensor
    binarized_alignment: Tensor
    offset: Tensor
    binarized_offset: Tensor
    direction_gap: Tensor
    bound: Tensor
    homogeneity: Tensor
    binarized_homogeneity: Tensor
    distances: Tensor | None
    saliency: Tensor | None
    binarized_saliency: Tensor | None
    method: str
    vjps: Tensor
    jvps: Tensor
    certified: Tensor
    lower_bound: Tensor
    failure_probability: float


class _KernelValues(torch.autograd.Function):
    """The kernel's values [K, B] in front of the recomputed ones (K times [B]), which carry the gradient."""

    @staticmethod
    def forward(values: Tensor, *recomputed: Tensor) -> tuple[Tensor, ...]:
        return tuple(row.clone() for row in values)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *(None if grad is None else grad.double() for grad in grads)


def margin_geometry(
    logits: Tensor, jacobian: Tensor, x: Tensor, *, norm: float | str = 2, backend: str = "auto"
) -> Geometry:
    """Linearised robustness, alignment, offsets, homogeneity and the bound of every example, in one pass over the Jacobian.

    logits: [B, n] with n >= 2, logits or log-softmax (not probabilities).
    jacobian: [B, n, *S], the gradient of every logit with respect to x. Any strides on the first two axes, contiguous in S.
    x: [B, *S], the input, in the Jacobian's dtype or float32.
    norm: the p of the perturbation, 2 (default), 1, `math.inf` or "inf"; gradients are measured in the dual q-norm.
    backend: "auto" (default), "reference", "cpu", "cuda" or "triton"; see `fastsal.info()`.

    Dtypes float32, float64, float16 and bfloat16; float64 goes with float64 only. Results are float64 for float64 inputs and
    float32 for all others, within 1e-13 and 1e-6 of exact arithmetic on the values passed (relative to each quantity's own
    scale). An example's results depend on that example alone: the same bits whatever the batch, strides or thread count.

    Differentiable in logits, jacobian and x to any order: the values are the kernel's, the gradients those of the two rows
    that the minimum selects, recomputed in float64. The gradient is 0 at a zero norm; indices and `distances` have none.

    Raises TypeError or ValueError, which name the argument, and RuntimeError where a named backend cannot run.

    The equations are those of Etmann, Lunz, Maass and Schönlieb, ICML 2019 (arXiv 1905.04172); `Geometry` lists them.

    >>> import torch, fastsal
    >>> x = torch.tensor([[3.0, 4.0]])
    >>> jacobian = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]])
    >>> logits = (jacobian @ x.unsqueeze(2)).squeeze(2)
    >>> result = fastsal.margin_geometry(logits, jacobian, x)
    >>> result.prediction.item(), result.runner_up.item(), round(result.linearized_robustness.item(), 4)
    (2, 0, 2.2361)
    """
    p = validation.norm(norm)
    validation.floating("x", x)  # None is for pairwise_margins only
    logits, flat, flat_x = validation.tensors(logits, jacobian, x)
    assert flat_x is not None
    return _geometry(logits, flat, flat_x, p, backend)


def _geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float, backend: str) -> Geometry:
    values, indices, distances = ops.margin_geometry(logits.detach(), jacobian.detach(), x.detach(), norm, backend)
    prediction, runner_up = indices.unbind(0)
    scalars = values.unbind(0)
    if torch.is_grad_enabled() and (logits.requires_grad or jacobian.requires_grad or x.requires_grad):
        winners = indices.t()
        rows = jacobian.gather(1, winners.unsqueeze(2).expand(-1, -1, jacobian.shape[2]))
        recomputed = reference.two_row_scalars(logits.gather(1, winners), rows, x, norm)
        scalars = _KernelValues.apply(values, *(recomputed[key] for key in reference.SCALARS))
    named = dict(zip(reference.SCALARS, scalars, strict=True))
    none = torch.zeros_like(prediction)
    return Geometry(
        prediction=prediction,
        runner_up=runner_up,
        **named,
        distances=distances,
        saliency=None,
        binarized_saliency=None,
        method="exact",
        vjps=none,
        jvps=none,
        certified=torch.ones_like(prediction, dtype=torch.bool),
        lower_bound=named["linearized_robustness"].detach(),
        failure_probability=0.0,
    )
