"""Everything that wants a GPU, in one command: `python -m bench gpu`, from the root of a checkout.

Four phases, within eight minutes: `build` (fastsal._cuda in place, for this device), `test` (the GPU tier, on each backend),
`sanitize` (compute-sanitizer's four tools on a small run) and `bench` (the cases of `python -m bench --device cuda`, whose
tables are printed last). Each has a share of the time, and what the phases before left of theirs; at its end it is killed, and
the next one begins.

What succeeded on this machine at this commit, with nothing changed since, is not done again: a run that was interrupted or
killed resumes, and a step that failed is tried once more. Outcomes are in build/gpu.json, figures in bench/results/gpu.json.

It needs PyTorch, Triton, nvcc, pybind11, setuptools, pytest and hypothesis, and no network. `--dry-run` goes through the
motions on a CPU, with small shapes.
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench import RESULTS, ROOT, cases
from bench.harness.store import Record, Store
from bench.report.tables import everything

SHARES = {"build": 100, "test": 120, "sanitize": 90, "bench": 145}  # seconds; the other 25 are for what is around them
PYTHON_M = (sys.executable, "-m")
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
# For every backend.
SHARED_TESTS = (
    *(f"tests/tensor/test_{name}.py" for name in ("tensor_level", "geometry", "pairwise")),
    "tests/test_determinism.py",
)


def step(store: Store, name: str, work: Callable[[], Record]) -> None:
    """Does a step of a phase, unless it succeeded before, and prints what came of it."""
    result = store.keep(name, work)
    facts = {key: value for key, value in result.items() if key not in ("tail", "commit", "date") and value != ""}
    print(f"[{name}] " + ", ".join(f"{key} {value}" for key, value in facts.items()), flush=True)


def run(command: list[str], deadline: float, folder: Path = ROOT, **environment: str) -> Record:
    """Runs a command in a folder until its deadline; seconds, exit code (124 past it) and the end of its output.

    The output goes to a file: a pipe would be waited for while any descendant holds it.
    """
    start = time.monotonic()
    paths = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONPATH": paths, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(deadline, 1))
        except subprocess.TimeoutExpired:
            code = 124
        with contextlib.suppress(ProcessLookupError):  # descendants too, which may have outlived the command
            os.killpg(process.pid, signal.SIGKILL)
        output.seek(0)
        tail = output.read().decode(errors="replace")[-6000:]
    return {"code": code, "seconds": round(time.monotonic() - start, 1), "tail": tail}


def build(store: Store, device: str, deadline: float) -> None:
    """In place, and out of sight of pyproject.toml, whose license a setuptools before 77 takes for an error."""
    environment = {"FASTSAL_CUDA": "auto"}
    if device == "cuda":
        environment = {
            "FASTSAL_CUDA": "1",
            "FASTSAL_CUDA_ARCHS": "".join(map(str, torch.cuda.get_device_capability(device))),
        }

    def built() -> Record:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("setup.py", "csrc", "fastsal"):
                Path(folder, name).symlink_to(ROOT / name)
            # Without force a change of a .cu file alone leaves the module that is there.
            command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force", "--parallel", "2"]
            return run(command, deadline, Path(folder), **environment)

    step(store, "build", built)


def test(store: Store, device: str, deadline: float) -> None:
    """A step for each backend, CUDA first: Triton's kernels are compiled while its tests run.

    What has not begun after four fifths of a step's time is skipped (tests/gpu/on_gpu.py), and left to another run.
    """
    command = [*PYTHON_M, "pytest", "-q", "-rs", "--maxfail=20", "-p", "no:cacheprovider", "--durations=5", "tests/gpu"]
    if device == "cuda":
        command += [*SHARED_TESTS, "-p", "gpu.on_gpu"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(12, os.cpu_count() or 1))]

    def counted(backend: str, seconds: float) -> Record:
        wanted = backend if backend == "triton" else "cuda and not triton"  # triton-cuda is a test of Triton on a GPU
        result = run([*command, "-k", wanted], seconds, FASTSAL_TEST_SECONDS=str(0.8 * seconds))
        if result["code"] == 0 and "out of time" in result["tail"]:
            result["code"] = 1  # the next run finds Triton's kernels compiled and goes further
        counts = re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", result["tail"])
        return {word: int(count) for count, word in counts} | result

    end = time.monotonic() + deadline
    step(store, "test cuda", lambda: counted("cuda", 0.45 * deadline))
    step(store, "test triton", lambda: counted("triton", end - time.monotonic()))


def sanitize(store: Store, device: str, deadline: float) -> None:
    sanitizer = shutil.which("compute-sanitizer")
    if device != "cuda" or sanitizer is None:
        why = "no GPU" if device != "cuda" else "no compute-sanitizer on PATH"
        step(store, "sanitize", lambda: {"refused": why})
        return

    def watched(tool: str, seconds: float) -> Record:
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
        step(store, tool, functools.partial(watched, tool, share))


def small_run(device: str) -> None:
    """Every CUDA kernel once, on small shapes, unaligned ones too: what the sanitizer watches."""
    from fastsal.tensor import ops

    backend = "cuda" if device == "cuda" else "auto"
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        for B, n, D in ((2, 10, 133), (2, 10, 160), (1, 20, 2500), (1, 40, 40_000), (1, 4100, 24), (360, 3, 4200)):
            logits, jacobian, x = _inputs((B, n, D), dtype, device)
            if max(B, n) > 100:
                ops.margin_geometry(logits, jacobian, x, 2.0, backend)
                if n < 100:
                    ops.pairwise_margins(logits, jacobian, x, 2.0, backend)
                continue
            w = torch.ones(B, n, n, dtype=torch.float64, device=device)
            for norm in (2.0, math.inf, 1.0):
                ops.row_distances(jacobian[:, 0], jacobian, norm, backend)
                ops.margin_geometry(logits, jacobian, x, norm, backend)
                ops.pairwise_margins(logits, jacobian, x, norm, backend)
                ops.pairwise_backward(w, w.triu() - w.tril(), jacobian, x, norm, backend)
    if device == "cuda":
        torch.cuda.synchronize()
    print("small run done")


def _inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    B, n, D = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sizes: list[tuple[tuple[int, ...], torch.dtype]] = [((B, n), wide), ((B, n, D), dtype), ((B, D), dtype)]
    return [torch.empty(size, device=device, dtype=kind).normal_() for size, kind in sizes]


def bench(store: Store, device: str, deadline: float) -> None:
    """The cases that run on a GPU, in a process of their own, and their tables; small ones on a CPU."""
    path, options = RESULTS / "gpu.json", ["--device", "cuda"]
    if device != "cuda":
        path, options = ROOT / "build" / "gpu_quick.json", ["--quick"]
    command = [*PYTHON_M, "bench", *cases.ON_A_GPU, *options, *["--fresh"] * store.fresh, "--out", str(path)]
    step(store, "bench", lambda: run(command, deadline))
    for record in Store(path).records.values():
        print(f"\n{everything(record)}")


PHASES: dict[str, Callable[[Store, str, float], None]] = {
    "build": build,
    "test": test,
    "sanitize": sanitize,
    "bench": bench,
}


def main() -> int:
    """The command line of `python -m bench gpu`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PHASES, help="this phase only (may be repeated)")
    parser.add_argument("--fresh", action="store_true", help="do again what succeeded before")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with small shapes")
    parser.add_argument("--small-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("torch.cuda.is_available() is false; --dry-run goes through the motions on the CPU")
    device = "cpu" if options.dry_run else "cuda"
    if options.small_run:
        small_run(device)
        return 0
    store = Store(ROOT / "build" / "gpu.json").begin(options.fresh, device)
    built = store.records.get("build", {})
    start, due = time.monotonic(), 0.0
    for phase in options.only or PHASES:
        due += SHARES[phase]
        PHASES[phase](store, device, due - (time.monotonic() - start))
        if phase == "build" and store.records["build"] is not built:
            store.fresh = True  # what was tested and measured was another build, or none
    failed = [name for name, found in store.records.items() if found.get("code", 0) and not found.get("refused")]
    print(f"written to {store.path}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0
