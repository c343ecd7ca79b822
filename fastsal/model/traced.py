"""Jacobian-vector products at the price of a forward pass: the derivative of a model, traced once and split in three.

`torch.func.jvp` computes for every direction anew what depends on x alone, and multiplies with the tangents of the weights,
which are zero: on EfficientNet-Lite0, convolutions and BatchNorms, a product takes some five forward passes. A `Trace` records
the operations of one such product at one example, drops what is zero, and sorts the others by what they depend on: the weights
only, x too, or the direction too. The first and the second kind are computed once for an example, the third for each direction.
There, the factors that a BatchNorm multiplies with go into the weights of the convolution before it, and explicit padding into
its padding. The logits have the model's bits; the products are those of `torch.func.jvp` up to the rounding of such factors.

`torch.func.linearize` does part of that, but for one x: it is set up anew for every example, which takes as long as a trace of
the model (7.9 s against 10.4 s for EfficientNet-Lite0, once), and folds nothing, so that a product takes 17.7 ms against
11.4 ms (and 76.5 ms by `torch.func.jvp`; medians of 25 interleaved rounds, 2 threads).

A trace knows the operations, not the weights: parameters and buffers of a module are read anew for every batch. What steers the
model besides (flags, replaced modules, hooks, Python attributes) it cannot see. So `Trace.at` runs the traced model at each
example, and `products.ModelPasses` uses the trace only where its logits equal the model's own, bit for bit, and its products
agree with the gradients that a backward pass gives.
"""

import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from fastsal.devices import take
from fastsal.model import private
from fastsal.model.attention import math_attention
from fastsal.model.calling import call
from fastsal.model.chunking import first_line, is_out_of_memory
from fastsal.model.function import Function
from fastsal.model.linearization import Linearization

# A trace takes about as long as this many bytes of gradients for each operation take longer without one.
PAYS = 1 << 20
# Of inputs (shape, dtype, device, autocast) that a model's traces are kept for: each holds the model's constants.
KINDS = 4
WEIGHTS, EXAMPLE, DIRECTION = range(3)  # what a value of the trace depends on, at most

_aten = torch.ops.aten
_ZEROS = {
    _aten.zeros.default,
    _aten.zeros_like.default,
    _aten.new_zeros.default,
    _aten._efficientzerotensor.default,
    _aten._new_zeros_with_same_feature_meta.default,
}
_COPIES = {_aten.alias.default, _aten.clone.default, _aten._to_copy.default, _aten.expand.default, _aten.view.default}
_PRODUCTS = {_aten.mul.Tensor, _aten.mm.default, _aten.bmm.default}
_PLAIN = {  # operations that vmap has no rule for, and the same with one
    torch.ops.prims.add.default: _aten.add.Tensor,
    torch.ops.prims.sub.default: _aten.sub.Tensor,
    torch.ops.prims.mul.default: _aten.mul.Tensor,
    torch.ops.prims.div.default: _aten.div.Tensor,
}


class UntraceableError(RuntimeError):
    """The model cannot be traced, or its trace cannot be split."""


def _tensors(model: Any) -> dict[str, Tensor]:
    """The parameters and buffers by name."""
    return dict((*model.named_parameters(), *model.named_buffers()))


def _given(function: Function, state: dict[str, Tensor]) -> list[Tensor]:
    """What is the same for all examples: the parameters and buffers, and other tensors that the model takes."""
    return [value.detach() for value in (*state.values(), *function.shared)]


class Trace:
    """The traced product of a function's Jacobian with one direction, at one example.

    Args:
        function: A module, as a function of one tensor.
        x: One example as the function takes it, [1, *S].
        own: What belongs to that example besides, [1, ...] each.

    Raises:
        UntraceableError: The model cannot be traced.
    """

    def __init__(self, function: Function, x: Tensor, own: Sequence[Tensor] = ()) -> None:
        state = _tensors(function.model)
        names = tuple(state)

        def product(state: list[Tensor], x: Tensor, own: list[Tensor], direction: Tensor) -> tuple[Tensor, Tensor]:
            values, shared = dict(zip(names, state, strict=False)), state[len(names) :]

            def model(*args: Any, **kwargs: Any) -> Any:
                return torch.func.functional_call(twin.model, values, args, kwargs)  # type: ignore[arg-type]

            def logits(value: Tensor) -> Tensor:
                return call(lambda v: twin.run(model, v, own, shared), value.clone())

            return torch.func.jvp(logits, (x,), (direction,))  # type: ignore[return-value]

        try:
            # What a forward pass leaves in a module, tracing leaves in the copy, which shares the parameters and buffers.
            twin = function.twin({id(tensor): tensor for tensor in _tensors(function.model).values()})
            with torch.no_grad(), math_attention(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what torch says of the model it says without the trace, too
                given = (_given(function, state), x, [*own], torch.ones_like(x))
                traced = private.recorded(product, *given)
        except Exception as error:  # whatever keeps a model from being traced: other ways compute the same
            if is_out_of_memory(error):
                raise
            raise UntraceableError(first_line(error)) from error
        self._names = names
        _simplify(traced)
        self._split(traced, 1 + len(own))

    def _split(self, traced: fx.GraphModule, inputs: int) -> None:
        """Divides the traced operations into three functions, by what they depend on; of an example there are `inputs`."""
        *given, direction = [node for node in traced.graph.nodes if node.op == "placeholder"]
        weights, example = given[:-inputs], given[-inputs:]
        value, tangent = cast(Any, traced.graph.output_node().args[0])
        kind = dict.fromkeys(weights, WEIGHTS) | dict.fromkeys(example, EXAMPLE) | {direction: DIRECTION}
        for node in traced.graph.nodes:
            if node.op not in ("placeholder", "output"):
                kind[node] = max((kind[used] for used in node.all_input_nodes), default=WEIGHTS)
                if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
                    raise UntraceableError(f"{node.target} writes to memory in place")
                if "as_strided" in str(node.target):  # of a batch, vmap takes the strides of an example: wrong values
                    raise UntraceableError(f"{node.target} depends on how an example is stored")
        if kind[value] != EXAMPLE or kind[tangent] != DIRECTION:
            raise UntraceableError("the traced logits do not depend on x")
        _fold(traced, kind)

        def used(source: int, *users: int) -> list[fx.Node]:
            found = (
                other
                for node, own in kind.items()
                if own in users and node.op != "placeholder"
                for other in node.all_input_nodes
                if kind[other] == source
            )
            return list(dict.fromkeys(found))

        def part(own: int, given: list[fx.Node], wanted: list[fx.Node]) -> fx.GraphModule:
            graph = fx.Graph()
            copies = {node: graph.placeholder(node.name) for node in given}
            for node in traced.graph.nodes:
                if kind.get(node) == own and node.op != "placeholder":
                    copies[node] = graph.node_copy(node, lambda other: copies[other])
            graph.output(tuple(copies[node] for node in wanted))
            graph.eliminate_dead_code()
            for node in graph.nodes:
                node.meta.clear()
            return fx.GraphModule(traced, graph)

        of_weights, of_example = used(WEIGHTS, EXAMPLE, DIRECTION), used(EXAMPLE, DIRECTION)
        self._of_weights = part(WEIGHTS, weights, of_weights)
        self._of_example = part(EXAMPLE, [*of_weights, *example], [value, *of_example])
        self._of_direction = part(DIRECTION, [*of_weights, *of_example, direction], [tangent])

    def at(self, function: Function, x: Tensor, own: Sequence[Tensor] = ()) -> tuple[Tensor, "TracedPasses"]:
        """Runs the trace at x [e, *S], one example after the other: its logits [e, n], and the products there.

        Raises:
            UntraceableError: The model's parameters and buffers have other names than they had.
        """
        state = _tensors(function.model)
        if tuple(state) != self._names:
            raise UntraceableError("the model's parameters have other names than they had")
        with torch.no_grad():
            shared = self._of_weights(*_given(function, state))
            # Not all at once: what vmap makes of these operations rounds otherwise, and units at a kink then go the other way.
            # On EfficientNet-Lite0 products of a group were off by 4e-3, and examples took up to 21 passes more.
            each = zip(*(tensor.split(1) for tensor in (x, *own)), strict=True)
            logits, *found = zip(*(self._of_example(*shared, *one) for one in each), strict=True)
            stacked = [torch.stack(values) if len(values) > 1 else values[0].unsqueeze(0) for values in found]
            return torch.cat(logits), TracedPasses(self._of_direction, shared, stacked)


class TracedPasses:
    """Products of the Jacobians at some examples, e of them, with directions."""

    def __init__(self, run: fx.GraphModule, shared: tuple[Tensor, ...], own: list[Tensor]) -> None:
        self._run, self._shared, self._own = run, shared, own
        self._batched = True

    def jvp(self, examples: np.ndarray, directions: Tensor) -> Tensor:
        """Multiplies the Jacobians of `examples`, int64 [e], with directions [k, e, *S]: [k, e, n]."""
        directions = directions.unsqueeze(2)
        with torch.no_grad():
            if self._batched and directions.shape[:2] != (1, 1):
                try:
                    with private.no_fallback():
                        return self._at_once(examples, directions).squeeze(2)
                except RuntimeError as error:
                    if is_out_of_memory(error):
                        raise
                    self._batched = False  # torch would take an operation one by one: then whole products
            products = []
            for slot, example in enumerate(examples.tolist()):
                own = [values[example] for values in self._own]
                products.append(torch.cat([self._run(*self._shared, *own, one)[0] for one in directions[:, slot]]))
            return torch.stack(products, 1)

    def _at_once(self, examples: np.ndarray, directions: Tensor) -> Tensor:
        """The same by vmap, over examples inside of directions, with directions [k, e, 1, *S]: [k, e, 1, n]."""

        def run(own: list[Tensor], one: Tensor) -> Tensor:
            products: Tensor = self._run(*self._shared, *own, one)[0]
            return products

        if len(examples) == 1:
            own = [values[examples[0]] for values in self._own]
            return torch.func.vmap(run, in_dims=(None, 0))(own, directions[:, 0]).unsqueeze(1)
        own = [take(values, examples) for values in self._own]
        if len(directions) == 1:
            return torch.func.vmap(run)(own, directions[0]).unsqueeze(0)
        return torch.func.vmap(torch.func.vmap(run), in_dims=(None, 0))(own, directions)


def _simplify(traced: fx.GraphModule) -> None:
    """Drops what is zero by construction, and copies of what nothing overwrites."""
    zero: set[Any] = set()

    def is_zero(node: fx.Node) -> bool:
        if node.op == "get_attr":
            value = getattr(traced, str(node.target))
            return isinstance(value, Tensor) and private.is_zero(value)
        if node.target is _aten.convolution.default and node.args[2] is not None and node.args[2] not in zero:
            return False
        if node.target in _PRODUCTS or node.target is _aten.convolution.default:
            return node.args[0] in zero or node.args[1] in zero
        return node.target in _ZEROS or (node.target in _COPIES and node.args[0] in zero)

    def same(node: fx.Node, other: Any) -> bool:
        if not isinstance(other, fx.Node):
            return False
        mine, its = node.meta.get("val"), other.meta.get("val")
        if not isinstance(mine, Tensor) or not isinstance(its, Tensor):
            return False
        return (mine.shape, mine.stride(), mine.dtype, mine.device) == (its.shape, its.stride(), its.dtype, its.device)

    def stands_for(node: fx.Node) -> Any:
        """What the node may be replaced by; None where it may not."""
        args = node.args
        if node.target in _COPIES and node.kwargs.get("memory_format") is None:
            return args[0]
        if node.target is _aten.copy.default:
            return args[1]
        if node.target is _aten.add.Tensor and not node.kwargs:
            return args[0] if args[1] in zero else args[1] if args[0] in zero else None
        return None

    for node in traced.graph.nodes:
        node.target = _PLAIN.get(node.target, node.target)
        if is_zero(node):
            zero.add(node)
        elif node.op == "call_function" and same(node, other := stands_for(node)):
            node.replace_all_uses_with(other)
    traced.graph.eliminate_dead_code()


def _fold(traced: fx.GraphModule, kind: dict[fx.Node, int]) -> None:
    """Gives convolutions of what depends on the direction the padding before and the factors of channels behind them."""
    graph = traced.graph

    def drop(node: fx.Node) -> None:
        if not node.users:
            graph.erase_node(node)
            del kind[node]

    for node in [node for node in graph.nodes if kind.get(node) == DIRECTION]:
        if node.target is _aten.convolution.default and _plain(node):
            pad, sides = node.args[0], len(node.args[4])
            if pad.target is _aten.constant_pad_nd.default and not any((*node.args[4], *pad.args[2:])):
                around = pad.args[1]
                if around[::2] == around[1::2] and len(around) == 2 * sides and min(around) >= 0:
                    node.args = (pad.args[0], *node.args[1:4], around[::-2], *node.args[5:])
                    drop(pad)
        elif node.target is _aten.mul.Tensor:
            conv, factor = sorted(node.args, key=lambda arg: -kind.get(arg, WEIGHTS))
            if not isinstance(factor, fx.Node) or kind[factor] != WEIGHTS or len(conv.users) > 1:
                continue
            if conv.target is not _aten.convolution.default or not _plain(conv) or kind[conv.args[1]] != WEIGHTS:
                continue
            weight, scale, result = (other.meta["val"] for other in (conv.args[1], factor, node))
            shape = (result.shape[1], *[1] * (result.dim() - 2))
            if tuple(scale.shape) not in (shape, (1, *shape)) or not scale.dtype == weight.dtype == result.dtype:
                continue
            with graph.inserting_before(node):
                shaped = graph.call_function(_aten.view.default, (factor, [shape[0], 1, *shape[1:]]))
                scaled = graph.call_function(_aten.mul.Tensor, (conv.args[1], shaped))
                folded = graph.call_function(conv.target, (conv.args[0], scaled, *conv.args[2:]))
            kind |= {shaped: WEIGHTS, scaled: WEIGHTS, folded: DIRECTION}
            scaled.meta["val"], folded.meta["val"] = weight, result
            node.replace_all_uses_with(folded)
            drop(node)
            drop(conv)


def _plain(conv: fx.Node) -> bool:
    """Whether a convolution is neither transposed nor has a bias."""
    return conv.args[2] is None and not conv.args[6]


def _same(logits: Tensor, others: Tensor) -> bool:
    """Whether the bits are the same, or both are NaN."""
    return bool(((logits == others) | (logits.isnan() & others.isnan())).all())


@dataclass
class _Known:
    """What is known of a model at inputs of one kind."""

    trace: Trace | None = None
    hopeless: bool = False
    distrusted: bool = False  # once
    examples: int = 0  # how many were looked at without a trace


_known: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Known]] = weakref.WeakKeyDictionary()


class Traces:
    """The trace of a model at examples like those of a recorded pass, kept from one batch to the next while the model lives.

    Args:
        graph: The recorded pass of all examples that are to be looked at.
        gain: What a trace spares a product, in bytes of the gradients that an operation forms for one row of one example.
    """

    def __init__(self, graph: Linearization, gain: float) -> None:
        self._graph = graph
        leaf = graph.leaf
        self._function = None if graph.batch is None else graph.batch.function
        kind = (leaf.shape[1:], leaf.dtype, leaf.device, graph.autocast, self._function and self._function.kind())
        # Of other callables nobody can tell what they keep between calls, nor make a copy.
        self._entry = _Known(hopeless=True)
        if isinstance(graph.model, nn.Module):
            kinds = _known.setdefault(graph.model, {})
            self._entry = kinds[kind] = kinds.pop(kind, _Known())  # the latest comes last
            while len(kinds) > KINDS:
                kinds.pop(next(iter(kinds)))
        self._gain = gain

    def at(self, examples: np.ndarray, logits: Tensor | None) -> "TracedPasses":
        """The products at some examples, from a trace whose logits there equal the model's, bit for bit.

        Args:
            examples: Which of the recorded pass, int64 [e].
            logits: The model's logits there, [e, n], if they are known from a run one example at a time.

        Raises:
            UntraceableError: The model cannot be traced, or it does not pay yet.
        """
        entry, function = self._entry, self._function
        x, own = take(self._graph.leaf.detach(), examples), self._graph.further(examples)
        if entry.trace is None and (entry.examples + len(self._graph.leaf)) * self._gain < PAYS:
            entry.examples += len(x)
            raise UntraceableError("a trace does not pay yet")
        for _ in range(2):  # a trace that no longer fits the model is made again, once
            if entry.hopeless or function is None:
                break
            try:
                with torch.no_grad(), self._graph.same_precision():
                    entry.trace = entry.trace or Trace(function, x[:1], [one[:1] for one in own])
                    traced, products = entry.trace.at(function, x, own)
                if (logits is not None and _same(traced, logits)) or _same(traced, self._logits(examples)):
                    return products
            except UntraceableError:
                entry.hopeless = entry.trace is None
            entry.trace = None
        entry.hopeless = True
        raise UntraceableError("the model cannot be traced")

    def _logits(self, examples: np.ndarray) -> Tensor:
        """The model's logits, one example at a time, with attention computed by plain operations as in the trace."""
        with torch.no_grad(), math_attention(), self._graph.same_precision():
            each = ((one, take(self._graph.leaf, one).clone()) for one in np.split(examples, len(examples)))
            return torch.cat([call(self._graph.function(one), x) for one, x in each])

    def distrust(self) -> None:
        """Drops the trace, whose products are not those of the model, and the second time gives it up."""
        entry = self._entry
        entry.hopeless, entry.trace, entry.distrusted = entry.hopeless or entry.distrusted, None, True
