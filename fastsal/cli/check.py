"""compare every available backend with the float64 reference on fresh random inputs: errors, limits and speed

Errors are in units of each quantity's own scale: the value itself, or the sum of the absolute terms where terms cancel.
The exit status is 1 if any is above its limit. Among the inputs: uneven sizes, gradients of 1e-25 and 1e20, rows that differ
by one part in a million, constant rows, other strides. Speed is that of margin_geometry, relative to the reference (eager
torch in float64).
"""

import argparse
import math
import random
from collections.abc import Iterator

import torch
from torch import Tensor

from fastsal.cli.clock import best_times
from fastsal.tensor import ops
from fastsal.tensor.geometry import margin_geometry
from fastsal.tensor.pairwise import pairwise_margins
from fastsal.tensor.reference import row_distances
from fastsal.tensor.tolerance import pairwise_errors, scaled_errors, tolerance, worst
from fastsal.validation import DTYPES

NORMS = (2.0, 1.0, math.inf)
SHAPES = ((3, 2, 1), (2, 5, 33), (5, 10, 784), (1, 3, 65537))
Inputs = tuple[Tensor, Tensor, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("--seed", type=int, help="default: a new one every time (it is printed)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, and no timing")


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """Random logits [B, n], jacobian [B, n, D] and x [B, D]."""
    B, n, D = shape
    draw = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((B, n), (B, n, D), (B, D)))
    logits, jacobian, x = (v.to(device, dtype) for v in draw)
    return logits, jacobian, x


def _cases(dtype: torch.dtype, device: str, quick: bool, generator: torch.Generator) -> Iterator[tuple[str, Inputs]]:
    """Inputs on which careless arithmetic fails, each with its name."""
    for shape in SHAPES[:3] if quick else SHAPES:
        yield f"random {'x'.join(map(str, shape))}", _inputs(shape, dtype, device, generator)
    logits, jacobian, x = _inputs((4, 6, 257), dtype, device, generator)
    if dtype != torch.float16:  # 1e-25 and 1e20 are outside its range
        yield "gradients of 1e-25", (logits, 1e-25 * jacobian, x)
        yield "gradients of 1e20", (logits, 1e20 * jacobian, x)
    step = max(1e-6, torch.finfo(dtype).eps)
    yield "near-identical rows", (logits, jacobian[:, :1] * (1 + step * jacobian.sign()), x)
    yield "constant rows", (logits, (0.1 * logits).unsqueeze(2).expand_as(jacobian).contiguous(), x)
    yield "class-major storage", (logits, jacobian.transpose(0, 1).contiguous().transpose(0, 1), x)
    if dtype != torch.float64:
        yield "x in float32", (logits, jacobian, x.float())


def _errors(inputs: Inputs, norm: float, backend: str) -> Iterator[tuple[float, str]]:
    """The worst scaled error of every quantity that the backend computes, with its name."""
    logits, jacobian, x = inputs
    geometry = margin_geometry(logits, jacobian, x, norm=norm, backend=backend)
    for name, error in scaled_errors(geometry, logits, jacobian, x, norm).items():
        yield error, name
    rows = jacobian[:, 1:]
    wanted = row_distances(jacobian[:, 0], rows, norm)
    yield worst(ops.row_distances(jacobian[:, 0], rows, norm, backend), wanted, wanted), "row_distances"
    pairs = pairwise_margins(logits, jacobian, x, norm=norm, backend=backend)
    for name, error in pairwise_errors(pairs, logits, jacobian, x, norm).items():
        yield error, f"pairwise {name}"


def _speed(backend: str, dtype: torch.dtype, norm: float, device: str, seed: int) -> float:
    """How many times as fast as the reference the backend is on a Jacobian of 32 x 10 x 3072."""
    inputs = _inputs((32, 10, 3072), dtype, device, torch.Generator().manual_seed(seed))
    eager, fast = best_times(inputs, norm, ("reference", backend))
    return eager / fast


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; returns 1 if anything is out of tolerance, else 0."""
    seed = random.SystemRandom().randrange(2**31) if arguments.seed is None else arguments.seed
    print(f"seed {seed}; errors in units of each quantity's own scale")
    print(
        f"{'backend':10} {'dtype':9} {'norm':4} {'worst error':>12} {'limit':>7} {'speed':>8}  worst quantity (inputs)"
    )
    failed = 0
    for backend, state in ops.info()["backends"].items():
        gpu = torch.cuda.is_available() and backend not in ("reference", "cpu")
        device = "cuda" if gpu else "cpu"
        if backend != "reference":
            state = ops.BACKENDS[backend].why_not(torch.empty(0, device=device)) or "available"
        if state != "available":
            print(f"{backend:10} not available: {state}")
            continue
        for dtype in DTYPES:
            for norm in NORMS:
                generator, limit = torch.Generator().manual_seed(seed), tolerance(dtype)
                error, quantity, case = max(
                    (*found, case)
                    for case, inputs in _cases(dtype, device, arguments.quick, generator)
                    for found in _errors(inputs, norm, backend)
                )
                bad = not error <= limit
                failed += bad
                timed = backend != "reference" and not arguments.quick
                speed = f"{_speed(backend, dtype, norm, device, seed):7.1f}x" if timed else "-"
                print(
                    f"{backend:10} {str(dtype)[6:]:9} {norm:<4g} {error:12.1e} {limit:7.0e} {speed:>8}  "
                    f"{quantity} ({case}){'  OUT OF TOLERANCE' if bad else ''}"
                )
    print(f"{failed} out of tolerance" if failed else "all within tolerance")
    return 1 if failed else 0
