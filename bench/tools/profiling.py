"""Where the time of a model-level analysis goes: forward, backward rows, probes, kernels, and the Python around them."""

import argparse
import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

import fastsal
from bench.baselines import models
from bench.cases.model import METHODS
from bench.report import words
from fastsal.model import linearization, products
from fastsal.tensor import ops

PARTS = ("forward", "backward rows", "probes", "kernel")


class Stopwatch:
    """Seconds by part, each moment counted once: time in an inner part is not the outer one's."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._inner = [0.0]

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as this part."""

        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            self._inner.append(0.0)
            try:
                return function(*arguments, **options)
            finally:
                elapsed = time.perf_counter() - start
                self.seconds[part] += elapsed - self._inner.pop()
                self._inner[-1] += elapsed

        return timed


@contextlib.contextmanager
def watched() -> Iterator[Stopwatch]:
    """fastsal with a stopwatch on its seams."""
    watch = Stopwatch()
    seams: list[tuple[Any, str, str]] = [
        (linearization, "call", "forward"),
        (torch.autograd, "grad", "backward rows"),
        (products.ModelPasses, "jvp", "probes"),
    ]
    for module in ops.BACKENDS.values():
        seams += [(module, name, "kernel") for name in ("row_distances", "margin_geometry") if hasattr(module, name)]
    with contextlib.ExitStack() as stack:
        for owner, name, part in seams:
            stack.enter_context(mock.patch.object(owner, name, watch.wrap(part, getattr(owner, name))))
        yield watch


def profile(name: str, method: Any) -> tuple[float, dict[str, float]]:
    """Seconds in all and by part of one analysis, the second of two."""
    model, x = models.load(name)
    for _ in range(2):
        with watched() as watch:
            start = time.perf_counter()
            fastsal.analyze(model, x, method=method)
            elapsed = time.perf_counter() - start
    return elapsed, watch.seconds


def table(only: str = "") -> str:
    """Every model and method."""
    rows = []
    for name in models.MODELS:
        for title, (method, _) in METHODS.items():
            if only in f"{name}, {title}":
                elapsed, seconds = profile(name, method)
                shares = [seconds[part] / elapsed for part in PARTS]
                rest = 1 - sum(shares)
                rows.append([f"{name}: {title}", words.seconds(elapsed), *(f"{s:.0%}" for s in (*shares, rest))])
    return words.table(["", "time", *PARTS, "Python and the rest"], rows)


def main() -> None:
    """The command line of `python -m bench profile`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="WORD", help="models and methods whose name holds this")
    print(table(parser.parse_args().only))
