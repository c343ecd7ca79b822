"""FAB, the fast adaptive boundary attack, on rows of the Jacobian that stream by."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fastsal import methods, validation
from fastsal.adversarial import Adversarial, classes_to_leave, distances, nearest_boundary, predicted
from fastsal.methods import Method
from fastsal.methods.base import Question
from fastsal.model.calling import Model
from fastsal.model.function import nonempty
from fastsal.model.linearization import Linearization, linearize

EPS = {math.inf: 0.3, 2.0: 1.0, 1.0: 5.0}  # of AutoAttack, for inputs between 0 and 1


def to_hyperplane(point: Tensor, row: Tensor, gap: Tensor, norm: float, bounds: tuple[float, float]) -> Tensor:
    """The shortest step from a point of a box to a hyperplane, within the box; where the two are apart, to the nearest corner.

    A step d moves each entry in the direction that closes the gap, as far as there is room. The shortest is d_i = ±min(λ abs
    row_i, room_i) for p = 2 and ±min(λ, room_i) for p = ∞, with the λ that closes it, and for p = 1 all room of the largest
    entries of the row, one after the other.

    Args:
        point: [b, D], float64, within the bounds.
        row: The hyperplane's normal vector, [b, D], float64, of largest entry near 1.
        gap: The hyperplane is {z: gap + ⟨row, z − point⟩ = 0}, float64 [b].
        norm: The p of the step.
        bounds: The box.

    Returns:
        The steps, [b, D]; 0 where the row is.
    """
    size, need = row.abs(), gap.abs().unsqueeze(1)
    direction = -row.sign() * gap.sign().unsqueeze(1)
    direction = direction.masked_fill(size.square() == 0, 0.0)
    room = (
        torch.where(direction > 0, bounds[1] - point, point - bounds[0]).clamp(min=0).masked_fill(direction == 0, 0.0)
    )
    tiny = torch.finfo(size.dtype).tiny
    if norm == 1:
        largest, order = size.sort(dim=1, descending=True, stable=True)
        sorted_room = room.gather(1, order)
        closed = pad((largest * sorted_room).cumsum(1), (1, 0))[:, :-1]  # by the entries before
        moves = torch.minimum(((need - closed) / largest.clamp(min=tiny)).clamp(min=0), sorted_room)
        return direction * torch.zeros_like(moves).scatter_(1, order, moves)
    weight, limit = (size.square(), room / size.clamp(min=tiny)) if norm == 2 else (size, room)
    ends, order = limit.sort(dim=1)  # the λ at which an entry has used its room
    weight = weight.gather(1, order).masked_fill(ends == 0, 0.0)
    closed = pad((weight * ends).cumsum(1), (1, 0))[:, :-1]
    moving = weight.flip(1).cumsum(1).flip(1)
    last = (closed + ends * moving < need).sum(1, keepdim=True).clamp(max=row.shape[1] - 1)
    length = (need - closed.gather(1, last)) / moving.gather(1, last).clamp(min=tiny)
    step: Tensor = direction * torch.minimum(length * size if norm == 2 else length, room)
    return step


def random_start(
    x: Tensor,
    radius: Tensor | float,
    norm: float,
    bounds: tuple[float, float],
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points at half the radius, a number or [b], around x [b, *S], in the box; the directions are drawn on the host."""
    draw = torch.rand if norm == math.inf else torch.randn
    direction = draw(x.shape, generator=generator, dtype=torch.float32).to(x.device).flatten(1).double()
    direction = 2 * direction - 1 if norm == math.inf else direction
    unit = direction / torch.linalg.vector_norm(direction, norm, dim=1, keepdim=True)
    step = unit * torch.as_tensor(radius, dtype=torch.float64, device=x.device).view(-1, 1) / 2
    start: Tensor = (x.flatten(1).double() + step).clamp(*bounds).to(x.dtype).view_as(x)
    return start


def descend(
    begin: Linearization,
    start: Tensor,
    question: Question,
    method: Method,
    *,
    steps: int,
    alpha_max: float,
    eta: float,
    beta: float,
    bounds: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """One run of FAB: the nearest points that it meets outside of given classes.

    A step goes from the current point beyond the nearest linearised boundary, `nearest_boundary`, and is drawn towards the
    point where x itself would meet the same boundary, by the share α = ‖step‖ / (‖step‖ + ‖that from x‖). Where the model
    errs on the result, the next step begins nearer to x.

    Args:
        begin: The model's forward pass at x, [b, *S], b >= 1.
        start: Where the run begins, [b, *S].
        question: The norm, and the classes to leave, its `target`.
        method: How to find the nearest boundary.
        steps, alpha_max, eta, beta, bounds: As in `fab`.

    Returns:
        The points [b, *S], x itself where there is none, and their distances, float64 [b], +inf there.
    """
    own, norm = question.target, question.norm
    assert own is not None
    x, everyone = begin.leaf.detach(), torch.arange(len(own), device=own.device)
    function, origin = begin.function(everyone), x.flatten(1).double()
    found, points = x, start
    best = torch.full((len(x),), math.inf, dtype=torch.float64, device=x.device)
    column = (-1, *(1,) * (x.dim() - 1))
    for _ in range(steps):
        selection, _, row = nearest_boundary(begin.at(everyone, points.detach()), method, question)
        scores = selection.logits.double().gather(1, selection.winners)
        row = torch.where(row.isfinite().all(1, keepdim=True), row, 0.0)
        largest = row.abs().amax(1).masked_fill((row == 0).all(1), 1.0)
        row, gap = row / largest.unsqueeze(1), ((scores[:, 0] - scores[:, 1]) / largest).nan_to_num(0.0, 0.0, 0.0)
        here = points.flatten(1).double()
        step = to_hyperplane(here, row, gap, norm, bounds)
        direct = to_hyperplane(origin, row, gap + (row * (origin - here)).sum(1), norm, bounds)
        lengths = torch.linalg.vector_norm(torch.stack((step, direct)), norm, dim=2)
        share = (lengths[0] / lengths.sum(0)).nan_to_num(alpha_max).clamp(max=alpha_max).unsqueeze(1)
        here = torch.lerp(here + eta * step, origin + eta * direct, share).clamp(*bounds)
        points = here.to(x.dtype).view_as(x)
        with begin.same_precision():
            errs = predicted(function, points) != own
        distance = distances(points, x, norm)
        better = errs & (distance < best)
        found, best = torch.where(better.view(column), points, found), torch.where(better, distance, best)
        points = torch.where(errs.view(column), torch.lerp(x, points, beta), points)
    return found, best


def fab(
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
    steps: int = 100,
    restarts: int = 1,
    bounds: tuple[float, float] = (0.0, 1.0),
    eps: float | None = None,
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    seed: int = 0,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Adversarial:
    """Small adversarial perturbations of a batch within a box of allowed values, by FAB, the fast adaptive boundary attack.

    At the current point z the logits are replaced by their linearisation, whose nearest boundary is that of the class j with
    the smallest abs(Ψᶜ − Ψʲ) / ‖g_c − g_j‖_q. With d the shortest step from z to that boundary within the box, d₀ the one
    from x, and α = min(‖d‖_p / (‖d‖_p + ‖d₀‖_p), `alpha_max`), the next point is (1 − α)(z + η d) + α(x + η d₀), clipped to
    the box. Where the model errs there, the point is kept if it is the nearest so far, and the next step begins at x + β(z −
    x) (Croce and Hein, ICML 2020, arXiv 1907.02044; untargeted). A single run gives the images of AutoAttack's code up to
    rounding, which takes entries of a gradient below 1e-8 for zero, and here they count.

    Every step takes the rows of the Jacobian of all examples once, and two forward passes. Results are deterministic and carry
    no gradients.

    Args:
        model: An `nn.Module` in evaluation mode, or any callable, as in `analyze`.
        x: [B, *S], float32, float64, float16 or bfloat16, within the bounds. Distances are in its units.
        args: What the model takes after x, as in `analyze`.
        kwargs: The same by name.
        layer: The perturbations are those of the output of this module at x, as in `analyze`; None for x itself.
        classes: Which classes to walk to, as in `analyze`: bool [n] or [B, n]; None for all.
        labels: The true classes, int64 [B]: an example that the model gets wrong already comes back unperturbed, at distance 0.
            None stands for the model's own predictions.
        norm: The p of the perturbation: 2, 1, `math.inf` or "inf".
        method: How the nearest boundary is found, as in `analyze`: "auto" (default), or another.
        steps: How many steps a run takes.
        restarts: How many runs. The first begins at x, each further one at a random point, half as far from x as the nearest
            that was found before, or as `eps` where that is less.
        bounds: The least and the greatest value of an entry, (0, 1) by default; `(-math.inf, math.inf)` for none.
        eps: The size of perturbations of interest, which bounds the random starts; None for AutoAttack's: 1 for p = 2, 0.3
            for p = ∞, 5 for p = 1.
        alpha_max: The greatest share of the way back to x, in [0, 1].
        eta: η, how far to step, 1 being the linearised boundary.
        beta: β, in (0, 1]: the share of a successful perturbation that the next step begins with.
        seed: Of the random starts.
        chunk_size: How many class gradients to take at once, as in `analyze`.
        backend: As in `analyze`.

    Returns:
        An `Adversarial`.

    Raises:
        TypeError: x or what the model returns is no tensor of floating dtype.
        ValueError: x is out of bounds, the labels or an option are wrong, or the model is one that `analyze` refuses.
        RuntimeError: A backend that was named cannot run, or the model itself failed.

    Examples:
        >>> import torch, fastsal
        >>> linear = torch.nn.Linear(2, 1)
        >>> _ = linear.weight.data.copy_(torch.tensor([[3.0, 4.0]])), linear.bias.data.fill_(-1.0)
        >>> found = fastsal.fab(linear, torch.tensor([[0.6, 0.8]]))  # ρ = (3·0.6 + 4·0.8 − 1) / 5
        >>> round(found.distance.item(), 2), found.prediction.item(), found.adversarial_class.item()
        (0.8, 1, 0)
    """
    p = validation.norm(norm)
    chosen = methods.resolve(method, p)
    validation.chunk_size(chunk_size)
    validation.positive("steps", steps)
    validation.positive("restarts", restarts)
    eps = EPS[p] if eps is None else eps
    for name, value, holds, wants in (
        ("bounds", bounds, bounds[0] < bounds[1], "the least and the greatest value of an entry"),
        ("eps", eps, 0 < eps < math.inf, "a number > 0"),
        ("alpha_max", alpha_max, 0 <= alpha_max <= 1, "a number from 0 to 1"),
        ("eta", eta, 0 < eta < math.inf, "a number > 0"),
        ("beta", beta, 0 < beta <= 1, "a number > 0, at most 1"),
    ):
        if not holds:
            raise ValueError(f"{name}: got {value!r}, wants {wants}")
    points, args, kwargs = nonempty((x, args, kwargs))
    with linearize(model, points, args=args, kwargs=kwargs, layer=layer) as begin:
        start, prediction = begin.leaf.detach(), begin.logits.argmax(1)
        if ((start < bounds[0]) | (start > bounds[1])).any():
            least, greatest = start.aminmax()
            raise ValueError(
                f"x: got entries from {least.item():.3g} to {greatest.item():.3g}, wants them within bounds={bounds}; pass "
                "other bounds, or images that the model normalises itself"
            )
        target = classes_to_leave(labels, len(x), begin.logits)
        allowed = validation.allowed(classes, begin.logits.shape, start.device) if len(x) else None
        question = Question(p, chunk_size, backend, target, allowed)
        validation.warn_probabilities(begin.logits)
        found = start.clone()
        distance = torch.zeros(len(start), dtype=torch.float64, device=start.device)
        standing = (prediction == target).nonzero().squeeze(1)
        generator = torch.Generator().manual_seed(seed)
        if len(standing):
            right = begin.at(standing)
            own, asked = right.leaf.detach(), question.at(standing)
            near, size = own, torch.full((len(standing),), math.inf, dtype=torch.float64, device=start.device)
            for run in range(restarts):
                first = random_start(own, size.clamp(max=eps), p, bounds, generator) if run else own
                again, length = descend(
                    right, first, asked, chosen, steps=steps, alpha_max=alpha_max, eta=eta, beta=beta, bounds=bounds
                )
                closer = (length < size).view(-1, *(1,) * (own.dim() - 1))
                near, size = torch.where(closer, again, near), torch.minimum(length, size)
            found[standing], distance[standing] = near, size
        success = distance.isfinite()
        with begin.same_precision():
            reached = predicted(begin.function(torch.arange(len(start), device=start.device)), found)
        taken = torch.zeros_like(target).index_fill_(0, standing, steps * restarts)
        result = Adversarial(found, distance.to(begin.logits.dtype), success, prediction, reached, taken)
    return result if len(x) else result[:0]
