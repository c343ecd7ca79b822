"""A model's forward pass, recorded: its logits, any rows of its Jacobian, and the checks that make both trustworthy."""

import contextlib
import functools
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsal import validation
from fastsal.host import to_device

Model = Callable[[Tensor], Tensor]
R = TypeVar("R")

# How many rows to take at once, by measurement on convolutional networks of 10 to 1000 classes. On a CPU, the gradients of a
# chunk are to fit a cache, or to be as many as are worth reading the weights for, up to a number of rows: at 64 rows a network
# of 1000 classes took 1.4 times as long and a third more memory, while another gained 2 percent. Elsewhere, a number of rows.
CHUNK_BYTES = 1 << 23
CHUNK_ROWS = 40
CHUNK_ROWS_ACCELERATOR = 32
CHUNK_PAIRS = 256  # of an example and a direction, where these can be chosen freely
CHUNK_PAIRS_ACCELERATOR = 1024

# Modules that in training mode mix the examples of a batch, draw random numbers or write buffers.
_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_DROPOUT = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)


def _uncompiled() -> contextlib.AbstractContextManager[None]:
    """Runs inside, of everything that torch.compile made, what it was made from.

    Compiled code calls no hooks, and has neither batched nor second derivatives nor a forward mode.
    """
    if "torch._dynamo" not in sys.modules:  # whoever has compiled anything has imported it, which takes seconds
        return contextlib.nullcontext()
    stance: contextlib.AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


@contextlib.contextmanager
def recording(model: Model, x: Tensor) -> Iterator[None]:
    """Lets autograd record inside, whatever mode the caller is in, and restores every random number generator afterwards.

    A model that went through torch.compile runs as it was before.

    The caller's autocast stays in force, but its cache of cast weights is switched off: before torch 2.11 a cache that was
    filled under `no_grad` holds weights without a graph.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    devices = {tensor.device for tensor in (x, *parameters) if tensor.is_cuda}
    cached = torch.is_autocast_cache_enabled()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        _uncompiled(),
    ):
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Computes attention by plain operations inside: the fused kernels have neither forward-mode nor second derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def flatten(value: Tensor, lead: int) -> Tensor:
    """Joins the dimensions behind the first `lead` into one, D, of unit stride; copies only where the strides demand it."""
    flat = value.reshape(*value.shape[:lead], -1)
    return flat if flat.shape[-1] <= 1 or flat.stride(-1) == 1 else flat.contiguous()


def check_input(x: Tensor) -> None:
    """Raises unless x is a floating-point tensor [B, *S] with at least one entry an example."""
    validation.floating("x", x)
    if x.dim() == 0 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wants [B, *S] with at least one entry an example (D >= 1)")


def check_evaluation_mode(model: Model) -> None:
    """Raises if a module of the model is in training mode and would mix the examples of a batch, or randomise them."""
    if not isinstance(model, nn.Module):
        return
    for name, module in model.named_modules():
        statistics = isinstance(module, _BATCH_STATISTICS) and (
            module.running_mean is not None or not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        )
        dropout = getattr(module, "p", getattr(module, "dropout", 0.0)) if isinstance(module, _DROPOUT) else 0.0
        if module.training and (statistics or dropout > 0 or isinstance(module, nn.RReLU)):
            raise ValueError(
                f"model: got {type(module).__name__} {name!r} in training mode, where it mixes or randomises the "
                "examples of a batch; call model.eval() first"
            )


def two_logits(score: Tensor) -> Tensor:
    """The logits (−Ψ/2, Ψ/2) [B, 2] of a model with one score Ψ [B] or [B, 1], so that class 1 is Ψ > 0."""
    half = score.reshape(-1) / 2
    return torch.stack((-half, half), 1)


def call(model: Model, x: Tensor) -> Tensor:
    """Runs the model and returns its logits [B, n], n >= 2, in the output dtype of x.

    They are what the model returns, or the `.logits` of that, as Hugging Face's classifiers have it.

    Raises:
        TypeError: The model returns no tensor of floating dtype.
        ValueError: The tensor is neither logits [B, n] nor one score [B] or [B, 1].
    """
    logits: Any = model(x)
    if isinstance(inner := getattr(logits, "logits", None), Tensor):
        logits = inner
    wants = f"wants logits [B, n] with B = {x.shape[0]} and n >= 2, or one score [B] or [B, 1]"
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: returned {type(logits).__name__}, wants a tensor of logits [B, n]; wrap the model")
    if not logits.is_floating_point():
        raise TypeError(f"model: returned dtype {logits.dtype}, wants floating-point logits [B, n]")
    if logits.dim() not in (1, 2) or logits.shape[0] != x.shape[0] or 0 in logits.shape[1:]:
        raise ValueError(f"model: returned shape {tuple(logits.shape)}, {wants}")
    logits = logits.to(validation.output_dtype(x.dtype))
    return two_logits(logits) if logits.dim() == 1 or logits.shape[1] == 1 else logits


def vmap(run: Callable[[Tensor], R], stack: Tensor) -> R:
    """Applies run to every entry of stack [k, ...] at once.

    This is not autograd's own `is_grads_batched`, whose older vmap takes convolutions one row at a time.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation that torch takes row by row
        result: R = torch.func.vmap(run, randomness="same")(stack)
    return result


def check_differentiable(gradient: Tensor) -> None:
    """Raises NotImplementedError where torch cannot differentiate a gradient, taken with its graph, any further.

    torch itself complains only once the derivative is asked for, far from what is at fault.
    """
    seen: set[Any] = set()
    nodes: list[Any] = [gradient.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("NotImplemented"):
            try:
                node(*[None] * len(getattr(node, "_input_metadata", "1")))  # raises, and so tells its name
            except RuntimeError as error:
                raise NotImplementedError(
                    f"model: {str(error).strip()}; wants second derivatives of every operation for differentiable=True and "
                    "losses, so write that one with others"
                ) from error
        seen.add(node)
        nodes += [after for after, _ in node.next_functions]


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised this error because memory ran out, on whatever device."""
    texts = ("out of memory", "not enough memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


def in_parts(stack: Tensor, size: int, run: Callable[[Tensor], None]) -> None:
    """Calls run on stack [k, ...], `size` entries at a time, in order.

    Where memory runs out, the same entries are tried again in parts of half the size. So a call of `run` that fails must leave
    no trace.
    """
    start = 0
    while start < len(stack):
        part = stack[start : start + size]
        try:
            run(part)
        except RuntimeError as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
            size = len(part) // 2
            continue
        start += len(part)


class Linearization:
    """A model's forward pass at x [B, *S], recorded: its logits and, by backward passes, any rows of its Jacobian.

    `linearize` makes it, and it is valid inside that context. The model runs when its logits are first asked for.

    Attributes:
        model: The model, as the caller passed it.
        leaf: x as the model took it, [B, *S].
        x: The same, flattened to [B, D].
        autocast: Whether autocast was on where this was made, and its dtype.
    """

    def __init__(self, model: Model, leaf: Tensor) -> None:
        self.model = model
        device = leaf.device.type
        self.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        self.leaf = leaf
        self._name = type(model).__name__
        self._batched = True
        self.x = flatten(leaf, 1)

    @functools.cached_property
    def graph_logits(self) -> Tensor:
        """The logits with their graph, in the output dtype of x: [B, n]."""
        with self.same_precision():
            logits = call(self.model, self.leaf.clone())  # a clone, so that a model may overwrite its input in place
        if not logits.requires_grad:
            raise ValueError(
                "model: its logits do not depend on x (they carry no gradient); wants logits computed from x with "
                "differentiable torch operations, without no_grad, detach or a trip through numpy inside the model"
            )
        return logits

    @functools.cached_property
    def logits(self) -> Tensor:
        """The same, detached. A method that records the model at a few examples at a time sets them."""
        return self.graph_logits.detach()

    def forget(self) -> None:
        """Frees the recorded pass. What needs it next, the logits excepted, makes it anew."""
        self.__dict__.pop("graph_logits", None)

    def same_precision(self) -> torch.autocast:
        """The autocast state that the forward pass ran under, for running the model again."""
        enabled, dtype = self.autocast
        return torch.autocast(self.leaf.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)

    def at(self, examples: Tensor | np.ndarray, model: Model | None = None) -> "Linearization":
        """The same model, or another, recorded at some of the examples only, int64 [e]."""
        with self.same_precision():
            leaf = self.leaf.detach()[to_device(examples, self.leaf.device)]
            return Linearization(model or self.model, leaf.requires_grad_())

    def _grad(self, cotangents: Tensor, batched: bool, create_graph: bool) -> Tensor:
        def grad_of(one: Tensor) -> Tensor | None:
            return torch.autograd.grad(
                self.graph_logits, self.leaf, one, retain_graph=True, create_graph=create_graph, allow_unused=True
            )[0]

        # Outside autocast: backward operations take the dtype that their forward had, and nothing else may be rounded.
        with torch.autocast(self.leaf.device.type, enabled=False):
            grad = vmap(grad_of, cotangents) if batched else grad_of(cotangents)
        if grad is None:
            raise ValueError("model: its logits do not depend on x, wants logits [B, n] computed from x")
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
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                # The loop below computes the same; an error that has nothing to do with vmap comes up again there.
                self._batched = False
                reason = str(error).strip().partition("\n")[0]
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
        return max(1, min(CHUNK_ROWS, self._at_once() // len(self.leaf)))

    def default_pairs(self) -> int:
        """How many pairs of an example and a direction to take at once where the caller does not say."""
        return max(1, min(CHUNK_PAIRS, self._at_once())) if self.leaf.device.type == "cpu" else CHUNK_PAIRS_ACCELERATOR

    def _at_once(self) -> int:
        """How many gradients of one example are worth taking at once on a CPU."""
        gradients = self.gradient_bytes()
        weights = sum(p.nbytes for p in self.model.parameters()) if isinstance(self.model, nn.Module) else 0
        # Weights are worth reading once for many rows where they are more than what a row reads besides.
        return max(CHUNK_BYTES, weights if weights > sum(gradients) else 0) // max(gradients)

    def gradient_bytes(self) -> list[int]:
        """Bytes of every gradient that a backward pass of one row of one example forms, read off the recorded graph."""
        users: dict[Any, list[Any]] = {}
        nodes: list[Any] = [self.graph_logits.grad_fn]
        while nodes:
            node = nodes.pop()
            for after, _ in node.next_functions:
                if after is not None and after not in users:
                    nodes.append(after)
                users.setdefault(after, []).append(node)
        found, seen, nodes = [self.leaf.nbytes], set(), [torch.autograd.graph.get_gradient_edge(self.leaf).node]
        while nodes:  # from x upward, since the gradients of weights are not computed
            node = nodes.pop()
            if node not in seen:
                seen.add(node)
                nodes += users.get(node, [])
                # An attribute of torch's own. Where it is missing, only the size of x counts.
                metadata = getattr(node, "_input_metadata", ())
                found += [math.prod(gradient.shape) * self.leaf.element_size() for gradient in metadata]
        return [max(1, size // len(self.leaf)) for size in found]

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
def linearize(model: Model, x: Tensor, *, differentiable: bool = False) -> Iterator[Linearization]:
    """Records the model at x, after every check of both that can be made.

    Inside, graphs are recorded whatever mode the caller is in, and autocast is off (the model itself ran under the caller's).
    The model keeps its flags, gradients, buffers and hooks, and the random number generators keep their state.

    Args:
        model: An `nn.Module` in evaluation mode, or any callable, from x to logits [B, n] or one score [B] or [B, 1].
        x: [B, *S] with B >= 1, of floating dtype.
        differentiable: Record on the caller's own x where that requires a gradient, and use only operations that have second
            derivatives.

    Yields:
        The recorded pass.

    Raises:
        TypeError: x is no tensor of floating dtype, or the model returns none.
        ValueError: The logits do not depend on x, or are no logits; or the model mixes the examples of a batch.
    """
    check_input(x)
    check_evaluation_mode(model)
    with recording(model, x), math_attention() if differentiable else contextlib.nullcontext():
        plain = x.clone() if x.is_inference() else x
        own = differentiable and plain.requires_grad
        graph = Linearization(model, plain if own else plain.detach().requires_grad_())
        if len(plain) > 1:
            # A few examples show a mixture as well as all do; two alone can hide the statistics of a batch.
            few = graph if len(plain) <= 3 else Linearization(model, plain[:3].detach().clone().requires_grad_())
            if few.mixes_examples():
                raise ValueError(
                    "model: mixes the examples of a batch (logits[0] have a gradient with respect to x[1:]), wants each "
                    "example's logits computed from that example alone; normalise with stored statistics, or pass the "
                    "examples one at a time"
                )
            del few
        with torch.autocast(x.device.type, enabled=False):
            yield graph
