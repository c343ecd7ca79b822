"""One run of the suite: measures what the file of figures lacks."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import RESULTS
from bench.harness import core
from bench.harness.store import Store, commit

QUICK_BUDGET = 3.0  # seconds of timing for a case and thread count


class Session:
    """Records of cases: taken from the file if it holds them for this commit, else measured now and written into it."""

    def __init__(self, quick: bool, fresh: bool = False, path: Path | None = None) -> None:
        self.quick, self._at = quick, commit()
        self.store = Store(path or RESULTS / ("quick.json" if quick else "bench.json"))
        self.store.begin(fresh)
        self._held: tuple[str, core.Work] | None = None

    def record(self, case: core.Case, threads: int) -> dict[str, Any]:
        """The figures of a case; its inputs are kept until the next case."""

        def measure() -> dict[str, Any]:
            if self._held is None or self._held[0] != case.title:
                self._held = None
                gc.collect()
                self._held = case.title, case.make(False)
            return core.measure(case, self._held[1], threads, QUICK_BUDGET if self.quick else case.budget)

        return self.keep(f"{case.title}, threads: {threads}", measure)

    def keep(self, key: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The record of this key: from the file if it holds one for this commit, else made now and written into it."""
        if not self.store.has(key, self._at):
            self.store.put(key, make(), self._at)
        return self.store.records[key]
