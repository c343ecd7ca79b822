"""The suite under pytest-benchmark, which stores runs and compares them: `pytest bench --quick --benchmark-autosave`.

The contestants of a case take turns, once, as in `python -m bench`; every test then plays its contestant's seconds back to
pytest-benchmark. A wrong answer fails the test if it is fastsal's, and is expected of others.
"""

from collections.abc import Iterator
from typing import Any

import pytest

from bench import cases
from bench.harness import core
from bench.harness.session import Session


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
    """Case, threads and contestant."""
    found = [
        pytest.param(case, threads, name, id=f"{case.title}, threads: {threads}, {name}")
        for case in cases.every(metafunc.config.getoption("--quick"))
        for work in [case.make(True)]
        for threads in core.thread_counts(case)
        for name in (*(contestant.name for contestant in work.contestants), *work.skipped)
    ]
    metafunc.parametrize(("case", "threads", "name"), found)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Session:
    """The figures, kept in bench/results/ like those of `python -m bench`."""
    return Session(request.config.getoption("--quick"))


@pytest.mark.benchmark(timer=CLOCK)
def test_speed(benchmark: Any, session: Session, case: core.Case, threads: int, name: str) -> None:
    row = next(row for row in session.record(case, threads)["results"] if row["contestant"] == name)
    if row["status"] == "skipped":
        pytest.skip(row["reason"])
    if row["status"] != "right":
        (pytest.fail if name.startswith("fastsal") else pytest.xfail)(f"{row['status']}: {row}")
    benchmark.group = f"{case.title}, threads: {threads}"
    benchmark.extra_info.update({key: value for key, value in row.items() if key not in ("seconds", "rounds")})
    benchmark.pedantic(CLOCK.advance, args=(iter(row["rounds"]),), rounds=len(row["rounds"]))
