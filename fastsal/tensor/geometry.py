"""margin_geometry: every quantity of docs/design.md, "Quantities", from one Jacobian in one pass."""

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from fastsal import validation
from fastsal.tensor import ops, reference
from fastsal.tensor.results import Results


@dataclass(frozen=True, eq=False, repr=False)
class Geometry(Results):
    """What fastsal knows about each of B examples.

    The logits of an example are Ψ and its input is x. Its prediction i* is the class of the highest logit, g_j is the gradient
    of logit j with respect to x, and g = g_{i*} is the saliency map. The distance of the decision boundary between i* and
    another class j, as the linearised logits see it, is (Ψ^{i*} − Ψʲ) / ‖g − g_j‖_q, where q is dual to the norm p of the
    perturbation: 2 to 2, 1 to infinity, infinity to 1. The class at the smallest distance is the runner-up j*. Subtracting its
    logit from the predicted one leaves a binary classifier, whose quantities carry a dagger: Ψ† = Ψ^{i*} − Ψ^{j*} and
    g† = g − g_{j*}.

    The equations are those of Etmann, Lunz, Maass and Schönlieb, ICML 2019 (arXiv 1905.04172). Tensors have the shape [B]
    unless another is given; they are float64 for float64 inputs and float32 for all others. Distances are in units of x as
    passed. Alignments, offsets, homogeneities and the bound depend on where the origin of x is (a mean-centred input or not);
    `linearized_robustness` does not.

    `len(geometry)` is B, and `geometry[k]` is example k, or those of a slice, a mask or indices. Iteration, `==`, `to(device)`,
    `cpu()`, `save(path)` and `to_pandas()` work on the whole; `fastsal.load` reads what was saved, `fastsal.cat` joins several.

    Attributes:
        prediction: i*, int64: the lowest class among equals.
        runner_up: j*, int64: often not the second-highest logit; the lowest class among equals.
        linearized_robustness: ρ̃ = min over j ≠ i* of (Ψ^{i*} − Ψʲ) / ‖g − g_j‖_q, how far the linearised decision boundary is.
        alignment: α = |⟨x, g⟩| / ‖g‖_q, how well the saliency map aligns with the input.
        cosine: |⟨x, g⟩| / (‖x‖_p ‖g‖_q), the alignment whatever the size of x, from 0 to 1: for p = 2 the cosine of the two.
        binarized_logit: Ψ† = Ψ^{i*} − Ψ^{j*}.
        binarized_alignment: α† = |⟨x, g†⟩| / ‖g†‖_q.
        offset: β = Ψ^{i*} − ⟨x, g⟩, zero where the predicted logit is homogeneous.
        binarized_offset: β† = Ψ† − ⟨x, g†⟩.
        direction_gap: ‖g†/‖g†‖_q − g/‖g‖_q‖_q, how much the directions of the two saliency maps differ.
        bound: α + ‖x‖_p · direction_gap + |β†| / ‖g†‖_q, which ρ̃ never exceeds.
        homogeneity: |⟨x, g⟩| / (|⟨x, g⟩| + |β|), from 0 to 1.
        binarized_homogeneity: |⟨x, g†⟩| / (|⟨x, g†⟩| + |β†|).
        distances: (Ψ^{i*} − Ψʲ) / ‖g − g_j‖_q for every class, [B, n], +inf at i*; None, with a warning that says what gives
            them, where not every class was evaluated.
        saliency: g, shaped like x, or None where it was not asked for.
        binarized_saliency: g†, likewise.
        method: How the runner-up was found: "exact", "certified" or "candidates".
        vjps: How many backward passes (vector-Jacobian products) that took, int64.
        jvps: How many forward-mode passes (Jacobian-vector products), int64.
        certified: Whether `linearized_robustness` is ρ̃ itself, bool; where it is not, it is an upper bound, or NaN.
        lower_bound: What ρ̃ is at least.
        failure_probability: The probability, for each example, that `certified` or `lower_bound` is wrong; a float.
    """

    prediction: Tensor
    runner_up: Tensor
    linearized_robustness: Tensor
    alignment: Tensor
    cosine: Tensor
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

    _shown: ClassVar = (
        "linearized_robustness",
        "alignment",
        "cosine",
        "bound",
        "homogeneity",
        "vjps",
        "jvps",
        "certified",
    )

    def __post_init__(self) -> None:
        if self.distances is None:
            object.__delattr__(self, "distances")  # so that whoever asks comes to __getattr__

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> None:
            if name != "distances":
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            why = (
                "they were not kept"
                if self.method == "exact"
                else f"method={self.method!r} evaluates few of the classes"
            )
            warnings.warn(
                f"distances: None, since {why}; analyze(model, x, method='exact') returns those of all classes",
                stacklevel=2,
            )


class _KernelValues(torch.autograd.Function):
    """Puts the kernel's values [K, B] in front of the recomputed ones (K tensors [B]), which carry the gradient."""

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

    `Geometry` lists the equations, which are those of Etmann, Lunz, Maass and Schönlieb, ICML 2019 (arXiv 1905.04172).

    Tensors may be float32, float64, float16 or bfloat16; float64 goes with float64 only. Results are float64 for float64 inputs
    and float32 for all others, within 1e-13 and 1e-6 of exact arithmetic on the values passed, relative to each quantity's own
    scale. An example's results depend on that example alone: they are the same bits whatever the batch, the strides and the
    number of threads.

    The scalars are differentiable in logits, jacobian and x, to any order. Their gradients are those of the two rows that the
    minimum selects, recomputed in float64, and 0 at a zero norm. Indices and `distances` carry none.

    Args:
        logits: [B, n] with n >= 2: logits or log-softmax, not probabilities.
        jacobian: [B, n, *S], the gradient of every logit with respect to x. The first two axes may have any strides; S must be
            contiguous.
        x: [B, *S], the input, in the Jacobian's dtype or in float32.
        norm: The p of the perturbation: 2, 1, `math.inf` or "inf". Gradients are measured in the dual q-norm.
        backend: "auto", "reference", "cpu", "cuda" or "triton"; `fastsal.info()` tells which can run.

    Returns:
        A `Geometry` without saliency maps. Its provenance says that every class was evaluated, by no pass through a model.

    Raises:
        TypeError: A tensor is missing or of the wrong dtype; the message names the argument, what it got and what it wants.
        ValueError: A shape, a stride, a device, the norm or the name of the backend is wrong; likewise.
        RuntimeError: A backend that was named cannot run; the message says why.

    Examples:
        >>> import torch, fastsal
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> jacobian = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]])
        >>> logits = (jacobian @ x.unsqueeze(2)).squeeze(2)  # a linear classifier without bias: 3, -3 and 8
        >>> result = fastsal.margin_geometry(logits, jacobian, x)
        >>> result.prediction.item(), result.runner_up.item(), round(result.linearized_robustness.item(), 4)
        (2, 0, 2.2361)

        From a model, as long as the Jacobian of a batch fits into memory (`fastsal.analyze` streams it):

        >>> from torch.func import jacrev, vmap
        >>> model, x = torch.nn.Linear(2, 3), torch.randn(5, 2)
        >>> jacobian = vmap(jacrev(lambda one: model(one.unsqueeze(0)).squeeze(0)))(x)  # jacrev(model)(x) is [B, n, B, *S]
        >>> jacobian.shape, len(fastsal.margin_geometry(model(x), jacobian, x))
        (torch.Size([5, 3, 2]), 5)
    """
    p = validation.norm(norm)
    validation.floating("x", x)  # which `validation.tensors` would let pass as None
    logits, flat, flat_x = validation.tensors(logits, jacobian, x)
    assert flat_x is not None
    return _geometry(logits, flat, flat_x, p, backend)


def _geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float, backend: str) -> Geometry:
    values, indices, distances = ops.margin_geometry(logits.detach(), jacobian.detach(), x.detach(), norm, backend)
    prediction, runner_up = indices.unbind(0)
    scalars = values.unbind(0)
    if torch.is_grad_enabled() and (logits.requires_grad or jacobian.requires_grad or x.requires_grad):
        winners = indices.t()
        rows = reference.rows_of(jacobian, winners)
        recomputed = reference.two_row_scalars(logits.gather(1, winners), rows, x, norm)
        scalars = _KernelValues.apply(values, *(recomputed[key] for key in reference.SCALARS))
    return _filled(dict(zip(reference.SCALARS, scalars, strict=True)), prediction, runner_up, distances)


def of_pair(logits: Tensor, pair: Tensor, x: Tensor, norm: float) -> Geometry:
    """The same of two classes, the first of which is in the place of the predicted one, whatever its logit.

    Args:
        logits: Theirs, [B, 2].
        pair: Their rows, [B, 2, D].
        x: [B, D].
        norm: The p of the perturbation.
    """
    named = {key: value.to(logits.dtype) for key, value in reference.two_row_scalars(logits, pair, x, norm).items()}
    first = torch.zeros_like(logits[:, 0], dtype=torch.int64)
    return _filled(named, first, first + 1, None)


def _filled(named: dict[str, Tensor], prediction: Tensor, runner_up: Tensor, distances: Tensor | None) -> Geometry:
    none, robustness = torch.zeros_like(prediction), named["linearized_robustness"].detach()
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
        certified=robustness == robustness,  # but for NaN
        lower_bound=robustness,
        failure_probability=0.0,
    )
