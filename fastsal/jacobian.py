"""Gradients out of a model: a recorded forward pass, rows of its Jacobian chunk by chunk, and the nearest of them."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastsal import ops, reference, validation

Model = Callable[[Tensor], Tensor]
R = TypeVar("R")

# How many rows at once on a CPU, by measurement on convolutional networks of 10 to 1000 classes: gradients that fit a cache,
# or as many as are worth reading the weights for, and no more than a number of rows: at 64 a network of 1000 classes took
# 1.4 times as long and a third more memory, another gained 2 percent. Elsewhere a number of rows.
CHUNK_BYTES = 1 << 23
CHUNK_ROWS = 40
CHUNK_ROWS_ACCELERATOR = 32

# Modules that in training mode mix the examples of a batch, draw random numbers or write buffers.
_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
_DROPOUT = (nn.modules.dropout._DropoutNd, nn.MultiheadAttention, nn.RNNBase)


@contextlib.contextmanager
def recording(model: Model, x: Tensor) -> Iterator[None]:
    """Records graphs whatever the ambient mode (no_grad, inference_mode), and puts every RNG state back afterwards.

    Autocast stays as the caller has it, but for its cache of weights: before torch 2.11 one filled under no_grad has
    no graph.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    devices = {tensor.device for tensor in (x, *parameters) if tensor.is_cuda}
    cached = torch.is_autocast_cache_enabled()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
    ):
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


@contextlib.contextmanager
def math_attention() -> Iterator[None]:
    """Attention out of plain operations: the fused kernels have neither forward-mode nor second derivatives."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def flatten(value: Tensor, lead: int) -> Tensor:
    """value [..., *S] as [..., D] of unit stride in D; a copy only where the strides ask for one (channels_last)."""
    flat = value.reshape(*value.shape[:lead], -1)
    return flat if flat.shape[-1] <= 1 or flat.stride(-1) == 1 else flat.contiguous()


def check_input(x: Tensor) -> None:
    """x [B, *S] is a floating-point tensor with D >= 1."""
    validation.floating("x", x)
    if x.dim() == 0 or 0 in x.shape[1:]:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wants [B, *S] with at least one entry an example (D >= 1)")


def check_evaluation_mode(model: Model) -> None:
    """No module of the model mixes or randomises examples because it was left in training mode."""
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
    """The model's logits [B, n], n >= 2, in the output dtype of x, checked."""
    logits: Any = model(x)
    wants = f"wants logits [B, n] with B = {x.shape[0]} and n >= 2, or one score [B] or [B, 1]"
    if not isinstance(logits, Tensor):
        raise TypeError(f"model: returned {type(logits).__name__}, wants a tensor of logits [B, n]; wrap the model")
    if not logits.is_floating_point():
        raise TypeError(f"model: returned dtype {logits.dtype}, wants floating-point logits [B, n]")
    if logits.dim() not in (1, 2) or logits.shape[0] != x.shape[0] or 0 in logits.shape[1:]:
        raise ValueError(f"model: returned shape {tuple(logits.shape)}, {wants}")
    logits = logits.to(validation.output_dtype(x.dtype))
    return two_logits(logits) if logits.dim() == 1 or logits.shape[1] == 1 else logits


def _vmap(run: Callable[[Tensor], R], stack: Tensor) -> R:
    """run over stack [k, ...]. Not by autograd's is_grads_batched: its older vmap takes convolutions row by row."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation that torch takes row by row
        result: R = torch.func.vmap(run)(stack)
    return result


def _out_of_memory(error: RuntimeError) -> bool:
    texts = ("out of memory", "not enough memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in texts)


class Linearization:
    """A model's forward pass at x [B, *S], recorded: logits and, by backward passes, any rows of the Jacobian.

    Made by `linearize` and valid inside its context. leaf: x as the model took it; x: the same flattened to [B, D];
    logits: [B, n] in the output dtype of x, detached; graph_logits: the same with their graph.
    """

    def __init__(self, model: Model, leaf: Tensor) -> None:
        self.model = model
        device = leaf.device.type
        self.autocast = (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device))
        self.leaf = leaf
        self._name = type(model).__name__
        self._batched = True
        # A clone, so that a model may overwrite its input in place.
        self.graph_logits = call(model, leaf.clone())
        self.logits = self.graph_logits.detach()
        self.x = flatten(leaf, 1)
        if not self.graph_logits.requires_grad:
            raise ValueError(
                "model: its logits do not depend on x (they carry no gradient); wants logits computed from x with "
                "differentiable torch operations, without no_grad, detach or a trip through numpy inside the model"
            )

    def same_precision(self) -> torch.autocast:
        """The autocast state that the forward pass ran under, for running the model again."""
        enabled, dtype = self.autocast
        return torch.autocast(self.leaf.device.type, dtype=dtype, enabled=enabled, cache_enabled=False)

    def at(self, examples: Tensor, model: Model | None = None) -> "Linearization":
        """The same model, or another, recorded at some of the examples only, int64 [e]."""
        with self.same_precision():
            return Linearization(model or self.model, self.leaf.detach()[examples].requires_grad_())

    def _grad(self, cotangents: Tensor, batched: bool, create_graph: bool) -> Tensor:
        def grad_of(one: Tensor) -> Tensor | None:
            return torch.autograd.grad(
                self.graph_logits, self.leaf, one, retain_graph=True, create_graph=create_graph, allow_unused=True
            )[0]

        # Outside autocast: backward operations take the dtype their forward had, and nothing else may be rounded.
        with torch.autocast(self.leaf.device.type, enabled=False):
            grad = _vmap(grad_of, cotangents) if batched else grad_of(cotangents)
        if grad is None:
            raise ValueError("model: its logits do not depend on x, wants logits [B, n] computed from x")
        return flatten(grad, 2 if batched else 1)

    def vjp(self, cotangents: Tensor, create_graph: bool = False) -> Tensor:
        """cotangents [c, B, n] times the Jacobian, example by example: [B, c, D] in x's dtype, unit stride in D."""
        if cotangents.shape[0] == 1:
            return self._grad(cotangents[0], False, create_graph).unsqueeze(1)
        if self._batched:
            try:
                return self._grad(cotangents, True, create_graph).transpose(0, 1)
            except RuntimeError as error:
                if _out_of_memory(error):
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
        """The gradients of the given classes: int64 [c, B] (each example its own) to [B, c, D]."""
        one_hot = self.logits.new_zeros(*classes.shape, self.logits.shape[1])
        return self.vjp(one_hot.scatter_(2, classes.unsqueeze(2), 1.0), create_graph)

    def default_chunk_size(self) -> int:
        """How many VJPs to run at once where the caller does not say."""
        if self.leaf.device.type != "cpu":
            return CHUNK_ROWS_ACCELERATOR
        weights = sum(p.nbytes for p in self.model.parameters()) if isinstance(self.model, nn.Module) else 0
        return max(1, min(CHUNK_ROWS, max(CHUNK_BYTES, weights) // self._largest_gradient()))

    def _largest_gradient(self) -> int:
        """Bytes of the largest tensor in a backward pass of one row, from the recorded graph."""
        users: dict[Any, list[Any]] = {}
        nodes: list[Any] = [self.graph_logits.grad_fn]
        while nodes:
            node = nodes.pop()
            for after, _ in node.next_functions:
                if after is not None and after not in users:
                    nodes.append(after)
                users.setdefault(after, []).append(node)
        largest, seen, nodes = self.leaf.nbytes, set(), [torch.autograd.graph.get_gradient_edge(self.leaf).node]
        while nodes:  # from x up: the gradients of weights are not computed
            node = nodes.pop()
            if node not in seen:
                seen.add(node)
                nodes += users.get(node, [])
                # torch's own; where it is missing, x alone counts
                for gradient in getattr(node, "_input_metadata", ()):
                    largest = max(largest, math.prod(gradient.shape) * self.leaf.element_size())
        return largest

    def sweep(self, classes: Tensor, chunk_size: int | None, visit: Callable[[Tensor, Tensor], None]) -> None:
        """Calls visit(classes [B, c], rows [B, c, D]) for all of classes int64 [K, B], chunk_size at a time, in order.

        Out of memory, in the pass or in `visit`, halves the chunk and tries again; `visit` must bear a second call.
        """
        start, size = 0, chunk_size or self.default_chunk_size()
        while start < classes.shape[0]:
            part = classes[start : start + size]
            try:
                visit(part.t(), self.rows(part))
            except RuntimeError as error:
                if part.shape[0] == 1 or not _out_of_memory(error):
                    raise
                size = part.shape[0] // 2
                continue
            start += part.shape[0]


def _check_independent(model: Model, x: Tensor) -> None:
    """The logits of the first example do not depend on the next ones (a few: two can hide a batch's statistics)."""
    few = Linearization(model, x[:4].detach().clone().requires_grad_())
    cotangent = torch.zeros_like(few.logits)
    cotangent[0] = torch.arange(1, cotangent.shape[1] + 1, device=x.device).cos()
    others = few.vjp(cotangent.unsqueeze(0))[1:]
    if bool(((others != 0) & ~others.isnan()).any()):  # NaN: zero times a weight that is not finite, not a mixture
        raise ValueError(
            "model: mixes the examples of a batch (logits[0] have a gradient with respect to x[1:]), wants each "
            "example's logits computed from that example alone; normalise with stored statistics, or pass the examples "
            "one at a time"
        )


@contextlib.contextmanager
def linearize(model: Model, x: Tensor, *, differentiable: bool = False) -> Iterator[Linearization]:
    """A `Linearization` of the model at x [B, *S], B >= 1, after every check of both that can be made.

    Inside, graphs are recorded whatever the ambient mode, and autocast is off (the model ran under the caller's).
    The model keeps its flags, gradients, buffers and hooks, and the random number generators their state.
    differentiable=True records on the caller's own x where that requires a gradient, and takes operations that have
    second derivatives.
    """
    check_input(x)
    check_evaluation_mode(model)
    with recording(model, x), math_attention() if differentiable else contextlib.nullcontext():
        plain = x.clone() if x.is_inference() else x
        if plain.shape[0] > 1:
            _check_independent(model, plain)
        own = differentiable and plain.requires_grad
        graph = Linearization(model, plain if own else plain.detach().requires_grad_())
        with torch.autocast(x.device.type, enabled=False):
            yield graph


@dataclass(frozen=True)
class Selection:
    """What a method found: winners int64 [B, 2] (i*, j*), their rows pair [B, 2, D], its own fields of `Geometry`."""

    winners: Tensor
    pair: Tensor
    provenance: dict[str, Any]


class Nearest:
    """The predicted row and the nearest row so far, pair [B, 2, D], of a stream of rows, the predicted one first.

    order: classes int64 [B, n], the predicted one and then the others. distances: m_j / ‖Δ_j‖_q of the rows seen, +inf
    elsewhere, float64 [B, n].
    """

    def __init__(self, graph: Linearization, norm: float, backend: str) -> None:
        self._norm, self._backend = norm, backend
        self.prediction = graph.logits.argmax(1)
        scores = graph.logits.double()
        self.order = torch.cat(
            (self.prediction.unsqueeze(1), reference.other_classes(self.prediction, scores.shape[1])), 1
        )
        self._margin = scores.gather(1, self.prediction.unsqueeze(1)) - scores
        self.distances = torch.full_like(scores, math.inf)
        self._nearest = self.prediction.new_empty(len(scores), 0)
        self.pair = graph.x.new_empty(len(scores), 0, graph.x.shape[1])

    def visit(self, classes: Tensor, rows: Tensor) -> None:
        """Takes the rows [B, c, D] of the next classes int64 [B, c] in an order that starts with the predicted ones."""
        pair = self.pair
        if pair.shape[1] == 0:
            pair = rows[:, :1].expand(-1, 2, -1).clone()
            classes, rows = classes[:, 1:], rows[:, 1:]
        if classes.shape[1] > 0:
            distance = ops.row_distances(pair[:, 0], rows, self._norm, self._backend)
            self.distances.scatter_(1, classes, reference.ratios(self._margin.gather(1, classes), distance))
            known = self._nearest.shape[1]  # 1, or 0 at first
            # Sorted: the lowest class among equals comes first.
            contenders, order = torch.cat((self._nearest, classes), 1).sort(1)
            distances, margins = self.distances.gather(1, contenders), self._margin.gather(1, contenders)
            which = reference.nearest(distances, margins).unsqueeze(1)
            slot = order.gather(1, which)
            row = rows.gather(1, (slot - known).clamp(min=0).unsqueeze(2).expand(-1, 1, rows.shape[2]))
            pair[:, 1:] = torch.where((slot >= known).unsqueeze(2), row, pair[:, 1:])
            self._nearest = contenders.gather(1, which)
        self.pair = pair

    @property
    def winners(self) -> Tensor:
        """Prediction and nearest class so far: int64 [B, 2]."""
        return torch.cat((self.prediction.unsqueeze(1), self._nearest), 1)


class ModelPasses:
    """VJPs and JVPs of a model at some examples, int64 [E], of a recorded batch: `certify.Passes`.

    JVPs are forward-mode, vmapped over the directions; where a module has no forward-mode rule (LSTM), the derivative of the
    VJP in its cotangent. Attention runs as plain operations in both, since its fused kernels have neither.
    """

    def __init__(self, graph: Linearization, examples: Tensor, chunk_size: int | None) -> None:
        self._base, self._own = graph, examples
        self._record(torch.arange(len(examples), device=examples.device))
        self.logits = graph.logits[examples]
        self.dimension = graph.x.shape[1]
        self.roundoff = _roundoff(graph)
        default = 256 if examples.device.type == "cpu" else 1024
        self.pairs = default if chunk_size is None else chunk_size * len(examples)
        self._ways = [self._forward_mode, self._double_backward]
        self._seconds = [math.inf, math.inf]  # of a VJP, of a JVP: the quickest so far

    def _record(self, examples: Tensor) -> None:
        own = self._own[examples]
        self._held, self._graph = examples, self._base if len(own) == len(self._base.logits) else self._base.at(own)

    def price(self) -> float:
        """JVP over VJP, rounded to a power of two so that a repeated run takes the same decisions."""
        vjp, jvp = self._seconds
        return 2.0 ** min(2, max(-1, round(math.log2(jvp / vjp)))) if math.inf > jvp else 1.0

    def vjp(self, examples: Tensor, cotangents: Tensor) -> Tensor:
        """cotangents [e, c, n] times the Jacobians: [e, c, D]."""
        if 2 * len(examples) <= len(self._held) or not bool(torch.isin(examples, self._held).all()):
            self._record(examples)
        slot = torch.searchsorted(self._held, examples)
        padded = cotangents.new_zeros(cotangents.shape[1], len(self._held), cotangents.shape[2])
        padded[:, slot] = cotangents.transpose(0, 1)
        size = max(1, self.pairs // len(self._held))
        return torch.cat(self._chunks(self._vjp, padded, size), 1)[slot]

    def jvp(self, examples: Tensor, directions: Tensor) -> Tensor | None:
        """The Jacobians times directions [e, k, D]: [e, k, n]; None, with a warning, where the model cannot."""
        x = self._base.x.detach()[self._own[examples]].view(-1, *self._base.leaf.shape[1:])
        tangents = directions.to(x.dtype).transpose(0, 1).reshape(-1, *x.shape)
        while self._ways:
            try:
                parts = self._chunks(lambda part: self._ways[0](x, part), tangents, max(1, self.pairs // len(examples)))
                return torch.cat(parts).transpose(0, 1)
            except RuntimeError as error:
                if _out_of_memory(error):
                    raise
                reason = str(error).strip().partition("\n")[0]
                self._ways.pop(0)
        name = type(self._base.model).__name__
        warnings.warn(
            f"{name}: has neither forward-mode nor second derivatives ({reason}); taking every row", stacklevel=2
        )
        return None

    def _chunks(self, run: Callable[[Tensor], Tensor], stack: Tensor, size: int) -> list[Tensor]:
        """run over stack [k, ...] in parts of `size`, halved where memory runs out."""
        parts, start = [], 0
        while start < len(stack):
            part = stack[start : start + size]
            try:
                parts.append(self._timed(run, part))
            except RuntimeError as error:
                if len(part) == 1 or not _out_of_memory(error):
                    raise
                size = len(part) // 2
                continue
            start += len(part)
        return parts

    def _timed(self, run: Callable[[Tensor], Tensor], part: Tensor) -> Tensor:
        if part.is_cuda:
            torch.cuda.synchronize(part.device)
        start = time.perf_counter()
        result = run(part)
        if part.is_cuda:
            torch.cuda.synchronize(part.device)
        kind = int(run != self._vjp)
        self._seconds[kind] = min(self._seconds[kind], (time.perf_counter() - start) / (len(part) * part.shape[1]))
        return result

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

            products = _vmap(jvp, tangents)
        return products


def _roundoff(graph: Linearization) -> float:
    """The unit roundoff of the coarsest arithmetic that the model's passes run in: x, autocast, parameters, TF32."""
    parameters = graph.model.parameters() if isinstance(graph.model, nn.Module) else ()
    dtypes = {graph.x.dtype, *(p.dtype for p in parameters if p.is_floating_point())}
    enabled, dtype = graph.autocast
    coarsest = max(torch.finfo(dtype).eps for dtype in (dtypes | {dtype} if enabled else dtypes)) / 2
    matmul = {"highest": 0.0, "high": 2.0**-11, "medium": 2.0**-8}[torch.get_float32_matmul_precision()]
    convolution = 2.0**-11 if graph.x.is_cuda and torch.backends.cudnn.allow_tf32 else 0.0
    return max(coarsest, matmul, convolution) if graph.x.dtype != torch.float64 else coarsest
