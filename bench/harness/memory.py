"""Memory: what the process holds, by how much that grows at most, and a fresh process to measure it in."""

import gc
import multiprocessing
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str = "VmRSS") -> int:
    """Bytes of a field of /proc/self/status: what the process holds, or as VmHWM the most that it has held."""
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def growth(run: Callable[[], object]) -> int:
    """Bytes by which the peak during `run` exceeds what the process holds before it."""
    gc.collect()
    if not _CLEAR.exists():  # not Linux: only the peak since the process began is known, in bytes on macOS
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    _CLEAR.write_text("5", encoding="ascii")  # the peak starts anew
    before = resident()
    run()
    return resident("VmHWM") - before


def _call(threads: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(threads)
    return function(*arguments)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a module's function returns in a process of its own, with as many threads; None if the process is killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(_call, torch.get_num_threads(), function, arguments).result()
        except BrokenProcessPool:
            return None
