"""What the CUDA kernels should reach on an H200: from their registers and what their warps have on its way. Needs no GPU.

The figures of the chip are the vendor's, except those called assumed, which nobody has measured here. A measurement that
differs by much says which of them is wrong. docs/gpu.md shows the table.
"""

import argparse
import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.tools.gpu_speed import GEOMETRY
from fastsal.tensor.backends import cuda

GROUP_ROWS, STEP, SEGMENT = 4, 512, 4096  # rows of a task; bytes of a row that a warp loads at once, and in a task
COPY_BYTES, FEW_BLOCKS, MANY_CLASSES = 46 << 10, 264, 4096  # as in csrc/cuda/margin_geometry.cu
# Bytes of a slice of the two winning rows: of short rows, and of others with narrow entries or wider ones.
SHORT_ROW, SHORT_SLICE, SLICES = 16384, 1024, (2048, 4096)
# What is on its way at once: a warp's steps of a task, the candidates of a thread that looks for the nearest, and the segments'
# folds and slices' sums of a lane that joins them; and all of a slice.
FOLD_STEPS, CANDIDATES, SEGMENT_FOLDS, SLICE_SUMS = 2, 4, 4, 5
NAMES = {torch.float32: "float", torch.bfloat16: "fastsal::BFloat16"}


@dataclass(frozen=True)
class Chip:
    """An H200. Times in microseconds, bandwidths in bytes a microsecond."""

    processors: int = 132
    bandwidth: float = 4.8e6
    clock: float = 1755.0
    registers: int = 65536
    shared: int = 228 << 10
    warps: int = 64
    float64: int = 64  # results a cycle of a multiprocessor
    conversions: int = 16  # likewise, to float64; assumed
    reads: float = 0.93  # of the bandwidth, what a plain read reaches; assumed
    latency: float = 1.1  # of device memory under load; assumed
    cache: float = 0.35  # of the second level cache under load; assumed
    # The same where next to nothing else is on its way. One thread that follows pointers on a GH200 waits 0.35 and 0.14 at
    # 1980 MHz: github.com/RRZE-HPC/gpu-benches, gpu-latency/gh200.txt. Here twice that: a warp asks for more at once, other
    # warps ask too, and half of the cache is farther away.
    idle_latency: float = 0.7
    idle_cache: float = 0.28
    shared_step: float = 0.06  # one step of a task from shared memory; assumed
    reduction: float = 0.25  # the sums of a warp's lanes; assumed
    selection: float = 0.35  # the nearest of a block's candidates; assumed
    scalars: float = 0.9  # of an example, from its slices' sums; assumed
    turn: float = 0.3  # between a block and the next in its place; assumed
    launch: float = 1.0  # between a kernel and the next; assumed
    early_launch: float = 0.35  # likewise, where the next was launched before its turn and waits; assumed

    def resident(self, registers: int, warps: int, shared: int) -> int:
        """Blocks of a multiprocessor."""
        by_registers = self.registers // (-(-registers // 8) * 8 * 32 * warps)
        return min(by_registers, self.shared // (shared + 1024), self.warps // warps, 32)


CHIP = Chip()
LOADED = replace(CHIP, idle_latency=CHIP.latency, idle_cache=CHIP.cache)  # as if the memory were never idle
WANTED = CHIP.bandwidth * CHIP.latency / CHIP.processors  # bytes on their way in a multiprocessor: Little's law


@dataclass(frozen=True)
class Prediction:
    """Of one problem. Bytes are of a multiprocessor, on average."""

    form: str
    blocks: int
    warps: int
    in_flight: float
    launches: int
    float64: float  # microseconds that these units take, beside the reading
    time: float  # microseconds
    fraction: float  # of a plain read's bandwidth


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def usage() -> dict[str, int]:
    """Registers of each kernel for q = 2 on sm_90, as fastsal._cuda was built."""
    triton = importlib.util.find_spec("triton")
    wheel = Path(str(triton.origin)).parent / "backends/nvidia/bin" if triton else Path()
    tool = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(wheel))
    module = importlib.util.find_spec("fastsal._cuda")
    if tool is None or module is None:
        raise SystemExit(f"gpu_model: needs {'cuobjdump' if tool is None else 'fastsal._cuda'}, which is not here")
    command = [tool, "-res-usage", "-arch", "sm_90", str(module.origin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (?:void )?fastsal::\(anonymous namespace\)::(\w+<2, .*>)\(.*\n\s*REG:(\d+)", names)
    return {name: int(registers) for name, registers in found}


def latencies(entries_bytes: int, unroll: int) -> int:
    """How often a warp waits for memory while it reads a part of a row."""
    return ceil_div(ceil_div(entries_bytes, STEP), unroll)


def margin_geometry(
    B: int, n: int, D: int, dtype: torch.dtype, registers: dict[str, int], c: Chip = CHIP
) -> Prediction:
    """A Jacobian [B, n, D] and x, rows aligned, q = 2, a direction gap that is not small."""
    size = dtype.itemsize
    row, need = D * size, B * (n + 1) * D * size
    segments = ceil_div(row, SEGMENT)
    tasks = ceil_div(n, GROUP_ROWS) * segments
    slice_bytes = SHORT_SLICE if row <= SHORT_ROW else SLICES[size >= 4]
    slices = ceil_div(row, slice_bytes)
    workspace = 112 + 104 * slices + 8 * n * (segments + 1)
    part = min(row, SEGMENT)
    best = need / (c.bandwidth * c.reads)
    # of the two winning rows and x: three conversions, a difference and six products an entry
    float64 = B * D * (3 / c.conversions + 7 / c.float64) / (c.processors * c.clock)

    def nearest(warps: int, first_wait: float, cache: float = c.cache) -> float:
        """In which a block finds the nearest of n candidates, whose first loads take `first_wait`."""
        return first_wait + (ceil_div(n, CANDIDATES * 32 * warps) - 1) * cache + c.selection

    def fused(form: str, copied: bool) -> Prediction:
        most = (4 if tasks > 8 else 2) if copied else 8
        warps = ceil_div(tasks, ceil_div(tasks, most))
        shared = 1536 + workspace + (row * (n + 1) if copied else 0)
        name = f"margin_geometry_fused_kernel<2, {NAMES[dtype]}, {'true' if copied else 'false'}>"
        resident = min(c.resident(registers[name], warps, shared), max(1, ceil_div(B, c.processors)))
        rounds = ceil_div(tasks, warps)
        predict = nearest(warps, c.latency)
        winners = ceil_div(slices, warps) * latencies(slice_bytes, 2) * (c.cache if not copied else 0) + c.reduction
        if copied:
            reading, fold = c.latency, rounds * (ceil_div(part, STEP) * c.shared_step + c.reduction)
        else:
            reading = rounds * latencies(part, FOLD_STEPS) * c.latency
            fold = reading + rounds * c.reduction
            winners += c.latency - c.cache  # for x
        rest = 2 * c.reduction + c.selection + winners + c.scalars
        turn = c.turn + predict + fold + rest
        bytes_of_block = (n + 1) * row
        of_fold = warps * GROUP_ROWS * STEP * FOLD_STEPS
        moving = (bytes_of_block if copied else of_fold) * reading / turn
        waves = B / (resident * c.processors)
        time = max(best, float64, max(waves, 1) * turn) + c.launch + (turn / 2 if waves > 1 else 0)
        return Prediction(form, B, resident * warps, resident * moving, 1, float64, time, best / time)

    fits = workspace <= 40 << 10
    if fits and (tasks <= cuda._FUSED_TASKS or B >= cuda._FUSED_BLOCKS * c.processors):
        copied = workspace + row * (n + 1) <= COPY_BYTES
        return fused("a block an example, copied" if copied else "a block an example", copied)

    warps = min(8, max(1, ceil_div(B * tasks, FEW_BLOCKS)))
    rounds = min(4, max(1, B * tasks // (8 * FEW_BLOCKS * 8)))
    blocks = B * ceil_div(tasks, warps * rounds)
    kernel = registers[f"margin_geometry_fold_kernel<2, {NAMES[dtype]}>"]
    resident = min(c.resident(kernel, warps, 768), ceil_div(blocks, c.processors))
    # Half of a warp's first task is asked for before it predicts: the memory is busy with that in the meantime. The logits are
    # in the cache, but for the first blocks.
    half = part // 2
    of_half = resident * warps * GROUP_ROWS * half * c.processors / (c.bandwidth * c.reads)
    start = c.turn + c.idle_latency + max(0, nearest(warps, c.latency) - of_half)
    predict = nearest(warps, c.cache)
    # The first half then has been on its way for as long. The other half is asked for when the first is waited for.
    waits = latencies(half, FOLD_STEPS)
    first_half = max(c.latency - predict, c.cache) + (waits - 1) * c.cache
    other_half = max(c.latency - first_half, c.cache) + (waits - 1) * c.cache
    reading = first_half + other_half + (rounds - 1) * latencies(part, FOLD_STEPS) * c.latency
    turn = c.turn + predict + reading + rounds * c.reduction
    # By Little's law, if the memory kept up: what is read in a turn, each byte of it on its way for the latency.
    moving = resident * warps * rounds * GROUP_ROWS * part * c.latency / turn
    # In the end fewer and fewer blocks read: half of the last turn is lost, from where they are too few for the bandwidth.
    end = turn / 2 * min(1, WANTED / moving)
    fold = start + max(best, float64, blocks / (resident * c.processors) * turn, turn) + end
    # The memory is idle from here on.
    join = ceil_div(segments, SEGMENT_FOLDS * 32) * c.idle_cache + 2 * c.reduction
    select = nearest(8, c.idle_cache, c.idle_cache)
    two_rows = select + c.idle_latency + c.reduction
    last = (1 + ceil_div(slices, SLICE_SUMS * 32)) * c.idle_cache + c.scalars
    launches = 4 + (n >= MANY_CLASSES)
    time = fold + join + two_rows + last + c.launch + (launches - 1) * c.early_launch
    return Prediction("spread", blocks, resident * warps, moving, launches, float64, time, best / time)


def pairwise_margins(n: int, D: int, registers: dict[str, int]) -> tuple[float, float]:
    """Microseconds for all pairs of one example without x, and the fraction of the float32 units' time in them."""
    c, edge, side, depth, additions = CHIP, 4, 16, 32, 32
    rows = edge * side
    tiles = ceil_div(n, rows)
    pairs = tiles * (tiles + 1) // 2
    useful = n * (n - 1) / 2 * D * 2 / (128 * c.processors * c.clock)
    arithmetic = edge * edge * depth * 2
    flushes, loads, other = edge * edge * 7 * depth // additions, 2 * edge * depth // 4, 60
    barriers = 150  # cycles of a tile in which nothing is summed; assumed
    warps = (
        side
        * side
        // 32
        * min(
            1,
            c.resident(
                registers["pairwise_margins_tile_kernel<2, float, fastsal::(anonymous namespace)::Tile<4, 16, 32> >"],
                8,
                19456,
            ),
        )
    )
    cycles = (arithmetic + flushes + loads + other) * warps / 4 + barriers
    time = pairs * ceil_div(D, depth) * cycles / (c.processors * c.clock)
    return time, useful / time


def main() -> int:
    """Prints the tables as Markdown."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    registers = usage()
    print(f"Wanted on its way: {WANTED / 1024:.0f} KiB a multiprocessor.\n")
    print("| shape | dtype | form | blocks | warps | on its way, KiB | launches | float64, µs | time, µs | fraction |")
    print("| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    loaded = []
    for shape in GEOMETRY:
        for dtype in NAMES:
            p = margin_geometry(*shape, dtype, registers)
            loaded.append(margin_geometry(*shape, dtype, registers, LOADED).fraction)
            print(
                f"| {shape} | {str(dtype)[6:]} | {p.form} | {p.blocks} | {p.warps} | {p.in_flight / 1024:.0f} | {p.launches} "
                f"| {p.float64:.0f} | {p.time:.0f} | {p.fraction:.2f} |"
            )
    print(f"\nWith latencies under load throughout: {', '.join(f'{fraction:.2f}' for fraction in loaded)}.")
    time, fraction = pairwise_margins(1000, 150_528, registers)
    print(f"\nAll pairs of (1, 1000, 150528), float32: {time / 1e3:.1f} ms, {fraction:.2f} of the float32 units' time.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
