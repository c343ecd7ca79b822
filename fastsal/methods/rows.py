"""Methods that take rows of the Jacobian class by class: of every class (`Exact`) or of the highest logits (`Candidates`)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastsal.methods.base import Method, Nearest, Question, Selection
from fastsal.methods.features import through_features
from fastsal.model.linearization import Linearization


@dataclass(frozen=True)
class Exact(Method):
    """Looks at every class, and returns ρ̃ itself and all distances.

    It takes n backward passes for n classes. Where the logits leave a linear layer with F inputs, F + 3 passes give the same
    (`fastsal.methods.features` says how), and the cheaper way is taken.

    Args:
        head: The linear layer, a module of the model: an `nn.Linear`, or a 1×1 convolution on maps of one pixel. None looks for
            it. One that is given is used even where it does not pay.
        memory_limit: How many bytes the Jacobian of the layer's inputs may take. Where those of one example do not fit, the
            rows are taken class by class.

    Raises:
        TypeError: `head` is no module.
        ValueError: `memory_limit` is no number of bytes. Later, `analyze` raises it where a head that was given cannot serve.

    Examples:
        >>> import torch, fastsal
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(30, 8), torch.nn.ReLU(), torch.nn.Linear(8, 100))
        >>> fastsal.analyze(model, torch.randn(2, 30)).vjps.tolist()
        [11, 11]
        >>> fastsal.analyze(model, torch.randn(2, 30), method=fastsal.Exact(memory_limit=0)).vjps.tolist()
        [100, 100]
    """

    name: ClassVar = "exact"

    head: nn.Module | None = None
    memory_limit: int = 1 << 30

    def __post_init__(self) -> None:
        if self.head is not None and not isinstance(self.head, nn.Module):
            raise TypeError(f"Exact: got head of type {type(self.head).__name__}, wants a module of the model or None")
        if not isinstance(self.memory_limit, int) or self.memory_limit < 0:
            raise ValueError(f"Exact: got memory_limit={self.memory_limit!r}, wants a number of bytes")

    def select(self, graph: Linearization, question: Question) -> Selection:
        """Looks at all classes: by way of the features where that is possible and cheaper, else row by row."""
        nearest = Nearest(graph.logits, question)
        selection = through_features(graph, nearest, question, self.head, self.memory_limit)
        if selection is not None:
            return selection
        vjps = _stream(graph, nearest, nearest.by_class(), question)
        provenance = {"method": self.name, "distances": nearest.distances.to(graph.logits.dtype), "vjps": vjps}
        return Selection(graph.logits, nearest.winners, nearest.pair, provenance)


@dataclass(frozen=True)
class Candidates(Method):
    """Looks at the classes of the k highest logits besides the predicted one, and returns an upper bound of ρ̃.

    It takes k + 1 backward passes. The nearest class is often, not always, among them: `certified` is false, `lower_bound` is 0
    and `distances` is None.

    Args:
        k: How many classes besides the predicted one, at least 1.

    Raises:
        ValueError: `k` is no integer from 1 on.

    Examples:
        >>> import torch, fastsal
        >>> _ = torch.manual_seed(0)
        >>> found = fastsal.analyze(torch.nn.Linear(30, 100), torch.randn(2, 30), method=fastsal.Candidates(k=3))
        >>> found.vjps.tolist(), found.certified.tolist()
        ([4, 4], [False, False])
    """

    name: ClassVar = "candidates"

    k: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"Candidates: got k={self.k!r}, wants an integer >= 1")

    def select(self, graph: Linearization, question: Question) -> Selection:
        """Looks at the classes of the smallest margins, the lowest class first among equals."""
        nearest = Nearest(graph.logits, question)
        vjps = _stream(graph, nearest, nearest.by_margin(self.k), question)
        # Of boundaries that x lies beyond nothing is known.
        least = torch.zeros_like(graph.logits[:, 0]).masked_fill((nearest.margin < 0).any(1), -math.inf)
        provenance = {"method": self.name, "distances": None, "certified": least > 0, "lower_bound": least}
        return Selection(graph.logits, nearest.winners, nearest.pair, provenance | {"vjps": vjps})


def _stream(graph: Linearization, nearest: Nearest, others: Tensor, question: Question) -> Tensor:
    """Lets `nearest` visit the predicted class and the others, int64 [B, k], of every example; returns the number of VJPs."""
    order = torch.cat((nearest.prediction.unsqueeze(1), others), 1)
    done = 0

    def visit(classes: Tensor, rows: Tensor) -> None:
        nonlocal done
        nearest.visit(classes, rows)
        done += classes.shape[1]
        question.report(done / order.shape[1])

    graph.sweep(order.t(), question.chunk_size, visit)
    return torch.full_like(nearest.prediction, order.shape[1])
