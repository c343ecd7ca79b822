"""Everything that wants a GPU, in one command: `python -m bench.gpu`, from the root of a checkout.

Four phases, each with a deadline, all within nine minutes: `build` (fastsal._cuda in place, for this device), `test` (the GPU
tier), `sanitize` (compute-sanitizer's four tools on a small run) and `bench` (the kernels beside what PyTorch offers, with the
read bandwidth measured in the same run). The JSON is rewritten after every phase and every case; a table comes last.

It needs PyTorch, Triton, nvcc, pybind11, setuptools, pytest and hypothesis, and no network. `--dry-run` goes through the
motions on a CPU, with small shapes.
"""

import argparse
import functools
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
DEADLINES = {"build": 130, "test": 150, "sanitize": 110, "bench": 140}  # seconds
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
GEOMETRY = [(8, 1000, 150_528), (4, 1000, 150_528), (1, 10, 150_528), (100_000, 10, 784), (4096, 100, 3072)]
PAIRWISE = [(64, 100, 3072), (1, 1000, 150_528)]


class Report:
    """The results so far, on disk after every change."""

    data: dict[str, Any]

    def __init__(self, path: Path, device: torch.device, resume: bool = False) -> None:
        self.path = path
        if resume:
            self.data = json.loads(path.read_text(encoding="utf-8"))
            return
        self.data = {"machine": machine(device), "phases": {}, "cases": []}
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")

    def phase(self, name: str, **result: Any) -> None:
        self.data["phases"][name] = result
        self.save()
        print(f"[{name}] " + ", ".join(f"{key} {value}" for key, value in result.items() if key != "tail"), flush=True)

    def case(self, **row: Any) -> None:
        self.data["cases"].append(row)
        self.save()


def output_of(*command: str) -> str:
    """What a command prints; its failure if it fails or is missing."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def machine(device: torch.device) -> dict[str, Any]:
    import importlib.metadata

    facts = {
        "torch": torch.__version__,
        "commit": output_of("git", "rev-parse", "HEAD"),
        "python": sys.version.split()[0],
    }
    try:
        facts["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        facts["triton"] = "missing"
    if device.type != "cuda":
        return {"device": device.type, **facts}
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", 0),
        "memory_bytes": properties.total_memory,
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": output_of("nvcc", "--version").splitlines()[-1],
        **facts,
    }


# --- build, test, sanitize ------------------------------------------------------------------------------------------


def run(command: list[str], deadline: float, **environment: str) -> dict[str, Any]:
    """Runs a command in the checkout until its deadline; seconds, exit code (124 past it) and the end of its output."""
    start = time.monotonic()
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, code = process.communicate(timeout=max(deadline, 1))[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, code = process.communicate()[0], 124
    return {"code": code, "seconds": round(time.monotonic() - start, 1), "tail": output[-6000:]}


def build(report: Report, device: torch.device, deadline: float) -> None:
    environment = {"FASTSAL_CUDA": "auto"}
    if device.type == "cuda":
        environment = {
            "FASTSAL_CUDA": "1",
            "FASTSAL_CUDA_ARCHS": "".join(map(str, torch.cuda.get_device_capability(device))),
        }
    report.phase("build", **run([sys.executable, "setup.py", "build_ext", "--inplace"], deadline, **environment))


def test(report: Report, device: torch.device, deadline: float) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider", "--durations=5"]
    files = ["tests/gpu", "tests/test_geometry.py", "tests/test_pairwise.py", "tests/test_determinism.py"]
    if device.type == "cuda":
        command += ["-p", "gpu.on_gpu"]
    else:
        files = ["tests/gpu"]
    result = run([*command, *files], deadline)
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", result["tail"])
    }
    report.phase("test", **counts, **result)


def sanitize(report: Report, device: torch.device, deadline: float) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if device.type != "cuda" or sanitizer is None:
        report.phase("sanitize", refused="no GPU" if device.type != "cuda" else "no compute-sanitizer on PATH")
        return
    end = time.monotonic() + deadline
    for index, tool in enumerate(SANITIZERS):
        share = (end - time.monotonic()) / (len(SANITIZERS) - index)
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "bench.gpu", "--small-run"]
        result = run(command, share, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        refusal = re.search(
            r"Device not supported|not supported on this device|Unable to find injection", result["tail"]
        )
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", result["tail"])
        report.phase(tool, summary=summary[-1] if summary else "", refused=refusal.group() if refusal else "", **result)


def small_run(device: torch.device) -> None:
    """Every CUDA kernel once, on small odd shapes: what the sanitizer watches."""
    from fastsal import ops

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for B, n, D in ((2, 10, 133), (1, 20, 2500)):
            logits, jacobian, x = inputs(B, n, D, dtype, device)
            w = torch.ones(B, n, n, dtype=torch.float64, device=device)
            for norm in (2.0, math.inf, 1.0):
                backend = "cuda" if device.type == "cuda" else "auto"
                ops.row_distances(jacobian[:, 0], jacobian, norm, backend)
                ops.margin_geometry(logits, jacobian, x, norm, backend)
                ops.pairwise_margins(logits, jacobian, x, norm, backend)
                ops.pairwise_backward(w, w.triu() - w.tril(), jacobian, x, norm, backend)
    if device.type == "cuda":
        torch.cuda.synchronize()
    print("small run done")


# --- bench ----------------------------------------------------------------------------------------------------------


def inputs(B: int, n: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(B, n, device=device, dtype=wide, generator=generator)
    jacobian = torch.empty(B, n, D, device=device, dtype=dtype).normal_(generator=generator)
    return logits, jacobian, torch.empty(B, D, device=device, dtype=dtype).normal_(generator=generator)


class Clock:
    """Times of a function with a cold L2: CUDA events around it, after a write of twice the cache."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = 2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20) if self.on_gpu else 1
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def once(self, function: Callable[[], Any]) -> float:
        """Seconds."""
        if not self.on_gpu:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        self._flush.zero_()
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


def eager(logits: Tensor, jacobian: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """margin_geometry as one would write it, norm 2, in the Jacobian's precision; without any of the care."""
    B = torch.arange(len(logits), device=logits.device)
    i = logits.argmax(1)
    g = jacobian[B, i]
    margin = logits[B, i].unsqueeze(1) - logits
    ratio = margin / torch.linalg.vector_norm(g.unsqueeze(1) - jacobian, dim=2)
    ratio[B, i] = math.inf
    j = ratio.argmin(1)
    d = g - jacobian[B, j]
    g_norm, d_norm = torch.linalg.vector_norm(g, dim=1), torch.linalg.vector_norm(d, dim=1)
    dot_g, dot_d = (x * g).sum(1), (x * d).sum(1)
    beta, beta_d = logits[B, i] - dot_g, margin[B, j] - dot_d
    gap = torch.linalg.vector_norm(d / d_norm.unsqueeze(1) - g / g_norm.unsqueeze(1), dim=1)
    alignment = dot_g.abs() / g_norm
    bound = alignment + torch.linalg.vector_norm(x, dim=1) * gap + beta_d.abs() / d_norm
    homogeneity = dot_g.abs() / (dot_g.abs() + beta.abs()), dot_d.abs() / (dot_d.abs() + beta_d.abs())
    return (
        ratio[B, j],
        alignment,
        margin[B, j],
        dot_d.abs() / d_norm,
        beta,
        beta_d,
        gap,
        bound,
        *homogeneity,
        i,
        j,
        ratio,
    )


def cdist_rows(logits: Tensor, jacobian: Tensor, x: Tensor) -> Tensor:
    """The distances alone: what torch.cdist can give."""
    g = jacobian[torch.arange(len(logits), device=logits.device), logits.argmax(1)]
    return torch.cdist(g.unsqueeze(1), jacobian, compute_mode="donot_use_mm_for_euclid_dist")


def rivals() -> dict[str, Callable[..., Any]]:
    """What a geometry case is compared with, cheapest to prepare first."""
    return {
        "eager": eager,
        "cdist": cdist_rows,
        "compile": torch.compile(eager, dynamic=False),
        "max-autotune": torch.compile(eager, dynamic=False, mode="max-autotune-no-cudagraphs"),
    }


def measure(
    report: Report, name: str, row: dict[str, Any], timed: Callable[[], dict[str, float]], **more: Any
) -> float:
    """Adds a case; a failure for want of memory or support is a result too. Returns the median in seconds, or NaN."""
    try:
        times = timed()
    except (RuntimeError, NotImplementedError) as error:
        report.case(**row, what=name, failed=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}", **more)
        return math.nan
    seconds = times["p50"] / 1e6
    if "bytes" in more:
        more["bandwidth_fraction"] = more["bytes"] / seconds / report.data["bandwidth"]["best"]
    report.case(**row, what=name, times_us=times, **more)
    print(f"  {row} {name}: {times['p50']:.1f} us {more.get('bandwidth_fraction', '')}", flush=True)
    return seconds


def geometry_case(
    report: Report,
    clock: Clock,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    backends: list[str],
    rival: str | None,
) -> None:
    """One shape on every backend, or on one rival."""
    import fastsal

    B, n, D = shape
    need = B * (n + 1) * D * dtype.itemsize
    row = {"op": "margin_geometry", "shape": [B, n, D], "dtype": str(dtype)}
    if clock.on_gpu and need > 0.9 * torch.cuda.mem_get_info()[0]:
        report.case(**row, what=rival or "inputs", failed="too little memory")
        return
    tensors = inputs(B, n, D, dtype, clock.device)
    if rival:
        function = rivals()[rival]
        measure(report, rival, row, lambda: clock.times(lambda: function(*tensors)), bytes=need)
        torch.compiler.reset()
        return
    for backend in backends:
        call = functools.partial(fastsal.margin_geometry, *tensors, backend=backend)
        measure(report, backend, row, functools.partial(clock.times, call), bytes=need)
        measure(report, f"{backend} graph", row, functools.partial(clock.graph_times, call), bytes=need)


def bench_geometry(
    report: Report, clock: Clock, backends: list[str], shrink: int, rival: str | None, end: float
) -> None:
    """Every shape and dtype until `end`; rivals that are compiled for each shape get float32 only."""
    for B, n, D in GEOMETRY:
        for dtype in (torch.float32, torch.bfloat16)[: 1 if rival in ("compile", "max-autotune") else 2]:
            if time.monotonic() < end:
                shape = (max(1, B // shrink), n, max(1, D // shrink))
                geometry_case(report, clock, shape, dtype, backends, rival)


def near_rows_error(function: Callable[[Tensor], Tensor], device: torch.device) -> float:
    """The largest relative error of the distances of rows that differ by one part in 10⁴, against float64."""
    generator = torch.Generator(device).manual_seed(1)
    base, noise = (torch.randn(1, count, 3072, device=device, generator=generator) for count in (1, 32))
    rows = base + 1e-4 * noise
    truth = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    off_diagonal = ~torch.eye(32, dtype=torch.bool, device=device)
    return float(((function(rows).double() - truth).abs() / truth)[0][off_diagonal].max())


def bench_pairwise(report: Report, clock: Clock, backends: list[str], shrink: int, end: float) -> None:
    import fastsal

    for shape in PAIRWISE:
        B, n, D = (max(1, shape[0] // shrink), max(2, shape[1] // shrink), max(1, shape[2] // shrink))
        logits, jacobian, x = inputs(B, n, D, torch.float32, clock.device)
        row = {"op": "pairwise_margins", "shape": [B, n, D], "dtype": "torch.float32"}
        candidates: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor]]] = {}
        for backend in backends:
            for with_x in (False, True):

                def call(j: Tensor, scores: Tensor, point: Tensor | None, backend: str = backend) -> Any:
                    return fastsal.pairwise_margins(scores, j, point, backend=backend)

                candidates[f"{backend}{' with x' if with_x else ''}"] = (
                    lambda call=call, point=x if with_x else None: call(jacobian, logits, point),  # noqa: B023
                    lambda rows, call=call: call(rows, rows[..., 0].contiguous(), None).distance,
                )
        for mode in ("use_mm_for_euclid_dist", "donot_use_mm_for_euclid_dist"):
            candidates[f"cdist {mode.removesuffix('_for_euclid_dist')}"] = (
                lambda mode=mode: torch.cdist(jacobian, jacobian, compute_mode=mode),  # noqa: B023
                lambda rows, mode=mode: torch.cdist(rows, rows, compute_mode=mode),
            )
        for name, (timed, distances) in candidates.items():
            if time.monotonic() > end:
                return
            error = near_rows_error(distances, clock.device)
            measure(report, name, row, lambda: clock.times(timed), error_on_near_rows=error)  # noqa: B023


def bench(report: Report, device: torch.device, deadline: float) -> None:
    """In a process of its own, which is killed at the deadline: a compilation may take long, and what it wrote stays."""
    command = [sys.executable, "-m", "bench.gpu", "--bench-worker", "--json", str(report.path)]
    result = run(command + (["--dry-run"] if device.type == "cpu" else []), deadline)
    report.data = json.loads(report.path.read_text(encoding="utf-8"))
    report.phase("bench", **result)


def bench_worker(report: Report, device: torch.device, seconds: float) -> None:
    from fastsal import ops

    start = time.monotonic()
    clock = Clock(device)
    names = ("cuda", "triton") if clock.on_gpu else ("cpu", "reference")
    backends = [name for name in names if not ops.BACKENDS[name].unavailable()]
    shrink = 1 if clock.on_gpu else 64
    report.data["bandwidth"] = read_bandwidth(clock, (4 << 30) // shrink**2)
    tiny = torch.empty(1, device=device)
    report.data["launch_floor_us"] = clock.times(tiny.zero_)["p50"]
    report.data["launch_floor_graph_us"] = clock.graph_times(tiny.zero_)["p50"]
    report.save()
    for rival in (None, "eager", "cdist"):
        bench_geometry(report, clock, backends, shrink, rival, start + 0.5 * seconds)
    bench_pairwise(report, clock, backends, shrink, start + 0.7 * seconds)
    for rival in ("compile", "max-autotune"):
        bench_geometry(report, clock, backends, shrink, rival, start + seconds)


# --- the command ----------------------------------------------------------------------------------------------------


def table(report: Report) -> None:
    """The short table that comes last."""
    for name, phase in report.data["phases"].items():
        facts = {key: value for key, value in phase.items() if key not in ("tail", "seconds") and value != ""}
        print(f"{name:10} {phase.get('seconds', 0):6} s  {facts}")
    if "bandwidth" in report.data:
        print(f"read bandwidth {report.data['bandwidth']['best'] / 1e9:.0f} GB/s", end=", ")
        print(
            f"launch floor {report.data['launch_floor_us']:.1f} us, in a graph {report.data['launch_floor_graph_us']:.1f}"
        )
    for row in report.data["cases"]:
        result = row.get("failed") or f"{row['times_us']['p50']:12.1f} us"
        fraction = f"{row['bandwidth_fraction']:6.2f} of bandwidth" if "bandwidth_fraction" in row else ""
        error = f"  error {row['error_on_near_rows']:.1e}" if "error_on_near_rows" in row else ""
        print(f"{row['op']:16} {row['shape']!s:20} {row['dtype'][6:]:9} {row['what']:18} {result} {fraction}{error}")


def main(arguments: list[str] | None = None) -> int:
    phases: dict[str, Callable[[Report, torch.device, float], None]] = {
        "build": build,
        "test": test,
        "sanitize": sanitize,
        "bench": bench,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=phases, help="this phase only (may be repeated)")
    parser.add_argument("--json", type=Path, help="where to write (bench/results/<device>.json)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--small-run", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--bench-worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is false; --dry-run goes through the motions on the CPU")
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.small_run:
        small_run(device)
        return 0
    if options.bench_worker:
        bench_worker(Report(options.json, device, resume=True), device, 0.9 * DEADLINES["bench"])
        return 0
    facts = machine(device)
    name = re.sub(r"\W+", "-", facts["device"].lower()).strip("-")
    default = ROOT / ("build" if options.dry_run else "bench/results") / f"{name}.json"
    report = Report(options.json or default, device)
    for phase in options.only or phases:
        phases[phase](report, device, DEADLINES[phase])
    table(report)
    failed = [
        name for name, phase in report.data["phases"].items() if phase.get("code", 0) and not phase.get("refused")
    ]
    print(f"written to {report.path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
