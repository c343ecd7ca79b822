"""Checks of arguments: each raises one error that names the argument, what it got and what it wants."""

import functools
import math
import warnings
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NORMS = {1: 1.0, 2: 2.0, math.inf: math.inf, "1": 1.0, "2": 2.0, "inf": math.inf}


def norm(value: Any) -> float:
    """The p of the perturbation norm as a float: 1.0, 2.0 or inf."""
    try:
        return NORMS[value]
    except (KeyError, TypeError):
        raise ValueError(f"norm: got {value!r}, wants 2, 1, math.inf or 'inf' (the p of the perturbation)") from None


def positive(name: str, value: Any, wants: str = "an integer >= 1") -> None:
    """Raises unless value is an integer from 1."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: got {value!r}, wants {wants}")


def chunk_size(value: Any) -> None:
    """Raises unless value is None or a number of classes."""
    if value is not None:
        positive("chunk_size", value, "None or an integer >= 1")


def output_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def _has_float64(place: torch.device) -> bool:
    """Whether a device computes in float64, as Apple's MPS and some of Intel's GPUs do not."""
    try:
        torch.ones(1, device=place).double().sqrt()
    except (RuntimeError, TypeError):
        return False
    return True


def device(name: str, value: Tensor) -> None:
    """Raises TypeError where a tensor is on a device without float64."""
    if value.device.type not in ("cpu", "cuda", "meta") and not _has_float64(value.device):
        raise TypeError(
            f"{name}: is on {value.device}, which has no float64, in which fastsal adds; wants all tensors, and the model if "
            f"there is one, on another device: pass {name}.cpu()"
        )


def floating(name: str, value: Any) -> None:
    """Raises TypeError unless the value is a dense tensor of one of the four floating dtypes, on a device with float64."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, wants a torch.Tensor")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {value.dtype}, wants float32, float64, float16 or bfloat16")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: got layout {value.layout}, wants a strided (dense) tensor; pass {name}.to_dense()")
    device(name, value)


def _flat(name: str, value: Tensor, lead: int) -> Tensor:
    """Joins the dimensions behind the first `lead` into one of unit stride, without a copy; raises where strides forbid it."""
    stride = 1
    for size, step in zip(reversed(value.shape[lead:]), reversed(value.stride()[lead:]), strict=True):
        if size != 1 and step != stride:
            raise ValueError(
                f"{name}: got strides {tuple(value.stride())} for shape {tuple(value.shape)}, wants the input dimensions "
                f"(those behind the first {lead}) contiguous; pass {name}.contiguous()"
            )
        stride *= size
    return value.view(*value.shape[:lead], stride)


def labels(name: str, value: Any, shape: torch.Size | tuple[int, ...]) -> None:
    """Raises unless value is a class of each example, integers [B] from 0 to n − 1, for logits of shape [B, n]."""
    B, n = shape
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool or value.shape != (B,):
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: got {got}, wants integers [B] = [{B}]")
    if B and not 0 <= int(value.min()) <= int(value.max()) < n:
        raise ValueError(f"{name}: got classes {int(value.min())} to {int(value.max())}, wants 0 to {n - 1}")


def allowed(value: Any, shape: torch.Size | tuple[int, ...], place: torch.device) -> Tensor | None:
    """Which classes may be the nearest, bool [n] or [B, n] or None, for logits of shape [B, n]: bool [B, n], or None."""
    if value is None:
        return None
    if (
        not isinstance(value, Tensor)
        or value.dtype != torch.bool
        or value.shape not in (tuple(shape), tuple(shape[1:]))
    ):
        got = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"classes: got {got}, wants bool [n] = {list(shape[1:])} or [B, n] = {list(shape)}")
    return value.to(place).expand(*shape)


def tensors(logits: Tensor, jacobian: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checks logits [B, n], jacobian [B, n, *S] and x [B, *S] or None; returns them with S flattened to D, without a copy."""
    named = {"logits": logits, "jacobian": jacobian}
    if x is not None:
        named["x"] = x
    for name, value in named.items():
        floating(name, value)
    if logits.dim() == 1 or (logits.dim() == 2 and logits.shape[1] == 1):
        raise ValueError(
            f"logits: got shape {tuple(logits.shape)}, wants [B, n] with n >= 2; for a binary classifier with one score F "
            "pass the two logits (-F/2, F/2) and the gradients (-dF/2, dF/2), or use fastsal.analyze"
        )
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits: got shape {tuple(logits.shape)}, wants [B, n] with n >= 2")
    if jacobian.dim() < 3 or jacobian.shape[:2] != logits.shape:
        raise ValueError(
            f"jacobian: got shape {tuple(jacobian.shape)}, wants [B, n, *S] with [B, n] = {list(logits.shape)} as in logits"
        )
    if 0 in jacobian.shape[2:]:
        raise ValueError(
            f"jacobian: got shape {tuple(jacobian.shape)}, wants at least one input dimension entry (D >= 1)"
        )
    if x is not None and x.shape != (jacobian.shape[0], *jacobian.shape[2:]):
        if x.shape == jacobian.shape[2:] and len(x) == len(logits):
            raise ValueError(
                f"jacobian: got shape {tuple(jacobian.shape)}, which is [B, n, B, *S], torch.func.jacrev of a whole batch; "
                f"wants [B, n, *S] = {[*logits.shape, *x.shape[1:]]}, each example by itself: "
                "vmap(jacrev(lambda one: model(one.unsqueeze(0)).squeeze(0)))(x), with both from torch.func"
            )
        raise ValueError(
            f"x: got shape {tuple(x.shape)}, wants [B, *S] = {[jacobian.shape[0], *jacobian.shape[2:]]} to go with jacobian"
        )
    for name, value in named.items():
        if value.device != jacobian.device:
            raise ValueError(f"{name}: got device {value.device}, wants the jacobian's, {jacobian.device}")
        if (value.dtype == torch.float64) != (jacobian.dtype == torch.float64):
            raise TypeError(
                f"{name}: got dtype {value.dtype}, wants "
                f"{'float64' if jacobian.dtype == torch.float64 else 'no float64'} to go with jacobian's {jacobian.dtype}"
            )
    if x is not None and x.dtype not in (jacobian.dtype, torch.float32):
        raise TypeError(f"x: got dtype {x.dtype}, wants the jacobian's, {jacobian.dtype}, or float32")
    flat_x = None if x is None else _flat("x", x, 1)
    return logits, _flat("jacobian", jacobian, 2), flat_x


def warn_probabilities(logits: Tensor) -> None:
    """Warns where every row of logits [B, n] looks like probabilities: softmax changes every distance."""
    rows = logits.detach()
    if rows.numel() and bool(((rows >= 0).all(1) & ((rows.double().sum(1) - 1).abs() < 1e-3)).all()):
        warnings.warn(
            "logits: every row is non-negative and sums to 1, as probabilities do; fastsal wants logits (or log-softmax), "
            "since distances from probabilities are different numbers",
            stacklevel=3,
        )
