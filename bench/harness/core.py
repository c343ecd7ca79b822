"""What a case is, and how it is checked and timed.

The answer of every contestant is checked first; a wrong one is reported with its error and without a speed. Then the
contestants take turns, round by round, so that whatever else the machine does slows all of them alike. A ratio compares two
times of the same round, and the figure is the median of the ratios, with the quartiles beside it.
"""

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from statistics import quantiles
from typing import Any

import torch

from bench.harness import memory

# What other people's code raises where it cannot do a piece of work. The table reports it, and the run goes on.
FOREIGN_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    ImportError,
)
SHORTEST = 5e-3  # seconds: shorter work is repeated within one timing
SLOW = 5.0  # seconds: longer work runs once only, and the run that was checked is the one that counts


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work of a case.

    `run(input)` does the work. `check(result)` returns the error of the result for the first input, and an error of at most
    `limit` counts as right. `what` says what is computed, where that is not every output of the case.
    """

    name: str
    run: Callable[[Any], Any]
    check: Callable[[Any], float]
    limit: float
    what: str = ""
    facts: Callable[[Any], dict[str, float]] | None = None  # figures beside the time, from the checked result
    compiles: bool = False  # its first run compiles, and tells nothing about its speed


@dataclass
class Work:
    """Inputs, together larger than every cache and taken in turns, and the contestants; the first of these is the yardstick."""

    inputs: list[Any]
    contestants: list[Contestant]
    skipped: dict[str, str] = field(default_factory=dict)  # name -> why it is not here
    size: int = 0  # bytes of J and x, for GB/s


@dataclass(frozen=True)
class Case:
    """A piece of work: `level` and `name` say where its figures go, and `make(tiny)` builds its inputs and contestants.

    With `tiny` the inputs are next to nothing and the contestants the same: for the tests, to warm up, to know the names.
    """

    level: str
    name: str
    make: Callable[[bool], Work]
    quick: bool = False  # belongs to --quick, which runs nothing else
    every_thread_count: bool = True  # with 1 thread and with all; else with all alone
    budget: float = 12.0  # seconds of timing, about, at each thread count
    memory: bool = False  # also the peak memory of every contestant, in a fresh process

    @property
    def title(self) -> str:
        """What `--only` looks into."""
        return f"{self.level}: {self.name}"


def thread_counts(case: Case) -> Iterable[int]:
    """The numbers of threads to measure with: 1 and all, or all alone."""
    every = torch.get_num_threads()
    return dict.fromkeys((1, every)) if case.every_thread_count else (every,)


def three(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


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


def _once(run: Callable[[Any], object], inputs: list[Any], repeats: int) -> float:
    """Seconds of one run: the mean over `repeats` runs, on one input after the other."""
    start = time.perf_counter()
    for turn in range(repeats):
        run(inputs[turn % len(inputs)])
    return (time.perf_counter() - start) / repeats


def take_turns(
    runs: dict[str, Callable[[Any], object]], inputs: list[Any], budget: float, rounds: int = 15
) -> dict[str, list[float]]:
    """Seconds of every run in every round. All runs are warm already, and every round has an order of its own.

    The order matters: the first of a round finds its threads asleep, and each finds the caches as the one before left them.
    Every run has an equal share of `budget` seconds: at most `rounds` rounds and at least three, or one if it takes a second.
    """
    times: dict[str, list[float]] = {}
    repeats, wanted, share = {}, {}, budget / max(1, len(runs))
    for name, run in runs.items():
        estimate = _once(run, inputs, 1)
        repeats[name] = max(1, math.ceil(SHORTEST / estimate))
        wanted[name] = min(rounds, max(3 if estimate < 1 else 0, int(share / (estimate * repeats[name]))))
        times[name] = [estimate] if estimate >= 1 else []  # a run that long counts, and is not repeated for nothing
    names, order = list(runs), random.Random(0)
    for turn in range(max(wanted.values(), default=0)):
        gc.collect()
        order.shuffle(names)
        for name in names:
            if turn < wanted[name]:
                times[name].append(_once(runs[name], inputs, repeats[name]))
    return times


def measure(case: Case, work: Work, threads: int, budget: float) -> dict[str, Any]:
    """Checks and times every contestant of `work` at this number of threads: a record for the JSON file."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows: dict[str, dict[str, Any]] = {}
        first: dict[str, float] = {}
        load = OtherLoad()
        for contestant in work.contestants:
            row = rows[contestant.name] = {"contestant": contestant.name}
            if contestant.what:
                row["what"] = contestant.what
            start = time.perf_counter()
            try:
                result = contestant.run(work.inputs[0])
                first[contestant.name] = 0.0 if contestant.compiles else time.perf_counter() - start
                row["error"] = error = contestant.check(result)
            except FOREIGN_ERRORS as failure:
                row |= {"status": "failed", "reason": f"{type(failure).__name__}: {failure}".splitlines()[0][:200]}
                continue
            if contestant.facts:
                row |= contestant.facts(result)
            row["status"] = "right" if error <= contestant.limit else "wrong"
            del result
        right = {c.name: c.run for c in work.contestants if rows[c.name]["status"] == "right"}
        quick = {name: run for name, run in right.items() if first[name] <= SLOW}
        times = {name: [first[name]] for name in right if name not in quick} | take_turns(quick, work.inputs, budget)
        yardstick = work.contestants[0].name
        for name, seconds in times.items():
            rows[name] |= {"seconds": three(seconds), "rounds": [float(f"{second:.4g}") for second in seconds]}
            if yardstick in times:
                rows[name]["ratio"] = three([a / b for a, b in zip(seconds, times[yardstick], strict=False)])
        other = load.cores()
        if case.memory:
            for name in right:
                rows[name]["peak memory"] = memory.in_fresh_process(case.title, name, case.quick, threads)
    finally:
        torch.set_num_threads(before)
    skipped = [{"contestant": n, "status": "skipped", "reason": why} for n, why in work.skipped.items()]
    return {
        "level": case.level,
        "case": case.name,
        "threads": threads,
        "yardstick": yardstick,
        "bytes": work.size,
        "other load in cores": other,
        "results": [*rows.values(), *skipped],
    }
