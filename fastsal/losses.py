"""Losses of margins in the input: functions of (model, x, y) to add to a training loss.

Both are differentiable in the model's parameters, and in x where that requires a gradient, which takes second derivatives of
the model. They look at the model as it measures, not as it trains: layers that in training mode mix the examples of a batch or
draw random numbers (BatchNorm, dropout) have to be in evaluation mode.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastsal import methods, validation
from fastsal.methods.base import Question
from fastsal.model.calling import Model
from fastsal.model.linearization import linearize
from fastsal.tensor import reference
from fastsal.tensor.pairwise import pairwise_margins

__all__ = ["cross_lipschitz_loss", "margin_loss"]


def margin_loss(
    model: Model,
    x: Tensor,
    y: Tensor,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layer: nn.Module | str | None = None,
    target: float | None = None,
    norm: float | str = 2,
    method: str | methods.Method = "auto",
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """The mean of −ρ̃, or of what ρ̃ falls short of a target: to train for distance to the decision boundary.

    With m the linearised margin of an example, the loss is the mean of −m, or with a target r that of max(0, r − m). Where the
    model predicts the label c = y, m is the linearised robustness ρ̃ = min_j (Ψᶜ − Ψʲ) / ‖g_c − g_j‖_q. Where it predicts
    another class i, m is (Ψᶜ − Ψⁱ) / ‖g_c − g_i‖_q < 0: how far x is on the wrong side of the boundary between the two. (The
    hinge on linearised distances is that of Elsayed, Krishnan, Mobahi, Regan and Bengio, NeurIPS 2018, arXiv 1803.05598.)

    The class j is found without a graph, by `method`, and a single row with second derivatives follows.

    Args:
        model: As in `fastsal.analyze`.
        x: [B, *S], of any floating dtype.
        y: int64 [B], the labels.
        args: As in `fastsal.analyze`.
        kwargs: As in `fastsal.analyze`.
        layer: As in `fastsal.analyze`: margins are those in the space of its output (Elsayed et al. take them at several
            layers at once).
        target: The ρ̃ from which on an example adds nothing, in units of x. None (default) for the mean of −m, which has no
            lower bound: it is −inf where a gradient vanishes.
        norm: The p of the perturbation, 2 (default), 1, `math.inf` or "inf".
        method: "auto" (default) or any method of `fastsal.analyze`.
        chunk_size: As in `fastsal.analyze`.
        backend: As in `fastsal.analyze`.

    Returns:
        A scalar, float64 for float64 x and float32 for all others. Deterministic, differentiable to any order.

    Raises:
        ValueError, TypeError: As `fastsal.analyze`; and where y does not go with the logits.
        NotImplementedError: torch has no second derivative of some operation of the model; the message names it.

    >>> import torch, fastsal
    >>> linear = torch.nn.Linear(2, 3, bias=False)
    >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]))
    >>> x, y = torch.tensor([[3.0, 4.0], [3.0, 1.0]]), torch.tensor([2, 2])  # ρ̃ = √5, and √5/5 on the wrong side
    >>> round(fastsal.losses.margin_loss(linear, x, y).item(), 4)
    -0.8944
    >>> loss = fastsal.losses.margin_loss(linear, x, y, target=1.0)
    >>> loss.backward()
    >>> round(loss.item(), 4), linear.weight.grad[1].tolist()
    (0.7236, [0.0, 0.0])
    """
    p = validation.norm(norm)
    chosen = methods.resolve(method, p)
    validation.chunk_size(chunk_size)
    with linearize(model, x, args=args, kwargs=kwargs, layer=layer, differentiable=True) as graph:
        validation.labels("y", y, graph.logits.shape)
        prediction, runner_up = chosen.select(graph, Question(p, chunk_size, backend)).winners.unbind(1)
        own = y.to(prediction)
        other = torch.where(prediction == own, runner_up, prediction)
        classes = torch.stack((own, other), 1)
        signs = graph.logits.new_tensor([[1.0, -1.0]]).expand(len(own), 2)
        row = graph.vjp(torch.zeros_like(graph.logits).scatter(1, classes, signs).unsqueeze(0), create_graph=True)
        scores = graph.graph_logits.gather(1, classes).double()
        distance = reference.vector_norm(row.squeeze(1), reference.dual(p))
        margin = reference.ratios(scores[:, 0] - scores[:, 1], distance)
        loss = -margin if target is None else torch.relu(target - margin)
        return loss.mean().to(graph.logits.dtype)


def cross_lipschitz_loss(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layer: nn.Module | str | None = None,
    norm: float | str = 2,
    backend: str = "auto",
) -> Tensor:
    """The cross-Lipschitz regulariser: how much the gradients of all pairs of logits differ.

    The mean over examples of Σ_ij ‖g_i − g_j‖_q² / n², with q = 2 in Hein and Andriushchenko (NeurIPS 2017, arXiv 1705.08475).
    The smaller it is at given logits, the larger the linearised margin of every pair of classes. All n rows take second
    derivatives and are held, [B, n, D].

    Args:
        model: As in `fastsal.analyze`.
        x: [B, *S], of any floating dtype.
        y: Not looked at, since the definition asks for no labels; taken so that all losses are called alike.
        args: As in `fastsal.analyze`.
        kwargs: As in `fastsal.analyze`.
        layer: As in `fastsal.analyze`.
        norm: The p of the perturbation, 2 (default), 1, `math.inf` or "inf"; gradients are measured in the dual q-norm.
        backend: As in `fastsal.analyze`.

    Returns:
        A scalar, float64 for float64 x and float32 for all others. Deterministic, differentiable to any order.

    Raises:
        ValueError, TypeError, NotImplementedError: As `margin_loss`.

    >>> import torch, fastsal
    >>> linear = torch.nn.Linear(2, 3, bias=False)
    >>> _ = linear.weight.data.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]]))
    >>> loss = fastsal.losses.cross_lipschitz_loss(linear, torch.tensor([[3.0, 4.0]]))  # 2 (4 + 5 + 5) / 9
    >>> round(loss.item(), 4)
    3.1111
    """
    p = validation.norm(norm)
    with linearize(model, x, args=args, kwargs=kwargs, layer=layer, differentiable=True) as graph:
        B, n = graph.logits.shape
        each = torch.arange(n, device=graph.logits.device).view(n, 1, 1).expand(n, 1, B)
        rows = torch.cat([graph.rows(classes, create_graph=True) for classes in each], 1)
        distance = pairwise_margins(graph.graph_logits, rows, norm=p, backend=backend).distance
        return distance.square().sum((1, 2)).mean() / n**2
