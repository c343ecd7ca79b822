"""margin_geometry on the CPU against a pure read of J and x: `python bench/margin_geometry.py [--quick] [--json FILE]`.

Every contestant computes all outputs of `fastsal.Geometry` from the same float32 Jacobian of about 2 GB, in turns, round by
round; the figures are medians of the pair-by-pair ratios to a pure read (bench/read_bandwidth.cpp, built here by the system
compiler), with quartiles. A result out of tolerance is reported as wrong and gets no speed.
"""

import argparse
import ctypes
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

import torch
from torch import Tensor

import fastsal
from fastsal.accuracy import scaled_errors

SHAPES = ((65536, 10, 784), (1700, 100, 3072), (13, 1000, 37632))
QUICK = ((1024, 10, 784), (30, 100, 3072), (1, 1000, 37632))


def eager(logits: Tensor, jacobian: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """What one would write in PyTorch: float32, norm 2, no care for ties or range."""
    prediction = logits.argmax(1, keepdim=True)
    g = jacobian.take_along_dim(prediction.unsqueeze(2), 1)
    margin = logits.gather(1, prediction) - logits
    distances = (margin / (g - jacobian).square().sum(2).sqrt()).scatter(1, prediction, torch.inf)
    robustness, runner_up = distances.min(1, keepdim=True)
    g_dag = (g - jacobian.take_along_dim(runner_up.unsqueeze(2), 1)).squeeze(1)
    g = g.squeeze(1)
    psi, psi_dag = logits.gather(1, prediction).squeeze(1), margin.gather(1, runner_up).squeeze(1)
    dot, dot_dag, size, size_dag = (x * g).sum(1), (x * g_dag).sum(1), g.norm(dim=1), g_dag.norm(dim=1)
    offset, offset_dag = psi - dot, psi_dag - dot_dag
    gap = (g_dag / size_dag.unsqueeze(1) - g / size.unsqueeze(1)).norm(dim=1)
    alignment, alignment_dag = dot.abs() / size, dot_dag.abs() / size_dag
    bound = alignment + x.norm(dim=1) * gap + offset_dag.abs() / size_dag
    homogeneity = dot.abs() / (dot.abs() + offset.abs())
    homogeneity_dag = dot_dag.abs() / (dot_dag.abs() + offset_dag.abs())
    return (
        *(prediction, runner_up, distances, robustness.squeeze(1), alignment, psi_dag, alignment_dag),
        *(offset, offset_dag, gap, bound, homogeneity, homogeneity_dag),
    )


def in_parts(work: Callable[..., object], logits: Tensor, jacobian: Tensor, x: Tensor) -> None:
    """Eager torch a few examples at a time, so that its temporaries stay near 256 MB."""
    step = max(1, 2**26 // (jacobian.shape[1] * jacobian.shape[2]))
    for start in range(0, len(logits), step):
        part = slice(start, start + step)
        work(logits[part], jacobian[part], x[part])


def pure_read(folder: str) -> Callable[[Tensor, Tensor], None]:
    """The fastest sum over all of J and x."""
    library = Path(folder, "read_bandwidth.so")
    source = Path(__file__).with_name("read_bandwidth.cpp")
    flags = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["c++", *flags, str(source), "-o", str(library)], check=True)
    read_sum = ctypes.CDLL(str(library)).read_sum
    read_sum.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int]
    read_sum.restype = ctypes.c_double

    def read(jacobian: Tensor, x: Tensor) -> None:
        for tensor in (jacobian, x):
            read_sum(tensor.data_ptr(), tensor.numel(), torch.get_num_threads())

    return read


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Prints a table; writes JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    report = {
        "machine": f"{platform.machine()}, {fastsal.info()['cpu']}",
        "torch": torch.__version__,
        "fastsal": fastsal.__version__,
        "commit": commit.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "ratio": "time over the time of a pure read of J and x: lower quartile, median, upper quartile",
        "cases": [],
    }
    all_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        read = pure_read(folder)
        print(f"{'B, n, D':>20} {'threads':>7}  {'contestant':14} {'time / pure read (quartiles)':>30}")
        for B, n, D in QUICK if options.quick else SHAPES:
            generator = torch.Generator().manual_seed(0)
            jacobian, x = torch.randn(B, n, D, generator=generator), torch.randn(B, D, generator=generator)
            logits = torch.randn(B, n, generator=generator)
            few = slice(0, max(1, 2**22 // (n * D)))
            got = fastsal.margin_geometry(logits, jacobian, x, backend="cpu")
            part = fastsal.margin_geometry(logits[few], jacobian[few], x[few], backend="cpu")
            errors = scaled_errors(part, logits[few], jacobian[few], x[few], 2.0)
            same = torch.equal(part.bound, got.bound[few]) and torch.equal(part.distances, got.distances[few])
            right = max(errors.values()) <= 1e-6 and same
            for threads in dict.fromkeys((1, all_threads)):
                torch.set_num_threads(threads)
                contestants: dict[str, Callable[[], object]] = {
                    "pure read": lambda: read(jacobian, x),  # noqa: B023
                    "fastsal cpu": lambda: fastsal.margin_geometry(logits, jacobian, x, backend="cpu"),  # noqa: B023
                    "eager torch": lambda: in_parts(eager, logits, jacobian, x),  # noqa: B023
                }
                if not options.no_compile:
                    compiled = torch.compile(eager, dynamic=False)
                    contestants["torch.compile"] = lambda: compiled(logits, jacobian, x)  # noqa: B023
                times: dict[str, list[float]] = {name: [] for name in contestants}
                for work in contestants.values():
                    work()  # warm up, compile
                for turn in range(options.rounds):
                    for name, work in contestants.items():
                        if turn < 3 or name in ("pure read", "fastsal cpu"):  # the slow ones three times
                            times[name].append(seconds(work))
                for name in list(contestants)[1:]:
                    ratios = [mine / pure for mine, pure in zip(times[name], times["pure read"], strict=False)]
                    quartiles = quantiles(ratios, n=4, method="inclusive")
                    text = "{1:.3f} ({0:.3f} to {2:.3f})".format(*quartiles)
                    if name == "fastsal cpu" and not right:
                        text = f"WRONG: {max(errors.values()):.1e}, same bits in a part: {same}"
                    report["cases"].append(
                        {"shape": [B, n, D], "threads": threads, "contestant": name, "ratio": quartiles, "right": right}
                    )
                    print(f"{f'{B}, {n}, {D}':>20} {threads:7}  {name:14} {text:>30}", flush=True)
                    if options.json:
                        options.json.parent.mkdir(parents=True, exist_ok=True)
                        options.json.write_text(
                            json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
                        )
            torch.set_num_threads(all_threads)


if __name__ == "__main__":
    main()
