"""Certified beside exact ρ̃ on trained networks of 1000 classes: passes, seconds, answers; and how passes grow with the classes.

    python -m bench certified --images 200 --threads 1 --folder build/bench

Trains the networks of bench/contestants/certified_models.py first where the folder does not hold them, which takes minutes. The
methods take turns on the same batches in one process, so that a busy machine slows all of them alike. Writes
bench/results/certified.json.
"""

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import fastsal
from bench import RESULTS
from bench.contestants.certified_models import STEPS, Images, accuracy, load
from bench.suite.store import commit, environment
from fastsal.methods.certified import certify

HABITS = (1, 5, 10)


def quantiles(values: list[int]) -> dict[str, float]:
    ordered = torch.tensor(values, dtype=torch.float64)
    return {"median": ordered.median().item(), "p95": ordered.quantile(0.95).item(), "max": ordered.max().item()}


def compare(kind: str, folder: Path, images: int, batch: int) -> dict[str, object]:
    """All methods on the same images of one trained network."""
    model, source = load(kind, folder), Images(kind, 3)
    right, loss = accuracy(model, *Images(kind, 2).draw(1000))
    methods = {
        "exact rows": fastsal.Exact(memory_limit=0),
        "exact features": fastsal.Exact(),
        "certified": fastsal.Certified(),
        "top-10 candidates": fastsal.Candidates(10),
    }
    if kind == "wide":
        del methods["exact features"]  # F > n
    seconds = dict.fromkeys(methods, 0.0)
    passes: dict[str, list[int]] = {name: [] for name in methods}
    same, certified, worst = 0, 0, 0.0
    wrong = dict.fromkeys(HABITS, 0)
    excess = dict.fromkeys(HABITS, 0.0)
    for method in methods.values():  # warm-up
        fastsal.analyze(model, source.draw(2)[0], method=method)
    for _ in range(images // batch):
        x, _ = source.draw(batch)
        results = {}
        for name, method in methods.items():
            start = time.perf_counter()
            results[name] = result = fastsal.analyze(model, x, method=method)
            seconds[name] += time.perf_counter() - start
            passes[name] += (result.vjps + result.jvps).tolist()
        exact, found = results["exact rows"], results["certified"]
        same += int((found.runner_up == exact.runner_up).sum())
        certified += int(found.certified.sum())
        error = (found.linearized_robustness / exact.linearized_robustness - 1).abs()
        worst = max(worst, error.max().item())
        with torch.no_grad():
            order = model(x).argsort(1, descending=True)[:, 1:]
        for k in HABITS:
            value = exact.distances.gather(1, order[:, :k]).amin(1)
            wrong[k] += int((value > exact.linearized_robustness * (1 + 1e-6)).sum())
            excess[k] = max(excess[k], (value / exact.linearized_robustness - 1).max().item())
    count = len(passes["certified"])
    return {
        "accuracy": right,
        "loss": loss,
        "images": count,
        "certified": certified,
        "same runner-up as exact": same,
        "largest relative error of certified": worst,
        "passes": {name: quantiles(values) for name, values in passes.items()},
        "seconds": seconds,
        "times faster than exact rows": {name: seconds["exact rows"] / value for name, value in seconds.items()},
        "habits": {f"top-{k}": {"share wrong": wrong[k] / count, "largest excess": excess[k]} for k in HABITS},
    }


@dataclass
class Matrices:
    """Jacobians [E, n, D] that are known, in the place of a model: what fastsal/methods/certified.py asks of it."""

    logits: Tensor
    jacobian: Tensor
    roundoff: float = 2.0**-24
    pairs: int = 256

    def __post_init__(self) -> None:
        self.dimension = self.jacobian.shape[2]

    def vjp(self, examples: Tensor, cotangents: Tensor) -> Tensor:
        return torch.einsum("ecn,end->ecd", cotangents, self.jacobian[examples])

    def jvp(self, examples: Tensor, directions: Tensor) -> Tensor:
        return torch.einsum("ekd,end->ekn", directions.float(), self.jacobian[examples])

    def price(self) -> float:
        return 1.0


def growth(n: int, examples: int = 8, dimension: int = 600) -> dict[str, object]:
    """Random Jacobians: singular values fall as 1/k, rows have a common part, margins are bunched as in trained networks."""
    generator = torch.Generator().manual_seed(n)
    spectrum = 1 / torch.arange(1, dimension + 1)
    totals, right = [], 0
    for _ in range(examples):
        rows = (torch.randn(n, dimension, generator=generator) + torch.randn(dimension, generator=generator)) * spectrum
        logits = torch.randn(n, generator=generator)
        logits[0] += 10.0
        found = certify(Matrices(logits[None], rows[None]), fastsal.Certified())
        scores = logits.double()
        prediction = int(scores.argmax())
        ratio = (scores[prediction] - scores) / (rows[prediction].double() - rows.double()).norm(dim=1)
        ratio[prediction] = math.inf
        right += int(found.certified[0]) * int(ratio.argmin() == found.winners[0, 1])
        totals.append(int(found.vjps[0] + found.jvps[0]))
    return {"n": n, "examples": examples, "certified and right": right, **quantiles(totals)}


def main() -> None:
    """The command line of `python -m bench certified`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    parser.add_argument("--networks", nargs="*", choices=list(STEPS), default=list(STEPS))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    RESULTS.mkdir(exist_ok=True)
    report: dict[str, object] = {
        "environment": environment(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "threads": arguments.threads,
        "growth": (table := [growth(n) for n in (10, 30, 100, 300, 1000, 3000, 10000)]),
    }
    for row in table:
        print(row, flush=True)
    for kind in arguments.networks:
        report[kind] = compare(kind, arguments.folder, arguments.images, arguments.batch)
        print(kind, json.dumps(report[kind], indent=1), flush=True)
        (RESULTS / "certified.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
