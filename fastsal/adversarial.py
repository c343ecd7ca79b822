"""Adversarial perturbations: DeepFool, which takes the step that ρ̃ measures until the prediction changes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsal import methods, validation
from fastsal.methods import Method
from fastsal.methods.base import Question, Selection
from fastsal.model.calling import Model, logits_alone
from fastsal.model.function import nonempty
from fastsal.model.linearization import Linearization, linearize
from fastsal.tensor import reference
from fastsal.tensor.results import Results

HALVINGS = 16


@dataclass(frozen=True, eq=False, repr=False)
class Adversarial(Results):
    """What `deepfool` found for each of B examples, an object to work with as `Geometry` is.

    Tensors have the shape [B] unless another is given.

    Attributes:
        adversarial: The perturbed inputs, [B, *S] in x's dtype; x itself where nothing was found.
        distance: ‖adversarial − x‖_p, an upper bound of the adversarial robustness ρ(x), the distance of the nearest input that
            is classified differently. It is +inf where nothing was found, and 0 where `labels` were given and the model errs on
            x already. float64 for float64 x, else float32.
        success: Whether `adversarial` is classified differently from the class that was to be left, bool.
        prediction: The class of x, int64.
        adversarial_class: The class of `adversarial`, int64.
        steps: How many linearisations were taken, int64.
    """

    adversarial: Tensor
    distance: Tensor
    success: Tensor
    prediction: Tensor
    adversarial_class: Tensor
    steps: Tensor

    _shown: ClassVar = ("distance", "steps", "success")


def distances(a: Tensor, b: Tensor, norm: float) -> Tensor:
    """‖a − b‖_p of every example, float64 [B], for a and b [B, *S]."""
    norms: Tensor = torch.linalg.vector_norm((a.double() - b.double()).flatten(1), norm, dim=1)
    return norms


def predicted(model: Model, x: Tensor) -> Tensor:
    """What the model predicts: int64 [B]."""
    return logits_alone(model, x).argmax(1)


def to_boundary(model: Model, x: Tensor, adversarial: Tensor, reference: Tensor) -> Tensor:
    """Finds the point of each segment from x to adversarial [B, *S] nearest to x that is still misclassified, by bisection.

    Its class differs from `reference` [B], while a point nearer to x by 2⁻¹⁶ of the segment has that class. Where `adversarial`
    is not misclassified, it comes back as it is; where x is, x comes back.
    """
    column = (-1, *(1,) * (x.dim() - 1))

    def at(fraction: Tensor) -> Tensor:
        return torch.lerp(x, adversarial, fraction.to(x.dtype).view(column))

    low, high = (torch.full((len(x),), value, dtype=torch.float64, device=x.device) for value in (0.0, 1.0))
    high = torch.where(predicted(model, x) != reference, low, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        errs = predicted(model, at(middle)) != reference
        low, high = torch.where(errs, low, middle), torch.where(errs, middle, high)
    return at(high)


def nearest_boundary(graph: Linearization, method: Method, question: Question) -> tuple[Selection, Tensor, Tensor]:
    """The nearest linearised boundary of given classes, which need not be the predicted ones.

    Args:
        graph: The model's forward pass at B examples.
        method: How to find the boundary.
        question: The norm, and the class c of every example, its `target`.

    Returns:
        What the method found, whose `winners` are c and the class j ≠ c for which |Ψᶜ − Ψʲ| / ‖g_c − g_j‖_q is smallest; and in
        float64 that distance [B] and the row g_c − g_j [B, D].
    """
    selection = method.select(graph, replace(question, signed=False))
    pair = selection.pair.double()
    row = pair[:, 0] - pair[:, 1]
    scores = selection.logits.double().gather(1, selection.winners)
    margin = (scores[:, 0] - scores[:, 1]).abs()
    return selection, reference.ratios(margin, reference.vector_norm(row, reference.dual(question.norm))), row


def _step(length: Tensor, row: Tensor, norm: float) -> Tensor:
    """The perturbation, of p-norm `length` [b], whose inner product with row [b, D] is the lowest."""
    scaled = row / row.abs().amax(1, keepdim=True)  # no square overflows
    direction = scaled.sign()
    if norm == 2:
        direction = scaled / torch.linalg.vector_norm(scaled, dim=1, keepdim=True)
    elif norm == 1:
        largest = scaled.abs().argmax(1, keepdim=True)
        direction = torch.zeros_like(row).scatter_(1, largest, direction.gather(1, largest))
    step: Tensor = -length.unsqueeze(1) * direction
    return step


def walk(
    begin: Linearization,
    own: Tensor,
    norm: float,
    method: Method,
    *,
    finished: Callable[[Tensor, Tensor], Tensor],
    length: Callable[[Tensor, Tensor], Tensor],
    max_steps: int,
    overshoot: float,
    bounds: tuple[float, float] = (-math.inf, math.inf),
    classes: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Walks out of given classes by DeepFool's iteration.

    A step goes to the class's nearest linearised boundary at the current point, `nearest_boundary`, and a little farther. An
    example that is finished, or without a way out (zero gradients, NaN), stays where it is and costs nothing any more.

    Args:
        begin: The model's forward pass where the examples begin, B >= 1 of them.
        own: The class that each is to leave, int64 [B].
        norm: The norm p of a perturbation.
        method: How to find the nearest boundary.
        finished: Which examples are through, bool [B], from the current points [B, *S] and their logits [B, n].
        length: How far to step, float64 [b], from the boundaries' distances, float64 [b], and the points [b, *S].
        max_steps: How many steps to take at most.
        overshoot: By how much the sum of the steps is lengthened.
        bounds: The box that the points are clipped to.
        classes: Which classes may be the nearest, bool [B, n]; None for all.
        chunk_size: As in `analyze`.
        backend: As in `analyze`.

    Returns:
        Where the examples are in the end, [B, *S], and how many steps each took, int64 [B].
    """
    start, graph = begin.leaf.detach(), begin
    found, total = start.clone(), torch.zeros_like(start, dtype=torch.float64)
    steps, active = torch.zeros_like(own), torch.arange(len(own), device=own.device)
    whole = Question(norm, chunk_size, backend, own, classes)
    validation.warn_probabilities(graph.logits)
    logits = graph.logits.clone()
    for step in range(max_steps):
        if step:
            graph = begin.at(active, found[active])
            logits[active] = graph.logits
        going = ~finished(found, logits)[active]
        if not going.any():
            break
        if not going.all():
            active, graph = active[going], graph.at(going.nonzero().squeeze(1))
        steps[active] += 1
        _, distance, row = nearest_boundary(graph, method, whole.at(active))
        movable = distance.isfinite() & (row != 0).any(1) & row.isfinite().all(1)
        active, distance, row = active[movable], distance[movable], row[movable]
        if not len(active):
            break
        total[active] += _step(length(distance, found[active]), row, norm).view_as(total[active])
        moved = start[active].double() + (1 + overshoot) * total[active]
        found[active] = moved.to(start.dtype).clamp(*bounds)
    return found, steps


def classes_to_leave(labels: Tensor | None, examples: int, logits: Tensor) -> Tensor:
    """The class that each example is to be moved out of: its label, checked, or where there are none the predicted one."""
    if labels is None:
        return logits.argmax(1)
    validation.labels("labels", labels, (examples, logits.shape[1]))
    own: Tensor = nonempty(labels).to(logits.device)
    return own


def deepfool(
    model: Model,
    x: Tensor,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layer: nn.Module | str | None = None,
    classes: Tensor | None = None,
    labels: Tensor | None = None,
    norm: float | str = 2,
    method: str | Method = "auto",
    max_steps: int = 50,
    overshoot: float = 0.02,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Adversarial:
    """Small adversarial perturbations of a batch, by DeepFool.

    At the current point z the logits are replaced by their linearisation. Its nearest decision boundary is reached by a
    perturbation of size ρ̃(z) = m_{j*} / ‖Δ_{j*}‖_q, where j* is the runner-up, m_{j*} the difference of the two logits and
    Δ_{j*} that of their gradients; for p = 2 it points along −Δ_{j*} (Moosavi-Dezfooli, Fawzi and Frossard, CVPR 2016, arXiv
    1511.04599). The first of these sizes is ρ̃(x) itself. Steps are taken until the prediction changes. Then their sum is
    lengthened by `overshoot`, and the segment from x to the result is bisected for the point nearest to x that is still
    misclassified. Its distance is an upper bound of the adversarial robustness ρ(x), and exact for linear and affine binary
    classifiers.

    An example for which nothing is found (its gradients are zero or NaN, or `max_steps` did not suffice) has `success` false
    and the distance +inf. Results are deterministic and carry no gradients.

    Args:
        model: An `nn.Module` in evaluation mode, or any callable, from x [B, *S] to logits [B, n] or to one score [B] or [B,
            1], as in `analyze`.
        x: [B, *S], float32, float64, float16 or bfloat16. Distances are in its units. No box of allowed values is imposed.
        args: What the model takes after x, as in `analyze`.
        kwargs: The same by name.
        layer: The perturbations are those of the output of this module at x, as in `analyze`; None for x itself.
        classes: Which classes to walk to, as in `analyze`: bool [n] or [B, n]; None for all.
        labels: The true classes, int64 [B]: an example that the model gets wrong already comes back unperturbed, at distance 0.
            None stands for the model's own predictions, as ρ and ρ̃ mean it.
        norm: The p of the perturbation: 2, 1, `math.inf` or "inf".
        method: Which classes a step considers, as in `analyze`: "auto" (default), "exact" or "certified" for all,
            "candidates" for the 10 highest logits besides the predicted one (DeepFool's own), or a method with options.
        max_steps: How many linearisations to take at most. Examples that are done cost nothing more.
        overshoot: By which share to step beyond the linearised boundary. It costs no distance: the bisection takes it back.
        chunk_size: How many class gradients to take at once, as in `analyze`.
        backend: As in `analyze`.

    Returns:
        An `Adversarial`.

    Raises:
        TypeError: x or what the model returns is no tensor of floating dtype.
        ValueError: The labels or an option are wrong, or the model is one that `analyze` refuses.
        RuntimeError: A backend that was named cannot run, or the model itself failed.

    Examples:
        >>> import torch, fastsal
        >>> linear = torch.nn.Linear(2, 1)
        >>> _ = linear.weight.data.copy_(torch.tensor([[3.0, 4.0]])), linear.bias.data.fill_(5.0)
        >>> found = fastsal.deepfool(linear, torch.tensor([[3.0, 4.0]]))  # ρ = |9 + 16 + 5| / 5
        >>> round(found.distance.item(), 3), found.prediction.item(), found.adversarial_class.item(), found.steps.item()
        (6.0, 1, 0, 1)
    """
    p = validation.norm(norm)
    validation.positive("max_steps", max_steps)
    if not overshoot >= 0:
        raise ValueError(f"overshoot: got {overshoot!r}, wants a number >= 0")
    chosen = methods.resolve(method, p)
    validation.chunk_size(chunk_size)
    points, args, kwargs = nonempty((x, args, kwargs))
    with linearize(model, points, args=args, kwargs=kwargs, layer=layer) as begin:
        start, prediction = begin.leaf.detach(), begin.logits.argmax(1)
        target = classes_to_leave(labels, len(x), begin.logits)
        function = begin.function(torch.arange(len(start), device=start.device))

        def run(points: Tensor) -> Tensor:
            with begin.same_precision():
                return function(points)

        def beyond(distance: Tensor, point: Tensor) -> Tensor:
            # On the boundary itself the step is empty: go one rounding error of x farther, to the other side of it.
            tiny = torch.finfo(start.dtype).eps * distances(point, torch.zeros_like(point), p)
            return torch.maximum(distance, tiny)

        found, steps = walk(
            begin,
            target,
            p,
            chosen,
            finished=lambda points, logits: logits.argmax(1) != target,
            length=beyond,
            max_steps=max_steps,
            overshoot=overshoot,
            classes=validation.allowed(classes, begin.logits.shape, start.device) if len(x) else None,
            chunk_size=chunk_size,
            backend=backend,
        )
        success = (predicted(run, found) != target) & found.flatten(1).isfinite().all(1)
        column = (-1, *(1,) * (start.dim() - 1))
        found = torch.where(success.view(column), to_boundary(run, start, found, target), start)
        reached = predicted(run, found)
        distance = torch.where(success, distances(found, start, p), math.inf).to(begin.logits.dtype)
    result = Adversarial(found, distance, success, prediction, reached, steps)
    return result if len(x) else result[:0]


def boundary_normal(model: Model, point: Tensor, own: Tensor, *, norm: float | str = 2) -> Tensor:
    """The normal of the decision boundary at points on it, such as those that `deepfool` finds.

    At a point z where two classes tie, the boundary between them is the zero set of Ψᶜ − Ψʲ, with c the class on this side and
    j the one beyond, and its normal is the gradient of that: g†(z), the binarised saliency map there. At x itself g†(x) is what
    the linearised classifier takes for it. `torch.cosine_similarity` says how far they agree: it is 1 where the classifier is
    linear in between.

    Args:
        model: As in `deepfool`.
        point: [B, *S], `Adversarial.adversarial`.
        own: int64 [B], the classes c on the side of the boundary where x is: `Adversarial.prediction`.
        norm: The p of the perturbation, by which the nearest boundary at z is found.

    Returns:
        ∇(Ψᶜ − Ψʲ)(z), shaped like `point`, for the class j whose linearised boundary with c is nearest to z. It points to x's
        side.

    Raises:
        TypeError, ValueError: As in `analyze`.

    Examples:
        >>> import torch, fastsal
        >>> linear, x = torch.nn.Linear(4, 2), torch.rand(3, 4)
        >>> moved = fastsal.deepfool(linear, x)
        >>> normal = fastsal.boundary_normal(linear, moved.adversarial, moved.prediction)
        >>> here = fastsal.analyze(linear, x, keep_saliency=True).binarized_saliency
        >>> torch.allclose(torch.cosine_similarity(normal, here), torch.ones(3))
        True
    """
    with linearize(model, point) as graph:
        validation.labels("own", own, (len(point), graph.n))
        question = Question(validation.norm(norm), None, "auto", own.to(graph.leaf.device, torch.int64))
        _, _, row = nearest_boundary(graph, methods.resolve("auto", question.norm), question)
    return row.view_as(point).to(point.dtype)
