"""Seconds: of one run, of many in interleaved rounds, on a CPU and on a GPU; and what else the machine did meanwhile."""

import gc
import math
import os
import random
import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any, Protocol

import torch

SHORTEST = 5e-3  # seconds: shorter work is repeated within one timing
SLOW = 5.0  # seconds: longer work runs once only, and the run that was checked is the one that counts

Run = Callable[[Any], object]


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def timed(run: Callable[..., Any], *arguments: Any) -> tuple[float, Any]:
    """Seconds, and the result."""
    start = time.perf_counter()
    result = run(*arguments)
    return time.perf_counter() - start, result


class Clock(Protocol):
    """Seconds of one run: the mean over `repeats` runs, on one input after the other."""

    def __call__(self, run: Run, inputs: list[Any], repeats: int) -> float: ...


def wall(run: Run, inputs: list[Any], repeats: int) -> float:
    """The clock of a CPU."""
    start = time.perf_counter()
    for place in range(repeats):
        run(inputs[place % len(inputs)])
    return (time.perf_counter() - start) / repeats


class CudaEvents:
    """The clock of a GPU: events around each run, with a cold L2, after a read of twice the cache.

    A write would leave the cache full of what the run must write back before it has room: up to 50 MB on an H200, beside the
    301 MB that (1, 1000, 150528) reads in bfloat16.
    """

    def __init__(self, device: torch.device) -> None:
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
        self._flush = torch.zeros(2 * cache // 4, device=device)

    def __call__(self, run: Run, inputs: list[Any], repeats: int) -> float:
        milliseconds = 0.0
        for place in range(repeats):
            self._flush.amax()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run(inputs[place % len(inputs)])
            end.record()
            end.synchronize()
            milliseconds += start.elapsed_time(end)
        return milliseconds / 1e3 / repeats


def clock_of(device: str) -> Clock:
    """The clock of a CPU, or of this GPU."""
    return wall if device.startswith("cpu") else CudaEvents(torch.device(device))


class Captured:
    """The replay of a CUDA graph of `run` on the first input: no gaps that Python leaves between launches."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, given: Any) -> object:
        if self._graph is None:
            self._graph = torch.cuda.CUDAGraph()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run(given)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(self._graph):
                self._result = self._run(given)
        self._graph.replay()
        return self._result


def interleaved(
    runs: dict[str, Run], inputs: list[Any], budget: float, rounds: int = 15, clock: Clock = wall
) -> dict[str, list[float]]:
    """Seconds of every run in every round. All runs are warm already, and every round has an order of its own.

    The order matters: the first of a round finds its threads asleep, and each finds the caches as the one before left them.
    Every run has an equal share of `budget` seconds: at most `rounds` rounds and at least three, or one if it takes a second.
    """
    times: dict[str, list[float]] = {}
    repeats, wanted, share = {}, {}, budget / max(1, len(runs))
    for name, run in runs.items():
        estimate = clock(run, inputs, 1)
        repeats[name] = max(1, math.ceil(SHORTEST / estimate))
        wanted[name] = min(rounds, max(3 if estimate < 1 else 0, int(share / (estimate * repeats[name]))))
        times[name] = [estimate] if estimate >= 1 else []  # a run that long counts, and is not repeated for nothing
    names, order = list(runs), random.Random(0)
    for place in range(max(wanted.values(), default=0)):
        gc.collect()
        order.shuffle(names)
        for name in names:
            if place < wanted[name]:
                times[name].append(clock(runs[name], inputs, repeats[name]))
    return times


def _busy() -> float | None:
    """Seconds of processor time that all processes of the machine have taken so far; None where the system does not tell."""
    try:
        with open("/proc/stat", encoding="ascii") as stat:
            user, nice, system, _, _, irq, softirq = (int(word) for word in stat.readline().split()[1:8])
    except OSError:
        return None
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class OtherLoad:
    """How many cores other processes kept busy since this was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), _busy(), sum(os.times()[:4])

    def cores(self) -> float | None:
        start, before, own = self._start
        if before is None or (now := _busy()) is None:
            return None
        elapsed = max(time.perf_counter() - start, 0.05)
        return max(0.0, (now - before - (sum(os.times()[:4]) - own)) / elapsed)
