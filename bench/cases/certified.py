"""Certified beside exact ρ̃ on trained networks of 1000 classes: passes, seconds, answers; how passes grow; how often it errs.

All of it for perturbations in the 2-norm, and in the largest entry (p = inf).

    python -m bench certified --images 200 --threads 1 --folder build/bench

Trains the networks of bench/baselines/certified_models.py first where the folder does not hold them, which takes minutes. The
methods take turns on the same batches in one process, so that a busy machine slows all of them alike. Writes
bench/results/certified.json.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from scipy import stats

import fastsal
from bench import RESULTS
from bench.baselines.certified_models import CLASSES, STEPS, Images, accuracy, load
from bench.baselines.jacobians import KINDS, Matrices, distances
from bench.harness.store import commit, environment
from fastsal.methods.certified import certify

HABITS = (1, 5, 10)
BATCHES = (12, 25, 64)
LIMITS = (10, 15, 20, 30, 40, 50, 60, 80, 100)
DELTA = 0.2  # the failure probability of the calibration: large, so that misses are seen


def quantiles(values: list[int]) -> dict[str, float]:
    ordered = torch.tensor(values, dtype=torch.float64)
    return {"median": ordered.median().item(), "p95": ordered.quantile(0.95).item(), "max": ordered.max().item()}


def compare(kind: str, folder: Path, images: int, batch: int, norm: float) -> dict[str, object]:
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
        fastsal.analyze(model, source.draw(2)[0], norm=norm, method=method)
    for _ in range(images // batch):
        x, _ = source.draw(batch)
        results = {}
        for name, method in methods.items():
            start = time.perf_counter()
            results[name] = result = fastsal.analyze(model, x, norm=norm, method=method)
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


def by_batch(kind: str, folder: Path, norm: float, rounds: int = 8) -> list[dict[str, float]]:
    """How many times faster certified is than exact rows at batches of several sizes, once the derivative has been traced."""
    model, source = load(kind, folder), Images(kind, 4)
    methods = {"exact rows": fastsal.Exact(memory_limit=0), "certified": fastsal.Certified()}
    fastsal.analyze(model, source.draw(100)[0], norm=norm, method="certified")  # so many pay for a trace
    found = []
    for batch in BATCHES:
        x, _ = source.draw(batch)
        seconds: dict[str, list[float]] = {name: [] for name in methods}
        for _ in range(rounds):
            for name, method in methods.items():
                start = time.perf_counter()
                result = fastsal.analyze(model, x, norm=norm, method=method)
                seconds[name].append(time.perf_counter() - start)
        passes = (result.vjps + result.jvps).double().mean().item()
        exact, certified = (sorted(values[1:])[(rounds - 1) // 2] for values in seconds.values())
        faster = exact / certified
        found.append({"batch": batch, "passes": passes, "faster": faster, "rows a pass": CLASSES / faster / passes})
    return found


def limited(kind: str, folder: Path, norm: float, images: int = 24) -> list[dict[str, float]]:
    """The lower bound and the value found, relative to ρ̃, at several limits of passes: medians and the worst of the images."""
    model = load(kind, folder)
    x, _ = Images(kind, 5).draw(images)
    exact = fastsal.analyze(model, x, norm=norm, method=fastsal.Exact(memory_limit=0)).linearized_robustness
    found = []
    for limit in LIMITS:
        result = fastsal.analyze(model, x, norm=norm, method=fastsal.Certified(max_passes=limit))
        lower, value = result.lower_bound / exact, result.linearized_robustness / exact
        row = {"limit": limit, "lower": lower.median().item(), "least lower": lower.min().item()}
        row |= {"value": value.median().item(), "largest value": value.max().item()}
        found.append(row | {"certified": result.certified.double().mean().item()})
    return found


def growth(n: int, norm: float, turned: bool, examples: int = 24, dimension: int = 600) -> dict[str, object]:
    """Random Jacobians: singular values fall as 1/k, rows have a common part, margins are bunched as in trained networks.

    The k-th singular direction is the k-th coordinate, unless they are turned into random ones. That is all the same to the
    2-norm; to sums of absolute entries the coordinates that are small are not small together.
    """
    generator = torch.Generator().manual_seed(n)
    spectrum = 1 / torch.arange(1, dimension + 1)
    turn = torch.linalg.qr(torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(0))).Q
    totals, right = [], 0
    for seed in range(examples):
        rows = (torch.randn(n, dimension, generator=generator) + torch.randn(dimension, generator=generator)) * spectrum
        rows = rows @ turn if turned else rows
        logits = torch.randn(n, generator=generator)
        logits[0] += 10.0
        found = certify(Matrices(logits[None], rows[None]), fastsal.Certified(seed=seed), norm=norm)
        nearest = distances(logits[None], rows[None], norm).argmin()
        right += int(found.certified[0]) * int(nearest == found.winners[0, 1])
        totals.append(int(found.vjps[0] + found.jvps[0]))
    return {"n": n, "examples": examples, "certified and right": right, **quantiles(totals)}


def misses(kind: str, max_passes: int | None, norm: float, batches: int = 60, examples: int = 50) -> dict[str, object]:
    """How often something false is said of random Jacobians at a failure probability of 0.2, with its 95 % interval.

    False is an example that is certified with a ratio above ρ̃, or whose lower bound is above ρ̃. Each batch has its own seed.
    """
    false = certified = 0
    for batch in range(batches):
        logits, rows = KINDS[norm][kind](torch.Generator().manual_seed(10_000 + batch), examples)
        ratio = distances(logits, rows, norm)
        found = certify(Matrices(logits, rows), fastsal.Certified(DELTA, max_passes, batch), norm=norm)
        least = ratio.amin(1) * (1 + 1e-12)
        above = ratio.gather(1, found.winners[:, 1:]).squeeze(1) > least
        false += int(((found.certified & above) | (found.lower_bound > least)).sum())
        certified += int(found.certified.sum())
    trials = batches * examples
    interval = stats.binomtest(false, trials).proportion_ci(0.95)
    return {
        "kind": kind,
        "max_passes": max_passes,
        "trials": trials,
        "certified": certified,
        "misses": false,
        "interval": [float(interval.low), float(interval.high)],
    }


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
    }
    other = dict(report)
    for norm, found in ((2.0, report), (math.inf, other)):
        classes = (10, 30, 100, 300, 1000, 3000, 10000)
        found["growth"] = [growth(n, norm, turned=norm == math.inf) for n in classes]
        if norm == math.inf:
            found["growth along the coordinates"] = [growth(n, norm, turned=False) for n in classes]
        found["calibration"] = [misses(kind, limit, norm) for kind in KINDS[norm] for limit in (None, 40)]
        print(f"norm {norm:g}", json.dumps(found, indent=1), flush=True)
        for kind in arguments.networks:
            found[kind] = compare(kind, arguments.folder, arguments.images, arguments.batch, norm)
            print(kind, json.dumps(found[kind], indent=1), flush=True)
        if "narrow" in arguments.networks:
            found["batches"] = by_batch("narrow", arguments.folder, norm)
            found["limits"] = limited("narrow", arguments.folder, norm)
            print(json.dumps({name: found[name] for name in ("batches", "limits")}, indent=1), flush=True)
    report["inf"] = other
    (RESULTS / "certified.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
