"""The `triton` backend: tensors -> launches of triton_ops. `layout.Backend` describes the functions.

Triton is imported when a function is first called.
"""

import contextlib
import functools
import importlib
import os
import shutil
from typing import Any

import torch
from torch import Tensor

from fastsal.tensor.backends import layout


@functools.cache
def _missing() -> str:
    return layout.imported("triton", "the package triton")[1]


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def _no_compiler() -> str:
    """Triton compiles each launch's host side with a C compiler, which it looks for in this order."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return "" if found else "Triton finds no C compiler (CC, gcc or clang)"


def unavailable() -> str:
    reason = _missing() or ("" if _interpreted() else _no_compiler())
    if reason or _interpreted() or torch.accelerator.is_available():
        return reason
    return "torch finds no accelerator, and Triton's interpreter is off (TRITON_INTERPRET=1)"


def why_not(jacobian: Tensor) -> str:
    if jacobian.device.type == "cpu" and not _interpreted():
        return "tensors are on the CPU, where Triton runs in its interpreter only (TRITON_INTERPRET=1)"
    return _missing() or ("" if _interpreted() else _no_compiler())


def info() -> dict[str, object]:
    """Triton's version and whether its interpreter is on."""
    if unavailable():
        return {}
    return {"version": importlib.import_module("triton").__version__, "interpreter": _interpreted()}


def _on_device(tensor: Tensor) -> Any:
    """Makes the tensor's device the current one, whose current stream the launches use."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def row_distances(anchor: Tensor, rows: Tensor, norm: float) -> Tensor:
    from fastsal.tensor.backends.triton_ops import row_distances as operator

    out = layout.empty_distances(rows)
    if out.numel():
        with _on_device(rows):
            operator.launch(anchor, rows, out, layout.DUAL_CODES[norm])
    return out


def margin_geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    from fastsal.tensor.backends.triton_ops import margin_geometry as operator

    outputs = layout.empty_geometry(jacobian)
    if len(jacobian):
        with _on_device(jacobian):
            operator.launch(layout.scores(logits, jacobian), jacobian, x, outputs, layout.DUAL_CODES[norm])
    return outputs


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from fastsal.tensor.backends.triton_ops import pairwise_margins as operator

    outputs = layout.empty_pairwise(jacobian, x)
    if len(jacobian):
        with _on_device(jacobian):
            operator.launch(layout.scores(logits, jacobian), jacobian, x, outputs, layout.DUAL_CODES[norm])
    return outputs


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor]:
    from fastsal.tensor.backends.triton_ops import pairwise_backward as operator

    outputs = layout.empty_gradients(jacobian, x)
    if len(jacobian):
        v = None if v is None else v.contiguous()
        with _on_device(jacobian):
            operator.launch(w.contiguous(), v, jacobian, x, outputs, layout.DUAL_CODES[norm])
    return outputs
