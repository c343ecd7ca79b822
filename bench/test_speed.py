"""The suite under pytest-benchmark, which stores runs and compares them: `pytest bench --quick --benchmark-autosave`.

The implementations of a case are timed in interleaved rounds, once, as in `python -m bench`; every test then plays the seconds
of one of them back to pytest-benchmark. A wrong answer fails the test if it is fastsal's, and is expected of others.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from bench import RESULTS, cases
from bench.harness.case import Case
from bench.harness.store import Store


class Playback:
    """A clock that moves only when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: Iterator[float]) -> None:
        self.now += next(seconds)


CLOCK = Playback()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Case, place among its numbers of threads, and implementation."""
    found = [
        pytest.param(case, place, name, id=f"{case.title}, threads: {threads or 'all'}, {name}")
        for case in cases.every(quick=metafunc.config.getoption("--quick"))
        for work in [case.make(True)]
        for place, threads in enumerate(case.threads)
        for name in (*(one.name for one in work.implementations), *work.skipped)
    ]
    metafunc.parametrize(("case", "place", "name"), found)


@pytest.fixture(scope="session")
def store(request: pytest.FixtureRequest) -> Store:
    """The figures, kept in bench/results/ like those of `python -m bench`."""
    return Store(RESULTS / ("quick.json" if request.config.getoption("--quick") else "bench.json")).begin()


@pytest.mark.benchmark(timer=CLOCK)
def test_speed(benchmark: Any, store: Store, case: Case, place: int, name: str) -> None:
    record = list(case.records(store))[place]
    row = next(row for row in record["results"] if row["implementation"] == name)
    if row["status"] == "skipped":
        pytest.skip(row["reason"])
    if row["status"] != "right":
        (pytest.fail if name.startswith("fastsal") else pytest.xfail)(f"{row['status']}: {row}")
    benchmark.group = f"{case.title}, threads: {record['threads']}"
    benchmark.extra_info.update({key: value for key, value in row.items() if key not in ("seconds", "rounds")})
    benchmark.pedantic(CLOCK.advance, args=(iter(row["rounds"]),), rounds=len(row["rounds"]))
