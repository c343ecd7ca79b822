"""The `cuda` backend: tensors -> calls of the native module fastsal._cuda on the current stream of the tensors' device.

`layout.Backend` describes the functions.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsal.tensor.backends import layout

_MANY_EXAMPLES = 1024  # from which on one thread finishes an example of few and short rows
_FEW_ROWS, _SHORT_BYTES = 64, 16384
_FEW_WAVES = 4  # blocks for every multiprocessor below which pairwise_margins gives each segment of D its own

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


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _scratch(on: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=on.device)


def row_distances(anchor: Tensor, rows: Tensor, norm: float) -> Tensor:
    with _launching(rows) as stream:
        out = layout.empty_distances(rows)
        scratch = _scratch(rows, _cuda.row_distances_scratch(layout.DTYPE_CODES[rows.dtype], *rows.shape))
        arguments = layout.native_arguments(norm, rows, (anchor.data_ptr(), anchor.stride(0)))
        _cuda.row_distances(*arguments, out.data_ptr(), scratch.data_ptr(), stream)
    return out


def _short(jacobian: Tensor) -> bool:
    """Whether one thread finishes an example of margin_geometry, rather than a block."""
    B, n, D = jacobian.shape
    return B >= _MANY_EXAMPLES and n <= _FEW_ROWS and D * jacobian.element_size() <= _SHORT_BYTES


def margin_geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    with _launching(jacobian) as stream:
        scores = layout.scores(logits, jacobian)
        outputs = layout.empty_geometry(jacobian)
        torch.argmax(scores, 1, out=outputs[1][0])
        arguments = layout.native_arguments(norm, jacobian, (scores.data_ptr(),), layout.x_arguments(x))
        scratch = _scratch(jacobian, _cuda.margin_geometry_scratch(layout.DTYPE_CODES[jacobian.dtype], *jacobian.shape))
        _cuda.margin_geometry(*arguments, *map(Tensor.data_ptr, outputs), _short(jacobian), scratch.data_ptr(), stream)
    return outputs


def _by_segment(jacobian: Tensor) -> bool:
    """Whether pairwise_margins gives each segment of D its own block, and not 16 of them, lest there be too few."""
    blocks: int = _cuda.pairwise_margins_blocks(layout.DTYPE_CODES[jacobian.dtype], *jacobian.shape, False)
    return blocks < _FEW_WAVES * _multiprocessors(jacobian.device)


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with _launching(jacobian) as stream:
        scores = layout.scores(logits, jacobian)
        outputs = layout.empty_pairwise(jacobian, x)
        arguments = layout.native_arguments(norm, jacobian, (scores.data_ptr(),), layout.x_arguments(x))
        by_segment = _by_segment(jacobian)
        scratch = _scratch(jacobian, _cuda.pairwise_margins_scratch(*jacobian.shape, by_segment))
        _cuda.pairwise_margins(*arguments, *map(Tensor.data_ptr, outputs), by_segment, scratch.data_ptr(), stream)
    return outputs


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor]:
    with _launching(jacobian) as stream:
        w, v = w.contiguous(), None if v is None else v.contiguous()
        outputs = layout.empty_gradients(jacobian, x)
        before = w.data_ptr(), 0 if v is None else v.data_ptr()
        arguments = layout.native_arguments(norm, jacobian, before, layout.x_arguments(x))
        scratch = _scratch(jacobian, _cuda.pairwise_backward_scratch(layout.DUAL_CODES[norm], *jacobian.shape))
        _cuda.pairwise_backward(*arguments, *map(Tensor.data_ptr, outputs), scratch.data_ptr(), stream)
    return outputs
