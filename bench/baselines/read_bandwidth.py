"""How fast the machine reads memory, the baseline of the tensor level: read_bandwidth.cpp, compiled when first asked for.

`pure_read` is the fastest read of all bytes that was found: on one thread and a large Jacobian nothing beats it, on several
threads some kernels do. `read_in_tiles` reads one example after the other, its rows side by side: the floor of a kernel that
reads in that order, as fastsal's does wherever a processor is not faster at one row after the other.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _compiled() -> ctypes.CDLL:
    """read_bandwidth.cpp as a library."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "read_bandwidth.so")
        source = Path(__file__).with_name("read_bandwidth.cpp")
        # Without -fopenmp: a second OpenMP pool in the process would spin against torch's.
        subprocess.run(["c++", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
        found = ctypes.CDLL(str(library))
    found.read_sum.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    found.read_in_tiles.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_void_p]
    found.read_sum.restype = found.read_in_tiles.restype = ctypes.c_double
    return found


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def _total(read: Callable[[Any], float], parts: list[Any], threads: int) -> float:
    """The sum of what `read` returns for each part (ctypes drops the GIL)."""
    return sum((_pool(threads).map if threads > 1 else map)(read, parts))


def _threads(jacobian: Tensor) -> int:
    return torch.get_num_threads() if jacobian.numel() >= 2**20 else 1


def pure_read(inputs: tuple[Tensor, Tensor, Tensor]) -> object:
    """The fastest sum over all bytes of J and x, taken as float32; every thread has its part of J. On a GPU torch's maximum."""
    _, jacobian, x = inputs
    if jacobian.is_cuda:
        return [tensor.flatten().view(torch.float32).amax() for tensor in (jacobian, x)]
    threads = _threads(jacobian)

    def read(part: Tensor) -> float:
        return _compiled().read_sum(part.data_ptr(), part.numel() * part.element_size() // 4)

    return _total(read, [*jacobian.flatten().chunk(threads), x], threads)


def read_in_tiles(inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """The same bytes, the rows of an example (ten at least) side by side; see read_bandwidth.cpp."""
    _, jacobian, x = inputs
    threads = _threads(jacobian)
    if len(jacobian) >= threads:
        parts = list(zip(jacobian.chunk(threads), x.chunk(threads), strict=True))
    else:
        parts = [(rows, x) for rows in jacobian.chunk(min(threads, jacobian.shape[1] // 10), 1)]

    def read(part: tuple[Tensor, Tensor]) -> float:
        rows, own = part
        (example, row, _), size = rows.stride(), rows.element_size()
        B, n, _ = rows.shape
        return _compiled().read_in_tiles(rows.data_ptr(), B, n, row * size, example * size, own.data_ptr())

    return _total(read, parts, threads)
