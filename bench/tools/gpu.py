"""Everything that wants a GPU, in one command: `python -m bench gpu`, from the root of a checkout.

Four phases, each with a deadline, all within nine minutes: `build` (fastsal._cuda in place, for this device), `test` (the GPU
tier, on each backend), `sanitize` (compute-sanitizer's four tools on a small run) and `bench` (the kernels beside what PyTorch
offers, with the read bandwidth measured in the same run). A table comes last.

The JSON is rewritten after every step of a phase and every case. What it holds of this machine and commit is not done again:
an interrupted run goes on where it was, and a step that failed is tried once more. `--fresh` forgets it.

It needs PyTorch, Triton, nvcc, pybind11, setuptools, pytest and hypothesis, and no network. `--dry-run` goes through the
motions on a CPU, with small shapes.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import RESULTS, ROOT

DEADLINES = {"build": 130, "test": 150, "sanitize": 110, "bench": 140}  # seconds
PYTHON_M = (sys.executable, "-m")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# For every backend.
SHARED_TESTS = tuple(f"tests/test_{name}.py" for name in ("tensor_level", "geometry", "pairwise", "determinism"))


class Report:
    """The results so far, on disk after every change; with what a file of this machine and commit holds already."""

    data: dict[str, Any]

    def __init__(self, path: Path, device: torch.device, fresh: bool = False) -> None:
        self.path = path
        self.data = {"machine": machine(device), "phases": {}, "cases": []}
        if path.exists() and not fresh:
            before = json.loads(path.read_text(encoding="utf-8"))
            if before["machine"] == self.data["machine"]:
                self.data = before
        self.save()

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")

    def step(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Does a step of a phase that has not succeeded yet, and keeps its result."""
        before = self.data["phases"].get(name, {})
        if before.get("code") == 0:
            print(f"[{name}] done already", flush=True)
            return
        result = self.data["phases"][name] = work()
        self.save()
        print(f"[{name}] " + ", ".join(f"{key} {value}" for key, value in result.items() if key != "tail"), flush=True)

    def has(self, row: dict[str, Any], what: str) -> bool:
        """Whether a case has been measured."""
        return any(row.items() <= case.items() and case["what"] == what and "failed" not in case for case in self.cases)

    @property
    def cases(self) -> list[dict[str, Any]]:
        return self.data["cases"]

    def case(self, row: dict[str, Any], what: str, **result: Any) -> None:
        """Keeps a case, in the place of one that failed before."""
        self.data["cases"] = [
            case for case in self.cases if not (row.items() <= case.items() and case["what"] == what)
        ] + [{**row, "what": what, **result}]
        self.save()


def output_of(*command: str) -> str:
    """What a command prints; its failure if it fails or is missing."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown ({type(error).__name__})"


def machine(device: torch.device) -> dict[str, Any]:
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


def run(command: list[str], deadline: float, folder: Path = ROOT, **environment: str) -> dict[str, Any]:
    """Runs a command in a folder until its deadline; seconds, exit code (124 past it) and the end of its output."""
    start = time.monotonic()
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    process = subprocess.Popen(
        command,
        cwd=folder,
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
    """In place, and out of sight of pyproject.toml, whose license a setuptools before 77 takes for an error."""
    environment = {"FASTSAL_CUDA": "auto"}
    if device.type == "cuda":
        environment = {
            "FASTSAL_CUDA": "1",
            "FASTSAL_CUDA_ARCHS": "".join(map(str, torch.cuda.get_device_capability(device))),
        }

    def built() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("setup.py", "csrc", "fastsal"):
                Path(folder, name).symlink_to(ROOT / name)
            # Without force a change of a .cu file alone leaves the module that is there.
            command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force", "--parallel", "2"]
            return run(command, deadline, Path(folder), **environment)

    report.step("build", built)


def test(report: Report, device: torch.device, deadline: float) -> None:
    """A step for each backend, CUDA first: Triton's kernels are compiled while its tests run.

    What has not begun after four fifths of a step's time is skipped (tests/gpu/on_gpu.py), and left to another run.
    """
    command = [*PYTHON_M, "pytest", "-q", "-rs", "--maxfail=20", "-p", "no:cacheprovider", "--durations=5", "tests/gpu"]
    if device.type == "cuda":
        command += [*SHARED_TESTS, "-p", "gpu.on_gpu"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(12, os.cpu_count() or 1))]

    def counted(backend: str, seconds: float) -> dict[str, Any]:
        wanted = backend if backend == "triton" else "cuda and not triton"  # triton-cuda is a test of Triton on a GPU
        result = run([*command, "-k", wanted], seconds, FASTSAL_TEST_SECONDS=str(0.8 * seconds))
        if result["code"] == 0 and "out of time" in result["tail"]:
            result["code"] = 1  # the next run finds Triton's kernels compiled and goes further
        counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", result["tail"])
        return {word: int(count) for count, word in counts} | result

    end = time.monotonic() + deadline
    report.step("test cuda", lambda: counted("cuda", 0.45 * deadline))
    report.step("test triton", lambda: counted("triton", end - time.monotonic()))


def sanitize(report: Report, device: torch.device, deadline: float) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if device.type != "cuda" or sanitizer is None:
        why = "no GPU" if device.type != "cuda" else "no compute-sanitizer on PATH"
        report.step("sanitize", lambda: {"refused": why})
        return

    def watched(tool: str, seconds: float) -> dict[str, Any]:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *PYTHON_M, "bench", "gpu", "--small-run"]
        result = run(command, seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        refusal = re.search(
            r"Device not supported|not supported on this device|Unable to find injection", result["tail"]
        )
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", result["tail"])
        return {"summary": summary[-1] if summary else "", "refused": refusal.group() if refusal else ""} | result

    end = time.monotonic() + deadline
    for index, tool in enumerate(SANITIZERS):
        share = (end - time.monotonic()) / (len(SANITIZERS) - index)
        report.step(tool, functools.partial(watched, tool, share))


def small_run(device: torch.device) -> None:
    """Every CUDA kernel once, on small shapes, odd ones too: what the sanitizer watches."""
    from fastsal.tensor import ops

    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for B, n, D in ((2, 10, 133), (2, 10, 160), (1, 20, 2500), (1, 4100, 24)):
            logits, jacobian, x = inputs(B, n, D, dtype, device)
            if n > 100:
                ops.margin_geometry(logits, jacobian, x, 2.0, "cuda" if device.type == "cuda" else "auto")
                continue
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


def inputs(B: int, n: int, D: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    logits = torch.randn(B, n, device=device, dtype=wide, generator=generator)
    jacobian = torch.empty(B, n, D, device=device, dtype=dtype).normal_(generator=generator)
    return logits, jacobian, torch.empty(B, D, device=device, dtype=dtype).normal_(generator=generator)


def bench(report: Report, device: torch.device, deadline: float) -> None:
    """bench/tools/gpu_speed.py, in a process of its own."""

    def measured() -> dict[str, Any]:
        command = [*PYTHON_M, "bench.tools.gpu_speed", "--json", str(report.path), "--device", str(device)]
        result = run([*command, "--seconds", str(0.9 * deadline)], deadline)
        report.data = json.loads(report.path.read_text(encoding="utf-8"))
        return result

    report.step("bench", measured)


def table(report: Report) -> None:
    """The short table that comes last."""
    for name, phase in report.data["phases"].items():
        facts = {key: value for key, value in phase.items() if key not in ("tail", "seconds") and value != ""}
        print(f"{name:11} {phase.get('seconds', 0):6} s  {facts}")
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


def main() -> int:
    """The command line of `python -m bench gpu`."""
    phases: dict[str, Callable[[Report, torch.device, float], None]] = {
        "build": build,
        "test": test,
        "sanitize": sanitize,
        "bench": bench,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=phases, help="this phase only (may be repeated)")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--json", type=Path, help="where to write (bench/results/gpu.json)")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--small-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is false; --dry-run goes through the motions on the CPU")
    device = torch.device("cpu" if options.dry_run else "cuda")
    if options.small_run:
        small_run(device)
        return 0
    default = (ROOT / "build" if options.dry_run else RESULTS) / "gpu.json"
    report = Report(options.json or default, device, options.fresh)
    for phase in options.only or phases:
        phases[phase](report, device, DEADLINES[phase])
    table(report)
    failed = [
        name for name, phase in report.data["phases"].items() if phase.get("code", 0) and not phase.get("refused")
    ]
    print(f"written to {report.path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0
