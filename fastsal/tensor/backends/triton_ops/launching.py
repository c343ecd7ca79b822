"""How kernels are launched: the one call of Triton's launcher, block sizes and scratch memory."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

MAX_PROGRAMS = 2**31 - 1  # of a grid
# Triton compiles a kernel again where an integer argument is 1 or a multiple of 16, as in the last batch of a data set. These
# counts say nothing about the alignment of a row, so that nothing is gained by it.
COUNTS = ("n_rows", "n_examples", "n_segments", "n_row_blocks", "n_col_blocks", "n_norms")


def kernel(function: Callable[..., Any]) -> Any:
    """Makes a Triton kernel of a function: one compilation serves every batch and, within a block, every number of classes."""
    return triton.jit(function, do_not_specialize=COUNTS)


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: int) -> None:
    """Starts `programs` programs of a kernel on the current stream. Triton fuses no multiplication with an addition."""
    if programs > MAX_PROGRAMS:
        raise RuntimeError(f"{kernel.__name__}: the problem is too large for one grid ({programs} programs)")
    kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False, **constants)


def block_size(count: int, least: int, most: int) -> int:
    """The smallest power of two that is not below `count`, but at least `least` and at most `most`."""
    return max(least, min(most, 1 << (count - 1).bit_length()))


def scratch(like: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Float64 buffers of the given sizes, in one allocation."""
    return torch.split(torch.empty(sum(sizes), dtype=torch.float64, device=like.device), list(sizes))
