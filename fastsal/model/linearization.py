"""A model's forward pass, recorded: its logits, any rows of its Jacobian, and the checks that make both trustworthy."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastsal.devices import to_device
from fastsal.model.attention import math_attention
from fastsal.model.calling import (
    Model,
    call,
    check_differentiable,
    check_evaluation_mode,
    check_input,
    flatten,
    recording,
)
from fastsal.model.chunking import (
    CHUNK_BYTES,
    CHUNK_BYTES_JVP,
    CHUNK_PAIRS,
    CHUNK_PAIRS_ACCELERATOR,
    CHUNK_ROWS,
    CHUNK_ROWS_ACCELERATOR,
    first_line,
    in_parts,
    is_out_of_memory,
    vmap,
)
from fastsal.model.function import Function
from fastsal.model.inputs import FIRST, Batch, in_precision, mixed_examples


class Linearization:
    """A function's forward pass at x [B, *S], recorded: its logits and, by backward passes, any rows of its Jacobian.

    The function is a model's, of its input or of a layer's output, as `fastsal.model.function` says.

    `linearize` makes it, and it is valid inside that context. The model runs when its logits are first asked for.

    Attributes:
        model: The model, as the caller passed it.
        leaf: x as the function took it, [B, *S].
        x: The same, flattened to [B, D].
        autocast: Whether autocast was on where this was made, and its dtype.
        batch: The batch of which these are some examples; None for another function of them than the model.
    """

    def __init__(
        self,
        model: Model,
        leaf: Tensor,
        batch: Batch | None = None,
        examples: Tensor | None = None,
        moved: bool = False,
    ) -> None:
        self.model, self.batch, self._examples, self._moved = model, batch, examples, moved
        device = leaf.device.type
        self.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        self.leaf = leaf
        self._name = type(model).__name__
        self._batched = True
        self._recorded: Tensor | None = None  # the logits with their graph, while they are held
        self._logits: Tensor | None = None  # the same, detached, once they are known
        self.x = flatten(leaf, 1)

    @property
    def graph_logits(self) -> Tensor:
        """The logits with their graph, in the output dtype of x: [B, n]."""
        if self._recorded is None:
            batch = self.batch
            logits = self._call(self.model) if batch is None else batch.record(self._call, self._examples, self._moved)
            if not logits.requires_grad:
                raise self._independent("they carry no gradient")
            self._recorded, self._logits = logits, logits.detach()
        return self._recorded

    def _independent(self, how: str) -> ValueError:
        name = "x" if self.batch is None else self.batch.function.name
        return ValueError(
            f"model: its logits do not depend on {name} ({how}); wants logits computed from it with differentiable torch "
            "operations, without no_grad, detach or a trip through numpy inside the model"
        )

    def _call(self, model: Model) -> Tensor:
        with self.same_precision():
            return call(model, self.leaf.clone())  # a clone, so that a model may overwrite its input in place

    @property
    def logits(self) -> Tensor:
        """The same, detached."""
        return self.graph_logits.detach() if self._logits is None else self._logits

    @property
    def n(self) -> int:
        """How many classes there are; where a batch is known, without recording the pass."""
        return self.logits.shape[1] if self.batch is None else self.batch.n

    def forget(self) -> None:
        """Frees the recorded pass. What needs it next, the logits excepted, makes it anew."""
        self._recorded = None

    def same_precision(self) -> torch.autocast:
        """The autocast state that the forward pass ran under, for running the model again."""
        return in_precision(self.leaf, self.autocast)

    def at(self, examples: Tensor | np.ndarray, moved: Tensor | None = None) -> "Linearization":
        """The same model at some of the examples only, int64 [e]; with their inputs moved to other points, [e, *S]."""
        chosen = to_device(examples, self.leaf.device)
        leaf = self.leaf.detach()[chosen] if moved is None else moved
        return self._like(self.model, leaf, self.batch, self._own(chosen), self._moved or moved is not None)

    def features(self, function: Model, examples: Tensor) -> "Linearization":
        """Another function than the model, at some of the examples, int64 [e]."""
        return self._like(function, self.leaf.detach()[examples])

    def function(self, examples: Tensor | np.ndarray) -> Model:
        """The function at some of the examples, int64 [e]."""
        own = self._own(to_device(examples, self.leaf.device))
        return self.model if self.batch is None else self.batch.at(own)

    def further(self, examples: Tensor | np.ndarray) -> list[Tensor]:
        """What belongs to some of the examples, int64 [e], besides x: [e, ...] each."""
        own = self._own(to_device(examples, self.leaf.device))
        return [] if self.batch is None else [one.detach()[own] for one in self.batch.function.own]

    def allows(self, examples: np.ndarray) -> bool:
        """Whether the model can be run at some of the examples, int64 [e], alone."""
        own = self._own(to_device(examples, self.leaf.device))
        return self.batch is None or self.batch.allows(own)

    def _own(self, examples: Tensor) -> Tensor:
        return examples if self._examples is None else self._examples[examples]

    def _like(self, model: Model, leaf: Tensor, *rest: Any) -> "Linearization":
        with self.same_precision():
            return Linearization(model, leaf.requires_grad_(), *rest)

    def _grad(self, cotangents: Tensor, batched: bool, create_graph: bool) -> Tensor:
        logits = self.graph_logits  # recorded, if need be, outside of vmap

        def grad_of(one: Tensor) -> Tensor | None:
            return torch.autograd.grad(
                logits, self.leaf, one, retain_graph=True, create_graph=create_graph, allow_unused=True
            )[0]

        # Outside autocast: backward operations take the dtype that their forward had, and nothing else may be rounded.
        with torch.autocast(self.leaf.device.type, enabled=False):
            grad = vmap(grad_of, cotangents) if batched else grad_of(cotangents)
        if grad is None:
            raise self._independent("their graph does not reach it")
        if create_graph:
            check_differentiable(grad)
        return flatten(grad, 2 if batched else 1)

    def vjp(self, cotangents: Tensor, create_graph: bool = False) -> Tensor:
        """Multiplies cotangents [c, B, n] with each example's Jacobian: [B, c, D] in x's dtype, of unit stride in D."""
        if cotangents.shape[0] == 1:
            return self._grad(cotangents[0], False, create_graph).unsqueeze(1)
        if self._batched:
            try:
                return self._grad(cotangents, True, create_graph).transpose(0, 1)
            except Exception as error:  # user code, for which torch's vmap may be too much
                if is_out_of_memory(error):
                    raise
                # The loop below computes the same; an error that has nothing to do with vmap comes up again there.
                self._batched = False
                reason = first_line(error)
            warnings.warn(
                f"{self._name}: torch cannot vmap its backward pass ({reason}); taking one class at a time",
                stacklevel=1,
            )
        return torch.stack([self._grad(one, False, create_graph) for one in cotangents]).transpose(0, 1)

    def rows(self, classes: Tensor, create_graph: bool = False) -> Tensor:
        """The gradients [B, c, D] of classes int64 [c, B], c of them for each example."""
        one_hot = self.logits.new_zeros(*classes.shape, self.logits.shape[1])
        return self.vjp(one_hot.scatter_(2, classes.unsqueeze(2), 1.0), create_graph)

    def default_chunk_size(self) -> int:
        """How many rows to take at once where the caller does not say."""
        if self.leaf.device.type != "cpu":
            return CHUNK_ROWS_ACCELERATOR
        return max(1, min(CHUNK_ROWS, self._at_once(CHUNK_BYTES)[0] // len(self.leaf)))

    def default_pairs(self) -> tuple[int, int]:
        """How many pairs of an example and a cotangent, or a direction, to take at once where the caller does not say."""
        if self.leaf.device.type != "cpu":
            return CHUNK_PAIRS_ACCELERATOR, CHUNK_PAIRS_ACCELERATOR
        cotangents, directions = self._at_once(CHUNK_BYTES, CHUNK_BYTES_JVP)
        return max(1, min(CHUNK_PAIRS, cotangents)), max(1, min(CHUNK_PAIRS, directions))

    def _at_once(self, *caches: int) -> list[int]:
        """How many gradients of one example are worth taking at once on a CPU, for caches of so many bytes."""
        gradients = [size for _, size in self.operations()]
        weights = sum(p.nbytes for p in self.model.parameters()) if isinstance(self.model, nn.Module) else 0
        # As many as fit a cache; or as many as, all together, are read as long as the weights, which are read once for all.
        return [max(cache // max(gradients), weights // sum(gradients)) for cache in caches]

    def operations(self) -> list[tuple[str, int]]:
        """What a backward pass goes through, by name, and the bytes of each gradient that one row of one example forms there.

        They are read off the recorded graph.
        """
        users: dict[Any, list[Any]] = {}
        nodes: list[Any] = [self.graph_logits.grad_fn]
        while nodes:
            node = nodes.pop()
            for after, _ in node.next_functions:
                if after is not None and after not in users:
                    nodes.append(after)
                users.setdefault(after, []).append(node)
        found, seen, nodes = [("x", self.leaf.nbytes)], set(), [torch.autograd.graph.get_gradient_edge(self.leaf).node]
        while nodes:  # from x upward, since the gradients of weights are not computed
            node = nodes.pop()
            if node not in seen:
                seen.add(node)
                nodes += users.get(node, [])
                # An attribute of torch's own. Where it is missing, only the size of x counts.
                metadata = getattr(node, "_input_metadata", ())
                found += [(node.name(), math.prod(one.shape) * self.leaf.element_size()) for one in metadata]
        return [(name, max(1, size // len(self.leaf))) for name, size in found]

    def sweep(self, classes: Tensor, chunk_size: int | None, visit: Callable[[Tensor, Tensor], None]) -> None:
        """Takes the rows of classes int64 [K, B], `chunk_size` of them at a time, and hands them to `visit` in order.

        `visit` is called with the classes [B, c] and their rows [B, c, D]. Where memory runs out, in the backward pass or in
        `visit`, the chunk is halved and taken again, as `in_parts` says.
        """
        in_parts(classes, chunk_size or self.default_chunk_size(), lambda part: visit(part.t(), self.rows(part)))

    def mixes_examples(self) -> bool:
        """Whether the outputs of the first example depend on the inputs of the others."""
        cotangent = torch.zeros_like(self.logits)
        cotangent[0] = torch.arange(1, cotangent.shape[1] + 1, device=cotangent.device).cos()
        others = self.vjp(cotangent.unsqueeze(0))[1:]
        # NaN is zero times a weight that is not finite, and no sign of a mixture.
        return bool(((others != 0) & ~others.isnan()).any())


@contextlib.contextmanager
def linearize(
    model: Model,
    x: Tensor,
    *,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    layer: nn.Module | str | None = None,
    differentiable: bool = False,
) -> Iterator[Linearization]:
    """Records the model at x, as a function of x or of a layer's output, after every check that can be made.

    Inside, graphs are recorded whatever mode the caller is in, and autocast is off (the model itself ran under the caller's).
    The model keeps its flags, gradients, buffers and hooks, and the random number generators keep their state.

    Args:
        model: An `nn.Module` in evaluation mode, or any callable, from x to logits [B, n] or one score [B] or [B, 1].
        x: [B, *S] with B >= 1, of floating dtype unless there is a layer.
        args, kwargs, layer: What the model takes after x, and whose output is looked at, as `Function` has them.
        differentiable: Record on the caller's own x where that requires a gradient, and use only operations that have second
            derivatives.

    Yields:
        The recorded pass.

    Raises:
        TypeError: x is no tensor of floating dtype, or the model returns none.
        ValueError: The logits do not depend on x, or are no logits; or the model mixes the examples of a batch.
    """
    if layer is None or not isinstance(x, Tensor):
        check_input(x)
    check_evaluation_mode(model)
    with recording(model, x), math_attention() if differentiable else contextlib.nullcontext():
        function = Function(model, x, args, kwargs, layer)
        with torch.set_grad_enabled(differentiable):
            start = function.start()
        own = differentiable and start.requires_grad
        graph = Linearization(model, start if own else start.detach().requires_grad_())
        graph.batch = batch = Batch(function, graph.leaf.detach(), graph.autocast)
        if len(start) > 1:
            # A few examples show a mixture as well as all do; two alone can hide the statistics of a batch.
            few = graph if len(start) <= FIRST else graph.at(np.arange(FIRST), moved=graph.leaf.detach()[:FIRST])
            mixed = few.mixes_examples()
            if few is not graph and batch.whole:
                mixed = graph.mixes_examples()
            elif few is not graph:
                batch.first = few.logits
            if mixed:
                raise mixed_examples(f"logits[0] have a gradient with respect to those of others in {function.name}")
            del few
        with torch.autocast(start.device.type, enabled=False):
            yield graph
