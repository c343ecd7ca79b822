"""Certified beside exact rows on networks of timm: every family, seeded random weights, 200 classes, the smallest images.

    python -m bench zoo

Random weights make gradients of 1e-18 and of 1e+13, and networks whose own gradients are noise. Whatever they do, the answer
has to be the exact one, and certified, or the network is named as unstable. A line is printed for each network, and
bench/results/zoo.json rewritten: a run that was interrupted goes on where it was.
"""

import argparse
import functools
import math
import time
import traceback
import warnings
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastsal
from bench import RESULTS
from bench.baselines import zoo
from bench.cases.model import VALUE_LIMIT
from bench.harness.session import Session
from bench.report.tables import zoo as as_table
from fastsal.model import traced

ROUNDS = 5


def _seconds(run: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _row(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """The gradient of the highest logit of the first example, and the seconds of a backward pass."""
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    cotangent = torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    times, rows = zip(
        *(_seconds(lambda: torch.autograd.grad(logits, leaf, cotangent, retain_graph=True)) for _ in range(ROUNDS)),
        strict=True,
    )
    return rows[0][0][0].double().flatten(), median(times)


def instability(alone: Tensor, together: Tensor) -> float:
    """How far the same gradient [D] is from itself when the image comes in another batch, relative to its norm."""
    scale = alone.abs().max()
    return float((alone - together).div(scale).norm() / alone.div(scale).norm()) if scale > 0 else 0.0


def compare(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Certified, without and with a traced derivative, and exact rows on a batch; the gradient alone and in a batch."""

    def certified() -> fastsal.Geometry:
        return fastsal.analyze(model, x, method="certified")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with mock.patch.object(traced, "PAYS", math.inf):
            untraced = certified()
    with warnings.catch_warnings(), mock.patch.object(traced, "PAYS", 0):
        warnings.simplefilter("ignore")
        first, _ = _seconds(certified)
        seconds, found = _seconds(certified)
        exact_seconds, exact = _seconds(lambda: fastsal.analyze(model, x, method=fastsal.Exact(memory_limit=0)))
    (together, one), (alone, _) = _row(model, x), _row(model, x[:1])
    answers = torch.stack((untraced.linearized_robustness, found.linearized_robustness))
    error = torch.where(answers == exact.linearized_robustness, 0.0, (answers / exact.linearized_robustness - 1).abs())
    error = error.amax(0)
    passes = (found.vjps + found.jvps).double()
    said = [str(warning.message).partition("\n")[0] for warning in caught if issubclass(warning.category, UserWarning)]
    return {
        "examples": len(x),
        "classes": exact.distances.shape[1],
        "equal": int((error <= VALUE_LIMIT).sum()),
        "same runner-up": int((found.runner_up == exact.runner_up).sum()),
        "largest relative error": float(error.max()),
        "certified": int((untraced.certified & found.certified).sum()),
        "traced": any(known.trace is not None for known in traced._known.get(model, {}).values()),
        "passes": passes.mean().item(),
        "seconds": {"first": first, "certified": seconds, "exact rows": exact_seconds, "one backward pass": one},
        "pass": seconds / passes.sum().item() / (one / len(x)),
        "exact pass": exact_seconds / exact.vjps.sum().item() / (one / len(x)),
        "instability": instability(alone, together),
        "warnings": list(dict.fromkeys(said)),
    }


def record(name: str, size: int) -> dict[str, Any]:
    """The figures of a network; if it breaks fastsal, how and where."""
    with torch.random.fork_rng(devices=[]):
        try:
            return {"size": size, **compare(*zoo.create(name, size))}
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = next(frame for frame in reversed(frames) if Path(frame.filename).is_relative_to(RESULTS.parents[1]))
            place = f"{Path(where.filename).name}, line {where.lineno}, {where.name}"
            return {"size": size, "failed": f"{type(error).__name__}: {error}".splitlines()[0], "where": place}


def main() -> None:
    """The command line of `python -m bench zoo`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="networks and families whose name holds this")
    parser.add_argument("--fresh", action="store_true", help="forget what the file holds")
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.json", help="the file of figures")
    arguments = parser.parse_args()
    session = Session(quick=False, fresh=arguments.fresh, path=arguments.out)
    for family, networks in zoo.FAMILIES.items():
        for name, size in networks.items():
            if arguments.only in name or arguments.only in family:
                found = session.keep(name, functools.partial(record, name, size))
                print(as_table({name: found}).splitlines()[-1], *found.get("warnings", ()), flush=True)
