"""The `triton` backend: tensors -> launches of triton_kernels. Triton is imported when a kernel is first asked for."""

import contextlib
import functools
import importlib
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastsal.kernels.layout import DUAL_CODES as _DUAL_CODES

_SEGMENT = 4096  # triton_kernels.SEGMENT
_MAX_PIECES = 256  # of the two winning rows
_PAIR_SEGMENT = 8192


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("fastsal.kernels.triton_kernels"), ""
    except ImportError as error:
        return None, f"the package triton cannot be imported: {error}"


def unavailable() -> str:
    """Why this backend cannot run at all; empty if it can."""
    reason = _load()[1]
    if reason or _interpreted() or torch.accelerator.is_available():
        return reason
    return "torch finds no accelerator, and Triton's interpreter is off (TRITON_INTERPRET=1)"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def why_not(jacobian: Tensor) -> str:
    """Why this backend cannot take this Jacobian; empty if it can."""
    if jacobian.device.type == "cpu" and not _interpreted():
        return "tensors are on the CPU, where Triton runs in its interpreter only (TRITON_INTERPRET=1)"
    return _load()[1]


def info() -> dict[str, object]:
    """Triton's version and whether its interpreter is on."""
    if unavailable():
        return {}
    return {"version": importlib.import_module("triton").__version__, "interpreter": _interpreted()}


class Tile(NamedTuple):
    """How many class rows share one load of the anchor, and by how many warps. No bit of the results depends on it."""

    rows: int
    warps: int


# (bytes of an entry, one example a program) -> tile, on Ampere and before, and from Hopper on, whose memory wants more bytes in
# flight. `_FEW` is for launches too small to fill the chip. From register counts and arithmetic; not measured.
_TILES = {
    8: {(2, False): Tile(4, 4), (4, False): Tile(4, 4), (8, False): Tile(2, 4)}
    | {(2, True): Tile(2, 2), (4, True): Tile(2, 2), (8, True): Tile(2, 2)},
    9: {(2, False): Tile(8, 4), (4, False): Tile(4, 4), (8, False): Tile(2, 4)}
    | {(2, True): Tile(2, 2), (4, True): Tile(2, 2), (8, True): Tile(2, 2)},
}
_FEW = Tile(1, 4)


class Device(NamedTuple):
    """What the choice of a tile looks at."""

    major: int
    processors: int


@functools.cache
def _device(device: torch.device) -> Device:
    if device.type != "cuda":
        return Device(9, 132)
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.major, properties.multi_processor_count)


def _power(value: int, least: int, most: int) -> int:
    """The power of two from `least` to `most` that is nearest to `value` from above."""
    return max(least, min(most, 1 << (value - 1).bit_length()))


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _block(D: int, itemsize: int) -> int:
    """Lanes of a row's reduction: part of the reduction tree."""
    return _power(D, 128, 512 if itemsize == 8 else 1024)


def _tile(rows: Tensor, whole: bool) -> Tile:
    B, n, D = rows.shape
    device = _device(rows.device)
    if not whole and B * n * _ceil(D, _SEGMENT) < 16 * device.processors:
        return _FEW
    return _TILES[8 if device.major < 9 else 9][rows.element_size(), whole]


def _whole(jacobian: Tensor) -> bool:
    """Whether one program takes a whole example, which saves a second trip to memory for the winning rows."""
    B, n, D = jacobian.shape
    return D <= _SEGMENT and (n * D <= 1 << 15 or B >= 8 * _device(jacobian.device).processors)


def _launch(name: str, programs: int, *args: Any, warps: int = 4, **constants: int | bool) -> None:
    getattr(_load()[0], name)[(programs,)](*args, num_warps=warps, enable_fp_fusion=False, **constants)


def _scratch(like: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """One float64 buffer, cut into pieces."""
    return torch.split(torch.empty(sum(sizes), dtype=torch.float64, device=like.device), list(sizes))


def _scores(logits: Tensor, jacobian: Tensor) -> Tensor:
    return logits.to(torch.float64 if jacobian.dtype == torch.float64 else torch.float32).contiguous()


def _on_device(tensor: Tensor) -> Any:
    """Makes the tensor's device the current one, whose current stream the launches use."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def _norms(anchor: Tensor, index: Tensor | None, rows: Tensor, pieces: Tensor, norms: Tensor, q: int) -> None:
    """‖anchor − row‖ into norms [B, n] by way of pieces [B, n, S]; anchor [B, D], or rows and the `index` [B] of one each."""
    B, n, D = rows.shape
    S = _ceil(D, _SEGMENT)
    tile = _tile(rows, False)
    groups = _ceil(n, tile.rows)
    _launch(
        "distance_kernel",
        B * groups * S,
        anchor,
        anchor.stride(0),
        anchor.stride(1),
        index,
        rows,
        rows.stride(0),
        rows.stride(1),
        pieces,
        n,
        D,
        S,
        groups,
        warps=tile.warps,
        Q=q,
        ROWS=tile.rows,
        BLOCK=_block(D, rows.element_size()),
    )
    pieces_block = _power(S, 1, 64)
    names = 256 // pieces_block
    _launch("combine_kernel", _ceil(B * n, names), pieces, norms, B * n, S, Q=q, BLOCK_N=names, PIECES=pieces_block)


def row_distances(anchor: Tensor, rows: Tensor, norm: float) -> Tensor:
    """‖anchor − row‖_q: float64 [B, c] from anchor [B, D] and rows [B, c, D]."""
    B, c, D = rows.shape
    out = torch.empty(B, c, dtype=torch.float64, device=rows.device)
    if out.numel():
        (pieces,) = _scratch(rows, B * c * _ceil(D, _SEGMENT))
        with _on_device(rows):
            _norms(anchor, None, rows, pieces, out, _DUAL_CODES[norm])
    return out


def margin_geometry(logits: Tensor, jacobian: Tensor, x: Tensor, norm: float) -> tuple[Tensor, Tensor, Tensor]:
    """Scalars [10, B], (prediction, runner_up) [2, B] and distances [B, n], in one pass over the Jacobian [B, n, D]."""
    B, n, D = jacobian.shape
    logits = _scores(logits, jacobian)
    scalars = logits.new_empty(10, B)
    indices = torch.empty(2, B, dtype=torch.int64, device=jacobian.device)
    distances = torch.empty_like(logits)
    if not B:
        return scalars, indices, distances
    q = _DUAL_CODES[norm]
    codes = {"Q": q, "P": {2: 2, 1: 0, 0: 1}[q]}
    strides = (jacobian.stride(0), jacobian.stride(1))
    segment = max(_SEGMENT, _ceil(_ceil(D, _MAX_PIECES), 512) * 512)
    S, S2 = _ceil(D, _SEGMENT), _ceil(D, segment)
    norms, pieces, sums, gaps = _scratch(jacobian, B * n, B * n * S, B * S2 * 8, B * S2)
    block_n = _power(n, 16, 1024)
    block_2 = _power(D, 128, 512)
    pieces_2 = _power(S2, 1, _MAX_PIECES)
    whole = _whole(jacobian)
    with _on_device(jacobian):
        torch.argmax(logits, 1, out=indices[0])
        if whole:
            tile = _tile(jacobian, True)
            _launch(
                "example_kernel",
                B,
                logits,
                jacobian,
                *strides,
                x,
                x.stride(0),
                norms,
                sums,
                gaps,
                indices,
                distances,
                n,
                D,
                B,
                warps=tile.warps,
                **codes,
                ROWS=tile.rows,
                BLOCK=_block(D, jacobian.element_size()),
                BLOCK_N=block_n,
                BLOCK_2=block_2,
            )
        else:
            _norms(jacobian, indices, jacobian, pieces, norms, q)
            _launch(
                "sums_kernel",
                B * S2,
                logits,
                jacobian,
                *strides,
                x,
                x.stride(0),
                norms,
                sums,
                indices,
                distances,
                n,
                D,
                B,
                S2,
                segment,
                **codes,
                BLOCK_N=block_n,
                BLOCK_2=block_2,
            )
            _launch(
                "gap_kernel",
                B * S2,
                jacobian,
                *strides,
                sums,
                gaps,
                indices,
                D,
                B,
                S2,
                segment,
                Q=q,
                PIECES=pieces_2,
                BLOCK_2=block_2,
            )
        examples = 256 // pieces_2
        _launch(
            "finish_kernel",
            _ceil(B, examples),
            logits,
            sums,
            gaps,
            indices,
            scalars,
            n,
            B,
            S2,
            **codes,
            BLOCK_B=examples,
            PIECES=pieces_2,
        )
    return scalars, indices, distances


def pairwise_margins(
    logits: Tensor, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """distance, margin [B, n, n], nearest_margin, nearest [B, n] and the projection [B, n, n] (empty without x)."""
    B, n, D = jacobian.shape
    logits = _scores(logits, jacobian)
    distance = logits.new_empty(B, n, n)
    margin = torch.empty_like(distance)
    nearest_margin = torch.empty_like(logits)
    nearest = torch.empty(B, n, dtype=torch.int64, device=jacobian.device)
    projection = torch.empty_like(distance) if x is not None else distance.new_empty(0)
    if not B:
        return distance, margin, nearest_margin, nearest, projection
    q = _DUAL_CODES[norm]
    S = _ceil(D, _PAIR_SEGMENT)
    total = B * n * (n - 1) // 2 * S
    norms, projections = _scratch(jacobian, total, total if x is not None else 0)
    wide = jacobian.dtype == torch.float64
    tile = 8 if wide else 16
    tiles = _ceil(n, tile)
    pieces = _power(S, 1, 64)
    with _on_device(jacobian):
        _launch(
            "pairs_kernel",
            B * tiles * tiles * S,
            jacobian,
            jacobian.stride(0),
            jacobian.stride(1),
            x,
            0 if x is None else x.stride(0),
            norms,
            None if x is None else projections,
            n,
            D,
            S,
            tiles,
            _PAIR_SEGMENT,
            warps=4 if wide else 8,
            Q=q,
            TILE=tile,
            BLOCK=32 if x is not None or wide else 64,
            SCALED_BLOCK=4,
        )
        _launch(
            "pairs_finish_kernel",
            B * n,
            logits,
            norms,
            None if x is None else projections,
            distance,
            margin,
            nearest_margin,
            nearest,
            None if x is None else projection,
            n,
            S,
            Q=q,
            BLOCK_N=_power(n, 16, max(16, 256 // pieces)),
            PIECES=pieces,
        )
    return distance, margin, nearest_margin, nearest, projection


def pairwise_backward(
    w: Tensor, v: Tensor | None, jacobian: Tensor, x: Tensor | None, norm: float
) -> tuple[Tensor, Tensor]:
    """What `reference.pairwise_backward` returns, in the dtypes of the Jacobian and x (empty without v)."""
    B, n, D = jacobian.shape
    grad = torch.empty(B, n, D, dtype=jacobian.dtype, device=jacobian.device)
    if v is None or x is None:
        v = x = None
    else:
        v = v.contiguous()
    grad_x = jacobian.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
    if not B:
        return grad, grad_x
    q = _DUAL_CODES[norm]
    strides = (jacobian.stride(0), jacobian.stride(1))
    w = w.contiguous()
    block = _power(D, 128, 256)
    rows = 4
    blocks, tiles = _ceil(D, block), _ceil(n, rows)
    with _on_device(jacobian):
        top = None
        if q == 0:
            top, share = _scratch(jacobian, B * n * n, B * n * n)
            _launch("top_kernel", B * n * n, jacobian, *strides, w, top, share, n, D, BLOCK=_power(D, 128, 512))
            w = share
        _launch(
            "pairs_backward_kernel",
            B * tiles * blocks,
            w,
            v,
            top,
            jacobian,
            *strides,
            x,
            0 if x is None else x.stride(0),
            grad,
            n,
            D,
            blocks,
            tiles,
            Q=q,
            ROWS=rows,
            BLOCK=block,
        )
        if x is not None:
            _launch(
                "pairs_backward_x_kernel",
                B * blocks,
                v,
                jacobian,
                *strides,
                grad_x,
                n,
                D,
                blocks,
                ROWS=rows,
                BLOCK=block,
            )
    return grad, grad_x
