"""What a case is, and how it is checked and timed.

The answer of every implementation is checked first; a wrong one is reported with its error and without a speed. Then the
implementations are timed in interleaved rounds, so that whatever else the machine does slows all of them alike. A ratio
compares two times of the same round, and the figure is the median of the ratios, with the quartiles beside it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.harness import memory
from bench.harness.clock import SLOW, Clock, OtherLoad, interleaved, quartiles, timed, wall
from bench.harness.store import Record, Store

# What a baseline raises where it cannot do a piece of work. The table reports it, and the others are measured.
ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, IndexError, KeyError, ImportError)
QUICK = 3.0  # seconds of timing for a case of `--quick`


@dataclass(frozen=True)
class Implementation:
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
    brief: Callable[[Any], Any] | None = None  # what the peak memory is taken of, if not of `run`


@dataclass
class Work:
    """Inputs, together larger than every cache and used one after the other, and implementations: first the baseline."""

    inputs: list[Any]
    implementations: list[Implementation]
    skipped: dict[str, str] = field(default_factory=dict)  # name -> why it is not here
    size: int = 0  # bytes of J and x, for GB/s
    clock: Clock = wall


@dataclass(frozen=True)
class Case:
    """A piece of work. `level` and `name` say where its figures go.

    `make(tiny)` builds inputs and implementations to be checked and timed. With `tiny` the inputs are next to nothing and the
    implementations the same: for the tests, to warm up, to know the names. A case without it has `figures()` of its own.
    """

    level: str
    name: str
    make: Callable[[bool], Work] | None = None
    figures: Callable[[], Record] | None = None
    threads: tuple[int | None, ...] = (None,)  # the numbers of threads to measure with; None: all
    budget: float = 12.0  # seconds of timing, about, at each number of threads
    memory: bool = False  # also the peak memory of every implementation, in a fresh process
    missing: str = ""  # why it cannot be measured here

    @property
    def title(self) -> str:
        """What `--only` looks into."""
        return f"{self.level}: {self.name}"

    def records(self, store: Store) -> Iterator[Record]:
        """A record for each number of threads, measured if the store has none."""
        every = torch.get_num_threads()
        for threads in dict.fromkeys(count or every for count in self.threads):
            torch.set_num_threads(threads)
            try:
                yield store.keep(f"{self.title}, threads: {threads}", self.record)
            finally:
                torch.set_num_threads(every)

    def record(self) -> Record:
        """Measured now, with as many threads as torch has."""
        figures = self.figures() if self.figures else measure(self, self.make(False))
        return {"level": self.level, "case": self.name, "threads": torch.get_num_threads(), **figures}


def peak(make: Callable[[bool], Work], name: str) -> int:
    """Bytes that an implementation takes, by the second of two runs: the first, on tiny inputs, takes what imports take."""
    for tiny in (True, False):
        work = make(tiny)
        one = next(one for one in work.implementations if one.name == name)
        taken = memory.growth(lambda one=one, work=work: (one.brief or one.run)(work.inputs[0]))
    return taken


def measure(case: Case, work: Work) -> Record:
    """Checks and times every implementation of `work`."""
    rows: dict[str, Record] = {}
    first: dict[str, float] = {}
    load = OtherLoad()
    for one in work.implementations:
        row = rows[one.name] = {"implementation": one.name, **({"what": one.what} if one.what else {})}
        try:
            seconds, result = timed(one.run, work.inputs[0])
            row["error"] = error = one.check(result)
        except ERRORS as failure:
            row |= {"status": "failed", "reason": f"{type(failure).__name__}: {failure}".splitlines()[0][:200]}
            continue
        first[one.name] = 0.0 if one.compiles else seconds
        if one.facts:
            row |= one.facts(result)
        row["status"] = "right" if error <= one.limit else "wrong"
        del result
    right = {one.name: one.run for one in work.implementations if rows[one.name]["status"] == "right"}
    short = {name: run for name, run in right.items() if first[name] <= SLOW}
    times = {name: [first[name]] for name in right if name not in short}
    times |= interleaved(short, work.inputs, case.budget, clock=work.clock)
    baseline = work.implementations[0].name
    for name, seconds in times.items():
        rows[name] |= {"seconds": quartiles(seconds), "rounds": [float(f"{second:.4g}") for second in seconds]}
        if baseline in times:
            rows[name]["ratio"] = quartiles([a / b for a, b in zip(seconds, times[baseline], strict=False)])
    other = load.cores()
    if case.memory:
        for name in right:
            rows[name]["peak memory"] = memory.in_fresh_process(peak, case.make, name)
    skipped = [{"implementation": n, "status": "skipped", "reason": why} for n, why in work.skipped.items()]
    return {
        "baseline": baseline,
        "bytes": work.size,
        "other load in cores": other,
        "results": [*rows.values(), *skipped],
    }
