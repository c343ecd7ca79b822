"""Jacobian-vector products as derivatives of a backward pass.

A backward pass is linear in its cotangent c, c ↦ Jᵀc, and the derivative of that with respect to c, along v, is Jv. Recorded
once, it gives a product for one further backward pass through what was recorded, and does not run the model again. Forward mode
does, and where passes are short that takes most of its time: 1.1 ms against 0.08 ms for a perceptron of 784-64-200, 101 against
13 ms for the decoder of a Whisper tiny (one direction each, 2 threads). Convolutions are the exception: torch computes their
second derivatives slowly, and one row at a time (2.1 s against 0.23 s for four directions of EfficientNet-Lite0).
"""

import numpy as np
import torch
from torch import Tensor

from fastsal.devices import take
from fastsal.model.attention import math_attention
from fastsal.model.calling import call
from fastsal.model.chunking import vmap
from fastsal.model.linearization import Linearization


class DoubleBackward:
    """The backward pass of a recorded function at some of its examples, int64 [e], recorded in turn.

    Args:
        graph: The recorded pass of a batch.
        examples: Which of the batch.

    Whatever torch raises where an operation has no second derivative is the caller's.
    """

    def __init__(self, graph: Linearization, examples: np.ndarray) -> None:
        self.examples = examples
        leaf = take(graph.leaf.detach(), examples).requires_grad_()
        # cudnn's recurrent networks and fused attention have no second derivatives.
        with math_attention(), torch.backends.cudnn.flags(enabled=False), graph.same_precision():
            logits = call(graph.function(examples), leaf.clone())
        self._cotangent = torch.zeros_like(logits, requires_grad=True)
        (self._gradient,) = torch.autograd.grad(logits, leaf, self._cotangent, create_graph=True)

    def jvp(self, tangents: Tensor) -> Tensor:
        """Multiplies the Jacobians with tangents [k, e, *S]: [k, e, n]."""

        def product(tangent: Tensor) -> Tensor:
            return torch.autograd.grad(self._gradient, self._cotangent, tangent, retain_graph=True)[0]

        return product(tangents[0]).unsqueeze(0) if len(tangents) == 1 else vmap(product, tangents)
