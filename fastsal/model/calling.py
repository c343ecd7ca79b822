"""A user's model is run here: what it may be and return, and the modes of torch that it runs under."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastsal import validation
from fastsal.model.chunking import is_out_of_memory

Model = Callable[[Tensor], Tensor]

_LOCK = threading.RLock()  # of everything that runs a model

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
def _buffers_kept(model: Model) -> Iterator[None]:
    """Gives a module its buffers back, and their values, as far as a forward pass has replaced them or written to them."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [
        (module, name, buffer, None if buffer is None or buffer.is_inference() else (buffer._version, buffer.clone()))
        for module in modules
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, state in before:
                module._buffers[name] = buffer
                if buffer is not None and state is not None and buffer._version != state[0]:
                    buffer.copy_(state[1])


@contextlib.contextmanager
def recording(model: Model, x: Tensor) -> Iterator[None]:
    """Lets autograd record inside, whatever mode the caller is in, and restores every random number generator afterwards.

    Buffers that the model writes to get their values back, and a model that went through torch.compile runs as it was before.
    One thread at a time is inside: torch's switches that are set here belong to the whole process.

    The caller's autocast stays in force, but its cache of cast weights is switched off: before torch 2.11 a cache that was
    filled under `no_grad` holds weights without a graph.
    """
    parameters = model.parameters() if isinstance(model, nn.Module) else ()
    devices = {tensor.device for tensor in (x, *parameters) if tensor.is_cuda}
    cached = torch.is_autocast_cache_enabled()
    with (
        _LOCK,
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices),
        _uncompiled(),
        _buffers_kept(model),
    ):
        torch.set_autocast_cache_enabled(False)
        try:
            yield
        finally:
            torch.set_autocast_cache_enabled(cached)


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


def logits_alone(model: Model, x: Tensor) -> Tensor:
    """The logits of a model at x [B, *S] without a graph: [B, n], as `call` has them.

    A model that takes gradients of its own inside, as of an energy, cannot run without one, and is run with it.
    """
    try:
        with torch.no_grad():
            return call(model, x)
    except Exception as error:  # user code
        if is_out_of_memory(error):
            raise
        try:
            with torch.inference_mode(False), torch.enable_grad():
                return call(model, x.detach().clone().requires_grad_()).detach()
        except Exception:
            raise error from None  # that was not it


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
