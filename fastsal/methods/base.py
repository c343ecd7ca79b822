"""What a method is and what it returns, and the one rule by which a row of the Jacobian is the nearest."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastsal.model.linearization import Linearization
from fastsal.progress import Report, ignore
from fastsal.tensor import ops, reference


@dataclass(frozen=True)
class Selection:
    """What a method found for every example of a batch.

    Attributes:
        logits: The model's logits, [B, n].
        winners: The prediction i*, or the target in its place, and the runner-up j*: int64 [B, 2].
        pair: Their rows of the Jacobian, [B, 2, D].
        provenance: The fields of `Geometry` that say how they were found: `method`, `vjps`, and those that differ from what
            `margin_geometry` fills in.
    """

    logits: Tensor
    winners: Tensor
    pair: Tensor
    provenance: dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What is asked of a method, for B examples.

    Attributes:
        norm: The p of the perturbation.
        chunk_size: How many rows to take at once; None leaves it to the method.
        backend: The name of the backend that measures the rows, or "auto".
        target: The classes whose nearest boundaries are asked for, int64 [B]; None for the predicted ones.
        classes: Which classes may be the nearest, bool [B, n]; None for all.
        signed: Whether the distance of a boundary that x lies beyond, where a class has a higher logit than the target, is
            negative. Else all are positive, as DeepFool and FAB have them.
        report: Is told, now and then, the share of the work that is done.
    """

    norm: float
    chunk_size: int | None = None
    backend: str = "auto"
    target: Tensor | None = None
    classes: Tensor | None = None
    signed: bool = True
    report: Report = ignore

    def at(self, examples: Tensor | slice) -> "Question":
        """The same, asked of some of the examples."""
        target, classes = (None if value is None else value[examples] for value in (self.target, self.classes))
        return replace(self, target=target, classes=classes)

    def margins(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The class whose nearest boundary is asked for, int64 [B], its margins, and which classes may be the nearest.

        The class is the target c, or without one the predicted class. Its margins m_j = Ψᶜ − Ψʲ are float64 [B, n], and +inf
        over the classes that may not be the nearest. Without a sign they are |Ψᶜ − Ψʲ|, where c is lifted by next to nothing
        over the classes that tie with it: there is no boundary to one whose gradient is the same.

        Raises:
            ValueError: An example has no class that may be the nearest.
        """
        own, margin = reference.margins(logits, self.target)
        if not self.signed:
            margin = margin.abs().clamp(min=torch.finfo(logits.dtype).tiny)
        if self.classes is None:
            return own, margin, None
        allowed = self.classes.scatter(1, own.unsqueeze(1), False)
        if not allowed.any(1).all():
            raise ValueError(
                "classes: allows an example no class but the one whose boundary is asked for, wants another one at least"
            )
        return own, margin.masked_fill(~allowed, math.inf), allowed


class Method(ABC):
    """A way to find the nearest class: a frozen dataclass of options, with a `select`.

    Attributes:
        name: What `fastsal.analyze` and the command line call it.
        norms: The norms p of a perturbation that it can serve.
    """

    name: ClassVar[str]
    norms: ClassVar[frozenset[float]] = frozenset((1.0, 2.0, math.inf))

    @abstractmethod
    def select(self, graph: Linearization, question: Question) -> Selection:
        """Finds the prediction, the nearest class and their rows for every example of a recorded pass, of B >= 1 examples."""


class Nearest:
    """The nearest of the rows that were visited so far, for every example of a batch.

    The rows of an example may come in any number of visits. The first of all is the row of its predicted class, the anchor,
    from which the distance of every other row is measured.

    Attributes:
        prediction: i*, int64 [B], or the target in its place.
        margin: m_j of every class, float64 [B, n], as `Question.margins` has them.
        allowed: Which classes may be the nearest, bool [B, n]; None for all but i*.
        distances: m_j / ‖g − g_j‖_q of the classes that were visited, +inf elsewhere and at i*, float64 [B, n].
        runner_up: The nearest class so far, int64 [B, 1], or [B, 0] before there is one.
        pair: The anchor and the nearest row so far, [B, 2, D], or [B, 0, D] before there is an anchor.
    """

    def __init__(self, logits: Tensor, question: Question) -> None:
        self._norm, self._backend = question.norm, question.backend
        self.prediction, self.margin, self.allowed = question.margins(logits)
        self.distances = torch.full_like(self.margin, math.inf)
        self.runner_up = self.prediction.new_empty(len(logits), 0)
        self.pair = logits.new_empty(len(logits), 0, 0)

    def by_class(self) -> Tensor:
        """The classes that may be the nearest, int64 [B, K], ascending; where an example has fewer, the first stands in."""
        order = reference.other_classes(self.prediction, self.margin.shape[1])
        if self.allowed is not None:
            order = order.gather(1, (~self.allowed.gather(1, order)).int().sort(stable=True, dim=1).indices)
        return self._only_allowed(order)

    def by_margin(self, count: int) -> Tensor:
        """At most `count` of them, the smallest margin first: a NaN before all, the lowest class among equals."""
        others = reference.other_classes(self.prediction, self.margin.shape[1])
        most = torch.finfo(self.margin.dtype).max  # before the classes that are not allowed, which have +inf too
        margin = self.margin.gather(1, others).nan_to_num(-math.inf, most, -math.inf)
        if self.allowed is not None:
            margin = margin.masked_fill(~self.allowed.gather(1, others), math.inf)
        return self._only_allowed(others.gather(1, reference.smallest(margin, min(count, others.shape[1]))))

    def _only_allowed(self, order: Tensor) -> Tensor:
        """Classes [B, k], those that are not allowed the last ones, without these."""
        if self.allowed is None:
            return order
        count = self.allowed.gather(1, order).sum(1, keepdim=True)
        order = torch.where(torch.arange(order.shape[1], device=order.device) < count, order, order[:, :1])
        return order[:, : int(count.max())]

    def ratios(self, distance: Tensor, part: slice = slice(None)) -> Tensor:
        """m_j / ‖g − g_j‖_q of every class from ‖g − g_j‖_q, float64 [b, n]; +inf at i* and where j may not be the nearest."""
        ratio = reference.ratios(self.margin[part], distance).scatter(1, self.prediction[part].unsqueeze(1), math.inf)
        return ratio if self.allowed is None else ratio.masked_fill(~self.allowed[part], math.inf)

    def visit(self, classes: Tensor, rows: Tensor, examples: Tensor | None = None) -> None:
        """Compares more rows with the nearest so far.

        The state changes only after everything has been computed. So a visit that ran out of memory has left no trace, and its
        rows may be visited again, a few at a time.

        Args:
            classes: The classes that the rows belong to, int64 [e, c].
            rows: Their gradients, [e, c, D].
            examples: Which examples these are, int64 [e]; None for all of them.
        """
        e = slice(None) if examples is None else examples
        pair = self.pair[e]
        if pair.shape[1] == 0:
            pair = rows[:, :1].expand(-1, 2, -1).clone()
            classes, rows = classes[:, 1:], rows[:, 1:]
        distances, runner_up = self.distances[e], self.runner_up[e]
        if classes.shape[1] > 0:
            distance = ops.row_distances(pair[:, 0], rows, self._norm, self._backend)
            margin = self.margin[e]
            distances = distances.scatter(1, classes, reference.ratios(margin.gather(1, classes), distance))
            known = runner_up.shape[1]
            # Sorted, so that the lowest class among equals comes first.
            contenders, order = torch.cat((runner_up, classes), 1).sort(1)
            which = reference.nearest(distances.gather(1, contenders), margin.gather(1, contenders)).unsqueeze(1)
            slot = order.gather(1, which)
            row = rows.gather(1, (slot - known).clamp(min=0).unsqueeze(2).expand(-1, 1, rows.shape[2]))
            pair[:, 1:] = torch.where((slot >= known).unsqueeze(2), row, pair[:, 1:])
            runner_up = contenders.gather(1, which)
        if examples is None:
            self.pair, self.distances, self.runner_up = pair, distances, runner_up
        else:
            self.pair[e], self.distances[e], self.runner_up[e] = pair, distances, runner_up

    @property
    def winners(self) -> Tensor:
        """The prediction and the nearest class so far: int64 [B, 2]."""
        return torch.cat((self.prediction.unsqueeze(1), self.runner_up), 1)
