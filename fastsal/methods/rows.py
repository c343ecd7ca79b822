"""Methods that take rows of the Jacobian class by class: every class (`Exact`), or the highest logits (`Candidates`)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fastsal.linearization import Linearization
from fastsal.methods.features import through_features
from fastsal.methods.selection import Method, Nearest, Selection
from fastsal.reference import other_classes


@dataclass(frozen=True)
class Exact(Method):
    """Every class, and ρ̃ itself: n backward passes an example, or F + 2 where the logits leave a linear layer of F inputs.

    Args:
        head: That layer (an `nn.Linear`, or a 1×1 convolution on 1×1 maps), a module of the model; None finds it. A layer
            that is given but cannot serve is an error; without one, class rows are taken.
        memory_limit: Bytes for the features' Jacobian, F·D numbers an example; where not even one example's fit, class rows
            are taken.

    >>> import torch, fastsal
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(30, 8), torch.nn.ReLU(), torch.nn.Linear(8, 100))
    >>> fastsal.analyze(model, torch.randn(2, 30)).vjps.tolist()
    [10, 10]
    """

    name: ClassVar = "exact"

    head: nn.Module | None = None
    memory_limit: int = 1 << 30

    def __post_init__(self) -> None:
        if self.head is not None and not isinstance(self.head, nn.Module):
            raise TypeError(f"Exact: got head of type {type(self.head).__name__}, wants a module of the model or None")
        if not isinstance(self.memory_limit, int) or self.memory_limit < 0:
            raise ValueError(f"Exact: got memory_limit={self.memory_limit!r}, wants a number of bytes")

    def select(self, graph: Linearization, norm: float, chunk_size: int | None, backend: str) -> Selection:
        """All classes: by way of the features where that is possible and cheaper, else row by row."""
        selection = through_features(graph, norm, chunk_size, backend, self.head, self.memory_limit)
        if selection is not None:
            return selection
        nearest = Nearest(graph.logits, norm, backend)
        others = other_classes(nearest.prediction, graph.logits.shape[1])
        vjps = _stream(graph, nearest, others, chunk_size)
        distances = nearest.distances.to(graph.logits.dtype)
        return Selection(nearest.winners, nearest.pair, {"method": self.name, "distances": distances, "vjps": vjps})


@dataclass(frozen=True)
class Candidates(Method):
    """The k highest logits besides the predicted one: k + 1 backward passes, and an upper bound of ρ̃.

    Args:
        k: How many classes besides the predicted one, at least 1.
    """

    name: ClassVar = "candidates"

    k: int = 10

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"Candidates: got k={self.k!r}, wants an integer >= 1")

    def select(self, graph: Linearization, norm: float, chunk_size: int | None, backend: str) -> Selection:
        """The classes of the highest logits, the lowest class first among equals."""
        nearest = Nearest(graph.logits, norm, backend)
        others = other_classes(nearest.prediction, graph.logits.shape[1])
        highest = graph.logits.gather(1, others).sort(stable=True, dim=1, descending=True).indices[:, : self.k]
        vjps = _stream(graph, nearest, others.gather(1, highest), chunk_size)
        nothing = torch.zeros_like(graph.logits[:, 0])
        provenance = {"method": self.name, "distances": None, "certified": nothing.bool(), "lower_bound": nothing}
        return Selection(nearest.winners, nearest.pair, provenance | {"vjps": vjps})


def _stream(graph: Linearization, nearest: Nearest, others: Tensor, chunk_size: int | None) -> Tensor:
    """Lets `nearest` visit the predicted class and the others, int64 [B, k], of every example; returns the count of VJPs."""
    order = torch.cat((nearest.prediction.unsqueeze(1), others), 1)
    graph.sweep(order.t(), chunk_size, nearest.visit)
    return torch.full_like(nearest.prediction, order.shape[1])
