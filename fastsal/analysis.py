"""analyze: the whole of DESIGN section 2 for a model, streaming its Jacobian instead of holding it."""

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fastsal import methods, validation
from fastsal.geometry import Geometry, margin_geometry
from fastsal.linearization import Model, check_input, linearize


def analyze(
    model: Model,
    x: Tensor,
    *,
    norm: float | str = 2,
    method: str | methods.Method = "exact",
    chunk_size: int | None = None,
    backend: str = "auto",
    keep_saliency: bool = False,
    differentiable: bool = False,
) -> Geometry:
    """Linearised robustness, saliency alignment and the bound that ties them, for every example of a batch of a model.

    model: an `nn.Module` in evaluation mode, or any callable, that maps x [B, *S] to logits [B, n], example by example.
        Logits or log-softmax, not probabilities. One score Ψ of shape [B] or [B, 1] means the two logits (−Ψ/2, Ψ/2),
        so that class 1 is Ψ > 0 and ρ̃ = |Ψ| / ‖∇Ψ‖.
    x: [B, *S], float32, float64, float16 or bfloat16. Distances are in units of x as passed: to measure them in pixels,
        wrap the normalisation into the model. α, β, the homogeneities and the bound depend on where the origin of x is
        (a mean-centred input or not); ρ̃ does not.
    norm: the p of the perturbation, 2 (default), 1, `math.inf` or "inf"; gradients are measured in the dual q-norm.
    method: "exact" / `fastsal.Exact(head=None, memory_limit=2**30)` (default; n backward passes, or F + 2 where the logits
        leave a linear layer of F inputs) or "candidates" / `fastsal.Candidates(k=10)` (only the k highest logits
        besides the predicted one, k + 1 passes: an upper bound of ρ̃, `certified` false, `distances` None) or "certified" /
        `fastsal.Certified(failure_probability=1e-6, max_passes=None, seed=0)` (norm 2: ρ̃ itself with that probability of
        failure for each example, in some 50 to 100 passes at 1000 classes; `vjps` and `jvps` count them, `distances` None).
    chunk_size: how many class gradients are taken at once; None chooses by device and threads. Out of memory halves it.
    backend: "auto" (default), "reference", "cpu", "cuda" or "triton"; see `fastsal.info()`.
    keep_saliency: also return `saliency` g and `binarized_saliency` g†, shaped like x, in x's dtype.
    differentiable: let the scalars (and the saliencies, where kept) carry gradients, to any order, into the model's
        parameters and into x where that requires a gradient, at the cost of two double-backward rows. Indices,
        `distances` and `lower_bound` carry none.

    Returns a `Geometry`: the equations of Etmann, Lunz, Maass and Schönlieb, ICML 2019 (arXiv 1905.04172), in float64
    for float64 x, else in float32. The Jacobian [B, n, D] is never held: beside the model's own activations the memory
    is O(chunk_size · B · D), and up to `Exact.memory_limit` where features are used. Works under
    `torch.no_grad()`, `inference_mode()` and autocast, and leaves the model's flags, gradients, buffers and hooks and the
    random number generators as it found them.

    The reductions are deterministic; the model's own arithmetic may differ in the last bits with batch and chunk size.

    Raises ValueError or TypeError, which say what x or the model is missing: logits not [B, n] or not depending on x,
    training-mode layers or batch statistics that mix or randomise the examples.

    >>> import torch, fastsal
    >>> linear = torch.nn.Linear(2, 3, bias=False)
    >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]))
    >>> result = fastsal.analyze(linear, torch.tensor([[3.0, 4.0]]))
    >>> result.prediction.item(), result.runner_up.item(), round(result.linearized_robustness.item(), 4)
    (2, 0, 2.2361)
    """
    p = validation.norm(norm)
    chosen = methods.resolve(method, p)
    validation.chunk_size(chunk_size)
    check_input(x)
    B = x.shape[0]
    empty = B == 0  # the number of classes is still to be learnt: ask one example, keep none
    with linearize(model, x.new_zeros(1, *x.shape[1:]) if empty else x, differentiable=differentiable) as graph:
        validation.warn_probabilities(graph.logits)
        selection = chosen.select(graph, p, chunk_size, backend)
        logits, pair, flat_x = graph.logits, selection.pair, graph.x.detach()
        if differentiable:
            logits, flat_x = graph.graph_logits, graph.x
            pair = torch.cat([graph.rows(row.unsqueeze(0), create_graph=True) for row in selection.winners.t()], 1)
        result = margin_geometry(logits.gather(1, selection.winners), pair, flat_x, norm=p, backend=backend)
        prediction, runner_up = selection.winners.unbind(1)
        result = replace(result, prediction=prediction, runner_up=runner_up, **selection.provenance)
        if keep_saliency:
            saliency, binarized = (row.reshape(-1, *x.shape[1:]) for row in (pair[:, 0], pair[:, 0] - pair[:, 1]))
            result = replace(result, saliency=saliency, binarized_saliency=binarized)
    if empty:
        tensors = {field.name: getattr(result, field.name) for field in fields(result)}
        sliced: dict[str, Any] = {name: value[:0] for name, value in tensors.items() if isinstance(value, Tensor)}
        result = replace(result, **sliced)
    return result
