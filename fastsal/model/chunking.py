"""How many rows of a Jacobian are taken at once, and what happens where memory runs out."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

R = TypeVar("R")

# How many rows to take at once, by measurement on convolutional networks of 10 to 1000 classes. On a CPU, the gradients of a
# chunk are to fit a cache, or to be as many as are worth reading the weights for, up to a number of rows: at 64 rows a network
# of 1000 classes took 1.4 times as long and a third more memory, while another gained 2 percent. Elsewhere, a number of rows.
CHUNK_BYTES = 1 << 23
# Of directions. With half as many bytes ResNet-18, MobileNet V2 and ConvNeXt-Atto take 2 to 15 % longer.
CHUNK_BYTES_JVP = 1 << 24
CHUNK_ROWS = 40
CHUNK_ROWS_ACCELERATOR = 32
CHUNK_PAIRS = 256  # of an example and a direction, where these can be chosen freely
CHUNK_PAIRS_ACCELERATOR = 1024


def vmap(run: Callable[[Tensor], R], stack: Tensor) -> R:
    """Applies run to every entry of stack [k, ...] at once.

    This is not autograd's own `is_grads_batched`, whose older vmap takes convolutions one row at a time.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # an operation that torch takes row by row
        result: R = torch.func.vmap(run, randomness="same")(stack)
    return result


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch raised this error because memory ran out, on whatever device."""
    texts = ("out of memory", "not enough memory", "DefaultCPUAllocator", "ALLOC_FAILED")
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


def first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def in_parts(stack: Tensor, size: int, run: Callable[[Tensor], None]) -> None:
    """Calls run on stack [k, ...], `size` entries at a time, in order.

    Where memory runs out, the same entries are tried again in parts of half the size. So a call of `run` that fails must leave
    no trace.
    """
    start = 0
    while start < len(stack):
        part = stack[start : start + size]
        try:
            run(part)
        except RuntimeError as error:
            if len(part) == 1 or not is_out_of_memory(error):
                raise
            size = len(part) // 2
            continue
        start += len(part)
