"""Compiles every Triton kernel ahead of time, without a GPU, and lists registers, spills and shared memory.

    python bench/tools/triton_matrix.py                    the full matrix: every launch of a range of shapes, uneven ones too
    python bench/tools/triton_matrix.py --default          what the tests compile: each kernel × dtype × norm once
    python bench/tools/triton_matrix.py --json matrix.json

The launches are those of fastsal/tensor/backends/triton_ops itself, taken before they reach the device.
"""

import argparse
import contextlib
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastsal.tensor.backends import triton as backend
from fastsal.tensor.backends.triton_ops import launching

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}
NORMS = (2.0, math.inf, 1.0)
DTYPES = tuple(TYPES)[:4]
# [B, n, D]: many segments; one; uneven D, so that no address is aligned.
DEFAULT_SHAPE = (8, 100, 150528)
SHAPES = (DEFAULT_SHAPE, (64, 10, 784), (4096, 100, 3072), (2, 3, 8191), (64, 10, 77))


class Launch(NamedTuple):
    """One compilation: a kernel and its module, the types of its arguments, its constants and its warps."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    warps: int


def caught(shapes: tuple[tuple[int, int, int], ...]) -> Iterator[Launch]:
    """Every launch of every operator on Jacobians of the given shapes."""
    launches: dict[Launch, None] = {}

    def catch(kernel: Any, programs: int, *args: Any, warps: int = 4, **constants: Any) -> None:
        names = kernel.arg_names
        values = dict(zip(names, args, strict=False)) | constants
        signature, fixed, aligned = [], [], []
        for place, key in enumerate(names):
            value, counted = values[key], kernel.params[place].do_not_specialize
            if isinstance(value, torch.Tensor):
                signature.append((key, "*" + TYPES[value.dtype]))
                aligned += [place]
            elif key in constants or value is None or (value == 1 and type(value) is int and not counted):
                signature.append((key, "constexpr"))
                fixed.append((key, value))
            else:
                signature.append((key, "i32" if -(2**31) <= value < 2**31 else "i64"))
                aligned += [place] if value % 16 == 0 and not counted else []
        where = (kernel.__module__, kernel.__name__)
        launches[Launch(*where, tuple(signature), tuple(fixed), tuple(aligned), warps)] = None

    launching.launch = catch
    backend._on_device = lambda tensor: contextlib.nullcontext()
    for B, n, D in shapes:
        for dtype in DTYPES:
            shapes_of = ((B, n), (B, n, D), (B, D))
            logits, jacobian, x = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes_of)
            pairs = torch.empty(B, n, n, dtype=torch.float64, device="meta")
            for norm in NORMS:
                backend.margin_geometry(logits, jacobian, x, norm)
                backend.row_distances(jacobian[:, 0], jacobian, norm)
                backend.pairwise_margins(logits, jacobian, x, norm)
                backend.pairwise_margins(logits, jacobian, None, norm)
                backend.pairwise_backward(pairs, pairs, jacobian, x, norm)
                backend.pairwise_backward(pairs, None, jacobian, None, norm)
    yield from launches


def default() -> list[Launch]:
    """The first launch of each kernel × dtype × norm, with x."""
    first: dict[tuple[Any, ...], Launch] = {}
    for launch in caught((DEFAULT_SHAPE,)):
        first.setdefault((launch.kernel, data_type(launch), dict(launch.constants).get("Q")), launch)
    return list(first.values())


def data_type(launch: Launch) -> str:
    """The type of the Jacobian, or where a kernel sees none of the output."""
    types = dict(launch.signature)
    names = ("rows_ptr", "jacobian_ptr", "scalars_ptr", "distance_ptr", "norms_ptr")
    return next(types[name][1:] for name in names if name in types)


def compiled(work: tuple[Launch, int]) -> dict[str, Any]:
    """Registers, spilled bytes and shared memory of one compilation, from its cubin."""
    launch, capability = work
    source = ASTSource(
        getattr(importlib.import_module(launch.module), launch.kernel),
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(place,): [["tt.divisibility", 16]] for place in launch.aligned},
    )
    options = {"num_warps": launch.warps, "enable_fp_fusion": False}
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        command = [str(cuobjdump), "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "kernel": launch.kernel,
        "capability": capability,
        "data": data_type(launch),
        "constants": {key: value for key, value in launch.constants if value is not None},
        "warps": launch.warps,
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": kernel.metadata.shared,
    }


def main() -> None:
    """Prints the table, or writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--default", action="store_true", help="each kernel × dtype × norm once")
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--json", type=Path, help="where to write the table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    work = [
        (launch, capability)
        for capability in arguments.capabilities
        for launch in (default() if arguments.default else caught(SHAPES))
    ]
    with ProcessPoolExecutor(arguments.jobs) as pool:
        rows = list(pool.map(compiled, work, chunksize=4))
    for row in rows:
        constants = " ".join(f"{key}={value}" for key, value in row["constants"].items())
        print(
            f"{row['kernel']:33} sm_{row['capability']:<4}{row['data']:5} {row['registers']:4} registers"
            f" {row['spilled_bytes']:5} B spilled {row['shared_bytes']:6} B shared  {row['warps']} warps  {constants}"
        )
    print(f"{len(rows)} kernels, {sum(row['spilled_bytes'] > 0 for row in rows)} of them spill")
    if arguments.json:
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        arguments.json.write_text(json.dumps(versions | {"kernels": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
