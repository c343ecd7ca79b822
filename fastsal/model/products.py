"""Passes through a model at chosen examples: vector-Jacobian products and Jacobian-vector products."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import take, to_device, to_host
from fastsal.model.attention import math_attention
from fastsal.model.calling import call, flatten
from fastsal.model.chunking import first_line, in_parts, is_out_of_memory, vmap
from fastsal.model.double_backward import DoubleBackward
from fastsal.model.linearization import Linearization
from fastsal.model.traced import TracedPasses, Traces, UntraceableError

RECORDING = 4  # what recording an example costs, in its rows, where these are taken many at a time
# Bytes of the gradients of a backward pass. A recorded pass of more gives way to JVPs, which want memory too, and is taken anew
# for the next VJPs: for EfficientNet-Lite0 that takes 5 to 8 % more time, and 6 to 13 % less memory.
KEPT = 1 << 28
# Of all operations: with no more convolutions than that, second derivatives take less time than forward mode, and what a trace
# spares then is less by a factor (a ViT-Tiny at 16 directions: 374, 467 and 545 ms by trace, second derivatives, forward mode).
FEW, LESS = 0.02, 0.25
GROSS = 0.01  # of its length: a JVP further than this from a known gradient is no matter of rounding


class NoJVPError(RuntimeError):
    """The model has neither forward-mode nor second derivatives."""


class Passes(Protocol):
    """What the certificate asks of a model at x [E, *S]. `examples`, int64 [e], are some of range(E), ascending."""

    logits: Tensor  # [E, n]
    dimension: int  # D
    pairs: int  # how many (example, direction) pairs are best run at once

    def vjp(self, examples: np.ndarray, cotangents: Tensor) -> Tensor:
        """Multiplies cotangents [e, c, n] with the Jacobians: [e, c, D]."""

    def jvp(self, examples: np.ndarray, directions: Tensor) -> Tensor:
        """Multiplies the Jacobians with directions [e, k, D]: [e, k, n]. Raises NoJVPError where the model cannot."""

    def distrust(self) -> None:
        """Forgets what was kept of the model from earlier calls, after products that were not those of its gradients."""


class ModelPasses:
    """The `Passes` of a model at some examples, int64 [E], of a recorded batch.

    A JVP is taken from a trace where there is one (`fastsal.model.traced` says when). Else it is the derivative of the VJP with
    respect to its cotangent (`fastsal.model.double_backward`), or, of a convolutional network, taken in forward mode, vmapped
    over the directions. Where a module has no rule for the one (LSTM none for forward mode, for one), it is the other. All of
    them compute attention by plain operations.
    """

    def __init__(self, graph: Linearization, examples: np.ndarray, chunk_size: int | None) -> None:
        self._base, self._own = graph, examples
        self._held, self._graph = np.arange(len(examples)), self._recorded(examples)
        self.logits = self._graph.logits
        self.dimension = graph.x.shape[1]
        given = None if chunk_size is None else (chunk_size * len(examples),) * 2
        self._cotangents, self.pairs = given or self._graph.default_pairs()
        # Functions, not bound methods: a reference cycle would keep the recorded pass until the next garbage collection.
        self._ways = [ModelPasses._traced, ModelPasses._forward_mode, ModelPasses._double_backward]
        operations = self._graph.operations()
        total = sum(size for _, size in operations)
        gain = total / len(operations)  # about proportional to what a trace spares a product
        if sum("Convolution" in name for name, _ in operations) <= FEW * len(operations):
            self._ways[1:] = [ModelPasses._double_backward, ModelPasses._forward_mode]
            gain *= LESS
        self._twice: DoubleBackward | None = None
        self._large = total * len(examples) > KEPT
        self._traces = Traces(graph, gain)
        self._products: TracedPasses | None = None
        self._latest: tuple[np.ndarray, Tensor, Tensor] | None = None  # of the VJPs: examples, cotangents, products

    def _recorded(self, own: np.ndarray) -> Linearization:
        """The model at examples `own` of the batch, of which nothing else is held."""
        if len(own) == len(self._base.leaf):
            return self._base
        self._base.forget()
        return self._base.at(own)

    def vjp(self, examples: np.ndarray, cotangents: Tensor) -> Tensor:
        """Multiplies cotangents [e, c, n] with the Jacobians: [e, c, D].

        The recorded pass may hold more examples than these. It is recorded anew where products taken in vain would cost more.
        """
        c = cotangents.shape[1]
        if self._in_vain(self._held, examples, c):
            self._held, self._graph = examples, self._recorded(self._own[examples])
        slot = to_device(np.searchsorted(self._held, examples), cotangents.device)
        padded = cotangents.new_zeros(c, len(self._held), cotangents.shape[2])
        padded[:, slot] = cotangents.transpose(0, 1)
        products = torch.cat(self._chunks(self._vjp, padded, self._cotangents // len(self._held)), 1)[slot]
        self._latest = (examples, cotangents, products)
        return products

    def _in_vain(self, held: np.ndarray, examples: np.ndarray, count: int) -> bool:
        """Whether products at `held` examples instead of these, `count` of them, cost more than recording these."""
        more = (len(held) - len(examples)) * count > min(RECORDING, self._cotangents) * len(examples)
        return more or not np.isin(examples, held).all()

    def jvp(self, examples: np.ndarray, directions: Tensor) -> Tensor:
        """Multiplies the Jacobians with directions [e, k, D]: [e, k, n]. Raises NoJVPError where the model cannot."""
        if self._large:  # the next VJP records it anew
            self._graph.forget()
            self._held = self._held[:0]
        shape = self._base.leaf.shape[1:]
        tangents = directions.to(self._base.x.dtype).transpose(0, 1).reshape(directions.shape[1], len(examples), *shape)
        while self._ways:
            try:
                size = self.pairs // len(examples)
                parts = self._chunks(lambda part: self._ways[0](self, examples, part), tangents, size)
                return torch.cat(parts).transpose(0, 1)
            except Exception as error:  # user code, in a pass that exact rows do without
                if is_out_of_memory(error):
                    raise
                if not isinstance(error, UntraceableError) and self._has_to_see_whole_batches(examples):
                    continue
                reason = first_line(error)
                self._ways.pop(0)
        raise NoJVPError(
            f"{type(self._base.model).__name__}: has neither forward-mode nor second derivatives ({reason})"
        )

    def _has_to_see_whole_batches(self, examples: np.ndarray) -> bool:
        """Whether the model, which failed at these examples, does so because they are not the whole batch; found out once."""
        batch = self._base.batch
        return batch is not None and not batch.whole and not self._base.allows(self._own[examples])

    def distrust(self) -> None:
        """Makes the trace of the model anew the next time; gives it up if that has happened before."""
        self._traces.distrust()

    def _chunks(self, run: Callable[[Tensor], Tensor], stack: Tensor, size: int) -> list[Tensor]:
        """Results of run on stack [k, ...], `size` entries at a time, or one."""
        results: list[Tensor] = []
        in_parts(stack, max(1, size), lambda part: results.append(run(part)))
        return results

    def _at(self, examples: np.ndarray) -> Tensor:
        """The model's input at these examples: [e, *S]."""
        return take(self._base.leaf.detach(), self._own[examples])

    def _vjp(self, cotangents: Tensor) -> Tensor:
        return self._graph.vjp(cotangents)

    def _traced(self, examples: np.ndarray, tangents: Tensor) -> Tensor:
        if self._base.batch is not None and self._base.batch.whole:
            raise UntraceableError("the model has to see whole batches")
        if self._products is not None:
            return self._products.jvp(examples, tangents)
        self._products = self._traces.at(self._own, self.logits if len(self._own) == 1 else None)
        products = self._products.jvp(examples, tangents)
        if self._disagree(examples, tangents, products):
            self._traces.distrust()
            raise UntraceableError("the products of the trace are not the model's")
        return products

    def _disagree(self, examples: np.ndarray, tangents: Tensor, products: Tensor) -> bool:
        """Whether JVPs [k, e, n] along tangents [k, e, *S] disagree grossly with the latest VJPs."""
        if self._latest is None:
            return False
        known, cotangents, rows = self._latest
        _, here, there = np.intersect1d(examples, known, return_indices=True)
        same, slot = (to_device(places, rows.device) for places in (here, there))
        cotangents, rows = cotangents[slot].double(), rows[slot].double()
        along = flatten(tangents, 2)[:, same].double().transpose(0, 1)
        gap = (rows @ along.mT - cotangents @ products[:, same].double().permute(1, 2, 0)).abs()
        size = rows.square().sum(2, keepdim=True).sqrt() * along.square().sum(2).sqrt().unsqueeze(1)
        return bool(to_host((gap > GROSS * size).any())[0])

    def _forward_mode(self, examples: np.ndarray, tangents: Tensor) -> Tensor:
        # A clone, since torch lays a tangent out as x is: with all that lies between the rows of a slice, filled with zeros.
        x = self._at(examples).clone()

        model = self._base.function(self._own[examples])

        def logits(value: Tensor) -> Tensor:
            return call(model, value.clone())

        def jvp(tangent: Tensor) -> Tensor:
            products: Tensor = torch.func.jvp(logits, (x,), (tangent,))[1]
            return products

        with torch.no_grad(), math_attention(), self._base.same_precision():
            return vmap(jvp, tangents)

    def _double_backward(self, examples: np.ndarray, tangents: Tensor) -> Tensor:
        kept, examples = self._twice, self._own[examples]
        if kept is None or self._in_vain(kept.examples, examples, len(tangents)):
            self._twice = kept = None  # not two at a time
            self._twice = kept = DoubleBackward(self._base, examples)
        slot = to_device(np.searchsorted(kept.examples, examples), tangents.device)
        if len(examples) == len(kept.examples):
            return kept.jvp(tangents)
        padded = tangents.new_zeros(len(tangents), len(kept.examples), *tangents.shape[2:])
        padded[:, slot] = tangents
        return kept.jvp(padded)[:, slot]
