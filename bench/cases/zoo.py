"""Certified beside exact rows on networks of timm: every family, seeded random weights, 200 classes, the smallest images.

Random weights make gradients of 1e-18 and of 1e+13, and networks whose own gradients are noise. Whatever they do, the answer
has to be the exact one, and certified, or the network is named as unstable.
"""

import functools
import importlib.util
import math
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import fastsal
from bench import ROOT
from bench.baselines import zoo
from bench.cases.model import VALUE_LIMIT, one_pass
from bench.harness.case import Case
from bench.harness.clock import timed
from fastsal.model import traced

ROUNDS = 5


def _row(model: nn.Module, x: Tensor) -> tuple[Tensor, float]:
    """The gradient of the highest logit of the first example, and the seconds of a backward pass."""
    run = one_pass(model, x)
    times, rows = zip(*(timed(run, None) for _ in range(ROUNDS)), strict=True)
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
        first, _ = timed(certified)
        seconds, found = timed(certified)
        exact_seconds, exact = timed(lambda: fastsal.analyze(model, x, method=fastsal.Exact(memory_limit=0)))
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


def record(name: str) -> dict[str, Any]:
    """The figures of a network; if it breaks fastsal, how and where."""
    with torch.random.fork_rng(devices=[]):
        try:
            model, x = zoo.create(name)
            return {"size": x.shape[-1], **compare(model, x)}
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            where = next(frame for frame in reversed(frames) if Path(frame.filename).is_relative_to(ROOT))
            place = f"{Path(where.filename).name}, line {where.lineno}, {where.name}"
            return {"failed": f"{type(error).__name__}: {error}".splitlines()[0], "where": place}


def cases(quick: bool = False) -> Iterator[Case]:
    """Every network; of each family one if `quick`."""
    missing = "" if importlib.util.find_spec("timm") else "not installed (pip install timm)"
    for names in zoo.FAMILIES.values():
        for name in names[: 1 if quick else None]:
            yield Case("zoo", name, figures=functools.partial(record, name), missing=missing)
