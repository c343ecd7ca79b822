"""The `cuda` backend: tensors -> calls of the native module fastsal._cuda on the current stream of the tensors' device."""

import contextlib
import functools
import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

_CODES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}
_DUAL_CODES = {2.0: 2, float("inf"): 1, 1.0: 0}  # p of the perturbation -> q of the gradient, 0 for infinity
_FUSED_BLOCKS = 8  # examples for every multiprocessor from which on one block an example fills the device
_FUSED_TASKS = 16  # warps: an example with no more work than this is one block's in any case
_SPLIT_BLOCKS = 2  # blocks for every multiprocessor below which pairwise_margins gives each segment of D its own


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastsal._cuda"), ""
    except ImportError as error:
        return None, f"the native module fastsal._cuda cannot be imported: {error}"


_cuda, _reason = _load()


def unavailable() -> str:
    """Why this backend cannot run at all; empty if it can."""
    if _reason or torch.cuda.is_available():
        return _reason
    return "torch.cuda.is_available() is false: no NVIDIA driver or device, or a torch without CUDA"


@functools.cache
def _device_why_not(index: int) -> str:
    assert _cuda is not None
    with torch.cuda.device(index):
        reason: str = _cuda.why_not()
    return f"cuda:{index} cannot run the kernels of this build: {reason}" if reason else ""


def why_not(jacobian: Tensor) -> str:
    """Why this backend cannot take this Jacobian; empty if it can."""
    if _reason:
        return _reason
    if jacobian.device.type != "cuda" or torch.version.hip:
        return f"tensors are on {jacobian.device}, not on an NVIDIA device"
    return _device_why_not(jacobian.get_device())


def info() -> dict[str, object]:
    """The CUDA runtime that is linked in."""
    if _cuda is None:
        return {}
    version = _cuda.runtime_version()
    return {"runtime": f"{version // 1000}.{version % 1000 // 10}"}


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


def _scores(logits: Tensor, jacobian: Tensor) -> Tensor:
    return logits.to(torch.float64 if jacobian.dtype == torch.float64 else torch.float32).contiguous()


def _rows_arguments(jacobian: Tensor) -> tuple[int, int, int]:
    return jacobian.data_ptr(), jacobian.stride(0), jacobian.stride(1)


def _x_arguments(x: Tensor | None) -> tuple[int, int, int]:
    return (0, 0, 0) if x is None else (x.data_ptr(), _CODES[x.dtype], x.stride(0))


def row_distances(anchor: Tensor, rows: Tensor, norm: float) -> Tensor:
    """‖anchor − row‖_q: float64 [B, c] from anchor [B, D] and rows [B, c, D]."""
    assert _cuda is not None
    B, c, D = rows.shape
    code = _CODES[rows.dtype]
    with _launching(rows) as stream:
        out = torch.empty(B, c, dtype=torch.float64, device=rows.device)
        scratch = _scratch(rows, _cuda.row_distances_scratch(code, B, c, D))
        _cuda.row_distances(
            _DUAL_CODES[norm],
            code,
            anchor.data_ptr(),
            anchor.stride(0),
            *_rows_arguments(rows),
            B,
            c,
            D,
            out.data_ptr(),
            scratch.data_ptr(),
            stream,
        )
    return out


def _fused(code: int, B: int, n: int, D: int, device: torch.device) -> bool:
    """Whether margin_geometry gives each example to one block, in one launch, or spreads it over six."""
    assert _cuda is not None
    if not _cuda.margin_geometry_fits(code, B, n, D):
        return False
    return _cuda.margin_geometry_tasks(code, B, n, D) <= _FUSED_TASKS or B >= _FUSED_BLOCKS * _multiprocessors(device)


def margin_geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scalars [10, B], (prediction, runner_up) [2, B] and distances [B, n], in one pass over the Jacobian [B, n, D]."""
    assert _cuda is not None
    B, n, D = jacobian.shape
    code = _CODES[jacobian.dtype]
    with _launching(jacobian) as stream:
        logits = _scores(logits, jacobian)
        scalars = logits.new_empty(10, B)
        indices = logits.new_empty(2, B, dtype=torch.int64)
        distances = torch.empty_like(logits)
        fused = _fused(code, B, n, D, jacobian.device)
        scratch = _scratch(jacobian, _cuda.margin_geometry_scratch(code, B, n, D, fused))
        _cuda.margin_geometry(
            _DUAL_CODES[norm],
            code,
            logits.data_ptr(),
            *_rows_arguments(jacobian),
            *_x_arguments(x),
            B,
            n,
            D,
            scalars.data_ptr(),
            indices.data_ptr(),
            distances.data_ptr(),
            fused,
            scratch.data_ptr(),
            stream,
        )
    return scalars, indices, distances


def _split(B: int, n: int, D: int, device: torch.device) -> bool:
    """Whether pairwise_margins gives each segment of D its own block, lest there be too few."""
    assert _cuda is not None
    blocks: int = _cuda.pairwise_margins_blocks(B, n, D, False)
    return blocks < _SPLIT_BLOCKS * _multiprocessors(device)


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """distance, margin [B, n, n], nearest_margin, nearest [B, n] and the projection [B, n, n] (empty without x)."""
    assert _cuda is not None
    B, n, D = jacobian.shape
    with _launching(jacobian) as stream:
        logits = _scores(logits, jacobian)
        distance = logits.new_empty(B, n, n)
        margin = torch.empty_like(distance)
        nearest_margin = torch.empty_like(logits)
        nearest = logits.new_empty(B, n, dtype=torch.int64)
        projection = torch.empty_like(distance) if x is not None else distance.new_empty(0)
        split = _split(B, n, D, jacobian.device)
        scratch = _scratch(jacobian, _cuda.pairwise_margins_scratch(B, n, D, x is not None, split))
        _cuda.pairwise_margins(
            _DUAL_CODES[norm],
            _CODES[jacobian.dtype],
            logits.data_ptr(),
            *_rows_arguments(jacobian),
            *_x_arguments(x),
            B,
            n,
            D,
            distance.data_ptr(),
            margin.data_ptr(),
            nearest_margin.data_ptr(),
            nearest.data_ptr(),
            projection.data_ptr(),
            split,
            scratch.data_ptr(),
            stream,
        )
    return distance, margin, nearest_margin, nearest, projection


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor]:
    """Gradients of the Jacobian [B, n, D] and of x [B, D] (empty without v), from the pairs' weights [B, n, n]."""
    assert _cuda is not None
    B, n, D = jacobian.shape
    with _launching(jacobian) as stream:
        w = w.contiguous()
        v = None if x is None or v is None else v.contiguous()
        grad_jacobian = jacobian.new_empty(B, n, D)
        grad_x = jacobian.new_empty(0) if x is None or v is None else x.new_empty(B, D)
        scratch = _scratch(jacobian, _cuda.pairwise_backward_scratch(_DUAL_CODES[norm], B, n, D))
        _cuda.pairwise_backward(
            _DUAL_CODES[norm],
            _CODES[jacobian.dtype],
            w.data_ptr(),
            0 if v is None else v.data_ptr(),
            *_rows_arguments(jacobian),
            *_x_arguments(x),
            B,
            n,
            D,
            grad_jacobian.data_ptr(),
            grad_x.data_ptr(),
            scratch.data_ptr(),
            stream,
        )
    return grad_jacobian, grad_x
