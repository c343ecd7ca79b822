"""Passes through a model at chosen examples: vector-Jacobian products and Jacobian-vector products."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastsal.linearization import Linearization, call, in_parts, is_out_of_memory, math_attention, vmap


class NoJVPError(RuntimeError):
    """The model has neither forward-mode nor second derivatives."""


class Passes(Protocol):
    """What the certificate asks of a model at x [E, *S]. `examples` int64 [e] are some of range(E)."""

    logits: Tensor  # [E, n]
    dimension: int  # D
    pairs: int  # how many (example, direction) pairs are best run at once

    def vjp(self, examples: Tensor, cotangents: Tensor) -> Tensor:
        """Multiplies cotangents [e, c, n] with the Jacobians: [e, c, D]."""

    def jvp(self, examples: Tensor, directions: Tensor) -> Tensor:
        """Multiplies the Jacobians with directions [e, k, D]: [e, k, n]. Raises NoJVPError where the model cannot."""


class ModelPasses:
    """The `Passes` of a model at some examples, int64 [E], of a recorded batch.

    A JVP is taken in forward mode, vmapped over the directions. Where a module has no forward-mode rule (LSTM, for one), it
    is the derivative of the VJP with respect to its cotangent. Both compute attention by plain operations.
    """

    def __init__(self, graph: Linearization, examples: Tensor, chunk_size: int | None) -> None:
        self._base, self._own = graph, examples
        self._record(torch.arange(len(examples), device=examples.device))
        self.logits = graph.logits[examples]
        self.dimension = graph.x.shape[1]
        default = 256 if examples.device.type == "cpu" else 1024
        self.pairs = default if chunk_size is None else chunk_size * len(examples)
        self._ways = [self._forward_mode, self._double_backward]

    def _record(self, examples: Tensor) -> None:
        own = self._own[examples]
        self._held, self._graph = examples, self._base if len(own) == len(self._base.logits) else self._base.at(own)

    def vjp(self, examples: Tensor, cotangents: Tensor) -> Tensor:
        if 2 * len(examples) <= len(self._held) or not bool(torch.isin(examples, self._held).all()):
            self._record(examples)
        slot = torch.searchsorted(self._held, examples)
        padded = cotangents.new_zeros(cotangents.shape[1], len(self._held), cotangents.shape[2])
        padded[:, slot] = cotangents.transpose(0, 1)
        size = max(1, self.pairs // len(self._held))
        return torch.cat(self._chunks(self._vjp, padded, size), 1)[slot]

    def jvp(self, examples: Tensor, directions: Tensor) -> Tensor:
        x = self._base.x.detach()[self._own[examples]].view(-1, *self._base.leaf.shape[1:])
        tangents = directions.to(x.dtype).transpose(0, 1).reshape(-1, *x.shape)
        while self._ways:
            try:
                parts = self._chunks(lambda part: self._ways[0](x, part), tangents, max(1, self.pairs // len(examples)))
                return torch.cat(parts).transpose(0, 1)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0]
                self._ways.pop(0)
        raise NoJVPError(
            f"{type(self._base.model).__name__}: has neither forward-mode nor second derivatives ({reason})"
        )

    def _chunks(self, run: Callable[[Tensor], Tensor], stack: Tensor, size: int) -> list[Tensor]:
        results: list[Tensor] = []
        in_parts(stack, size, lambda part: results.append(run(part)))
        return results

    def _vjp(self, cotangents: Tensor) -> Tensor:
        return self._graph.vjp(cotangents)

    def _forward_mode(self, x: Tensor, tangents: Tensor) -> Tensor:
        def logits(value: Tensor) -> Tensor:
            return call(self._base.model, value.clone())

        def jvp(tangent: Tensor) -> Tensor:
            products: Tensor = torch.func.jvp(logits, (x,), (tangent,))[1]
            return products

        with torch.no_grad(), math_attention(), self._base.same_precision():
            products: Tensor = torch.func.vmap(jvp, randomness="same")(tangents)
        return products

    def _double_backward(self, x: Tensor, tangents: Tensor) -> Tensor:
        leaf = x.clone().requires_grad_()
        with math_attention(), torch.backends.cudnn.flags(enabled=False):  # cudnn's RNNs have no second derivative
            with self._base.same_precision():
                logits = call(self._base.model, leaf.clone())
            dummy = torch.zeros_like(logits, requires_grad=True)
            (gradient,) = torch.autograd.grad(logits, leaf, dummy, create_graph=True)

            def jvp(tangent: Tensor) -> Tensor:
                return torch.autograd.grad(gradient, dummy, tangent, retain_graph=True)[0]

            products = vmap(jvp, tangents)
        return products
