"""Exact ρ̃ through the features: where the logits leave a linear layer with F < n inputs, F passes give every row.

Such a layer, the head, computes Ψ = W·f(x) + b from features f(x). So the Jacobian of the logits is J = W·J_f, with J_f [F, D]
the Jacobian of the features. The difference of two rows is formed as Δ_j = (w_{i*} − w_j)ᵀ J_f, and the weights are subtracted
first, in float64: a class whose weights nearly equal the predicted one's keeps its digits, which the difference of two rounded
rows would lose. For p = 2 the Gram matrix J_f J_fᵀ tells, with a bound of its rounding, of which classes the rows have to be
formed (`fastsal.methods.gram`).

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
from fastsal.methods.gram import screen
from fastsal.methods.mixtures import mixture
from fastsal.model.calling import Model
from fastsal.model.linearization import Linearization
from fastsal.tensor import ops, reference

TILE_BYTES = 1 << 26
WIDE = 1 << 25  # multiplications to form the rows of an example, from which on it pays to take one at a time
ROUNDING = 1000.0  # units of it that two ways to one row may be apart, at most
PASSES = 3  # besides those of the features: the winners' rows and a mixture
SPARE = 8.0  # and in units of what they are apart for the rows of the winners
REDUCED = 512.0  # units of rounding between a dot product in a dtype and one in less precision (TF32: about 2000)


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


def _places(head: nn.Module, calls: list[tuple[nn.Module, Tensor, Tensor]], graph: Linearization) -> Tensor | str:
    """Where the logits of each example leave `head`, which may see several vectors of it: int64 [B]; or why they do not."""
    mine = [(inputs, output) for module, inputs, output in calls if module is head]
    weight = _weight(head)
    if weight is None:
        return f"{type(head).__name__} is neither a linear layer nor a 1x1 convolution"
    if len(mine) != 1:
        return f"it runs {len(mine)} times in a forward pass, wants once"
    inputs, output = mine[0]
    features, (B, n) = _vectors(head, inputs), graph.logits.shape
    if features is None or len(features) != B:
        return (
            f"its input has shape {tuple(inputs.shape)}, wants vectors of {weight.shape[1]} features for each example"
        )
    if not inputs.dtype == output.dtype == weight.dtype == graph.x.dtype:
        return "it works in another precision than x"
    if graph.x.dtype not in (torch.float32, torch.float64):
        return f"in {graph.x.dtype} what a head leaves out cannot be told from rounding"
    if output.numel() != features.shape[1] * graph.logits.numel():
        return "its output is not the logits"
    outputs = output.detach().reshape(B, -1, n)
    same = (outputs == graph.logits.unsqueeze(1)).all(2)
    if not same.any(1).all():
        return "its output is not the logits, bit for bit"
    places = same.shape[1] - 1 - same.flip(1).int().argmax(1)  # of equals the last, as causal models have it
    each = torch.arange(B, device=places.device)
    features = features.detach()[each, places].double()
    exact, size = features @ weight.double().T, features.square() @ weight.double().T.square()
    if isinstance(head.bias, Tensor):
        exact += head.bias.detach().double()
    off = torch.linalg.vector_norm(outputs[each, places] - exact)
    if off > REDUCED * torch.finfo(output.dtype).eps * size.sum().sqrt():
        return "it works in less precision than x has"
    return places


def _vectors(head: nn.Module, inputs: Tensor) -> Tensor | None:
    """What a head sees of each example as vectors [B, L, F]; None where these are no vectors of an example."""
    if isinstance(head, nn.Linear):
        return inputs.reshape(len(inputs), -1, inputs.shape[-1]) if inputs.dim() > 1 else None
    return inputs.flatten(1).unsqueeze(1) if inputs[0, 0].numel() == 1 else None


def _find(
    graph: Linearization, wanted: nn.Module | None, widest: float = math.inf
) -> tuple[nn.Module, Tensor, Tensor] | None:
    """The head that the caller wants, or one that is recognised and narrow enough to pay, or None where there is none.

    With it come its weight [n, F], and the places in its output where the logits are, int64 [B].
    """
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
            if (weight := _weight(module)) is not None
            and len(weight) == n
            and 2 <= weight.shape[1] < min(n - PASSES + 1, widest + 1)
        ]
    )
    if not heads:
        return None
    with _recorded(heads) as calls, graph.same_precision():
        graph.function(np.arange(len(graph.leaf)))(graph.leaf.clone())
    for head in heads:
        places, weight = _places(head, calls, graph), _weight(head)
        if not isinstance(places, str) and weight is not None:
            return head, weight, places
        if wanted is not None:
            raise ValueError(f"Exact: cannot go through the given head: {places}; leave head=None for class rows")
    return None


def pays(graph: Linearization, most: int, memory_limit: int) -> bool:
    """Whether there is a head by which the rows of all classes take at most so many passes an example."""
    if graph.batch is not None and graph.batch.whole:
        return False
    found = _find(graph, None, most - PASSES)
    return found is not None and found[1].shape[1] * graph.x.shape[1] * graph.x.element_size() <= memory_limit


def _jacobian(features: Linearization, chunk_size: int | None) -> Tensor:
    """J_f of every example: [B, F, D], by F passes."""
    B, F = features.logits.shape
    held = features.x.new_empty(B, F, features.x.shape[1])

    def keep(which: Tensor, rows: Tensor) -> None:
        held[:, which[0]] = rows

    features.sweep(torch.arange(F, device=held.device).unsqueeze(1).expand(F, B), chunk_size, keep)
    return held


def _to_form(
    weight: Tensor, jacobian: Tensor, nearest: Nearest, part: slice, distance: Tensor, norm: float
) -> Iterator[tuple[slice, Tensor]]:
    """Some examples of a part at a time, and the classes whose rows are to be formed, int64 [c].

    Of a wide head that is one example, and for p = 2 the norms of the other classes are entered into `distance` [B, n].
    """
    (n, F), D = weight.shape, jacobian.shape[2]
    every = torch.arange(n, device=weight.device)
    if n * F * D < WIDE:
        yield slice(None), every
        return
    for example, rows in enumerate(jacobian):
        at, classes = part.start + example, every
        if norm == 2 and weight.dtype == torch.float32 and D > F:
            own = nearest.prediction[at]
            candidates = (every != own) if nearest.allowed is None else nearest.allowed[at]
            distance[at], form = screen(weight, rows, own, nearest.margin[at], candidates)
            classes = form.nonzero().squeeze(1)
        yield slice(example, example + 1), classes


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
    recognised = _find(graph, wanted)
    if recognised is None:
        return None
    head, weight, places = recognised
    B, n = graph.logits.shape
    F, D = weight.shape[1], graph.x.shape[1]
    others = nearest.by_class()
    size = memory_limit // (F * D * graph.x.element_size())
    if size == 0 or (wanted is None and F + PASSES >= 1 + others.shape[1]):
        return None

    def features(model: Model, which: Tensor, x: Tensor) -> Tensor:
        with _recorded([head]) as calls:
            model(x)
        found = _vectors(head, calls[0][1])
        assert found is not None
        found = found if len(found) == len(x) else found[which]  # of a model that has to see the whole batch
        return found[torch.arange(len(which), device=which.device), places[which]]

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
        winner = weight[prediction[part]].double().unsqueeze(1)
        nothing = graph.x.new_zeros(len(jacobian), D)
        for some, classes in _to_form(weight, jacobian, nearest, part, distance, question.norm):
            for those in classes.split(tile):
                difference = (winner[some] - weight[those].double()).to(graph.x.dtype)
                distance[part][some][:, those] = ops.row_distances(
                    nothing[some], difference @ jacobian[some], question.norm, question.backend
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
        question.report(part.stop / B)
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
    distances = ratio.to(graph.logits.dtype)
    provenance = {"method": "exact", "distances": distances, "vjps": torch.full_like(prediction, F + PASSES)}
    return Selection(graph.logits, winners, pair, provenance)
