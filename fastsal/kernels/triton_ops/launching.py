"""How kernels are launched: the one call of Triton's launcher, scratch memory, and what is known about the device."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor


def launch(kernel: Any, programs: int, *arguments: Any, warps: int = 4, **constants: int) -> None:
    """Starts `programs` programs of a kernel on the current stream. Triton fuses no multiplication with an addition."""
    kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False, **constants)


class Device(NamedTuple):
    """What the choice of a launch looks at."""

    major: int  # of the compute capability
    processors: int


@functools.cache
def device(of: torch.device) -> Device:
    """An H100's numbers where there is no CUDA device, as in the interpreter."""
    if of.type != "cuda":
        return Device(9, 132)
    properties = torch.cuda.get_device_properties(of)
    return Device(properties.major, properties.multi_processor_count)


def block_size(count: int, least: int, most: int) -> int:
    """The smallest power of two that is not below `count`, but at least `least` and at most `most`."""
    return max(least, min(most, 1 << (count - 1).bit_length()))


def scratch(like: Tensor, *sizes: int) -> tuple[Tensor, ...]:
    """Float64 buffers of the given sizes, in one allocation."""
    return torch.split(torch.empty(sum(sizes), dtype=torch.float64, device=like.device), list(sizes))
