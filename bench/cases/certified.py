"""Certified beside exact ρ̃ on trained networks of 1000 classes: passes, seconds, answers; how passes grow; how often it errs.

All of it for perturbations in the 2-norm, and in the largest entry (p = ∞). The networks are those of
bench/baselines/certified_models.py, trained first where build/bench does not hold them, which takes minutes.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from scipy import stats

import fastsal
from bench import ROOT
from bench.baselines.certified_models import CLASSES, STEPS, Images, accuracy, load
from bench.baselines.jacobians import KINDS, Matrices, distances
from bench.harness.case import Case
from bench.harness.clock import interleaved, quartiles, timed
from bench.harness.store import Record
from fastsal.methods.base import Question
from fastsal.methods.certified import certify

FOLDER = ROOT / "build" / "bench"
IMAGES, BATCH = 200, 25
CANDIDATES = (1, 5, 10)
BATCHES = (12, 25, 64)
LIMITS = (10, 15, 20, 30, 40, 50, 60, 80, 100)
GROWTH = (10, 30, 100, 300, 1000, 3000, 10000)  # classes
DELTA = 0.2  # the failure probability of the calibration: large, so that misses are seen
EXACT = fastsal.Exact(memory_limit=0)


def quantiles(values: list[int]) -> dict[str, float]:
    ordered = torch.tensor(values, dtype=torch.float64)
    return {"median": ordered.median().item(), "p95": ordered.quantile(0.95).item(), "max": ordered.max().item()}


def compare(kind: str, norm: float) -> Record:
    """All methods on the same images of one trained network."""
    model, source = load(kind, FOLDER), Images(kind, 3)
    right, loss = accuracy(model, *Images(kind, 2).draw(1000))
    methods = {
        "exact rows": EXACT,
        "exact features": fastsal.Exact(),
        "certified": fastsal.Certified(),
        "top-10 candidates": fastsal.Candidates(10),
    }
    if kind == "wide":
        del methods["exact features"]  # F > n
    seconds = dict.fromkeys(methods, 0.0)
    passes: dict[str, list[int]] = {name: [] for name in methods}
    same, certified, worst = 0, 0, 0.0
    wrong = dict.fromkeys(CANDIDATES, 0)
    excess = dict.fromkeys(CANDIDATES, 0.0)
    for method in methods.values():  # warm-up
        fastsal.analyze(model, source.draw(2)[0], norm=norm, method=method)
    for _ in range(IMAGES // BATCH):
        x, _ = source.draw(BATCH)
        results = {}
        for name, method in methods.items():
            took, result = timed(functools.partial(fastsal.analyze, norm=norm, method=method), model, x)
            results[name] = result
            seconds[name] += took
            passes[name] += (result.vjps + result.jvps).tolist()
        exact, found = results["exact rows"], results["certified"]
        same += int((found.runner_up == exact.runner_up).sum())
        certified += int(found.certified.sum())
        error = (found.linearized_robustness / exact.linearized_robustness - 1).abs()
        worst = max(worst, error.max().item())
        with torch.no_grad():
            order = model(x).argsort(1, descending=True)[:, 1:]
        for k in CANDIDATES:
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
        "candidates": {f"top-{k}": {"share wrong": wrong[k] / count, "largest excess": excess[k]} for k in CANDIDATES},
    }


def by_batch(norm: float) -> Record:
    """How many times faster certified is than exact rows at batches of several sizes, once the derivative has been traced."""
    model, source = load("narrow", FOLDER), Images("narrow", 4)
    fastsal.analyze(model, source.draw(100)[0], norm=norm, method="certified")  # so many pay for a trace
    found = []
    for batch in BATCHES:
        x, _ = source.draw(batch)
        runs = {
            name: functools.partial(fastsal.analyze, model, norm=norm, method=method)
            for name, method in (("exact rows", EXACT), ("certified", fastsal.Certified()))
        }
        result = [run(x) for run in runs.values()][-1]
        passes = (result.vjps + result.jvps).double().mean().item()
        exact, certified = (quartiles(seconds)[1] for seconds in interleaved(runs, [x], budget=60.0, rounds=7).values())
        faster = exact / certified
        found.append({"batch": batch, "passes": passes, "faster": faster, "rows a pass": CLASSES / faster / passes})
    return {"rows": found}


def limited(norm: float, images: int = 24) -> Record:
    """The lower bound and the value found, relative to ρ̃, at several limits of passes: medians and the worst of the images."""
    model = load("narrow", FOLDER)
    x, _ = Images("narrow", 5).draw(images)
    exact = fastsal.analyze(model, x, norm=norm, method=EXACT).linearized_robustness
    found = []
    for limit in LIMITS:
        result = fastsal.analyze(model, x, norm=norm, method=fastsal.Certified(max_passes=limit))
        lower, value = result.lower_bound / exact, result.linearized_robustness / exact
        row = {"limit": limit, "lower": lower.median().item(), "least lower": lower.min().item()}
        row |= {"value": value.median().item(), "largest value": value.max().item()}
        found.append(row | {"certified": result.certified.double().mean().item()})
    return {"rows": found}


def growth(norm: float, turned: bool, classes: tuple[int, ...], examples: int = 24, dimension: int = 600) -> Record:
    """Random Jacobians: singular values fall as 1/k, rows have a common part, margins are bunched as in trained networks.

    The k-th singular direction is the k-th coordinate, unless they are turned into random ones. That is all the same to the
    2-norm; to sums of absolute entries the coordinates that are small are not small together.
    """
    spectrum = 1 / torch.arange(1, dimension + 1)
    turn = torch.linalg.qr(torch.randn(dimension, dimension, generator=torch.Generator().manual_seed(0))).Q
    found = []
    for n in classes:
        generator = torch.Generator().manual_seed(n)
        totals, right = [], 0
        for seed in range(examples):
            common = torch.randn(n, dimension, generator=generator) + torch.randn(dimension, generator=generator)
            rows = common * spectrum @ turn if turned else common * spectrum
            logits = torch.randn(n, generator=generator)
            logits[0] += 10.0
            one = certify(Matrices(logits[None], rows[None]), fastsal.Certified(seed=seed), Question(norm))
            nearest = distances(logits[None], rows[None], norm).argmin()
            right += int(one.certified[0]) * int(nearest == one.winners[0, 1])
            totals.append(int(one.vjps[0] + one.jvps[0]))
        found.append({"n": n, "examples": examples, "certified and right": right, **quantiles(totals)})
    return {"rows": found}


def misses(kind: str, max_passes: int | None, norm: float, batches: int, examples: int = 50) -> dict[str, Any]:
    """How often something false is said of random Jacobians at a failure probability of 0.2, with its 95 % interval.

    False is an example that is certified with a ratio above ρ̃, or whose lower bound is above ρ̃. Each batch has its own seed.
    """
    false = certified = 0
    for batch in range(batches):
        logits, rows = KINDS[norm][kind](torch.Generator().manual_seed(10_000 + batch), examples)
        ratio = distances(logits, rows, norm)
        found = certify(Matrices(logits, rows), fastsal.Certified(DELTA, max_passes, batch), Question(norm))
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


def calibration(norm: float, batches: int) -> Record:
    """`misses` of every kind, with a limit of passes and without."""
    return {"rows": [misses(kind, limit, norm, batches) for kind in KINDS[norm] for limit in (None, 40)]}


def cases(quick: bool = False) -> Iterator[Case]:
    """On one thread; with `quick` on random Jacobians of few classes alone."""
    classes = GROWTH[:3] if quick else GROWTH
    for norm, name in ((2.0, "p = 2"), (math.inf, "p = ∞")):
        infinite = norm == math.inf
        parts: dict[str, Callable[[], Record]] = {"growth": functools.partial(growth, norm, infinite, classes)}
        if infinite:
            parts["growth along the coordinates"] = functools.partial(growth, norm, False, classes)
        parts["calibration"] = functools.partial(calibration, norm, 1 if quick else 60)
        if not quick:
            parts |= {kind: functools.partial(compare, kind, norm) for kind in STEPS}
            parts |= {"batches": functools.partial(by_batch, norm), "limits": functools.partial(limited, norm)}
        for part, figures in parts.items():
            yield Case("certified", f"{name}, {part}", figures=figures, threads=(1,))
