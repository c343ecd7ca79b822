"""Exact ρ̃ through the features: where the logits leave a linear layer with F < n inputs, F passes give every row.

Such a layer, the head, computes Ψ = W·f(x) + b from features f(x). So the Jacobian of the logits is J = W·J_f, with J_f [F, D]
the Jacobian of the features. The difference of two rows is formed as Δ_j = (w_{i*} − w_j)ᵀ J_f, and the weights are subtracted
first, in float64: a class whose weights nearly equal the predicted one's keeps its digits, which the difference of two rounded
rows would lose. (The Gram matrix J_f J_fᵀ would be cheaper still. But it squares the condition number, and serves the Euclidean
norm only.)

J is never held: Δ is formed for a tile of classes at a time, and J_f for as many examples as the memory limit allows. The rows
of the prediction and of the runner-up are taken by two more passes, so that everything but the distances is computed from the
same rows as without features. One more, of a mixture of all classes, shows whether J = W·J_f: a part of the model that adds 0
to the logits may have a gradient.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.methods.base import Nearest, Question, Selection
from fastsal.methods.mixtures import mixture
from fastsal.model.calling import Model
from fastsal.model.linearization import Linearization
from fastsal.tensor import ops, reference

TILE_BYTES = 1 << 26
ROUNDING = 1000.0  # units of it that two ways to one row may be apart, at most
SPARE = 8.0  # and in units of what they are apart for the rows of the winners


@contextlib.contextmanager
def _recorded(heads: list[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Lists the module, the input and the output of every call of the heads while the model runs inside."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    handles = [
        head.register_forward_hook(lambda module, inputs, output: calls.append((module, inputs[0], output)))
        for head in heads
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _weight(head: nn.Module) -> Tensor | None:
    """The [n, F] matrix of a linear layer or of a 1×1 convolution without groups; None for any other module."""
    if isinstance(head, nn.Linear):
        return head.weight.detach()
    if isinstance(head, nn.Conv1d | nn.Conv2d | nn.Conv3d) and head.groups == 1 and set(head.kernel_size) == {1}:
        return head.weight.detach().flatten(1)
    return None


def _why_not(head: nn.Module, calls: list[tuple[nn.Module, Tensor, Tensor]], graph: Linearization) -> str:
    """Says why the logits are not `head` applied to features of each example; nothing where they are."""
    mine = [(inputs, output) for module, inputs, output in calls if module is head]
    weight = _weight(head)
    if weight is None:
        return f"{type(head).__name__} is neither a linear layer nor a 1x1 convolution"
    if len(mine) != 1:
        return f"it runs {len(mine)} times in a forward pass, wants once"
    inputs, output = mine[0]
    if inputs.shape[0] != len(graph.logits) or inputs.numel() != len(graph.logits) * weight.shape[1]:
        return f"its input has shape {tuple(inputs.shape)}, wants one vector of {weight.shape[1]} features an example"
    if not inputs.dtype == output.dtype == weight.dtype == graph.x.dtype:
        return "it works in another precision than x"
    if graph.x.dtype not in (torch.float32, torch.float64):
        return f"in {graph.x.dtype} what a head leaves out cannot be told from rounding"
    if output.numel() != graph.logits.numel() or not torch.equal(
        output.detach().reshape(graph.logits.shape), graph.graph_logits.detach()
    ):
        return "its output is not the logits, bit for bit"
    return ""


def _find(graph: Linearization, wanted: nn.Module | None) -> nn.Module | None:
    """The head that the caller wants, or one that is recognised and narrow enough to pay; None where there is none."""
    n = graph.logits.shape[1]
    modules = list(graph.model.modules()) if isinstance(graph.model, nn.Module) else []
    if wanted is not None and all(module is not wanted for module in modules):
        raise ValueError("Exact: got a head that is no module of the model")
    heads = (
        [wanted]
        if wanted is not None
        else [
            module
            for module in modules
            if (weight := _weight(module)) is not None and len(weight) == n and 2 <= weight.shape[1] < n - 2
        ]
    )
    if not heads:
        return None
    with _recorded(heads) as calls, graph.same_precision():
        graph.function(np.arange(len(graph.leaf)))(graph.leaf.detach().clone())
    for head in heads:
        why_not = _why_not(head, calls, graph)
        if not why_not:
            return head
        if wanted is not None:
            raise ValueError(f"Exact: cannot go through the given head: {why_not}; leave head=None for class rows")
    return None


def _jacobian(features: Linearization, chunk_size: int | None) -> Tensor:
    """J_f of every example: [B, F, D], by F passes."""
    B, F = features.logits.shape
    held = features.x.new_empty(B, F, features.x.shape[1])

    def keep(which: Tensor, rows: Tensor) -> None:
        held[:, which[0]] = rows

    features.sweep(torch.arange(F, device=held.device).unsqueeze(1).expand(F, B), chunk_size, keep)
    return held


def _disagreement(rows: Tensor, formed: Tensor) -> float:
    """The largest relative distance of two vectors [B, D]; inf where one of them has a NaN."""
    scale = torch.maximum(reference.vector_norm(rows, 2.0), reference.vector_norm(formed, 2.0))
    gap = reference.ratios(reference.vector_norm(rows.double() - formed.double(), 2.0), scale)
    return float(gap.nan_to_num(math.inf).max()) if len(gap) else 0.0


def through_features(
    graph: Linearization,
    nearest: Nearest,
    question: Question,
    wanted: nn.Module | None,
    memory_limit: int,
) -> Selection | None:
    """Looks at all classes by way of the features.

    Args:
        graph: The recorded forward pass.
        nearest: The classes and their margins; it visits nothing.
        question: The norm, how many rows of J_f to take at once, and the backend that measures the differences.
        wanted: The head; None looks for one.
        memory_limit: How many bytes J_f may take.

    Returns:
        The selection, or None where there is no head that serves, or class rows are cheaper.
    """
    if graph.batch is not None and graph.batch.whole and wanted is None:
        return None
    head = _find(graph, wanted)
    weight = None if head is None else _weight(head)
    if head is None or weight is None:
        return None
    B, n = graph.logits.shape
    F, D = weight.shape[1], graph.x.shape[1]
    others = nearest.by_class()
    size = memory_limit // (F * D * graph.x.element_size())
    if size == 0 or (wanted is None and F + 3 >= 1 + others.shape[1]):
        return None

    def features(model: Model, which: Tensor, x: Tensor) -> Tensor:
        with _recorded([head]) as calls:
            model(x)
        found = calls[0][1].flatten(1)
        return found if len(found) == len(x) else found[which]  # of a model that has to see the whole batch

    prediction, margin = nearest.prediction, nearest.margin
    distance = torch.zeros_like(margin)
    winners = torch.zeros_like(margin[:, :2], dtype=torch.int64)
    cotangents, formed = graph.logits.new_zeros(1, B, n), graph.x.new_zeros(B, 3, D)  # the winners' rows, and a mixture
    weights = mixture(n, 0, margin.device)
    examples = torch.arange(B, device=prediction.device)
    tile = max(1, TILE_BYTES // (min(size, B) * D * graph.x.element_size()))
    for start in range(0, B, size):
        part = slice(start, min(start + size, B))
        which = examples[part]
        inner = graph.features(functools.partial(features, graph.function(which), which), which)
        if inner.mixes_examples():
            return None
        jacobian = _jacobian(inner, question.chunk_size)
        winner = weight.double()[prediction[part]].unsqueeze(1)
        nothing = graph.x.new_zeros(len(jacobian), D)
        for first in range(0, n, tile):
            difference = (winner - weight[first : first + tile].double()).to(graph.x.dtype)
            distance[part, first : first + tile] = ops.row_distances(
                nothing, difference @ jacobian, question.norm, question.backend
            )
        # Each class counts in units of the size by which an error of its gradient would be measured.
        own = ops.row_distances(nothing, winner.to(graph.x.dtype) @ jacobian, question.norm, question.backend)
        scale = torch.maximum(distance[part], own)
        cotangents[0, part] = torch.where(scale > 0, weights * own / scale, weights).to(cotangents.dtype)
        ratio, other = nearest.ratios(distance[part], part), others[part]
        slot = reference.nearest(ratio.gather(1, other), margin[part].gather(1, other)).unsqueeze(1)
        winners[part] = torch.cat((prediction[part].unsqueeze(1), other.gather(1, slot)), 1)
        mixed = cotangents[0, part].to(weight.dtype) @ weight
        formed[part] = torch.cat((weight[winners[part]], mixed.unsqueeze(1)), 1) @ jacobian
    ratio, pair = nearest.ratios(distance), graph.rows(winners.t())
    unit, known = torch.finfo(graph.x.dtype).eps, ~ratio.isnan().any(1)
    seen = max(_disagreement(pair[known, row], formed[known, row]) for row in (0, 1))
    gap = max(seen, _disagreement(graph.vjp(cotangents)[known, 0], formed[known, 2]))
    if gap > min(ROUNDING * unit, SPARE * max(unit, seen)):
        reason = f"the gradients of the logits differ by {gap:.1e} from those of its input times its weights"
        if wanted is not None:
            raise ValueError(f"Exact: cannot go through the given head: {reason}; leave head=None for class rows")
        warnings.warn(
            f"model: {type(head).__name__} at its end is not all of it: {reason}; taking class rows", stacklevel=2
        )
        return None
    provenance = {
        "method": "exact",
        "distances": ratio.to(graph.logits.dtype),
        "vjps": torch.full_like(prediction, F + 3),
    }
    return Selection(graph.logits, winners, pair, provenance)
