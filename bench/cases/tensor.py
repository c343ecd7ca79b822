"""Tensor level: all outputs of `fastsal.Geometry`, or ρ̃ alone, from a Jacobian that is given.

The baseline is a pure read of J and x, and beside it stands a read in the order of fastsal's kernel
(bench/baselines/read_bandwidth.py). On a GPU a CUDA graph of each backend is timed too.
"""

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import fastsal
from bench.baselines import backends, formulas
from bench.baselines.read_bandwidth import pure_read, read_in_tiles
from bench.harness.case import QUICK, Case, Implementation, Work
from bench.harness.clock import Captured, clock_of
from fastsal.tensor import reference
from fastsal.tensor.tolerance import scaled_errors, tolerance, worst

Inputs = tuple[Tensor, Tensor, Tensor]
CACHES = 1 << 28  # bytes: several times any last-level cache of one socket
LOOSE = 1e-4  # the error that baselines may have, in units of a quantity's scale: they sum in plain float32

SHAPES = ((8, 10, 784), (65536, 10, 784), (1700, 100, 3072), (13, 1000, 37632), (1, 1000, 150528))
QUICK_SHAPES = ((8, 10, 784), (200, 100, 3072))
TINY = (3, 30, 50)
LARGEST_REFERENCE = 2**27  # numbers in J: above, the reference is left out
CHECKED = 64  # examples compared with float64, fewer where they are large


def draw(shape: tuple[int, int, int], dtype: torch.dtype, tiny: bool = False, device: str = "cpu") -> list[Inputs]:
    """Random logits, Jacobians and x: as many as it takes to exceed every cache, or a small one if `tiny`."""
    B, n, D = (min(size, small) for size, small in zip(shape, TINY, strict=True)) if tiny else shape
    generator = torch.Generator(device).manual_seed(0)
    copies = 1 if tiny else max(1, CACHES // (B * n * D * dtype.itemsize))
    return [
        (
            torch.randn(B, n, generator=generator, device=device),
            torch.randn(B, n, D, generator=generator, dtype=dtype, device=device),
            torch.randn(B, D, generator=generator, dtype=dtype, device=device),
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
        """The worst scaled error; not computed again where the bits are those of the call before."""
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
    **{f"torch.cdist, {name}": (functools.partial(formulas.cdist, name), "ρ̃ alone") for name in formulas.CDIST_MODES},
    "Gram by bmm": (formulas.gram, "ρ̃ alone"),
    "NumPy": (formulas.numpy_alone, "ρ̃ alone"),
}


def work(shape: tuple[int, int, int], dtype: torch.dtype, tiny: bool, device: str = "cpu") -> Work:
    """Jacobians of this shape, and the implementations that work on them."""
    inputs = draw(shape, dtype, tiny, device)
    checks = Checks(inputs[0])
    implementations = [Implementation("pure read", pure_read, lambda _: 0.0, 0.0, "reads J and x")]
    names, skipped = backends.compiled(inputs[0][1])
    on_cpu = device == "cpu"

    def add(name: str, run: Callable[[Inputs], Any], limit: float, what: str = "", compiles: bool = False) -> None:
        check = functools.partial(checks, name)
        implementations.append(Implementation(name, run, check, limit, what, compiles=compiles))

    if on_cpu:
        what = "reads J and x, row beside row"
        implementations.append(Implementation("read in tiles", read_in_tiles, lambda _: 0.0, 0.0, what))
    for name in names:
        ours = functools.partial(_fastsal, name)
        add(f"fastsal {name}", ours, tolerance(dtype))
        if not on_cpu:
            add(f"fastsal {name}, graph", Captured(ours), tolerance(dtype), compiles=True)
    torch._dynamo.reset()  # a shape beyond its limit of recompilations would run uncompiled
    # torch.compile fixes the number of threads and guards it, so that every number of threads gets code of its own.
    optimized = torch.compile(formulas.eager, dynamic=False)
    add("torch.compile", lambda given: optimized(*given), LOOSE, compiles=True)
    for name, (formula, what) in FORMULAS.items():
        if dtype == torch.bfloat16 and not name.startswith("eager"):
            skipped[name] = "float32 only"
        elif name == "NumPy" and not on_cpu:
            skipped[name] = "on the CPU only"
        else:
            add(name, lambda given, formula=formula: formulas.in_parts(formula, *given), LOOSE, what)
    if inputs[0][1].numel() > LARGEST_REFERENCE:
        skipped["fastsal reference"] = "float64 in pure torch takes minutes here"
    else:
        add("fastsal reference", lambda given: formulas.in_parts(_reference, *given), tolerance(dtype), "in float64")
    size = sum(tensor.numel() * tensor.element_size() for tensor in inputs[0][1:])
    return Work(inputs, implementations, skipped, size, clock_of(device))


def cases(quick: bool = False, device: str = "cpu") -> Iterator[Case]:
    """float32 and bfloat16; large Jacobians, and one so small that all of its time is overhead."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            if dtype == torch.bfloat16 and (quick or shape in (SHAPES[0], SHAPES[-1])):
                continue
            name = f"({', '.join(map(str, shape))}) {str(dtype).removeprefix('torch.')}"
            make = functools.partial(work, shape, dtype, device=device)
            yield Case("tensor", name, make, threads=threads_on(device), budget=QUICK if quick else 12.0)


def threads_on(device: str) -> tuple[int | None, ...]:
    """On a CPU one thread and all of them; on a GPU their number does not matter."""
    return (1, None) if device == "cpu" else (None,)
