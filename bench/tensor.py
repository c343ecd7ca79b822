"""Tensor level: all outputs of `fastsal.Geometry`, or ρ̃ alone, from a Jacobian that is given.

The yardstick is a pure read of J and x (read_bandwidth.cpp, built by the system's compiler): what no method can beat that looks
at every gradient. Beside it stands a read of one example after the other, its rows side by side: the floor of a kernel that
reads in that order, as fastsal's does wherever a processor is not faster at one row after the other.
"""

import ctypes
import functools
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fastsal
from bench import formulas
from bench.core import Case, Contestant, Work
from fastsal import ops, reference
from fastsal.tolerance import scaled_errors, tolerance, worst

Inputs = tuple[Tensor, Tensor, Tensor]
CACHES = 1 << 28  # bytes: several times any last-level cache of one socket
LOOSE = 1e-4  # the error, in units of a quantity's scale, that others may have: plain float32 sums; fastsal's is 1e-6

SHAPES = ((8, 10, 784), (65536, 10, 784), (1700, 100, 3072), (13, 1000, 37632), (1, 1000, 150528))
QUICK = ((8, 10, 784), (200, 100, 3072))
TINY = (3, 30, 50)
LARGEST_REFERENCE = 2**27  # numbers in J: above, the reference is left out
CHECKED = 64  # examples compared with float64, fewer where they are large


@functools.cache
def readers() -> ctypes.CDLL:
    """read_bandwidth.cpp, compiled."""
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
    """The sum of what `read` returns of each part (ctypes drops the GIL)."""
    return sum((_pool(threads).map if threads > 1 else map)(read, parts))


def _threads(jacobian: Tensor) -> int:
    return torch.get_num_threads() if jacobian.numel() >= 2**20 else 1


def pure_read(inputs: Inputs) -> float:
    """The fastest sum over all bytes of J and x, taken as float32; every thread has its part of J."""
    _, jacobian, x = inputs
    threads = _threads(jacobian)

    def read(part: Tensor) -> float:
        return readers().read_sum(part.data_ptr(), part.numel() * part.element_size() // 4)

    return _total(read, [*jacobian.flatten().chunk(threads), x], threads)


def read_in_tiles(inputs: Inputs) -> float:
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
        return readers().read_in_tiles(rows.data_ptr(), B, n, row * size, example * size, own.data_ptr())

    return _total(read, parts, threads)


def draw(shape: tuple[int, int, int], dtype: torch.dtype, tiny: bool) -> list[Inputs]:
    """Random logits, jacobian and x; as many as it takes to exceed every cache. Tiny: small ones."""
    B, n, D = (min(size, small) for size, small in zip(shape, TINY, strict=True)) if tiny else shape
    generator = torch.Generator().manual_seed(0)
    copies = 1 if tiny else max(1, CACHES // (B * n * D * dtype.itemsize))
    return [
        (
            torch.randn(B, n, generator=generator),
            torch.randn(B, n, D, generator=generator, dtype=dtype),
            torch.randn(B, D, generator=generator, dtype=dtype),
        )
        for _ in range(copies)
    ]


class Checks:
    """Compares results with float64 on examples spread over the batch."""

    def __init__(self, inputs: Inputs) -> None:
        B, n, D = inputs[1].shape
        count = min(B, CHECKED, max(1, 2**22 // (n * D)))
        self.examples = torch.linspace(0, B - 1, count).long()
        self.inputs = tuple(tensor[self.examples] for tensor in inputs)
        self.robustness = reference.margin_geometry(*self.inputs)[0]["linearized_robustness"]
        self._seen: dict[str, tuple[dict[str, Tensor], float]] = {}

    def __call__(self, name: str, result: Any) -> float:
        """The worst scaled error; where the bits are those of the call before, its answer."""
        fields = result if isinstance(result, dict) else vars(result)
        part = {key: value[self.examples] for key, value in fields.items() if isinstance(value, Tensor)}
        before, error = self._seen.get(name, ({}, 0.0))
        if before.keys() == part.keys() and all(before[key].equal(part[key]) for key in part):
            return error
        if "runner_up" in part:
            error = max(scaled_errors(SimpleNamespace(**part), *self.inputs, 2.0).values())
        else:
            error = worst(part["linearized_robustness"], self.robustness, self.robustness)
        self._seen[name] = part, error
        return error


def _fastsal(backend: str, inputs: Inputs) -> Any:
    return fastsal.margin_geometry(*inputs, backend=backend)


def _reference(logits: Tensor, jacobian: Tensor, x: Tensor) -> formulas.Outputs:
    result = vars(fastsal.margin_geometry(logits, jacobian, x, backend="reference"))
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}


FORMULAS: dict[str, tuple[formulas.Formula, str]] = {
    "eager torch": (formulas.eager, ""),
    "eager torch, ρ̃": (formulas.eager_alone, "alone"),
    "torch.cdist, direct": (formulas.cdist_direct, "ρ̃ alone"),
    "torch.cdist, matmul": (formulas.cdist_matmul, "ρ̃ alone"),
    "Gram by bmm": (formulas.gram, "ρ̃ alone"),
    "NumPy": (formulas.numpy_alone, "ρ̃ alone"),
}


def work(shape: tuple[int, int, int], dtype: torch.dtype, tiny: bool) -> Work:
    """Everyone on a Jacobian of this shape."""
    inputs = draw(shape, dtype, tiny)
    checks = Checks(inputs[0])
    contestants = [
        Contestant("pure read", pure_read, lambda _: 0.0, 0.0, "reads J and x"),
        Contestant("read in tiles", read_in_tiles, lambda _: 0.0, 0.0, "reads J and x, row beside row"),
    ]
    skipped = {}

    def add(name: str, run: Callable[[Inputs], Any], limit: float, what: str = "", compiles: bool = False) -> None:
        contestants.append(Contestant(name, run, functools.partial(checks, name), limit, what, compiles=compiles))

    for backend, module in ops.KERNELS.items():
        if reason := module.why_not(inputs[0][1]):
            skipped[f"fastsal {backend}"] = reason
        else:
            add(f"fastsal {backend}", functools.partial(_fastsal, backend), tolerance(dtype))
    torch._dynamo.reset()  # a shape beyond its limit of recompilations would run uncompiled
    # The number of threads is compiled in, and a change of it is guarded: every thread count gets code of its own.
    optimized = torch.compile(formulas.eager, dynamic=False)
    add("torch.compile", lambda given: optimized(*given), LOOSE, compiles=True)
    for name, (formula, what) in FORMULAS.items():
        if dtype == torch.bfloat16 and not name.startswith("eager"):
            skipped[name] = "float32 only"
            continue
        add(name, lambda given, formula=formula: formulas.in_parts(formula, *given), LOOSE, what)
    if inputs[0][1].numel() > LARGEST_REFERENCE:
        skipped["fastsal reference"] = "float64 in pure torch takes minutes here"
    else:
        add("fastsal reference", lambda given: formulas.in_parts(_reference, *given), tolerance(dtype), "in float64")
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs[0][1:])
    return Work(inputs, contestants, skipped, size)


def cases() -> Iterator[Case]:
    """float32 and bfloat16, sizes that fill the memory and one that is all overhead."""
    for quick, shapes in ((False, SHAPES), (True, QUICK)):
        for shape in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                if dtype == torch.bfloat16 and (quick or shape in (SHAPES[0], SHAPES[-1])):
                    continue
                name = f"({', '.join(map(str, shape))}) {str(dtype).removeprefix('torch.')}"
                yield Case("tensor", name, functools.partial(work, shape, dtype), quick)
