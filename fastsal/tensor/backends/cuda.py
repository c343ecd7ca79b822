"""The `cuda` backend: tensors -> calls of the native module fastsal._cuda on the current stream of the tensors' device.

`layout.Backend` describes the functions.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastsal.tensor.backends import layout

_cuda, _reason = layout.imported("fastsal._cuda", "the native module fastsal._cuda")

_devices_that_can: set[int] = set()  # a reason against a device is asked for anew each time: it may pass


def _device_why_not(index: int) -> str:
    if index in _devices_that_can:
        return ""
    with torch.cuda.device(index):
        reason: str = _cuda.why_not()
    if not reason:
        _devices_that_can.add(index)
        return ""
    return f"cuda:{index} cannot run the kernels of this build (CUDA runtime {_runtime()}): {reason}"


def _runtime() -> str:
    version = _cuda.runtime_version()
    return f"{version // 1000}.{version % 1000 // 10}"


def unavailable() -> str:
    if _reason:
        return _reason
    if not torch.cuda.is_available() or torch.version.hip:
        return "torch.cuda.is_available() is false: no NVIDIA driver or device, or a torch without CUDA"
    reasons = [_device_why_not(index) for index in range(torch.cuda.device_count())]
    return "" if "" in reasons else "; ".join(reasons)


def why_not(jacobian: Tensor) -> str:
    if _reason:
        return _reason
    if jacobian.device.type != "cuda" or torch.version.hip:
        return f"tensors are on {jacobian.device}, not on an NVIDIA device"
    return _device_why_not(jacobian.get_device())


def info() -> dict[str, object]:
    """The CUDA runtime that is linked in."""
    return {} if _reason else {"runtime": _runtime()}


@contextlib.contextmanager
def _launching(on: Tensor) -> Iterator[int]:
    """Makes the tensor's device the current one; gives its current stream."""
    with torch.cuda.device(on.device):
        yield torch.cuda.current_stream().cuda_stream


def _inputs(norm: float, rows: Tensor, x: Tensor | None) -> Any:
    return _cuda.Inputs(*layout.native_arguments(norm, rows, (), layout.x_arguments(x)))


def _row_sums(inputs: Any, own: int, rows: Tensor, stream: int) -> Tensor:
    """What csrc/cuda/ops.h describes under row_sums."""
    sums = rows.new_empty(*rows.shape[:2], _cuda.sum_segments(inputs), 3, dtype=torch.float64)
    _cuda.row_sums(inputs, own, sums.data_ptr(), stream)
    return sums


def row_distances(anchor: Tensor, rows: Tensor, norm: float) -> Tensor:
    with _launching(rows) as stream:
        return _row_sums(_inputs(norm, rows, anchor), 0, rows, stream)[:, :, 0, 0].contiguous()


def margin_geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    with _launching(jacobian) as stream:
        inputs, scores = _inputs(norm, jacobian, x), layout.scores(logits, jacobian)
        outputs = layout.empty_geometry(jacobian)
        torch.argmax(scores, 1, out=outputs[1][0])
        sums = _row_sums(inputs, outputs[1].data_ptr(), jacobian, stream)
        _cuda.margin_geometry(inputs, *map(Tensor.data_ptr, (sums, scores, *outputs)), stream)
    return outputs


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _launching(jacobian) as stream:
        inputs, scores = _inputs(norm, jacobian, x), layout.scores(logits, jacobian)
        outputs = layout.empty_pairwise(jacobian, x)
        scratch = jacobian.new_empty(_cuda.pairwise_margins_scratch(inputs), dtype=torch.uint8)
        _cuda.pairwise_margins(inputs, *map(Tensor.data_ptr, (scratch, scores, *outputs)), stream)
    return outputs


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor]:
    with _launching(jacobian) as stream:
        inputs, outputs = _inputs(norm, jacobian, x), layout.empty_gradients(jacobian, x)
        w, v = w.contiguous(), w.new_empty(0) if v is None else v.contiguous()  # an empty tensor's address is 0
        scratch = jacobian.new_empty(_cuda.pairwise_backward_scratch(inputs), dtype=torch.uint8)
        _cuda.pairwise_backward(inputs, *map(Tensor.data_ptr, (scratch, w, v, *outputs)), stream)
    return outputs
