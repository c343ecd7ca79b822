"""The kernels on a GPU beside what PyTorch offers, with the read bandwidth of the same run: `python -m bench gpu` starts this.

It runs in a process of its own, which is killed at its deadline: a compilation may take long, and what was written stays.
"""

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsal
from bench.baselines import formulas
from bench.tools.gpu import Report, inputs
from fastsal.tensor import ops

GEOMETRY = [(65_536, 10, 784), (1700, 100, 3072), (13, 1000, 37_632), (1, 1000, 150_528), (8, 10, 784)]
PAIRWISE = [(64, 100, 3072), (1, 1000, 150_528)]

Distances = Callable[[Tensor, Tensor], Tensor]  # from logits [B, n] and jacobian [B, n, D]


class Clock:
    """Times of a function with a cold L2: CUDA events around it, after a read of twice the cache.

    A write would leave the cache full of what the function must write back before it has room: up to 50 MB on an H200, beside
    the 301 MB that (1, 1000, 150528) reads in bfloat16.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20) if self.on_gpu else 1
        self._flush = torch.zeros(size // 4, device=device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def once(self, function: Callable[[], Any]) -> float:
        """Seconds."""
        if not self.on_gpu:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        self._flush.amax()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def times(self, function: Callable[[], Any], seconds: float = 0.4) -> dict[str, float]:
        """Percentiles in microseconds of as many runs as fit, at least 5."""
        warm = max(self.once(function) for _ in range(3))
        count = min(100, max(5, int(seconds / max(warm, 1e-6))))
        samples = sorted(1e6 * self.once(function) for _ in range(count))
        cuts = statistics.quantiles(samples, n=10)
        return {"p20": cuts[1], "p50": statistics.median(samples), "p80": cuts[7], "runs": count}

    def graph_times(self, function: Callable[[], Any]) -> dict[str, float]:
        """The same of a CUDA graph's replay, without the launch gaps of Python."""
        if not self.on_gpu:
            return self.times(function)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return self.times(graph.replay)


def read_bandwidth(clock: Clock, size: int) -> dict[str, float]:
    """Bytes per second of the fastest read of device memory found: torch's reductions and a copy (read and write)."""
    data = torch.randn(size // 4, device=clock.device)
    target = torch.empty_like(data)
    reads = {"sum": (lambda: data.sum(), 1), "amax": (lambda: data.amax(), 1), "copy": (lambda: target.copy_(data), 2)}
    found = {name: passes * size / (clock.times(function)["p50"] / 1e6) for name, (function, passes) in reads.items()}
    return {**found, "best": max(found.values())}


RIVALS: dict[str, Callable[..., Any]] = {  # cheapest to prepare first
    "eager": formulas.eager,
    "cdist": formulas.cdist_direct,
    "compile": torch.compile(formulas.eager, dynamic=False),
    "max-autotune": torch.compile(formulas.eager, dynamic=False, mode="max-autotune-no-cudagraphs"),
}


def measure(report: Report, name: str, row: dict[str, Any], timed: Callable[[], dict[str, float]], **more: Any) -> None:
    """Adds a case that is not there yet; a failure for want of memory or support is a result too."""
    if report.has(row, name):
        return
    try:
        times = timed()
    except (RuntimeError, NotImplementedError) as error:
        report.case(row, name, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", **more)
        return
    if "bytes" in more:
        more["bandwidth_fraction"] = more["bytes"] / times["p50"] * 1e6 / report.data["bandwidth"]["best"]
    report.case(row, name, times_us=times, **more)
    print(f"  {row} {name}: {times['p50']:.1f} us {more.get('bandwidth_fraction', '')}", flush=True)


def in_turn(timed: Callable[[], dict[str, float]]) -> dict[str, float]:
    """The same with every CUDA kernel launched when the one before it has ended."""
    before = os.environ.get("FASTSAL_DEPENDENT_LAUNCH", "1")
    os.environ["FASTSAL_DEPENDENT_LAUNCH"] = "0"
    try:
        return timed()
    finally:
        os.environ["FASTSAL_DEPENDENT_LAUNCH"] = before


class Bench:
    """The cases of a run: every shape, on the backends that are there and on their rivals, until a moment that is given."""

    def __init__(self, report: Report, clock: Clock) -> None:
        self.report, self.clock = report, clock
        names = ("cuda", "triton") if clock.on_gpu else ("cpu", "reference")
        self.backends = [name for name in names if not ops.BACKENDS[name].unavailable()]
        self.shrink = 1 if clock.on_gpu else 64
        self.unfinished = False

    def in_time(self, end: float) -> bool:
        """Whether the moment has not come yet; a case that it leaves out is for the next run."""
        self.unfinished |= time.monotonic() >= end
        return time.monotonic() < end

    def floors(self) -> None:
        """What no kernel can beat: the read bandwidth and the time of a launch, measured anew in every run."""
        data, tiny = self.report.data, torch.empty(1, device=self.clock.device)
        data["bandwidth"] = read_bandwidth(self.clock, (4 << 30) // self.shrink**2)
        data["launch_floor_us"] = self.clock.times(tiny.zero_)["p50"]
        data["launch_floor_graph_us"] = self.clock.graph_times(tiny.zero_)["p50"]
        self.report.save()

    def geometry(self, rival: str | None, end: float) -> None:
        """margin_geometry on every shape and dtype; rivals that are compiled for each shape get float32 only."""
        for B, n, D in GEOMETRY:
            for dtype in (torch.float32, torch.bfloat16)[: 1 if rival in ("compile", "max-autotune") else 2]:
                if self.in_time(end):
                    self._geometry((max(1, B // self.shrink), n, max(1, D // self.shrink)), dtype, rival)

    def _geometry(self, shape: tuple[int, int, int], dtype: torch.dtype, rival: str | None) -> None:
        """One shape on every backend, or on one rival."""
        B, n, D = shape
        need = B * (n + 1) * D * dtype.itemsize
        row = {"op": "margin_geometry", "shape": [B, n, D], "dtype": str(dtype)}
        if self.clock.on_gpu and need > 0.9 * torch.cuda.mem_get_info()[0]:
            self.report.case(row, rival or "inputs", failed="too little memory")
            return
        wanted = [rival] if rival else [name for backend in self.backends for name in (backend, f"{backend} graph")]
        if "cuda" in self.backends and not rival:
            wanted.append("cuda graph in turn")
        if all(self.report.has(row, name) for name in wanted):
            return
        tensors = inputs(B, n, D, dtype, self.clock.device)
        if rival:
            call = functools.partial(RIVALS[rival], *tensors)
            measure(self.report, rival, row, functools.partial(self.clock.times, call), bytes=need)
            torch.compiler.reset()
            return
        for backend in self.backends:
            call = functools.partial(fastsal.margin_geometry, *tensors, backend=backend)
            measure(self.report, backend, row, functools.partial(self.clock.times, call), bytes=need)
            graph = functools.partial(self.clock.graph_times, call)
            measure(self.report, f"{backend} graph", row, graph, bytes=need)
            if backend == "cuda":
                measure(self.report, "cuda graph in turn", row, functools.partial(in_turn, graph), bytes=need)

    def pairwise(self, end: float) -> None:
        """pairwise_margins on every shape, with the error on rows that are nearly identical."""
        for shape in PAIRWISE:
            B, n, D = (max(least, size // self.shrink) for least, size in zip((1, 2, 1), shape, strict=True))
            logits, jacobian, x = inputs(B, n, D, torch.float32, self.clock.device)
            row = {"op": "pairwise_margins", "shape": [B, n, D], "dtype": "torch.float32"}
            contestants: dict[str, tuple[Distances, Distances]] = {}  # what is timed, and what its error is taken of
            for backend in self.backends:
                alone = functools.partial(ours, backend, None)
                contestants[backend] = alone, alone
                contestants[f"{backend} with x"] = functools.partial(ours, backend, x), alone
            for name, mode in formulas.CDIST_MODES.items():
                contestants[f"cdist, {name}"] = (functools.partial(cdist, mode),) * 2
            for name, (distances, alone) in contestants.items():
                if not self.in_time(end):
                    return
                if self.report.has(row, name):
                    continue
                timed = functools.partial(self.clock.times, functools.partial(distances, logits, jacobian))
                error = near_rows_error(alone, self.clock.device)
                measure(self.report, name, row, timed, error_on_near_rows=error)


def ours(backend: str, x: Tensor | None, logits: Tensor, jacobian: Tensor) -> Tensor:
    """The distances of all pairs of rows [B, n, n]."""
    return fastsal.pairwise_margins(logits, jacobian, x, backend=backend).distance


def cdist(mode: str, logits: Tensor, jacobian: Tensor) -> Tensor:
    """The same by torch.cdist, which needs no logits."""
    return torch.cdist(jacobian, jacobian, compute_mode=mode)


def near_rows_error(distances: Distances, device: torch.device) -> float:
    """The largest relative error of the distances of rows that differ by one part in 10⁴, against float64."""
    generator = torch.Generator(device).manual_seed(1)
    base, noise = (torch.randn(1, count, 3072, device=device, generator=generator) for count in (1, 32))
    rows = base + 1e-4 * noise
    truth = cdist(formulas.CDIST_MODES["direct"], rows, rows.double())
    off_diagonal = ~torch.eye(32, dtype=torch.bool, device=device)
    found = distances(rows[..., 0].contiguous(), rows).double()
    return float(((found - truth).abs() / truth)[0][off_diagonal].max())


def main() -> int:
    """Goes on with the report in --json: backends first, then what is dearer to prepare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True, help="the report, which is there already")
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    options = parser.parse_args()
    start, seconds = time.monotonic(), options.seconds
    bench = Bench(Report(options.json, options.device), Clock(options.device))
    bench.floors()
    for rival in (None, "eager", "cdist"):
        bench.geometry(rival, start + 0.5 * seconds)
    bench.pairwise(start + 0.7 * seconds)
    for rival in ("compile", "max-autotune"):
        bench.geometry(rival, start + seconds)
    if bench.unfinished:
        print("some cases are left for another run")
    return int(bench.unfinished)


if __name__ == "__main__":
    sys.exit(main())
